package bundle

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const lockFile = "lock"

// Lock is held by the one supervisor of a bundle. It goes with the process that holds it, however that ends.
type Lock struct{ f *os.File }

// Lock takes the bundle for this process. ErrRunning (wrapped, with the pid) when another holds it.
func (b *Bundle) Lock() (*Lock, error) {
	l, err := b.take()
	if err != nil {
		return nil, err
	}
	if err := l.f.Truncate(0); err == nil {
		_, err = l.f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
		if err != nil {
			l.f.Close()
			return nil, fmt.Errorf("lock bundle: %w", err)
		}
	}
	return l, nil
}

// take is Lock without a process ID for others to read.
func (b *Bundle) take() (*Lock, error) {
	if err := os.MkdirAll(b.RunDir(), 0o700); err != nil {
		return nil, fmt.Errorf("lock bundle: %w", readOnlyHint(err))
	}
	f, err := os.OpenFile(filepath.Join(b.RunDir(), lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock bundle: %w", readOnlyHint(err))
	}
	// Open file description locks: they can be looked at without being taken, and end with the descriptor.
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("bundle %s %w (pid %s)", b.Dir, ErrRunning, pidOf(f))
		}
		return nil, fmt.Errorf("lock bundle: %w", &os.PathError{Op: "fcntl", Path: f.Name(), Err: err})
	}
	return &Lock{f}, nil
}

// Unlock gives the bundle back. It may be called twice.
func (l *Lock) Unlock() error { return l.f.Close() }

// Running reports whether a supervisor holds the bundle, and its pid.
func (b *Bundle) Running() (pid int, running bool) {
	f, err := os.Open(filepath.Join(b.RunDir(), lockFile))
	if err != nil {
		return 0, false
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_RDLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil || l.Type == unix.F_UNLCK {
		return 0, false
	}
	pid, _ = strconv.Atoi(pidOf(f))
	return pid, true
}

// Kill kills the supervisor of a bundle that runs, and its machine with it. It is for a supervisor that does not answer.
func (b *Bundle) Kill() error {
	pid, running := b.Running()
	if !running {
		return nil
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("kill the supervisor (pid %d) of %s: %w", pid, b.Dir, err)
	}
	defer unix.Close(fd)
	if again, running := b.Running(); !running || again != pid { // the number may be somebody else's by now
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill the supervisor (pid %d) of %s: %w", pid, b.Dir, err)
	}
	return nil
}

// pidOf reads what Lock wrote.
func pidOf(f *os.File) string {
	text := make([]byte, 32)
	n, _ := f.ReadAt(text, 0)
	return strings.TrimSpace(string(text[:n]))
}

func readOnlyHint(err error) error {
	if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w (a bundle must be writable to run: copy it to a writable place)", err)
	}
	return err
}
