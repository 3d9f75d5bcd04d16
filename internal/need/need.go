// Package need says what a test needs from its machine. Without it the test is skipped with the remedy; where CI is
// set the test fails instead, so that a promised test can never be skipped there.
//
//	need.Root(t)
//	qemu := need.Command(t, "qemu-system-x86_64", "apt-get install qemu-system-x86")
package need

import (
	"os"
	"os/exec"
	"testing"
)

// Root needs the test to run as root.
func Root(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "root", "run the tests as root: sudo -E make test")
	}
}

// Command needs a program and returns its path.
func Command(t testing.TB, name, remedy string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, name, remedy)
	}
	return path
}

// File needs a file or device to exist.
func File(t testing.TB, path, remedy string) string {
	t.Helper()
	if _, err := os.Stat(path); err != nil {
		missing(t, path, remedy)
	}
	return path
}

// Long needs time: a test that boots a machine, or compiles much, is left out of a short run.
func Long(t testing.TB) {
	t.Helper()
	if testing.Short() {
		missing(t, "time", "run the tests without -short")
	}
}

func missing(t testing.TB, what, remedy string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("needs %s, and CI may not skip it (%s)", what, remedy)
	}
	t.Skipf("needs %s (%s)", what, remedy)
}
