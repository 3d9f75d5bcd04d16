// Package pool keeps machines ready: thawed from templates, or restored and rehearsed, and standing still until somebody takes
// one.
//
//	p := pool.New(pool.Config{Store: store, Size: 4, Limit: 16, Prepare: rehearse, Log: log})
//	err := p.Serve(ctx, listener)                        // one process for a host's user
//
//	taken, err := pool.Take(ctx, socket, pool.Request{…}) // any other process of that user
//	machine, err := vmm.Adopt(ctx, taken.Machine, config, log)
//
// The two speak over a unix socket that keeps the boundaries of messages: one request, one answer, the machine's open files
// beside it. A machine dies when nobody has its lifeline open any more: with the pool while it waits, with whoever took it
// afterwards.
package pool

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/vmm"
	"github.com/kcradle/kcradle/vmm/template"
)

// Config is what a pool works with.
type Config struct {
	Store *template.Store // required
	Size  int             // machines that are kept ready of each shape; at least 1
	Limit int             // machines altogether; at least Size
	// Reserve is how much memory of the host stays available: below it no machine is made. Bytes.
	Reserve int64
	// Prepare rehearses a machine that was restored. Required.
	Prepare func(ctx context.Context, m *vmm.Machine, r Request) error
	Log     *slog.Logger // required
}

// Request asks for a machine.
type Request struct {
	Shape template.Shape `json:"shape"`
	// Config makes a machine of that shape: drives blank, a wire without a file.
	Config vmm.Config `json:"config"`
	// Status asks for the pool's state instead.
	Status bool `json:"status,omitempty"`
}

// Taken is a machine of the pool, and our end of its wire.
type Taken struct {
	Machine *vmm.Handover
	Wire    *os.File // nil: it has none

	pool *net.UnixConn
}

// Started tells the pool that the start is over: it holds still until then, or for a few seconds.
func (t Taken) Started() {
	if t.pool != nil {
		t.pool.Close()
	}
}

// Status is what a pool has.
type Status struct {
	Shapes []ShapeStatus `json:"shapes"`
}

// ShapeStatus is what a pool has of a shape.
type ShapeStatus struct {
	Key   string `json:"key"`
	Ready int    `json:"ready"`
	Taken int    `json:"taken"` // since the pool started
	Asked int    `json:"asked"`
}

// answer is what goes back; with a machine its files are beside it, the wire's last.
type answer struct {
	Machine *vmm.Handover `json:"machine,omitempty"`
	Wire    bool          `json:"wire,omitempty"`
	Reason  string        `json:"reason,omitempty"` // why there is none
	Status  *Status       `json:"status,omitempty"`
}

// maxMessage bounds a request and an answer, and is how much a socket of this kind takes at once.
const maxMessage = 128 << 10

// ErrNone says that the pool has no machine of that shape at the moment.
var ErrNone = errors.New("no machine is ready")

// Pool is the side that keeps the machines.
type Pool struct {
	cfg Config

	mu        sync.Mutex
	shapes    map[string]*shape
	wake      chan struct{} // something was asked for or taken
	launching int           // machines whose takers are not done with their start
}

type shape struct {
	request Request
	ready   []Taken
	taken   int
	asked   int
	last    time.Time // when it was asked for
	failed  time.Time // when making one failed last
}

// New makes an empty pool.
func New(cfg Config) (*Pool, error) {
	switch {
	case cfg.Store == nil || cfg.Prepare == nil || cfg.Log == nil:
		return nil, errors.New("pool: Config needs a store, a rehearsal and a log")
	case cfg.Size < 1 || cfg.Limit < cfg.Size:
		return nil, fmt.Errorf("pool: %d machines of a shape and %d altogether: want at least one, and no more than altogether", cfg.Size, cfg.Limit)
	}
	return &Pool{cfg: cfg, shapes: map[string]*shape{}, wake: make(chan struct{}, 1)}, nil
}

// Want lets the pool keep machines of a shape that nobody has asked for yet.
func (p *Pool) Want(r Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.shapeLocked(r)
	p.wakeLocked()
}

func (p *Pool) shapeLocked(r Request) *shape {
	key := r.Shape.Key()
	s := p.shapes[key]
	if s == nil {
		s = &shape{}
		p.shapes[key] = s
	}
	s.request, s.last = r, time.Now()
	return s
}

