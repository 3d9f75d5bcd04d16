package channel

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/nettest"
)

// virtioPort behaves as the guest's end of a virtio-serial port: writes wait for a host, reads end while there is none,
// and a host that goes and comes between two calls goes unnoticed.
type virtioPort struct {
	mu       sync.Mutex
	cond     *sync.Cond
	host     net.Conn
	deadline time.Time
	closed   bool
}

func newVirtioPort() *virtioPort {
	p := &virtioPort{}
	p.cond = sync.NewCond(&p.mu)
	return p
}

// attach connects a new host; detach happens when the host closes its end.
func (p *virtioPort) attach(context.Context) (net.Conn, error) {
	host, device := socketpair()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, errors.New("the machine is gone")
	}
	if p.host != nil {
		_ = p.host.Close()
	}
	p.host = device
	_ = device.SetReadDeadline(p.deadline)
	p.cond.Broadcast()
	return host, nil
}

func (p *virtioPort) Read(b []byte) (int, error) {
	for {
		p.mu.Lock()
		h, closed := p.host, p.closed
		p.mu.Unlock()
		if closed {
			return 0, os.ErrClosed
		}
		if h == nil {
			return 0, io.EOF
		}
		n, err := h.Read(b)
		if n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
		p.mu.Lock()
		same := p.host == h
		if same {
			p.host = nil
		}
		p.mu.Unlock()
		if same {
			return 0, io.EOF
		}
	}
}

func (p *virtioPort) Write(b []byte) (int, error) {
	p.mu.Lock()
	for p.host == nil && !p.closed {
		p.cond.Wait()
	}
	h, closed := p.host, p.closed
	p.mu.Unlock()
	if closed {
		return 0, os.ErrClosed
	}
	_, _ = h.Write(b) // what no host takes is lost
	return len(b), nil
}

func (p *virtioPort) SetReadDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline = t
	if p.host != nil {
		return p.host.SetReadDeadline(t)
	}
	return nil
}

func (p *virtioPort) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.host != nil {
		_ = p.host.Close()
	}
	p.cond.Broadcast()
	return nil
}

func socketpair() (a, b net.Conn) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		panic(err)
	}
	conn := func(fd int) net.Conn {
		f := os.NewFile(uintptr(fd), "socketpair")
		defer f.Close()
		c, err := net.FileConn(f)
		if err != nil {
			panic(err)
		}
		return c
	}
	return conn(fds[0]), conn(fds[1])
}

// pair is a guest and a host that meet over a virtioPort.
func pair(t testing.TB) (*Guest, *Host, *virtioPort) {
	p := newVirtioPort()
	g := newGuest(p, transportSerial, slog.New(slog.NewTextHandler(testWriter{t}, nil)))
	h := NewHost(HostConfig{Connect: p.attach, Guest: Fresh})
	return g, h, p
}

type testWriter struct{ testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.Log(strings.TrimSpace(string(b)))
	return len(b), nil
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// noLeaks fails the test when goroutines of this package outlive it.
func noLeaks(t testing.TB) {
	t.Cleanup(func() {
		var left string
		for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			buf := make([]byte, 1<<20)
			buf = buf[:runtime.Stack(buf, true)]
			left = ""
			for i, g := range strings.Split(string(buf), "\n\n") {
				if i > 0 && (strings.Contains(g, "vmm/channel.(*") || strings.Contains(g, "hashicorp/yamux")) {
					left += g + "\n\n"
				}
			}
			if left == "" {
				return
			}
		}
		t.Errorf("goroutines left behind:\n%s", left)
	})
}

func echo(l net.Listener, wg *sync.WaitGroup) {
	defer wg.Done()
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			defer c.Close()
			_, _ = io.Copy(c, c)
		}()
	}
}

func TestConformance(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		g, h, _ := pair(t)
		l, err := g.Listen(7)
		if err != nil {
			return nil, nil, nil, err
		}
		g.Ready()
		c1, err = h.Dial(t.Context(), 7)
		if err != nil {
			return nil, nil, nil, err
		}
		c2, err = l.Accept()
		return c1, c2, func() {
			_ = c1.Close()
			_ = c2.Close()
			_ = h.Close()
			_ = g.Close()
		}, err
	})
}

func TestPorts(t *testing.T) {
	noLeaks(t)
	g, h, _ := pair(t)
	defer g.Close()
	defer h.Close()
	ctx := testContext(t)
	for _, port := range []uint32{1, 2, 1 << 31} {
		l, err := g.Listen(port)
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte{byte(port >> 24), byte(port)})
			_ = c.Close()
		}()
	}
	if _, err := g.Listen(1); err == nil {
		t.Error("a second listener on one port was accepted")
	}
	if _, err := g.Listen(0); err == nil {
		t.Error("a listener on the channel's own port was accepted")
	}
	g.Ready()
	for _, test := range []struct {
		port uint32
		want string
		err  error
	}{
		{port: 1, want: "\x00\x01"},
		{port: 2, want: "\x00\x02"},
		{port: 1 << 31, want: "\x80\x00"},
		{port: 3, err: ErrRefused},
	} {
		c, err := h.Dial(ctx, test.port)
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(c)
		if string(got) != test.want || !errors.Is(err, test.err) {
			t.Errorf("port %d: read %q and %v, want %q and %v", test.port, got, err, test.want, test.err)
		}
		_ = c.Close()
	}
}

