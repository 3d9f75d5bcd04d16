package verify

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"os"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/sim"
)

func TestParseVEK(t *testing.T) {
	tests := []struct {
		name   string
		line   snp.Line
		signer snp.Signer
		change func(*testing.T, *authority)
		err    string // empty: it parses
	}{
		{"Milan", snp.LineMilan, snp.SignerVCEK, nil, ""},
		{"Turin", snp.LineTurin, snp.SignerVCEK, nil, ""},
		{"VLEK", snp.LineGenoa, snp.SignerVLEK, nil, ""},
		{"product without stepping", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extProduct, ia5("Milan")) }, ""},
		{"structure version 1", snp.LineTurin, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extVersion, der(1)) }, ""},
		{"part of 255", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extUcode, der(255)) }, ""},
		{"chip as octet string", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extHWID, der(bytes.Repeat([]byte{7}, 64))) }, ""},
		{"Turin's chip as octet string", snp.LineTurin, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extHWID, der(bytes.Repeat([]byte{7}, 8))) }, ""},

		{"structure version 2", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extVersion, der(2)) }, "structure version 2"},
		{"part of 256", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extUcode, der(256)) }, "3.8"},
		{"negative part", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extBL, der(-1)) }, "3.1"},
		{"part not minimal", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extBL, []byte{2, 2, 0, 10}) }, "3.1"},
		{"bytes behind a part", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extBL, []byte{2, 1, 10, 0}) }, "3.1"},
		{"part is no integer", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extSNP, ia5("x")) }, "3.3"},
		{"empty part", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extTEE, nil) }, "3.2"},
		{"reserved part", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extSPL4, der(1)) }, "3.4"},
		{"product of another line", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extProduct, ia5("Genoa")) }, `"Genoa" issued by Milan`},
		{"product that only begins alike", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extProduct, ia5("Milano")) }, `"Milano"`},
		{"product is UTF-8", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extProduct, []byte("\x0c\x05Milan")) }, "IA5String"},
		{"empty product", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extProduct, nil) }, "IA5String"},
		{"no chip", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.dropExt(extHWID) }, ".4 is missing"},
		{"chip of zeros", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extHWID, make([]byte, 64)) }, "names no chip"},
		{"chip of 8 bytes on Milan", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extHWID, bytes.Repeat([]byte{7}, 8)) }, "8 bytes, want 64"},
		{"chip of 64 bytes on Turin", snp.LineTurin, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extHWID, bytes.Repeat([]byte{7}, 64)) }, "64 bytes, want 8"},
		{"chip of 66 bytes", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extHWID, bytes.Repeat([]byte{7}, 66)) }, "66 bytes, want 64"},
		{"Turin without FMC", snp.LineTurin, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.dropExt(extFMC) }, ".3.9 is missing"},
		{"Turin with SPL4", snp.LineTurin, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extSPL4, der(0)) }, ".3.4 does not belong"},
		{"Milan with FMC", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extFMC, der(0)) }, ".3.9 does not belong"},
		{"VCEK with a provider", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.setExt(extCSP, ia5("x")) }, ".5 does not belong"},
		{"VLEK with a chip", snp.LineMilan, snp.SignerVLEK, func(_ *testing.T, a *authority) { a.setExt(extHWID, make([]byte, 64)) }, ".4 does not belong"},
		{"VLEK without a provider", snp.LineMilan, snp.SignerVLEK, func(_ *testing.T, a *authority) { a.dropExt(extCSP) }, ".5 is missing"},
		{"unknown extension of AMD's", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) {
			a.Extensions = append(a.Extensions, pkix.Extension{Id: append(append(asn1.ObjectIdentifier{}, amd...), 9), Value: der(0)})
		}, ".9 does not belong"},
		{"unknown critical extension", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) {
			a.Extensions = append(a.Extensions, pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: der(0)})
		}, "critical extension 1.2.3"},
		{"duplicate chip", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) {
			a.Extensions = append(a.Extensions, ext(extHWID, bytes.Repeat([]byte{9}, 64)))
		}, "duplicate"},
		{"subject of somebody", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.VEK.Subject.CommonName = "VCEK" }, `subject "VCEK"`},
		{"issuer of somebody", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.ASK.Subject.CommonName = "SEV-Rome" }, `issuer "SEV-Rome"`},
		{"issuer without prefix", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.ASK.Subject.CommonName = "Milan" }, `issuer "Milan"`},
		{"VCEK by the issuer of VLEKs", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.ASK.Subject.CommonName = "SEV-VLEK-Milan" }, "issuer"},
		{"VLEK by the issuer of VCEKs", snp.LineMilan, snp.SignerVLEK, func(_ *testing.T, a *authority) { a.ASK.Subject.CommonName = "SEV-Milan" }, "issuer"},
		{"authority", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.VEK.IsCA, a.VEK.BasicConstraintsValid = true, true }, "may certify"},
		{"may sign certificates", snp.LineMilan, snp.SignerVCEK, func(_ *testing.T, a *authority) { a.VEK.KeyUsage = x509.KeyUsageCertSign }, "may certify"},
		{"P-256", snp.LineMilan, snp.SignerVCEK, func(t *testing.T, a *authority) {
			key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			if err != nil {
				t.Fatal(err)
			}
			a.Key = key
		}, "P-384"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			a := newAuthority(t, tt.line, tt.signer)
			if tt.change != nil {
				tt.change(t, a)
			}
			v, err := ParseVEK(a.vekDER(t))
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v, want …%s…", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if v.Line != tt.line || v.Signer != tt.signer || v.TCB.Layout != tt.line.Layout() {
				t.Errorf("got %+v", v)
			}
		})
	}
}

