package network

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/net/dns/dnsmessage"
)

// nameServer is a small real DNS server over UDP and TCP on one address of the host.
type nameServer struct {
	at    netip.AddrPort
	asked atomic.Int64
	mute  atomic.Bool
	fail  atomic.Bool
}

const records = 400 // of big.example: some 6 KiB

// startNameServer serves these names below "example":
//
//	one    a single A record, naming the server by its last byte
//	big    many, too many for a datagram of 512 bytes
func startNameServer(t testing.TB, at string) *nameServer {
	t.Helper()
	s := &nameServer{at: netip.MustParseAddrPort(at)}
	pc, err := net.ListenPacket("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	l := listenHost(t, "tcp", at)
	t.Cleanup(func() { _ = pc.Close() })
	go func() {
		buf := make([]byte, 4096)
		for {
			n, from, err := pc.ReadFrom(buf)
			if err != nil {
				return
			}
			q, err := parseQuery(buf[:n])
			if err != nil {
				continue
			}
			if answer := s.answer(buf[:n]); answer != nil {
				if len(answer) > q.size {
					answer = bare(q, dnsmessage.RCodeSuccess, true)
				}
				_, _ = pc.WriteTo(answer, from)
			}
		}
	}()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for {
					msg, err := readMessage(c, 4096)
					if err != nil {
						return
					}
					answer := s.answer(msg)
					if answer == nil || writeMessage(c, answer) != nil {
						return
					}
				}
			}()
		}
	}()
	return s
}

func (s *nameServer) answer(msg []byte) []byte {
	s.asked.Add(1)
	q, err := parseQuery(msg)
	switch {
	case err != nil || s.mute.Load():
		return nil
	case s.fail.Load():
		return bare(q, dnsmessage.RCodeServerFailure, false)
	}
	last := s.at.Addr().AsSlice()[s.at.Addr().BitLen()/8-1]
	switch fold(q.question.Name.String()) {
	case "one.example":
		return local(q, []netip.Addr{netip.AddrFrom4([4]byte{192, 0, 2, last})}, localTTL)
	case "big.example":
		var addrs []netip.Addr
		for i := range records {
			addrs = append(addrs, netip.AddrFrom4([4]byte{192, 0, byte(i >> 8), byte(i)}))
		}
		return local(q, addrs, localTTL)
	}
	return bare(q, dnsmessage.RCodeNameError, false)
}

// lookup asks the gateway as a guest's resolver does, over one transport.
func (g *guest) lookup(network, name string) ([]string, error) {
	r := net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		return g.dial(network, join(g.plan.gateway4, dnsPort))
	}}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	return r.LookupHost(ctx, name)
}

