package sim

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
)

// Chip is a processor with one guest on it: its key (of VLEKs: the provider's), the certificate of that key, and what the
// firmware says in reports. A real chip has a key for each TCB version; this one keeps its key.
type Chip struct {
	Authority  *Authority
	Key        *ecdsa.PrivateKey
	VEK        *x509.Certificate // template
	Extensions []pkix.Extension  // AMD's, of the VEK
	Report     snp.Report        // template of what Attest returns
}

// NewChip returns chip number n of the authority's line; the same number is the same chip id. Its key is new. Certificate
// and report fit together: a guest as kcradle starts it, on current firmware, of which nothing is measured yet.
func (a *Authority) NewChip(n uint64) (*Chip, error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("sim: %w", err)
	}
	c := &Chip{Authority: a, Key: key, VEK: a.template("SEV-"+a.Signer.String(), 1)}
	firmware := snp.Firmware{Build: 43, Minor: 55, Major: 1}
	c.Report = snp.Report{
		Version:       snp.Version3,
		Policy:        snp.PolicyReserved1 | snp.PolicySMT,
		SignatureAlgo: snp.AlgoECDSAP384SHA384,
		PlatformInfo:  snp.PlatformSMT | snp.PlatformECC | snp.PlatformAliasCheck,
		KeyInfo:       snp.NewKeyInfo(false, false, a.Signer),
		Current:       firmware,
		Committed:     firmware,
	}
	for i := range c.Report.ReportIDMA {
		c.Report.ReportIDMA[i] = 0xff
	}
	tcb := snp.TCB{Layout: a.Line.Layout(), Bootloader: 10, TEE: 1, SNP: 25, Microcode: 200}
	switch a.Line {
	case snp.LineMilan:
		c.Report.CPU = snp.CPU{Family: 0x19, Model: 0x01, Stepping: 1}
	case snp.LineGenoa:
		c.Report.CPU = snp.CPU{Family: 0x19, Model: 0x11, Stepping: 1}
	case snp.LineTurin:
		c.Report.CPU = snp.CPU{Family: 0x1a, Model: 0x02, Stepping: 1}
		tcb.FMC = 2
	default:
		return nil, errors.New("sim: no product line")
	}
	id := sha512.Sum512(binary.BigEndian.AppendUint64([]byte("sim chip "), n))
	if a.Signer == snp.SignerVCEK {
		copy(c.Report.ChipID[:a.Line.HWIDSize()], id[:])
	}
	copy(c.Report.ReportID[:], id[32:])
	c.SetTCB(tcb)
	return c, nil
}

// SetTCB makes t the chip's TCB version: in the certificate, and in all four places of the report.
func (c *Chip) SetTCB(t snp.TCB) {
	r := &c.Report
	r.CurrentTCB, r.ReportedTCB, r.CommittedTCB, r.LaunchTCB = t, t, t, t
	c.Extensions = Extensions(c.Authority.Line, c.Authority.Signer, t, r.ChipID[:c.Authority.Line.HWIDSize()])
}

// Extensions returns AMD's extensions of the certificate of a key (57230, "VCEK certificate"): version, product, TCB version,
// and the chip's id or, of a VLEK, the cloud provider.
func Extensions(l snp.Line, s snp.Signer, t snp.TCB, hwid []byte) []pkix.Extension {
	ext := func(value []byte, id ...int) pkix.Extension {
		return pkix.Extension{Id: slices.Concat(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, id), Value: value}
	}
	part := func(v uint8) []byte {
		if v > 0x7f {
			return []byte{asn1.TagInteger, 2, 0, v}
		}
		return []byte{asn1.TagInteger, 1, v}
	}
	text := func(s string) []byte { return append([]byte{asn1.TagIA5String, byte(len(s))}, s...) }
	out := []pkix.Extension{
		ext(part(0), 1),
		ext(text(l.String()+"-B0"), 2),
		ext(part(t.Bootloader), 3, 1),
		ext(part(t.TEE), 3, 2),
		ext(part(t.SNP), 3, 3),
		ext(part(0), 3, 5),
		ext(part(0), 3, 6),
		ext(part(0), 3, 7),
		ext(part(t.Microcode), 3, 8),
	}
	if l == snp.LineTurin {
		out = append(out, ext(part(t.FMC), 3, 9))
	} else {
		out = append(out, ext(part(0), 3, 4))
	}
	if s == snp.SignerVLEK {
		return append(out, ext(text("simulated-cloud"), 5))
	}
	return append(out, ext(bytes.Clone(hwid), 4))
}

// VEKDER returns the certificate of the chip's key.
func (c *Chip) VEKDER() ([]byte, error) {
	vek := *c.VEK
	vek.ExtraExtensions = c.Extensions
	return certify(&vek, c.Authority.ASK, c.Key.Public(), c.Authority.Keys.ASK)
}

// Attest returns a report with the guest's data and VMPL, signed. It is what a guest gets from the firmware.
func (c *Chip) Attest(data [64]byte, vmpl uint32) ([]byte, error) {
	r := c.Report
	r.ReportData, r.VMPL = data, vmpl
	return c.Sign(r)
}

// Sign returns the bytes of any report that has some, signed by the chip's key.
func (c *Chip) Sign(r snp.Report) ([]byte, error) {
	r.Signature = snp.Signature{}
	b, err := r.Bytes()
	if err != nil {
		return nil, fmt.Errorf("sim: %w", err)
	}
	digest := sha512.Sum384(b[:snp.SignedSize])
	x, y, err := ecdsa.Sign(rand.Reader, c.Key, digest[:])
	if err != nil {
		return nil, fmt.Errorf("sim: sign report: %w", err)
	}
	r.Signature = snp.Signature{R: Scalar(x), S: Scalar(y)}
	if b, err = r.Bytes(); err != nil {
		return nil, fmt.Errorf("sim: %w", err)
	}
	return b, nil
}

// Scalar returns a number below 2^576 as it stands in a report's signature.
func Scalar(n *big.Int) (b [72]byte) {
	n.FillBytes(b[:])
	slices.Reverse(b[:])
	return b
}

// Object returns under which name the key distribution service publishes the chip's certificate.
func (c *Chip) Object() kds.Object {
	return kds.VCEK(c.Authority.Line, c.Report.ChipID, c.Report.ReportedTCB)
}