// TestDuplicates does not rely on the certificate parser's own refusal.
func TestDuplicates(t *testing.T) {
	a := newAuthority(t, snp.LineMilan, snp.SignerVCEK)
	for _, e := range a.Extensions {
		v := &VEK{Line: snp.LineMilan, Signer: snp.SignerVCEK}
		if err := v.parseExtensions(append(append([]pkix.Extension{}, a.Extensions...), e)); err == nil || !strings.Contains(err.Error(), "twice") {
			t.Errorf("extension %s twice: %v", e.Id, err)
		}
	}
}

func TestRealVEK(t *testing.T) {
	for _, real := range reals {
		v, err := ParseVEK(need.Fixture(t, "fixtures/"+real.vek+".vcek.der"))
		if err != nil {
			t.Errorf("%s: %v", real.vek, err)
			continue
		}
		t.Logf("%-20s %s %s, %s, chip %x…", real.vek, v.Signer, v.Product, v.TCB, v.HWID[:8])
	}
}

func FuzzParseVEK(f *testing.F) {
	for _, s := range []snp.Signer{snp.SignerVCEK, snp.SignerVLEK} {
		for _, line := range []snp.Line{snp.LineMilan, snp.LineTurin} {
			f.Add(newAuthority(f, line, s).vekDER(f))
		}
	}
	for _, path := range need.AnyFixtures(f, "fixtures/*.der") {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		v, err := ParseVEK(b)
		if err != nil {
			return
		}
		if v.Line == snp.LineUnknown || v.key == nil || v.Signer == snp.SignerVCEK && len(v.HWID) != v.Line.HWIDSize() {
			t.Errorf("got %+v", v)
		}
	})
}

// FuzzExtensions reaches the values without having to hit upon a certificate.
func FuzzExtensions(f *testing.F) {
	f.Add(uint8(0), der(5), ia5("Milan-B0"), bytes.Repeat([]byte{1}, 64), true)
	f.Add(uint8(1), der(255), ia5("Turin"), der(bytes.Repeat([]byte{1}, 8)), false)
	f.Fuzz(func(t *testing.T, line uint8, part, text, hwid []byte, vcek bool) {
		v := &VEK{Line: snp.LineMilan + snp.Line(line%3), Signer: snp.SignerVCEK}
		if !vcek {
			v.Signer = snp.SignerVLEK
		}
		exts := sim.Extensions(v.Line, v.Signer, snp.TCB{}, hwid)
		for i, e := range exts {
			switch e.Id.String() {
			case ext(extProduct, nil).Id.String(), ext(extCSP, nil).Id.String():
				exts[i].Value = text
			case ext(extSNP, nil).Id.String():
				exts[i].Value = part
			}
		}
		if err := v.parseExtensions(exts); err == nil && vcek && len(v.HWID) != v.Line.HWIDSize() {
			t.Errorf("got %+v", v)
		}
	})
}

func FuzzParseChain(f *testing.F) {
	f.Add(newAuthority(f, snp.LineMilan, snp.SignerVCEK).chainPEM(f))
	f.Add([]byte("-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := parseChain(b); err == nil && (c.ask == nil || c.ark == nil) {
			t.Error("a chain without a certificate")
		}
	})
}
