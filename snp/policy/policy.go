// Package policy is what its reader accepts of an attested pod: the right guest, in the right state, on a machine that is
// good enough. It is a value, and a file.
//
//	p, err := policy.Parse(file)      // or policy.Default()
//	p.Measurements = append(p.Measurements, digest)
//	v, err := verify.New(verify.Config{Now: time.Now, Roots: verify.AMD(), Policy: p})
//
// What a file leaves out is as in Default, which is as strict as a genuine pod of today can be. Package verify decides.
package policy

import (
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/internal/strict"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/pod"
)

// Version is the version of the policy that this code reads and writes:
//
//	1  the first
const Version = 1

// Policy is what evidence must say. Default returns the strictest that a genuine pod of today meets; the zero value is not
// valid. The json tags are the names in a policy file; docs/attestation.md has them one by one.
//
// To add a field: here, in Default and validate, and a rule in package verify that uses it. A test there finds fields that
// no decision depends on.
type Policy struct {
	Version int `json:"version" strict:"required"`
	// Reference names the file with the reference values. Reading it is the caller's part: a Verifier without a reference
	// refuses everything under a policy that names one.
	Reference *Reference `json:"reference,omitempty"`
	// Images are what the pod may run: each container's image must be one of them, and each of them must run. Empty: those
	// of the reference, or any.
	Images strict.OneOrMore[Image] `json:"image,omitempty"`
	// Products are the product lines that are accepted. Milan is not named here; see AllowMilan.
	Products []snp.Line `json:"products"`
	// AllowMilan accepts the Milan line, with a warning: its root secrets are published to be extractable by software, and
	// whoever has them can sign what he likes, in the name of any firmware version.
	AllowMilan bool `json:"allowMilan"`
	// ReportVersion bounds the version of the report's format.
	ReportVersion Versions `json:"reportVersion"`
	// VMPL is the privilege level, 0 to 3, that asked for the report. A report that the host asked for is never accepted.
	VMPL uint8 `json:"vmpl"`
	// Signer is whose key signed.
	Signer Signer `json:"signer"`
	// GuestPolicy is about the policy the guest was launched with.
	GuestPolicy GuestPolicy `json:"guestPolicy"`
	// Platform is about the machine.
	Platform Platform `json:"platform"`
	// MinTCB is the lowest acceptable TCB version of each line, part by part. Of a line without one the check is a warning.
	MinTCB map[snp.Line]TCB `json:"minTCB,omitempty"`
	// TCBApplies are the TCB versions that MinTCB is held against; at least one.
	TCBApplies []TCBName `json:"tcbApplies"`
	// MinMitigations are the mitigations that a report of each line must have. A line without them demands none.
	MinMitigations map[snp.Line]Mitigations `json:"mitVectors,omitempty"`
	// AllowProvisional accepts firmware that the host may still roll back: running, but not committed.
	AllowProvisional bool `json:"allowProvisional"`
	// ChipIDs are the chips that are accepted. Empty accepts any, with a warning.
	ChipIDs []ChipID `json:"chipIDs,omitempty"`
	// Measurements are launch digests that are accepted beside that of the reference. Without either, none is.
	Measurements []measure.Digest `json:"measurement,omitempty"`
	// HostData is what HOST_DATA must be; nil: what the reference says, or the pod digest.
	HostData *HostData `json:"hostData,omitempty"`
	// IDKeyDigests are the keys, one of which must have signed the guest's ID block. Empty: that of the reference, or any
	// and none.
	IDKeyDigests []KeyDigest `json:"idKeyDigests,omitempty"`
	// CRL says what becomes of a revocation list that is missing or outdated.
	CRL CRLMode `json:"crl"`
	// MaxEvidenceAge is how long ago stored evidence may have been stored, by its own word. Zero: any time.
	MaxEvidenceAge Duration `json:"maxEvidenceAge,omitzero"`
	// PodConstraints are about what stands in pod.json.
	PodConstraints PodConstraints `json:"podConstraints"`
}

// Reference names a file with reference values (package reference).
type Reference struct {
	File string `json:"file" strict:"required"` // beside the policy file, unless absolute
	// SignedBy is the key that must have signed the bytes of File: the signature, 64 bytes as they are, is in File + ".sig".
	// Nil: none.
	SignedBy *PublicKey `json:"signedBy,omitempty"`
}

