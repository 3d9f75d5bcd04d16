package snp

import (
	"errors"
	"fmt"
)

// CPU is a processor's family, model and stepping, the extended parts of family and model added in, as CPUID leaf 1
// gives them and reports from version 3 on repeat them.
type CPU struct {
	Family, Model, Stepping uint8
}

// String returns the three numbers as AMD's documents write them.
func (c CPU) String() string {
	return fmt.Sprintf("family %#02x model %#02x stepping %d", c.Family, c.Model, c.Stepping)
}

// Product returns what processor it is, ProductUnknown if it is none of those.
func (c CPU) Product() Product {
	switch {
	case c.Family == 0x19 && c.Model <= 0x0f:
		return Milan
	case c.Family == 0x19 && c.Model >= 0x10 && c.Model <= 0x1f:
		return Genoa
	case c.Family == 0x19 && c.Model >= 0xa0 && c.Model <= 0xaf:
		return Bergamo
	case c.Family == 0x1a && c.Model <= 0x11:
		return Turin
	}
	return ProductUnknown
}

// Product is a processor by AMD's code name.
type Product uint8

// The products that have SEV-SNP.
const (
	ProductUnknown Product = iota
	Milan                  // EPYC 7003
	Genoa                  // EPYC 9004
	Bergamo                // EPYC 97x4, and Siena, EPYC 8004: family and model are the same
	Turin                  // EPYC 9005, dense or not
)

// String returns the code name.
func (p Product) String() string {
	switch p {
	case Milan:
		return "Milan"
	case Genoa:
		return "Genoa"
	case Bergamo:
		return "Bergamo or Siena"
	case Turin:
		return "Turin"
	}
	return "unknown"
}

// Line returns the product line whose keys sign for the product.
func (p Product) Line() Line {
	switch p {
	case Milan:
		return LineMilan
	case Genoa, Bergamo:
		return LineGenoa
	case Turin:
		return LineTurin
	}
	return LineUnknown
}

// Line is a product line: the products that share one root key of AMD's, and the name that AMD's key distribution
// service has for them (VCEK certificate and KDS interface specification, document 57230).
type Line uint8

// The lines.
const (
	LineUnknown Line = iota
	LineMilan
	LineGenoa // Genoa, Bergamo and Siena
	LineTurin
)

// String returns the name as it stands in AMD's certificates and addresses.
func (l Line) String() string {
	switch l {
	case LineMilan:
		return "Milan"
	case LineGenoa:
		return "Genoa"
	case LineTurin:
		return "Turin"
	}
	return "unknown"
}

// ParseLine is the inverse of Line.String.
func ParseLine(s string) (Line, error) {
	for _, l := range []Line{LineMilan, LineGenoa, LineTurin} {
		if s == l.String() {
			return l, nil
		}
	}
	return LineUnknown, fmt.Errorf("%q is no product line, want Milan, Genoa or Turin", s)
}

// MarshalText writes what ParseLine reads.
func (l Line) MarshalText() ([]byte, error) {
	if _, err := ParseLine(l.String()); err != nil {
		return nil, err
	}
	return []byte(l.String()), nil
}

// UnmarshalText is ParseLine.
func (l *Line) UnmarshalText(b []byte) error {
	read, err := ParseLine(string(b))
	if err == nil {
		*l = read
	}
	return err
}

// Layout returns how the line packs a TCB version.
func (l Line) Layout() Layout {
	switch l {
	case LineMilan, LineGenoa:
		return LayoutMilan
	case LineTurin:
		return LayoutTurin
	}
	return LayoutUnknown
}

// HWIDSize returns how many bytes of CHIP_ID name a chip of the line, 0 for an unknown one. (57230)
func (l Line) HWIDSize() int {
	switch l {
	case LineMilan, LineGenoa:
		return 64
	case LineTurin:
		return 8
	}
	return 0
}

// Layout is the order of a TCB version's parts in its eight bytes. (56860, "TCB version")
type Layout uint8

// The layouts. Bytes that are not named are reserved.
const (
	LayoutUnknown Layout = iota
	LayoutMilan          // 0 boot loader, 1 TEE, 6 SNP, 7 microcode: Milan, Genoa, Bergamo, Siena
	LayoutTurin          // 0 FMC, 1 boot loader, 2 TEE, 3 SNP, 7 microcode
)

// TCB is the security versions of the firmware's parts. TCBs of one layout can be compared with ==.
type TCB struct {
	Layout     Layout
	FMC        uint8 // first mutable code; Turin only
	Bootloader uint8
	TEE        uint8
	SNP        uint8
	Microcode  uint8
}

var errTCB = errors.New("unknown layout of TCB version")

// ParseTCB reads the eight bytes of a TCB version. Reserved bytes that are not zero are an error.
func ParseTCB(l Layout, b [8]byte) (TCB, error) {
	t := TCB{Layout: l}
	switch l {
	case LayoutMilan:
		t.Bootloader, t.TEE, t.SNP, t.Microcode = b[0], b[1], b[6], b[7]
	case LayoutTurin:
		t.FMC, t.Bootloader, t.TEE, t.SNP, t.Microcode = b[0], b[1], b[2], b[3], b[7]
	default:
		return TCB{}, errTCB
	}
	if t.Bytes() != b {
		return TCB{}, fmt.Errorf("%x has bits in reserved bytes", b)
	}
	return t, nil
}

// Bytes returns the eight bytes of a TCB version; eight zeros for LayoutUnknown.
func (t TCB) Bytes() [8]byte {
	switch t.Layout {
	case LayoutMilan:
		return [8]byte{0: t.Bootloader, 1: t.TEE, 6: t.SNP, 7: t.Microcode}
	case LayoutTurin:
		return [8]byte{0: t.FMC, 1: t.Bootloader, 2: t.TEE, 3: t.SNP, 7: t.Microcode}
	}
	return [8]byte{}
}

// String returns the parts by the names they have in AMD's key distribution service.
func (t TCB) String() string {
	s := fmt.Sprintf("bl %d tee %d snp %d ucode %d", t.Bootloader, t.TEE, t.SNP, t.Microcode)
	if t.Layout == LayoutTurin {
		return fmt.Sprintf("fmc %d %s", t.FMC, s)
	}
	return s
}

// layout returns how the report's TCB versions are packed. From version 3 on the processor says it. A version 2 report
// does not name its processor; there a chip id of eight bytes is Turin's, and where the chip id is masked the first
// layout is taken whose reserved bytes are zero in all four.
func (r *Report) layout(tcbs ...[8]byte) Layout {
	if r.Version >= Version3 {
		return r.CPU.Product().Line().Layout()
	}
	if r.ChipID == ([64]byte{}) {
		for _, b := range tcbs {
			if _, err := ParseTCB(LayoutMilan, b); err != nil {
				return LayoutTurin
			}
		}
		return LayoutMilan
	}
	if [56]byte(r.ChipID[8:]) == ([56]byte{}) {
		return LayoutTurin
	}
	return LayoutMilan
}

// Product returns the processor the report names; ProductUnknown in a version 2 report, which names none.
func (r *Report) Product() Product {
	if r.Version < Version3 {
		return ProductUnknown
	}
	return r.CPU.Product()
}
