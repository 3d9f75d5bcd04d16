package erofs

import (
	"encoding/binary"
	"hash/crc32"
)

// The on-disk format, as in the kernel's fs/erofs/erofs_fs.h. All numbers are little-endian.
const (
	superOffset = 1024
	superMagic  = 0xE0F5E1E2

	blockBits = 12
	// BlockSize is the file system's block size; an image is a multiple of it.
	BlockSize = 1 << blockBits

	featureCompatChecksum  = 0x1 // the superblock carries a CRC-32C
	featureCompatMtime     = 0x2 // inodes carry mtimes
	featureIncompatChunked = 0x4 // files mapped chunk by chunk, which is how holes are said

	slotBits  = 5 // an inode number counts 32-byte slots from the start of the metadata
	slotSize  = 1 << slotBits
	inodeSize = 64 // extended inodes only: the compact ones have no mtime

	layoutPlain  = 0 // blocks one after the other
	layoutInline = 2 // the same, and what is left over follows the inode
	layoutChunk  = 4 // an array of block addresses follows the inode

	nullBlock = 0xFFFFFFFF // a hole in a chunk array

	direntSize = 12

	xattrHeaderSize = 12 // before the entries of an inode
	xattrEntrySize  = 4  // before name and value
)

// File types in directory entries, as in the kernel's include/linux/fs_types.h.
const (
	dtUnknown = iota
	dtRegular
	dtDirectory
	dtCharDevice
	dtBlockDevice
	dtFIFO
	dtSocket
	dtSymlink
)

// xattrPrefixes are the name prefixes that the format has a number for; other attributes cannot be stored.
var xattrPrefixes = []struct {
	index  byte
	prefix string
	whole  bool // the prefix is the whole name
}{
	{1, "user.", false},
	{2, "system.posix_acl_access", true},
	{3, "system.posix_acl_default", true},
	{4, "trusted.", false},
	{6, "security.", false},
}

// superblock is struct erofs_super_block, what of it is used here.
type superblock struct {
	rootNid    uint16
	inodes     uint64
	blocks     uint32
	metaBlock  uint32
	uuid       [16]byte
	volume     [16]byte
	features   uint32
	featuresIn uint32
}

// block returns the first block of the image: the superblock at its place, checksummed.
func (s *superblock) block() []byte {
	le := binary.LittleEndian
	b := make([]byte, BlockSize)
	p := b[superOffset:]
	le.PutUint32(p[0:], superMagic)
	le.PutUint32(p[8:], s.features|featureCompatChecksum)
	p[12] = blockBits
	le.PutUint16(p[14:], s.rootNid)
	le.PutUint64(p[16:], s.inodes)
	// 24: build time, zero: the same layer must give the same bytes.
	le.PutUint32(p[36:], s.blocks)
	le.PutUint32(p[40:], s.metaBlock)
	copy(p[48:64], s.uuid[:])
	copy(p[64:80], s.volume[:])
	le.PutUint32(p[80:], s.featuresIn)
	// The kernel's CRC-32C starts at all ones and is not inverted at the end; Go's is.
	le.PutUint32(p[4:], ^crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// dataLayout is what an inode's i_format and i_u say of its content.
type dataLayout struct {
	layout uint16
	u      uint32 // raw_blkaddr, rdev or chunk format
}

// put writes struct erofs_inode_extended.
func (i *Inode) put(b []byte, l dataLayout, xattrSize int) {
	le := binary.LittleEndian
	le.PutUint16(b[0:], l.layout<<1|1)
	if xattrSize > 0 {
		le.PutUint16(b[2:], uint16((xattrSize-xattrHeaderSize)/4+1))
	}
	le.PutUint16(b[4:], i.Mode)
	le.PutUint64(b[8:], uint64(i.size))
	le.PutUint32(b[16:], l.u)
	le.PutUint32(b[20:], uint32(i.nid))
	le.PutUint32(b[24:], i.UID)
	le.PutUint32(b[28:], i.GID)
	le.PutUint64(b[32:], uint64(i.Mtime))
	le.PutUint32(b[40:], i.MtimeNsec)
	le.PutUint32(b[44:], i.nlink)
}

func fileType(mode uint16) byte {
	switch mode & TypeMask {
	case TypeRegular:
		return dtRegular
	case TypeDirectory:
		return dtDirectory
	case TypeCharDevice:
		return dtCharDevice
	case TypeBlockDevice:
		return dtBlockDevice
	case TypeFIFO:
		return dtFIFO
	case TypeSocket:
		return dtSocket
	case TypeSymlink:
		return dtSymlink
	}
	return dtUnknown
}

func align(n, to int64) int64 { return (n + to - 1) / to * to }
