package network

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	dnsPort     = 53
	maxQuery    = 4096
	maxAnswer   = 65535
	plainAnswer = 512 // over UDP, to a client that names no size (RFC 1035)

	dnsHedge    = time.Second      // without an answer for so long the next server is asked as well
	dnsTimeout  = 10 * time.Second // of a query, all servers together
	dnsPenalty  = 30 * time.Second // for so long a server that failed is asked last
	dnsIdle     = 30 * time.Second // of a guest's TCP connection
	resolvCheck = time.Second      // how often resolv.conf is looked at
	localTTL    = 60
	memberTTL   = 5 // of machines, which come and go
)

// resolver answers the guest's DNS queries: the names of the host itself, everything else through the servers that the
// host uses. Messages pass as they are; only their IDs change.
type resolver struct {
	path  string                  // of resolv.conf
	fixed []netip.AddrPort        // instead of it
	names map[string][]netip.Addr // lower case, without the last dot
	hedge time.Duration
	host  bool // the host's own names are answered

	segments atomic.Pointer[[]*segment] // whose machines' names are answered

	mu      sync.Mutex
	checked time.Time
	stamp   string // of resolv.conf as last read
	servers []netip.AddrPort
	bad     map[netip.AddrPort]time.Time // failed, until when it is asked last
}

func newResolver(c Config) *resolver {
	r := &resolver{path: resolvConf, hedge: dnsHedge, host: !c.NoHost, names: map[string][]netip.Addr{}, bad: map[netip.AddrPort]time.Time{}}
	for _, a := range c.DNS {
		r.fixed = append(r.fixed, netip.AddrPortFrom(a, dnsPort))
	}
	for name, a := range c.Hosts {
		r.names[fold(name)] = []netip.Addr{a.Unmap()}
	}
	r.serve(nil)
	return r
}

// serve says which networks the machine is on.
func (r *resolver) serve(segments []*segment) { r.segments.Store(&segments) }

// known answers a name that needs no other server: which addresses it has, and for how many seconds that may be kept.
func (r *resolver) known(name string) (addrs []netip.Addr, ttl uint32, ok bool) {
	if addrs, ok := r.names[fold(name)]; ok {
		return addrs, localTTL, true
	}
	segments := *r.segments.Load()
	if name = fold(name); r.host && (name == "host.docker.internal" || name == "gateway.docker.internal") {
		for _, s := range segments {
			if s.Internal {
				continue
			}
			for _, a := range []netip.Addr{s.plan.host4, s.plan.host6} {
				if a.IsValid() {
					addrs = append(addrs, a)
				}
			}
			if len(addrs) > 0 {
				return addrs, localTTL, true
			}
		}
	}
	for _, s := range segments {
		addrs = append(addrs, s.lookup(name)...)
	}
	// Whoever has several machines under one name wants all of them to be asked.
	rand.Shuffle(len(addrs), func(i, j int) { addrs[i], addrs[j] = addrs[j], addrs[i] })
	return addrs, memberTTL, len(addrs) > 0
}

// reverse answers the question for the name of an address, as "2.0.18.172.in-addr.arpa".
func (r *resolver) reverse(question string) (string, bool) {
	labels, ok := strings.CutSuffix(fold(question), ".in-addr.arpa")
	if !ok {
		return "", false
	}
	parts := strings.Split(labels, ".")
	slices.Reverse(parts)
	a, err := netip.ParseAddr(strings.Join(parts, "."))
	if err != nil || !a.Is4() {
		return "", false
	}
	for _, s := range *r.segments.Load() {
		if s.lan != nil && s.Resolve {
			if name, ok := s.lan.Reverse(a); ok {
				return name + "." + s.Name + ".", true
			}
		}
	}
	return "", false
}

// outside reports whether the machine may ask other servers: on internal networks alone it may not.
func (r *resolver) outside() bool {
	segments := *r.segments.Load()
	return len(segments) == 0 || slices.ContainsFunc(segments, func(s *segment) bool { return !s.Internal })
}

func fold(name string) string { return strings.ToLower(strings.TrimSuffix(name, ".")) }

// upstream returns the servers, those that failed of late last.
func (r *resolver) upstream() []netip.AddrPort {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	servers := r.fixed
	if len(servers) == 0 {
		if now.Sub(r.checked) >= resolvCheck {
			r.checked = now
			stamp := "missing"
			if info, err := os.Stat(r.path); err == nil {
				stamp = fmt.Sprint(info.ModTime().UnixNano(), info.Size())
			}
			if stamp != r.stamp {
				r.stamp, r.servers = stamp, nil
				for _, a := range readResolvConf(r.path).servers {
					r.servers = append(r.servers, netip.AddrPortFrom(a, dnsPort))
				}
				if len(r.servers) == 0 {
					r.servers = []netip.AddrPort{netip.AddrPortFrom(netip.MustParseAddr(defaultServerIPv4), dnsPort)}
				}
			}
		}
		servers = r.servers
	}
	var good, bad []netip.AddrPort
	for _, s := range servers {
		if now.Before(r.bad[s]) {
			bad = append(bad, s)
		} else {
			delete(r.bad, s)
			good = append(good, s)
		}
	}
	return append(good, bad...)
}

