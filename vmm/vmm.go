// Package vmm runs one virtual machine: files, drives, a command line in; a control channel and the reason of its end
// out. It knows no image, bundle, container or pod.
//
//	host, err := vmm.Probe(ctx, cacheDir)         // which engine runs here, and why
//	config := vmm.Config{Engine: host.Engine, QEMU: host.QEMU.Path, Kernel: "vmlinux", Initrd: "initrd",
//		VCPUs: 1, Memory: 256 << 20}
//	m, err := vmm.Start(ctx, config, log)         // returns at once
//	conn, err := m.Dial(ctx, spec.PortControl)    // waits for the guest
//	exit := m.Wait()                              // says in words why the machine ended
package vmm

import (
	"errors"
	"fmt"
	"os"
)

// Engine is what executes the guest's instructions.
type Engine string

const (
	KVM Engine = "kvm" // the processor
	TCG Engine = "tcg" // QEMU's translator, in software
)

// Config is what a machine is made of. It is plain data: nothing is opened before Start.
type Config struct {
	Name        string // shown in the process list; empty: "kcradle"
	Engine      Engine // required
	QEMU        string // path of qemu-system-x86_64; required
	Kernel      string // path of an uncompressed vmlinux with a PVH entry; required
	Initrd      string // path; empty: none
	CommandLine string // of the kernel; QEMU appends the virtio-mmio devices
	VCPUs       int    // 0: 1
	Memory      int64  // bytes, rounded up to MiB; required, at least MinMemory

	Drives []Drive // in slot order: the first is the guest's first virtio-blk device
	Wire   *Wire   // nil: no network device

	// MemoryFile is the path of the file that is the guest's memory, for a machine that Snapshot will be called on: Start
	// makes it, and it must not exist. While the machine runs, everybody who reaches it by path may write to it: its
	// directory must be the caller's alone. Empty: memory without a name.
	MemoryFile string
	// Restore is what the machine goes on from, instead of booting; see Snapshot. nil: boot.
	Restore *Snapshot

	// Console is the path of the file that gets the kernel's log (hvc0). The file and its predecessor, Console plus
	// ".old", stay under ConsoleLimit together. Empty: only the tail is kept, in memory.
	Console      string
	ConsoleLimit int64 // bytes; 0: 1 MiB

	// Transferable says that Give may be called: the machine then dies with whoever has it, not with this process.
	Transferable bool

	// CID is the guest's context id on AF_VSOCK, unique on the host. 0: the control channel runs over virtio-serial.
	CID uint32

	// RunAs is the user that QEMU runs as, when the caller is root. nil: the caller. All files are opened by the caller
	// and handed over, so this user needs no rights on any.
	RunAs *Credential

	cpu string // for tests; empty: the engine's
}

// MinMemory is the least memory that a machine is started with: what a kernel needs to reach its init.
const MinMemory = 32 << 20

// Drive is one virtio-blk device. To add a kind of source, add a field here, a case in Validate, in args and in files.
type Drive struct {
	Serial   string // by which the guest finds the device; required, unique, 1 to 20 of [A-Za-z0-9._-]
	ReadOnly bool

	// Exactly one of these is the contents.
	Path    string   // a raw file
	Extents []Extent // several raw files, shown as one device one behind the other; blocks that the guest frees stay taken
	Blank   bool     // nothing: it reads as zero and forgets what is written. Machine.Attach gives it contents later
}

// SlotSize is how large a guest takes a drive to be that was blank when it booted: more than any file that will be there.
const SlotSize = 1 << 40

// Extent is a file as a part of a drive. It takes Size rounded up to ExtentAlignment; what the file lacks reads as zero, and a
// write there makes it longer.
type Extent struct {
	Path string
	Size int64 // bytes of the file that are shown, from its beginning; > 0
}

// ExtentAlignment is what each extent's place and length on its drive are multiples of.
const ExtentAlignment = 4096

// Wire is the network device.
type Wire struct {
	Kind WireKind
	File *os.File // the connection; Start leaves it open, the caller closes it
	MAC  string   // required
	MTU  int      // told to the guest; 0: not told
}

// Snapshot is a machine at rest, as Machine.Snapshot leaves it. Each start from it gets the memory copy-on-write: the files
// are not changed. It fits a Config that differs in nothing but Name, Console, RunAs, the drives' contents, and the
// wire's file and MAC address.
type Snapshot struct {
	Memory string // path of the memory, as large as Config.Memory in MiB
	State  string // path of the devices' state
}

