package verify

import (
	"bytes"
	"crypto/x509"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/sim"
)

func TestChain(t *testing.T) {
	_, foreign := testKeys()
	a := newAuthority(t, snp.LineGenoa, snp.SignerVCEK)
	c, err := a.roots(t).ParseChain(snp.LineGenoa, snp.SignerVCEK, a.chainPEM(t))
	if err != nil {
		t.Fatal(err)
	}
	if c.ASK.Subject.CommonName != "SEV-Genoa" || c.ARK.Subject.CommonName != "ARK-Genoa" {
		t.Errorf("got %s below %s", c.ASK.Subject, c.ARK.Subject)
	}

	wantErr := func(name string, err error, want string) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want …%s…", name, err, want)
		}
	}
	roots := a.roots(t)
	all := Roots{Milan: roots.Genoa, Genoa: roots.Genoa, Turin: roots.Genoa}
	_, err = roots.ParseChain(snp.LineGenoa, snp.SignerVCEK, []byte("rubbish"))
	wantErr("rubbish", err, "certificate 1 of 2")
	_, err = AMD().ParseChain(snp.LineGenoa, snp.SignerVCEK, a.chainPEM(t))
	wantErr("against AMD's roots", err, "not the root of Genoa")
	_, err = roots.ParseChain(snp.LineMilan, snp.SignerVCEK, a.chainPEM(t))
	wantErr("line that is not trusted", err, "not the root of Milan")
	_, err = roots.ParseChain(snp.LineUnknown, snp.SignerVCEK, a.chainPEM(t))
	wantErr("no line", err, "not the root")
	_, err = all.ParseChain(snp.LineMilan, snp.SignerVCEK, a.chainPEM(t))
	wantErr("another line with the same key", err, `subject "ARK-Genoa"`)
	_, err = roots.ParseChain(snp.LineGenoa, snp.SignerVLEK, a.chainPEM(t))
	wantErr("chain of VCEKs for VLEKs", err, `ASK: subject "SEV-Genoa"`)
	_, err = roots.ParseChain(snp.LineGenoa, snp.SignerVCEK, append(toPEM(a.under(sim.Keys{ARK: foreign, ASK: a.Keys.ASK}).askDER(t)), toPEM(a.arkDER(t))...))
	wantErr("ASK of somebody", err, "ASK: not signed")

	vek, err := ParseVEK(a.vekDER(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.CheckVEK(vek); err != nil {
		t.Error(err)
	}
	if vek, err = ParseVEK(a.under(sim.Keys{ASK: foreign}).vekDER(t)); err != nil {
		t.Fatal(err)
	}
	wantErr("VEK of somebody", c.CheckVEK(vek), "VCEK: not signed")
	if vek, err = ParseVEK(newAuthority(t, snp.LineMilan, snp.SignerVCEK).vekDER(t)); err != nil {
		t.Fatal(err)
	}
	wantErr("VEK of another line", c.CheckVEK(vek), `subject "ARK-Genoa"`)

	list, err := c.ParseCRL(a.crl(t, nil, a.Keys.ARK, 5))
	if err != nil {
		t.Fatal(err)
	}
	if err := c.CheckRevoked(list); err != nil {
		t.Error(err)
	}
	// A list that revokes the chain is a good list, and has to be kept more than any other.
	if list, err = c.ParseCRL(a.crl(t, nil, a.Keys.ARK, 0x10001)); err != nil {
		t.Fatal(err)
	}
	wantErr("revoked", c.CheckRevoked(list), "SEV-Genoa was revoked")
	_, err = c.ParseCRL(a.crl(t, nil, foreign))
	wantErr("list of somebody", err, "not signed")
	_, err = c.ParseCRL(append(a.crl(t, nil, a.Keys.ARK), 0))
	wantErr("bytes behind the list", err, "behind")
	_, err = c.ParseCRL(bytes.Repeat([]byte{0}, 10))
	wantErr("no list", err, "revocation list: ")
	_, err = c.ParseCRL(a.crl(t, func(l *x509.RevocationList) { l.SignatureAlgorithm = x509.SHA256WithRSA }, a.Keys.ARK))
	wantErr("weaker signature", err, "signed with")
}

// TestRealChain holds AMD's own chains and certificates against each other.
func TestRealChain(t *testing.T) {
	for _, real := range reals {
		c, err := AMD().ParseChain(real.line, snp.SignerVCEK, need.Fixture(t, "fixtures/ask_ark_"+real.chain+".pem"))
		if err != nil {
			t.Errorf("%s: %v", real.name, err)
			continue
		}
		v, err := ParseVEK(need.Fixture(t, "fixtures/"+real.vek+".vcek.der"))
		if err != nil {
			t.Fatal(err)
		}
		if err := c.CheckVEK(v); err != nil {
			t.Errorf("%s: %v", real.name, err)
		}
	}
}
