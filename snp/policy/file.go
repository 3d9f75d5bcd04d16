package policy

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/internal/strict"
)

// maxList bounds the lists of a policy.
const maxList = 4096

func limits() strict.Limits { return strict.Limits{Bytes: 2 << 20, Depth: 4, Entries: maxList} }

// Parse reads a policy file, JSON of at most 2 MiB. What the file leaves out is as in Default; the version may not be left
// out. Names are exact and unknown ones are errors, as are names that stand twice, null, and digests that are not lower
// case hex of their length. The policy that Parse returns is valid.
func Parse(b []byte) (Policy, error) {
	p := Default()
	p.Version = 0
	if err := strict.Decode(b, limits(), &p); err != nil {
		return Policy{}, fmt.Errorf("policy: %w", err)
	}
	if err := p.Validate(); err != nil {
		return Policy{}, err
	}
	return p, nil
}

// Encode returns the policy file, with the defaults written out, so that Parse returns the same policy under later
// defaults too. Its errors are those of Validate.
func (p Policy) Encode() ([]byte, error) {
	if err := p.Validate(); err != nil {
		return nil, err
	}
	if p.Products == nil {
		p.Products = []snp.Line{}
	}
	b, err := json.MarshalIndent(p, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("policy: %w", err)
	}
	return append(b, '\n'), nil
}

// Validate returns everything that is wrong with the policy itself, joined. A policy without measurements is valid: a
// reference may bring one, and nothing passes without.
func (p Policy) Validate() error {
	err := errors.Join(
		p.validateOrigin(),
		p.GuestPolicy.validate(),
		p.Platform.validate(),
		p.validateTCB(),
		p.validateIdentities(),
	)
	if err == nil {
		return nil
	}
	return fmt.Errorf("policy: %s", strings.ReplaceAll(err.Error(), "\n", "; "))
}

func (p Policy) validateOrigin() error {
	var errs []error
	if p.Version != Version {
		errs = append(errs, strict.Faultf("version", "%d is not known here, want %d", p.Version, Version))
	}
	if p.Reference != nil && p.Reference.File == "" {
		errs = append(errs, strict.Faultf("reference.file", "names no file"))
	}
	if p.Reference != nil && p.Reference.SignedBy != nil && *p.Reference.SignedBy == (PublicKey{}) {
		errs = append(errs, strict.Faultf("reference.signedBy", "all zeros are no key"))
	}
	if len(p.Products) == 0 && !p.AllowMilan {
		errs = append(errs, strict.Faultf("products", "names none"))
	}
	for i, l := range p.Products {
		if l == snp.LineMilan {
			errs = append(errs, strict.Faultf(strict.Entry("products", i), `Milan is accepted by "allowMilan": true, and not from here`))
		} else if l.Layout() == snp.LayoutUnknown {
			errs = append(errs, strict.Faultf(strict.Entry("products", i), "no product line"))
		}
	}
	errs = append(errs, once("products", p.Products))
	if v := p.ReportVersion; v.Min < snp.Version2 || v.Max > snp.Version5 || v.Min > v.Max {
		errs = append(errs, strict.Faultf("reportVersion", "%d to %d, want a range within %d to %d", v.Min, v.Max, snp.Version2, snp.Version5))
	}
	if p.VMPL > 3 {
		errs = append(errs, strict.Faultf("vmpl", "%d, want 0 to 3", p.VMPL))
	}
	switch p.Signer {
	case VCEK, VLEK, AnySigner:
	default:
		errs = append(errs, strict.Faultf("signer", "%.80q, want vcek, vlek or any", string(p.Signer)))
	}
	if p.CRL > CRLOff {
		errs = append(errs, strict.Faultf("crl", "%s", p.CRL))
	}
	if p.MaxEvidenceAge < 0 {
		errs = append(errs, strict.Faultf("maxEvidenceAge", "%s is before now", p.MaxEvidenceAge))
	}
	return errors.Join(errs...)
}

