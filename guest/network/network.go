// Package network sets up a pod's wire as the placement assigns it: interfaces found by MAC address, renamed, addressed,
// routed, and the files that programs read about names.
//
//	err := network.Loopback()
//	wire, err := network.Up(placement.Network)
//	defer wire.Down()
//	hosts := network.Hosts(pod, placement.Network)
package network

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/spec"
)

// Wire is the pod's wire.
type Wire struct {
	nic       int // index of the machine's device; 0: not looked for yet
	now       spec.Network
	forwarder *forwarder // nil: none
}

// Up brings up the interfaces of n. There is no DHCP and no duplicate address detection: the addresses are
// assigned, and waiting would delay every start by a second.
func Up(n *spec.Network) (*Wire, error) {
	w := &Wire{now: *n}
	if len(n.Interfaces) > 0 {
		links, err := net.Interfaces()
		if err != nil {
			return nil, fmt.Errorf("list network interfaces: %w", err)
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return nil, fmt.Errorf("open netlink: %w", err)
		}
		defer h.Close()
		for i := range n.Interfaces {
			if err := w.up(h, links, &n.Interfaces[i]); err != nil {
				return nil, fmt.Errorf("set up network interface %s: %w", n.Interfaces[i].Name, err)
			}
		}
	}
	return w, w.forward(n)
}

// Change makes the wire what n says. Interfaces that stay are not touched.
func (w *Wire) Change(n *spec.Network) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("open netlink: %w", err)
	}
	defer h.Close()
	if w.nic == 0 && len(n.Interfaces) > 0 {
		if w.nic, err = theDevice(h); err != nil {
			return err
		}
	}
	stays := func(in []spec.Interface, i spec.Interface) bool {
		return slices.ContainsFunc(in, func(o spec.Interface) bool {
			return o.Name == i.Name && o.Tag == i.Tag && o.MAC == i.MAC && o.MTU == i.MTU && slices.Equal(o.Addresses, i.Addresses)
		})
	}
	for _, i := range w.now.Interfaces {
		if err := w.routes(h, i, nil); err != nil {
			return err
		}
		if stays(n.Interfaces, i) {
			continue
		}
		if err := w.down(h, i); err != nil {
			return fmt.Errorf("take down network interface %s: %w", i.Name, err)
		}
	}
	for _, i := range n.Interfaces {
		if stays(w.now.Interfaces, i) {
			if err := w.routes(h, i, i.Gateways); err != nil {
				return err
			}
			continue
		}
		links, err := net.Interfaces()
		if err != nil {
			return fmt.Errorf("list network interfaces: %w", err)
		}
		if err := w.up(h, links, &i); err != nil {
			return fmt.Errorf("set up network interface %s: %w", i.Name, err)
		}
	}
	w.now = *n
	return w.forward(n)
}

// theDevice is the machine's only network device; what the pod may have made are devices of other kinds.
func theDevice(h *netlink.Handle) (int, error) {
	links, err := h.LinkList()
	if err != nil {
		return 0, fmt.Errorf("list network interfaces: %w", err)
	}
	for _, l := range links {
		if l.Type() == "device" && l.Attrs().Flags&net.FlagLoopback == 0 {
			return l.Attrs().Index, nil
		}
	}
	return 0, errors.New("the machine has no network device")
}

// Loopback brings up loopback. It takes one call, and the kernel then gives it its addresses. Netlink would cost an emulated
// machine 25 ms: many do not need it for anything else.
func Loopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	lo.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("set loopback up: %w", err)
	}
	return nil
}

