package channel

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	headerSize = 12                  // of a frame of the multiplexer
	maxChunk   = 32<<10 - headerSize // payload of one frame: header and payload fit one write(2) of a virtio-serial port

	// portReset carries the id of a stream that its peer has closed for good: what yamux has no message for. It is the
	// only port that either side accepts streams on.
	portReset uint32 = 0

	statusOK      byte = 0 // the guest's first byte on each stream: accepted
	statusRefused byte = 1 // nobody listens on that port

	maxStreams    = 4096             // open at a time, per session
	headerTimeout = 30 * time.Second // for the four bytes of port that begin a stream; the peer sends them at once
	closeGrace    = time.Second      // between the close of a stream and its reset, for a peer that still writes
)

// port is what a session runs over: an os.File in the poller, or a net.Conn.
type port interface {
	io.Reader
	io.Writer
	SetReadDeadline(time.Time) error
}

// link is the connection that yamux sees.
type link struct {
	r       *bufio.Reader
	p       port
	release func() error // called once on Close; nil: the port outlives the session

	header []byte // of a data frame, held back to be written with its payload
	buf    []byte

	once sync.Once
	err  error
}

func (l *link) Read(b []byte) (int, error) { return l.r.Read(b) }

// Write joins the header of a data frame to its payload (yamux writes them one after the other, from one goroutine), so
// that a frame is one exit of the virtual machine. It reports no error: what the peer sent before it went away is still
// to be read, and the reader then learns of the end.
func (l *link) Write(b []byte) (int, error) {
	if l.header == nil && len(b) == headerSize && b[1] == 0 /* data */ && binary.BigEndian.Uint32(b[8:]) > 0 {
		l.header = append(l.buf[:0], b...)
		return len(b), nil
	}
	out := b
	if l.header != nil {
		l.buf = append(l.header, b...)
		l.header = nil
		out = l.buf
	}
	_, _ = l.p.Write(out)
	return len(b), nil
}

// Close ends the reader; the port itself stays open unless the link owns it.
func (l *link) Close() error {
	l.once.Do(func() {
		if l.release != nil {
			l.err = l.release()
			return
		}
		l.err = l.p.SetReadDeadline(past)
	})
	return l.err
}

// mux is one session: streams over one link.
type mux struct {
	session *yamux.Session
	accept  func(port uint32, c *conn) bool // nil on the host: nothing but resets

	mu      sync.Mutex
	streams map[uint32]*conn
	closing bool           // no new work
	work    sync.WaitGroup // goroutines of accepted streams and of closed ones
	loop    chan struct{}  // closed when the accept loop has ended
}

func muxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = 64
	// A machine that is paused, or a busy host, is no reason to give the session up: the reader learns of the end.
	c.EnableKeepAlive = false
	c.ConnectionWriteTimeout = 24 * time.Hour
	c.StreamOpenTimeout = 0
	c.StreamCloseTimeout = 0 // it would end half-closed streams, which live as long as they please
	c.LogOutput = nil
	c.Logger = log.New(io.Discard, "", 0)
	return c
}

// newMux starts a session over p behind r; the host is yamux's client. release as in link.
func newMux(r *bufio.Reader, p port, release func() error, host bool, accept func(uint32, *conn) bool) (*mux, error) {
	l := &link{r: r, p: p, release: release}
	start := yamux.Server
	if host {
		start = yamux.Client
	}
	s, err := start(l, muxConfig())
	if err != nil {
		return nil, err
	}
	m := &mux{session: s, accept: accept, streams: map[uint32]*conn{}, loop: make(chan struct{})}
	go m.acceptLoop()
	return m, nil
}

// close ends the session and waits for its goroutines.
func (m *mux) close() {
	_ = m.session.Close()
	<-m.loop
	m.mu.Lock()
	m.closing = true
	m.mu.Unlock()
	m.work.Wait()
}

// spawn runs f in a goroutine that close waits for; after close, here.
func (m *mux) spawn(f func()) {
	m.mu.Lock()
	if m.closing {
		m.mu.Unlock()
		f()
		return
	}
	m.work.Add(1)
	m.mu.Unlock()
	go func() {
		defer m.work.Done()
		f()
	}()
}

func (m *mux) done() <-chan struct{} { return m.session.CloseChan() }

func (m *mux) acceptLoop() {
	defer close(m.loop)
	for {
		s, err := m.session.AcceptStream()
		if err != nil {
			_ = m.session.Close()
			return
		}
		if m.session.NumStreams() > maxStreams {
			_ = s.Close()
			continue
		}
		m.spawn(func() { m.serve(s) })
	}
}

