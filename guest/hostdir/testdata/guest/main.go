// Command guest is /init of a machine that tries what programs do with a directory of the host, and reports each on
// the control port: a line "ok NAME" or "FAIL NAME: why", at last "end".
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/guest/hostdir"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm/channel"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "guest:", err)
	}
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func run() error {
	for dir, kind := range map[string]string{"/dev": "devtmpfs", "/sys": "sysfs", "/proc": "proc"} {
		if err := errors.Join(os.MkdirAll(dir, 0o755), unix.Mount(kind, dir, kind, 0, "")); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", dir, err)
		}
	}
	g, err := channel.Open(context.Background(), slog.Default())
	if err != nil {
		return err
	}
	shares, err := g.Listen(spec.PortShare)
	if err != nil {
		return err
	}
	control, err := g.Listen(spec.PortControl)
	if err != nil {
		return err
	}
	g.Ready()
	dirs := hostdir.New(shares, "/run/shares")
	report, err := control.Accept()
	if err != nil {
		return err
	}
	defer report.Close()
	for _, c := range checks(dirs) {
		if err := c.try(); err != nil {
			fmt.Fprintf(report, "FAIL %s: %v\n", c.name, err)
		} else {
			fmt.Fprintf(report, "ok %s\n", c.name)
		}
	}
	fmt.Fprintln(report, "end")
	_, err = io.Copy(io.Discard, report) // until the host has read all and leaves
	return err
}

type check struct {
	name string
	try  func() error
}

