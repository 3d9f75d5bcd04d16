package ps

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/internal/need"
)

// The same columns of the same process as the machine's own ps.
func TestAgainstPs(t *testing.T) {
	ps := need.Command(t, "ps", "apt-get install procps")
	sleep := exec.Command("sh", "-c", "exec sleep 60")
	if err := sleep.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { sleep.Process.Kill(); sleep.Wait() }()
	awaitExec(t, sleep.Process.Pid, "sleep")
	n := strconv.Itoa(sleep.Process.Pid)
	for _, list := range []string{"pid,ppid,uid,gid,comm,args", "ppid,tty,nlwp,ni,s,cmd", "pid=NUMBER,cmd", "vsz,time,user"} {
		out, err := exec.Command(ps, "-o", list, "-p", n).Output()
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSpace(string(out)), "\n")
		titles, rows, err := List("/proc", []int{sleep.Process.Pid}, []string{"-o", list})
		if err != nil || len(rows) != 1 {
			t.Fatalf("List %s: %v, %v", list, rows, err)
		}
		if d := cmp.Diff(strings.Fields(lines[0]), titles); d != "" {
			t.Errorf("titles of %s (-ps +List):\n%s", list, d)
		}
		if d := cmp.Diff(strings.Fields(lines[1]), strings.Fields(strings.Join(rows[0], " "))); d != "" {
			t.Errorf("row of %s (-ps +List):\n%s", list, d)
		}
	}
}

// awaitExec waits until a child has become the program.
func awaitExec(t *testing.T, pid int, name string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		p, err := read("/proc", pid)
		if err == nil && p.comm == name {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("process %d did not become %s: %v", pid, name, err)
		}
	}
}

func TestForms(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{nil, "UID PID PPID C STIME TTY TIME CMD"},
		{[]string{"-ef"}, "UID PID PPID C STIME TTY TIME CMD"},
		{[]string{"-e", "-f"}, "UID PID PPID C STIME TTY TIME CMD"},
		{[]string{"aux"}, "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND"},
		{[]string{"-o pid,comm"}, "PID COMMAND"},
		{[]string{"-eo", "pid,etime"}, "PID ELAPSED"},
	} {
		titles, rows, err := List("/proc", []int{os.Getpid(), 1 << 22}, tt.args)
		if err != nil {
			t.Errorf("%v: %v", tt.args, err)
			continue
		}
		if got := strings.Join(titles, " "); got != tt.want {
			t.Errorf("%v: got titles %q, want %q", tt.args, got, tt.want)
		}
		if len(rows) != 1 || !slices.Contains(rows[0], strconv.Itoa(os.Getpid())) {
			t.Errorf("%v: want one row for this process and none for one that is not there, got %v", tt.args, rows)
		}
	}
	for _, args := range [][]string{{"-x"}, {"-o"}, {"-o", "pid,colour"}, {"-o", ""}} {
		if _, _, err := List("/proc", nil, args); !errors.Is(err, ErrUsage) {
			t.Errorf("%v: got %v, want ErrUsage", args, err)
		}
	}
}

func TestParseStat(t *testing.T) {
	const tail = " S 1 7 7 34816 7 4194304 1 2 3 4 150 50 0 0 20 0 3 0 200 8192000 100 18446744073709551615 1 1"
	p, err := parseStat([]byte("7 (a ) (b) \x1b)" + tail))
	if err != nil {
		t.Fatal(err)
	}
	want := &process{pid: 7, ppid: 1, comm: "a ) (b) ?", state: "S", tty: 34816, cpu: 2 * time.Second, priority: 20,
		threads: 3, start: 2 * time.Second, vsz: 8192000, rss: 100 * uint64(os.Getpagesize())}
	if d := cmp.Diff(want, p, cmp.AllowUnexported(process{})); d != "" {
		t.Errorf("parseStat (-want +got):\n%s", d)
	}
	if got := ttyName(p.tty); got != "pts/0" {
		t.Errorf("tty: got %q", got)
	}
	for _, s := range []string{"", "7 (a", "x (a)" + tail, "7 (a) S 1"} {
		if _, err := parseStat([]byte(s)); err == nil {
			t.Errorf("parseStat(%q): no error", s)
		}
	}
}

func TestTimes(t *testing.T) {
	now := time.Date(2026, 5, 6, 12, 0, 0, 0, time.UTC)
	for age, want := range map[time.Duration]string{
		time.Hour: "11:00", 48 * time.Hour: "May04", 400 * 24 * time.Hour: "2025",
	} {
		m := &machine{now: now, uptime: 500 * 24 * time.Hour}
		if got := startTime(&process{start: m.uptime - age}, m); got != want {
			t.Errorf("start time of a process of age %v: got %q, want %q", age, got, want)
		}
	}
	if got := clock(26*time.Hour + 3*time.Second); got != "1-02:00:03" {
		t.Errorf("clock: got %q", got)
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("7 (a) S 1 7 7 34816 7 4194304 1 2 3 4 150 50 0 0 20 0 3 0 200 8192000 100 1 1 1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := parseStat(b); err == nil && strings.ContainsAny(p.comm, "\x00\n\x1b") {
			t.Errorf("name %q disturbs a table", p.comm)
		}
	})
}
