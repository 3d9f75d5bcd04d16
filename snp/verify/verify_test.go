package verify

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/sim"
)

// mustVerify decides whether hardware made a report: what the report says is as expected.
func mustVerify(t testing.TB, c Config, e Evidence) Result {
	t.Helper()
	v, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return v.Verify(t.Context(), e, Expectation{ReportData: &expectedData})
}

// wantPass and wantStop hold a result against what it must be, in every respect.
func wantPass(t testing.TB, r Result) {
	t.Helper()
	if err := r.Err(); err != nil || !r.Passed() {
		t.Fatalf("got %v, want a pass", err)
	}
	if r.Report == nil || r.VEK == nil {
		t.Error("a result that passed lacks its report or certificate")
	}
}

func wantStop(t testing.TB, r Result, id ID, status Status, message string) {
	t.Helper()
	var e *Error
	if r.Passed() || !errors.As(r.Err(), &e) {
		t.Fatalf("got %v, want check %s to stop it", r.Err(), id)
	}
	if c := e.Failed[0]; c.ID != id || c.Status != status || !strings.Contains(c.Message, message) || c != e.Cause() {
		t.Errorf("got %v\nwant %s: %s: …%s…", e, id, status, message)
	}
	if r.Report != nil || r.VEK != nil || r.Pod != nil {
		t.Error("a result that did not pass shows its report, certificate or pod")
	}
	reached := true
	for i, c := range r.Checks {
		if c.ID != rows[i].id {
			t.Errorf("check %d is %s, want %s", i, c.ID, rows[i].id)
		}
		if !reached && c.Status != Skipped {
			t.Errorf("check %s behind the failure is %s", c.ID, c.Status)
		}
		reached = reached && c.ID != id
	}
	if len(r.Checks) != len(rows) {
		t.Errorf("%d checks, want %d", len(r.Checks), len(rows))
	}
}

func TestSynthetic(t *testing.T) {
	for _, line := range []snp.Line{snp.LineMilan, snp.LineGenoa, snp.LineTurin} {
		t.Run(line.String(), func(t *testing.T) {
			a := newAuthority(t, line, snp.SignerVCEK)
			r := mustVerify(t, a.config(t), a.evidence(t))
			wantPass(t, r)
			if r.VEK.TCB != a.Report.ReportedTCB || r.VEK.Line != line || r.Report.Product().Line() != line {
				t.Errorf("got %+v", r.VEK)
			}
			for _, c := range r.Checks[:slices.IndexFunc(rows, func(w row) bool { return !w.stops })] {
				if c.Status != Pass && c.ID != CheckReference {
					t.Errorf("check %s is %s", c.ID, c.Status)
				}
			}
		})
	}
}

func TestSyntheticVersions(t *testing.T) {
	a := newAuthority(t, snp.LineGenoa, snp.SignerVCEK)
	c := a.config(t)
	a.Report.Version, a.Report.LaunchMit = snp.Version5, 3
	wantPass(t, mustVerify(t, c, a.evidence(t)))
	a.Report.Version, a.Report.LaunchMit, a.Report.CPU = snp.Version2, 0, snp.CPU{}
	wantPass(t, mustVerify(t, c, a.evidence(t)))
	a.Report.Version, a.Report.CPU = snp.Version3, snp.CPU{Family: 0x19, Model: 0xa0, Stepping: 2}
	wantPass(t, mustVerify(t, c, a.evidence(t)))
	hwid := bytes.Clone(a.Report.ChipID[:])
	a.setExt(extHWID, der(hwid))
	wantPass(t, mustVerify(t, c, a.evidence(t)))
}

