package initrd

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/internal/need"
)

func TestBuild(t *testing.T) {
	var b bytes.Buffer
	if err := Build(&b, strings.NewReader("#!\n"), 3); err != nil {
		t.Fatal(err)
	}
	got, err := readAll(&b, MaxInit)
	if err != nil {
		t.Fatal(err)
	}
	want := []entry{
		{Header{Name: "dev", Mode: ModeDir | 0o755}, ""},
		{Header{Name: "dev/null", Mode: ModeChar | 0o666, Major: 1, Minor: 3}, ""},
		{Header{Name: "init", Mode: ModeFile | 0o755, Size: 3}, "#!\n"},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

func TestBuildRefuses(t *testing.T) {
	if err := Build(io.Discard, strings.NewReader(""), MaxInit+1); !errors.Is(err, ErrTooLarge) {
		t.Errorf("an /init one byte above the limit: got %v, want ErrTooLarge", err)
	}
	if err := Build(io.Discard, strings.NewReader(""), 0); err == nil {
		t.Error("an empty /init was accepted")
	}
	if err := Build(io.Discard, strings.NewReader("1"), 2); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("a short /init: got %v, want an unexpected EOF", err)
	}
}

func TestWriteLeavesNothingBehind(t *testing.T) {
	dir := t.TempDir()
	init := filepath.Join(dir, "init")
	if err := os.WriteFile(init, make([]byte, MaxInit+1), 0o755); err != nil {
		t.Fatal(err)
	}
	out := t.TempDir()
	if err := Write(context.Background(), filepath.Join(out, "initrd.cpio"), init); !errors.Is(err, ErrTooLarge) {
		t.Errorf("got %v, want ErrTooLarge", err)
	}
	if err := Write(context.Background(), filepath.Join(out, "initrd.cpio"), dir); err == nil {
		t.Error("a directory was accepted as /init")
	}
	left, err := os.ReadDir(out)
	if err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestReproducible builds the guest's init in two directories, the second time with an empty build cache, and compares
// the archives. It also holds init to its limit.
func TestReproducible(t *testing.T) {
	need.Long(t)
	goTool := need.Command(t, "go", "install Go 1.26")
	root, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	var sums [2][32]byte
	var archives [2]string
	for i := range sums {
		dir := t.TempDir()
		if i == 1 {
			dir = filepath.Join(dir, "a", "longer", "path")
		}
		copyModule(t, root, dir)
		cmd := exec.Command(goTool, "build", "-tags", "nethttpomithttp2", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", "init.bin", initPackage(t, root))
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOAMD64=v1", "GOFLAGS=-mod=mod",
			"GOPROXY=off")
		if i == 1 {
			cmd.Env = append(cmd.Env, "GOCACHE="+t.TempDir())
		}
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build: %v\n%s", err, out)
		}
		archives[i] = filepath.Join(dir, "initrd.cpio")
		if err := Write(t.Context(), archives[i], filepath.Join(dir, "init.bin")); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(archives[i])
		if err != nil {
			t.Fatal(err)
		}
		sums[i] = sha256.Sum256(b)
		t.Logf("%s: %d bytes, sha256 %x", archives[i], len(b), sums[i])
	}
	if sums[0] != sums[1] {
		t.Errorf("two builds differ: cmp %s %s", archives[0], archives[1])
	}
}

// initPackage is cmd/init, or the stand-in while that has no source yet.
func initPackage(t *testing.T, root string) string {
	t.Helper()
	sources, err := filepath.Glob(filepath.Join(root, "cmd", "init", "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	if len(sources) == 0 {
		return "./initrd/testdata/hello"
	}
	return "./cmd/init"
}

// copyModule copies the module's Go sources, and what they embed, to dir.
func copyModule(t *testing.T, root, dir string) {
	t.Helper()
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if rel == ".git" || rel == "bin" || rel == "build" || rel == "docs" {
				return filepath.SkipDir
			}
			return os.MkdirAll(filepath.Join(dir, rel), 0o755)
		}
		if !d.Type().IsRegular() || strings.HasSuffix(rel, ".zst") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, rel), b, 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
}
