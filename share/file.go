package share

import (
	"encoding/binary"
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"
)

// file is one object of the shared tree as one user sees it: an O_PATH descriptor, and after Open a second one for its
// contents. A descriptor stays with its object whatever happens to names, so no path is ever resolved again.
// Setuid and setgid bits do not come through: the protocol library masks them.
type file struct {
	p9.DefaultWalkGetAttr
	s    *Share
	uid  p9.UID
	fd   int // O_PATH|O_NOFOLLOW
	root bool

	mu   sync.Mutex // guards the position of an opened directory
	open *os.File   // nil before Open
}

var _ p9.File = (*file)(nil)

// attach opens the root of the tree for a user.
func (s *Share) attach(uid p9.UID) (*file, error) {
	return s.object(uid, func() (int, error) {
		return unix.Openat(int(s.root.Fd()), ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}, true)
}

// object wraps a descriptor, within the share's limit.
func (s *Share) object(uid p9.UID, open func() (int, error), root bool) (*file, error) {
	if s.objects.Add(1) > s.limit {
		s.objects.Add(-1)
		return nil, unix.ENFILE
	}
	fd, err := open()
	if err != nil {
		s.objects.Add(-1)
		return nil, err
	}
	return &file{s: s, uid: uid, fd: fd, root: root}, nil
}

func (f *file) Close() error {
	if f.open != nil {
		f.open.Close()
	}
	f.s.objects.Add(-1)
	return unix.Close(f.fd)
}

// visible says whether a name exists for the guest: sharing a file shows nothing else of its directory.
func (f *file) visible(name string) bool {
	return !f.root || f.s.only == "" || name == f.s.only
}

// changes says whether names in this directory may be made or removed.
func (f *file) changes(name string) error {
	if f.s.mode&ReadOnly != 0 {
		return unix.EROFS
	}
	if f.root && f.s.only != "" {
		return unix.EPERM
	}
	if name == "" || name == "." || name == ".." || strings.ContainsRune(name, '/') {
		return unix.EINVAL
	}
	return nil
}

func (f *file) Walk(names []string) (_ []p9.QID, _ p9.File, err error) {
	defer wire(&err)
	if len(names) == 0 {
		clone, err := f.s.object(f.uid, func() (int, error) {
			return unix.FcntlInt(uintptr(f.fd), unix.F_DUPFD_CLOEXEC, 0)
		}, f.root)
		if err != nil {
			return nil, nil, err
		}
		return nil, clone, nil
	}
	var qids []p9.QID
	at := f
	for i, name := range names {
		next, qid, err := at.child(name)
		if i > 0 {
			at.Close()
		}
		if err != nil {
			return nil, nil, err
		}
		qids = append(qids, qid)
		at = next
	}
	return qids, at, nil
}

func (f *file) child(name string) (*file, p9.QID, error) {
	if name == "" || name == "." || name == ".." || strings.ContainsRune(name, '/') {
		return nil, p9.QID{}, unix.EINVAL
	}
	if !f.visible(name) {
		return nil, p9.QID{}, unix.ENOENT
	}
	c, err := f.s.object(f.uid, func() (int, error) {
		return unix.Openat(f.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	}, false)
	if err != nil {
		return nil, p9.QID{}, err
	}
	st, err := c.stat()
	if err != nil {
		c.Close()
		return nil, p9.QID{}, err
	}
	return c, qidOf(&st), nil
}

func (f *file) stat() (st unix.Stat_t, err error) {
	err = unix.Fstatat(f.fd, "", &st, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
	return st, err
}

// qidOf tells objects apart by inode; the device is mixed in because file systems may be mounted below the root.
func qidOf(st *unix.Stat_t) p9.QID {
	return p9.QID{Type: p9.FileMode(st.Mode).QIDType(), Path: qidPath(st.Dev, st.Ino)}
}

func qidPath(dev, ino uint64) uint64 { return ino ^ dev<<40 }

func (f *file) GetAttr(p9.AttrMask) (_ p9.QID, _ p9.AttrMask, _ p9.Attr, err error) {
	defer wire(&err)
	st, err := f.stat()
	if err != nil {
		return p9.QID{}, p9.AttrMask{}, p9.Attr{}, err
	}
	valid := p9.AttrMask{Mode: true, NLink: true, UID: true, GID: true, RDev: true, ATime: true, MTime: true, CTime: true, INo: true, Size: true, Blocks: true}
	return qidOf(&st), valid, p9.Attr{
		Mode:             p9.FileMode(st.Mode),
		UID:              p9.UID(st.Uid),
		GID:              p9.GID(st.Gid),
		NLink:            p9.NLink(st.Nlink),
		RDev:             p9.Dev(st.Rdev),
		Size:             uint64(st.Size),
		BlockSize:        uint64(st.Blksize),
		Blocks:           uint64(st.Blocks),
		ATimeSeconds:     uint64(st.Atim.Sec),
		ATimeNanoSeconds: uint64(st.Atim.Nsec),
		MTimeSeconds:     uint64(st.Mtim.Sec),
		MTimeNanoSeconds: uint64(st.Mtim.Nsec),
		CTimeSeconds:     uint64(st.Ctim.Sec),
		CTimeNanoSeconds: uint64(st.Ctim.Nsec),
	}, nil
}

// path names the object itself for calls that take no O_PATH descriptor. It resolves to the inode, never to a name.
func (f *file) path() string { return "/proc/self/fd/" + strconv.Itoa(f.fd) }

func (f *file) SetAttr(valid p9.SetAttrMask, attr p9.SetAttr) (err error) {
	defer wire(&err)
	if f.s.mode&ReadOnly != 0 {
		return unix.EROFS
	}
	st, err := f.stat()
	if err != nil {
		return err
	}
	link := st.Mode&unix.S_IFMT == unix.S_IFLNK
	if valid.UID || valid.GID {
		uid, gid := -1, -1
		if valid.UID {
			uid = int(attr.UID)
		}
		if valid.GID {
			gid = int(attr.GID)
		}
		if err := unix.Fchownat(f.fd, "", uid, gid, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return err
		}
	}
	// After the owner, because a change of owner clears setuid and setgid.
	if valid.Permissions {
		if link {
			return unix.EOPNOTSUPP
		}
		if err := unix.Chmod(f.path(), uint32(attr.Permissions)&0o7777); err != nil {
			return err
		}
	}
	if valid.Size {
		if st.Mode&unix.S_IFMT != unix.S_IFREG {
			return unix.EINVAL
		}
		if err := unix.Truncate(f.path(), int64(attr.Size)); err != nil {
			return err
		}
	}
	if valid.ATime || valid.MTime {
		times := []unix.Timespec{{Nsec: unix.UTIME_OMIT}, {Nsec: unix.UTIME_OMIT}}
		if valid.ATime {
			times[0] = timeFor(valid.ATimeNotSystemTime, attr.ATimeSeconds, attr.ATimeNanoSeconds)
		}
		if valid.MTime {
			times[1] = timeFor(valid.MTimeNotSystemTime, attr.MTimeSeconds, attr.MTimeNanoSeconds)
		}
		if link {
			return unix.EOPNOTSUPP
		}
		return unix.UtimesNanoAt(unix.AT_FDCWD, f.path(), times, 0)
	}
	return nil
}

func timeFor(given bool, sec, nsec uint64) unix.Timespec {
	if !given {
		return unix.Timespec{Nsec: unix.UTIME_NOW}
	}
	return unix.Timespec{Sec: int64(sec), Nsec: int64(nsec)}
}

func (f *file) Open(flags p9.OpenFlags) (_ p9.QID, _ uint32, err error) {
	defer wire(&err)
	st, err := f.stat()
	if err != nil {
		return p9.QID{}, 0, err
	}
	mode := openMode(flags)
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		mode = unix.O_RDONLY | unix.O_DIRECTORY
	case unix.S_IFREG:
		if f.s.mode&ReadOnly != 0 && mode&(unix.O_ACCMODE|unix.O_TRUNC) != unix.O_RDONLY {
			return p9.QID{}, 0, unix.EROFS
		}
	default:
		return p9.QID{}, 0, unix.ENXIO
	}
	fd, err := unix.Open(f.path(), mode|unix.O_CLOEXEC, 0)
	if err != nil {
		return p9.QID{}, 0, err
	}
	f.open = os.NewFile(uintptr(fd), f.path())
	return qidOf(&st), 0, nil
}

// openMode keeps of a client's flags what concerns the host: the client does appending and caching itself.
func openMode(flags p9.OpenFlags) int {
	return int(flags) & (unix.O_ACCMODE | unix.O_TRUNC)
}

func (f *file) ReadAt(p []byte, offset int64) (_ int, err error) {
	defer wire(&err)
	n, err := f.open.ReadAt(p, offset)
	if n > 0 && err == io.EOF {
		err = nil
	}
	return n, err
}

func (f *file) WriteAt(p []byte, offset int64) (_ int, err error) {
	defer wire(&err)
	return f.open.WriteAt(p, offset)
}

func (f *file) FSync() (err error) {
	defer wire(&err)
	if f.open == nil {
		return unix.EBADF
	}
	return f.open.Sync()
}

func (f *file) Create(name string, flags p9.OpenFlags, perm p9.FileMode, _ p9.UID, gid p9.GID) (_ p9.File, _ p9.QID, _ uint32, err error) {
	defer wire(&err)
	if err := f.changes(name); err != nil {
		return nil, p9.QID{}, 0, err
	}
	// The client asks for creation after a lookup that found nothing; an object that appeared meanwhile is refused
	// rather than opened, because it might not be a regular file.
	fd, err := unix.Openat(f.fd, name, openMode(flags)|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, p9.QID{}, 0, err
	}
	opened := os.NewFile(uintptr(fd), name)
	c, err := f.s.object(f.uid, func() (int, error) {
		if err := f.own(fd, "", gid); err != nil {
			return -1, err
		}
		if err := unix.Fchmod(fd, uint32(perm)&0o7777); err != nil {
			return -1, err
		}
		return unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_PATH|unix.O_CLOEXEC, 0)
	}, false)
	if err != nil {
		opened.Close()
		return nil, p9.QID{}, 0, errors.Join(err, unix.Unlinkat(f.fd, name, 0))
	}
	c.open = opened
	st, err := c.stat()
	if err != nil {
		c.Close()
		return nil, p9.QID{}, 0, err
	}
	return c, qidOf(&st), 0, nil
}

// own gives a new object to the user who made it. A server without the right to do so leaves it to itself, as any
// unprivileged program would.
func (f *file) own(dirfd int, name string, gid p9.GID) error {
	uid, group := -1, -1
	if f.uid.Ok() {
		uid = int(f.uid)
	}
	if gid.Ok() {
		group = int(gid)
	}
	err := unix.Fchownat(dirfd, name, uid, group, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
	if errors.Is(err, unix.EPERM) && os.Geteuid() != 0 {
		return nil
	}
	return err
}

// made finishes a directory entry that was just created: its owner, and its mode unless that is 0 (a link has none).
func (f *file) made(name string, gid p9.GID, perm uint32) (p9.QID, error) {
	if err := f.own(f.fd, name, gid); err != nil {
		return p9.QID{}, err
	}
	c, qid, err := f.child(name)
	if err != nil {
		return p9.QID{}, err
	}
	defer c.Close()
	if perm != 0 {
		if err := unix.Chmod(c.path(), perm&0o7777); err != nil {
			return p9.QID{}, err
		}
	}
	return qid, nil
}

func (f *file) Mkdir(name string, perm p9.FileMode, _ p9.UID, gid p9.GID) (_ p9.QID, err error) {
	defer wire(&err)
	if err := f.changes(name); err != nil {
		return p9.QID{}, err
	}
	if err := unix.Mkdirat(f.fd, name, 0o700); err != nil {
		return p9.QID{}, err
	}
	return f.made(name, gid, uint32(perm)|unix.S_IFDIR)
}

func (f *file) Symlink(target, name string, _ p9.UID, gid p9.GID) (_ p9.QID, err error) {
	defer wire(&err)
	if err := f.changes(name); err != nil {
		return p9.QID{}, err
	}
	if err := unix.Symlinkat(target, f.fd, name); err != nil {
		return p9.QID{}, err
	}
	return f.made(name, gid, 0)
}

func (f *file) Mknod(name string, mode p9.FileMode, _, _ uint32, _ p9.UID, gid p9.GID) (_ p9.QID, err error) {
	defer wire(&err)
	if err := f.changes(name); err != nil {
		return p9.QID{}, err
	}
	switch kind := uint32(mode) & unix.S_IFMT; kind {
	case unix.S_IFIFO, unix.S_IFSOCK, unix.S_IFREG:
		if err := unix.Mknodat(f.fd, name, kind|0o600, 0); err != nil {
			return p9.QID{}, err
		}
		return f.made(name, gid, uint32(mode)|unix.S_IFREG)
	default:
		return p9.QID{}, unix.EPERM
	}
}

func (f *file) Link(target p9.File, name string) (err error) {
	defer wire(&err)
	if err := f.changes(name); err != nil {
		return err
	}
	t, ok := target.(*file)
	if !ok || t.s != f.s {
		return unix.EXDEV
	}
	return unix.Linkat(unix.AT_FDCWD, t.path(), f.fd, name, unix.AT_SYMLINK_FOLLOW)
}

func (f *file) RenameAt(oldName string, dir p9.File, newName string) (err error) {
	defer wire(&err)
	d, ok := dir.(*file)
	if !ok || d.s != f.s {
		return unix.EXDEV
	}
	if err := errors.Join(f.changes(oldName), d.changes(newName)); err != nil {
		return err // wire picks the first
	}
	return unix.Renameat(f.fd, oldName, d.fd, newName)
}

// Rename is not called on servers; the library turns it into RenameAt.
func (f *file) Rename(p9.File, string) error { return unix.ENOSYS }

func (f *file) UnlinkAt(name string, flags uint32) (err error) {
	defer wire(&err)
	if err := f.changes(name); err != nil {
		return err
	}
	return unix.Unlinkat(f.fd, name, int(flags)&unix.AT_REMOVEDIR)
}

// Renamed needs nothing: descriptors follow their objects.
func (f *file) Renamed(p9.File, string) {}

func (f *file) Readlink() (_ string, err error) {
	defer wire(&err)
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(f.fd, "", buf)
	if err != nil {
		return "", err
	}
	return string(buf[:n]), nil
}

// Readdir reads entries from a position that an earlier call returned, or 0. The layout is struct linux_dirent64 of
// getdents64(2): d_ino[8] d_off[8] d_reclen[2] d_type[1] d_name[].
func (f *file) Readdir(offset uint64, count uint32) (_ p9.Dirents, err error) {
	defer wire(&err)
	if f.open == nil {
		return nil, unix.EBADF
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	st, err := f.stat()
	if err != nil {
		return nil, err
	}
	fd := int(f.open.Fd())
	if _, err := unix.Seek(fd, int64(offset), io.SeekStart); err != nil {
		return nil, err
	}
	const header = 8 + 8 + 2 + 1
	var out p9.Dirents
	buf := make([]byte, 32<<10)
	// A 9P entry takes 24 bytes and its name; the server cuts what does not fit, so stop near the count.
	for size := 0; size < int(count); {
		n, err := unix.Getdents(fd, buf)
		if err != nil {
			return out, err
		}
		if n == 0 {
			break
		}
		for b := buf[:n]; len(b) > header; {
			reclen := int(binary.NativeEndian.Uint16(b[16:]))
			if reclen <= header || reclen > len(b) {
				return nil, unix.EIO
			}
			name, _, _ := strings.Cut(string(b[header:reclen]), "\x00")
			if name != "." && name != ".." && f.visible(name) {
				kind := direntType(b[18])
				out = append(out, p9.Dirent{
					QID:    p9.QID{Type: kind, Path: qidPath(st.Dev, binary.NativeEndian.Uint64(b))},
					Offset: binary.NativeEndian.Uint64(b[8:]),
					Type:   p9.QIDType(b[18]),
					Name:   name,
				})
				size += 24 + len(name)
			}
			b = b[reclen:]
		}
	}
	return out, nil
}

func direntType(t byte) p9.QIDType {
	switch t {
	case unix.DT_DIR:
		return p9.TypeDir
	case unix.DT_LNK:
		return p9.TypeSymlink
	}
	return p9.TypeRegular
}

func (f *file) StatFS() (_ p9.FSStat, err error) {
	defer wire(&err)
	var st unix.Statfs_t
	if err := unix.Fstatfs(f.fd, &st); err != nil {
		return p9.FSStat{}, err
	}
	return p9.FSStat{
		Type:            0x01021997, // V9FS_MAGIC
		BlockSize:       uint32(st.Bsize),
		Blocks:          st.Blocks,
		BlocksFree:      st.Bfree,
		BlocksAvailable: st.Bavail,
		Files:           st.Files,
		FilesFree:       st.Ffree,
		NameLength:      uint32(st.Namelen),
	}, nil
}

// Lock grants every lock: the guest's kernel has already taken it among the guest's own processes, and those of the
// host do not take part.
func (f *file) Lock(int, p9.LockType, p9.LockFlags, uint64, uint64, string) (p9.LockStatus, error) {
	return p9.LockStatusOK, nil
}

// attribute says whether the guest may use an extended attribute. security.* and trusted.* mean something to the
// host's kernel and stay out of reach.
func attribute(name string) error {
	if strings.HasPrefix(name, "user.") || name == "system.posix_acl_access" || name == "system.posix_acl_default" {
		return nil
	}
	return unix.EOPNOTSUPP
}

func (f *file) GetXattr(name string) (_ []byte, err error) {
	defer wire(&err)
	if err := attribute(name); err != nil {
		return nil, err
	}
	n, err := unix.Getxattr(f.path(), name, nil)
	if err != nil || n == 0 {
		return nil, err
	}
	buf := make([]byte, n)
	n, err = unix.Getxattr(f.path(), name, buf)
	if err != nil {
		return nil, err
	}
	return buf[:n], nil
}

func (f *file) ListXattrs() (_ []string, err error) {
	defer wire(&err)
	n, err := unix.Listxattr(f.path(), nil)
	if err != nil || n == 0 {
		return nil, err
	}
	buf := make([]byte, n)
	if n, err = unix.Listxattr(f.path(), buf); err != nil {
		return nil, err
	}
	var out []string
	for name := range strings.SplitSeq(string(buf[:n]), "\x00") {
		if name != "" && attribute(name) == nil {
			out = append(out, name)
		}
	}
	return out, nil
}

func (f *file) SetXattr(name string, data []byte, flags p9.XattrFlags) (err error) {
	defer wire(&err)
	if f.s.mode&ReadOnly != 0 {
		return unix.EROFS
	}
	if err := attribute(name); err != nil {
		return err
	}
	return unix.Setxattr(f.path(), name, data, int(flags))
}

func (f *file) RemoveXattr(name string) (err error) {
	defer wire(&err)
	if f.s.mode&ReadOnly != 0 {
		return unix.EROFS
	}
	if err := attribute(name); err != nil {
		return err
	}
	return unix.Removexattr(f.path(), name)
}

// wire makes an error number of the host the same number for the guest. Left alone, the library would fold related
// numbers into one (a directory that is not empty would "exist").
func wire(err *error) {
	var errno unix.Errno
	if errors.As(*err, &errno) {
		*err = linux.Errno(errno)
	}
}
