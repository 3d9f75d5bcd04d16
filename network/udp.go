package network

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	xipv4 "golang.org/x/net/ipv4"
	xipv6 "golang.org/x/net/ipv6"
	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/buffer"
	"gvisor.dev/gvisor/pkg/tcpip/checksum"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// The idle times of Linux's connection tracking: a session nobody has answered, and one in both directions.
const (
	udpUnanswered = 30 * time.Second
	udpAnswered   = 2 * time.Minute
	udpSweep      = 5 * time.Second
)

// udpKey names a session as the guest sees it.
type udpKey struct{ guest, remote netip.AddrPort }

// inKey names a session as the client of a published port sees it.
type inKey struct {
	socket *net.UDPConn
	client netip.AddrPort
}

// udpSession is one exchange of datagrams between the guest and somebody outside.
type udpSession struct {
	key  udpKey
	in   inKey        // zero for a session that the guest began
	send func([]byte) // to the outside; never blocks, drops instead
	end  func()       // frees what send uses
	last time.Time    // of use; guarded by the table
	both [2]bool      // seen from the guest, seen from outside; guarded by the table
	oob  []byte       // control message that makes a reply leave from the address that was asked; guarded by the table
}

// udpTable holds the sessions, at most max in each direction of origin: outside clients cannot push out the guest's.
type udpTable struct {
	max int

	mu       sync.Mutex
	closed   bool
	sessions map[udpKey]*udpSession
	inbound  map[inKey]*udpSession
	sweeper  *time.Timer // armed while there are sessions
}

// use finds a session and marks it as used by one of its sides.
func (t *udpTable) use(k udpKey, side int) *udpSession {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.sessions[k]
	if s != nil {
		s.last, s.both[side] = time.Now(), true
	}
	return s
}

// add puts a session in. When its kind is full the one longest unused goes. False: the table is closed.
func (t *udpTable) add(s *udpSession) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return false
	}
	if t.sessions == nil {
		t.sessions, t.inbound = map[udpKey]*udpSession{}, map[inKey]*udpSession{}
	}
	outside := s.in.socket != nil
	count := len(t.inbound)
	if !outside {
		count = len(t.sessions) - len(t.inbound)
	}
	if count >= t.max {
		var oldest *udpSession
		for _, o := range t.sessions {
			if (o.in.socket != nil) == outside && (oldest == nil || o.last.Before(oldest.last)) {
				oldest = o
			}
		}
		t.removeLocked(oldest)
	}
	s.last = time.Now()
	t.sessions[s.key] = s
	if outside {
		t.inbound[s.in] = s
	}
	if t.sweeper == nil {
		t.sweeper = time.AfterFunc(udpSweep, t.sweep)
	}
	return true
}

func (t *udpTable) remove(s *udpSession) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.removeLocked(s)
}

func (t *udpTable) removeLocked(s *udpSession) {
	if t.sessions[s.key] != s {
		return
	}
	delete(t.sessions, s.key)
	delete(t.inbound, s.in)
	s.end()
}

func (t *udpTable) sweep() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed {
		return
	}
	now := time.Now()
	for _, s := range t.sessions {
		idle := udpUnanswered
		if s.both[0] && s.both[1] {
			idle = udpAnswered
		}
		if now.Sub(s.last) > idle {
			t.removeLocked(s)
		}
	}
	t.sweeper = nil
	if len(t.sessions) > 0 {
		t.sweeper = time.AfterFunc(udpSweep, t.sweep)
	}
}

// close ends every session; it may be called twice.
func (t *udpTable) close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
	if t.sweeper != nil {
		t.sweeper.Stop()
	}
	for _, s := range t.sessions {
		t.removeLocked(s)
	}
}

