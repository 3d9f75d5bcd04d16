package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const (
	// maxOutput bounds what is kept of a test's output, in bytes. The first part and the last part stay.
	maxOutput = 4 << 20
	// quitGrace is how long a hanging test has to print its goroutines after SIGQUIT.
	quitGrace = 5 * time.Second
)

// runner runs tests one after the other, each in a process of its own: they clean up after themselves by removing what
// they did not find when they began, so two at a time would remove each other's.
type runner struct {
	suite   *suite
	server  *server
	dir     string // for what tests write; short, because they make sockets in it
	dockerd string // words of a shell that start what tests get that want a daemon of their own; empty: nothing
	same    bool   // that is the same program as the server
	timeout time.Duration
	run     *regexp.Regexp // of tests; nil: all
	remote  bool
	log     io.Writer // a line for each test
}

// setUp makes the directories and the dockerd that tests find.
func (r *runner) setUp() error {
	// Daemons with user namespaces have to get through it.
	if err := os.Chmod(r.dir, 0o711); err != nil {
		return err
	}
	for _, d := range []string{r.tmp(), r.bin(), r.home(), r.dest()} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	// It leaves a mark, so that it is known which tests do not speak of the server under test.
	script := fmt.Sprintf("#!/bin/sh\n: >%s\n", quote(r.mark()))
	if r.dockerd == "" {
		script += "echo 'there is no daemon for tests that start their own (moby-suite -dockerd PROGRAM)' >&2\nexit 1\n"
	} else {
		// The suite gives /dev/null for an empty configuration, which an older dockerd takes for a broken one.
		script += fmt.Sprintf("for a; do shift; if [ \"$a\" = /dev/null ]; then a=%s; fi; set -- \"$@\" \"$a\"; done\nexec %s \"$@\"\n",
			quote(r.config()), r.dockerd)
		if err := os.WriteFile(r.config(), []byte("{}\n"), 0o644); err != nil {
			return err
		}
	}
	if err := os.WriteFile(filepath.Join(r.bin(), "dockerd"), []byte(script), 0o755); err != nil {
		return err
	}
	// What the suite calls registry is docker-registry in Debian.
	if registry, err := exec.LookPath("docker-registry"); err == nil {
		return os.Symlink(registry, filepath.Join(r.bin(), "registry"))
	}
	return nil
}

func (r *runner) tmp() string    { return filepath.Join(r.dir, "t") }
func (r *runner) bin() string    { return filepath.Join(r.dir, "b") }
func (r *runner) home() string   { return filepath.Join(r.dir, "h") }
func (r *runner) dest() string   { return filepath.Join(r.dir, "o") }
func (r *runner) config() string { return filepath.Join(r.dir, "empty.json") }
func (r *runner) mark() string   { return filepath.Join(r.dir, "started") }

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// environment is what tests see: nothing of ours that may vary, and what the suite asks for by name.
func (r *runner) environment() []string {
	env := []string{
		"PATH=" + r.bin() + ":" + os.Getenv("PATH"),
		"HOME=" + r.home(),
		"TMPDIR=" + r.tmp(),
		"DEST=" + r.dest(), // state of daemons that tests start
		"DOCKER_HOST=" + r.server.host,
		"DOCKER_CONFIG=" + r.home(),
		"DOCKER_INTEGRATION_DAEMON_DEST=" + r.dest(),
		"TEST_CLIENT_BINARY=docker",
		"GOTRACEBACK=all",
		"LC_ALL=C.UTF-8",
	}
	if older(r.server.version.APIVersion, suiteAPI) {
		env = append(env, "DOCKER_API_VERSION="+r.server.version.APIVersion)
	}
	if r.dockerd != "" {
		env = append(env, "DOCKER_GRAPHDRIVER=overlay2")
	}
	if r.remote {
		env = append(env, "DOCKER_REMOTE_DAEMON=1")
	}
	return env
}

// older compares versions of the API, "1.41" with "1.51". One that cannot be read is not older.
func older(a, b string) bool {
	number := func(s string) (major, minor int, err error) {
		x, y, _ := strings.Cut(s, ".")
		major, err1 := strconv.Atoi(x)
		minor, err2 := strconv.Atoi(y)
		return major, minor, errors.Join(err1, err2)
	}
	a1, a2, errA := number(a)
	b1, b2, errB := number(b)
	return errA == nil && errB == nil && (a1 < b1 || a1 == b1 && a2 < b2)
}

// packageTests runs the tests of one package. On an error the report holds what ran before.
func (r *runner) packageTests(ctx context.Context, pkg string) (*packageReport, error) {
	p := &packageReport{Name: pkg}
	out, err := r.exec(ctx, pkg, "-test.list=.")
	if err != nil {
		return p, fmt.Errorf("list the tests of %s: %w\n%s", pkg, err, tail(out, 4<<10))
	}
	p.All = testNames(string(out))
	if len(p.All) == 0 {
		return p, fmt.Errorf("list the tests of %s: it has none", pkg)
	}
	for _, name := range p.All {
		if r.run != nil && !r.run.MatchString(name) {
			continue
		}
		t, err := r.test(ctx, pkg, name)
		if ctx.Err() != nil {
			return p, ctx.Err() // a test that was interrupted has no result
		}
		p.add(t)
		fmt.Fprintf(r.log, "%s %s: %s in %.1f s%s\n", pkg, name, t.Status, t.Seconds, note(t))
		if err != nil {
			return p, err
		}
	}
	return p, nil
}

