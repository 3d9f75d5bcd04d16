// Package share serves a directory or file of the host to a guest as a 9P2000.L file system over one stream of the
// control channel: a bind mount that needs no device, no root and no daemon of its own.
//
//	dir, err := share.Open("/srv/www", share.ReadOnly)
//	go dir.Serve(conn) // until the guest or the machine goes away
//
// The guest is hostile. Every name is resolved one component at a time from a descriptor of its directory, never
// through a symbolic link, so nothing outside the shared tree can be named. Only regular files and directories are
// opened; device nodes can neither be made nor opened. Extended attributes are limited to user.* and POSIX ACLs.
// The number of objects that a guest holds open is bounded.
package share

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync/atomic"

	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"
)

// Mode says what the guest may do.
type Mode int

// Modes of a share; they can be added up.
const (
	ReadWrite    Mode = 0
	ReadOnly     Mode = 1 << 0
	NonRecursive Mode = 1 << 1 // without what is mounted below the directory; needs CAP_SYS_ADMIN
)

// maxObjects bounds the descriptors that one share holds for its guest. Linux keeps one per cached directory entry in
// use, so it is generous; the process's own limit on open files lowers it (see limit).
const maxObjects = 1 << 17

// Share is an opened directory or file of the host.
type Share struct {
	root    *os.File // O_PATH of the shared directory, or of the directory that holds the shared file
	only    string   // name of the shared file in root; empty: the whole directory
	mode    Mode
	objects atomic.Int64
	limit   int64
}

// Open opens a directory or regular file for sharing. The path may lead through symbolic links: it is the owner's word.
// The caller closes the share after the last Serve has returned.
func Open(path string, mode Mode) (*Share, error) {
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return nil, fmt.Errorf("share %s: %w", path, err)
	}
	st, err := os.Stat(real)
	if err != nil {
		return nil, fmt.Errorf("share %s: %w", path, err)
	}
	s := &Share{mode: mode, limit: limit()}
	switch {
	case st.Mode().IsDir():
	case st.Mode().IsRegular():
		real, s.only = filepath.Split(real)
	default:
		return nil, fmt.Errorf("share %s: neither a directory nor a regular file (sockets and devices of the host have no meaning in the guest)", path)
	}
	var fd int
	if mode&NonRecursive != 0 && s.only == "" {
		// A mount of its own, that no path leads to: what is mounted in the other one is not in it.
		fd, err = unix.OpenTree(unix.AT_FDCWD, real, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if errors.Is(err, unix.EPERM) {
			return nil, fmt.Errorf("share %s without what is mounted below it: %w (run as root, or share it with that)", path, err)
		}
	} else {
		fd, err = unix.Open(real, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return nil, fmt.Errorf("share %s: %w", path, &os.PathError{Op: "open", Path: real, Err: err})
	}
	s.root = os.NewFile(uintptr(fd), real)
	return s, nil
}

// limit is half of what the process may open, so that a guest cannot starve its supervisor of descriptors.
func limit() int64 {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil || r.Cur/2 > maxObjects {
		return maxObjects
	}
	return int64(r.Cur / 2)
}

// File is the name of the shared file inside the served directory, empty when a whole directory is shared.
func (s *Share) File() string { return s.only }

// Close releases the share. It may be called twice.
func (s *Share) Close() error {
	if err := s.root.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}

// Serve answers one client until the stream ends, and closes the stream. It returns an error only for a guest that
// broke the protocol before the server saw it.
func (s *Share) Serve(conn io.ReadWriteCloser) error {
	users := &userReader{r: conn}
	err := p9.NewServer(attacher{s}).Handle(users, conn)
	return errors.Join(err, users.err)
}

type attacher struct{ s *Share }

// Attach hands out the crossroads above the tree; see userReader.
func (a attacher) Attach() (p9.File, error) { return &crossroads{s: a.s}, nil }
