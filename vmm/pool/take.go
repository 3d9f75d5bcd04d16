package pool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxFiles bounds what comes beside a message.
const maxFiles = 32

// ErrNoPool says that no pool runs there.
var ErrNoPool = errors.New("no pool runs")

// Listen makes a pool's socket, for this user alone. The caller must be the only pool there.
func Listen(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("pool: %w", err)
	}
	var l *net.UnixListener
	err := inDirectory(path, func(short string) (err error) {
		old := unix.Umask(0o177)
		defer unix.Umask(old)
		l, err = net.ListenUnix("unixpacket", &net.UnixAddr{Name: short, Net: "unixpacket"})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("pool: listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	return l, nil
}

// inDirectory calls f with a name of path that is short enough for a socket.
func inDirectory(path string, f func(short string) error) error {
	d, err := os.OpenFile(filepath.Dir(path), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer d.Close()
	return f("/proc/self/fd/" + strconv.Itoa(int(d.Fd())) + "/" + filepath.Base(path))
}

// Take asks the pool behind a socket for a machine. ErrNoPool and ErrNone are no failures: there is none to be had.
func Take(ctx context.Context, socket string, r Request) (Taken, error) {
	c, a, files, err := ask(ctx, socket, r)
	if err != nil {
		return Taken{}, err
	}
	if a.Machine == nil {
		c.Close()
		for _, f := range files {
			f.Close()
		}
		return Taken{}, ErrNone
	}
	t := Taken{Machine: a.Machine, pool: c}
	if a.Wire {
		if len(files) == 0 {
			c.Close()
			return Taken{}, errors.New("pool: the wire did not come with the machine")
		}
		t.Wire, files = files[len(files)-1], files[:len(files)-1]
	}
	t.Machine.Files = files
	return t, nil
}

// Ask asks a pool for its state.
func Ask(ctx context.Context, socket string) (Status, error) {
	c, a, files, err := ask(ctx, socket, Request{Status: true})
	if err == nil {
		c.Close()
	}
	for _, f := range files {
		f.Close()
	}
	if err == nil && a.Status == nil {
		err = errors.New("pool: it gave no state")
	}
	if err != nil {
		return Status{}, err
	}
	return *a.Status, nil
}

// ask sends a request and returns the answer, and the connection that it came over.
func ask(ctx context.Context, socket string, r Request) (c *net.UnixConn, a answer, files []*os.File, err error) {
	err = inDirectory(socket, func(short string) error {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unixpacket", short)
		if err == nil {
			c = conn.(*net.UnixConn)
		}
		return err
	})
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, a, nil, ErrNoPool
	}
	if err != nil {
		return nil, a, nil, fmt.Errorf("pool: %w", err)
	}
	if a, files, err = exchange(ctx, c, r); err != nil {
		c.Close()
		for _, f := range files {
			f.Close()
		}
		return nil, a, nil, fmt.Errorf("ask the pool: %w", err)
	}
	return c, a, files, nil
}

func exchange(ctx context.Context, c *net.UnixConn, r Request) (a answer, files []*os.File, err error) {
	if err := sameUser(c); err != nil {
		return a, nil, err
	}
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return a, nil, err
	}
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	b, err := json.Marshal(r)
	if err == nil {
		_, err = c.Write(b)
	}
	if err != nil {
		return a, nil, err
	}
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf, oob) // the descriptors are closed on exec
	if err != nil {
		return a, nil, err
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return a, nil, err
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // credentials and others
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "of the pool"))
		}
	}
	switch {
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		return a, files, errors.New("its answer was cut")
	case n == 0:
		return a, files, errors.New("it gave no answer")
	}
	return a, files, json.Unmarshal(buf[:n], &a)
}
