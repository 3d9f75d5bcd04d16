package snp

import (
	"fmt"
	"strings"
)

// Policy is what the guest's owner allows the host, fixed at launch. (56860, "Guest policy") Bits that have no name here
// are kept; see Unknown.
type Policy uint64

// Bits of a Policy.
const (
	PolicySMT              Policy = 1 << 16 // may run where SMT is on
	PolicyReserved1        Policy = 1 << 17 // always one
	PolicyMigrateMA        Policy = 1 << 18 // may have a migration agent
	PolicyDebug            Policy = 1 << 19 // the host may read and write its memory
	PolicySingleSocket     Policy = 1 << 20 // only on one socket
	PolicyCXL              Policy = 1 << 21 // may have CXL devices or memory
	PolicyXTS              Policy = 1 << 22 // only with memory encrypted by AES-256-XTS
	PolicyRAPLDisabled     Policy = 1 << 23 // only where power measurement (RAPL) is off
	PolicyCiphertextHiding Policy = 1 << 24 // only where the host cannot read the guest's ciphertext
	PolicyPageSwapDisabled Policy = 1 << 25 // the host may not swap or move its pages
)

type name struct {
	bit  uint64
	name string // as in the specification
	on   string // what a set bit says
}

var policyNames = []name{
	{uint64(PolicySMT), "SMT", "SMT allowed"},
	{uint64(PolicyMigrateMA), "MIGRATE_MA", "migration agent allowed"},
	{uint64(PolicyDebug), "DEBUG", "DEBUG ALLOWED: the host may read and write the guest's memory"},
	{uint64(PolicySingleSocket), "SINGLE_SOCKET", "one socket only"},
	{uint64(PolicyCXL), "CXL_ALLOW", "CXL allowed"},
	{uint64(PolicyXTS), "MEM_AES_256_XTS", "AES-256-XTS required"},
	{uint64(PolicyRAPLDisabled), "RAPL_DIS", "RAPL off required"},
	{uint64(PolicyCiphertextHiding), "CIPHERTEXT_HIDING_DRAM", "ciphertext hiding required"},
	{uint64(PolicyPageSwapDisabled), "PAGE_SWAP_DISABLE", "page swap disabled"},
}

// ABIMinor returns the lowest minor version of the firmware's ABI that the guest wants.
func (p Policy) ABIMinor() uint8 { return uint8(p) }

// ABIMajor returns the major version of the firmware's ABI that the guest wants.
func (p Policy) ABIMajor() uint8 { return uint8(p >> 8) }

// Has reports whether all bits of q are set.
func (p Policy) Has(q Policy) bool { return p&q == q }

// Unknown returns the bits that have no name here. A verifier must refuse them: what they allow is not known.
func (p Policy) Unknown() uint64 {
	return uint64(p) &^ (known(policyNames) | uint64(PolicyReserved1) | 0xffff)
}

// String returns the names of the bits, separated by commas.
func (p Policy) String() string {
	return join(names(uint64(p), policyNames), p.Unknown())
}

func (p Policy) check() string {
	if !p.Has(PolicyReserved1) {
		return "bit 17 is 0, want 1"
	}
	return ""
}

// PlatformInfo is the state of the machine that made the report. (56860, "PLATFORM_INFO") Bits that have no name here
// are kept; see Unknown.
type PlatformInfo uint64

// Bits of a PlatformInfo. Bit 6 is set by real processors of the Turin line and has no name here.
const (
	PlatformSMT              PlatformInfo = 1 << 0 // SMT is on
	PlatformTSME             PlatformInfo = 1 << 1 // transparent memory encryption is on
	PlatformECC              PlatformInfo = 1 << 2 // memory has error correction
	PlatformRAPLDisabled     PlatformInfo = 1 << 3 // power measurement (RAPL) is off
	PlatformCiphertextHiding PlatformInfo = 1 << 4 // ciphertext hiding is on
	PlatformAliasCheck       PlatformInfo = 1 << 5 // memory was checked for aliased addresses since the last reset
	PlatformTIO              PlatformInfo = 1 << 7 // SEV-TIO is on
)

