package verify

import (
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/ovmf/ovmftest"
	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/reference"
)

// sample is a pod that passes without a warning, under a policy and a reference that name everything there is to name.
// Tests change one thing in it.
type sample struct {
	*authority
	policy   policy.Policy
	expect   Expectation
	document []byte   // pod.json
	made     Evidence // of the chip: all but report and pod
	change   func(*Evidence)
}

// kits are what samples of a line share: signatures of RSA keys take most of a test's time.
var kits sync.Map

type kit struct {
	authority *authority
	made      Evidence
}

// documentOf returns a pod.json with fields of its container, and of the pod, added.
func documentOf(container, rest string) []byte {
	return []byte(`{"version":1,"name":"p","containers":[{"name":"c","image":{"ref":"app:1","digest":"` + digestOf(7) + `","config":"` + digestOf(8) + `"}` +
		container + `}]` + rest + `}`)
}

func digestOf(n byte) string { return "sha256:" + strings.Repeat(fmt.Sprintf("%02x", n), 32) }

func imageOf(n byte) policy.Image {
	i, err := policy.ParseImage(fmt.Sprintf("image%d@%s", n, digestOf(n)))
	if err != nil {
		panic(err)
	}
	return i
}

func readFirmware(t testing.TB, size uint32) measure.Firmware {
	t.Helper()
	f, err := measure.ReadFirmware(ovmftest.Image(ovmftest.AmdSev(size)))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func newSample(t testing.TB, line snp.Line) *sample {
	t.Helper()
	kept, ok := kits.Load(line)
	if !ok {
		a := newAuthority(t, line, snp.SignerVCEK)
		kept, _ = kits.LoadOrStore(line, kit{a, a.evidence(t)})
	}
	shared := kept.(kit)
	chip := *shared.authority.Chip
	a := &authority{shared.authority.Authority, &chip}
	r := &a.Report
	r.Version, r.LaunchMit, r.CurrentMit = snp.Version5, 1, 3
	r.Policy = snp.PolicyReserved1 | snp.PolicySMT | 1<<8 | 51
	tcb := r.ReportedTCB
	p := policy.Default()
	p.CRL = policy.CRLRequire
	p.MinTCB = map[snp.Line]policy.TCB{line: {Bootloader: tcb.Bootloader, TEE: tcb.TEE, SNP: tcb.SNP, Microcode: tcb.Microcode}}
	if line == snp.LineTurin {
		p.MinTCB[line] = policy.TCB{FMC: &tcb.FMC, Bootloader: tcb.Bootloader, TEE: tcb.TEE, SNP: tcb.SNP, Microcode: tcb.Microcode}
	}
	p.MinMitigations = map[snp.Line]policy.Mitigations{line: {Launch: 1, Current: 3}}
	p.ChipIDs = []policy.ChipID{{9}, r.ChipID}
	p.PodConstraints.Exec = true
	p.Images = []policy.Image{imageOf(7)}
	s := &sample{authority: a, made: shared.made, policy: p, expect: Expectation{Key: []byte("key"), Firmware: []measure.Firmware{readFirmware(t, 64<<10)}}}
	for i := range 32 {
		s.expect.Nonce[i], s.expect.Exporter[i] = byte(i), 0xee
	}
	s.launch(t, documentOf("", ""))
	return s
}

// launch makes the sample's guest boot a pod, and the reference expect it.
func (s *sample) launch(t testing.TB, document []byte) {
	t.Helper()
	s.document = document
	ref := referenceOf(t, string(document), s.Report.Policy)
	s.expect.Reference = ref
	s.Report.Measurement, s.Report.HostData, s.Report.IDKeyDigest = ref.Measurement, ref.HostData, ref.IDKeyDigest
	var err error
	s.Report.ReportData, err = snp.Binding{
		Nonce: s.expect.Nonce, Key: s.expect.Key, Exporter: s.expect.Exporter, PodDigest: pod.DigestOf(document),
	}.ReportData()
	if err != nil {
		t.Fatal(err)
	}
}

// references are kept by pod.json, since the key of the ID block takes most of a sample's time.
var references sync.Map

// referenceOf returns the caller's own copy of the reference for a pod.json.
func referenceOf(t testing.TB, document string, p snp.Policy) *reference.Reference {
	t.Helper()
	type key struct {
		document string
		policy   snp.Policy
	}
	kept, ok := references.Load(key{document, p})
	if !ok {
		ref, err := reference.New(reference.Options{
			Firmware: readFirmware(t, 64<<10), Kernel: measure.FileHash{1}, Initrd: measure.FileHash{2},
			CommandLine: "console=hvc0 cradle.pod=" + pod.DigestOf([]byte(document)).String(),
			VCPUs:       2, CPU: "EPYC-v4", SEVFeatures: 1, GuestPolicy: p, Pod: []byte(document),
		})
		if err != nil {
			t.Fatal(err)
		}
		kept, _ = references.LoadOrStore(key{document, p}, *ref)
	}
	ref := kept.(reference.Reference)
	if ref.Image != nil {
		image := *ref.Image
		ref.Image = &image
	}
	return &ref
}

// relaunch makes the guest boot what differs from the reference in one thing.
func (s *sample) relaunch(t testing.TB, change func(*measure.Input)) {
	t.Helper()
	in, err := s.expect.Reference.Input()
	if err != nil {
		t.Fatal(err)
	}
	change(&in)
	if s.Report.Measurement, err = in.Digest(); err != nil {
		t.Fatal(err)
	}
}

// bare makes the sample a report of which only the report data are known.
func (s *sample) bare() {
	data := s.Report.ReportData
	s.expect = Expectation{ReportData: &data}
	s.document = nil
	s.policy.Measurements = []measure.Digest{s.Report.Measurement}
	s.policy.Images = nil
}

func (s *sample) decide(t testing.TB) Result {
	t.Helper()
	v, err := New(Config{Now: now, Roots: s.roots(t), Policy: s.policy})
	if err != nil {
		t.Fatal(err)
	}
	e := s.made
	e.Report, e.Pod = s.sign(t), s.document
	if s.change != nil {
		s.change(&e)
	}
	return v.Verify(t.Context(), e, s.expect)
}

// failed returns the ids of the checks that made a result a failure.
func failed(t testing.TB, r Result) (ids []ID) {
	t.Helper()
	err := r.Err()
	if r.Passed() != (err == nil) || (r.Verdict() == VerdictPass) != (err == nil) || (r.Report != nil) != (err == nil) {
		t.Error("Passed, Err, Verdict and Report disagree")
	}
	if err == nil {
		return nil
	}
	var e *Error
	if !errors.As(err, &e) {
		t.Fatal(err)
	}
	for _, c := range e.Failed {
		ids = append(ids, c.ID)
	}
	return ids
}

func find(t testing.TB, r Result, id ID) Check {
	t.Helper()
	i := slices.IndexFunc(r.Checks, func(c Check) bool { return c.ID == id })
	if i < 0 {
		t.Fatalf("no check %s", id)
	}
	return r.Checks[i]
}

func TestSample(t *testing.T) {
	for _, line := range []snp.Line{snp.LineGenoa, snp.LineTurin} {
		r := newSample(t, line).decide(t)
		for i, c := range r.Checks {
			if c.Status != Pass {
				t.Errorf("%s: %+v", line, c)
			}
			if c.ID != rows[i].id {
				t.Errorf("%s: check %d is %s, want %s", line, i, c.ID, rows[i].id)
			}
		}
		if err := r.Err(); err != nil || len(r.Warnings()) != 0 {
			t.Errorf("%s: got %v and warnings %v", line, err, r.Warnings())
		}
		if r.Pod == nil || r.Pod.Name != "p" || r.PodDigest != pod.DigestOf(documentOf("", "")) {
			t.Errorf("got pod %+v", r.Pod)
		}
	}
}

// TestRules makes one thing wrong at a time in a pod that would pass, and wants exactly the check that is for it to fail.
func TestRules(t *testing.T) {
	podChecks := []ID{CheckImage, CheckPodExec, CheckPodHostMounts, CheckPodVolumes, CheckPodPrivileged}
	tests := []struct {
		name   string
		line   snp.Line
		change func(t *testing.T, s *sample)
		id     ID
		status Status    // "": Fail
		want   [3]string // parts of expected, actual and message
		also   []ID      // checks that cannot but fail, too
	}{
		{name: "other report data", change: func(_ *testing.T, s *sample) { s.Report.ReportData[0]++ }, id: CheckReportData, want: [3]string{"", "", "another nonce, key, connection or pod"}},
		{name: "other nonce", change: func(_ *testing.T, s *sample) { s.expect.Nonce[31]++ }, id: CheckReportData},
		{name: "other key", change: func(_ *testing.T, s *sample) { s.expect.Key = []byte("kez") }, id: CheckReportData},
		{name: "other connection", change: func(_ *testing.T, s *sample) { s.expect.Exporter[0]++ }, id: CheckReportData},
		{name: "no nonce", change: func(_ *testing.T, s *sample) { s.expect.Nonce = [32]byte{} }, id: CheckReportData, status: Unset, want: [3]string{"", "", "no nonce"}},
		{name: "no key", change: func(_ *testing.T, s *sample) { s.expect.Key = nil }, id: CheckReportData, status: Unset, want: [3]string{"", "", "no key"}},
		{name: "no exporter", change: func(_ *testing.T, s *sample) { s.expect.Exporter = [32]byte{} }, id: CheckReportData, status: Unset, want: [3]string{"", "", "no exporter"}},
		{name: "nothing expected", change: func(_ *testing.T, s *sample) {
			s.expect = Expectation{Reference: s.expect.Reference, Firmware: s.expect.Firmware}
		}, id: CheckReportData, status: Unset},
		{name: "zeros expected", change: func(_ *testing.T, s *sample) {
			s.Report.ReportData = [64]byte{}
			s.bare()
		}, id: CheckReportData, status: Unset, want: [3]string{"", "", "or zeros"}},
		{name: "two expectations", change: func(_ *testing.T, s *sample) { s.expect.ReportData = &s.Report.ReportData }, id: CheckReportData, status: Unset, want: [3]string{"", "", "both"}},

		{name: "older than accepted", change: func(_ *testing.T, s *sample) {
			s.expect.Stored, s.expect.StoredAt = true, clock.Add(-time.Hour-1)
			s.policy.MaxEvidenceAge = policy.Duration(time.Hour)
		}, id: CheckFreshness, want: [3]string{"at most 1h0m0s", "stored 2026-03-01T10:59:59Z", "too long ago"}},
		{name: "stored some time", change: func(_ *testing.T, s *sample) {
			s.expect.Stored = true
			s.policy.MaxEvidenceAge = policy.Duration(time.Hour)
		}, id: CheckFreshness, want: [3]string{"at most 1h0m0s", "", "does not say when"}},
		{name: "stored tomorrow", change: func(_ *testing.T, s *sample) { s.expect.Stored, s.expect.StoredAt = true, clock.Add(time.Second) },
			id: CheckFreshness, want: [3]string{"", "", "later than now"}},
		{name: "bare report of any age", change: func(_ *testing.T, s *sample) {
			s.bare()
			s.policy.MaxEvidenceAge = policy.Duration(time.Hour)
		}, id: CheckFreshness, want: [3]string{"at most", "", "does not say when"}},

		{name: "no pod.json", change: func(t *testing.T, s *sample) { s.change = func(e *Evidence) { e.Pod = nil } },
			id: CheckPod, status: Malformed, want: [3]string{"", "", "has no pod.json"}, also: append([]ID{CheckReportData}, podChecks...)},
		{name: "other pod.json", change: func(t *testing.T, s *sample) { s.change = func(e *Evidence) { e.Pod = documentOf(`,"tty":true`, "") } },
			id: CheckPod, want: [3]string{"", "", "another pod than the reference"}, also: append([]ID{CheckReportData}, podChecks...)},
		{name: "pod.json is rubbish", change: func(t *testing.T, s *sample) { s.change = func(e *Evidence) { e.Pod = []byte("rubbish") } },
			id: CheckPod, status: Malformed, also: append([]ID{CheckReportData}, podChecks...)},
		{name: "pod.json beside a bare report", change: func(_ *testing.T, s *sample) {
			s.bare()
			s.document = documentOf("", "")
		}, id: CheckPod, want: [3]string{"", "", "nothing ties this pod.json"}, also: podChecks},

		{name: "other measurement", change: func(_ *testing.T, s *sample) { s.Report.Measurement[0]++ }, id: CheckMeasurement, want: [3]string{"", "", "launched from something else, and no single change"}},
		{name: "no measurement named", change: func(_ *testing.T, s *sample) { s.bare(); s.policy.Measurements = nil }, id: CheckMeasurement, status: Unset, want: [3]string{"", "", "so any guest would do"}},
		{name: "empty measurements", change: func(_ *testing.T, s *sample) { s.bare(); s.policy.Measurements = []measure.Digest{} }, id: CheckMeasurement, status: Unset},
		{name: "measurement of others", change: func(_ *testing.T, s *sample) { s.bare(); s.policy.Measurements = []measure.Digest{{1}, {2}} }, id: CheckMeasurement, want: [3]string{" or ", "", "launched from something else"}},

		{name: "other host data", change: func(_ *testing.T, s *sample) { s.Report.HostData[0]++ }, id: CheckHostData, want: [3]string{"", "", "other host data"}},
		{name: "no host data", change: func(_ *testing.T, s *sample) { s.Report.HostData = [32]byte{} }, id: CheckHostData},
		{name: "host data of the policy", change: func(_ *testing.T, s *sample) { s.policy.HostData = &policy.HostData{3} }, id: CheckHostData, want: [3]string{"0300", "", "other host data"}},
		{name: "host data of no reference", change: func(_ *testing.T, s *sample) {
			s.policy.Measurements = []measure.Digest{s.Report.Measurement}
			s.expect.Reference = nil
			s.Report.HostData[0]++
		}, id: CheckHostData},
		{name: "other ID key", change: func(_ *testing.T, s *sample) { s.Report.IDKeyDigest[0]++ }, id: CheckIDKey, want: [3]string{"", "", "no accepted key"}},
		{name: "no ID block", change: func(_ *testing.T, s *sample) { s.Report.IDKeyDigest = [48]byte{} }, id: CheckIDKey, want: [3]string{"", "no ID block", "no accepted key"}},

		{name: "old version", change: func(_ *testing.T, s *sample) {
			s.Report.Version, s.Report.LaunchMit, s.Report.CurrentMit, s.Report.CPU = snp.Version2, 0, 0, snp.CPU{}
			s.policy.MinMitigations = nil
		}, id: CheckVersion, want: [3]string{"3 to 5", "2", "format"}},
		{name: "new version", change: func(_ *testing.T, s *sample) { s.policy.ReportVersion.Max = 3 }, id: CheckVersion, want: [3]string{"3", "5", "format"}},
		{name: "Milan", line: snp.LineMilan, change: func(*testing.T, *sample) {}, id: CheckProduct, want: [3]string{"Genoa or Turin", "Milan", "can be forged"}},
		{name: "other line", line: snp.LineTurin, change: func(_ *testing.T, s *sample) { s.policy.Products = []snp.Line{snp.LineGenoa} }, id: CheckProduct, want: [3]string{"Genoa", "Turin", "not accepted"}},
		{name: "VMPL 1", change: func(_ *testing.T, s *sample) { s.Report.VMPL = 1 }, id: CheckVMPL, want: [3]string{"0", "1", "privilege level"}},
		{name: "asked by the host", change: func(_ *testing.T, s *sample) { s.Report.VMPL = snp.VMPLHost }, id: CheckVMPL, want: [3]string{"0", "the host", "not the guest"}},
		{name: "asked by the host, VMPL 3 accepted", change: func(_ *testing.T, s *sample) { s.Report.VMPL, s.policy.VMPL = snp.VMPLHost, 3 }, id: CheckVMPL, want: [3]string{"3", "the host", "not the guest"}},

		{name: "debug", change: func(_ *testing.T, s *sample) { s.Report.Policy |= snp.PolicyDebug }, id: CheckDebug, want: [3]string{"not allowed", "allowed", "read and write the guest's memory"}},
		{name: "migration", change: func(_ *testing.T, s *sample) { s.Report.Policy |= snp.PolicyMigrateMA }, id: CheckMigration, want: [3]string{"not allowed", "allowed", "migration agent"}},
		{name: "CXL", change: func(_ *testing.T, s *sample) { s.Report.Policy |= snp.PolicyCXL }, id: CheckCXL, want: [3]string{"not allowed", "allowed", "CXL"}},
		{name: "SMT of the guest", change: func(_ *testing.T, s *sample) { s.policy.GuestPolicy.SMT = policy.Deny }, id: CheckSMT, want: [3]string{"not allowed", "allowed", "SMT"}},
		{name: "single socket", change: func(_ *testing.T, s *sample) { s.policy.GuestPolicy.SingleSocket = policy.Require }, id: CheckSingleSocket, want: [3]string{"required", "not required", "single socket"}},
		{name: "XTS", change: func(_ *testing.T, s *sample) { s.policy.GuestPolicy.XTS = policy.Require }, id: CheckXTS, want: [3]string{"required", "not required", "XTS"}},
		{name: "RAPL of the guest", change: func(_ *testing.T, s *sample) { s.policy.GuestPolicy.RAPLDisabled = policy.Require }, id: CheckRAPL, want: [3]string{"required", "not required", "RAPL"}},
		{name: "ciphertext hiding of the guest", change: func(_ *testing.T, s *sample) { s.policy.GuestPolicy.CiphertextHiding = policy.Require }, id: CheckCiphertextHiding, want: [3]string{"required", "not required", "ciphertext"}},
		{name: "page swap", change: func(_ *testing.T, s *sample) { s.policy.GuestPolicy.PageSwapDisabled = policy.Require }, id: CheckPageSwap, want: [3]string{"required", "not required", "swap"}},
		{name: "older ABI", change: func(_ *testing.T, s *sample) { s.policy.GuestPolicy.MinABI = policy.ABI{Major: 1, Minor: 52} }, id: CheckABI, want: [3]string{"1.52 or newer", "1.51", "older ABI"}},
		{name: "older major ABI", change: func(_ *testing.T, s *sample) { s.policy.GuestPolicy.MinABI = policy.ABI{Major: 2} }, id: CheckABI, want: [3]string{"2.0 or newer", "1.51", "older ABI"}},
		{name: "unknown policy bit", change: func(_ *testing.T, s *sample) { s.Report.Policy |= 1 << 26 }, id: CheckUnknownPolicy, want: [3]string{"none", "0x4000000", "not known"}},
		{name: "unknown policy bit at the end", change: func(_ *testing.T, s *sample) { s.Report.Policy |= 1 << 63 }, id: CheckUnknownPolicy, want: [3]string{"none", "0x8000000000000000", "not known"}},

		{name: "no alias check", change: func(_ *testing.T, s *sample) { s.Report.PlatformInfo &^= snp.PlatformAliasCheck }, id: CheckPlatformAlias, want: [3]string{"on", "off", "aliased"}},
		{name: "no ECC", change: func(_ *testing.T, s *sample) {
			s.policy.Platform.ECC, s.Report.PlatformInfo = policy.Require, snp.PlatformAliasCheck
		}, id: CheckPlatformECC, want: [3]string{"on", "off", "error correction"}},
		{name: "SMT of the machine", change: func(_ *testing.T, s *sample) { s.policy.Platform.SMT = policy.Deny }, id: CheckPlatformSMT, want: [3]string{"off", "on", "SMT"}},
		{name: "no TSME", change: func(_ *testing.T, s *sample) { s.policy.Platform.TSME = policy.Require }, id: CheckPlatformTSME, want: [3]string{"on", "off", "TSME"}},
		{name: "RAPL of the machine", change: func(_ *testing.T, s *sample) { s.policy.Platform.RAPLDisabled = policy.Require }, id: CheckPlatformRAPL, want: [3]string{"on", "off", "RAPL"}},
		{name: "ciphertext hiding of the machine", change: func(_ *testing.T, s *sample) { s.policy.Platform.CiphertextHiding = policy.Require }, id: CheckPlatformCiphertextHiding, want: [3]string{"on", "off", "ciphertext"}},
		{name: "TIO", change: func(_ *testing.T, s *sample) {
			s.policy.Platform.TIO, s.Report.PlatformInfo = policy.Deny, s.Report.PlatformInfo|snp.PlatformTIO
		}, id: CheckPlatformTIO, want: [3]string{"off", "on", "SEV-TIO"}},

		{name: "old microcode reported", change: tcb(func(s *sample) { s.Report.ReportedTCB.Microcode-- }), id: CheckTCBReported, want: [3]string{"ucode 200 or newer", "ucode 199", "ucode 199 is below 200"}},
		{name: "old boot loader reported", change: tcb(func(s *sample) { s.Report.ReportedTCB.Bootloader = 9 }), id: CheckTCBReported, want: [3]string{"bl 10", "bl 9", "bl 9 is below 10"}},
		{name: "old TEE reported", change: tcb(func(s *sample) { s.Report.ReportedTCB.TEE = 0 }), id: CheckTCBReported, want: [3]string{"tee 1", "tee 0", "tee 0 is below 1"}},
		{name: "old SNP reported", change: tcb(func(s *sample) { s.Report.ReportedTCB.SNP = 24 }), id: CheckTCBReported, want: [3]string{"snp 25", "snp 24", "snp 24 is below 25"}},
		{name: "old FMC reported", line: snp.LineTurin, change: tcb(func(s *sample) { s.Report.ReportedTCB.FMC = 1 }), id: CheckTCBReported, want: [3]string{"fmc 2", "fmc 1", "fmc 1 is below 2"}},
		{name: "old committed", change: func(_ *testing.T, s *sample) { s.Report.CommittedTCB.SNP--; s.policy.AllowProvisional = true }, id: CheckTCBCommitted, want: [3]string{"snp 25", "snp 24", "committed"}},
		{name: "old at launch", change: func(_ *testing.T, s *sample) { s.Report.LaunchTCB.SNP-- }, id: CheckTCBLaunch, want: [3]string{"snp 25", "snp 24", "launch"}},
		{name: "mitigations at launch", change: func(_ *testing.T, s *sample) { s.Report.LaunchMit = 6 }, id: CheckMitigationsLaunch, want: [3]string{"all of 0x1", "0x6", "missing: 0x1"}},
		{name: "mitigations now", change: func(_ *testing.T, s *sample) { s.Report.CurrentMit = 1 }, id: CheckMitigationsCurrent, want: [3]string{"all of 0x3", "0x1", "missing: 0x2"}},
		{name: "provisional firmware", change: func(_ *testing.T, s *sample) { s.Report.Committed.Build-- }, id: CheckProvisional, want: [3]string{"build 43", "build 42", "roll it back"}},
		{name: "provisional TCB", change: func(_ *testing.T, s *sample) { s.Report.CurrentTCB.Microcode++ }, id: CheckProvisional, want: [3]string{"ucode 201", "ucode 200", "roll it back"}},
		{name: "committed above current", change: func(_ *testing.T, s *sample) {
			s.Report.CommittedTCB.SNP++
			s.policy.AllowProvisional = true
		}, id: CheckProvisional, want: [3]string{"snp 25", "snp 26", "committed a newer one"}},
		{name: "committed build above current", change: func(_ *testing.T, s *sample) {
			s.Report.Committed.Build++
			s.policy.AllowProvisional = true
		}, id: CheckProvisional, want: [3]string{"build 43", "build 44", "committed a newer one"}},
		{name: "reported above current", change: func(_ *testing.T, s *sample) {
			s.Report.CurrentTCB.Microcode, s.Report.CommittedTCB.Microcode = 199, 199
			s.policy.AllowProvisional = true
			s.policy.MinTCB = nil
		}, id: CheckProvisional, want: [3]string{"ucode 199", "ucode 200", "reports a newer TCB version"}},
		{name: "other chip", change: func(_ *testing.T, s *sample) { s.policy.ChipIDs = []policy.ChipID{{9}} }, id: CheckChipID, want: [3]string{"0900", "", "none of those"}},

		{name: "other image", change: func(_ *testing.T, s *sample) { s.policy.Images = []policy.Image{imageOf(6)} }, id: CheckImage, want: [3]string{"image6@sha256:06", "app:1@sha256:07", "not accepted"}},
		{name: "an image more", change: func(_ *testing.T, s *sample) { s.policy.Images = []policy.Image{imageOf(7), imageOf(6)} }, id: CheckImage, want: [3]string{"", "", "does not run every image"}},
		{name: "an image less", change: func(t *testing.T, s *sample) {
			s.launch(t, []byte(strings.Replace(string(documentOf("", "")), `"containers":[`, `"containers":[{"name":"d","image":{"ref":"evil","digest":"`+digestOf(5)+`","config":"`+digestOf(5)+`"}},`, 1)))
		}, id: CheckImage, want: [3]string{"image7@", "evil@sha256:05", "not accepted"}},
		{name: "image without a manifest", change: func(t *testing.T, s *sample) {
			s.launch(t, []byte(strings.Replace(string(documentOf("", "")), `"digest":"`+digestOf(7)+`",`, "", 1)))
		}, id: CheckImage, want: [3]string{"image7@", "app:1 without a manifest, configuration sha256:08", "not accepted"}},
		{name: "image of another reference", change: func(_ *testing.T, s *sample) {
			s.policy.Images = nil
			s.expect.Reference.Image.Manifest = pod.Digest{1}
		}, id: CheckImage, want: [3]string{"app:1@sha256:01", "app:1@sha256:07", "not accepted"}},
		{name: "configuration of another reference", change: func(_ *testing.T, s *sample) {
			s.policy.Images = nil
			s.expect.Reference.Image = &reference.Image{Ref: "app:1", Config: pod.Digest{1}}
		}, id: CheckImage, want: [3]string{"", "", "another configuration"}},
		{name: "image of a bare report", change: func(_ *testing.T, s *sample) { s.bare(); s.policy.Images = []policy.Image{imageOf(7)} }, id: CheckImage, want: [3]string{"image7@", "", "no pod.json"}},
		{name: "host mounts", change: func(t *testing.T, s *sample) {
			s.launch(t, documentOf(`,"mounts":[{"type":"bind","source":"/srv"}]`, ""))
		},
			id: CheckPodHostMounts, want: [3]string{"none", "c: /srv", "directory of the host"}},
		{name: "volumes", change: func(t *testing.T, s *sample) { s.launch(t, documentOf("", `,"volumes":[{"name":"data"}]`)) },
			id: CheckPodVolumes, want: [3]string{"none", "data", "volume"}},
		{name: "privileged", change: func(t *testing.T, s *sample) { s.launch(t, documentOf(`,"privileged":true`, "")) },
			id: CheckPodPrivileged, want: [3]string{"none", "c: privileged", "act as the machine"}},
	}
	tested := map[ID]bool{CheckUnknownPlatform: true, CheckPodExec: true} // never fail; see TestWarnings
	for _, tt := range tests {
		tested[tt.id] = true
		t.Run(tt.name, func(t *testing.T) {
			if tt.line == snp.LineUnknown {
				tt.line = snp.LineGenoa
			}
			if tt.status == "" {
				tt.status = Fail
			}
			s := newSample(t, tt.line)
			tt.change(t, s)
			r := s.decide(t)
			got := failed(t, r)
			for _, id := range tt.also {
				if i := slices.Index(got, id); i < 0 {
					t.Errorf("%s did not fail, too", id)
				} else {
					got = slices.Delete(got, i, i+1)
				}
			}
			if !slices.Equal(got, []ID{tt.id}) {
				t.Fatalf("failed: %v, want %s", got, tt.id)
			}
			c := find(t, r, tt.id)
			if c.Status != tt.status || c.Message == "" {
				t.Errorf("got %+v, want %s and why", c, tt.status)
			}
			for i, got := range []string{c.Expected, c.Actual, c.Message} {
				if !strings.Contains(got, tt.want[i]) {
					t.Errorf("got %q, want …%s…", got, tt.want[i])
				}
			}
			for _, id := range podChecks {
				if c := find(t, r, id); slices.Contains(tt.also, id) && (c.Status != Skipped || c.Actual != "") {
					t.Errorf("%+v was made on a pod that was not attested", c)
				}
			}
		})
	}
	for _, w := range rows {
		if !w.stops && !tested[w.id] {
			t.Errorf("nothing makes check %s fail", w.id)
		}
	}
}

// tcb changes the reported TCB version, and has AMD certify a key for it.
func tcb(change func(*sample)) func(*testing.T, *sample) {
	return func(t *testing.T, s *sample) {
		good := s.Report
		change(s)
		reported := s.Report.ReportedTCB
		s.SetTCB(reported)
		s.Report = good
		s.Report.ReportedTCB = reported
		s.made.VEK = s.vekDER(t)
	}
}

// TestWarnings leaves things open that a policy may leave open: the result passes, and says so.
func TestWarnings(t *testing.T) {
	tests := []struct {
		name   string
		line   snp.Line
		change func(t *testing.T, s *sample)
		id     ID
		status Status
	}{
		{"firmware not at hand", snp.LineGenoa, func(_ *testing.T, s *sample) { s.expect.Firmware = nil }, CheckReference, Warn},
		{"another firmware at hand", snp.LineGenoa, func(t *testing.T, s *sample) { s.expect.Firmware = []measure.Firmware{readFirmware(t, 8<<10)} }, CheckReference, Warn},
		{"no reference", snp.LineGenoa, func(_ *testing.T, s *sample) {
			s.policy.Measurements = []measure.Digest{s.Report.Measurement}
			s.expect.Reference = nil
		}, CheckReference, Open},
		{"no revocation list", snp.LineGenoa, func(_ *testing.T, s *sample) {
			s.policy.CRL = policy.CRLSoft
			s.change = func(e *Evidence) { e.CRL = nil }
		}, CheckCRL, Warn},
		{"stored", snp.LineGenoa, func(_ *testing.T, s *sample) { s.expect.Stored = true }, CheckFreshness, Warn},
		{"stored just now", snp.LineGenoa, func(_ *testing.T, s *sample) {
			s.expect.Stored, s.expect.StoredAt = true, clock.Add(-time.Hour)
			s.policy.MaxEvidenceAge = policy.Duration(time.Hour)
		}, CheckFreshness, Warn},
		{"bare report", snp.LineGenoa, func(_ *testing.T, s *sample) { s.bare() }, CheckFreshness, Warn},
		{"no pod of a bare report", snp.LineGenoa, func(_ *testing.T, s *sample) { s.bare() }, CheckPod, Open},
		{"no constraints of a bare report", snp.LineGenoa, func(_ *testing.T, s *sample) { s.bare() }, CheckPodHostMounts, Open},
		{"nobody named of a bare report", snp.LineGenoa, func(_ *testing.T, s *sample) { s.bare() }, CheckPodExec, Open},
		{"no image of a bare report", snp.LineGenoa, func(_ *testing.T, s *sample) { s.bare() }, CheckImage, Open},
		{"no host data of a bare report", snp.LineGenoa, func(_ *testing.T, s *sample) { s.bare() }, CheckHostData, Open},
		{"no ID key", snp.LineGenoa, func(_ *testing.T, s *sample) { s.bare() }, CheckIDKey, Open},
		{"Milan allowed", snp.LineMilan, func(_ *testing.T, s *sample) { s.policy.AllowMilan = true }, CheckProduct, Warn},
		{"debug allowed", snp.LineGenoa, func(_ *testing.T, s *sample) {
			s.Report.Policy |= snp.PolicyDebug
			s.policy.GuestPolicy.Debug = true
		}, CheckDebug, Warn},
		{"unknown platform bit", snp.LineTurin, func(_ *testing.T, s *sample) { s.Report.PlatformInfo |= 1 << 6 }, CheckUnknownPlatform, Warn},
		{"no minimum", snp.LineGenoa, func(_ *testing.T, s *sample) { s.policy.MinTCB = nil }, CheckTCBReported, Warn},
		{"minimum of another line", snp.LineGenoa, func(_ *testing.T, s *sample) {
			s.policy.MinTCB = map[snp.Line]policy.TCB{snp.LineTurin: {FMC: new(uint8)}}
		}, CheckTCBLaunch, Warn},
		{"minimum not applied", snp.LineGenoa, func(_ *testing.T, s *sample) { s.policy.TCBApplies = []policy.TCBName{policy.Reported} }, CheckTCBLaunch, Open},
		{"no mitigations", snp.LineGenoa, func(_ *testing.T, s *sample) { s.policy.MinMitigations = nil }, CheckMitigationsCurrent, Open},
		{"no chips", snp.LineGenoa, func(_ *testing.T, s *sample) { s.policy.ChipIDs = nil }, CheckChipID, Warn},
		{"nobody says who may exec", snp.LineGenoa, func(_ *testing.T, s *sample) { s.policy.PodConstraints.Exec = false }, CheckPodExec, Warn},
		{"host mounts allowed", snp.LineGenoa, func(t *testing.T, s *sample) {
			s.launch(t, documentOf(`,"mounts":[{"type":"bind","source":"/srv"}]`, ""))
			s.policy.PodConstraints.HostMounts = true
		}, CheckPodHostMounts, Warn},
		{"volumes allowed", snp.LineGenoa, func(t *testing.T, s *sample) {
			s.launch(t, documentOf("", `,"volumes":[{"name":"data"}]`))
			s.policy.PodConstraints.UnverifiedVolumes = true
		}, CheckPodVolumes, Warn},
		{"image of the reference", snp.LineGenoa, func(_ *testing.T, s *sample) { s.policy.Images = nil }, CheckImage, Pass},
		{"no image anywhere", snp.LineGenoa, func(_ *testing.T, s *sample) { s.policy.Images, s.expect.Reference.Image = nil, nil }, CheckImage, Open},
		{"reference or another digest", snp.LineGenoa, func(_ *testing.T, s *sample) { s.policy.Measurements = []measure.Digest{{9}} }, CheckMeasurement, Pass},
		{"pod.json of a bare report's reference", snp.LineGenoa, func(_ *testing.T, s *sample) {
			document, ref := s.document, s.expect.Reference
			s.bare()
			s.document, s.expect.Reference = document, ref
		}, CheckPod, Pass},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newSample(t, tt.line)
			tt.change(t, s)
			r := s.decide(t)
			if err := r.Err(); err != nil {
				t.Fatal(err)
			}
			c := find(t, r, tt.id)
			if c.Status != tt.status || (c.Message == "") != (tt.status == Pass) {
				t.Errorf("got %+v, want %s and why", c, tt.status)
			}
			warned := slices.ContainsFunc(r.Warnings(), func(w Check) bool { return w.ID == tt.id })
			if warned != (tt.status == Warn) {
				t.Errorf("warnings: %v", r.Warnings())
			}
		})
	}
}

