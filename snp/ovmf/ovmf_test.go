package ovmf_test

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/snp/ovmf"
	"github.com/kcradle/kcradle/snp/ovmf/ovmftest"
)

func TestParse(t *testing.T) {
	last := ovmftest.AmdSev(4 << 20) // as edk2 has it in 2026, the page for hashes at the end
	s := last.Sections
	s[5], s[6] = ovmf.Section{Type: ovmf.SectionMemory, GPA: 0x811000, Size: 0x1f000}, s[5]
	for _, l := range []ovmf.Layout{
		ovmftest.AmdSev(ovmf.PageSize), ovmftest.AmdSev(4 << 20), ovmftest.AmdSev(ovmf.MaxSize), ovmftest.OvmfX64(2 << 20), last,
	} {
		got, err := ovmf.Parse(ovmftest.Image(l))
		if err != nil {
			t.Error(err)
		}
		if !reflect.DeepEqual(got, l) {
			t.Errorf("got %+v, want %+v", got, l)
		}
	}
}

func TestParseReal(t *testing.T) {
	for _, tt := range []struct {
		file, sha256 string
		want         ovmf.Layout
	}{
		{"ovmf_AmdSev_suffix.bin", "8f765dfabc127fc0a938a0744a3103ec15864d7d794eb4c398aa976b6d6ab16c", ovmftest.AmdSev(4096)},
		{"ovmf_OvmfX64_suffix.bin", "b4c021e085fb83ceffe6571a3d357b4a98773c83c474e47f76c876708fe316da", ovmftest.OvmfX64(4096)},
	} {
		t.Run(tt.file, func(t *testing.T) {
			b := need.Fixture(t, "fixtures/"+tt.file)
			if sum := sha256.Sum256(b); hex.EncodeToString(sum[:]) != tt.sha256 {
				t.Fatalf("got another file, with SHA-256 %x", sum)
			}
			got, err := ovmf.Parse(b)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, tt.want) {
				t.Errorf("got %+v, want %+v", got, tt.want)
			}
		})
	}
}

func TestSection(t *testing.T) {
	l := ovmftest.AmdSev(ovmf.PageSize)
	if s, ok := l.Section(ovmf.SectionMemory); !ok || s != l.Sections[0] {
		t.Errorf("got %+v %v, want the first section", s, ok)
	}
	l = ovmftest.OvmfX64(ovmf.PageSize)
	if s, ok := l.Section(ovmf.SectionKernelHashes); ok {
		t.Errorf("got %+v, want none", s)
	}
}

