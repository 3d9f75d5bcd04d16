package snp_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-sev-guest/proto/sevsnp"
	"github.com/google/go-sev-guest/validate"
	theirs "github.com/google/go-sev-guest/verify"
	"github.com/google/go-sev-guest/verify/trust"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/sim"
	"github.com/kcradle/kcradle/snp/verify"
)

// go-sev-guest is the second opinion: both programs are given the same evidence and the same wishes, and the table of cases
// says what each makes of it. Where they differ it says who is right, and why; docs/attestation.md has the same list.

// clock is the instant that all certificates are held against.
var clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// subject is one piece of evidence, and what is wanted of it.
type subject struct {
	report, vek, crl []byte
	chain            []byte // PEM
	vlek             bool   // the key is to be a VLEK
	real             bool   // AMD's own roots, and no list: AMD's are not among the fixtures
	line             snp.Line
	root             [32]byte // of a simulated line

	data        [64]byte // REPORT_DATA
	measurement []byte   // MEASUREMENT; empty: it is not said
	strict      bool     // no debugging, no migration, no CXL, no provisional firmware, VMPL 0, alias check
}

// ours is what package verify makes of it.
func (s subject) ours(t testing.TB) error {
	t.Helper()
	p := policy.Default()
	p.AllowMilan, p.ReportVersion.Min = true, snp.Version2
	if s.vlek {
		p.Signer = policy.VLEK
	}
	if !s.strict {
		p.GuestPolicy.Debug, p.GuestPolicy.MigrateMA, p.GuestPolicy.CXL = true, true, true
		p.AllowProvisional, p.Platform.AliasCheck = true, policy.Any
	}
	p.CRL = policy.CRLRequire
	roots := verify.Roots{Milan: s.root, Genoa: s.root, Turin: s.root}
	if s.real {
		p.CRL, roots = policy.CRLOff, verify.AMD()
	}
	if len(s.measurement) > 0 {
		p.Measurements = []measure.Digest{measure.Digest(s.measurement)}
	}
	v, err := verify.New(verify.Config{Now: func() time.Time { return clock }, Roots: roots, Policy: p})
	if err != nil {
		t.Fatal(err)
	}
	return v.Verify(t.Context(), verify.Evidence{Report: s.report, VEK: s.vek, Chain: s.chain, CRL: s.crl}, verify.Expectation{ReportData: &s.data}).Err()
}

// list is the one thing that go-sev-guest may fetch.
type list []byte

func (l list) Get(string) ([]byte, error) {
	if l == nil {
		return nil, errors.New("unplugged")
	}
	return l, nil
}

// theirs is what go-sev-guest makes of it: verify.SnpAttestation for keys and signature, then validate.SnpAttestation for
// what the report says, as its own tool does.
func (s subject) theirs(t testing.TB) error {
	t.Helper()
	report, err := abi.ReportToProto(s.report)
	if err != nil {
		return err
	}
	a := &sevsnp.Attestation{Report: report, CertificateChain: &sevsnp.CertificateChain{}}
	if s.vlek {
		a.CertificateChain.VlekCert = s.vek
	} else {
		a.CertificateChain.VcekCert = s.vek
	}
	o := &theirs.Options{DisableCertFetching: true, Now: clock}
	if !s.real {
		ask, rest := pem.Decode(s.chain)
		ark, _ := pem.Decode(rest)
		if ask == nil || ark == nil {
			return errors.New("no chain")
		}
		root := trust.AMDRootCertsProduct(s.line.String())
		root.ProductCerts = &trust.ProductCerts{}
		if root.ProductCerts.Ark, err = x509.ParseCertificate(ark.Bytes); err != nil {
			return err
		}
		into := &root.ProductCerts.Ask
		if s.vlek {
			into = &root.ProductCerts.Asvk
		}
		if *into, err = x509.ParseCertificate(ask.Bytes); err != nil {
			return err
		}
		root.ProductCerts.Ask = *into // where its check of the list looks
		o.TrustedRoots = map[string][]*trust.AMDRootCerts{s.line.String(): {root}}
		o.CheckRevocations, o.Getter = true, list(s.crl)
		// It takes the roots that it is given for pinned ones.
		if b, err := x509.MarshalPKIXPublicKey(root.ProductCerts.Ark.PublicKey); err != nil || sha256.Sum256(b) != s.root {
			return errors.New("the chain ends in another root")
		}
	}
	if err := theirs.SnpAttestationContext(t.Context(), a, o); err != nil {
		return err
	}
	zero := 0
	w := &validate.Options{
		GuestPolicy:               abi.SnpPolicy{SMT: true, Debug: true, MigrateMA: true, CXLAllowed: true},
		ReportData:                s.data[:],
		Measurement:               s.measurement,
		PermitProvisionalFirmware: true,
		VMPL:                      &zero,
	}
	if s.strict {
		w.GuestPolicy = abi.SnpPolicy{SMT: true}
		w.PermitProvisionalFirmware = false
		w.PlatformInfo = &abi.SnpPlatformInfo{SMTEnabled: true, TSMEEnabled: true, AliasCheckComplete: true, TIOEnabled: true}
	}
	return validate.SnpAttestation(a, w)
}

