package rootfs

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Kind says how a path differs, with docker's numbers.
type Kind int

const (
	Modified Kind = 0
	Added    Kind = 1
	Deleted  Kind = 2
)

// Change is one path that differs from the layers.
type Change struct {
	Kind Kind
	Path string
}

// standing are the paths that docker's own setup makes in every container; empty ones do not count as changes.
var standing = map[string]bool{
	"/.dockerenv": true, "/dev": true, "/dev/console": true, "/dev/pts": true, "/dev/shm": true, "/etc": true, "/etc/hostname": true,
	"/etc/hosts": true, "/etc/mtab": true, "/etc/resolv.conf": true, "/proc": true, "/sys": true, "/sbin": true, "/sbin/docker-init": true,
}

// Changes compares upper with layers (oldest first), both as overlayfs keeps them, and leaves out what a start
// makes in every container. Ignore adds paths, mount targets mostly.
func Changes(layers []string, upper string, ignore map[string]bool) ([]Change, error) {
	var out []Change
	root, err := os.OpenRoot(upper)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	below := make([]*os.Root, 0, len(layers))
	defer func() {
		for _, r := range below {
			r.Close()
		}
	}()
	for _, l := range layers {
		r, err := os.OpenRoot(l)
		if err != nil {
			return nil, err
		}
		below = append(below, r)
	}
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // the container runs
			}
			return err
		}
		if name == "." {
			return nil
		}
		path := "/" + name
		info, err := d.Info()
		if err != nil {
			return nil
		}
		st := info.Sys().(*syscall.Stat_t)
		if info.Mode()&fs.ModeCharDevice != 0 && st.Rdev == 0 {
			out = append(out, Change{Deleted, path})
			return nil
		}
		old := lowerInfo(below, name)
		if old == nil {
			if (standing[path] || ignore[path]) && (info.IsDir() || info.Size() == 0 || info.Mode()&fs.ModeSymlink != 0) {
				return nil
			}
			out = append(out, Change{Added, path})
			return nil
		}
		if info.IsDir() && old.IsDir() && isOpaque(root, name) {
			out = append(out, Change{Modified, path})
			gone, err := hidden(below, root, name)
			for _, g := range gone {
				out = append(out, Change{Deleted, path + "/" + g})
			}
			return err
		}
		if info.IsDir() && old.IsDir() && sameAttributes(info, old) {
			// Copied up for something below it: changed if something below it is.
			return nil
		}
		out = append(out, Change{Modified, path})
		return nil
	})
	if err != nil {
		return nil, err
	}
	// A directory above a change counts as modified.
	seen := map[string]bool{}
	for _, c := range out {
		seen[c.Path] = true
	}
	for _, c := range out[:len(out):len(out)] {
		for dir := filepath.Dir(c.Path); dir != "/" && !seen[dir]; dir = filepath.Dir(dir) {
			seen[dir] = true
			kind := Modified
			if lowerInfo(below, dir[1:]) == nil {
				kind = Added
			}
			out = append(out, Change{kind, dir})
		}
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Path < out[j].Path })
	return out, nil
}

// hidden lists what the layers show in a directory that upper replaced by a new one, and that is not in the new one.
func hidden(layers []*os.Root, upper *os.Root, dir string) ([]string, error) {
	seen := map[string]bool{}
	var out []string
	for _, l := range layers {
		f, err := l.Open(dir)
		if err != nil {
			continue
		}
		names, err := f.Readdirnames(-1)
		f.Close()
		if err != nil && !errors.Is(err, unix.ENOTDIR) {
			return nil, err
		}
		for _, n := range names {
			name := dir + "/" + n
			if seen[n] || lowerInfo(layers, name) == nil {
				continue
			}
			seen[n] = true
			if _, err := upper.Lstat(name); err != nil {
				out = append(out, n)
			}
		}
	}
	return out, nil
}

func sameAttributes(a, b fs.FileInfo) bool {
	x, y := a.Sys().(*syscall.Stat_t), b.Sys().(*syscall.Stat_t)
	return a.Mode() == b.Mode() && x.Uid == y.Uid && x.Gid == y.Gid
}

// lowerInfo is what the layers show at a path, nil when nothing.
func lowerInfo(layers []*os.Root, name string) fs.FileInfo {
next:
	for i := len(layers) - 1; i >= 0; i-- {
		info, err := layers[i].Lstat(name)
		if err == nil {
			if info.Mode()&fs.ModeCharDevice != 0 && info.Sys().(*syscall.Stat_t).Rdev == 0 {
				return nil
			}
			return info
		}
		// A parent that is opaque, deleted or no directory in this layer hides the layers below.
		dir := ""
		for part := range strings.SplitSeq(filepath.Dir(name), "/") {
			dir = filepath.Join(dir, part)
			info, err := layers[i].Lstat(dir)
			if err != nil {
				continue next
			}
			if !info.IsDir() || isOpaque(layers[i], dir) {
				return nil
			}
		}
	}
	return nil
}

func isOpaque(r *os.Root, dir string) bool {
	f, err := r.Open(dir)
	if err != nil {
		return false
	}
	defer f.Close()
	var v [8]byte
	n, err := unix.Fgetxattr(int(f.Fd()), "trusted.overlay.opaque", v[:])
	return err == nil && n == 1 && v[0] == 'y'
}

// Prepare takes links away from where a start mounts files, as docker does: a link there would lead the mount astray
// (resolv.conf of an image that ran systemd). What else docker makes in a container a start makes, see package container.
func Prepare(root string, files []string) error {
	for _, path := range files {
		dir, err := open(root, filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) {
				continue
			}
			return err
		}
		name := filepath.Base(path)
		var b [1]byte
		if _, err = unix.Readlinkat(int(dir.Fd()), name, b[:]); err == nil {
			err = unix.Unlinkat(int(dir.Fd()), name, 0)
		}
		dir.Close()
		if err != nil && err != unix.ENOENT && err != unix.EINVAL { // EINVAL: no link
			return &fs.PathError{Op: "remove link", Path: path, Err: err}
		}
	}
	return nil
}

// Usage is how many bytes of disk a tree takes, each file once.
func Usage(dir string) (int64, error) {
	var total int64
	seen := map[inode]bool{}
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			return err
		}
		info, err := d.Info()
		if err != nil || info.IsDir() {
			return nil
		}
		st := info.Sys().(*syscall.Stat_t)
		if id := (inode{st.Dev, st.Ino}); st.Nlink > 1 {
			if seen[id] {
				return nil
			}
			seen[id] = true
		}
		total += info.Size()
		return nil
	})
	return total, err
}
