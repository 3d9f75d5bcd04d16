package verify

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha512"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kcradle/kcradle/snp"
)

// clock is the instant that all tests hold certificates against.
var clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func now() time.Time { return clock }

// rsaKeys are made once: RSA keys of 4096 bits take seconds. The third belongs to nobody whom a test trusts.
var rsaKeys = sync.OnceValue(func() [3]*rsa.PrivateKey {
	var keys [3]*rsa.PrivateKey
	var wg sync.WaitGroup
	for i := range keys {
		wg.Go(func() {
			key, err := rsa.GenerateKey(rand.Reader, 4096)
			if err != nil {
				panic(err)
			}
			keys[i] = key
		})
	}
	wg.Wait()
	return keys
})

// authority has the shape of AMD's: an ARK, an ASK below it, and a key of a chip below that. Tests change the templates
// before they ask for certificates.
type authority struct {
	line           snp.Line
	arkKey, askKey *rsa.PrivateKey
	vekKey         *ecdsa.PrivateKey
	ark, ask, vek  *x509.Certificate // templates
	exts           []pkix.Extension  // of the VEK
	report         snp.Report        // template, unsigned
}

// newAuthority returns the authority of a line whose one chip and one report fit together.
func newAuthority(t testing.TB, line snp.Line, s snp.Signer) *authority {
	t.Helper()
	keys := rsaKeys()
	vekKey, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := &authority{line: line, arkKey: keys[0], askKey: keys[1], vekKey: vekKey}
	name := func(cn string) pkix.Name {
		return pkix.Name{CommonName: cn, Organization: []string{"Advanced Micro Devices"}, Country: []string{"US"}}
	}
	template := func(cn string, serial int64) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber:       big.NewInt(serial),
			Subject:            name(cn),
			NotBefore:          clock.AddDate(-1, 0, 0),
			NotAfter:           clock.AddDate(1, 0, 0),
			SignatureAlgorithm: x509.SHA384WithRSAPSS,
		}
	}
	ask := "SEV-" + line.String()
	if s == snp.SignerVLEK {
		ask = "SEV-VLEK-" + line.String()
	}
	a.ark = template("ARK-"+line.String(), 0x10000)
	a.ark.IsCA, a.ark.BasicConstraintsValid, a.ark.KeyUsage = true, true, x509.KeyUsageCertSign|x509.KeyUsageCRLSign
	a.ask = template(ask, 0x10001)
	a.ask.IsCA, a.ask.BasicConstraintsValid, a.ask.KeyUsage, a.ask.MaxPathLenZero = true, true, x509.KeyUsageCertSign, true
	a.vek = template("SEV-"+s.String(), 1)

	a.report = snp.Report{
		Version:       snp.Version3,
		Policy:        snp.PolicyReserved1 | snp.PolicySMT,
		SignatureAlgo: snp.AlgoECDSAP384SHA384,
		KeyInfo:       snp.NewKeyInfo(false, false, s),
	}
	tcb := snp.TCB{Layout: line.Layout(), Bootloader: 10, TEE: 1, SNP: 25, Microcode: 200}
	switch line {
	case snp.LineMilan:
		a.report.CPU = snp.CPU{Family: 0x19, Model: 0x01, Stepping: 1}
	case snp.LineGenoa:
		a.report.CPU = snp.CPU{Family: 0x19, Model: 0x11, Stepping: 1}
	case snp.LineTurin:
		a.report.CPU = snp.CPU{Family: 0x1a, Model: 0x02, Stepping: 1}
		tcb.FMC = 2
	}
	a.report.CurrentTCB, a.report.ReportedTCB, a.report.CommittedTCB, a.report.LaunchTCB = tcb, tcb, tcb, tcb
	var hwid []byte
	if s == snp.SignerVCEK {
		for i := range line.HWIDSize() {
			hwid = append(hwid, byte(i+1))
		}
	}
	copy(a.report.ChipID[:], hwid)
	a.exts = extensions(line, s, tcb, hwid)
	return a
}

// extensions returns AMD's extensions of a VEK.
func extensions(line snp.Line, s snp.Signer, t snp.TCB, hwid []byte) []pkix.Extension {
	out := []pkix.Extension{
		ext(extVersion, der(0)),
		ext(extProduct, ia5(line.String()+"-B0")),
		ext(extBL, der(int(t.Bootloader))),
		ext(extTEE, der(int(t.TEE))),
		ext(extSNP, der(int(t.SNP))),
		ext(extSPL5, der(0)),
		ext(extSPL6, der(0)),
		ext(extSPL7, der(0)),
		ext(extUcode, der(int(t.Microcode))),
	}
	if line == snp.LineTurin {
		out = append(out, ext(extFMC, der(int(t.FMC))))
	} else {
		out = append(out, ext(extSPL4, der(0)))
	}
	if s == snp.SignerVLEK {
		return append(out, ext(extCSP, ia5("cloud")))
	}
	return append(out, ext(extHWID, hwid))
}

