package network

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
)

// QEMU's stream netdev writes each Ethernet frame behind its length, four bytes, big endian.
const (
	frameHeader = 4
	// maxFrame is the largest frame QEMU sends (NET_BUFSIZE of its include/net/net.h). A longer one means that the two
	// sides no longer agree on where frames begin.
	maxFrame = 4096 + 65536

	readBuffer = 2 * maxFrame
	maxPending = 256 << 10 // bytes that wait for the socket before writers wait too
)

var errFrame = errors.New("frame longer than QEMU sends")

// readFrames calls deliver with each frame of r until r ends; the frame is only valid during the call. A stream that
// ends between frames ends with nil.
func readFrames(r io.Reader, deliver func([]byte)) error {
	buf := make([]byte, readBuffer)
	var start, end int
	for {
		n, err := r.Read(buf[end:])
		end += n
		for end-start >= frameHeader {
			size := binary.BigEndian.Uint32(buf[start:])
			if size > maxFrame {
				return fmt.Errorf("read frame of %d bytes: %w", size, errFrame)
			}
			next := start + frameHeader + int(size)
			if next > end {
				break
			}
			deliver(buf[start+frameHeader : next])
			start = next
		}
		switch {
		case start == end:
			start, end = 0, 0
		case start > 0 && len(buf)-end < maxFrame+frameHeader:
			end = copy(buf, buf[start:end])
			start = 0
		}
		if err != nil {
			if err == io.EOF && end > start {
				return io.ErrUnexpectedEOF
			}
			if err == io.EOF {
				return nil
			}
			return err
		}
	}
}

// link is the stack's end of the stream to QEMU. There is one machine on it, so every frame goes to that machine and no
// address resolution is needed.
type link struct {
	conn  io.Writer
	mac   [6]byte       // of the gateway
	guest atomic.Uint64 // MAC of the guest in the low 48 bits
	mtu   uint32

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

func newLink(conn io.Writer, gateway, guest net.HardwareAddr, mtu int) *link {
	l := &link{conn: conn, mac: [6]byte(gateway), mtu: uint32(mtu)}
	l.cond = sync.NewCond(&l.mu)
	l.guest.Store(macBits(guest))
	return l
}

func macBits(b []byte) uint64 {
	return uint64(binary.BigEndian.Uint16(b))<<32 | uint64(binary.BigEndian.Uint32(b[2:]))
}

// appendHeader appends the length and the Ethernet header of a frame to that address.
func (l *link) appendHeader(b []byte, mac uint64, proto tcpip.NetworkProtocolNumber, payload int) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(header.EthernetMinimumSize+payload))
	b = binary.BigEndian.AppendUint16(b, uint16(mac>>32))
	b = binary.BigEndian.AppendUint32(b, uint32(mac))
	b = append(b, l.mac[:]...)
	return binary.BigEndian.AppendUint16(b, uint16(proto))
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
