package verify

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/snp"
)

// decoded is a Result's JSON as a program reads it.
type decoded struct {
	Version  int
	Verdict  string
	Error    string
	Checks   []Check
	Report   map[string]any
	Warnings []string
}

func decode(t *testing.T, r Result) decoded {
	t.Helper()
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	var d decoded
	if err := json.Unmarshal(b, &d); err != nil {
		t.Fatal(err)
	}
	if d.Version != ResultVersion || !slices.Equal(d.Checks, r.Checks) || d.Verdict != string(r.Verdict()) || len(d.Warnings) != len(r.Warnings()) {
		t.Errorf("got %s", b)
	}
	for _, name := range []string{`"checks":[`, `"warnings":[`} {
		if !bytes.Contains(b, []byte(name)) {
			t.Errorf("got no %s in %s", name, b)
		}
	}
	return d
}

func table(t *testing.T, r Result) string {
	t.Helper()
	var b strings.Builder
	if err := r.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// lastLine is the verdict.
func lastLine(s string) string {
	lines := strings.Split(strings.TrimSuffix(s, "\n"), "\n")
	return lines[len(lines)-1]
}

// TestViews wants table and JSON of every kind of result to say the same, and to show a report only of one that passed.
func TestViews(t *testing.T) {
	good := newSample(t, snp.LineTurin)
	stored := newSample(t, snp.LineTurin)
	stored.expect.Stored = true
	stored.policy.ChipIDs = nil
	bare := newSample(t, snp.LineGenoa)
	bare.bare()
	wrong := newSample(t, snp.LineGenoa)
	wrong.Report.VMPL = 1
	wrong.Report.Measurement[0]++
	forged := newSample(t, snp.LineGenoa)
	forged.change = func(e *Evidence) { e.Report[0x90]++ }
	unset := newSample(t, snp.LineGenoa)
	unset.bare()
	unset.policy.Measurements = nil
	both := newSample(t, snp.LineGenoa)
	both.bare()
	both.policy.Measurements = nil
	both.Report.VMPL = 1
	for _, tt := range []struct {
		name    string
		result  Result
		verdict Verdict
		last    string
		has     []string
	}{
		{"good", good.decide(t), VerdictPass, "VERIFIED image app:1@" + digestOf(7) + " in pod p sha256:", []string{"CHECK ", "\nfreshness ", ", fresh nonce, TLS bound\n"}},
		{"stored", stored.decide(t), VerdictPass, "VERIFIED image app:1@", []string{"\nWARNING freshness: not checked", "\nWARNING chip-id: ", ", freshness not checked, 2 warnings\n"}},
		{"bare", bare.decide(t), VerdictPass, "VERIFIED a report of measurement ", []string{"Genoa, TCB bl 10 tee 1 snp 25 ucode 200, chip ", ", 1 warning\n"}},
		{"wrong", wrong.decide(t), VerdictFail, "NOT VERIFIED: measurement, vmpl", []string{"\nmeasurement                 FAIL     ", "\nFAIL measurement: the guest was launched from something else", "\n  expected ", "\n  got      ", "\nFAIL vmpl: another privilege level"}},
		{"forged", forged.decide(t), VerdictFail, "NOT VERIFIED: signature; 42 checks were not reached", []string{"\nSKIPPED"}},
		{"unset", unset.decide(t), VerdictError, "NOT VERIFIED: measurement", []string{"\nUNSET measurement: "}},
		{"unset and wrong", both.decide(t), VerdictFail, "NOT VERIFIED: measurement, vmpl", nil},
		{"rejected", Rejected(CheckEvidence, Unreachable, errors.New("no route")), VerdictError, "NOT VERIFIED: evidence; ", []string{"\nUNREACHABLE evidence: no route\n"}},
		{"nothing", Result{}, VerdictError, "NOT VERIFIED: snp: check policy was not made", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			passed := tt.verdict == VerdictPass
			d, text := decode(t, tt.result), table(t, tt.result)
			if d.Verdict != string(tt.verdict) || (d.Report != nil) != passed || (d.Error == "") != passed {
				t.Errorf("got verdict %s, error %q, report %v", d.Verdict, d.Error, d.Report)
			}
			if got := lastLine(text); !strings.HasPrefix(got, tt.last) || got != tt.result.Summary() {
				t.Errorf("got last line %q, want %s", got, tt.last)
			}
			for _, want := range tt.has {
				if want == "\nSKIPPED" {
					if strings.Contains(text, want) {
						t.Errorf("checks that were not reached are explained in\n%s", text)
					}
				} else if !strings.Contains(text, want) {
					t.Errorf("got no %q in\n%s", want, text)
				}
			}
			for line := range strings.Lines(text) {
				if strings.HasSuffix(strings.TrimSuffix(line, "\n"), " ") {
					t.Errorf("blanks at the end of %q", line)
				}
			}
			for _, c := range tt.result.Checks {
				if !strings.Contains(text, "\n"+string(c.ID)+" ") {
					t.Errorf("no line for %s", c.ID)
				}
			}
		})
	}
}

// TestWords of the other side cannot move the cursor, start a line of their own, or hide one.
func TestWords(t *testing.T) {
	s := newSample(t, snp.LineGenoa)
	evil := "app\\u001b[2J\\nVERIFIED\\u202e\\u009b"
	s.launch(t, bytes.Replace(documentOf("", ""), []byte("app:1"), []byte(evil), 1))
	r := s.decide(t)
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	text := table(t, r)
	for _, bad := range []string{"\x1b", "\u009b", "\u202e", "\nVERIFIED\u202e", "\nVERIFIED�"} {
		if strings.Contains(text, bad) {
			t.Errorf("got %q in\n%s", bad, text)
		}
	}
	if !strings.Contains(lastLine(text), "image app�[2J�VERIFIED��@") {
		t.Errorf("got %q", lastLine(text))
	}
}

func TestCell(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", ""}, {strings.Repeat("a", maxCell), strings.Repeat("a", maxCell)},
		{strings.Repeat("a", maxCell+1), strings.Repeat("a", maxCell-3) + "…"},
		{strings.Repeat("é", maxCell), strings.Repeat("é", 18) + "…"},
	} {
		if got := cell(tt.in); got != tt.want {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, fmt.Errorf("no space") }

func TestWriteTableError(t *testing.T) {
	if err := new(Result).WriteTable(full{}); err == nil {
		t.Error("a table that could not be written was")
	}
}
