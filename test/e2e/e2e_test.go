// Package e2e tests the whole road from outside: the built kcradle, real images, real machines, the real docker client,
// and Debian's own dockerd to compare with. It needs root and the packages of hack/deps test:
//
//	make build && go test ./test/e2e
//
// Pods run one or two at a time: where there is no hardware virtualization, a machine takes a whole processor.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
)

// startTimeout bounds a start of a machine with its containers; without hardware virtualization it takes seconds.
const startTimeout = 2 * time.Minute

// shared is what all tests of this package share.
var shared struct {
	dir  string // removed at the end; short, because sockets lie below it
	root string // kcradle's state directory
}

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := servers.TempDir()
		if err != nil {
			fmt.Fprintln(os.Stderr, "e2e:", err)
			return 1
		}
		defer os.RemoveAll(dir)
		shared.dir, shared.root = dir, filepath.Join(dir, "root")
		return m.Run()
	}())
}

// kcradle is the path of the program under test, built by make build.
func kcradle(t testing.TB) string {
	t.Helper()
	need.Root(t)
	need.Command(t, "qemu-system-x86_64", "hack/deps test")
	need.Command(t, "docker", "hack/deps test")
	path := os.Getenv("KCRADLE")
	if path == "" {
		path = "../../bin/kcradle"
	}
	abs, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return need.File(t, abs, "make build")
}

// image returns an image made from Debian packages.
func image(t testing.TB, name string) *images.Built {
	t.Helper()
	need.Root(t)
	need.Command(t, "debootstrap", "hack/deps test")
	cache, err := images.Open("", testWriter{t})
	if err != nil {
		t.Fatal(err)
	}
	b, err := cache.Build(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}

// tempDir is a directory short enough for sockets, removed at the end of the test.
func tempDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(shared.dir, "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// command is kcradle with arguments and the shared state directory.
func command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(kcradle(t), args...)
	cmd.Env = append(os.Environ(), "KCRADLE_TEMPLATES=off", "KCRADLE_ROOT="+shared.root)
	return cmd
}

// succeed runs cmd, whose stdout it returns; anything but success ends the test.
func succeed(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := output(t, cmd)
	if err != nil {
		t.Fatalf("%s: %v", line(cmd), err)
	}
	return out
}

func output(t testing.TB, cmd *exec.Cmd) (string, error) {
	t.Helper()
	var stdout, stderr bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &stdout
	}
	cmd.Stderr = &stderr
	start := time.Now()
	err := cmd.Run()
	t.Logf("%6.2f s  %s", time.Since(start).Seconds(), line(cmd))
	if err != nil {
		err = fmt.Errorf("%w\nstdout: %s\nstderr: %s", err, tail(stdout.Bytes()), tail(stderr.Bytes()))
	}
	return stdout.String(), err
}

// line is what was run, short enough to read.
func line(cmd *exec.Cmd) string {
	words := append([]string{filepath.Base(cmd.Path)}, cmd.Args[1:]...)
	s := strings.ReplaceAll(strings.Join(words, " "), shared.dir, "…")
	if len(s) > 300 {
		s = s[:300] + "…"
	}
	return strconv.Quote(s)
}

func tail(b []byte) string {
	if n := len(b) - 4<<10; n > 0 {
		b = b[n:]
	}
	return strings.TrimSpace(string(b))
}

// pod is a bundle and, while it runs, its machine.
type pod struct {
	t    testing.TB
	dir  string
	name string // of its container
}

// summon writes a bundle. args are flags and, after "--", a command.
func summon(t testing.TB, source string, args ...string) *pod {
	t.Helper()
	p := &pod{t: t, dir: filepath.Join(tempDir(t), "vm"), name: "c"}
	flags, cmd := args, []string(nil)
	for i, a := range args {
		if a == "--" {
			flags, cmd = args[:i], args[i:]
			break
		}
	}
	all := append([]string{"summon", "--name", p.name}, flags...)
	all = append(append(all, p.dir, source), cmd...)
	succeed(t, command(t, all...))
	return p
}

