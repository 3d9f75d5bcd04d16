package vmm

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestOOMRecord(t *testing.T) {
	const record = "3,1432,98765,-;Out of memory: Killed process 4242 (qemu-system-x86) total-vm:1234kB, anon-rss:567kB\n SUBSYSTEM=mm\n"
	tests := []struct {
		name, record string
		pid          int
		want         string
	}{
		{"ours", record, 4242, "Out of memory: Killed process 4242 (qemu-system-x86) total-vm:1234kB, anon-rss:567kB"},
		{"of a control group", strings.Replace(record, "Out of memory", "Memory cgroup out of memory", 1), 4242, "Memory cgroup out of memory: Killed process 4242 (qemu-system-x86) total-vm:1234kB, anon-rss:567kB"},
		{"another's", record, 424, ""},
		{"no record", "Killed process 4242 ", 4242, ""},
		{"empty", "3,1,1,-;", 4242, ""},
	}
	for _, test := range tests {
		if got := oomRecord([]byte(test.record), test.pid, 0); got != test.want {
			t.Errorf("%s: got %q, want %q", test.name, got, test.want)
		}
	}
}

func TestOOMRecordOfAUser(t *testing.T) {
	record := []byte("3,1,9,-;Out of memory: Killed process 7 (qemu-system-x86) total-vm:1kB, shmem-rss:0kB, UID:1800000042 pgtables:8kB\n")
	for user, want := range map[uint32]bool{1800000042: true, 180000004: false, 0: false} {
		if got := oomRecord(record, 4242, user); (got != "") != want {
			t.Errorf("user %d: got %q", user, got)
		}
	}
}

func TestOOMCounters(t *testing.T) {
	got := memoryEventFiles([]byte("11:cpu,cpuacct:/x\n5:memory:/system.slice/a\n0::/user.slice/b\nbad\n"))
	want := []string{"/sys/fs/cgroup/memory/system.slice/a/memory.oom_control", "/sys/fs/cgroup/user.slice/b/memory.events"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	path := filepath.Join(t.TempDir(), "memory.events")
	write := func(s string) {
		if err := os.WriteFile(path, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("low 0\noom 3\noom_kill 3\noom_group_kill 0\n")
	n, ok := oomKills(path)
	if n != 3 || !ok {
		t.Errorf("got %d and %v, want 3", n, ok)
	}
	w := &oomWatch{counters: map[string]int64{path: n}, kmsg: -1}
	if v := w.verdict(1); v != "" {
		t.Errorf("nothing was killed, and the verdict is %q", v)
	}
	write("oom_kill 4\n")
	if v := w.verdict(1); !strings.Contains(v, path) {
		t.Errorf("a counter rose, and the verdict is %q", v)
	}
	write("oom_kill many\n")
	if v := w.verdict(1); v != "" {
		t.Errorf("of a counter that is no number came %q", v)
	}
}
