package reap

import (
	"syscall"
	"testing"
	"time"

	"github.com/kcradle/kcradle/internal/need"
	"os"
	"os/exec"
)

// script is a wait4 that the test feeds.
func script(r *Reaper) chan<- waitResult {
	ch := make(chan waitResult)
	r.wait = func() waitResult {
		w, ok := <-ch
		if !ok {
			return waitResult{err: syscall.ECHILD}
		}
		return w
	}
	return ch
}

func TestStart(t *testing.T) {
	exit := func(code int) Exit { return Exit{Status: syscall.WaitStatus(code << 8)} }
	for _, tt := range []struct {
		name    string
		fork    func(feed func(pid, code int)) (int, error)
		after   func(feed func(pid, code int))
		code    int
		orphans uint64
	}{
		{
			name:  "ends after it was registered",
			fork:  func(func(int, int)) (int, error) { return 7, nil },
			after: func(feed func(int, int)) { feed(7, 3) },
			code:  3,
		},
		{
			name:  "ends before fork returns",
			fork:  func(feed func(int, int)) (int, error) { feed(7, 4); return 7, nil },
			after: func(func(int, int)) {},
			code:  4,
		},
		{
			name:    "an orphan ends meanwhile",
			fork:    func(feed func(int, int)) (int, error) { feed(9, 1); return 7, nil },
			after:   func(feed func(int, int)) { feed(8, 1); feed(7, 5) },
			code:    5,
			orphans: 2,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := New()
			ch := script(r)
			stop, done := make(chan struct{}), make(chan struct{})
			go func() { defer close(done); r.Run(stop) }()
			feed := func(pid, code int) {
				ch <- waitResult{pid: pid, exit: exit(code)}
				ch <- waitResult{err: syscall.EINTR} // the one before was handled
			}
			c, err := r.Start(func() (int, error) { return tt.fork(feed) })
			if err != nil {
				t.Fatal(err)
			}
			tt.after(feed)
			<-c.Done()
			if got := c.Exit().Code(); got != tt.code {
				t.Errorf("exit code: got %d, want %d", got, tt.code)
			}
			if got := r.Orphans(); got != tt.orphans {
				t.Errorf("orphans: got %d, want %d", got, tt.orphans)
			}
			close(ch)
			close(stop)
			<-done
		})
	}
}

func TestCode(t *testing.T) {
	for _, tt := range []struct {
		name   string
		status syscall.WaitStatus
		want   int
	}{
		{"zero", 0, 0},
		{"exit 3", 3 << 8, 3},
		{"SIGKILL", 9, 137},
		{"SIGSEGV with core", 11 | 0x80, 139},
	} {
		if got := (Exit{Status: tt.status}).Code(); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.name, got, tt.want)
		}
	}
}

// TestReal runs in a process of its own, because nothing else may wait there.
func TestReal(t *testing.T) {
	if os.Getenv("REAP_TEST") == "" {
		need.Command(t, "sh", "install a shell")
		cmd := exec.Command(os.Args[0], "-test.run=^TestReal$", "-test.v")
		cmd.Env = append(os.Environ(), "REAP_TEST=1")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	// The orphans of this test become ours, as those of a machine become PID 1's.
	const prSetChildSubreaper = 36
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prSetChildSubreaper, 1, 0); errno != 0 {
		t.Fatal(errno)
	}
	r := New()
	stop, done := make(chan struct{}), make(chan struct{})
	go func() { defer close(done); r.Run(stop) }()
	sh, err := exec.LookPath("sh")
	if err != nil {
		t.Fatal(err)
	}
	start := func(script string) *Child {
		c, err := r.Start(func() (int, error) {
			return syscall.ForkExec(sh, []string{"sh", "-c", script}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
		})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for i := range 50 {
		if c := start("exit 7"); wait(t, c) != 7 {
			t.Fatalf("run %d: got exit code %d, want 7", i, c.Exit().Code())
		}
	}
	if c := start("kill -9 $$"); wait(t, c) != 137 {
		t.Errorf("got exit code %d, want 137", c.Exit().Code())
	}
	wait(t, start("(exit 1) & (exec sleep 0.01) & exit 0"))
	close(stop)
	<-done
	if r.Orphans() == 0 {
		t.Error("no orphan was reaped")
	}
}

func wait(t *testing.T, c *Child) int {
	t.Helper()
	select {
	case <-c.Done():
		return c.Exit().Code()
	case <-time.After(10 * time.Second):
		t.Fatal("child did not end within 10 s")
		return 0
	}
}
