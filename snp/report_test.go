package snp

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
)

var update = flag.Bool("update", false, "write the golden files")

// realReports returns the real reports by name.
func realReports(t testing.TB) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for _, path := range need.Fixtures(t, "fixtures/*.report") {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		out[strings.TrimSuffix(filepath.Base(path), ".report")] = b
	}
	return out
}

// synthetic returns a valid report of the given version, all of whose fields differ from zero. Nobody signed it.
func synthetic(version uint32, cpu CPU) *Report {
	layout := cpu.Product().Line().Layout()
	tcb := func(n uint8) TCB {
		t := TCB{Layout: layout, Bootloader: n, TEE: 1, SNP: n + 10, Microcode: n + 80}
		if layout == LayoutTurin {
			t.FMC = 2
		}
		return t
	}
	r := &Report{
		Version:       version,
		GuestSVN:      7,
		Policy:        PolicyReserved1 | PolicySMT | 1<<8 | 51,
		VMPL:          1,
		SignatureAlgo: AlgoECDSAP384SHA384,
		CurrentTCB:    tcb(4),
		PlatformInfo:  PlatformSMT | PlatformECC | PlatformAliasCheck,
		KeyInfo:       NewKeyInfo(true, false, SignerVCEK),
		ReportedTCB:   tcb(3),
		CommittedTCB:  tcb(2),
		LaunchTCB:     tcb(1),
		Current:       Firmware{Build: 43, Minor: 55, Major: 1},
		Committed:     Firmware{Build: 40, Minor: 54, Major: 1},
	}
	for i, field := range [][]byte{r.FamilyID[:], r.ImageID[:], r.ReportData[:], r.Measurement[:], r.HostData[:], r.IDKeyDigest[:],
		r.AuthorKeyDigest[:], r.ReportID[:], r.ReportIDMA[:], r.ChipID[:], r.Signature.R[:48], r.Signature.S[:48]} {
		for j := range field {
			field[j] = byte(i<<4 + j + 1)
		}
	}
	if layout == LayoutTurin {
		clear(r.ChipID[8:])
	}
	if version >= Version3 {
		r.CPU = cpu
	}
	if version >= Version5 {
		r.LaunchMit, r.CurrentMit = 3, 7
	}
	return r
}

var (
	cpuMilan   = CPU{0x19, 0x01, 1}
	cpuGenoa   = CPU{0x19, 0x11, 1}
	cpuBergamo = CPU{0x19, 0xa0, 2}
	cpuTurin   = CPU{0x1a, 0x02, 1}
)

var synthetics = []struct {
	name    string
	version uint32
	cpu     CPU
}{
	{"milan-v2", Version2, cpuMilan},
	{"turin-v2", Version2, cpuTurin},
	{"milan-v3", Version3, cpuMilan},
	{"genoa-v3", Version3, cpuGenoa},
	{"bergamo-v3", Version3, cpuBergamo},
	{"genoa-v5", Version5, cpuGenoa},
	{"turin-v5", Version5, cpuTurin},
}

