package pod

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/guest/container"
	"github.com/kcradle/kcradle/spec"
)

// stream reads a pipe or a terminal's master to its end. Once the process has ended, descendants may still hold the
// other end: then the stream ends when nothing has come for the grace.
type stream struct {
	f      *os.File
	exited <-chan struct{}
	grace  time.Duration
	quit   chan struct{}
	done   chan struct{}
	once   sync.Once
}

func newStream(f *os.File, exited <-chan struct{}, grace time.Duration) *stream {
	s := &stream{f: f, exited: exited, grace: grace, quit: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(s.done)
		select {
		case <-exited:
			f.SetReadDeadline(time.Now().Add(grace)) // of a read that waits now
		case <-s.quit:
		}
	}()
	return s
}

// stop releases the stream, not the file.
func (s *stream) stop() {
	s.once.Do(func() { close(s.quit) })
	<-s.done
}

func (s *stream) Read(b []byte) (int, error) {
	for {
		over := false
		select {
		case <-s.exited:
			over = true
			<-s.done
			// The grace begins anew with each read: a slow reader of much output loses none of it.
			s.f.SetReadDeadline(time.Now().Add(s.grace))
		default:
		}
		n, err := s.f.Read(b)
		switch {
		case n > 0 || err == nil:
			return n, nil
		case errors.Is(err, os.ErrDeadlineExceeded) && !over:
			continue
		default:
			// EIO is the end of a terminal; whatever else ends a stream, nobody could do more about it.
			return 0, io.EOF
		}
	}
}

// input is the standard input of a process: several may write, each through a descriptor of its own, so that one that
// waits can be closed.
type input struct {
	mu      sync.Mutex
	f       *os.File // nil once closed
	tty     bool
	writers map[*inputWriter]bool
}

func newInput(p *container.Running) *input {
	in := &input{writers: map[*inputWriter]bool{}}
	if p.Terminal != nil {
		in.f, in.tty = p.Terminal, true
	} else {
		in.f, p.Stdin = p.Stdin, nil
	}
	return in
}

// close ends the input; a terminal stays as it is.
func (in *input) close() {
	in.mu.Lock()
	defer in.mu.Unlock()
	for w := range in.writers {
		w.f.Close()
	}
	clear(in.writers)
	if in.f != nil && !in.tty {
		in.f.Close()
	}
	in.f = nil
}

type inputWriter struct {
	in *input
	f  *os.File
}

func (in *input) writer() (*inputWriter, error) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if in.f == nil {
		return nil, os.ErrClosed
	}
	raw, err := in.f.SyscallConn()
	if err != nil {
		return nil, err
	}
	var fd int
	var derr error
	err = raw.Control(func(old uintptr) { fd, derr = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) })
	if err = errors.Join(err, derr); err != nil {
		return nil, err
	}
	w := &inputWriter{in: in, f: os.NewFile(uintptr(fd), "stdin")} // non-blocking, as its original
	in.writers[w] = true
	return w, nil
}

func (w *inputWriter) Write(b []byte) (int, error) { return w.f.Write(b) }

func (w *inputWriter) Close() error {
	w.in.mu.Lock()
	delete(w.in.writers, w)
	w.in.mu.Unlock()
	return w.f.Close()
}

// pump sends a container's output and states to the host, a state behind the output that came before it.
type pump struct {
	c    *Container
	host Host

	mu     sync.Mutex
	states []pendingState
	last   bool // nothing follows

	cursor int64 // used by run alone
}

type pendingState struct {
	off   int64
	state spec.State
}

// coalesce bounds how far apart pieces may be that are sent as one.
const coalesce = 5 * time.Millisecond

func (p *pump) state(off int64, s spec.State) {
	if p.host == nil {
		return
	}
	p.mu.Lock()
	p.states = append(p.states, pendingState{off, s})
	p.mu.Unlock()
	p.c.log.wake()
}

// finish lets run return once everything is sent.
func (p *pump) finish() {
	p.mu.Lock()
	p.last = true
	p.mu.Unlock()
	p.c.log.wake()
}

// run pumps until finish was called or the host is gone.
func (p *pump) run() {
	defer p.c.log.pumped(math.MaxInt64)
	log := p.c.log
	// A cursor that ends where the next state is due.
	cur := cursor{log: log, off: p.cursor}
	var due *pendingState
	cur.end = func() (int64, bool) {
		p.mu.Lock()
		defer p.mu.Unlock()
		due = nil
		if len(p.states) > 0 {
			s := p.states[0]
			due = &s
			return s.off, true
		}
		if p.last {
			return math.MaxInt64, true
		}
		return 0, false
	}
	var held *record
	var buf []byte
	for {
		var rec record
		var err error
		if held != nil {
			rec, held = *held, nil
		} else {
			rec, err = cur.next(context.Background())
		}
		if err != nil {
			if due == nil {
				return // the last
			}
			p.mu.Lock()
			p.states = p.states[1:]
			p.mu.Unlock()
			if p.host.State(due.state) != nil {
				return
			}
			continue
		}
		// The first byte leaves at once; what is there already goes with it.
		buf = append(buf[:0], rec.bytes...)
		for held == nil && len(buf) < maxRecord/2 {
			more, ok := p.peek(&cur)
			if !ok {
				break
			}
			if more.stream != rec.stream || len(buf)+len(more.bytes) > maxRecord || time.Duration(more.time-rec.time) > coalesce {
				held = &more
				break
			}
			buf = append(buf, more.bytes...)
		}
		err = p.host.Output(spec.Output{Container: p.c.index, Stream: rec.stream, Time: time.Unix(0, rec.time), Bytes: buf})
		if err != nil {
			return
		}
		taken := cur.off
		if held != nil {
			taken = held.off
		}
		log.pumped(taken)
	}
}

