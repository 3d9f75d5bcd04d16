package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/evidence"
	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/snp/reference"
	"github.com/kcradle/kcradle/snp/verify"
)

// simNonce is the nonce that the verifier of a simulated pod chose.
var simNonce = [32]byte{0: 0x5e, 31: 0x01}

// launch CHIP REFERENCE POD FILE: a simulated chip launches what a reference says, with a pod.json, and FILE is the
// evidence. It also writes FILE.report, FILE.vek, and the report data in hex as FILE.data.
func launch(ts *testscript.TestScript, _ bool, args []string) {
	s, err := simulate()
	ts.Check(err)
	chip, ok := s.chips[args[0]]
	if !ok {
		ts.Fatalf("no chip %s", args[0])
	}
	r, err := reference.Parse([]byte(ts.ReadFile(args[1])))
	ts.Check(err)
	document := []byte(ts.ReadFile(args[2]))
	out := evidence.Stored{At: simClock, Pod: document, Nonce: simNonce, Key: []byte("key"), Exporter: [32]byte{1}}
	data, err := snp.Binding{Nonce: out.Nonce, Key: out.Key, Exporter: out.Exporter, PodDigest: pod.DigestOf(document)}.ReportData()
	ts.Check(err)
	guest := *chip
	guest.Report.Measurement, guest.Report.HostData, guest.Report.IDKeyDigest = r.Measurement, r.HostData, r.IDKeyDigest
	out.Report, err = guest.Attest(data, 0)
	ts.Check(err)
	b, err := out.Encode()
	ts.Check(err)
	vek, err := guest.VEKDER()
	ts.Check(err)
	for suffix, b := range map[string][]byte{"": b, ".report": out.Report, ".vek": vek, ".data": []byte(hex.EncodeToString(data[:]))} {
		ts.Check(os.WriteFile(ts.MkAbs(args[3]+suffix), b, 0o644))
	}
}

// TestResultCode wants a code for each way to fail, and 0 for none.
func TestResultCode(t *testing.T) {
	for _, tt := range []struct {
		id     verify.ID
		status verify.Status
		want   int
	}{
		{verify.CheckPolicy, verify.Malformed, exitPolicy},
		{verify.CheckReference, verify.Malformed, exitPolicy},
		{verify.CheckReference, verify.Fail, exitRefused},
		{verify.CheckReference, verify.Unset, exitUsage},
		{verify.CheckEvidence, verify.Malformed, exitMalformed},
		{verify.CheckEvidence, verify.Unreachable, exitNetwork},
		{verify.CheckReport, verify.Malformed, exitMalformed},
		{verify.CheckVEK, verify.Missing, exitMissing},
		{verify.CheckVEK, verify.Unreachable, exitNetwork},
		{verify.CheckCRL, verify.Missing, exitMissing},
		{verify.CheckSignature, verify.Fail, exitRefused},
		{verify.CheckMeasurement, verify.Unset, exitUsage},
		{verify.CheckMeasurement, verify.Skipped, exitRefused},
		{verify.CheckMeasurement, verify.Warn, exitRefused},
		{verify.CheckMeasurement, "", exitRefused},
	} {
		if got := resultCode(verify.Rejected(tt.id, tt.status, errors.New("x"))); got != tt.want {
			t.Errorf("%s %s: got %d, want %d", tt.id, tt.status, got, tt.want)
		}
	}
	if got := resultCode(verify.Result{}); got != exitRefused {
		t.Errorf("nothing: got %d", got)
	}
}

// TestVerifyReal gives real reports to the command, with AMD's roots.
func TestVerifyReal(t *testing.T) {
	for _, tt := range []struct {
		report, chain string
		words         []string
	}{
		{"gosevguest-milan-v2-debugpolicy", "milan", []string{"FAIL version", "FAIL product", "FAIL guest-debug", "NOT VERIFIED: version, product, guest-debug, platform-alias-check\n"}},
		{"trustee-milan-v2", "milan", []string{"NOT VERIFIED: version, product, platform-alias-check, provisional\n"}},
		{"oak-milan-v3", "milan", []string{"FAIL product: reports of the Milan line can be forged", "NOT VERIFIED: product\n"}},
		{"trustee-siena-v3", "genoa", []string{"VERIFIED a report of measurement"}},
		{"oak-genoa-v5", "genoa", []string{"VERIFIED a report of measurement", "Genoa, TCB bl 10 tee 0 snp 25 ucode 84, chip "}},
		{"oak-turin-v5", "turin_vcek", []string{"VERIFIED a report of measurement", "WARNING platform-unknown"}},
	} {
		path := need.FixturePath(t, "fixtures/"+tt.report+".report")
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		r, err := snp.Parse(b)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		p := filepath.Join(dir, "policy.json")
		if err := os.WriteFile(p, fmt.Appendf(nil, `{"version": 1, "measurement": ["%x"]}`, r.Measurement), 0o644); err != nil {
			t.Fatal(err)
		}
		bare := []string{"--root", dir, "verify", "--offline", "--report", path, "--vek", need.FixturePath(t, "fixtures/"+strings.TrimSuffix(tt.report, "-debugpolicy")+".vcek.der")}
		data := []string{"--report-data", hex.EncodeToString(r.ReportData[:])}
		chain := []string{"--chain", need.FixturePath(t, "fixtures/ask_ark_"+tt.chain+".pem")}

		out, errs, code := runHere(t, &app{}, slices.Concat(bare, data, chain, []string{"--policy", p})...)
		want := exitRefused
		if strings.HasPrefix(tt.words[0], "VERIFIED") {
			want = 0
		}
		if code != want || errs != "" {
			t.Errorf("%s: got %d, %q\n%s", tt.report, code, errs, out)
		}
		for _, w := range tt.words {
			if !strings.Contains(out, w) {
				t.Errorf("%s: got no %q in\n%s", tt.report, w, out)
			}
		}
		if out, errs, code = runHere(t, &app{}, slices.Concat(bare, data, []string{"--policy", p})...); code != exitMissing || !strings.Contains(out, "MISSING root") {
			t.Errorf("%s without a chain: got %d, %q\n%s", tt.report, code, errs, out)
		}
		if out, errs, code = runHere(t, &app{}, slices.Concat(bare, data, chain)...); code == 0 || !strings.Contains(out, "UNSET measurement") {
			t.Errorf("%s without a measurement: got %d, %q\n%s", tt.report, code, errs, out)
		}
		if out, errs, code = runHere(t, &app{}, slices.Concat(bare, chain, []string{"--policy", p})...); code == 0 || !strings.Contains(out, "UNSET report-data") {
			t.Errorf("%s without report data: got %d, %q\n%s", tt.report, code, errs, out)
		}
	}
}
