// Package ovmf reads from a firmware image what a monitor needs to launch it as a SEV-SNP guest: which guest pages are
// prepared and how, where the hashes of kernel, initrd and command line go, where a second CPU starts.
//
//	layout, err := ovmf.Parse(image)
//	for _, s := range layout.Sections {
//		fmt.Printf("%v at %#x, %d bytes\n", s.Type, s.GPA, s.Size)
//	}
//
// An image comes from the host and is hostile. Parse is strict: it returns a whole [Layout] or an error that names what
// is wrong and at which offset of the image.
//
// A layout says where things are, never what the firmware does with them. Trust in a firmware comes from its digest.
package ovmf

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/kcradle/kcradle/snp/internal/guid"
)

const (
	// PageSize is the unit of everything here, in bytes.
	PageSize = 4096
	// MaxSize bounds an image, in bytes: the largest max-fw-size that QEMU takes (hw/i386/pc.c).
	MaxSize = 16 << 20
	// MaxSections bounds the metadata table. edk2's longest has 8 entries.
	MaxSections = 64
	// MaxSectionBytes bounds the memory that all sections take together. edk2's take less than 256 KiB.
	MaxSectionBytes = 16 << 20
	// HashTableSize is the room in bytes that QEMU wants for its table of hashes (PaddedSevHashTable in QEMU's
	// target/i386/sev.c).
	HashTableSize = 176
)

// ErrNotSNP is returned (wrapped) for an image without the tables of a SEV-SNP firmware.
var ErrNotSNP = errors.New("not a firmware for SEV-SNP (build one from edk2's OvmfPkg/AmdSev)")

// SectionType is how the pages of a section are prepared. The values are those of edk2's OvmfPkg/ResetVector
// (OVMF_SECTION_TYPE_*) and QEMU's include/hw/i386/pc.h (ovmf_sev_metadata_desc_type).
type SectionType uint32

// The section types.
const (
	SectionMemory       SectionType = 1    // validated memory of the first boot phase
	SectionSecrets      SectionType = 2    // the page that gets the guest's message keys
	SectionCPUID        SectionType = 3    // the page that gets the CPUID values
	SectionSVSMCAA      SectionType = 4    // the calling area of a secure VM service module
	SectionKernelHashes SectionType = 0x10 // the page that gets the hashes of kernel, initrd and command line
)

func (t SectionType) String() string {
	switch t {
	case SectionMemory:
		return "memory"
	case SectionSecrets:
		return "secrets"
	case SectionCPUID:
		return "CPUID"
	case SectionSVSMCAA:
		return "SVSM calling area"
	case SectionKernelHashes:
		return "kernel hashes"
	}
	return fmt.Sprintf("type %#x", uint32(t))
}

// once reports whether a firmware has at most one section of this type, of exactly one page.
func (t SectionType) once() bool {
	return t == SectionSecrets || t == SectionCPUID || t == SectionKernelHashes
}

// Section is one entry of the metadata table.
type Section struct {
	Type SectionType
	GPA  uint32 // guest physical address, a multiple of PageSize
	Size uint32 // bytes, a multiple of PageSize
}

func (s Section) end() uint64 { return uint64(s.GPA) + uint64(s.Size) }

// Area is a range of guest physical memory.
type Area struct {
	Base uint32 // guest physical address
	Size uint32 // bytes; 0: the firmware has none
}

// Layout is what a launch needs to know of a firmware.
type Layout struct {
	// Size is the length of the image in bytes, a multiple of PageSize; the image ends at 4 GiB. 0: not known.
	Size uint32
	// ResetEIP is where every CPU but the first starts.
	ResetEIP uint32
	// HashTable is where the firmware looks for the table of hashes. Without a section of type SectionKernelHashes it
	// is not measured by a SEV-SNP launch.
	HashTable Area
	// Sections in the order of the table, which is the order of measurement.
	Sections []Section
}

// Section returns the first section of a type.
func (l Layout) Section(t SectionType) (Section, bool) {
	for _, s := range l.Sections {
		if s.Type == t {
			return s, true
		}
	}
	return Section{}, false
}

// Validate checks a layout that was not made by [Parse].
func (l Layout) Validate() error {
	if i, err := l.check(); err != nil {
		if i >= 0 {
			return fmt.Errorf("ovmf: section %d: %w", i, err)
		}
		return fmt.Errorf("ovmf: %w", err)
	}
	return nil
}