// start runs the pod in the background until it is stopped or the test ends.
func (p *pod) start() {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), startTimeout)
	defer cancel()
	cmd := command(p.t, "run", "-d", p.dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	start := time.Now()
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { p.kill() })
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err := <-done:
		if err != nil {
			p.t.Fatalf("%s: %v\n%s\n%s", line(cmd), err, tail(out.Bytes()), p.console())
		}
	case <-ctx.Done():
		_ = cmd.Process.Kill()
		p.t.Fatalf("%s: still not started\n%s\n%s", line(cmd), tail(out.Bytes()), p.console())
	}
	p.t.Logf("%6.2f s  %s", time.Since(start).Seconds(), line(cmd))
}

// console is the end of the machine's kernel log.
func (p *pod) console() string {
	b, err := os.ReadFile(filepath.Join(p.dir, "run/console.log"))
	if err != nil {
		return err.Error()
	}
	return "console: " + tail(b)
}

// state is what the bundle says of itself.
func (p *pod) state() bundle.State {
	p.t.Helper()
	b, err := bundle.Open(p.dir)
	if err != nil {
		p.t.Fatal(err)
	}
	s, ok, err := b.State()
	if err != nil || !ok {
		p.t.Fatalf("state of %s: %v, there is one: %v", p.dir, err, ok)
	}
	return s
}

// stop ends the pod in good order.
func (p *pod) stop() {
	p.t.Helper()
	succeed(p.t, command(p.t, "stop", p.dir))
	if s := p.state(); s.Phase != bundle.PhaseEnded || s.End == nil || s.End.Reason != bundle.EndDone && s.End.Reason != bundle.EndStopped {
		b, _ := json.Marshal(s)
		p.t.Errorf("state after stop: got %s, want an orderly end", b)
	}
}

// kill ends the pod in whatever state it is in, for the end of a test.
func (p *pod) kill() {
	cmd := exec.Command(command(p.t, "kill", p.dir).Path, "kill", p.dir)
	cmd.Env = append(os.Environ(), "KCRADLE_TEMPLATES=off", "KCRADLE_ROOT="+shared.root)
	_ = cmd.Run() // it fails when the pod has ended, as it should have
	if p.t.Failed() {
		p.t.Log(p.console())
	}
}

// docker is the docker client speaking to the pod.
func (p *pod) docker(args ...string) *exec.Cmd {
	return servers.Client(p.t.Context(), "unix://"+filepath.Join(p.dir, "run/vdocker.sock"), args...)
}

// address is where a published port of the container is bound on the host.
func (p *pod) address(port string) string {
	p.t.Helper()
	out := succeed(p.t, p.docker("port", p.name, port))
	first, _, _ := strings.Cut(out, "\n")
	if first == "" {
		p.t.Fatalf("docker port %s %s: no output", p.name, port)
	}
	return first
}

// waitLog reads the container's log since its last start until it holds text.
func (p *pod) waitLog(text string) {
	p.t.Helper()
	started := strings.TrimSpace(succeed(p.t, p.docker("inspect", "--format", "{{.State.StartedAt}}", p.name)))
	ctx, cancel := context.WithTimeout(p.t.Context(), startTimeout)
	defer cancel()
	pr, pw := io.Pipe()
	cmd := servers.Client(ctx, "unix://"+filepath.Join(p.dir, "run/vdocker.sock"), "logs", "--follow", "--since", started, p.name)
	cmd.Stdout, cmd.Stderr = pw, pw
	if err := cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { pw.CloseWithError(either(cmd.Wait(), io.EOF)) })
	defer wg.Wait()
	defer pr.Close()
	defer cancel()

	var all []byte
	buf := make([]byte, 32<<10)
	for {
		k, err := pr.Read(buf)
		all = append(all, buf[:k]...)
		if bytes.Contains(all, []byte(text)) {
			return
		}
		if err != nil {
			p.t.Fatalf("log of %s: %v before it said %q\n%s\n%s", p.name, errors.Join(err, ctx.Err()), text, tail(all), p.console())
		}
	}
}

// either is err, or other when there is none.
func either(err, other error) error {
	if err != nil {
		return err
	}
	return other
}
