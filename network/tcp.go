package network

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"gvisor.dev/gvisor/pkg/tcpip"
	"gvisor.dev/gvisor/pkg/tcpip/header"
	"gvisor.dev/gvisor/pkg/tcpip/stack"
	"gvisor.dev/gvisor/pkg/tcpip/transport/tcp"
	"gvisor.dev/gvisor/pkg/waiter"
)

const (
	// guestDialTimeout is how long a client of a published port waits for a guest that does not answer at all, such as
	// one that still boots. A guest that refuses is believed at once, unless it is young.
	guestDialTimeout = 10 * time.Second
	// youth is how long after its start a guest's refusal may only mean that its server does not listen yet: the client waits.
	youth        = 5 * time.Second
	retryRefused = 20 * time.Millisecond
	// drainTimeout is how long a finished flow may take to bring its last bytes to a slow guest.
	drainTimeout = 2 * time.Minute
	// A guest that vanished (a namespace taken down) sends no FIN.
	keepaliveIdle     = 5 * time.Minute
	keepaliveInterval = 30 * time.Second
)

// synTable remembers the sequence numbers of connection requests under way: an ICMP error is only believed by the guest
// when it quotes the one it has sent.
type synTable struct {
	mu   sync.Mutex
	seqs map[stack.TransportEndpointID]uint32
}

func (t *synTable) note(id stack.TransportEndpointID, pkt *stack.PacketBuffer, limit int) {
	h := header.TCP(pkt.TransportHeader().Slice())
	if len(h) < header.TCPMinimumSize || h.Flags()&(header.TCPFlagSyn|header.TCPFlagAck|header.TCPFlagRst) != header.TCPFlagSyn {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.seqs == nil {
		t.seqs = map[stack.TransportEndpointID]uint32{}
	}
	if _, ok := t.seqs[id]; !ok && len(t.seqs) < limit {
		t.seqs[id] = h.SequenceNumber()
	}
}

func (t *synTable) take(id stack.TransportEndpointID) uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	seq := t.seqs[id]
	delete(t.seqs, id)
	return seq
}

// forwardTCP carries a connection that the guest opens: first to its destination, and only when that has answered back
// to the guest, so that a refusal reaches the guest as one.
func (n *netstack) forwardTCP(ctx context.Context, r *tcp.ForwarderRequest) {
	id := r.ID()
	seq := n.syns.take(id)
	if !n.gate.enter() {
		r.Complete(true)
		return
	}
	defer n.gate.leave()
	if !n.flows.take() {
		if n.full.now() {
			n.log.Warn("the guest has as many connections as it may have; refusing more", "limit", n.limits.tcp)
		}
		r.Complete(true)
		return
	}
	defer n.flows.give()

	guest := netip.AddrPortFrom(address(id.RemoteAddress), id.RemotePort)
	dst := netip.AddrPortFrom(address(id.LocalAddress), id.LocalPort)
	switch {
	case !n.isGateway(dst.Addr()):
	case dst.Port() == dnsPort:
		if ep, wq := n.answerTCP(r); ep != nil {
			n.serveDNS(n.machine, ep, wq)
		}
		return
	case !n.isHost(dst.Addr()):
		r.Complete(true)
		return
	}
	target, err := n.target(dst.Addr())
	var host net.Conn
	if err == nil {
		host, err = n.dial(n.machine, "tcp", netip.AddrPortFrom(target, dst.Port()).String())
		// The host's loopback is one place: a server may listen on either of its addresses.
		if other := otherLoopback(target); other.IsValid() && errors.Is(err, syscall.ECONNREFUSED) {
			host, err = n.dial(n.machine, "tcp", netip.AddrPortFrom(other, dst.Port()).String())
		}
	}
	switch {
	case err == nil:
	case errors.Is(err, syscall.ETIMEDOUT):
		r.Complete(false) // the guest finds out in its own time
		return
	case errors.Is(err, syscall.EHOSTUNREACH) || errors.Is(err, syscall.ENETUNREACH) || errors.Is(err, syscall.EACCES) ||
		errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EADDRNOTAVAIL):
		r.Complete(false)
		n.sendUnreachable(header.TCPProtocolNumber, guest, dst, seq, err)
		return
	default:
		r.Complete(true)
		return
	}
	ep, wq := n.answerTCP(r)
	if ep == nil {
		_ = host.Close()
		return
	}
	n.splice(ctx, ep, wq, host.(*net.TCPConn))
}

