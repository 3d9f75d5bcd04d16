// Package reference keeps what a pod's report is expected to say, together with all that it follows from: a reference file
// is a computation, and never a bare digest to trust.
//
//	r, err := reference.Parse(file)
//	err = r.Check()                   // it agrees with itself
//	err = r.CheckFirmware(firmware)   // and with the firmware's own bytes
//
// Whoever wrote the file chose its inputs: that they are the ones of a release is for its reader to compare, by their
// SHA-256. The firmware's seed stands for the firmware's bytes and cannot be compared so; CheckFirmware computes it again.
package reference

import (
	"crypto/sha512"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/idblock"
	"github.com/kcradle/kcradle/snp/internal/strict"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/ovmf"
	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/snp/policy"
)

// Version is the version of the reference file that this code reads and writes:
//
//	1  the first
const Version = 1

// PodParameter is the parameter on the kernel's command line that names the pod, and so puts its digest into the launch
// digest: cradle.pod=sha256:HEX, once.
const PodParameter = "cradle.pod="

// ErrDisagrees is returned (wrapped) for a reference that is not what follows from its inputs.
var ErrDisagrees = errors.New("the reference disagrees with its own inputs")

// ErrFirmware is returned (wrapped) for a firmware that is not the reference's.
var ErrFirmware = errors.New("it is not the reference's firmware")

// Reference is a reference file. It is a value: its methods do not change it.
type Reference struct {
	Version     int              `json:"version" strict:"required"`
	Release     string           `json:"release,omitempty"`  // for people
	PodDigest   pod.Digest       `json:"podDigest,omitzero"` // of pod.json; zero: the machine boots no pod
	Image       *Image           `json:"image,omitempty"`    // nil: none is named, or the pod has several
	Inputs      Inputs           `json:"inputs" strict:"required"`
	Measurement measure.Digest   `json:"measurement" strict:"required"`
	HostData    policy.HostData  `json:"hostData,omitzero"`    // the pod digest again; zero: none
	IDKeyDigest policy.KeyDigest `json:"idKeyDigest,omitzero"` // of the anonymous key (package idblock); zero: none
}

// Image is the one image of a pod.
type Image struct {
	Ref         string     `json:"ref"`                   // for people
	Manifest    pod.Digest `json:"manifest,omitzero"`     // zero: not known
	Config      pod.Digest `json:"config,omitzero"`       // docker's image ID; zero: not known
	EROFSWriter uint       `json:"erofsWriter,omitempty"` // version of what wrote the layers' file systems; for people
}

// Inputs is everything that enters the launch digest (measure.Input), and the guest policy, which enters the ID block.
type Inputs struct {
	Firmware       pod.Digest     `json:"firmware" strict:"required"`       // of the image
	FirmwareSeed   measure.Digest `json:"firmwareSeed" strict:"required"`   // the digest after the pages of the image
	FirmwareLayout Layout         `json:"firmwareLayout" strict:"required"` // what a launch reads from the image
	Kernel         pod.Digest     `json:"kernel" strict:"required"`
	Initrd         pod.Digest     `json:"initrd,omitzero"` // zero: none
	CommandLine    string         `json:"cmdline" strict:"required"`
	VCPUs          int            `json:"vcpus" strict:"required"`
	CPU            string         `json:"cpu" strict:"required"` // as QEMU's -cpu has it
	SEVFeatures    Hex            `json:"sevFeatures" strict:"required"`
	GuestPolicy    Hex            `json:"guestPolicy,omitzero"` // there if IDKeyDigest is
}

// Layout is ovmf.Layout.
type Layout struct {
	Size      Hex       `json:"size" strict:"required"`
	ResetEIP  Hex       `json:"resetEIP" strict:"required"`
	HashTable Area      `json:"hashTable" strict:"required"`
	Sections  []Section `json:"sections" strict:"required"`
}

// Area is ovmf.Area.
type Area struct {
	Base Hex `json:"base" strict:"required"`
	Size Hex `json:"size" strict:"required"`
}

// Section is ovmf.Section.
type Section struct {
	Type Hex `json:"type" strict:"required"`
	GPA  Hex `json:"gpa" strict:"required"`
	Size Hex `json:"size" strict:"required"`
}

// Hex is a number, written as 0x and hexadecimal digits without a leading zero.
type Hex uint64

// String returns the number as it is written.
func (h Hex) String() string { return fmt.Sprintf("%#x", uint64(h)) }

// MarshalText writes String.
func (h Hex) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads what MarshalText writes, and no other way to write a number.
func (h *Hex) UnmarshalText(b []byte) error {
	digits, ok := strings.CutPrefix(string(b), "0x")
	n, err := strconv.ParseUint(digits, 16, 64)
	if !ok || err != nil || Hex(n).String() != string(b) {
		return fmt.Errorf("%.80q, want a number such as 0x21", b)
	}
	*h = Hex(n)
	return nil
}