// keys are made once: they take seconds. The last one belongs to nobody whom a test trusts.
var keys = sync.OnceValues(func() (k sim.Keys, foreign *rsa.PrivateKey) {
	var err, foreignErr error
	var wg sync.WaitGroup
	wg.Go(func() { k, err = sim.NewKeys() })
	wg.Go(func() { foreign, foreignErr = rsa.GenerateKey(rand.Reader, 4096) })
	wg.Wait()
	if err != nil || foreignErr != nil {
		panic("no keys")
	}
	return k, foreign
})

// machine is a simulated chip under an authority whose certificates say what AMD's do, which go-sev-guest looks at.
type machine struct {
	*sim.Chip
	crl func(*x509.RevocationList) // changes the list before it is signed
}

func newMachine(t testing.TB, l snp.Line, s snp.Signer) *machine {
	t.Helper()
	k, _ := keys()
	a := sim.NewAuthority(k, l, s, clock)
	c, err := a.NewChip(1)
	if err != nil {
		t.Fatal(err)
	}
	for _, cert := range []*x509.Certificate{a.ARK, a.ASK, c.VEK} {
		cert.Subject = pkix.Name{
			CommonName: cert.Subject.CommonName, Country: []string{"US"}, Locality: []string{"Santa Clara"}, Province: []string{"CA"},
			Organization: []string{"Advanced Micro Devices"}, OrganizationalUnit: []string{"Engineering"},
		}
	}
	a.ASK.CRLDistributionPoints = []string{"https://kdsintf.amd.com/vcek/v1/" + l.String() + "/crl"}
	c.Report.Measurement, c.Report.ReportData = [48]byte{2}, [64]byte{1}
	return &machine{Chip: c}
}

// subject returns what the machine is verified with, all of which fits together unless its templates were changed.
func (m *machine) subject(t testing.TB) subject {
	t.Helper()
	s := subject{
		line: m.Authority.Line, vlek: m.Authority.Signer == snp.SignerVLEK,
		data: m.Report.ReportData, measurement: m.Report.Measurement[:],
	}
	tree := m.Authority.CRLTemplate()
	if m.crl != nil {
		m.crl(tree)
	}
	for _, part := range []struct {
		to   *[]byte
		made func() ([]byte, error)
	}{
		{&s.report, func() ([]byte, error) { return m.Sign(m.Report) }}, {&s.vek, m.VEKDER}, {&s.chain, m.Authority.Chain},
		{&s.crl, func() ([]byte, error) { return m.Authority.SignCRL(tree) }},
	} {
		var err error
		if *part.to, err = part.made(); err != nil {
			t.Fatal(err)
		}
	}
	var err error
	if s.root, err = m.Authority.Root(); err != nil {
		t.Fatal(err)
	}
	return s
}