// serve reads the port of an incoming stream and hands it on.
func (m *mux) serve(s *yamux.Stream) {
	_ = s.SetReadDeadline(time.Now().Add(headerTimeout))
	p, err := readPort(s)
	if err != nil {
		_ = s.Close()
		return
	}
	if p == portReset {
		if id, err := readPort(s); err == nil {
			m.mu.Lock()
			c := m.streams[id]
			m.mu.Unlock()
			if c != nil {
				c.reset()
			}
		}
		_ = s.Close()
		return
	}
	_ = s.SetReadDeadline(time.Time{})
	c := m.track(s, p)
	c.greet = true
	if m.accept == nil || !m.accept(p, c) {
		_, _ = s.Write([]byte{statusRefused})
		_ = c.Close()
	}
}

func readPort(r io.Reader) (uint32, error) {
	var b [4]byte
	if _, err := io.ReadFull(r, b[:]); err != nil {
		return 0, err
	}
	return binary.BigEndian.Uint32(b[:]), nil
}

// open opens a stream to a port of the peer. It does not wait for the peer.
func (m *mux) open(p uint32) (*conn, error) {
	s, err := m.session.OpenStream()
	if err != nil {
		return nil, err
	}
	c := m.track(s, p)
	c.status = true
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], p)
	if _, err := s.Write(b[:]); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

func (m *mux) track(s *yamux.Stream, p uint32) *conn {
	c := &conn{stream: s, mux: m, port: p}
	m.mu.Lock()
	m.streams[s.StreamID()] = c
	m.mu.Unlock()
	return c
}

func (m *mux) forget(c *conn) {
	m.mu.Lock()
	delete(m.streams, c.stream.StreamID())
	m.mu.Unlock()
}

// finish runs after a stream's close: it takes what the peer still sends, and tells a peer that goes on sending that
// nobody reads any more.
func (m *mux) finish(c *conn) {
	defer m.forget(c)
	c.readMu.Lock() // the reader that Close woke has left
	defer c.readMu.Unlock()
	_ = c.stream.SetReadDeadline(time.Now().Add(closeGrace))
	if _, err := io.Copy(io.Discard, c.stream); !errors.Is(err, yamux.ErrTimeout) {
		return
	}
	s, err := m.session.OpenStream()
	if err != nil {
		return
	}
	var b [8]byte
	binary.BigEndian.PutUint32(b[:4], portReset)
	binary.BigEndian.PutUint32(b[4:], c.stream.StreamID())
	_, _ = s.Write(b[:])
	_ = s.Close()
	_, _ = io.Copy(io.Discard, s)
	_ = c.stream.SetReadDeadline(time.Time{})
	_, _ = io.Copy(io.Discard, c.stream) // ends with the peer's answer to the reset, or with the session
}

// conn is one stream.
type conn struct {
	stream *yamux.Stream
	mux    *mux
	port   uint32

	closed  atomic.Bool
	broken  atomic.Bool // reset by the peer
	once    sync.Once
	halfway sync.Once

	readBy, writeBy deadline

	readMu sync.Mutex // held while reading, so that Close's drain is alone
	status bool       // the peer's status byte is still to be read; readMu

	writeMu sync.Mutex // keeps one Write's chunks together
	greet   bool       // our status byte is still to be written, with the first payload; writeMu
}

var _ Conn = (*conn)(nil)

// deadline is what was last set; yamux looks at its own only when it has to wait. It is kept as it was given, with its reading
// of the monotonic clock: a guest's wall clock jumps while a pod is being launched.
type deadline struct{ at atomic.Pointer[time.Time] }

func (d *deadline) set(t time.Time) { d.at.Store(&t) }

func (d *deadline) passed() bool {
	at := d.at.Load()
	return at != nil && !at.IsZero() && !time.Now().Before(*at)
}

func (c *conn) Read(b []byte) (int, error) {
	c.readMu.Lock()
	defer c.readMu.Unlock()
	if err := c.usable(&c.readBy); err != nil {
		return 0, c.opError("read", err)
	}
	if c.status {
		var s [1]byte
		if _, err := io.ReadFull(c.stream, s[:]); err != nil {
			return 0, c.readError(err)
		}
		if s[0] != statusOK {
			return 0, c.opError("read", fmt.Errorf("port %d: %w", c.port, ErrRefused))
		}
		c.status = false
	}
	if len(b) == 0 {
		return 0, nil
	}
	n, err := c.stream.Read(b)
	if err != nil {
		return n, c.readError(err)
	}
	return n, nil
}

