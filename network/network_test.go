package network

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

var addrCmp = cmp.Comparer(func(a, b netip.Addr) bool { return a == b })

func TestParseMode(t *testing.T) {
	tests := []struct {
		in     string
		mode   Mode
		device string
		bad    bool
	}{
		{in: "", mode: User},
		{in: "user", mode: User},
		{in: "bridge", mode: User},
		{in: "default", mode: User},
		{in: "none", mode: None},
		{in: "tap:tap0", mode: Tap, device: "tap0"},
		{in: "tap:", bad: true},
		{in: "tap:a/b", bad: true},
		{in: "tap:0123456789abcdef", bad: true},
		{in: "host", bad: true},
	}
	for _, test := range tests {
		mode, device, err := ParseMode(test.in)
		if mode != test.mode || device != test.device || (err != nil) != test.bad {
			t.Errorf("%q: got %q, %q, %v, want %q, %q, bad %v", test.in, mode, device, err, test.mode, test.device, test.bad)
		}
	}
}

func TestParsePorts(t *testing.T) {
	tests := []struct {
		in   string
		want []Port
		bad  string
	}{
		{in: "80", want: []Port{{Proto: "tcp", ContainerPort: 80}}},
		{in: "8080:80", want: []Port{{Proto: "tcp", HostPort: 8080, ContainerPort: 80}}},
		{in: "8080:80/udp", want: []Port{{Proto: "udp", HostPort: 8080, ContainerPort: 80}}},
		{in: "127.0.0.1::80", want: []Port{{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), ContainerPort: 80}}},
		{in: "[::1]:8080:80", want: []Port{{Proto: "tcp", HostIP: netip.IPv6Loopback(), HostPort: 8080, ContainerPort: 80}}},
		{in: "8000-8010:80", want: []Port{{Proto: "tcp", HostPort: 8000, HostPortEnd: 8010, ContainerPort: 80}}},
		{in: "127.0.0.1:8000-8001:80-81/udp", want: []Port{
			{Proto: "udp", HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8000, ContainerPort: 80},
			{Proto: "udp", HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8001, ContainerPort: 81},
		}},
		{in: "8000-8001:80-82", bad: "invalid ranges"},
		{in: "80/sctp", bad: "sctp"},
		{in: "0", bad: "port is missing"},
		{in: "1-65535:1-65535", bad: "limit"},
		{in: "", bad: "no port"},
		{in: "x:80", bad: "hostPort"},
		{in: "host:80:80", bad: "invalid IP"},
		{in: "70000:80", bad: "hostPort"},
	}
	for _, test := range tests {
		t.Run(test.in, func(t *testing.T) {
			got, err := ParsePorts(test.in)
			if test.bad != "" {
				if err == nil || !strings.Contains(err.Error(), test.bad) {
					t.Errorf("got %v, %v, want an error with %q", got, err, test.bad)
				}
				return
			}
			if d := cmp.Diff(test.want, got, addrCmp); d != "" || err != nil {
				t.Errorf("%v (-want +got)\n%s", err, d)
			}
		})
	}
}

func FuzzParsePorts(f *testing.F) {
	for _, s := range []string{"80", "127.0.0.1:8000-8010:80-90/udp", "[::1]:1:2", "1-2:3", "::", "a:b:c:d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		ports, err := ParsePorts(s)
		if err != nil {
			return
		}
		for _, p := range ports { // what was understood reads back as itself
			again, err := ParsePorts(p.String())
			if err != nil || len(again) != 1 || again[0] != p {
				t.Errorf("%q gave %q, which gave %v, %v", s, p, again, err)
			}
		}
	})
}

