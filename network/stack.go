package network

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv6"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/tcpip/transport/udp"
)

const nic = 1

// TCP buffers of one flow. The link has no delay to speak of, so little is enough; the sizes fall with the number of
// flows (see flowBuffer) to bound what a guest can make this process hold.
const (
	tcpBuffer    = 256 << 10
	tcpBufferMax = 512 << 10
)

// netstack terminates the guest's traffic and carries it on with sockets of the host.
//
// Frames are sorted here: ARP, neighbour discovery and ICMP are answered in icmp.go, TCP and UDP pass through gVisor's
// stack (reassembly, fragmentation, all of TCP) to the handlers of tcp.go and udp.go. The stack has no address of its
// own: it takes packets to any address and answers from any.
type netstack struct {
	stackConfig
	limits limits
	stack  *stack.Stack

	machine context.Context // done when the machine is gone; a signal to many, not the context of a call

	dial func(ctx context.Context, network, address string) (net.Conn, error)

	flows   slots
	carried tally // flows that carry bytes
	syns    synTable
	udp     udpTable
	echo    echoTable
	queries slots
	full    seldom
}

// stackConfig is what a stack is made from.
type stackConfig struct {
	plan     plan
	noHost   bool
	internal bool // nothing beyond the network is reached
	link     *link
	dns      *resolver
	gate     *gate
	log      *slog.Logger
	born     time.Time // when the machine got its wire
}

// newNetstack makes a stack. Flows are aborted when ctx is done; when machine is, which is before that, they bring to
// its end what the guest had sent.
func newNetstack(ctx, machine context.Context, c stackConfig) *netstack {
	var d net.Dialer
	n := &netstack{stackConfig: c, limits: newLimits(), machine: machine, dial: d.DialContext}
	n.flows = make(slots, n.limits.tcp)
	n.queries = make(slots, n.limits.queries)
	n.udp.max = n.limits.udp
	n.echo.max = n.limits.echo

	n.stack = stack.New(stack.Options{
		NetworkProtocols:   []stack.NetworkProtocolFactory{ipv4.NewProtocol, ipv6.NewProtocol},
		TransportProtocols: []stack.TransportProtocolFactory{tcp.NewProtocolCUBIC, udp.NewProtocol},
	})
	// None of these can fail with constant arguments; a failure is a mistake in this package.
	must := func(err tcpip.Error) {
		if err != nil {
			panic("network: internal error: " + err.String())
		}
	}
	receive := tcpip.TCPReceiveBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBuffer, Max: tcpBufferMax}
	must(n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &receive))
	send := tcpip.TCPSendBufferSizeRangeOption{Min: tcp.MinBufferSize, Default: tcpBuffer, Max: tcpBufferMax}
	must(n.stack.SetTransportProtocolOption(tcp.ProtocolNumber, &send))
	must(n.stack.CreateNIC(nic, n.link))
	must(n.stack.SetPromiscuousMode(nic, true))
	must(n.stack.SetSpoofing(nic, true))
	n.stack.SetRouteTable([]tcpip.Route{
		{Destination: header.IPv4EmptySubnet, NIC: nic},
		{Destination: header.IPv6EmptySubnet, NIC: nic},
	})
	forwarder := tcp.NewForwarder(n.stack, tcpBuffer, n.limits.tcp, func(r *tcp.ForwarderRequest) { n.forwardTCP(ctx, r) })
	n.stack.SetTransportProtocolHandler(tcp.ProtocolNumber, func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		n.syns.note(id, pkt, n.limits.tcp)
		return forwarder.HandlePacket(id, pkt)
	})
	n.stack.SetTransportProtocolHandler(udp.ProtocolNumber, func(id stack.TransportEndpointID, pkt *stack.PacketBuffer) bool {
		n.forwardUDP(ctx, id, pkt)
		return true
	})
	context.AfterFunc(ctx, func() {
		n.udp.close()
		n.echo.close()
	})
	return n
}

// gatewayMAC is an address that differs from the guest's.
func gatewayMAC(guest net.HardwareAddr) net.HardwareAddr {
	mac := net.HardwareAddr{0x02, 0x6b, 0x63, 0x72, 0x64, 0x01}
	if macBits(mac) == macBits(guest) {
		mac[5]++
	}
	return mac
}

// close ends the stack. The context must be done and the connection to QEMU closed.
func (n *netstack) close() {
	n.udp.close()
	n.echo.close()
	n.stack.Close()
	n.gate.wait() // flows end now, and no new one begins
	n.stack.Wait()
}

