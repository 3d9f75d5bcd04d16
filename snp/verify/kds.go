package verify

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/kcradle/kcradle/snp"
)

// Source hands out what AMD's key distribution service publishes: over the network, from a cache, or from a directory.
// What it returns is not trusted.
type Source interface {
	// Fetch returns the body under url, one of VCEKURL, ChainURL and CRLURL.
	Fetch(ctx context.Context, url string) ([]byte, error)
}

// kds is AMD's key distribution service (document 57230).
const kds = "https://kdsintf.amd.com"

// VCEKURL returns where the certificate (DER) of a chip's key at a TCB version is. hwid is the chip's id, HWIDSize bytes
// of the line. AMD signs the certificate when it is asked for, and answers only a few such questions a minute.
func VCEKURL(l snp.Line, hwid []byte, t snp.TCB) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s/vcek/v1/%s/%x?", kds, l, hwid)
	if l == snp.LineTurin {
		fmt.Fprintf(&b, "fmcSPL=%02d&", t.FMC)
	}
	fmt.Fprintf(&b, "blSPL=%02d&teeSPL=%02d&snpSPL=%02d&ucodeSPL=%02d", t.Bootloader, t.TEE, t.SNP, t.Microcode)
	return b.String()
}

// ChainURL returns where ASK (of VLEKs: ASVK) and ARK of a line are, PEM.
func ChainURL(l snp.Line, s snp.Signer) string { return issuerURL(l, s) + "/cert_chain" }

// CRLURL returns where the revocation list of a line is, DER.
func CRLURL(l snp.Line, s snp.Signer) string { return issuerURL(l, s) + "/crl" }

func issuerURL(l snp.Line, s snp.Signer) string {
	return fmt.Sprintf("%s/%s/v1/%s", kds, strings.ToLower(s.String()), l)
}

var errNoSource = errors.New("not given, and there is no source to ask")

// fetch asks the source, if there is one.
func (s *session) fetch(ctx context.Context, url string) ([]byte, error) {
	if s.Source == nil {
		return nil, fmt.Errorf("%s: %w", url, errNoSource)
	}
	b, err := s.Source.Fetch(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", url, err)
	}
	if len(b) == 0 {
		return nil, fmt.Errorf("fetch %s: nothing came", url)
	}
	return b, nil
}

// vekURL returns where the certificate of the key that signed r is.
func vekURL(r *snp.Report) (string, error) {
	if r.KeyInfo.Signer() != snp.SignerVCEK {
		return "", errors.New("the certificate of a VLEK is not published: it has to come with the report")
	}
	l := r.Product().Line()
	if l == snp.LineUnknown {
		return "", errors.New("a report of version 2 does not name its processor: the certificate has to come with it")
	}
	if r.ChipID == ([64]byte{}) {
		return "", errors.New("the platform masks its chip id: the certificate has to come with the report")
	}
	return VCEKURL(l, r.ChipID[:l.HWIDSize()], r.ReportedTCB), nil
}
