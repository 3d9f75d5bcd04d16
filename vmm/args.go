package vmm

import (
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/kcradle/kcradle/spec"
)

const (
	slots    = 8  // virtio-mmio places of a microvm without ACPI; its second I/O APIC, with 16 more, needs ACPI
	maxVCPUs = 64 // NR_CPUS of the guest kernel
)

// maxCommandLine is COMMAND_LINE_SIZE of x86 less what QEMU appends: "virtio_mmio.device=512@0xfeb02e00:23" per place.
func (c Config) maxCommandLine() int { return 2048 - 1 - 40*slots }

// engines is everything in which the engines differ on QEMU's command line.
var engines = map[Engine]struct {
	accel   string
	cpu     string
	machine string // appended to -M microvm
	// smallPages keeps the host from backing the machine with huge pages. QEMU asks for them, and they pay for a processor's
	// nested page tables; a machine that boots touches little of each, and zeroing the rest took a fifth of an emulated boot.
	smallPages bool
	// synchronous lets the thread that executes the guest begin what the guest asks of a device, where a word to QEMU's main loop
	// would be two switches between threads.
	synchronous bool
}{
	// kvm-clock replaces the timer chips, the local APIC the interrupt controller.
	KVM: {accel: "kvm", cpu: "host", machine: ",pit=off,pic=off,rtc=off"},
	// Without a timer chip the kernel hangs while it calibrates the TSC.
	// One thread for all vCPUs: with a thread each, one translates code while another rewrites it and keeps what it read.
	// A kernel that patches itself (a CPU quota is enough) then dies of its own int3, on QEMU 7.2 at once, on 10.0 seldom.
	// Without fast string instructions the kernel clears and copies eight bytes at a time, and each step is a loop here.
	// Random numbers of an emulated processor come from a generator in QEMU's memory, which is the same in each machine that is
	// thawed from one image.
	TCG: {accel: "tcg,thread=single", cpu: "max,-erms,-fsrm,-rdrand,-rdseed,-pku", smallPages: true, synchronous: true},
}

// sandbox: QEMU opens nothing by privilege, starts nothing, and changes no priorities.
const sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// firstFile is the number of the first descriptor that QEMU inherits.
const firstFile = 3

// file is what a descriptor is for, in the order in which QEMU inherits them.
type file struct {
	role  string
	drive int    // index in Drives
	path  string // what to open; empty: made by Start
	write bool
	size  int64 // the file must have at least so many bytes
}

// files lists QEMU's descriptors: the i-th has number firstFile+i. Args and Start agree by it.
func (c Config) files() []file {
	fs := []file{{role: "qmp"}, {role: "console"}, {role: "channel"}}
	if c.Restore == nil {
		fs = append(fs, file{role: "kernel", path: c.Kernel})
		if c.Initrd != "" {
			fs = append(fs, file{role: "initrd", path: c.Initrd})
		}
	}
	if c.CID != 0 {
		fs = append(fs, file{role: "vsock", path: "/dev/vhost-vsock", write: true})
	}
	if c.MemoryFile != "" {
		fs = append(fs, file{role: "memory", path: c.MemoryFile, write: true})
	}
	if c.Restore != nil {
		fs = append(fs, file{role: "memory", path: c.Restore.Memory}, file{role: "state", path: c.Restore.State})
	}
	if c.Wire != nil {
		fs = append(fs, file{role: "wire"})
	}
	for i, d := range c.Drives {
		fs = append(fs, d.files(i)...)
	}
	if c.Transferable {
		fs = append(fs, file{role: "lifeline"}) // QEMU knows nothing of it
	}
	return fs
}

// files lists the descriptors of the drive at index i.
func (d Drive) files(i int) []file {
	switch {
	case d.Blank:
		return nil
	case d.Path != "":
		return []file{{role: "drive", drive: i, path: d.Path, write: !d.ReadOnly}}
	case d.plain():
		return []file{{role: "drive", drive: i, path: d.Extents[0].Path, size: d.Extents[0].Size}}
	}
	fs := []file{{role: "descriptor", drive: i, write: !d.ReadOnly}} // its format notes who wrote last
	for _, e := range d.Extents {
		fs = append(fs, file{role: "extent", drive: i, path: e.Path, write: !d.ReadOnly, size: e.Size})
	}
	return fs
}

// devices counts the places that are needed: serial, memory balloon, then what the config asks for.
func (c Config) devices() int {
	n := 2 + len(c.Drives)
	if c.CID != 0 {
		n++
	}
	if c.Wire != nil {
		n++
	}
	return n
}

// random says whether a place is left for the random device: the guest is seeded by its processor and its host anyway.
func (c Config) random() bool { return c.devices() < slots }

