// Package measure computes the launch digest of a SEV-SNP guest: the MEASUREMENT of its attestation reports, from what
// a monitor is given to start it.
//
//	firmware, err := measure.ReadFirmware(image)
//	kernel, err := measure.HashFile(file)
//	in := measure.Input{
//		Firmware: firmware, Kernel: kernel, Initrd: initrd, CommandLine: "console=hvc0",
//		VCPUs: 2, CPU: measure.EPYC, SEVFeatures: measure.FeatureSNP,
//	}
//	want, err := in.Digest()
//	steps, err := in.Explain()        // how it came to be
//	change, ok, err := in.Match(got)  // what would explain another digest
//
// A digest says that a guest was started from these inputs. It says nothing of what is not among them: the size of the
// memory, devices, ACPI tables, the CPUID values, HOST_DATA, the guest policy.
package measure

import (
	"crypto/sha512"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"

	"github.com/kcradle/kcradle/snp/ovmf"
)

// MaxVCPUs bounds the number of virtual CPUs: the most that Linux' KVM can be built for on x86.
const MaxVCPUs = 4096

const (
	// FeatureSNP is bit 0 of SEV_FEATURES, without which a guest is not SEV-SNP.
	FeatureSNP = 1 << 0
	// FeatureDebugSwap is bit 5 of SEV_FEATURES. Hosts whose QEMU or kernel starts guests with KVM_SEV_ES_INIT may set it.
	FeatureDebugSwap = 1 << 5
)

var (
	// ErrNoHashPage is returned (wrapped) for a firmware without a page for the hashes of kernel, initrd and command
	// line, which a launch therefore does not measure.
	ErrNoHashPage = errors.New("the firmware has no page for kernel hashes (use a build of edk2's OvmfPkg/AmdSev)")
	// ErrDigest is returned (wrapped) for text that is no digest.
	ErrDigest = errors.New("want 96 hexadecimal digits")
)

// Digest is a launch digest, SHA-384.
type Digest [sha512.Size384]byte

// ParseDigest reads 96 hexadecimal digits.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	err := d.UnmarshalText([]byte(s))
	return d, err
}

func (d Digest) String() string { return hex.EncodeToString(d[:]) }

// MarshalText writes 96 hexadecimal digits.
func (d Digest) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, d[:]), nil }

// UnmarshalText reads 96 hexadecimal digits.
func (d *Digest) UnmarshalText(b []byte) error {
	var read Digest
	if len(b) != hex.EncodedLen(len(read)) {
		return fmt.Errorf("measure: digest of %d characters: %w", len(b), ErrDigest)
	}
	if _, err := hex.Decode(read[:], b); err != nil {
		return fmt.Errorf("measure: digest: %w: %w", ErrDigest, err)
	}
	*d = read
	return nil
}

// PageType is how a page enters the digest: PAGE_TYPE of SNP_LAUNCH_UPDATE (SEV-SNP firmware ABI, AMD document 56860,
// section 8.17).
type PageType uint8

// The page types.
const (
	PageNormal     PageType = 1
	PageVMSA       PageType = 2
	PageZero       PageType = 3
	PageUnmeasured PageType = 4
	PageSecrets    PageType = 5
	PageCPUID      PageType = 6
)

func (p PageType) String() string {
	switch p {
	case PageNormal:
		return "normal"
	case PageVMSA:
		return "VMSA"
	case PageZero:
		return "zero"
	case PageUnmeasured:
		return "unmeasured"
	case PageSecrets:
		return "secrets"
	case PageCPUID:
		return "CPUID"
	}
	return fmt.Sprintf("type %d", uint8(p))
}

// The PAGE_INFO structure (document 56860, section 8.17.2): the digest of a launch is replaced by the digest of this for
// each page. Permissions of VMPL 1 to 3 and the IMI flag stay zero.
const (
	pageInfoSize     = 112
	pageInfoDigest   = 0x00 // before this page
	pageInfoContents = 0x30 // SHA-384 of a normal page or VMSA, else zero
	pageInfoLength   = 0x60 // u16
	pageInfoType     = 0x62 // u8
	pageInfoGPA      = 0x68 // u64
)

