package measure

import (
	"bytes"
	"crypto/sha512"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/snp/ovmf"
	"github.com/kcradle/kcradle/snp/ovmf/ovmftest"
)

// The published vectors use the last 4 KiB of two firmware images, which are not in the repository. What of them enters
// a digest is: their layout and their seed.
func amdSev() Firmware {
	return Firmware{
		Layout: ovmftest.AmdSev(4096),
		Seed:   digest("086e2e9149ebf45abdc3445fba5b2da8270bdbb04094d7a2c37faaa4b24af3aa16aff8c374c2a55c467a50da6d466b74"),
		SHA256: hash("8f765dfabc127fc0a938a0744a3103ec15864d7d794eb4c398aa976b6d6ab16c"),
	}
}

func ovmfX64() Firmware {
	return Firmware{
		Layout: ovmftest.OvmfX64(4096),
		Seed:   digest("b91e6fec73d2bcc57ad5fd400a426ce02731c22ea92bc894ce675e7c9921a822977d6cf025b85f8ef4f264bff8839d20"),
		SHA256: hash("b4c021e085fb83ceffe6571a3d357b4a98773c83c474e47f76c876708fe316da"),
	}
}

// ec2 is the firmware of AWS in 2023, of which seed and sections are published.
func ec2() Firmware {
	return Firmware{
		Layout: ovmf.Layout{
			ResetEIP: 0x80b004,
			Sections: []ovmf.Section{
				{Type: ovmf.SectionMemory, GPA: 0x800000, Size: 0x9000},
				{Type: ovmf.SectionMemory, GPA: 0x80a000, Size: 0x3000},
				{Type: ovmf.SectionSecrets, GPA: 0x80d000, Size: 0x1000},
				{Type: ovmf.SectionCPUID, GPA: 0x80e000, Size: 0x1000},
				{Type: ovmf.SectionMemory, GPA: 0x80f000, Size: 0x11000},
			},
		},
		Seed: digest("2027a27bb9f7acfd280e4c7bd68a73973b94bf0756e5b282e004b9395f597b8d0eb4defa7d8f6549375aa4d2b146f0f3"),
	}
}

func digest(s string) Digest {
	d, err := ParseDigest(s)
	if err != nil {
		panic(err)
	}
	return d
}

func hash(s string) FileHash {
	h, err := ParseFileHash(s)
	if err != nil {
		panic(err)
	}
	return h
}

