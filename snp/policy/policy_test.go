package policy

import (
	"bytes"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/pod"
)

// full has every field set, and no field as in Default.
func full() Policy {
	fmc := uint8(2)
	host := HostData{3}
	key := PublicKey{7}
	return Policy{
		Version:       1,
		Reference:     &Reference{File: "ref.json", SignedBy: &key},
		Images:        []Image{{"registry.example/app", pod.Digest{1}}, {"db", pod.Digest{2}}},
		Products:      []snp.Line{snp.LineTurin},
		AllowMilan:    true,
		ReportVersion: Versions{Min: 2, Max: 4},
		VMPL:          2,
		Signer:        AnySigner,
		GuestPolicy: GuestPolicy{
			Debug: true, MigrateMA: true, CXL: true, SMT: Deny, SingleSocket: Require, XTS: Require,
			RAPLDisabled: Require, CiphertextHiding: Require, PageSwapDisabled: Require, MinABI: ABI{1, 55},
		},
		Platform: Platform{
			AliasCheck: Any, ECC: Require, SMT: Deny, TSME: Deny, RAPLDisabled: Require, CiphertextHiding: Require, TIO: Deny,
		},
		MinTCB: map[snp.Line]TCB{
			snp.LineGenoa: {Bootloader: 10, SNP: 25, Microcode: 84},
			snp.LineTurin: {FMC: &fmc, Bootloader: 1, TEE: 1, SNP: 2, Microcode: 71},
		},
		TCBApplies:       []TCBName{Reported},
		MinMitigations:   map[snp.Line]Mitigations{snp.LineTurin: {Launch: 1, Current: 0xffff_ffff_ffff_fffe}},
		AllowProvisional: true,
		ChipIDs:          []ChipID{{0: 1}, {63: 2}},
		Measurements:     []measure.Digest{{1}, {2}},
		HostData:         &host,
		IDKeyDigests:     []KeyDigest{{4}},
		CRL:              CRLRequire,
		MaxEvidenceAge:   Duration(36 * time.Hour),
		PodConstraints:   PodConstraints{Exec: true, HostMounts: true, UnverifiedVolumes: true, Privileged: true},
	}
}

func TestRoundTrip(t *testing.T) {
	for name, p := range map[string]Policy{"default": Default(), "full": full(), "Milan alone": func() Policy {
		p := Default()
		p.Products, p.AllowMilan = nil, true
		return p
	}()} {
		b, err := p.Encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := Parse(b)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, b)
		}
		if p.Products == nil {
			p.Products = []snp.Line{}
		}
		if !reflect.DeepEqual(got, p) {
			t.Errorf("%s: got %+v, want %+v", name, got, p)
		}
		again, err := got.Encode()
		if err != nil || !bytes.Equal(again, b) {
			t.Errorf("%s: written again it is other bytes: %v", name, err)
		}
	}
	// The fields of full are none of Default's, so that a field which is not written is found.
	d, f := reflect.ValueOf(Default()), reflect.ValueOf(full())
	for i := range d.NumField() {
		if name := d.Type().Field(i).Name; name != "Version" && reflect.DeepEqual(d.Field(i).Interface(), f.Field(i).Interface()) {
			t.Errorf("full has the default for %s", name)
		}
	}
}

func TestDefault(t *testing.T) {
	p, err := Parse([]byte(`{"version": 1}`))
	if err != nil || !reflect.DeepEqual(p, Default()) {
		t.Errorf("got %+v, %v", p, err)
	}
	if err := (Policy{}).Validate(); err == nil {
		t.Error("the zero policy is valid")
	}
	if p.AllowMilan || p.GuestPolicy.Debug || p.GuestPolicy.MigrateMA || p.GuestPolicy.CXL || p.VMPL != 0 || p.Signer != VCEK ||
		p.Platform.AliasCheck != Require || p.ReportVersion != (Versions{3, 5}) || p.AllowProvisional || p.PodConstraints != (PodConstraints{}) ||
		len(p.Measurements) != 0 || p.CRL == CRLOff {
		t.Errorf("a default is lax: %+v", p)
	}
}

// TestExample is the example of docs/attestation.md.
func TestExample(t *testing.T) {
	p, err := Parse([]byte(`{
		"version": 1,
		"reference": {"file": "ref.json"},
		"image": "registry.example/app@sha256:` + strings.Repeat("ab", 32) + `",
		"minTCB": {"Turin": {"fmc": 0, "bl": 1, "tee": 0, "snp": 2, "ucode": 71}},
		"chipIDs": ["` + strings.Repeat("01", 8) + `", "` + strings.Repeat("02", 64) + `"],
		"guestPolicy": {"smt": "deny"}
	}`))
	if err != nil {
		t.Fatal(err)
	}
	if len(p.Images) != 1 || p.Images[0].Ref != "registry.example/app" || p.Images[0].Digest[31] != 0xab {
		t.Errorf("got %v", p.Images)
	}
	if p.GuestPolicy.SMT != Deny || p.GuestPolicy.SingleSocket != Any {
		t.Errorf("got %+v", p.GuestPolicy)
	}
	if p.ChipIDs[0].String() != strings.Repeat("01", 8) || p.ChipIDs[1].String() != strings.Repeat("02", 64) {
		t.Errorf("got %v", p.ChipIDs)
	}
	if got := p.MinTCB[snp.LineTurin].Of(snp.LineTurin); got != (snp.TCB{Layout: snp.LayoutTurin, Bootloader: 1, SNP: 2, Microcode: 71}) {
		t.Errorf("got %+v", got)
	}
}

