package verify

import (
	"fmt"
	"slices"
	"strings"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/pod"
)

// ID names a check; it is stable.
type ID string

// The checks, in their order. What is given to verify with:
const (
	CheckPolicy    ID = "policy"    // the policy is well formed
	CheckReference ID = "reference" // the reference is well formed, and what follows from its own inputs
	CheckEvidence  ID = "evidence"  // the evidence could be had
)

// Whether AMD's hardware made the report. The first of these that does not pass ends everything.
const (
	CheckReport    ID = "report"    // the report is well formed
	CheckSigner    ID = "signer"    // it is signed, by a kind of key that is accepted
	CheckVEK       ID = "vek"       // the certificate of that key is well formed, and of that kind
	CheckLine      ID = "line"      // the certificate is of the processor's product line
	CheckRoot      ID = "root"      // the chain ends in the pinned root of that line
	CheckChain     ID = "chain"     // each certificate is signed by the next, and is what its place demands
	CheckValidity  ID = "validity"  // no certificate is expired or not yet valid
	CheckCRL       ID = "crl"       // no certificate of the chain is revoked; see policy.CRLMode
	CheckSignature ID = "signature" // the key of the certificate signed the report
	CheckTCB       ID = "tcb"       // the key belongs to the TCB version the report names
	CheckChip      ID = "chip"      // the key belongs to the chip the report names; a VLEK has none
)

// Whether it is the right guest. From here on all checks are made, whatever fails.
const (
	CheckReportData  ID = "report-data" // REPORT_DATA answers this verifier's nonce, for this key, connection and pod
	CheckFreshness   ID = "freshness"   // that was just now, over this connection
	CheckPod         ID = "pod"         // pod.json is the one that was attested
	CheckMeasurement ID = "measurement"
	CheckHostData    ID = "host-data"
	CheckIDKey       ID = "id-key"
)

// Whether guest and machine are in a state that is accepted.
const (
	CheckVersion          ID = "version"
	CheckProduct          ID = "product"
	CheckVMPL             ID = "vmpl"
	CheckDebug            ID = "guest-debug"
	CheckMigration        ID = "guest-migration"
	CheckCXL              ID = "guest-cxl"
	CheckSMT              ID = "guest-smt"
	CheckSingleSocket     ID = "guest-single-socket"
	CheckXTS              ID = "guest-xts"
	CheckRAPL             ID = "guest-rapl"
	CheckCiphertextHiding ID = "guest-ciphertext-hiding"
	CheckPageSwap         ID = "guest-page-swap"
	CheckABI              ID = "guest-abi"
	CheckUnknownPolicy    ID = "guest-unknown"

	CheckPlatformAlias            ID = "platform-alias-check"
	CheckPlatformECC              ID = "platform-ecc"
	CheckPlatformSMT              ID = "platform-smt"
	CheckPlatformTSME             ID = "platform-tsme"
	CheckPlatformRAPL             ID = "platform-rapl"
	CheckPlatformCiphertextHiding ID = "platform-ciphertext-hiding"
	CheckPlatformTIO              ID = "platform-tio"
	CheckUnknownPlatform          ID = "platform-unknown"

	CheckTCBReported        ID = "tcb-reported"
	CheckTCBCommitted       ID = "tcb-committed"
	CheckTCBLaunch          ID = "tcb-launch"
	CheckMitigationsLaunch  ID = "mitigations-launch"
	CheckMitigationsCurrent ID = "mitigations-current"
	CheckProvisional        ID = "provisional"
	CheckChipID             ID = "chip-id"
)

// Whether the pod is what was asked for.
const (
	CheckImage         ID = "image"
	CheckPodExec       ID = "pod-exec"
	CheckPodHostMounts ID = "pod-host-mounts"
	CheckPodVolumes    ID = "pod-volumes"
	CheckPodPrivileged ID = "pod-privileged"
)

// Status is the outcome of a check. The zero value is not a pass.
type Status string