// The kernel and the initrd of the vectors are empty files.
func emptyFile() FileHash {
	return hash("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
}

func withKernel(in Input, line string) Input {
	in.Kernel, in.Initrd, in.CommandLine = emptyFile(), emptyFile(), line
	return in
}

func withoutHashes(in Input) Input {
	in.NoKernelHashes = true
	return in
}

type vector struct {
	name, digest string
	in           Input
}

// vectors are the published digests: all but the last are tests/test_guest.py of virtee/sev-snp-measure, under the names
// they have there; the last is that of a report from AWS hardware (edgelesssys/constellation,
// internal/attestation/aws/snp/testdata).
func vectors() []vector {
	one := func(f Firmware, features uint64) Input {
		return Input{Firmware: f, VCPUs: 1, CPU: EPYC, SEVFeatures: features}
	}
	four := withKernel(one(amdSev(), 0x1), "")
	four.VCPUs = 4
	const ofReset = 0x600 // RDX of any CPU after reset
	onEC2 := func(features uint64) Input {
		return withKernel(Input{Firmware: amdSev(), VCPUs: 1, CPU: ofReset, SEVFeatures: features, VMM: EC2}, "")
	}
	return []vector{
		{"test_snp_default", "803f691094946e42068aaa3a8f9e26a5c89f36f7b73ecfb28c653360fe4b3aba7e534442e7e1e17895dfe778d0228977",
			withKernel(one(amdSev(), 0x21), "console=ttyS0 loglevel=7")},
		{"test_snp_guest_feature_snp_only", "6d287813eb5222d770f75005c664e34c204f385ce832cc2ce7d0d6f354454362f390ef83a92046c042e706363b4b08fa",
			withKernel(one(amdSev(), 0x1), "console=ttyS0 loglevel=7")},
		{"test_snp_ovmf_hash_gen_default", "329c8ce0972ae52343b64d34a434a86f245dfd74f5ed7aae15d22efc78fb9683632b9b50e4e1d7fa41179ef98a7ef198",
			withKernel(one(amdSev(), 0x21), "")},
		{"test_snp_without_kernel_default", "e1e1ca029dd7973ab9513295be68198472dcd4fc834bd9af9b63f6e8a1674dbf281a9278a4a2ebe0eed9f22adbcd0e2b",
			withoutHashes(one(amdSev(), 0x21))},
		{"test_snp_without_kernel_feature_snp_only", "19358ba9a7615534a9a1e2f0dfc29384dcd4dcb7062ff9c6013b26869a5fc6ecabe033c48dd6f6db5d6d76e7c5df632d",
			withoutHashes(one(amdSev(), 0x1))},
		{"test_snp_with_multiple_vcpus_feature_snp_only", "5061fffb019493a903613d56d54b94912a1a2f9e4502385f5c194616753720a92441310ba6c4933de877c36e23046ad5",
			four},
		{"test_snp_with_ovmfx64_without_default", "28797ae0afaba4005a81e629acebfb59e6687949d6be44007cd5506823b0dd66f146aaae26ff291eed7b493d8a64c385",
			withoutHashes(one(ovmfX64(), 0x21))},
		{"test_snp_with_ovmfx64_without_kernel_feature_snp_only", "da0296de8193586a5512078dcd719eccecbd87e2b825ad4148c44f665dc87df21e5b49e21523a9ad993afdb6a30b4005",
			withoutHashes(one(ovmfX64(), 0x1))},
		{"test_snp_ec2_default", "0ce9ccc06bab55eebe8abc234f3df6514883977a68a591b71052498ab52b2f1aa415db338033946ef93aa8278c0d67fb",
			onEC2(0x21)},
		{"test_snp_ec2_feature_snp_only", "0883bd0eeb716e65b7b977a321c278d1e51b33b5c655fab985443bbcc65c086b9c15e8a0bd8811050dec7e24964e5056",
			onEC2(0x1)},
		{"test_snp_gce_default", "5da7106cf14cf46b1725ebab123eb9e53bd46a1e9f400cd0c08e7827b04b688ea8b4e403c8404efed4397ea5d5d0722e",
			withKernel(Input{Firmware: amdSev(), VCPUs: 1, CPU: ofReset, SEVFeatures: 0x1, VMM: gce}, "")},
		{"aws_end_to_end", "c2c84b9364fc9f0f54b04534768c860c6e0e386ad98b96e8b98eca46ac8971d05c531ba48373f054c880cfd1f4a0a84e",
			withoutHashes(Input{Firmware: ec2(), VCPUs: 2, SEVFeatures: 0x1, VMM: EC2})},
	}
}

func TestVectors(t *testing.T) {
	for _, v := range vectors() {
		t.Run(v.name, func(t *testing.T) {
			got, err := v.in.Digest()
			if err != nil {
				t.Fatal(err)
			}
			if got.String() != v.digest {
				t.Errorf("got %v, want %s", got, v.digest)
			}
			steps, err := v.in.Explain()
			if err != nil {
				t.Fatal(err)
			}
			if last := steps[len(steps)-1].Digest; last != got {
				t.Errorf("explained: got %v, want %v", last, got)
			}
		})
	}
}

// The seeds above are those of the real bytes.
func TestReadFirmwareReal(t *testing.T) {
	for _, tt := range []struct {
		file string
		want Firmware
	}{
		{"ovmf_AmdSev_suffix.bin", amdSev()},
		{"ovmf_OvmfX64_suffix.bin", ovmfX64()},
	} {
		got, err := ReadFirmware(need.Fixture(t, "fixtures/"+tt.file))
		if err != nil {
			t.Error(err)
		}
		if !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: got %+v, want %+v", tt.file, got, tt.want)
		}
	}
}

// Every digest of the file of vectors is one of the vectors above, and no number there differs.
func TestVectorsFile(t *testing.T) {
	var file struct {
		VMSA map[string]struct {
			Sig string `json:"sig"`
			BSP string `json:"bsp_sha384"`
			AP  string `json:"ap_0x80b004_sha384"`
		} `json:"vmsa"`
		HashTable struct {
			Hex string `json:"hex"`
		} `json:"hash_table"`
		Trace   [][2]string `json:"trace"`
		Vectors []struct {
			Source string  `json:"source"`
			OVMF   string  `json:"ovmf"`
			Kernel *string `json:"kernel"`
			Append *string `json:"append"`
			VCPUs  int     `json:"vcpus"`
			Digest string  `json:"digest"`
		} `json:"vectors"`
		AWS struct {
			Digest string `json:"digest"`
		} `json:"aws_end_to_end"`
	}
	if err := json.Unmarshal(need.Fixture(t, "vectors.json"), &file); err != nil {
		t.Fatal(err)
	}
	mine := map[string]vector{}
	for _, v := range vectors() {
		mine[v.digest] = v
	}
	for _, v := range file.Vectors {
		if strings.HasPrefix(v.Source, "self-generated") {
			if v.Digest != debianDigest {
				t.Errorf("%s: got digest %s", v.Source, v.Digest)
			}
			continue // of a whole image; see TestDebianFirmware
		}
		m, ok := mine[v.Digest]
		if !ok {
			t.Errorf("%s is not among the vectors", v.Source)
			continue
		}
		line := ""
		if v.Append != nil {
			line = *v.Append
		}
		if !strings.HasSuffix(v.Source, "::"+m.name) || m.in.VCPUs != v.VCPUs || m.in.CommandLine != line || m.in.NoKernelHashes != (v.Kernel == nil) {
			t.Errorf("%s: got another input, %+v", v.Source, m)
		}
	}
	if _, ok := mine[file.AWS.Digest]; !ok {
		t.Error("the digest of AWS is not among the vectors")
	}
	for i, step := range trace() {
		if i >= len(file.Trace) || file.Trace[i][1] != step.digest {
			t.Errorf("step %d of the trace differs", i)
		}
	}
	if file.HashTable.Hex != hashTableHex {
		t.Error("the hash table differs")
	}
	for _, v := range vmsaVectors() {
		if f := file.VMSA[v.name]; f.BSP != v.first || f.AP != v.other || f.Sig != fmt.Sprintf("%#x", uint32(v.cpu)) {
			t.Errorf("the registers of %s differ", v.name)
		}
	}
	if len(file.VMSA) != len(vmsaVectors()) || len(file.Trace) != len(trace()) {
		t.Errorf("got %d CPU models and %d steps in the file", len(file.VMSA), len(file.Trace))
	}
}

