package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
)

// test names a top-level test: "container TestX" in the list.
type test struct{ pkg, name string }

func (t test) String() string { return t.pkg + " " + t.name }

func compareTests(a, b test) int { return strings.Compare(a.String(), b.String()) }

const listHeader = `# The tests of moby's integration suite that a kcradle daemon passes: package and test, sorted.
# make moby fails when one of them does not pass; go run ./hack/moby-suite -daemon bin/kcradle -update writes the list.
`

// readList reads the list at path. A file that is not there is an empty list.
func readList(path string) ([]test, error) {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	list, err := parseList(string(b))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return list, nil
}

func parseList(text string) ([]test, error) {
	var list []test
	n := 0
	for line := range strings.Lines(text) {
		n++
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		f := strings.Fields(line)
		if len(f) != 2 || !packagePattern.MatchString(f[0]) || !strings.HasPrefix(f[1], "Test") {
			return nil, fmt.Errorf("line %d: got %q, want a package and a test, such as container TestKill", n, line)
		}
		t := test{f[0], f[1]}
		if len(list) > 0 && compareTests(list[len(list)-1], t) >= 0 {
			return nil, fmt.Errorf("line %d: %s stands after %s, want them sorted and each once (write the list with -update)",
				n, t, list[len(list)-1])
		}
		list = append(list, t)
	}
	return list, nil
}

func formatList(list []test) string {
	var b strings.Builder
	b.WriteString(listHeader)
	for _, t := range list {
		fmt.Fprintln(&b, t)
	}
	return b.String()
}

// updateList returns old with what this run has to say: tests that passed are in it, others that ran are not, and those
// that did not run stay as they are. A test that used a daemon of its own says nothing of the server, unless that is the same program.
func updateList(old []test, r *report) []test {
	ran := map[test]bool{}
	var list []test
	for _, p := range r.Packages {
		for _, t := range p.Tests {
			id := test{p.Name, t.Name}
			ran[id] = true
			if t.Status == passed && (!t.OwnDaemon || r.SameDaemon) {
				list = append(list, id)
			}
		}
	}
	for _, t := range old {
		if !ran[t] && !r.gone(t) {
			list = append(list, t)
		}
	}
	slices.SortFunc(list, compareTests)
	return list
}

// broken returns what is on the list, was to run, and did not pass, each with the reason.
func broken(list []test, r *report) []string {
	var out []string
	for _, t := range list {
		switch got := r.find(t); {
		case got != nil && got.Status != passed:
			out = append(out, fmt.Sprintf("%s: %s: %s", t, got.Status, got.Reason))
		case r.gone(t):
			out = append(out, fmt.Sprintf("%s: the suite has no such test", t))
		case got == nil && r.wanted(t):
			out = append(out, fmt.Sprintf("%s: it was not run", t))
		}
	}
	return out
}