func (r *resolver) failed(s netip.AddrPort) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bad[s] = time.Now().Add(dnsPenalty)
}

// query is what is understood of a query.
type query struct {
	header   dnsmessage.Header
	question dnsmessage.Question
	size     int // of the largest answer over UDP
}

func parseQuery(msg []byte) (query, error) {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil {
		return query{}, err
	}
	q := query{header: h, size: plainAnswer}
	if h.Response {
		return query{}, errors.New("a response, not a query")
	}
	if q.question, err = p.Question(); err != nil {
		return query{}, err
	}
	if _, err := p.Question(); !errors.Is(err, dnsmessage.ErrSectionDone) {
		return query{}, errors.New("more than one question")
	}
	if p.SkipAllAnswers() == nil && p.SkipAllAuthorities() == nil {
		for {
			rh, err := p.AdditionalHeader()
			if err != nil {
				break
			}
			if rh.Type == dnsmessage.TypeOPT {
				q.size = max(q.size, int(rh.Class)) // RFC 6891: the class is the size
			}
			if p.SkipAdditional() != nil {
				break
			}
		}
	}
	return q, nil
}

// answer returns the answer to a message of the guest, nil when it deserves none.
func (r *resolver) answer(ctx context.Context, msg []byte, stream bool) []byte {
	q, err := parseQuery(msg)
	if err != nil {
		if len(msg) < 12 || msg[2]&0x80 != 0 {
			return nil
		}
		return bare(query{header: dnsmessage.Header{ID: binary.BigEndian.Uint16(msg)}}, dnsmessage.RCodeFormatError, false)
	}
	if q.question.Class == dnsmessage.ClassINET {
		name := q.question.Name.String()
		if addrs, ttl, ok := r.known(name); ok {
			return local(q, addrs, ttl)
		}
		if name, ok := r.reverse(name); ok && q.question.Type == dnsmessage.TypePTR {
			return pointer(q, name)
		}
	}
	if !r.outside() {
		return bare(q, dnsmessage.RCodeNameError, false)
	}
	ctx, cancel := context.WithTimeout(ctx, dnsTimeout)
	defer cancel()
	answer := r.exchange(ctx, q, msg, stream)
	switch {
	case answer == nil:
		return bare(q, dnsmessage.RCodeServerFailure, false)
	case !stream && len(answer) > q.size:
		return bare(q, dnsmessage.RCode(answer[3]&0xf), true) // the client asks again over TCP
	}
	binary.BigEndian.PutUint16(answer, q.header.ID)
	return answer
}

// bare is an answer without records.
func bare(q query, code dnsmessage.RCode, truncated bool) []byte {
	m := dnsmessage.Message{Header: dnsmessage.Header{
		ID: q.header.ID, Response: true, OpCode: q.header.OpCode, RecursionDesired: q.header.RecursionDesired,
		RecursionAvailable: true, RCode: code, Truncated: truncated,
	}}
	if q.question.Name.Length > 0 {
		m.Questions = []dnsmessage.Question{q.question}
	}
	b, err := m.Pack()
	if err != nil {
		return nil
	}
	return b
}

// local answers a name that this resolver knows itself.
func local(q query, addrs []netip.Addr, ttl uint32) []byte {
	m := authoritative(q)
	h := dnsmessage.ResourceHeader{Name: q.question.Name, Class: dnsmessage.ClassINET, TTL: ttl}
	for _, a := range addrs {
		switch {
		case a.Is4() && (q.question.Type == dnsmessage.TypeA || q.question.Type == dnsmessage.TypeALL):
			h.Type = dnsmessage.TypeA
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AResource{A: a.As4()}})
		case a.Is6() && (q.question.Type == dnsmessage.TypeAAAA || q.question.Type == dnsmessage.TypeALL):
			h.Type = dnsmessage.TypeAAAA
			m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.AAAAResource{AAAA: a.As16()}})
		}
	}
	b, err := m.Pack()
	if err != nil {
		return nil
	}
	return b
}

// authoritative begins an answer of this resolver's own.
func authoritative(q query) dnsmessage.Message {
	return dnsmessage.Message{
		Header: dnsmessage.Header{
			ID: q.header.ID, Response: true, RecursionDesired: q.header.RecursionDesired, RecursionAvailable: true, Authoritative: true,
		},
		Questions: []dnsmessage.Question{q.question},
	}
}

// pointer answers with the name of an address.
func pointer(q query, name string) []byte {
	n, err := dnsmessage.NewName(name)
	if err != nil {
		return bare(q, dnsmessage.RCodeServerFailure, false)
	}
	m := authoritative(q)
	h := dnsmessage.ResourceHeader{Name: q.question.Name, Type: dnsmessage.TypePTR, Class: dnsmessage.ClassINET, TTL: memberTTL}
	m.Answers = append(m.Answers, dnsmessage.Resource{Header: h, Body: &dnsmessage.PTRResource{PTR: n}})
	b, err := m.Pack()
	if err != nil {
		return nil
	}
	return b
}

