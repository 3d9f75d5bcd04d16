// Package verify decides whether AMD's hardware made an attestation report: the report's signature, the certificate of
// the key that made it, and the chain from there to a pinned root of AMD's. What the report says (measurement, policy,
// data) is not judged here; nothing in a report means anything before this package has passed it.
//
//	v, err := verify.New(verify.Config{Now: time.Now, Roots: verify.AMD(), Source: source})
//	result := v.Verify(ctx, verify.Evidence{Report: report, VEK: vcek})
//	if err := result.Err(); err != nil { // the first check that did not pass
//
// The package has no state of its own: clock, roots and the way to AMD's key distribution service are handed in.
// Formats are those of AMD's documents 56860 (SEV-SNP firmware ABI) and 57230 (VCEK certificate and KDS interface).
package verify

import (
	"context"
	"crypto/ecdsa"
	"crypto/sha512"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
)

// Config is what a Verifier trusts and how strict it is.
type Config struct {
	// Now is the clock that certificates are held against; it is read once for each Verify. Required.
	Now func() time.Time
	// Roots are the root keys to trust; AMD() are the real ones. Required.
	Roots Roots
	// Source is asked for what Evidence leaves out; nil means that nothing is fetched.
	Source Source
	// CRL says what becomes of a missing or outdated revocation list; the zero value requires one.
	CRL CRLMode
	// AllowVLEK admits reports signed by a cloud provider's key. Such a report names no chip that was checked.
	AllowVLEK bool
}

// Evidence is one report and what goes with it. Everything in it may come from whoever is to be verified: it is
// believed only as far as it leads to a root.
type Evidence struct {
	Report []byte // snp.Size bytes; required
	VEK    []byte // certificate of the signing key, DER; empty: ask Config.Source
	Chain  []byte // ASK (or ASVK) and ARK in this order, PEM; empty: ask Config.Source
	CRL    []byte // revocation list of the ARK, DER; empty: ask Config.Source
}

// Verifier holds evidence against a Config. It may be used by several goroutines at once if its clock and source may.
type Verifier struct {
	config Config
}

// New returns a Verifier. A Config without clock or roots, or with a CRL mode that does not exist, is an error.
func New(c Config) (*Verifier, error) {
	switch {
	case c.Now == nil:
		return nil, errors.New("verify: Config.Now is required")
	case c.Roots == Roots{}:
		return nil, errors.New("verify: Config.Roots is required (AMD() returns AMD's)")
	case c.CRL > CRLOff:
		return nil, fmt.Errorf("verify: Config.CRL: %s", c.CRL)
	}
	return &Verifier{config: c}, nil
}

// Verify runs all checks in their order and stops at the first that does not pass; the ones behind it are listed as
// skipped. It returns no error: whatever goes wrong, also while fetching, is the outcome of a check. It waits only for
// Config.Source, which is handed ctx.
func (v *Verifier) Verify(ctx context.Context, e Evidence) Result {
	s := &session{Config: v.config, Evidence: e, now: v.config.Now()}
	result := Result{crl: v.config.CRL}
	stopped := ""
	for _, step := range steps {
		c := Check{ID: step.id, Status: Skipped, Message: "not reached: " + stopped + " did not pass"}
		if stopped == "" {
			c = step.run(s, ctx)
			c.ID = step.id
			if !c.Status.harmless() {
				stopped = string(step.id)
			}
		}
		result.Checks = append(result.Checks, c)
	}
	result.vlek = s.vek != nil && s.vek.Signer == snp.SignerVLEK
	if result.Passed() {
		result.Report, result.VEK = s.report, s.vek
	}
	return result
}

// session is one Verify under way; each step may rely on what the steps before it have filled in.
type session struct {
	Config
	Evidence
	now time.Time

	report *snp.Report
	vek    *VEK
	chain  *chain
}

// steps are the checks. To add one: a constant in result.go, a row here in its order, and a row in the tests that makes
// only this one fail.
var steps = []struct {
	id  ID
	run func(*session, context.Context) Check
}{
	{CheckReport, (*session).checkReport},
	{CheckSigner, (*session).checkSigner},
	{CheckVEK, (*session).checkVEK},
	{CheckLine, (*session).checkLine},
	{CheckRoot, (*session).checkRoot},
	{CheckChain, (*session).checkChain},
	{CheckValidity, (*session).checkValidity},
	{CheckCRL, (*session).checkCRL},
	{CheckSignature, (*session).checkSignature},
	{CheckTCB, (*session).checkTCB},
	{CheckChip, (*session).checkChip},
}

func (s *session) checkReport(context.Context) Check {
	r, err := snp.Parse(s.Evidence.Report)
	if err != nil {
		return Check{Status: Malformed, Message: err.Error()}
	}
	s.report = r
	return Check{Status: Pass, Actual: fmt.Sprintf("version %d", r.Version)}
}

func (s *session) checkSigner(context.Context) Check {
	want := snp.SignerVCEK.String()
	if s.AllowVLEK {
		want += " or " + snp.SignerVLEK.String()
	}
	signer := s.report.KeyInfo.Signer()
	c := Check{Status: Fail, Expected: want, Actual: signer.String()}
	switch {
	case signer == snp.SignerNone:
		c.Message = "nobody signed this report"
	case s.report.KeyInfo.MaskChipKey():
		c.Message = "the platform masks its chip key, so this report has no signature"
	case signer == snp.SignerVLEK && !s.AllowVLEK:
		c.Message = "a cloud provider's key signed this report, which was not allowed"
	default:
		c.Status = Pass
	}
	return c
}

