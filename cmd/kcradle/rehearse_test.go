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
	for name, b := range map[string][]byte{
		rehearsalProgram: executable(programBase, nil, interpreterPath), rehearsalInterpreter: executable(interpreterBase, rehearsalCode(), rehearsalStrings),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("chroot", dir, "/"+rehearsalProgram).CombinedOutput()
	if err != nil || string(out) != rehearsalWord {
		t.Errorf("got %q and %v, want %q", out, err, rehearsalWord)
	}
}
