package verify

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"strings"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
)

// VEK is the certificate of a key that signs reports: a VCEK (of a chip) or a VLEK (of a cloud provider). Its fields
// are what the certificate claims; a Verifier checks that AMD says so.
type VEK struct {
	Certificate *x509.Certificate
	Signer      snp.Signer // SignerVCEK or SignerVLEK
	Line        snp.Line   // from the issuer's name
	Product     string     // AMD's name of the processor, such as Milan-B0
	TCB         snp.TCB    // the TCB version the key was derived for
	HWID        []byte     // VCEK only: 64 bytes, on Turin 8
	CSP         string     // VLEK only: the cloud provider

	key *ecdsa.PublicKey
}

// ParseVEK reads a certificate in DER. It wants a P-384 key that certifies no others, the names AMD gives to subject
// and issuer, all of AMD's extensions that the kind of key and the product line demand, each once, and none else of
// AMD's. It checks no signature and no date.
func ParseVEK(der []byte) (*VEK, error) {
	if len(der) > kds.MaxVEK {
		return nil, fmt.Errorf("vek certificate: %d bytes, more than %d", len(der), kds.MaxVEK)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("vek certificate: %w", err)
	}
	v := &VEK{Certificate: cert}
	if err := v.parseNames(); err != nil {
		return nil, fmt.Errorf("vek certificate: %w", err)
	}
	key, ok := cert.PublicKey.(*ecdsa.PublicKey)
	if !ok || key.Curve != elliptic.P384() {
		return nil, fmt.Errorf("vek certificate: %s key, want ECDSA on P-384", cert.PublicKeyAlgorithm)
	}
	v.key = key
	if cert.IsCA || cert.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0 {
		return nil, errors.New("vek certificate: its key may certify others")
	}
	if len(cert.UnhandledCriticalExtensions) != 0 {
		return nil, fmt.Errorf("vek certificate: unknown critical extension %s", cert.UnhandledCriticalExtensions[0])
	}
	if err := v.parseExtensions(cert.Extensions); err != nil {
		return nil, fmt.Errorf("vek certificate: %w", err)
	}
	return v, nil
}

// parseNames takes kind and line from subject and issuer: SEV-VCEK by SEV-Milan, SEV-VLEK by SEV-VLEK-Milan. (57230)
func (v *VEK) parseNames() error {
	subject, issuer := v.Certificate.Subject.CommonName, v.Certificate.Issuer.CommonName
	var line string
	var ok bool
	switch subject {
	case "SEV-VCEK":
		v.Signer = snp.SignerVCEK
		line, ok = strings.CutPrefix(issuer, "SEV-")
	case "SEV-VLEK":
		v.Signer = snp.SignerVLEK
		line, ok = strings.CutPrefix(issuer, "SEV-VLEK-")
	default:
		return fmt.Errorf("subject %q, want SEV-VCEK or SEV-VLEK", subject)
	}
	var err error
	if v.Line, err = snp.ParseLine(line); err != nil || !ok {
		return fmt.Errorf("issuer %q of a %s is not known", issuer, v.Signer)
	}
	return nil
}

// extension is a certificate extension of AMD's, named as in document 57230. What is left of an OID behind the prefix
// 1.3.6.1.4.1.3704.1 is its key.
type extension string

const (
	extVersion extension = "1"   // structure version, INTEGER 0 or 1
	extProduct extension = "2"   // product name, IA5String
	extBL      extension = "3.1" // parts of the TCB version, INTEGER 0 to 255 each
	extTEE     extension = "3.2"
	extSNP     extension = "3.3"
	extSPL4    extension = "3.4" // reserved parts, 0; Turin has no SPL4
	extSPL5    extension = "3.5"
	extSPL6    extension = "3.6"
	extSPL7    extension = "3.7"
	extUcode   extension = "3.8"
	extFMC     extension = "3.9" // Turin only
	extHWID    extension = "4"   // VCEK only: the bytes themselves, or an OCTET STRING of them
	extCSP     extension = "5"   // VLEK only: cloud provider, IA5String
)

var amd = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 3704, 1}

