package guest

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kcradle/kcradle/spec"
)

// host is the control stream: frames in both directions.
type host struct {
	conn     net.Conn
	r        *bufio.Reader
	received time.Time // when the placement came
	asked    int       // questions for the time in a row
	set      bool      // the wall clock was looked at

	wg           sync.WaitGroup
	stopStarting func()
	stopped      chan struct{} // closed when the pod is to end
	once         sync.Once
	limit        atomic.Int64 // nanoseconds for a write; 0: none

	mu   sync.Mutex // guards what follows and the order of frames
	buf  []byte
	stop spec.Stop
}

func newHost(c net.Conn) *host {
	return &host{conn: c, r: bufio.NewReader(c), stopped: make(chan struct{})}
}

// write sends a frame whose payload is appended by fill.
func (h *host) write(kind byte, fill func([]byte) []byte) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	b := fill(append(h.buf[:0], kind, 0, 0, 0, 0))
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-5))
	h.buf = b
	if limit := h.limit.Load(); limit != 0 {
		h.conn.SetWriteDeadline(time.Now().Add(time.Duration(limit)))
	}
	_, err := h.conn.Write(b)
	return err
}

// Output sends a container's output.
func (h *host) Output(o spec.Output) error { return h.write(spec.FrameOutput, o.Append) }

// State sends a container's state.
func (h *host) State(s spec.State) error { return h.send(spec.FrameState, s) }

func (h *host) send(kind byte, v any) error {
	payload, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode frame %q: %w", kind, err)
	}
	return h.write(kind, func(b []byte) []byte { return append(b, payload...) })
}

// hurry bounds how long the host may take to accept a frame, from now on.
func (h *host) hurry(limit time.Duration) {
	h.limit.Store(int64(limit))
	h.conn.SetWriteDeadline(time.Now().Add(limit)) // of a write that waits now
}

func (h *host) stopTimeout() *int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.stop.Timeout
}

// serve obeys the host's frames until the stream ends. A host that is gone is an order to stop: nobody owns the machine
// any more, and its disks must be left in order.
func (h *host) serve(g *guest) {
	h.wg.Go(func() {
		defer h.once.Do(func() { close(h.stopped) })
		buf := make([]byte, 4<<10)
		for {
			kind, b, err := spec.ReadFrame(h.r, buf)
			if err != nil {
				if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
					g.log.Warn("control stream", "error", err)
				}
				return
			}
			if err := h.obey(g, kind, b); err != nil {
				g.log.Warn("control frame", "kind", string(kind), "error", err)
			}
		}
	})
}

func (h *host) obey(g *guest, kind byte, b []byte) error {
	switch kind {
	case spec.FrameSignal:
		var s spec.Signal
		if err := json.Unmarshal(b, &s); err != nil {
			return err
		}
		return g.pod.Signal(s)
	case spec.FrameStop:
		var s spec.Stop
		if len(b) > 0 {
			if err := json.Unmarshal(b, &s); err != nil {
				return err
			}
		}
		h.mu.Lock()
		h.stop = s
		h.mu.Unlock()
		h.once.Do(func() { close(h.stopped) })
	case spec.FrameClock:
		return h.clock(g.m, b)
	case spec.FrameNetwork:
		raw := bytes.Clone(b)
		h.wg.Go(func() { // the launch it waits for can be stopped
			var done spec.Done
			if err := g.rewire(raw); err != nil {
				done.Message = err.Error()
			}
			if err := h.send(spec.FrameNetwork, done); err != nil {
				g.log.Warn("tell the host of the network", "error", err)
			}
		})
	default:
		return errors.New("unknown")
	}
	return nil
}

// awaitClose waits for the host to end the stream.
func (h *host) awaitClose(limit time.Duration) {
	h.conn.SetReadDeadline(time.Now().Add(limit))
	h.wg.Wait()
}

func (h *host) close() {
	h.conn.Close()
	h.wg.Wait()
}