const debianDigest = "d74bd3ea40b240c3228edc5177ce6193561ebff633dbd0be76d6c143b876d65102425c0e2e8a930857c48daa5eacda58"

// The digest of a whole image, where its package is installed or its file lies beside the vectors.
func TestDebianFirmware(t *testing.T) {
	sum := hash("3e4fd0b3fe3b2dbe481c3d9e99418a034174f26cbe1f55aa212b0f18c12d2d6f")
	for _, path := range append(need.AnyFixtures(t, "fixtures/OVMF.amdsev.fd"), "/usr/share/ovmf/OVMF.amdsev.fd") {
		image, err := os.ReadFile(path)
		if err != nil || hashBytes(image) != sum {
			continue
		}
		f, err := ReadFirmware(image)
		if err != nil {
			t.Fatal(err)
		}
		got, err := withoutHashes(Input{Firmware: f, VCPUs: 1, CPU: EPYC, SEVFeatures: FeatureSNP}).Digest()
		if err != nil {
			t.Fatal(err)
		}
		if got.String() != debianDigest {
			t.Errorf("got %v, want %s", got, debianDigest)
		}
		return
	}
	t.Skip("needs OVMF.amdsev.fd of Debian's package ovmf-amdsev 2026.08+ds-2")
}

type traceStep struct {
	name   string
	page   PageType
	gpa    uint64
	pages  int
	digest string
}

// trace is vector test_snp_guest_feature_snp_only, step by step.
func trace() []traceStep {
	return []traceStep{
		{"firmware", PageNormal, 0xfffff000, 1, "086e2e9149ebf45abdc3445fba5b2da8270bdbb04094d7a2c37faaa4b24af3aa16aff8c374c2a55c467a50da6d466b74"},
		{"memory", PageZero, 0x800000, 9, "411a1360ae4001ab44e1c8a5f14115068566f56b565be90042aa16cc26de1492ef3025f10b7cdd14911ae69aaea7881a"},
		{"memory", PageZero, 0x80a000, 3, "e0b2ff7ad80630d6c56ba3d43c7dd1cccca220d9cc60092fe69e5f31a6ab4e9537aa477497f03636ae29b18630df8477"},
		{"secrets", PageSecrets, 0x80d000, 1, "230c05427474c0649ea31849fe3144dbbef0921570105732b69ff5463dee1fe8612dee2db0866719377099718ecb46d8"},
		{"CPUID", PageCPUID, 0x80e000, 1, "17af371be37e5a8f0f3d83cd4195cfb47b60caabf8c209e6c68ab44d6484381a057812c0760811d53f47b522a16e5574"},
		{"SVSM calling area", PageZero, 0x80f000, 1, "1de7f0d81360fb802b5e2a7327f58ed1a2c9d1947a2e3cf0ae34184e6e1b4cb102da9ac69f421cded3105d12d523e4e9"},
		{"kernel hashes", PageNormal, 0x810000, 1, "ce06e9d69b176848cf5cbf7c89096ee2e45937a2721e168519ecbec9e0cc7b33df8b16c10c6004379d579d2ff03f528e"},
		{"memory", PageZero, 0x811000, 15, "36fcd572bd473b23cdcce6f078026377e7b2d18ede30fe022d371f062ac1fbd73ba70c6286951b488c864e3ff9392f43"},
		{"vCPU 0", PageVMSA, 0xfffffffff000, 1, "6d287813eb5222d770f75005c664e34c204f385ce832cc2ce7d0d6f354454362f390ef83a92046c042e706363b4b08fa"},
	}
}

