package network

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

// echoIdle is how long an echo session waits for the next reply.
const echoIdle = 15 * time.Second

const hopLimit = 64

// handleARP answers who has the gateway's and the host's address.
func (n *netstack) handleARP(eth header.Ethernet, packet []byte) {
	if len(packet) < header.ARPSize {
		return
	}
	h := header.ARP(packet[:header.ARPSize])
	if !h.IsValid() || h.Op() != header.ARPRequest {
		return
	}
	if netip.AddrFrom4([4]byte(h.ProtocolAddressSender())) == n.plan.guest4 {
		n.link.guest.Store(macBits(eth[6:]))
	}
	target := netip.AddrFrom4([4]byte(h.ProtocolAddressTarget()))
	if target != n.plan.gateway4 && target != n.plan.host4 {
		return
	}
	n.link.replyARP(h, n.link.mac)
}

// replyARP tells whoever asks which Ethernet address is the one of the address asked for.
func (l *link) replyARP(h header.ARP, mac [6]byte) {
	reply := header.ARP(make([]byte, header.ARPSize))
	reply.SetIPv4OverEthernet()
	reply.SetOp(header.ARPReply)
	copy(reply.HardwareAddressSender(), mac[:])
	copy(reply.ProtocolAddressSender(), h.ProtocolAddressTarget())
	copy(reply.HardwareAddressTarget(), h.HardwareAddressSender())
	copy(reply.ProtocolAddressTarget(), h.ProtocolAddressSender())
	l.writePacket(macBits(h.HardwareAddressSender()), header.ARPProtocolNumber, reply)
}

func isSolicit(b []byte) bool {
	return len(b) >= header.ICMPv6NeighborSolicitMinimumSize && header.ICMPv6(b).Type() == header.ICMPv6NeighborSolicit
}

// handleSolicit answers who has the gateway's and the host's IPv6 address.
func (n *netstack) handleSolicit(eth header.Ethernet, ip header.IPv6, b []byte) {
	target := address(header.NDPNeighborSolicit(header.ICMPv6(b).MessageBody()).TargetAddress())
	asker := address(ip.SourceAddress())
	if target != n.plan.gateway6 && target != n.plan.host6 || !unicast(asker) || ip.HopLimit() != header.NDPHopLimit {
		return
	}
	if asker == n.plan.guest6 {
		n.link.guest.Store(macBits(eth[6:]))
	}
	n.link.writeICMP6(macBits(eth[6:]), target, asker, header.NDPHopLimit, advert(target, n.link.mac, true))
}

// advert is the answer to a solicitation: which Ethernet address is the one of target.
func advert(target netip.Addr, mac [6]byte, router bool) []byte {
	const option = 8 // target link-layer address: type, length in units of 8, address
	body := make([]byte, header.ICMPv6NeighborAdvertMinimumSize+option)
	icmp := header.ICMPv6(body)
	icmp.SetType(header.ICMPv6NeighborAdvert)
	advert := header.NDPNeighborAdvert(icmp.MessageBody())
	advert.SetRouterFlag(router)
	advert.SetSolicitedFlag(true)
	advert.SetOverrideFlag(true)
	advert.SetTargetAddress(tcpipAddress(target))
	opt := body[header.ICMPv6NeighborAdvertMinimumSize:]
	opt[0], opt[1] = 2, 1 // RFC 4861, section 4.6.1
	copy(opt[2:], mac[:])
	return body
}

// sendICMP4 sends an ICMP message; its checksum is set here.
func (n *netstack) sendICMP4(from, to netip.Addr, body []byte) {
	icmp := header.ICMPv4(body)
	icmp.SetChecksum(0)
	icmp.SetChecksum(^checksum.Checksum(body, 0))
	packet := make([]byte, header.IPv4MinimumSize+len(body))
	ip := header.IPv4(packet)
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(packet)), TTL: hopLimit, Protocol: uint8(header.ICMPv4ProtocolNumber),
		SrcAddr: tcpipAddress(from), DstAddr: tcpipAddress(to),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	copy(packet[header.IPv4MinimumSize:], body)
	n.link.writePacket(n.link.guest.Load(), header.IPv4ProtocolNumber, packet)
}