// Each row breaks one thing of a good image.
func TestParseRefuses(t *testing.T) {
	u16 := func(before int, v uint16) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint16(b[len(b)-before:], v); return b }
	}
	u32 := func(before int, v uint32) func([]byte) []byte {
		return func(b []byte) []byte { binary.LittleEndian.PutUint32(b[len(b)-before:], v); return b }
	}
	// section breaks word (0 address, 1 size, 2 type) of section i.
	section := func(i, word int, v uint32) func([]byte) []byte {
		return u32(ovmftest.Metadata-16-12*i-4*word, v)
	}
	guidCopy := func(from, to int) func([]byte) []byte {
		return func(b []byte) []byte { copy(b[len(b)-to:], b[len(b)-from:][:16]); return b }
	}
	for _, tt := range []struct {
		name   string
		change func([]byte) []byte
		want   string
	}{
		{"empty", func([]byte) []byte { return nil }, "image of 0 bytes"},
		{"no whole page", func(b []byte) []byte { return b[1:] }, "image of 8191 bytes"},
		{"too large", func([]byte) []byte { return make([]byte, ovmf.MaxSize+ovmf.PageSize) }, "image of 16781312 bytes"},
		{"zeros", func([]byte) []byte { return make([]byte, 8192) }, "no table of GUIDs at offset 0x1fd0: not a firmware for SEV-SNP"},
		{"footer GUID", u16(ovmftest.FooterGUID, 0), "no table of GUIDs at offset 0x1fd0"},
		{"table too small", u16(ovmftest.FooterSize, 17), "table of 17 bytes ends at offset 0x1fe0"},
		{"table empty", u16(ovmftest.FooterSize, 18), "the table has no SEV-ES reset block: not a firmware for SEV-SNP"},
		{"table too large", u16(ovmftest.FooterSize, 8161), "table of 8161 bytes"},
		{"table cut", u16(ovmftest.FooterSize, 20), "2 bytes at offset 0x1fcc are left over"},
		{"entry without header", u16(ovmftest.ResetSize, 17), "entry of 17 bytes ends at offset 0x1fce: want 18 to 70"},
		{"entry of zero", u16(ovmftest.ResetSize, 0), "entry of 0 bytes"},
		{"entry too long", u16(ovmftest.ResetSize, 71), "entry of 71 bytes"},
		{"entry twice", guidCopy(ovmftest.ResetGUID, ovmftest.HashesGUID), "entry 00f771de-1a7e-4fcb-890e-68c77e2fb44e at offset 0x1f9e is there again at 0x1fb8"},
		{"the footer inside", guidCopy(ovmftest.FooterGUID, ovmftest.HashesGUID), "which has 0x0 bytes at 0x0"},
		{"no reset block", u16(ovmftest.ResetGUID, 0), "no SEV-ES reset block"},
		{"no metadata", u16(ovmftest.MetadataGUID, 0), "no SEV metadata: not a firmware for SEV-SNP"},
		{"reset block too long", func(b []byte) []byte { // takes the hash table's entry as its data
			return u16(ovmftest.ResetSize, 48)(b)
		}, "SEV-ES reset block at offset 0x1f9e has 30 bytes: want 4"},
		{"hash table too long", u16(ovmftest.HashesSize, 48), "SEV hash table at offset 0x1f88 has 30 bytes: want 8"},
		{"metadata outside", u32(ovmftest.MetadataFrom, 8193), "SEV metadata 0x2001 bytes before the end of an image of 0x2000"},
		{"metadata far outside", u32(ovmftest.MetadataFrom, 0xffffffff), "SEV metadata 0xffffffff bytes"},
		{"metadata at the end", u32(ovmftest.MetadataFrom, 15), "SEV metadata 0xf bytes"},
		{"signature", u32(ovmftest.Metadata, 0), "SEV metadata at offset 0x1800: signature"},
		{"length", u32(ovmftest.Metadata-4, 101), "length 101 with 7 sections: want 100"},
		{"version", u32(ovmftest.Metadata-8, 2), "version 2: this code knows 1"},
		{"no sections", u32(ovmftest.Metadata-12, 0), "0 sections: want 1 to 64"},
		{"many sections", u32(ovmftest.Metadata-12, 0x15555556), "357913942 sections: want 1 to 64"},
		{"cut by the end", func(b []byte) []byte {
			copy(b[len(b)-24:], b[len(b)-ovmftest.Metadata:][:16])
			return u32(ovmftest.MetadataFrom, 24)(b)
		}, "length 100: the image ends after 24"},
		{"unknown type", section(2, 2, 5), "section 2 at offset 0x1828: unknown type 0x5"},
		{"address", section(0, 0, 0x800001), "section 0 at offset 0x1810: memory at 0x800001"},
		{"no size", section(0, 1, 0), "memory at 0x800000 of 0x0 bytes: want whole pages"},
		{"size", section(0, 1, 0xfff), "want whole pages"},
		{"over the firmware", section(6, 0, 0xfffff000), "section 6 at offset 0x1858: memory from 0xfffff000 to 0x10000e000: want it below 0xffffe000"},
		{"too much memory", section(6, 1, 0x1000000), "the sections take 0x1010000 bytes"},
		{"two pages of secrets", section(2, 1, 0x2000), "secrets of 0x2000 bytes: want one page"},
		{"secrets twice", section(3, 2, 2), "a second section of type secrets, after section 2"},
		{"hashes twice", section(3, 2, 0x10), "want it around the hash table"},
		{"overlap", section(1, 0, 0x808000), "section 1 at offset 0x181c: memory from 0x808000 to 0x80b000 overlaps section 0"},
		{"same page", section(4, 0, 0x80e000), "overlaps section 3, CPUID"},
		{"hash table elsewhere", u32(98, 0x811c00), "kernel hashes from 0x810000 to 0x811000: want it around the hash table, which has 0x400 bytes at 0x811c00"},
		{"hash table over the page", u32(98, 0x810f51), "want it around the hash table"},
		{"hash table too small", u32(94, 175), "which has 0xaf bytes"},
		{"hash table over 4 GiB", u32(94, 0xffffffff), "hash table from 0x810c00 to 0x100810bff: want it below 0xffffe000"},
		{"hash table unknown", u16(ovmftest.HashesGUID, 0), "which has 0x0 bytes at 0x0"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			l, err := ovmf.Parse(tt.change(ovmftest.Image(ovmftest.AmdSev(8192))))
			if err == nil {
				t.Fatalf("got %+v, want an error", l)
			}
			if !strings.Contains(err.Error(), tt.want) || !strings.HasPrefix(err.Error(), "ovmf: ") {
				t.Errorf("got %q, want ovmf: … %q", err, tt.want)
			}
			if !reflect.DeepEqual(l, ovmf.Layout{}) {
				t.Errorf("got %+v beside the error", l)
			}
			if want := strings.Contains(tt.want, "not a firmware"); want && !errors.Is(err, ovmf.ErrNotSNP) {
				t.Errorf("got %q, want ErrNotSNP", err)
			}
		})
	}
}