func TestExplain(t *testing.T) {
	in := withKernel(Input{Firmware: amdSev(), VCPUs: 1, CPU: EPYC, SEVFeatures: FeatureSNP}, "console=ttyS0 loglevel=7")
	steps, err := in.Explain()
	if err != nil {
		t.Fatal(err)
	}
	var got []traceStep
	for _, s := range steps {
		got = append(got, traceStep{s.Name, s.Page, s.GPA, s.Pages, s.Digest.String()})
	}
	if want := trace(); !slices.Equal(got, want) {
		t.Errorf("got\n%v\nwant\n%v", got, want)
	}
}

// A firmware of which only the seed is known has no pages to tell of; EC2 has the CPUID page after the other sections.
func TestExplainEC2(t *testing.T) {
	steps, err := withoutHashes(Input{Firmware: ec2(), VCPUs: 2, SEVFeatures: FeatureSNP, VMM: EC2}).Explain()
	if err != nil {
		t.Fatal(err)
	}
	var got strings.Builder
	for _, s := range steps {
		fmt.Fprintf(&got, "%s %v %#x+%d\n", s.Name, s.Page, s.GPA, s.Pages)
	}
	const want = `firmware normal 0x0+0
memory zero 0x800000+9
memory zero 0x80a000+3
secrets secrets 0x80d000+1
memory zero 0x80f000+17
CPUID CPUID 0x80e000+1
vCPU 0 VMSA 0xfffffffff000+1
vCPU 1 VMSA 0xfffffffff000+1
`
	if got.String() != want {
		t.Errorf("got\n%swant\n%s", got.String(), want)
	}
}

const hashTableHex = "06d63894224fc94cb479a793d411fd21a800d82dd09720bd944caa78e7714d36ab2a3200321c8eec6a77bad179511397f913a083067ad8cb737bb260aacbfe8df70fc50a31f7ba442f3ad74b9af141e29169781d3200e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b8553794e74dd2ab7f42b835d5b172d2045b3200e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b8550000000000000000"

func TestHashTable(t *testing.T) {
	got, err := HashTable(emptyFile(), emptyFile(), "console=ttyS0 loglevel=7")
	if err != nil {
		t.Fatal(err)
	}
	if hex.EncodeToString(got[:]) != hashTableHex {
		t.Errorf("got %x, want %s", got, hashTableHex)
	}
	without, err := HashTable(emptyFile(), FileHash{}, "console=ttyS0 loglevel=7")
	if err != nil {
		t.Fatal(err)
	}
	if without != got {
		t.Errorf("without initrd: got %x, want that of an empty one", without)
	}
	if _, err := HashTable(FileHash{}, FileHash{}, ""); err == nil {
		t.Error("got no error without a kernel")
	}
	if _, err := HashTable(emptyFile(), FileHash{}, "a\x00b"); err == nil || !strings.Contains(err.Error(), "NUL in the command line after 1 bytes") {
		t.Errorf("got %v, want an error about NUL", err)
	}
}

type vmsaVector struct {
	name         string
	cpu          CPU
	first, other string // SHA-384 of the page; the other CPUs start at 0x80b004
}

func vmsaVectors() []vmsaVector {
	return []vmsaVector{
		{"EPYC-v4", EPYC,
			"77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b3856f55378e9518d0da99452d51c553a",
			"8413b852790765a310d95867a8b00bfca3a802b5a80830044b45e253fe96222657e11e53fcf63eb0e0afd722385bf7b4"},
		{"EPYC-Rome", EPYCRome,
			"34f43cbd622a2c18c3e042a6d30358628c35d97690fb5d3566644b45b26f7c907c7c20b959a53c74eb6e47414e68bb78",
			"ef83e68cc616fd4d3ea2d64f4b8de7ba13de044bd205042df48504ddd0cb58f3064fb7e3def8cf5f221f9eb0815df223"},
		{"EPYC-Milan", EPYCMilan,
			"728af287318db5f3fc4d2357a969483c4225956dc555b514a78d64ee372112d13b3dca8afd02cdbd1c55697d8ce087f5",
			"24d6d6fe1cc2fd76d9504a2e411e2a1e229a6723c94521c373c21dd97514c44895fc07fea07e04b4186d90160c8dad0b"},
		{"EPYC-Genoa", EPYCGenoa,
			"7d39672d1b8a3e38353a8eef23af9a14a850be7b9c80bd29898aff5cd2386719e5ce72ad660a022def56b15e5e0f899e",
			"2eb1a41390605ea8527eded2db4f86244f621bd8b4abd7791e6ea37949d43373d47725b1f20213bb83332de70d646a4f"},
		{"EPYC-Turin", EPYCTurin,
			"49ddacf0393b6d9401ac505250ec615e923bc580ff6ce0a0b4c5f2e261b0a972cd4facec381e17ad503ce64f4de8a83e",
			"47e5109e4f9565bf1ad1f664a7924f996d8e651ccd8a16b4bc43d8986873ba443726708b2beb263f8f9178c9ad30ea78"},
	}
}

