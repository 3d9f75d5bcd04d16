// Package tour walks through the Docker Engine API with the real docker client, against two hosts at once: a pod, and
// Debian's dockerd with containers made equal. What the client says must be the same, byte for byte, but for IDs and
// times.
//
//	doc := tour.Pod(image)                     // the containers of the tour, none started
//	err := tour.Create(ctx, theirs, imageRef)  // the same with dockerd
//	tour.Run(t, ours, theirs)
package tour

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/spec"
)

// Host is where a docker client can go.
type Host struct {
	Name    string // for messages
	Address string // as for DOCKER_HOST, "unix:///run/x.sock"
	Pod     bool   // what a pod refuses is tried, too
	Limits  bool   // its kernel can limit resources
}

// stepTimeout bounds one call of the client. A call that must end and does not is a failure like any other.
const stepTimeout = 60 * time.Second

// Docker is the docker client speaking to a host, without the configuration of the user who runs it.
func (h Host) Docker(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "docker", args...)
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+h.Address, "DOCKER_CONFIG=/nonexistent", "DOCKER_CONTEXT=", "DOCKER_CLI_HINTS=false")
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// HTTP is a client of the API itself.
func (h Host) HTTP() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return h.Dial(ctx) },
		DisableKeepAlives: true,
	}}
}

// Dial connects to the host's socket.
func (h Host) Dial(ctx context.Context) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "unix", strings.TrimPrefix(h.Address, "unix://"))
}

// containers are the tour's, in order of their creation.
func containers() []spec.Container {
	timeout, soon := 2, 1
	return []spec.Container{
		{Name: "main", Cmd: []string{"sh", "-c", `trap 'echo got USR1' USR1; trap 'echo bye; exit 7' TERM; echo started; while :; do sleep 0.05; done`},
			Env: []string{"COLOUR=dark green"}, Labels: map[string]string{"tour": "yes", "with.value": "a b"}, StopTimeout: &timeout},
		{Name: "quick", Cmd: []string{"echo", "one line"}},
		{Name: "fail", Cmd: []string{"sh", "-c", "echo out; echo err >&2; exit 3"}},
		{Name: "cat", Cmd: []string{"cat"}, OpenStdin: true, StdinOnce: true},
		{Name: "idle", Cmd: []string{"sleep", "1000000"}, User: "1000:1000", WorkingDir: "/tmp", StopTimeout: &soon},
		{Name: "lines", Cmd: []string{"sh", "-c", `i=0; while [ $i -lt 20 ]; do echo "out $i"; i=$((i+1)); done; printf 'no newline'`}},
		{Name: "shell", Cmd: []string{"sh"}, TTY: true, OpenStdin: true, Env: []string{"PS1=> "}},
		{Name: "missing", Cmd: []string{"/no/such/program"}},
		{Name: "refused", Cmd: []string{"/etc/passwd"}},
		{Name: "signalled", Cmd: []string{"sh", "-c", "kill -9 $$"}},
		{Name: "readonly", Cmd: []string{"sleep", "1000000"}, ReadOnly: true, StopTimeout: &soon},
		{Name: "big", Cmd: []string{"sh", "-c", "head -c 3000000 /dev/zero | tr '\\0' x"}},
		{Name: "waits", Cmd: []string{"sh", "-c", `trap 'exit 5' TERM; while :; do sleep 0.05; done`}},
		{Name: "follow", Cmd: []string{"sh", "-c", `for i in 1 2 3 4 5; do echo "line $i"; sleep 0.2; done`}},
	}
}

// Ref is what the tour's image is called on both sides.
const Ref = "tour:latest"

// Pod is the document of a pod with the tour's containers, each made from image. It must be launched with Hold and
// Linger: the tour starts the containers itself.
func Pod(image spec.Image) *spec.Pod {
	image.Ref = Ref
	p := &spec.Pod{Version: spec.PodVersion, Name: "tour", Containers: containers()}
	created := time.Now().UTC().Add(-time.Minute)
	for i := range p.Containers {
		c := &p.Containers[i]
		c.ID = fmt.Sprintf("%02x%s", i+1, strings.Repeat("c0ffee", 11)[:62])
		c.Image, c.Created = image, created.Add(time.Duration(i)*time.Second)
		c.Env = append([]string{}, c.Env...)
		c.Env = append(c.Env, "PATH="+Path)
		c.NonCritical = true
	}
	p.Containers[0].NonCritical = false
	return p
}

