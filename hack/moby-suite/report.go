package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"text/tabwriter"
	"time"
)

// report is everything about a run; -json writes it.
type report struct {
	Suite    string    `json:"suite"`
	Server   version   `json:"server"`
	Started  time.Time `json:"started"`
	Seconds  float64   `json:"seconds"`
	Run      string    `json:"run,omitempty"` // regular expression
	Restarts int       `json:"restarts"`      // how often the server had to be started again
	// SameDaemon says that tests which start a daemon of their own get the program that is the server.
	SameDaemon bool             `json:"sameDaemon,omitempty"`
	Error      string           `json:"error,omitempty"`
	Packages   []*packageReport `json:"packages"`
}

type packageReport struct {
	Name     string        `json:"name"`
	Passed   int           `json:"passed"`
	Failed   int           `json:"failed"`
	Skipped  int           `json:"skipped"`
	TimedOut int           `json:"timedOut"`
	Unjudged int           `json:"unjudged"`
	All      []string      `json:"all"` // the tests that the package has
	Tests    []*testReport `json:"tests"`
}

// testReport is a top-level test's end.
type testReport struct {
	result
	OwnDaemon bool     `json:"ownDaemon,omitempty"` // it started a daemon of its own, so it may not speak of the server
	Trouble   string   `json:"trouble,omitempty"`   // how it left the server, when that was not as it found it
	ServerLog string   `json:"serverLog,omitempty"` // its last part, when the server had to be started again
	Subtests  []result `json:"subtests,omitempty"`
	Output    string   `json:"output,omitempty"` // the last 64 KiB, when it did not pass
}

func (p *packageReport) add(t *testReport) {
	p.Tests = append(p.Tests, t)
	*map[status]*int{
		passed: &p.Passed, failed: &p.Failed, skipped: &p.Skipped, timedOut: &p.TimedOut, unjudged: &p.Unjudged,
	}[t.Status]++
}

// pkg returns the report of a package that was run, or nil.
func (r *report) pkg(name string) *packageReport {
	for _, p := range r.Packages {
		if p.Name == name {
			return p
		}
	}
	return nil
}

// find returns the result of a test that was run, or nil.
func (r *report) find(t test) *testReport {
	p := r.pkg(t.pkg)
	if p == nil {
		return nil
	}
	i := slices.IndexFunc(p.Tests, func(got *testReport) bool { return got.Name == t.name })
	if i < 0 {
		return nil
	}
	return p.Tests[i]
}

// gone reports that t's package was asked for its tests and has none of that name.
func (r *report) gone(t test) bool {
	p := r.pkg(t.pkg)
	return p != nil && len(p.All) > 0 && !slices.Contains(p.All, t.name)
}

// wanted reports that this run was to run t.
func (r *report) wanted(t test) bool {
	if r.pkg(t.pkg) == nil {
		return false
	}
	re, err := regexp.Compile(r.Run)
	return err != nil || re.MatchString(t.name)
}

// note is what the table and the progress say of a test besides its status.
func note(t *testReport) string {
	s := ""
	if t.OwnDaemon && t.Status != unjudged {
		s += " [daemon of its own]"
	}
	if t.Reason != "" {
		s += ": " + t.Reason
	}
	if t.Trouble != "" && t.Trouble != t.Reason {
		s += " [" + shorten(t.Trouble) + "]"
	}
	return s
}

// print writes the table, and below it what did not pass, each with the first line of its reason.
func (r *report) print(w io.Writer) error {
	fmt.Fprintf(w, "%s against %s %s (API %s), %.0f s\n\n", r.Suite, orElse(r.Server.Platform, "server"),
		r.Server.Version, r.Server.APIVersion, r.Seconds)
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(tw, "package\tpassed\tfailed\ttimed out\tskipped\tunjudged\tof\t")
	for _, p := range r.Packages {
		fmt.Fprintf(tw, "%s\t%d\t%d\t%d\t%d\t%d\t%d\t\n", p.Name, p.Passed, p.Failed, p.TimedOut, p.Skipped, p.Unjudged, len(p.All))
	}
	if err := tw.Flush(); err != nil {
		return err
	}
	for _, s := range []struct {
		status
		title string
	}{
		{failed, "failed"},
		{timedOut, "timed out"},
		{unjudged, "unjudged: they start a daemon of their own (-dockerd PROGRAM)"},
	} {
		first := true
		for _, p := range r.Packages {
			for _, t := range p.Tests {
				if t.Status != s.status {
					continue
				}
				if first {
					fmt.Fprintf(w, "\n%s:\n", s.title)
					first = false
				}
				fmt.Fprintf(w, "  %s %s%s\n", p.Name, t.Name, note(t))
			}
		}
	}
	return nil
}

func orElse(s, other string) string {
	if s == "" {
		return other
	}
	return s
}

// writeFile puts b at path, whole or not at all.
func writeFile(path string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(path), ".moby-suite-")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // nothing, once it is renamed
	if _, err := f.Write(b); err != nil {
		f.Close()
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

func (r *report) writeJSON(path string) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return writeFile(path, append(b, '\n'))
}