// sendICMP6 sends an ICMPv6 message; its checksum is set here.
func (n *netstack) sendICMP6(from, to netip.Addr, body []byte) {
	n.link.writeICMP6(n.link.guest.Load(), from, to, hopLimit, body)
}

func (l *link) writeICMP6(mac uint64, from, to netip.Addr, hops uint8, body []byte) {
	icmp := header.ICMPv6(body)
	icmp.SetChecksum(0)
	icmp.SetChecksum(header.ICMPv6Checksum(header.ICMPv6ChecksumParams{
		Header: icmp, Src: tcpipAddress(from), Dst: tcpipAddress(to),
	}))
	packet := make([]byte, header.IPv6MinimumSize+len(body))
	header.IPv6(packet).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(body)), TransportProtocol: header.ICMPv6ProtocolNumber, HopLimit: hops,
		SrcAddr: tcpipAddress(from), DstAddr: tcpipAddress(to),
	})
	copy(packet[header.IPv6MinimumSize:], body)
	l.writePacket(mac, header.IPv6ProtocolNumber, packet)
}

// sendUnreachable tells the guest why its packet went nowhere. It quotes as much of the packet as a kernel looks at to
// find the socket: addresses, ports and, of TCP, the sequence number.
func (n *netstack) sendUnreachable(proto tcpip.TransportProtocolNumber, guest, dst netip.AddrPort, seq uint32, cause error) {
	v4 := guest.Addr().Is4()
	quoted := make([]byte, 8)
	if proto == header.TCPProtocolNumber && !v4 {
		quoted = make([]byte, header.TCPMinimumSize)
	}
	binary.BigEndian.PutUint16(quoted, guest.Port())
	binary.BigEndian.PutUint16(quoted[2:], dst.Port())
	if proto == header.TCPProtocolNumber {
		binary.BigEndian.PutUint32(quoted[4:], seq)
	} else {
		binary.BigEndian.PutUint16(quoted[4:], header.UDPMinimumSize)
	}
	code := 0
	if v4 {
		switch { // RFC 792 and RFC 1812, section 5.2.7.1
		case errors.Is(cause, syscall.ECONNREFUSED):
			code = 3 // port
		case errors.Is(cause, syscall.EHOSTUNREACH):
			code = 1 // host
		case errors.Is(cause, syscall.EACCES), errors.Is(cause, syscall.EPERM):
			code = 13 // administratively prohibited
		}
		const icmp = header.ICMPv4MinimumSize
		body := make([]byte, icmp+header.IPv4MinimumSize+len(quoted))
		header.ICMPv4(body).SetType(header.ICMPv4DstUnreachable)
		header.ICMPv4(body).SetCode(header.ICMPv4Code(code))
		ip := header.IPv4(body[icmp:])
		ip.Encode(&header.IPv4Fields{
			TotalLength: uint16(header.IPv4MinimumSize + len(quoted)), TTL: hopLimit, Protocol: uint8(proto),
			SrcAddr: tcpipAddress(guest.Addr()), DstAddr: tcpipAddress(dst.Addr()),
		})
		ip.SetChecksum(^ip.CalculateChecksum())
		copy(body[icmp+header.IPv4MinimumSize:], quoted)
		n.sendICMP4(n.plan.gateway4, guest.Addr(), body)
		return
	}
	switch { // RFC 4443, section 3.1
	case errors.Is(cause, syscall.ECONNREFUSED):
		code = 4 // port
	case errors.Is(cause, syscall.EHOSTUNREACH):
		code = 3 // address
	case errors.Is(cause, syscall.EACCES), errors.Is(cause, syscall.EPERM):
		code = 1 // administratively prohibited
	}
	const icmp = header.ICMPv6DstUnreachableMinimumSize
	body := make([]byte, icmp+header.IPv6MinimumSize+len(quoted))
	header.ICMPv6(body).SetType(header.ICMPv6DstUnreachable)
	header.ICMPv6(body).SetCode(header.ICMPv6Code(code))
	header.IPv6(body[icmp:]).Encode(&header.IPv6Fields{
		PayloadLength: uint16(len(quoted)), TransportProtocol: proto, HopLimit: hopLimit,
		SrcAddr: tcpipAddress(guest.Addr()), DstAddr: tcpipAddress(dst.Addr()),
	})
	copy(body[icmp+header.IPv6MinimumSize:], quoted)
	n.sendICMP6(n.plan.gateway6, guest.Addr(), body)
}

