// Package servers starts the real programs that tests and benchmarks compare with or take images from: Debian's dockerd,
// containerd and docker-registry, each with all its state below a directory of the caller's and reachable over a socket
// or a loopback port of its own. Nothing of the machine's own docker is touched.
//
//	d, err := servers.StartDockerd(ctx, dir)
//	defer d.Stop()
//	out, err := d.Docker(ctx, "run", "--rm", "--network", "none", "busybox", "true").Output()
package servers

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// startTimeout bounds how long a server may take to say that it is ready; machines without much to spare take long.
const startTimeout = 2 * time.Minute

// process is a started server.
type process struct {
	cmd  *exec.Cmd
	name string
	dir  string
	log  string // path
	done chan struct{}
	err  error // set before done is closed

	stop sync.Once
}

// start runs cmd with its output in dir/NAME.log. ready is called until it returns nil or a failure; the process' own
// end ends the wait, too.
func start(ctx context.Context, dir string, cmd *exec.Cmd, ready func(context.Context, *process) error) (_ *process, err error) {
	name := filepath.Base(cmd.Path)
	logFile, err := os.Create(filepath.Join(dir, name+".log"))
	if err != nil {
		return nil, err
	}
	defer logFile.Close()
	if cmd.Stdout == nil {
		cmd.Stdout = logFile
	}
	if cmd.Stderr == nil {
		cmd.Stderr = logFile
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w (hack/deps test)", name, err)
	}
	p := &process{cmd: cmd, name: name, dir: dir, log: logFile.Name(), done: make(chan struct{})}
	go func() {
		p.err = cmd.Wait()
		close(p.done)
	}()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	ctx, ended := context.WithCancelCause(ctx)
	stopWatch := make(chan struct{})
	defer close(stopWatch)
	go func() {
		select {
		case <-p.done:
			ended(fmt.Errorf("%s ended while starting: %w", name, p.err))
		case <-stopWatch:
		}
	}()
	if err := ready(ctx, p); err != nil {
		err = fmt.Errorf("start %s: %w\n%s", name, errors.Join(err, context.Cause(ctx)), p.Log())
		p.Stop()
		return nil, err
	}
	return p, nil
}

// Log returns the last part of what the server has written.
func (p *process) Log() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	if n := len(b) - 4<<10; n > 0 {
		b = b[n:]
	}
	return string(bytes.TrimSpace(b))
}

// Ended is closed when the server has ended.
func (p *process) Ended() <-chan struct{} { return p.done }

// Pid returns the server's process ID.
func (p *process) Pid() int { return p.cmd.Process.Pid }

// Stop ends the server and waits for its end; it may be called twice. What it has mounted below its directory is unmounted.
func (p *process) Stop() {
	p.stop.Do(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(20 * time.Second):
		}
		// Whatever is left of its group goes with it.
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		<-p.done
		unmountBelow(p.dir)
	})
}

func unmountBelow(dir string) {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return
	}
	lines := strings.Split(string(b), "\n")
	slices.Reverse(lines) // the last mounted goes first
	for _, line := range lines {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], dir+"/") {
			_ = unix.Unmount(f[1], unix.MNT_DETACH)
		}
	}
}