// Versions bounds the version of the report's format, both ends included.
type Versions struct {
	Min uint32 `json:"min"`
	Max uint32 `json:"max"`
}

// Rule is what is wanted of something that a report says is on or off.
type Rule string

// The rules. The zero value is none of them and not valid; each field says which it takes.
const (
	Any     Rule = "any"     // on or off
	Require Rule = "require" // on
	Deny    Rule = "deny"    // off
	Allow   Rule = "allow"   // on or off, of something that the guest permits the host
)

// Signer says whose key may have signed.
type Signer string

// The signers. The zero value is none of them and not valid.
const (
	VCEK      Signer = "vcek" // the key of the chip
	VLEK      Signer = "vlek" // the key of a cloud provider
	AnySigner Signer = "any"  // one of the two
)

// Accepts reports whether s takes a report signed by such a key.
func (s Signer) Accepts(k snp.Signer) bool {
	switch k {
	case snp.SignerVCEK:
		return s == VCEK || s == AnySigner
	case snp.SignerVLEK:
		return s == VLEK || s == AnySigner
	}
	return false
}

// String returns the keys by AMD's names.
func (s Signer) String() string {
	if s == AnySigner {
		return "VCEK or VLEK"
	}
	return strings.ToUpper(string(s))
}

// TCBName names one of a report's TCB versions.
type TCBName string

// The TCB versions that a minimum can be held against.
const (
	Reported  TCBName = "reported"  // the one the signing key was derived for
	Committed TCBName = "committed" // the one the firmware refuses to go below
	Launch    TCBName = "launch"    // the one under which the guest was launched
)

// GuestPolicy is what the guest's policy must be. Bits of a policy that are not known here are never accepted.
type GuestPolicy struct {
	Debug            bool `json:"debug"`            // accept guests whose memory the host may read and write, with a warning
	MigrateMA        bool `json:"migrateMA"`        // accept guests with a migration agent, with a warning
	CXL              bool `json:"cxl"`              // accept guests that may have CXL devices, with a warning
	SMT              Rule `json:"smt"`              // Allow or Deny: that the guest's cores are shared
	SingleSocket     Rule `json:"singleSocket"`     // Any or Require
	XTS              Rule `json:"xts"`              // Any or Require: AES-256-XTS
	RAPLDisabled     Rule `json:"raplDisabled"`     // Any or Require
	CiphertextHiding Rule `json:"ciphertextHiding"` // Any or Require
	PageSwapDisabled Rule `json:"pageSwapDisabled"` // Any or Require
	MinABI           ABI  `json:"minABI"`           // the guest must ask for this version of the firmware's ABI, or a newer one
}

// ABI is a version of the firmware's ABI.
type ABI struct {
	Major uint8 `json:"major" strict:"required"`
	Minor uint8 `json:"minor" strict:"required"`
}

// String returns the version as AMD writes it.
func (a ABI) String() string { return fmt.Sprintf("%d.%d", a.Major, a.Minor) }

// Less reports whether a is older than b.
func (a ABI) Less(b ABI) bool {
	return a.Major < b.Major || a.Major == b.Major && a.Minor < b.Minor
}

// Platform is what the machine must be; each field is Any, Require or Deny. Bits that are not known here are a warning.
type Platform struct {
	AliasCheck       Rule `json:"aliasCheck"`
	ECC              Rule `json:"ecc"`
	SMT              Rule `json:"smt"`
	TSME             Rule `json:"tsme"`
	RAPLDisabled     Rule `json:"raplDisabled"`
	CiphertextHiding Rule `json:"ciphertextHiding"`
	TIO              Rule `json:"tio"`
}

// TCB is a lowest TCB version; a part that is left out would accept everything.
type TCB struct {
	FMC        *uint8 `json:"fmc,omitempty"` // Turin, and no other line
	Bootloader uint8  `json:"bl" strict:"required"`
	TEE        uint8  `json:"tee" strict:"required"`
	SNP        uint8  `json:"snp" strict:"required"`
	Microcode  uint8  `json:"ucode" strict:"required"`
}

