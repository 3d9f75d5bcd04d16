// Tree lists a file tree, a line for each path, so that two trees can be compared as text wherever they are seen:
//
//	CGO_ENABLED=0 go build ./hack/tree && ./tree [-skip PATH]… ROOT
//
// A line has, separated by tabs: the path, the type, the mode, owner and group, the size of a file, what a symbolic link
// points to or a device's numbers, the modification time, the SHA-256 of a file's contents, the number of hard links and
// the first path of the same inode, and the extended attributes. Sizes and link counts of directories are left out: they
// belong to the file system, not to the tree. It needs nothing but itself in the tree it lists.
package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

func main() {
	var skip []string
	args := os.Args[1:]
	for len(args) >= 2 && args[0] == "-skip" {
		skip = append(skip, args[1])
		args = args[2:]
	}
	if len(args) != 1 {
		fmt.Fprintln(os.Stderr, "usage: tree [-skip PATH]… ROOT")
		os.Exit(2)
	}
	w := bufio.NewWriterSize(os.Stdout, 64<<10)
	if err := errors.Join(list(w, args[0], skip), w.Flush()); err != nil {
		fmt.Fprintln(os.Stderr, "tree:", err)
		os.Exit(1)
	}
}

type inode struct{ dev, ino uint64 }

// lister writes the lines of one tree.
type lister struct {
	w     io.Writer
	root  string
	skip  map[string]bool
	first map[inode]string
	sums  map[inode]string // of files with several names: each is read once
}

// list writes root's tree to w without the paths in skip, which are absolute as seen from root, and what lies below.
func list(w io.Writer, root string, skip []string) error {
	l := &lister{w: w, root: root, skip: map[string]bool{}, first: map[inode]string{}, sums: map[inode]string{}}
	for _, s := range skip {
		l.skip[s] = true
	}
	return l.walk("/")
}

// walk visits directories in the order of their names' bytes, a directory before what it holds.
func (l *lister) walk(path string) error {
	if l.skip[path] {
		return nil
	}
	full := filepath.Join(l.root, path)
	var st unix.Stat_t
	if err := unix.Lstat(full, &st); err != nil {
		return &os.PathError{Op: "lstat", Path: full, Err: err}
	}
	line, err := l.describe(path, full, &st)
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(l.w, line); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return nil
	}
	entries, err := os.ReadDir(full)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := l.walk(filepath.Join(path, e.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (l *lister) describe(path, full string, st *unix.Stat_t) (string, error) {
	size, target, sum, links := "-", "-", "-", "-"
	kind, key := "", inode{st.Dev, st.Ino}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		kind = "dir"
	case unix.S_IFREG:
		kind = "file"
		size = strconv.FormatInt(st.Size, 10)
		var err error
		if sum = l.sums[key]; sum == "" {
			if sum, err = digest(full); err != nil {
				return "", err
			}
		}
		if st.Nlink > 1 {
			l.sums[key] = sum
		}
	case unix.S_IFLNK:
		kind = "link"
		t, err := os.Readlink(full)
		if err != nil {
			return "", err
		}
		target = strconv.QuoteToASCII(t)
	case unix.S_IFIFO:
		kind = "fifo"
	case unix.S_IFSOCK:
		kind = "socket"
	case unix.S_IFCHR, unix.S_IFBLK:
		kind = "char"
		if st.Mode&unix.S_IFMT == unix.S_IFBLK {
			kind = "block"
		}
		target = fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}
	if kind != "dir" {
		if l.first[key] == "" {
			l.first[key] = path
		}
		links = fmt.Sprintf("%d=%s", st.Nlink, strconv.QuoteToASCII(l.first[key]))
	}
	attrs, err := xattrs(full)
	if err != nil {
		return "", err
	}
	return strings.Join([]string{
		strconv.QuoteToASCII(path), kind, fmt.Sprintf("%04o", st.Mode&0o7777), fmt.Sprintf("%d:%d", st.Uid, st.Gid),
		size, target, fmt.Sprintf("%d.%09d", st.Mtim.Sec, st.Mtim.Nsec), sum, links, attrs,
	}, "\t"), nil
}

func digest(path string) (_ string, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// xattrs returns the attributes that belong to the tree: what a stacking file system or a security module keeps beside
// them is left out.
func xattrs(path string) (string, error) {
	n, err := unix.Llistxattr(path, nil)
	if errors.Is(err, unix.ENOTSUP) || n == 0 && err == nil {
		return "-", nil
	}
	if err != nil {
		return "", &os.PathError{Op: "listxattr", Path: path, Err: err}
	}
	names := make([]byte, n)
	if n, err = unix.Llistxattr(path, names); err != nil {
		return "", &os.PathError{Op: "listxattr", Path: path, Err: err}
	}
	var out []string
	for name := range strings.SplitSeq(strings.TrimRight(string(names[:n]), "\x00"), "\x00") {
		// A stacking file system answers the first call with a size that counts names it then hides.
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") || name == "security.selinux" {
			continue
		}
		size, err := unix.Lgetxattr(path, name, nil)
		if err != nil {
			return "", &os.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		value := make([]byte, size)
		if size, err = unix.Lgetxattr(path, name, value); err != nil {
			return "", &os.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		out = append(out, name+"="+strconv.QuoteToASCII(string(value[:size])))
	}
	if len(out) == 0 {
		return "-", nil
	}
	slices.Sort(out)
	return strings.Join(out, " "), nil
}