// peek takes the next record if it is there now.
func (p *pump) peek(cur *cursor) (record, bool) {
	if end, known := cur.end(); known && cur.off >= end {
		return record{}, false
	}
	r, more, _, err := cur.log.at(cur.off)
	if err != nil || !more {
		return record{}, false
	}
	if end, known := cur.end(); known && r.off >= end {
		return record{}, false
	}
	cur.off = r.next()
	return r, true
}

// Attachment is a client's end of a container's streams.
type Attachment struct {
	Stdin io.WriteCloser // nil unless asked for and the container has one; Close obeys StdinOnce

	c       *Container
	options AttachOptions
	cursor  cursor
	started <-chan struct{} // nil when bound to a run
	closed  chan struct{}
	once    sync.Once
	leave   func()

	mu  sync.Mutex
	run *run // nil until the container starts
}

// Attach attaches to the run in progress, or to the next one when none is: no byte of it is lost.
func (c *Container) Attach(o AttachOptions) (*Attachment, error) {
	a := &Attachment{c: c, options: o, closed: make(chan struct{})}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.state.Status {
	case spec.StatusPaused:
		return nil, c.wrapLocked(ErrPaused)
	case spec.StatusRestarting:
		return nil, c.wrapLocked(ErrRestarting)
	case spec.StatusRunning:
		a.run = c.run
	default:
		a.started = c.next
	}
	off := c.log.position()
	if o.Logs {
		off = c.log.begin()
	}
	a.cursor = cursor{log: c.log, off: off, end: a.end}
	if !o.Stream {
		now := c.log.position()
		a.cursor.end = func() (int64, bool) { return now, true }
	}
	if o.Stdin && o.Stream && c.doc.OpenStdin {
		a.Stdin = &attachedInput{a: a}
	}
	a.leave = c.pod.enter()
	return a, nil
}

// ErrRestarting says that a container waits for its restart.
var ErrRestarting = errors.New("container is restarting, wait until the container is running")

func (c *Container) wrapLocked(err error) error {
	return fmt.Errorf("container %s: %w", c.name, err)
}

// bound returns the run, which may not have begun.
func (a *Attachment) bound() *run {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.run == nil && a.started != nil {
		select {
		case <-a.started:
			a.c.mu.Lock()
			a.run = a.c.run
			a.c.mu.Unlock()
		default:
		}
	}
	return a.run
}

func (a *Attachment) end() (int64, bool) {
	select {
	case <-a.closed:
		return 0, true
	default:
	}
	r := a.bound()
	if r == nil {
		return 0, false
	}
	select {
	case <-r.ended:
		return r.end, true
	default:
		return 0, false
	}
}

// Next returns the next piece of output, io.EOF after the last one of the run.
func (a *Attachment) Next(ctx context.Context) (Chunk, error) {
	for {
		rec, err := a.cursor.next(ctx)
		if err != nil {
			return Chunk{}, err
		}
		if rec.stream == 1 && a.options.Stdout || rec.stream == 2 && a.options.Stderr {
			return Chunk{Stream: rec.stream, Time: time.Unix(0, rec.time), Bytes: rec.bytes}, nil
		}
	}
}

// Close detaches. It may be called twice, and ends a Next or a write that waits.
func (a *Attachment) Close() {
	a.once.Do(func() {
		close(a.closed)
		a.leave()
		a.c.log.wake()
		if in, ok := a.Stdin.(*attachedInput); ok {
			in.detach()
		}
	})
}

// attachedInput writes to the standard input of the attachment's run and waits for the run to begin.
type attachedInput struct {
	a *Attachment

	mu       sync.Mutex
	w        *inputWriter
	in       *input
	detached bool
}

func (i *attachedInput) Write(b []byte) (int, error) {
	w, err := i.open()
	if err != nil {
		return 0, err
	}
	return w.Write(b)
}

func (i *attachedInput) open() (*inputWriter, error) {
	if i.a.bound() == nil {
		select {
		case <-i.a.started:
		case <-i.a.closed:
			return nil, os.ErrClosed
		case <-i.a.c.pod.ctx.Done():
			return nil, os.ErrClosed
		}
	}
	r := i.a.bound()
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.detached {
		return nil, os.ErrClosed
	}
	if i.w != nil {
		return i.w, nil
	}
	if r == nil || r.stdin == nil {
		return nil, syscall.EPIPE
	}
	w, err := r.stdin.writer()
	if err != nil {
		return nil, err
	}
	i.w, i.in = w, r.stdin
	return w, nil
}

// Close is the client's end of input. With StdinOnce the process sees it, too.
func (i *attachedInput) Close() error {
	if i.a.c.doc.StdinOnce {
		// Also for a client that closes without a byte.
		if _, err := i.open(); err == nil && !i.in.tty {
			i.in.close()
		}
	}
	i.detach()
	return nil
}

func (i *attachedInput) detach() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.detached = true
	if i.w != nil {
		i.w.Close()
		i.w = nil
	}
}
