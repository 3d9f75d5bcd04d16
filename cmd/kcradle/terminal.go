package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi/client"
	"github.com/kcradle/kcradle/spec"
)

// startReport is what a supervisor tells the kcradle that started it, once, as a line of JSON.
type startReport struct {
	Code     int    `json:"code,omitempty"` // with an error: the exit code
	Error    string `json:"error,omitempty"`
	Detached bool   `json:"detached,omitempty"` // the user left the terminal
}

// tell reports the start; only the first report counts. A terminal's parent only wants to know of the detach keys: it
// waits for the end itself.
func (s *supervisor) tell(r startReport) {
	if s.report == nil || s.opts.Terminal && !r.Detached {
		return
	}
	b, err := json.Marshal(r)
	if err == nil {
		_, err = s.report.Write(append(b, '\n'))
	}
	if err != nil {
		s.log.Debug("nobody waits for the start any more", "error", err)
	}
	s.report.Close()
	s.report = nil
}

// errDetached ends the copying of stdin when the detach keys were typed.
var errDetached = errors.New("detached")

// stdin passes our standard input to the first container.
func (s *supervisor) stdin(ctx context.Context) {
	c := s.guestClient()
	if s.opts.Terminal {
		s.resize(ctx)
	}
	conn, err := c.Hijack(ctx, "/containers/"+s.pod.Containers[0].ID+"/attach", url.Values{"stream": {"1"}, "stdin": {"1"}}, nil)
	if err != nil {
		if ctx.Err() == nil {
			s.log.Warn("the container gets no standard input", "error", err)
		}
		return
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	in := s.app.Stdin
	if s.pod.Containers[0].TTY {
		keys, err := detachKeys(s.opts.DetachKeys)
		if err != nil {
			s.log.Warn("no detach keys", "error", err)
		}
		in = &keyReader{r: in, keys: keys}
	}
	_, err = io.Copy(conn, in)
	if errors.Is(err, errDetached) {
		s.send(detachAsk{})
		return // without closing the container's input
	}
	if err == nil {
		err = conn.CloseWrite()
	}
	if err != nil {
		s.log.Debug("standard input", "error", err)
		return
	}
	<-ctx.Done() // closing the connection before the container has read would take the rest away
}

// guestClient speaks to vdocker without the socket in between.
func (s *supervisor) guestClient() client.Client {
	return client.Client{Dial: func(ctx context.Context) (net.Conn, error) { return s.machine.Dial(ctx, spec.PortVdocker) }}
}

// resize tells the container the size of our terminal.
func (s *supervisor) resize(ctx context.Context) {
	f, ok := s.app.Stdin.(*os.File)
	if !ok {
		return
	}
	width, height, err := term.GetSize(int(f.Fd()))
	if err == nil {
		err = resizeTo(ctx, s.guestClient(), "/containers/"+s.pod.Containers[0].ID+"/resize", width, height)
	}
	if err != nil {
		s.log.Debug("resize", "error", err)
	}
}

func resizeTo(ctx context.Context, c client.Client, path string, width, height int) error {
	return c.Do(ctx, "POST", path, url.Values{"w": {strconv.Itoa(width)}, "h": {strconv.Itoa(height)}}, nil, nil)
}

// letGoOfTerminal turns a supervisor with a terminal into a detached one.
func (s *supervisor) letGoOfTerminal() {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		s.log.Warn("keep the terminal", "error", err)
		return
	}
	defer null.Close()
	for fd := range 3 {
		if err := unix.Dup3(int(null.Fd()), fd, 0); err != nil {
			s.log.Warn("keep the terminal", "error", err)
		}
	}
}

// keyReader passes input on until the detach keys come in a row; then it returns errDetached. Keys that begin the
// sequence are held back until it is clear that they do not.
type keyReader struct {
	r    io.Reader
	keys []byte
	held int    // how many of keys were read
	rest []byte // to be passed on
	err  error
}

func (k *keyReader) Read(b []byte) (int, error) {
	for len(k.rest) == 0 {
		if k.err != nil {
			return 0, k.err
		}
		buf := make([]byte, len(b))
		n, err := k.r.Read(buf)
		k.err = err
		for _, c := range buf[:n] {
			if k.held < len(k.keys) && c == k.keys[k.held] {
				if k.held++; k.held == len(k.keys) {
					k.err = errDetached
					break
				}
				continue
			}
			if k.held > 0 {
				k.rest = append(k.rest, k.keys[:k.held]...)
				k.held = 0
				if len(k.keys) > 0 && c == k.keys[0] {
					k.held = 1
					continue
				}
			}
			k.rest = append(k.rest, c)
		}
		if k.err != nil && !errors.Is(k.err, errDetached) {
			k.rest = append(k.rest, k.keys[:k.held]...)
			k.held = 0
		}
	}
	n := copy(b, k.rest)
	k.rest = k.rest[n:]
	return n, nil
}

// detachKeys reads docker's notation: letters, or ctrl- and a letter or one of @[\]^_, with commas between.
func detachKeys(s string) ([]byte, error) {
	if s == "" {
		return nil, nil
	}
	var out []byte
	for _, k := range strings.Split(s, ",") {
		if name, ok := strings.CutPrefix(strings.ToLower(k), "ctrl-"); ok && len(name) == 1 {
			c := name[0]
			if c >= 'a' && c <= 'z' || strings.IndexByte("@[\\]^_", c) >= 0 {
				out = append(out, c&0x1f)
				continue
			}
		}
		if len(k) != 1 {
			return nil, fmt.Errorf("invalid detach keys (%s) provided", s)
		}
		out = append(out, k[0])
	}
	return out, nil
}