// add returns the digest after one more page.
func (d Digest) add(t PageType, gpa uint64, contents *[sha512.Size384]byte) Digest {
	var b [pageInfoSize]byte
	copy(b[pageInfoDigest:], d[:])
	if contents != nil {
		copy(b[pageInfoContents:], contents[:])
	}
	binary.LittleEndian.PutUint16(b[pageInfoLength:], pageInfoSize)
	b[pageInfoType] = byte(t)
	binary.LittleEndian.PutUint64(b[pageInfoGPA:], gpa)
	return sha512.Sum384(b[:])
}

// Firmware is what of a firmware enters the digest. It stands for the whole image, so that the image is read once and
// not needed to measure.
type Firmware struct {
	Layout ovmf.Layout // required
	Seed   Digest      // required; after the pages of the image
	SHA256 FileHash    // of the image; zero: not known
}

// ReadFirmware measures an image: the whole file as it is given to the monitor.
func ReadFirmware(image []byte) (Firmware, error) {
	layout, err := ovmf.Parse(image)
	if err != nil {
		return Firmware{}, fmt.Errorf("measure: %w", err)
	}
	f := Firmware{Layout: layout, SHA256: hashBytes(image)}
	gpa := f.gpa()
	for ; len(image) > 0; image = image[ovmf.PageSize:] {
		contents := sha512.Sum384(image[:ovmf.PageSize])
		f.Seed = f.Seed.add(PageNormal, gpa, &contents)
		gpa += ovmf.PageSize
	}
	return f, nil
}

// gpa is where the image starts: it ends at 4 GiB.
func (f Firmware) gpa() uint64 { return 1<<32 - uint64(f.Layout.Size) }

// Input is everything that enters a launch digest. It is a value: its methods do not change it.
type Input struct {
	Firmware Firmware // required

	// Kernel is the hash of the bzImage as the monitor reads it. Required unless NoKernelHashes.
	Kernel FileHash
	// Initrd is the hash of the initrd. Zero: the machine is started without one, which measures as an empty one.
	Initrd FileHash
	// CommandLine is what the monitor is given, without the NUL that is measured at its end. Empty: none.
	CommandLine string
	// NoKernelHashes is a launch that does not measure kernel, initrd and command line (QEMU's kernel-hashes=off), so
	// that whoever starts the machine chooses them. Those fields must be empty then.
	NoKernelHashes bool

	// VCPUs is the number of virtual CPUs at the start, 1 to [MaxVCPUs].
	VCPUs int
	// CPU is required with QEMU.
	CPU CPU
	// SEVFeatures is SEV_FEATURES of every virtual CPU. Required: at least [FeatureSNP].
	SEVFeatures uint64

	// VMM is the monitor. Zero: QEMU.
	VMM VMM
}

// Validate says what is missing or contradictory.
func (in Input) Validate() error {
	if err := in.Firmware.Layout.Validate(); err != nil {
		return fmt.Errorf("measure: firmware: %w", err)
	}
	if in.Firmware.Seed == (Digest{}) {
		return errors.New("measure: firmware: no seed (make one with ReadFirmware)")
	}
	if in.NoKernelHashes {
		if in.Kernel != (FileHash{}) || in.Initrd != (FileHash{}) || in.CommandLine != "" {
			return errors.New("measure: kernel, initrd or command line given, but they are not measured without kernel hashes")
		}
	} else {
		if in.Kernel == (FileHash{}) {
			return errors.New("measure: no kernel")
		}
		if err := checkCommandLine(in.CommandLine); err != nil {
			return err
		}
		if _, ok := in.Firmware.Layout.Section(ovmf.SectionKernelHashes); !ok {
			return fmt.Errorf("measure: %w", ErrNoHashPage)
		}
	}
	if in.VCPUs < 1 || in.VCPUs > MaxVCPUs {
		return fmt.Errorf("measure: %d vCPUs: want 1 to %d", in.VCPUs, MaxVCPUs)
	}
	if in.SEVFeatures&FeatureSNP == 0 {
		return fmt.Errorf("measure: SEV features %#x: want bit 0, which makes the guest SEV-SNP", in.SEVFeatures)
	}
	if in.VMM > gce {
		return fmt.Errorf("measure: unknown monitor %d", in.VMM)
	}
	if in.VMM == QEMU && in.CPU == 0 {
		return errors.New("measure: no CPU model")
	}
	return nil
}