// deliver takes one Ethernet frame of the guest. It is called by one goroutine.
func (n *netstack) deliver(frame []byte) {
	if len(frame) < header.EthernetMinimumSize || len(frame) > header.EthernetMinimumSize+int(n.link.mtu) {
		return
	}
	eth, packet := frame[:header.EthernetMinimumSize], frame[header.EthernetMinimumSize:]
	if eth[0]&1 == 0 && [6]byte(eth[:6]) != n.link.mac {
		return // to nobody on this link
	}
	switch proto := header.Ethernet(eth).Type(); proto {
	case header.ARPProtocolNumber:
		n.handleARP(eth, packet)
	case header.IPv4ProtocolNumber:
		ip := header.IPv4(packet)
		if !ip.IsValid(len(packet)) {
			return
		}
		src, dst := address(ip.SourceAddress()), address(ip.DestinationAddress())
		if !n.plan.net4.Contains(src) || !unicast(dst) || src == n.plan.gateway4 || src == n.plan.host4 {
			return
		}
		if src == n.plan.guest4 {
			n.link.guest.Store(macBits(eth[6:]))
		}
		switch ip.TransportProtocol() {
		case header.TCPProtocolNumber, header.UDPProtocolNumber:
			n.inject(proto, packet[:ip.TotalLength()])
		case header.ICMPv4ProtocolNumber:
			if !ip.More() && ip.FragmentOffset() == 0 {
				n.handleICMP4(src, dst, packet[ip.HeaderLength():ip.TotalLength()])
			}
		}
	case header.IPv6ProtocolNumber:
		ip := header.IPv6(packet)
		if !ip.IsValid(len(packet)) {
			return
		}
		packet = packet[:header.IPv6MinimumSize+int(ip.PayloadLength())]
		src, dst := address(ip.SourceAddress()), address(ip.DestinationAddress())
		if ip.TransportProtocol() == header.ICMPv6ProtocolNumber && isSolicit(packet[header.IPv6MinimumSize:]) {
			n.handleSolicit(eth, ip, packet[header.IPv6MinimumSize:])
			return
		}
		if !n.plan.net6.Contains(src) || !unicast(dst) || src == n.plan.gateway6 || src == n.plan.host6 {
			return
		}
		if src == n.plan.guest6 {
			n.link.guest.Store(macBits(eth[6:]))
		}
		switch tcpip.TransportProtocolNumber(ip.NextHeader()) {
		case header.TCPProtocolNumber, header.UDPProtocolNumber, tcpip.TransportProtocolNumber(header.IPv6FragmentHeader):
			n.inject(proto, packet)
		case header.ICMPv6ProtocolNumber:
			n.handleICMP6(src, dst, packet[header.IPv6MinimumSize:])
		}
	}
}

// inject hands a packet to gVisor's stack.
func (n *netstack) inject(proto tcpip.NetworkProtocolNumber, packet []byte) {
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{Payload: buffer.MakeWithData(packet)})
	pkt.RXChecksumValidated = true
	n.link.dispatcher.DeliverNetworkPacket(proto, pkt)
	pkt.DecRef()
}

func (n *netstack) isGateway(a netip.Addr) bool { return a == n.plan.gateway4 || a == n.plan.gateway6 }

// isHost says whether an address stands for the host, for whoever may reach it.
func (n *netstack) isHost(a netip.Addr) bool {
	return !n.noHost && !n.internal && (a == n.plan.host4 || a == n.plan.host6)
}

// target is where traffic to dst really goes. The error is what a socket would say of such a destination.
func (n *netstack) target(dst netip.Addr) (netip.Addr, error) {
	switch {
	case n.internal:
		return netip.Addr{}, syscall.ENETUNREACH
	case dst == n.plan.host4 && !n.noHost:
		return netip.AddrFrom4([4]byte{127, 0, 0, 1}), nil
	case dst == n.plan.host6 && !n.noHost:
		return netip.IPv6Loopback(), nil
	case n.plan.net4.Contains(dst) || n.plan.net6.Contains(dst):
		return netip.Addr{}, syscall.EHOSTUNREACH
	case !unicast(dst) || dst.Is4In6() || dst.IsLoopback() || dst.IsLinkLocalUnicast() && dst.Is6():
		return netip.Addr{}, syscall.ENETUNREACH
	case dst.Is4() && dst.As4()[0] == 0: // Linux takes these for its own addresses
		return netip.Addr{}, syscall.ENETUNREACH
	}
	return dst, nil
}

// unicast says whether a is one host's address.
func unicast(a netip.Addr) bool {
	return a.IsValid() && !a.IsUnspecified() && !a.IsMulticast() && !(a.Is4() && a.As4()[0] >= 240)
}

func address(a tcpip.Address) netip.Addr {
	if a.Len() == 4 {
		return netip.AddrFrom4(a.As4())
	}
	return netip.AddrFrom16(a.As16())
}

func tcpipAddress(a netip.Addr) tcpip.Address {
	if a.Is4() {
		return tcpip.AddrFrom4(a.As4())
	}
	return tcpip.AddrFrom16(a.As16())
}

func protocol(a netip.Addr) tcpip.NetworkProtocolNumber {
	if a.Is4() {
		return header.IPv4ProtocolNumber
	}
	return header.IPv6ProtocolNumber
}

func fullAddress(a netip.AddrPort) tcpip.FullAddress {
	return tcpip.FullAddress{NIC: nic, Addr: tcpipAddress(a.Addr()), Port: a.Port()}
}

// gatewayOf is the gateway's address in the family of a.
func (p plan) gatewayOf(a netip.Addr) netip.Addr {
	if a.Is4() {
		return p.gateway4
	}
	return p.gateway6
}

// visibleSource is the address under which a client of a published port appears to the guest: its own where the guest
// can answer it, else the gateway's.
func (n *netstack) visibleSource(client netip.Addr, guest netip.Addr) (netip.Addr, bool) {
	client = client.Unmap()
	if client.Is4() != guest.Is4() || client.Zone() != "" || client.IsLinkLocalUnicast() ||
		n.plan.net4.Contains(client) || n.plan.net6.Contains(client) {
		return n.plan.gatewayOf(guest), false
	}
	if _, err := n.target(client); err != nil {
		return n.plan.gatewayOf(guest), false
	}
	return client, true
}

// buffers hold what is on its way between a socket and the stack.
const copyBuffer = 64 << 10

var buffers = sync.Pool{New: func() any { b := make([]byte, copyBuffer); return &b }}