// spawn starts this program again as the supervisor of a bundle, in a session of its own.
func spawn(a *app, o runOptions, report *os.File, stdio [3]*os.File, terminal bool) (*exec.Cmd, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	args := []string{"--root", a.Root, "--log-level", logLevel(a.Log), "run", "--supervise-fd", "3"}
	if terminal {
		args = append(args, "--supervise-terminal")
	}
	for flag, set := range map[string]bool{"--interactive": o.Interactive, "--tty": o.TTY, "--linger": o.Linger, "--hold": o.Hold, "--no-template": o.NoTemplate} {
		if set {
			args = append(args, flag)
		}
	}
	for flag, values := range map[string][]string{
		"--publish": o.Publish, "--ip": o.IPs, "--gateway": o.Gateways, "--detach-keys": {o.DetachKeys},
	} {
		for _, v := range values {
			if v != "" {
				args = append(args, flag+"="+v)
			}
		}
	}
	args = append(args, o.machineArgs()...)
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(self, append(args, "--", dir)...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdio[0], stdio[1], stdio[2]
	cmd.ExtraFiles = []*os.File{report}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start the supervisor: %w", err)
	}
	return cmd, nil
}

// detach starts the supervisor in the background and says where the bundle is once the container has started.
func detach(ctx context.Context, a *app, b *bundle.Bundle, o runOptions) (int, error) {
	code, err := background(ctx, a, b, o)
	if err != nil || code != 0 {
		return code, err
	}
	_, err = fmt.Fprintln(a.Stdout, b.Dir)
	return 0, err
}

// background starts a supervisor that outlives this process and waits until the container has started, or with Hold could be.
// It returns the exit code of a container that could not.
func background(ctx context.Context, a *app, b *bundle.Bundle, o runOptions) (int, error) {
	if pid, running := b.Running(); running { // before its log is begun anew
		return exitOwnFailure, fmt.Errorf("bundle %s %w (pid %d)", b.Dir, bundle.ErrRunning, pid)
	}
	if err := os.MkdirAll(b.RunDir(), 0o700); err != nil {
		return exitOwnFailure, err
	}
	log, err := os.OpenFile(filepath.Join(b.RunDir(), "supervisor.log"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return exitOwnFailure, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return exitOwnFailure, err
	}
	defer null.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return exitOwnFailure, err
	}
	defer r.Close()
	cmd, err := spawn(a, o, w, [3]*os.File{null, log, log}, false)
	w.Close()
	if err != nil {
		return exitOwnFailure, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }() // for a parent that lives on: nobody else would take its exit code
	// Until it has started, it is ours to stop.
	stop := context.AfterFunc(ctx, func() { cmd.Process.Signal(unix.SIGTERM) })
	defer stop()
	var report startReport
	if err := json.NewDecoder(r).Decode(&report); err != nil {
		return exitOwnFailure, fmt.Errorf("the supervisor ended before the container had started (%v); see %s", <-ended, log.Name())
	}
	if report.Error != "" || report.Code != 0 {
		<-ended // its exit code is in the report
		if report.Error == "" {
			return report.Code, nil
		}
		return report.Code, errors.New(report.Error)
	}
	return 0, nil
}

// superviseTerminal runs the supervisor in a session of its own, on our terminal, so that the user can leave it with
// the detach keys. This process keeps the terminal's mode and passes signals on.
func superviseTerminal(ctx context.Context, a *app, b *bundle.Bundle, o runOptions) (int, error) {
	in, ok := a.Stdin.(*os.File)
	out, ok2 := a.Stdout.(*os.File)
	errs, ok3 := a.Stderr.(*os.File)
	if !ok || !ok2 || !ok3 {
		return exitOwnFailure, errors.New("a terminal needs files")
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	r, w, err := os.Pipe()
	if err != nil {
		return exitOwnFailure, err
	}
	defer r.Close()
	restore, err := rawTerminal(in)
	if err != nil {
		return exitOwnFailure, err
	}
	defer restore()
	cmd, err := spawn(a, o, w, [3]*os.File{in, out, errs}, true)
	w.Close()
	if err != nil {
		return exitOwnFailure, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	left := make(chan bool, 1)
	go func() {
		var report startReport
		left <- json.NewDecoder(r).Decode(&report) == nil && report.Detached
	}()
	for {
		select {
		case sig := <-signals:
			if sig == unix.SIGHUP { // the terminal is gone; the container lives on, as with docker
				return 129, nil
			}
			cmd.Process.Signal(sig)
		case detached := <-left:
			if detached {
				restore()
				fmt.Fprintf(a.Stderr, "\ndetached; kcradle attach %s comes back\n", b.Dir)
				return 0, nil
			}
			left = nil
		case err := <-ended:
			var exit *exec.ExitError
			if errors.As(err, &exit) {
				if exit.ExitCode() < 0 {
					return 137, fmt.Errorf("the supervisor was lost: %w", err)
				}
				return exit.ExitCode(), nil
			}
			return 0, err
		}
	}
}

// rawTerminal gives every key to the container. The returned function may be called twice.
func rawTerminal(f *os.File) (restore func(), err error) {
	if !term.IsTerminal(int(f.Fd())) {
		return func() {}, nil
	}
	old, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("terminal: %w", err)
	}
	return func() { term.Restore(int(f.Fd()), old) }, nil
}
