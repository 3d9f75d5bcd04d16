package verify

import (
	"bytes"
	"context"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/policy"
)

// Fingerprint is the SHA-256 of a public key in DER (SubjectPublicKeyInfo). It outlives the certificate around the key.
type Fingerprint [sha256.Size]byte

// Roots pins the root key (ARK) of each product line. A line with a zero Fingerprint is not trusted.
type Roots struct {
	Milan Fingerprint
	Genoa Fingerprint // also Bergamo and Siena
	Turin Fingerprint
}

// AMD returns AMD's own roots. The certificates come with every chain that AMD's key distribution service hands out
// (kds.Chain); these are the keys in them:
//
//	curl https://kdsintf.amd.com/vcek/v1/Milan/cert_chain | awk '/BEGIN/{n++} n==2' |
//	  openssl x509 -noout -pubkey | openssl pkey -pubin -outform der | sha256sum
func AMD() Roots {
	return Roots{
		Milan: pinned("9f056bee44377e29308cb5ffa895bdfb62d18881fa6bed8d6f075b0204089cb9"),
		Genoa: pinned("429a69c9422aa258ee4d8db5fcda9c6470ef15f8cd5a9cebd6cbc7d90b863831"),
		Turin: pinned("4f125410563a2ab9a50356f9243f6fe0b6f73de98603f53f90339c70e9d7ad08"),
	}
}

func pinned(s string) (f Fingerprint) {
	if n, err := hex.Decode(f[:], []byte(s)); err != nil || n != len(f) {
		panic("verify: internal error: fingerprint " + s)
	}
	return f
}

func (r Roots) pin(l snp.Line) Fingerprint {
	switch l {
	case snp.LineMilan:
		return r.Milan
	case snp.LineGenoa:
		return r.Genoa
	case snp.LineTurin:
		return r.Turin
	}
	return Fingerprint{}
}

func fingerprint(c *x509.Certificate) Fingerprint { return sha256.Sum256(c.RawSubjectPublicKeyInfo) }

// chain is the two certificates above a VEK.
type chain struct {
	ask *x509.Certificate // AMD SEV key (of VLEKs: ASVK), signs VEKs
	ark *x509.Certificate // AMD root key, signs itself, the ASK and the revocation list
}

// parseChain reads exactly two certificates in PEM, with nothing but white space around them. (57230, "cert_chain")
func parseChain(b []byte) (*chain, error) {
	if len(b) > kds.MaxChain {
		return nil, fmt.Errorf("certificate chain: %d bytes, more than %d", len(b), kds.MaxChain)
	}
	var certs [2]*x509.Certificate
	for i := range certs {
		b = bytes.TrimSpace(b)
		block, rest := pem.Decode(b)
		if block == nil || block.Type != "CERTIFICATE" || len(block.Headers) != 0 || !bytes.HasPrefix(b, []byte("-----BEGIN CERTIFICATE-----")) {
			return nil, fmt.Errorf("certificate chain: certificate %d of %d is no PEM", i+1, len(certs))
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate chain: certificate %d of %d: %w", i+1, len(certs), err)
		}
		certs[i], b = cert, rest
	}
	if len(bytes.TrimSpace(b)) != 0 {
		return nil, errors.New("certificate chain: more than ASK and ARK")
	}
	return &chain{ask: certs[0], ark: certs[1]}, nil
}

// check holds the chain from v up to its root against what each place demands. Precondition: the ARK's key is pinned.
func (c *chain) check(v *VEK) error {
	if err := c.checkAuthorities(v.Line, v.Signer); err != nil {
		return err
	}
	return checkIssued(v.Signer.String(), v.Certificate, c.ask)
}

// checkAuthorities is check without a VEK.
func (c *chain) checkAuthorities(l snp.Line, s snp.Signer) error {
	ask := "SEV-" + l.String()
	if s == snp.SignerVLEK {
		ask = "SEV-VLEK-" + l.String()
	}
	if err := checkAuthority("ARK", c.ark, "ARK-"+l.String(), x509.KeyUsageCertSign|x509.KeyUsageCRLSign); err != nil {
		return err
	}
	if err := checkAuthority("ASK", c.ask, ask, x509.KeyUsageCertSign); err != nil {
		return err
	}
	if c.ask.MaxPathLen != 0 || !c.ask.MaxPathLenZero {
		return errors.New("ASK: it may certify other authorities")
	}
	if err := checkIssued("ARK", c.ark, c.ark); err != nil {
		return err
	}
	return checkIssued("ASK", c.ask, c.ark)
}

// checkAuthority wants an RSA-4096 certificate authority of the given name that may be used as said.
func checkAuthority(what string, c *x509.Certificate, name string, usage x509.KeyUsage) error {
	if c.Subject.CommonName != name {
		return fmt.Errorf("%s: subject %q, want %q", what, c.Subject.CommonName, name)
	}
	if key, ok := c.PublicKey.(*rsa.PublicKey); !ok || key.N.BitLen() != 4096 {
		return fmt.Errorf("%s: its key is not RSA of 4096 bits", what)
	}
	if !c.BasicConstraintsValid || !c.IsCA {
		return fmt.Errorf("%s: it is no certificate authority", what)
	}
	if c.KeyUsage&usage != usage {
		return fmt.Errorf("%s: its key may not be used to sign certificates or revocation lists", what)
	}
	if len(c.UnhandledCriticalExtensions) != 0 {
		return fmt.Errorf("%s: unknown critical extension %s", what, c.UnhandledCriticalExtensions[0])
	}
	return nil
}