// The outcomes.
const (
	Pass        Status = "pass"
	Fail        Status = "fail"        // checked, and not as it must be
	Malformed   Status = "malformed"   // could not be read
	Missing     Status = "missing"     // could not be had: a certificate or a revocation list
	Unreachable Status = "unreachable" // could not be had, because who has it does not answer
	Unset       Status = "unset"       // nobody said what is expected, without which nothing can pass
	Warn        Status = "warn"        // not as it should be, or not to be known, and tolerated by the policy
	Open        Status = "open"        // the policy leaves it open
	Skipped     Status = "skipped"     // not reached
)

// harmless reports whether later checks may still run.
func (s Status) harmless() bool { return s == Pass || s == Warn || s == Open }

// Check is the outcome of one check.
type Check struct {
	ID       ID     `json:"id"`
	Status   Status `json:"status"`
	Expected string `json:"expected,omitempty"`
	Actual   string `json:"actual,omitempty"`
	Message  string `json:"message,omitempty"` // what is wrong; empty for a pass
}

// Result is the decision on one piece of evidence, as a value: table, JSON and exit codes are made from it and nothing
// else. The zero Result has not passed.
type Result struct {
	// Checks holds each check once, in order.
	Checks []Check
	// Report and VEK are nil unless the result has passed.
	Report *snp.Report
	VEK    *VEK
	// Pod is nil unless the result has passed and there is a pod.
	Pod       *pod.Pod
	PodDigest pod.Digest
}

// Passed reports whether every check was made, once, and passed. Warn and Open count as passed where the policy can leave
// the check open; Skipped never does.
func (r Result) Passed() bool { return r.Err() == nil }

// Err returns why the result has not passed, nil if it has. The error is an *Error if checks of the result are the reason.
func (r Result) Err() error {
	seen := map[ID]bool{}
	var failed []Check
	for _, c := range r.Checks {
		i := slices.IndexFunc(rows, func(w row) bool { return w.id == c.ID })
		if i < 0 || seen[c.ID] {
			return fmt.Errorf("snp: check %s was made twice, or is none", c.ID)
		}
		seen[c.ID] = true
		if c.Status != Pass && !slices.Contains(rows[i].may, c.Status) {
			failed = append(failed, c)
		}
	}
	if len(failed) > 0 {
		return &Error{Failed: failed}
	}
	for _, w := range rows {
		if !seen[w.id] {
			return fmt.Errorf("snp: check %s was not made", w.id)
		}
	}
	return nil
}

// Warnings returns the checks that are not as they should be, and tolerated.
func (r Result) Warnings() (out []Check) {
	for _, c := range r.Checks {
		if c.Status == Warn {
			out = append(out, c)
		}
	}
	return out
}

// Rejected returns the result of evidence that could not be looked at, because check id of what was given ends with that
// status and error.
func Rejected(id ID, s Status, err error) Result {
	var r Result
	for _, w := range rows {
		c := Check{ID: w.id, Status: Skipped, Message: notReached(id)}
		if w.id == id {
			c.Status, c.Message = s, err.Error()
		}
		r.Checks = append(r.Checks, c)
	}
	return r
}

func notReached(id ID) string { return fmt.Sprintf("not reached: %s did not pass", id) }

// Error is all checks that did not pass, in order.
type Error struct {
	Failed []Check // at least one
}

// Cause returns the check that decides what the failure is: one that failed, or else the first that could not be made.
func (e *Error) Cause() Check {
	if i := slices.IndexFunc(e.Failed, func(c Check) bool { return c.Status == Fail }); i >= 0 {
		return e.Failed[i]
	}
	if i := slices.IndexFunc(e.Failed, func(c Check) bool { return c.Status != Skipped }); i >= 0 {
		return e.Failed[i]
	}
	return e.Failed[0]
}

// Error returns a line for each check that did not pass, and none for those that were not reached because of them.
func (e *Error) Error() string {
	var lines []string
	for _, c := range e.Failed {
		if c.Status == Skipped && c != e.Cause() {
			continue
		}
		s := fmt.Sprintf("snp: check %s: %s: %s", c.ID, c.Status, c.Message)
		if c.Expected != "" && c.Expected != c.Actual {
			s += fmt.Sprintf(" (expected %s, got %s)", c.Expected, c.Actual)
		}
		lines = append(lines, s)
	}
	return strings.Join(lines, "\n")
}