func (p *Pool) wakeLocked() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Serve answers on l, which must keep the boundaries of messages, and fills the pool, until ctx ends. Machines that nobody
// has taken end then.
func (p *Pool) Serve(ctx context.Context, l *net.UnixListener) error {
	var wg sync.WaitGroup
	defer func() {
		wg.Wait()
		p.mu.Lock()
		defer p.mu.Unlock()
		for _, s := range p.shapes {
			for _, t := range s.ready {
				t.close()
			}
			s.ready = nil
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	wg.Go(func() { p.fill(ctx) })
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("pool: accept: %w", err)
		}
		wg.Go(func() {
			defer c.Close()
			if err := p.serve(c); err != nil && !errors.Is(err, io.EOF) {
				p.cfg.Log.Warn("a request to the pool failed", "error", err)
			}
		})
	}
}

// patience is how long either side waits for the other's message.
const patience = 5 * time.Second

func (p *Pool) serve(c *net.UnixConn) error {
	if err := sameUser(c); err != nil {
		return err
	}
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	buf := make([]byte, maxMessage)
	n, err := c.Read(buf)
	if err != nil {
		return err
	}
	var r Request
	if err := json.Unmarshal(buf[:n], &r); err != nil {
		return fmt.Errorf("parse a request: %w", err)
	}
	if r.Status {
		st := p.status()
		return send(c, answer{Status: &st}, nil)
	}
	t, ok := p.take(r)
	if !ok {
		return send(c, answer{Reason: ErrNone.Error()}, nil)
	}
	files := slices.Clone(t.Machine.Files)
	if t.Wire != nil {
		files = append(files, t.Wire)
	}
	err = send(c, answer{Machine: t.Machine, Wire: t.Wire != nil}, files)
	t.close() // ours; the other side has its own, or the machine dies
	if err != nil {
		return err
	}
	// A start is no time to make another machine.
	p.launch(1)
	defer p.launch(-1)
	_ = c.SetReadDeadline(time.Now().Add(patience))
	_, _ = c.Read(buf[:1])
	return nil
}

// launch counts the starts that go on.
func (p *Pool) launch(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.launching += n
	p.wakeLocked()
}

// take removes a machine that lives from the pool.
func (p *Pool) take(r Request) (Taken, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.shapeLocked(r)
	s.asked++
	for len(s.ready) > 0 {
		t := s.ready[0]
		s.ready = s.ready[1:]
		if t.Machine.Alive() {
			s.taken++
			return t, true
		}
		t.close()
	}
	p.wakeLocked()
	return Taken{}, false
}

func (p *Pool) status() Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	st := Status{Shapes: []ShapeStatus{}}
	for key, s := range p.shapes {
		st.Shapes = append(st.Shapes, ShapeStatus{Key: key, Ready: len(s.ready), Taken: s.taken, Asked: s.asked})
	}
	slices.SortFunc(st.Shapes, func(a, b ShapeStatus) int { return strings.Compare(a.Key, b.Key) })
	return st
}

// Intervals of fill.
const (
	retry = 30 * time.Second // after a shape could not be made
	look  = 10 * time.Second // for machines that died, memory that became free, templates that were made
)

// fill makes one machine after the other while one is missing.
func (p *Pool) fill(ctx context.Context) {
	tick := time.NewTicker(look)
	defer tick.Stop()
	for ctx.Err() == nil {
		if s, r := p.next(); s != nil {
			t, err := p.make(ctx, r)
			p.mu.Lock()
			switch {
			case err == nil:
				s.ready = append(s.ready, t)
				s.failed = time.Time{}
			case errors.Is(err, template.ErrNone): // it is made by the first that boots
			case ctx.Err() == nil:
				s.failed = time.Now()
				p.cfg.Log.Warn("no machine for the pool", "template", r.Shape.Key(), "error", err)
			}
			p.mu.Unlock()
			if err == nil {
				continue
			}
		}
		select {
		case <-ctx.Done():
		case <-p.wake:
		case <-tick.C:
		}
	}
}