// WireKind is what the file of a Wire is.
type WireKind string

const (
	WireStream WireKind = "stream" // a stream socket; each frame behind its length, 4 bytes big endian
	WireTap    WireKind = "tap"    // a tap device opened with IFF_TAP|IFF_NO_PI|IFF_VNET_HDR
)

// Credential is a user.
type Credential struct {
	UID, GID uint32
	Groups   []uint32 // supplementary
}

// ErrSlots is in the error of a Config with more devices than a microvm has places for: up to six drives without a wire and
// without AF_VSOCK, one less with either, two less with both.
var ErrSlots = errors.New("too many devices")

// Validate names everything that is missing or wrong, without looking at the file system.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if _, ok := engines[c.Engine]; !ok {
		bad("engine %q is neither %q nor %q", c.Engine, KVM, TCG)
	}
	if c.QEMU == "" {
		bad("the path of QEMU is missing")
	}
	if c.Kernel == "" {
		bad("the kernel is missing")
	}
	if c.VCPUs < 0 || c.VCPUs > maxVCPUs {
		bad("%d vCPUs are not within 1 to %d", c.VCPUs, maxVCPUs)
	}
	if c.Memory < MinMemory {
		bad("%d bytes of memory are less than the least, %d", c.Memory, MinMemory)
	}
	if n := c.maxCommandLine(); len(c.CommandLine) > n {
		bad("a kernel command line of %d bytes is longer than %d", len(c.CommandLine), n)
	}
	if c.CID == 1 || c.CID == 2 || c.CID == 1<<32-1 {
		bad("vsock context id %d is reserved", c.CID)
	}
	seen := map[string]bool{}
	for i, d := range c.Drives {
		name := fmt.Sprintf("drive %d (%q)", i, d.Serial)
		switch {
		case !validSerial(d.Serial):
			bad("%s: a serial is 1 to 20 of letters, digits, '.', '_' and '-'", name)
		case seen[d.Serial]:
			bad("%s: another drive has the same serial", name)
		}
		seen[d.Serial] = true
		n := 0
		for _, is := range []bool{d.Path != "", len(d.Extents) > 0, d.Blank} {
			if is {
				n++
			}
		}
		if n != 1 {
			bad("%s: needs either a path or extents, or is blank", name)
		}
		for j, e := range d.Extents {
			if e.Path == "" || e.Size <= 0 {
				bad("%s: extent %d needs a path and a size", name, j)
			}
		}
	}
	if c.Wire != nil {
		switch {
		case c.Wire.Kind != WireStream && c.Wire.Kind != WireTap:
			bad("wire: kind %q is neither %q nor %q", c.Wire.Kind, WireStream, WireTap)
		case c.Wire.File == nil:
			bad("wire: its file is missing")
		case !validMAC(c.Wire.MAC):
			bad("wire: MAC address %q is none", c.Wire.MAC)
		}
	}
	if r := c.Restore; r != nil {
		switch {
		case c.MemoryFile != "":
			bad("a machine cannot both come from a snapshot and become one")
		case r.Memory == "" || r.State == "":
			bad("the snapshot needs a memory and a state")
		}
	}
	if n := c.devices(); n > slots {
		bad("%w: %d drives make %d, and a microvm has places for %d; leave %d out", ErrSlots, len(c.Drives), n, slots, n-slots)
	}
	if c.RunAs != nil && (c.RunAs.UID == 0 || c.RunAs.GID == 0) {
		bad("run as: user %d and group %d: root is what this is there to avoid", c.RunAs.UID, c.RunAs.GID)
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("machine: %w", err)
	}
	return nil
}

func validSerial(s string) bool {
	if len(s) < 1 || len(s) > 20 {
		return false
	}
	for _, r := range s {
		if !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-') {
			return false
		}
	}
	return true
}

// validMAC takes six pairs of hexadecimal digits with colons: the spelling is part of QEMU's option syntax.
func validMAC(s string) bool {
	if len(s) != 17 {
		return false
	}
	for i, r := range s {
		if i%3 == 2 {
			if r != ':' {
				return false
			}
			continue
		}
		if !(r >= '0' && r <= '9' || r >= 'a' && r <= 'f' || r >= 'A' && r <= 'F') {
			return false
		}
	}
	return true
}