// TestRefusals makes one thing wrong at a time in evidence that would pass (see TestSynthetic and TestVLEK), and wants
// exactly the check that is for it to refuse.
func TestRefusals(t *testing.T) {
	_, foreign := testKeys()
	tests := []struct {
		name    string
		line    snp.Line
		signer  snp.Signer
		change  func(t *testing.T, a *authority, c *Config)   // before anything is signed
		tamper  func(t *testing.T, a *authority, e *Evidence) // after
		check   ID
		status  Status
		message string
	}{
		{name: "truncated report", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Report = e.Report[:1183] },
			check: CheckReport, status: Malformed, message: "1183 bytes"},
		{name: "extended report", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Report = append(e.Report, 0) },
			check: CheckReport, status: Malformed, message: "1185 bytes"},
		{name: "no report", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Report = nil },
			check: CheckReport, status: Malformed, message: "0 bytes"},
		{name: "version 1", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Report[0] = 1 },
			check: CheckReport, status: Malformed, message: "VERSION"},
		{name: "version 4", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Report[0] = 4 },
			check: CheckReport, status: Malformed, message: "4 is not known here"},
		{name: "version 6", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Report[0] = 6 },
			check: CheckReport, status: Malformed, message: "VERSION"},

		{name: "nobody signed", change: func(_ *testing.T, a *authority, _ *Config) {
			a.Report.KeyInfo = snp.NewKeyInfo(false, false, snp.SignerNone)
		},
			check: CheckSigner, status: Fail, message: "nobody"},
		{name: "masked chip key", change: func(_ *testing.T, a *authority, _ *Config) {
			a.Report.KeyInfo = snp.NewKeyInfo(false, true, snp.SignerVCEK)
		},
			check: CheckSigner, status: Fail, message: "masks"},
		{name: "VLEK where none is allowed", signer: snp.SignerVLEK, change: func(_ *testing.T, _ *authority, c *Config) { c.Policy.Signer = policy.VCEK },
			check: CheckSigner, status: Fail, message: "another kind"},

		{name: "no certificate and no source", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.VEK = nil },
			check: CheckVEK, status: Missing, message: "no source"},
		{name: "certificate is rubbish", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.VEK = []byte("rubbish") },
			check: CheckVEK, status: Malformed},
		{name: "certificate is too long", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.VEK = make([]byte, kds.MaxVEK+1) },
			check: CheckVEK, status: Malformed, message: "more than"},
		{name: "ASK as VEK", tamper: func(t *testing.T, a *authority, e *Evidence) { e.VEK = a.askDER(t) },
			check: CheckVEK, status: Malformed, message: `subject "SEV-Milan"`},
		{name: "ARK as VEK", tamper: func(t *testing.T, a *authority, e *Evidence) { e.VEK = a.arkDER(t) },
			check: CheckVEK, status: Malformed, message: `subject "ARK-Milan"`},
		{name: "VLEK for a VCEK's report", change: func(_ *testing.T, _ *authority, c *Config) { c.Policy.Signer = policy.AnySigner },
			tamper: func(t *testing.T, a *authority, e *Evidence) {
				e.VEK = newAuthority(t, a.Line, snp.SignerVLEK).vekDER(t)
			},
			check: CheckVEK, status: Fail, message: "another kind"},
		{name: "VCEK for a VLEK's report", signer: snp.SignerVLEK,
			tamper: func(t *testing.T, a *authority, e *Evidence) {
				e.VEK = newAuthority(t, a.Line, snp.SignerVCEK).vekDER(t)
			},
			check: CheckVEK, status: Fail, message: "another kind"},
		{name: "duplicate extension", change: func(_ *testing.T, a *authority, _ *Config) { a.Extensions = append(a.Extensions, ext(extBL, der(10))) },
			check: CheckVEK, status: Malformed, message: "duplicate"},

		{name: "Milan certificate for a Genoa report", change: func(_ *testing.T, a *authority, _ *Config) { a.Report.CPU.Model = 0x11 },
			check: CheckLine, status: Fail, message: "another line"},
		{name: "Turin's version 2 report with a Milan certificate", change: func(_ *testing.T, a *authority, _ *Config) {
			a.Report.Version, a.Report.CPU = snp.Version2, snp.CPU{}
			clear(a.Report.ChipID[8:])
			zero := snp.TCB{Layout: snp.LayoutTurin, SNP: 3}
			a.Report.CurrentTCB, a.Report.ReportedTCB, a.Report.CommittedTCB, a.Report.LaunchTCB = zero, zero, zero, zero
		}, check: CheckLine, status: Fail, message: "another line"},

		{name: "no chain and no source", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Chain = nil },
			check: CheckRoot, status: Missing, message: "no source"},
		{name: "chain is rubbish", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Chain = []byte("rubbish") },
			check: CheckRoot, status: Malformed, message: "certificate 1 of 2"},
		{name: "chain is too long", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Chain = make([]byte, kds.MaxChain+1) },
			check: CheckRoot, status: Malformed, message: "more than"},
		{name: "chain of one", tamper: func(t *testing.T, a *authority, e *Evidence) { e.Chain = toPEM(a.askDER(t)) },
			check: CheckRoot, status: Malformed, message: "certificate 2 of 2"},
		{name: "chain of three", tamper: func(t *testing.T, a *authority, e *Evidence) { e.Chain = append(e.Chain, toPEM(a.arkDER(t))...) },
			check: CheckRoot, status: Malformed, message: "more than ASK and ARK"},
		{name: "text before the chain", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Chain = append([]byte("hello\n"), e.Chain...) },
			check: CheckRoot, status: Malformed, message: "certificate 1 of 2"},
		{name: "chain upside down", tamper: func(t *testing.T, a *authority, e *Evidence) {
			e.Chain = slices.Concat(toPEM(a.arkDER(t)), toPEM(a.askDER(t)))
		}, check: CheckRoot, status: Fail, message: "not the root"},
		{name: "line without a trusted root", change: func(_ *testing.T, _ *authority, c *Config) { c.Roots = Roots{Genoa: c.Roots.Milan} },
			check: CheckRoot, status: Fail, message: "no root of Milan"},
		{name: "self-made root", change: func(_ *testing.T, a *authority, _ *Config) { a.Keys.ARK = foreign },
			check: CheckRoot, status: Fail, message: "not the root"},
		{name: "self-made root against AMD's", change: func(_ *testing.T, _ *authority, c *Config) { c.Roots = AMD() },
			check: CheckRoot, status: Fail, message: "not the root"},
		{name: "self-made Genoa root against AMD's", line: snp.LineGenoa, change: func(_ *testing.T, _ *authority, c *Config) { c.Roots = AMD() },
			check: CheckRoot, status: Fail, message: "not the root"},
		{name: "self-made Turin root against AMD's", line: snp.LineTurin, change: func(_ *testing.T, _ *authority, c *Config) { c.Roots = AMD() },
			check: CheckRoot, status: Fail, message: "not the root"},

		{name: "ASK by a self-made root behind the right ARK", tamper: func(t *testing.T, a *authority, e *Evidence) {
			ask := a.under(sim.Keys{ARK: foreign, ASK: a.Keys.ASK}).askDER(t)
			e.Chain = slices.Concat(toPEM(ask), toPEM(a.arkDER(t)))
		}, check: CheckChain, status: Fail, message: "ASK: not signed"},
		{name: "VEK by a self-made ASK", tamper: func(t *testing.T, a *authority, e *Evidence) {
			e.VEK = a.under(sim.Keys{ASK: foreign}).vekDER(t)
		}, check: CheckChain, status: Fail, message: "VCEK: not signed"},
		{name: "VEK by the ARK itself", tamper: func(t *testing.T, a *authority, e *Evidence) {
			e.VEK = a.under(sim.Keys{ASK: a.Keys.ARK}).vekDER(t)
		}, check: CheckChain, status: Fail, message: "VCEK: not signed"},
		{name: "ARK twice", tamper: func(t *testing.T, a *authority, e *Evidence) { e.Chain = bytes.Repeat(toPEM(a.arkDER(t)), 2) },
			check: CheckChain, status: Fail, message: `ASK: subject "ARK-Milan"`},
		{name: "ASVK above a VCEK", tamper: func(t *testing.T, a *authority, e *Evidence) {
			a.ASK.Subject.CommonName = "SEV-VLEK-Milan"
			e.Chain = a.chainPEM(t)
		}, check: CheckChain, status: Fail, message: `ASK: subject "SEV-VLEK-Milan"`},
		{name: "issuer's name of another organization", tamper: func(t *testing.T, a *authority, e *Evidence) {
			a.ASK.Subject.Organization = []string{"Somebody"}
			e.Chain = a.chainPEM(t)
		}, check: CheckChain, status: Fail, message: "VCEK: issued by"},
		{name: "ASK is no authority", change: func(_ *testing.T, a *authority, _ *Config) { a.ASK.IsCA, a.ASK.MaxPathLenZero = false, false },
			check: CheckChain, status: Fail, message: "ASK: it is no certificate authority"},
		{name: "ASK may make authorities", change: func(_ *testing.T, a *authority, _ *Config) { a.ASK.MaxPathLen, a.ASK.MaxPathLenZero = 1, false },
			check: CheckChain, status: Fail, message: "ASK: it may certify other authorities"},
		{name: "ASK may not certify", change: func(_ *testing.T, a *authority, _ *Config) { a.ASK.KeyUsage = x509.KeyUsageDigitalSignature },
			check: CheckChain, status: Fail, message: "ASK: its key may not"},
		{name: "ARK may not sign lists", change: func(_ *testing.T, a *authority, _ *Config) { a.ARK.KeyUsage = x509.KeyUsageCertSign },
			check: CheckChain, status: Fail, message: "ARK: its key may not"},
		{name: "ASK signed with PKCS #1", change: func(_ *testing.T, a *authority, _ *Config) { a.ASK.SignatureAlgorithm = x509.SHA384WithRSA },
			check: CheckChain, status: Fail, message: "ASK: signed with"},
		{name: "VEK signed with SHA-256", change: func(_ *testing.T, a *authority, _ *Config) { a.VEK.SignatureAlgorithm = x509.SHA256WithRSAPSS },
			check: CheckChain, status: Fail, message: "VCEK: signed with"},
		{name: "short ASK", change: func(t *testing.T, a *authority, _ *Config) {
			key, err := rsa.GenerateKey(rand.Reader, 2048)
			if err != nil {
				t.Fatal(err)
			}
			a.Keys.ASK = key
		}, check: CheckChain, status: Fail, message: "ASK: its key is not RSA of 4096 bits"},
		{name: "unknown critical extension in the ASK", change: func(_ *testing.T, a *authority, _ *Config) {
			a.ASK.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}
		}, check: CheckChain, status: Fail, message: "ASK: unknown critical extension"},

		{name: "expired VEK", change: func(_ *testing.T, a *authority, _ *Config) { a.VEK.NotAfter = clock.Add(-time.Second) },
			check: CheckValidity, status: Fail, message: "SEV-VCEK has expired"},
		{name: "expired ASK", change: func(_ *testing.T, a *authority, _ *Config) { a.ASK.NotAfter = clock.Add(-time.Second) },
			check: CheckValidity, status: Fail, message: "SEV-Milan has expired"},
		{name: "expired ARK", change: func(_ *testing.T, a *authority, _ *Config) { a.ARK.NotAfter = clock.Add(-time.Second) },
			check: CheckValidity, status: Fail, message: "ARK-Milan has expired"},
		{name: "VEK of tomorrow", change: func(_ *testing.T, a *authority, _ *Config) { a.VEK.NotBefore = clock.Add(time.Second) },
			check: CheckValidity, status: Fail, message: "SEV-VCEK is not valid before"},
		{name: "ASK of tomorrow", change: func(_ *testing.T, a *authority, _ *Config) { a.ASK.NotBefore = clock.Add(time.Second) },
			check: CheckValidity, status: Fail, message: "SEV-Milan is not valid before"},
		{name: "ARK of tomorrow", change: func(_ *testing.T, a *authority, _ *Config) { a.ARK.NotBefore = clock.Add(time.Second) },
			check: CheckValidity, status: Fail, message: "ARK-Milan is not valid before"},

		{name: "flipped signature", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Report[0x2a0] ^= 1 },
			check: CheckSignature, status: Fail, message: "not by the key"},
		{name: "flipped measurement", tamper: func(_ *testing.T, _ *authority, e *Evidence) { e.Report[0x90] ^= 1 },
			check: CheckSignature, status: Fail, message: "not by the key"},
		{name: "R and S are 0", tamper: func(_ *testing.T, _ *authority, e *Evidence) { clear(e.Report[0x2a0:]) },
			check: CheckSignature, status: Fail, message: "not by the key"},
		{name: "R is the order", tamper: func(_ *testing.T, _ *authority, e *Evidence) { putScalar(e.Report[0x2a0:], elliptic.P384().Params().N) },
			check: CheckSignature, status: Fail, message: "not by the key"},
		{name: "S above the order", tamper: func(_ *testing.T, _ *authority, e *Evidence) { fill(e.Report[0x2e8:0x318], 0xff) },
			check: CheckSignature, status: Fail, message: "not by the key"},
		{name: "R and S swapped", tamper: func(_ *testing.T, _ *authority, e *Evidence) {
			r := bytes.Clone(e.Report[0x2a0:0x2e8])
			copy(e.Report[0x2a0:], e.Report[0x2e8:0x330])
			copy(e.Report[0x2e8:], r)
		}, check: CheckSignature, status: Fail, message: "not by the key"},
		{name: "R and S big endian", tamper: func(_ *testing.T, _ *authority, e *Evidence) {
			slices.Reverse(e.Report[0x2a0:0x2d0])
			slices.Reverse(e.Report[0x2e8:0x318])
		}, check: CheckSignature, status: Fail, message: "not by the key"},
		{name: "signed with SHA-512", tamper: func(t *testing.T, a *authority, e *Evidence) {
			digest := sha512.Sum512(e.Report[:snp.SignedSize])
			r, s, err := ecdsa.Sign(rand.Reader, a.Key, digest[:])
			if err != nil {
				t.Fatal(err)
			}
			putScalar(e.Report[0x2a0:], r)
			putScalar(e.Report[0x2e8:], s)
		}, check: CheckSignature, status: Fail, message: "not by the key"},
		{name: "report of another chip's key", tamper: func(t *testing.T, a *authority, e *Evidence) {
			key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			a.Key = key
			e.Report = a.sign(t)
		}, check: CheckSignature, status: Fail, message: "not by the key"},

		{name: "other boot loader", change: func(_ *testing.T, a *authority, _ *Config) { a.setExt(extBL, der(9)) },
			check: CheckTCB, status: Fail, message: "another TCB"},
		{name: "other TEE", change: func(_ *testing.T, a *authority, _ *Config) { a.setExt(extTEE, der(0)) },
			check: CheckTCB, status: Fail, message: "another TCB"},
		{name: "other SNP", change: func(_ *testing.T, a *authority, _ *Config) { a.Report.ReportedTCB.SNP++ },
			check: CheckTCB, status: Fail, message: "another TCB"},
		{name: "other microcode", change: func(_ *testing.T, a *authority, _ *Config) { a.Report.ReportedTCB.Microcode-- },
			check: CheckTCB, status: Fail, message: "another TCB"},
		{name: "other FMC", line: snp.LineTurin, change: func(_ *testing.T, a *authority, _ *Config) { a.setExt(extFMC, der(3)) },
			check: CheckTCB, status: Fail, message: "another TCB"},
		{name: "other chip", change: func(_ *testing.T, a *authority, _ *Config) { a.Report.ChipID[63] ^= 1 },
			check: CheckChip, status: Fail, message: "another chip"},
		{name: "masked chip id", change: func(_ *testing.T, a *authority, _ *Config) { a.Report.ChipID = [64]byte{} },
			check: CheckChip, status: Fail, message: "another chip"},
		{name: "other Turin", line: snp.LineTurin, change: func(_ *testing.T, a *authority, _ *Config) { a.Report.ChipID[7] ^= 1 },
			check: CheckChip, status: Fail, message: "another chip"},
		{name: "bytes behind Turin's chip id", line: snp.LineTurin, change: func(_ *testing.T, a *authority, _ *Config) { a.Report.ChipID[8] = 1 },
			check: CheckChip, status: Fail, message: "another chip"},
	}
	// See TestCRL, TestReference, TestRejected.
	tested := map[ID]bool{CheckCRL: true, CheckPolicy: true, CheckReference: true, CheckEvidence: true}
	for _, tt := range tests {
		tested[tt.check] = true
		t.Run(tt.name, func(t *testing.T) {
			if tt.line == snp.LineUnknown {
				tt.line = snp.LineMilan
			}
			a := newAuthority(t, tt.line, tt.signer)
			c := a.config(t)
			if tt.change != nil {
				tt.change(t, a, &c)
			}
			e := a.evidence(t)
			if tt.tamper != nil {
				tt.tamper(t, a, &e)
			}
			wantStop(t, mustVerify(t, c, e), tt.check, tt.status, tt.message)
		})
	}
	for _, w := range rows {
		if w.stops && !tested[w.id] {
			t.Errorf("nothing makes check %s fail", w.id)
		}
	}
}

