package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/servers"
)

// raw sends a request to the daemon and returns the connection behind it: a client that can go whenever it likes.
func (h *host) raw(method, path, body string, header ...string) (net.Conn, *bufio.Reader) {
	h.t.Helper()
	conn, err := net.Dial("unix", strings.TrimPrefix(h.d.Host, "unix://"))
	if err != nil {
		h.t.Fatal(err)
	}
	fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: d\r\nContent-Type: application/json\r\nContent-Length: %d\r\n", method, path, len(body))
	for _, line := range header {
		fmt.Fprintf(conn, "%s\r\n", line)
	}
	fmt.Fprintf(conn, "\r\n%s", body)
	return conn, bufio.NewReader(conn)
}

// descriptors are the files that the daemon has open.
func (h *host) descriptors() int {
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", h.d.Pid()))
	if err != nil {
		h.t.Fatal(err)
	}
	return len(list)
}

// TestDaemonClientGone: a client may go in the middle of every stream. The daemon lets go of its end, and the container goes on.
func TestDaemonClientGone(t *testing.T) {
	h := startHost(t)
	h.docker("run", "-d", "-i", "--name", "box", busybox, "sh", "-c", "head -c 40000000 /dev/zero >/big; while :; do echo tick; sleep 0.1; done")
	await(t, "its first words", func() bool { return strings.Contains(h.docker("logs", "box"), "tick") })
	upgrade := []string{"Connection: Upgrade", "Upgrade: tcp"}
	exec := func() string {
		conn, r := h.raw("POST", "/containers/box/exec", `{"Cmd":["sh","-c","while :; do echo x; done"],"AttachStdout":true}`, "Connection: close")
		defer conn.Close()
		all, _ := io.ReadAll(r)
		_, rest, _ := strings.Cut(string(all), `"Id":"`)
		id, _, _ := strings.Cut(rest, `"`)
		return id
	}
	before := h.descriptors()
	for _, tc := range []struct {
		name, method, path, body string
		header                   []string
	}{
		{"logs -f", "GET", "/containers/box/logs?follow=1&stdout=1", "", nil},
		{"attach", "POST", "/containers/box/attach?stream=1&stdout=1&stdin=1", "", upgrade},
		{"exec", "POST", "/exec/" + exec() + "/start", `{}`, upgrade},
		{"events", "GET", "/events?since=1", "", nil},
		{"stats", "GET", "/containers/box/stats", "", nil},
		{"export", "GET", "/containers/box/export", "", nil},
		{"cp", "GET", "/containers/box/archive?path=/big", "", nil},
		{"save", "GET", "/images/" + busybox + "/get", "", nil},
		{"wait", "POST", "/containers/box/wait", "", nil},
	} {
		conn, r := h.raw(tc.method, tc.path, tc.body, tc.header...)
		status, err := r.ReadString('\n')
		if err != nil || !strings.Contains(status, " 200 ") && !strings.Contains(status, " 101 ") {
			rest, _ := io.ReadAll(io.LimitReader(r, 1<<10))
			t.Errorf("%s: got %q, %v, %s", tc.name, status, err, rest)
		}
		if tc.name != "wait" {
			if _, err := io.ReadFull(r, make([]byte, 256)); err != nil {
				t.Errorf("%s: the stream does not begin: %v", tc.name, err)
			}
		}
		conn.Close()
	}
	// Bodies that never end: an archive to be copied in, an image to be loaded.
	for _, path := range []string{"PUT /containers/box/archive?path=/", "POST /images/load", "POST /images/create?fromSrc=-&repo=x"} {
		method, path, _ := strings.Cut(path, " ")
		conn, err := net.Dial("unix", strings.TrimPrefix(h.d.Host, "unix://"))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "%s %s HTTP/1.1\r\nHost: d\r\nContent-Type: application/x-tar\r\nContent-Length: 100000000\r\n\r\n", method, path)
		if _, err := conn.Write(make([]byte, 100)); err != nil {
			t.Error(err)
		}
		conn.Close()
	}
	await(t, "the daemon's end of each stream", func() bool { return h.descriptors() <= before+1 })
	h.want("the container", h.docker("inspect", "-f", "{{.State.Status}}", "box"), "running")
	h.want("an exec beside the one whose client has gone", h.docker("exec", "box", "echo", "here"), "here")
}

// TestDaemonPullGone: a client goes while an image comes from a registry that has stopped sending.
func TestDaemonPullGone(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	asked, gone := make(chan bool, 16), make(chan bool, 16)
	srv := &http.Server{Handler: http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		asked <- true
		<-r.Context().Done()
		gone <- true
	})}
	go srv.Serve(l)
	t.Cleanup(func() { srv.Close() })
	t.Setenv("KCRADLE_PLAIN_HTTP", l.Addr().String())
	h := startHost(t)
	conn, _ := h.raw("POST", "/images/create?fromImage="+l.Addr().String()+"/x&tag=1", "")
	<-asked
	conn.Close()
	<-gone
}

