package bundle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/undo"
	"github.com/kcradle/kcradle/spec"
)

// DefaultDiskSize is the size of a scratch disk or volume that names none. The files are sparse: they take what was
// written to them.
const DefaultDiskSize = 10 << 30

// minDiskSize is what an ext4 with its journal can live in.
const minDiskSize = 16 << 20

// ext4Features are those of mke2fs.conf in e2fsprogs 1.47 that the guest's kernel knows for long, without room for the growth of
// a mounted one: that would lie between a disk's superblock and all the rest.
const ext4Features = "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file," +
	"huge_file,dir_nlink,extra_isize,metadata_csum"

// A start reads little of a disk, but each read makes it wait. So all that it reads is in the first block group.
const (
	// ext4Flex is how many block groups keep their bitmaps and inodes together. Whoever writes to one group first reads the bitmaps of
	// all that are together with it: with mkfs's 16 that is a tenth of what a start takes.
	ext4Flex = "1"
	// ext4Journal is the journal's first block. mkfs would put it into the middle of the disk.
	ext4Journal = "1024"
)

// diskKind is what a disk is for, by the directories at its top.
type diskKind struct {
	name string // in the cache
	dirs []string
}

var (
	scratchDisk = diskKind{"scratch", []string{spec.ScratchContainers, spec.ScratchLogs}}
	volumeDisk  = diskKind{"volume", []string{spec.VolumeData}}
)

// blank returns a disk of that kind and size on which nothing was written, from the cache directory, making it at first use. The
// cache is shared by processes: a file there is whole or absent.
func blank(ctx context.Context, cache string, kind diskKind, size int64) (string, error) {
	if size < minDiskSize {
		return "", fmt.Errorf("disk size %d: want at least %d MiB", size, minDiskSize>>20)
	}
	size = (size + 4095) &^ 4095
	path := filepath.Join(cache, fmt.Sprintf("ext4-v4-%s-%d", kind.name, size))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return "", err
	}
	f, err := os.CreateTemp(cache, ".ext4-*")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	err = f.Truncate(size)
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return "", err
	}
	// No reserved blocks: there is no root to save from users. The journal is not written out: a new file reads as
	// zeroes. The inode tables are not either, and mkfs marks them as zeroed because the file's hole was punched.
	// Features are named one by one, so that every host makes the same disk whatever its mke2fs.conf says.
	if _, err := e2fs(ctx, "", "mkfs.ext4", "-q", "-F", "-t", "ext4", "-m", "0", "-b", "4096", "-I", "256", "-i", "16384", "-G", ext4Flex,
		"-J", "location="+ext4Journal, "-O", ext4Features, "-E", "lazy_journal_init=1,root_owner=0:0", f.Name()); err != nil {
		return "", err
	}
	var script strings.Builder
	for _, d := range kind.dirs {
		fmt.Fprintln(&script, "mkdir", d)
	}
	fmt.Fprintln(&script, "ls -p")
	out, err := e2fs(ctx, script.String(), "debugfs", "-w", "-f", "-", f.Name())
	if err != nil {
		return "", err
	}
	for _, d := range kind.dirs {
		if !strings.Contains(out, "/040755/0/0/"+d+"/") { // debugfs ends well whatever its orders come to
			return "", fmt.Errorf("debugfs: made no directory %s: %s", d, out)
		}
	}
	return path, os.Rename(f.Name(), path)
}

// e2fs runs a program of e2fsprogs, which are often not in the path of who is not root, and returns what it said.
func e2fs(ctx context.Context, stdin, name string, args ...string) (string, error) {
	for _, path := range []string{name, "/usr/sbin/" + name, "/sbin/" + name} {
		found, err := exec.LookPath(path)
		if err != nil {
			continue
		}
		cmd := exec.CommandContext(ctx, found, args...)
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "MKE2FS_CONFIG=/dev/null", "DEBUGFS_PAGER=cat"}
		cmd.Stdin = strings.NewReader(stdin)
		out, err := cmd.CombinedOutput()
		out = bytes.TrimSpace(out)
		if err != nil {
			return "", fmt.Errorf("%s: %w: %s", name, err, out)
		}
		return string(out), nil
	}
	return "", fmt.Errorf("%s is not installed (apt-get install e2fsprogs)", name)
}

// copyFile makes dst a copy of src that shares its blocks where the file system can, and keeps its holes elsewhere.
// dst must not exist; after an error it does not.
func copyFile(ctx context.Context, dst, src string, mode fs.FileMode) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	out, err := os.OpenFile(dst, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run()
	u.Push(func() { out.Close(); os.Remove(dst) })
	if unix.IoctlFileClone(int(out.Fd()), int(in.Fd())) != nil {
		if err := copyData(ctx, out, in, fi.Size()); err != nil {
			return err
		}
	}
	if err := out.Close(); err != nil {
		return err
	}
	u.Keep()
	return nil
}

// copyData copies the data of a sparse file and leaves its holes.
func copyData(ctx context.Context, out, in *os.File, size int64) error {
	if err := out.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		if err := ctx.Err(); err != nil {
			return err
		}
		data, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // only a hole is left
			return nil
		}
		hole := size
		if err != nil { // no such thing on this file system
			data = at
		} else if hole, err = unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE); err != nil {
			return &os.PathError{Op: "seek", Path: in.Name(), Err: err}
		}
		if hole > data+(64<<20) { // look at ctx now and then
			hole = data + 64<<20
		}
		if _, err := in.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if _, err := out.Seek(data, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.CopyN(out, in, min(hole, size)-data); err != nil {
			return err
		}
		at = hole
	}
	return nil
}

// TemporaryDisk is a scratch disk in memory, which goes when it is closed.
func TemporaryDisk(ctx context.Context, cache string) (*os.File, error) {
	path, err := blank(ctx, cache, scratchDisk, DefaultDiskSize)
	if err != nil {
		return nil, err
	}
	in, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer in.Close()
	fd, err := unix.MemfdCreate("disk", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	out := os.NewFile(uintptr(fd), "disk")
	if err := copyData(ctx, out, in, DefaultDiskSize); err != nil {
		out.Close()
		return nil, err
	}
	return out, nil
}
