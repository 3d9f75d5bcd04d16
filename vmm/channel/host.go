package channel

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
)

// HostConfig says how the host reaches the guest's serial port.
type HostConfig struct {
	// Connect opens a connection to the device behind the port. Required. It is called again when a session has ended.
	Connect func(ctx context.Context) (net.Conn, error)
	// Guest is what is known of the guest's end when the first connection is made.
	Guest GuestState
	// Nonce is that of the hello which a Waiting guest has said on the first connection; 0: it is asked to say it again.
	Nonce uint64
	// CID is the guest's context id on AF_VSOCK; 0: the machine has no vsock device.
	CID uint32
}

// GuestState is what a guest's end is in the middle of when a host comes.
type GuestState int

const (
	Unknown GuestState = iota // perhaps of a session with another host, which was lost
	Fresh                     // of nothing: nobody was connected before
	Waiting                   // it has said hello and waits for the answer; see Host.Rest
)

// Host is the host's end of the channel.
type Host struct {
	config HostConfig
	ctx    context.Context // of the sessions that are being made; ended by Close
	cancel context.CancelFunc

	mu      sync.Mutex
	guest   GuestState
	closed  bool
	resting net.Conn // set by Rest
	hello   uint64   // and the nonce that came over it
	attempt *attempt
	running sync.WaitGroup
}

// attempt is one session from its first connect to its end.
type attempt struct {
	ready chan struct{} // closed when mux, vsock and err are set

	conn  net.Conn
	mux   *mux
	vsock bool
	err   error
}

func (a *attempt) over() bool {
	select {
	case <-a.ready:
	default:
		return false
	}
	if a.err != nil {
		return true
	}
	if a.mux == nil {
		return false
	}
	select {
	case <-a.mux.done():
		return true
	default:
		return false
	}
}

// NewHost begins to connect at once and returns; Close ends it.
func NewHost(config HostConfig) *Host {
	ctx, cancel := context.WithCancel(context.Background())
	h := &Host{config: config, ctx: ctx, cancel: cancel, guest: config.Guest}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.beginLocked()
	return h
}

func (h *Host) beginLocked() *attempt {
	a := &attempt{ready: make(chan struct{})}
	guest, nonce := h.guest, h.config.Nonce
	if guest != Waiting {
		nonce = 0
	}
	h.guest = Unknown
	old := h.attempt
	h.attempt = a
	h.running.Add(1)
	go func() {
		defer h.running.Done()
		if old != nil {
			old.release()
		}
		h.meet(a, guest, nonce)
		close(a.ready)
	}()
	return a
}

// release frees what an attempt that is over still holds.
func (a *attempt) release() {
	if a.mux != nil {
		a.mux.close()
	}
	if a.conn != nil {
		_ = a.conn.Close()
	}
}

// meet makes one session.
func (h *Host) meet(a *attempt, guest GuestState, nonce uint64) {
	c, err := h.config.Connect(h.ctx)
	if err != nil {
		a.err = fmt.Errorf("connect to the control channel: %w", err)
		return
	}
	stop := context.AfterFunc(h.ctx, func() { _ = c.SetDeadline(past) })
	r := bufio.NewReader(c)
	transport, err := meetGuest(r, c, guest, nonce)
	stopped := stop()
	if err == nil && !stopped {
		err = net.ErrClosed
	}
	if err != nil {
		_ = c.Close()
		if h.ctx.Err() != nil {
			err = net.ErrClosed
		}
		a.err = fmt.Errorf("begin a session on the control channel: %w", err)
		return
	}
	a.conn = c
	if transport == transportVsock {
		a.vsock = true
		return
	}
	if a.mux, err = newMux(r, c, c.Close, true, nil); err != nil {
		_ = c.Close()
		a.err = err
	}
}

// session waits for a live session.
func (h *Host) session(ctx context.Context) (*attempt, error) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil, net.ErrClosed
	}
	a := h.attempt
	if a.over() {
		a = h.beginLocked()
	}
	h.mu.Unlock()
	select {
	case <-a.ready:
		return a, a.err
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the guest to be ready: %w", context.Cause(ctx))
	}
}

// Ready waits until the guest has said that it is ready.
func (h *Host) Ready(ctx context.Context) error {
	_, err := h.session(ctx)
	return err
}

// Dial opens a connection to the guest's listener on port, when the guest is ready. Without a listener there, the first
// Read reports ErrRefused (over vsock Dial itself fails). The connection is a Conn.
func (h *Host) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	a, err := h.session(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial port %d of the guest: %w", port, err)
	}
	if a.vsock {
		c, err := dialVsock(ctx, h.config.CID, port)
		if err != nil {
			return nil, fmt.Errorf("dial port %d of the guest: %w", port, err)
		}
		return c, nil
	}
	type result struct {
		conn *conn
		err  error
	}
	done := make(chan result, 1)
	a.mux.spawn(func() {
		c, err := a.mux.open(port)
		done <- result{c, err}
	})
	select {
	case r := <-done:
		if r.err != nil {
			return nil, fmt.Errorf("dial port %d of the guest: %w", port, errors.Join(ErrBroken, r.err))
		}
		return r.conn, nil
	case <-ctx.Done():
		a.mux.spawn(func() {
			if r := <-done; r.conn != nil {
				_ = r.conn.Close()
			}
		})
		return nil, fmt.Errorf("dial port %d of the guest: %w", port, context.Cause(ctx))
	}
}

// Close ends the session and waits for its goroutines. Connections over the serial port end with it.
func (h *Host) Close() error {
	if !h.end() {
		h.mu.Lock()
		defer h.mu.Unlock()
		if h.resting != nil {
			_ = h.resting.Close()
			h.resting = nil
		}
	}
	return nil
}

// end ends the session for good; false when that has happened before.
func (h *Host) end() bool {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return false
	}
	h.closed = true
	a := h.attempt
	h.mu.Unlock()
	h.cancel()
	h.running.Wait()
	a.release()
	return true
}

// Rest ends the session and returns when the guest waits for another host, which finds it in the state Waiting. This one
// can dial nothing any more, and stays connected until Close.
func (h *Host) Rest(ctx context.Context) error {
	if !h.end() {
		return net.ErrClosed
	}
	c, err := h.config.Connect(ctx)
	if err != nil {
		return fmt.Errorf("connect to the control channel: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { _ = c.SetDeadline(past) })
	defer stop()
	hello, err := awaitHello(c)
	if err != nil {
		_ = c.Close()
		return fmt.Errorf("wait for the guest to say hello again: %w", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.resting, h.hello = c, hello
	return nil
}

// Resting is the connection that Rest has made, which belongs to the host, and the nonce of the hello that came over it.
func (h *Host) Resting() (net.Conn, uint64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.resting, h.hello
}

// Disconnect ends the session that is there, and every connection over the serial port with it. The next Dial begins
// another.
func (h *Host) Disconnect() {
	h.mu.Lock()
	a := h.attempt
	h.mu.Unlock()
	select {
	case <-a.ready:
		if a.mux != nil {
			_ = a.mux.session.Close()
		}
	default:
	}
}