// TestExplained launches what differs from the reference in one thing, and wants the words.
func TestExplained(t *testing.T) {
	other := documentOf(`,"tty":true`, "")
	small := readFirmware(t, 8<<10)
	for _, tt := range []struct {
		want   string
		change func(t *testing.T, s *sample)
	}{
		{"4 vCPUs", func(t *testing.T, s *sample) { s.relaunch(t, func(in *measure.Input) { in.VCPUs = 4 }) }},
		{"CPU EPYC-Milan", func(t *testing.T, s *sample) { s.relaunch(t, func(in *measure.Input) { in.CPU = measure.EPYCMilan }) }},
		{"SEV features 0x21", func(t *testing.T, s *sample) { s.relaunch(t, func(in *measure.Input) { in.SEVFeatures = 0x21 }) }},
		{"kernel hashes off", func(t *testing.T, s *sample) {
			s.relaunch(t, func(in *measure.Input) {
				in.NoKernelHashes, in.Kernel, in.Initrd, in.CommandLine = true, measure.FileHash{}, measure.FileHash{}, ""
			})
		}},
		{"firmware " + pod.Digest(small.SHA256).String(), func(t *testing.T, s *sample) {
			s.relaunch(t, func(in *measure.Input) { in.Firmware = small })
			s.expect.Firmware = append(s.expect.Firmware, small)
		}},
		{"pod " + pod.DigestOf(other).String(), func(t *testing.T, s *sample) { // the host's word for it
			s.relaunch(t, func(in *measure.Input) { in.CommandLine = "console=hvc0 cradle.pod=" + pod.DigestOf(other).String() })
			s.Report.HostData = pod.DigestOf(other)
		}},
		{"pod " + pod.DigestOf(other).String(), func(t *testing.T, s *sample) { // the evidence's
			s.relaunch(t, func(in *measure.Input) { in.CommandLine = "console=hvc0 cradle.pod=" + pod.DigestOf(other).String() })
			s.change = func(e *Evidence) { e.Pod = other }
		}},
	} {
		s := newSample(t, snp.LineGenoa)
		tt.change(t, s)
		c := find(t, s.decide(t), CheckMeasurement)
		if want := "the guest was launched from something else; it would match with " + tt.want; c.Status != Fail || c.Message != want {
			t.Errorf("got %s %q, want %q", c.Status, c.Message, want)
		}
	}
}

