package image

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// lockPoll is how often a waiting process asks again. flock(2) has no wait that a context could end.
const lockPoll = 20 * time.Millisecond

// fileLock is an flock on a file that lives for the lock's sake. The kernel lets it go when the process dies.
type fileLock struct{ f *os.File }

// lockFile takes the exclusive lock of a file, waiting as long as ctx allows. onWait is called once if it has to wait.
func lockFile(ctx context.Context, path string, onWait func()) (*fileLock, error) {
	for waited := false; ; waited = true {
		l, err := tryLockFile(path)
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, err
		}
		if !waited && onWait != nil {
			onWait()
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lock %s: %w", path, context.Cause(ctx))
		case <-time.After(lockPoll):
		}
	}
}

// tryLockFile takes the lock at once or fails with EWOULDBLOCK.
func tryLockFile(path string) (*fileLock, error) {
	for {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return nil, err
		}
		if err := flock(f); err != nil {
			f.Close()
			return nil, err
		}
		// Whoever held the lock before may have removed the file: then this lock guards nothing.
		var mine, there unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &mine); err != nil {
			f.Close()
			return nil, os.NewSyscallError("fstat", err)
		}
		if err := unix.Stat(path, &there); err == nil && mine.Ino == there.Ino && mine.Dev == there.Dev {
			return &fileLock{f: f}, nil
		}
		f.Close()
	}
}

func flock(f *os.File) error {
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EINTR) {
			return &os.PathError{Op: "flock", Path: f.Name(), Err: err}
		}
	}
}

// remove takes the lock's file away while the lock is held.
func (l *fileLock) remove() error { return os.Remove(l.f.Name()) }

// unlock lets the lock go. It may be called twice.
func (l *fileLock) unlock() { l.f.Close() }