// A hash table may fill its page to the last byte.
func TestHashTableAtTheEdge(t *testing.T) {
	l := ovmftest.AmdSev(ovmf.PageSize)
	l.HashTable = ovmf.Area{Base: 0x810f50, Size: ovmf.HashTableSize}
	if _, err := ovmf.Parse(ovmftest.Image(l)); err != nil {
		t.Error(err)
	}
}

func TestValidate(t *testing.T) {
	l := ovmftest.AmdSev(0)
	if err := l.Validate(); err != nil {
		t.Errorf("without a size: %v", err)
	}
	l.Sections = slices.Clone(l.Sections)
	l.Sections[3].Size = 0
	if err := l.Validate(); err == nil || !strings.HasPrefix(err.Error(), "ovmf: section 3: CPUID") {
		t.Errorf("got %v, want an error about section 3", err)
	}
	if err := (ovmf.Layout{}).Validate(); err == nil {
		t.Error("got no error for an empty layout")
	}
}

// What parses is valid, and building an image of it again gives the same layout. The fuzzer writes the end of an image,
// because everything is read from there.
func FuzzParse(f *testing.F) {
	for _, l := range []ovmf.Layout{ovmftest.AmdSev(4096), ovmftest.OvmfX64(4096)} {
		image := ovmftest.Image(l)
		f.Add(image[len(image)-ovmftest.Metadata:])
	}
	f.Add(make([]byte, 50))
	f.Fuzz(func(t *testing.T, end []byte) {
		b := make([]byte, max(1, (len(end)+ovmf.PageSize-1)/ovmf.PageSize)*ovmf.PageSize)
		copy(b[len(b)-len(end):], end)
		l, err := ovmf.Parse(b)
		if err != nil {
			if !reflect.DeepEqual(l, ovmf.Layout{}) {
				t.Fatalf("got %+v beside %v", l, err)
			}
			return
		}
		if err := l.Validate(); err != nil {
			t.Fatal(err)
		}
		if int(l.Size) != len(b) {
			t.Fatalf("got size %d of %d bytes", l.Size, len(b))
		}
		again, err := ovmf.Parse(ovmftest.Image(l))
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(again, l) {
			t.Fatalf("got %+v, want %+v", again, l)
		}
	})
}

func BenchmarkParse(b *testing.B) {
	image := ovmftest.Image(ovmftest.AmdSev(4 << 20))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := ovmf.Parse(image); err != nil {
			b.Fatal(err)
		}
	}
}
