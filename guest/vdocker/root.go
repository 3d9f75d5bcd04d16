package vdocker

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// inRoot calls f with dir as its root directory, on a thread of its own that ends with it. No path that f opens leaves
// dir, whatever links the container made. What f starts runs elsewhere and sees the machine's own root.
func inRoot(dir string, f func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		return chroot(dir, f)
	})
}

// inImageRoot is inRoot without what is mounted in dir: the tree that the image and the container made, with empty
// directories and files where volumes and the like are mounted.
func inImageRoot(dir string, f func() error) error {
	return onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		// The private namespace goes with the thread, and the mount on dir with it.
		if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
			return &os.PathError{Op: "make private", Path: "/", Err: err}
		}
		if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
			return &os.PathError{Op: "bind", Path: dir, Err: err}
		}
		return chroot(dir, f)
	})
}

func chroot(dir string, f func() error) error {
	if err := unix.Chroot(dir); err != nil {
		return &os.PathError{Op: "chroot", Path: dir, Err: err}
	}
	if err := unix.Chdir("/"); err != nil {
		return &os.PathError{Op: "chdir", Path: "/", Err: err}
	}
	return f()
}

// onThread runs f on a thread that nothing else ever runs on.
func onThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The first thread is what /proc/self shows and cannot end. It stays locked here until another has done it.
			done <- onThread(f)
			runtime.UnlockOSThread()
			return
		}
		done <- f()
	}()
	return <-done
}

// maxLinks bounds the symbolic links followed in one path, the kernel's own limit.
const maxLinks = 40

// follow resolves every link in an absolute path, as the kernel would; what does not exist is kept as it is written.
func follow(path string) (string, error) {
	rest := strings.Split(path, "/")
	done := "/"
	for links := 0; len(rest) > 0; {
		part := rest[0]
		rest = rest[1:]
		next := filepath.Join(done, part) // "..", too: done holds no links
		if part == "" || part == "." || next == done {
			continue
		}
		target, err := os.Readlink(next)
		switch {
		case errors.Is(err, syscall.EINVAL), errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
			done = next
		case err != nil:
			return "", err
		default:
			if links++; links > maxLinks {
				return "", &os.PathError{Op: "follow", Path: path, Err: syscall.ELOOP}
			}
			if strings.HasPrefix(target, "/") {
				done = "/"
			}
			rest = append(strings.Split(target, "/"), rest...)
		}
	}
	return done, nil
}
