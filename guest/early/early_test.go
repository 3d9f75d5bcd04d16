package early

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestTables looks at what a machine's start would trip over; the mounts themselves are tested in one.
func TestTables(t *testing.T) {
	seen := map[string]bool{}
	for _, m := range mounts {
		if seen[m.target] {
			t.Errorf("%s is mounted twice", m.target)
		}
		seen[m.target] = true
		parent := filepath.Dir(m.target)
		if parent != "/" && !seen[parent] && !strings.HasPrefix(parent, newRoot+"/sys/fs") {
			t.Errorf("%s is mounted before %s", m.target, parent)
		}
	}
	for _, s := range settings {
		if s.reason == "" || s.value == "" || strings.HasPrefix(s.file, "/") {
			t.Errorf("setting %+v", s)
		}
	}
}

func TestControllers(t *testing.T) {
	for _, tt := range []struct{ have, want string }{
		{"cpuset cpu io memory pids\n", "+cpuset +cpu +io +memory +pids"},
		{"\n", ""},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "cgroup.controllers"), []byte(tt.have), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if err := Controllers(dir); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, "cgroup.subtree_control")); err != nil || string(b) != tt.want {
			t.Errorf("got %q, %v, want %q", b, err, tt.want)
		}
	}
}

func TestSinceBoot(t *testing.T) {
	a := SinceBoot()
	if b := SinceBoot(); a <= 0 || b < a {
		t.Errorf("got %v, then %v", a, b)
	}
}
