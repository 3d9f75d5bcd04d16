// Package snp reads the attestation reports of AMD SEV-SNP: bytes to fields and back, and fields to words. It knows no
// key and no certificate: what a parsed report says is a claim until package verify has checked who signed it.
//
//	r, err := snp.Parse(b) // every byte is accounted for, or err names the field and its offset
//	r.Explain(os.Stdout)
//
// Names and offsets are those of ATTESTATION_REPORT in AMD's SEV-SNP firmware ABI specification, document 56860.
package snp

import (
	"encoding/binary"
	"fmt"
)

// Sizes of a report in bytes.
const (
	Size          = 0x4a0 // the whole report
	SignedSize    = 0x2a0 // what the signature covers, from the first byte on
	SignatureSize = Size - SignedSize
)

// Versions of the report's format that Parse knows. Each shows more of the bytes that were reserved before:
//
//	2  the first in the field
//	3  family, model and stepping of the processor
//	5  the mitigation vectors
//
// Version 4 is refused, as any other: what lies in its reserved bytes is not known here.
const (
	Version2 = 2
	Version3 = 3
	Version5 = 5
)

// VMPLHost is the VMPL of a report that the host asked for and not the guest (SNP_HV_REPORT_REQ); such a report
// carries no data of the guest's choice.
const VMPLHost = 0xffffffff

// SignatureAlgo is how a report is signed.
type SignatureAlgo uint32

// AlgoECDSAP384SHA384 is the only algorithm there is; AlgoNone is legal only in a report that nobody signed.
const (
	AlgoNone            SignatureAlgo = 0
	AlgoECDSAP384SHA384 SignatureAlgo = 1
)

// String returns the algorithm in words.
func (a SignatureAlgo) String() string {
	switch a {
	case AlgoNone:
		return "none"
	case AlgoECDSAP384SHA384:
		return "ECDSA P-384 with SHA-384"
	}
	return fmt.Sprintf("unknown (%d)", uint32(a))
}

// Report is one attestation report. The zero value is not valid; Parse makes valid ones. It mirrors ATTESTATION_REPORT
// (56860, chapter "Attestation"); the comments give the offset in the report.
type Report struct {
	Version         uint32        // 0x000
	GuestSVN        uint32        // 0x004: the guest's security version, from its ID block
	Policy          Policy        // 0x008
	FamilyID        [16]byte      // 0x010: from the ID block
	ImageID         [16]byte      // 0x020: from the ID block
	VMPL            uint32        // 0x030: who in the guest asked, 0 to 3, or VMPLHost
	SignatureAlgo   SignatureAlgo // 0x034
	CurrentTCB      TCB           // 0x038
	PlatformInfo    PlatformInfo  // 0x040
	KeyInfo         KeyInfo       // 0x048
	ReportData      [64]byte      // 0x050: chosen by the guest
	Measurement     [48]byte      // 0x090: the launch digest
	HostData        [32]byte      // 0x0c0: chosen by the host at launch
	IDKeyDigest     [48]byte      // 0x0e0: SHA-384 of the key that signed the ID block, zero without one
	AuthorKeyDigest [48]byte      // 0x110: SHA-384 of the key that signed the ID key, zero without one
	ReportID        [32]byte      // 0x140: of this guest, for its life
	ReportIDMA      [32]byte      // 0x160: of its migration agent, all ff without one
	ReportedTCB     TCB           // 0x180: the one the signing key was derived for
	CPU             CPU           // 0x188: zero before version 3
	ChipID          [64]byte      // 0x1a0: zero if the platform masks it; on Turin 8 bytes, then zeros
	CommittedTCB    TCB           // 0x1e0: the firmware refuses to go below it
	Current         Firmware      // 0x1e8
	Committed       Firmware      // 0x1ec
	LaunchTCB       TCB           // 0x1f0: the current one when the guest was launched
	LaunchMit       uint64        // 0x1f8: mitigations when the guest was launched, zero before version 5
	CurrentMit      uint64        // 0x200: mitigations now, zero before version 5
	Signature       Signature     // 0x2a0
}

// Firmware is the version of the SEV firmware, in the order of its bytes in a report.
type Firmware struct {
	Build, Minor, Major uint8
}

// String returns the version as AMD writes it.
func (f Firmware) String() string { return fmt.Sprintf("%d.%d build %d", f.Major, f.Minor, f.Build) }

