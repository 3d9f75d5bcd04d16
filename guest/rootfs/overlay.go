// Package rootfs makes the file tree a container sees: image layers stacked under a writable directory, the users it
// names, the content its volumes begin with. Every path that an image or a container could have shaped is resolved
// inside that tree.
//
//	err := rootfs.Mount(dir, layers, upper, work)
//	user, err := rootfs.LookupUser(dir, "www-data", nil)
//	err = rootfs.CopyUp(dir, "/var/lib/mysql", volume)
package rootfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Mount stacks layers (directories, oldest first) under upper and mounts the result at dir. work is overlayfs's own and
// lies on the same file system as upper.
func Mount(dir string, layers []string, upper, work string) (err error) {
	fsfd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open overlay file system: %w", err)
	}
	defer unix.Close(fsfd)
	// One call per layer: 127 paths do not fit the page that mount(2) takes. The uppermost comes first.
	for i := len(layers) - 1; i >= 0; i-- {
		if err := unix.FsconfigSetString(fsfd, "lowerdir+", layers[i]); err != nil {
			return complaint(fsfd, "add overlay layer "+layers[i], err)
		}
	}
	for _, o := range [][2]string{{"upperdir", upper}, {"workdir", work}, {"source", "overlay"}} {
		if err := unix.FsconfigSetString(fsfd, o[0], o[1]); err != nil {
			return complaint(fsfd, "set overlay "+o[0]+" "+o[1], err)
		}
	}
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return complaint(fsfd, "create overlay", err)
	}
	mnt, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return complaint(fsfd, "mount overlay", err)
	}
	defer unix.Close(mnt)
	if err := unix.MoveMount(mnt, "", unix.AT_FDCWD, dir, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount overlay at %s: %w", dir, err)
	}
	return nil
}

// complaint adds what the kernel says about a file system that it refused: the descriptor is also a message queue.
func complaint(fsfd int, act string, err error) error {
	buf := make([]byte, 1024)
	var said []string
	for range 8 {
		n, rerr := unix.Read(fsfd, buf)
		if rerr != nil || n == 0 {
			break
		}
		said = append(said, strings.TrimSpace(string(buf[:n])))
	}
	if said == nil {
		return fmt.Errorf("%s: %w", act, err)
	}
	return fmt.Errorf("%s: %w (%s)", act, err, strings.Join(said, "; "))
}

// open opens a path inside root: links and .. lead nowhere else.
func open(root, path string, flags int) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: root, Err: err}
	}
	defer unix.Close(dir)
	return openAt(dir, path, flags)
}

func openAt(dir int, path string, flags int) (*os.File, error) {
	how := &unix.OpenHow{Flags: uint64(flags | unix.O_CLOEXEC), Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	for {
		fd, err := unix.Openat2(dir, path, how)
		if err == unix.EINTR || err == unix.EAGAIN { // something was renamed meanwhile
			continue
		}
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
}

// MkdirAll makes a directory and its parents inside root and opens it.
func MkdirAll(root, path string, mode uint32) (*os.File, error) {
	path = filepath.Clean("/" + path)
	f, err := open(root, path, unix.O_PATH|unix.O_DIRECTORY)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	parent, err := MkdirAll(root, filepath.Dir(path), mode)
	if err != nil {
		return nil, err
	}
	err = unix.Mkdirat(int(parent.Fd()), filepath.Base(path), mode)
	parent.Close()
	if err != nil && err != unix.EEXIST {
		return nil, &fs.PathError{Op: "mkdir", Path: path, Err: err}
	}
	return open(root, path, unix.O_PATH|unix.O_DIRECTORY)
}

// Mountpoint is one thing mounted into a view.
type Mountpoint struct {
	Source, Target string
	File           bool
}

// View mounts a copy of the mount at root on dir, and the sources on their targets in it, so that dir shows what the
// container sees without its own temporary file systems. close takes it away again, at once from names and as soon as
// nobody uses it from the rest.
func View(dir, root string, points []Mountpoint) (close func() error, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount(root, dir, "", unix.MS_BIND, ""); err != nil {
		return nil, fmt.Errorf("bind %s to %s: %w", root, dir, err)
	}
	close = func() error {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
		return os.Remove(dir)
	}
	for _, p := range points {
		if err := attach(dir, p); err != nil {
			return nil, errors.Join(err, close())
		}
	}
	return close, nil
}

func attach(dir string, p Mountpoint) error {
	var target *os.File
	var err error
	if p.File {
		target, err = open(dir, p.Target, unix.O_PATH)
	} else {
		target, err = MkdirAll(dir, p.Target, 0o755)
	}
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a file that the first start will make
		}
		return err
	}
	defer target.Close()
	source, err := unix.OpenTree(unix.AT_FDCWD, p.Source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("copy mount %s: %w", p.Source, err)
	}
	defer unix.Close(source)
	err = unix.MoveMount(source, "", int(target.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("mount %s at %s: %w", p.Source, p.Target, err)
	}
	return nil
}
