package e2e

import (
	"bufio"
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
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/spec"
)

// TestMariaDB is the story of a database: a client on the host writes, docker dumps and copies, the pod is stopped and
// run again, its machine is killed while rows are written, and nothing that was committed is lost.
func TestMariaDB(t *testing.T) {
	kcradle(t)
	need.Command(t, "mariadb", "hack/deps test")
	p := summon(t, "oci:"+image(t, "mariadb").Layout, "-p", "127.0.0.1::3306", "-m", "768m",
		"-e", "MARIADB_ROOT_PASSWORD=ro'ot", "-e", "MARIADB_DATABASE=shop", "-e", "MARIADB_USER=clerk", "-e", `MARIADB_PASSWORD=pa\ss`)
	const ready = "mariadbd: ready for connections"
	p.start()
	p.waitLog(ready)
	db := database{t, p}

	db.query("CREATE TABLE item (id INT PRIMARY KEY, name VARCHAR(100)) ENGINE=InnoDB; INSERT INTO item VALUES (1,'cradle'),(2,'blanket')")
	const items = "1\tcradle\n2\tblanket\n"
	if got := db.query("SELECT * FROM item ORDER BY id"); got != items {
		t.Fatalf("SELECT over the published port: got %q, want %q", got, items)
	}
	p.waitHealth("healthy")

	// A dump inside, copied out, changed nowhere, copied back, read into another database.
	dump := succeed(t, p.docker("exec", p.name, "mariadb-dump", "-uclerk", `-ppa\ss`, "shop"))
	if !strings.Contains(dump, "(2,'blanket')") || !strings.Contains(dump, "-- Dump completed") {
		t.Errorf("docker exec mariadb-dump: got %q", tail([]byte(dump)))
	}
	succeed(t, p.docker("exec", p.name, "sh", "-c", `mariadb-dump -uclerk '-ppa\ss' shop >/tmp/dump.sql`))
	dir := tempDir(t)
	succeed(t, p.docker("cp", p.name+":/tmp/dump.sql", filepath.Join(dir, "dump.sql")))
	copied, err := os.ReadFile(filepath.Join(dir, "dump.sql"))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(copied), "(2,'blanket')") {
		t.Errorf("docker cp of the dump: got %q", tail(copied))
	}
	succeed(t, p.docker("cp", filepath.Join(dir, "dump.sql"), p.name+":/tmp/back.sql"))
	succeed(t, p.docker("exec", p.name, "sh", "-c",
		`mariadb -uroot "-pro'ot" -e 'CREATE DATABASE copy' && mariadb -uroot "-pro'ot" copy </tmp/back.sql && mariadb -uroot "-pro'ot" -e 'GRANT ALL ON copy.* TO clerk'`))
	if got := db.query("SELECT * FROM copy.item ORDER BY id"); got != items {
		t.Errorf("the dump read back: got %q, want %q", got, items)
	}

	p.stop()
	p.start()
	p.waitLog(ready)
	if got := db.query("SELECT * FROM item ORDER BY id"); got != items {
		t.Errorf("after stop and run: got %q, want %q", got, items)
	}

	db.query("CREATE TABLE log (id INT PRIMARY KEY, pad VARCHAR(2000)) ENGINE=InnoDB")
	last := 0
	for round := range 2 {
		last = db.killWhileWriting(last + 1)
		s := p.state()
		if s.Phase != bundle.PhaseEnded || s.End == nil || s.End.ExitCode == 0 || s.End.Message == "" {
			b, _ := json.Marshal(s)
			t.Errorf("state after QEMU was killed: got %s, want an end with a reason", b)
		}
		p.start()
		p.waitLog(ready)
		var there []int
		for f := range strings.FieldsSeq(db.query("SELECT id FROM log ORDER BY id")) {
			n, err := strconv.Atoi(f)
			if err != nil {
				t.Fatal(err)
			}
			there = append(there, n)
		}
		// The row after the last one acknowledged may have been committed, too.
		if len(there) < last || len(there) > last+1 || there[0] != 1 || there[len(there)-1] != len(there) {
			t.Fatalf("round %d: %d rows were acknowledged; there are %d", round, last, len(there))
		}
		t.Logf("round %d: %d rows acknowledged, %d there", round, last, len(there))
		last = len(there)
	}
	if got := db.query("CHECK TABLE item, log, copy.item"); strings.Count(got, "OK") != 3 {
		t.Errorf("CHECK TABLE: got %q, want OK three times", got)
	}
	p.stop()
}

// database is the server in a pod, asked by a client on the host.
type database struct {
	t *testing.T
	p *pod
}

