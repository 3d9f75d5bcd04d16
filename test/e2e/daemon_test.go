package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/servers"
)

// host is a daemon of ours and the docker client that speaks to it.
type host struct {
	t    *testing.T
	dir  string
	d    *servers.Daemon
	root string
}

// startHost starts a daemon with one image, test/busybox.
func startHost(t *testing.T) *host {
	t.Helper()
	h := &host{t: t, dir: tempDir(t)}
	h.root = filepath.Join(h.dir, "root")
	t.Setenv("KCRADLE_TEMPLATES", "off")
	h.start()
	t.Cleanup(func() {
		for id := range strings.FieldsSeq(h.docker("ps", "-aq")) {
			h.docker("rm", "-f", "-v", id)
		}
		h.d.Stop()
		if rest := supervisors(h.root); len(rest) > 0 {
			t.Errorf("supervisors that nobody needs: %v", rest)
		}
	})
	h.docker("load", "-q", "-i", image(t, "busybox").Archive)
	return h
}

func (h *host) start() {
	h.t.Helper()
	var err error
	if h.d, err = servers.StartDaemon(h.t.Context(), h.dir, kcradle(h.t)); err != nil {
		h.t.Fatal(err)
	}
}

// crash kills the daemon as nothing could foresee it, and starts another one.
func (h *host) crash() {
	h.t.Helper()
	if err := syscall.Kill(h.d.Pid(), syscall.SIGKILL); err != nil {
		h.t.Fatal(err)
	}
	h.d.Stop() // waits for its end
	h.start()
}

func (h *host) command(args ...string) *exec.Cmd {
	return servers.Client(context.WithoutCancel(h.t.Context()), h.d.Host, args...) // also while the test cleans up
}

// docker runs the client, which must succeed, and returns what it wrote, without the last newline.
func (h *host) docker(args ...string) string {
	h.t.Helper()
	return strings.TrimSuffix(succeed(h.t, h.command(args...)), "\n")
}

