package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/coreos/go-systemd/v22/activation"
	sd "github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/daemon"
	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/image"
)

// daemonOptions are the flags of daemon, named as dockerd names them.
type daemonOptions struct {
	Hosts                      []string
	Group                      string
	Insecure                   []string
	Pidfile                    string
	HostGateway                []net.IP
	MetricsAddr                string
	TLSVerify                  bool
	TLSCACert, TLSCert, TLSKey string
}

func newDaemon(a *app) *cobra.Command {
	var o daemonOptions
	cmd := &cobra.Command{
		Use:   "daemon [flags]",
		Short: "Offer the Docker Engine API of this host: every container in a machine of its own",
		Long: `daemon serves the Docker Engine API. Containers that it makes are bundles below the state directory, each with a
supervisor of its own that outlives the daemon: a daemon that ends, or is killed, is started again and takes up what runs.

-H is unix://PATH (default: /run/kcradle/docker.sock, or $XDG_RUNTIME_DIR/kcradle/docker.sock for a user), fd:// for
sockets that systemd has opened, or tcp://ADDRESS:PORT, which is served with TLS and to clients with a certificate of
--tlscacert alone. It may be given several times.`,
		Example: `  kcradle daemon
  docker context create cradle --docker host=unix:///run/kcradle/docker.sock
  docker --context cradle run --rm -it debian bash
  kcradle daemon -H unix:///run/kcradle/docker.sock -H tcp://0.0.0.0:2376 --tlsverify --tlscacert ca.pem --tlscert cert.pem --tlskey key.pem`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return serveDaemon(cmd.Context(), a, o) },
	}
	f := cmd.Flags()
	f.StringArrayVarP(&o.Hosts, "host", "H", nil, "where to serve: unix://PATH, fd:// or tcp://ADDRESS:PORT")
	f.StringVarP(&o.Group, "group", "G", "", "group that may use the unix socket, beside its owner")
	f.StringArrayVar(&o.Insecure, "insecure-registry", nil, "registry (`HOST[:PORT]`, or a network) that may be spoken to without TLS, beside those of $KCRADLE_PLAIN_HTTP")
	f.IPSliceVar(&o.HostGateway, "host-gateway-ip", nil, "what host-gateway stands for in --add-host (default: the gateway of a container's network)")
	f.StringVarP(&o.Pidfile, "pidfile", "p", "", "write the process ID to a file")
	f.StringVar(&o.MetricsAddr, "metrics-addr", "", "serve metrics for Prometheus at /metrics of `ADDRESS`: a port of the loopback (127.0.0.1:9323), or unix://PATH")
	f.BoolVar(&o.TLSVerify, "tlsverify", false, "demand a certificate of clients; tcp is never served without")
	f.StringVar(&o.TLSCACert, "tlscacert", "", "certificates that client certificates must be signed by")
	f.StringVar(&o.TLSCert, "tlscert", "", "certificate of this server")
	f.StringVar(&o.TLSKey, "tlskey", "", "its key")
	return cmd
}