func TestValidate(t *testing.T) {
	address := []netip.Prefix{netip.MustParsePrefix("10.1.2.3/24")}
	tests := []struct {
		name string
		c    Config
		want string // part of the error
	}{
		{"no mode", Config{}, "mode"},
		{"small MTU", Config{Mode: User, MTU: 100}, "mtu"},
		{"multicast MAC", Config{Mode: User, MAC: net.HardwareAddr{1, 0, 0, 0, 0, 0}}, "mac"},
		{"ports without network", Config{Mode: None, Ports: []Port{{Proto: "tcp", ContainerPort: 1}}}, "--network user"},
		{"ports of a tap", Config{Mode: Tap, Device: "tap0", Addresses: address, Ports: []Port{{Proto: "tcp", ContainerPort: 1}}}, "--network user"},
		{"addresses of user", Config{Mode: User, Addresses: address}, "--network tap:NAME"},
		{"tap without address", Config{Mode: Tap, Device: "tap0"}, "--ip"},
		{"tap without device", Config{Mode: Tap, Addresses: address}, "device"},
		{"device without tap", Config{Mode: User, Device: "tap0"}, "only for a tap"},
		{"loopback for the guest", Config{Mode: Tap, Device: "tap0", Addresses: []netip.Prefix{netip.MustParsePrefix("127.0.0.1/8")}}, "127.0.0.1"},
		{"two gateways", Config{Mode: Tap, Device: "tap0", Addresses: address, Gateways: []netip.Addr{address[0].Addr(), address[0].Addr()}}, "one per family"},
		{"protocol", Config{Mode: User, Ports: []Port{{Proto: "sctp", ContainerPort: 1}}}, "sctp"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			if _, err := Open(t.Context(), test.c, discard()); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
}

func TestNone(t *testing.T) {
	w, err := Open(t.Context(), Config{Mode: None}, discard())
	if err != nil {
		t.Fatal(err)
	}
	if w.File() != nil || w.Netdev("net0", 3) != "" || w.Guest().Interfaces != nil || w.Close() != nil {
		t.Errorf("a machine without network has one: %v", w)
	}
}

func TestPlan(t *testing.T) {
	tests := []struct {
		name string
		used []string
		want string
	}{
		{"free", []string{"127.0.0.0/8", "192.168.1.0/24"}, "10.0.2.15"},
		{"the host lives in the first network", []string{"10.0.2.0/24"}, "192.168.127.15"},
		{"a wide network", []string{"10.0.0.0/8"}, "192.168.127.15"},
		{"all taken: the last", []string{"0.0.0.0/0"}, "172.31.254.15"},
	}
	for _, test := range tests {
		var used []netip.Prefix
		for _, s := range test.used {
			used = append(used, netip.MustParsePrefix(s))
		}
		if got := newPlan(used).guest4.String(); got != test.want {
			t.Errorf("%s: got %s, want %s", test.name, got, test.want)
		}
	}
}

// What the guest may reach: everything but the host's loopback, whatever it is called.
func TestTarget(t *testing.T) {
	n := &netstack{stackConfig: stackConfig{plan: newPlan(nil)}}
	tests := []struct{ dst, want string }{
		{"10.0.2.2", "127.0.0.1"},
		{"fd6b:6372:6164::2", "::1"},
		{"198.51.100.1", "198.51.100.1"},
		{"2001:db8::1", "2001:db8::1"},
		{"169.254.169.254", "169.254.169.254"},
		{"10.0.2.1", ""},
		{"10.0.2.99", ""},
		{"fd6b:6372:6164::99", ""},
		{"127.0.0.1", ""},
		{"127.255.0.1", ""},
		{"0.0.0.0", ""},
		{"0.0.0.1", ""},
		{"224.0.0.1", ""},
		{"255.255.255.255", ""},
		{"::", ""},
		{"::1", ""},
		{"::ffff:127.0.0.1", ""},
		{"::ffff:198.51.100.1", ""},
		{"fe80::1", ""},
		{"ff02::1", ""},
	}
	for _, test := range tests {
		got, err := n.target(netip.MustParseAddr(test.dst))
		if test.want == "" && err == nil || test.want != "" && (err != nil || got.String() != test.want) {
			t.Errorf("%s: got %v, %v, want %q", test.dst, got, err, test.want)
		}
	}
	n.noHost = true
	if got, err := n.target(n.plan.host4); err == nil {
		t.Errorf("without the host: got %v", got)
	}
}

func TestParseResolvConf(t *testing.T) {
	got := parseResolvConf(strings.NewReader(`# made by hand
domain old.example
nameserver 192.0.2.1 # first
nameserver	2001:db8::1
nameserver fe80::1%eth0
nameserver nonsense
nameserver
options ndots:1
search a.example. b.example ; tail`))
	want := resolvers{
		servers: []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1"), netip.MustParseAddr("fe80::1%eth0")},
		search:  []string{"a.example", "b.example"},
	}
	if d := cmp.Diff(want, got, addrCmp, cmp.AllowUnexported(resolvers{})); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
}

func FuzzParseResolvConf(f *testing.F) {
	f.Add("nameserver 192.0.2.1\nsearch a b\n")
	f.Add("domain x\n\tnameserver ::1%lo # y")
	f.Fuzz(func(t *testing.T, s string) {
		c := parseResolvConf(strings.NewReader(s))
		if len(c.servers) > maxServers || len(c.search) > maxSearch {
			t.Errorf("%d servers and %d domains are more than the limits", len(c.servers), len(c.search))
		}
	})
}

// goroutines waits until no more than want run, and shows them otherwise.
func goroutines(t *testing.T, want int) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; {
		if runtime.NumGoroutine() <= want {
			return
		}
		if time.Now().After(deadline) {
			buf := make([]byte, 1<<20)
			t.Fatalf("%d goroutines, want %d\n%s", runtime.NumGoroutine(), want, buf[:runtime.Stack(buf, true)])
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// Close ends everything, with connections of every kind still open.
func TestClose(t *testing.T) {
	before := runtime.NumGoroutine()
	u := openWire(t, Config{Ports: []Port{{Proto: "tcp", ContainerPort: 80}, {Proto: "udp", ContainerPort: 80}}})
	t.Run("", func(t *testing.T) {
		g := startGuest(t, u)
		l := listenHost(t, "tcp", "127.0.0.1:0")
		in := g.listen("tcp", ":80")
		out := g.mustDial("tcp", join(u.plan.host4, port(l.Addr())))
		askEcho(t, g.mustDial("udp", join(u.plan.host4, hostEcho(t, "127.0.0.1:0"))), []byte("x"))
		_ = g.mustDial("tcp", join(u.plan.gateway4, dnsPort))
		host := accept(t, l)
		client, err := net.Dial("tcp", join(netip.MustParseAddr("127.0.0.1"), u.Ports()[0].HostPort))
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		accept(t, in)
		start := time.Now()
		if err := u.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if d := time.Since(start); d > drainOnClose/2 {
			t.Errorf("close took %v", d)
		}
		for name, c := range map[string]net.Conn{"the host's server": host, "the client of a published port": client} {
			_ = c.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("%s: got %v, want the end", name, err)
			}
		}
		_ = out.Close()
		if err := u.Close(); err != nil {
			t.Errorf("close again: %v", err)
		}
	})
	goroutines(t, before)
}

// When QEMU goes away its end is closed: the reader ends, writers do not hang, published ports reset their clients.
func TestMachineGone(t *testing.T) {
	before := runtime.NumGoroutine()
	u := openWire(t, Config{Ports: []Port{{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), ContainerPort: 80}}})
	if err := u.CloseFile(); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", join(u.Ports()[0].HostIP, u.Ports()[0].HostPort))
	if err == nil { // else the reset came even earlier
		_ = c.SetDeadline(time.Now().Add(guestDialTimeout / 2))
		_, err = c.Read(make([]byte, 1))
		_ = c.Close()
	}
	if !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("got %v, want a reset", err)
	}
	if err := u.Close(); err != nil {
		t.Error(err)
	}
	goroutines(t, before)
}

// acknowledged waits until everything that was written has been acknowledged, the end as well.
func acknowledged(t *testing.T, c *net.TCPConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		var queued int
		if err := raw.Control(func(fd uintptr) { queued, err = unix.IoctlGetInt(int(fd), unix.SIOCOUTQ) }); err != nil {
			t.Fatal(err)
		}
		if queued == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes are not acknowledged", queued)
		}
		time.Sleep(time.Millisecond)
	}
}