func TestVMSA(t *testing.T) {
	for _, v := range vmsaVectors() {
		t.Run(v.name, func(t *testing.T) {
			cpu, err := ParseCPU(v.name)
			if err != nil {
				t.Fatal(err)
			}
			if cpu != v.cpu {
				t.Errorf("got %v, want %v", cpu, v.cpu)
			}
			first, other := Input{Firmware: amdSev(), CPU: cpu, SEVFeatures: FeatureSNP}.vmsaHashes()
			if got := hex.EncodeToString(first[:]); got != v.first {
				t.Errorf("first: got %s, want %s", got, v.first)
			}
			if got := hex.EncodeToString(other[:]); got != v.other {
				t.Errorf("other: got %s, want %s", got, v.other)
			}
		})
	}
}

// The page of the first CPU of EPYC-v4, where it is not zero.
func TestVMSABytes(t *testing.T) {
	page := Input{Firmware: amdSev(), CPU: EPYC, SEVFeatures: FeatureSNP}.vmsa(firstEIP, 0x9b)
	var got []string
	for i := 0; i < len(page); i++ {
		if page[i] == 0 {
			continue
		}
		n := i
		for n < len(page) && page[n] != 0 {
			n++
		}
		got = append(got, fmt.Sprintf("0x%03x:%x", i, page[i:n]))
		i = n
	}
	want := strings.Fields(`0x002:93 0x004:ffff 0x011:f09b 0x014:ffff 0x01a:ffff 0x022:93 0x024:ffff 0x032:93 0x034:ffff
		0x042:93 0x044:ffff 0x052:93 0x054:ffff 0x064:ffff 0x072:82 0x074:ffff 0x084:ffff 0x092:8b 0x094:ffff 0x0d1:10
		0x148:40 0x158:10 0x161:04 0x168:f00fffff 0x170:02 0x178:f0ff 0x268:060407 0x26c:060407 0x310:120f80 0x3b0:01
		0x3e8:01 0x408:801f 0x410:7f03`)
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestCPU(t *testing.T) {
	// AMD document 24594, CPUID Fn0000_0001 EAX: a family above 15 is 15 plus the extended family.
	signature := func(family, model, stepping uint32) CPU {
		return CPU((family-15)<<20 | model>>4<<16 | 0xf<<8 | model&0xf<<4 | stepping)
	}
	for _, tt := range []struct {
		name string
		want CPU
	}{
		{"EPYC", signature(23, 1, 2)}, {"EPYC-v1", EPYC}, {"EPYC-v5", EPYC},
		{"EPYC-Rome", signature(23, 49, 0)}, {"EPYC-Rome-v4", EPYCRome},
		{"EPYC-Milan", signature(25, 1, 1)}, {"EPYC-Milan-v2", EPYCMilan},
		{"EPYC-Genoa", signature(25, 17, 0)}, {"EPYC-Genoa-v1", EPYCGenoa},
		{"EPYC-Turin", signature(26, 0, 0)},
	} {
		if got, err := ParseCPU(tt.name); err != nil || got != tt.want {
			t.Errorf("%s: got %v, %v, want %v", tt.name, got, err, tt.want)
		}
	}
	for _, name := range []string{"", "host", "max", "EPYC-", "EPYC-v", "EPYC-v0", "EPYC-v01", "EPYC-v6", "epyc", "EPYC-v4 ", "EPYC-Rome-v4,+foo"} {
		if got, err := ParseCPU(name); err == nil || got != 0 {
			t.Errorf("%q: got %v, want an error", name, got)
		}
	}
	if got := EPYCTurin.String(); got != "EPYC-Turin" {
		t.Errorf("got %s", got)
	}
	if got := CPU(0x600).String(); got != "CPUID 0x600" {
		t.Errorf("got %s", got)
	}
}

// good is an input of a firmware that the tests make themselves.
func good(t testing.TB) Input {
	t.Helper()
	f, err := ReadFirmware(ovmftest.Image(ovmftest.AmdSev(64 << 10)))
	if err != nil {
		t.Fatal(err)
	}
	kernel, err := HashFile(strings.NewReader("kernel"))
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := HashFile(strings.NewReader("initrd"))
	if err != nil {
		t.Fatal(err)
	}
	return Input{Firmware: f, Kernel: kernel, Initrd: initrd, CommandLine: "console=hvc0", VCPUs: 2, CPU: EPYC, SEVFeatures: FeatureSNP}
}

func TestValidate(t *testing.T) {
	if err := good(t).Validate(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		change func(*Input)
		want   string
	}{
		{"nothing", func(in *Input) { *in = Input{} }, "measure: firmware: ovmf: 0 sections"},
		{"seed", func(in *Input) { in.Firmware.Seed = Digest{} }, "no seed"},
		{"section", func(in *Input) { in.Firmware.Layout.Sections = []ovmf.Section{{Type: 9, Size: 4096}} }, "section 0: unknown type 0x9"},
		{"hash table", func(in *Input) { in.Firmware.Layout.HashTable.Base = 0xffff_ffff }, "ovmf: hash table"},
		{"kernel", func(in *Input) { in.Kernel = FileHash{} }, "no kernel"},
		{"NUL", func(in *Input) { in.CommandLine = "\x00" }, "NUL in the command line after 0 bytes"},
		{"no page for hashes", func(in *Input) { in.Firmware = ovmfX64() }, ErrNoHashPage.Error()},
		{"kernel unmeasured", func(in *Input) { in.NoKernelHashes = true }, "not measured without kernel hashes"},
		{"line unmeasured", func(in *Input) { in.NoKernelHashes, in.Kernel, in.Initrd = true, FileHash{}, FileHash{} }, "not measured without"},
		{"no CPU", func(in *Input) { in.CPU = 0 }, "no CPU model"},
		{"no vCPU", func(in *Input) { in.VCPUs = 0 }, "0 vCPUs: want 1 to 4096"},
		{"vCPUs below zero", func(in *Input) { in.VCPUs = -1 }, "-1 vCPUs"},
		{"many vCPUs", func(in *Input) { in.VCPUs = 4097 }, "4097 vCPUs"},
		{"features", func(in *Input) { in.SEVFeatures = 0x20 }, "SEV features 0x20: want bit 0"},
		{"monitor", func(in *Input) { in.VMM = 77 }, "unknown monitor 77"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			in := good(t)
			tt.change(&in)
			d, err := in.Digest()
			if err == nil || !strings.Contains(err.Error(), tt.want) || d != (Digest{}) {
				t.Errorf("got %v, %v, want an error with %q", d, err, tt.want)
			}
			if steps, err := in.Explain(); err == nil || steps != nil {
				t.Errorf("explained: got %v, %v", steps, err)
			}
			if _, ok, err := in.Match(Digest{}); err == nil || ok {
				t.Errorf("matched: got %v, %v", ok, err)
			}
		})
	}
	in := good(t)
	in.Firmware = ovmfX64()
	if err := in.Validate(); !errors.Is(err, ErrNoHashPage) {
		t.Errorf("got %v, want ErrNoHashPage", err)
	}
}