func putScalar(b []byte, n *big.Int) {
	v := littleEndian(n)
	copy(b, v[:])
}

func fill(b []byte, v byte) {
	for i := range b {
		b[i] = v
	}
}

func TestVLEK(t *testing.T) {
	for _, line := range []snp.Line{snp.LineMilan, snp.LineTurin} {
		a := newAuthority(t, line, snp.SignerVLEK)
		c := a.config(t)
		r := mustVerify(t, c, a.evidence(t))
		wantPass(t, r)
		if got := find(t, r, CheckChip); got.Status != Open {
			t.Errorf("got %+v, want the chip not to be checked", got)
		}
		if r.VEK.CSP != "simulated-cloud" || r.VEK.HWID != nil {
			t.Errorf("got %+v", r.VEK)
		}
	}
}

func TestCRL(t *testing.T) {
	a := newAuthority(t, snp.LineMilan, snp.SignerVCEK)
	_, foreign := testKeys()
	good := a.evidence(t)
	other := newAuthority(t, snp.LineMilan, snp.SignerVCEK)
	other.ARK.Subject.CommonName = "ARK-Genoa"
	critical := []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 28}, Critical: true, Value: []byte{0x30, 0}}}

	expired := a.crl(t, func(l *x509.RevocationList) { l.NextUpdate = clock.Add(-time.Hour) }, a.Keys.ARK)
	published := func(list []byte) Source { return directory{kds.CRL(snp.LineMilan, snp.SignerVCEK).URL(): list} }

	const none = Status("") // the result passes and the check too
	tests := []struct {
		name          string
		list          []byte
		require, soft Status
		message       string
		source        Source
	}{
		{name: "current", list: good.CRL, require: none, soft: none},
		{name: "others revoked", list: a.crl(t, nil, a.Keys.ARK, 1, 0x10002), require: none, soft: none},
		{name: "ASK revoked", list: a.crl(t, nil, a.Keys.ARK, 5, 0x10001), require: Fail, soft: Fail, message: "SEV-Milan was revoked"},
		{name: "ARK revoked", list: a.crl(t, nil, a.Keys.ARK, 0x10000), require: Fail, soft: Fail, message: "ARK-Milan was revoked"},
		{name: "ASK revoked in an expired list", list: a.crl(t, func(l *x509.RevocationList) { l.NextUpdate = clock.Add(-time.Hour) }, a.Keys.ARK, 0x10001),
			require: Fail, soft: Fail, message: "SEV-Milan was revoked"},
		{name: "wrong signer", list: a.crl(t, nil, foreign), require: Fail, soft: Fail, message: "not signed"},
		{name: "signed by the ASK", list: a.crl(t, nil, a.Keys.ASK), require: Fail, soft: Fail, message: "not signed"},
		{name: "wrong issuer", list: other.crl(t, nil, a.Keys.ARK), require: Fail, soft: Fail, message: `issued by "ARK-Genoa"`},
		{name: "weaker signature", list: a.crl(t, func(l *x509.RevocationList) { l.SignatureAlgorithm = x509.SHA256WithRSA }, a.Keys.ARK),
			require: Fail, soft: Fail, message: "signed with"},
		{name: "partial list", list: a.crl(t, func(l *x509.RevocationList) { l.ExtraExtensions = critical }, a.Keys.ARK),
			require: Fail, soft: Fail, message: "critical extension 2.5.29.28"},
		{name: "critical extension of an entry", list: a.crl(t, func(l *x509.RevocationList) { l.RevokedCertificateEntries[0].ExtraExtensions = critical }, a.Keys.ARK, 9),
			require: Fail, soft: Fail, message: "critical extension 2.5.29.28"},
		{name: "bytes behind the list", list: append(bytes.Clone(good.CRL), 0), require: Malformed, soft: Malformed, message: "behind"},
		{name: "rubbish", list: []byte("rubbish"), require: Malformed, soft: Malformed},
		{name: "too long", list: make([]byte, kds.MaxCRL+1), require: Malformed, soft: Malformed, message: "more than"},
		{name: "expired", list: a.crl(t, func(l *x509.RevocationList) { l.NextUpdate = clock.Add(-time.Hour) }, a.Keys.ARK),
			require: Fail, soft: Warn, message: "has expired"},
		{name: "of tomorrow", list: a.crl(t, func(l *x509.RevocationList) { l.ThisUpdate = clock.Add(time.Hour) }, a.Keys.ARK),
			require: Fail, soft: Warn, message: "not valid before"},
		{name: "missing", require: Missing, soft: Warn, message: "no source"},
		{name: "not to be had", require: Missing, soft: Warn, message: "unplugged", source: directory{}},
		{name: "no answer", require: Unreachable, soft: Warn, message: "does not answer", source: unreachable{}},

		// Of the evidence and from the source: who hands in an old list does not keep a newer one from being asked for.
		{name: "ASK revoked since", list: good.CRL, source: published(a.crl(t, nil, a.Keys.ARK, 0x10001)), require: Fail, soft: Fail, message: "SEV-Milan was revoked"},
		{name: "ASK revoked in the one handed in", list: a.crl(t, nil, a.Keys.ARK, 0x10001), source: published(good.CRL), require: Fail, soft: Fail, message: "SEV-Milan was revoked"},
		{name: "both current", list: good.CRL, source: published(good.CRL), require: none, soft: none},
		{name: "not to be had, and handed in", list: good.CRL, source: unreachable{}, require: none, soft: none},
		{name: "expired, and a current one handed in", list: good.CRL, source: published(expired), require: none, soft: none},
		{name: "current, and an expired one handed in", list: expired, source: published(good.CRL), require: none, soft: none},
		{name: "both expired", list: expired, source: published(expired), require: Fail, soft: Warn, message: "has expired"},
		{name: "rubbish from the source", list: good.CRL, source: published([]byte("rubbish")), require: Malformed, soft: Malformed},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			e := good
			e.CRL = tt.list
			for mode, want := range map[policy.CRLMode]Status{policy.CRLRequire: tt.require, policy.CRLSoft: tt.soft, policy.CRLOff: Open} {
				c := a.config(t)
				c.Policy.CRL, c.Source = mode, tt.source
				r := mustVerify(t, c, e)
				switch want {
				case none:
					wantPass(t, r)
					want = Pass
				case Warn, Open:
					wantPass(t, r)
				default:
					wantStop(t, r, CheckCRL, want, tt.message)
				}
				i := slices.IndexFunc(r.Checks, func(c Check) bool { return c.ID == CheckCRL })
				if got := r.Checks[i]; got.Status != want || want == Warn && !strings.Contains(got.Message, tt.message) {
					t.Errorf("%s: got %+v, want %s", mode, got, want)
				}
			}
		})
	}
}

