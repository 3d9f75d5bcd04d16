// Package hostdir mounts directories and files of the host in the guest: 9P over streams of the control channel that
// the host opens, one for each bind mount of the pod.
//
//	dirs := hostdir.New(listener, "/run/kcradle/shares")
//	source, err := dirs.Mount(ctx, 0, placement.Shares[0].File, readOnly) // then bind source into the container
//
// See package share for the host's side.
package hostdir

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/spec"
)

// headerTimeout bounds how long a stream may take to say which mount it serves.
const headerTimeout = 10 * time.Second

// messageSize is the largest 9P message: large reads and writes go in few round trips.
const messageSize = 512 << 10

// Dirs receives the host's streams and mounts them.
type Dirs struct {
	l    net.Listener
	base string
	wg   sync.WaitGroup

	mu      sync.Mutex
	mounted []string         // in order
	streams map[int]net.Conn // arrived, not yet mounted
	changed chan struct{}    // closed and replaced when a stream arrives or the listener ends
	ended   error
}

// New takes streams from a listener on spec.PortShare until it is closed. Mounts are made below base.
func New(l net.Listener, base string) *Dirs {
	d := &Dirs{l: l, base: base, streams: map[int]net.Conn{}, changed: make(chan struct{})}
	d.wg.Go(d.accept)
	return d
}

// Close ends the listener, unmounts everything, which brings what is still to be written to the host, and waits for what
// served the mounts. Nothing may use them any more.
func (d *Dirs) Close() error {
	err := d.l.Close()
	d.mu.Lock()
	for _, dir := range slices.Backward(d.mounted) {
		uerr := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW)
		if uerr == unix.EBUSY { // its stream would never end
			uerr = errors.Join(uerr, unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_FORCE|unix.MNT_DETACH))
		}
		if uerr != nil {
			err = errors.Join(err, &os.PathError{Op: "unmount", Path: dir, Err: uerr})
		}
	}
	d.mounted = nil
	for _, c := range d.streams {
		c.Close()
	}
	clear(d.streams)
	d.mu.Unlock()
	d.wg.Wait()
	return err
}

func (d *Dirs) accept() {
	for {
		c, err := d.l.Accept()
		if err != nil {
			d.mu.Lock()
			d.ended = err
			d.announceLocked()
			d.mu.Unlock()
			return
		}
		d.wg.Go(func() { d.arrive(c) })
	}
}

func (d *Dirs) announceLocked() {
	close(d.changed)
	d.changed = make(chan struct{})
}

func (d *Dirs) arrive(c net.Conn) {
	var h [spec.ShareHeader]byte
	_ = c.SetReadDeadline(time.Now().Add(headerTimeout))
	if _, err := io.ReadFull(c, h[:]); err != nil {
		c.Close()
		return
	}
	_ = c.SetReadDeadline(time.Time{})
	i := int(binary.BigEndian.Uint16(h[:]))
	d.mu.Lock()
	defer d.mu.Unlock()
	if old := d.streams[i]; old != nil {
		old.Close()
	}
	d.streams[i] = c
	d.announceLocked()
}

// take waits for the stream of a mount.
func (d *Dirs) take(ctx context.Context, i int) (net.Conn, error) {
	for {
		d.mu.Lock()
		c, ended, changed := d.streams[i], d.ended, d.changed
		delete(d.streams, i)
		d.mu.Unlock()
		switch {
		case c != nil:
			return c, nil
		case ended != nil:
			return nil, ended
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, fmt.Errorf("the host opened no stream for it: %w", ctx.Err())
		}
	}
}

// Mount mounts what the host serves as bind mount i and returns the path to bind into the container: the mounted
// directory, or the file in it. It waits for the host's stream until ctx ends.
func (d *Dirs) Mount(ctx context.Context, i int, file string, readOnly bool) (source string, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("mount host directory %d: %w", i, err)
		}
	}()
	if file != "" && (filepath.Base(file) != file || file == "." || file == "..") {
		return "", fmt.Errorf("%q is not the name of a file", file)
	}
	dir := filepath.Join(d.base, strconv.Itoa(i))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	c, err := d.take(ctx, i)
	if err != nil {
		return "", err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		c.Close()
		return "", os.NewSyscallError("socketpair", err)
	}
	kernel, ours := os.NewFile(uintptr(pair[0]), "9p"), os.NewFile(uintptr(pair[1]), "9p")
	defer kernel.Close() // the mount holds its own reference
	local, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		c.Close()
		return "", err
	}
	d.wg.Go(func() { splice(local, c) })

	var flags uintptr = unix.MS_NOSUID | unix.MS_NODEV
	if readOnly {
		flags |= unix.MS_RDONLY
	}
	// access=user: each user of the guest attaches as itself, so new files belong to it. cache=mmap: no page of a file
	// is kept beyond its mappings, so what the host changes is seen.
	// noxattr: the server's library answers for an attribute that is not there as for a request that makes no sense, and
	// then the kernel executes no file: it asks for capabilities first.
	options := fmt.Sprintf("trans=fd,rfdno=%d,wfdno=%d,version=9p2000.L,access=user,cache=mmap,noxattr,msize=%d",
		kernel.Fd(), kernel.Fd(), messageSize)
	if err := unix.Mount("host", dir, "9p", flags, options); err != nil {
		local.Close() // ends splice, which closes the stream
		return "", &os.PathError{Op: "mount 9p (" + options + ")", Path: dir, Err: err}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mounted = append(d.mounted, dir)
	return filepath.Join(dir, file), nil
}

// splice copies both ways until either side ends, then closes both.
func splice(a, b net.Conn) {
	var once sync.Once
	end := func() { once.Do(func() { _ = errors.Join(a.Close(), b.Close()) }) }
	defer end()
	var wg sync.WaitGroup
	for _, pair := range [][2]net.Conn{{a, b}, {b, a}} {
		wg.Go(func() {
			defer end()
			_, _ = io.Copy(pair[0], pair[1]) // an ended mount is no error, and the kernel reports its own
		})
	}
	wg.Wait()
}