func checks(dirs *hostdir.Dirs) []check {
	var rw, ro, file string
	mount := func(i int, name string, readOnly bool, path *string) func() error {
		return func() (err error) {
			ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
			defer cancel()
			*path, err = dirs.Mount(ctx, i, name, readOnly)
			return err
		}
	}
	return []check{
		{"mount", mount(0, "", false, &rw)},
		{"mount read-only", mount(1, "", true, &ro)},
		{"mount file", mount(2, "config", false, &file)},
		{"no stream", func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			defer cancel()
			if _, err := dirs.Mount(ctx, 7, "", false); !errors.Is(err, context.DeadlineExceeded) {
				return fmt.Errorf("got %v, want a deadline", err)
			}
			return nil
		}},
		{"read", func() error { return wantContent(rw+"/hello", "hello, guest") }},
		{"large file both ways", func() error {
			b, err := os.ReadFile(rw + "/large")
			if err != nil {
				return err
			}
			sum := sha256.Sum256(b)
			if err := os.WriteFile(rw+"/large.copy", b, 0o644); err != nil {
				return err
			}
			return os.WriteFile(rw+"/large.sum", fmt.Appendf(nil, "%x", sum), 0o644)
		}},
		{"list", func() error {
			l, err := os.ReadDir(rw + "/many")
			if err == nil && len(l) != 2000 {
				err = fmt.Errorf("%d names, want 2000", len(l))
			}
			return err
		}},
		{"create as a user", func() error {
			return as(1234, func() error {
				if err := os.WriteFile(rw+"/open/mine", []byte("x"), 0o640); err != nil {
					return err
				}
				return os.Mkdir(rw+"/open/dir", 0o750)
			})
		}},
		{"permission is checked", func() error {
			return as(1234, func() error {
				if _, err := os.ReadFile(rw + "/secret"); !errors.Is(err, unix.EACCES) {
					return fmt.Errorf("read another user's file: got %v, want EACCES", err)
				}
				return nil
			})
		}},
		{"append", func() error {
			f, err := os.OpenFile(rw+"/appended", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
			if err != nil {
				return err
			}
			_, err = f.WriteString("a")
			_, err2 := f.WriteString("b")
			return errors.Join(err, err2, f.Close(), wantContent(rw+"/appended", "ab"))
		}},
		{"rename, link, symlink", func() error {
			return errors.Join(os.Rename(rw+"/appended", rw+"/renamed"), os.Link(rw+"/renamed", rw+"/linked"),
				os.Symlink("renamed", rw+"/pointer"), wantContent(rw+"/pointer", "ab"), wantContent(rw+"/linked", "ab"))
		}},
		{"directory is not empty", func() error {
			if err := os.Remove(rw + "/many"); !errors.Is(err, unix.ENOTEMPTY) {
				return fmt.Errorf("got %v, want ENOTEMPTY", err)
			}
			return nil
		}},
		{"shared mapping", func() error {
			f, err := os.OpenFile(rw+"/mapped", os.O_CREATE|os.O_RDWR, 0o600)
			if err != nil {
				return err
			}
			defer f.Close()
			if err := f.Truncate(8192); err != nil {
				return err
			}
			m, err := unix.Mmap(int(f.Fd()), 0, 8192, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			if err != nil {
				return err
			}
			copy(m[4096:], "mapped")
			return errors.Join(unix.Msync(m, unix.MS_SYNC), unix.Munmap(m))
		}},
		{"use after unlink", func() error {
			f, err := os.Create(rw + "/gone")
			if err != nil {
				return err
			}
			defer f.Close()
			if err := os.Remove(rw + "/gone"); err != nil {
				return err
			}
			if _, err := f.WriteAt([]byte("still"), 0); err != nil {
				return err
			}
			b := make([]byte, 5)
			if _, err := f.ReadAt(b, 0); err != nil || string(b) != "still" {
				return fmt.Errorf("read %q: %w", b, err)
			}
			return nil
		}},
		{"attributes", func() error {
			return errors.Join(os.Chmod(rw+"/renamed", 0o604), os.Chown(rw+"/renamed", 7, 8),
				os.Chtimes(rw+"/renamed", time.Unix(1e9, 0), time.Unix(1e9, 5)))
		}},
		{"no extended attributes", func() error {
			if err := unix.Setxattr(rw+"/renamed", "user.k", []byte("v"), 0); !errors.Is(err, unix.EOPNOTSUPP) {
				return fmt.Errorf("got %v, want EOPNOTSUPP", err)
			}
			return nil
		}},
		{"no device nodes", func() error {
			if err := unix.Mknod(rw+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); !errors.Is(err, unix.EPERM) {
				return fmt.Errorf("got %v, want EPERM", err)
			}
			return nil
		}},
		{"lock", func() error {
			f, err := os.OpenFile(rw+"/renamed", os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		}},
		{"host's change is seen", func() error {
			for range 1000 {
				b, err := os.ReadFile(rw + "/ping")
				if err != nil {
					return err
				}
				if bytes.Equal(b, []byte("pong")) {
					return os.WriteFile(rw+"/ping", []byte("done"), 0o644)
				}
				// The host answers the file "asked".
				if err := os.WriteFile(rw+"/asked", nil, 0o644); err != nil {
					return err
				}
				time.Sleep(10 * time.Millisecond)
			}
			return errors.New("never")
		}},
		{"read-only", func() error {
			if err := os.WriteFile(ro+"/x", nil, 0o644); !errors.Is(err, unix.EROFS) {
				return fmt.Errorf("got %v, want EROFS", err)
			}
			return wantContent(ro+"/hello", "hello, guest")
		}},
		{"file", func() error {
			l, err := os.ReadDir(filepath.Dir(file))
			if err == nil && len(l) != 1 {
				err = fmt.Errorf("%d names beside the file, want only itself", len(l))
			}
			return errors.Join(err, wantContent(file, "one file"))
		}},
	}
}

func wantContent(path, want string) error {
	b, err := os.ReadFile(path)
	if err == nil && string(b) != want {
		err = fmt.Errorf("%s holds %q, want %q", path, b, want)
	}
	return err
}

// as runs fn with the file system rights of a user, on a thread that ends with it.
func as(uid int, fn func() error) error {
	ch := make(chan error)
	go func() {
		runtime.LockOSThread()
		_, _, e1 := syscall.RawSyscall(unix.SYS_SETRESGID, ^uintptr(0), uintptr(uid), ^uintptr(0))
		_, _, e2 := syscall.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0))
		if e1 != 0 || e2 != 0 {
			ch <- errors.Join(e1, e2)
			return
		}
		ch <- fn()
	}()
	return <-ch
}