// resign signs bytes that no report has.
func (m *machine) resign(t testing.TB, s *subject, change func([]byte)) {
	t.Helper()
	change(s.report)
	digest := sha512.Sum384(s.report[:snp.SignedSize])
	x, y, err := ecdsa.Sign(rand.Reader, m.Key, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	r, v := sim.Scalar(x), sim.Scalar(y)
	copy(s.report[snp.SignedSize:], r[:])
	copy(s.report[snp.SignedSize+len(r):], v[:])
}

// setExt replaces the extension whose OID ends as said, or adds it.
func (m *machine) setExt(value []byte, id ...int) {
	oid := slices.Concat(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, id)
	e := pkix.Extension{Id: oid, Value: value}
	if i := slices.IndexFunc(m.Extensions, func(x pkix.Extension) bool { return x.Id.Equal(oid) }); i >= 0 {
		m.Extensions[i] = e
	} else {
		m.Extensions = append(m.Extensions, e)
	}
}

func (m *machine) dropExt(id ...int) {
	oid := slices.Concat(asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}, id)
	m.Extensions = slices.DeleteFunc(m.Extensions, func(x pkix.Extension) bool { return x.Id.Equal(oid) })
}

// opinion is one case.
type opinion struct {
	name   string
	line   snp.Line                                   // zero: Genoa
	signer snp.Signer                                 // zero: VCEK
	change func(t testing.TB, m *machine)             // before anything is signed
	tamper func(t testing.TB, m *machine, s *subject) // after
	ours   bool                                       // passes here
	theirs bool                                       // passes there
	why    string                                     // who is right, if they differ
}

// report changes the report before it is signed, raw the bytes of it before they are, and after them without a signature.
func report(change func(*snp.Report)) func(testing.TB, *machine) {
	return func(_ testing.TB, m *machine) { change(&m.Report) }
}

func raw(change func([]byte)) func(testing.TB, *machine, *subject) {
	return func(t testing.TB, m *machine, s *subject) { m.resign(t, s, change) }
}

func after(change func(*subject)) func(testing.TB, *machine, *subject) {
	return func(_ testing.TB, _ *machine, s *subject) { change(s) }
}