// check returns an error and the index of the section that it is about, or -1.
func (l Layout) check() (int, error) {
	if l.Size%PageSize != 0 || l.Size > MaxSize {
		return -1, fmt.Errorf("image of %d bytes: want a multiple of %d up to %d", l.Size, PageSize, MaxSize)
	}
	if n := len(l.Sections); n == 0 || n > MaxSections {
		return -1, fmt.Errorf("%d sections: want 1 to %d", n, MaxSections)
	}
	top := uint64(1)<<32 - uint64(l.Size)
	if end := uint64(l.HashTable.Base) + uint64(l.HashTable.Size); end > top {
		return -1, fmt.Errorf("hash table from %#x to %#x: want it below %#x", l.HashTable.Base, end, top)
	}
	var total uint64
	for i, s := range l.Sections {
		switch s.Type {
		case SectionMemory, SectionSecrets, SectionCPUID, SectionSVSMCAA, SectionKernelHashes:
		default:
			return i, fmt.Errorf("unknown %v: what a monitor measures for it is not known", s.Type)
		}
		if s.GPA%PageSize != 0 || s.Size%PageSize != 0 || s.Size == 0 {
			return i, fmt.Errorf("%v at %#x of %#x bytes: want whole pages", s.Type, s.GPA, s.Size)
		}
		if s.end() > top {
			return i, fmt.Errorf("%v from %#x to %#x: want it below %#x", s.Type, s.GPA, s.end(), top)
		}
		if total += uint64(s.Size); total > MaxSectionBytes {
			return i, fmt.Errorf("the sections take %#x bytes: want at most %#x", total, MaxSectionBytes)
		}
		if s.Type.once() && s.Size != PageSize {
			return i, fmt.Errorf("%v of %#x bytes: want one page", s.Type, s.Size)
		}
		for j, o := range l.Sections[:i] {
			if s.Type == o.Type && s.Type.once() {
				return i, fmt.Errorf("a second section of type %v, after section %d", s.Type, j)
			}
			if uint64(s.GPA) < o.end() && uint64(o.GPA) < s.end() {
				return i, fmt.Errorf("%v from %#x to %#x overlaps section %d, %v from %#x to %#x",
					s.Type, s.GPA, s.end(), j, o.Type, o.GPA, o.end())
			}
		}
		if s.Type == SectionKernelHashes {
			h := l.HashTable
			if h.Size < HashTableSize || h.Base < s.GPA || uint64(h.Base)+HashTableSize > s.end() {
				return i, fmt.Errorf("%v from %#x to %#x: want it around the hash table, which has %#x bytes at %#x",
					s.Type, s.GPA, s.end(), h.Size, h.Base)
			}
		}
	}
	return -1, nil
}

// The table at the end of an image (edk2's OvmfPkg/ResetVector/Ia16/ResetVectorVtf0.asm; QEMU's
// hw/i386/pc_sysfw_ovmf.c) ends resetVector bytes before the end and is read backwards. An entry is its data, a u16 with
// the size of the entry, and a GUID; the last entry has no data and the size of the whole table.
const (
	resetVector = 32
	entryHeader = 2 + guid.Size
)

// The GUIDs are functions, because Go has no constant arrays.
func tableGUID() guid.GUID      { return guid.Of(0x96b582de, 0x1fb2, 0x45f7, 0xbaea_a366c55a082d) }
func resetBlockGUID() guid.GUID { return guid.Of(0x00f771de, 0x1a7e, 0x4fcb, 0x890e_68c77e2fb44e) }
func hashTableGUID() guid.GUID  { return guid.Of(0x7255371f, 0x3a3b, 0x4b04, 0x927b_1da6efa8d454) }
func metadataGUID() guid.GUID   { return guid.Of(0xdc886566, 0x984a, 0x4798, 0xa75e_5585a7bf67cc) }

// The header of the metadata (edk2's OvmfPkg/ResetVector/X64/OvmfSevMetadata.asm; OvmfSevMetadata in QEMU's
// hw/i386/pc.h) is a signature, then length, version and number of sections as u32; each section is address, size and
// type as u32.
const (
	metadataSignature = "ASEV"
	metadataVersion   = 1
	metadataHeader    = 16
	sectionSize       = 12
)