func (c Config) vcpus() int { return max(1, c.VCPUs) }

// memory is the machine's size in MiB.
func (c Config) memory() int64 {
	const mib = 1 << 20
	return min(c.Memory, math.MaxInt64-mib+1)/mib + min(1, c.Memory%mib)
}

// Args is QEMU's command line without the program. It is pure; descriptor numbers follow from the config alone.
func (c Config) Args() []string {
	number := map[string]int{} // first descriptor of each role, and of each drive
	files := c.files()
	for i, f := range files {
		key := f.role
		if f.role == "drive" || f.role == "descriptor" {
			key = "drive" + strconv.Itoa(f.drive)
		}
		if _, ok := number[key]; !ok {
			number[key] = firstFile + i
		}
	}
	e := engines[c.Engine]
	if c.cpu != "" {
		e.cpu = c.cpu
	}
	machine := "microvm,acpi=off,x-option-roms=off,isa-serial=off,memory-backend=memory" + e.machine
	name := c.Name
	if name == "" {
		name = "kcradle"
	}
	var a []string
	add := func(option, format string, args ...any) { a = append(a, option, fmt.Sprintf(format, args...)) }

	add("-name", "%s", escape(name))
	add("-M", "%s", machine)
	add("-accel", "%s", e.accel)
	add("-cpu", "%s", e.cpu)
	add("-smp", "%d", c.vcpus())
	add("-m", "%dM", c.memory())
	switch {
	case c.MemoryFile != "":
		add("-object", "memory-backend-file,id=memory,size=%dM,mem-path=/proc/self/fd/%d,share=on", c.memory(), number["memory"])
	case c.Restore != nil:
		// The warden sees to it that this opens for reading only, and that what the guest frees is forgotten and not
		// cut out of the file.
		add("-object", "memory-backend-file,id=memory,size=%dM,mem-path=/proc/self/fd/%d,share=off", c.memory(), number["memory"])
		add("-incoming", "defer")
	default:
		add("-object", "memory-backend-ram,id=memory,size=%dM", c.memory())
	}
	a = append(a, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot")
	add("-sandbox", "%s", sandbox)
	add("-msg", "timestamp=off")
	// Virtio as of version 1: vsock knows no other, and QEMU's default for virtio-mmio is the one before.
	add("-global", "virtio-mmio.force-legacy=off")
	if e.synchronous {
		add("-global", "virtio-mmio.ioeventfd=off")
	}

	add("-chardev", "socket,id=qmp,fd=%d", number["qmp"])
	add("-mon", "chardev=qmp,mode=control")

	if c.Restore == nil { // else they are in the memory
		add("-kernel", "/proc/self/fd/%d", number["kernel"])
		if c.Initrd != "" {
			add("-initrd", "/proc/self/fd/%d", number["initrd"])
		}
		if c.CommandLine != "" {
			add("-append", "%s", c.CommandLine)
		}
	}

	// Few ports: the guest makes two queues for each port that might come, at boot.
	add("-device", "virtio-serial-device,id=serial,max_ports=2")
	add("-chardev", "socket,id=console,fd=%d", number["console"])
	add("-device", "virtconsole,bus=serial.0,nr=0,chardev=console")
	// A listening socket: the host may come and go.
	add("-chardev", "socket,id=channel,fd=%d,server=on,wait=off", number["channel"])
	add("-device", "virtserialport,bus=serial.0,nr=1,chardev=channel,id=channel,name=%s", spec.ChannelPortName)
	if c.random() {
		// From the host's kernel, and not from a generator of QEMU's own; see engines.
		add("-object", "rng-random,id=host,filename=/dev/urandom")
		add("-device", "virtio-rng-device,id=random,rng=host")
	}
	// What the guest frees goes back to the host.
	add("-device", "virtio-balloon-device,id=balloon,free-page-reporting=on")
	if c.CID != 0 {
		add("-device", "vhost-vsock-device,id=vsock,guest-cid=%d,vhostfd=%d", c.CID, number["vsock"])
	}
	if w := c.Wire; w != nil {
		switch w.Kind {
		case WireStream:
			add("-netdev", "stream,id=wire,server=off,addr.type=fd,addr.str=%d", number["wire"])
		case WireTap:
			add("-netdev", "tap,id=wire,fd=%d", number["wire"])
		}
		mtu := ""
		if w.MTU > 0 {
			mtu = fmt.Sprintf(",host_mtu=%d", w.MTU)
		}
		add("-device", "virtio-net-device,id=net,netdev=wire,mac=%s%s", w.MAC, mtu)
	}

	// Each file of a drive is a descriptor set of its own, numbered as the descriptor.
	for i, f := range files {
		if f.role == "drive" || f.role == "descriptor" || f.role == "extent" {
			add("-add-fd", "fd=%d,set=%d", firstFile+i, firstFile+i)
		}
	}
	for i, d := range c.Drives {
		b, err := json.Marshal(d.node(driveNode(i), number["drive"+strconv.Itoa(i)]))
		if err != nil {
			panic(fmt.Sprintf("vmm: internal error: %v", err)) // plain values
		}
		add("-blockdev", "%s", b)
		// An error of the host's disk is an error in the guest: a machine that stands still tells nobody.
		device := fmt.Sprintf("virtio-blk-device,id=blk%d,drive=%s,serial=%s,physical_block_size=4096,write-cache=on,rerror=report,werror=report",
			i, driveNode(i), d.Serial)
		if d.ReadOnly {
			device += fmt.Sprintf(",opt_io_size=%d", readAhead/2)
		}
		add("-device", "%s", device)
	}
	return a
}

// readAhead is how many bytes around a page that is not there the guest reads from a drive of layers: by default its kernel takes
// twice what a drive calls its best size. Programs are read by page faults in no order, and a request costs as much as half a
// megabyte of data.
const readAhead = 2 << 20

// plain says that a drive of one extent needs no descriptor, which QEMU takes milliseconds to understand.
func (d Drive) plain() bool {
	return len(d.Extents) == 1 && d.ReadOnly && d.Extents[0].Size%ExtentAlignment == 0
}

// driveNode is the name of the block node that drive i begins with.
func driveNode(i int) string { return fmt.Sprintf("drive%d", i) }

// node is a block node in the words of QEMU's blockdev-add.
type node struct {
	Driver     string    `json:"driver"`
	Name       string    `json:"node-name,omitempty"`
	ReadOnly   bool      `json:"read-only,omitempty"`
	Discard    string    `json:"discard,omitempty"`
	File       *nodeFile `json:"file,omitempty"`
	Size       int64     `json:"size,omitempty"`
	ReadZeroes bool      `json:"read-zeroes,omitempty"`
}

type nodeFile struct {
	Driver   string `json:"driver"`
	Filename string `json:"filename"`
}

// node is the drive's, whose first file is in the descriptor set of that number.
func (d Drive) node(name string, set int) node {
	if d.Blank {
		return node{Driver: "null-co", Name: name, ReadOnly: d.ReadOnly, Size: SlotSize, ReadZeroes: true}
	}
	// What is not said is as it should be: the host's page cache is used, and shared by all machines that show the same
	// layer; a flush of the guest is an fdatasync; threads do the work. QEMU reads its orders byte by byte.
	n := node{Driver: "raw", Name: name, ReadOnly: d.ReadOnly, File: &nodeFile{Driver: "file", Filename: fmt.Sprintf("/dev/fdset/%d", set)}}
	switch {
	case d.plain():
		n.Size = d.Extents[0].Size
	case d.Path == "":
		n.Driver = "vmdk"
	}
	if !d.ReadOnly {
		n.Discard = "unmap" // VMDK knows no discard and takes it for done
	}
	return n
}

// Shape is what of a config a snapshot depends on, as text: configs of the same shape can be restored from each other's
// snapshots, as long as QEMU, kernel and initrd are the same files.
func (c Config) Shape() []string {
	c.Name, c.MemoryFile, c.Restore, c.Transferable = "", "", nil, false
	if c.CID != 0 {
		c.CID = 3 // which one it is, the guest learns anew
	}
	if c.Wire != nil {
		c.Wire = &Wire{Kind: c.Wire.Kind, MTU: c.Wire.MTU}
	}
	c.Drives = slices.Clone(c.Drives)
	for i := range c.Drives {
		c.Drives[i] = Drive{Serial: c.Drives[i].Serial, ReadOnly: c.Drives[i].ReadOnly, Blank: true}
	}
	return c.Args()
}

// escape doubles commas, which separate QEMU's options.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

// descriptor is the VMDK text that shows extents as one device; the first is in the descriptor set of number set, the others
// follow. Offsets and lengths are in sectors. There is no empty line: QEMU reads the line behind one twice.
func descriptor(extents []Extent, set int) string {
	var b strings.Builder
	b.WriteString("# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"twoGbMaxExtentFlat\"\n")
	for i, e := range extents {
		fmt.Fprintf(&b, "RW %d FLAT \"/dev/fdset/%d\" 0\n", (e.Size+ExtentAlignment-1)/ExtentAlignment*(ExtentAlignment/512), set+i)
	}
	return b.String()
}
