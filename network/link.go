package network

import (
	"encoding/binary"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"

	"github.com/kcradle/kcradle/network/lan"
)

// QEMU's stream netdev writes each Ethernet frame behind its length, four bytes, big endian.
const (
	frameHeader = 4
	// maxFrame is the largest frame QEMU sends (NET_BUFSIZE of its include/net/net.h). A longer one means that the two
	// sides no longer agree on where frames begin.
	maxFrame = 4096 + 65536

	maxPending = 256 << 10 // bytes that wait for the socket before writers wait too
)

// readFrames calls deliver with each frame of r until r ends; the frame is only valid during the call.
func readFrames(r io.Reader, deliver func([]byte)) error { return lan.ReadFrames(r, maxFrame, deliver) }

// link is the stack's end of the stream to QEMU. There is one machine on it, so every frame goes to that machine and no
// address resolution is needed.
type link struct {
	conn  io.Writer
	mac   [6]byte       // of the gateway
	guest atomic.Uint64 // MAC of the guest in the low 48 bits
	mtu   uint32
	tag   uint16 // of IEEE 802.1Q; 0: frames have none

	dispatcher stack.NetworkDispatcher // set once, before the first frame is delivered

	mu       sync.Mutex
	cond     *sync.Cond
	pending  []byte // frames that nobody writes yet
	spare    []byte
	flushing bool // somebody is writing, and will write pending as well
	err      error
}

var (
	_ stack.LinkEndpoint = (*link)(nil)
	_ stack.GSOEndpoint  = (*link)(nil)
)

func newLink(conn io.Writer, gateway, guest net.HardwareAddr, mtu, tag int) *link {
	l := &link{conn: conn, mac: [6]byte(gateway), mtu: uint32(mtu), tag: uint16(tag)}
	l.cond = sync.NewCond(&l.mu)
	l.guest.Store(macBits(guest))
	return l
}

func macBits(b []byte) uint64 {
	return uint64(binary.BigEndian.Uint16(b))<<32 | uint64(binary.BigEndian.Uint32(b[2:]))
}

// appendHeader appends the length and the Ethernet header of a frame to that address.
func (l *link) appendHeader(b []byte, mac uint64, proto tcpip.NetworkProtocolNumber, payload int) []byte {
	b = l.appendLength(b, header.EthernetMinimumSize+payload)
	b = binary.BigEndian.AppendUint16(b, uint16(mac>>32))
	b = binary.BigEndian.AppendUint32(b, uint32(mac))
	b = l.appendTag(append(b, l.mac[:]...))
	return binary.BigEndian.AppendUint16(b, uint16(proto))
}

// appendLength appends the length of a frame that has so many bytes without its tag.
func (l *link) appendLength(b []byte, size int) []byte {
	if l.tag != 0 {
		size += vlanHeader
	}
	return binary.BigEndian.AppendUint32(b, uint32(size))
}

func (l *link) appendTag(b []byte) []byte {
	if l.tag == 0 {
		return b
	}
	return binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(b, etherVLAN), l.tag)
}

// WritePackets implements stack.LinkWriter. It blocks while the machine does not take what is already there: the link
// loses nothing, TCP is slowed instead. Writers that come while another one writes leave it their frames.
func (l *link) WritePackets(pkts stack.PacketBufferList) (int, tcpip.Error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, p := range pkts.AsSlice() {
		if !l.roomLocked() {
			return n, &tcpip.ErrClosedForSend{}
		}
		l.pending = l.appendHeader(l.pending, l.guest.Load(), p.NetworkProtocolNumber, p.Size())
		for _, s := range p.AsSlices() {
			l.pending = append(l.pending, s...)
		}
		n++
	}
	l.flushLocked()
	return n, nil
}

// writePacket sends one packet, a network header and what follows it.
func (l *link) writePacket(mac uint64, proto tcpip.NetworkProtocolNumber, packet []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.roomLocked() {
		return
	}
	l.pending = l.appendHeader(l.pending, mac, proto, len(packet))
	l.pending = append(l.pending, packet...)
	l.flushLocked()
}

// writeFrame sends a frame of another machine, which has no tag.
func (l *link) writeFrame(frame []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.roomLocked() {
		return
	}
	l.pending = l.appendTag(append(l.appendLength(l.pending, len(frame)), frame[:12]...))
	l.pending = append(l.pending, frame[12:]...)
	l.flushLocked()
}

// close ends the link: whoever waits for it goes on.
func (l *link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err = net.ErrClosed
	}
	l.cond.Broadcast()
}

// roomLocked waits until there is room, and says whether the link still lives.
func (l *link) roomLocked() bool {
	for len(l.pending) >= maxPending && l.flushing && l.err == nil {
		l.cond.Wait()
	}
	return l.err == nil
}

func (l *link) flushLocked() {
	if l.flushing {
		return
	}
	l.flushing = true
	for len(l.pending) > 0 && l.err == nil {
		buf := l.pending
		l.pending, l.spare = l.spare[:0], nil
		l.mu.Unlock()
		_, err := l.conn.Write(buf)
		l.mu.Lock()
		if cap(buf) <= 2*maxPending {
			l.spare = buf
		}
		if err != nil {
			l.err = err
		}
		l.cond.Broadcast()
	}
	l.flushing = false
}

// The rest of stack.LinkEndpoint and stack.GSOEndpoint.

func (l *link) MTU() uint32                             { return l.mtu }
func (l *link) SetMTU(uint32)                           {}
func (l *link) MaxHeaderLength() uint16                 { return 0 }
func (l *link) LinkAddress() tcpip.LinkAddress          { return tcpip.LinkAddress(l.mac[:]) }
func (l *link) SetLinkAddress(tcpip.LinkAddress)        {}
func (l *link) Attach(d stack.NetworkDispatcher)        { l.dispatcher = d }
func (l *link) IsAttached() bool                        { return l.dispatcher != nil }
func (l *link) Wait()                                   {}
func (l *link) ARPHardwareType() header.ARPHardwareType { return header.ARPHardwareEther }
func (l *link) AddHeader(*stack.PacketBuffer)           {}
func (l *link) ParseHeader(*stack.PacketBuffer) bool    { return true }
func (l *link) Close()                                  {}
func (l *link) SetOnCloseAction(func())                 {}
func (l *link) GSOMaxSize() uint32                      { return stack.GVisorGSOMaxSize }
func (l *link) SupportedGSO() stack.SupportedGSO        { return stack.GVisorGSOSupported }
func (l *link) Capabilities() stack.LinkEndpointCapabilities {
	// A local socket does not damage bytes, so what arrives is not summed again. What is sent carries its sums:
	// the guest's driver checks them.
	return stack.CapabilityRXChecksumOffload
}
