package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/vmm"
)

func TestNeeds(t *testing.T) {
	meminfo := func(s string) string {
		path := filepath.Join(t.TempDir(), "meminfo")
		if err := os.WriteFile(path, []byte(s), 0o644); err != nil {
			t.Fatal(err)
		}
		return path
	}
	qemu := vmm.QEMU{Path: "/usr/bin/qemu-system-x86_64", Version: vmm.QEMUVersion{6, 2, 0}}
	tests := []struct {
		name   string
		got    diagnosis
		state  string
		found  string
		remedy string
	}{
		{"platform", platformNeed("linux", "amd64"), needOK, "linux/amd64", ""},
		{"other platform", platformNeed("linux", "arm64"), needMissing, "linux/arm64", "linux/amd64"},
		{"qemu", qemuNeed(vmm.Host{QEMU: qemu}, nil), needOK, "6.2.0", ""},
		{"no qemu", qemuNeed(vmm.Host{}, &vmm.NoQEMUError{Path: "qemu-system-x86_64"}), needMissing, "no qemu-system-x86_64", "apt-get install qemu-system-x86"},
		{"old qemu", qemuNeed(vmm.Host{QEMU: qemu}, &vmm.OldQEMUError{QEMU: qemu}), needMissing, "6.2.0", "7.2.0 or newer"},
		{"broken qemu", qemuNeed(vmm.Host{QEMU: qemu}, errors.New("exit status 127")), needMissing, "exit status 127", "--reinstall"},
		{"kvm", engineNeed(vmm.Host{Engine: vmm.KVM, Reason: "it works"}), needOK, "kvm: it works", ""},
		{"tcg", engineNeed(vmm.Host{Engine: vmm.TCG, Reason: "no rights", Remedy: "usermod"}), needNote, "tcg: no rights", "usermod"},
		{"no package", packageNeed(t.TempDir()), needMissing, "manifest.json", "make build"},
		{"disk", judgeDisk(diagnosis{State: needOK}, "/x", 6<<30), needOK, "6GiB free for /x", ""},
		{"little disk", judgeDisk(diagnosis{State: needOK}, "/x", 1<<30), needNote, "1GiB", "kcradle prune"},
		{"no disk", judgeDisk(diagnosis{State: needOK}, "/x", 1<<20), needMissing, "1MiB", "--root"},
		{"disk below a directory to be made", diskNeed(filepath.Join(t.TempDir(), "a/b/c")), "", "a/b/c", ""},
		{"memory", memoryNeed(meminfo("MemTotal: 9 kB\nMemAvailable:   16777216 kB\n")), needOK, "16GiB available", ""},
		{"little memory", memoryNeed(meminfo("MemAvailable: 524288 kB\n")), needNote, "512MiB", "add memory"},
		{"no memory", memoryNeed(meminfo("MemAvailable: 1024 kB\n")), needMissing, "1MiB", "add memory"},
		{"unknown memory", memoryNeed(meminfo("MemTotal: 1024 kB\n")), needNote, "does not say", ""},
		{"absurd memory", memoryNeed(meminfo("MemAvailable: 99999999999999999999 kB\n")), needNote, "parse", ""},
		{"device", deviceNeed("null", os.DevNull, "x", "y"), needOK, os.DevNull, ""},
		{"no device", deviceNeed("x", "/nonexistent", "less works", "modprobe x"), needNote, "no /nonexistent: less works", "modprobe x"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			d := test.got
			if test.state != "" && d.State != test.state || !strings.Contains(d.Found, test.found) || !strings.Contains(d.Remedy, test.remedy) || test.state == needOK && d.Remedy != "" {
				t.Errorf("got %+v, want state %q, found with %q, remedy with %q", d, test.state, test.found, test.remedy)
			}
		})
	}
}

func TestDoctor(t *testing.T) {
	t.Setenv("KCRADLE_PACKAGES", t.TempDir()) // empty: something required is missing
	var out bytes.Buffer
	a := &app{Stdout: &out, Stderr: &out, Root: t.TempDir()}
	var coded *exitError
	if err := doctor(t.Context(), a, true); !errors.As(err, &coded) || coded.code != 1 {
		t.Errorf("got %v, want exit code 1", err)
	}
	var got struct {
		OK    bool
		Needs []diagnosis
	}
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	if got.OK || len(got.Needs) != 10 {
		t.Errorf("got ok %v and %d needs, want 10 that do not suffice", got.OK, len(got.Needs))
	}
	for _, d := range got.Needs {
		if d.Name == "" || d.Found == "" || d.State == needMissing && d.Remedy == "" {
			t.Errorf("%+v lacks something", d)
		}
	}
	out.Reset()
	if err := doctor(t.Context(), a, false); !errors.As(err, &coded) {
		t.Errorf("got %v, want exit code 1", err)
	}
	if s := out.String(); !strings.Contains(s, "machine package") || !strings.Contains(s, "→ make build") || !strings.Contains(s, "cannot run") {
		t.Errorf("got %s", s)
	}
}