// test runs one test and makes the server ready for the next.
func (r *runner) test(ctx context.Context, pkg, name string) (*testReport, error) {
	if err := os.Remove(r.mark()); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	begin := time.Now()
	out, runErr := r.exec(ctx, pkg, "-test.v=test2json", "-test.run=^"+regexp.QuoteMeta(name)+"$", "-test.timeout=0")
	t := &testReport{OwnDaemon: exists(r.mark())}
	own, subtests := split(parse(string(out)), name)
	t.Subtests = subtests
	switch {
	case errors.Is(runErr, errTimeout):
		t.result = result{Status: timedOut, Reason: "no end within " + r.timeout.String()}
	case own != nil && (own.Status == failed) == (runErr != nil):
		t.result = *own
	case runErr != nil:
		// A panic of another goroutine, an exit in the middle.
		t.result = result{Status: failed, Reason: lastWords(out, runErr)}
	default:
		t.result = result{Status: failed, Reason: "it ended without a verdict"}
	}
	t.Name, t.Seconds = name, time.Since(begin).Seconds()
	if t.Status == failed && t.OwnDaemon && r.dockerd == "" {
		t.Status = unjudged
	}
	err := r.sweep()
	if err != nil {
		return t, err
	}
	t.Trouble, t.ServerLog, err = r.server.restore(ctx)
	if t.Status == passed && t.Trouble != "" && !t.OwnDaemon {
		t.Status, t.Reason = failed, t.Trouble // whatever the test looked at
	}
	if t.Status != passed {
		t.Output = strings.ToValidUTF8(strings.ReplaceAll(string(tail(out, 64<<10)), "\x16", ""), "?")
	}
	return t, err
}

// sweep ends what daemons of a test have left running: machines do not end with the daemon that started them.
func (r *runner) sweep() error {
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, l := range lines {
		b, err := os.ReadFile(l)
		if err != nil || !strings.Contains(string(b), r.dest()+"/") || !strings.Contains(string(b), "--supervise-fd") {
			continue
		}
		if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(l))); err == nil {
			_ = syscall.Kill(pid, syscall.SIGKILL) // it may be gone
		}
	}
	return nil
}

// lastWords says why a process ended that has not said how its test ended.
func lastWords(out []byte, err error) string {
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "panic: ") || strings.HasPrefix(line, "fatal error: ") {
			return shorten(strings.TrimSpace(line))
		}
	}
	return "it ended without a verdict: " + err.Error()
}

var errTimeout = errors.New("timed out")

// exec runs a package's test binary in a process group, which is killed when the time is up or ctx is done, and returns
// what it printed. An end for want of time is errTimeout.
func (r *runner) exec(ctx context.Context, pkg string, args ...string) ([]byte, error) {
	cmd := exec.Command(r.suite.program(pkg), args...)
	cmd.Dir = r.suite.workDir(pkg)
	cmd.Env = append(r.environment(), "PWD="+cmd.Dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	// What a test leaves running may hold its output open.
	cmd.WaitDelay = 2 * time.Second
	out := &bounded{max: maxOutput}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	timer := time.NewTimer(r.timeout)
	defer timer.Stop()
	group := -cmd.Process.Pid
	var err error
	select {
	case err = <-done:
		if errors.Is(err, exec.ErrWaitDelay) {
			err = nil
		}
	case <-timer.C:
		_ = syscall.Kill(cmd.Process.Pid, syscall.SIGQUIT) // Go prints what every goroutine waits for
		select {
		case <-done:
		case <-time.After(quitGrace):
			_ = syscall.Kill(group, syscall.SIGKILL)
			<-done
		}
		err = errTimeout
	case <-ctx.Done():
		_ = syscall.Kill(group, syscall.SIGKILL)
		<-done
		err = ctx.Err()
	}
	_ = syscall.Kill(group, syscall.SIGKILL) // daemons that it started, if any are left
	return out.Bytes(), err
}

// bounded keeps the first and the last part of what is written to it, half of max each.
type bounded struct {
	max int

	mu      sync.Mutex
	head    bytes.Buffer
	tail    []byte
	dropped int
}

func (b *bounded) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	n := len(p)
	if room := b.max/2 - b.head.Len(); room > 0 {
		k := min(room, len(p))
		b.head.Write(p[:k])
		p = p[k:]
	}
	b.tail = append(b.tail, p...)
	if over := len(b.tail) - b.max/2; over > 0 {
		b.dropped += over
		b.tail = append(b.tail[:0], b.tail[over:]...)
	}
	return n, nil
}

// Bytes returns what was kept, with a line that says how much was not.
func (b *bounded) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := bytes.Clone(b.head.Bytes())
	if b.dropped > 0 {
		out = fmt.Appendf(out, "\n[%d bytes left out]\n", b.dropped)
	}
	return append(out, b.tail...)
}