// Of returns the version as one of a line.
func (t TCB) Of(l snp.Line) snp.TCB {
	out := snp.TCB{Layout: l.Layout(), Bootloader: t.Bootloader, TEE: t.TEE, SNP: t.SNP, Microcode: t.Microcode}
	if t.FMC != nil {
		out.FMC = *t.FMC
	}
	return out
}

// Mitigations are bits of the mitigation vectors that must be set. Reports before version 5 have none set.
type Mitigations struct {
	Launch  Mask `json:"launch" strict:"required"`  // when the guest was launched
	Current Mask `json:"current" strict:"required"` // when the report was made
}

// PodConstraints is what a pod may do. All false is the strictest.
type PodConstraints struct {
	Exec              bool `json:"exec"`              // accept that somebody may run commands in the pod
	HostMounts        bool `json:"hostMounts"`        // accept directories of the host in the pod
	UnverifiedVolumes bool `json:"unverifiedVolumes"` // accept volumes whose content the guest does not verify
	Privileged        bool `json:"privileged"`        // accept containers that act as the machine
}

// Default returns the policy of a file that says nothing. It names no measurement, so that it accepts nothing without a
// reference.
func Default() Policy {
	return Policy{
		Version:       Version,
		Products:      []snp.Line{snp.LineGenoa, snp.LineTurin},
		ReportVersion: Versions{Min: snp.Version3, Max: snp.Version5},
		Signer:        VCEK,
		GuestPolicy: GuestPolicy{
			SMT:              Allow,
			SingleSocket:     Any,
			XTS:              Any,
			RAPLDisabled:     Any,
			CiphertextHiding: Any,
			PageSwapDisabled: Any,
		},
		Platform: Platform{
			AliasCheck:       Require,
			ECC:              Any,
			SMT:              Any,
			TSME:             Any,
			RAPLDisabled:     Any,
			CiphertextHiding: Any,
			TIO:              Any,
		},
		TCBApplies: []TCBName{Reported, Committed, Launch},
		CRL:        CRLSoft,
	}
}

// CRLMode says what becomes of a revocation list that is missing or outdated. One that can be read is always used: a
// revoked certificate and a list of the wrong signer fail in every mode but CRLOff.
type CRLMode uint8

// The modes.
const (
	CRLRequire CRLMode = iota // without a current list nothing passes
	CRLSoft                   // without a current list the check is a warning
	CRLOff                    // no list is looked at
)

// String returns the mode as ParseCRLMode reads it.
func (m CRLMode) String() string {
	switch m {
	case CRLRequire:
		return "require"
	case CRLSoft:
		return "soft"
	case CRLOff:
		return "off"
	}
	return fmt.Sprintf("unknown mode %d", uint8(m))
}

// ParseCRLMode reads require, soft or off.
func ParseCRLMode(s string) (CRLMode, error) {
	for m := CRLRequire; m <= CRLOff; m++ {
		if s == m.String() {
			return m, nil
		}
	}
	return CRLRequire, fmt.Errorf("%.80q, want require, soft or off", s)
}

