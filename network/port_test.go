package network

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestPublish(t *testing.T) {
	u := openWire(t, Config{Ports: []Port{
		{Proto: "tcp", ContainerPort: 80},
		{Proto: "udp", ContainerPort: 80},
		{Proto: "tcp", HostIP: netip.MustParseAddr(outside4), ContainerPort: 80},
	}})
	g := startGuest(t, u)
	if n := len(u.Ports()); n != 5 {
		t.Fatalf("got %d bound ports, want 2 of each without address and 1 with: %v", n, u.Ports())
	}
	l := g.listen("tcp", ":80")
	pc := g.listenPacket("udp", ":80")
	go echoUDP(pc)
	for _, p := range u.Ports() {
		if p.HostPort == 0 {
			t.Fatalf("%v: the port that was found is not shown", p)
		}
		// From the loopback, and from an address of its own.
		reach := []string{outside4, "127.0.0.1"}
		switch {
		case p.HostIP.Is6():
			reach = []string{outside6, "::1"}
		case !p.HostIP.IsUnspecified():
			reach = []string{p.HostIP.String()}
		}
		for _, host := range reach {
			t.Run(p.Proto+" "+p.HostIP.String()+" by "+host, func(t *testing.T) {
				a := netip.MustParseAddr(host)
				c, err := net.Dial(p.Proto, join(a, p.HostPort))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				if p.Proto == "udp" {
					askEcho(t, c, []byte("datagram"))
					if size := 60000; a.Is4() {
						askEcho(t, c, make([]byte, size))
					}
					return
				}
				in := accept(t, l)
				exchange(t, c, in, 8<<20)
				// The guest sees who it is, where it can answer that address.
				want := c.LocalAddr().(*net.TCPAddr).AddrPort()
				got := in.RemoteAddr().(*net.TCPAddr).AddrPort()
				got = netip.AddrPortFrom(got.Addr().Unmap(), got.Port())
				if a.IsLoopback() {
					if got.Addr() != u.plan.gatewayOf(a) {
						t.Errorf("the guest sees a client on loopback as %v, want the gateway", got)
					}
				} else if got != want {
					t.Errorf("the guest sees the client as %v, want %v", got, want)
				}
			})
		}
	}
}

// A server that listens on one family is reached by the other as well: "localhost" is either.
func TestPublishOtherFamily(t *testing.T) {
	u := openWire(t, Config{Ports: []Port{{Proto: "tcp", ContainerPort: 80}, {Proto: "tcp", ContainerPort: 81}}})
	g := startGuest(t, u)
	only4, only6 := g.listen("tcp4", ":80"), g.listen("tcp6", "[::]:81")
	for _, p := range u.Ports() {
		a := netip.MustParseAddr("127.0.0.1")
		if p.HostIP.Is6() {
			a = netip.IPv6Loopback()
		}
		c, err := net.Dial("tcp", join(a, p.HostPort))
		if err != nil {
			t.Fatal(err)
		}
		l := only4
		if p.ContainerPort == 81 {
			l = only6
		}
		in := accept(t, l)
		_, _ = in.Write([]byte("hello"))
		_ = in.Close()
		if got, err := io.ReadAll(c); string(got) != "hello" || err != nil {
			t.Errorf("%v: got %q, %v", p, got, err)
		}
		_ = c.Close()
	}
}

// Nobody listens in the guest: the client is reset at once. Nobody is there yet, or the guest is young: the client waits.
func TestPublishEarly(t *testing.T) {
	u := openWire(t, Config{Ports: []Port{{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), ContainerPort: 80}}})
	at := join(u.Ports()[0].HostIP, u.Ports()[0].HostPort)
	early, err := net.Dial("tcp", at) // before the machine
	if err != nil {
		t.Fatal(err)
	}
	defer early.Close()
	g := makeGuest(t, u)
	l := g.listen("tcp", ":80") // before the wire: a guest that is there and does not listen refuses
	g.plug()
	in := accept(t, l)
	_, _ = in.Write([]byte("welcome"))
	_ = in.Close()
	_ = early.SetDeadline(time.Now().Add(20 * time.Second))
	if got, err := io.ReadAll(early); string(got) != "welcome" || err != nil {
		t.Errorf("a client that came before the machine: got %q, %v", got, err)
	}
	_ = l.Close()
	hasty, err := net.Dial("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	defer hasty.Close()
	time.Sleep(3 * retryRefused) // so that it is refused at first
	l = g.listen("tcp", ":80")
	in = accept(t, l)
	_, _ = in.Write([]byte("here"))
	_ = in.Close()
	_ = hasty.SetDeadline(time.Now().Add(20 * time.Second))
	if got, err := io.ReadAll(hasty); string(got) != "here" || err != nil {
		t.Errorf("a client that came before the server: got %q, %v", got, err)
	}
	_ = l.Close()

	u = openWire(t, Config{Ports: []Port{{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), ContainerPort: 80}}, born: time.Now().Add(-youth)})
	startGuest(t, u)
	late, err := net.Dial("tcp", join(u.Ports()[0].HostIP, u.Ports()[0].HostPort))
	if err == nil { // else the reset came even earlier
		_ = late.SetDeadline(time.Now().Add(5 * time.Second))
		_, err = late.Read(make([]byte, 1))
		_ = late.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("nobody listens: got %v, want a reset", err)
	}
}