func (s *session) checkVEK(ctx context.Context) Check {
	der := s.VEK
	if len(der) == 0 {
		o, err := kds.ForReport(s.report)
		if err != nil {
			return Check{Status: Missing, Message: err.Error()}
		}
		if der, err = s.fetch(ctx, o); err != nil {
			return Check{Status: Missing, Message: err.Error()}
		}
	}
	vek, err := ParseVEK(der)
	if err != nil {
		return Check{Status: Malformed, Message: err.Error()}
	}
	c := Check{Status: Pass, Expected: s.report.KeyInfo.Signer().String(), Actual: vek.Signer.String()}
	if vek.Signer != s.report.KeyInfo.Signer() {
		c.Status, c.Message = Fail, "the certificate is of another kind of key than the report says"
		return c
	}
	s.vek = vek
	return c
}

// checkLine holds the processor of the report against the issuer of the certificate. A version 2 report does not name
// its processor; there the layout of its TCB versions must at least be the line's.
func (s *session) checkLine(context.Context) Check {
	c := Check{Status: Fail, Actual: s.vek.Line.String()}
	if s.report.Version < snp.Version3 {
		c.Expected = "a line with the report's layout of TCB versions"
		if s.report.ReportedTCB.Layout == s.vek.Line.Layout() {
			c.Status = Pass
			return c
		}
	} else {
		c.Expected = s.report.Product().Line().String()
		if s.report.Product().Line() == s.vek.Line {
			c.Status = Pass
			return c
		}
	}
	c.Message = "the certificate is for processors of another line"
	return c
}

func (s *session) checkRoot(ctx context.Context) Check {
	pem := s.Chain
	if len(pem) == 0 {
		var err error
		if pem, err = s.fetch(ctx, kds.Chain(s.vek.Line, s.vek.Signer)); err != nil {
			return Check{Status: Missing, Message: err.Error()}
		}
	}
	ch, err := parseChain(pem)
	if err != nil {
		return Check{Status: Malformed, Message: err.Error()}
	}
	pin := s.Roots.pin(s.vek.Line)
	got := fingerprint(ch.ark)
	c := Check{Status: Fail, Expected: fmt.Sprintf("%x", pin), Actual: fmt.Sprintf("%x", got)}
	switch {
	case pin == Fingerprint{}:
		c.Expected = "none"
		c.Message = fmt.Sprintf("no root of %s is trusted", s.vek.Line)
	case pin != got:
		c.Message = fmt.Sprintf("the chain ends in a key that is not the root of %s", s.vek.Line)
	default:
		c.Status = Pass
		s.chain = ch
	}
	return c
}

func (s *session) checkChain(context.Context) Check {
	if err := s.chain.check(s.vek); err != nil {
		return Check{Status: Fail, Message: err.Error()}
	}
	return Check{Status: Pass, Actual: fmt.Sprintf("%s, %s, %s",
		s.vek.Certificate.Subject.CommonName, s.chain.ask.Subject.CommonName, s.chain.ark.Subject.CommonName)}
}

func (s *session) checkValidity(context.Context) Check {
	c := Check{Status: Pass, Actual: s.now.UTC().Format(time.RFC3339)}
	if err := s.chain.checkValidity(s.vek, s.now); err != nil {
		c.Status, c.Message = Fail, err.Error()
	}
	return c
}

// checkSignature verifies over the bytes that came in, never over bytes made from fields. Of an ECDSA signature (R, S)
// there is a twin (R, n-S) that is as good: the bytes of a signature identify no report.
func (s *session) checkSignature(context.Context) Check {
	digest := sha512.Sum384(s.Evidence.Report[:snp.SignedSize])
	if !ecdsa.Verify(s.vek.key, digest[:], scalar(s.report.Signature.R), scalar(s.report.Signature.S)) {
		return Check{Status: Fail, Message: "the signature of the report is not by the key of the certificate"}
	}
	return Check{Status: Pass, Actual: s.report.SignatureAlgo.String()}
}

// scalar turns a little endian number into a big.Int.
func scalar(v [72]byte) *big.Int {
	slices.Reverse(v[:])
	return new(big.Int).SetBytes(v[:])
}

// checkTCB wants the key to be the one of the TCB version that the report names: a key of an older one signs for older
// firmware.
func (s *session) checkTCB(context.Context) Check {
	c := Check{Status: Pass, Expected: s.vek.TCB.String(), Actual: s.report.ReportedTCB.String()}
	if s.vek.TCB.Bytes() != s.report.ReportedTCB.Bytes() {
		c.Status, c.Message = Fail, "the certificate was issued for another TCB version than the report's"
	}
	return c
}

func (s *session) checkChip(context.Context) Check {
	c := Check{Expected: fmt.Sprintf("%x", s.vek.HWID), Actual: fmt.Sprintf("%x", s.report.ChipID)}
	if s.vek.Signer == snp.SignerVLEK {
		c.Expected = ""
		c.Status, c.Message = Skipped, "a VLEK names no chip"
		return c
	}
	var want [64]byte
	copy(want[:], s.vek.HWID)
	if want != s.report.ChipID {
		c.Status, c.Message = Fail, "the certificate was issued for another chip than the report's"
		return c
	}
	c.Status = Pass
	return c
}
