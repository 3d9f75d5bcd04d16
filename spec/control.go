package spec

import (
	"encoding/binary"
	"fmt"
	"io"
	"time"
)

// The control stream (PortControl) carries frames in both directions: one byte of type, four bytes of length
// (big endian), the payload. The host opens one stream per machine and speaks first.
//
//	host  → guest   FramePod (exact bytes of pod.json), FramePlacement (JSON), then FrameSignal, FrameStop
//	both            FrameClock, FrameNetwork
//	guest → host    FrameOutput and FrameState as things happen, at most one FrameError, FrameDone as the last
const (
	FramePod       byte = 'P' // bytes of pod.json
	FramePlacement byte = 'L' // JSON Placement; the launch begins
	FrameSignal    byte = 'K' // JSON Signal; not a stop by the API, so the pod may end by it
	FrameStop      byte = 'T' // JSON Stop: end the pod

	FrameClock byte = 'C' // see Clock; in both directions

	// FrameNetwork has a JSON Network: the pod's wire from now on. The guest answers with a JSON Done.
	FrameNetwork byte = 'N'

	FrameOutput byte = 'O' // see Output
	FrameState  byte = 'S' // JSON State
	FrameError  byte = 'E' // JSON Failure: the launch failed; the machine ends
	FrameDone   byte = 'D' // JSON Done: file systems are synced and unmounted; the machine may be switched off

	// Between a supervisor and other programs of its host alone, on the socket that also takes FrameSignal and FrameStop. There,
	// FrameNetwork is empty and says that the bundle's SegmentsFile has changed; the answer is a FrameDone.
	FrameWatch  byte = 'W' // from now on, tell the pod's state as it changes
	FrameReport byte = 'R' // JSON of the bundle's State
)

// MaxFrame bounds the payload of a frame. Output frames are far smaller.
const MaxFrame = 8 << 20

// OutputHeader is the size of what precedes the bytes in an output frame.
const OutputHeader = 2 + 1 + 8

// WriteFrame writes one frame with a single Write.
func WriteFrame(w io.Writer, kind byte, payload []byte) error {
	if len(payload) > MaxFrame {
		return fmt.Errorf("write frame %q: %d bytes are more than the limit of %d", kind, len(payload), MaxFrame)
	}
	b := make([]byte, 5+len(payload))
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:], uint32(len(payload)))
	copy(b[5:], payload)
	_, err := w.Write(b)
	return err
}

// ReadFrame reads one frame. It returns io.EOF when the stream ends between frames, io.ErrUnexpectedEOF within one.
// buf is used for the payload when it is large enough.
func ReadFrame(r io.Reader, buf []byte) (kind byte, payload []byte, err error) {
	var h [5]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	n := binary.BigEndian.Uint32(h[1:])
	if n > MaxFrame {
		return 0, nil, fmt.Errorf("read frame %q: %d bytes are more than the limit of %d", h[0], n, MaxFrame)
	}
	if int(n) > cap(buf) {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := io.ReadFull(r, buf); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return 0, nil, err
	}
	return h[0], buf, nil
}

// Output is a piece of a container's output: uint16 index in Pod.Containers, one byte of stream (1 stdout, 2 stderr),
// int64 nanoseconds since 1970, all big endian, then the bytes.
type Output struct {
	Container int
	Stream    byte
	Time      time.Time
	Bytes     []byte
}

// Append encodes o behind b.
func (o Output) Append(b []byte) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(o.Container))
	b = append(b, o.Stream)
	b = binary.BigEndian.AppendUint64(b, uint64(o.Time.UnixNano()))
	return append(b, o.Bytes...)
}

// ParseOutput decodes the payload of an output frame; Bytes points into it.
func ParseOutput(b []byte) (Output, error) {
	if len(b) < OutputHeader {
		return Output{}, fmt.Errorf("parse output frame: %d bytes are fewer than its header of %d", len(b), OutputHeader)
	}
	o := Output{
		Container: int(binary.BigEndian.Uint16(b)),
		Stream:    b[2],
		Time:      time.Unix(0, int64(binary.BigEndian.Uint64(b[3:]))),
		Bytes:     b[OutputHeader:],
	}
	if o.Stream != 1 && o.Stream != 2 {
		return Output{}, fmt.Errorf("parse output frame: stream %d is neither stdout (1) nor stderr (2)", o.Stream)
	}
	return o, nil
}

// Signal asks for a signal to a container's process.
type Signal struct {
	Container string `json:"container"` // name; empty: the first container
	Signal    int    `json:"signal"`
}

// Stop ends the pod: each container gets its stop signal, after the grace SIGKILL, then file systems are synced and
// unmounted and FrameDone is sent.
type Stop struct {
	Timeout *int `json:"timeout,omitempty"` // seconds; nil: each container's own; negative: wait for ever
}

// Status values of a container, as docker names them.
const (
	StatusCreated    = "created"
	StatusRunning    = "running"
	StatusPaused     = "paused"
	StatusRestarting = "restarting"
	StatusExited     = "exited"
	StatusDead       = "dead"
)

// State is what is known of one container. Each change is sent to the host, which keeps the last one.
type State struct {
	Container  string    `json:"container"` // name
	Status     string    `json:"status"`
	Pid        int       `json:"pid,omitempty"`    // in the guest; 0 when not running
	ExitCode   int       `json:"exit_code"`        // docker's: 128+signal when killed by one
	Signal     int       `json:"signal,omitempty"` // that ended it
	OOMKilled  bool      `json:"oom_killed,omitempty"`
	Error      string    `json:"error,omitempty"` // why it could not start
	Restarts   int       `json:"restarts,omitempty"`
	Started    time.Time `json:"started,omitzero"`
	Finished   time.Time `json:"finished,omitzero"`
	Health     string    `json:"health,omitempty"` // "", "starting", "healthy", "unhealthy"
	ManualStop bool      `json:"manual_stop,omitempty"`
}

// Failure says why a launch failed.
type Failure struct {
	Phase   string `json:"phase"` // of guest init's table
	Message string `json:"message"`
}

// Done is the guest's last word.
type Done struct {
	Clean   bool             `json:"clean"` // every file system was unmounted
	Message string           `json:"message,omitempty"`
	Phases  map[string]int64 `json:"phases,omitempty"` // nanoseconds since the kernel's start at which each phase ended
}
