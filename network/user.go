package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// plan is the address plan of a user network. Every machine has a wire of its own, so all may use the same one.
type plan struct {
	net4, net6         netip.Prefix
	gateway4, gateway6 netip.Addr // routes everything, answers DNS
	host4, host6       netip.Addr // stand for the host's loopback
	guest4, guest6     netip.Addr
}

// The IPv4 networks, in order of preference: the first that none of the host's interfaces uses. Hosts of the same
// network elsewhere cannot be reached from the guest.
var networks4 = [...]string{"10.0.2.0/24", "192.168.127.0/24", "172.31.254.0/24"}

// network6 is a unique local prefix (RFC 4193). Its source addresses make resolvers prefer IPv4 for global names, which
// is right as long as nobody knows whether the host has IPv6.
const network6 = "fd6b:6372:6164::/64"

// The hosts of both networks.
const (
	hostGateway = 1
	hostHost    = 2
	hostGuest   = 15
)

func newPlan(used []netip.Prefix) plan {
	p := plan{net6: netip.MustParsePrefix(network6)}
	for _, s := range networks4 {
		p.net4 = netip.MustParsePrefix(s)
		if !overlaps(p.net4, used) {
			break
		}
	}
	p.gateway4, p.gateway6 = nth(p.net4, hostGateway), nth(p.net6, hostGateway)
	p.host4, p.host6 = nth(p.net4, hostHost), nth(p.net6, hostHost)
	p.guest4, p.guest6 = nth(p.net4, hostGuest), nth(p.net6, hostGuest)
	return p
}

func overlaps(p netip.Prefix, used []netip.Prefix) bool {
	for _, u := range used {
		if u.Overlaps(p) {
			return true
		}
	}
	return false
}

// nth is the n-th address of a network, n below 256.
func nth(p netip.Prefix, n byte) netip.Addr {
	b := p.Addr().AsSlice()
	b[len(b)-1] = n
	a, _ := netip.AddrFromSlice(b)
	return a
}

// HostPrefixes are the networks of the host's own interfaces.
func HostPrefixes() []netip.Prefix {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	var out []netip.Prefix
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			out = append(out, p.Masked())
		}
	}
	return out
}

// limits bound what a guest can make this process hold.
type limits struct {
	tcp     int // flows
	udp     int // sessions in each direction
	echo    int // ICMP echo sessions
	queries int // DNS queries under way
}

// newLimits leaves most of the process's descriptors to the process: a flow or a session holds one.
func newLimits() limits {
	l := limits{tcp: 4096, udp: 1024, echo: 64, queries: 256}
	var r unix.Rlimit
	if unix.Getrlimit(unix.RLIMIT_NOFILE, &r) == nil {
		l.tcp = min(l.tcp, int(min(r.Cur, 1<<20))/2)
		l.udp = min(l.udp, int(min(r.Cur, 1<<20))/8)
		l.echo = min(l.echo, int(min(r.Cur, 1<<20))/16)
		l.queries = min(l.queries, int(min(r.Cur, 1<<20))/16)
	}
	return l
}

// user is the wire of in-process stacks: one for each network that the machine is on.
//
// Open binds ports and makes a socket pair; a stack is built by the first frame or the first connection, so that a start pays
// nothing for it.
type user struct {
	config   Config
	log      *slog.Logger
	plan     plan // of a wire of its own
	ports    []published
	resolver *resolver

	file      *os.File // QEMU's end
	fileOnce  sync.Once
	fileErr   error
	conn      *net.UnixConn // ours
	run       context.Context
	cancel    context.CancelFunc
	machine   context.Context // done when the machine is gone
	reader    chan struct{}   // closed when no more frames are delivered
	gate      gate
	closeOnce sync.Once

	mu       sync.Mutex
	segments atomic.Pointer[[]*segment] // replaced with the lock held
	guest    Guest
	left     []*segment // not among segments any more; the reader may still be in them
	leaving  atomic.Bool
	closed   bool
}

var _ Wire = (*user)(nil)

