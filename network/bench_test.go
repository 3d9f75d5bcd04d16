package network

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"
)

// BenchmarkTCP is the throughput between a guest's kernel and a server on the host, both ways, as iperf3 would show it:
//
//	go test -run '^$' -bench TCP -benchtime 3s ./network
//
// The guest's tap device is bridged to the wire by this process, which costs more than QEMU's part does.
func BenchmarkTCP(b *testing.B) {
	for _, mtu := range []int{DefaultMTU, 9000, MaxMTU} {
		u := openWire(b, Config{MTU: mtu, Ports: []Port{{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), ContainerPort: 80}}})
		g := startGuest(b, u)
		l := listenHost(b, "tcp", "127.0.0.1:0")
		in := g.listen("tcp", ":80")
		out := func(b *testing.B) (net.Conn, net.Conn) {
			c := g.mustDial("tcp", join(u.plan.host4, port(l.Addr())))
			return c, accept(b, l)
		}
		b.Run(fmt.Sprintf("mtu=%d/guest-to-host", mtu), func(b *testing.B) {
			c, s := out(b)
			pump(b, c, s)
		})
		b.Run(fmt.Sprintf("mtu=%d/host-to-guest", mtu), func(b *testing.B) {
			c, s := out(b)
			pump(b, s, c)
		})
		b.Run(fmt.Sprintf("mtu=%d/published", mtu), func(b *testing.B) {
			c, err := net.Dial("tcp", join(u.Ports()[0].HostIP, u.Ports()[0].HostPort))
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			pump(b, c, accept(b, in))
		})
	}
}

func pump(b *testing.B, from, to net.Conn) {
	b.Helper()
	const chunk = 1 << 20
	b.SetBytes(chunk)
	done := make(chan error)
	go func() {
		_, err := io.CopyN(io.Discard, to, int64(b.N)*chunk)
		done <- err
	}()
	buf := make([]byte, chunk)
	start := time.Now()
	b.ResetTimer()
	for range b.N {
		if _, err := from.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	if err := <-done; err != nil {
		b.Fatal(err)
	}
	b.ReportMetric(float64(b.N)*chunk*8/time.Since(start).Seconds()/1e9, "Gbit/s")
}

// BenchmarkRequest is the time of a connection with one byte each way, through a published port.
func BenchmarkRequest(b *testing.B) {
	u := openWire(b, Config{Ports: []Port{{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), ContainerPort: 80}}})
	g := startGuest(b, u)
	l := g.listen("tcp", ":80")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.CopyN(c, c, 1)
			_ = c.Close()
		}
	}()
	for b.Loop() {
		c, err := net.Dial("tcp", join(u.Ports()[0].HostIP, u.Ports()[0].HostPort))
		if err != nil {
			b.Fatal(err)
		}
		_, _ = c.Write([]byte("x"))
		if _, err := io.ReadAll(c); err != nil {
			b.Fatal(err)
		}
		_ = c.Close()
	}
}

// BenchmarkOpen is what a start pays for its wire before QEMU is started: two published ports and the socket pair.
func BenchmarkOpen(b *testing.B) {
	c := Config{Mode: User, Ports: []Port{{Proto: "tcp", ContainerPort: 80}, {Proto: "udp", ContainerPort: 53}}}
	for b.Loop() {
		w, err := Open(context.Background(), c, discard())
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkStack is what the first frame pays for the stack.
func BenchmarkStack(b *testing.B) {
	for b.Loop() {
		w, err := Open(context.Background(), Config{Mode: User}, discard())
		if err != nil {
			b.Fatal(err)
		}
		start := time.Now()
		w.(*user).stack()
		b.ReportMetric(float64(time.Since(start).Microseconds()), "µs/last")
		if err := w.Close(); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkIdle shows the private memory of this process before a wire and with an idle one that has served a guest.
func BenchmarkIdle(b *testing.B) {
	before := private(b)
	u := openWire(b, Config{})
	g := startGuest(b, u)
	p := hostEcho(b, "127.0.0.1:0")
	askEcho(b, g.mustDial("udp", join(u.plan.host4, p)), []byte("x"))
	after := private(b)
	for b.Loop() {
	}
	b.ReportMetric(float64(before), "KiB-before")
	b.ReportMetric(float64(after), "KiB-with")
}

func private(b *testing.B) (kib int) {
	b.Helper()
	text, err := os.ReadFile("/proc/self/smaps_rollup")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[0], "Private_") {
			n, _ := strconv.Atoi(f[1])
			kib += n
		}
	}
	return kib
}
