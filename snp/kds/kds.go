// Package kds names what AMD's key distribution service publishes, and where: the certificates of chips, the chains above
// them, and revocation lists.
//
//	o, err := kds.ForReport(report) // the certificate of the key that signed it
//	fmt.Println(o.URL())
//	fmt.Println(kds.Chain(o.Line, o.Signer).URL())
//
// It fetches nothing. Addresses are those of AMD's document 57230 (VCEK certificate and KDS interface specification).
package kds

import (
	"errors"
	"fmt"
	"strings"

	"github.com/kcradle/kcradle/snp"
)

// Service is where AMD's own service is.
const Service = "https://kdsintf.amd.com"

// Bounds of what the service publishes, in bytes. Real certificates have about 1350, chains 4900, lists 900.
const (
	MaxVEK   = 16 << 10
	MaxChain = 64 << 10
	MaxCRL   = 1 << 20
)

// Kind is what an Object is.
type Kind uint8

// The kinds. The zero Kind is none.
const (
	KindVCEK  Kind = iota + 1 // the certificate of a chip's key at a TCB version, DER
	KindChain                 // ASK (of VLEKs: ASVK) and ARK of a line, PEM
	KindCRL                   // the revocation list of a line's ARK, DER
)

// String returns the kind in a word.
func (k Kind) String() string {
	switch k {
	case KindVCEK:
		return "vcek"
	case KindChain:
		return "chain"
	case KindCRL:
		return "crl"
	}
	return fmt.Sprintf("unknown kind %d", uint8(k))
}

// Object is one thing that the service publishes. Objects can be compared with ==.
type Object struct {
	Kind   Kind
	Line   snp.Line
	Signer snp.Signer // the kind of keys below a chain, or whose issuers a list is about
	ChipID [64]byte   // KindVCEK only, as in a report: HWIDSize bytes of the line, then zeros
	TCB    snp.TCB    // KindVCEK only
}

// VCEK is the certificate of a chip's key at a TCB version. AMD signs it when it is asked for, and answers only a few such
// questions a minute.
func VCEK(l snp.Line, chipID [64]byte, t snp.TCB) Object {
	return Object{Kind: KindVCEK, Line: l, Signer: snp.SignerVCEK, ChipID: chipID, TCB: t}
}

// Chain is the two certificates above the keys of a line.
func Chain(l snp.Line, s snp.Signer) Object { return Object{Kind: KindChain, Line: l, Signer: s} }

// CRL is the revocation list of a line.
func CRL(l snp.Line, s snp.Signer) Object { return Object{Kind: KindCRL, Line: l, Signer: s} }

// ForReport is the certificate of the key that signed a report. Its errors say why AMD cannot be asked for it.
func ForReport(r *snp.Report) (Object, error) {
	if r.KeyInfo.Signer() != snp.SignerVCEK {
		return Object{}, errors.New("the certificate of a VLEK is not published: it has to come with the report")
	}
	l := r.Product().Line()
	if l == snp.LineUnknown {
		return Object{}, errors.New("a report of version 2 does not name its processor: the certificate has to come with it")
	}
	if r.ChipID == ([64]byte{}) {
		return Object{}, errors.New("the platform masks its chip id: the certificate has to come with the report")
	}
	o := VCEK(l, r.ChipID, r.ReportedTCB)
	return o, o.Validate()
}

// Validate says what is contradictory.
func (o Object) Validate() error {
	if o.Line.HWIDSize() == 0 {
		return errors.New("no product line")
	}
	switch o.Kind {
	case KindVCEK:
		if o.Signer != snp.SignerVCEK {
			return fmt.Errorf("a VCEK of kind %s", o.Signer)
		}
		if o.ChipID == ([64]byte{}) {
			return errors.New("no chip")
		}
		for _, b := range o.ChipID[o.Line.HWIDSize():] {
			if b != 0 {
				return fmt.Errorf("a chip of %s has an id of %d bytes", o.Line, o.Line.HWIDSize())
			}
		}
		if o.TCB.Layout != o.Line.Layout() {
			return fmt.Errorf("a TCB version that is not of %s", o.Line)
		}
	case KindChain, KindCRL:
		if o.Signer != snp.SignerVCEK && o.Signer != snp.SignerVLEK {
			return fmt.Errorf("%s of kind %s", o.Kind, o.Signer)
		}
		if o.ChipID != ([64]byte{}) || o.TCB != (snp.TCB{}) {
			return fmt.Errorf("%s of one chip", o.Kind)
		}
	default:
		return errors.New(o.Kind.String())
	}
	return nil
}

// HWID is the bytes of ChipID that name the chip.
func (o Object) HWID() []byte { return o.ChipID[:o.Line.HWIDSize()] }

// MaxSize bounds the object, in bytes.
func (o Object) MaxSize() int {
	switch o.Kind {
	case KindVCEK:
		return MaxVEK
	case KindChain:
		return MaxChain
	case KindCRL:
		return MaxCRL
	}
	return 0
}

// URL returns where AMD publishes the object.
func (o Object) URL() string { return Service + o.Path() }

// Path returns what follows the name of the service, from the slash on.
func (o Object) Path() string {
	base := fmt.Sprintf("/%s/v1/%s/", strings.ToLower(o.Signer.String()), o.Line)
	switch o.Kind {
	case KindChain:
		return base + "cert_chain"
	case KindCRL:
		return base + "crl"
	}
	fmc := ""
	if o.TCB.Layout == snp.LayoutTurin {
		fmc = fmt.Sprintf("fmcSPL=%02d&", o.TCB.FMC)
	}
	return fmt.Sprintf("%s%x?%sblSPL=%02d&teeSPL=%02d&snpSPL=%02d&ucodeSPL=%02d",
		base, o.HWID(), fmc, o.TCB.Bootloader, o.TCB.TEE, o.TCB.SNP, o.TCB.Microcode)
}

// String returns the object in words.
func (o Object) String() string {
	switch o.Kind {
	case KindVCEK:
		return fmt.Sprintf("VCEK of %s chip %.8x… at %s", o.Line, o.HWID(), o.TCB)
	case KindChain:
		return fmt.Sprintf("chain of %s for %ss", o.Line, o.Signer)
	case KindCRL:
		return fmt.Sprintf("revocation list of %s for %ss", o.Line, o.Signer)
	}
	return o.Kind.String()
}