// Everything that is an input changes the digest, each to a digest of its own.
func TestEveryInputCounts(t *testing.T) {
	image := ovmftest.Image(ovmftest.AmdSev(64 << 10))
	seen := map[Digest]string{}
	check := func(name string, in Input) {
		t.Helper()
		d, err := in.Digest()
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if o, twice := seen[d]; twice {
			t.Errorf("%s and %s have the same digest", name, o)
		}
		seen[d] = name
	}
	changed := func(name string, change func(*Input)) {
		t.Helper()
		in := good(t)
		in.Firmware.Layout.Sections = slices.Clone(in.Firmware.Layout.Sections)
		change(&in)
		check(name, in)
	}
	check("good", good(t))
	for _, at := range []int{0, 4095, 4096, len(image) - 1} { // a bit of the image, none in the tables
		b := bytes.Clone(image)
		b[at] ^= 1
		f, err := ReadFirmware(b)
		if err != nil {
			t.Fatal(err)
		}
		changed(fmt.Sprintf("byte %d", at), func(in *Input) { in.Firmware = f })
	}
	b := bytes.Clone(image)
	copy(b, image[4096:8192])
	copy(b[4096:], image[:4096])
	f, err := ReadFirmware(b)
	if err != nil {
		t.Fatal(err)
	}
	changed("pages swapped", func(in *Input) { in.Firmware = f })
	changed("sections swapped", func(in *Input) {
		s := in.Firmware.Layout.Sections
		s[0], s[1] = s[1], s[0]
	})
	changed("section type", func(in *Input) { in.Firmware.Layout.Sections[3].Type = ovmf.SectionMemory })
	changed("section address", func(in *Input) { in.Firmware.Layout.Sections[6].GPA += ovmf.PageSize })
	changed("section size", func(in *Input) { in.Firmware.Layout.Sections[6].Size -= ovmf.PageSize })
	changed("place of the hashes", func(in *Input) { in.Firmware.Layout.HashTable = ovmf.Area{Base: 0x810000, Size: 0x1000} })
	changed("reset EIP", func(in *Input) { in.Firmware.Layout.ResetEIP++ })
	changed("reset EIP's upper half", func(in *Input) { in.Firmware.Layout.ResetEIP += 1 << 16 })
	changed("kernel", func(in *Input) { in.Kernel[0]++ })
	changed("initrd", func(in *Input) { in.Initrd[31]++ })
	changed("no initrd", func(in *Input) { in.Initrd = FileHash{} })
	changed("kernel and initrd swapped", func(in *Input) { in.Kernel, in.Initrd = in.Initrd, in.Kernel })
	changed("line", func(in *Input) { in.CommandLine += " " })
	changed("no line", func(in *Input) { in.CommandLine = "" })
	changed("no hashes", func(in *Input) { *in = off(*in) })
	for _, m := range cpuModels()[1:] {
		changed(m.name, func(in *Input) { in.CPU = m.cpu })
	}
	for bit := 1; bit < 64; bit++ {
		changed(fmt.Sprintf("feature %d", bit), func(in *Input) { in.SEVFeatures |= 1 << bit })
	}
	changed("EC2", func(in *Input) { in.VMM = EC2 })
	changed("gce", func(in *Input) { in.VMM = gce })
	for _, n := range []int{1, 3, 4, 64, 255, MaxVCPUs} {
		changed(vCPUs(n), func(in *Input) { in.VCPUs = n })
	}
}