// What the guest has sent, and was told to have arrived, arrives although the machine is gone and its wire closed.
func TestLastBytes(t *testing.T) {
	namespace(t)
	u := openWire(t, Config{})
	l := listenHost(t, "tcp", "127.0.0.1:0")
	var s net.Conn
	t.Run("machine", func(t *testing.T) {
		g := startGuest(t, u)
		c := g.mustDial("tcp", join(u.plan.host4, port(l.Addr())))
		var err error
		if s, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(make([]byte, 100<<10)); err != nil {
			t.Fatal(err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		acknowledged(t, c.(*net.TCPConn)) // and now the machine goes
	})
	defer s.Close()
	closed := make(chan error)
	go func() { closed <- u.Close() }()
	_ = s.SetReadDeadline(time.Now().Add(10 * time.Second))
	if got, err := io.Copy(io.Discard, s); got != 100<<10 || err != nil {
		t.Errorf("got %d bytes, %v, want all and a proper end", got, err)
	}
	if err := <-closed; err != nil {
		t.Error(err)
	}
}

func TestTapErrors(t *testing.T) {
	namespace(t)
	c := Config{Mode: Tap, Device: "gone0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.1.2.3/24")}}
	if _, err := Open(t.Context(), c, discard()); err == nil || !strings.Contains(err.Error(), "ip tuntap add dev gone0 mode tap") {
		t.Errorf("missing device: got %v, want the remedy", err)
	}
	if _, err := net.InterfaceByName("gone0"); err == nil {
		t.Error("the missing device was made")
	}
	c.Device = "outside0"
	if _, err := Open(t.Context(), c, discard()); err == nil || !strings.Contains(err.Error(), "it is no tap device") {
		t.Errorf("another kind of device: got %v, want the remedy", err)
	}
}