func (w *Wire) up(h *netlink.Handle, links []net.Interface, want *spec.Interface) error {
	mac, err := net.ParseMAC(want.MAC)
	if err != nil {
		return err
	}
	if want.Tag != 0 {
		if links, err = w.tagged(h, want, mac); err != nil {
			return err
		}
	}
	have, err := w.find(links, mac, want.Tag)
	if err != nil {
		return err
	}
	link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: have.Index}} // what it is in full, nobody asks for
	sameMAC := bytes.Equal(have.HardwareAddr, mac)
	if have.Flags&net.FlagUp != 0 && (have.Name != want.Name || !sameMAC) {
		if err := h.LinkSetDown(link); err != nil {
			return fmt.Errorf("set down: %w", err)
		}
	}
	if !sameMAC {
		if err := h.LinkSetHardwareAddr(link, mac); err != nil {
			return fmt.Errorf("set MAC address %s: %w", want.MAC, err)
		}
	}
	if have.Name != want.Name {
		if err := h.LinkSetName(link, want.Name); err != nil {
			return fmt.Errorf("rename %s: %w", have.Name, err)
		}
	}
	if want.MTU != 0 && want.MTU != have.MTU {
		if err := h.LinkSetMTU(link, want.MTU); err != nil {
			return fmt.Errorf("set MTU %d: %w", want.MTU, err)
		}
	}
	var six bool
	for _, a := range want.Addresses {
		prefix, err := netip.ParsePrefix(a)
		if err != nil {
			return err
		}
		six = six || prefix.Addr().Is6()
		addr := &netlink.Addr{IPNet: &net.IPNet{
			IP:   prefix.Addr().AsSlice(),
			Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen()),
		}}
		if prefix.Addr().Is6() {
			addr.Flags = unix.IFA_F_NODAD
		}
		if err := h.AddrAdd(link, addr); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("add address %s: %w", a, err)
		}
	}
	if six {
		// Neither the link-local address nor router advertisements: what the pod has is what it was assigned.
		for _, s := range [][2]string{{"accept_dad", "0"}, {"accept_ra", "0"}} {
			file := "/proc/sys/net/ipv6/conf/" + want.Name + "/" + s[0]
			if err := os.WriteFile(file, []byte(s[1]), 0); err != nil {
				return err
			}
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	for _, g := range want.Gateways {
		r, err := defaultRoute(have.Index, g)
		if err != nil {
			return err
		}
		if err := h.RouteReplace(r); err != nil {
			return fmt.Errorf("add route by %s: %w", g, err)
		}
	}
	return nil
}

func defaultRoute(index int, gateway string) (*netlink.Route, error) {
	gw, err := netip.ParseAddr(gateway)
	if err != nil {
		return nil, err
	}
	bits := 32
	if gw.Is6() {
		bits = 128
	}
	return &netlink.Route{LinkIndex: index, Dst: &net.IPNet{IP: make(net.IP, bits/8), Mask: net.CIDRMask(0, bits)}, Gw: gw.AsSlice()}, nil
}

// routes makes the default routes by an interface those given.
func (w *Wire) routes(h *netlink.Handle, i spec.Interface, gateways []string) error {
	link, err := h.LinkByName(i.Name)
	if err != nil {
		return fmt.Errorf("find network interface %s: %w", i.Name, err)
	}
	for _, g := range i.Gateways {
		r, err := defaultRoute(link.Attrs().Index, g)
		if err != nil {
			return err
		}
		if slices.Contains(gateways, g) {
			err = h.RouteReplace(r)
		} else if err = h.RouteDel(r); errors.Is(err, unix.ESRCH) { // the pod has removed it
			err = nil
		}
		if err != nil {
			return fmt.Errorf("change the route by %s: %w", g, err)
		}
	}
	return nil
}

// tagged makes the device of a tag on the machine's.
func (w *Wire) tagged(h *netlink.Handle, want *spec.Interface, mac net.HardwareAddr) ([]net.Interface, error) {
	if w.nic == 0 {
		var err error
		if w.nic, err = theDevice(h); err != nil {
			return nil, err
		}
	}
	if err := h.LinkSetUp(&netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: w.nic}}); err != nil {
		return nil, fmt.Errorf("set up the machine's device: %w", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.ParentIndex, attrs.HardwareAddr, attrs.MTU = want.Name, w.nic, mac, want.MTU
	if err := h.LinkAdd(&netlink.Vlan{LinkAttrs: attrs, VlanId: want.Tag, VlanProtocol: netlink.VLAN_PROTOCOL_8021Q}); err != nil {
		return nil, fmt.Errorf("make it: %w", err)
	}
	made, err := net.InterfaceByName(want.Name)
	if err != nil {
		return nil, err
	}
	return []net.Interface{*made}, nil
}

// down takes an interface away. The machine's own device stays up: others are made on top of it.
func (w *Wire) down(h *netlink.Handle, i spec.Interface) error {
	if i.Tag != 0 {
		link, err := h.LinkByName(i.Name)
		if err != nil {
			return err
		}
		return h.LinkDel(link)
	}
	link, err := h.LinkByIndex(w.nic)
	if err != nil {
		return err
	}
	addrs, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, a := range addrs {
		if err := h.AddrDel(link, &a); err != nil {
			return fmt.Errorf("remove address %s: %w", a.IPNet, err)
		}
	}
	return nil
}

// find returns the interface of a MAC address. In a machine that was made from a template the address is still that of the
// template: its only wire is meant then.
func (w *Wire) find(links []net.Interface, mac net.HardwareAddr, tag int) (found net.Interface, err error) {
	defer func() {
		if err == nil && tag == 0 {
			w.nic = found.Index
		}
	}()
	var wires []net.Interface
	for _, l := range links {
		switch {
		case tag == 0 && w.nic != 0 && l.Index != w.nic:
		case bytes.Equal(l.HardwareAddr, mac) || w.nic != 0 && l.Index == w.nic:
			return l, nil
		case len(l.HardwareAddr) == len(mac) && !bytes.Equal(l.HardwareAddr, make([]byte, len(mac))): // the kernel's own have none
			wires = append(wires, l)
		}
	}
	if len(wires) != 1 {
		return net.Interface{}, fmt.Errorf("the machine has no interface with the MAC address %s", mac)
	}
	return wires[0], nil
}

// Down takes everything back that Up did, but for names, MAC addresses and the size of packets. A nil Wire is one that is down.
func (w *Wire) Down() error {
	if w == nil {
		return nil
	}
	w.forwarder.close()
	links, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list network interfaces: %w", err)
	}
	var errs []error
	for _, l := range links {
		if l.Flags&net.FlagUp == 0 || l.Flags&net.FlagLoopback != 0 {
			continue
		}
		link := &netlink.Device{LinkAttrs: netlink.LinkAttrs{Index: l.Index}}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V4) // those of IPv6 and the routes go with the interface's state
		errs = append(errs, err, netlink.LinkSetDown(link))
		for _, a := range addrs {
			errs = append(errs, netlink.AddrDel(link, &a))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("take the network down: %w", err)
	}
	return nil
}