// Signature is R and S of an ECDSA signature as they stand in a report: little endian, 72 bytes each, of which a P-384
// number fills the first 48 and Parse has checked that the rest is zero. (56860, "ECDSA P-384 with SHA-384 signature")
type Signature struct {
	R, S [72]byte
}

// scalarSize is the length of a number modulo the order of P-384, in bytes.
const scalarSize = 48

// FieldError says what is wrong with a report, and where.
type FieldError struct {
	Field  string // as 56860 calls it
	Offset int    // of the field's first byte in the report
	Reason string
}

// Error returns the field, its offset and the reason.
func (e *FieldError) Error() string {
	return fmt.Sprintf("snp report: %s at offset %#x: %s", e.Field, e.Offset, e.Reason)
}

func fault(field string, offset int, format string, args ...any) error {
	return &FieldError{Field: field, Offset: offset, Reason: fmt.Sprintf(format, args...)}
}

// Parse reads a report. It wants exactly Size bytes, a version it knows, zeros wherever that version reserves bytes,
// and values that the specification allows; unknown bits of Policy and PlatformInfo are kept, see their Unknown. Every
// error is a *FieldError. Parse checks no signature.
func Parse(b []byte) (*Report, error) {
	if len(b) != Size {
		return nil, fault("report", 0, "%d bytes, want %d", len(b), Size)
	}
	r := &Report{Version: binary.LittleEndian.Uint32(b)}
	switch r.Version {
	case Version2, Version3, Version5:
	default:
		return nil, fault("VERSION", 0, "%d is not known here, want 2, 3 or 5", r.Version)
	}
	c := &codec{b: b}
	r.walk(c)
	if c.err != nil {
		return nil, c.err
	}
	return r, nil
}

// Bytes returns the report's Size bytes; of a report made by Parse, the very bytes it was made from. An error means
// that the fields of a report built by hand are not valid; it is the one that Parse would have returned.
func (r *Report) Bytes() ([]byte, error) {
	c := &codec{b: make([]byte, Size), write: true}
	w := *r
	w.walk(c)
	if c.err != nil {
		return nil, c.err
	}
	if _, err := Parse(c.b); err != nil {
		return nil, err
	}
	return c.b, nil
}

// walk takes a codec over all fields in the order of their bytes, for both directions. To add a field of a new version:
// one line here, one field in Report, one line in Lines, and the reserved range around it shrinks.
func (r *Report) walk(c *codec) {
	c.u32(0x000, &r.Version)
	c.u32(0x004, &r.GuestSVN)
	c.u64(0x008, (*uint64)(&r.Policy))
	c.check(0x008, "POLICY", r.Policy.check())
	c.bytes(0x010, r.FamilyID[:])
	c.bytes(0x020, r.ImageID[:])
	c.u32(0x030, &r.VMPL)
	if r.VMPL > 3 && r.VMPL != VMPLHost {
		c.check(0x030, "VMPL", fmt.Sprintf("%d, want 0 to 3, or %#x for the host", r.VMPL, uint32(VMPLHost)))
	}
	c.u32(0x034, (*uint32)(&r.SignatureAlgo))
	current := c.raw(0x038, &r.CurrentTCB)
	c.u64(0x040, (*uint64)(&r.PlatformInfo))
	c.u32(0x048, (*uint32)(&r.KeyInfo))
	c.check(0x048, "KEY_INFO", r.KeyInfo.check())
	if r.SignatureAlgo != AlgoECDSAP384SHA384 && (r.SignatureAlgo != AlgoNone || r.KeyInfo.Signer() != SignerNone) {
		c.check(0x034, "SIGNATURE_ALGO", fmt.Sprintf("%d, want %d", uint32(r.SignatureAlgo), uint32(AlgoECDSAP384SHA384)))
	}
	c.reserved(0x04c, 0x050)
	c.bytes(0x050, r.ReportData[:])
	c.bytes(0x090, r.Measurement[:])
	c.bytes(0x0c0, r.HostData[:])
	c.bytes(0x0e0, r.IDKeyDigest[:])
	c.bytes(0x110, r.AuthorKeyDigest[:])
	c.bytes(0x140, r.ReportID[:])
	c.bytes(0x160, r.ReportIDMA[:])
	reported := c.raw(0x180, &r.ReportedTCB)
	if r.Version >= Version3 {
		c.u8(0x188, &r.CPU.Family)
		c.u8(0x189, &r.CPU.Model)
		c.u8(0x18a, &r.CPU.Stepping)
		if r.CPU.Product() == ProductUnknown {
			c.check(0x188, "CPUID_FAM_ID", fmt.Sprintf("%s is no processor that is known here", r.CPU))
		}
		c.reserved(0x18b, 0x1a0)
	} else {
		c.reserved(0x188, 0x1a0)
	}
	c.bytes(0x1a0, r.ChipID[:])
	committed := c.raw(0x1e0, &r.CommittedTCB)
	c.firmware(0x1e8, &r.Current)
	c.firmware(0x1ec, &r.Committed)
	launch := c.raw(0x1f0, &r.LaunchTCB)
	if r.Version >= Version5 {
		c.u64(0x1f8, &r.LaunchMit)
		c.u64(0x200, &r.CurrentMit)
		c.reserved(0x208, SignedSize)
	} else {
		c.reserved(0x1f8, SignedSize)
	}
	c.scalar(0x2a0, "SIGNATURE.R", &r.Signature.R)
	c.scalar(0x2e8, "SIGNATURE.S", &r.Signature.S)
	c.reserved(0x330, Size)
	if c.write || c.err != nil {
		return
	}
	// Only now is known which layout the TCB versions have.
	layout := r.layout(current, reported, committed, launch)
	c.tcb(0x038, "CURRENT_TCB", layout, current, &r.CurrentTCB)
	c.tcb(0x180, "REPORTED_TCB", layout, reported, &r.ReportedTCB)
	c.tcb(0x1e0, "COMMITTED_TCB", layout, committed, &r.CommittedTCB)
	c.tcb(0x1f0, "LAUNCH_TCB", layout, launch, &r.LaunchTCB)
}

