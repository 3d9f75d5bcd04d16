// Package ovmftest makes firmware images for tests: the tables of a real one around bytes that mean nothing.
//
//	image := ovmftest.Image(ovmftest.AmdSev(4 << 20))
package ovmftest

import (
	"encoding/binary"

	"github.com/kcradle/kcradle/snp/internal/guid"
	"github.com/kcradle/kcradle/snp/ovmf"
)

// Where Image puts what, in bytes before the end of the image, for tests that break one of them.
const (
	FooterSize   = 50  // u16: size of the table
	FooterGUID   = 48  // 16 bytes
	ResetSize    = 68  // u16: size of the entry with the reset EIP
	ResetGUID    = 66  // 16 bytes
	HashesSize   = 90  // u16: size of the entry with the hash table's place
	HashesGUID   = 88  // 16 bytes
	MetadataFrom = 120 // u32: where the metadata is, in bytes before the end
	MetadataSize = 116 // u16: size of the entry with it
	MetadataGUID = 114 // 16 bytes
	Metadata     = 2048
)

// AmdSev is the layout of edk2's OvmfPkg/AmdSev of 2025, for an image of size bytes.
func AmdSev(size uint32) ovmf.Layout {
	return ovmf.Layout{
		Size:      size,
		ResetEIP:  0x80b004,
		HashTable: ovmf.Area{Base: 0x810c00, Size: 0x400},
		Sections: []ovmf.Section{
			{Type: ovmf.SectionMemory, GPA: 0x800000, Size: 0x9000},
			{Type: ovmf.SectionMemory, GPA: 0x80a000, Size: 0x3000},
			{Type: ovmf.SectionSecrets, GPA: 0x80d000, Size: 0x1000},
			{Type: ovmf.SectionCPUID, GPA: 0x80e000, Size: 0x1000},
			{Type: ovmf.SectionSVSMCAA, GPA: 0x80f000, Size: 0x1000},
			{Type: ovmf.SectionKernelHashes, GPA: 0x810000, Size: 0x1000},
			{Type: ovmf.SectionMemory, GPA: 0x811000, Size: 0xf000},
		},
	}
}

// OvmfX64 is the layout of edk2's generic OvmfPkg before 2025-11, which has no page for hashes.
func OvmfX64(size uint32) ovmf.Layout {
	l := AmdSev(size)
	l.HashTable = ovmf.Area{}
	l.Sections = append(l.Sections[:5:5], ovmf.Section{Type: ovmf.SectionMemory, GPA: 0x810000, Size: 0x10000})
	return l
}

// Image is an image with a layout, right or wrong. Its Size must be at least a page; the sections must fit in the last
// 2 KiB before the table.
func Image(l ovmf.Layout) []byte {
	b := make([]byte, l.Size)
	for i := range b {
		b[i] = byte(i*7 + i>>12)
	}
	end := len(b)
	le := binary.LittleEndian

	m := append([]byte("ASEV"), make([]byte, 12)...)
	le.PutUint32(m[4:], uint32(16+12*len(l.Sections)))
	le.PutUint32(m[8:], 1)
	le.PutUint32(m[12:], uint32(len(l.Sections)))
	for _, s := range l.Sections {
		m = le.AppendUint32(m, s.GPA)
		m = le.AppendUint32(m, s.Size)
		m = le.AppendUint32(m, uint32(s.Type))
	}
	copy(b[end-Metadata:], m)

	var t []byte
	entry := func(id guid.GUID, words ...uint32) {
		for _, w := range words {
			t = le.AppendUint32(t, w)
		}
		t = le.AppendUint16(t, uint16(4*len(words)+18))
		t = append(t, id[:]...)
	}
	entry(guid.Of(0xdc886566, 0x984a, 0x4798, 0xa75e_5585a7bf67cc), Metadata)
	entry(guid.Of(0x7255371f, 0x3a3b, 0x4b04, 0x927b_1da6efa8d454), l.HashTable.Base, l.HashTable.Size)
	entry(guid.Of(0x00f771de, 0x1a7e, 0x4fcb, 0x890e_68c77e2fb44e), l.ResetEIP)
	entry(guid.Of(0x96b582de, 0x1fb2, 0x45f7, 0xbaea_a366c55a082d))
	le.PutUint16(t[len(t)-18:], uint16(len(t)))
	copy(b[end-32-len(t):], t)
	return b
}
