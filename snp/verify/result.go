package verify

import (
	"fmt"

	"github.com/kcradle/kcradle/snp"
)

// ID names a check; it is stable.
type ID string

// The checks, in their order.
const (
	CheckReport    ID = "report"    // the report is well formed
	CheckSigner    ID = "signer"    // it is signed, by a kind of key that is allowed
	CheckVEK       ID = "vek"       // the certificate of that key is well formed, and of that kind
	CheckLine      ID = "line"      // the certificate is of the processor's product line
	CheckRoot      ID = "root"      // the chain ends in the pinned root of that line
	CheckChain     ID = "chain"     // each certificate is signed by the next, and is what its place demands
	CheckValidity  ID = "validity"  // no certificate is expired or not yet valid
	CheckCRL       ID = "crl"       // no certificate of the chain is revoked; see CRLMode
	CheckSignature ID = "signature" // the key of the certificate signed the report
	CheckTCB       ID = "tcb"       // the key belongs to the TCB version the report names
	CheckChip      ID = "chip"      // the key belongs to the chip the report names; a VLEK has none
)

// Status is the outcome of a check. The zero value is not a pass.
type Status string

// The outcomes.
const (
	Pass      Status = "pass"
	Fail      Status = "fail"      // checked, and not as it must be
	Malformed Status = "malformed" // could not be read
	Missing   Status = "missing"   // could not be had: a certificate or a revocation list
	Warn      Status = "warn"      // not as it should be, and tolerated by configuration
	Skipped   Status = "skipped"   // not checked
)

// harmless reports whether later checks may still run.
func (s Status) harmless() bool { return s == Pass || s == Warn || s == Skipped }

// Check is the outcome of one check.
type Check struct {
	ID       ID     `json:"id"`
	Status   Status `json:"status"`
	Expected string `json:"expected,omitempty"`
	Actual   string `json:"actual,omitempty"`
	Message  string `json:"message,omitempty"` // what is wrong; empty for a pass
}

// Result is the decision on one piece of evidence, as a value. The zero Result has not passed.
type Result struct {
	// Checks holds each check once, in order.
	Checks []Check
	// Report and VEK are nil unless the result has passed.
	Report *snp.Report
	VEK    *VEK

	crl  CRLMode
	vlek bool
}

// Passed reports whether every check that the configuration demands was made, once, and passed, and whether no other
// check failed. A skipped check is never a pass: only a revocation list under CRLSoft and CRLOff, and the chip of a
// VLEK, are not demanded.
func (r Result) Passed() bool { return r.Err() == nil }

// Err returns why the result has not passed, nil if it has. The error is an *Error if a check of the result is the
// reason.
func (r Result) Err() error {
	seen := map[ID]bool{}
	for _, c := range r.Checks {
		if seen[c.ID] {
			return fmt.Errorf("snp: check %s was made twice", c.ID)
		}
		seen[c.ID] = true
		if c.Status != Pass && !r.tolerated(c) {
			return &Error{Check: c}
		}
	}
	for _, s := range steps {
		if !seen[s.id] {
			return fmt.Errorf("snp: check %s was not made", s.id)
		}
	}
	return nil
}

// tolerated reports whether a check that did not pass leaves the result standing.
func (r Result) tolerated(c Check) bool {
	switch c.ID {
	case CheckCRL:
		return r.crl == CRLSoft && c.Status == Warn || r.crl == CRLOff && c.Status == Skipped
	case CheckChip:
		return r.vlek && c.Status == Skipped
	}
	return false
}

// Error is a check that did not pass.
type Error struct {
	Check Check
}

// Error returns the check and what is wrong.
func (e *Error) Error() string {
	s := fmt.Sprintf("snp: check %s: %s: %s", e.Check.ID, e.Check.Status, e.Check.Message)
	if e.Check.Expected != "" && e.Check.Expected != e.Check.Actual {
		s += fmt.Sprintf(" (expected %s, got %s)", e.Check.Expected, e.Check.Actual)
	}
	return s
}