// echoKey names an echo session: one ping of the guest.
type echoKey struct {
	guest, dst netip.Addr
	id         uint16
}

// echoSession is a ping socket of the host for one ping of the guest.
type echoSession struct {
	file *os.File
	raw  bool   // a raw socket: replies to others arrive as well
	id   uint16 // on the host's side; chosen by the kernel unless raw
	last time.Time
}

// echoTable holds the echo sessions, at most max.
type echoTable struct {
	max int

	mu       sync.Mutex
	closed   bool
	sessions map[echoKey]*echoSession
	told     bool // that this host gives no ping sockets
}

// get returns the session of k and whether it is new.
func (t *echoTable) get(k echoKey, open func() (*echoSession, error)) (_ *echoSession, fresh bool, _ error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return nil, false, os.ErrClosed
	}
	if s := t.sessions[k]; s != nil {
		s.last = time.Now()
		return s, false, nil
	}
	s, err := open()
	if err != nil {
		return nil, false, err
	}
	if t.sessions == nil {
		t.sessions = map[echoKey]*echoSession{}
	}
	if len(t.sessions) >= t.max {
		var oldest echoKey
		for o, s := range t.sessions {
			if old := t.sessions[oldest]; old == nil || s.last.Before(old.last) {
				oldest = o
			}
		}
		_ = t.sessions[oldest].file.Close()
		delete(t.sessions, oldest)
	}
	s.last = time.Now()
	t.sessions[k] = s
	return s, true, nil
}

func (t *echoTable) remove(k echoKey, s *echoSession) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_ = s.file.Close()
	if t.sessions[k] == s {
		delete(t.sessions, k)
	}
}

func (t *echoTable) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	for _, s := range t.sessions {
		_ = s.file.Close()
	}
}

// idle says whether nothing was sent for so long that a reply is not to be expected.
func (t *echoTable) idle(s *echoSession) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.closed || time.Since(s.last) >= echoIdle
}

func (n *netstack) handleICMP4(src, dst netip.Addr, b []byte) {
	if len(b) < header.ICMPv4MinimumSize || header.ICMPv4(b).Type() != header.ICMPv4Echo || header.ICMPv4(b).Code() != 0 {
		return
	}
	if dst == n.plan.gateway4 || dst == n.plan.host4 {
		reply := append([]byte(nil), b...)
		header.ICMPv4(reply).SetType(header.ICMPv4EchoReply)
		n.sendICMP4(dst, src, reply)
		return
	}
	n.forwardEcho(src, dst, header.ICMPv4(b).Ident(), b)
}

func (n *netstack) handleICMP6(src, dst netip.Addr, b []byte) {
	if len(b) < header.ICMPv6EchoMinimumSize || header.ICMPv6(b).Type() != header.ICMPv6EchoRequest || header.ICMPv6(b).Code() != 0 {
		return
	}
	if dst == n.plan.gateway6 || dst == n.plan.host6 {
		reply := append([]byte(nil), b...)
		header.ICMPv6(reply).SetType(header.ICMPv6EchoReply)
		n.sendICMP6(dst, src, reply)
		return
	}
	n.forwardEcho(src, dst, header.ICMPv6(b).Ident(), b)
}

