// Package guid is the 16 bytes of a GUID as UEFI stores them.
//
//	footer := guid.Of(0x96b582de, 0x1fb2, 0x45f7, 0xbaea_a366c55a082d)
//	footer.String() // 96b582de-1fb2-45f7-baea-a366c55a082d
package guid

import (
	"encoding/binary"
	"fmt"
)

// Size is the length of a GUID in bytes.
const Size = 16

// GUID mirrors EFI_GUID (UEFI specification 2.10, appendix A): the first three groups of the text are little-endian
// numbers, the last two are bytes in the order of the text.
type GUID [Size]byte

// Of builds a GUID from its text, group by group; d takes the last two groups, 16 and 48 bits of them.
func Of(a uint32, b, c uint16, d uint64) GUID {
	var g GUID
	binary.LittleEndian.PutUint32(g[0:], a)
	binary.LittleEndian.PutUint16(g[4:], b)
	binary.LittleEndian.PutUint16(g[6:], c)
	binary.BigEndian.PutUint64(g[8:], d)
	return g
}

// String is the usual text in five groups, lower case.
func (g GUID) String() string {
	return fmt.Sprintf("%08x-%04x-%04x-%x-%x", binary.LittleEndian.Uint32(g[0:]), binary.LittleEndian.Uint16(g[4:]),
		binary.LittleEndian.Uint16(g[6:]), g[8:10], g[10:16])
}
