package rootfs

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// CopyUp fills an empty volume with what the image has at path, as docker does on a volume's first use: content with
// owners, modes, times, extended attributes, links and devices, and the directory's own owner and mode. A volume that
// holds anything is left alone. An image without that path leaves the volume empty.
//
// base is the directory that holds the volume's content as name, so that the copy appears whole or not at all, whatever
// happens meanwhile. used says that name is mounted somewhere already; then its entries appear one by one.
func CopyUp(root, path, base, name string, used bool) error {
	data := filepath.Join(base, name)
	if empty, err := isEmpty(data); err != nil || !empty {
		return err
	}
	src, err := open(root, path, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
			return nil
		}
		return fmt.Errorf("copy %s of the image into a volume: %w", path, err)
	}
	defer src.Close()
	tmp := filepath.Join(base, "copy-in-progress")
	if err := os.RemoveAll(tmp); err != nil {
		return err
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	dst, err := os.Open(tmp)
	if err != nil {
		return err
	}
	defer dst.Close()
	c := copier{links: map[inode]string{}, root: dst}
	if err := c.dir(src, dst, "."); err != nil {
		return fmt.Errorf("copy %s of the image into a volume: %w", path, err)
	}
	if !used {
		// Not os.Rename, which refuses what rename(2) does: to replace an empty directory.
		if err := unix.Rename(tmp, data); err != nil {
			return &os.LinkError{Op: "rename", Old: tmp, New: data, Err: err}
		}
		return nil
	}
	entries, err := os.ReadDir(tmp)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Rename(filepath.Join(tmp, e.Name()), filepath.Join(data, e.Name())); err != nil {
			return err
		}
	}
	d, err := os.Open(data)
	if err != nil {
		return err
	}
	defer d.Close()
	return attributes(int(src.Fd()), int(d.Fd()))
}

func isEmpty(dir string) (bool, error) {
	d, err := os.Open(dir)
	if err != nil {
		return false, err
	}
	defer d.Close()
	if _, err := d.Readdirnames(1); err != io.EOF {
		return false, err
	}
	return true, nil
}

type inode struct{ dev, ino uint64 }

// copier copies a tree through descriptors: names are looked up one at a time and links never followed.
type copier struct {
	links map[inode]string // where a file with several names was copied to, relative to root
	root  *os.File
}

// dir copies what is in src and then src's own attributes.
func (c *copier) dir(src, dst *os.File, rel string) error {
	for {
		names, err := src.Readdirnames(256)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		for _, name := range names {
			if err := c.entry(src, dst, name, filepath.Join(rel, name)); err != nil {
				return err
			}
		}
	}
	return attributes(int(src.Fd()), int(dst.Fd()))
}

func (c *copier) entry(src, dst *os.File, name, rel string) error {
	sfd, dfd := int(src.Fd()), int(dst.Fd())
	fail := func(op string, err error) error { return &fs.PathError{Op: op, Path: rel, Err: err} }
	var st unix.Stat_t
	if err := unix.Fstatat(sfd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fail("stat", err)
	}
	kind := st.Mode & unix.S_IFMT
	id := inode{st.Dev, st.Ino}
	if kind != unix.S_IFDIR && st.Nlink > 1 {
		if first, ok := c.links[id]; ok {
			if err := unix.Linkat(int(c.root.Fd()), first, dfd, name, 0); err != nil {
				return fail("link", err)
			}
			return nil
		}
		c.links[id] = rel
	}
	switch kind {
	case unix.S_IFDIR:
		if err := unix.Mkdirat(dfd, name, 0o700); err != nil {
			return fail("mkdir", err)
		}
		s, err := c.at(sfd, name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return fail("open", err)
		}
		defer s.Close()
		d, err := c.at(dfd, name, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return fail("open", err)
		}
		defer d.Close()
		return c.dir(s, d, rel)
	case unix.S_IFREG:
		s, err := c.at(sfd, name, unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			return fail("open", err)
		}
		defer s.Close()
		fd, err := unix.Openat(dfd, name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
		if err != nil {
			return fail("create", err)
		}
		d := os.NewFile(uintptr(fd), rel)
		if _, err := io.Copy(d, s); err != nil {
			d.Close()
			return err
		}
		if err := attributes(int(s.Fd()), fd); err != nil {
			d.Close()
			return fail("copy attributes", err)
		}
		return d.Close()
	case unix.S_IFLNK:
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(sfd, name, buf)
		if err != nil {
			return fail("readlink", err)
		}
		if err := unix.Symlinkat(string(buf[:n]), dfd, name); err != nil {
			return fail("symlink", err)
		}
	default: // device, FIFO, socket
		if err := unix.Mknodat(dfd, name, st.Mode, int(st.Rdev)); err != nil {
			return fail("mknod", err)
		}
		if err := unix.Fchmodat(dfd, name, st.Mode&0o7777, 0); err != nil {
			return fail("chmod", err)
		}
	}
	if err := unix.Fchownat(dfd, name, int(st.Uid), int(st.Gid), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fail("chown", err)
	}
	if kind != unix.S_IFLNK {
		if err := unix.Fchmodat(dfd, name, st.Mode&0o7777, 0); err != nil { // chown clears setuid
			return fail("chmod", err)
		}
	}
	if err := unix.UtimesNanoAt(dfd, name, []unix.Timespec{st.Atim, st.Mtim}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fail("set times", err)
	}
	return nil
}

func (c *copier) at(dir int, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(dir, name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

// attributes copies owner, mode, extended attributes and times from one open file to another.
func attributes(src, dst int) error {
	var st unix.Stat_t
	if err := unix.Fstat(src, &st); err != nil {
		return err
	}
	if err := unix.Fchown(dst, int(st.Uid), int(st.Gid)); err != nil {
		return err
	}
	if err := unix.Fchmod(dst, st.Mode&0o7777); err != nil {
		return err
	}
	if err := xattrs(src, dst); err != nil {
		return err
	}
	return unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", dst), []unix.Timespec{st.Atim, st.Mtim}, 0)
}

const maxXattr = 64 << 10 // XATTR_SIZE_MAX and XATTR_LIST_MAX of linux/limits.h

func xattrs(src, dst int) error {
	n, err := unix.Flistxattr(src, nil)
	if err == unix.EOPNOTSUPP || n == 0 {
		return nil
	}
	if err != nil {
		return err
	}
	list := make([]byte, maxXattr)
	if n, err = unix.Flistxattr(src, list); err != nil {
		return err
	}
	value := make([]byte, maxXattr)
	for _, name := range splitNames(list[:n]) {
		n, err := unix.Fgetxattr(src, name, value)
		if err == unix.ENODATA {
			continue
		}
		if err != nil {
			return err
		}
		if err := unix.Fsetxattr(dst, name, value[:n], 0); err != nil && err != unix.EOPNOTSUPP {
			return fmt.Errorf("set attribute %s: %w", name, err)
		}
	}
	return nil
}

func splitNames(b []byte) []string {
	var out []string
	for len(b) > 0 {
		i := 0
		for i < len(b) && b[i] != 0 {
			i++
		}
		if i > 0 {
			out = append(out, string(b[:i]))
		}
		b = b[min(i+1, len(b)):]
	}
	return out
}