func mustBytes(t testing.TB, r *Report) []byte {
	t.Helper()
	b, err := r.Bytes()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestSyntheticRoundTrip(t *testing.T) {
	for _, s := range synthetics {
		t.Run(s.name, func(t *testing.T) {
			want := synthetic(s.version, s.cpu)
			got, err := Parse(mustBytes(t, want))
			if err != nil {
				t.Fatal(err)
			}
			if *got != *want {
				t.Errorf("got  %+v\nwant %+v", *got, *want)
			}
		})
	}
}

// TestOffsets holds the fields against the specification's table: the bytes at the offset, and nothing else, change.
func TestOffsets(t *testing.T) {
	fields := []struct {
		name   string
		offset int
		set    func(*Report)
	}{
		{"GUEST_SVN", 0x004, func(r *Report) { r.GuestSVN ^= 1 }},
		{"POLICY", 0x008, func(r *Report) { r.Policy ^= 1 }},
		{"FAMILY_ID", 0x010, func(r *Report) { r.FamilyID[0] ^= 1 }},
		{"IMAGE_ID", 0x020, func(r *Report) { r.ImageID[0] ^= 1 }},
		{"VMPL", 0x030, func(r *Report) { r.VMPL ^= 1 }},
		{"CURRENT_TCB", 0x038, func(r *Report) { r.CurrentTCB.FMC ^= 1 }},
		{"PLATFORM_INFO", 0x040, func(r *Report) { r.PlatformInfo ^= 1 }},
		{"KEY_INFO", 0x048, func(r *Report) { r.KeyInfo ^= 1 }},
		{"REPORT_DATA", 0x050, func(r *Report) { r.ReportData[0] ^= 1 }},
		{"MEASUREMENT", 0x090, func(r *Report) { r.Measurement[0] ^= 1 }},
		{"HOST_DATA", 0x0c0, func(r *Report) { r.HostData[0] ^= 1 }},
		{"ID_KEY_DIGEST", 0x0e0, func(r *Report) { r.IDKeyDigest[0] ^= 1 }},
		{"AUTHOR_KEY_DIGEST", 0x110, func(r *Report) { r.AuthorKeyDigest[0] ^= 1 }},
		{"REPORT_ID", 0x140, func(r *Report) { r.ReportID[0] ^= 1 }},
		{"REPORT_ID_MA", 0x160, func(r *Report) { r.ReportIDMA[0] ^= 1 }},
		{"REPORTED_TCB", 0x180, func(r *Report) { r.ReportedTCB.FMC ^= 1 }},
		{"REPORTED_TCB boot loader", 0x181, func(r *Report) { r.ReportedTCB.Bootloader ^= 1 }},
		{"REPORTED_TCB TEE", 0x182, func(r *Report) { r.ReportedTCB.TEE ^= 1 }},
		{"REPORTED_TCB SNP", 0x183, func(r *Report) { r.ReportedTCB.SNP ^= 1 }},
		{"REPORTED_TCB microcode", 0x187, func(r *Report) { r.ReportedTCB.Microcode ^= 1 }},
		{"CPUID_MOD_ID", 0x189, func(r *Report) { r.CPU.Model ^= 1 }},
		{"CPUID_STEP", 0x18a, func(r *Report) { r.CPU.Stepping ^= 1 }},
		{"CHIP_ID", 0x1a0, func(r *Report) { r.ChipID[0] ^= 1 }},
		{"COMMITTED_TCB", 0x1e0, func(r *Report) { r.CommittedTCB.FMC ^= 1 }},
		{"CURRENT_BUILD", 0x1e8, func(r *Report) { r.Current.Build ^= 1 }},
		{"CURRENT_MINOR", 0x1e9, func(r *Report) { r.Current.Minor ^= 1 }},
		{"CURRENT_MAJOR", 0x1ea, func(r *Report) { r.Current.Major ^= 1 }},
		{"COMMITTED_BUILD", 0x1ec, func(r *Report) { r.Committed.Build ^= 1 }},
		{"COMMITTED_MINOR", 0x1ed, func(r *Report) { r.Committed.Minor ^= 1 }},
		{"COMMITTED_MAJOR", 0x1ee, func(r *Report) { r.Committed.Major ^= 1 }},
		{"LAUNCH_TCB", 0x1f0, func(r *Report) { r.LaunchTCB.FMC ^= 1 }},
		{"LAUNCH_MIT_VECTOR", 0x1f8, func(r *Report) { r.LaunchMit ^= 1 }},
		{"CURRENT_MIT_VECTOR", 0x200, func(r *Report) { r.CurrentMit ^= 1 }},
		{"SIGNATURE.R", 0x2a0, func(r *Report) { r.Signature.R[0] ^= 1 }},
		{"SIGNATURE.S", 0x2e8, func(r *Report) { r.Signature.S[0] ^= 1 }},
	}
	base := mustBytes(t, synthetic(Version5, cpuTurin))
	for _, f := range fields {
		r := synthetic(Version5, cpuTurin)
		f.set(r)
		got := mustBytes(t, r)
		want := bytes.Clone(base)
		want[f.offset] ^= 1
		if !bytes.Equal(got, want) {
			t.Errorf("%s does not stand at %#x", f.name, f.offset)
		}
	}
}

func TestParseRefuses(t *testing.T) {
	put32 := func(offset int, v uint32) func([]byte) {
		return func(b []byte) { binary.LittleEndian.PutUint32(b[offset:], v) }
	}
	set := func(offset int, v byte) func([]byte) { return func(b []byte) { b[offset] = v } }
	tests := []struct {
		name    string
		version uint32
		cpu     CPU
		change  func([]byte)
		field   string
		offset  int
	}{
		{"version 0", Version3, cpuMilan, put32(0, 0), "VERSION", 0},
		{"version 1", Version3, cpuMilan, put32(0, 1), "VERSION", 0},
		{"version 4", Version3, cpuMilan, put32(0, 4), "VERSION", 0},
		{"version 6", Version3, cpuMilan, put32(0, 6), "VERSION", 0},
		{"policy without its one", Version3, cpuMilan, set(0x0a, 1), "POLICY", 0x8},
		{"VMPL 4", Version3, cpuMilan, put32(0x30, 4), "VMPL", 0x30},
		{"VMPL below the host's", Version3, cpuMilan, put32(0x30, 0xfffffffe), "VMPL", 0x30},
		{"no algorithm", Version3, cpuMilan, put32(0x34, 0), "SIGNATURE_ALGO", 0x34},
		{"algorithm 2", Version3, cpuMilan, put32(0x34, 2), "SIGNATURE_ALGO", 0x34},
		{"signer 2", Version3, cpuMilan, put32(0x48, 2<<2), "KEY_INFO", 0x48},
		{"signer 6", Version3, cpuMilan, put32(0x48, 6<<2), "KEY_INFO", 0x48},
		{"key info bit 5", Version3, cpuMilan, put32(0x48, 1<<5), "KEY_INFO", 0x48},
		{"key info bit 31", Version3, cpuMilan, put32(0x48, 1<<31), "KEY_INFO", 0x48},
		{"reserved behind key info", Version3, cpuMilan, set(0x4f, 1), "reserved", 0x4f},
		{"current TCB of Milan", Version3, cpuMilan, set(0x38+2, 1), "CURRENT_TCB", 0x38},
		{"reported TCB of Genoa", Version5, cpuGenoa, set(0x180+5, 1), "REPORTED_TCB", 0x180},
		{"committed TCB of Turin", Version5, cpuTurin, set(0x1e0+6, 1), "COMMITTED_TCB", 0x1e0},
		{"launch TCB of Turin", Version5, cpuTurin, set(0x1f0+4, 1), "LAUNCH_TCB", 0x1f0},
		{"processor in version 2", Version2, cpuMilan, set(0x188, 0x19), "reserved", 0x188},
		{"no processor in version 3", Version3, cpuMilan, put32(0x188, 0), "CPUID_FAM_ID", 0x188},
		{"Rome", Version3, cpuMilan, set(0x188, 0x17), "CPUID_FAM_ID", 0x188},
		{"model between the products", Version3, cpuMilan, set(0x189, 0x20), "CPUID_FAM_ID", 0x188},
		{"model behind Turin", Version5, cpuTurin, set(0x189, 0x12), "CPUID_FAM_ID", 0x188},
		{"reserved behind the processor", Version3, cpuMilan, set(0x18b, 1), "reserved", 0x18b},
		{"reserved before the chip id", Version2, cpuMilan, set(0x19f, 1), "reserved", 0x19f},
		{"reserved behind current", Version3, cpuMilan, set(0x1eb, 1), "reserved", 0x1eb},
		{"reserved behind committed", Version3, cpuMilan, set(0x1ef, 1), "reserved", 0x1ef},
		{"mitigations in version 3", Version3, cpuMilan, set(0x1f8, 1), "reserved", 0x1f8},
		{"reserved behind mitigations", Version5, cpuGenoa, set(0x208, 1), "reserved", 0x208},
		{"last reserved byte that is signed", Version5, cpuGenoa, set(0x29f, 1), "reserved", 0x29f},
		{"padding of R", Version3, cpuMilan, set(0x2a0+48, 1), "SIGNATURE.R", 0x2d0},
		{"last padding of R", Version3, cpuMilan, set(0x2a0+71, 1), "SIGNATURE.R", 0x2e7},
		{"padding of S", Version3, cpuMilan, set(0x2e8+48, 1), "SIGNATURE.S", 0x318},
		{"reserved behind the signature", Version3, cpuMilan, set(0x330, 1), "reserved", 0x330},
		{"last byte", Version3, cpuMilan, set(Size-1, 1), "reserved", Size - 1},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			b := mustBytes(t, synthetic(tt.version, tt.cpu))
			tt.change(b)
			_, err := Parse(b)
			var fe *FieldError
			if !errors.As(err, &fe) {
				t.Fatalf("got %v, want a FieldError", err)
			}
			if fe.Field != tt.field || fe.Offset != tt.offset {
				t.Errorf("got %v, want field %s at offset %#x", err, tt.field, tt.offset)
			}
		})
	}
	for _, n := range []int{0, 1, Size - 1, Size + 1} {
		if _, err := Parse(make([]byte, n)); err == nil {
			t.Errorf("%d bytes are parsed", n)
		}
	}
}

