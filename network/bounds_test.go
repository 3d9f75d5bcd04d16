package network

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
)

type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Len()
}

// randomPacket is a frame of the guest to dst: a SYN, or a datagram of 100 bytes, from a random port.
func randomPacket(n *netstack, proto tcpip.TransportProtocolNumber, dst [4]byte, dstPort uint16) []byte {
	size := header.UDPMinimumSize + 100
	if proto == header.TCPProtocolNumber {
		size = header.TCPMinimumSize
	}
	b := make([]byte, header.EthernetMinimumSize+header.IPv4MinimumSize+size)
	copy(b, n.link.mac[:])
	b[6] = 2
	binary.BigEndian.PutUint16(b[12:], uint16(header.IPv4ProtocolNumber))
	ip := header.IPv4(b[header.EthernetMinimumSize:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(ip)), TTL: 64, Protocol: uint8(proto), ID: uint16(rand.Uint32()),
		SrcAddr: tcpipAddress(n.plan.guest4), DstAddr: tcpip.AddrFrom4(dst),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	p := ip[header.IPv4MinimumSize:]
	from := uint16(rand.Uint32() | 1)
	if proto == header.TCPProtocolNumber {
		header.TCP(p).Encode(&header.TCPFields{
			SrcPort: from, DstPort: dstPort, SeqNum: rand.Uint32(),
			DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 60000,
		})
	} else {
		header.UDP(p).Encode(&header.UDPFields{SrcPort: from, DstPort: dstPort, Length: uint16(size)})
	}
	return b
}

// echoRequest is a ping of the gateway with so many bytes.
func echoRequest(n *netstack, size int) []byte {
	b := make([]byte, header.EthernetMinimumSize+header.IPv4MinimumSize+header.ICMPv4MinimumSize+size)
	copy(b, n.link.mac[:])
	b[6] = 2
	binary.BigEndian.PutUint16(b[12:], uint16(header.IPv4ProtocolNumber))
	ip := header.IPv4(b[header.EthernetMinimumSize:])
	ip.Encode(&header.IPv4Fields{
		TotalLength: uint16(len(ip)), TTL: 64, Protocol: uint8(header.ICMPv4ProtocolNumber),
		SrcAddr: tcpipAddress(n.plan.guest4), DstAddr: tcpipAddress(n.plan.gateway4),
	})
	ip.SetChecksum(^ip.CalculateChecksum())
	header.ICMPv4(ip[header.IPv4MinimumSize:]).SetType(header.ICMPv4Echo)
	return b
}

// flood sends a number of everything.
func flood(n *netstack, count int, tcpPort uint16, send func([]byte)) {
	out := [4]byte(netip.MustParseAddr(outside4).AsSlice())
	for range count {
		send(randomPacket(n, header.TCPProtocolNumber, out, tcpPort))
		send(randomPacket(n, header.UDPProtocolNumber, out, 9))
		// The first half of a datagram whose second never comes.
		half := randomPacket(n, header.UDPProtocolNumber, out, 9)
		ip := header.IPv4(half[header.EthernetMinimumSize:])
		ip.SetFlagsFragmentOffset(header.IPv4FlagMoreFragments, 0)
		ip.SetTotalLength(header.IPv4MinimumSize + 104)
		ip.SetChecksum(0)
		ip.SetChecksum(^ip.CalculateChecksum())
		send(half)
	}
}

// A guest that floods takes what it may have and no more.
func TestFlood(t *testing.T) {
	namespace(t)
	u := openWire(t, Config{})
	n := u.stack()
	n.flows = make(slots, 64)
	n.udp.max = 64
	l := listenHost(t, "tcp", outside4+":0") // accepts, never reads
	qemu, err := net.FileConn(u.File())
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Close()
	drained := make(chan error)
	go func() { drained <- readFrames(qemu, func([]byte) {}) }()
	before := runtime.NumGoroutine()
	flood(n, 5000, port(l.Addr()), n.deliver)
	n.udp.mu.Lock()
	sessions := len(n.udp.sessions)
	n.udp.mu.Unlock()
	if sessions > 64 {
		t.Errorf("%d UDP sessions, want 64 at most", sessions)
	}
	if flows := len(n.flows); flows > 64 {
		t.Errorf("%d flows, want 64 at most", flows)
	}
	goroutines(t, before+64+64+8) // a flow in its handshake and a session have one each
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	if m.HeapAlloc > 64<<20 {
		t.Errorf("%d MiB of heap after the flood", m.HeapAlloc>>20)
	}
	_ = qemu.SetReadDeadline(time.Now())
	if err := <-drained; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the other end: %v", err)
	}
	// And it still serves.
	g := startGuest(t, u)
	askEcho(t, g.mustDial("udp", join(n.plan.host4, hostEcho(t, "127.0.0.1:0"))), []byte("still there"))
}

// A guest that takes nothing off its wire blocks nobody but itself, and Close.
func TestDeafGuest(t *testing.T) {
	namespace(t)
	before := runtime.NumGoroutine()
	u := openWire(t, Config{})
	qemu, err := net.FileConn(u.File())
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Close()
	n := u.stack()
	ping := framed(echoRequest(n, 1400))
	for { // each one is answered, until the answers that nobody takes block the stack, and it takes no more
		_ = qemu.SetWriteDeadline(time.Now().Add(time.Second))
		if _, err := qemu.Write(ping); err != nil {
			if !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatal(err)
			}
			break
		}
	}
	start := time.Now()
	if err := u.Close(); err != nil {
		t.Error(err)
	}
	if d := time.Since(start); d > drainOnClose/2 {
		t.Errorf("close took %v", d)
	}
	_ = qemu.Close()
	goroutines(t, before)
}

func TestFlowBuffer(t *testing.T) {
	var sum int64
	for i := 1; i <= 4096; i++ {
		size := flowBuffer(i)
		if size == 0 {
			size = tcpBufferMax
		}
		sum += size
	}
	if sum > 128<<20 {
		t.Errorf("all flows together may hold %d MiB in each direction, want 128 at most", sum>>20)
	}
}
