package verify

import (
	"crypto/x509"
	"fmt"

	"github.com/kcradle/kcradle/snp"
)

// Chain is what stands above the keys of a product line: two certificates, each what its place demands and signed as it
// must be, the upper one with a pinned key. It is for whoever keeps certificates (package certs); a Verifier makes its own.
type Chain struct {
	ASK *x509.Certificate // AMD SEV key, or of VLEKs the ASVK
	ARK *x509.Certificate // root
}

// ParseChain reads ASK and ARK, PEM, and wants them to be the chain of a line and a kind of key up to the line's root in r.
// It checks no date.
func (r Roots) ParseChain(l snp.Line, s snp.Signer, pem []byte) (*Chain, error) {
	c, err := parseChain(pem)
	if err != nil {
		return nil, err
	}
	if pin := r.pin(l); pin == (Fingerprint{}) || pin != fingerprint(c.ark) {
		return nil, fmt.Errorf("certificate chain: it ends in a key that is not the root of %s", l)
	}
	if err := c.checkAuthorities(l, s); err != nil {
		return nil, fmt.Errorf("certificate chain: %w", err)
	}
	return &Chain{ASK: c.ask, ARK: c.ark}, nil
}

func (c *Chain) chain() *chain { return &chain{ask: c.ASK, ark: c.ARK} }

// CheckVEK wants v to be issued by the chain's ASK. It checks no date.
func (c *Chain) CheckVEK(v *VEK) error { return c.chain().check(v) }

// ParseCRL reads a revocation list, DER, and wants it to be a complete one that the chain's ARK signed. It checks no date,
// and not whom the list revokes.
func (c *Chain) ParseCRL(der []byte) (*x509.RevocationList, error) {
	list, err := parseList(der)
	if err == nil {
		err = c.chain().checkList(list)
	}
	if err != nil {
		return nil, fmt.Errorf("revocation list: %w", err)
	}
	return list, nil
}

// CheckRevoked wants a list of ParseCRL to revoke neither certificate of the chain.
func (c *Chain) CheckRevoked(list *x509.RevocationList) error { return c.chain().checkRevoked(list) }
