package dockerapi

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
)

// Streams of a frame.
const (
	Stdin  byte = 0
	Stdout byte = 1
	Stderr byte = 2
)

// MaxFrame bounds the payload of a frame that is read. Servers write far smaller ones.
const MaxFrame = 4 << 20

// frameHeader is one byte of stream, three zeros, a big-endian length.
const frameHeader = 8

// FrameWriter writes the frames of a multiplexed stream, each with a single Write. It may be used by several
// goroutines.
type FrameWriter struct {
	mu  sync.Mutex
	w   io.Writer
	buf []byte
}

// NewFrameWriter returns a writer of frames to w.
func NewFrameWriter(w io.Writer) *FrameWriter { return &FrameWriter{w: w} }

// WriteFrame writes b as one frame of a stream.
func (f *FrameWriter) WriteFrame(stream byte, b []byte) error {
	if len(b) > MaxFrame {
		return fmt.Errorf("write frame: %d bytes are more than the limit of %d", len(b), MaxFrame)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.buf = append(f.buf[:0], stream, 0, 0, 0)
	f.buf = binary.BigEndian.AppendUint32(f.buf, uint32(len(b)))
	f.buf = append(f.buf, b...)
	_, err := f.w.Write(f.buf)
	return err
}

// ReadFrame reads one frame; its payload is in buf when that is large enough. It returns io.EOF between frames and
// io.ErrUnexpectedEOF within one.
func ReadFrame(r io.Reader, buf []byte) (stream byte, payload []byte, err error) {
	var h [frameHeader]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	if h[0] > Stderr || h[1] != 0 || h[2] != 0 || h[3] != 0 {
		return 0, nil, fmt.Errorf("read frame: % x is no header of a multiplexed stream", h)
	}
	n := binary.BigEndian.Uint32(h[4:])
	if n > MaxFrame {
		return 0, nil, fmt.Errorf("read frame: %d bytes are more than the limit of %d", n, MaxFrame)
	}
	if int(n) > cap(buf) {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := io.ReadFull(r, buf); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return h[0], buf, nil
}