func TestDialWaitsForReady(t *testing.T) {
	noLeaks(t)
	g, h, _ := pair(t)
	defer g.Close()
	defer h.Close()
	l, err := g.Listen(1)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(testContext(t), 50*time.Millisecond)
	defer cancel()
	if _, err := h.Dial(ctx, 1); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("dial before the guest is ready: got %v, want a deadline error", err)
	}
	var wg sync.WaitGroup
	wg.Add(1)
	go echo(l, &wg)
	done := make(chan error, 1)
	go func() {
		c, err := h.Dial(testContext(t), 1)
		if err == nil {
			_ = c.Close()
		}
		done <- err
	}()
	g.Ready()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	_ = h.Close()
	wg.Wait()
}

func TestHalfClose(t *testing.T) {
	noLeaks(t)
	g, h, _ := pair(t)
	defer g.Close()
	defer h.Close()
	l, err := g.Listen(1)
	if err != nil {
		t.Fatal(err)
	}
	g.Ready()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		all, _ := io.ReadAll(c) // ends with the peer's CloseWrite
		_, _ = c.Write(append([]byte("got "), all...))
	}()
	c, err := h.Dial(testContext(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("all of it")); err != nil {
		t.Fatal(err)
	}
	if err := c.(Conn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "got all of it" {
		t.Errorf("got %q and %v", got, err)
	}
	if _, err := c.Write([]byte("more")); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("write behind CloseWrite: got %v, want EPIPE", err)
	}
	_ = c.Close()
	if err := c.Close(); err != nil {
		t.Errorf("second close: %v", err)
	}
}

// A peer that writes for ever must learn that nobody reads any more, in both directions.
func TestCloseStopsAWriter(t *testing.T) {
	for _, name := range []string{"guest writes", "host writes"} {
		t.Run(name, func(t *testing.T) {
			noLeaks(t)
			g, h, _ := pair(t)
			defer g.Close()
			defer h.Close()
			l, err := g.Listen(1)
			if err != nil {
				t.Fatal(err)
			}
			g.Ready()
			c, err := h.Dial(testContext(t), 1)
			if err != nil {
				t.Fatal(err)
			}
			s, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			writer, reader := s, c
			if name == "host writes" {
				writer, reader = c, s
			}
			stopped := make(chan error, 1)
			go func() {
				b := make([]byte, 64<<10)
				for {
					if _, err := writer.Write(b); err != nil {
						stopped <- err
						return
					}
				}
			}()
			if _, err := io.CopyN(io.Discard, reader, 1<<20); err != nil {
				t.Fatal(err)
			}
			_ = reader.Close()
			select {
			case err := <-stopped:
				if !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("the writer got %v, want ECONNRESET", err)
				}
			case <-time.After(10 * time.Second):
				t.Fatal("the writer was not told")
			}
			_ = writer.Close()
			for end := time.Now().Add(5 * time.Second); h.attempt.mux.session.NumStreams() > 0; time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("%d streams left", h.attempt.mux.session.NumStreams())
				}
			}
		})
	}
}

func TestBulk(t *testing.T) {
	noLeaks(t)
	g, h, _ := pair(t)
	defer g.Close()
	defer h.Close()
	l, err := g.Listen(1)
	if err != nil {
		t.Fatal(err)
	}
	g.Ready()
	var wg sync.WaitGroup
	wg.Add(1)
	go echo(l, &wg)
	const streams, size = 8, 4 << 20
	var clients sync.WaitGroup
	for range streams {
		clients.Add(1)
		go func() {
			defer clients.Done()
			c, err := h.Dial(testContext(t), 1)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			sent := make([]byte, size)
			_, _ = rand.Read(sent)
			go func() {
				_, _ = c.Write(sent)
				_ = c.(Conn).CloseWrite()
			}()
			got := sha256.New()
			n, err := io.Copy(got, c)
			want := sha256.Sum256(sent)
			if err != nil || n != size || !bytes.Equal(got.Sum(nil), want[:]) {
				t.Errorf("echo of %d bytes: %d bytes came back, error %v", size, n, err)
			}
		}()
	}
	clients.Wait()
	_ = l.Close()
	_ = h.Close()
	wg.Wait()
}

