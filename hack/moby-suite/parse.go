package main

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// status is how a test ended.
type status string

const (
	passed   status = "pass"
	failed   status = "fail"
	skipped  status = "skip"
	timedOut status = "timeout"
	// unjudged: it failed because it wanted to start a daemon of its own and there was none to give it. It says nothing
	// of the server under test.
	unjudged status = "unjudged"
)

// result is the end of one test, or of one subtest.
type result struct {
	Name    string  `json:"name"` // a subtest's with its parents', as Go prints it
	Status  status  `json:"status"`
	Seconds float64 `json:"seconds"`
	Reason  string  `json:"reason,omitempty"` // why it failed or was skipped, in a line or two
}

var (
	verdictLine = regexp.MustCompile(`^ *--- (PASS|FAIL|SKIP): (\S+) \(([0-9.]+)s\)$`)
	nameLine    = regexp.MustCompile(`^=== (?:RUN|CONT|NAME|PAUSE)\s+(\S*)$`)
	logLine     = regexp.MustCompile(`^ *[\w.-]+\.go:[0-9]+: ?(.*)$`)
)

// maxReason bounds a reason, in bytes.
const maxReason = 400

// parse reads what a test binary printed under -test.v=test2json and returns the tests that it gives a verdict of,
// subtests first. A test that began and has no verdict did not end.
func parse(output string) []result {
	var out []result
	lines := map[string][]string{} // what each test printed
	current := ""
	for line := range strings.Lines(output) {
		line = strings.TrimRight(line, "\r\n")
		// Go puts a mark before each line of its own, because a test may print without a newline at the end.
		if before, after, marked := strings.Cut(line, "\x16"); marked {
			if before != "" {
				lines[current] = append(lines[current], before)
			}
			line = strings.ReplaceAll(after, "\x16", "")
		}
		if m := nameLine.FindStringSubmatch(line); m != nil {
			current = m[1]
			continue
		}
		m := verdictLine.FindStringSubmatch(line)
		if m == nil {
			lines[current] = append(lines[current], line)
			continue
		}
		seconds, err := strconv.ParseFloat(m[3], 64)
		if err != nil {
			continue // "1.2.3", which Go does not print
		}
		current = m[2]
		out = append(out, result{Name: m[2], Status: verdicts[m[1]], Seconds: seconds})
	}
	// What a test logs can stand behind its verdict, so the reasons come last.
	for i := range out {
		if out[i].Status != passed {
			out[i].Reason = reason(lines[out[i].Name])
		}
	}
	slices.SortStableFunc(out, func(a, b result) int { return top(a.Name) - top(b.Name) })
	return out
}

var verdicts = map[string]status{"PASS": passed, "FAIL": failed, "SKIP": skipped}

// top is 1 for a top-level test, 0 for a subtest.
func top(name string) int {
	if strings.Contains(name, "/") {
		return 0
	}
	return 1
}

// failureText begins what the suite's helpers print when they fail a test; other lines may be a test's narration.
var failureText = regexp.MustCompile(
	`^(assertion failed|timeout hit|polling check failed|failed to|could not|cannot|unable to|unexpected|expected)`)

// reason is the first log entry that sounds like a failure, or else the last one, which is what ends a test. A panic is
// reason enough wherever it stands.
func reason(lines []string) string {
	last := ""
	for i := 0; i < len(lines); i++ {
		if strings.HasPrefix(lines[i], "panic: ") {
			return shorten(lines[i])
		}
		m := logLine.FindStringSubmatch(lines[i])
		if m == nil {
			continue
		}
		text := strings.TrimSpace(m[1])
		// The rest of a log entry is indented deeper than its first line.
		for i+1 < len(lines) && strings.HasPrefix(lines[i+1], "        ") && !logLine.MatchString(lines[i+1]) {
			i++
			if len(text) < maxReason/2 {
				text = strings.TrimSpace(text + " " + strings.TrimSpace(lines[i]))
			}
		}
		if failureText.MatchString(text) {
			return shorten(text)
		}
		if text != "" {
			last = text
		}
	}
	return shorten(last)
}

func shorten(s string) string {
	s = strings.ToValidUTF8(s, "?")
	if len(s) <= maxReason {
		return s
	}
	return strings.ToValidUTF8(s[:maxReason], "") + "…"
}

// split takes the result of the test called name out of results; the others are its subtests'. Where it failed and
// does not say why, the first subtest that does is quoted.
func split(results []result, name string) (own *result, subtests []result) {
	for _, r := range results {
		if r.Name == name {
			own = &r
			continue
		}
		subtests = append(subtests, r)
	}
	if own != nil && own.Status == failed && !failureText.MatchString(own.Reason) {
		for _, r := range subtests {
			if r.Status == failed && r.Reason != "" {
				own.Reason = shorten(strings.TrimPrefix(r.Name, name+"/") + ": " + r.Reason)
				break
			}
		}
	}
	return own, subtests
}

// testNames reads what -test.list printed: tests only, no benchmarks and examples, and nothing else that is printed.
func testNames(output string) []string {
	var names []string
	for line := range strings.Lines(output) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "Test") && !strings.ContainsAny(line, " \t:/") {
			names = append(names, line)
		}
	}
	return names
}