// Options are what a reference is made from.
type Options struct {
	Release     string
	Firmware    measure.Firmware // required, with its SHA-256: made with measure.ReadFirmware
	Kernel      measure.FileHash // required
	Initrd      measure.FileHash // zero: none
	CommandLine string           // with PodParameter, if there is a Pod
	VCPUs       int              // required
	CPU         string           // required
	SEVFeatures uint64           // required
	GuestPolicy snp.Policy       // zero: no ID block
	Pod         []byte           // pod.json; nil: the machine boots no pod
}

// New returns the reference of a launch. It agrees with itself.
func New(o Options) (*Reference, error) {
	r := &Reference{
		Version: Version,
		Release: o.Release,
		Inputs: Inputs{
			Firmware: pod.Digest(o.Firmware.SHA256), FirmwareSeed: o.Firmware.Seed, FirmwareLayout: newLayout(o.Firmware.Layout),
			Kernel: pod.Digest(o.Kernel), Initrd: pod.Digest(o.Initrd), CommandLine: o.CommandLine,
			VCPUs: o.VCPUs, CPU: o.CPU, SEVFeatures: Hex(o.SEVFeatures), GuestPolicy: Hex(o.GuestPolicy),
		},
	}
	if o.Pod != nil {
		p, err := pod.Parse(o.Pod)
		if err != nil {
			return nil, fmt.Errorf("reference: %w", err)
		}
		r.PodDigest = pod.DigestOf(o.Pod)
		r.HostData = policy.HostData(r.PodDigest)
		if images := p.Images(); len(images) == 1 {
			r.Image = &Image{Ref: images[0].Ref, Manifest: images[0].Digest, Config: images[0].Config}
		}
	}
	in, err := r.Input()
	if err != nil {
		return nil, err
	}
	if r.Measurement, err = in.Digest(); err != nil {
		return nil, fmt.Errorf("reference: %w", err)
	}
	if o.GuestPolicy != 0 {
		if r.IDKeyDigest, err = r.idKey(); err != nil {
			return nil, err
		}
	}
	return r, r.Check()
}

// Parse reads a reference file, JSON of at most 1 MiB. As in a policy, unknown fields and loose spellings are errors. It
// does not compute anything; see Check.
func Parse(b []byte) (*Reference, error) {
	r := &Reference{}
	if err := strict.Decode(b, strict.Limits{Bytes: 1 << 20, Depth: 5, Entries: 256}, r); err != nil {
		return nil, fmt.Errorf("reference: %w", err)
	}
	if r.Version != Version {
		return nil, fmt.Errorf("reference: version: %d is not known here, want %d", r.Version, Version)
	}
	if _, err := r.Input(); err != nil {
		return nil, err
	}
	return r, nil
}

// Encode returns the bytes that Parse reads.
func (r *Reference) Encode() ([]byte, error) {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("reference: %w", err)
	}
	return append(b, '\n'), nil
}

// Input returns what the launch digest follows from. Its errors are those of measure.Input.Validate, and of numbers that do
// not fit.
func (r *Reference) Input() (measure.Input, error) {
	cpu, err := measure.ParseCPU(r.Inputs.CPU)
	if err != nil {
		return measure.Input{}, fmt.Errorf("reference: inputs.cpu: %w", err)
	}
	layout, err := r.Inputs.FirmwareLayout.layout()
	if err != nil {
		return measure.Input{}, fmt.Errorf("reference: inputs.firmwareLayout: %w", err)
	}
	if r.Inputs.Firmware == (pod.Digest{}) {
		return measure.Input{}, errors.New("reference: inputs.firmware: all zeros are no digest")
	}
	in := measure.Input{
		Firmware:    measure.Firmware{Layout: layout, Seed: r.Inputs.FirmwareSeed, SHA256: measure.FileHash(r.Inputs.Firmware)},
		Kernel:      measure.FileHash(r.Inputs.Kernel),
		Initrd:      measure.FileHash(r.Inputs.Initrd),
		CommandLine: r.Inputs.CommandLine,
		VCPUs:       r.Inputs.VCPUs,
		CPU:         cpu,
		SEVFeatures: uint64(r.Inputs.SEVFeatures),
	}
	if err := in.Validate(); err != nil {
		return measure.Input{}, fmt.Errorf("reference: inputs: %w", err)
	}
	return in, nil
}