func opinions() []opinion {
	strict := after(func(s *subject) { s.strict = true })
	critical := []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
	return []opinion{
		{name: "good", ours: true, theirs: true},
		{name: "good Milan", line: snp.LineMilan, ours: true, theirs: true},
		{name: "good, version 5", change: report(func(r *snp.Report) { r.Version, r.LaunchMit = 5, 1 }), ours: true, theirs: true},
		{name: "good, strictly", tamper: strict, ours: true, theirs: true},
		{name: "good VLEK", signer: snp.SignerVLEK, ours: true, theirs: true},
		{name: "good Turin", line: snp.LineTurin, ours: true, theirs: false, why: "ours: Turin's certificates have an extension for FMC (57230), and it does not know it"},
		{name: "Siena", change: report(func(r *snp.Report) { r.CPU.Model = 0xa0 }), ours: true, theirs: false, why: "ours: family 0x19 with model 0xa0 to 0xaf are Bergamo and Siena, whose root is Genoa's; it knows model 0x11 alone"},

		// The report's form.
		{name: "a byte less", tamper: after(func(s *subject) { s.report = s.report[:snp.Size-1] })},
		{name: "a byte more", tamper: after(func(s *subject) { s.report = append(s.report, 0) }), theirs: true, why: "ours: bytes that nobody signed are not part of a report; it drops them"},
		{name: "version 1", tamper: raw(func(b []byte) { b[0] = 1 })},
		{name: "version 4", tamper: raw(func(b []byte) { b[0] = 4 }), theirs: true, why: "ours: which bytes a report of version 4 reserves is not published; it reads one as any other"},
		{name: "version 6", tamper: raw(func(b []byte) { b[0] = 6 })},
		{name: "unknown policy bit", change: report(func(r *snp.Report) { r.Policy |= 1 << 26 })},
		{name: "policy without its one", tamper: raw(func(b []byte) { b[0xa] &^= 2 })},
		{name: "reserved bits of the key info", tamper: raw(func(b []byte) { b[0x48] |= 0x20 })},
		{name: "signing key 2", tamper: raw(func(b []byte) { b[0x48] |= 2 << 2 })},
		{name: "reserved byte 0x4c", tamper: raw(func(b []byte) { b[0x4c] = 1 })},
		{name: "reserved byte 0x18b", tamper: raw(func(b []byte) { b[0x18b] = 1 })},
		{name: "reserved byte 0x1eb", tamper: raw(func(b []byte) { b[0x1eb] = 1 })},
		{name: "mitigations in version 3", tamper: raw(func(b []byte) { b[0x1f8] = 1 }), theirs: true, why: "ours: those bytes are reserved before version 5"},
		{name: "reserved byte 0x208", tamper: raw(func(b []byte) { b[0x208] = 1 })},
		{name: "reserved byte of the current TCB", tamper: raw(func(b []byte) { b[0x3a] = 1 }), theirs: true, why: "ours: what a firmware means by those bytes is not known; it passes over them"},
		{name: "reserved byte behind the signature", tamper: after(func(s *subject) { s.report[snp.Size-1] = 1 })},
		{name: "VMPL 4", tamper: raw(func(b []byte) { b[0x30] = 4 })},
		{name: "family nobody knows", tamper: raw(func(b []byte) { b[0x188] = 0x1b })},
		{name: "signature algorithm 2", tamper: raw(func(b []byte) { b[0x34] = 2 })},

		// Who signed.
		{name: "nobody signed", change: report(func(r *snp.Report) { r.KeyInfo = snp.NewKeyInfo(false, false, snp.SignerNone) })},
		{name: "masked chip key", change: report(func(r *snp.Report) { r.KeyInfo = snp.NewKeyInfo(false, true, snp.SignerVCEK) }), theirs: true, why: "ours: with MASK_CHIP_KEY the firmware signs nothing (56860), so whoever signed this was no firmware; it does not look at the bit"},
		{name: "VLEK where a VCEK is wanted", signer: snp.SignerVLEK, tamper: after(func(s *subject) { s.vlek = false })},
		{name: "VLEK for a VCEK's report", tamper: func(t testing.TB, m *machine, s *subject) {
			s.vek = newMachine(t, m.Authority.Line, snp.SignerVLEK).subject(t).vek
		}},
		{name: "flipped measurement", tamper: after(func(s *subject) { s.report[0x90]++; s.measurement = s.report[0x90:0xc0] })},
		{name: "flipped signature", tamper: after(func(s *subject) { s.report[0x2a0]++ })},
		{name: "signature of zeros", tamper: after(func(s *subject) { clear(s.report[0x2a0:]) })},
		{name: "signature big endian", tamper: after(func(s *subject) {
			slices.Reverse(s.report[0x2a0:0x2d0])
			slices.Reverse(s.report[0x2e8:0x318])
		})},
		{name: "another chip's key", tamper: func(t testing.TB, m *machine, s *subject) {
			s.report = newMachine(t, m.Authority.Line, snp.SignerVCEK).subject(t).report
		}},

		// The certificate of the key.
		{name: "no certificate", tamper: after(func(s *subject) { s.vek = nil })},
		{name: "certificate is rubbish", tamper: after(func(s *subject) { s.vek = []byte("rubbish") })},
		{name: "ASK as VEK", tamper: func(t testing.TB, m *machine, s *subject) {
			var err error
			if s.vek, err = m.Authority.ASKDER(); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "other TCB in the certificate", change: func(_ testing.TB, m *machine) { m.setExt([]byte{2, 1, 9}, 3, 1) }},
		{name: "other TCB in the report", change: report(func(r *snp.Report) { r.ReportedTCB.SNP-- })},
		{name: "other chip", change: report(func(r *snp.Report) { r.ChipID[0]++ })},
		{name: "masked chip id", change: report(func(r *snp.Report) { r.ChipID = [64]byte{} }), theirs: true, why: "ours: nothing ties the key to a chip then, and no list of chips can be applied; it leaves the comparison out"},
		{name: "chip id as octet string", change: func(_ testing.TB, m *machine) {
			m.setExt(append([]byte{asn1.TagOctetString, 64}, m.Report.ChipID[:]...), 4)
		}, ours: true, theirs: true},
		{name: "no chip id in the certificate", change: func(_ testing.TB, m *machine) { m.dropExt(4) }},
		{name: "no microcode in the certificate", change: func(_ testing.TB, m *machine) { m.dropExt(3, 8) }},
		{name: "extension twice", change: func(_ testing.TB, m *machine) { m.Extensions = append(m.Extensions, m.Extensions[2]) }},
		{name: "part of 256", change: func(_ testing.TB, m *machine) { m.setExt([]byte{2, 2, 1, 0}, 3, 1) }},
		{name: "reserved part", change: func(_ testing.TB, m *machine) { m.setExt([]byte{2, 1, 1}, 3, 4) }},
		{name: "FMC in a certificate of Genoa", change: func(_ testing.TB, m *machine) { m.setExt([]byte{2, 1, 0}, 3, 9) }},
		{name: "product of another line", change: func(_ testing.TB, m *machine) { m.setExt(append([]byte{asn1.TagIA5String, 8}, "Milan-B0"...), 2) }, theirs: true, why: "ours: AMD's own words contradict each other; it passes over the name once the report names its processor, because of wrong steppings, which are no matter here"},
		{name: "structure version 2", change: func(_ testing.TB, m *machine) { m.setExt([]byte{2, 1, 2}, 1) }, theirs: true, why: "ours: what such a certificate means is not published; it does not look"},
		{name: "critical extension in the VEK", change: func(_ testing.TB, m *machine) { m.Extensions = append(m.Extensions, critical...) }},
		{name: "VEK is an authority", change: func(_ testing.TB, m *machine) { m.VEK.IsCA, m.VEK.BasicConstraintsValid = true, true }},
		{name: "VEK of somebody", change: func(_ testing.TB, m *machine) { m.VEK.Subject.CommonName = "VCEK" }},
		{name: "VEK of another organization", change: func(_ testing.TB, m *machine) { m.VEK.Subject.Organization = []string{"Somebody"} }, ours: true, why: "either: whom AMD's key certifies is decided by the signature, and the rest of a name by nobody; it compares all of it"},
		{name: "VEK signed with SHA-256", change: func(_ testing.TB, m *machine) { m.VEK.SignatureAlgorithm = x509.SHA256WithRSAPSS }},
		{name: "expired VEK", change: func(_ testing.TB, m *machine) { m.VEK.NotAfter = clock.Add(-time.Second) }},
		{name: "VEK of tomorrow", change: func(_ testing.TB, m *machine) { m.VEK.NotBefore = clock.Add(time.Second) }},

		// The chain.
		{name: "report of Genoa under Milan", line: snp.LineMilan, change: report(func(r *snp.Report) { r.CPU.Model = 0x11 })},
		{name: "self-made root", tamper: func(t testing.TB, m *machine, s *subject) {
			k, foreign := keys()
			m.Authority.Keys = sim.Keys{ARK: foreign, ASK: k.ASK}
			root := s.root
			*s = m.subject(t)
			s.root = root
		}},
		{name: "self-made root against AMD's", tamper: after(func(s *subject) { s.real = true })},
		{name: "self-made root of Milan against AMD's", line: snp.LineMilan, tamper: after(func(s *subject) { s.real = true })},
		{name: "self-made root of Turin against AMD's", line: snp.LineTurin, tamper: after(func(s *subject) { s.real = true })},
		{name: "VEK by a self-made ASK", tamper: func(t testing.TB, m *machine, s *subject) {
			k, foreign := keys()
			m.Authority.Keys = sim.Keys{ARK: k.ARK, ASK: foreign}
			s.vek = m.subject(t).vek
		}},
		{name: "expired ASK", change: func(_ testing.TB, m *machine) { m.Authority.ASK.NotAfter = clock.Add(-time.Second) }},
		{name: "expired ARK", change: func(_ testing.TB, m *machine) { m.Authority.ARK.NotAfter = clock.Add(-time.Second) }},
		{name: "ASK is no authority", change: func(_ testing.TB, m *machine) { m.Authority.ASK.IsCA, m.Authority.ASK.MaxPathLenZero = false, false }},
		{name: "ASK may make authorities", change: func(_ testing.TB, m *machine) { m.Authority.ASK.MaxPathLen, m.Authority.ASK.MaxPathLenZero = 1, false }, theirs: true, why: "ours: AMD's bound is 0 further authorities (57230); it leaves the bound to the chain at hand"},
		{name: "ASK signed with PKCS #1", change: func(_ testing.TB, m *machine) { m.Authority.ASK.SignatureAlgorithm = x509.SHA384WithRSA }, theirs: true, why: "ours: AMD signs with PSS (57230); it wants that of the last certificate alone"},
		{name: "critical extension in the ASK", change: func(_ testing.TB, m *machine) { m.Authority.ASK.ExtraExtensions = critical }},

		// The revocation list.
		{name: "ASK revoked", change: revoke(0x10001)},
		{name: "ARK revoked", change: revoke(0x10000), theirs: true, why: "ours: a list that revokes its own signer means it; it looks for the ASK alone"},
		{name: "others revoked", change: revoke(5), ours: true, theirs: true},
		{name: "no list", tamper: after(func(s *subject) { s.crl = nil })},
		{name: "list is rubbish", tamper: after(func(s *subject) { s.crl = []byte("rubbish") })},
		{name: "list of another signer", tamper: func(t testing.TB, m *machine, s *subject) {
			k, foreign := keys()
			m.Authority.Keys = sim.Keys{ARK: foreign, ASK: k.ASK}
			s.crl = m.subject(t).crl
		}},
		{name: "expired list", change: crl(func(l *x509.RevocationList) { l.NextUpdate = clock.Add(-time.Hour) }), theirs: true, why: "ours: an old list does not show what was revoked since; it does not look at the dates of a list that it has just fetched"},
		{name: "list of tomorrow", change: crl(func(l *x509.RevocationList) { l.ThisUpdate = clock.Add(time.Hour) }), theirs: true, why: "ours: as for an expired list"},
		{name: "partial list", change: crl(func(l *x509.RevocationList) {
			l.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: true, Value: []byte{0x30, 0}}}
		}), theirs: true, why: "ours: a critical extension that is not known makes the list another than it seems (RFC 5280, section 5.2); the standard library leaves that to its caller"},

		// What the report says.
		{name: "other report data", tamper: after(func(s *subject) { s.data[0]++ })},
		{name: "other measurement", tamper: after(func(s *subject) { s.measurement = bytes.Repeat([]byte{9}, 48) })},
		{name: "no measurement", tamper: after(func(s *subject) { s.measurement = nil }), theirs: true, why: "ours: without a measurement any guest would do; it leaves out the check"},
		{name: "empty measurement", tamper: after(func(s *subject) { s.measurement = []byte{} }), theirs: true, why: "ours: an expectation that came out empty by mistake must not switch its check off; it does"},
		{name: "VMPL 1", change: report(func(r *snp.Report) { r.VMPL = 1 })},
		{name: "asked by the host", change: report(func(r *snp.Report) { r.VMPL = snp.VMPLHost })},
		{name: "debug", change: report(func(r *snp.Report) { r.Policy |= snp.PolicyDebug }), tamper: strict},
		{name: "migration", change: report(func(r *snp.Report) { r.Policy |= snp.PolicyMigrateMA }), tamper: strict},
		{name: "CXL", change: report(func(r *snp.Report) { r.Policy |= snp.PolicyCXL }), tamper: strict},
		{name: "debug, tolerated", change: report(func(r *snp.Report) { r.Policy |= snp.PolicyDebug }), ours: true, theirs: true},
		{name: "no alias check", change: report(func(r *snp.Report) { r.PlatformInfo &^= snp.PlatformAliasCheck }), tamper: strict},
		{name: "platform bit 6", change: report(func(r *snp.Report) { r.PlatformInfo |= 1 << 6 }), tamper: strict, ours: true, why: "ours: real machines of Turin set it, and platform bits allow nothing; it refuses all that it has no name for"},
		{name: "provisional build", change: report(func(r *snp.Report) { r.Committed.Build-- }), tamper: strict},
		{name: "provisional TCB", change: report(func(r *snp.Report) { r.CommittedTCB.SNP-- }), tamper: strict},
		{name: "reported above current", change: report(func(r *snp.Report) { r.CurrentTCB.Microcode, r.CommittedTCB.Microcode = 1, 1 })},
		{name: "committed above current", change: report(func(r *snp.Report) { r.CommittedTCB.SNP++ })},
	}
}

