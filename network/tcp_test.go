package network

import (
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"
)

const big = 64 << 20

// stream is the same pseudo-random bytes for the same seed.
func stream(seed uint64, n int64) io.Reader {
	var b [32]byte
	b[0] = byte(seed)
	return io.LimitReader(rand.NewChaCha8(b), n)
}

func sum(t testing.TB, r io.Reader) [32]byte {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		t.Errorf("read: %v", err)
	}
	return [32]byte(h.Sum(nil))
}

// exchange sends a big stream each way at once, ends each with a half-close, and compares both.
func exchange(t *testing.T, client, server net.Conn, size int64) {
	t.Helper()
	for _, c := range []net.Conn{client, server} {
		_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
	}
	send := func(c net.Conn, seed uint64, done chan<- struct{}) {
		defer close(done)
		if _, err := io.Copy(c, stream(seed, size)); err != nil {
			t.Errorf("send: %v", err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Errorf("close write: %v", err)
		}
	}
	sent1, sent2 := make(chan struct{}), make(chan struct{})
	go send(client, 1, sent1)
	go send(server, 2, sent2)
	got := make(chan [32]byte)
	go func() { got <- sum(t, server) }()
	if sum(t, client) != sum(t, stream(2, size)) {
		t.Error("what the client got is not what the server sent")
	}
	if <-got != sum(t, stream(1, size)) {
		t.Error("what the server got is not what the client sent")
	}
	<-sent1
	<-sent2
}

func accept(t testing.TB, l net.Listener) net.Conn {
	t.Helper()
	_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(20 * time.Second))
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestTCPOut(t *testing.T) {
	u := openWire(t, Config{})
	g := startGuest(t, u)
	tests := []struct {
		name, listen, dial string
		size               int64
	}{
		{"IPv4 host loopback", "127.0.0.1", u.plan.host4.String(), big},
		{"IPv6 host loopback", "::1", u.plan.host6.String(), big},
		{"IPv4 host loopback by IPv6", "127.0.0.1", u.plan.host6.String(), 1 << 20},
		{"IPv4 outside", outside4, outside4, 1 << 20},
		{"IPv6 outside", outside6, outside6, 1 << 20},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			l := listenHost(t, "tcp", net.JoinHostPort(test.listen, "0"))
			c := g.mustDial("tcp", join(netip.MustParseAddr(test.dial), port(l.Addr())))
			exchange(t, c, accept(t, l), test.size)
		})
	}
}

func TestTCPOutLargeMTU(t *testing.T) {
	u := openWire(t, Config{MTU: MaxMTU})
	g := startGuest(t, u)
	l := listenHost(t, "tcp", "127.0.0.1:0")
	c := g.mustDial("tcp", join(u.plan.host4, port(l.Addr())))
	exchange(t, c, accept(t, l), big)
}

func TestHalfClose(t *testing.T) {
	u := openWire(t, Config{Ports: []Port{{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), ContainerPort: 80}}})
	g := startGuest(t, u)
	out := listenHost(t, "tcp", "127.0.0.1:0")
	in := g.listen("tcp", ":80")
	pairs := map[string]func(t *testing.T) (inner, outer net.Conn){
		"the guest's connection": func(t *testing.T) (net.Conn, net.Conn) {
			c := g.mustDial("tcp", join(u.plan.host4, port(out.Addr())))
			return c, accept(t, out)
		},
		"a published port": func(t *testing.T) (net.Conn, net.Conn) {
			c, err := net.Dial("tcp", join(u.Ports()[0].HostIP, u.Ports()[0].HostPort))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
			return accept(t, in), c
		},
	}
	for name, pair := range pairs {
		for _, first := range []string{"guest", "host"} {
			t.Run(name+", "+first+" ends first", func(t *testing.T) {
				a, b := pair(t)
				if first == "host" {
					a, b = b, a
				}
				for _, c := range []net.Conn{a, b} {
					_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				}
				if _, err := a.Write([]byte("question")); err != nil {
					t.Fatal(err)
				}
				if err := a.(*net.TCPConn).CloseWrite(); err != nil {
					t.Fatal(err)
				}
				if got, err := io.ReadAll(b); string(got) != "question" || err != nil {
					t.Fatalf("got %q, %v, want the question and its end", got, err)
				}
				if _, err := b.Write([]byte("answer")); err != nil {
					t.Fatalf("write after the other side's end: %v", err)
				}
				if err := b.Close(); err != nil {
					t.Fatal(err)
				}
				if got, err := io.ReadAll(a); string(got) != "answer" || err != nil {
					t.Fatalf("got %q, %v, want the answer and its end", got, err)
				}
			})
		}
	}
}