// checkIssued wants c to name issuer and to be signed by its key with RSA-PSS and SHA-384.
func checkIssued(what string, c, issuer *x509.Certificate) error {
	if !bytes.Equal(c.RawIssuer, issuer.RawSubject) {
		return fmt.Errorf("%s: issued by %q, not by %q", what, c.Issuer.CommonName, issuer.Subject.CommonName)
	}
	if c.SignatureAlgorithm != x509.SHA384WithRSAPSS {
		return fmt.Errorf("%s: signed with %s, want %s", what, c.SignatureAlgorithm, x509.SHA384WithRSAPSS)
	}
	if err := c.CheckSignatureFrom(issuer); err != nil {
		return fmt.Errorf("%s: not signed by %q: %w", what, issuer.Subject.CommonName, err)
	}
	return nil
}

func (c *chain) checkValidity(v *VEK, now time.Time) error {
	for _, cert := range []*x509.Certificate{v.Certificate, c.ask, c.ark} {
		if now.Before(cert.NotBefore) {
			return fmt.Errorf("%s is not valid before %s", cert.Subject.CommonName, cert.NotBefore.Format(time.RFC3339))
		}
		if now.After(cert.NotAfter) {
			return fmt.Errorf("%s has expired on %s", cert.Subject.CommonName, cert.NotAfter.Format(time.RFC3339))
		}
	}
	return nil
}

// checkCRL looks for the ASK and the ARK in the root's revocation list. VEKs are not in it: their serial number is 0.
//
// The source is asked first: who hands in evidence may hand in a list of before the revocation with it, which is good until
// it expires. A list of either that revokes something, or is none, ends the matter.
func (s *session) checkCRL(ctx context.Context) Check {
	if s.Policy.CRL == policy.CRLOff {
		return Check{Status: Open, Message: "the policy wants no revocation list"}
	}
	var c Check
	if s.Source != nil || len(s.Evidence.CRL) == 0 {
		der, err := s.fetch(ctx, kds.CRL(s.vek.Line, s.vek.Signer))
		hard := false
		if err != nil {
			c = missing(err)
		} else if c, hard = s.checkOneCRL(der); hard {
			return c
		}
	}
	if len(s.Evidence.CRL) > 0 {
		given, hard := s.checkOneCRL(s.Evidence.CRL)
		if hard || c.Status != Pass {
			c = given
		}
		if hard {
			return c
		}
	}
	if c.Status != Pass && s.Policy.CRL == policy.CRLSoft {
		c.Status = Warn
	}
	return c
}

// checkOneCRL looks at one list. Whether there is a current one is a matter of the policy; what is hard is not.
func (s *session) checkOneCRL(der []byte) (c Check, hard bool) {
	list, err := parseList(der)
	if err != nil {
		return Check{Status: Malformed, Message: "revocation list: " + err.Error()}, true
	}
	if err = s.chain.checkList(list); err == nil {
		err = s.chain.checkRevoked(list)
	}
	if err != nil {
		return Check{Status: Fail, Message: "revocation list: " + err.Error()}, true
	}
	c = Check{Status: Pass, Actual: fmt.Sprintf("list of %s", list.ThisUpdate.UTC().Format(time.RFC3339))}
	switch {
	case s.now.Before(list.ThisUpdate):
		c.Status, c.Message = Fail, fmt.Sprintf("the revocation list is not valid before %s", list.ThisUpdate.Format(time.RFC3339))
	case list.NextUpdate.IsZero():
		c.Status, c.Message = Fail, "the revocation list does not say until when it is valid"
	case s.now.After(list.NextUpdate):
		c.Status, c.Message = Fail, fmt.Sprintf("the revocation list has expired on %s", list.NextUpdate.Format(time.RFC3339))
	}
	return c, false
}

// parseList reads a revocation list and nothing behind it.
func parseList(der []byte) (*x509.RevocationList, error) {
	if len(der) > kds.MaxCRL {
		return nil, fmt.Errorf("%d bytes, more than %d", len(der), kds.MaxCRL)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		return nil, err
	}
	if len(list.Raw) != len(der) {
		return nil, fmt.Errorf("%d bytes stand behind it", len(der)-len(list.Raw))
	}
	return list, nil
}

// checkList wants the ARK to have signed list, and list to be a complete one.
func (c *chain) checkList(list *x509.RevocationList) error {
	if !bytes.Equal(list.RawIssuer, c.ark.RawSubject) {
		return fmt.Errorf("issued by %q, not by %q", list.Issuer.CommonName, c.ark.Subject.CommonName)
	}
	if list.SignatureAlgorithm != x509.SHA384WithRSAPSS {
		return fmt.Errorf("signed with %s, want %s", list.SignatureAlgorithm, x509.SHA384WithRSAPSS)
	}
	if err := list.CheckSignatureFrom(c.ark); err != nil {
		return fmt.Errorf("not signed by %q: %w", c.ark.Subject.CommonName, err)
	}
	// A list of parts, of changes, or of several issuers is marked by a critical extension.
	for _, e := range list.Extensions {
		if e.Critical {
			return fmt.Errorf("unknown critical extension %s", e.Id)
		}
	}
	for _, entry := range list.RevokedCertificateEntries {
		for _, e := range entry.Extensions {
			if e.Critical {
				return fmt.Errorf("unknown critical extension %s", e.Id)
			}
		}
	}
	return nil
}

// checkRevoked wants list to name no certificate of the chain.
func (c *chain) checkRevoked(list *x509.RevocationList) error {
	for _, entry := range list.RevokedCertificateEntries {
		for _, cert := range []*x509.Certificate{c.ask, c.ark} {
			if entry.SerialNumber.Cmp(cert.SerialNumber) == 0 {
				return fmt.Errorf("%s was revoked on %s", cert.Subject.CommonName, entry.RevocationTime.Format(time.RFC3339))
			}
		}
	}
	return nil
}
