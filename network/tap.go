package network

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

const tunDevice = "/dev/net/tun"

func checkDevice(name string) error {
	if name == "" || len(name) >= unix.IFNAMSIZ {
		return fmt.Errorf("device: %q is not an interface name (1 to %d bytes)", name, unix.IFNAMSIZ-1)
	}
	for _, r := range name {
		if r <= ' ' || r == '/' || r == ':' || r >= 0x7f {
			return fmt.Errorf("device: %q is not an interface name", name)
		}
	}
	return nil
}

// tap is the wire over a device that the caller prepared. QEMU gets the open device; nothing of it passes through here.
type tap struct {
	file  *os.File
	guest Guest

	once     sync.Once
	closeErr error
}

var _ Wire = (*tap)(nil)

func openTap(c Config, log *slog.Logger) (Wire, error) {
	iface, err := net.InterfaceByName(c.Device)
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w (make it with: ip tuntap add dev %s mode tap user %s && ip link set %s up)",
			c.Device, err, c.Device, userName(), c.Device)
	}
	if iface.Flags&net.FlagUp == 0 {
		log.Warn("the tap device is down, nothing will pass; ip link set DEVICE up", "device", c.Device)
	}
	file, err := openTapDevice(c.Device)
	if err != nil {
		return nil, err
	}
	if c.MTU == 0 {
		c.MTU = min(max(iface.MTU, MinMTU), MaxMTU)
	}
	g := Guest{
		MAC: c.MAC, MTU: c.MTU, DNS: c.DNS, Search: c.Search,
		Interfaces: []Interface{{MAC: c.MAC, MTU: c.MTU, Addresses: c.Addresses, Gateways: c.Gateways}},
	}
	for _, gw := range c.Gateways { // docker's host-gateway is IPv4 where there is one
		if !g.HostIP.IsValid() || gw.Is4() {
			g.HostIP = gw
		}
	}
	host := readResolvConf(resolvConf)
	if len(g.DNS) == 0 {
		g.DNS = reachable(host)
	}
	if g.Search == nil {
		g.Search = host.search
	}
	return &tap{file: file, guest: g}, nil
}

// reachable are the resolvers of the host that a guest can use. A stub on the host's loopback is of no use to it, so
// the servers behind systemd's stub are taken instead.
func reachable(c resolvers) []netip.Addr {
	usable := func(c resolvers) (out []netip.Addr) {
		for _, s := range c.servers {
			if !s.IsLoopback() && !s.IsUnspecified() && s.Zone() == "" {
				out = append(out, s)
			}
		}
		return out
	}
	if out := usable(c); len(out) > 0 {
		return out
	}
	return usable(readResolvConf("/run/systemd/resolve/resolv.conf"))
}

// openTapDevice attaches to an existing tap device with the header that QEMU's virtio-net wants.
func openTapDevice(name string) (*os.File, error) {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w%s", name, &os.PathError{Op: "open", Path: tunDevice, Err: err}, tapRemedy(err, name))
	}
	for _, flags := range []uint16{
		unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR,
		unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_MULTI_QUEUE, // one queue of a multi-queue device
	} {
		var req *unix.Ifreq
		if req, err = unix.NewIfreq(name); err != nil {
			break
		}
		req.SetUint16(flags)
		if err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req); !errors.Is(err, unix.EINVAL) {
			break
		}
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("tap %s: %w%s", name, os.NewSyscallError("ioctl TUNSETIFF", err), tapRemedy(err, name))
	}
	return os.NewFile(uintptr(fd), tunDevice), nil
}

func tapRemedy(err error, name string) string {
	switch {
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		return fmt.Sprintf(" (it belongs to somebody else; make it yours: ip tuntap add dev %s mode tap user %s)", name, userName())
	case errors.Is(err, unix.EBUSY):
		return " (another process has it open; give each pod its own device)"
	case errors.Is(err, unix.EINVAL):
		return fmt.Sprintf(" (it is no tap device; ip -d link show %s says what it is)", name)
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO):
		return " (this kernel has no tun driver; modprobe tun)"
	}
	return ""
}

// userName is who should own the device, as a shell takes it.
func userName() string {
	if name := os.Getenv("USER"); name != "" {
		return name
	}
	return fmt.Sprint(os.Geteuid())
}

func (t *tap) File() *os.File { return t.file }
func (t *tap) Guest() Guest   { return t.guest }
func (t *tap) Ports() []Port  { return nil }
func (t *tap) Close() error   { return t.CloseFile() }

func (t *tap) SetSegments([]Segment) error { return errNotShared }

func (t *tap) CloseFile() error {
	t.once.Do(func() { t.closeErr = t.file.Close() })
	return t.closeErr
}

func (t *tap) Netdev(id string, fd int) string {
	return fmt.Sprintf("tap,id=%s,fd=%d,vhost=off", id, fd)
}
