package measure

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/kcradle/kcradle/snp/internal/guid"
	"github.com/kcradle/kcradle/snp/ovmf"
)

// FileHash is the SHA-256 of a kernel, an initrd or a firmware. Zero is none.
type FileHash [sha256.Size]byte

// HashFile reads a file to its end.
func HashFile(r io.Reader) (FileHash, error) {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return FileHash{}, fmt.Errorf("measure: hash file: %w", err)
	}
	return FileHash(h.Sum(nil)), nil
}

// ParseFileHash reads 64 hexadecimal digits.
func ParseFileHash(s string) (FileHash, error) {
	var h FileHash
	err := h.UnmarshalText([]byte(s))
	return h, err
}

func (h FileHash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText writes 64 hexadecimal digits.
func (h FileHash) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, h[:]), nil }

// UnmarshalText reads 64 hexadecimal digits.
func (h *FileHash) UnmarshalText(b []byte) error {
	var read FileHash
	if len(b) != hex.EncodedLen(len(read)) {
		return fmt.Errorf("measure: file hash of %d characters: want 64 hexadecimal digits", len(b))
	}
	if _, err := hex.Decode(read[:], b); err != nil {
		return fmt.Errorf("measure: file hash: %w", err)
	}
	*h = read
	return nil
}

func hashBytes(b []byte) FileHash { return sha256.Sum256(b) }

// The table of hashes that the monitor puts into guest memory and the firmware compares with what it loads
// (PaddedSevHashTable in QEMU's target/i386/sev.c; edk2's OvmfPkg/AmdSev/BlobVerifierLibSevHashes). A header of GUID
// and u16 length is followed by three entries of GUID, u16 length and SHA-256, and by zeros to a multiple of 16.
const (
	hashHeader    = guid.Size + 2
	hashEntry     = hashHeader + sha256.Size
	hashTableSize = hashHeader + 3*hashEntry
)

// HashTable is the table of hashes for a kernel, an initrd (zero: none) and a command line, as QEMU writes it with
// kernel-hashes=on.
func HashTable(kernel, initrd FileHash, commandLine string) ([ovmf.HashTableSize]byte, error) {
	if kernel == (FileHash{}) {
		return [ovmf.HashTableSize]byte{}, errors.New("measure: hash table: no kernel")
	}
	if err := checkCommandLine(commandLine); err != nil {
		return [ovmf.HashTableSize]byte{}, err
	}
	return hashTable(kernel, initrd, commandLine), nil
}

func hashTable(kernel, initrd FileHash, commandLine string) [ovmf.HashTableSize]byte {
	if initrd == (FileHash{}) {
		initrd = hashBytes(nil)
	}
	withNUL := make([]byte, 0, 4096)
	withNUL = append(append(withNUL, commandLine...), 0)

	var table [ovmf.HashTableSize]byte
	b := table[:0]
	entry := func(id guid.GUID, size int, data []byte) {
		b = append(b, id[:]...)
		b = binary.LittleEndian.AppendUint16(b, uint16(size))
		b = append(b, data...)
	}
	line := hashBytes(withNUL)
	entry(guid.Of(0x9438d606, 0x4f22, 0x4cc9, 0xb479_a793d411fd21), hashTableSize, nil)
	entry(guid.Of(0x97d02dd8, 0xbd20, 0x4c94, 0xaa78_e7714d36ab2a), hashEntry, line[:])
	entry(guid.Of(0x44baf731, 0x3a2f, 0x4bd7, 0x9af1_41e29169781d), hashEntry, initrd[:])
	entry(guid.Of(0x4de79437, 0xabd2, 0x427f, 0xb835_d5b172d2045b), hashEntry, kernel[:])
	return table
}

// hashPage hashes the page with the table: zeros around it.
func (in Input) hashPage() [sha512.Size384]byte {
	var page [ovmf.PageSize]byte
	table := hashTable(in.Kernel, in.Initrd, in.CommandLine)
	copy(page[in.Firmware.Layout.HashTable.Base%ovmf.PageSize:], table[:])
	return sha512.Sum384(page[:])
}

// checkCommandLine refuses a NUL: the monitor and the kernel would end there, the digest would not.
func checkCommandLine(s string) error {
	if i := strings.IndexByte(s, 0); i >= 0 {
		return fmt.Errorf("measure: NUL in the command line after %d bytes", i)
	}
	return nil
}
