package pod

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/guest/container"
	"github.com/kcradle/kcradle/guest/reap"
	"github.com/kcradle/kcradle/guest/sandboxtest"
	"github.com/kcradle/kcradle/spec"
)

func TestMain(m *testing.M) { sandboxtest.Inside(m) }

const layerID = "sha256:1111111111111111111111111111111111111111111111111111111111111111"

// testHost keeps what the host was told, as lines.
type testHost struct {
	mu     sync.Mutex
	lines  []string
	output strings.Builder
}

func (h *testHost) Output(o spec.Output) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.output.Write(o.Bytes)
	h.lines = append(h.lines, "output "+string(o.Bytes))
	return nil
}

func (h *testHost) State(s spec.State) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.lines = append(h.lines, "state "+s.Container+" "+s.Status)
	return nil
}

type fixture struct {
	*Pod
	host *testHost
	cfg  Config
}

// newPod makes a pod of busybox containers, with a goroutine and descriptor count around it.
func newPod(t *testing.T, containers []spec.Container, change func(*Config)) *fixture {
	t.Helper()
	cgroup := sandboxtest.Cgroup(t)
	dir := t.TempDir()
	// The upper layer of an overlay may not lie on an overlay: a file system of our own.
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	f := &fixture{host: &testHost{}}
	doc := &spec.Pod{Version: spec.PodVersion, Name: "pod", Containers: containers}
	for i := range doc.Containers {
		c := &doc.Containers[i]
		c.ID = strings.Repeat(string("0123456789abcdef"[i]), 64)
		c.Image = spec.Image{ConfigID: layerID, Layers: []string{layerID}}
	}
	f.cfg = Config{
		Pod: doc, Placement: &spec.Placement{},
		Layers: map[string]string{layerID: sandboxtest.Busybox(t)}, Scratch: filepath.Join(dir, "scratch"),
		Run: filepath.Join(dir, "run"), Cgroup: cgroup, Host: f.host, Volumes: map[string]string{},
		Log: slog.New(slog.NewTextHandler(testWriter{t}, nil)),
	}
	if change != nil {
		change(&f.cfg)
	}
	for _, v := range doc.Volumes {
		f.cfg.Volumes[v.Name] = filepath.Join(dir, "volumes", v.Name)
		if err := os.MkdirAll(filepath.Join(f.cfg.Volumes[v.Name], "lost+found"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := doc.Validate(); err != nil {
		t.Fatal(err)
	}
	before := runtime.NumGoroutine()
	f.cfg.Reaper = reap.New()
	quit, reaped := make(chan struct{}), make(chan struct{})
	go func() { defer close(reaped); f.cfg.Reaper.Run(quit) }()
	p, err := New(f.cfg)
	if err != nil {
		t.Fatal(err)
	}
	f.Pod = p
	t.Cleanup(func() {
		zero := 0
		p.Stop(context.Background(), &zero)
		if err := p.Close(); err != nil {
			t.Error(err)
		}
		close(quit)
		<-reaped
		deadline := time.Now().Add(5 * time.Second)
		for runtime.NumGoroutine() > before {
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<20)
				t.Errorf("%d goroutines, %d before:\n%s", runtime.NumGoroutine(), before, buf[:runtime.Stack(buf, true)])
				break
			}
			time.Sleep(time.Millisecond)
		}
	})
	return f
}

type testWriter struct{ t *testing.T }

func (w testWriter) Write(b []byte) (int, error) { w.t.Logf("%s", b); return len(b), nil }

func sh(name, script string) spec.Container {
	return spec.Container{Name: name, Cmd: []string{"sh", "-c", script}}
}

// script is a container that obeys SIGTERM.
const forever = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.02; done"

func ctx(t testing.TB) context.Context {
	c, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return c
}

// status waits for a status.
func status(t testing.TB, c *Container, want string) spec.State {
	t.Helper()
	err := c.await(ctx(t), func() (bool, error) { return c.state.Status == want, nil })
	if err != nil {
		t.Fatalf("status %q: %v; state %+v", want, err, c.State())
	}
	return c.State()
}

// read reads chunks to the end.
func read(t testing.TB, next func(context.Context) (Chunk, error)) string {
	t.Helper()
	var b strings.Builder
	for {
		ch, err := next(ctx(t))
		if err == io.EOF {
			return b.String()
		}
		if err != nil {
			t.Fatalf("after %q: %v", b.String(), err)
		}
		b.Write(ch.Bytes)
	}
}

// until reads chunks until the text is there.
func until(t testing.TB, next func(context.Context) (Chunk, error), text string) {
	t.Helper()
	var b strings.Builder
	for !strings.Contains(b.String(), text) {
		ch, err := next(ctx(t))
		if err != nil {
			t.Fatalf("wait for %q: %v after %q", text, err, b.String())
		}
		b.Write(ch.Bytes)
	}
}

func TestOrderAndEnd(t *testing.T) {
	web := sh("web", "echo web")
	web.After = []spec.Dependency{{Container: "init", Condition: spec.ConditionCompleted}}
	f := newPod(t, []spec.Container{sh("init", "sleep 0.1; echo first"), web}, nil)
	f.Start(ctx(t))
	<-f.Done()
	for _, c := range f.Containers() {
		c.pump.finish()
	}
	f.pumps.Wait()
	want := []string{"state init created", "state web created", "state init running", "output first\n", "state init exited",
		"state web running", "output web\n", "state web exited"}
	got := slices.Clone(f.host.lines)
	slices.Sort(got[:2]) // each container has a pump of its own
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("what the host saw (-want +got):\n%s", d)
	}
}

