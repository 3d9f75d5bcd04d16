package checkpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Whoever started the test may have left files open for everybody.
func TestMain(m *testing.M) {
	if err := unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// pipes are the standard files of a process, and our ends of them.
func pipes(t *testing.T) (in, out *os.File, files map[string]*os.File) {
	t.Helper()
	r, in, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	out, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); out.Close(); r.Close(); w.Close() })
	return in, out, map[string]*os.File{"in": r, "out": w}
}

func role(d Descriptor) string {
	return map[int]string{0: "in", 1: "out"}[d.Number]
}

func TestCat(t *testing.T) {
	in, out, files := pipes(t)
	cmd := exec.Command("cat")
	cmd.Stdin, cmd.Stdout = files["in"], files["out"]
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	say := func(in, out *os.File, word string) {
		t.Helper()
		b := make([]byte, len(word))
		if _, err := io.WriteString(in, word); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(out, b); err != nil || string(b) != word {
			t.Fatalf("got %q and %v, want %q", b, err, word)
		}
	}
	say(in, out, "before")
	memory, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	img, err := Freeze(cmd.Process.Pid, memory, role)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := json.Marshal(img)
	if err != nil {
		t.Fatal(err)
	}
	img = new(Image)
	if err := json.Unmarshal(doc, img); err != nil {
		t.Fatal(err)
	}
	if err := img.Check(); err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		in, out, files := pipes(t)
		cmd := &exec.Cmd{}
		thawed, waited := make(chan error), make(chan error, 1)
		go func() {
			runtime.LockOSThread()
			err := Thaw(cmd, img, Start{Memory: memory, Files: files, Ready: i%2 == 1})
			thawed <- err
			if err == nil {
				waited <- cmd.Wait()
			}
		}()
		if err := <-thawed; err != nil {
			t.Fatal(err)
		}
		for n := range 3 {
			say(in, out, fmt.Sprintf("clone %d, word %d", i, n))
		}
		line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", cmd.Process.Pid))
		if err != nil || !strings.HasPrefix(string(line), "cat\x00") {
			t.Errorf("cmdline: %q and %v", line, err)
		}
		in.Close()
		files["in"].Close()
		if err := <-waited; err != nil {
			t.Error(err)
		}
	}
}

// What cannot be made again is no image, and whoever is asked for one ends in any case.
func TestRefuse(t *testing.T) {
	_, _, files := pipes(t)
	cmd := exec.Command("cat")
	cmd.Stdin, cmd.Stdout = files["in"], files["out"]
	cmd.ExtraFiles = []*os.File{files["out"]}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	memory, err := os.Create(filepath.Join(t.TempDir(), "memory"))
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	_, err = Freeze(cmd.Process.Pid, memory, role)
	if want := "descriptor 3 is pipe:"; err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v, want an error with %q", err, want)
	}
	if err := cmd.Wait(); err == nil || cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("it ended with %v, want SIGKILL", err)
	}
}

// A thread that computes does not come to rest.
func TestBusy(t *testing.T) {
	runtime.LockOSThread() // as Freeze does
	defer runtime.UnlockOSThread()
	cmd := exec.Command("sh", "-c", "while :; do :; done")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := settle(cmd.Process.Pid, 20*look); err == nil || !strings.Contains(err.Error(), "does not come to rest") {
		t.Errorf("got %v", err)
	}
	kill(cmd.Process.Pid)
	_ = cmd.Wait()
}

// An image is of one boot of the host, and of the files that were mapped.
func TestStale(t *testing.T) {
	host, err := Host()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "library")
	if err := os.WriteFile(path, []byte("one"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := describeFile(path)
	if err != nil {
		t.Fatal(err)
	}
	img := Image{Host: host, Files: []File{f}}
	if err := img.Check(); err != nil {
		t.Fatal(err)
	}
	if err := (&Image{Host: "another", Files: img.Files}).Check(); !errors.Is(err, ErrStale) {
		t.Errorf("another boot: %v", err)
	}
	if err := os.WriteFile(path, []byte("three"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := img.Check(); !errors.Is(err, ErrStale) {
		t.Errorf("a changed file: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := img.Check(); !errors.Is(err, ErrStale) {
		t.Errorf("a file that is gone: %v", err)
	}
}
