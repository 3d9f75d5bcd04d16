package main

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
)

// console is a program on a terminal, and what it has written.
type console struct {
	t   *testing.T
	cmd *exec.Cmd
	pty *os.File

	mu   sync.Mutex
	text strings.Builder
	seen int // what expect has passed
	ends chan struct{}
}

func startConsole(t *testing.T, cmd *exec.Cmd) *console {
	t.Helper()
	f, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 33, Cols: 99})
	if err != nil {
		t.Fatal(err)
	}
	c := &console{t: t, cmd: cmd, pty: f, ends: make(chan struct{})}
	go func() {
		defer close(c.ends)
		buf := make([]byte, 4096)
		for {
			n, err := f.Read(buf)
			c.mu.Lock()
			c.text.Write(buf[:n])
			c.mu.Unlock()
			if err != nil { // EIO when the last one has closed the terminal
				return
			}
		}
	}()
	t.Cleanup(func() { cmd.Process.Kill(); f.Close(); <-c.ends })
	return c
}

// expect waits until the program has written want, after what was expected before.
func (c *console) expect(want string) {
	c.t.Helper()
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		c.mu.Lock()
		text := c.text.String()
		c.mu.Unlock()
		if i := strings.Index(text[c.seen:], want); i >= 0 {
			c.seen += i + len(want)
			return
		}
		if time.Since(begun) > time.Minute {
			c.t.Fatalf("no %q within a minute in %q", want, text)
		}
	}
}

func (c *console) send(keys string) {
	c.t.Helper()
	if _, err := io.WriteString(c.pty, keys); err != nil {
		c.t.Fatal(err)
	}
}

func (c *console) wait(code int) {
	c.t.Helper()
	err := c.cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		c.t.Fatal(err)
	}
	if got := c.cmd.ProcessState.ExitCode(); got != code {
		c.t.Errorf("%v: got exit code %d, want %d; it wrote %q", c.cmd.Args, got, code, c.text.String())
	}
}

// A shell on a terminal: size and its changes, Ctrl-C as a key, the detach keys, coming back, the exit code.
func TestTerminal(t *testing.T) {
	m := machineNeeds(t)
	dir := filepath.Join(t.TempDir(), "vm")
	run := func(args ...string) *exec.Cmd {
		cmd := exec.Command(m.kcradle, args...)
		cmd.Env = append(os.Environ(), "KCRADLE_TEMPLATES=off", "KCRADLE_ROOT="+filepath.Join(filepath.Dir(dir), "root"), "KCRADLE_PACKAGES="+m.packages)
		return cmd
	}
	if out, err := run("summon", "-q", "-it", dir, m.image, "--", "sh").CombinedOutput(); err != nil {
		t.Fatalf("summon: %v\n%s", err, out)
	}
	c := startConsole(t, run("run", "--network", "none", dir))
	t.Cleanup(func() { run("rm", "-f", dir).Run() })
	c.expect("# ")
	c.send("stty size\r")
	c.expect("33 99")
	if err := pty.Setsize(c.pty, &pty.Winsize{Rows: 44, Cols: 111}); err != nil {
		t.Fatal(err)
	}
	// The change travels beside the keys, so ask until it has arrived.
	c.send("until stty size | grep 44; do :; done\r")
	c.expect("44 111")
	c.expect("# ")
	// A shell that changes the terminal's mode drops what was typed before, and one that has not yet given the terminal away
	// takes Ctrl-C for itself: it comes once the command in the foreground says so.
	c.send("sh -c \"echo be''gun; exec sleep 1000\"\r")
	c.expect("begun")
	c.send("\x03")
	c.expect("# ")
	c.send("\x10\x11")
	c.expect("detached")
	c.wait(0)

	c = startConsole(t, run("attach", dir))
	c.send("\r")
	c.expect("# ")
	c.send("tty; exit 9\r")
	c.expect("/dev/pts/")
	c.wait(9)
	if out, err := run("wait", dir).Output(); err != nil || strings.TrimSpace(string(out)) != "9" {
		t.Errorf("wait: got %q, %v; want 9", out, err)
	}
}

// Without a terminal on our side -it is refused, as docker refuses it.
func TestTerminalRefused(t *testing.T) {
	m := machineNeeds(t)
	dir := filepath.Join(t.TempDir(), "vm")
	env := append(os.Environ(), "KCRADLE_TEMPLATES=off", "KCRADLE_ROOT="+filepath.Join(filepath.Dir(dir), "root"), "KCRADLE_PACKAGES="+m.packages)
	cmd := exec.Command(m.kcradle, "summon", "-q", dir, m.image)
	cmd.Env = env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("summon: %v\n%s", err, out)
	}
	cmd = exec.Command(m.kcradle, "run", "-it", dir)
	cmd.Env = env
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "the input device is not a TTY") || cmd.ProcessState.ExitCode() != exitOwnFailure {
		t.Errorf("run -it without a terminal: got %v, %q", err, out)
	}
}

// A reader that has had enough stops the pod in order, as SIGPIPE would end a program.
func TestReaderGone(t *testing.T) {
	m := machineNeeds(t)
	dir := filepath.Join(t.TempDir(), "vm")
	env := append(os.Environ(), "KCRADLE_TEMPLATES=off", "KCRADLE_ROOT="+filepath.Join(filepath.Dir(dir), "root"), "KCRADLE_PACKAGES="+m.packages)
	cmd := exec.Command(m.kcradle, "summon", "-q", dir, m.image, "--", "sh", "-c", "trap 'exit 5' TERM; while :; do echo line; done")
	cmd.Env = env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("summon: %v\n%s", err, out)
	}
	cmd = exec.Command(m.kcradle, "run", "--network", "none", dir)
	cmd.Env = env
	r, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill() })
	if _, err := io.ReadFull(r, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	r.Close()
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 5 {
		t.Errorf("run with a reader that went: got %v, want exit code 5", err)
	}
}