func TestPortTaken(t *testing.T) {
	l := listenHost(t, "tcp", "127.0.0.1:0")
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	loop := netip.MustParseAddr("127.0.0.1")
	free := port(listenHost(t, "tcp", "127.0.0.1:0").Addr())
	tests := []struct {
		name  string
		ports []Port
		want  []string // in the error
	}{
		{"tcp", []Port{{Proto: "tcp", HostIP: loop, HostPort: port(l.Addr()), ContainerPort: 80}},
			[]string{join(loop, port(l.Addr())) + ":80/tcp", "address already in use", "ss -ltnp"}},
		{"udp", []Port{{Proto: "udp", HostIP: loop, HostPort: port(pc.LocalAddr()), ContainerPort: 80}},
			[]string{"address already in use", "ss -lunp"}},
		{"one family of every address", []Port{{Proto: "tcp", HostPort: port(l.Addr()), ContainerPort: 80}},
			[]string{"address already in use"}},
		{"a range of one taken port", []Port{{Proto: "tcp", HostIP: loop, HostPort: free, HostPortEnd: free, ContainerPort: 80}},
			[]string{"address already in use"}},
		{"an address of another host", []Port{{Proto: "tcp", HostIP: netip.MustParseAddr("192.0.2.77"), ContainerPort: 80}},
			[]string{"does not have that address"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			// One before it that can be bound, which must be free again afterwards.
			before := Port{Proto: "tcp", HostIP: loop, ContainerPort: 79}
			w, err := Open(t.Context(), Config{Mode: User, Ports: append([]Port{before}, test.ports...)}, discard())
			if err == nil {
				w.Close()
				t.Fatal("opened")
			}
			for _, want := range test.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("got %q, want %q in it", err, want)
				}
			}
		})
	}
	namespace(t)
	taken := port(l.Addr())
	if taken == 65535 {
		t.Skip("the kernel gave the last port")
	}
	u := openWire(t, Config{Ports: []Port{{Proto: "tcp", HostIP: loop, HostPort: taken, HostPortEnd: taken + 1, ContainerPort: 80}}})
	if got := u.Ports()[0].HostPort; got != taken+1 {
		t.Errorf("a range whose first port is taken: got %d, want %d", got, taken+1)
	}
}

// One client port connected to the same guest port by two ways: the guest must tell the two apart.
func TestPublishSameClient(t *testing.T) {
	loop := netip.MustParseAddr(outside4)
	for _, proto := range []string{"tcp", "udp"} {
		t.Run(proto, func(t *testing.T) {
			u := openWire(t, Config{Ports: []Port{
				{Proto: proto, HostIP: loop, ContainerPort: 80}, {Proto: proto, HostIP: loop, ContainerPort: 80},
			}})
			g := startGuest(t, u)
			client := freePort(t, loop)
			if proto == "udp" {
				go echoUDP(g.listenPacket("udp", ":80"))
				c, err := net.ListenPacket("udp", join(loop, client))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				for i, p := range u.Ports() {
					to := net.UDPAddrFromAddrPort(netip.AddrPortFrom(loop, p.HostPort))
					if _, err := c.WriteTo([]byte{byte(i)}, to); err != nil {
						t.Fatal(err)
					}
					buf := make([]byte, 10)
					_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
					n, from, err := c.ReadFrom(buf)
					if err != nil || n != 1 || buf[0] != byte(i) || from.String() != to.String() {
						t.Errorf("port %d: got %x from %v, %v, want its own echo", p.HostPort, buf[:n], from, err)
					}
				}
				return
			}
			l := g.listen("tcp", ":80")
			reuse := net.Dialer{
				LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(loop, client)),
				Control: func(_, _ string, c syscall.RawConn) error {
					return c.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1) })
				},
			}
			for _, p := range u.Ports() {
				c, err := reuse.Dial("tcp", join(loop, p.HostPort))
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				in := accept(t, l)
				_, _ = in.Write([]byte("hello"))
				buf := make([]byte, 5)
				_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, err := io.ReadFull(c, buf); err != nil {
					t.Errorf("port %d: %v (the guest sees %v)", p.HostPort, err, in.RemoteAddr())
				}
			}
		})
	}
}

func freePort(t *testing.T, a netip.Addr) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", join(a, 0))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return port(l.Addr())
}
