package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"github.com/kcradle/kcradle/network/lan"
)

// shared is a segment of a test: the n-th machine on the x-th network.
func shared(dir string, x, n, tag int, names ...string) Segment {
	a := netip.AddrFrom4([4]byte{172, byte(17 + x), 0, byte(n)})
	six := netip.MustParseAddr(fmt.Sprintf("fd00:%d::%d", x, n))
	return Segment{
		Tag: tag, Name: fmt.Sprintf("net%d", x), Dir: dir, MTU: DefaultMTU, Default: tag == 0, Resolve: true, Names: names,
		MAC:       lan.MAC{2, 0x42, 172, byte(17 + x), 0, byte(n)},
		Addresses: []netip.Prefix{netip.PrefixFrom(a, 16), netip.PrefixFrom(six, 64)},
		Gateways:  []netip.Addr{netip.AddrFrom4([4]byte{172, byte(17 + x), 0, 1}), netip.MustParseAddr(fmt.Sprintf("fd00:%d::ff", x))},
	}
}

// deep is a directory whose sockets' names are longer than a socket's address.
func deep(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("x", 120))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// resolve asks the wire's resolver.
func resolve(t *testing.T, u *user, name string) (out []string) {
	t.Helper()
	q := dnsmessage.Message{Header: dnsmessage.Header{ID: 9, RecursionDesired: true}, Questions: []dnsmessage.Question{{
		Name: dnsmessage.MustNewName(name + "."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET,
	}}}
	if strings.HasSuffix(name, ".arpa") {
		q.Questions[0].Type = dnsmessage.TypePTR
	}
	msg, err := q.Pack()
	if err != nil {
		t.Fatal(err)
	}
	var m dnsmessage.Message
	if err := m.Unpack(u.resolver.answer(t.Context(), msg, false)); err != nil {
		t.Fatal(err)
	}
	for _, a := range m.Answers {
		switch b := a.Body.(type) {
		case *dnsmessage.AResource:
			out = append(out, netip.AddrFrom4(b.A).String())
		case *dnsmessage.PTRResource:
			out = append(out, b.PTR.String())
		}
	}
	slices.Sort(out)
	return out
}

// echo makes the guest serve, and the other one speak to it.
func echo(t *testing.T, server, client *guest, at string) error {
	t.Helper()
	l := server.listen("tcp", at)
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			_, _ = c.Write([]byte("hello\n"))
			_ = c.Close()
		}
	}()
	c, err := client.dial("tcp", l.Addr().String())
	if err != nil {
		return err
	}
	defer c.Close()
	b := make([]byte, 16)
	n, err := c.Read(b)
	if string(b[:n]) != "hello\n" {
		return fmt.Errorf("got %q, %v", b[:n], err)
	}
	return nil
}

