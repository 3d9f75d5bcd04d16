// Package sim stands in for AMD and its hardware, in tests and demonstrations: an authority with the shape of AMD's, chips
// that sign reports, the key distribution service, and the report files of a guest's kernel.
//
//	keys, err := sim.NewKeys() // takes seconds
//	amd := sim.NewAuthority(keys, snp.LineGenoa, snp.SignerVCEK, time.Now())
//	chip, err := amd.NewChip(1)
//	chip.Report.Measurement = digest
//	report, err := chip.Attest(reportData, 0)
//
// Nothing here protects anything. Who verifies with AMD's roots (verify.AMD) refuses all of it; a test or a demonstration
// has to trust Authority.Root on purpose.
//
// The simple doors make what must pass. To make what must fail, change the templates (exported fields) before asking for
// bytes.
package sim

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"time"

	"github.com/kcradle/kcradle/snp"
)

// Keys are the RSA keys of an authority, 4096 bits each as AMD's are.
type Keys struct {
	ARK *rsa.PrivateKey // root
	ASK *rsa.PrivateKey // of AMD's SEV key, or of VLEKs (ASVK)
}

// NewKeys makes keys, which takes seconds. One pair serves any number of authorities, one after the other or at once.
func NewKeys() (Keys, error) {
	var k Keys
	var errs [2]error
	var wg sync.WaitGroup
	for i, key := range []**rsa.PrivateKey{&k.ARK, &k.ASK} {
		wg.Go(func() { *key, errs[i] = rsa.GenerateKey(rand.Reader, 4096) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return Keys{}, fmt.Errorf("sim: %w", err)
		}
	}
	return k, nil
}

// Authority is AMD for one product line and one kind of key: a root (ARK) and, below it, what signs the certificates of
// chips (ASK) or of cloud providers (ASVK). It may be used by several goroutines while nobody changes its fields.
type Authority struct {
	Keys   Keys
	Line   snp.Line
	Signer snp.Signer
	Now    time.Time         // certificates are valid from a year before to a year behind it, a list from a day before for a month
	ARK    *x509.Certificate // template
	ASK    *x509.Certificate // template
}

// NewAuthority returns the authority of a line for VCEKs or VLEKs at an instant.
func NewAuthority(k Keys, l snp.Line, s snp.Signer, now time.Time) *Authority {
	a := &Authority{Keys: k, Line: l, Signer: s, Now: now}
	ask := "SEV-" + l.String()
	if s == snp.SignerVLEK {
		ask = "SEV-VLEK-" + l.String()
	}
	a.ARK = a.template("ARK-"+l.String(), 0x10000)
	a.ARK.IsCA, a.ARK.BasicConstraintsValid, a.ARK.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	a.ASK = a.template(ask, 0x10001)
	a.ASK.IsCA, a.ASK.BasicConstraintsValid, a.ASK.KeyUsage, a.ASK.MaxPathLenZero = true, true, x509.KeyUsageCertSign, true
	return a
}

// template is what all certificates share. Names are AMD's as far as verifiers look at them; the rest says what it is.
func (a *Authority) template(name string, serial int64) *x509.Certificate {
	return &x509.Certificate{
		SerialNumber: big.NewInt(serial),
		Subject: pkix.Name{
			Country:            []string{"US"},
			Organization:       []string{"Simulation of Advanced Micro Devices"},
			OrganizationalUnit: []string{"no hardware stands behind this"},
			CommonName:         name,
		},
		NotBefore:          a.Now.AddDate(-1, 0, 0),
		NotAfter:           a.Now.AddDate(1, 0, 0),
		SignatureAlgorithm: x509.SHA384WithRSAPSS,
	}
}

// Root returns what a verifier pins (verify.Roots): the SHA-256 of the root's public key.
func (a *Authority) Root() ([sha256.Size]byte, error) {
	b, err := x509.MarshalPKIXPublicKey(a.Keys.ARK.Public())
	if err != nil {
		return [sha256.Size]byte{}, fmt.Errorf("sim: %w", err)
	}
	return sha256.Sum256(b), nil
}

// RootDER returns the root's certificate, signed by itself.
func (a *Authority) RootDER() ([]byte, error) {
	return certify(a.ARK, a.ARK, a.Keys.ARK.Public(), a.Keys.ARK)
}

// ASKDER returns the certificate of the key below the root.
func (a *Authority) ASKDER() ([]byte, error) {
	return certify(a.ASK, a.ARK, a.Keys.ASK.Public(), a.Keys.ARK)
}

// Chain returns both certificates as the key distribution service does: ASK, then ARK, PEM.
func (a *Authority) Chain() ([]byte, error) {
	ask, err := a.ASKDER()
	if err != nil {
		return nil, err
	}
	ark, err := a.RootDER()
	if err != nil {
		return nil, err
	}
	return slices.Concat(PEM(ask), PEM(ark)), nil
}

// PEM wraps a certificate.
func PEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// CRL returns the revocation list of the root, DER, with the certificates of the given serial numbers revoked.
func (a *Authority) CRL(revoked ...int64) ([]byte, error) {
	return a.SignCRL(a.CRLTemplate(revoked...))
}

// CRLTemplate returns the list that CRL signs.
func (a *Authority) CRLTemplate(revoked ...int64) *x509.RevocationList {
	list := &x509.RevocationList{
		Number:             big.NewInt(1),
		ThisUpdate:         a.Now.AddDate(0, 0, -1),
		NextUpdate:         a.Now.AddDate(0, 1, 0),
		SignatureAlgorithm: x509.SHA384WithRSAPSS,
	}
	for _, serial := range revoked {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: big.NewInt(serial), RevocationTime: a.Now.AddDate(0, 0, -2)})
	}
	return list
}

// SignCRL signs any list, also one that a verifier must refuse.
func (a *Authority) SignCRL(list *x509.RevocationList) ([]byte, error) {
	issuer := *a.ARK // CreateRevocationList looks at these fields of it, and refuses what the ARK's template may lack
	issuer.SubjectKeyId, issuer.KeyUsage = []byte{1}, x509.KeyUsageCRLSign
	b, err := x509.CreateRevocationList(rand.Reader, list, &issuer, a.Keys.ARK)
	if err != nil {
		return nil, fmt.Errorf("sim: sign revocation list: %w", err)
	}
	return b, nil
}

func certify(template, parent *x509.Certificate, public any, key *rsa.PrivateKey) ([]byte, error) {
	b, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		return nil, fmt.Errorf("sim: certify %s: %w", template.Subject.CommonName, err)
	}
	return b, nil
}
