// Package sandboxtest runs the tests of a package below guest as root in namespaces of their own, where the test process
// is PID 1:
//
//	func TestMain(m *testing.M) { sandboxtest.Inside(m) }
//	func TestX(t *testing.T) { cgroup := sandboxtest.Cgroup(t); root := sandboxtest.Busybox(t); … }
package sandboxtest

import (
	"bufio"
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
)

const (
	envInside = "KCRADLE_SANDBOXTEST_INSIDE"
	envCgroup = "KCRADLE_SANDBOXTEST_CGROUP"
)

// Namespaces are what a sandbox has of its own.
const Namespaces = syscall.CLONE_NEWPID | syscall.CLONE_NEWNS | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET

// Inside runs the tests of a package as PID 1 of new PID, mount, UTS, IPC and network namespaces. Without root they
// run where they are and must ask [NeedInside].
func Inside(m *testing.M) {
	if os.Getenv(envInside) != "" {
		// The main thread must keep its namespaces: it stands for the process in /proc/self.
		runtime.LockOSThread()
		if err := Settle(); err != nil {
			fmt.Fprintln(os.Stderr, "sandboxtest:", err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	if os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	cgroup, remove, err := MakeCgroup()
	if err != nil {
		fmt.Fprintln(os.Stderr, "sandboxtest:", err)
		os.Exit(1)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), envInside+"=1", envCgroup+"="+cgroup)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: Namespaces, Pdeathsig: syscall.SIGKILL}
	runtime.LockOSThread() // Pdeathsig is about this thread
	if err := cmd.Start(); err != nil {
		fmt.Fprintln(os.Stderr, "sandboxtest:", err)
		remove()
		os.Exit(1)
	}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	go func() {
		for s := range signals {
			cmd.Process.Signal(s)
		}
	}()
	err = cmd.Wait()
	remove()
	if err != nil {
		if code := cmd.ProcessState.ExitCode(); code > 0 {
			os.Exit(code)
		}
		fmt.Fprintln(os.Stderr, "sandboxtest:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// NeedInside skips a test that does not run inside, which is so without root.
func NeedInside(t testing.TB) {
	t.Helper()
	if os.Getenv(envInside) == "" {
		need.Root(t)
		t.Fatal("TestMain of this package must call sandboxtest.Inside")
	}
}

// Cgroup is a cgroup v2 directory of the test's own.
func Cgroup(t testing.TB) string {
	t.Helper()
	NeedInside(t)
	return os.Getenv(envCgroup)
}

// Settle makes new namespaces usable.
func Settle() error {
	if err := unix.Mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	return nil
}

// MakeCgroup makes a cgroup at the root of the version 2 hierarchy, with every controller handed down. remove kills what
// is in it.
func MakeCgroup() (dir string, remove func(), err error) {
	root, err := cgroup2()
	if err != nil {
		return "", nil, err
	}
	dir, err = os.MkdirTemp(root, "kcradle-test-")
	if err != nil {
		return "", nil, err
	}
	// What controllers there are.
	if b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers")); err == nil {
		for _, c := range strings.Fields(string(b)) {
			os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
		}
	}
	return dir, func() {
		os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
		entries, _ := os.ReadDir(dir)
		for _, e := range entries {
			if e.IsDir() {
				os.Remove(filepath.Join(dir, e.Name()))
			}
		}
		os.Remove(dir)
	}, nil
}

// cgroup2 finds the version 2 hierarchy.
func cgroup2() (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	for s.Scan() {
		before, after, ok := strings.Cut(s.Text(), " - ")
		words := strings.Fields(before)
		if ok && strings.HasPrefix(after, "cgroup2 ") && len(words) > 4 {
			return words[4], nil
		}
	}
	return "", fmt.Errorf("no cgroup v2 hierarchy is mounted (mount -t cgroup2 none /sys/fs/cgroup/unified)")
}

// Busybox makes a root directory with a static busybox and its applets, and the files that name root and a user.
func Busybox(t testing.TB) string {
	t.Helper()
	busybox := need.Command(t, "busybox", "apt-get install busybox-static")
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if !isStatic(b) {
		t.Fatalf("%s is not static (apt-get install busybox-static)", busybox)
	}
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"bin", "etc", "tmp", "root", "home/user"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	files := map[string]string{
		"etc/passwd": "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:User:/home/user:/bin/sh\n",
		"etc/group":  "root:x:0:\nuser:x:1000:\nextra:x:1234:user,other\naudio:x:29:user\n",
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "bin/busybox"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(string(list)) {
		if name == "busybox" {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// isStatic says whether an ELF file asks for no interpreter.
func isStatic(b []byte) bool {
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return false
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return true
}