// codec reads the fields of a report from b, or writes them to it. The first error stays; next is where the next field
// has to begin, so that walk can leave no byte out.
type codec struct {
	b     []byte
	write bool
	next  int
	err   error
}

// take returns the n bytes of the field at offset.
func (c *codec) take(offset, n int) []byte {
	if offset != c.next {
		panic(fmt.Sprintf("snp: internal error: field at %#x, want %#x", offset, c.next))
	}
	c.next += n
	return c.b[offset : offset+n]
}

// check notes what is wrong with the field at offset, if anything is.
func (c *codec) check(offset int, field, reason string) {
	if c.err == nil && reason != "" {
		c.err = fault(field, offset, "%s", reason)
	}
}

func (c *codec) bytes(offset int, field []byte) {
	b := c.take(offset, len(field))
	if c.write {
		copy(b, field)
	} else {
		copy(field, b)
	}
}

func (c *codec) u8(offset int, v *uint8) {
	b := c.take(offset, 1)
	if c.write {
		b[0] = *v
	} else {
		*v = b[0]
	}
}

func (c *codec) u32(offset int, v *uint32) {
	b := c.take(offset, 4)
	if c.write {
		binary.LittleEndian.PutUint32(b, *v)
	} else {
		*v = binary.LittleEndian.Uint32(b)
	}
}

func (c *codec) u64(offset int, v *uint64) {
	b := c.take(offset, 8)
	if c.write {
		binary.LittleEndian.PutUint64(b, *v)
	} else {
		*v = binary.LittleEndian.Uint64(b)
	}
}

func (c *codec) firmware(offset int, f *Firmware) {
	c.u8(offset, &f.Build)
	c.u8(offset+1, &f.Minor)
	c.u8(offset+2, &f.Major)
	c.reserved(offset+3, offset+4)
}

// reserved wants zeros from offset up to end.
func (c *codec) reserved(offset, end int) {
	c.zero(offset, "reserved", c.take(offset, end-offset))
}

func (c *codec) zero(offset int, field string, b []byte) {
	for i, v := range b {
		if v != 0 {
			c.check(offset+i, field, fmt.Sprintf("%#02x, want 0", v))
			return
		}
	}
}

// scalar is R or S: the number, then padding.
func (c *codec) scalar(offset int, field string, v *[72]byte) {
	c.bytes(offset, v[:])
	c.zero(offset+scalarSize, field, v[scalarSize:])
}

// raw takes the bytes of a TCB version; its layout is known only behind the chip's identity.
func (c *codec) raw(offset int, v *TCB) (b [8]byte) {
	field := c.take(offset, 8)
	if c.write {
		b = v.Bytes()
		copy(field, b[:])
	} else {
		copy(b[:], field)
	}
	return b
}

func (c *codec) tcb(offset int, field string, layout Layout, b [8]byte, v *TCB) {
	t, err := ParseTCB(layout, b)
	if err != nil {
		c.check(offset, field, err.Error())
		return
	}
	*v = t
}
