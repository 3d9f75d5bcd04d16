package template

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/vmm"
)

// Machines are made and restored in internal/vmtest and cmd/kcradle; here are the files.

func testConfig(t testing.TB) vmm.Config {
	qemu := filepath.Join(t.TempDir(), "qemu")
	if err := os.WriteFile(qemu, []byte("not one"), 0o755); err != nil {
		t.Fatal(err)
	}
	return vmm.Config{Engine: vmm.TCG, QEMU: qemu, Kernel: "/k", Memory: 256 << 20, Drives: []vmm.Drive{{Serial: "scratch", Path: "/s"}}}
}

func shapeOf(t testing.TB, c vmm.Config) Shape {
	t.Helper()
	s, err := ShapeOf(c, "sha256:kernel", "sha256:initrd")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// put puts a template into the store that no machine has made.
func put(t testing.TB, s *Store, shape Shape, size int) string {
	t.Helper()
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp(s.dir, making)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{memoryFile: bytes.Repeat([]byte{7}, size), stateFile: []byte("state")} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := describe(t.Context(), dir, shape); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(s.dir, shape.Key())
	if err := os.Rename(dir, to); err != nil {
		t.Fatal(err)
	}
	return to
}

func open(t testing.TB, budget int64) (*Store, *strings.Builder) {
	var log strings.Builder
	return Open(filepath.Join(t.TempDir(), "templates"), budget, slog.New(slog.NewTextHandler(&log, nil))), &log
}

func TestFind(t *testing.T) {
	s, _ := open(t, 0)
	shape := shapeOf(t, testConfig(t))
	if _, err := s.Find(shape); !errors.Is(err, ErrNone) {
		t.Fatalf("empty store: got %v", err)
	}
	dir := put(t, s, shape, 5000)
	got, err := s.Find(shape)
	if err != nil {
		t.Fatal(err)
	}
	if got.Snapshot.Memory != filepath.Join(dir, memoryFile) || got.Snapshot.State != filepath.Join(dir, stateFile) || got.Size < 5000 {
		t.Errorf("got %+v", got)
	}
	if err := got.Check(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestShape changes each thing that a machine depends on, and those that it does not.
func TestShape(t *testing.T) {
	base := testConfig(t)
	key := shapeOf(t, base).Key()
	same := map[string]func(*vmm.Config){
		"name":     func(c *vmm.Config) { c.Name = "other" },
		"console":  func(c *vmm.Config) { c.Console = "/log" },
		"user":     func(c *vmm.Config) { c.RunAs = &vmm.Credential{UID: 7, GID: 7} },
		"contents": func(c *vmm.Config) { c.Drives = []vmm.Drive{{Serial: "scratch", Blank: true}} },
	}
	for name, change := range same {
		c := base
		change(&c)
		if shapeOf(t, c).Key() != key {
			t.Errorf("%s makes another template", name)
		}
	}
	other := map[string]func(*vmm.Config){
		"engine":       func(c *vmm.Config) { c.Engine = vmm.KVM },
		"command line": func(c *vmm.Config) { c.CommandLine = "quiet" },
		"vCPUs":        func(c *vmm.Config) { c.VCPUs = 2 },
		"memory":       func(c *vmm.Config) { c.Memory *= 2 },
		"drives":       func(c *vmm.Config) { c.Drives = append(c.Drives, vmm.Drive{Serial: "layers", Blank: true}) },
		"access":       func(c *vmm.Config) { c.Drives = []vmm.Drive{{Serial: "scratch", Path: "/s", ReadOnly: true}} },
		"wire":         func(c *vmm.Config) { c.Wire = &vmm.Wire{Kind: vmm.WireStream} },
		"vsock":        func(c *vmm.Config) { c.CID = 77 },
		"initrd":       func(c *vmm.Config) { c.Initrd = "/i" },
	}
	seen := map[string]string{key: "nothing"}
	for name, change := range other {
		c := base
		change(&c)
		k := shapeOf(t, c).Key()
		if seen[k] != "" {
			t.Errorf("%s makes the template of %s", name, seen[k])
		}
		seen[k] = name
	}
	for _, digests := range [][2]string{{"sha256:kernel", "sha256:other"}, {"sha256:other", "sha256:initrd"}} {
		s, err := ShapeOf(base, digests[0], digests[1])
		if err != nil || s.Key() == key {
			t.Errorf("digests %v: the same template, %v", digests, err)
		}
	}
	if err := os.WriteFile(base.QEMU, []byte("upgraded"), 0o755); err != nil {
		t.Fatal(err)
	}
	if shapeOf(t, base).Key() == key {
		t.Error("another QEMU, the same template")
	}
}

// TestDamage has templates that must not be used: each is set aside, with the reason in the log, and another can take its
// place.
func TestDamage(t *testing.T) {
	write := func(name string, change func([]byte) []byte) func(testing.TB, string) {
		return func(t testing.TB, dir string) {
			path := filepath.Join(dir, name)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, change(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := []struct {
		name   string
		damage func(t testing.TB, dir string)
		want   string
	}{
		{"memory cut", func(t testing.TB, dir string) {
			if err := os.Truncate(filepath.Join(dir, memoryFile), 100); err != nil {
				t.Fatal(err)
			}
		}, "memory was changed"},
		{"memory written", write(memoryFile, func(b []byte) []byte { b[17]++; return b }), "memory was changed"},
		{"memory copied", func(t testing.TB, dir string) {
			path := filepath.Join(dir, memoryFile)
			b, err := os.ReadFile(path)
			if err == nil {
				err = os.Remove(path)
			}
			if err == nil {
				err = os.WriteFile(path, b, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}, "memory was changed"},
		{"memory gone", func(t testing.TB, dir string) { os.Remove(filepath.Join(dir, memoryFile)) }, "no such file"},
		{"memory is a link", func(t testing.TB, dir string) {
			path := filepath.Join(dir, memoryFile)
			if err := errors.Join(os.Rename(path, path+"2"), os.Symlink(path+"2", path)); err != nil {
				t.Fatal(err)
			}
		}, "not a file of this user"},
		{"state", write(stateFile, func(b []byte) []byte { b[0]++; return b }), "state is damaged"},
		{"state cut", write(stateFile, func(b []byte) []byte { return b[:1] }), "state is damaged"},
		{"manifest empty", write(manifestFile, func([]byte) []byte { return nil }), "parse template.json"},
		{"manifest gone", func(t testing.TB, dir string) { os.Remove(filepath.Join(dir, manifestFile)) }, "no such file"},
		{"manifest of another shape", write(manifestFile, func(b []byte) []byte {
			return bytes.Replace(b, []byte("sha256:kernel"), []byte("sha256:another"), 1)
		}), "another version or shape"},
		{"newer version", write(manifestFile, func(b []byte) []byte {
			return bytes.Replace(b, []byte(`"version": 1`), []byte(`"version": 99`), 1)
		}), "another version or shape"},
		{"others may enter", func(t testing.TB, dir string) {
			if err := os.Chmod(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}, "alone"},
		{"another user's memory", func(t testing.TB, dir string) {
			need.Root(t)
			if err := os.Chown(filepath.Join(dir, memoryFile), 1234, 1234); err != nil {
				t.Fatal(err)
			}
		}, "not a file of this user"},
		{"another user's directory", func(t testing.TB, dir string) {
			need.Root(t)
			if err := os.Chown(dir, 1234, 1234); err != nil {
				t.Fatal(err)
			}
		}, "alone"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s, log := open(t, 0)
			shape := shapeOf(t, testConfig(t))
			dir := put(t, s, shape, 5000)
			test.damage(t, dir)
			list, damaged, err := s.List()
			if err != nil || len(list) != 0 || damaged[shape.Key()] == nil || !strings.Contains(damaged[shape.Key()].Error(), test.want) {
				t.Errorf("list: %v, %v, %v, want %q", list, damaged, err, test.want)
			}
			if _, err := s.Find(shape); !errors.Is(err, ErrNone) {
				t.Errorf("it was used: %v", err)
			}
			if !strings.Contains(log.String(), test.want) {
				t.Errorf("log: %s, want %q", log, test.want)
			}
			if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("it is still in its place: %v", err)
			}
			put(t, s, shape, 5000)
			if _, err := s.Find(shape); err != nil {
				t.Errorf("its successor: %v", err)
			}
			if err := s.clear(); err != nil {
				t.Error(err)
			}
			if entries, _ := os.ReadDir(s.dir); len(entries) != 1 {
				t.Errorf("left behind: %v", entries)
			}
		})
	}
}

// TestCheck finds what a start cannot: memory that changed below the file system.
func TestCheck(t *testing.T) {
	s, _ := open(t, 0)
	put(t, s, shapeOf(t, testConfig(t)), 5000)
	list, _, err := s.List()
	if err != nil || len(list) != 1 {
		t.Fatal(list, err)
	}
	f, err := os.OpenFile(list[0].Snapshot.Memory, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("x"), 4999); err != nil {
		t.Fatal(err)
	}
	if err := list[0].Check(t.Context()); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("got %v", err)
	}
}

// TestMakers has two makers, one that died, and one that fails.
func TestMakers(t *testing.T) {
	s, _ := open(t, 0)
	c := testConfig(t)
	shape := shapeOf(t, c)
	if err := os.MkdirAll(filepath.Join(s.dir, making+"dead", "x"), 0o700); err != nil {
		t.Fatal(err)
	}
	if s.Busy() {
		t.Error("busy, without a maker")
	}
	lock, err := s.lock()
	if err != nil {
		t.Fatal(err)
	}
	never := func(context.Context, *vmm.Machine) error { t.Error("a machine was made"); return nil }
	if err := s.Make(t.Context(), shape, c, never); !errors.Is(err, ErrBusy) || !s.Busy() {
		t.Errorf("second maker: got %v, busy %v", err, s.Busy())
	}
	lock.Close()
	if err := s.Make(t.Context(), shape, c, never); err == nil || !strings.Contains(err.Error(), "make template: ") { // there is no such kernel
		t.Errorf("got %v", err)
	}
	if entries, _ := os.ReadDir(s.dir); len(entries) != 1 || entries[0].Name() != lockFile {
		t.Errorf("left behind: %v", entries)
	}
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.Make(t.Context(), shape, c, never); err == nil || !strings.Contains(err.Error(), "alone") {
		t.Errorf("in a directory that others can enter: got %v", err)
	}
}

// TestBudget removes what was not used for longest.
func TestBudget(t *testing.T) {
	s, _ := open(t, 250<<10)
	c := testConfig(t)
	var keys []string
	for i := range 4 {
		c.VCPUs = i + 1
		shape := shapeOf(t, c)
		dir := put(t, s, shape, 100<<10)
		then := time.Now().Add(time.Duration(i-10) * time.Hour)
		if err := os.Chtimes(filepath.Join(dir, manifestFile), then, then); err != nil {
			t.Fatal(err)
		}
		keys = append(keys, shape.Key())
	}
	c.VCPUs = 1
	if _, err := s.Find(shapeOf(t, c)); err != nil { // the oldest is the youngest now
		t.Fatal(err)
	}
	if err := s.shrink(keys[1]); err != nil {
		t.Fatal(err)
	}
	list, _, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, l := range list {
		left = append(left, l.Key)
	}
	if len(left) != 2 || left[0] != keys[0] || left[1] != keys[1] {
		t.Errorf("left: %v of %v", left, keys)
	}
	for _, bad := range []string{"", ".", "..", "../templates", lockFile, "none", making + "x"} {
		if err := s.Remove(bad); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("remove %q: got %v", bad, err)
		}
	}
	if err := s.Remove(keys[0]); err != nil {
		t.Error(err)
	}
}