// Path is the PATH of the tour's image.
const Path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Create makes the same containers with docker.
func Create(ctx context.Context, h Host) error {
	for _, c := range containers() {
		args := []string{"create", "--network", "none", "--hostname", "tour", "--name", c.Name}
		for _, e := range c.Env {
			args = append(args, "-e", e)
		}
		for k, v := range c.Labels {
			args = append(args, "-l", k+"="+v)
		}
		for flag, on := range map[string]bool{"-t": c.TTY, "-i": c.OpenStdin, "--read-only": c.ReadOnly} {
			if on {
				args = append(args, flag)
			}
		}
		if c.User != "" {
			args = append(args, "-u", c.User)
		}
		if c.WorkingDir != "" {
			args = append(args, "-w", c.WorkingDir)
		}
		if c.StopTimeout != nil {
			args = append(args, "--stop-timeout", fmt.Sprint(*c.StopTimeout))
		}
		args = append(append(args, Ref), c.Cmd...)
		if out, err := h.Docker(ctx, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, out)
		}
	}
	return nil
}

// Import makes the tour's image from a root directory.
func Import(ctx context.Context, h Host, root string) error {
	tar := exec.CommandContext(ctx, "tar", "-C", root, "--numeric-owner", "-c", ".")
	pipe, err := tar.StdoutPipe()
	if err != nil {
		return err
	}
	load := h.Docker(ctx, "import", "-c", "ENV PATH="+Path, "-", Ref)
	load.Stdin = pipe
	if err := tar.Start(); err != nil {
		return err
	}
	out, err := load.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("docker import: %w: %s", err, out)
	}
	return errors.Join(err, tar.Wait())
}

// result is what one call of the client gave.
type result struct {
	Stdout string
	Stderr string
	Code   int
}

// call is one call of the client.
type call struct {
	args  []string
	stdin string
	open  bool // stdin stays open until the client ends
	tty   *pty.Winsize
	typed []reply // with tty: what is typed when something has been seen

	// newer changes dockerd's answer where its version 20.10 did something else than 28 does.
	newer func(*result)
}

// reply is what is typed once text has appeared behind what was seen before.
type reply struct{ seen, send string }

func (h Host) run(t *testing.T, c call) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stepTimeout)
	defer cancel()
	cmd := h.Docker(ctx, c.args...)
	var r result
	var err error
	if c.tty != nil {
		r.Stdout, err = onTerminal(cmd, c.tty, c.typed)
	} else {
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		switch {
		case c.open:
			pr, pw, perr := os.Pipe()
			if perr != nil {
				t.Fatal(perr)
			}
			defer pr.Close()
			defer pw.Close()
			cmd.Stdin = pr
		default:
			cmd.Stdin = strings.NewReader(c.stdin)
		}
		err = cmd.Run()
		r.Stdout, r.Stderr = stdout.String(), stderr.String()
	}
	if ctx.Err() != nil {
		t.Fatalf("%s: docker %s has not ended within %s\nstdout: %.2000s\nstderr: %.2000s", h.Name, strings.Join(c.args, " "), stepTimeout, r.Stdout, r.Stderr)
	}
	exit := (*exec.ExitError)(nil)
	switch {
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil:
		t.Fatalf("%s: docker %s: %v", h.Name, strings.Join(c.args, " "), err)
	}
	return r
}

// onTerminal runs a command on a terminal of its own and types what it is told to.
func onTerminal(cmd *exec.Cmd, size *pty.Winsize, typed []reply) (string, error) {
	f, err := pty.StartWithSize(cmd, size)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var mu sync.Mutex
	var all bytes.Buffer
	more := make(chan struct{}, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		buf := make([]byte, 4096)
		for {
			n, err := f.Read(buf)
			mu.Lock()
			all.Write(buf[:n])
			mu.Unlock()
			select {
			case more <- struct{}{}:
			default:
			}
			if err != nil { // EIO: the last process has closed the terminal
				return
			}
		}
	}()
	from := 0
	for _, r := range typed {
		for seen := false; !seen; {
			mu.Lock()
			i := bytes.Index(all.Bytes()[from:], []byte(r.seen))
			if seen = i >= 0; seen {
				from += i + len(r.seen)
			}
			mu.Unlock()
			if seen {
				break
			}
			select {
			case <-more:
			case <-done:
				mu.Lock()
				defer mu.Unlock()
				return all.String(), fmt.Errorf("the terminal closed before %q was seen: %w", r.seen, cmd.Wait())
			}
		}
		if _, err := io.WriteString(f, r.send); err != nil {
			return all.String(), err
		}
	}
	err = cmd.Wait()
	<-done
	mu.Lock()
	defer mu.Unlock()
	return all.String(), err
}

