// Package verify decides whether a pod is the one its owner asked for, on hardware that its owner accepts: the report's
// signature, the certificates from there to a pinned root of AMD's, and then what the report says, held against a policy, a
// reference and the verifier's own nonce.
//
//	v, err := verify.New(verify.Config{Now: time.Now, Roots: verify.AMD(), Source: source, Policy: policy.Default()})
//	result := v.Verify(ctx, evidence, verify.Expectation{
//		Reference: reference, Nonce: nonce, Key: peerKey, Exporter: exporter,
//	})
//	if err := result.Err(); err != nil { // every check that did not pass
//
// The whole decision is the Result: which checks there are, in which order, what was expected and what was found. There is
// no way to ask for the signature alone: a genuine report of another guest means nothing.
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
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/reference"
)

// Config is what a Verifier trusts and how strict it is.
type Config struct {
	// Now is the clock that certificates are held against; it is read once for each Verify. Required.
	Now func() time.Time
	// Roots are the root keys to trust; AMD() are the real ones. Required.
	Roots Roots
	// Source is asked for what Evidence leaves out; nil means that nothing is fetched.
	Source Source
	// Policy is what is accepted; policy.Default() is the strictest. Required.
	Policy policy.Policy
}

// Evidence is one report and what goes with it. Everything in it may come from whoever is to be verified: it is believed
// only as far as it leads to a root.
type Evidence struct {
	Report []byte // snp.Size bytes; required
	VEK    []byte // certificate of the signing key, DER; empty: ask Config.Source
	Chain  []byte // ASK (or ASVK) and ARK in this order, PEM; empty: ask Config.Source
	CRL    []byte // revocation list of the ARK, DER; Config.Source is asked, too, since this one may be an old one
	Pod    []byte // pod.json; required unless Expectation.ReportData is there
}

// Expectation is what only the verifier of this one report can know. Nothing in it may come from the pod or its host.
type Expectation struct {
	// Reference is what the report must say. Nil: the policy has measurements of its own.
	Reference *reference.Reference
	// Firmware are images that the verifier has read himself. The reference's own among them makes its seed certain; others
	// serve to explain a launch digest.
	Firmware []measure.Firmware

	// Nonce, Key and Exporter are of the connection to the pod, see snp.Binding. All are required unless ReportData is
	// there.
	Nonce    [32]byte
	Key      []byte
	Exporter [32]byte
	// Stored says that the evidence was kept since StoredAt (zero: not known), so that Key and Exporter are those of a
	// connection which is gone.
	Stored   bool
	StoredAt time.Time

	// ReportData is what REPORT_DATA must be, of a report that is not a pod's.
	ReportData *[64]byte
}

// Verifier holds evidence against a Config. It may be used by several goroutines at once if its clock and source may.
type Verifier struct {
	config Config
}

// New returns a Verifier. A Config without clock, roots or a valid policy is an error.
func New(c Config) (*Verifier, error) {
	switch {
	case c.Now == nil:
		return nil, errors.New("verify: Config.Now is required")
	case c.Roots == Roots{}:
		return nil, errors.New("verify: Config.Roots is required (AMD() returns AMD's)")
	}
	if err := c.Policy.Validate(); err != nil {
		return nil, fmt.Errorf("verify: Config.Policy: %w (policy.Default() returns a valid one)", err)
	}
	return &Verifier{config: c}, nil
}

// Verify makes all checks in their order. It stops at the first of those up to CheckChip that does not pass, since then
// nothing in the report means anything; all others are made whatever fails. It returns no error: whatever goes wrong, also
// while fetching, is the outcome of a check. It waits only for Config.Source, which is handed ctx.
func (v *Verifier) Verify(ctx context.Context, e Evidence, x Expectation) Result {
	s := &session{Config: v.config, Evidence: e, Expectation: x, now: v.config.Now()}
	var result Result
	stopped := ID("")
	for _, w := range rows {
		c := Check{Status: Skipped, Message: notReached(stopped)}
		if stopped == "" {
			c = w.run(s, ctx)
			if w.stops && !c.Status.harmless() {
				stopped = w.id
			}
		}
		c.ID = w.id
		result.Checks = append(result.Checks, c)
	}
	if result.Passed() {
		result.Report, result.VEK = s.report, s.vek
		if s.pod != nil {
			result.Pod, result.PodDigest = s.pod, pod.DigestOf(s.Evidence.Pod)
		}
	}
	return result
}

// session is one Verify under way; each check may rely on what the checks before it have filled in.
type session struct {
	Config
	Evidence
	Expectation
	now time.Time

	report *snp.Report
	vek    *VEK
	chain  *chain
	pod    *pod.Pod // that was attested; nil: none
}

// row is a check.
type row struct {
	id    ID
	run   func(*session, context.Context) Check
	stops bool     // without it the following mean nothing
	may   []Status // what is tolerated beside a pass, if the policy leaves it open
}