func off(in Input) Input {
	in.Kernel, in.Initrd, in.CommandLine, in.NoKernelHashes = FileHash{}, FileHash{}, "", true
	return in
}

// With one CPU nobody starts at the reset EIP.
func TestResetEIPOfOneCPU(t *testing.T) {
	in := good(t)
	in.VCPUs = 1
	a, err := in.Digest()
	if err != nil {
		t.Fatal(err)
	}
	in.Firmware.Layout.ResetEIP++
	b, err := in.Digest()
	if err != nil {
		t.Fatal(err)
	}
	if a != b {
		t.Error("the reset EIP counts with one CPU")
	}
}

// The NUL at the end of the command line is hashed: the hash of the line alone is another.
func TestCommandLineNUL(t *testing.T) {
	table, err := HashTable(emptyFile(), FileHash{}, "quiet")
	if err != nil {
		t.Fatal(err)
	}
	with, without := hashBytes([]byte("quiet\x00")), hashBytes([]byte("quiet"))
	if got := table[36:68]; !bytes.Equal(got, with[:]) || bytes.Equal(got, without[:]) {
		t.Errorf("got %x, want %x", got, with)
	}
	long := strings.Repeat("x", 5000)
	if table, err = HashTable(emptyFile(), FileHash{}, long); err != nil {
		t.Fatal(err)
	}
	if want := hashBytes([]byte(long + "\x00")); !bytes.Equal(table[36:68], want[:]) {
		t.Error("a long line has another hash")
	}
}

// A digest continues from the seed: measuring page by page by hand gives the same.
func TestSeed(t *testing.T) {
	image := ovmftest.Image(ovmftest.AmdSev(8192))
	f, err := ReadFirmware(image)
	if err != nil {
		t.Fatal(err)
	}
	var d Digest
	for i, gpa := range []uint64{0xffffe000, 0xfffff000} {
		contents := sha512.Sum384(image[i*4096:][:4096])
		d = d.add(PageNormal, gpa, &contents)
	}
	if f.Seed != d {
		t.Errorf("got %v, want %v", f.Seed, d)
	}
	if f.SHA256 != hashBytes(image) {
		t.Errorf("got SHA-256 %v", f.SHA256)
	}
	if _, err := ReadFirmware(image[1:]); err == nil {
		t.Error("got no error for half a page")
	}
	if _, err := ReadFirmware(make([]byte, 8192)); !errors.Is(err, ovmf.ErrNotSNP) {
		t.Errorf("got %v, want ErrNotSNP", err)
	}
}

