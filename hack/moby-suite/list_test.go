package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// ran is the report of a run of package container with -run, which the network's list of tests was not asked for.
func ran(run string) *report {
	end := func(name string, s status, own bool) *testReport {
		return &testReport{result: result{Name: name, Status: s, Reason: "why"}, OwnDaemon: own}
	}
	p := &packageReport{Name: "container", All: []string{"TestA", "TestB", "TestC", "TestD", "TestE", "TestF"}}
	for _, t := range []*testReport{
		end("TestA", passed, false), end("TestB", failed, false), end("TestC", passed, true), end("TestD", timedOut, false),
	} {
		p.add(t)
	}
	return &report{Run: run, Packages: []*packageReport{p}}
}

func list(t *testing.T, lines ...string) []test {
	t.Helper()
	l, err := parseList(strings.Join(lines, "\n"))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestListRoundTrip(t *testing.T) {
	want := list(t, "# comment", "", "container TestA", "  container   TestB", "network/bridge TestA")
	got, err := parseList(formatList(want))
	if err != nil {
		t.Fatal(err)
	}
	lines := []test{{"container", "TestA"}, {"container", "TestB"}, {"network/bridge", "TestA"}}
	if diff := cmp.Diff(lines, got, cmp.AllowUnexported(test{})); diff != "" {
		t.Errorf("(-want +got)\n%s", diff)
	}
}

func TestListRefuses(t *testing.T) {
	for text, want := range map[string]string{
		"container":                            `line 1: got "container"`,
		"container TestA x":                    `line 1: got "container TestA x"`,
		"# c\n../x TestA":                      `line 2: got "../x TestA"`,
		"container Kill":                       `line 1: got "container Kill"`,
		"container TestB\ncontainer TestA\n":   "line 2: container TestA stands after container TestB",
		"container TestA\n\ncontainer TestA\n": "line 3: container TestA stands after container TestA",
	} {
		if _, err := parseList(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", text, err, want)
		}
	}
}

func TestReadList(t *testing.T) {
	path := filepath.Join(t.TempDir(), "list")
	if l, err := readList(path); err != nil || l != nil {
		t.Errorf("no file: got %v, %v, want an empty list", l, err)
	}
	if err := os.WriteFile(path, []byte("nonsense\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := readList(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a broken file: got %v, want its name", err)
	}
}

// The kept list is one that -update would write.
func TestKeptList(t *testing.T) {
	b, err := os.ReadFile("passing.txt")
	if err != nil {
		t.Fatal(err)
	}
	l, err := parseList(string(b))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(formatList(l), string(b)); diff != "" {
		t.Errorf("passing.txt (-want +got)\n%s", diff)
	}
}

func TestUpdateList(t *testing.T) {
	old := list(t, "container TestB", "container TestC", "container TestE", "container TestGone", "image TestX")
	got := formatList(updateList(old, ran("")))
	// A passed; B failed; C had a daemon of its own; E and image's X did not run; Gone is not there any more.
	if want := listHeader + "container TestA\ncontainer TestE\nimage TestX\n"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestBroken(t *testing.T) {
	kept := list(t, "container TestA", "container TestB", "container TestD", "container TestE", "container TestGone", "image TestX")
	for _, tc := range []struct {
		run  string
		want []string
	}{
		{"", []string{
			"container TestB: fail: why", "container TestD: timeout: why", "container TestE: it was not run",
			"container TestGone: the suite has no such test",
		}},
		{"Test[ABD]", []string{
			"container TestB: fail: why", "container TestD: timeout: why", "container TestGone: the suite has no such test",
		}},
	} {
		if diff := cmp.Diff(tc.want, broken(kept, ran(tc.run))); diff != "" {
			t.Errorf("-run %q (-want +got)\n%s", tc.run, diff)
		}
	}
	if got := broken(list(t, "container TestA", "image TestX"), ran("")); got != nil {
		t.Errorf("got %v, want nothing: one passed, the other's package was not run", got)
	}
}
