package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"syscall"

	"github.com/docker/go-connections/nat"
)

// maxPorts bounds the published ports of one wire; each is up to two sockets and two goroutines.
const maxPorts = 1024

// Port is a published port.
type Port struct {
	Proto         string     // required; "tcp" or "udp"
	HostIP        netip.Addr // invalid: every address of the host, IPv4 and IPv6
	HostPort      uint16     // zero: a free one
	HostPortEnd   uint16     // zero: HostPort alone, else the first free one from HostPort to HostPortEnd
	ContainerPort uint16     // required
}

// String is the port as docker's -p takes it.
func (p Port) String() string {
	var b strings.Builder
	if p.HostIP.IsValid() {
		b.WriteString(netip.AddrPortFrom(p.HostIP, p.HostPort).String())
	} else {
		b.WriteString(strconv.Itoa(int(p.HostPort)))
	}
	if p.HostPortEnd > p.HostPort {
		b.WriteString("-" + strconv.Itoa(int(p.HostPortEnd)))
	}
	return fmt.Sprintf("%s:%d/%s", b.String(), p.ContainerPort, p.Proto)
}

// Validate says what is wrong with a port.
func (p Port) Validate() error {
	switch {
	case p.Proto != "tcp" && p.Proto != "udp":
		return fmt.Errorf("publish %s: protocol %q is not carried, only tcp and udp", p, p.Proto)
	case p.ContainerPort == 0:
		return fmt.Errorf("publish %s: the container's port is missing", p)
	case p.HostPortEnd != 0 && p.HostPortEnd < p.HostPort:
		return fmt.Errorf("publish %s: the range ends before it begins", p)
	case p.HostIP.Zone() != "":
		return fmt.Errorf("publish %s: an address with a zone is not carried", p)
	}
	return nil
}

// ParsePorts reads the value of docker's -p: [[ADDRESS:]HOST[-HOST]:]CONTAINER[-CONTAINER][/tcp|/udp].
func ParsePorts(s string) ([]Port, error) {
	mappings, err := nat.ParsePortSpec(s)
	if err != nil {
		return nil, fmt.Errorf("parse port %q: %w", s, err)
	}
	if len(mappings) > maxPorts {
		return nil, fmt.Errorf("parse port %q: %d ports are more than the limit of %d", s, len(mappings), maxPorts)
	}
	out := make([]Port, 0, len(mappings))
	for _, m := range mappings {
		p := Port{Proto: m.Port.Proto()}
		n, err := nat.ParsePort(m.Port.Port())
		if err != nil {
			return nil, fmt.Errorf("parse port %q: %w", s, err)
		}
		p.ContainerPort = uint16(n)
		if m.Binding.HostIP != "" {
			if p.HostIP, err = netip.ParseAddr(m.Binding.HostIP); err != nil {
				return nil, fmt.Errorf("parse port %q: %w", s, err)
			}
			p.HostIP = p.HostIP.Unmap()
		}
		if m.Binding.HostPort != "" {
			from, to, err := nat.ParsePortRangeToInt(m.Binding.HostPort)
			if err != nil {
				return nil, fmt.Errorf("parse port %q: %w", s, err)
			}
			p.HostPort = uint16(from)
			if to > from {
				p.HostPortEnd = uint16(to)
			}
		}
		if err := p.Validate(); err != nil {
			return nil, fmt.Errorf("parse port %q: %w", s, err)
		}
		out = append(out, p)
	}
	return out, nil
}

// published is a bound port: one listener (tcp) or one socket (udp).
type published struct {
	Port
	tcp *net.TCPListener
	udp *net.UDPConn
}

func (p published) close() {
	if p.tcp != nil {
		_ = p.tcp.Close()
	}
	if p.udp != nil {
		_ = p.udp.Close()
	}
}

// freePortTries bounds the search for a number that is free in both families.
const freePortTries = 64

// bindPort binds one port: one socket for a named address, one per family for every address.
func bindPort(ctx context.Context, p Port) ([]published, error) {
	addrs := []netip.Addr{p.HostIP}
	if !p.HostIP.IsValid() {
		addrs = []netip.Addr{netip.IPv4Unspecified(), netip.IPv6Unspecified()}
	}
	first, last := int(p.HostPort), int(max(p.HostPort, p.HostPortEnd))
	if first == 0 {
		last = freePortTries // tries, not numbers
	}
	var err error
	for n := first; n <= last; n++ {
		number := uint16(n)
		if first == 0 {
			number = 0
		}
		var out []published
		if out, err = bindAll(ctx, p, addrs, number); err == nil {
			return out, nil
		}
		if !errors.Is(err, syscall.EADDRINUSE) {
			break
		}
	}
	return nil, fmt.Errorf("publish %s: %w%s", p, err, remedy(err, p))
}

// bindAll binds the same number on each address, or nothing.
func bindAll(ctx context.Context, p Port, addrs []netip.Addr, number uint16) (out []published, retErr error) {
	defer func() {
		if retErr != nil {
			for _, b := range out {
				b.close()
			}
			out = nil
		}
	}()
	for _, a := range addrs {
		b, err := bindOne(ctx, p, netip.AddrPortFrom(a, number))
		if err != nil {
			// A host without IPv6 publishes on IPv4 alone, as docker does.
			if len(addrs) > 1 && len(out) > 0 && (errors.Is(err, syscall.EAFNOSUPPORT) || errors.Is(err, syscall.EADDRNOTAVAIL)) {
				continue
			}
			return out, err
		}
		number = b.HostPort
		out = append(out, b)
	}
	return out, nil
}

func bindOne(ctx context.Context, p Port, at netip.AddrPort) (published, error) {
	family := "6" // with this suffix Go sets IPV6_V6ONLY
	if at.Addr().Is4() {
		family = "4"
	}
	var lc net.ListenConfig
	lc.SetMultipathTCP(false) // a plain listener, as docker's
	b := published{Port: Port{Proto: p.Proto, HostIP: at.Addr(), ContainerPort: p.ContainerPort}}
	if p.Proto == "tcp" {
		l, err := lc.Listen(ctx, "tcp"+family, at.String())
		if err != nil {
			return published{}, err
		}
		b.tcp = l.(*net.TCPListener)
		b.HostPort = uint16(l.Addr().(*net.TCPAddr).Port)
		return b, nil
	}
	c, err := lc.ListenPacket(ctx, "udp"+family, at.String())
	if err != nil {
		return published{}, err
	}
	b.udp = c.(*net.UDPConn)
	b.HostPort = uint16(c.LocalAddr().(*net.UDPAddr).Port)
	return b, nil
}

// remedy is what a user can do about a port that cannot be bound.
func remedy(err error, p Port) string {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		flag := "t"
		if p.Proto == "udp" {
			flag = "u"
		}
		if p.HostPortEnd > p.HostPort {
			return " (every port of the range is taken; choose another range)"
		}
		return fmt.Sprintf(" (choose another host port, or free this one; ss -l%snp 'sport = :%d' says who has it)", flag, p.HostPort)
	case errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM):
		return " (choose a host port of 1024 or more, or lower net.ipv4.ip_unprivileged_port_start)"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return " (this host does not have that address; ip address shows those it has)"
	}
	return ""
}