// TestReference hands in references that cannot be trusted: nothing else is looked at.
func TestReference(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, s *sample)
		status Status
		want   string
	}{
		{"measurement changed", func(_ *testing.T, s *sample) {
			s.Report.Measurement[0]++
			s.expect.Reference.Measurement[0]++
		}, Fail, "disagrees with its own inputs"},
		{"seed of another firmware", func(t *testing.T, s *sample) {
			r := s.expect.Reference
			r.Inputs.FirmwareSeed = readFirmware(t, 8<<10).Seed
			in, err := r.Input()
			if err != nil {
				t.Fatal(err)
			}
			if r.Measurement, err = in.Digest(); err != nil {
				t.Fatal(err)
			}
			r.Inputs.GuestPolicy, r.IDKeyDigest = 0, policy.KeyDigest{}
			s.Report.Measurement = r.Measurement
		}, Fail, "inputs.firmwareSeed"},
		{"not valid", func(_ *testing.T, s *sample) { s.expect.Reference.Inputs.VCPUs = 0 }, Malformed, "0 vCPUs"},
		{"not given", func(_ *testing.T, s *sample) {
			s.policy.Reference = &policy.Reference{File: "ref.json"}
			s.policy.Measurements = []measure.Digest{s.Report.Measurement}
			s.expect.Reference = nil
		}, Unset, "was not given"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newSample(t, snp.LineGenoa)
			tt.change(t, s)
			wantStop(t, s.decide(t), CheckReference, tt.status, tt.want)
		})
	}
}