func TestTap(t *testing.T) {
	namespace(t)
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "testtap0"}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(link)
	if err := netlink.LinkSetMTU(link, 9000); err != nil {
		t.Fatal(err)
	}
	c := Config{
		Mode: Tap, Device: "testtap0",
		Addresses: []netip.Prefix{netip.MustParsePrefix("10.1.2.3/24"), netip.MustParsePrefix("2001:db8:7::3/64")},
		Gateways:  []netip.Addr{netip.MustParseAddr("2001:db8:7::1"), netip.MustParseAddr("10.1.2.1")},
		DNS:       []netip.Addr{netip.MustParseAddr("192.0.2.53")}, Search: []string{"example"},
	}
	w, err := Open(context.Background(), c, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if _, err := Open(t.Context(), c, discard()); err == nil || !strings.Contains(err.Error(), "another process has it open") {
		t.Errorf("opened twice: got %v, want the remedy", err)
	}
	g := w.Guest()
	want := Guest{
		MAC: g.MAC, MTU: 9000, DNS: c.DNS, Search: c.Search,
		Interfaces: []Interface{{MAC: g.MAC, MTU: 9000, Addresses: c.Addresses, Gateways: c.Gateways}},
		HostIP:     netip.MustParseAddr("10.1.2.1"),
	}
	if d := cmp.Diff(want, g, addrCmp, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); d != "" {
		t.Errorf("(-want +got)\n%s", d)
	}
	if got := w.Netdev("net0", 7); got != "tap,id=net0,fd=7,vhost=off" {
		t.Errorf("netdev: got %q", got)
	}
	// The device is the one that was prepared: a frame written to it arrives in the namespace.
	if err := linkUp("testtap0"); err != nil {
		t.Fatal(err)
	}
	frame := make([]byte, 10+60) // QEMU's header first
	copy(frame[10:], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0, 0, 1, 0x88, 0xb5})
	if _, err := w.File().Write(frame); err != nil {
		t.Fatal(err)
	}
	l, err := netlink.LinkByName("testtap0")
	if err != nil {
		t.Fatal(err)
	}
	if got := l.Attrs().Statistics.RxPackets; got != 1 {
		t.Errorf("%d packets arrived, want 1", got)
	}
}