// Digest is the launch digest. Its errors are those of [Input.Validate].
func (in Input) Digest() (Digest, error) {
	if err := in.Validate(); err != nil {
		return Digest{}, err
	}
	return in.addVCPUs(in.addSections(nil), nil), nil
}

// Step is a part of a launch and the digest after it.
type Step struct {
	Name   string   // "firmware", the type of a section, "vCPU 0"
	Page   PageType // of all pages of the step
	GPA    uint64   // guest physical address of the first page
	Pages  int      // of 4096 bytes; 0: a firmware of which only the seed is known
	Digest Digest   // after the step
}

// Explain lists the steps of [Input.Digest] in their order; the digest of the last one is the launch digest.
func (in Input) Explain() ([]Step, error) {
	if err := in.Validate(); err != nil {
		return nil, err
	}
	steps := make([]Step, 0, 1+len(in.Firmware.Layout.Sections)+in.VCPUs)
	visit := func(s Step) { steps = append(steps, s) }
	in.addVCPUs(in.addSections(visit), visit)
	return steps, nil
}

// addSections measures the firmware and what it wants prepared. The order is QEMU's (snp_populate_metadata_pages and
// sev_snp_launch_finish in target/i386/sev.c): the image, then the sections as the table has them.
func (in Input) addSections(visit func(Step)) Digest {
	layout, digest := in.Firmware.Layout, in.Firmware.Seed
	if visit != nil {
		step := Step{Name: "firmware", Page: PageNormal, Pages: int(layout.Size / ovmf.PageSize), Digest: digest}
		if layout.Size != 0 {
			step.GPA = in.Firmware.gpa()
		}
		visit(step)
	}
	how := in.VMM.flavour()
	for _, cpuid := range [...]bool{false, true} {
		for _, s := range layout.Sections {
			last := how.cpuidLast && s.Type == ovmf.SectionCPUID
			if last != cpuid {
				continue
			}
			page, contents := in.sectionPage(s, how)
			for offset := uint64(0); offset < uint64(s.Size); offset += ovmf.PageSize {
				digest = digest.add(page, uint64(s.GPA)+offset, contents)
			}
			if visit != nil {
				visit(Step{Name: s.Type.String(), Page: page, GPA: uint64(s.GPA), Pages: int(s.Size / ovmf.PageSize), Digest: digest})
			}
		}
	}
	return digest
}

// sectionPage is how the pages of a section are measured, and the hash of what is in them.
func (in Input) sectionPage(s ovmf.Section, how flavour) (PageType, *[sha512.Size384]byte) {
	switch s.Type {
	case ovmf.SectionMemory:
		return how.memory, nil
	case ovmf.SectionSecrets:
		return PageSecrets, nil
	case ovmf.SectionCPUID:
		return PageCPUID, nil
	case ovmf.SectionKernelHashes:
		if !in.NoKernelHashes {
			contents := in.hashPage()
			return PageNormal, &contents
		}
	}
	return PageZero, nil
}

// vmsaGPA is where the register pages are measured, whichever page holds them: the constant INITIAL_VMSA_GPA of Linux'
// arch/x86/kvm/svm/sev.c.
const vmsaGPA = 0xffff_ffff_f000

// addVCPUs measures the registers of the virtual CPUs in their order, which KVM does when the launch is finished.
func (in Input) addVCPUs(digest Digest, visit func(Step)) Digest {
	first, other := in.vmsaHashes()
	contents := &first
	for i := range in.VCPUs {
		digest = digest.add(PageVMSA, vmsaGPA, contents)
		if visit != nil {
			visit(Step{Name: fmt.Sprintf("vCPU %d", i), Page: PageVMSA, GPA: vmsaGPA, Pages: 1, Digest: digest})
		}
		contents = &other
	}
	return digest
}