func openUser(ctx context.Context, c Config, log *slog.Logger) (_ *user, retErr error) {
	if c.MTU == 0 {
		c.MTU = DefaultMTU
	}
	if c.born.IsZero() {
		c.born = time.Now()
	}
	u := &user{config: c, log: log}
	// The wire outlives the call: only Close ends it.
	u.run, u.cancel = context.WithCancel(context.WithoutCancel(ctx))
	machine, gone := context.WithCancel(u.run)
	u.machine = machine
	u.segments.Store(&[]*segment{})
	defer func() {
		if retErr != nil {
			gone()
			u.cancel()
			for _, p := range u.ports {
				p.close()
			}
			for _, s := range *u.segments.Load() {
				s.leave()
			}
		}
	}()
	for _, p := range c.Ports {
		bound, err := bindPort(ctx, p)
		if err != nil {
			return nil, err
		}
		u.ports = append(u.ports, bound...)
	}
	var err error
	if c.End != nil {
		u.conn, err = adopt(c.End)
	} else {
		u.conn, u.file, err = socketPair()
	}
	if err != nil {
		return nil, err
	}
	u.resolver = newResolver(c)
	if c.Shared {
		err = u.setSegments(c.Segments)
	} else {
		u.plan = newPlan(HostPrefixes())
		err = u.setSegments([]Segment{alone(c, u.plan)})
	}
	if err != nil {
		_ = u.conn.Close()
		return nil, errors.Join(err, u.CloseFile())
	}
	u.reader = make(chan struct{})
	u.gate.start(func() {
		defer close(u.reader)
		err := readFrames(u.conn, u.fromGuest)
		if err != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, unix.ECONNRESET) {
			log.Error("the wire to the machine broke", "error", err)
		}
		_ = u.conn.Close() // writers end as well
		gone()             // what comes from the host has nowhere to go
	})
	for _, p := range u.ports {
		u.gate.start(func() {
			if p.tcp != nil {
				acceptTCP(u.run, p, u.stack, log)
			} else {
				receiveUDP(u.run, p, u.stack, log)
			}
		})
	}
	return u, nil
}

// fromGuest takes a frame of the machine. It is called by one goroutine.
func (u *user) fromGuest(frame []byte) {
	if u.leaving.Load() {
		u.mu.Lock()
		left := u.left
		u.left = nil
		u.leaving.Store(false)
		u.mu.Unlock()
		for _, s := range left { // this goroutine is in none of them
			u.gate.start(s.close)
		}
	}
	tag := 0
	if frame, tag = untag(frame); frame == nil {
		return
	}
	for _, s := range *u.segments.Load() {
		if s.Tag == tag {
			s.fromGuest(frame)
			return
		}
	}
}

// SetSegments implements Wire.
func (u *user) SetSegments(want []Segment) error {
	if !u.config.Shared {
		return errNotShared
	}
	if err := checkSegments(want); err != nil {
		return err
	}
	return u.setSegments(want)
}

func (u *user) setSegments(want []Segment) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.closed {
		return net.ErrClosed
	}
	old := *u.segments.Load()
	var next []*segment
	var missing []Segment
	for _, w := range want {
		if i := slices.IndexFunc(old, func(s *segment) bool { return s.same(w) }); i >= 0 {
			if err := old[i].rename(w); err != nil {
				return err
			}
			next = append(next, old[i])
		} else {
			missing = append(missing, w)
		}
	}
	for _, s := range old { // before others join, who may be the same under another name
		if !slices.Contains(next, s) {
			s.leave()
			s.cancel()
			u.left = append(u.left, s)
			u.leaving.Store(true)
		}
	}
	var errs []error
	for _, w := range missing {
		s, err := u.join(w)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		next = append(next, s)
	}
	slices.SortFunc(next, func(a, b *segment) int { return a.Tag - b.Tag })
	u.guest = guestOf(u.config, next)
	u.segments.Store(&next)
	u.resolver.serve(next)
	return errors.Join(errs...)
}

// guestOf is what the guest is told of its networks.
func guestOf(c Config, segments []*segment) Guest {
	g := Guest{MAC: c.MAC, MTU: c.MTU, Search: c.Search, Resolver: c.Shared}
	if g.Search == nil {
		g.Search = readResolvConf(resolvConf).search
	}
	for _, s := range segments {
		i := Interface{Tag: s.Tag, MAC: s.MAC[:], MTU: s.MTU, Addresses: s.Addresses}
		if s.Default {
			i.Gateways = s.Gateways
		}
		if s.Tag == 0 {
			g.MAC = i.MAC
		}
		if !g.HostIP.IsValid() && !c.NoHost && !s.Internal {
			g.HostIP = s.plan.host4
		}
		if len(g.DNS) == 0 && len(s.Gateways) > 0 {
			g.DNS = s.Gateways[:1]
		}
		g.Interfaces = append(g.Interfaces, i)
	}
	return g
}