// The host goes away in the middle of everything and comes back: connections break, none sees bytes of another session.
func TestHostComesBack(t *testing.T) {
	noLeaks(t)
	p := newVirtioPort()
	g := newGuest(p, transportSerial, nil)
	defer g.Close()
	l, err := g.Listen(1)
	if err != nil {
		t.Fatal(err)
	}
	g.Ready()
	var wg sync.WaitGroup
	wg.Add(1)
	go echo(l, &wg)
	defer wg.Wait()
	defer l.Close()
	for i := range 20 {
		h := NewHost(HostConfig{Connect: p.attach, Guest: []GuestState{Fresh, Unknown}[min(i, 1)]})
		c, err := h.Dial(testContext(t), 1)
		if err != nil {
			t.Fatal(err)
		}
		want := bytes.Repeat([]byte{byte(i)}, 200<<10)
		go func() { _, _ = c.Write(want); _, _ = c.Write(want) }()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("session %d: echo differs, error %v", i, err)
		}
		if i%2 == 0 {
			// Another host connects while this one is still there, in the middle of a frame.
			other, err := p.attach(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			_ = other.Close()
		}
		_ = h.Close()
		if _, err := c.Read(got); err != nil && !errors.Is(err, ErrBroken) && !errors.Is(err, net.ErrClosed) {
			t.Fatalf("read of a broken connection: got %v", err)
		}
		_ = c.Close()
	}
}

// A host that rests leaves a guest that the next host meets without knowing of the first: as in a restored machine, on the
// same connection.
func TestRest(t *testing.T) {
	for _, known := range []bool{false, true} {
		t.Run(fmt.Sprint("nonce known ", known), func(t *testing.T) { testRest(t, known) })
	}
}

func testRest(t *testing.T, known bool) {
	noLeaks(t)
	g, h, _ := pair(t)
	defer g.Close()
	l, err := g.Listen(1)
	if err != nil {
		t.Fatal(err)
	}
	g.Ready()
	var wg sync.WaitGroup
	wg.Add(1)
	go echo(l, &wg)
	defer wg.Wait()
	defer l.Close()
	c, err := h.Dial(testContext(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Rest(testContext(t)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrBroken) {
		t.Errorf("a connection of the ended session: got %v, want %v", err, ErrBroken)
	}
	if _, err := h.Dial(testContext(t), 1); !errors.Is(err, net.ErrClosed) {
		t.Errorf("dialed at rest: got %v, want %v", err, net.ErrClosed)
	}
	if err := h.Rest(testContext(t)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("rested twice: got %v, want %v", err, net.ErrClosed)
	}
	same, nonce := h.Resting()
	h.resting = nil
	_ = h.Close()
	if !known {
		nonce = 0
	}
	next := NewHost(HostConfig{Connect: func(context.Context) (net.Conn, error) { return same, nil }, Guest: Waiting, Nonce: nonce})
	defer next.Close()
	c, err = next.Dial(testContext(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	want := bytes.Repeat([]byte{7}, 200<<10)
	go func() { _, _ = c.Write(want) }()
	got := make([]byte, len(want))
	if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
		t.Errorf("echo differs, error %v", err)
	}
	_ = c.Close()
}

// One Host object outlives a session that the guest ends.
func TestHostDialsAgain(t *testing.T) {
	noLeaks(t)
	g, h, _ := pair(t)
	defer g.Close()
	defer h.Close()
	l, err := g.Listen(1)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Add(1)
	go echo(l, &wg)
	defer wg.Wait()
	defer l.Close()
	g.Ready()
	for range 5 {
		c, err := h.Dial(testContext(t), 1)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		g.mu.Lock()
		m := g.current
		g.mu.Unlock()
		_ = m.session.Close()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, ErrBroken) {
			t.Fatalf("read after the session's end: got %v, want %v", err, ErrBroken)
		}
		_ = c.Close()
	}
}

func TestCloseEndsDial(t *testing.T) {
	noLeaks(t)
	g, h, _ := pair(t)
	defer g.Close()
	done := make(chan error, 1)
	go func() {
		_, err := h.Dial(testContext(t), 1)
		done <- err
	}()
	_ = h.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
	if _, err := h.Dial(testContext(t), 1); !errors.Is(err, net.ErrClosed) {
		t.Errorf("got %v, want %v", err, net.ErrClosed)
	}
}

// A deadline must not pass, or stay away, because somebody sets the clock.
func TestDeadlineKeepsMonotonicTime(t *testing.T) {
	var d deadline
	if d.passed() {
		t.Error("one that was never set has passed")
	}
	at := time.Now().Add(time.Hour)
	d.set(at)
	if got := *d.at.Load(); got != at || got == at.Round(0) { // Round(0) is the wall clock's part alone
		t.Errorf("got %v, want %v with its monotonic part", got, at)
	}
	if d.passed() {
		t.Error("one in an hour has passed")
	}
	d.set(time.Now().Add(-time.Nanosecond))
	if !d.passed() {
		t.Error("one in the past has not passed")
	}
	d.set(time.Time{})
	if d.passed() {
		t.Error("one that was removed has passed")
	}
}