// otherLoopback is the loopback address of the other family, invalid for what is none.
func otherLoopback(a netip.Addr) netip.Addr {
	switch {
	case !a.IsLoopback():
		return netip.Addr{}
	case a.Is4():
		return netip.IPv6Loopback()
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// answerTCP completes the handshake with the guest; nil when the guest has gone meanwhile.
func (n *netstack) answerTCP(r *tcp.ForwarderRequest) (tcpip.Endpoint, *waiter.Queue) {
	var wq waiter.Queue
	ep, err := r.CreateEndpoint(&wq)
	r.Complete(err != nil)
	if err != nil {
		return nil, nil
	}
	n.tune(ep)
	return ep, &wq
}

// tune sets what a flow may hold and how a dead one is found.
func (n *netstack) tune(ep tcpip.Endpoint) {
	if size := flowBuffer(len(n.flows)); size > 0 {
		ep.SocketOptions().SetReceiveBufferSize(size, true)
		ep.SocketOptions().SetSendBufferSize(size, true)
	}
	idle := tcpip.KeepaliveIdleOption(keepaliveIdle)
	_ = ep.SetSockOpt(&idle)
	interval := tcpip.KeepaliveIntervalOption(keepaliveInterval)
	_ = ep.SetSockOpt(&interval)
	ep.SocketOptions().SetKeepAlive(true)
}

// flowBuffer is the fixed size of each of a flow's two buffers when it is the flows-th; zero leaves it to the stack,
// up to tcpBufferMax. With 4096 flows the sum is 32 + 28 + 56 MiB in each direction.
func flowBuffer(flows int) int64 {
	switch {
	case flows <= 64:
		return 0
	case flows <= 512:
		return 64 << 10
	}
	return 16 << 10
}

// acceptTCP carries connections to a published port until the listener is closed.
func acceptTCP(ctx context.Context, p published, stack func() *netstack, log *slog.Logger) {
	for {
		c, err := p.tcp.AcceptTCP()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			// Out of descriptors or memory: neither is helped by asking again at once.
			log.Warn("accept on a published port", "port", p.Port.String(), "error", err)
			select {
			case <-ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		n := stack()
		if n == nil || !n.gate.start(func() { n.publishTCP(ctx, p, c) }) {
			_ = c.Close()
		}
	}
}

// publishTCP carries one connection to the guest. What the guest refuses is reset: the client was accepted already.
func (n *netstack) publishTCP(ctx context.Context, p published, host *net.TCPConn) {
	if !n.flows.take() {
		abortTCP(host)
		return
	}
	defer n.flows.give()
	client := host.RemoteAddr().(*net.TCPAddr).AddrPort()
	// The guest's server may listen on one family only; the client's own is tried first.
	guests := []netip.Addr{n.plan.guest4, n.plan.guest6}
	if p.HostIP.Is6() {
		guests[0], guests[1] = guests[1], guests[0]
	}
	dialCtx, cancel := context.WithTimeout(n.machine, guestDialTimeout)
	defer cancel()
	for {
		refused := true
		for _, guest := range guests {
			if !guest.IsValid() {
				continue
			}
			ep, wq, err := n.dialGuest(dialCtx, client, netip.AddrPortFrom(guest, p.ContainerPort))
			if err == nil {
				n.splice(ctx, ep, wq, host)
				return
			}
			if _, refused = err.(*tcpip.ErrConnectionRefused); !refused {
				break
			}
		}
		if !refused || time.Since(n.born) > youth {
			break
		}
		select { // nobody tells when a server begins to listen
		case <-time.After(retryRefused):
			continue
		case <-dialCtx.Done():
		}
		break
	}
	abortTCP(host)
}

// dialGuest connects to the guest, from the client's own address where that can be.
func (n *netstack) dialGuest(ctx context.Context, client, guest netip.AddrPort) (tcpip.Endpoint, *waiter.Queue, tcpip.Error) {
	source, same := n.visibleSource(client.Addr(), guest.Addr())
	from := netip.AddrPortFrom(source, 0)
	if same {
		from = netip.AddrPortFrom(source, client.Port())
	}
	ep, wq, err := n.connect(ctx, from, guest)
	switch err.(type) {
	case nil, *tcpip.ErrConnectionRefused, *tcpip.ErrTimeout:
	default:
		// The client's port is in use: it is connected to the same guest port through another published port.
		ep, wq, err = n.connect(ctx, netip.AddrPortFrom(n.plan.gatewayOf(guest.Addr()), 0), guest)
	}
	return ep, wq, err
}

func (n *netstack) connect(ctx context.Context, from, to netip.AddrPort) (tcpip.Endpoint, *waiter.Queue, tcpip.Error) {
	var wq waiter.Queue
	ep, err := n.stack.NewEndpoint(tcp.ProtocolNumber, protocol(to.Addr()), &wq)
	if err != nil {
		return nil, nil, err
	}
	n.tune(ep)
	ep.SocketOptions().SetReuseAddress(true)
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventErr | waiter.EventHUp)
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)
	if err := ep.Bind(fullAddress(from)); err != nil {
		ep.Close()
		return nil, nil, err
	}
	err = ep.Connect(fullAddress(to))
	if _, started := err.(*tcpip.ErrConnectStarted); started {
		select {
		case <-ctx.Done():
			ep.Abort()
			return nil, nil, &tcpip.ErrTimeout{}
		case <-ready:
			err = ep.LastError()
		}
	}
	if err != nil {
		ep.Close()
		return nil, nil, err
	}
	return ep, &wq, nil
}

// abortTCP closes a connection so that its peer sees a reset, not an end.
func abortTCP(c *net.TCPConn) {
	_ = c.SetLinger(0)
	_ = c.Close()
}

// splice carries bytes both ways until both have ended, each direction on its own (half-close), or one has broken
// (reset, which breaks the other). It closes both.
func (n *netstack) splice(ctx context.Context, ep tcpip.Endpoint, wq *waiter.Queue, host *net.TCPConn) {
	n.carried.add(1)
	defer n.carried.add(-1)
	f := &flow{guest: ep, wq: wq, host: host, broken: make(chan struct{}), gone: n.machine.Done()}
	stop := context.AfterFunc(ctx, f.abort)
	defer stop()
	// Without a machine nothing of the host's is wanted any more.
	stopGone := context.AfterFunc(n.machine, func() { _ = host.SetReadDeadline(time.Unix(1, 0)) })
	defer stopGone()
	// A reset by the guest must also end a direction that waits for the host alone. This runs under the stack's locks,
	// so it touches the host's side only; the direction that wakes up by it does the rest.
	entry := waiter.NewFunctionEntry(waiter.EventErr|waiter.EventHUp, func(waiter.EventMask) {
		if tcp.EndpointState(ep.State()) == tcp.StateError {
			abortTCP(host)
		}
	})
	wq.EventRegister(&entry)
	defer wq.EventUnregister(&entry)

	done := make(chan struct{})
	go func() {
		defer close(done)
		if !f.toHost() {
			f.abort()
		}
	}()
	if !f.toGuest() {
		f.abort()
	}
	<-done
	f.end(ctx)
}

// flow is one TCP connection of the guest and its counterpart on the host.
type flow struct {
	guest tcpip.Endpoint
	wq    *waiter.Queue
	host  *net.TCPConn

	once   sync.Once
	broken chan struct{}   // closed by abort
	gone   <-chan struct{} // closed when the machine is gone
}

// orphan says whether the machine is gone.
func (f *flow) orphan() bool {
	select {
	case <-f.gone:
		return true
	default:
		return false
	}
}

// abort resets both sides. It may be called at any time, also after the end.
func (f *flow) abort() {
	f.once.Do(func() {
		close(f.broken)
		abortTCP(f.host)
		f.guest.Abort()
	})
}

// wait blocks until an event; false is the end of the flow or of the machine.
func (f *flow) wait(ready <-chan struct{}) bool {
	select {
	case <-ready:
		return true
	case <-f.gone:
		return false
	case <-f.broken:
		return false
	}
}

// toHost carries what the guest sends. It reports whether that came to a proper end. No buffer is held while waiting.
// What the guest has sent, and was told to have arrived, is carried even when the machine is gone meanwhile.
func (f *flow) toHost() bool {
	entry, ready := waiter.NewChannelEntry(waiter.ReadableEvents | waiter.EventHUp | waiter.EventErr)
	f.wq.EventRegister(&entry)
	defer f.wq.EventUnregister(&entry)
	for {
		buf := buffers.Get().(*[]byte)
		w := tcpip.SliceWriter(*buf)
		res, err := f.guest.Read(&w, tcpip.ReadOptions{})
		var writeErr error
		if err == nil {
			_, writeErr = f.host.Write((*buf)[:res.Count])
		}
		buffers.Put(buf)
		switch err.(type) {
		case nil:
			if writeErr != nil {
				return false
			}
		case *tcpip.ErrWouldBlock:
			if !f.wait(ready) {
				return false
			}
		case *tcpip.ErrClosedForReceive:
			return f.host.CloseWrite() == nil
		default:
			return false
		}
	}
}

// toGuest carries what the host's side sends, as toHost does.
func (f *flow) toGuest() bool {
	entry, ready := waiter.NewChannelEntry(waiter.WritableEvents | waiter.EventHUp | waiter.EventErr)
	f.wq.EventRegister(&entry)
	defer f.wq.EventUnregister(&entry)
	raw, err := f.host.SyscallConn()
	if err != nil {
		return false
	}
	for {
		buf, size, err := readReady(raw)
		if err != nil {
			return f.orphan() && errors.Is(err, os.ErrDeadlineExceeded)
		}
		if size == 0 {
			buffers.Put(buf)
			return f.guest.Shutdown(tcpip.ShutdownWrite) == nil || f.orphan()
		}
		ok := f.writeGuest((*buf)[:size], ready)
		buffers.Put(buf)
		if !ok {
			return f.orphan()
		}
	}
}

func (f *flow) writeGuest(b []byte, ready <-chan struct{}) bool {
	r := bytes.NewReader(b)
	for r.Len() > 0 {
		_, err := f.guest.Write(r, tcpip.WriteOptions{})
		switch err.(type) {
		case nil:
		case *tcpip.ErrWouldBlock:
			if !f.wait(ready) {
				return false
			}
		default:
			return false
		}
	}
	return true
}

// end lets the guest's side finish what is still in its buffers, then frees it. Until then the flow counts.
func (f *flow) end(ctx context.Context) {
	_ = f.host.Close()
	f.guest.Close()
	deadline := time.Now().Add(drainTimeout)
	for pause := time.Millisecond; ; pause = min(2*pause, time.Second) {
		switch tcp.EndpointState(f.guest.State()) {
		case tcp.StateClose, tcp.StateError:
			return
		case tcp.StateTimeWait:
			// The last acknowledgement is out, and this link loses nothing: nobody will ask for it again.
			f.guest.Abort()
			return
		}
		if time.Now().After(deadline) {
			f.guest.Abort()
			return
		}
		select {
		case <-ctx.Done():
			f.guest.Abort()
			return
		case <-f.gone:
			f.guest.Abort()
			return
		case <-f.broken:
			f.guest.Abort()
			return
		case <-time.After(pause):
		}
	}
}

// readReady waits until a socket can be read and reads it once, taking a buffer only then. The caller returns the
// buffer to the pool unless there is an error.
func readReady(raw syscall.RawConn) (buf *[]byte, size int, err error) {
	var readErr error
	err = raw.Read(func(fd uintptr) bool {
		buf = buffers.Get().(*[]byte)
		for {
			size, readErr = unix.Read(int(fd), *buf)
			if readErr != unix.EINTR {
				break
			}
		}
		if readErr == unix.EAGAIN {
			buffers.Put(buf)
			buf = nil
			return false
		}
		return true
	})
	if err == nil && readErr != nil {
		err = readErr
		buffers.Put(buf)
	}
	if err != nil {
		return nil, 0, err
	}
	return buf, size, nil
}