func (d database) client(args ...string) *exec.Cmd {
	d.t.Helper()
	host, port, err := net.SplitHostPort(d.p.address("3306/tcp"))
	if err != nil {
		d.t.Fatal(err)
	}
	args = append([]string{"--no-defaults", "--protocol=tcp", "-h", host, "-P", port, "-uclerk", `-ppa\ss`, "-N", "--batch", "--unbuffered"}, args...)
	return exec.Command("mariadb", append(args, "shop")...)
}

func (d database) query(sql string) string {
	d.t.Helper()
	return succeed(d.t, d.client("-e", sql))
}

// killWhileWriting writes rows, each a transaction of its own, until enough are acknowledged, kills QEMU while more
// follow, and returns the last row whose commit was acknowledged.
func (d database) killWhileWriting(first int) int {
	d.t.Helper()
	cmd := d.client("--abort-source-on-error")
	in, err := cmd.StdinPipe()
	if err != nil {
		d.t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		d.t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(d.t.Context(), startTimeout)
	defer cancel()
	context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	written := make(chan struct{})
	go func() {
		defer close(written)
		// The client stops reading with the connection, and the pipe breaks.
		for i := first; ; i++ {
			if _, err := fmt.Fprintf(in, "INSERT INTO log VALUES (%d, REPEAT('x', 2000)); SELECT %d;\n", i, i); err != nil {
				return
			}
		}
	}()
	supervisor := d.p.supervisor()
	const enough = 200
	last, s := first-1, bufio.NewScanner(out)
	for s.Scan() {
		n, err := strconv.Atoi(s.Text())
		if err != nil || n != last+1 {
			d.t.Fatalf("the client said %q after row %d", s.Text(), last)
		}
		if last = n; n == first+enough {
			d.p.killMachine()
		}
	}
	_ = cmd.Wait() // it lost its server
	_ = in.Close()
	<-written
	if last < first+enough {
		d.t.Fatalf("only rows %d to %d were acknowledged before the connection ended (%v)", first, last, ctx.Err())
	}
	d.p.waitEnded(supervisor)
	return last
}

// killMachine kills QEMU as the kernel's OOM killer would.
func (p *pod) killMachine() {
	p.t.Helper()
	pid := p.state().MachinePid
	if pid <= 1 {
		p.t.Fatalf("state: machine has pid %d", pid)
	}
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		p.t.Fatalf("kill QEMU: %v", err)
	}
}

// supervisor is a descriptor of the pod's supervisor; with it waitEnded waits for its end.
func (p *pod) supervisor() (pidfd int) {
	p.t.Helper()
	fd, err := unix.PidfdOpen(p.state().Pid, 0)
	if err != nil {
		p.t.Fatalf("open the supervisor's pidfd: %v", err)
	}
	p.t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// waitEnded waits until the supervisor is gone.
func (p *pod) waitEnded(pidfd int) {
	p.t.Helper()
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	deadline := time.Now().Add(startTimeout)
	for {
		n, err := unix.Poll(fds, int(time.Until(deadline).Milliseconds()))
		switch {
		case err == unix.EINTR:
		case err != nil:
			p.t.Fatalf("wait for the supervisor's end: %v", err)
		case n == 0:
			p.t.Fatalf("the supervisor still runs %v after its machine's end", startTimeout)
		default:
			return
		}
	}
}

// waitHealth waits for a health event of the container that says status, or finds it so.
func (p *pod) waitHealth(status string) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), startTimeout)
	defer cancel()
	events := p.docker("events", "--since", "24h", "--filter", "event=health_status", "--format", "{{.Action}}")
	out, err := events.StdoutPipe()
	if err != nil {
		p.t.Fatal(err)
	}
	if err := events.Start(); err != nil {
		p.t.Fatal(err)
	}
	context.AfterFunc(ctx, func() { _ = events.Process.Kill() })
	defer func() { _ = events.Wait() }()
	defer func() { _ = events.Process.Kill() }()
	s := bufio.NewScanner(out)
	for s.Scan() {
		if strings.HasSuffix(s.Text(), ": "+status) {
			got := strings.TrimSpace(succeed(p.t, p.docker("inspect", "--format", "{{.State.Health.Status}}", p.name)))
			if got != status {
				p.t.Errorf("docker inspect: health is %q, want %q", got, status)
			}
			return
		}
	}
	p.t.Fatalf("no event says that the container is %s (%v)", status, ctx.Err())
}

// layersOf are the layers of the only container in a pod.json.
func layersOf(t *testing.T, raw []byte) string {
	t.Helper()
	pod, err := spec.ParsePod(raw)
	if err != nil {
		t.Fatal(err)
	}
	if len(pod.Containers) != 1 || len(pod.Containers[0].Image.Layers) == 0 {
		t.Fatalf("pod.json: want one container with layers, got %s", raw)
	}
	return strings.Join(pod.Containers[0].Image.Layers, " ")
}

func sortLines(s string) []string {
	out := strings.Split(strings.TrimSpace(s), "\n")
	slices.Sort(out)
	return out
}