func TestSegments(t *testing.T) {
	namespace(t)
	front, back := deep(t), deep(t)
	dead := []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	web := openWire(t, Config{Shared: true, DNS: dead, Segments: []Segment{shared(front, 1, 2, 0, "web", "www")}})
	db := openWire(t, Config{Shared: true, DNS: dead, Segments: []Segment{shared(front, 1, 3, 0, "db", "www"), shared(back, 2, 3, 1, "db")}})
	inner := shared(back, 2, 2, 0, "inner")
	inner.Internal = true
	hidden := openWire(t, Config{Shared: true, DNS: dead, Segments: []Segment{inner}})
	gWeb, gDB, gHidden := startGuest(t, web), startGuest(t, db), startGuest(t, hidden)

	for _, at := range []string{"172.18.0.3:0", "[fd00:1::3]:0"} {
		if err := echo(t, gDB, gWeb, at); err != nil {
			t.Errorf("to another machine at %s: %v", at, err)
		}
	}
	if err := echo(t, gDB, gHidden, "172.19.0.3:0"); err != nil {
		t.Errorf("on a second network, which has a tag: %v", err)
	}
	if err := echo(t, gHidden, gDB, "172.19.0.2:0"); err != nil {
		t.Errorf("the other way: %v", err)
	}
	// To the outside: through the default network, and not at all from an internal one.
	out := listenHost(t, "tcp", outside4+":0")
	go func() {
		for {
			c, err := out.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	for _, g := range []*guest{gWeb, gDB} {
		c, err := g.dial("tcp", out.Addr().String())
		if err != nil {
			t.Errorf("to the outside: %v", err)
			continue
		}
		_ = c.Close()
	}
	if _, err := gHidden.dial("tcp", out.Addr().String()); err == nil || !strings.Contains(err.Error(), "unreachable") {
		t.Errorf("to the outside from an internal network: got %v, want unreachable", err)
	}
	// The gateway stands for the host's loopback, but not on an internal network.
	inside := listenHost(t, "tcp", "127.0.0.1:0")
	go func() {
		if c, err := inside.Accept(); err == nil {
			_ = c.Close()
		}
	}()
	number := port(inside.Addr())
	if c, err := gWeb.dial("tcp", fmt.Sprintf("172.18.0.1:%d", number)); err != nil {
		t.Errorf("to the host: %v", err)
	} else {
		_ = c.Close()
	}
	if _, err := gHidden.dial("tcp", fmt.Sprintf("172.19.0.1:%d", number)); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("to the host from an internal network: got %v, want a refusal", err)
	}
	if got := resolve(t, web, "host.docker.internal"); !slices.Equal(got, []string{"172.18.0.1"}) {
		t.Errorf("host.docker.internal is %v", got)
	}
	if _, err := gWeb.dial("tcp", "172.19.0.3:80"); err == nil {
		t.Error("a machine reached a network that it is not on")
	}

	for name, want := range map[string][]string{
		"db": {"172.18.0.3"}, "DB.net1": {"172.18.0.3"}, "www": {"172.18.0.2", "172.18.0.3"}, "inner": nil,
		"3.0.18.172.in-addr.arpa": {"db.net1."},
	} {
		if got := resolve(t, web, name); !slices.Equal(got, want) {
			t.Errorf("web resolves %s to %v, want %v", name, got, want)
		}
	}
	if got := resolve(t, db, "inner"); !slices.Equal(got, []string{"172.19.0.2"}) {
		t.Errorf("db resolves inner to %v", got)
	}
	if hidden.resolver.outside() || !db.resolver.outside() {
		t.Error("only a machine on internal networks alone is kept from other servers")
	}

	// Another name, another network, while connections go on.
	l := gDB.listen("tcp", "172.18.0.3:0")
	served := make(chan net.Conn, 1)
	go func() {
		if c, err := l.Accept(); err == nil {
			served <- c
		}
	}()
	kept := gWeb.mustDial("tcp", l.Addr().String())
	far := <-served
	defer far.Close()
	second := shared(back, 2, 4, 1, "web")
	renamed := shared(front, 1, 2, 0, "web2")
	renamed.Links = map[string]string{"alias": "db"}
	if err := web.SetSegments([]Segment{renamed, second}); err != nil {
		t.Fatal(err)
	}
	gWeb.do(func() {
		if err := gWeb.setUpInterface(web.Guest().Interfaces[1]); err != nil {
			t.Error(err)
		}
	})
	if err := echo(t, gWeb, gHidden, "172.19.0.4:0"); err != nil {
		t.Errorf("to a machine that came later: %v", err)
	}
	for name, want := range map[string][]string{"alias": {"172.18.0.3"}, "inner": {"172.19.0.2"}, "db": {"172.18.0.3", "172.19.0.3"}} {
		if got := resolve(t, web, name); !slices.Equal(got, want) {
			t.Errorf("web resolves %s to %v, want %v", name, got, want)
		}
	}
	if got := resolve(t, db, "web2"); !slices.Equal(got, []string{"172.18.0.2"}) {
		t.Errorf("db resolves web's new name to %v", got)
	}
	if got := resolve(t, db, "web"); !slices.Equal(got, []string{"172.19.0.4"}) {
		t.Errorf("db resolves web's old name to %v, want that of the other network", got)
	}
	for _, c := range []net.Conn{kept, far} {
		if _, err := c.Write([]byte("x")); err != nil {
			t.Errorf("a connection did not outlive the change: %v", err)
		}
	}
	if err := web.SetSegments([]Segment{renamed}); err != nil {
		t.Fatal(err)
	}
	if got := resolve(t, db, "web"); got != nil {
		t.Errorf("db resolves the name of a machine that has left to %v", got)
	}
	if n := entries(t, back); n != 4 {
		t.Errorf("%d names are left in the network's directory, want those of two machines", n)
	}

	// A machine that was killed leaves names, and nobody behind them.
	gone := shared(front, 1, 9, 0, "killed")
	l2, err := lan.Join(front, lan.Member{MAC: gone.MAC, Addresses: prefixAddresses(gone.Addresses), Names: gone.Names}, func([]byte) {})
	if err != nil {
		t.Fatal(err)
	}
	if got := resolve(t, web, "killed"); !slices.Equal(got, []string{"172.18.0.9"}) {
		t.Errorf("before its death: %v", got)
	}
	saved := map[string][]byte{}
	for _, name := range []string{"0242ac120009.json"} {
		if saved[name], err = os.ReadFile(filepath.Join(front, name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l2.Close(); err != nil {
		t.Fatal(err)
	}
	for name, b := range saved {
		if err := os.WriteFile(filepath.Join(front, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := resolve(t, web, "killed"); got != nil {
		t.Errorf("after its death: %v", got)
	}
}

func entries(t *testing.T, dir string) int {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(list)
}

// A machine speaks for itself alone.
func TestSegmentsSpoofed(t *testing.T) {
	dir := t.TempDir()
	heard := make(chan []byte, 16)
	other, err := lan.Join(dir, lan.Member{MAC: lan.MAC{2, 0, 0, 0, 0, 9}, Addresses: []netip.Addr{netip.MustParseAddr("172.18.0.9")}}, func(b []byte) {
		heard <- slices.Clone(b)
	})
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	u := openWire(t, Config{Shared: true, Segments: []Segment{shared(dir, 1, 2, 0, "me")}})
	s := (*u.segments.Load())[0]
	frame := func(from lan.MAC, source string) []byte {
		b := append([]byte{2, 0, 0, 0, 0, 9}, from[:]...)
		ip := []byte{0x45, 0, 0, 24, 0, 0, 0, 0, 64, 253, 0, 0}
		a := netip.MustParseAddr(source).As4()
		ip = append(append(ip, a[:]...), 172, 18, 0, 9)
		return append(append(append(b, 8, 0), ip...), "data"...)
	}
	s.fromGuest(frame(lan.MAC{2, 0, 0, 0, 0, 7}, "172.18.0.2")) // another's Ethernet address
	s.fromGuest(frame(s.MAC, "172.18.0.7"))                     // another's address
	arp := append(append([]byte{255, 255, 255, 255, 255, 255}, s.MAC[:]...), 8, 6, 0, 1, 8, 0, 6, 4, 0, 2)
	arp = append(append(arp, s.MAC[:]...), 172, 18, 0, 7)
	s.fromGuest(append(append(arp, 2, 0, 0, 0, 0, 9), 172, 18, 0, 9)) // "172.18.0.7 is me"
	honest := frame(s.MAC, "172.18.0.2")
	s.fromGuest(honest)
	select {
	case got := <-heard:
		if string(got) != string(honest) {
			t.Errorf("heard %x, want the honest frame %x alone", got, honest)
		}
	case <-time.After(20 * time.Second):
		t.Error("the honest frame did not arrive")
	}
}

func TestUntag(t *testing.T) {
	plain := []byte("TOTOTOFROMFRETpayload")
	tagged := []byte("TOTOTOFROMFR\x81\x00\x20\x05ETpayload")
	for _, test := range []struct {
		in, want string
		tag      int
	}{
		{string(plain), string(plain), 0}, {string(tagged), "TOTOTOFROMFRETpayload", 5}, {string(tagged[:16]), "", 0}, {"short", "", 0},
		{"TOTOTOFROMFR\x81\x00\x20\x00ETx", "", 0},
	} {
		got, tag := untag([]byte(test.in))
		if string(got) != test.want || tag != test.tag {
			t.Errorf("%q: got %q with tag %d, want %q with %d", test.in, got, tag, test.want, test.tag)
		}
	}
}