// refused runs the client, which must end with that code, and returns what it complains of.
func (h *host) refused(code int, args ...string) string {
	h.t.Helper()
	cmd := h.command(args...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	_ = cmd.Run() // the code says it
	if got := cmd.ProcessState.ExitCode(); got != code {
		h.t.Errorf("docker %s: got exit code %d, want %d; stderr: %s", strings.Join(args, " "), got, code, stderr.String())
	}
	return stderr.String()
}

func (h *host) want(what, got, want string) {
	h.t.Helper()
	if got != want {
		h.t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

// supervisors are the processes that supervise pods below a state directory.
func supervisors(root string) []int {
	var out []int
	dirs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range dirs {
		b, err := os.ReadFile(f)
		if err == nil && bytes.Contains(b, []byte("--supervise-fd")) && bytes.Contains(b, []byte(root)) {
			pid, _ := strconv.Atoi(filepath.Base(filepath.Dir(f)))
			out = append(out, pid)
		}
	}
	return out
}

// supervisor is that of one container.
func (h *host) supervisor(name string) int {
	h.t.Helper()
	id := h.docker("inspect", "-f", "{{.Id}}", name)
	pids := supervisors(filepath.Join(h.root, "containers", id))
	if len(pids) != 1 {
		h.t.Fatalf("container %s has the supervisors %v, want one", name, pids)
	}
	return pids[0]
}

const busybox = "test/busybox"

// TestDaemon is the life of containers, by the real docker client against the daemon.
func TestDaemon(t *testing.T) {
	need.Command(t, "curl", "hack/deps test")
	h := startHost(t)

	// docker run: output, input, exit codes, what cannot be started, and nothing left behind.
	h.want("run", h.docker("run", "--rm", busybox, "echo", "hello"), "hello")
	in := h.command("run", "--rm", "-i", busybox, "cat")
	in.Stdin = strings.NewReader("typed")
	h.want("run -i", succeed(t, in), "typed")
	h.refused(7, "run", "--rm", busybox, "sh", "-c", "exit 7")
	if msg := h.refused(127, "run", "--rm", busybox, "no-such-program"); !strings.Contains(msg, "executable file not found in $PATH") {
		t.Errorf("run of what is not there: %s", msg)
	}
	if msg := h.refused(125, "run", "--rm", "--pid", "host", busybox, "true"); !strings.Contains(msg, "HostConfig.PidMode is refused") {
		t.Errorf("run --pid host: %s", msg)
	}
	if msg := h.refused(125, "run", "--rm", "--pull", "never", "no/such/image"); !strings.Contains(msg, "No such image: no/such/image:latest") {
		t.Errorf("run of an image that is not there: %s", msg)
	}
	h.want("ps -a", h.docker("ps", "-aq"), "")

	// A container that goes on.
	id := h.docker("run", "-d", "--name", "web", "-p", "127.0.0.1::80", "-l", "k=v", busybox,
		"sh", "-c", "mkdir /www; echo page >/www/index.html; echo ready; exec httpd -f -h /www")
	h.want("ps", h.docker("ps", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Image}} {{.State}}"), id+" web "+busybox+" running")
	await(t, "its first words", func() bool { return h.docker("logs", "web") == "ready" })
	h.want("exec", h.docker("exec", "web", "hostname"), id[:12])
	h.refused(3, "exec", "web", "sh", "-c", "exit 3")
	h.want("published port", succeed(t, exec.Command("curl", "-s", "http://"+h.docker("port", "web", "80/tcp"))), "page\n")
	h.docker("pause", "web")
	h.want("paused", h.docker("inspect", "-f", "{{.State.Status}}", "web"), "paused")
	h.docker("unpause", "web")
	h.docker("rename", "web", "web2")
	h.refused(1, "inspect", "web")
	file := filepath.Join(h.dir, "file")
	if err := os.WriteFile(file, []byte("from the host"), 0o644); err != nil {
		t.Fatal(err)
	}
	h.docker("cp", file, "web2:/root-file")
	h.want("cp", h.docker("exec", "web2", "cat", "/root-file"), "from the host")
	if msg := h.refused(1, "rm", "web2"); !strings.Contains(msg, "container is running") {
		t.Errorf("rm of what runs: %s", msg)
	}
	h.docker("update", "--memory", "64m", "--memory-swap", "64m", "web2")
	h.want("update", h.docker("exec", "web2", "cat", "/sys/fs/cgroup/memory.max"), "67108864")

	// Stopped: the files, the logs and the exit code are still there, and the next start finds what was written.
	h.docker("stop", "-t", "0", "web2")
	h.want("stopped", h.docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "web2"), "exited 137")
	h.want("logs of what has stopped", h.docker("logs", "web2"), "ready")
	h.docker("cp", "web2:/root-file", file+"2")
	if b, err := os.ReadFile(file + "2"); string(b) != "from the host" {
		t.Errorf("cp of what has stopped: got %q, %v", b, err)
	}
	if d := h.docker("diff", "web2"); !slices.Contains(strings.Split(d, "\n"), "A /root-file") {
		t.Errorf("diff: got %q", d)
	}
	h.want("after cp", h.docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "web2"), "exited 137")
	h.docker("start", "web2")
	h.want("started again", h.docker("exec", "web2", "cat", "/root-file", "/sys/fs/cgroup/memory.max"), "from the host67108864")
	h.docker("restart", "-t", "0", "web2")
	h.want("restarted", h.docker("exec", "web2", "cat", "/root-file"), "from the host")
	h.docker("rm", "-f", "web2")

	// create, start -a, wait.
	h.docker("create", "--name", "once", busybox, "sh", "-c", "echo out; exit 4")
	start := h.command("start", "-a", "once")
	if out, err := start.Output(); string(out) != "out\n" || start.ProcessState.ExitCode() != 4 {
		t.Errorf("start -a: got %q, %v", out, err)
	}
	h.want("wait", h.docker("wait", "once"), "4")
	h.docker("rm", "once")

	// An image of a container, under two names, out and in again.
	h.docker("run", "--name", "base", "-e", "A=b", busybox, "sh", "-c", "echo new >/etc/new; rm /usr/bin/wget")
	h.docker("commit", "-m", "why", "-c", `CMD ["cat","/etc/new"]`, "base", "my/image:1")
	h.docker("rm", "base")
	h.want("run of a committed image", h.docker("run", "--rm", "my/image:1"), "new")
	h.want("what a layer took away", h.docker("run", "--rm", "my/image:1", "sh", "-c", "ls /usr/bin/wget 2>&1; echo $A"), "ls: /usr/bin/wget: No such file or directory\nb")
	committed := h.docker("inspect", "-f", "{{.Id}}", "my/image:1")
	h.docker("tag", "my/image:1", "my/image:2")
	archive := filepath.Join(h.dir, "image.tar")
	h.docker("save", "-o", archive, "my/image:2")
	h.docker("rmi", "my/image:1", "my/image:2")
	h.refused(1, "inspect", "my/image:1")
	h.docker("load", "-q", "-i", archive)
	h.want("an image that was out and in again", h.docker("inspect", "-f", "{{.Id}} {{.Comment}}", "my/image:2"), committed+" why")
	if out := h.docker("rmi", "my/image:2"); !strings.Contains(out, "Deleted: "+committed) {
		t.Errorf("rmi of the last name: %s", out)
	}

	// Volumes outlive containers; an anonymous one goes with rm -v.
	h.docker("run", "--rm", "-v", "data:/data", busybox, "sh", "-c", "echo kept >/data/f")
	h.want("a volume", h.docker("run", "--rm", "-v", "data:/data:ro", busybox, "cat", "/data/f"), "kept")
	h.docker("run", "-d", "--name", "holder", "-v", "data:/data", busybox, "sleep", "1000")
	if msg := h.refused(125, "run", "--rm", "-v", "data:/data", busybox, "true"); !strings.Contains(msg, "volume data is in use by container holder") {
		t.Errorf("a volume that is in use: %s", msg)
	}
	if msg := h.refused(1, "volume", "rm", "data"); !strings.Contains(msg, "volume is in use") {
		t.Errorf("volume rm of what is in use: %s", msg)
	}
	h.docker("rm", "-f", "holder")
	h.docker("volume", "rm", "data")
	h.docker("run", "--rm", "-v", "/anonymous", busybox, "true")
	h.want("volumes", h.docker("volume", "ls", "-q"), "")
	h.want("a bind", h.docker("run", "--rm", "-v", file+":/f:ro", busybox, "cat", "/f"), "from the host")
}

// An image goes to a registry and comes back from it.
func TestDaemonRegistry(t *testing.T) {
	need.Command(t, "docker-registry", "hack/deps test")
	need.Command(t, "curl", "hack/deps test")
	reg, err := servers.StartRegistry(t.Context(), tempDir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reg.Stop)
	h := startHost(t) // a registry on loopback needs no word of it
	name := reg.Addr + "/team/app:1"
	h.docker("tag", busybox, name)
	id := h.docker("inspect", "-f", "{{.Id}}", busybox)
	pushed := h.docker("push", name)
	_, digest, ok := strings.Cut(pushed, "1: digest: ")
	digest, _, _ = strings.Cut(digest, " ")
	if !ok || !strings.HasPrefix(digest, "sha256:") {
		t.Fatalf("push: got %s", pushed)
	}
	// What is at the registry, asked by way of the daemon.
	answer := succeed(t, exec.CommandContext(t.Context(), "curl", "-s", "--unix-socket", strings.TrimPrefix(h.d.Host, "unix://"), "http://d/distribution/"+name+"/json"))
	var remote struct {
		Descriptor struct{ Digest string }
		Platforms  []struct{ OS, Architecture string }
	}
	if err := json.Unmarshal([]byte(answer), &remote); err != nil || remote.Descriptor.Digest != digest || len(remote.Platforms) != 1 || remote.Platforms[0].Architecture != "amd64" {
		t.Errorf("distribution: got %s, %v", answer, err)
	}
	h.docker("rmi", name, busybox)
	h.want("pull", h.docker("pull", "-q", name), name)
	h.want("what came back", h.docker("inspect", "-f", "{{.Id}} {{index .RepoDigests 0}}", name), id+" "+reg.Addr+"/team/app@"+digest)
	h.want("run --pull always", h.docker("run", "--rm", "--pull", "always", "-q", name+"@"+digest, "echo", "pulled"), "pulled")
	if msg := h.refused(1, "pull", reg.Addr+"/team/none"); !strings.Contains(msg, "no such image") {
		t.Errorf("pull of what is not there: %s", msg)
	}
}

// The sequence of events is docker's.
func TestDaemonEvents(t *testing.T) {
	h := startHost(t)
	since := time.Now()
	h.refused(3, "run", "--rm", "--name", "short", "-l", "who=me", busybox, "sh", "-c", "exit 3")
	out := h.docker("events", "--since", strconv.FormatInt(since.Unix(), 10), "--until", strconv.FormatInt(time.Now().Unix()+1, 10), "--format", "{{json .}}")
	var got []string
	for line := range strings.SplitSeq(out, "\n") {
		var m struct {
			Type, Action string
			Actor        struct{ Attributes map[string]string }
		}
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		if m.Type == "image" {
			continue
		}
		s := m.Type + " " + m.Action
		if m.Type == "container" {
			s += fmt.Sprintf(" %s %s %s", m.Actor.Attributes["name"], m.Actor.Attributes["who"], m.Actor.Attributes["exitCode"])
		}
		got = append(got, strings.TrimSpace(s))
	}
	want := []string{"container create short me", "container attach short me", "network connect", "container start short me",
		"container die short me 3", "network disconnect", "container destroy short me"}
	if !slices.Equal(got, want) {
		t.Errorf("events: got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// A daemon that is killed has lost nothing: what runs goes on and is taken up, what ended in between is known, what was to
// remove itself is gone, what was to come back is back.
func TestDaemonKilled(t *testing.T) {
	h := startHost(t)
	h.docker("run", "-d", "--name", "runs", busybox, "sh", "-c", "echo one; exec sleep 1000")
	h.docker("run", "-d", "--name", "ends", busybox, "sh", "-c", "while [ ! -e /go ]; do sleep 0.1; done; exit 9")
	h.docker("run", "-d", "--rm", "--name", "goes", busybox, "sh", "-c", "while [ ! -e /go ]; do sleep 0.1; done")
	h.docker("run", "-d", "--restart", "always", "--name", "back", busybox, "sleep", "1000")
	back := h.supervisor("back")
	pids := []int{h.supervisor("ends"), h.supervisor("goes")}
	runs := h.supervisor("runs")
	for _, name := range []string{"ends", "goes"} {
		h.docker("exec", "-d", name, "sh", "-c", "sleep 1; touch /go")
	}
	if err := syscall.Kill(h.d.Pid(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	h.d.Stop()
	if err := syscall.Kill(back, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	await(t, "the ends of containers without a daemon", func() bool {
		return !slices.ContainsFunc(append(pids, back), func(pid int) bool { return syscall.Kill(pid, 0) == nil })
	})
	h.start()
	await(t, "what was to go and to come back", func() bool {
		return h.docker("ps", "-a", "--filter", "status=running", "--format", "{{.Names}}") == "back\nruns" &&
			h.docker("ps", "-a", "--filter", "name=goes", "-q") == ""
	})
	h.want("the exit code of what ended", h.docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "ends"), "exited 9")
	h.want("what runs", h.docker("exec", "runs", "echo", "still"), "still")
	h.want("its log", h.docker("logs", "runs"), "one")
	if pid := h.supervisor("runs"); pid != runs {
		t.Errorf("the supervisor of what runs: got %d, want %d as before", pid, runs)
	}
	if h.supervisor("back") == back {
		t.Error("what was to come back has its dead supervisor")
	}

	// And once more with nothing to do.
	h.crash()
	h.want("after another", h.docker("exec", "runs", "echo", "still"), "still")
}

// systemd opens the socket, hears when the daemon is ready, and the socket outlives the daemon.
func TestDaemonActivated(t *testing.T) {
	dir := tempDir(t)
	listen := func(network, name string) (net.Conn, *os.File) {
		addr := &net.UnixAddr{Net: network, Name: filepath.Join(dir, name)}
		if network == "unixgram" {
			c, err := net.ListenUnixgram(network, addr)
			if err != nil {
				t.Fatal(err)
			}
			return c, nil
		}
		l, err := net.ListenUnix(network, addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		f, err := l.File()
		if err != nil {
			t.Fatal(err)
		}
		return nil, f
	}
	notify, _ := listen("unixgram", "notify")
	defer notify.Close()
	_, socket := listen("unix", "docker.sock")
	defer socket.Close()

	// The process ID of a program that is to know it: the shell's, which becomes the daemon.
	cmd := exec.Command("sh", "-c", `LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" --root "$1" daemon -H fd://`, kcradle(t), filepath.Join(dir, "root"))
	cmd.Env = append(os.Environ(), "NOTIFY_SOCKET="+filepath.Join(dir, "notify"))
	cmd.ExtraFiles = []*os.File{socket}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { cmd.Process.Kill() })
	if err := notify.SetReadDeadline(time.Now().Add(startTimeout)); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 256)
	n, err := notify.Read(b)
	if got := string(b[:n]); err != nil || got != "READY=1" {
		t.Fatalf("systemd hears %q, %v; want READY=1", got, err)
	}
	host := "unix://" + filepath.Join(dir, "docker.sock")
	if got := strings.TrimSpace(succeed(t, servers.Client(t.Context(), host, "version", "-f", "{{.Server.APIVersion}}"))); got != "1.50" {
		t.Errorf("API version: got %q", got)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Errorf("the daemon was asked to end: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "docker.sock")); err != nil {
		t.Errorf("systemd's socket after the daemon's end: %v", err)
	}
}

// Two daemons on one state directory, or on one socket: the second one says so and touches nothing.
func TestDaemonTwice(t *testing.T) {
	h := startHost(t)
	for _, args := range [][]string{
		{"--root", h.root, "daemon", "-H", "unix://" + filepath.Join(h.dir, "other.sock")},
		{"--root", filepath.Join(h.dir, "other"), "daemon", "-H", h.d.Host},
		{"--root", filepath.Join(h.dir, "other"), "daemon", "-H", "tcp://127.0.0.1:0"},
	} {
		cmd := exec.Command(kcradle(t), args...)
		out, err := cmd.CombinedOutput()
		if err == nil || cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("%v: got %v, %s", args, err, out)
		}
		t.Logf("%s", out)
	}
	h.want("the first one", h.docker("images", "-q", busybox), h.docker("inspect", "-f", "{{slice .Id 7 19}}", busybox))
}

// await waits until cond is true.
func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	end := time.After(startTimeout)
	for !cond() {
		select {
		case <-tick.C:
		case <-end:
			t.Fatalf("%s: not within %v", what, startTimeout)
		}
	}
}
