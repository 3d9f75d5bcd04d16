package vmm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestJudgeKVM(t *testing.T) {
	tests := []struct {
		name   string
		err    error
		want   Engine
		reason string
		remedy string
	}{
		{"works", nil, KVM, "by itself", ""},
		{"emulated", fmt.Errorf("%w: suberror 1", errEmulated), TCG, "emulated here", "bare metal"},
		{"missing", &fs.PathError{Op: "open", Path: kvmDevice, Err: unix.ENOENT}, TCG, "there is no /dev/kvm", "modprobe kvm_intel"},
		{"no module", &fs.PathError{Op: "open", Path: kvmDevice, Err: unix.ENODEV}, TCG, "there is no /dev/kvm", "modprobe kvm_intel"},
		{"no rights", &fs.PathError{Op: "open", Path: kvmDevice, Err: unix.EACCES}, TCG, "no rights on /dev/kvm", "usermod -aG kvm"},
		{"taken", fmt.Errorf("create a VM: %w", unix.EBUSY), TCG, "another hypervisor", "stop the other"},
		{"other", errors.New("KVM's API version is 11"), TCG, "API version is 11", ""},
	}
	for _, test := range tests {
		engine, reason, remedy := judgeKVM(test.err)
		if engine != test.want || !strings.Contains(reason, test.reason) || !strings.Contains(remedy, test.remedy) {
			t.Errorf("%s: got %s, %q, %q", test.name, engine, reason, remedy)
		}
	}
}

// Whatever this machine is, the probe must decide within its bounds.
func TestRunsInHardware(t *testing.T) {
	begun := time.Now()
	err := runsInHardware(probeDeadline)
	took := time.Since(begun)
	t.Logf("%v: %v", took, err)
	if took > 2*time.Second {
		t.Errorf("the probe took %v", took)
	}
	if err == nil {
		return
	}
	if !errors.Is(err, errEmulated) && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, fs.ErrPermission) {
		t.Errorf("the probe failed by itself: %v", err)
	}
	if f, e := os.OpenFile(kvmDevice, os.O_RDWR, 0); e == nil {
		_ = f.Close()
		before := openFiles(t)
		_ = runsInHardware(probeDeadline)
		if after := openFiles(t); after > before {
			t.Errorf("%d descriptors before a probe, %d after", before, after)
		}
	}
}

func TestParseVersion(t *testing.T) {
	tests := []struct {
		input string
		want  QEMUVersion
	}{
		{"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright", QEMUVersion{7, 2, 22}},
		{"QEMU emulator version 10.0\n", QEMUVersion{10, 0, 0}},
		{"QEMU emulator version 99999.1", QEMUVersion{}},
		{"qemu: \x1b[31mcommand not found", QEMUVersion{}},
		{"", QEMUVersion{}},
	}
	for _, test := range tests {
		got, err := parseVersion([]byte(test.input))
		if got != test.want || (err == nil) != (test.want != QEMUVersion{}) {
			t.Errorf("%q: got %v and %v, want %v", test.input, got, err, test.want)
		}
		if err != nil && strings.Contains(err.Error(), "\x1b") {
			t.Errorf("the error brings control characters: %q", err)
		}
	}
}

// fakeQEMU puts a program that says a version on PATH; it counts how often it was asked.
func fakeQEMU(t *testing.T, says string) (asked func() int) {
	t.Helper()
	dir := t.TempDir()
	count := filepath.Join(dir, "count")
	script := fmt.Sprintf("#!/bin/sh\necho x >> %s\necho '%s'\n", count, says)
	if err := os.WriteFile(filepath.Join(dir, QEMUProgram), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir)
	return func() int {
		b, err := os.ReadFile(count)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return strings.Count(string(b), "x")
	}
}

func TestProbeIsKept(t *testing.T) {
	asked := fakeQEMU(t, "QEMU emulator version 9.1.2")
	dir := filepath.Join(t.TempDir(), "cache")
	first, err := Probe(t.Context(), dir)
	if err != nil || first.Cached || first.QEMU.Version != (QEMUVersion{9, 1, 2}) || first.Engine == "" || first.Reason == "" {
		t.Fatalf("got %+v and %v", first, err)
	}
	begun := time.Now()
	second, err := Probe(t.Context(), dir)
	t.Logf("kept answer: %v", time.Since(begun))
	first.Cached = true
	if err != nil || second != first || asked() != 1 {
		t.Errorf("second probe: got %+v and %v after asking %d times, want %+v from the cache", second, err, asked(), first)
	}
	// Another QEMU is another question, and its answer replaces the first.
	path := first.QEMU.Path
	if err := os.Chtimes(path, time.Time{}, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	third, err := Probe(t.Context(), dir)
	if err != nil || third.Cached || asked() != 2 {
		t.Errorf("after a change of QEMU: got %+v and %v after asking %d times", third, err, asked())
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Fatalf("%d files are kept, want 1 (%v)", len(files), err)
	}
	// What is not an answer is not believed.
	for _, junk := range []string{"", "{", `{"engine": "warp", "qemu": {"path": "` + path + `"}}`, strings.Repeat("x", 2*maxProbe)} {
		if err := os.WriteFile(filepath.Join(dir, files[0].Name()), []byte(junk), 0o644); err != nil {
			t.Fatal(err)
		}
		if h, err := Probe(t.Context(), dir); err != nil || h.Cached || h.Engine != first.Engine {
			t.Errorf("with %.20q in the cache: got %+v and %v", junk, h, err)
		}
	}
}

func TestProbeFails(t *testing.T) {
	t.Run("no QEMU", func(t *testing.T) {
		t.Setenv("PATH", t.TempDir())
		h, err := Probe(t.Context(), t.TempDir())
		var none *NoQEMUError
		if !errors.As(err, &none) || !strings.Contains(err.Error(), "apt-get install qemu-system-x86") || h.Engine == "" {
			t.Errorf("got %+v and %v", h, err)
		}
	})
	t.Run("too old", func(t *testing.T) {
		fakeQEMU(t, "QEMU emulator version 5.2.0 (Debian 1:5.2+dfsg-11)")
		dir := t.TempDir()
		for range 2 { // found, then kept
			_, err := Probe(t.Context(), dir)
			var old *OldQEMUError
			if !errors.As(err, &old) || !strings.Contains(err.Error(), "5.2.0") || !strings.Contains(err.Error(), "7.2.0") {
				t.Errorf("got %v", err)
			}
		}
	})
	t.Run("not QEMU", func(t *testing.T) {
		fakeQEMU(t, "something else")
		if _, err := Probe(t.Context(), ""); err == nil || !strings.Contains(err.Error(), "no version of QEMU") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("the caller gives up", func(t *testing.T) {
		fakeQEMU(t, "x")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Probe(ctx, ""); !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
}

func TestUnprivilegedUser(t *testing.T) {
	if os.Geteuid() != 0 {
		if c, err := Unprivileged(TCG); c != nil || err != nil {
			t.Errorf("for a user: got %v and %v, want nothing", c, err)
		}
		return
	}
	c, err := Unprivileged(TCG)
	if err != nil || c.UID == 0 || c.GID == 0 || len(c.Groups) != 0 {
		t.Errorf("got %+v and %v", c, err)
	}
	if !mapped("/proc/self/uid_map", 0) || mapped("/nonexistent", 0) {
		t.Error("the map of user ids is misread")
	}
}