// rows are the checks. To add one: a constant in result.go, a row here in its order, and a row in the tests that makes only
// this one fail.
var rows = []row{
	{CheckPolicy, (*session).checkPolicy, true, nil},
	{CheckReference, (*session).checkReference, true, []Status{Warn, Open}},
	{CheckEvidence, (*session).checkEvidence, true, nil},

	{CheckReport, (*session).checkReport, true, nil},
	{CheckSigner, (*session).checkSigner, true, nil},
	{CheckVEK, (*session).checkVEK, true, nil},
	{CheckLine, (*session).checkLine, true, nil},
	{CheckRoot, (*session).checkRoot, true, nil},
	{CheckChain, (*session).checkChain, true, nil},
	{CheckValidity, (*session).checkValidity, true, nil},
	{CheckCRL, (*session).checkCRL, true, []Status{Warn, Open}},
	{CheckSignature, (*session).checkSignature, true, nil},
	{CheckTCB, (*session).checkTCB, true, nil},
	{CheckChip, (*session).checkChip, true, []Status{Open}},

	{CheckReportData, (*session).checkReportData, false, nil},
	{CheckFreshness, (*session).checkFreshness, false, []Status{Warn}},
	{CheckPod, (*session).checkPod, false, []Status{Open}},
	{CheckMeasurement, (*session).checkMeasurement, false, nil},
	{CheckHostData, (*session).checkHostData, false, []Status{Open}},
	{CheckIDKey, (*session).checkIDKey, false, []Status{Open}},

	{CheckVersion, (*session).checkVersion, false, nil},
	{CheckProduct, (*session).checkProduct, false, []Status{Warn}},
	{CheckVMPL, (*session).checkVMPL, false, nil},
	{CheckDebug, permission(snp.PolicyDebug, "the host may read and write the guest's memory", func(g policy.GuestPolicy) bool { return g.Debug }), false, []Status{Warn}},
	{CheckMigration, permission(snp.PolicyMigrateMA, "a migration agent may move the guest and its secrets elsewhere", func(g policy.GuestPolicy) bool { return g.MigrateMA }), false, []Status{Warn}},
	{CheckCXL, permission(snp.PolicyCXL, "the guest may be given CXL devices or memory", func(g policy.GuestPolicy) bool { return g.CXL }), false, []Status{Warn}},
	{CheckSMT, (*session).checkSMT, false, nil},
	{CheckSingleSocket, restriction(snp.PolicySingleSocket, "the guest does not insist on a single socket", func(g policy.GuestPolicy) policy.Rule { return g.SingleSocket }), false, nil},
	{CheckXTS, restriction(snp.PolicyXTS, "the guest does not insist on memory encrypted by AES-256-XTS", func(g policy.GuestPolicy) policy.Rule { return g.XTS }), false, nil},
	{CheckRAPL, restriction(snp.PolicyRAPLDisabled, "the guest does not insist on power measurement (RAPL) being off", func(g policy.GuestPolicy) policy.Rule { return g.RAPLDisabled }), false, nil},
	{CheckCiphertextHiding, restriction(snp.PolicyCiphertextHiding, "the guest does not insist on its ciphertext being hidden from the host", func(g policy.GuestPolicy) policy.Rule { return g.CiphertextHiding }), false, nil},
	{CheckPageSwap, restriction(snp.PolicyPageSwapDisabled, "the guest lets the host swap and move its pages", func(g policy.GuestPolicy) policy.Rule { return g.PageSwapDisabled }), false, nil},
	{CheckABI, (*session).checkABI, false, nil},
	{CheckUnknownPolicy, (*session).checkUnknownPolicy, false, nil},
	{CheckPlatformAlias, platform(snp.PlatformAliasCheck, "the check of the memory for aliased addresses", func(p policy.Platform) policy.Rule { return p.AliasCheck }), false, nil},
	{CheckPlatformECC, platform(snp.PlatformECC, "error correction of the memory", func(p policy.Platform) policy.Rule { return p.ECC }), false, nil},
	{CheckPlatformSMT, platform(snp.PlatformSMT, "SMT", func(p policy.Platform) policy.Rule { return p.SMT }), false, nil},
	{CheckPlatformTSME, platform(snp.PlatformTSME, "transparent memory encryption (TSME)", func(p policy.Platform) policy.Rule { return p.TSME }), false, nil},
	{CheckPlatformRAPL, platform(snp.PlatformRAPLDisabled, "the lock on power measurement (RAPL)", func(p policy.Platform) policy.Rule { return p.RAPLDisabled }), false, nil},
	{CheckPlatformCiphertextHiding, platform(snp.PlatformCiphertextHiding, "ciphertext hiding", func(p policy.Platform) policy.Rule { return p.CiphertextHiding }), false, nil},
	{CheckPlatformTIO, platform(snp.PlatformTIO, "SEV-TIO", func(p policy.Platform) policy.Rule { return p.TIO }), false, nil},
	{CheckUnknownPlatform, (*session).checkUnknownPlatform, false, []Status{Warn}},
	{CheckTCBReported, minimum(policy.Reported, func(r *snp.Report) snp.TCB { return r.ReportedTCB }), false, []Status{Warn, Open}},
	{CheckTCBCommitted, minimum(policy.Committed, func(r *snp.Report) snp.TCB { return r.CommittedTCB }), false, []Status{Warn, Open}},
	{CheckTCBLaunch, minimum(policy.Launch, func(r *snp.Report) snp.TCB { return r.LaunchTCB }), false, []Status{Warn, Open}},
	{CheckMitigationsLaunch, mitigations(func(r *snp.Report, m policy.Mitigations) (uint64, policy.Mask) { return r.LaunchMit, m.Launch }), false, []Status{Open}},
	{CheckMitigationsCurrent, mitigations(func(r *snp.Report, m policy.Mitigations) (uint64, policy.Mask) { return r.CurrentMit, m.Current }), false, []Status{Open}},
	{CheckProvisional, (*session).checkProvisional, false, nil},
	{CheckChipID, (*session).checkChipID, false, []Status{Warn}},

	{CheckImage, (*session).checkImage, false, []Status{Open}},
	{CheckPodExec, (*session).checkPodExec, false, []Status{Warn, Open}},
	{CheckPodHostMounts, constraint("a directory of the host, which may change under it", (*pod.Pod).HostMounts, func(c policy.PodConstraints) bool { return c.HostMounts }), false, []Status{Warn, Open}},
	{CheckPodVolumes, constraint("a volume whose content it does not verify", (*pod.Pod).UnverifiedVolumes, func(c policy.PodConstraints) bool { return c.UnverifiedVolumes }), false, []Status{Warn, Open}},
	{CheckPodPrivileged, constraint("a container that can act as the machine, and ask for reports in its name", (*pod.Pod).Privileges, func(c policy.PodConstraints) bool { return c.Privileged }), false, []Status{Warn, Open}},
}