func (g GuestPolicy) validate() error {
	return errors.Join(
		oneOf("guestPolicy.smt", g.SMT, Allow, Deny),
		oneOf("guestPolicy.singleSocket", g.SingleSocket, Any, Require),
		oneOf("guestPolicy.xts", g.XTS, Any, Require),
		oneOf("guestPolicy.raplDisabled", g.RAPLDisabled, Any, Require),
		oneOf("guestPolicy.ciphertextHiding", g.CiphertextHiding, Any, Require),
		oneOf("guestPolicy.pageSwapDisabled", g.PageSwapDisabled, Any, Require),
	)
}

func (p Platform) validate() error {
	return errors.Join(
		oneOf("platform.aliasCheck", p.AliasCheck, Any, Require, Deny),
		oneOf("platform.ecc", p.ECC, Any, Require, Deny),
		oneOf("platform.smt", p.SMT, Any, Require, Deny),
		oneOf("platform.tsme", p.TSME, Any, Require, Deny),
		oneOf("platform.raplDisabled", p.RAPLDisabled, Any, Require, Deny),
		oneOf("platform.ciphertextHiding", p.CiphertextHiding, Any, Require, Deny),
		oneOf("platform.tio", p.TIO, Any, Require, Deny),
	)
}

func (p Policy) validateTCB() error {
	var errs []error
	for _, l := range slices.Sorted(maps.Keys(p.MinTCB)) {
		switch t := p.MinTCB[l]; {
		case l.Layout() == snp.LayoutUnknown:
			errs = append(errs, strict.Faultf("minTCB", "line %d is not known", l))
		case l.Layout() == snp.LayoutTurin && t.FMC == nil:
			errs = append(errs, strict.Faultf("minTCB."+l.String()+".fmc", "missing"))
		case l.Layout() != snp.LayoutTurin && t.FMC != nil:
			errs = append(errs, strict.Faultf("minTCB."+l.String()+".fmc", "only Turin has one"))
		}
	}
	if len(p.TCBApplies) == 0 {
		errs = append(errs, strict.Faultf("tcbApplies", "names none, so minTCB would be held against nothing"))
	}
	for i, t := range p.TCBApplies {
		switch t {
		case Reported, Committed, Launch:
		default:
			errs = append(errs, strict.Faultf(strict.Entry("tcbApplies", i), "%.80q, want reported, committed or launch", string(t)))
		}
	}
	errs = append(errs, once("tcbApplies", p.TCBApplies))
	for _, l := range slices.Sorted(maps.Keys(p.MinMitigations)) {
		if l.Layout() == snp.LayoutUnknown {
			errs = append(errs, strict.Faultf("mitVectors", "line %d is not known", l))
		}
	}
	return errors.Join(errs...)
}

func (p Policy) validateIdentities() error {
	var errs []error
	for i, image := range p.Images {
		if image.Digest == [32]byte{} {
			errs = append(errs, strict.Faultf(strict.Entry("image", i), "all zeros are no digest"))
		}
	}
	if slices.Contains(p.ChipIDs, ChipID{}) {
		errs = append(errs, strict.Faultf("chipIDs", "all zeros name no chip, but every platform that masks its own"))
	}
	if slices.Contains(p.Measurements, [48]byte{}) {
		errs = append(errs, strict.Faultf("measurement", "all zeros are no launch digest"))
	}
	if slices.Contains(p.IDKeyDigests, KeyDigest{}) {
		errs = append(errs, strict.Faultf("idKeyDigests", "all zeros are no key, but what a guest without an ID block has"))
	}
	errs = append(errs, once("image", p.Images), once("chipIDs", p.ChipIDs), once("measurement", p.Measurements), once("idKeyDigests", p.IDKeyDigests))
	return errors.Join(errs...)
}

func oneOf(field string, r Rule, want ...Rule) error {
	if slices.Contains(want, r) {
		return nil
	}
	var names []string
	for _, w := range want {
		names = append(names, string(w))
	}
	last := len(names) - 1
	return strict.Faultf(field, "%.80q, want %s or %s", string(r), strings.Join(names[:last], ", "), names[last])
}

// once wants a list of bearable length that names nothing twice.
func once[T comparable](field string, list []T) error {
	if len(list) > maxList {
		return strict.Faultf(field, "%d entries, more than %d", len(list), maxList)
	}
	seen := map[T]bool{}
	for i, v := range list {
		if seen[v] {
			return strict.Faultf(strict.Entry(field, i), "stands there twice")
		}
		seen[v] = true
	}
	return nil
}