var platformNames = []name{
	{uint64(PlatformSMT), "SMT_EN", "SMT on"},
	{uint64(PlatformTSME), "TSME_EN", "TSME on"},
	{uint64(PlatformECC), "ECC_EN", "ECC memory"},
	{uint64(PlatformRAPLDisabled), "RAPL_DIS", "RAPL off"},
	{uint64(PlatformCiphertextHiding), "CIPHERTEXT_HIDING_DRAM_EN", "ciphertext hiding on"},
	{uint64(PlatformAliasCheck), "ALIAS_CHECK_COMPLETE", "memory aliases checked"},
	{uint64(PlatformTIO), "TIO_EN", "SEV-TIO on"},
}

// Has reports whether all bits of q are set.
func (p PlatformInfo) Has(q PlatformInfo) bool { return p&q == q }

// Unknown returns the bits that have no name here. A verifier should show them; they describe and allow nothing.
func (p PlatformInfo) Unknown() uint64 { return uint64(p) &^ known(platformNames) }

// String returns the names of the bits, separated by commas.
func (p PlatformInfo) String() string {
	return join(names(uint64(p), platformNames), p.Unknown())
}

// Signer is the key that signed a report.
type Signer uint8

// The signers; all other values are reserved.
const (
	SignerVCEK Signer = 0 // the key of one chip at one TCB version
	SignerVLEK Signer = 1 // the key of a cloud provider at one TCB version
	SignerNone Signer = 7 // nobody: the report proves nothing
)

// String returns AMD's name of the key.
func (s Signer) String() string {
	switch s {
	case SignerVCEK:
		return "VCEK"
	case SignerVLEK:
		return "VLEK"
	case SignerNone:
		return "none"
	}
	return fmt.Sprintf("reserved (%d)", uint8(s))
}

// KeyInfo says which keys had a part in a report: bit 0 AUTHOR_KEY_EN, bit 1 MASK_CHIP_KEY, bits 4:2 SIGNING_KEY, all
// others reserved. (56860, ATTESTATION_REPORT offset 0x48)
type KeyInfo uint32

// NewKeyInfo puts a KeyInfo together.
func NewKeyInfo(authorKey, maskChipKey bool, s Signer) KeyInfo {
	k := KeyInfo(s) << 2
	if authorKey {
		k |= 1
	}
	if maskChipKey {
		k |= 2
	}
	return k
}

// AuthorKey reports whether the ID key was signed by an author key.
func (k KeyInfo) AuthorKey() bool { return k&1 != 0 }

// MaskChipKey reports whether the platform keeps its chip key from signing: such a report has no signature.
func (k KeyInfo) MaskChipKey() bool { return k&2 != 0 }

// Signer returns the key that signed the report.
func (k KeyInfo) Signer() Signer { return Signer(k >> 2 & 7) }

func (k KeyInfo) check() string {
	if k>>5 != 0 {
		return fmt.Sprintf("%#x has reserved bits", uint32(k))
	}
	switch k.Signer() {
	case SignerVCEK, SignerVLEK, SignerNone:
		return ""
	}
	return fmt.Sprintf("signing key %d, want 0, 1 or 7", uint8(k.Signer()))
}

func known(table []name) (mask uint64) {
	for _, n := range table {
		mask |= n.bit
	}
	return mask
}

func names(v uint64, table []name) (out []string) {
	for _, n := range table {
		if v&n.bit != 0 {
			out = append(out, n.name)
		}
	}
	return out
}

func words(v uint64, table []name) (out []string) {
	for _, n := range table {
		if v&n.bit != 0 {
			out = append(out, n.on)
		}
	}
	return out
}

func join(parts []string, unknown uint64) string {
	if unknown != 0 {
		parts = append(parts, fmt.Sprintf("unknown bits %#x", unknown))
	}
	if len(parts) == 0 {
		return "nothing"
	}
	return strings.Join(parts, ", ")
}
