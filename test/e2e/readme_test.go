package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
)

// TestTour pastes the README's tour into a shell, in this repository, as it stands.
func TestTour(t *testing.T) {
	kcradle(t)
	need.Command(t, "wget", "hack/deps test")
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, tour, ok := strings.Cut(string(readme), "```sh\n")
	if ok {
		tour, _, ok = strings.Cut(tour, "```")
	}
	if !ok {
		t.Fatal("README.md has no block of shell")
	}
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"/tmp/vm", "/tmp/once"} {
		if _, err := os.Lstat(path); err == nil {
			t.Fatalf("%s is there already: the tour would meet somebody's bundle", path)
		}
		t.Cleanup(func() {
			if _, err := os.Lstat(path); err == nil {
				out, err := command(t, "rm", "--force", path).CombinedOutput()
				t.Logf("the tour left %s behind: %s %v", path, out, err)
			}
		})
	}
	cmd := exec.Command("bash", "-euo", "pipefail", "-x")
	cmd.Dir = root
	cmd.Stdin = strings.NewReader(tour)
	cmd.Env = append(os.Environ(), "KCRADLE_TEMPLATES=off", "KCRADLE_ROOT="+shared.root)
	out, err := cmd.CombinedOutput()
	t.Logf("%s", out)
	if err != nil {
		t.Fatalf("the tour: %v", err)
	}
	for _, want := range []string{
		"web", "67108864", "hello from outside", "THROUGH A MACHINE", "exit code 3",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the tour did not show %q", want)
		}
	}
}