// socketPair is a connected pair: our end, and QEMU's.
func socketPair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	for _, fd := range fds {
		for _, opt := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, 1<<20) // as much of it as the host allows
		}
	}
	ours := os.NewFile(uintptr(fds[0]), "netdev")
	theirs := os.NewFile(uintptr(fds[1]), "netdev")
	conn, err := net.FileConn(ours) // a copy
	if err := errors.Join(err, ours.Close()); err != nil {
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("socket pair: %w", err)
	}
	return conn.(*net.UnixConn), theirs, nil
}

// adopt is our end of a wire that is there already.
func adopt(end *os.File) (*net.UnixConn, error) {
	conn, err := net.FileConn(end) // a copy
	if err != nil {
		return nil, fmt.Errorf("go on with a wire: %w", err)
	}
	c, ok := conn.(*net.UnixConn)
	if !ok {
		_ = conn.Close()
		return nil, errors.New("go on with a wire: it is no unix socket")
	}
	return c, end.Close()
}

// stack is the one that published ports lead into, nil when there is none.
func (u *user) stack() *netstack {
	for _, s := range *u.segments.Load() {
		if !s.Internal {
			return s.stack()
		}
	}
	return nil
}

func (u *user) File() *os.File { return u.file }

func (u *user) Guest() Guest {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.guest
}

func (u *user) CloseFile() error {
	u.fileOnce.Do(func() {
		if u.file != nil {
			u.fileErr = u.file.Close()
		}
	})
	return u.fileErr
}

func (u *user) Netdev(id string, fd int) string {
	return fmt.Sprintf("stream,id=%s,server=off,addr.type=fd,addr.str=%d", id, fd)
}

func (u *user) Ports() []Port {
	var out []Port
	for _, p := range u.ports {
		out = append(out, p.Port)
	}
	return out
}

func (u *user) Close() error {
	u.closeOnce.Do(func() {
		for _, p := range u.ports {
			p.close()
		}
		_ = u.conn.Close()
		<-u.reader // a fragment delivered to a closed stack would hang for ever
		u.gate.shut()
		u.mu.Lock()
		u.closed = true
		segments := slices.Concat(*u.segments.Load(), u.left)
		u.mu.Unlock()
		late := time.NewTimer(drainOnClose)
		defer late.Stop()
		for _, s := range segments {
			s.leave()
			s.drain(late.C)
		}
		u.cancel()
		for _, s := range segments {
			s.close()
		}
		u.gate.wait()
	})
	return u.CloseFile()
}

// drainOnClose is how long Close waits for peers that take the last bytes of a machine that is gone.
const drainOnClose = 2 * time.Second

// tally counts what goes on.
type tally struct {
	mu   sync.Mutex
	n    int
	zero chan struct{} // closed at the next 0; nil: nobody waits
}

func (t *tally) add(d int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.n += d
	if t.n == 0 && t.zero != nil {
		close(t.zero)
		t.zero = nil
	}
}

// none is closed when there is nothing, now or for the first time. One caller at a time.
func (t *tally) none() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	zero := make(chan struct{})
	if t.n == 0 {
		close(zero)
	} else {
		t.zero = zero
	}
	return zero
}

// gate counts goroutines and lets no new one in once it is shut.
type gate struct {
	mu   sync.Mutex
	down bool
	wg   sync.WaitGroup
}

// enter admits the calling goroutine, which must leave, or says that the gate is shut.
func (g *gate) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.down {
		return false
	}
	g.wg.Add(1)
	return true
}

func (g *gate) leave() { g.wg.Done() }

// start runs f in a goroutine of its own unless the gate is shut.
func (g *gate) start(f func()) bool {
	if !g.enter() {
		return false
	}
	go func() {
		defer g.leave()
		f()
	}()
	return true
}

func (g *gate) shut() {
	g.mu.Lock()
	g.down = true
	g.mu.Unlock()
}

func (g *gate) wait() { g.wg.Wait() }

// slots is a bounded number of something.
type slots chan struct{}

func (s slots) take() bool {
	select {
	case s <- struct{}{}:
		return true
	default:
		return false
	}
}

func (s slots) give() { <-s }

// seldom limits how often something is said.
type seldom struct {
	mu   sync.Mutex
	last time.Time
}

func (s *seldom) now() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if t := time.Now(); t.Sub(s.last) > 10*time.Second {
		s.last = t
		return true
	}
	return false
}