// TestDaemonFlood: a container that writes as fast as it can fills neither the disk nor the daemon, and is stopped as any other.
func TestDaemonFlood(t *testing.T) {
	h := startHost(t)
	h.docker("run", "-d", "--name", "flood", busybox, "yes", "all work and no play")
	id := h.docker("inspect", "-f", "{{.Id}}", "flood")
	log := filepath.Join(h.root, "containers", id, "logs", id+".log")
	await(t, "the log's turn", func() bool { _, err := os.Stat(log + ".1"); return err == nil })
	h.want("exec beside it", h.docker("exec", "flood", "echo", "here"), "here")
	for _, f := range []string{log, log + ".1"} {
		if fi, err := os.Stat(f); err != nil || fi.Size() > 17<<20 {
			t.Errorf("%s: %v, %v", f, fi, err)
		}
	}
	h.docker("stop", "-t", "0", "flood")
	if last := h.docker("logs", "-n", "1", "flood"); !strings.HasPrefix("all work and no play", last) || last == "" {
		t.Errorf("its last line: got %q", last)
	}
	h.want("stopped", h.docker("inspect", "-f", "{{.State.Status}}", "flood"), "exited")
}

// TestDaemonMachineKilled: the machine is killed under an exec, and under a container whose client waits.
func TestDaemonMachineKilled(t *testing.T) {
	h := startHost(t)
	h.docker("run", "-d", "--name", "box", busybox, "sleep", "1000")
	run := h.command("exec", "box", "sh", "-c", "echo here; sleep 1000")
	out, err := run.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := run.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "here\n" {
		t.Fatalf("exec: got %q, %v", line, err)
	}
	wait := h.command("wait", "box")
	var code bytes.Buffer
	wait.Stdout = &code
	if err := wait.Start(); err != nil {
		t.Fatal(err)
	}
	for _, pid := range machines(h.t, h.root) {
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
	}
	if err := run.Wait(); err == nil {
		t.Error("an exec whose machine was killed has succeeded")
	}
	if err := wait.Wait(); err != nil {
		t.Errorf("wait: %v", err)
	}
	h.want("the exit code that was waited for, if the wait had begun", strings.TrimSpace(code.String()), "137")
	h.want("the state", h.docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "box"), "exited 137")
	if why := h.docker("inspect", "-f", "{{.State.Error}}", "box"); !strings.Contains(why, "the machine ended") {
		t.Errorf("why: got %q", why)
	}
	h.docker("start", "box")
	h.want("started again", h.docker("exec", "box", "echo", "here"), "here")
}

// machines are the QEMUs whose disks lie below a directory.
func machines(t *testing.T, dir string) (out []int) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[int]bool{}
	for _, fd := range all {
		target, _ := os.Readlink(fd)
		var pid int
		if !strings.HasPrefix(target, dir) || !strings.HasSuffix(target, ".ext4") {
			continue
		}
		if _, err := fmt.Sscanf(fd, "/proc/%d/", &pid); err != nil || seen[pid] {
			continue
		}
		if exe, _ := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); strings.HasPrefix(filepath.Base(exe), "qemu-system-") {
			seen[pid] = true
			out = append(out, pid)
		}
	}
	return out
}

