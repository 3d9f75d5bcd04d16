package erofs

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// The type bits of Inode.Mode: st_mode's.
const (
	TypeMask        = 0xF000
	TypeFIFO        = 0x1000
	TypeCharDevice  = 0x2000
	TypeDirectory   = 0x4000
	TypeBlockDevice = 0x6000
	TypeRegular     = 0x8000
	TypeSymlink     = 0xA000
	TypeSocket      = 0xC000
)

// Bounds of the format and of Linux.
const (
	MaxName       = 255  // bytes of a name in a directory
	MaxTarget     = 4095 // bytes of a symbolic link's target
	maxXattrName  = 255
	maxXattrValue = 65535
	maxXattrs     = 4 * 65534 // bytes of an inode's entries: i_xattr_icount has 16 bits
)

// Inode is a file of any type. One that stands in several directories, or under several names, is a hard link.
type Inode struct {
	Mode      uint16 // required: type and permission bits
	UID, GID  uint32
	Mtime     int64 // seconds
	MtimeNsec uint32
	Rdev      uint32 // of a device; see MakeDevice
	Target    string // of a symbolic link

	xattrs   map[string]string
	children map[string]*Inode // of a directory
	data     Content           // of a regular file

	// Set by Finish.
	nlink  uint32
	nid    uint64
	size   int64
	placed bool
}

// IsDir says whether the inode is a directory.
func (i *Inode) IsDir() bool { return i.Mode&TypeMask == TypeDirectory }

// MakeDevice is the number of a device as Linux' new_encode_dev makes it.
func MakeDevice(major, minor uint32) uint32 {
	return minor&0xff | major<<8 | minor&^0xff<<12
}

// Child returns what stands under a name in a directory, or nil.
func (i *Inode) Child(name string) *Inode { return i.children[name] }

// Put sets a name in a directory, replacing what stood there.
func (i *Inode) Put(name string, child *Inode) error {
	switch {
	case !i.IsDir():
		return fmt.Errorf("%q: its parent is not a directory", name)
	case name == "" || name == "." || name == "..":
		return fmt.Errorf("%q is no file name", name)
	case len(name) > MaxName:
		return fmt.Errorf("%q…: the name has %d bytes, the limit is %d", name[:32], len(name), MaxName)
	case strings.ContainsAny(name, "/\x00"):
		return fmt.Errorf("%q: slash or NUL in a file name", name)
	}
	if i.children == nil {
		i.children = make(map[string]*Inode)
	}
	i.children[name] = child
	return nil
}

// Len is the number of names in a directory.
func (i *Inode) Len() int { return len(i.children) }

// Names returns a directory's names, sorted.
func (i *Inode) Names() []string { return slices.Sorted(maps.Keys(i.children)) }

// SetContent gives a regular file its content.
func (i *Inode) SetContent(c Content) { i.data = c }

// ErrXattrNamespace says that the format has no place for an attribute of that namespace.
var ErrXattrNamespace = errors.New("extended attribute namespace is not supported")

// SetXattr sets an extended attribute by its full name ("user.origin").
func (i *Inode) SetXattr(name, value string) error {
	_, suffix, ok := splitXattr(name)
	switch {
	case !ok:
		return fmt.Errorf("%q: %w", name, ErrXattrNamespace)
	case len(suffix) > maxXattrName:
		return fmt.Errorf("extended attribute %.40q…: the name has %d bytes, the limit is %d", name, len(name), maxXattrName)
	case strings.ContainsRune(name, 0):
		return fmt.Errorf("extended attribute %q: NUL in its name", name)
	case len(value) > maxXattrValue:
		return fmt.Errorf("extended attribute %q: %d bytes are more than the limit of %d", name, len(value), maxXattrValue)
	}
	old, had := i.xattrs[name]
	if i.xattrs == nil {
		i.xattrs = make(map[string]string)
	}
	i.xattrs[name] = value
	if n := i.xattrSize(); n > xattrHeaderSize+maxXattrs {
		delete(i.xattrs, name)
		if had {
			i.xattrs[name] = old
		}
		return fmt.Errorf("extended attributes: %d bytes are more than the limit of %d", n, maxXattrs)
	}
	return nil
}

// Xattr returns an extended attribute.
func (i *Inode) Xattr(name string) (string, bool) {
	v, ok := i.xattrs[name]
	return v, ok
}

// ClearXattrs takes all extended attributes away.
func (i *Inode) ClearXattrs() { i.xattrs = nil }

func splitXattr(name string) (index byte, suffix string, ok bool) {
	for _, p := range xattrPrefixes {
		if p.whole {
			if name == p.prefix {
				return p.index, "", true
			}
			continue
		}
		if s, found := strings.CutPrefix(name, p.prefix); found && s != "" {
			return p.index, s, true
		}
	}
	return 0, "", false
}

func (i *Inode) xattrSize() int {
	if len(i.xattrs) == 0 {
		return 0
	}
	n := xattrHeaderSize
	for name, value := range i.xattrs {
		_, suffix, _ := splitXattr(name)
		n += (xattrEntrySize + len(suffix) + len(value) + 3) &^ 3
	}
	return n
}

// putXattrs writes struct erofs_xattr_ibody_header and its entries, sorted by name.
func (i *Inode) putXattrs(b []byte) {
	n := xattrHeaderSize
	for _, name := range slices.Sorted(maps.Keys(i.xattrs)) {
		value := i.xattrs[name]
		index, suffix, _ := splitXattr(name)
		b[n] = byte(len(suffix))
		b[n+1] = index
		b[n+2], b[n+3] = byte(len(value)), byte(len(value)>>8)
		copy(b[n+xattrEntrySize:], suffix)
		copy(b[n+xattrEntrySize+len(suffix):], value)
		n += (xattrEntrySize + len(suffix) + len(value) + 3) &^ 3
	}
}

// XattrNames returns the names of the extended attributes, sorted.
func (i *Inode) XattrNames() []string { return slices.Sorted(maps.Keys(i.xattrs)) }
