package sim

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// Reports is where a guest's kernel has its report files.
const Reports = "/sys/kernel/config/tsm/report"

// Provider is how the kernel names the format of AMD's reports.
const Provider = "sev_guest"

// Limits of the files.
const (
	maxInblob    = 64 // bytes
	maxPrivlevel = 3
)

// Tree is the directory of report files that a guest's kernel has (configfs-tsm, Linux 6.7 and newer), without a kernel:
//
//	tree := &sim.Tree{Attest: chip.Attest}
//	err := tree.Mkdir(sim.Reports+"/a", 0o700)
//	err = tree.WriteFile(sim.Reports+"/a/inblob", data, 0o600) // 64 bytes of the guest's choice
//	report, err := tree.ReadFile(sim.Reports + "/a/outblob")
//	err = tree.Remove(sim.Reports + "/a")
//
// It is not on a disk. In configfs a read runs code, and answers with an errno; a file that somebody watches is read
// before the watcher has answered, a FIFO has no errno, and a file system of one's own (FUSE, 9p) wants privileges, a
// kernel that has it, and more code than all of this package. Instead, the four methods have the signatures of os.Mkdir,
// os.WriteFile, os.ReadFile and os.Remove: a client that reaches its files through an interface of these four, by the
// kernel's own paths, runs against either and cannot tell the difference. Errors are *fs.PathError with the kernel's errno.
//
// The rules are those of Linux' Documentation/ABI/testing/configfs-tsm-report and drivers/virt/coco. A Tree may be used by
// several goroutines; its fields may not change meanwhile.
type Tree struct {
	// Attest answers a request for a report, as Chip.Attest does. nil: there is no provider, and no directory can be made.
	Attest func(data [64]byte, vmpl uint32) ([]byte, error)
	// Provider is the content of provider. Empty: sev_guest.
	Provider string
	// PrivlevelFloor is the lowest VMPL that this guest may ask for: 0, or more under a secure VM service module.
	PrivlevelFloor uint32
	// Aux is what the host gives as auxblob: a table of certificates, or nothing.
	Aux []byte
	// Fault is asked before each operation ("mkdir", "write", "read", "remove"); its error, such as syscall.EBUSY of a
	// host that limits requests, is the operation's. It may use the Tree, as another process would. nil: no faults.
	Fault func(op, path string) error

	mu      sync.Mutex
	entries map[string]*entry // by name of the directory
}

// entry is one directory of a Tree. A report is made when it is read, and kept until something is written.
type entry struct {
	inblob    []byte
	privlevel uint32
	written   uint64 // generation
	read      uint64 // generation that outblob is of
	outblob   []byte // nil: none
}

// Mkdir makes a directory with report files, below Reports.
func (t *Tree) Mkdir(name string, _ fs.FileMode) error {
	return t.do("mkdir", name, func(dir, file string) error {
		switch {
		case file != "" || dir == "":
			return syscall.EPERM // the files are the kernel's
		case t.entries[dir] != nil:
			return syscall.EEXIST
		case t.Attest == nil:
			return syscall.ENXIO
		}
		if t.entries == nil {
			t.entries = map[string]*entry{}
		}
		t.entries[dir] = &entry{}
		return nil
	})
}

// Remove removes such a directory; its files go with it.
func (t *Tree) Remove(name string) error {
	return t.do("remove", name, func(dir, file string) error {
		switch {
		case file != "" || dir == "":
			return syscall.EPERM
		case t.entries[dir] == nil:
			return syscall.ENOENT
		}
		delete(t.entries, dir)
		return nil
	})
}

// WriteFile writes inblob or privlevel.
func (t *Tree) WriteFile(name string, data []byte, _ fs.FileMode) error {
	return t.do("write", name, func(dir, file string) error {
		e := t.entries[dir]
		switch {
		case e == nil:
			return syscall.ENOENT
		case file == "inblob":
			if len(data) > maxInblob {
				return syscall.EFBIG
			}
			// The kernel takes it when the file is closed, where nobody looks at an error.
			if e.advance() == nil {
				e.inblob = bytes.Clone(data)
			}
			return nil
		case file == "privlevel":
			level, err := strconv.ParseUint(strings.TrimSuffix(string(data), "\n"), 0, 32)
			if err != nil || level < uint64(t.PrivlevelFloor) || level > maxPrivlevel {
				return syscall.EINVAL
			}
			if err := e.advance(); err != nil {
				return err
			}
			e.privlevel = uint32(level)
			return nil
		case readable(file):
			return syscall.EACCES
		}
		return syscall.ENOENT
	})
}

// ReadFile reads outblob, auxblob, provider, generation or privlevel_floor.
func (t *Tree) ReadFile(name string) (content []byte, err error) {
	err = t.do("read", name, func(dir, file string) error {
		e := t.entries[dir]
		switch {
		case e == nil:
			return syscall.ENOENT
		case file == "inblob" || file == "privlevel":
			return syscall.EACCES
		case file == "provider":
			content = fmt.Appendln(nil, t.provider())
		case file == "generation":
			content = fmt.Appendln(nil, e.written)
		case file == "privlevel_floor":
			content = fmt.Appendln(nil, t.PrivlevelFloor)
		case file == "outblob":
			err := t.refresh(e)
			content = bytes.Clone(e.outblob)
			return err
		case file == "auxblob":
			err := t.refresh(e)
			content = bytes.Clone(t.Aux)
			return err
		default:
			return syscall.ENOENT
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return content, nil
}

func readable(file string) bool {
	switch file {
	case "outblob", "auxblob", "provider", "generation", "privlevel_floor":
		return true
	}
	return false
}

func (t *Tree) provider() string {
	if t.Provider == "" {
		return Provider
	}
	return t.Provider
}

// refresh makes the report of what was written last, unless there is one.
func (t *Tree) refresh(e *entry) error {
	switch {
	case len(e.inblob) == 0:
		return syscall.EINVAL
	case e.outblob != nil && e.read == e.written:
		return nil
	case len(e.inblob) != maxInblob: // AMD's provider wants all of them
		return syscall.EINVAL
	case e.privlevel < t.PrivlevelFloor: // the firmware refuses
		return syscall.EIO
	}
	e.outblob = nil
	report, err := t.Attest([64]byte(e.inblob), e.privlevel)
	if err != nil {
		return err
	}
	e.outblob, e.read = report, e.written
	return nil
}

// advance counts a write. The counter may not come round to the generation of the last report.
func (e *entry) advance() error {
	if e.written == e.read-1 {
		return syscall.EBUSY
	}
	e.written++
	return nil
}

// do runs one operation on the file, or with file empty the directory, that name is. dir and file are empty for what lies
// elsewhere.
func (t *Tree) do(op, name string, f func(dir, file string) error) error {
	if t.Fault != nil {
		if err := t.Fault(op, name); err != nil {
			return &fs.PathError{Op: op, Path: name, Err: err}
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var dir, file string
	rest, ok := strings.CutPrefix(path.Clean(name), Reports+"/")
	if ok {
		dir, file, _ = strings.Cut(rest, "/")
	}
	err := f(dir, file)
	if err == nil {
		return nil
	}
	if errno := syscall.Errno(0); !errors.As(err, &errno) { // not the kernel's: the test's own report maker
		return fmt.Errorf("sim: %s %s: %w", op, name, err)
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}