// HostName is the pod's host name.
func HostName(p *spec.Pod) string {
	if p.Hostname != "" {
		return p.Hostname
	}
	return p.Name
}

// Hosts is /etc/hosts as docker writes it.
func Hosts(p *spec.Pod, n *spec.Network) (string, error) {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n" +
		"::1\tlocalhost ip6-localhost ip6-loopback\n" +
		"fe00::\tip6-localnet\n" +
		"ff00::\tip6-mcastprefix\n" +
		"ff02::1\tip6-allnodes\n" +
		"ff02::2\tip6-allrouters\n")
	var asked bool
	for _, h := range p.ExtraHosts {
		asked = asked || h.Name == "host.docker.internal"
		addr := h.Address
		if addr == spec.HostGateway {
			if n.HostIP == "" {
				return "", fmt.Errorf("extra host %s: this network has no address for the host", h.Name)
			}
			addr = n.HostIP
		}
		if _, err := netip.ParseAddr(addr); err != nil || strings.ContainsAny(h.Name, " \t\n") {
			return "", fmt.Errorf("extra host %q: %q is no address", h.Name, addr)
		}
		fmt.Fprintf(&b, "%s\t%s\n", addr, h.Name)
	}
	if n.HostIP != "" && !asked {
		fmt.Fprintf(&b, "%s\thost.docker.internal\n", n.HostIP)
	}
	lines, err := HostLines(p, n)
	if err != nil {
		return "", err
	}
	for _, l := range lines {
		b.WriteString(l + "\n")
	}
	return b.String(), nil
}

// HostLines are the lines of /etc/hosts about the pod's own addresses.
func HostLines(p *spec.Pod, n *spec.Network) (lines []string, err error) {
	names := HostName(p)
	if p.Domain != "" {
		names = names + "." + p.Domain + " " + names
	}
	for _, i := range n.Interfaces {
		for _, a := range i.Addresses {
			prefix, err := netip.ParsePrefix(a)
			if err != nil {
				return nil, err
			}
			lines = append(lines, fmt.Sprintf("%s\t%s", prefix.Addr(), names))
		}
	}
	return lines, nil
}

// ResolvConf is /etc/resolv.conf: what the pod's owner asked for, else what the host assigned.
func ResolvConf(p *spec.Pod, n *spec.Network) (string, error) {
	servers, search, options := p.DNS, p.DNSSearch, p.DNSOptions
	switch {
	case n.Resolver:
		servers = []string{spec.ResolverAddress}
		if !slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "ndots:") }) {
			options = append(slices.Clone(options), "ndots:0") // names without a dot are those of other pods
		}
	case len(servers) == 0:
		servers = n.DNS
	}
	if len(search) == 0 {
		search = n.DNSSearch
	}
	var b strings.Builder
	for _, s := range servers {
		if _, err := netip.ParseAddr(s); err != nil {
			return "", fmt.Errorf("nameserver: %w", err)
		}
		b.WriteString("nameserver " + s + "\n")
	}
	if len(search) > 0 && !(len(search) == 1 && search[0] == ".") {
		b.WriteString("search " + strings.Join(search, " ") + "\n")
	}
	if len(options) > 0 {
		b.WriteString("options " + strings.Join(options, " ") + "\n")
	}
	return b.String(), nil
}
