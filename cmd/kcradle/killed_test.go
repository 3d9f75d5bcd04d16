package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestKilled kills kcradle with SIGKILL at many moments of making a template, of a start from it, and of a start from the pool. No
// machine may outlive it, and the next start is as any other.
func TestKilled(t *testing.T) {
	m := machineNeeds(t)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	vm, root := filepath.Join(dir, "vm"), filepath.Join(dir, "root")
	command := func(args ...string) *exec.Cmd {
		cmd := exec.Command(m.kcradle, args...)
		cmd.Env = append(os.Environ(), "KCRADLE_ROOT="+root, "KCRADLE_PACKAGES="+m.packages, "KCRADLE_TEMPLATES=2GiB")
		return cmd
	}
	output := func(args ...string) string {
		t.Helper()
		out, err := command(args...).CombinedOutput()
		if err != nil {
			t.Fatalf("kcradle %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	killed := func(after time.Duration, args ...string) {
		t.Helper()
		cmd := command(args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(after) // the moment is the test's input
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	alone := func(what string) {
		t.Helper()
		deadline := time.Now().Add(20 * time.Second)
		for {
			left := machinesOf(t, dir)
			if len(left) == 0 {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: QEMU outlived kcradle: %v", what, left)
			}
			time.Sleep(10 * time.Millisecond) // nobody tells of other people's children
		}
	}
	start := []string{"run", "--network", "none", vm}
	same := func(what string) {
		t.Helper()
		alone(what)
		if got := output(start...); got != "hello\n" {
			t.Errorf("%s: the next start said %q", what, got)
		}
	}

	output("summon", "-q", vm, m.image, "--", "echo", "hello")
	begun := time.Now()
	output("template", "warm", "-q", "--network", "none", vm)
	took := time.Since(begun)
	for i := range 12 {
		killed(took*time.Duration(i)/12, "template", "warm", "-q", "--again", "--network", "none", vm)
		alone("making a template")
	}
	same("making a template")
	output("template", "warm", "-q", "--again", "--network", "none", vm) // a maker clears up after others
	entries, err := os.ReadDir(filepath.Join(root, "templates"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".making-") {
			t.Errorf("%s was left by a maker", e.Name())
		}
	}

	for i := range 40 {
		killed(time.Duration(i)*4*time.Millisecond, start...)
		alone("a start from a template")
	}
	same("a start from a template")

	pool := command("pool", "--size", "1", "--network", "none", vm)
	if err := pool.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	end := func() error { ended = true; return errors.Join(pool.Process.Signal(syscall.SIGTERM), pool.Wait()) }
	defer func() {
		if !ended {
			_ = end()
		}
	}()
	ready := func() {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); ; {
			out, err := command("pool", "--status").Output()
			if f := strings.Fields(string(out)); err == nil && len(f) == 8 && f[5] == "1" {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("the pool has no machine: %v\n%s", err, out)
			}
			time.Sleep(10 * time.Millisecond) // nor does the pool tell
		}
	}
	for i := range 25 {
		ready()
		killed(time.Duration(i)*4*time.Millisecond, start...)
	}
	ready()
	if got := output(start...); got != "hello\n" {
		t.Errorf("after starts from the pool were killed: the next said %q", got)
	}
	if err := end(); err != nil {
		t.Errorf("end of the pool: %v", err)
	}
	alone("starts from the pool")
}

// machinesOf returns the QEMU processes that have a file below a directory open, or mapped.
func machinesOf(t *testing.T, dir string) (left []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		if exe, err := os.Readlink(p + "/exe"); err != nil || !strings.HasPrefix(filepath.Base(exe), "qemu-system-") {
			continue
		}
		maps, _ := os.ReadFile(p + "/maps") // it may be gone
		found := strings.Contains(string(maps), dir)
		fds, _ := os.ReadDir(p + "/fd")
		for _, fd := range fds {
			target, _ := os.Readlink(filepath.Join(p, "fd", fd.Name()))
			found = found || strings.HasPrefix(target, dir)
		}
		if found {
			left = append(left, filepath.Base(p))
		}
	}
	return left
}
