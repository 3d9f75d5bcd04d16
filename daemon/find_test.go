package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestFindBundle(t *testing.T) {
	root := t.TempDir()
	dir := func(id string) string { return filepath.Join(root, containersDir, id) }
	first, second := strings.Repeat("a", 64), "aa"+strings.Repeat("b", 62)
	for id, name := range map[string]string{first: "web", second: "db", second + ".rm-1": "gone"} {
		if err := os.MkdirAll(dir(id), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir(id), recordFile), []byte(`{"version":2,"name":"`+name+`"}`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for ref, want := range map[string]string{"web": dir(first), "/db": dir(second), first: dir(first), "aab": dir(second)} {
		if got, err := FindBundle(root, ref); got != want || err != nil {
			t.Errorf("%s: got %s, %v, want %s", ref, got, err, want)
		}
	}
	for _, ref := range []string{"", "aa", "gone", "nobody", ".."} {
		if got, err := FindBundle(root, ref); err == nil {
			t.Errorf("%q: got %s", ref, got)
		}
	}
}
