package snp

import (
	"fmt"
	"io"
	"strings"
)

// Labelled is one line of an explanation.
type Labelled struct {
	Label string
	Value string
}

// Lines returns the report in words, in the order of its bytes. Digests and identities are lower case hex.
func (r *Report) Lines() []Labelled {
	policy := append([]string{fmt.Sprintf("%#x: ABI %d.%d or newer", uint64(r.Policy), r.Policy.ABIMajor(), r.Policy.ABIMinor())},
		words(uint64(r.Policy), policyNames)...)
	lines := []Labelled{
		{"version", fmt.Sprint(r.Version)},
		{"guest SVN", fmt.Sprint(r.GuestSVN)},
		{"guest policy", join(policy, r.Policy.Unknown())},
		{"family id", hexOr(r.FamilyID[:], "none")},
		{"image id", hexOr(r.ImageID[:], "none")},
		{"VMPL", r.vmpl()},
		{"signature", r.signature()},
		{"current TCB", r.CurrentTCB.String()},
		{"platform", fmt.Sprintf("%#x: %s", uint64(r.PlatformInfo), join(words(uint64(r.PlatformInfo), platformNames), r.PlatformInfo.Unknown()))},
		{"report data", hexOr(r.ReportData[:], "all zero")},
		{"measurement", fmt.Sprintf("%x", r.Measurement)},
		{"host data", hexOr(r.HostData[:], "all zero")},
		{"ID key digest", hexOr(r.IDKeyDigest[:], "none: launched without an ID block")},
		{"author key digest", r.authorKey()},
		{"report id", fmt.Sprintf("%x", r.ReportID)},
		{"migration agent", r.agent()},
		{"reported TCB", r.ReportedTCB.String()},
		{"processor", r.processor()},
		{"chip id", hexOr(r.ChipID[:], "masked by the platform")},
		{"committed TCB", r.CommittedTCB.String()},
		{"current firmware", r.Current.String()},
		{"committed firmware", r.Committed.String()},
		{"launch TCB", r.LaunchTCB.String()},
	}
	if r.Version >= Version5 {
		lines = append(lines,
			Labelled{"launch mitigations", fmt.Sprintf("%#x", r.LaunchMit)},
			Labelled{"current mitigations", fmt.Sprintf("%#x", r.CurrentMit)})
	}
	return lines
}

// Explain writes Lines to w as two columns. It says what the report claims and verifies nothing, and its last line says
// that.
func (r *Report) Explain(w io.Writer) error {
	var b strings.Builder
	for _, l := range r.Lines() {
		fmt.Fprintf(&b, "%-20s %s\n", l.Label, l.Value)
	}
	b.WriteString("\nThis is what the report claims. Its signature was not checked.\n")
	_, err := io.WriteString(w, b.String())
	return err
}

func (r *Report) vmpl() string {
	if r.VMPL == VMPLHost {
		return "requested by the host, not by the guest"
	}
	return fmt.Sprint(r.VMPL)
}

func (r *Report) signature() string {
	var s string
	switch r.KeyInfo.Signer() {
	case SignerVCEK:
		s = "by the VCEK, the key of this chip; " + r.SignatureAlgo.String()
	case SignerVLEK:
		s = "by the VLEK, a cloud provider's key; " + r.SignatureAlgo.String()
	default:
		s = "NOT SIGNED"
	}
	if r.KeyInfo.MaskChipKey() {
		s += "; the platform masks its chip key"
	}
	return s
}

func (r *Report) authorKey() string {
	s := hexOr(r.AuthorKeyDigest[:], "none")
	if r.KeyInfo.AuthorKey() != (s != "none") {
		s += fmt.Sprintf("; its flag says %t", r.KeyInfo.AuthorKey())
	}
	return s
}

func (r *Report) agent() string {
	for _, b := range r.ReportIDMA {
		if b != 0xff {
			return fmt.Sprintf("%x", r.ReportIDMA)
		}
	}
	return "none"
}

func (r *Report) processor() string {
	if r.Version < Version3 {
		return "not named by a report of version 2"
	}
	return fmt.Sprintf("%s (%s)", r.Product(), r.CPU)
}

// hexOr returns b in hex, or zero if all of it is.
func hexOr(b []byte, zero string) string {
	for _, v := range b {
		if v != 0 {
			return fmt.Sprintf("%x", b)
		}
	}
	return zero
}