func crl(change func(*x509.RevocationList)) func(testing.TB, *machine) {
	return func(_ testing.TB, m *machine) { m.crl = change }
}

func revoke(serial int64) func(testing.TB, *machine) {
	return func(_ testing.TB, m *machine) {
		revoked := m.Authority.CRLTemplate(serial).RevokedCertificateEntries
		m.crl = func(l *x509.RevocationList) { l.RevokedCertificateEntries = revoked }
	}
}

func TestOpinions(t *testing.T) {
	for _, o := range opinions() {
		t.Run(o.name, func(t *testing.T) {
			line := o.line
			if line == snp.LineUnknown {
				line = snp.LineGenoa
			}
			m := newMachine(t, line, o.signer)
			if o.change != nil {
				o.change(t, m)
			}
			s := m.subject(t)
			if o.tamper != nil {
				o.tamper(t, m, &s)
			}
			o.hold(t, s)
		})
	}
}

// hold wants both programs to decide as the table says.
func (o opinion) hold(t *testing.T, s subject) {
	t.Helper()
	ours, theirs := s.ours(t), s.theirs(t)
	if (ours == nil) != o.ours {
		t.Errorf("ours: got %v, want a pass: %t", ours, o.ours)
	}
	if (theirs == nil) != o.theirs {
		t.Errorf("theirs: got %v, want a pass: %t (ours %v)", theirs, o.theirs, ours)
	}
	if (o.ours != o.theirs) != (o.why != "") {
		t.Errorf("ours %v\ntheirs %v\nwhy: %s", ours, theirs, o.why)
	}
}