func TestBytesRefuses(t *testing.T) {
	r := synthetic(Version3, cpuMilan)
	r.VMPL = 9
	if _, err := r.Bytes(); err == nil {
		t.Error("a report with VMPL 9 has bytes")
	}
	if _, err := new(Report).Bytes(); err == nil {
		t.Error("the zero report has bytes")
	}
}

func TestUnsigned(t *testing.T) {
	r := synthetic(Version3, cpuMilan)
	r.KeyInfo, r.SignatureAlgo, r.Signature, r.VMPL = NewKeyInfo(false, true, SignerNone), AlgoNone, Signature{}, VMPLHost
	r.ReportData, r.ChipID = [64]byte{}, [64]byte{}
	got, err := Parse(mustBytes(t, r))
	if err != nil {
		t.Fatal(err)
	}
	if !got.KeyInfo.MaskChipKey() || got.KeyInfo.Signer() != SignerNone || got.KeyInfo.AuthorKey() {
		t.Errorf("key info is %#x", got.KeyInfo)
	}
	var b strings.Builder
	if err := got.Explain(&b); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"NOT SIGNED", "requested by the host", "masked by the platform"} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("explanation lacks %q:\n%s", want, b.String())
		}
	}
}

func TestProduct(t *testing.T) {
	tests := []struct {
		cpu     CPU
		product Product
		line    Line
	}{
		{CPU{0x19, 0x00, 0}, Milan, LineMilan},
		{CPU{0x19, 0x0f, 0}, Milan, LineMilan},
		{CPU{0x19, 0x10, 0}, Genoa, LineGenoa},
		{CPU{0x19, 0x1f, 9}, Genoa, LineGenoa},
		{CPU{0x19, 0x20, 0}, ProductUnknown, LineUnknown},
		{CPU{0x19, 0x9f, 0}, ProductUnknown, LineUnknown},
		{CPU{0x19, 0xa0, 2}, Bergamo, LineGenoa},
		{CPU{0x19, 0xaf, 0}, Bergamo, LineGenoa},
		{CPU{0x19, 0xb0, 0}, ProductUnknown, LineUnknown},
		{CPU{0x1a, 0x00, 0}, Turin, LineTurin},
		{CPU{0x1a, 0x11, 0}, Turin, LineTurin},
		{CPU{0x1a, 0x12, 0}, ProductUnknown, LineUnknown},
		{CPU{0x17, 0x31, 0}, ProductUnknown, LineUnknown},
		{CPU{}, ProductUnknown, LineUnknown},
	}
	for _, tt := range tests {
		if p := tt.cpu.Product(); p != tt.product || p.Line() != tt.line {
			t.Errorf("%s: got %s of line %s, want %s of line %s", tt.cpu, p, p.Line(), tt.product, tt.line)
		}
	}
	for _, l := range []Line{LineMilan, LineGenoa, LineTurin} {
		if got, err := ParseLine(l.String()); err != nil || got != l {
			t.Errorf("ParseLine(%s): got %v, %v", l, got, err)
		}
	}
	if _, err := ParseLine("unknown"); err == nil {
		t.Error("an unknown line is parsed")
	}
}