// exchange asks the servers in turn: the next one as soon as one has failed, or has been silent for a while. The first
// that knows whether the name exists decides; a server's own failure is only passed on when no other one does better.
func (r *resolver) exchange(ctx context.Context, q query, msg []byte, stream bool) []byte {
	servers := r.upstream()
	type result struct {
		server netip.AddrPort
		answer []byte
		err    error
	}
	results := make(chan result, len(servers))
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait() // after cancel: nobody outlives the query
	defer cancel()

	timer := time.NewTimer(0)
	defer timer.Stop()
	next, open := 0, 0
	var fallback []byte
	for {
		select {
		case <-timer.C:
			if next == len(servers) {
				continue
			}
			server := servers[next]
			next++
			open++
			timer.Reset(r.hedge)
			wg.Go(func() {
				answer, err := ask(ctx, server, q, msg, stream)
				results <- result{server, answer, err}
			})
		case res := <-results:
			open--
			if res.err == nil {
				switch code := dnsmessage.RCode(res.answer[3] & 0xf); code {
				case dnsmessage.RCodeSuccess, dnsmessage.RCodeNameError:
					for _, silent := range servers[:next] {
						if silent == res.server {
							break
						}
						r.failed(silent)
					}
					return res.answer
				default:
					fallback = res.answer
				}
			}
			r.failed(res.server)
			if next == len(servers) && open == 0 {
				return fallback
			}
			timer.Reset(0)
		case <-ctx.Done():
			return fallback
		}
	}
}

// ask asks one server. Over UDP it listens until an answer to this very question comes.
func ask(ctx context.Context, server netip.AddrPort, q query, msg []byte, stream bool) ([]byte, error) {
	network := "udp"
	if stream {
		network = "tcp"
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, server.String())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	id := uint16(rand.Uint32())
	out := append([]byte(nil), msg...)
	binary.BigEndian.PutUint16(out, id)
	if stream {
		if err := writeMessage(conn, out); err != nil {
			return nil, err
		}
		in, err := readMessage(conn, maxAnswer)
		if err != nil {
			return nil, err
		}
		if !answers(in, id, q.question) {
			return nil, fmt.Errorf("dns server %s: answer to another question", server)
		}
		return in, nil
	}
	if _, err := conn.Write(out); err != nil {
		return nil, err
	}
	buf := buffers.Get().(*[]byte)
	defer buffers.Put(buf)
	for {
		n, err := conn.Read(*buf)
		if err != nil {
			return nil, err
		}
		if in := (*buf)[:n]; answers(in, id, q.question) {
			return append([]byte(nil), in...), nil
		}
	}
}

// answers says whether a message is the response to the question asked with that ID.
func answers(msg []byte, id uint16, asked dnsmessage.Question) bool {
	var p dnsmessage.Parser
	h, err := p.Start(msg)
	if err != nil || !h.Response || h.ID != id {
		return false
	}
	got, err := p.Question()
	if err != nil { // some servers refuse without repeating the question
		return errors.Is(err, dnsmessage.ErrSectionDone) && h.RCode != dnsmessage.RCodeSuccess && h.RCode != dnsmessage.RCodeNameError
	}
	return got.Type == asked.Type && got.Class == asked.Class && strings.EqualFold(got.Name.String(), asked.Name.String())
}

// serveDNS answers a guest's queries over TCP, one after another (RFC 7766 lets a server do so).
func (n *netstack) serveDNS(ctx context.Context, ep tcpip.Endpoint, wq *waiter.Queue) {
	conn := gonet.NewTCPConn(wq, ep)
	defer ep.Abort()
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { ep.Abort() })
	defer stop()
	for {
		_ = conn.SetDeadline(time.Now().Add(dnsIdle))
		msg, err := readMessage(conn, maxQuery)
		if err != nil {
			return
		}
		answer := n.dns.answer(ctx, msg, true)
		if answer == nil || writeMessage(conn, answer) != nil {
			return
		}
	}
}

// readMessage reads a DNS message behind its length (RFC 1035, section 4.2.2).
func readMessage(r io.Reader, limit int) ([]byte, error) {
	var h [2]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return nil, err
	}
	n := int(binary.BigEndian.Uint16(h[:]))
	if n > limit {
		return nil, fmt.Errorf("dns message of %d bytes is more than the limit of %d", n, limit)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(r, b)
	return b, err
}

func writeMessage(w io.Writer, msg []byte) error {
	if len(msg) > maxAnswer {
		return fmt.Errorf("dns message of %d bytes is more than the limit of %d", len(msg), maxAnswer)
	}
	b := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(msg)), uint16(len(msg)))
	_, err := w.Write(append(b, msg...))
	return err
}