func TestFailedDependency(t *testing.T) {
	web := sh("web", "echo web")
	web.After = []spec.Dependency{{Container: "init", Condition: spec.ConditionCompleted}}
	f := newPod(t, []spec.Container{sh("init", "exit 4"), web}, nil)
	f.Start(ctx(t))
	<-f.Done()
	if s := f.Containers()[1].State(); s.Status != spec.StatusCreated || s.ExitCode != 125 || !strings.Contains(s.Error, "dependency init did not complete successfully: exit 4") {
		t.Errorf("got %+v", s)
	}
}

func TestCriticalEnd(t *testing.T) {
	side := sh("side", forever)
	side.NonCritical = true
	f := newPod(t, []spec.Container{side, sh("main", "exit 0")}, nil)
	f.Start(ctx(t))
	<-f.Done()
	if s := f.Containers()[0].State().Status; s != spec.StatusRunning {
		t.Errorf("the container that is not critical: got %s", s)
	}
}

func TestStop(t *testing.T) {
	f := newPod(t, []spec.Container{sh("web", forever)}, nil)
	c := f.Containers()[0]
	if err := c.Stop(ctx(t), StopOptions{}); !errors.Is(err, ErrAlready) {
		t.Errorf("stop before start: got %v", err)
	}
	a, err := c.Attach(AttachOptions{Stdout: true, Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	if err := c.Start(ctx(t)); err != nil {
		t.Fatal(err)
	}
	if err := c.Start(ctx(t)); !errors.Is(err, ErrAlready) {
		t.Errorf("start twice: got %v", err)
	}
	until(t, a.Next, "up\n")
	wait, cancel, err := c.Wait(WaitNextExit)
	if err != nil {
		t.Fatal(err)
	}
	defer cancel()
	if err := c.Stop(ctx(t), StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if s := c.State(); s.Status != spec.StatusExited || s.ExitCode != 5 || !s.ManualStop {
		t.Errorf("state after stop: %+v", s)
	}
	if got := <-wait; got.ExitCode != 5 || got.Err != nil {
		t.Errorf("wait: got %+v", got)
	}
	if got := read(t, a.Next); got != "bye\n" {
		t.Errorf("attachment after the first piece: got %q", got)
	}
	select {
	case <-f.Done():
		t.Error("a stop by the API ended the pod")
	default:
	}
	if err := c.Start(ctx(t)); err != nil {
		t.Fatalf("start again: %v", err)
	}
	zero := 0
	if err := c.Stop(ctx(t), StopOptions{Signal: "SIGUSR1", Timeout: &zero}); err != nil {
		t.Fatal(err)
	}
	if s := c.State(); s.ExitCode != 137 && s.ExitCode != 138 {
		t.Errorf("stop without grace: got %+v", s)
	}
}

func TestRestart(t *testing.T) {
	c := sh("web", "echo run; exit 1")
	c.Restart = spec.Restart{Name: "on-failure", MaxRetries: 2}
	f := newPod(t, []spec.Container{c}, nil)
	began := time.Now()
	f.Start(ctx(t))
	<-f.Done()
	w := f.Containers()[0]
	if s := w.State(); s.Restarts != 2 || s.ExitCode != 1 {
		t.Errorf("got %+v", s)
	}
	if d := time.Since(began); d < 300*time.Millisecond {
		t.Errorf("two restarts took %v; the delays are 100 and 200 ms", d)
	}
	r, err := w.Logs(LogOptions{Stdout: true, Tail: -1})
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, r.Next); got != "run\nrun\nrun\n" {
		t.Errorf("log: got %q", got)
	}
}

func TestRestartAlwaysUntilStopped(t *testing.T) {
	c := sh("web", "exit 0")
	c.Restart = spec.Restart{Name: "always"}
	f := newPod(t, []spec.Container{c}, nil)
	f.Start(ctx(t))
	w := f.Containers()[0]
	err := w.await(ctx(t), func() (bool, error) { return w.state.Restarts >= 1 && w.state.Status == spec.StatusRestarting, nil })
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Stop(ctx(t), StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if s := w.State(); s.Status != spec.StatusExited || !s.ManualStop {
		t.Errorf("got %+v", s)
	}
}

// Limits need a kernel with controllers: they are in test/tour, in a machine.
func TestUpdate(t *testing.T) {
	f := newPod(t, []spec.Container{sh("a", "exit 3")}, nil)
	c := f.Containers()[0]
	policy := func(name string, max int, err error) error {
		return c.Update(ctx(t), func(_ *spec.Resources, p *spec.Restart) error {
			*p = spec.Restart{Name: name, MaxRetries: max}
			return err
		})
	}
	if err := policy("on-failure", 2, nil); err != nil {
		t.Fatal(err)
	}
	if err := policy("always", 0, errors.New("no")); err == nil {
		t.Error("the error of a change is lost")
	}
	if got := c.Spec().Restart; got != (spec.Restart{Name: "on-failure", MaxRetries: 2}) {
		t.Errorf("got %+v", got)
	}
	f.Start(ctx(t))
	<-f.Done()
	if s := c.State(); s.Restarts != 2 || s.ExitCode != 3 {
		t.Errorf("got %+v, want two restarts", s)
	}
}

func TestKill(t *testing.T) {
	c := sh("web", forever)
	c.Restart = spec.Restart{Name: "always"}
	f := newPod(t, []spec.Container{c}, nil)
	w := f.Containers()[0]
	if err := w.Kill(ctx(t), syscall.SIGKILL); !errors.Is(err, ErrNotRunning) {
		t.Errorf("kill before start: %v", err)
	}
	f.Start(ctx(t))
	if err := w.Kill(ctx(t), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s := status(t, w, spec.StatusExited)
	if s.ExitCode != 137 || s.Signal != 9 || s.OOMKilled {
		t.Errorf("got %+v", s)
	}
}

// TestStopAtOnce stops a container that has no handler yet when it is stopped: it ends in order nevertheless.
func TestStopAtOnce(t *testing.T) {
	f := newPod(t, []spec.Container{sh("web", "sleep 0.3; "+forever)}, nil)
	c := f.Containers()[0]
	if err := c.Start(ctx(t)); err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(ctx(t), StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if s := c.State(); s.ExitCode != 5 {
		t.Errorf("state after stop: %+v", s)
	}
}

func TestHostSignalEndsPod(t *testing.T) {
	f := newPod(t, []spec.Container{sh("web", forever)}, nil)
	a, err := f.Containers()[0].Attach(AttachOptions{Stdout: true, Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	f.Start(ctx(t))
	until(t, a.Next, "up")
	a.Close()
	if err := f.Signal(spec.Signal{Signal: int(syscall.SIGTERM)}); err != nil {
		t.Fatal(err)
	}
	<-f.Done()
}

func TestPause(t *testing.T) {
	f := newPod(t, []spec.Container{sh("web", forever)}, nil)
	f.Start(ctx(t))
	c := f.Containers()[0]
	if err := c.Unpause(ctx(t)); !errors.Is(err, ErrNotPaused) {
		t.Errorf("unpause: got %v", err)
	}
	if err := c.Pause(ctx(t)); err != nil {
		t.Fatal(err)
	}
	if s := c.State().Status; s != spec.StatusPaused {
		t.Errorf("status %s", s)
	}
	if _, err := c.Exec(ExecConfig{Cmd: []string{"true"}}); !errors.Is(err, ErrPaused) {
		t.Errorf("exec while paused: %v", err)
	}
	if err := c.Pause(ctx(t)); !errors.Is(err, ErrPaused) {
		t.Errorf("pause twice: %v", err)
	}
	if err := c.Unpause(ctx(t)); err != nil {
		t.Fatal(err)
	}
	if err := c.Pause(ctx(t)); err != nil {
		t.Fatal(err)
	}
	if err := c.Stop(ctx(t), StopOptions{}); err != nil {
		t.Fatal(err)
	}
	if s := c.State(); s.Status != spec.StatusExited {
		t.Errorf("stop while paused: %+v", s)
	}
}

func TestStartFailure(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*spec.Container)
		code   int
		want   string
	}{
		{"program", func(c *spec.Container) { c.Cmd = []string{"nosuch"} }, 127, `exec: "nosuch": executable file not found in $PATH`},
		{"user", func(c *spec.Container) { c.User = "nobody-here" }, 125, "unable to find user nobody-here: no matching entries in passwd file"},
		{"group", func(c *spec.Container) { c.User = "root:nogroup-here" }, 125, "unable to find group nogroup-here: no matching entries in group file"},
		{"capability", func(c *spec.Container) { c.CapAdd = []string{"FLY"} }, 125, `invalid capability: "FLY"`},
		{"sysctl", func(c *spec.Container) { c.Sysctls = map[string]string{"kernel.panic": "1"} }, 125, "not in a separate kernel namespace"},
		{"tmpfs", func(c *spec.Container) {
			c.Mounts = []spec.Mount{{Type: spec.MountTmpfs, Target: "/t", Options: []string{"rw,frobnicate"}}}
		}, 125, `invalid tmpfs option ["frobnicate"]`},
		{"twice", func(c *spec.Container) {
			c.Mounts = []spec.Mount{{Type: spec.MountTmpfs, Target: "/t"}, {Type: spec.MountTmpfs, Target: "/t/"}}
		}, 125, "duplicate mount point: /t"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := sh("web", "true")
			c.Restart = spec.Restart{Name: "always"}
			tt.change(&c)
			f := newPod(t, []spec.Container{c}, nil)
			err := f.Containers()[0].Start(ctx(t))
			var se *container.StartError
			if !errors.As(err, &se) || se.Code != tt.code || !strings.Contains(se.Msg, tt.want) {
				t.Errorf("got %v, want %d with %q", err, tt.code, tt.want)
			}
			<-f.Done()
			if s := f.Containers()[0].State(); s.ExitCode != tt.code || s.Error != se.Msg || s.Status != spec.StatusCreated {
				t.Errorf("state: %+v", s)
			}
		})
	}
}

func TestAttach(t *testing.T) {
	c := spec.Container{Name: "cat", Cmd: []string{"cat"}, OpenStdin: true, StdinOnce: true}
	f := newPod(t, []spec.Container{c}, nil)
	w := f.Containers()[0]
	a, err := w.Attach(AttachOptions{Stdin: true, Stdout: true, Stderr: true, Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	written := make(chan error, 1)
	go func() { // before the start: it waits
		_, err := io.WriteString(a.Stdin, "typed before the start\n")
		written <- errors.Join(err, a.Stdin.Close())
	}()
	f.Start(ctx(t))
	if err := <-written; err != nil {
		t.Fatal(err)
	}
	if got := read(t, a.Next); got != "typed before the start\n" {
		t.Errorf("got %q", got)
	}
	<-f.Done()

	late, err := w.Attach(AttachOptions{Stdout: true, Logs: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, late.Next); got != "typed before the start\n" {
		t.Errorf("logs only: got %q", got)
	}
}

// TestAttachLeaves has a writer that nobody reads and that goes away.
func TestAttachLeaves(t *testing.T) {
	c := spec.Container{Name: "deaf", Cmd: []string{"sh", "-c", forever}, OpenStdin: true}
	f := newPod(t, []spec.Container{c}, nil)
	f.Start(ctx(t))
	a, err := f.Containers()[0].Attach(AttachOptions{Stdin: true, Stdout: true, Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := a.Stdin.Write(make([]byte, 1<<20)) // more than the pipe takes
		done <- err
	}()
	until(t, a.Next, "up")
	a.Close()
	select {
	case err := <-done:
		if err == nil {
			t.Error("the write came through")
		}
	case <-time.After(5 * time.Second):
		t.Error("the write still waits")
	}
	if _, err := a.Next(ctx(t)); err != io.EOF {
		t.Errorf("Next after Close: %v", err)
	}
}

func TestTerminal(t *testing.T) {
	c := spec.Container{Name: "tty", Cmd: []string{"sh", "-c", "stty size; read x; echo got $x; stty size"}, TTY: true, OpenStdin: true}
	f := newPod(t, []spec.Container{c}, nil)
	w := f.Containers()[0]
	if err := w.Resize(30, 90); err != nil {
		t.Fatal(err)
	}
	a, err := w.Attach(AttachOptions{Stdin: true, Stdout: true, Stream: true})
	if err != nil {
		t.Fatal(err)
	}
	defer a.Close()
	f.Start(ctx(t))
	until(t, a.Next, "30 90\r\n")
	if err := w.Resize(31, 91); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(a.Stdin, "hello\n"); err != nil {
		t.Fatal(err)
	}
	if got := read(t, a.Next); got != "hello\r\ngot hello\r\n31 91\r\n" {
		t.Errorf("got %q", got)
	}
}

func TestExec(t *testing.T) {
	c := sh("web", forever)
	c.Env = []string{"A=1"}
	f := newPod(t, []spec.Container{c}, nil)
	w := f.Containers()[0]
	if _, err := w.Exec(ExecConfig{Cmd: []string{"true"}}); !errors.Is(err, ErrNotRunning) {
		t.Errorf("exec before start: %v", err)
	}
	f.Start(ctx(t))
	e, err := w.Exec(ExecConfig{
		Cmd: []string{"sh", "-c", "read x; echo $x $A $B $PWD; id -un; echo err >&2; exit 6"}, Env: []string{"B=2"}, User: "user", WorkingDir: "/tmp",
		Stdin: true, Stdout: true, Stderr: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, err := f.Exec(e.ID()); err != nil || got != e {
		t.Errorf("find exec: %v", err)
	}
	if got := w.Execs(); len(got) != 1 {
		t.Errorf("execs: %v", got)
	}
	s, err := e.Start(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := e.Start(ctx(t)); !errors.Is(err, ErrAlready) {
		t.Errorf("start twice: %v", err)
	}
	if st := e.State(); !st.Running || st.Pid == 0 {
		t.Errorf("state: %+v", st)
	}
	if _, err := io.WriteString(s.Stdin, "in\n"); err != nil {
		t.Fatal(err)
	}
	s.Stdin.Close()
	out, err := io.ReadAll(s.Stdout)
	if err != nil {
		t.Fatal(err)
	}
	errOut, err := io.ReadAll(s.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	if string(out) != "in 1 2 /tmp\nuser\n" || string(errOut) != "err\n" {
		t.Errorf("got %q, %q", out, errOut)
	}
	if code, err := s.Wait(ctx(t)); code != 6 || err != nil {
		t.Errorf("exit code %d, %v", code, err)
	}
	if got := w.State(); got.Status != spec.StatusRunning {
		t.Errorf("the container after an exec: %+v", got)
	}

	bad, err := w.Exec(ExecConfig{Cmd: []string{"nosuch"}})
	if err != nil {
		t.Fatal(err)
	}
	var se *container.StartError
	if _, err := bad.Start(ctx(t)); !errors.As(err, &se) || se.Code != 127 {
		t.Errorf("missing program: %v", err)
	}
	if st := bad.State(); st.ExitCode == nil || *st.ExitCode != 127 {
		t.Errorf("state of a failed exec: %+v", st)
	}
}

// TestExecLeavesDescendant has an exec whose child keeps the pipe open.
func TestExecLeavesDescendant(t *testing.T) {
	f := newPod(t, []spec.Container{sh("web", forever)}, nil)
	f.Start(ctx(t))
	e, err := f.Containers()[0].Exec(ExecConfig{Cmd: []string{"sh", "-c", "sleep 60 & echo left"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	s, err := e.Start(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	began := time.Now()
	out, err := io.ReadAll(s.Stdout)
	if err != nil || string(out) != "left\n" {
		t.Errorf("got %q, %v", out, err)
	}
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("the output ended after %v", d)
	}
}

// A size that arrives while the process is being started is not lost. Clients send it once, at about that time.
func TestResizeBesideStart(t *testing.T) {
	const untilSized = `until [ "$(stty size)" = "33 101" ]; do sleep 0.01; done; echo sized`
	shell := spec.Container{Name: "tty", Cmd: []string{"sh", "-c", untilSized}, TTY: true, OpenStdin: true}
	f := newPod(t, []spec.Container{sh("web", forever), shell}, func(c *Config) { c.Placement.Hold = true })
	web, tty := f.Containers()[0], f.Containers()[1]
	if err := web.Start(ctx(t)); err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		e, err := web.Exec(ExecConfig{Cmd: []string{"sh", "-c", untilSized}, TTY: true, Stdin: true, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		resized := make(chan error, 1)
		go func() {
			time.Sleep(time.Duration(i) * 100 * time.Microsecond) // each at another moment of the start
			resized <- e.Resize(33, 101)
		}()
		s, err := e.Start(ctx(t))
		if err != nil {
			t.Fatal(err)
		}
		out, err := io.ReadAll(s.Stdout)
		s.Close()
		if err := errors.Join(err, <-resized); err != nil || !strings.Contains(string(out), "sized") {
			t.Fatalf("exec %d: got %q, %v", i, out, err)
		}
	}
	go tty.Resize(33, 101)
	if err := tty.Start(ctx(t)); err != nil {
		t.Fatal(err)
	}
	if err := tty.await(ctx(t), func() (bool, error) { return tty.state.Status == spec.StatusExited, nil }); err != nil {
		t.Error(err)
	}
}

func TestExecTerminal(t *testing.T) {
	f := newPod(t, []spec.Container{sh("web", forever)}, nil)
	f.Start(ctx(t))
	e, err := f.Containers()[0].Exec(ExecConfig{Cmd: []string{"sh", "-c", "stty size; echo $TERM; tty"}, TTY: true, Stdout: true, ConsoleSize: &[2]uint{11, 22}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := e.Start(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	out, err := io.ReadAll(s.Stdout)
	if err != nil || string(out) != "11 22\r\nxterm\r\n/dev/pts/0\r\n" {
		t.Errorf("got %q, %v", out, err)
	}
}

func TestHealth(t *testing.T) {
	c := sh("web", "sleep 0.3; touch /ok; while :; do sleep 0.05; done")
	c.Healthcheck = &spec.Healthcheck{
		Test: []string{"CMD-SHELL", "echo probe; test -e /ok"}, Interval: 50 * time.Millisecond, StartPeriod: time.Minute,
		StartInterval: 50 * time.Millisecond, Retries: 2,
	}
	f := newPod(t, []spec.Container{c}, nil)
	w := f.Containers()[0]
	_, events, cancel := f.Events(time.Now())
	defer cancel()
	if s := w.State().Health; s != "starting" {
		t.Errorf("health before the start: %q", s)
	}
	f.Start(ctx(t))
	await := func(health string) {
		t.Helper()
		if err := w.await(ctx(t), func() (bool, error) { return w.state.Health == health, nil }); err != nil {
			t.Fatalf("health %s: %v, %+v", health, err, w.Health())
		}
	}
	await("healthy")
	h := w.Health()
	if h.FailingStreak != 0 || len(h.Log) == 0 || h.Log[len(h.Log)-1].ExitCode != 0 || h.Log[len(h.Log)-1].Output != "probe\n" {
		t.Errorf("health: %+v", h)
	}
	e, err := w.Exec(ExecConfig{Cmd: []string{"rm", "/ok"}})
	if err != nil {
		t.Fatal(err)
	}
	s, err := e.Start(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	await("unhealthy")
	if h := w.Health(); h.FailingStreak < 2 || len(h.Log) > 5 {
		t.Errorf("health: %+v", h)
	}
	var seen []string
	for len(seen) < 2 {
		e := <-events
		if strings.HasPrefix(e.Action, "health_status") {
			seen = append(seen, e.Action)
		}
	}
	if d := cmp.Diff([]string{"health_status: healthy", "health_status: unhealthy"}, seen); d != "" {
		t.Errorf("events (-want +got):\n%s", d)
	}
}

func TestHealthTimeout(t *testing.T) {
	c := sh("web", forever)
	c.Healthcheck = &spec.Healthcheck{Test: []string{"CMD", "sleep", "60"}, Interval: 10 * time.Millisecond, Timeout: 50 * time.Millisecond, Retries: 1}
	f := newPod(t, []spec.Container{c}, nil)
	f.Start(ctx(t))
	w := f.Containers()[0]
	if err := w.await(ctx(t), func() (bool, error) { return w.state.Health == healthUnhealthy, nil }); err != nil {
		t.Fatal(err)
	}
	if r := w.Health().Log[0]; r.ExitCode != -1 || !strings.HasPrefix(r.Output, "Health check exceeded timeout (50ms)") {
		t.Errorf("got %+v", r)
	}
}

func TestVolume(t *testing.T) {
	web := sh("web", "ls -A /etc; stat -c '%u:%g %a' /etc/sub; cat /etc/passwd | head -1; ls /lost+found 2>/dev/null; echo more > /etc/new")
	web.Mounts = []spec.Mount{{Type: spec.MountVolume, Source: "data", Target: "/etc"}}
	again := sh("again", "cat /data/new; echo x > /data/y || echo read-only")
	again.Mounts = []spec.Mount{{Type: spec.MountVolume, Source: "data", Target: "/data", ReadOnly: true}}
	again.After = []spec.Dependency{{Container: "web", Condition: spec.ConditionCompleted}}
	f := newPod(t, []spec.Container{web, again}, func(cfg *Config) {
		cfg.Pod.Volumes = []spec.Volume{{Name: "data"}}
		sub := filepath.Join(cfg.Layers[layerID], "etc/sub")
		if err := os.Mkdir(sub, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(sub, 12, 34); err != nil {
			t.Fatal(err)
		}
	})
	f.Start(ctx(t))
	<-f.Done()
	log := func(i int) string {
		r, err := f.Containers()[i].Logs(LogOptions{Tail: -1, Stdout: true})
		if err != nil {
			t.Fatal(err)
		}
		return read(t, r.Next)
	}
	if got := log(0); got != "group\nhostname\nhosts\npasswd\nresolv.conf\nsub\n12:34 700\nroot:x:0:0:root:/root:/bin/sh\n" {
		t.Errorf("first container: %q", got)
	}
	if got := log(1); got != "more\nread-only\n" {
		t.Errorf("second container: %q", got)
	}
}

func TestChangesAndRoot(t *testing.T) {
	f := newPod(t, []spec.Container{sh("web", "echo x > /new; rm /etc/group; echo y >> /etc/passwd; mkdir -p /a/b; rm -r /home && mkdir /home; exec sleep 60")}, nil)
	f.Start(ctx(t))
	c := f.Containers()[0]
	dir, release, err := c.Root()
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err := os.Stat(filepath.Join(dir, "home/user")); err != nil {
			if _, err := os.Stat(filepath.Join(dir, "home")); err == nil {
				break
			}
		}
		if time.Now().After(deadline) {
			t.Fatal("the container's changes are not to be seen")
		}
		time.Sleep(time.Millisecond)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "new")); err != nil || string(b) != "x\n" {
		t.Errorf("/new: %q, %v", b, err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "etc/hostname")); err != nil || string(b) != "pod\n" {
		t.Errorf("/etc/hostname: %q, %v", b, err)
	}
	got, err := c.Changes(ctx(t))
	if err != nil {
		t.Fatal(err)
	}
	want := []Change{
		{ChangeAdded, "/a"}, {ChangeAdded, "/a/b"}, {ChangeModified, "/etc"}, {ChangeDeleted, "/etc/group"}, {ChangeModified, "/etc/passwd"},
		{ChangeModified, "/home"}, {ChangeDeleted, "/home/user"}, {ChangeAdded, "/new"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("changes (-want +got):\n%s", d)
	}
	rw, all, err := c.Size(ctx(t))
	if err != nil || rw == 0 || all <= rw {
		t.Errorf("size: %d, %d, %v", rw, all, err)
	}
	// A second view while the first is open, and one of a container that does not run.
	dir2, release2, err := c.Root()
	if err != nil || dir2 == dir {
		t.Errorf("second view: %q, %v", dir2, err)
	}
	release2()
	zero := 0
	if err := c.Stop(ctx(t), StopOptions{Timeout: &zero}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "new")); err != nil {
		t.Errorf("after the stop: %v", err)
	}
}

func TestTopAndStats(t *testing.T) {
	f := newPod(t, []spec.Container{sh("web", forever)}, nil)
	c := f.Containers()[0]
	if _, err := c.Stats(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("stats before start: %v", err)
	}
	f.Start(ctx(t))
	titles, rows, err := c.Top(nil)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(titles, " "); got != "UID PID PPID C STIME TTY TIME CMD" || len(rows) == 0 || !strings.HasPrefix(rows[0][7], "sh -c trap") {
		t.Errorf("top: %v %v", titles, rows)
	}
	if _, _, err := c.Top([]string{"--frobnicate"}); !errors.Is(err, ErrInvalid) {
		t.Errorf("top with an unknown option: %v", err)
	}
	s, err := c.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if s.Pids.Current == 0 || s.CPU.Online == 0 || s.CPU.Host == 0 || s.Memory.Limit == 0 || s.Read.IsZero() {
		t.Errorf("stats: %+v", s)
	}
}

func TestFindAndRename(t *testing.T) {
	f := newPod(t, []spec.Container{sh("a", "true"), sh("b", "true")}, nil)
	a := f.Containers()[0]
	for _, tt := range []struct {
		ref  string
		want *Container
		err  error
	}{
		{"a", a, nil}, {"/a", a, nil}, {a.ID(), a, nil}, {"000", a, nil}, {"1", f.Containers()[1], nil},
		{"c", nil, ErrNotFound}, {"", nil, ErrNotFound},
	} {
		got, err := f.Find(tt.ref)
		if got != tt.want || !errors.Is(err, tt.err) {
			t.Errorf("find %q: got %v, %v", tt.ref, got, err)
		}
	}
	if err := a.Rename("b"); !errors.Is(err, ErrConflict) {
		t.Errorf("rename to a name in use: %v", err)
	}
	if err := a.Rename("bad name"); !errors.Is(err, ErrInvalid) {
		t.Errorf("rename to a bad name: %v", err)
	}
	if err := a.Rename("/c"); err != nil {
		t.Fatal(err)
	}
	if got, err := f.Find("c"); got != a || err != nil || a.Name() != "c" {
		t.Errorf("after rename: %v, %v", got, err)
	}
	past, _, cancel := f.Events(time.Time{})
	cancel()
	if e := past[len(past)-1]; e.Action != "rename" || e.Attributes["oldName"] != "/a" {
		t.Errorf("event: %+v", e)
	}
}

func TestEventsDropSlow(t *testing.T) {
	f := newPod(t, []spec.Container{sh("a", "true")}, nil)
	_, live, cancel := f.Events(time.Now())
	defer cancel()
	for range eventQueue + 1 {
		f.Emit(Event{Action: "x"})
	}
	n := 0
	for range live {
		n++
	}
	if n != eventQueue {
		t.Errorf("a slow reader got %d events, want %d and the end", n, eventQueue)
	}
}

func TestHold(t *testing.T) {
	f := newPod(t, []spec.Container{sh("web", "echo hi")}, func(c *Config) { c.Placement.Hold = true })
	f.Start(ctx(t))
	if s := f.Containers()[0].State().Status; s != spec.StatusCreated {
		t.Errorf("held container: %s", s)
	}
}

func TestInfiniteOutput(t *testing.T) {
	c := sh("noisy", "yes | head -c 4000000")
	f := newPod(t, []spec.Container{c}, nil)
	f.Start(ctx(t))
	<-f.Done()
	w := f.Containers()[0]
	w.pump.finish()
	f.pumps.Wait()
	if n := f.host.output.Len(); n != 4000000 {
		t.Errorf("the host got %d bytes of 4000000", n)
	}
	r, err := w.Logs(LogOptions{Tail: -1, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(read(t, r.Next)); n != 4000000 {
		t.Errorf("the log has %d bytes of 4000000", n)
	}
	r, err = w.Logs(LogOptions{Tail: 3, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if got := read(t, r.Next); got != "y\ny\ny\n" {
		t.Errorf("the last three lines: %q", got)
	}
}