// tour is one walk.
type tour struct {
	*testing.T
	ours, theirs Host
	dirs         [2]string // a directory of each side's own for files on the client's side
}

// both makes the same calls with both hosts and compares. A test with the name of the step says what differs. "@/" in
// an argument stands for the side's directory.
func (r *tour) both(name string, calls ...call) {
	r.Helper()
	r.Run(name, func(t *testing.T) {
		t.Helper()
		var got [2][]result
		for side, h := range []Host{r.ours, r.theirs} {
			for _, c := range calls {
				args := make([]string, len(c.args))
				for i, a := range c.args {
					args[i] = strings.ReplaceAll(a, "@/", r.dirs[side]+"/")
				}
				c.args = args
				res := h.run(t, c)
				res.Stdout = strings.ReplaceAll(res.Stdout, r.dirs[side]+"/", "@/")
				res.Stderr = strings.ReplaceAll(res.Stderr, r.dirs[side]+"/", "@/")
				if !h.Pod && c.newer != nil {
					c.newer(&res)
				}
				if len(c.typed) > 0 {
					// What was waited for has been seen. The rest is as the shell and the client happen to meet.
					res.Stdout = fmt.Sprint("detached: ", strings.Contains(res.Stdout, "read escape sequence"))
				}
				got[side] = append(got[side], res.normal())
			}
		}
		if d := cmp.Diff(got[1], got[0]); d != "" {
			t.Errorf("dockerd's answer (-), the pod's (+):\n%s", d)
		}
	})
}

// docker is a call without input.
func docker(args ...string) call { return call{args: args} }

// code is for a call that ended with one code in 20.10 and ends with another since.
func code(old, since int) func(*result) {
	return func(r *result) {
		if r.Code == old {
			r.Code = since
		}
	}
}

// eachSide does something with both hosts that cannot be compared.
func (r *tour) eachSide(f func(h Host, dir string)) {
	r.Helper()
	f(r.ours, r.dirs[0])
	f(r.theirs, r.dirs[1])
}

// await waits until a call's output satisfies ok, on both hosts.
func (r *tour) await(what string, c call, ok func(result) bool) {
	r.Helper()
	r.eachSide(func(h Host, _ string) {
		deadline := time.Now().Add(stepTimeout)
		for {
			res := h.run(r.T, c)
			if ok(res) {
				return
			}
			if time.Now().After(deadline) {
				r.Fatalf("%s: %s has not come within %s; last: %+v", h.Name, what, stepTimeout, res)
			}
			time.Sleep(20 * time.Millisecond) // between two questions; docker offers no event for output
		}
	})
}

// awaitLog waits until a container has written text.
func (r *tour) awaitLog(container, text string) {
	r.Helper()
	r.await(container+" writing "+text, docker("logs", container), func(res result) bool {
		return strings.Contains(res.Stdout+res.Stderr, text)
	})
}

// Run walks. Both hosts must have the tour's containers, created and not started.
func Run(t *testing.T, ours, theirs Host) {
	base := t.TempDir()
	r := &tour{T: t, ours: ours, theirs: theirs, dirs: [2]string{filepath.Join(base, "a"), filepath.Join(base, "b")}}
	for _, d := range r.dirs {
		if err := clientFiles(d); err != nil {
			t.Fatal(err)
		}
	}
	events := [2]*recorder{record(t, ours), record(t, theirs)}
	r.created()
	r.starts()
	r.lists()
	r.logs()
	r.execs()
	r.terminals()
	r.signals()
	r.copies()
	r.waits()
	r.names()
	if ours.Limits {
		r.updates()
	}
	r.refusals()
	r.wire()
	r.shapes()
	r.events(events)
}
