package channel

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// backlog is how many connections wait for a listener's Accept.
const backlog = 128

// Guest is the guest's end of the channel.
type Guest struct {
	port      guestPort
	transport byte
	log       *slog.Logger

	mu        sync.Mutex
	listeners map[uint32]*listener
	started   bool
	closed    bool
	current   *mux
	stopped   chan struct{} // closed when serve has ended
}

// guestPort is a virtio-serial port: reads return io.EOF while no host is connected, writes wait for one.
type guestPort interface {
	port
	Close() error
}

func newGuest(p guestPort, transport byte, log *slog.Logger) *Guest {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Guest{port: p, transport: transport, log: log, listeners: map[uint32]*listener{}, stopped: make(chan struct{})}
}

// Listen returns the listener of a port. It may be called before and after Ready; one listener per port at a time.
func (g *Guest) Listen(port uint32) (net.Listener, error) {
	if port == portReset {
		return nil, fmt.Errorf("listen on port %d of the control channel: it is the channel's own", port)
	}
	if g.transport == transportVsock {
		return listenVsock(port)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, fmt.Errorf("listen on port %d of the control channel: %w", port, net.ErrClosed)
	}
	if g.listeners[port] != nil {
		return nil, fmt.Errorf("listen on port %d of the control channel: it has a listener already", port)
	}
	l := &listener{guest: g, port: port, queue: make(chan *conn, backlog), closed: make(chan struct{})}
	g.listeners[port] = l
	return l, nil
}

// Ready tells the host, now and whenever it comes again, that the guest may be dialed. Call it once, after Listen for
// every port that the host dials first. It does not wait.
func (g *Guest) Ready() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.started || g.closed {
		return
	}
	g.started = true
	go g.serve()
}

// Close ends the session and every listener, and waits for their goroutines.
func (g *Guest) Close() error {
	g.mu.Lock()
	if g.closed {
		g.mu.Unlock()
		return nil
	}
	g.closed = true
	m, started := g.current, g.started
	ls := make([]*listener, 0, len(g.listeners))
	for _, l := range g.listeners {
		ls = append(ls, l)
	}
	g.mu.Unlock()
	for _, l := range ls {
		_ = l.Close()
	}
	err := g.port.Close()
	if m != nil {
		_ = m.session.Close()
	}
	if started {
		<-g.stopped
	}
	return err
}

// serve holds one session after the other until the port is closed or fails.
func (g *Guest) serve() {
	defer close(g.stopped)
	for {
		err := g.serveOnce()
		g.mu.Lock()
		closed := g.closed
		g.mu.Unlock()
		if closed {
			return
		}
		if err != nil && !isEnd(err) {
			g.log.Error("control channel failed", "error", err)
			return
		}
		g.log.Debug("control channel: the host went away", "error", err)
	}
}

// isEnd tells the end of a session from the end of the port.
func isEnd(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errSkip)
}

func (g *Guest) serveOnce() error {
	if err := g.port.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("prepare the port: %w", err)
	}
	r := bufio.NewReader(g.port)
	if err := meetHost(r, g.port, g.transport); err != nil {
		return err
	}
	if g.transport == transportVsock {
		// Connections come over vsock; this port has only to notice a new host.
		_, err := r.ReadByte()
		if err == nil {
			return nil
		}
		return err
	}
	// Nothing is delivered before the session is known.
	g.mu.Lock()
	m, err := newMux(r, g.port, nil, false, g.deliver)
	if err != nil {
		g.mu.Unlock()
		return err
	}
	closed := g.closed
	g.current = m
	g.mu.Unlock()
	if !closed {
		<-m.done()
	}
	m.close()
	return nil
}

// deliver hands a connection to the port's listener; false: there is none.
func (g *Guest) deliver(port uint32, c *conn) bool {
	g.mu.Lock()
	l := g.listeners[port]
	g.mu.Unlock()
	if l == nil {
		return false
	}
	select {
	case l.queue <- c:
	case <-l.closed:
		return false
	case <-c.mux.done():
		_ = c.Close()
		return true
	}
	select {
	case <-l.closed: // nobody may have taken it
		l.drain()
	default:
	}
	return true
}

type listener struct {
	guest  *Guest
	port   uint32
	queue  chan *conn
	once   sync.Once
	closed chan struct{}
}

var _ net.Listener = (*listener)(nil)

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, &net.OpError{Op: "accept", Net: l.Addr().Network(), Addr: l.Addr(), Err: net.ErrClosed}
	default:
	}
	select {
	case c := <-l.queue:
		return c, nil
	case <-l.closed:
		return nil, &net.OpError{Op: "accept", Net: l.Addr().Network(), Addr: l.Addr(), Err: net.ErrClosed}
	}
}

// Close ends Accept. Connections that were accepted live on.
func (l *listener) Close() error {
	l.once.Do(func() {
		l.guest.mu.Lock()
		if l.guest.listeners[l.port] == l {
			delete(l.guest.listeners, l.port)
		}
		l.guest.mu.Unlock()
		close(l.closed)
		l.drain()
	})
	return nil
}

func (l *listener) drain() {
	for {
		select {
		case c := <-l.queue:
			_ = c.Close()
		default:
			return
		}
	}
}

func (l *listener) Addr() net.Addr { return Addr{Port: l.port} }