// wanted returns the extensions that a certificate of this kind and line must have; it may have no others of AMD's.
func (v *VEK) wanted() []extension {
	out := []extension{extVersion, extProduct, extBL, extTEE, extSNP, extSPL5, extSPL6, extSPL7, extUcode}
	if v.Line == snp.LineTurin {
		out = append(out, extFMC)
	} else {
		out = append(out, extSPL4)
	}
	if v.Signer == snp.SignerVLEK {
		return append(out, extCSP)
	}
	return append(out, extHWID)
}

func (v *VEK) parseExtensions(all []pkix.Extension) error {
	found := map[extension][]byte{}
	seen := map[string]bool{}
	for _, e := range all {
		id := e.Id.String()
		if seen[id] {
			return fmt.Errorf("extension %s stands twice", id)
		}
		seen[id] = true
		if key, ok := strings.CutPrefix(id, amd.String()+"."); ok {
			found[extension(key)] = e.Value
		}
	}
	wanted := v.wanted()
	for _, key := range wanted {
		if _, ok := found[key]; !ok {
			return fmt.Errorf("extension %s.%s is missing from a %s of %s", amd, key, v.Signer, v.Line)
		}
	}
	if len(found) != len(wanted) {
		for _, key := range wanted {
			delete(found, key)
		}
		for key := range found {
			return fmt.Errorf("extension %s.%s does not belong into a %s of %s", amd, key, v.Signer, v.Line)
		}
	}

	p := &values{found: found}
	if version := p.integer(extVersion); version > 1 {
		return fmt.Errorf("structure version %d, want 0 or 1", version)
	}
	v.Product = p.text(extProduct)
	for _, key := range []extension{extSPL4, extSPL5, extSPL6, extSPL7} {
		if _, ok := found[key]; ok && p.integer(key) != 0 {
			return fmt.Errorf("extension %s.%s is reserved and not 0", amd, key)
		}
	}
	v.TCB = snp.TCB{
		Layout:     v.Line.Layout(),
		Bootloader: p.integer(extBL),
		TEE:        p.integer(extTEE),
		SNP:        p.integer(extSNP),
		Microcode:  p.integer(extUcode),
	}
	if v.Line == snp.LineTurin {
		v.TCB.FMC = p.integer(extFMC)
	}
	if v.Signer == snp.SignerVLEK {
		v.CSP = p.text(extCSP)
	} else {
		v.HWID = p.hwid(v.Line.HWIDSize())
	}
	if p.err != nil {
		return p.err
	}
	if name := v.Line.String(); v.Product != name && !strings.HasPrefix(v.Product, name+"-") {
		return fmt.Errorf("product %q issued by %s", v.Product, name)
	}
	return nil
}

// values reads the values of extensions; the first error stays.
type values struct {
	found map[extension][]byte
	err   error
}

func (p *values) fail(key extension, format string, args ...any) {
	if p.err == nil {
		p.err = fmt.Errorf("extension %s.%s: %s", amd, key, fmt.Sprintf(format, args...))
	}
}

func (p *values) integer(key extension) uint8 {
	var n int
	rest, err := asn1.Unmarshal(p.found[key], &n)
	if err != nil || len(rest) != 0 || n < 0 || n > 255 {
		p.fail(key, "%x is no INTEGER from 0 to 255", p.found[key])
		return 0
	}
	return uint8(n)
}

func (p *values) text(key extension) string {
	var s string
	rest, err := asn1.UnmarshalWithParams(p.found[key], &s, "ia5")
	if err != nil || len(rest) != 0 || p.found[key][0] != asn1.TagIA5String || s == "" {
		p.fail(key, "%x is no IA5String", p.found[key])
		return ""
	}
	return s
}

// hwid takes n bytes as they are, or as an OCTET STRING; the lengths tell which.
func (p *values) hwid(n int) []byte {
	b := p.found[extHWID]
	if len(b) == n+2 && b[0] == asn1.TagOctetString && int(b[1]) == n {
		b = b[2:]
	}
	if len(b) != n {
		p.fail(extHWID, "%d bytes, want %d", len(b), n)
		return nil
	}
	for _, v := range b {
		if v != 0 {
			return b
		}
	}
	p.fail(extHWID, "names no chip")
	return nil
}