// next is the shape, with what it is made from, that a machine is to be made of, nil when nothing is missing or nothing may be made. When the pool is
// full of other shapes, the one that was not asked for longest gives one up.
func (p *Pool) next() (*shape, Request) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.launching > 0 {
		return nil, Request{}
	}
	var want, oldest *shape
	total := 0
	for _, s := range p.shapes {
		s.ready = slices.DeleteFunc(s.ready, func(t Taken) bool {
			dead := !t.Machine.Alive()
			if dead {
				t.close()
			}
			return dead
		})
		total += len(s.ready)
		if len(s.ready) > 0 && (oldest == nil || s.last.Before(oldest.last)) {
			oldest = s
		}
		if len(s.ready) < p.cfg.Size && time.Since(s.failed) > retry && (want == nil || s.last.After(want.last)) {
			want = s
		}
	}
	if want == nil {
		return nil, Request{}
	}
	if total >= p.cfg.Limit {
		if oldest == nil || oldest == want || !oldest.last.Before(want.last) {
			return nil, Request{}
		}
		oldest.ready[0].close()
		oldest.ready = oldest.ready[1:]
	}
	if available, err := availableMemory(); err == nil && available < p.cfg.Reserve+want.request.Config.Memory/4 {
		return nil, Request{}
	}
	return want, want.request
}

// makeTimeout bounds the making of one machine.
const makeTimeout = 2 * time.Minute

// make thaws a machine, or restores and rehearses one.
func (p *Pool) make(ctx context.Context, r Request) (_ Taken, err error) {
	t, err := p.cfg.Store.Find(r.Shape)
	if err != nil {
		return Taken{}, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, makeTimeout, fmt.Errorf("it took longer than %v", makeTimeout))
	defer cancel()
	c := r.Config
	c.Name, c.Console, c.Restore, c.Transferable = "kcradle:pool", "", &t.Snapshot, true
	if c.RunAs, err = vmm.Unprivileged(c.Engine); err != nil {
		p.cfg.Log.Warn("QEMU runs as root", "error", err)
	}
	var wire *os.File
	if c.Wire != nil {
		w := *c.Wire
		var theirs *os.File
		if wire, theirs, err = vmm.WirePair(); err != nil {
			return Taken{}, err
		}
		defer theirs.Close()
		w.File = theirs
		if w.MAC == "" {
			w.MAC = "02:00:00:00:00:01" // until the guest is told its own
		}
		c.Wire = &w
	}
	out := Taken{Wire: wire}
	if t.Frozen() {
		ready := vmm.ThawConfig{RunAs: c.RunAs, Ready: true}
		if c.Wire != nil {
			ready.Wire = c.Wire.File
		}
		if out.Machine, err = t.Thaw(ready, p.cfg.Log); err == nil {
			return out, nil
		}
		p.cfg.Log.Warn("a frozen machine could not be used", "template", t.Key, "error", err)
	}
	m, err := vmm.Start(ctx, c, p.cfg.Log)
	if err == nil {
		if err = p.cfg.Prepare(ctx, m, r); err == nil {
			out.Machine, err = m.Give(ctx)
		}
		if err != nil {
			if ctx.Err() == nil {
				p.cfg.Store.SetAside(t.Key, err)
			}
			m.Kill()
			m.Wait()
		}
	}
	if err != nil {
		out.close()
	}
	return out, err
}

func (t Taken) close() {
	if t.Machine != nil {
		t.Machine.Close()
	}
	if t.Wire != nil {
		t.Wire.Close()
	}
}

// availableMemory is what the host could give without swapping.
func availableMemory() (int64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		var kib int64
		if n, _ := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); n == 1 {
			return kib << 10, nil
		}
	}
	return 0, errors.New("/proc/meminfo has no MemAvailable")
}

// send sends one message with files beside it.
func send(c *net.UnixConn, a answer, files []*os.File) error {
	b, err := json.Marshal(a)
	if err != nil {
		return err
	}
	if len(b) > maxMessage {
		return fmt.Errorf("an answer of %d bytes is longer than %d", len(b), maxMessage)
	}
	var fds []int
	for _, f := range files {
		fds = append(fds, int(f.Fd()))
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, rights, nil)
	return err
}

// sameUser checks that the other side is this user, or root.
func sameUser(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var cerr error
	if err := raw.Control(func(fd uintptr) { cred, cerr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return err
	}
	if cerr != nil {
		return os.NewSyscallError("getsockopt", cerr)
	}
	if int(cred.Uid) != os.Geteuid() && cred.Uid != 0 {
		return fmt.Errorf("the other side of the pool's socket is user %d", cred.Uid)
	}
	return nil
}
