package pool

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/vmm"
	"github.com/kcradle/kcradle/vmm/template"
)

// Machines are in cmd/kcradle (TestMachine/pool); here is what two processes say to each other.

func serve(t *testing.T) (*Pool, string) {
	t.Helper()
	dir := t.TempDir()
	p, err := New(Config{
		Store: template.Open(filepath.Join(dir, "templates"), 0, slog.New(slog.DiscardHandler)), Size: 1, Limit: 1,
		Prepare: func(context.Context, *vmm.Machine, Request) error { return errors.New("never") }, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(dir, strings.Repeat("long-", 30), "pool.sock")
	if err := os.Mkdir(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	l, err := Listen(socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- p.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return p, socket
}

func request() Request {
	return Request{
		Shape:  template.Shape{Args: []string{"-m", "1M"}, Kernel: "k"},
		Config: vmm.Config{Engine: vmm.TCG, Memory: 1 << 20, Wire: &vmm.Wire{Kind: vmm.WireStream, MTU: 1500}},
	}
}

func TestNone(t *testing.T) {
	if _, err := Take(t.Context(), filepath.Join(t.TempDir(), "none.sock"), request()); !errors.Is(err, ErrNoPool) {
		t.Errorf("no socket: got %v", err)
	}
	p, socket := serve(t)
	for range 3 {
		if _, err := Take(t.Context(), socket, request()); !errors.Is(err, ErrNone) {
			t.Fatalf("empty pool: got %v", err)
		}
	}
	st, err := Ask(t.Context(), socket)
	if err != nil || len(st.Shapes) != 1 || st.Shapes[0] != (ShapeStatus{Key: request().Shape.Key(), Asked: 3}) {
		t.Errorf("got %+v, %v", st, err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	got := p.shapes[request().Shape.Key()].request
	if w := got.Config.Wire; w == nil || w.File != nil || w.MTU != 1500 || got.Config.Memory != 1<<20 {
		t.Errorf("what the pool learnt: %+v", got)
	}
}

// TestHandOver puts files into the pool where a machine would be, and takes them.
func TestHandOver(t *testing.T) {
	p, socket := serve(t)
	var ends []*os.File
	pipe := func() *os.File {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, w)
		t.Cleanup(func() { w.Close() })
		return r
	}
	self, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	h := &vmm.Handover{PID: 77, Engine: vmm.TCG, Nodes: []string{"a"}, Nonce: 1 << 63, Files: []*os.File{os.NewFile(uintptr(self), "pidfd"), pipe(), pipe()}}
	p.mu.Lock()
	p.shapeLocked(request()).ready = []Taken{{Machine: h, Wire: pipe()}}
	p.mu.Unlock()
	taken, err := Take(t.Context(), socket, request())
	if err != nil {
		t.Fatal(err)
	}
	if m := taken.Machine; m.PID != 77 || m.Nonce != 1<<63 || len(m.Files) != 3 || !m.Alive() || taken.Wire == nil {
		t.Errorf("got %+v", taken)
	}
	// The files are the same, in their order, and the pool has let go of them.
	for i, f := range append(taken.Machine.Files[1:], taken.Wire) {
		if _, err := ends[i].Write([]byte{byte('a' + i)}); err != nil {
			t.Fatal(err)
		}
		var b [1]byte
		if _, err := f.Read(b[:]); err != nil || b[0] != byte('a'+i) {
			t.Errorf("file %d: got %q, %v", i, b, err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	for begun := time.Now(); ; {
		_, err := ends[0].Write([]byte("x"))
		if errors.Is(err, unix.EPIPE) {
			break
		}
		if time.Since(begun) > 10*time.Second {
			t.Fatal("the pool still has the file")
		}
	}
	p.mu.Lock()
	if p.launching != 1 {
		t.Errorf("%d starts go on, want 1", p.launching)
	}
	p.mu.Unlock()
	taken.Started()
	if _, err := Take(t.Context(), socket, request()); !errors.Is(err, ErrNone) {
		t.Errorf("the machine was handed out twice: %v", err)
	}
}

// TestHostileClients say what makes no sense, or nothing.
func TestHostileClients(t *testing.T) {
	_, socket := serve(t)
	dial := func() *net.UnixConn {
		var c *net.UnixConn
		if err := inDirectory(socket, func(short string) (err error) {
			c, err = net.DialUnix("unixpacket", nil, &net.UnixAddr{Name: short, Net: "unixpacket"})
			return err
		}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	dial() // and silence
	for _, text := range []string{"", "{", "[]", `{"shape":7}`, strings.Repeat("x", 100<<10)} {
		c := dial()
		if _, err := c.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := Ask(t.Context(), socket); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

func TestNew(t *testing.T) {
	good := Config{
		Store: template.Open("/nowhere", 0, slog.New(slog.DiscardHandler)), Size: 2, Limit: 2, Log: slog.New(slog.DiscardHandler),
		Prepare: func(context.Context, *vmm.Machine, Request) error { return nil },
	}
	if _, err := New(good); err != nil {
		t.Error(err)
	}
	for _, change := range []func(*Config){func(c *Config) { c.Size = 0 }, func(c *Config) { c.Limit = 1 }, func(c *Config) { c.Store = nil }} {
		bad := good
		change(&bad)
		if _, err := New(bad); err == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}