// TestAllAtOnce wants every failure of a pod that has many, with its words.
func TestAllAtOnce(t *testing.T) {
	s := newSample(t, snp.LineGenoa)
	s.Report.Policy |= snp.PolicyDebug | snp.PolicyMigrateMA
	s.Report.VMPL = 2
	s.Report.LaunchTCB.Bootloader, s.Report.LaunchTCB.SNP = 9, 5
	r := s.decide(t)
	if got, want := failed(t, r), []ID{CheckVMPL, CheckDebug, CheckMigration, CheckTCBLaunch}; !slices.Equal(got, want) {
		t.Fatalf("failed: %v, want %v", got, want)
	}
	want := `snp: check vmpl: fail: another privilege level in the guest asked for the report (expected 0, got 2)
snp: check guest-debug: fail: the host may read and write the guest's memory (expected not allowed, got allowed)
snp: check guest-migration: fail: a migration agent may move the guest and its secrets elsewhere (expected not allowed, got allowed)
snp: check tcb-launch: fail: the launch TCB version is too old: bl 9 is below 10, snp 5 is below 25 ` +
		`(expected bl 10 tee 1 snp 25 ucode 200 or newer, got bl 9 tee 1 snp 5 ucode 200)`
	if got := r.Err().Error(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// TestNeverPassedUnchecked takes each check away from a result that passed, doubles it, and gives it every other status:
// none of these results may pass, unless a policy can leave the check open.
func TestNeverPassedUnchecked(t *testing.T) {
	good := newSample(t, snp.LineGenoa).decide(t)
	if new(Result).Passed() {
		t.Error("the zero result passed")
	}
	may := map[ID][]Status{}
	for _, w := range rows {
		may[w.id] = w.may
		if slices.ContainsFunc(w.may, func(s Status) bool { return s != Warn && s != Open }) {
			t.Errorf("%s may be %v", w.id, w.may)
		}
	}
	for _, id := range []ID{
		CheckPolicy, CheckEvidence, CheckReport, CheckSigner, CheckVEK, CheckLine, CheckRoot, CheckChain, CheckValidity, CheckSignature, CheckTCB,
		CheckReportData, CheckMeasurement, CheckVersion, CheckVMPL, CheckUnknownPolicy, CheckPlatformAlias, CheckProvisional,
	} {
		if may[id] != nil {
			t.Errorf("%s may be %v", id, may[id])
		}
	}
	for i, c := range good.Checks {
		if (Result{Checks: slices.Delete(slices.Clone(good.Checks), i, i+1)}).Passed() {
			t.Errorf("passed without %s", c.ID)
		}
		if (Result{Checks: append(slices.Clone(good.Checks), c)}).Passed() {
			t.Errorf("passed with %s twice", c.ID)
		}
		for _, status := range []Status{"", Fail, Malformed, Missing, Unreachable, Unset, Warn, Open, Skipped, "PASS"} {
			r := Result{Checks: slices.Clone(good.Checks)}
			r.Checks[i].Status = status
			if r.Passed() != slices.Contains(may[c.ID], status) {
				t.Errorf("%s being %q: passed %t", c.ID, status, r.Passed())
			}
		}
	}
	if (Result{Checks: append(slices.Clone(good.Checks), Check{ID: "other", Status: Pass})}).Passed() {
		t.Error("passed with a check that does not exist")
	}
}

func TestRejected(t *testing.T) {
	for _, id := range []ID{CheckPolicy, CheckReference, CheckEvidence} {
		r := Rejected(id, Malformed, errors.New("line 1: rubbish"))
		var e *Error
		if !errors.As(r.Err(), &e) || len(e.Failed) != len(rows) || r.Verdict() != VerdictError {
			t.Fatalf("got %v", r.Err())
		}
		for _, c := range e.Failed {
			if want := (Check{id, Malformed, "", "", "line 1: rubbish"}); c.ID == id && c != want || c.ID != id && c.Status != Skipped {
				t.Errorf("got %+v", c)
			}
		}
		if c := e.Cause(); c.ID != id {
			t.Errorf("got cause %+v", c)
		}
		if got, want := r.Err().Error(), "snp: check "+string(id)+": malformed: line 1: rubbish"; got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}

// fields are ways to make each field of a Policy decide: a result that differs when only this field does.
var fields = map[string]func(s *sample){
	"Reference":                    func(s *sample) { s.expect.Reference = nil; s.policy.Reference = &policy.Reference{File: "ref.json"} },
	"Images":                       func(s *sample) { s.policy.Images = []policy.Image{imageOf(6)} },
	"Products":                     func(s *sample) { s.policy.Products = []snp.Line{snp.LineTurin} },
	"AllowMilan":                   func(s *sample) { s.policy.AllowMilan = true },
	"ReportVersion.Min":            func(s *sample) { s.Report.Version = snp.Version3; s.policy.ReportVersion.Min = 4 },
	"ReportVersion.Max":            func(s *sample) { s.policy.ReportVersion.Max = 4 },
	"VMPL":                         func(s *sample) { s.policy.VMPL = 1 },
	"Signer":                       func(s *sample) { s.policy.Signer = policy.VLEK },
	"GuestPolicy.Debug":            func(s *sample) { s.Report.Policy |= snp.PolicyDebug; s.policy.GuestPolicy.Debug = true },
	"GuestPolicy.MigrateMA":        func(s *sample) { s.Report.Policy |= snp.PolicyMigrateMA; s.policy.GuestPolicy.MigrateMA = true },
	"GuestPolicy.CXL":              func(s *sample) { s.Report.Policy |= snp.PolicyCXL; s.policy.GuestPolicy.CXL = true },
	"GuestPolicy.SMT":              func(s *sample) { s.policy.GuestPolicy.SMT = policy.Deny },
	"GuestPolicy.SingleSocket":     func(s *sample) { s.policy.GuestPolicy.SingleSocket = policy.Require },
	"GuestPolicy.XTS":              func(s *sample) { s.policy.GuestPolicy.XTS = policy.Require },
	"GuestPolicy.RAPLDisabled":     func(s *sample) { s.policy.GuestPolicy.RAPLDisabled = policy.Require },
	"GuestPolicy.CiphertextHiding": func(s *sample) { s.policy.GuestPolicy.CiphertextHiding = policy.Require },
	"GuestPolicy.PageSwapDisabled": func(s *sample) { s.policy.GuestPolicy.PageSwapDisabled = policy.Require },
	"GuestPolicy.MinABI.Major":     func(s *sample) { s.policy.GuestPolicy.MinABI.Major = 2 },
	"GuestPolicy.MinABI.Minor":     func(s *sample) { s.Report.Policy &^= 0xffff; s.policy.GuestPolicy.MinABI.Minor = 1 },
	"Platform.AliasCheck":          func(s *sample) { s.policy.Platform.AliasCheck = policy.Deny },
	"Platform.ECC":                 func(s *sample) { s.policy.Platform.ECC = policy.Deny },
	"Platform.SMT":                 func(s *sample) { s.policy.Platform.SMT = policy.Deny },
	"Platform.TSME":                func(s *sample) { s.policy.Platform.TSME = policy.Require },
	"Platform.RAPLDisabled":        func(s *sample) { s.policy.Platform.RAPLDisabled = policy.Require },
	"Platform.CiphertextHiding":    func(s *sample) { s.policy.Platform.CiphertextHiding = policy.Require },
	"Platform.TIO":                 func(s *sample) { s.policy.Platform.TIO = policy.Require },
	"MinTCB":                       func(s *sample) { s.policy.MinTCB = map[snp.Line]policy.TCB{snp.LineGenoa: {SNP: 26}} },
	"TCBApplies":                   func(s *sample) { s.Report.LaunchTCB.SNP = 1; s.policy.TCBApplies = []policy.TCBName{policy.Reported} },
	"MinMitigations":               func(s *sample) { s.policy.MinMitigations = map[snp.Line]policy.Mitigations{snp.LineGenoa: {Launch: 2}} },
	"AllowProvisional":             func(s *sample) { s.Report.Committed.Build--; s.policy.AllowProvisional = true },
	"ChipIDs":                      func(s *sample) { s.policy.ChipIDs = []policy.ChipID{{1}} },
	"Measurements": func(s *sample) {
		s.expect.Reference = nil
		s.policy.Measurements = []measure.Digest{s.Report.Measurement}
	},
	"HostData":                         func(s *sample) { s.policy.HostData = &policy.HostData{1} },
	"IDKeyDigests":                     func(s *sample) { s.Report.IDKeyDigest = [48]byte{1}; s.policy.IDKeyDigests = []policy.KeyDigest{{1}} },
	"CRL":                              func(s *sample) { s.change = func(e *Evidence) { e.CRL = nil }; s.policy.CRL = policy.CRLSoft },
	"MaxEvidenceAge":                   func(s *sample) { s.expect.Stored = true; s.policy.MaxEvidenceAge = 1 },
	"PodConstraints.Exec":              func(s *sample) { s.policy.PodConstraints.Exec = false },
	"PodConstraints.HostMounts":        func(s *sample) { s.policy.PodConstraints.HostMounts = true },
	"PodConstraints.UnverifiedVolumes": func(s *sample) { s.policy.PodConstraints.UnverifiedVolumes = true },
	"PodConstraints.Privileged":        func(s *sample) { s.policy.PodConstraints.Privileged = true },
}

// TestNoDeadField wants each field of Policy, found by reflection, to turn a check.
func TestNoDeadField(t *testing.T) {
	left := map[string]bool{}
	for name := range fields {
		left[name] = true
	}
	base := func(path string) *sample {
		line := snp.LineGenoa
		if path == "AllowMilan" {
			line = snp.LineMilan
		}
		s := newSample(t, line)
		switch path {
		case "Reference":
			s.policy.Measurements = []measure.Digest{s.Report.Measurement}
		case "ReportVersion.Min":
			s.policy.MinMitigations, s.Report.LaunchMit, s.Report.CurrentMit = nil, 0, 0
		case "PodConstraints.HostMounts":
			s.launch(t, documentOf(`,"mounts":[{"type":"bind","source":"/srv"}]`, ""))
		case "PodConstraints.UnverifiedVolumes":
			s.launch(t, documentOf("", `,"volumes":[{"name":"data"}]`))
		case "PodConstraints.Privileged":
			s.launch(t, documentOf(`,"privileged":true`, ""))
		}
		return s
	}
	var walk func(path string, field reflect.Type, index []int)
	walk = func(path string, field reflect.Type, index []int) {
		if field.Kind() == reflect.Struct {
			for i := range field.NumField() {
				walk(strings.TrimPrefix(path+"."+field.Field(i).Name, "."), field.Field(i).Type, append(slices.Clone(index), i))
			}
			return
		}
		if path == "Version" { // has one value
			return
		}
		delete(left, path)
		change, ok := fields[path]
		if !ok {
			t.Errorf("no test knows what %s decides", path)
			return
		}
		with, without := base(path), base(path)
		before := without.policy
		change(with)
		change(without)
		// without has all that change made but the field itself.
		without.policy = before
		only := reflect.ValueOf(&before).Elem()
		only.FieldByIndex(index).Set(reflect.ValueOf(with.policy).FieldByIndex(index))
		if !reflect.DeepEqual(before, with.policy) {
			t.Errorf("%s: its test changes other fields too", path)
		}
		a, b := with.decide(t), without.decide(t)
		if slices.EqualFunc(a.Checks, b.Checks, func(a, b Check) bool { return a.Status == b.Status }) {
			t.Errorf("%s decides nothing: %v", path, a.Err())
		}
		if a.Passed() == b.Passed() && path != "PodConstraints.Exec" {
			t.Errorf("%s is only a matter of words", path)
		}
	}
	walk("", reflect.TypeFor[policy.Policy](), nil)
	for name := range left {
		t.Errorf("there is no field %s", name)
	}
}

// TestRealByDefault judges real reports by the default policy and the measurement and data of the report itself.
func TestRealByDefault(t *testing.T) {
	// of a version 2 report the alias check is a bit that was reserved then
	v2 := []ID{CheckVersion, CheckProduct, CheckPlatformAlias}
	for _, tt := range []struct {
		report string
		failed []ID
		warned []ID
	}{
		{"gosevguest-milan-v2-debugpolicy", []ID{CheckVersion, CheckProduct, CheckDebug, CheckPlatformAlias}, nil},
		{"trustee-milan-v2", append(v2, CheckProvisional), nil},
		{"oak-milan-v3", []ID{CheckProduct}, nil},
		{"trustee-siena-v3", nil, nil},
		{"oak-genoa-v5", nil, nil},
		{"oak-turin-v5", nil, []ID{CheckUnknownPlatform}},
	} {
		t.Run(tt.report, func(t *testing.T) {
			i := slices.IndexFunc(reals, func(r real) bool { return r.name == tt.report })
			e := reals[i].evidence(t)
			report, err := snp.Parse(e.Report)
			if err != nil {
				t.Fatal(err)
			}
			c := Config{Now: now, Roots: AMD(), Policy: policy.Default()}
			decide := func(x Expectation) Result {
				t.Helper()
				v, err := New(c)
				if err != nil {
					t.Fatal(err)
				}
				return v.Verify(t.Context(), e, x)
			}
			x := Expectation{ReportData: &report.ReportData}
			if got := failed(t, decide(x)); !slices.Contains(got, CheckMeasurement) {
				t.Errorf("without a measurement failed: %v", got)
			}
			c.Policy.Measurements = []measure.Digest{report.Measurement}
			r := decide(x)
			if got := failed(t, r); !slices.Equal(got, tt.failed) {
				t.Errorf("failed: %v, want %v", got, tt.failed)
			}
			warned := append([]ID{CheckCRL, CheckFreshness}, tt.warned...)
			warned = append(warned, CheckTCBReported, CheckTCBCommitted, CheckTCBLaunch, CheckChipID)
			var got []ID
			for _, w := range r.Warnings() {
				got = append(got, w.ID)
			}
			if !slices.Equal(got, warned) {
				t.Errorf("warnings: %v, want %v", got, warned)
			}
			data := report.ReportData
			data[63] ^= 1
			if got := failed(t, decide(Expectation{ReportData: &data})); !slices.Contains(got, CheckReportData) {
				t.Errorf("with other report data failed: %v", got)
			}
			if got := failed(t, decide(Expectation{})); !slices.Contains(got, CheckReportData) || !slices.Contains(got, CheckPod) {
				t.Errorf("without report data failed: %v", got)
			}
			c.Policy.Measurements[0][0] ^= 1
			if got := failed(t, decide(x)); !slices.Contains(got, CheckMeasurement) {
				t.Errorf("with another measurement failed: %v", got)
			}
		})
	}
}

// BenchmarkVerify is the whole decision on a pod, nothing of it kept from before but the firmware.
func BenchmarkVerify(b *testing.B) {
	s := newSample(b, snp.LineGenoa)
	v, err := New(Config{Now: now, Roots: s.roots(b), Policy: s.policy})
	if err != nil {
		b.Fatal(err)
	}
	e := s.made
	e.Report, e.Pod = s.sign(b), s.document
	b.ReportAllocs()
	for b.Loop() {
		if err := v.Verify(b.Context(), e, s.expect).Err(); err != nil {
			b.Fatal(err)
		}
	}
}