func (c *conn) readError(err error) error {
	if e := c.usable(nil); e != nil {
		return c.opError("read", e)
	}
	switch {
	case errors.Is(err, yamux.ErrTimeout):
		err = os.ErrDeadlineExceeded
	case err == io.EOF && !c.mux.session.IsClosed():
		return io.EOF
	case err == io.EOF, errors.Is(err, yamux.ErrSessionShutdown):
		err = ErrBroken
	case errors.Is(err, yamux.ErrConnectionReset):
		err = syscall.ECONNRESET
	}
	return c.opError("read", err)
}

func (c *conn) Write(b []byte) (int, error) {
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	total := 0
	if c.greet && len(b) > 0 && c.usable(&c.writeBy) == nil {
		first := make([]byte, 0, maxChunk)
		first = append(first, statusOK)
		first = append(first, b[:min(len(b), maxChunk-1)]...)
		n, err := c.stream.Write(first)
		c.greet = n == 0
		total = max(0, n-1)
		if err != nil {
			return total, c.writeError(err)
		}
	}
	for {
		if err := c.usable(&c.writeBy); err != nil {
			return total, c.opError("write", err)
		}
		if total == len(b) {
			return total, nil
		}
		n, err := c.stream.Write(b[total:min(len(b), total+maxChunk)])
		total += n
		if err != nil {
			return total, c.writeError(err)
		}
		if total == len(b) {
			return total, nil
		}
	}
}

func (c *conn) writeError(err error) error {
	if e := c.usable(nil); e != nil {
		return c.opError("write", e)
	}
	switch {
	case errors.Is(err, yamux.ErrTimeout):
		err = os.ErrDeadlineExceeded
	case c.mux.session.IsClosed(), errors.Is(err, yamux.ErrSessionShutdown):
		err = ErrBroken
	case errors.Is(err, yamux.ErrStreamClosed):
		err = syscall.EPIPE
	case errors.Is(err, yamux.ErrConnectionReset):
		err = syscall.ECONNRESET
	}
	return c.opError("write", err)
}

// usable says why the connection cannot be used: closed, reset, or past its deadline.
func (c *conn) usable(d *deadline) error {
	switch {
	case c.closed.Load():
		return net.ErrClosed
	case c.broken.Load():
		return syscall.ECONNRESET
	case d != nil && d.passed():
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (c *conn) opError(op string, err error) error {
	return &net.OpError{Op: op, Net: Addr{}.Network(), Addr: Addr{Port: c.port}, Err: err}
}

// endWriting tells the peer that all has been written. When the session has ended that may be untrue, and yamux would
// still send it, now and then.
func (c *conn) endWriting() {
	if !c.mux.session.IsClosed() {
		_ = c.stream.Close()
	}
}

func (c *conn) CloseWrite() error {
	if c.closed.Load() {
		return c.opError("close", net.ErrClosed)
	}
	c.halfway.Do(c.endWriting)
	return nil
}

func (c *conn) Close() error {
	c.once.Do(func() {
		c.closed.Store(true)
		_ = c.stream.SetDeadline(past) // wakes a reader and a writer
		c.halfway.Do(c.endWriting)
		c.mux.spawn(func() { c.mux.finish(c) })
	})
	return nil
}

// reset is the peer's word that it reads no more.
func (c *conn) reset() {
	c.broken.Store(true)
	_ = c.stream.SetDeadline(past)
	c.halfway.Do(c.endWriting)
}

func (c *conn) LocalAddr() net.Addr  { return Addr{Port: c.port} }
func (c *conn) RemoteAddr() net.Addr { return Addr{Port: c.port} }

func (c *conn) SetDeadline(t time.Time) error {
	if err := c.SetReadDeadline(t); err != nil {
		return err
	}
	return c.SetWriteDeadline(t)
}

func (c *conn) SetReadDeadline(t time.Time) error {
	if err := c.usable(nil); err != nil {
		return c.opError("set", err)
	}
	c.readBy.set(t)
	return c.stream.SetReadDeadline(t)
}

func (c *conn) SetWriteDeadline(t time.Time) error {
	if err := c.usable(nil); err != nil {
		return c.opError("set", err)
	}
	c.writeBy.set(t)
	return c.stream.SetWriteDeadline(t)
}
