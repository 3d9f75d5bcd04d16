package layer

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"sync"
)

const (
	aheadChunk = 256 << 10
	aheadDepth = 4
)

// ahead reads a stream in a goroutine of its own, hashing it there: decompression and digest run beside the work on
// what was read before. It also bounds the stream's length.
type ahead struct {
	ctx    context.Context
	full   chan []byte
	free   chan []byte
	stop   chan struct{}
	done   chan struct{}
	once   sync.Once
	buf    []byte // being read, a part of its chunk
	chunk  []byte
	total  int64 // bytes read; valid after the end
	err    error // why it ended; set before full is closed
	closed bool  // the end was read, so that err may be looked at
}

func newAhead(ctx context.Context, r io.Reader, h hash.Hash, limit int64) *ahead {
	a := &ahead{
		ctx:  ctx,
		full: make(chan []byte, aheadDepth),
		free: make(chan []byte, aheadDepth),
		stop: make(chan struct{}),
		done: make(chan struct{}),
	}
	for range aheadDepth {
		a.free <- make([]byte, aheadChunk)
	}
	go a.run(r, h, limit)
	return a
}

func (a *ahead) run(r io.Reader, h hash.Hash, limit int64) {
	defer close(a.done)
	defer close(a.full)
	for {
		var b []byte
		select {
		case b = <-a.free:
		case <-a.stop:
			return
		case <-a.ctx.Done():
			a.err = context.Cause(a.ctx)
			return
		}
		b = b[:cap(b)]
		n := 0
		var err error
		for n < len(b) && err == nil {
			var m int
			m, err = r.Read(b[n:])
			n += m
		}
		a.total += int64(n)
		if a.total > limit {
			a.err = fmt.Errorf("%w: the layer unpacks to more than %d bytes", ErrLimit, limit)
			return
		}
		h.Write(b[:n])
		if n > 0 {
			select {
			case a.full <- b[:n]:
			case <-a.stop:
				return
			}
		}
		if err != nil {
			a.err = err
			return
		}
	}
}

// Read implements io.Reader for the one goroutine that works on the stream.
func (a *ahead) Read(p []byte) (int, error) {
	for len(a.buf) == 0 {
		if a.chunk != nil {
			a.free <- a.chunk
			a.chunk = nil
		}
		b, ok := <-a.full
		if !ok {
			a.closed = true
			if a.err == nil {
				return 0, io.ErrClosedPipe
			}
			return 0, a.err
		}
		a.buf, a.chunk = b, b
	}
	n := copy(p, a.buf)
	a.buf = a.buf[n:]
	return n, nil
}

// explain prefers the stream's own error to what the reader above made of it, so that a tar that is cut short because
// its source failed says how the source failed.
func (a *ahead) explain(err error) error {
	if !a.closed {
		return err
	}
	if a.err == nil || a.err == io.EOF || errors.Is(err, a.err) {
		return err
	}
	return a.err
}

// close ends the goroutine and waits for it. The stream must end on its own or by its context.
func (a *ahead) close() {
	a.once.Do(func() { close(a.stop) })
	<-a.done
}