// Parse reads the layout of a firmware image: the whole file as it is given to the monitor.
func Parse(image []byte) (Layout, error) {
	if len(image) == 0 || len(image)%PageSize != 0 || len(image) > MaxSize {
		return Layout{}, fmt.Errorf("ovmf: image of %d bytes: want a multiple of %d up to %d", len(image), PageSize, MaxSize)
	}
	table, err := readTable(image)
	if err != nil {
		return Layout{}, fmt.Errorf("ovmf: %w", err)
	}
	l := Layout{Size: uint32(len(image))}

	reset, err := table.entry(resetBlockGUID(), "SEV-ES reset block", 4)
	if err != nil {
		return Layout{}, fmt.Errorf("ovmf: %w", err)
	}
	if reset == nil {
		return Layout{}, fmt.Errorf("ovmf: the table has no SEV-ES reset block: %w", ErrNotSNP)
	}
	l.ResetEIP = binary.LittleEndian.Uint32(reset)

	hashes, err := table.entry(hashTableGUID(), "SEV hash table", 8)
	if err != nil {
		return Layout{}, fmt.Errorf("ovmf: %w", err)
	}
	if hashes != nil {
		l.HashTable = Area{Base: binary.LittleEndian.Uint32(hashes), Size: binary.LittleEndian.Uint32(hashes[4:])}
	}

	metadata, err := table.entry(metadataGUID(), "SEV metadata", 4)
	if err != nil {
		return Layout{}, fmt.Errorf("ovmf: %w", err)
	}
	if metadata == nil {
		return Layout{}, fmt.Errorf("ovmf: the table has no SEV metadata: %w", ErrNotSNP)
	}
	fromEnd := binary.LittleEndian.Uint32(metadata)
	if fromEnd > l.Size || fromEnd < metadataHeader {
		return Layout{}, fmt.Errorf("ovmf: SEV metadata %#x bytes before the end of an image of %#x", fromEnd, l.Size)
	}
	at := len(image) - int(fromEnd)
	if l.Sections, err = readMetadata(image[at:]); err != nil {
		return Layout{}, fmt.Errorf("ovmf: SEV metadata at offset %#x: %w", at, err)
	}
	if i, err := l.check(); err != nil {
		if i >= 0 {
			return Layout{}, fmt.Errorf("ovmf: section %d at offset %#x: %w", i, at+metadataHeader+i*sectionSize, err)
		}
		return Layout{}, fmt.Errorf("ovmf: %w", err)
	}
	return l, nil
}

type entry struct {
	offset int // in the image
	data   []byte
}

type table map[guid.GUID]entry

// entry returns the data of an entry, nil without one.
func (t table) entry(id guid.GUID, name string, size int) ([]byte, error) {
	e, ok := t[id]
	if !ok {
		return nil, nil
	}
	if len(e.data) != size {
		return nil, fmt.Errorf("%s at offset %#x has %d bytes: want %d", name, e.offset, len(e.data), size)
	}
	return e.data, nil
}

func readTable(image []byte) (table, error) {
	end := len(image) - resetVector
	footer := end - entryHeader
	if guid.GUID(image[footer+2:end]) != tableGUID() {
		return nil, fmt.Errorf("no table of GUIDs at offset %#x: %w", footer+2, ErrNotSNP)
	}
	size := int(binary.LittleEndian.Uint16(image[footer:]))
	if size < entryHeader || size > end {
		return nil, fmt.Errorf("table of %d bytes ends at offset %#x: want %d to %d", size, end, entryHeader, end)
	}
	t := table{}
	start := end - size
	for p := footer; p > start; {
		if p-start < entryHeader {
			return nil, fmt.Errorf("%d bytes at offset %#x are left over before the first entry of the table", p-start, start)
		}
		header := p - entryHeader
		n := int(binary.LittleEndian.Uint16(image[header:]))
		if n < entryHeader || n > p-start {
			return nil, fmt.Errorf("entry of %d bytes ends at offset %#x: want %d to %d", n, p, entryHeader, p-start)
		}
		id := guid.GUID(image[header+2 : p])
		if o, twice := t[id]; twice {
			return nil, fmt.Errorf("entry %v at offset %#x is there again at %#x", id, p-n, o.offset)
		}
		p -= n
		t[id] = entry{offset: p, data: image[p:header]}
	}
	return t, nil
}

// readMetadata reads the sections; b holds a header at least.
func readMetadata(b []byte) ([]Section, error) {
	if got := string(b[:4]); got != metadataSignature {
		return nil, fmt.Errorf("signature %q: want %q", got, metadataSignature)
	}
	length := binary.LittleEndian.Uint32(b[4:])
	version := binary.LittleEndian.Uint32(b[8:])
	count := binary.LittleEndian.Uint32(b[12:])
	if version != metadataVersion {
		return nil, fmt.Errorf("version %d: this code knows %d", version, metadataVersion)
	}
	if count == 0 || count > MaxSections {
		return nil, fmt.Errorf("%d sections: want 1 to %d", count, MaxSections)
	}
	if want := metadataHeader + count*sectionSize; length != want {
		return nil, fmt.Errorf("length %d with %d sections: want %d", length, count, want)
	}
	if uint64(length) > uint64(len(b)) {
		return nil, fmt.Errorf("length %d: the image ends after %d", length, len(b))
	}
	sections := make([]Section, count)
	for i := range sections {
		s := b[metadataHeader+i*sectionSize:]
		sections[i] = Section{
			GPA:  binary.LittleEndian.Uint32(s),
			Size: binary.LittleEndian.Uint32(s[4:]),
			Type: SectionType(binary.LittleEndian.Uint32(s[8:])),
		}
	}
	return sections, nil
}