func realOpinions() []opinion {
	const (
		siena = "ours: as for Siena above"
		turin = "ours: as for Turin above"
	)
	return []opinion{
		{name: "gosevguest-milan-v2-debugpolicy", ours: true, theirs: true},
		{name: "trustee-milan-v2", ours: true, theirs: true},
		{name: "oak-milan-v3", ours: true, theirs: true},
		{name: "trustee-siena-v3", ours: true, why: siena},
		{name: "oak-genoa-v5", ours: true, theirs: true},
		{name: "oak-turin-v5", ours: true, why: turin},
	}
}

// realSubject is a real report, of which is wanted what it says.
func realSubject(t testing.TB, name string) subject {
	t.Helper()
	chain := "genoa"
	if strings.Contains(name, "milan") {
		chain = "milan"
	} else if strings.Contains(name, "turin") {
		chain = "turin_vcek"
	}
	s := subject{
		report: need.Fixture(t, "fixtures/"+name+".report"), vek: need.Fixture(t, "fixtures/"+strings.TrimSuffix(name, "-debugpolicy")+".vcek.der"),
		chain: need.Fixture(t, "fixtures/ask_ark_"+chain+".pem"), real: true,
	}
	s.expectItself()
	return s
}

func (s *subject) expectItself() {
	s.data, s.measurement = [64]byte(s.report[0x50:]), s.report[0x90:0xc0]
}

func TestRealOpinions(t *testing.T) {
	for _, o := range realOpinions() {
		t.Run(o.name, func(t *testing.T) {
			s := realSubject(t, o.name)
			o.hold(t, s)
			if !o.theirs {
				return
			}
			// Each byte of one report, and every sixteenth of the others: snp/verify does all of all.
			step := 16
			if o.name == "oak-genoa-v5" {
				step = 1
			}
			good := s.report
			for i := 0; i < len(good); i += step {
				s.report = bytes.Clone(good)
				s.report[i] ^= 1 << (i % 8)
				s.expectItself()
				if ours, theirs := s.ours(t), s.theirs(t); ours == nil || theirs == nil {
					t.Errorf("byte %#x flipped: ours %v, theirs %v", i, ours, theirs)
				}
			}
		})
	}
}
