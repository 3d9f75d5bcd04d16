// Package disk finds a machine's block devices by their serial numbers, cuts those that hold several file systems,
// and mounts what is on them.
//
//	drives, err := disk.Drives()
//	layer, err := disk.Linear("layer0", drives["layers"], offset, length, disk.ReadOnly)
//	err = disk.MountLayer(layer.Path, "/run/layers/0")
//	err = disk.MountWritable(drives["scratch"], "/run/scratch")
package disk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// SectorSize is the unit of the kernel's block layer.
const SectorSize = 512

// Drive is a block device of the machine.
type Drive struct {
	Path string // /dev/vda
}

// Drives maps serial numbers to virtio block devices.
func Drives() (map[string]Drive, error) { return drives("/sys/block", "/dev") }

func drives(sys, dev string) (map[string]Drive, error) {
	entries, err := os.ReadDir(sys)
	if err != nil {
		return nil, fmt.Errorf("list block devices: %w", err)
	}
	out := map[string]Drive{}
	for _, e := range entries {
		name := e.Name()
		if !strings.HasPrefix(name, "vd") {
			continue
		}
		b, err := os.ReadFile(filepath.Join(sys, name, "serial"))
		if err != nil {
			return nil, fmt.Errorf("read the serial number of %s: %w", name, err)
		}
		serial := strings.TrimRight(string(b), "\x00\n ")
		if serial == "" {
			continue
		}
		if other, ok := out[serial]; ok {
			return nil, fmt.Errorf("the drives %s and %s/%s have the same serial number %q", other.Path, dev, name, serial)
		}
		out[serial] = Drive{Path: filepath.Join(dev, name)}
	}
	return out, nil
}

// Find returns the drive of a serial number, or says which ones there are.
func Find(all map[string]Drive, serial string) (Drive, error) {
	if d, ok := all[serial]; ok {
		return d, nil
	}
	var have []string
	for s := range all {
		have = append(have, strconv.Quote(s))
	}
	slices.Sort(have)
	if have == nil {
		have = []string{"none"}
	}
	return Drive{}, fmt.Errorf("the machine has no drive with the serial number %q (it has: %s)", serial, strings.Join(have, ", "))
}

// Access is what may be done with a device of [Linear].
type Access bool

// The kinds of access.
const (
	ReadOnly Access = false
	Writable Access = true
)

// Linear makes a block device of length bytes at offset of a drive, by the device mapper.
func Linear(name string, d Drive, offset, length int64, access Access) (Drive, error) {
	if offset < 0 || length <= 0 || offset%SectorSize != 0 || length%SectorSize != 0 {
		return Drive{}, fmt.Errorf("cut %s out of %s: %d bytes at %d are no whole sectors", name, d.Path, length, offset)
	}
	minor, err := createLinear(name, d.Path, offset/SectorSize, length/SectorSize, access)
	if errors.Is(err, unix.EINVAL) {
		if n, serr := size(d.Path); serr == nil && (offset > n || length > n-offset) {
			err = fmt.Errorf("it does not fit: the drive has %d bytes", n)
		}
	}
	if err != nil {
		return Drive{}, fmt.Errorf("cut %s, %d bytes at %d, out of %s: %w", name, length, offset, d.Path, err)
	}
	return Drive{Path: fmt.Sprintf("/dev/dm-%d", minor)}, nil
}

// size is that of a block device in bytes.
func size(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// Remove takes a device of Linear away.
func Remove(name string) error {
	if err := removeDevice(name); err != nil {
		return fmt.Errorf("remove device %s: %w", name, err)
	}
	return nil
}

// MountLayer mounts an EROFS image.
func MountLayer(dev, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(dev, dir, "erofs", unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount layer %s: %w (is the image damaged? kcradle rmi and pull make it anew)", dev, err)
	}
	return nil
}

// ext4 superblock: at byte 1024 of the device, its magic number at byte 56 of it (Documentation/filesystems/ext4).
const (
	ext4Magic       = 0xef53
	ext4MagicOffset = 1024 + 56
)

// MountWritable mounts an ext4 file system read and write. Its journal is replayed by the mount: no check is needed
// after a crash. Access times are not kept, because each read would become a write; freed blocks are given back to the
// host's sparse file; after an error the file system turns read-only rather than spreading the damage.
func MountWritable(d Drive, dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	// Every block bitmap would be read, or made up, right after the mount, by a thread of the kernel: most are never needed. And
	// a third of the mount would be a list of all blocks that no file may have, against disks that others have damaged.
	err := unix.Mount(d.Path, dir, "ext4", unix.MS_NOATIME, "discard,errors=remount-ro,no_prefetch_block_bitmaps,noblock_validity")
	if err != nil {
		if ok, merr := isExt4(d.Path); merr == nil && !ok {
			return fmt.Errorf("%s holds no ext4 file system; the host makes it when it makes the disk", d.Path)
		}
		return fmt.Errorf("mount %s: %w", d.Path, err)
	}
	return nil
}

// isExt4 looks for the magic number of a superblock.
func isExt4(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var magic [2]byte
	if _, err = f.ReadAt(magic[:], ext4MagicOffset); err != nil && !errors.Is(err, io.EOF) {
		return false, err
	}
	return bytes.Equal(magic[:], []byte{ext4Magic & 0xff, ext4Magic >> 8}), nil
}

// AwaitFree waits until no file system holds a drive any more, which is when all its data is on it: an unmounted file
// system lives on while a namespace that still ends refers to it.
func AwaitFree(d Drive, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for pause := 200 * time.Microsecond; ; pause *= 2 {
		// Exclusive opening of a block device fails while something is mounted from it.
		fd, err := unix.Open(d.Path, unix.O_RDWR|unix.O_EXCL|unix.O_CLOEXEC, 0)
		if err == nil {
			return unix.Close(fd)
		}
		if err != unix.EBUSY || time.Now().After(deadline) {
			return &fs.PathError{Op: "open exclusively", Path: d.Path, Err: err}
		}
		time.Sleep(pause) // the kernel announces the end of a superblock to nobody
	}
}
