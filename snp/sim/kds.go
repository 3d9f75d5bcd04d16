package sim

import (
	"context"
	"fmt"
	"net/http"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
)

// KDS is the key distribution service: what is published, by address. It can be asked as a verify.Source and over HTTP.
type KDS map[string][]byte

// Publish adds what the service has of a chip: its certificate unless it is a VLEK, which AMD does not publish; the chain
// above it; and a revocation list that revokes nothing.
func (k KDS) Publish(c *Chip) error {
	a := c.Authority
	if a.Signer == snp.SignerVCEK {
		vek, err := c.VEKDER()
		if err != nil {
			return err
		}
		k[c.Object().URL()] = vek
	}
	chain, err := a.Chain()
	if err != nil {
		return err
	}
	crl, err := a.CRL()
	if err != nil {
		return err
	}
	k[kds.Chain(a.Line, a.Signer).URL()], k[kds.CRL(a.Line, a.Signer).URL()] = chain, crl
	return nil
}

// Fetch returns what is published under o.
func (k KDS) Fetch(ctx context.Context, o kds.Object) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	b, ok := k[o.URL()]
	if !ok {
		return nil, fmt.Errorf("sim: %s is not published", o)
	}
	return b, nil
}

// ServeHTTP answers as the service does: the path says what is wanted, the host does not matter.
func (k KDS) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b, ok := k[kds.Service+r.URL.RequestURI()]
	if !ok || r.Method != http.MethodGet {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	_, _ = w.Write(b) // who hangs up misses the rest
}
