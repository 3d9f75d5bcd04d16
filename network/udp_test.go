package network

import (
	"bytes"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kcradle/kcradle/internal/need"
)

// echoUDP answers every datagram with the sender's address and the datagram.
func echoUDP(c net.PacketConn) {
	buf := make([]byte, 65535)
	for {
		n, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		_, _ = c.WriteTo(buf[:n], from)
	}
}

func hostEcho(t testing.TB, address string) uint16 {
	t.Helper()
	c, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	go echoUDP(c)
	return port(c.LocalAddr())
}

// ask sends a datagram until its echo comes; UDP may lose one.
func askEcho(t testing.TB, c net.Conn, payload []byte) {
	t.Helper()
	buf := make([]byte, 65535)
	var err error
	for range 5 {
		if _, err = c.Write(payload); err != nil {
			break
		}
		_ = c.SetReadDeadline(time.Now().Add(2 * time.Second))
		var n int
		if n, err = c.Read(buf); err == nil {
			if !bytes.Equal(buf[:n], payload) {
				t.Fatalf("got %d other bytes, want the %d that were sent", n, len(payload))
			}
			return
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
	}
	t.Fatalf("echo of %d bytes: %v", len(payload), err)
}

func TestUDPOut(t *testing.T) {
	u := openWire(t, Config{})
	g := startGuest(t, u)
	tests := []struct{ name, listen, dial string }{
		{"IPv4 host loopback", "127.0.0.1", u.plan.host4.String()},
		{"IPv6 host loopback", "::1", u.plan.host6.String()},
		{"IPv4 outside", outside4, outside4},
		{"IPv6 outside", outside6, outside6},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			p := hostEcho(t, net.JoinHostPort(test.listen, "0"))
			c := g.mustDial("udp", join(netip.MustParseAddr(test.dial), p))
			for _, size := range []int{0, 1, 1400, 9000, 60000} { // fragments from 1473 on
				askEcho(t, c, bytes.Repeat([]byte{byte(size)}, size))
			}
		})
	}
}

func TestUDPRefused(t *testing.T) {
	u := openWire(t, Config{})
	g := startGuest(t, u)
	for _, address := range []string{
		join(u.plan.host4, 9), join(u.plan.host6, 9), join(u.plan.gateway4, 9), join(netip.MustParseAddr(outside4), 9),
	} {
		c := g.mustDial("udp", address)
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("%s: got %v, want the host's refusal", address, err)
		}
	}
}

// Sessions are bounded; the one used last lives.
func TestUDPSessions(t *testing.T) {
	u := openWire(t, Config{})
	g := startGuest(t, u)
	p := hostEcho(t, "127.0.0.1:0")
	u.stack().udp.mu.Lock()
	u.stack().udp.max = 8
	u.stack().udp.mu.Unlock()
	kept := g.mustDial("udp", join(u.plan.host4, p))
	for range 40 {
		askEcho(t, kept, []byte("kept"))
		askEcho(t, g.mustDial("udp", join(u.plan.host4, p)), []byte("other"))
	}
	table := &u.stack().udp
	table.mu.Lock()
	n := len(table.sessions)
	local := kept.LocalAddr().(*net.UDPAddr).AddrPort()
	_, alive := table.sessions[udpKey{netip.AddrPortFrom(local.Addr().Unmap(), local.Port()), netip.AddrPortFrom(u.plan.host4, p)}]
	// Time passes.
	for _, s := range table.sessions {
		s.last = s.last.Add(-udpAnswered - time.Second)
	}
	table.mu.Unlock()
	if n > 8 {
		t.Errorf("%d sessions are more than the limit of 8", n)
	}
	if !alive {
		t.Error("the session used last was the one to go")
	}
	table.sweep()
	table.mu.Lock()
	defer table.mu.Unlock()
	if len(table.sessions) != 0 {
		t.Errorf("%d idle sessions are still there", len(table.sessions))
	}
}

func TestPing(t *testing.T) {
	ping := need.Command(t, "ping", "apt-get install iputils-ping")
	for _, mode := range []struct{ name, groups string }{{"raw sockets", "1 0"}, {"ping sockets", "0 2147483647"}} {
		t.Run(mode.name, func(t *testing.T) {
			namespace(t)
			if err := os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte(mode.groups), 0); err != nil {
				t.Skipf("this namespace has no ping_group_range of its own: %v", err)
			}
			u := openWire(t, Config{})
			g := startGuest(t, u)
			for _, address := range []string{
				u.plan.gateway4.String(), u.plan.gateway6.String(), u.plan.host4.String(), u.plan.host6.String(), outside4, outside6,
			} {
				out, err := g.run(ping, "-n", "-c", "3", "-i", "0.2", "-W", "5", "-s", "1000", address)
				if err != nil || !strings.Contains(out, " 0% packet loss") {
					t.Errorf("ping %s: %v\n%s", address, err, out)
				}
			}
			if out, err := g.run(ping, "-n", "-c", "1", "-W", "1", "10.0.2.77"); err == nil {
				t.Errorf("an address nobody has answered:\n%s", out)
			}
		})
	}
}
