package network

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"testing"
	"testing/iotest"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/kcradle/kcradle/network/lan"
)

func framed(frames ...[]byte) []byte {
	var b []byte
	for _, f := range frames {
		b = binary.BigEndian.AppendUint32(b, uint32(len(f)))
		b = append(b, f...)
	}
	return b
}

func TestReadFrames(t *testing.T) {
	var frames [][]byte
	for i := range 40 {
		frames = append(frames, bytes.Repeat([]byte{byte(i)}, i*1700))
	}
	whole := framed(frames...)
	readers := map[string]func() io.Reader{
		"at once":      func() io.Reader { return bytes.NewReader(whole) },
		"in halves":    func() io.Reader { return iotest.HalfReader(bytes.NewReader(whole)) },
		"byte by byte": func() io.Reader { return iotest.OneByteReader(bytes.NewReader(whole)) },
		"with the end": func() io.Reader { return iotest.DataErrReader(bytes.NewReader(whole)) },
	}
	for name, r := range readers {
		t.Run(name, func(t *testing.T) {
			var got [][]byte
			if err := readFrames(r(), func(b []byte) { got = append(got, bytes.Clone(b)) }); err != nil {
				t.Fatal(err)
			}
			if !slices.EqualFunc(got, frames, bytes.Equal) {
				t.Errorf("got %d frames, want the same %d", len(got), len(frames))
			}
		})
	}
	if err := readFrames(bytes.NewReader(whole[:len(whole)-1]), func([]byte) {}); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("an end within a frame: got %v", err)
	}
	if err := readFrames(bytes.NewReader([]byte{0, 2, 0, 0}), func([]byte) {}); !errors.Is(err, lan.ErrFrame) {
		t.Errorf("a frame too long: got %v", err)
	}
}

func FuzzReadFrames(f *testing.F) {
	f.Add(framed([]byte("abc"), nil, []byte("d")))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		var got []byte
		err := readFrames(iotest.HalfReader(bytes.NewReader(b)), func(frame []byte) { got = append(got, framed(frame)...) })
		if !bytes.HasPrefix(b, got) {
			t.Errorf("%x reads as %x", b, got)
		}
		if err == nil && len(got) != len(b) {
			t.Errorf("%d of %d bytes were read without an error", len(got), len(b))
		}
	})
}

// seedFrames are frames a guest sends, of every kind that is looked at.
func seedFrames(p plan) [][]byte {
	gw := gatewayMAC(net.HardwareAddr{2, 0, 0, 0, 0, 1})
	eth := func(proto uint16, packet []byte) []byte {
		b := append([]byte(nil), gw...)
		b = append(b, 2, 0, 0, 0, 0, 1)
		return append(binary.BigEndian.AppendUint16(b, proto), packet...)
	}
	arp := header.ARP(make([]byte, header.ARPSize))
	arp.SetIPv4OverEthernet()
	arp.SetOp(header.ARPRequest)
	copy(arp.ProtocolAddressTarget(), p.gateway4.AsSlice())
	out := [][]byte{eth(0x0806, arp)}
	tcpSYN := make([]byte, header.TCPMinimumSize)
	header.TCP(tcpSYN).Encode(&header.TCPFields{SrcPort: 1, DstPort: 2, SeqNum: 3, DataOffset: header.TCPMinimumSize, Flags: header.TCPFlagSyn, WindowSize: 1000})
	udp := make([]byte, header.UDPMinimumSize+8)
	header.UDP(udp).Encode(&header.UDPFields{SrcPort: 1, DstPort: 2, Length: uint16(len(udp))})
	dns := make([]byte, header.UDPMinimumSize+17)
	header.UDP(dns).Encode(&header.UDPFields{SrcPort: 1, DstPort: dnsPort, Length: uint16(len(dns))})
	dns[header.UDPMinimumSize+5] = 1
	ping := make([]byte, header.ICMPv4MinimumSize+8)
	header.ICMPv4(ping).SetType(header.ICMPv4Echo)
	ping6 := make([]byte, header.ICMPv6EchoMinimumSize+4)
	header.ICMPv6(ping6).SetType(header.ICMPv6EchoRequest)
	solicit := make([]byte, header.ICMPv6NeighborSolicitMinimumSize)
	header.ICMPv6(solicit).SetType(header.ICMPv6NeighborSolicit)
	header.NDPNeighborSolicit(header.ICMPv6(solicit).MessageBody()).SetTargetAddress(tcpipAddress(p.gateway6))
	for _, x := range []struct {
		proto   uint8
		payload []byte
	}{{6, tcpSYN}, {17, udp}, {17, dns}, {1, ping}, {58, ping6}, {58, solicit}, {44, append([]byte{17, 0, 0, 1, 0, 0, 0, 9}, udp...)}} {
		if x.proto != 58 && x.proto != 44 {
			for _, flags := range []uint8{0, header.IPv4FlagMoreFragments} {
				if flags != 0 && len(x.payload)%8 != 0 {
					continue // no fragment but the last may be of such a size
				}
				b := make([]byte, header.IPv4MinimumSize, 100)
				ip := header.IPv4(b)
				ip.Encode(&header.IPv4Fields{
					TotalLength: uint16(len(b) + len(x.payload)), TTL: 64, Protocol: x.proto, Flags: flags, ID: 5,
					SrcAddr: tcpipAddress(p.guest4), DstAddr: tcpipAddress(p.gateway4),
				})
				ip.SetChecksum(^ip.CalculateChecksum())
				out = append(out, eth(0x0800, append(b, x.payload...)))
			}
		}
		if x.proto != 1 {
			b := make([]byte, header.IPv6MinimumSize, 100)
			header.IPv6(b).Encode(&header.IPv6Fields{
				PayloadLength: uint16(len(x.payload)), HopLimit: 255,
				SrcAddr: tcpipAddress(p.guest6), DstAddr: tcpipAddress(p.gateway6),
			})
			b[6] = x.proto
			out = append(out, eth(0x86dd, append(b, x.payload...)))
		}
	}
	return out
}

// offline is a stack that reaches nothing, for frames nobody vouches for.
func offline(t testing.TB, p plan) *netstack {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var g gate
	mac := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	n := newNetstack(ctx, ctx, stackConfig{
		plan: p, noHost: true, link: newLink(io.Discard, gatewayMAC(mac), mac, DefaultMTU, 0), dns: newResolver(Config{NoHost: true}), gate: &g, log: discard(),
	})
	n.dns.path = "/nonexistent"
	n.dial = func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("offline") }
	n.echo.max, n.echo.closed = 0, true
	t.Cleanup(func() {
		cancel()
		g.shut()
		n.close()
	})
	return n
}

func FuzzDeliver(f *testing.F) {
	p := newPlan(nil)
	for _, b := range seedFrames(p) {
		f.Add(b)
	}
	n := offline(f, p)
	f.Fuzz(func(t *testing.T, frame []byte) { n.deliver(frame) })
}

// The seeds are what they claim: each one is answered.
func TestSeeds(t *testing.T) {
	p := newPlan(nil)
	n := offline(t, p)
	var out syncBuffer
	n.link.conn = &out
	answered := 0
	for _, b := range seedFrames(p) {
		before := out.len()
		n.deliver(b)
		for deadline := time.Now().Add(300 * time.Millisecond); out.len() == before && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
		}
		if out.len() > before {
			answered++
		}
	}
	// ARP, SYN, UDP, DNS, ping on IPv4 and SYN, UDP, DNS, ping, neighbour solicitation on IPv6; no fragment.
	if answered != 10 {
		t.Errorf("%d seeds were answered, want 10", answered)
	}
}
