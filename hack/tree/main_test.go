package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestList(t *testing.T) {
	root := t.TempDir()
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	at := func(name string) string { return filepath.Join(root, name) }
	do(os.MkdirAll(at("b/skipped"), 0o755))
	do(os.WriteFile(at("a"), []byte("hello"), 0o644))
	do(os.Link(at("a"), at("b/a")))
	do(os.Symlink("../a\n", at("b/link")))
	do(unix.Mkfifo(at("fifo"), 0o622))
	do(os.Chmod(at("fifo"), 0o600|os.ModeSetuid))

	var out strings.Builder
	do(list(&out, root, []string{"/b/skipped"}))
	got := regexp.MustCompile(`\t\d+\.\d{9}\t`).ReplaceAllString(out.String(), "\tTIME\t")
	got = regexp.MustCompile(`\t\d+:\d+\t`).ReplaceAllString(got, "\tOWNER\t")
	want := strings.Join([]string{
		`"/"	dir	0755	OWNER	-	-	TIME	-	-	-`,
		`"/a"	file	0644	OWNER	5	-	TIME	2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824	2="/a"	-`,
		`"/b"	dir	0755	OWNER	-	-	TIME	-	-	-`,
		`"/b/a"	file	0644	OWNER	5	-	TIME	2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824	2="/a"	-`,
		`"/b/link"	link	0777	OWNER	-	"../a\n"	TIME	-	1="/b/link"	-`,
		`"/fifo"	fifo	4600	OWNER	-	-	TIME	-	1="/fifo"	-`,
	}, "\n") + "\n"
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("tree (-want +got):\n%s", d)
	}
}