func TestDNS(t *testing.T) {
	namespace(t)
	first, second := startNameServer(t, "127.0.0.71:53"), startNameServer(t, "[::1]:53")
	u := openWire(t, Config{
		DNS:   []netip.Addr{netip.MustParseAddr("127.0.0.70"), first.at.Addr(), second.at.Addr()}, // at .70 there is none
		Hosts: map[string]netip.Addr{"DB.Internal.": netip.MustParseAddr("192.0.2.200")},
	})
	g := startGuest(t, u)
	for _, network := range []string{"udp", "tcp"} {
		tests := []struct {
			name string
			want []string
		}{
			{"one.example.", []string{"192.0.2.71"}},
			{"ONE.example.", []string{"192.0.2.71"}},
			{"host.docker.internal.", []string{u.plan.host4.String(), u.plan.host6.String()}},
			{"gateway.docker.internal.", []string{u.plan.host4.String(), u.plan.host6.String()}},
			{"db.internal.", []string{"192.0.2.200"}},
		}
		for _, test := range tests {
			t.Run(network+" "+test.name, func(t *testing.T) {
				got, err := g.lookup(network, test.name)
				slices.Sort(got)
				if d := cmp.Diff(test.want, got); d != "" || err != nil {
					t.Errorf("%v (-want +got)\n%s", err, d)
				}
			})
		}
		t.Run(network+" no such name", func(t *testing.T) {
			_, err := g.lookup(network, "missing.example.")
			var e *net.DNSError
			if !errors.As(err, &e) || !e.IsNotFound {
				t.Errorf("got %v, want the server's word that there is none", err)
			}
		})
	}
	t.Run("an answer larger than a datagram", func(t *testing.T) {
		r := net.Resolver{PreferGo: true, Dial: func(_ context.Context, network, _ string) (net.Conn, error) {
			return g.dial(network, join(g.plan.gateway6, dnsPort)) // UDP first, TCP when told that it is truncated
		}}
		got, err := r.LookupNetIP(t.Context(), "ip4", "big.example.")
		if err != nil || len(got) != records {
			t.Errorf("got %d addresses, %v, want %d", len(got), err, records)
		}
	})
	t.Run("the next server when one is mute", func(t *testing.T) {
		first.mute.Store(true)
		defer first.mute.Store(false)
		want := []string{"192.0.2.1"} // the server at ::1
		start := time.Now()
		if got, err := g.lookup("udp", "one.example."); err != nil || cmp.Diff(want, got) != "" {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
		if d := time.Since(start); d > 4*time.Second {
			t.Errorf("took %v", d)
		}
		asked := first.asked.Load()
		if _, err := g.lookup("udp", "one.example."); err != nil {
			t.Error(err)
		}
		if first.asked.Load() != asked {
			t.Error("the mute server was asked again before the others")
		}
	})
	t.Run("the next server when one fails, its failure when all do", func(t *testing.T) {
		n := u.stack()
		clear := func() {
			n.dns.mu.Lock()
			defer n.dns.mu.Unlock()
			n.dns.bad = map[netip.AddrPort]time.Time{}
		}
		clear()
		first.fail.Store(true)
		defer first.fail.Store(false)
		if got, err := g.lookup("udp", "one.example."); err != nil || got[0] != "192.0.2.1" {
			t.Errorf("got %v, %v, want the other server's answer", got, err)
		}
		clear()
		second.fail.Store(true)
		defer second.fail.Store(false)
		_, err := g.lookup("udp", "one.example.")
		var e *net.DNSError
		if !errors.As(err, &e) || e.IsNotFound || !strings.Contains(err.Error(), "server misbehaving") {
			t.Errorf("got %v, want a server failure", err)
		}
	})
}

// The host's resolv.conf is followed while the machine runs.
func TestResolvConfChange(t *testing.T) {
	namespace(t)
	startNameServer(t, "127.0.0.81:53")
	startNameServer(t, "127.0.0.82:53")
	path := filepath.Join(t.TempDir(), "resolv.conf")
	write := func(s string) {
		t.Helper()
		if err := errors.Join(os.WriteFile(path+"~", []byte(s), 0o644), os.Rename(path+"~", path)); err != nil {
			t.Fatal(err)
		}
	}
	write("nameserver 127.0.0.81\n")
	r := newResolver(Config{})
	r.path = path
	ask := func() byte {
		t.Helper()
		q := dnsmessage.Message{
			Header:    dnsmessage.Header{ID: 7, RecursionDesired: true},
			Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("one.example."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
		}
		msg, err := q.Pack()
		if err != nil {
			t.Fatal(err)
		}
		var m dnsmessage.Message
		if err := m.Unpack(r.answer(t.Context(), msg, false)); err != nil {
			t.Fatal(err)
		}
		if m.ID != 7 || len(m.Answers) != 1 {
			t.Fatalf("got %+v, want one answer with the ID of the question", m)
		}
		return m.Answers[0].Body.(*dnsmessage.AResource).A[3]
	}
	if got := ask(); got != 81 {
		t.Errorf("got the answer of server %d, want 81", got)
	}
	write("nameserver 127.0.0.82\n\n")
	r.mu.Lock()
	r.checked = time.Time{} // a second passes
	r.mu.Unlock()
	if got := ask(); got != 82 {
		t.Errorf("after the change: got the answer of server %d, want 82", got)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	r.checked = time.Time{}
	r.mu.Unlock()
	if got := r.upstream(); len(got) != 1 || got[0] != netip.MustParseAddrPort("127.0.0.1:53") {
		t.Errorf("without a file: got %v, want the server on this machine", got)
	}
}

func FuzzDNS(f *testing.F) {
	q := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: 7, RecursionDesired: true},
		Questions: []dnsmessage.Question{{Name: dnsmessage.MustNewName("host.docker.internal."), Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	msg, err := q.Pack()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(msg)
	f.Add(msg[:13])
	f.Add(append(append([]byte(nil), msg...), 0, 0, 41, 16, 0, 0, 0, 0, 0, 0, 0))
	f.Add([]byte("\x00\x07\x81\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x01\x00\x01"))
	r := newResolver(Config{})
	r.fixed = []netip.AddrPort{netip.MustParseAddrPort("127.0.0.1:1")}
	ctx, cancel := context.WithCancel(context.Background())
	cancel() // no server is asked
	f.Fuzz(func(t *testing.T, msg []byte) {
		answer := r.answer(ctx, msg, false)
		_ = answers(msg, 7, q.Questions[0])
		if answer == nil {
			return
		}
		var p dnsmessage.Parser
		h, err := p.Start(answer)
		if err != nil || !h.Response || answer[0] != msg[0] || answer[1] != msg[1] {
			t.Errorf("the answer to %x is %x", msg, answer)
		}
	})
}