// notified makes cmd say over systemd's protocol when it is ready, and returns the wait for that.
func notified(dir string, cmd *exec.Cmd) (func(context.Context, *process) error, error) {
	path := filepath.Join(dir, "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	cmd.Env = append(cmd.Environ(), "NOTIFY_SOCKET="+path)
	return func(ctx context.Context, _ *process) error {
		defer conn.Close()
		defer context.AfterFunc(ctx, func() { conn.Close() })()
		buf := make([]byte, 4096)
		for {
			n, err := conn.Read(buf)
			if err != nil {
				return fmt.Errorf("wait until it is ready: %w", err)
			}
			if slices.Contains(strings.Split(string(buf[:n]), "\n"), "READY=1") {
				return nil
			}
		}
	}, nil
}

// Dockerd is a running Docker daemon without networks.
type Dockerd struct {
	*process
	Host string // as for DOCKER_HOST
	dir  string
}

// StartDockerd starts a daemon with an empty store below dir, which must not be deep: a socket's path has 107 bytes.
func StartDockerd(ctx context.Context, dir string) (*Dockerd, error) {
	return startDockerd(ctx, dir, "--bridge", "none", "--iptables=false", "--ip-forward=false", "--ip-masq=false")
}

// StartDockerdWithNetworks starts one with docker's own bridge and its iptables rules. The caller must be in a network
// namespace made for it, or the machine's network is changed.
func StartDockerdWithNetworks(ctx context.Context, dir string) (*Dockerd, error) {
	return startDockerd(ctx, dir)
}

func startDockerd(ctx context.Context, dir string, networks ...string) (*Dockerd, error) {
	socket := filepath.Join(dir, "docker.sock")
	cmd := exec.Command("dockerd", append([]string{"--host", "unix://" + socket, "--group", "root",
		"--data-root", filepath.Join(dir, "data"), "--exec-root", filepath.Join(dir, "exec"), "--pidfile", filepath.Join(dir, "pid"),
		"--storage-driver", "overlay2", "--config-file", filepath.Join(dir, "daemon.json")}, networks...)...)
	if err := os.WriteFile(filepath.Join(dir, "daemon.json"), []byte("{}\n"), 0o600); err != nil {
		return nil, err
	}
	ready, err := notified(dir, cmd)
	if err != nil {
		return nil, err
	}
	p, err := start(ctx, dir, cmd, ready)
	if err != nil {
		return nil, err
	}
	return &Dockerd{process: p, Host: "unix://" + socket, dir: dir}, nil
}

// Docker is the docker client speaking to the daemon.
func (d *Dockerd) Docker(ctx context.Context, args ...string) *exec.Cmd {
	return Client(ctx, d.Host, args...)
}

// Client is the docker client speaking to host, without the configuration of the user who runs the tests.
func Client(ctx context.Context, host string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+host, "DOCKER_CONFIG=/nonexistent", "DOCKER_CONTEXT=")
	return cmd
}

// Containerd is a running containerd.
type Containerd struct {
	*process
	Socket string
}

// StartContainerd starts a containerd with an empty store below dir.
func StartContainerd(ctx context.Context, dir string) (*Containerd, error) {
	socket := filepath.Join(dir, "c.sock")
	config := filepath.Join(dir, "config.toml")
	text := fmt.Sprintf("version = 2\nroot = %q\nstate = %q\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = %q\n",
		filepath.Join(dir, "root"), filepath.Join(dir, "state"), socket)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command("containerd", "--config", config)
	ready, err := notified(dir, cmd)
	if err != nil {
		return nil, err
	}
	p, err := start(ctx, dir, cmd, ready)
	if err != nil {
		return nil, err
	}
	return &Containerd{process: p, Socket: socket}, nil
}

// Ctr is containerd's own client, in the namespace "default".
func (c *Containerd) Ctr(ctx context.Context, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ctr", append([]string{"--address", c.Socket}, args...)...)
}

// Registry is a running docker-registry without TLS and without users.
type Registry struct {
	*process
	Addr string // "127.0.0.1:PORT"
}

// StartRegistry starts an empty registry below dir.
func StartRegistry(ctx context.Context, dir string) (*Registry, error) {
	config := filepath.Join(dir, "registry.yml")
	text := fmt.Sprintf("version: 0.1\nlog: {level: info, formatter: text}\nstorage: {filesystem: {rootdirectory: %q}}\nhttp: {addr: \"127.0.0.1:0\", net: tcp}\n",
		filepath.Join(dir, "registry"))
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	cmd := exec.Command("docker-registry", "serve", config)
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	cmd.Stdout, cmd.Stderr = w, w
	addr := make(chan string, 1)
	got := ""
	logPath := filepath.Join(dir, "docker-registry.log")
	p, err := start(ctx, dir, cmd, func(ctx context.Context, _ *process) error {
		go follow(r, logPath, addr)
		select {
		case a, ok := <-addr:
			if !ok {
				return errors.New("it does not say where it listens")
			}
			got = a
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	})
	if err != nil {
		r.Close()
		return nil, err
	}
	return &Registry{process: p, Addr: got}, nil
}

// follow copies a registry's log to a file until its end and sends the address it announces.
func follow(r io.ReadCloser, path string, addr chan<- string) {
	defer r.Close()
	defer close(addr)
	log, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return
	}
	defer log.Close()
	s := bufio.NewScanner(r)
	s.Buffer(nil, 1<<20)
	sent := false
	for s.Scan() {
		fmt.Fprintln(log, s.Text())
		if _, rest, ok := strings.Cut(s.Text(), "listening on "); ok && !sent {
			if end := strings.IndexAny(rest, "\", "); end >= 0 {
				rest = rest[:end]
			}
			addr <- rest
			sent = true
		}
	}
}