func ext(key extension, value []byte) pkix.Extension {
	ids := map[extension][]int{extVersion: {1}, extProduct: {2}, extBL: {3, 1}, extTEE: {3, 2}, extSNP: {3, 3}, extSPL4: {3, 4}, extSPL5: {3, 5},
		extSPL6: {3, 6}, extSPL7: {3, 7}, extUcode: {3, 8}, extFMC: {3, 9}, extHWID: {4}, extCSP: {5}}
	return pkix.Extension{Id: slices.Concat(amd, ids[key]), Value: value}
}

func der(v any) []byte {
	b, err := asn1.Marshal(v)
	if err != nil {
		panic(err)
	}
	return b
}

func ia5(s string) []byte { return append([]byte{asn1.TagIA5String, byte(len(s))}, s...) }

// setExt replaces the value of an extension.
func (a *authority) setExt(key extension, value []byte) {
	e := ext(key, value)
	i := slices.IndexFunc(a.exts, func(x pkix.Extension) bool { return x.Id.Equal(e.Id) })
	if i < 0 {
		a.exts = append(a.exts, e)
	} else {
		a.exts[i] = e
	}
}

func (a *authority) dropExt(key extension) {
	id := ext(key, nil).Id
	a.exts = slices.DeleteFunc(a.exts, func(x pkix.Extension) bool { return x.Id.Equal(id) })
}

func certify(t testing.TB, template, parent *x509.Certificate, public crypto.PublicKey, key crypto.Signer) []byte {
	t.Helper()
	b, err := x509.CreateCertificate(rand.Reader, template, parent, public, key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (a *authority) arkDER(t testing.TB) []byte {
	return certify(t, a.ark, a.ark, a.arkKey.Public(), a.arkKey)
}

func (a *authority) askDER(t testing.TB) []byte {
	return certify(t, a.ask, a.ark, a.askKey.Public(), a.arkKey)
}

func (a *authority) vekDER(t testing.TB) []byte {
	a.vek.ExtraExtensions = a.exts
	return certify(t, a.vek, a.ask, a.vekKey.Public(), a.askKey)
}

func (a *authority) chainPEM(t testing.TB) []byte {
	return slices.Concat(toPEM(a.askDER(t)), toPEM(a.arkDER(t)))
}

func toPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// roots trusts the authority's ARK for its line.
func (a *authority) roots(t testing.TB) (r Roots) {
	t.Helper()
	c, err := x509.ParseCertificate(a.arkDER(t))
	if err != nil {
		t.Fatal(err)
	}
	switch a.line {
	case snp.LineMilan:
		r.Milan = fingerprint(c)
	case snp.LineGenoa:
		r.Genoa = fingerprint(c)
	case snp.LineTurin:
		r.Turin = fingerprint(c)
	}
	return r
}

// crl returns a list that revokes the given serial numbers; change may alter it before it is signed by key.
func (a *authority) crl(t testing.TB, change func(*x509.RevocationList), key *rsa.PrivateKey, serials ...int64) []byte {
	t.Helper()
	list := &x509.RevocationList{
		Number:             big.NewInt(1),
		ThisUpdate:         clock.AddDate(0, 0, -1),
		NextUpdate:         clock.AddDate(0, 1, 0),
		SignatureAlgorithm: x509.SHA384WithRSAPSS,
	}
	for _, s := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries,
			x509.RevocationListEntry{SerialNumber: big.NewInt(s), RevocationTime: clock.AddDate(0, 0, -2)})
	}
	if change != nil {
		change(list)
	}
	issuer := *a.ark
	issuer.SubjectKeyId = []byte{1}
	issuer.KeyUsage = x509.KeyUsageCRLSign // CreateRevocationList refuses to make what a verifier must refuse
	b, err := x509.CreateRevocationList(rand.Reader, list, &issuer, key)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// sign returns the report's bytes, signed by the chip's key.
func (a *authority) sign(t testing.TB) []byte {
	t.Helper()
	r := a.report
	b, err := r.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	digest := sha512.Sum384(b[:snp.SignedSize])
	x, y, err := ecdsa.Sign(rand.Reader, a.vekKey, digest[:])
	if err != nil {
		t.Fatal(err)
	}
	r.Signature = snp.Signature{R: littleEndian(x), S: littleEndian(y)}
	if b, err = r.Bytes(); err != nil {
		t.Fatal(err)
	}
	return b
}

func littleEndian(n *big.Int) (b [72]byte) {
	n.FillBytes(b[:])
	slices.Reverse(b[:])
	return b
}

// evidence returns all there is to a report that must pass.
func (a *authority) evidence(t testing.TB) Evidence {
	return Evidence{Report: a.sign(t), VEK: a.vekDER(t), Chain: a.chainPEM(t), CRL: a.crl(t, nil, a.arkKey)}
}
