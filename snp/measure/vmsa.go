package measure

import (
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/kcradle/kcradle/snp/ovmf"
)

// CPU is a CPU model as it enters the digest: its CPUID signature (Fn0000_0001 EAX), which a virtual CPU has in RDX
// when it starts. Versions of a QEMU model differ in features and not in this.
type CPU uint32

// The CPU models of QEMU's target/i386/cpu.c that a SEV-SNP host can run.
const (
	EPYC      CPU = 0x800f12 // family 0x17 model 1 stepping 2
	EPYCRome  CPU = 0x830f10 // family 0x17 model 0x31 stepping 0
	EPYCMilan CPU = 0xa00f11 // family 0x19 model 1 stepping 1
	EPYCGenoa CPU = 0xa10f10 // family 0x19 model 0x11 stepping 0
	EPYCTurin CPU = 0xb00f00 // family 0x1a model 0 stepping 0
)

type cpuModel struct {
	name     string
	cpu      CPU
	versions int // -v1 to -vN in QEMU 10.1
}

func cpuModels() []cpuModel {
	return []cpuModel{
		{"EPYC", EPYC, 5},
		{"EPYC-Rome", EPYCRome, 5},
		{"EPYC-Milan", EPYCMilan, 3},
		{"EPYC-Genoa", EPYCGenoa, 2},
		{"EPYC-Turin", EPYCTurin, 1},
	}
}

// ParseCPU reads the name of a model as QEMU's -cpu takes it, such as EPYC-v4 or EPYC-Milan.
func ParseCPU(name string) (CPU, error) {
	models := cpuModels()
	for _, m := range models {
		if name == m.name {
			return m.cpu, nil
		}
		for v := range m.versions {
			if name == m.name+"-v"+strconv.Itoa(v+1) {
				return m.cpu, nil
			}
		}
	}
	var names []string
	for _, m := range models {
		names = append(names, m.name)
	}
	return 0, fmt.Errorf("measure: unknown CPU model %q: want %s, with or without a version such as -v1", name, strings.Join(names, ", "))
}

// String is the name of the model without a version, or the signature of one that has no name here.
func (c CPU) String() string {
	models := cpuModels()
	if i := slices.IndexFunc(models, func(m cpuModel) bool { return m.cpu == c }); i >= 0 {
		return models[i].name
	}
	return fmt.Sprintf("CPUID %#x", uint32(c))
}

// VMM is a monitor. Each starts its virtual CPUs a little differently.
//
// To add one, add its row to flavour and a published digest to the tests.
type VMM uint8

// The monitors.
const (
	// QEMU is version 9.1 or newer on Linux 6.11 or newer.
	QEMU VMM = iota
	// EC2 is AWS. Its guests' RDX, and so [Input.CPU], is zero by what its reports of 2023 show; newer tools expect 0x600.
	EC2
	// gce is Google's, as far as one published digest goes. It is here to test the table: Google measures the registers at
	// an address that depends on the product, which this package does not.
	gce
)

// flavour is what differs between monitors.
type flavour struct {
	firstCode uint16 // attributes of CS in the first virtual CPU
	otherCode uint16 // and in the others
	stack     uint16 // attributes of SS
	task      uint16 // attributes of TR
	pat       uint64 // the page attribute table
	mxcsr     uint32
	fcw       uint16   // x87 control word
	memory    PageType // of ovmf.SectionMemory
	cpuidLast bool     // the CPUID page comes after all other sections
}

func (v VMM) flavour() flavour {
	const pat = 0x0007_0406_0007_0406 // of a CPU after reset
	switch v {
	case EC2:
		return flavour{firstCode: 0x9a, otherCode: 0x9b, stack: 0x92, task: 0x83, pat: pat, memory: PageZero, cpuidLast: true}
	case gce:
		return flavour{firstCode: 0x9b, otherCode: 0x9b, stack: 0x93, task: 0x8b, pat: 0x70106, memory: PageUnmeasured}
	}
	return flavour{firstCode: 0x9b, otherCode: 0x9b, stack: 0x93, task: 0x8b, pat: pat, mxcsr: 0x1f80, fcw: 0x37f, memory: PageZero}
}

// firstEIP is where the first virtual CPU starts: the reset vector, 16 bytes before 4 GiB.
const firstEIP = 0xffff_fff0

// vmsaHashes are the hashes of the register pages of the first virtual CPU and of each other.
func (in Input) vmsaHashes() (first, other [sha512.Size384]byte) {
	how := in.VMM.flavour()
	f := in.vmsa(firstEIP, how.firstCode)
	o := in.vmsa(in.Firmware.Layout.ResetEIP, how.otherCode)
	return sha512.Sum384(f[:]), sha512.Sum384(o[:])
}

// vmsa is the page with a virtual CPU's registers when it starts: the VM save area (AMD64 architecture manual, document
// 24593, appendix B, table B-4) as QEMU resets a CPU and KVM copies it (sev_es_sync_vmsa in Linux' arch/x86/kvm/svm/sev.c,
// since 6.10 with the state of the FPU).
func (in Input) vmsa(eip uint32, code uint16) [ovmf.PageSize]byte {
	var b [ovmf.PageSize]byte
	le := binary.LittleEndian
	how := in.VMM.flavour()

	// A segment is u16 selector, u16 attributes, u32 limit, u64 base.
	for _, s := range [...]struct {
		offset, attributes uint16
	}{
		{0x00, 0x93},      // ES
		{0x10, code},      // CS
		{0x20, how.stack}, // SS
		{0x30, 0x93},      // DS
		{0x40, 0x93},      // FS
		{0x50, 0x93},      // GS
		{0x60, 0},         // GDTR
		{0x70, 0x82},      // LDTR
		{0x80, 0},         // IDTR
		{0x90, how.task},  // TR
	} {
		le.PutUint16(b[s.offset+2:], s.attributes)
		le.PutUint32(b[s.offset+4:], 0xffff)
	}
	le.PutUint16(b[0x10:], 0xf000)                  // CS selector
	le.PutUint64(b[0x18:], uint64(eip&0xffff_0000)) // CS base

	le.PutUint64(b[0x0d0:], 0x1000)             // EFER: SVME
	le.PutUint64(b[0x148:], 0x40)               // CR4: MCE
	le.PutUint64(b[0x158:], 0x10)               // CR0: ET
	le.PutUint64(b[0x160:], 0x400)              // DR7
	le.PutUint64(b[0x168:], 0xffff_0ff0)        // DR6
	le.PutUint64(b[0x170:], 0x2)                // RFLAGS
	le.PutUint64(b[0x178:], uint64(eip&0xffff)) // RIP
	le.PutUint64(b[0x268:], how.pat)            // G_PAT
	le.PutUint64(b[0x310:], uint64(in.CPU))     // RDX
	le.PutUint64(b[0x3b0:], in.SEVFeatures)     // SEV_FEATURES
	le.PutUint64(b[0x3e8:], 1)                  // XCR0: x87
	le.PutUint32(b[0x408:], how.mxcsr)          // MXCSR
	le.PutUint16(b[0x410:], how.fcw)            // X87_FCW
	return b
}