// directory is a Source of bytes by address.
type directory map[string][]byte

func (d directory) Fetch(ctx context.Context, o kds.Object) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	b, ok := d[o.URL()]
	if !ok {
		return nil, errors.New("unplugged")
	}
	return b, nil
}

// unreachable is a Source that nobody answers.
type unreachable struct{}

func (unreachable) Fetch(context.Context, kds.Object) ([]byte, error) {
	return nil, fmt.Errorf("dial: %w", ErrUnreachable)
}

func TestSource(t *testing.T) {
	for _, line := range []snp.Line{snp.LineMilan, snp.LineGenoa, snp.LineTurin} {
		t.Run(line.String(), func(t *testing.T) {
			a := newAuthority(t, line, snp.SignerVCEK)
			e := a.evidence(t)
			hwid := a.Report.ChipID[:line.HWIDSize()]
			fmc := ""
			if line == snp.LineTurin {
				fmc = "fmcSPL=02&"
			}
			d := directory{
				fmt.Sprintf("https://kdsintf.amd.com/vcek/v1/%s/%x?%sblSPL=10&teeSPL=01&snpSPL=25&ucodeSPL=200", line, hwid, fmc): e.VEK,
				fmt.Sprintf("https://kdsintf.amd.com/vcek/v1/%s/cert_chain", line):                                                e.Chain,
				fmt.Sprintf("https://kdsintf.amd.com/vcek/v1/%s/crl", line):                                                       e.CRL,
			}
			c := a.config(t)
			c.Source = d
			bare := Evidence{Report: e.Report}
			wantPass(t, mustVerify(t, c, bare))

			v, err := New(c)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			cancel()
			wantStop(t, v.Verify(ctx, bare, Expectation{ReportData: &expectedData}), CheckVEK, Missing, context.Canceled.Error())

			for url := range d {
				d[url] = nil
			}
			wantStop(t, mustVerify(t, c, bare), CheckVEK, Missing, "nothing came")
		})
	}
	a := newAuthority(t, snp.LineMilan, snp.SignerVCEK)
	c := a.config(t)
	c.Source = directory{}
	a.Report.ChipID = [64]byte{}
	wantStop(t, mustVerify(t, c, Evidence{Report: a.sign(t)}), CheckVEK, Missing, "masks its chip id")
	a.Report.Version, a.Report.CPU = snp.Version2, snp.CPU{}
	wantStop(t, mustVerify(t, c, Evidence{Report: a.sign(t)}), CheckVEK, Missing, "version 2")
	a = newAuthority(t, snp.LineMilan, snp.SignerVLEK)
	c.Policy.Signer = policy.AnySigner
	wantStop(t, mustVerify(t, c, Evidence{Report: a.sign(t)}), CheckVEK, Missing, "not published")
	if got, want := kds.Chain(snp.LineTurin, snp.SignerVLEK).URL(), "https://kdsintf.amd.com/vlek/v1/Turin/cert_chain"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

func TestNew(t *testing.T) {
	for name, c := range map[string]Config{
		"nothing":        {},
		"no clock":       {Roots: AMD(), Policy: policy.Default()},
		"no roots":       {Now: now, Policy: policy.Default()},
		"no policy":      {Now: now, Roots: AMD()},
		"invalid policy": {Now: now, Roots: AMD(), Policy: func() policy.Policy { p := policy.Default(); p.VMPL = 4; return p }()},
	} {
		if _, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestErrorText(t *testing.T) {
	a := newAuthority(t, snp.LineMilan, snp.SignerVCEK)
	c := a.config(t)
	a.setExt(extBL, der(9))
	err := mustVerify(t, c, a.evidence(t)).Err()
	want := "snp: check tcb: fail: the certificate was issued for another TCB version than the report's " +
		"(expected bl 9 tee 1 snp 25 ucode 200, got bl 10 tee 1 snp 25 ucode 200)"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
	err = mustVerify(t, c, Evidence{}).Err()
	want = "snp: check report: malformed: snp report: report at offset 0x0: 0 bytes, want 1184"
	if err == nil || err.Error() != want {
		t.Errorf("got  %v\nwant %s", err, want)
	}
}

type real struct {
	name, vek, chain string
	line             snp.Line
}

var reals = []real{
	{"gosevguest-milan-v2-debugpolicy", "gosevguest-milan-v2", "milan", snp.LineMilan},
	{"trustee-milan-v2", "trustee-milan-v2", "milan", snp.LineMilan},
	{"oak-milan-v3", "oak-milan-v3", "milan", snp.LineMilan},
	{"trustee-siena-v3", "trustee-siena-v3", "genoa", snp.LineGenoa},
	{"oak-genoa-v5", "oak-genoa-v5", "genoa", snp.LineGenoa},
	{"oak-turin-v5", "oak-turin-v5", "turin_vcek", snp.LineTurin},
}

func (r real) evidence(t testing.TB) Evidence {
	t.Helper()
	return Evidence{
		Report: need.Fixture(t, "fixtures/"+r.name+".report"),
		VEK:    need.Fixture(t, "fixtures/"+r.vek+".vcek.der"),
		Chain:  need.Fixture(t, "fixtures/ask_ark_"+r.chain+".pem"),
	}
}

// amd's revocation lists are not among the fixtures.
func realConfig() Config {
	c := Config{Now: now, Roots: AMD(), Policy: lax()}
	c.Policy.CRL = policy.CRLSoft
	c.Policy.GuestPolicy.Debug, c.Policy.AllowProvisional = true, true
	return c
}

// verifyReal decides whether hardware made a report: measurement and data are the report's own, if it has any.
func verifyReal(t testing.TB, c Config, e Evidence) Result {
	t.Helper()
	x := Expectation{ReportData: &expectedData}
	if r, err := snp.Parse(e.Report); err == nil {
		c.Policy.Measurements, x.ReportData = []measure.Digest{r.Measurement}, &r.ReportData
	}
	v, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	return v.Verify(t.Context(), e, x)
}

func TestReal(t *testing.T) {
	for _, real := range reals {
		t.Run(real.name, func(t *testing.T) {
			e := real.evidence(t)
			r := verifyReal(t, realConfig(), e)
			wantPass(t, r)
			for _, c := range r.Checks {
				t.Logf("%-10s %-5s %s %s", c.ID, c.Status, c.Actual, c.Message)
			}
			if r.VEK.Line != real.line || r.VEK.Signer != snp.SignerVCEK {
				t.Errorf("got %s of %s", r.VEK.Signer, r.VEK.Line)
			}
			c := realConfig()
			c.Policy.CRL = policy.CRLRequire
			wantStop(t, verifyReal(t, c, e), CheckCRL, Missing, "no source")
			c = realConfig()
			c.Now = func() time.Time { return clock.AddDate(10, 0, 0) }
			wantStop(t, verifyReal(t, c, e), CheckValidity, Fail, "SEV-VCEK has expired")
			c.Now = func() time.Time { return clock.AddDate(-10, 0, 0) }
			wantStop(t, verifyReal(t, c, e), CheckValidity, Fail, "is not valid before")
		})
	}
}

// TestRealRoots reads AMD's chains for VCEKs and VLEKs, and wants the pinned keys in all of them.
func TestRealRoots(t *testing.T) {
	for name, line := range map[string]snp.Line{
		"milan": snp.LineMilan, "milan_vlek": snp.LineMilan,
		"genoa": snp.LineGenoa, "genoa_vlek": snp.LineGenoa,
		"turin_vcek": snp.LineTurin, "turin_vlek": snp.LineTurin,
	} {
		t.Run(name, func(t *testing.T) {
			c, err := parseChain(need.Fixture(t, "fixtures/ask_ark_"+name+".pem"))
			if err != nil {
				t.Fatal(err)
			}
			if got, want := fingerprint(c.ark), AMD().pin(line); got != want {
				t.Errorf("got %x, want %x", got, want)
			}
			ask := "SEV-" + line.String()
			if strings.HasSuffix(name, "_vlek") {
				ask = "SEV-VLEK-" + line.String()
			}
			if err := errors.Join(
				checkAuthority("ARK", c.ark, "ARK-"+line.String(), x509.KeyUsageCertSign|x509.KeyUsageCRLSign),
				checkAuthority("ASK", c.ask, ask, x509.KeyUsageCertSign),
				checkIssued("ARK", c.ark, c.ark),
				checkIssued("ASK", c.ask, c.ark),
			); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestRealCrossed gives each report every other certificate and every other chain.
func TestRealCrossed(t *testing.T) {
	for _, a := range reals {
		for _, b := range reals {
			if a == b {
				continue
			}
			e := a.evidence(t)
			e.VEK = b.evidence(t).VEK
			if r := verifyReal(t, realConfig(), e); r.Passed() {
				t.Errorf("%s passes with the certificate of %s", a.name, b.name)
			}
			e.Chain = b.evidence(t).Chain
			if r := verifyReal(t, realConfig(), e); r.Passed() {
				t.Errorf("%s passes with certificate and chain of %s", a.name, b.name)
			}
			if a.line != b.line {
				e = a.evidence(t)
				e.Chain = b.evidence(t).Chain
				wantStop(t, verifyReal(t, realConfig(), e), CheckRoot, Fail, "not the root")
			}
		}
		e := a.evidence(t)
		e.Chain = need.Fixture(t, "fixtures/ask_ark_"+strings.ToLower(a.line.String())+"_vlek.pem")
		wantStop(t, verifyReal(t, realConfig(), e), CheckChain, Fail, "ASK: subject")
	}
}

// TestRealMutations flips each byte of each real report: the report must be refused.
func TestRealMutations(t *testing.T) {
	for _, real := range reals {
		t.Run(real.name, func(t *testing.T) {
			t.Parallel()
			e := real.evidence(t)
			good := e.Report
			stopped := map[ID]int{}
			for i := range good {
				e.Report = bytes.Clone(good)
				e.Report[i] ^= 1 << (i % 8)
				var stop *Error
				if r := verifyReal(t, realConfig(), e); r.Passed() || !errors.As(r.Err(), &stop) {
					t.Fatalf("byte %#x flipped: %v", i, r.Err())
				}
				stopped[stop.Failed[0].ID]++
			}
			t.Logf("refused by: %v", stopped)
			e.Report = good
			wantPass(t, verifyReal(t, realConfig(), e))
		})
	}
}