func TestRefusals(t *testing.T) {
	hex := func(n int) string { return strings.Repeat("ab", n) }
	tests := []struct{ name, fields, want string }{
		{"no version", ``, "version: missing"},
		{"version 0", `"version":0`, "version: 0 is not known here, want 1"},
		{"version 2", `"version":2`, "version: 2 is not known here, want 1"},
		{"unknown field", `"version":1,"allowmilan":true`, "allowmilan: no such field"},
		{"unknown field of the guest's policy", `"version":1,"guestPolicy":{"debugging":false}`, "guestPolicy.debugging: no such field"},
		{"twice", `"version":1,"allowMilan":false,"allowMilan":true`, "allowMilan: stands there twice"},
		{"null", `"version":1,"measurement":null`, "measurement: null, want a list"},
		{"Milan among the products", `"version":1,"products":["Genoa","Milan"]`, `products[1]: Milan is accepted by "allowMilan"`},
		{"no products", `"version":1,"products":[]`, "products: names none"},
		{"unknown product", `"version":1,"products":["Bergamo"]`, `products[0]: "Bergamo" is no product line`},
		{"a product twice", `"version":1,"products":["Genoa","Genoa"]`, "products[1]: stands there twice"},
		{"report version 1", `"version":1,"reportVersion":{"min":1}`, "reportVersion: 1 to 5, want a range within 2 to 5"},
		{"report version 6", `"version":1,"reportVersion":{"max":6}`, "reportVersion: 3 to 6"},
		{"empty range", `"version":1,"reportVersion":{"min":5,"max":3}`, "reportVersion: 5 to 3"},
		{"VMPL 4", `"version":1,"vmpl":4`, "vmpl: 4, want 0 to 3"},
		{"the host's VMPL", `"version":1,"vmpl":4294967295`, "vmpl: 4294967295 is no whole number of 8 bits"},
		{"signer", `"version":1,"signer":"VCEK"`, `signer: "VCEK", want vcek, vlek or any`},
		{"no signer", `"version":1,"signer":""`, `signer: "", want`},
		{"rule of another field", `"version":1,"guestPolicy":{"smt":"require"}`, `guestPolicy.smt: "require", want allow or deny`},
		{"unknown rule", `"version":1,"platform":{"aliasCheck":"yes"}`, `platform.aliasCheck: "yes", want any, require or deny`},
		{"half a version", `"version":1,"guestPolicy":{"minABI":{"major":1}}`, "guestPolicy.minABI.minor: missing"},
		{"minimum without a part", `"version":1,"minTCB":{"Genoa":{"bl":1,"tee":0,"snp":1}}`, "minTCB.Genoa.ucode: missing"},
		{"Genoa with FMC", `"version":1,"minTCB":{"Genoa":{"fmc":0,"bl":1,"tee":0,"snp":1,"ucode":1}}`, "minTCB.Genoa.fmc: only Turin has one"},
		{"Turin without FMC", `"version":1,"minTCB":{"Turin":{"bl":1,"tee":0,"snp":1,"ucode":1}}`, "minTCB.Turin.fmc: missing"},
		{"minimum of no line", `"version":1,"minTCB":{"Siena":{"bl":1,"tee":0,"snp":1,"ucode":1}}`, `minTCB.Siena: "Siena" is no product line`},
		{"no TCB applies", `"version":1,"tcbApplies":[]`, "tcbApplies: names none"},
		{"another TCB applies", `"version":1,"tcbApplies":["current"]`, `tcbApplies[0]: "current", want reported, committed or launch`},
		{"mask as a number", `"version":1,"mitVectors":{"Genoa":{"launch":1,"current":1}}`, "mitVectors.Genoa.launch: a number, want a string"},
		{"short mask", `"version":1,"mitVectors":{"Genoa":{"launch":"1","current":"1"}}`, "mitVectors.Genoa.launch: 1 characters, want 16"},
		{"chip of 9 bytes", `"version":1,"chipIDs":["` + hex(9) + `"]`, "chipIDs[0]: 18 characters, want 128 hexadecimal digits, of a Turin 16"},
		{"chip of zeros", `"version":1,"chipIDs":["` + strings.Repeat("0", 128) + `"]`, "chipIDs: all zeros"},
		{"short measurement", `"version":1,"measurement":["` + hex(47) + `"]`, "measurement[0]: measure: digest of 94 characters: want 96"},
		{"measurement of zeros", `"version":1,"measurement":["` + strings.Repeat("0", 96) + `"]`, "measurement: all zeros"},
		{"measurement in base64", `"version":1,"measurement":["` + strings.Repeat("q83v", 16) + `"]`, "measurement[0]"},
		{"measurement twice", `"version":1,"measurement":["` + hex(48) + `","` + hex(48) + `"]`, "measurement[1]: stands there twice"},
		{"long host data", `"version":1,"hostData":"` + hex(33) + `"`, "hostData: 66 characters, want 64"},
		{"upper case", `"version":1,"hostData":"` + strings.ToUpper(hex(32)) + `"`, "hostData: 'A' after 0 characters"},
		{"ID key of zeros", `"version":1,"idKeyDigests":["` + strings.Repeat("0", 96) + `"]`, "idKeyDigests: all zeros"},
		{"image by tag", `"version":1,"image":"app:1"`, `image: "app:1", want an image with the digest`},
		{"image by a short digest", `"version":1,"image":"app@sha256:abcd"`, "image: 4 characters, want 64"},
		{"image without a name", `"version":1,"image":"@sha256:` + hex(32) + `"`, "want an image with the digest"},
		{"image of zeros", `"version":1,"image":["a@sha256:` + strings.Repeat("0", 64) + `"]`, "image[0]: all zeros"},
		{"CRL mode", `"version":1,"crl":"hard"`, `crl: "hard", want require, soft or off`},
		{"negative age", `"version":1,"maxEvidenceAge":"-1h"`, "maxEvidenceAge: -1h0m0s is before now"},
		{"age without a unit", `"version":1,"maxEvidenceAge":"24"`, "maxEvidenceAge: want a length of time"},
		{"reference without a file", `"version":1,"reference":{}`, "reference.file: missing"},
		{"reference with an empty file", `"version":1,"reference":{"file":""}`, "reference.file: names no file"},
		{"key of another kind", `"version":1,"reference":{"file":"x","signedBy":"rsa:00"}`, `reference.signedBy: "rsa:00", want ed25519:`},
		{"key of zeros", `"version":1,"reference":{"file":"x","signedBy":"ed25519:` + strings.Repeat("0", 64) + `"}`, "reference.signedBy: all zeros"},
		{"unknown constraint", `"version":1,"podConstraints":{"attach":true}`, "podConstraints.attach: no such field"},
		{"the clock", `"version":1,"now":"2026-01-01T00:00:00Z"`, "now: no such field"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Parse([]byte("{" + tt.fields + "}"))
			if err == nil || !strings.HasPrefix(err.Error(), "policy: ") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %s", err, tt.want)
			}
			if !reflect.DeepEqual(p, Policy{}) {
				t.Errorf("got %+v with the error", p)
			}
		})
	}
	_, err := Parse([]byte(`{"version":1,"vmpl":9,"signer":"me"}`))
	for _, field := range []string{"vmpl", "signer"} {
		if err == nil || !strings.Contains(err.Error(), field) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v, want all in one line", err)
		}
	}
	p := Default()
	p.ChipIDs = make([]ChipID, maxList+1)
	if _, err := p.Encode(); err == nil || !strings.Contains(err.Error(), "chipIDs: 4097 entries") {
		t.Errorf("got %v", err)
	}
}

