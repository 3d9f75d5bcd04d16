package verify

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/sim"
)

// clock is the instant that all tests hold certificates against.
var clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func now() time.Time { return clock }

// testKeys are made once. The last one belongs to nobody whom a test trusts.
var testKeys = sync.OnceValues(func() (keys sim.Keys, foreign *rsa.PrivateKey) {
	var err, foreignErr error
	var wg sync.WaitGroup
	wg.Go(func() { keys, err = sim.NewKeys() })
	wg.Go(func() { foreign, foreignErr = rsa.GenerateKey(rand.Reader, 4096) })
	wg.Wait()
	if err != nil || foreignErr != nil {
		panic("no keys")
	}
	return keys, foreign
})

// authority is a simulated authority with one chip; its methods fail the test.
type authority struct {
	*sim.Authority
	*sim.Chip
}

// What the reports of the tests say unless they say something else.
var (
	expectedData   = [64]byte{1}
	expectedDigest = [48]byte{2}
)

// lax is a policy that accepts what the hardware of a test says, so that only its signature matters.
func lax() policy.Policy {
	p := policy.Default()
	p.AllowMilan = true
	p.ReportVersion.Min = 2
	p.Platform.AliasCheck = policy.Any
	p.CRL = policy.CRLRequire
	p.Measurements = []measure.Digest{expectedDigest}
	return p
}

// config trusts the authority, and accepts the kind of key that it is for.
func (a *authority) config(t testing.TB) Config {
	t.Helper()
	c := Config{Now: now, Roots: a.roots(t), Policy: lax()}
	if a.Signer == snp.SignerVLEK {
		c.Policy.Signer = policy.VLEK
	}
	return c
}

// newAuthority returns the authority of a line whose one chip and one report fit together.
func newAuthority(t testing.TB, line snp.Line, s snp.Signer) *authority {
	t.Helper()
	keys, _ := testKeys()
	a := sim.NewAuthority(keys, line, s, clock)
	chip, err := a.NewChip(1)
	if err != nil {
		t.Fatal(err)
	}
	chip.Report.ReportData, chip.Report.Measurement = expectedData, expectedDigest
	return &authority{a, chip}
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
	i := slices.IndexFunc(a.Extensions, func(x pkix.Extension) bool { return x.Id.Equal(e.Id) })
	if i < 0 {
		a.Extensions = append(a.Extensions, e)
	} else {
		a.Extensions[i] = e
	}
}

func (a *authority) dropExt(key extension) {
	id := ext(key, nil).Id
	a.Extensions = slices.DeleteFunc(a.Extensions, func(x pkix.Extension) bool { return x.Id.Equal(id) })
}

func must(t testing.TB, b []byte, err error) []byte {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (a *authority) arkDER(t testing.TB) []byte {
	t.Helper()
	b, err := a.RootDER()
	return must(t, b, err)
}

func (a *authority) askDER(t testing.TB) []byte {
	t.Helper()
	b, err := a.ASKDER()
	return must(t, b, err)
}

func (a *authority) vekDER(t testing.TB) []byte {
	t.Helper()
	b, err := a.VEKDER()
	return must(t, b, err)
}

func (a *authority) chainPEM(t testing.TB) []byte {
	t.Helper()
	b, err := a.Authority.Chain()
	return must(t, b, err)
}

// under returns the authority with other keys.
func (a *authority) under(keys sim.Keys) *authority {
	other := *a.Authority
	other.Keys = keys
	chip := *a.Chip
	chip.Authority = &other
	return &authority{&other, &chip}
}

// roots trusts the authority's ARK for its line.
func (a *authority) roots(t testing.TB) (r Roots) {
	t.Helper()
	root, err := a.Root()
	if err != nil {
		t.Fatal(err)
	}
	switch a.Line {
	case snp.LineMilan:
		r.Milan = root
	case snp.LineGenoa:
		r.Genoa = root
	case snp.LineTurin:
		r.Turin = root
	}
	return r
}

// crl returns a list that revokes the given serial numbers; change may alter it before it is signed by key.
func (a *authority) crl(t testing.TB, change func(*x509.RevocationList), key *rsa.PrivateKey, serials ...int64) []byte {
	t.Helper()
	list := a.CRLTemplate(serials...)
	if change != nil {
		change(list)
	}
	b, err := a.under(sim.Keys{ARK: key}).SignCRL(list)
	return must(t, b, err)
}

// sign returns the report's bytes, signed by the chip's key.
func (a *authority) sign(t testing.TB) []byte {
	t.Helper()
	b, err := a.Sign(a.Report)
	return must(t, b, err)
}

func littleEndian(n *big.Int) [72]byte { return sim.Scalar(n) }

func toPEM(der []byte) []byte { return sim.PEM(der) }

// evidence returns all there is to a report that must pass.
func (a *authority) evidence(t testing.TB) Evidence {
	return Evidence{Report: a.sign(t), VEK: a.vekDER(t), Chain: a.chainPEM(t), CRL: a.crl(t, nil, a.Keys.ARK)}
}