// TestLayoutVersion2 is about reports that do not name their processor.
func TestLayoutVersion2(t *testing.T) {
	tests := []struct {
		name string
		chip int // bytes that are not zero
		b    [8]byte
		want Layout
	}{
		{"64 bytes", 64, [8]byte{3, 0, 0, 0, 0, 0, 8, 115}, LayoutMilan},
		{"8 bytes", 8, [8]byte{0, 1, 0, 2, 0, 0, 0, 71}, LayoutTurin},
		{"masked", 0, [8]byte{3, 0, 0, 0, 0, 0, 8, 115}, LayoutMilan},
		{"masked, bytes that Milan reserves", 0, [8]byte{0, 1, 0, 2, 0, 0, 0, 71}, LayoutTurin},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := synthetic(Version2, cpuMilan)
			clear(r.ChipID[tt.chip:])
			r.CurrentTCB, r.CommittedTCB, r.LaunchTCB, r.ReportedTCB = TCB{}, TCB{}, TCB{}, TCB{}
			b := mustBytes(t, r)
			for _, offset := range []int{0x38, 0x180, 0x1e0, 0x1f0} {
				copy(b[offset:], tt.b[:])
			}
			got, err := Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			if got.ReportedTCB.Layout != tt.want || got.ReportedTCB.Bytes() != tt.b {
				t.Errorf("got layout %d of %s, want %d", got.ReportedTCB.Layout, got.ReportedTCB, tt.want)
			}
		})
	}
}