func TestTCPErrors(t *testing.T) {
	u := openWire(t, Config{})
	g := startGuest(t, u)
	closed := listenHost(t, "tcp", "127.0.0.1:0")
	dead := port(closed.Addr())
	_ = closed.Close()
	tests := []struct {
		name    string
		address string
		want    error
	}{
		{"nobody listens on the host's loopback", join(u.plan.host4, dead), syscall.ECONNREFUSED},
		{"nobody listens on the host's IPv6 loopback", join(u.plan.host6, dead), syscall.ECONNREFUSED},
		{"nobody listens outside", join(netip.MustParseAddr(outside4), dead), syscall.ECONNREFUSED},
		{"the gateway has no such service", join(u.plan.gateway4, 80), syscall.ECONNREFUSED},
		{"no route to the host", join(netip.MustParseAddr(nowhere4), 80), syscall.EHOSTUNREACH},
		{"no route to the IPv6 host", join(netip.MustParseAddr(nowhere6), 80), syscall.EHOSTUNREACH},
		{"no route to the network", "192.0.2.1:80", syscall.ENETUNREACH},
		{"a mapped loopback address", "[::ffff:7f00:1]:80", syscall.ECONNREFUSED}, // the guest's own
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			start := time.Now()
			c, err := g.dial("tcp", test.address)
			if err == nil {
				_ = c.Close()
				t.Fatal("connected")
			}
			if !errors.Is(err, test.want) {
				t.Errorf("got %v, want %v", err, test.want)
			}
			if d := time.Since(start); d > 2*time.Second {
				t.Errorf("took %v: the guest guessed from silence", d)
			}
		})
	}
}

func TestNoHost(t *testing.T) {
	u := openWire(t, Config{NoHost: true})
	g := startGuest(t, u)
	l := listenHost(t, "tcp", "127.0.0.1:0")
	if c, err := g.dial("tcp", join(u.plan.host4, port(l.Addr()))); err == nil {
		_ = c.Close()
		t.Error("the host's loopback was reached")
	}
	if u.Guest().HostIP.IsValid() {
		t.Error("the guest is told an address of the host")
	}
}

func TestReset(t *testing.T) {
	u := openWire(t, Config{})
	g := startGuest(t, u)
	l := listenHost(t, "tcp", "127.0.0.1:0")
	for _, by := range []string{"guest", "host"} {
		t.Run("by the "+by, func(t *testing.T) {
			c := g.mustDial("tcp", join(u.plan.host4, port(l.Addr())))
			s := accept(t, l)
			// Both ways first, so that the reset meets an established flow.
			if _, err := c.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(s, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			killer, victim := c, s
			if by == "host" {
				killer, victim = s, c
			}
			if err := errors.Join(killer.(*net.TCPConn).SetLinger(0), killer.Close()); err != nil {
				t.Fatal(err)
			}
			_ = victim.SetDeadline(time.Now().Add(20 * time.Second))
			if _, err := victim.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("got %v, want a reset", err)
			}
		})
	}
}

// A guest that does not read holds back its peer, and loses nothing of what the peer had sent when it went away.
func TestSlowReader(t *testing.T) {
	u := openWire(t, Config{})
	g := startGuest(t, u)
	l := listenHost(t, "tcp", "127.0.0.1:0")
	c := g.mustDial("tcp", join(u.plan.host4, port(l.Addr())))
	s := accept(t, l)
	sent := make(chan int64)
	go func() { // until nothing moves any more
		var n int64
		b := make([]byte, 64<<10)
		for {
			_ = s.SetWriteDeadline(time.Now().Add(2 * time.Second))
			k, err := s.Write(b)
			n += int64(k)
			if err != nil {
				if !errors.Is(err, os.ErrDeadlineExceeded) {
					t.Errorf("write: %v", err)
				}
				break
			}
		}
		_ = s.Close()
		sent <- n
	}()
	n := <-sent
	if n > 64<<20 {
		t.Errorf("%d bytes went nowhere: nothing holds the sender back", n)
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	if got, err := io.Copy(io.Discard, c); got != n || err != nil {
		t.Errorf("got %d bytes, %v, want all %d", got, err, n)
	}
}