func (s *session) checkPolicy(context.Context) Check {
	return Check{Status: Pass, Actual: fmt.Sprintf("version %d", s.Policy.Version)} // New has looked at it
}

// checkReference computes the reference again. Its seed stands for the bytes of a firmware, which only they can prove.
func (s *session) checkReference(context.Context) Check {
	r := s.Reference
	if r == nil {
		if s.Policy.Reference != nil {
			return Check{Status: Unset, Message: "the policy names a reference, which was not given"}
		}
		return Check{Status: Open, Message: "there is none"}
	}
	if _, err := r.Input(); err != nil {
		return Check{Status: Malformed, Message: err.Error()}
	}
	if err := r.Check(); err != nil {
		return Check{Status: Fail, Message: err.Error()}
	}
	c := Check{
		Status: Warn, Expected: r.Inputs.Firmware.String(),
		Message: "the firmware's seed is taken from the reference, whoever wrote it; give the firmware itself to have it computed",
	}
	for _, f := range s.Firmware {
		switch err := r.CheckFirmware(f); {
		case err == nil:
			c.Status, c.Actual, c.Message = Pass, c.Expected, ""
		case !errors.Is(err, reference.ErrFirmware):
			return Check{Status: Fail, Message: err.Error()}
		}
	}
	return c
}

func (s *session) checkEvidence(context.Context) Check {
	c := Check{Status: Pass, Actual: "of a connection"}
	switch {
	case s.Expectation.ReportData != nil:
		c.Actual = "a bare report"
	case s.Stored:
		c.Actual = "stored"
	}
	return c
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
	signer := s.report.KeyInfo.Signer()
	c := Check{Status: Fail, Expected: s.Policy.Signer.String(), Actual: signer.String()}
	switch {
	case signer == snp.SignerNone:
		c.Message = "nobody signed this report"
	case s.report.KeyInfo.MaskChipKey():
		c.Message = "the platform masks its chip key, so this report has no signature"
	case !s.Policy.Signer.Accepts(signer):
		c.Message = "a key of another kind signed this report than the policy accepts"
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
			return missing(err)
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
			return missing(err)
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
	c := Check{Expected: fmt.Sprintf("%x", s.vek.HWID), Actual: policy.ChipID(s.report.ChipID).String()}
	if s.vek.Signer == snp.SignerVLEK {
		c.Expected = ""
		c.Status, c.Message = Open, "a VLEK names no chip"
		return c
	}
	var want [64]byte
	copy(want[:], s.vek.HWID)
	if want != s.report.ChipID {
		c.Actual = fmt.Sprintf("%x", s.report.ChipID)
		c.Status, c.Message = Fail, "the certificate was issued for another chip than the report's"
		return c
	}
	c.Status = Pass
	return c
}