// Check computes everything in the reference that follows from its inputs, and returns what differs: ErrDisagrees, wrapped.
func (r *Reference) Check() error {
	in, err := r.Input()
	if err != nil {
		return err
	}
	got, err := in.Digest()
	if err != nil {
		return fmt.Errorf("reference: %w", err)
	}
	if got != r.Measurement {
		return disagrees("measurement: %s, but the inputs make %s", r.Measurement, got)
	}
	if err := r.checkPod(); err != nil {
		return err
	}
	if (r.Inputs.GuestPolicy != 0) != (r.IDKeyDigest != policy.KeyDigest{}) {
		return disagrees("idKeyDigest and inputs.guestPolicy: one is there without the other")
	}
	if r.Inputs.GuestPolicy != 0 {
		key, err := r.idKey()
		if err != nil {
			return err
		}
		if key != r.IDKeyDigest {
			return disagrees("idKeyDigest: %s, but measurement and guest policy make %s", r.IDKeyDigest, key)
		}
	}
	return nil
}

// checkPod holds the three places of the pod digest against each other.
func (r *Reference) checkPod() error {
	named := strings.Count(r.Inputs.CommandLine, PodParameter)
	if r.PodDigest == (pod.Digest{}) {
		if named != 0 {
			return disagrees("podDigest: missing, but inputs.cmdline has %s", PodParameter)
		}
		if r.HostData != (policy.HostData{}) || r.Image != nil {
			return disagrees("podDigest: missing, but hostData or image is there")
		}
		return nil
	}
	if named != 1 || !slices.Contains(strings.Fields(r.Inputs.CommandLine), PodParameter+r.PodDigest.String()) {
		return disagrees("inputs.cmdline: want %s%s, once", PodParameter, r.PodDigest)
	}
	if r.HostData != (policy.HostData{}) && pod.Digest(r.HostData) != r.PodDigest {
		return disagrees("hostData: %s, but the pod digest is %s", r.HostData, r.PodDigest)
	}
	return nil
}

func (r *Reference) idKey() (policy.KeyDigest, error) {
	auth, err := idblock.Anonymous(idblock.Block{LaunchDigest: [sha512.Size384]byte(r.Measurement), Policy: uint64(r.Inputs.GuestPolicy)})
	if err != nil {
		return policy.KeyDigest{}, fmt.Errorf("reference: %w", err)
	}
	return auth.IDKey.Digest(), nil
}

// CheckFirmware wants f, which was read from an image, to be the reference's: ErrFirmware, wrapped, if it is another image;
// ErrDisagrees if the reference claims to be of this image, and its seed or layout are not.
func (r *Reference) CheckFirmware(f measure.Firmware) error {
	if pod.Digest(f.SHA256) != r.Inputs.Firmware {
		return fmt.Errorf("reference: firmware %s: %w, which is %s", pod.Digest(f.SHA256), ErrFirmware, r.Inputs.Firmware)
	}
	if f.Seed != r.Inputs.FirmwareSeed {
		return disagrees("inputs.firmwareSeed: %s, but the firmware's is %s", r.Inputs.FirmwareSeed, f.Seed)
	}
	if got, want := newLayout(f.Layout), r.Inputs.FirmwareLayout; !got.equal(want) {
		return disagrees("inputs.firmwareLayout: it is not the firmware's")
	}
	return nil
}

func disagrees(format string, args ...any) error {
	return fmt.Errorf("reference: %w: %s", ErrDisagrees, fmt.Sprintf(format, args...))
}

func newLayout(l ovmf.Layout) Layout {
	out := Layout{
		Size:      Hex(l.Size),
		ResetEIP:  Hex(l.ResetEIP),
		HashTable: Area{Base: Hex(l.HashTable.Base), Size: Hex(l.HashTable.Size)},
		Sections:  []Section{},
	}
	for _, s := range l.Sections {
		out.Sections = append(out.Sections, Section{Type: Hex(s.Type), GPA: Hex(s.GPA), Size: Hex(s.Size)})
	}
	return out
}

func (l Layout) equal(o Layout) bool {
	return l.Size == o.Size && l.ResetEIP == o.ResetEIP && l.HashTable == o.HashTable && slices.Equal(l.Sections, o.Sections)
}

// layout reads l; measure.Input.Validate looks at what it says.
func (l Layout) layout() (ovmf.Layout, error) {
	var err error
	narrow := func(h Hex) uint32 {
		if h > 1<<32-1 {
			err = fmt.Errorf("%s is no number of 32 bits", h)
		}
		return uint32(h)
	}
	out := ovmf.Layout{
		Size:      narrow(l.Size),
		ResetEIP:  narrow(l.ResetEIP),
		HashTable: ovmf.Area{Base: narrow(l.HashTable.Base), Size: narrow(l.HashTable.Size)},
	}
	for _, s := range l.Sections {
		out.Sections = append(out.Sections, ovmf.Section{Type: ovmf.SectionType(narrow(s.Type)), GPA: narrow(s.GPA), Size: narrow(s.Size)})
	}
	return out, err
}