// MarshalText writes what ParseCRLMode reads.
func (m CRLMode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText is ParseCRLMode.
func (m *CRLMode) UnmarshalText(b []byte) error {
	read, err := ParseCRLMode(string(b))
	if err == nil {
		*m = read
	}
	return err
}

// Image is an image by the digest of its manifest.
type Image struct {
	Ref    string // for people
	Digest pod.Digest
}

// ParseImage reads REF@sha256:HEX. A reference without a digest is an error: a tag may name anything tomorrow.
func ParseImage(s string) (Image, error) {
	ref, digest, ok := strings.Cut(s, "@")
	if !ok || ref == "" {
		return Image{}, fmt.Errorf("%.200q, want an image with the digest of its manifest, NAME@sha256:…", s)
	}
	if len(ref) > maxRef {
		return Image{}, fmt.Errorf("an image's name of %d bytes, more than %d", len(ref), maxRef)
	}
	d, err := pod.ParseDigest(digest)
	return Image{Ref: ref, Digest: d}, err
}

// maxRef bounds the name of an image, in bytes.
const maxRef = 1024

// String returns what ParseImage reads.
func (i Image) String() string { return i.Ref + "@" + i.Digest.String() }

// MarshalText writes what ParseImage reads.
func (i Image) MarshalText() ([]byte, error) { return []byte(i.String()), nil }

// UnmarshalText is ParseImage.
func (i *Image) UnmarshalText(b []byte) error {
	read, err := ParseImage(string(b))
	if err == nil {
		*i = read
	}
	return err
}

// ChipID is a chip as a report names it: 64 bytes, of which Turin fills 8.
type ChipID [64]byte

// String returns 128 hexadecimal digits, or of a chip of Turin 16.
func (c ChipID) String() string {
	if [56]byte(c[8:]) == ([56]byte{}) {
		return hex.EncodeToString(c[:8])
	}
	return hex.EncodeToString(c[:])
}

// MarshalText writes String.
func (c ChipID) MarshalText() ([]byte, error) { return []byte(c.String()), nil }

// UnmarshalText reads 128 hexadecimal digits, or 16 and means zeros behind them.
func (c *ChipID) UnmarshalText(b []byte) error {
	n := snp.LineGenoa.HWIDSize()
	if turin := snp.LineTurin.HWIDSize(); len(b) == hex.EncodedLen(turin) {
		n = turin
	}
	var read ChipID
	if err := strict.Hex(read[:n], b); err != nil {
		return fmt.Errorf("%w, of a Turin 16", err)
	}
	*c = read
	return nil
}

// HostData is HOST_DATA of a report.
type HostData [32]byte

// String returns 64 hexadecimal digits.
func (h HostData) String() string { return hex.EncodeToString(h[:]) }

// MarshalText writes String.
func (h HostData) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads 64 hexadecimal digits.
func (h *HostData) UnmarshalText(b []byte) error { return strict.Hex(h[:], b) }

// KeyDigest is ID_KEY_DIGEST of a report: the SHA-384 of a key as package idblock writes it.
type KeyDigest [48]byte

// String returns 96 hexadecimal digits.
func (k KeyDigest) String() string { return hex.EncodeToString(k[:]) }

// MarshalText writes String.
func (k KeyDigest) MarshalText() ([]byte, error) { return []byte(k.String()), nil }

// UnmarshalText reads 96 hexadecimal digits.
func (k *KeyDigest) UnmarshalText(b []byte) error { return strict.Hex(k[:], b) }

// PublicKey is an Ed25519 key.
type PublicKey [32]byte

const keyPrefix = "ed25519:"

// MarshalText writes ed25519: and 64 hexadecimal digits.
func (k PublicKey) MarshalText() ([]byte, error) {
	return []byte(keyPrefix + hex.EncodeToString(k[:])), nil
}

// UnmarshalText reads what MarshalText writes.
func (k *PublicKey) UnmarshalText(b []byte) error {
	digits, ok := strings.CutPrefix(string(b), keyPrefix)
	if !ok {
		return fmt.Errorf("%.80q, want %s and 64 hexadecimal digits", b, keyPrefix)
	}
	return strict.Hex(k[:], []byte(digits))
}

// Mask is a set of bits. It is written as 16 hexadecimal digits: not all programs read JSON numbers of that size alike.
type Mask uint64

// MarshalText writes the digits.
func (m Mask) MarshalText() ([]byte, error) { return fmt.Appendf(nil, "%016x", uint64(m)), nil }

// UnmarshalText reads the digits.
func (m *Mask) UnmarshalText(b []byte) error {
	var read [8]byte
	if err := strict.Hex(read[:], b); err != nil {
		return err
	}
	*m = 0
	for _, v := range read {
		*m = *m<<8 | Mask(v)
	}
	return nil
}

// Duration is a length of time, written as in 90m or 24h.
type Duration time.Duration

// String returns it as it is written.
func (d Duration) String() string { return time.Duration(d).String() }

// MarshalText writes String.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText reads a length of time as time.ParseDuration does.
func (d *Duration) UnmarshalText(b []byte) error {
	read, err := time.ParseDuration(string(b))
	if err != nil {
		return errors.New("want a length of time such as 90m or 24h")
	}
	*d = Duration(read)
	return nil
}