func TestMatch(t *testing.T) {
	base := good(t)
	base.CommandLine = "console=hvc0 "
	for _, tt := range []struct {
		want   string
		change func(*Input)
	}{
		{"", func(*Input) {}},
		{"1 vCPU", func(in *Input) { in.VCPUs = 1 }},
		{"4 vCPUs", func(in *Input) { in.VCPUs = 4 }},
		{"4096 vCPUs", func(in *Input) { in.VCPUs = MaxVCPUs }},
		{"CPU EPYC-Rome", func(in *Input) { in.CPU = EPYCRome }},
		{"CPU EPYC-Milan", func(in *Input) { in.CPU = EPYCMilan }},
		{"CPU EPYC-Genoa", func(in *Input) { in.CPU = EPYCGenoa }},
		{"CPU EPYC-Turin", func(in *Input) { in.CPU = EPYCTurin }},
		{"SEV features 0x21", func(in *Input) { in.SEVFeatures = 0x21 }},
		{"kernel hashes off", func(in *Input) { *in = off(*in) }},
		{"no initrd", func(in *Input) { in.Initrd = FileHash{} }},
		{"an empty command line", func(in *Input) { in.CommandLine = "" }},
		{"a command line that ends in a newline", func(in *Input) { in.CommandLine += "\n" }},
		{"the command line without the space around it", func(in *Input) { in.CommandLine = "console=hvc0" }},
	} {
		t.Run(tt.want, func(t *testing.T) {
			in := base
			tt.change(&in)
			want, err := in.Digest()
			if err != nil {
				t.Fatal(err)
			}
			v, ok, err := base.Match(want)
			if err != nil || !ok {
				t.Fatalf("got %v, %v, want a match", ok, err)
			}
			if v.Change != tt.want || !reflect.DeepEqual(v.Input, in) {
				t.Errorf("got %q %+v, want %q %+v", v.Change, v.Input, tt.want, in)
			}
		})
	}
	for name, change := range map[string]func(*Input){
		"two changes":    func(in *Input) { in.VCPUs, in.CPU = 4, EPYCMilan },
		"another kernel": func(in *Input) { in.Kernel[0]++ },
	} {
		in := base
		change(&in)
		want, err := in.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if v, ok, err := base.Match(want); ok || err != nil || v.Change != "" {
			t.Errorf("%s: got %q, %v, %v, want no match", name, v.Change, ok, err)
		}
	}
	// What the caller has at hand.
	firmware, line := base, base
	firmware.Firmware.Seed[0]++
	line.CommandLine = "console=hvc0 cradle.pod=sha256:00"
	others := []Variation{{"no input", Input{}}, {"the other firmware", firmware}, {"the other pod", line}}
	for _, other := range others[1:] {
		want, err := other.Input.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if v, ok, err := base.Match(want, others...); err != nil || !ok || v.Change != other.Change {
			t.Errorf("got %q, %v, %v, want %q", v.Change, ok, err, other.Change)
		}
		if v, ok, err := base.Match(want); err != nil || ok {
			t.Errorf("got %q, %v without it", v.Change, err)
		}
	}
	// From features of an old host, and without hashes.
	in := off(good(t))
	want, err := in.Digest()
	if err != nil {
		t.Fatal(err)
	}
	in.SEVFeatures = 0x21
	if v, ok, err := in.Match(want); err != nil || !ok || v.Change != "SEV features 0x1" {
		t.Errorf("got %q, %v, %v", v.Change, ok, err)
	}
}

func TestText(t *testing.T) {
	d := digest(vectors()[0].digest)
	h := emptyFile()
	b, err := json.Marshal(map[string]any{"digest": d, "file": h})
	if err != nil {
		t.Fatal(err)
	}
	var back struct {
		Digest Digest
		File   FileHash
	}
	if err := json.Unmarshal(b, &back); err != nil {
		t.Fatal(err)
	}
	if back.Digest != d || back.File != h {
		t.Errorf("got %+v of %s", back, b)
	}
	for _, s := range []string{"", d.String()[1:], d.String() + "0", "x" + d.String()[1:]} {
		if got, err := ParseDigest(s); !errors.Is(err, ErrDigest) || got != (Digest{}) {
			t.Errorf("%q: got %v, %v, want ErrDigest", s, got, err)
		}
	}
	for _, s := range []string{"", h.String()[1:], h.String() + "0", h.String()[1:] + "x"} {
		if got, err := ParseFileHash(s); err == nil || got != (FileHash{}) {
			t.Errorf("%q: got %v, want an error", s, got)
		}
	}
	if _, err := HashFile(iotest.ErrReader(os.ErrClosed)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("got %v, want the reader's error", err)
	}
}

func BenchmarkReadFirmware4MiB(b *testing.B) {
	image := ovmftest.Image(ovmftest.AmdSev(4 << 20))
	b.ReportAllocs()
	b.SetBytes(int64(len(image)))
	for b.Loop() {
		if _, err := ReadFirmware(image); err != nil {
			b.Fatal(err)
		}
	}
}

func benchmarkDigest(b *testing.B, vcpus int) {
	in := good(b)
	in.VCPUs = vcpus
	b.ReportAllocs()
	for b.Loop() {
		if _, err := in.Digest(); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDigest(b *testing.B)          { benchmarkDigest(b, 2) }
func BenchmarkDigest64VCPUs(b *testing.B)   { benchmarkDigest(b, 64) }
func BenchmarkDigest4096VCPUs(b *testing.B) { benchmarkDigest(b, MaxVCPUs) }

// The worst case: nothing matches.
func BenchmarkMatch(b *testing.B) {
	in := good(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, ok, err := in.Match(Digest{}); ok || err != nil {
			b.Fatal(ok, err)
		}
	}
}
