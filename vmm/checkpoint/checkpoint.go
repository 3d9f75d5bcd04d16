// Package checkpoint writes a process that stands still to files, and starts it again from them, as often as wanted, each
// time as a process of its own: with its memory, copy-on-write, and its threads, in the middle of what they were doing. What
// a process has made of its memory comes along, which is more than its program would tell: the code that an emulator has
// translated, for instance.
//
//	img, err := checkpoint.Freeze(pid, memory, role)                               // the process has ended
//	err = checkpoint.Thaw(cmd, img, checkpoint.Start{Memory: memory, Files: files}) // its threads go on where they stopped
//
// The process must be one whose world is small, and is refused otherwise: no shared or locked memory, and no descriptors but
// files that the caller knows, /dev/null, /dev/urandom, eventfd(2) and signalfd(2). Its identifiers are new after each Thaw: the memory knows
// those of threads where set_tid_address(2) points to, and nowhere else that matters.
//
// An image is good for the host that it was made on, until that boots again: see Host.
package checkpoint

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Image is a process at rest, without the contents of its memory. It is plain data.
type Image struct {
	Host        string       `json:"host"`
	Program     string       `json:"program"`
	Layout      Layout       `json:"layout"`
	Files       []File       `json:"files"` // that Maps show
	Maps        []Map        `json:"maps"`
	Kernel      []Area       `json:"kernel"` // what the kernel maps into each process by itself: [vdso] and what belongs to it
	Threads     []Thread     `json:"threads"`
	Actions     []Action     `json:"actions"`
	Descriptors []Descriptor `json:"descriptors"`
	Workspace   uint64       `json:"workspace"` // address from which on much is free
}

// Layout is what the kernel knows of a process's memory: the addresses of prctl(2), PR_SET_MM_MAP, in its order.
type Layout struct {
	Addresses [11]uint64 `json:"addresses"`
	Auxiliary []byte     `json:"auxiliary"`
}

// File is one that is mapped.
type File struct {
	Path       string `json:"path"`
	Descriptor int    `json:"descriptor"` // it is open, too, and known to the caller; -1: found by its path
	Device     uint64 `json:"device"`
	Inode      uint64 `json:"inode"`
	Size       int64  `json:"size"`
	Changed    int64  `json:"changed"` // ctime, nanoseconds since 1970
}

// Area is a range of addresses.
type Area struct {
	Name  string `json:"name,omitempty"`
	Start uint64 `json:"start"`
	End   uint64 `json:"end"`
}

// Map is a private mapping of nothing or of a file.
type Map struct {
	Area
	Protection int     `json:"protection"`
	File       int     `json:"file"` // index in Files; -1: none
	Offset     int64   `json:"offset,omitempty"`
	Huge       bool    `json:"huge,omitempty"` // madvise(2), MADV_HUGEPAGE
	Pieces     []Piece `json:"pieces,omitempty"`
}

// Piece is memory of a mapping that is the process's own.
type Piece struct {
	Start  uint64 `json:"start"`
	Length uint64 `json:"length"`
	Offset int64  `json:"offset"` // in the memory's file
}

// Thread is a thread; the first is the one that the process began with.
type Thread struct {
	Name      string          `json:"name"`
	Registers unix.PtraceRegs `json:"registers"`
	Extended  []byte          `json:"extended"`            // XSAVE's
	Mask      uint64          `json:"mask"`                // of signals
	ID        uint64          `json:"id"`                  // where its number is in memory
	Robust    [2]uint64       `json:"robust"`              // set_robust_list(2)
	Sequences *[4]uint64      `json:"sequences,omitempty"` // rseq: address, length, signature, flags
}

// Action is what a signal does, as the kernel's struct has it: handler, flags, restorer, mask.
type Action [4]uint64

// Kinds of descriptors.
const (
	KindNull   = "null"    // /dev/null
	KindRandom = "urandom" // /dev/urandom
	KindEvent  = "eventfd"
	KindSignal = "signalfd"
	KindOther  = "" // what the caller knows, by its role
)

// Descriptor is an open file of the process.
type Descriptor struct {
	Number int    `json:"number"`
	Kind   string `json:"kind,omitempty"`
	Role   string `json:"role,omitempty"`
	Flags  int    `json:"flags"`
	Value  uint64 `json:"value,omitempty"` // an eventfd's count, a signalfd's mask

	Link   string `json:"-"` // as /proc shows it
	Inode  uint64 `json:"-"`
	Type   uint32 `json:"-"` // S_IFSOCK and so on
	Device uint64 `json:"-"`
}

// Host names what an image depends on beside the files that it maps: this boot of the host, and with it the kernel, the
// processor, and the clocks that a process has read.
func Host() (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(boot)), err
}

// ErrStale is what Check finds when all is well, but the host is not as it was any more.
var ErrStale = errors.New("the host has changed since the process was frozen")

// Check says why the image cannot be used here, from what can be seen without reading its memory.
func (img *Image) Check() error {
	host, err := Host()
	if err != nil {
		return err
	}
	if host != img.Host {
		return fmt.Errorf("%w: it has booted", ErrStale)
	}
	for _, f := range img.Files {
		if f.Descriptor >= 0 {
			continue
		}
		now, err := describeFile(f.Path)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrStale, err)
		}
		if now != f {
			return fmt.Errorf("%w: %s is another", ErrStale, f.Path)
		}
	}
	return nil
}

// describeFile is a file as it is now.
func describeFile(path string) (File, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return File{}, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	return File{Path: path, Descriptor: -1, Device: st.Dev, Inode: st.Ino, Size: st.Size, Changed: st.Ctim.Nano()}, nil
}
