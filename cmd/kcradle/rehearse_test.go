package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestRehearsalProgram runs it here, with its interpreter beside it in a root of its own.
func TestRehearsalProgram(t *testing.T) {
	machineNeeds(t)
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "usr/bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("usr/bin", filepath.Join(dir, "bin")); err != nil {
		t.Fatal(err)
	}
	for name, b := range map[string][]byte{
		rehearsalPath:        executable(programBase, programSize, nil, interpreterPath),
		rehearsalInterpreter: executable(interpreterBase, interpreterSize, rehearsalCode(), rehearsalStrings),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("chroot", dir, rehearsalPath).CombinedOutput()
	if err != nil || string(out) != rehearsalWord {
		t.Errorf("got %q and %v, want %q", out, err, rehearsalWord)
	}
}