func TestSigner(t *testing.T) {
	for _, tt := range []struct {
		signer     Signer
		vcek, vlek bool
	}{{VCEK, true, false}, {VLEK, false, true}, {AnySigner, true, true}, {"", false, false}} {
		if tt.signer.Accepts(snp.SignerVCEK) != tt.vcek || tt.signer.Accepts(snp.SignerVLEK) != tt.vlek || tt.signer.Accepts(snp.SignerNone) {
			t.Errorf("signer %q", tt.signer)
		}
	}
}

func TestABI(t *testing.T) {
	for _, tt := range []struct {
		a, b ABI
		want bool
	}{{ABI{1, 51}, ABI{1, 52}, true}, {ABI{1, 52}, ABI{1, 52}, false}, {ABI{0, 99}, ABI{1, 0}, true}, {ABI{2, 0}, ABI{1, 52}, false}} {
		if got := tt.a.Less(tt.b); got != tt.want {
			t.Errorf("%s < %s: got %t", tt.a, tt.b, got)
		}
	}
}

func FuzzParse(f *testing.F) {
	b, err := full().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte(`{"version":1}`))
	f.Add([]byte(`{"version":1,"image":"a@sha256:` + strings.Repeat("ab", 32) + `","crl":"off","mitVectors":{"Genoa":{"launch":"0000000000000001","current":"0000000000000000"}}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(b)
		if err != nil {
			return
		}
		again, err := p.Encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := Parse(again)
		if err != nil {
			t.Fatal(err)
		}
		once, err := back.Encode()
		if err != nil || !bytes.Equal(once, again) {
			t.Errorf("got %s, want %s", once, again)
		}
	})
}