func serveDaemon(ctx context.Context, a *app, o daemonOptions) error {
	store, err := image.Open(a.Root, a.Log)
	if err != nil {
		return err
	}
	if len(o.Hosts) == 0 {
		o.Hosts = []string{"unix://" + defaultSocket()}
	}
	// First the sockets: a second daemon is told so before it touches anything.
	var listeners []net.Listener
	defer func() {
		for _, l := range listeners {
			l.Close()
		}
	}()
	for _, h := range o.Hosts {
		ls, err := listenOn(h, o)
		if err != nil {
			return err
		}
		listeners = append(listeners, ls...)
	}
	var metrics net.Listener
	if o.MetricsAddr != "" {
		if metrics, err = listenMetrics(o.MetricsAddr); err != nil {
			return err
		}
		listeners = append(listeners, metrics)
	}
	d, err := daemon.Open(ctx, daemon.Config{
		Root: a.Root, Store: store, Packages: packagesDir(), Version: buildInfo().Version, Log: a.Log,
		PlainHTTP: withPlainHTTP(o.Insecure), HostGateway: o.HostGateway,
		Launch: func(ctx context.Context, dir string, l daemon.LaunchOptions) error {
			b, err := bundle.Open(dir)
			if err != nil {
				return err
			}
			_, err = background(ctx, a, b, runOptions{Dir: dir, Detach: true, Hold: true, Network: l.Network})
			return err
		},
	})
	if err != nil {
		return err
	}
	if o.Pidfile != "" {
		if err := os.WriteFile(o.Pidfile, []byte(strconv.Itoa(os.Getpid())+"\n"), 0o644); err != nil {
			return errors.Join(err, d.Close())
		}
		defer os.Remove(o.Pidfile)
	}
	if _, err := sd.SdNotify(false, sd.SdNotifyReady); err != nil {
		a.Log.Warn("systemd does not hear that the daemon is ready", "error", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	errs := make(chan error, len(listeners))
	for _, l := range listeners {
		serve := d.Serve
		if l == metrics {
			serve = func(ctx context.Context, l net.Listener) error { return serveMetrics(ctx, a, d, l) }
		}
		wg.Go(func() {
			if err := serve(ctx, l); err != nil {
				errs <- err
				cancel()
			}
		})
	}
	wg.Wait()
	close(errs)
	err = <-errs // nil when there was none
	return errors.Join(err, d.Close())
}

// defaultSocket is where the daemon of this user serves.
func defaultSocket() string {
	if os.Geteuid() == 0 {
		return "/run/kcradle/docker.sock"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); filepath.IsAbs(dir) {
		return filepath.Join(dir, "kcradle/docker.sock")
	}
	return filepath.Join(defaultRoot(), "docker.sock")
}

func listenOn(host string, o daemonOptions) ([]net.Listener, error) {
	scheme, rest, ok := strings.Cut(host, "://")
	if !ok {
		return nil, usageError{fmt.Errorf("invalid argument %q for \"--host\" flag: want unix://PATH, fd:// or tcp://ADDRESS:PORT", host)}
	}
	switch scheme {
	case "unix":
		l, err := listenUnix(rest, o.Group)
		if err != nil {
			return nil, err
		}
		return []net.Listener{l}, nil
	case "fd":
		ls, err := activation.Listeners()
		if err == nil && len(ls) == 0 {
			err = errors.New("systemd has given no socket")
		}
		if err != nil {
			return nil, fmt.Errorf("listen on %s: %w", host, err)
		}
		return ls, nil
	case "tcp":
		c, err := o.tlsConfig()
		if err != nil {
			return nil, fmt.Errorf("listen on %s: %w", host, err)
		}
		l, err := tls.Listen("tcp", rest, c)
		if err != nil {
			return nil, err
		}
		return []net.Listener{l}, nil
	}
	return nil, usageError{fmt.Errorf("invalid argument %q for \"--host\" flag: want unix://PATH, fd:// or tcp://ADDRESS:PORT", host)}
}

// listenMetrics listens where metrics are to be served. They tell of every container, to whoever asks: not to a network.
func listenMetrics(addr string) (net.Listener, error) {
	if path, ok := strings.CutPrefix(addr, "unix://"); ok {
		return listenUnix(path, "")
	}
	host, _, err := net.SplitHostPort(addr)
	if ip, perr := netip.ParseAddr(host); err != nil || perr != nil || !ip.IsLoopback() {
		return nil, usageError{fmt.Errorf("invalid argument %q for \"--metrics-addr\" flag: want an address of the loopback with a port (127.0.0.1:9323), or unix://PATH", addr)}
	}
	return net.Listen("tcp", addr)
}

// maxScrapes bounds the connections to the metrics.
const maxScrapes = 16

func serveMetrics(ctx context.Context, a *app, d *daemon.Daemon, l net.Listener) error {
	srv := dockerapi.Server(d.Metrics(), a.Log)
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(dockerapi.Limit(l, maxScrapes)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}

// listenUnix listens on a path for the owner, and for a group if one is named. What nobody serves any more is in the way of
// nobody.
func listenUnix(path, group string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("listen on %s: somebody serves there already", path)
	} else if errors.Is(err, unix.ECONNREFUSED) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", path)
	unix.Umask(old)
	if err != nil {
		return nil, err
	}
	if group != "" {
		g, err := user.LookupGroup(group)
		if err == nil {
			var gid int
			if gid, err = strconv.Atoi(g.Gid); err == nil {
				err = errors.Join(os.Chown(path, -1, gid), os.Chmod(path, 0o660))
			}
		}
		if err != nil {
			l.Close()
			return nil, fmt.Errorf("give %s to the group: %w", path, err)
		}
	}
	return l, nil
}

// tlsConfig demands certificates of both sides.
func (o daemonOptions) tlsConfig() (*tls.Config, error) {
	if !o.TLSVerify || o.TLSCACert == "" || o.TLSCert == "" || o.TLSKey == "" {
		return nil, errors.New("tcp is served with --tlsverify, --tlscacert, --tlscert and --tlskey alone: who reaches the socket is root on this host")
	}
	cert, err := tls.LoadX509KeyPair(o.TLSCert, o.TLSKey)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(o.TLSCACert)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: no certificate in it", o.TLSCACert)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12}, nil
}