func TestBits(t *testing.T) {
	p := PolicyReserved1 | PolicySMT | PolicyDebug | 1<<8 | 55 | 1<<26 | 1<<63
	if p.ABIMajor() != 1 || p.ABIMinor() != 55 || !p.Has(PolicyDebug|PolicySMT) || p.Has(PolicyCXL) {
		t.Errorf("policy %#x is read wrongly", uint64(p))
	}
	if got, want := p.Unknown(), uint64(1<<26|1<<63); got != want {
		t.Errorf("unknown bits: got %#x, want %#x", got, want)
	}
	if got, want := p.String(), "SMT, DEBUG, unknown bits 0x8000000004000000"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := PlatformInfo(0x67).String(), "SMT_EN, TSME_EN, ECC_EN, ALIAS_CHECK_COMPLETE, unknown bits 0x40"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := PlatformInfo(0).String(), "nothing"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestExplain(t *testing.T) {
	for _, s := range synthetics {
		t.Run(s.name, func(t *testing.T) {
			var b bytes.Buffer
			if err := synthetic(s.version, s.cpu).Explain(&b); err != nil {
				t.Fatal(err)
			}
			golden(t, s.name+".txt", b.Bytes())
		})
	}
}

func TestJSON(t *testing.T) {
	for _, s := range synthetics {
		t.Run(s.name, func(t *testing.T) {
			b, err := json.MarshalIndent(synthetic(s.version, s.cpu), "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			golden(t, s.name+".json", append(b, '\n'))
		})
	}

	// Every byte that is signed and may be other than zero is in it.
	good := mustBytes(t, synthetic(Version5, cpuTurin))
	want, err := json.Marshal(synthetic(Version5, cpuTurin))
	if err != nil {
		t.Fatal(err)
	}
	for i := range SignedSize {
		for bit := range 8 {
			b := bytes.Clone(good)
			b[i] ^= 1 << bit
			r, err := Parse(b)
			if err != nil || r.SignatureAlgo != AlgoECDSAP384SHA384 {
				continue
			}
			got, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Equal(got, want) {
				t.Errorf("bit %d of byte %#x makes no difference", bit, i)
			}
		}
	}

	r := synthetic(Version3, cpuMilan)
	r.VMPL, r.Policy = VMPLHost, PolicyReserved1|1<<40
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"requestedByHost":true`, `"guestPolicy":{"value":"0x10000020000","set":[],"unknown":"0x10000000000"}`} {
		if !strings.Contains(string(b), want) {
			t.Errorf("got %s, want …%s…", b, want)
		}
	}
	if strings.Contains(string(b), "vmpl") {
		t.Errorf("a report for the host has a VMPL: %s", b)
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", "explain", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestRealReports(t *testing.T) {
	want := map[string]struct {
		version  uint32
		product  Product
		policy   Policy
		platform PlatformInfo
		reported string
	}{
		"gosevguest-milan-v2-debugpolicy": {2, ProductUnknown, 0xb0000, 0x1, "bl 2 tee 0 snp 5 ucode 68"},
		"trustee-milan-v2":                {2, ProductUnknown, 0x3001f, 0x1, "bl 3 tee 0 snp 8 ucode 115"},
		"oak-milan-v3":                    {3, Milan, 0x30000, 0x25, "bl 4 tee 0 snp 24 ucode 219"},
		"trustee-siena-v3":                {3, Bergamo, 0x30000, 0x25, "bl 10 tee 0 snp 23 ucode 25"},
		"oak-genoa-v5":                    {5, Genoa, 0x30000, 0x25, "bl 10 tee 0 snp 25 ucode 84"},
		"oak-turin-v5":                    {5, Turin, 0x30000, 0x67, "fmc 0 bl 1 tee 0 snp 2 ucode 71"},
	}
	reports := realReports(t)
	for name, w := range want {
		t.Run(name, func(t *testing.T) {
			b, ok := reports[name]
			if !ok {
				t.Fatal("the report is missing")
			}
			r, err := Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			if r.Version != w.version || r.Product() != w.product || r.Policy != w.policy || r.PlatformInfo != w.platform || r.ReportedTCB.String() != w.reported {
				t.Errorf("got %d %s %#x %#x %s, want %+v", r.Version, r.Product(), uint64(r.Policy), uint64(r.PlatformInfo), r.ReportedTCB, w)
			}
			if got := mustBytes(t, r); !bytes.Equal(got, b) {
				t.Error("bytes do not come back")
			}
			if err := r.Explain(&bytes.Buffer{}); err != nil {
				t.Error(err)
			}
		})
	}
	for name := range reports {
		if _, ok := want[name]; !ok {
			t.Errorf("%s is not in the table", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range synthetics {
		f.Add(mustBytes(f, synthetic(s.version, s.cpu)))
	}
	f.Add([]byte{})
	for _, path := range need.AnyFixtures(f, "fixtures/*.report") {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Parse(b)
		if err != nil {
			return
		}
		if got := mustBytes(t, r); !bytes.Equal(got, b) {
			t.Errorf("bytes do not come back:\n%x\n%x", b, got)
		}
		if err := r.Explain(&bytes.Buffer{}); err != nil {
			t.Error(err)
		}
	})
}
