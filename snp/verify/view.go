package verify

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/kcradle/kcradle/snp"
)

// Verdict is a result in a word.
type Verdict string

// The verdicts. The zero value is none of them.
const (
	VerdictPass  Verdict = "pass"
	VerdictFail  Verdict = "fail"  // looked at, and not accepted
	VerdictError Verdict = "error" // could not be looked at
)

// Verdict returns the result in a word. Whatever it is called: only VerdictPass has passed.
func (r Result) Verdict() Verdict {
	err := r.Err()
	if err == nil {
		return VerdictPass
	}
	var e *Error
	if errors.As(err, &e) && e.Cause().Status == Fail {
		return VerdictFail
	}
	return VerdictError
}

// ResultVersion is the version of a Result's JSON:
//
//	1  the first
const ResultVersion = 1

// MarshalJSON returns the result for programs. The report is there only if the result has passed.
func (r Result) MarshalJSON() ([]byte, error) {
	out := struct {
		Version  int         `json:"version"`
		Verdict  Verdict     `json:"verdict"`
		Error    string      `json:"error,omitempty"`
		Checks   []Check     `json:"checks"`
		Report   *snp.Report `json:"report,omitempty"`
		Warnings []string    `json:"warnings"`
	}{ResultVersion, r.Verdict(), "", append([]Check{}, r.Checks...), r.Report, []string{}}
	if err := r.Err(); err != nil {
		out.Error = err.Error()
	}
	for _, c := range r.Warnings() {
		out.Warnings = append(out.Warnings, fmt.Sprintf("%s: %s", c.ID, c.Message))
	}
	return json.Marshal(out)
}

// maxCell bounds a value in the table, in bytes; the whole value of a check that did not pass stands below it.
const maxCell = 40

// WriteTable writes the result for people: a line for each check, what is wrong below them in full, and the verdict as the
// last line. It writes plain text, without colours.
func (r Result) WriteTable(w io.Writer) error {
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "CHECK\tVERDICT\tEXPECTED\tGOT")
	for _, c := range r.Checks {
		status := string(c.Status)
		if !c.Status.harmless() {
			status = strings.ToUpper(status)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", c.ID, status, cell(c.Expected), cell(c.Actual))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	for i, c := range r.Warnings() {
		if i == 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "WARNING %s: %s\n", c.ID, printable(c.Message))
	}
	err := r.Err()
	var e *Error
	if errors.As(err, &e) {
		for _, c := range e.Failed {
			if c.Status == Skipped {
				continue
			}
			fmt.Fprintf(&b, "\n%s %s: %s\n", strings.ToUpper(string(c.Status)), c.ID, printable(c.Message))
			if len(c.Expected) > maxCell || len(c.Actual) > maxCell {
				fmt.Fprintf(&b, "  expected %s\n  got      %s\n", printable(c.Expected), printable(c.Actual))
			}
		}
	}
	fmt.Fprintf(&b, "\n%s\n", r.Summary())
	// Cells that are empty at the end of a line leave blanks there.
	lines := strings.Split(b.String(), "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	_, err = io.WriteString(w, strings.Join(lines, "\n"))
	return err
}

// Summary returns the verdict in a line: what was verified, or how many checks did not pass.
func (r Result) Summary() string {
	err := r.Err()
	if err == nil {
		return "VERIFIED " + r.what()
	}
	var e *Error
	if !errors.As(err, &e) {
		return "NOT VERIFIED: " + err.Error()
	}
	var ids []string
	skipped := 0
	for _, c := range e.Failed {
		if c.Status == Skipped {
			skipped++
			continue
		}
		ids = append(ids, string(c.ID))
	}
	s := "NOT VERIFIED: " + strings.Join(ids, ", ")
	if skipped > 0 {
		s += fmt.Sprintf("; %d checks were not reached", skipped)
	}
	return s
}

func (r Result) what() string {
	var parts []string
	if r.Pod != nil {
		var images []string
		for _, i := range r.Pod.Images() {
			if i.Digest == [32]byte{} {
				images = append(images, fmt.Sprintf("%s (configuration %s)", i.Ref, i.Config))
			} else {
				images = append(images, i.Ref+"@"+i.Digest.String())
			}
		}
		parts = append(parts, fmt.Sprintf("image %s in pod %s %s", strings.Join(images, ", "), r.Pod.Name, r.PodDigest))
	} else {
		parts = append(parts, fmt.Sprintf("a report of measurement %.8x…", r.Report.Measurement))
	}
	parts = append(parts, r.VEK.Line.String(), "TCB "+r.Report.ReportedTCB.String())
	if r.VEK.Signer == snp.SignerVLEK {
		parts = append(parts, "a machine of "+r.VEK.CSP)
	} else {
		parts = append(parts, fmt.Sprintf("chip %.8x…", r.VEK.HWID))
	}
	for _, c := range r.Checks {
		switch {
		case c.ID != CheckFreshness:
		case c.Status == Pass:
			parts = append(parts, "fresh nonce", "TLS bound")
		default:
			parts = append(parts, "freshness not checked")
		}
	}
	if n := len(r.Warnings()); n == 1 {
		parts = append(parts, "1 warning")
	} else if n > 1 {
		parts = append(parts, fmt.Sprintf("%d warnings", n))
	}
	return printable(strings.Join(parts, ", "))
}

// cell shortens a value to what a column bears.
func cell(s string) string {
	s = printable(s)
	if len(s) <= maxCell {
		return s
	}
	return strings.ToValidUTF8(s[:maxCell-len("…")], "") + "…"
}

// printable keeps what came from the other side from moving the cursor.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r >= 0x7f && r < 0xa0 || r >= 0x2028 && r <= 0x202e || r >= 0x2066 && r <= 0x2069 || r == 0x200e || r == 0x200f {
			return '�'
		}
		return r
	}, s)
}