// forwardUDP carries a datagram of the guest. It never waits: what cannot go now is lost, as on any network.
func (n *netstack) forwardUDP(ctx context.Context, id stack.TransportEndpointID, pkt *stack.PacketBuffer) {
	h := header.UDP(pkt.TransportHeader().Slice())
	if len(h) < header.UDPMinimumSize {
		return
	}
	payload := pkt.Data().AsRange().ToSlice()
	if size := int(h.Length()) - header.UDPMinimumSize; size < 0 || size > len(payload) {
		return
	} else {
		payload = payload[:size]
	}
	key := udpKey{
		guest:  netip.AddrPortFrom(address(id.RemoteAddress), id.RemotePort),
		remote: netip.AddrPortFrom(address(id.LocalAddress), id.LocalPort),
	}
	if s := n.udp.use(key, 0); s != nil {
		s.send(payload)
		return
	}
	if key.remote.Port() == 0 {
		return
	}
	switch a := key.remote.Addr(); {
	case !n.isGateway(a):
	case key.remote.Port() == dnsPort:
		n.answerDNS(ctx, key, payload)
		return
	case !n.isHost(a):
		n.sendUnreachable(header.UDPProtocolNumber, key.guest, key.remote, 0, syscall.ECONNREFUSED)
		return
	}
	target, err := n.target(key.remote.Addr())
	var conn net.Conn
	if err == nil {
		conn, err = n.dial(ctx, "udp", netip.AddrPortFrom(target, key.remote.Port()).String())
	}
	if err != nil {
		n.sendUnreachable(header.UDPProtocolNumber, key.guest, key.remote, 0, err)
		return
	}
	raw, err := conn.(syscall.Conn).SyscallConn()
	if err != nil {
		_ = conn.Close()
		return
	}
	s := &udpSession{key: key, both: [2]bool{true, false}, end: func() { _ = conn.Close() }}
	s.send = func(b []byte) {
		_ = raw.Write(func(fd uintptr) bool {
			err := unix.Send(int(fd), b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			if errors.Is(err, unix.ECONNREFUSED) { // of an earlier datagram; this one has not gone yet
				_ = unix.Send(int(fd), b, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
			}
			return true
		})
	}
	if !n.udp.add(s) {
		_ = conn.Close()
		return
	}
	if !n.gate.start(func() { n.returnUDP(s, raw) }) {
		n.udp.remove(s)
		return
	}
	s.send(payload)
}

// returnUDP carries what comes back to the guest until the session is closed.
func (n *netstack) returnUDP(s *udpSession, raw syscall.RawConn) {
	for {
		buf, size, err := readReady(raw)
		switch {
		case err == nil:
			n.udp.use(s.key, 1)
			n.sendUDP(s.key.remote, s.key.guest, (*buf)[:size])
			buffers.Put(buf)
		case errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH):
			n.sendUnreachable(header.UDPProtocolNumber, s.key.guest, s.key.remote, 0, err)
		case errors.Is(err, syscall.EMSGSIZE) || errors.Is(err, syscall.ENOBUFS) || errors.Is(err, syscall.ENOMEM):
		default:
			n.udp.remove(s)
			return
		}
	}
}

// sendUDP sends one datagram to the guest; the stack cuts it into fragments where it must.
func (n *netstack) sendUDP(from, to netip.AddrPort, payload []byte) {
	if len(payload) > 0xffff-header.UDPMinimumSize {
		return
	}
	route, err := n.stack.FindRoute(nic, tcpipAddress(from.Addr()), tcpipAddress(to.Addr()), protocol(to.Addr()), false)
	if err != nil {
		return
	}
	defer route.Release()
	pkt := stack.NewPacketBuffer(stack.PacketBufferOptions{
		ReserveHeaderBytes: header.UDPMinimumSize + int(route.MaxHeaderLength()),
		Payload:            buffer.MakeWithData(payload),
	})
	defer pkt.DecRef()
	h := header.UDP(pkt.TransportHeader().Push(header.UDPMinimumSize))
	pkt.TransportProtocolNumber = header.UDPProtocolNumber
	size := uint16(header.UDPMinimumSize + len(payload))
	h.Encode(&header.UDPFields{SrcPort: from.Port(), DstPort: to.Port(), Length: size})
	sum := h.CalculateChecksum(checksum.Checksum(payload, route.PseudoHeaderChecksum(header.UDPProtocolNumber, size)))
	if sum != 0xffff { // a sum of zero means "none"
		sum = ^sum
	}
	h.SetChecksum(sum)
	_ = route.WritePacket(stack.NetworkHeaderParams{Protocol: header.UDPProtocolNumber, TTL: 64}, pkt)
}

// receiveUDP carries datagrams to a published port until its socket is closed.
func receiveUDP(ctx context.Context, p published, stack func() *netstack, log *slog.Logger) {
	// On a socket for every address the reply must leave from the one that was asked.
	anywhere := p.HostIP.IsUnspecified()
	if anywhere {
		var err error
		if p.HostIP.Is4() {
			err = xipv4.NewPacketConn(p.udp).SetControlMessage(xipv4.FlagDst|xipv4.FlagInterface, true)
		} else {
			err = xipv6.NewPacketConn(p.udp).SetControlMessage(xipv6.FlagDst|xipv6.FlagInterface, true)
		}
		if err != nil {
			log.Warn("published udp port answers from the host's default address", "port", p.Port.String(), "error", err)
			anywhere = false
		}
	}
	raw, err := p.udp.SyscallConn()
	if err != nil {
		return
	}
	oob := make([]byte, 128)
	for {
		// Wait first, then take a buffer: a thousand quiet ports hold none.
		err := raw.Read(func(fd uintptr) bool {
			_, _, err := unix.Recvfrom(int(fd), oob[:1], unix.MSG_PEEK|unix.MSG_DONTWAIT)
			return err != unix.EAGAIN && err != unix.EINTR
		})
		if err != nil {
			return
		}
		buf := buffers.Get().(*[]byte)
		size, oobSize, _, client, err := p.udp.ReadMsgUDPAddrPort(*buf, oob)
		switch {
		case err == nil:
			var reply []byte
			if anywhere {
				reply = replyFrom(oob[:oobSize], p.HostIP.Is4())
			}
			if n := stack(); n != nil {
				n.publishUDP(p, client, (*buf)[:size], reply)
			}
		case errors.Is(err, net.ErrClosed):
			buffers.Put(buf)
			return
		}
		buffers.Put(buf)
		if ctx.Err() != nil {
			return
		}
	}
}

// replyFrom turns the control message of a datagram into that of its reply.
func replyFrom(oob []byte, v4 bool) []byte {
	if v4 {
		var cm xipv4.ControlMessage
		if cm.Parse(oob) != nil || cm.Dst == nil {
			return nil
		}
		return (&xipv4.ControlMessage{Src: cm.Dst}).Marshal()
	}
	var cm xipv6.ControlMessage
	if cm.Parse(oob) != nil || cm.Dst == nil {
		return nil
	}
	reply := &xipv6.ControlMessage{Src: cm.Dst}
	if cm.Dst.IsLinkLocalUnicast() {
		reply.IfIndex = cm.IfIndex
	}
	return reply.Marshal()
}

// publishUDP carries one datagram of a client to the guest.
func (n *netstack) publishUDP(p published, client netip.AddrPort, payload, oob []byte) {
	in := inKey{p.udp, client}
	n.udp.mu.Lock()
	s := n.udp.inbound[in]
	if s != nil {
		s.last, s.both[1], s.oob = time.Now(), true, oob
	}
	n.udp.mu.Unlock()
	if s == nil {
		if s = n.newInbound(p, in, oob); s == nil {
			return
		}
	}
	n.sendUDP(s.key.remote, s.key.guest, payload)
}

// newInbound begins a session for a client; nil when there can be none.
func (n *netstack) newInbound(p published, in inKey, oob []byte) *udpSession {
	guest := n.plan.guest4
	if other := n.plan.guest6; other.IsValid() && (p.HostIP.Is6() || !guest.IsValid()) {
		guest = other
	}
	source, _ := n.visibleSource(in.client.Addr(), guest)
	s := &udpSession{in: in, both: [2]bool{false, true}, oob: oob, end: func() {}}
	s.send = func(b []byte) {
		n.udp.mu.Lock()
		oob := s.oob
		n.udp.mu.Unlock()
		_, _, _ = p.udp.WriteMsgUDPAddrPort(b, oob, in.client)
	}
	port := in.client.Port()
	for range freePortTries {
		s.key = udpKey{
			guest:  netip.AddrPortFrom(guest, p.ContainerPort),
			remote: netip.AddrPortFrom(source, port),
		}
		n.udp.mu.Lock()
		_, taken := n.udp.sessions[s.key]
		n.udp.mu.Unlock()
		if !taken {
			if !n.udp.add(s) {
				return nil
			}
			return s
		}
		// Another client has this port; the next one above the privileged and DNS's will do.
		source = n.plan.gatewayOf(guest)
		port = uint16(max(1024, int(port+1)))
	}
	return nil
}

// answerDNS answers a query over UDP in a goroutine of its own.
func (n *netstack) answerDNS(ctx context.Context, key udpKey, query []byte) {
	if len(query) > maxQuery || !n.queries.take() {
		return
	}
	started := n.gate.start(func() {
		defer n.queries.give()
		if answer := n.dns.answer(ctx, query, false); answer != nil {
			n.sendUDP(key.remote, key.guest, answer)
		}
	})
	if !started {
		n.queries.give()
	}
}
