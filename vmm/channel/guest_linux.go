package channel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/spec"
)

const (
	portsDirectory   = "/sys/class/virtio-ports"
	devicesDirectory = "/dev"
)

// Open finds the guest's end of the channel: the virtio-serial port named spec.ChannelPortName, which it waits for
// until ctx ends (the kernel announces ports after it has started init), and the vsock device if there is one. /sys and
// /dev must be mounted. log may be nil.
func Open(ctx context.Context, log *slog.Logger) (*Guest, error) {
	f, err := openPort(ctx, spec.ChannelPortName)
	if err != nil {
		return nil, fmt.Errorf("open control channel: %w", err)
	}
	transport := transportSerial
	// Without a device the kernel knows no context id, or says VMADDR_CID_ANY.
	if cid, err := vsock.ContextID(); err == nil && cid > hostCID && cid != unix.VMADDR_CID_ANY {
		transport = transportVsock
	}
	return newGuest(f, transport, log), nil
}

// openPort waits for a port of that name. Uevents are asked for before the first look, so that none is missed.
func openPort(ctx context.Context, name string) (*os.File, error) {
	events, err := uevents()
	if err != nil {
		return nil, err
	}
	defer events.Close()
	stop := context.AfterFunc(ctx, func() { _ = events.SetReadDeadline(past) })
	defer stop()
	buf := make([]byte, 8<<10)
	for {
		f, err := findPort(portsDirectory, devicesDirectory, name)
		if f != nil || err != nil {
			return f, err
		}
		if _, err := events.Read(buf); err != nil && !errors.Is(err, unix.ENOBUFS) {
			if ctx.Err() != nil {
				return nil, fmt.Errorf("wait for virtio-serial port %s: %w", name, context.Cause(ctx))
			}
			return nil, fmt.Errorf("wait for virtio-serial port %s: %w", name, err)
		}
	}
}

// uevents is a netlink socket that becomes readable when the kernel announces a device.
func uevents() (*os.File, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err != nil {
		return nil, os.NewSyscallError("socket uevent", err)
	}
	if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("bind uevent", err)
	}
	return os.NewFile(uintptr(fd), "uevents"), nil
}

// findPort looks for a port by name. It returns nil and no error while there is none.
func findPort(ports, devices, name string) (*os.File, error) {
	entries, err := os.ReadDir(ports)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		// The name comes in a message of its own, after the port.
		got, err := os.ReadFile(filepath.Join(ports, e.Name(), "name"))
		if err != nil || string(bytes.TrimSpace(got)) != name {
			continue
		}
		path := filepath.Join(devices, e.Name())
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		switch {
		case errors.Is(err, unix.ENOENT): // devtmpfs follows
			continue
		case err != nil:
			return nil, &fs.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(fd), path), nil
	}
	return nil, nil
}

// listenVsock listens on AF_VSOCK, for the host alone.
func listenVsock(port uint32) (net.Listener, error) {
	l, err := vsock.Listen(port, nil)
	if err != nil {
		return nil, fmt.Errorf("listen on vsock port %d: %w", port, err)
	}
	return hostOnly{l}, nil
}

type hostOnly struct{ *vsock.Listener }

func (l hostOnly) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if a, ok := c.RemoteAddr().(*vsock.Addr); ok && a.ContextID == hostCID {
			return c, nil
		}
		_ = c.Close()
	}
}