// TestDaemonDeafMachine: a machine that stands still answers nothing; rm -f ends it, and the others never notice.
func TestDaemonDeafMachine(t *testing.T) {
	h := startHost(t)
	h.docker("run", "-d", "--name", "deaf", busybox, "sleep", "1000")
	for _, pid := range machines(t, h.root) {
		if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	h.docker("run", "--rm", busybox, "true")
	h.want("ps", h.docker("ps", "--format", "{{.Names}}"), "deaf")
	h.crash() // a start of the daemon does not wait for it either
	h.want("ps of the next daemon", h.docker("ps", "--format", "{{.Names}}"), "deaf")
	h.docker("rm", "-f", "deaf")
	if left := machines(t, h.root); len(left) > 0 {
		t.Errorf("machines that are left: %v", left)
	}
}

// TestDaemonDiskFull: the state directory has no room. Whatever needs some says so and leaves nothing half made; what runs, runs.
func TestDaemonDiskFull(t *testing.T) {
	need.Command(t, "docker-registry", "hack/deps test")
	reg, err := servers.StartRegistry(t.Context(), tempDir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reg.Stop)
	t.Setenv("KCRADLE_PLAIN_HTTP", reg.Addr)
	h := &host{t: t, dir: tempDir(t)}
	h.root = tempDir(t) // not below h.dir, whose mounts go with each daemon
	if err := os.Symlink(h.root, filepath.Join(h.dir, "root")); err != nil {
		t.Fatal(err)
	}
	const room = 192 << 20
	if err := unix.Mount("tmpfs", h.root, "tmpfs", 0, fmt.Sprintf("size=%d,mode=755", room)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(h.root, unix.MNT_DETACH) })
	t.Setenv("KCRADLE_TEMPLATES", "off")
	h.start()
	t.Cleanup(func() {
		for id := range strings.FieldsSeq(h.docker("ps", "-aq")) {
			h.docker("rm", "-f", "-v", id)
		}
		h.d.Stop()
	})
	h.docker("load", "-q", "-i", image(t, "busybox").Archive)
	name := reg.Addr + "/app:1"
	h.docker("tag", busybox, name)
	h.docker("push", "-q", name)
	h.docker("rmi", name)
	h.docker("run", "-d", "--name", "runs", busybox, "sh", "-c", "while [ ! -e /go ]; do sleep 0.1; done; yes a line of the log | head -n 100000; exec sleep 1000")
	h.docker("create", "--name", "ready", busybox, "true")
	h.docker("volume", "create", "kept")

	ballast := filepath.Join(h.root, "ballast")
	fill := func() {
		t.Helper()
		f, err := os.OpenFile(ballast, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for _, n := range []int{1 << 20, 4096} {
			for block := make([]byte, n); ; {
				if _, err := f.Write(block); errors.Is(err, unix.ENOSPC) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	fill()
	full := func(code int, args ...string) {
		t.Helper()
		if msg := h.refused(code, args...); !strings.Contains(msg, "no space left on device") {
			t.Errorf("docker %s: got %s", strings.Join(args, " "), msg)
		}
		fill()
	}
	full(1, "create", busybox, "true")
	full(1, "pull", "-q", name)
	full(1, "load", "-q", "-i", image(t, "demo").Archive)
	full(1, "volume", "create", "more")
	full(1, "start", "ready")
	h.want("ps", h.docker("ps", "-a", "--format", "{{.Names}} {{.State}}"), "ready created\nruns running")
	h.want("volumes", h.docker("volume", "ls", "-q"), "kept")
	h.docker("exec", "runs", "touch", "/go") // the log does not fit
	h.want("exec", h.docker("exec", "runs", "echo", "here"), "here")
	h.docker("stop", "-t", "0", "runs")
	h.want("stopped", h.docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "runs"), "exited 137")
	h.crash()
	h.want("after a crash of the daemon", h.docker("ps", "-a", "--format", "{{.Names}} {{.State}}"), "ready created\nruns exited")
	h.docker("rm", "runs") // which needs no room

	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	h.docker("pull", "-q", name)
	h.docker("start", "ready")
	h.want("ready", h.docker("wait", "ready"), "0")
	h.docker("run", "--rm", "-v", "kept:/d", busybox, "touch", "/d/f")
	h.docker("rm", "ready")
	if left, err := filepath.Glob(filepath.Join(h.root, "containers", "*")); len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}

// TestDaemonConflicts: what is taken, and what is in use.
func TestDaemonConflicts(t *testing.T) {
	h := startHost(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	h.docker("create", "--name", "ported", "-p", taken.Addr().String()+":80", busybox, "sleep", "1000")
	if msg := h.refused(1, "start", "ported"); !strings.Contains(msg, "address already in use") {
		t.Errorf("a port that is taken: %s", msg)
	}
	h.want("what could not start", h.docker("inspect", "-f", "{{.State.Status}}", "ported"), "created")
	taken.Close()
	h.docker("start", "ported")
	h.docker("create", "--name", "ported2", "-p", taken.Addr().String()+":80", busybox, "sleep", "1000")
	if msg := h.refused(1, "start", "ported2"); !strings.Contains(msg, "address already in use") {
		t.Errorf("a port of another container: %s", msg)
	}
	if msg := h.refused(1, "create", "--name", "ported", busybox); !strings.Contains(msg, "is already in use by container") {
		t.Errorf("a name that is taken: %s", msg)
	}
	if msg := h.refused(1, "rename", "ported2", "ported"); !strings.Contains(msg, "is already in use by container") {
		t.Errorf("rename to a name that is taken: %s", msg)
	}
	if msg := h.refused(1, "rmi", busybox); !strings.Contains(msg, "is using") && !strings.Contains(msg, "in use") {
		t.Errorf("rmi of what is in use: %s", msg)
	}
	h.docker("rm", "ported2")
	h.docker("rm", "-f", "ported")
	h.docker("network", "create", "net")
	h.docker("run", "-d", "--name", "on", "--network", "net", busybox, "sleep", "1000")
	if msg := h.refused(1, "network", "rm", "net"); !strings.Contains(msg, "has active endpoints") {
		t.Errorf("network rm of what is in use: %s", msg)
	}
	if msg := h.refused(1, "network", "create", "net"); !strings.Contains(msg, "already exists") {
		t.Errorf("a network's name that is taken: %s", msg)
	}
	h.docker("rm", "-f", "on")
	h.docker("network", "rm", "net")
}