// forwardEcho sends an echo request on. ICMP and ICMPv6 lay them out alike: type, code, sum, identifier, sequence, data.
func (n *netstack) forwardEcho(src, dst netip.Addr, id uint16, b []byte) {
	if target, err := n.target(dst); err != nil || target != dst {
		return
	}
	key := echoKey{src, dst, id}
	s, fresh, err := n.echo.get(key, func() (*echoSession, error) { return openEcho(dst) })
	if err != nil {
		if (errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM)) && !n.echo.told {
			n.echo.told = true // only the reader of frames comes here
			n.log.Warn("ping from the guest goes unanswered: this host gives the user no ping sockets; "+
				"allow them with: sysctl -w net.ipv4.ping_group_range='0 2147483647'", "error", err)
		}
		return
	}
	if fresh && !n.gate.start(func() { n.returnEcho(key, s) }) {
		n.echo.remove(key, s)
		return
	}
	out := append([]byte(nil), b...)
	if s.raw {
		binary.BigEndian.PutUint16(out[4:], s.id)
		if dst.Is4() { // the kernel sums ICMPv6 itself
			header.ICMPv4(out).SetChecksum(0)
			header.ICMPv4(out).SetChecksum(^checksum.Checksum(out, 0))
		}
	}
	raw, err := s.file.SyscallConn()
	if err != nil {
		return
	}
	_ = raw.Write(func(fd uintptr) bool {
		_ = unix.Send(int(fd), out, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		return true
	})
}

// openEcho opens a ping socket connected to dst: an unprivileged one where the host allows it, else a raw one.
func openEcho(dst netip.Addr) (*echoSession, error) {
	domain, proto := unix.AF_INET, unix.IPPROTO_ICMP
	var to unix.Sockaddr = &unix.SockaddrInet4{Addr: [4]byte(dst.AsSlice()[:4])}
	if dst.Is6() {
		domain, proto = unix.AF_INET6, unix.IPPROTO_ICMPV6
		to = &unix.SockaddrInet6{Addr: dst.As16()}
	}
	s := &echoSession{}
	const flags = unix.SOCK_CLOEXEC | unix.SOCK_NONBLOCK
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|flags, proto)
	if errors.Is(err, unix.EACCES) {
		s.raw, s.id = true, uint16(rand.Uint32())
		fd, err = unix.Socket(domain, unix.SOCK_RAW|flags, proto)
	}
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if err := unix.Connect(fd, to); err != nil {
		_ = unix.Close(fd)
		return nil, os.NewSyscallError("connect", err)
	}
	s.file = os.NewFile(uintptr(fd), "echo")
	return s, nil
}

// returnEcho carries replies to the guest until none has been asked for a while.
func (n *netstack) returnEcho(key echoKey, s *echoSession) {
	defer n.echo.remove(key, s)
	reply := uint8(header.ICMPv4EchoReply)
	if key.dst.Is6() {
		reply = uint8(header.ICMPv6EchoReply)
	}
	buf := make([]byte, 0xffff)
	for {
		if err := s.file.SetReadDeadline(time.Now().Add(echoIdle)); err != nil {
			return
		}
		size, err := s.file.Read(buf)
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			if n.echo.idle(s) {
				return
			}
			continue
		case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.ECONNREFUSED):
			continue
		default:
			return
		}
		b := buf[:size]
		if s.raw && key.dst.Is4() { // raw IPv4 sockets give the IP header as well
			ip := header.IPv4(b)
			if len(b) < header.IPv4MinimumSize || int(ip.HeaderLength()) > len(b) {
				continue
			}
			b = b[ip.HeaderLength():]
		}
		if len(b) < header.ICMPv4MinimumSize || b[0] != reply || s.raw && binary.BigEndian.Uint16(b[4:]) != s.id {
			continue
		}
		if len(b)+header.IPv6MinimumSize > int(n.link.mtu) {
			continue // requests are never fragments, so honest replies fit
		}
		binary.BigEndian.PutUint16(b[4:], key.id)
		if key.dst.Is4() {
			n.sendICMP4(key.dst, key.guest, b)
		} else {
			n.sendICMP6(key.dst, key.guest, b)
		}
	}
}
