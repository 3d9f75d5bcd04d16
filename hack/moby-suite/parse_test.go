package main

import (
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// out is what a test binary prints: a tilde stands for the mark that Go puts before its own lines.
func out(lines ...string) string {
	return strings.ReplaceAll(strings.Join(lines, "\n")+"\n", "~", "\x16")
}

func TestParse(t *testing.T) {
	for _, tc := range []struct {
		name, output string
		want         []result
	}{
		{"nothing", "", nil},
		{"pass", out("INFO: hello", "~=== RUN   TestA", "~--- PASS: TestA (0.01s)", "PASS"),
			[]result{{Name: "TestA", Status: passed, Seconds: 0.01}}},
		{"without marks", out("=== RUN   TestA", "    a_test.go:3: why", "--- FAIL: TestA (1.50s)", "FAIL"),
			[]result{{Name: "TestA", Status: failed, Seconds: 1.5, Reason: "why"}}},
		{"skip", out("~=== RUN   TestA", "    a_test.go:3: too old", "~--- SKIP: TestA (0.00s)"),
			[]result{{Name: "TestA", Status: skipped, Reason: "too old"}}},
		{"text before a mark", out("~=== RUN   TestA", "no newline~--- FAIL: TestA (0.00s)"),
			[]result{{Name: "TestA", Status: failed}}},
		{"verdict that a test prints in mid-line", out("~=== RUN   TestA", "it said --- PASS: TestB (0.00s)", "~--- FAIL: TestA (0.00s)"),
			[]result{{Name: "TestA", Status: failed}}},
		{"subtests that take turns", out("~=== RUN   TestA", "~=== RUN   TestA/x", "~=== PAUSE TestA/x", "~=== RUN   TestA/y",
			"    a_test.go:9: assertion failed: of y", "~=== NAME  TestA/x", "    a_test.go:8: assertion failed: of x",
			"~--- FAIL: TestA (0.20s)", "    ~--- FAIL: TestA/x (0.10s)", "~    --- FAIL: TestA/y (0.10s)"),
			[]result{
				{Name: "TestA/x", Status: failed, Seconds: 0.1, Reason: "assertion failed: of x"},
				{Name: "TestA/y", Status: failed, Seconds: 0.1, Reason: "assertion failed: of y"},
				{Name: "TestA", Status: failed, Seconds: 0.2},
			}},
		{"narration, then a failure of several lines, then more", out("~=== RUN   TestA", "    build.go:57: Step 1/2", "    a_test.go:3: assertion failed: ",
			"        --- got", "        +++ want", "    a_test.go:4: assertion failed: another", "~--- FAIL: TestA (0.00s)"),
			[]result{{Name: "TestA", Status: failed, Reason: "assertion failed: --- got +++ want"}}},
		{"the last of several that say nothing", out("~=== RUN   TestA", "    a.go:1: one", "    a.go:2: two", "~--- FAIL: TestA (0.00s)"),
			[]result{{Name: "TestA", Status: failed, Reason: "two"}}},
		{"panic", out("~=== RUN   TestA", "    a.go:1: one", "~--- FAIL: TestA (0.00s)", "panic: runtime error [recovered]", "goroutine 1:"),
			[]result{{Name: "TestA", Status: failed, Reason: "panic: runtime error [recovered]"}}},
		{"no verdict", out("~=== RUN   TestA", "    a.go:1: one"), nil},
	} {
		if diff := cmp.Diff(tc.want, parse(tc.output)); diff != "" {
			t.Errorf("%s: (-want +got)\n%s", tc.name, diff)
		}
	}
}

func TestReasonIsShort(t *testing.T) {
	lines := []string{"    a.go:1: assertion failed: " + strings.Repeat("é", maxReason)}
	for range 1000 {
		lines = append(lines, "        "+strings.Repeat("x", 100))
	}
	if got := reason(lines); len(got) > maxReason+len("…") || !strings.HasSuffix(got, "é…") {
		t.Errorf("got %d bytes, want at most %d, whole characters, and a sign that there was more: %q", len(got), maxReason, got)
	}
}

func TestSplit(t *testing.T) {
	sub := []result{{Name: "TestA/x", Status: passed}, {Name: "TestA/y", Status: failed, Reason: "assertion failed: 1"}}
	for _, tc := range []struct {
		name   string
		own    result
		reason string
	}{
		{"silent", result{Name: "TestA", Status: failed}, "y: assertion failed: 1"},
		{"narrating", result{Name: "TestA", Status: failed, Reason: "Step 1/2"}, "y: assertion failed: 1"},
		{"with a reason of its own", result{Name: "TestA", Status: failed, Reason: "timeout hit after 1s"}, "timeout hit after 1s"},
		{"skipped", result{Name: "TestA", Status: skipped, Reason: "old"}, "old"},
	} {
		own, subtests := split(append(slices.Clone(sub), tc.own), "TestA")
		if own == nil || own.Reason != tc.reason || len(subtests) != 2 {
			t.Errorf("%s: got %+v with %d subtests, want reason %q with 2", tc.name, own, len(subtests), tc.reason)
		}
	}
	if own, subtests := split(sub, "TestA"); own != nil || len(subtests) != 2 {
		t.Errorf("without a verdict: got %+v, %v, want none", own, subtests)
	}
}

func TestNames(t *testing.T) {
	got := testNames("INFO: Testing against a local daemon\nTest: no\nTestA\nBenchmarkB\nExampleC\nFuzzD\nTestE_f\nok  pkg 0.1s\n")
	if want := []string{"TestA", "TestE_f"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(out("~=== RUN   TestA", "~=== RUN   TestA/x", "text~    --- FAIL: TestA/x (0.10s)", "~--- FAIL: TestA (0.20s)"), "TestA")
	f.Add("--- PASS: TestA (1.2.3s)\n\x16\x16\n", "TestA")
	f.Fuzz(func(t *testing.T, output, name string) {
		results := parse(output)
		for _, r := range results {
			if r.Name == "" || r.Status == "" || len(r.Reason) > maxReason+len("…") {
				t.Errorf("got %+v", r)
			}
		}
		own, subtests := split(results, name)
		if own != nil && own.Name != name {
			t.Errorf("split: got %s, want %s", own.Name, name)
		}
		if len(subtests) > len(results) {
			t.Errorf("split made %d results of %d", len(subtests), len(results))
		}
	})
}
