package need

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// fixtureDir is where real attestation reports, AMD's certificates, firmware and published vectors lie, beside the repository: they
// are not part of this module.
var fixtureDir = filepath.Join("..", "shared", "snp")

// Fixture needs a real report, certificate, firmware or vector, and returns what is in it. A checkout that stands alone has none, and
// skips the test even where CI is set; beside a directory of them a single file may not be missing there.
func Fixture(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(FixturePath(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// FixturePath is [Fixture] for what is given to a program.
func FixturePath(t testing.TB, name string) string {
	t.Helper()
	return Fixtures(t, name)[0]
}

// Fixtures needs at least one file that matches a pattern of [filepath.Glob].
func Fixtures(t testing.TB, pattern string) []string {
	t.Helper()
	dir := filepath.Join(moduleRoot(t), fixtureDir)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		t.Skipf("needs %s (it holds real reports, certificates and firmware, and lies beside the repository, not in it)", dir)
	}
	paths := AnyFixtures(t, pattern)
	if len(paths) == 0 {
		missing(t, filepath.Join(dir, pattern), "the directory is there without it: complete it, or move it away")
	}
	return paths
}

// AnyFixtures returns the files that match a pattern, none where there are none: seeds of a fuzz test are welcome, not needed.
func AnyFixtures(t testing.TB, pattern string) []string {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(moduleRoot(t), fixtureDir, pattern))
	if err != nil {
		t.Fatal(err)
	}
	return paths
}

// moduleRoot is the directory above the test's that holds go.mod.
func moduleRoot(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			t.Fatal("no go.mod above the working directory")
		}
		dir = parent
	}
}
