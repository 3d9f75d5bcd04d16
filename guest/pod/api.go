// Package pod runs the containers of a machine: one owner per container, its state, its output, its restarts and its
// health, and everything that the Docker Engine API asks of them.
//
//	p, err := pod.New(pod.Config{Pod: doc, Placement: placement, …})
//	err = p.Start(ctx)       // in the order of the document
//	c, err := p.Find("web")
//	err = c.Stop(ctx, pod.StopOptions{})
//	<-p.Done()               // nothing critical runs any more and nothing will restart it
package pod

import (
	"errors"
	"time"
)

// Errors that callers decide on. They come wrapped with the container they are about.
var (
	ErrNotFound   = errors.New("no such container")
	ErrAmbiguous  = errors.New("more than one container has an ID that begins so")
	ErrAlready    = errors.New("already in that state")
	ErrNotRunning = errors.New("container is not running")
	ErrPaused     = errors.New("container is paused")
	ErrConflict   = errors.New("name is already in use")
	ErrInvalid    = errors.New("invalid argument")
)

// Event is something that happened to a container, with docker's names for actions and attributes.
type Event struct {
	Time       time.Time
	Action     string            // "start", "die", "health_status: healthy", …
	Container  string            // ID
	Attributes map[string]string // beside name, image and labels, which the reader adds: exitCode, signal, execID, …
}

// StopOptions says how to stop. The zero value asks for the container's own signal and grace.
type StopOptions struct {
	Signal  string // name or number; empty: the container's own
	Timeout *int   // seconds; nil: the container's own; negative: wait for ever
}

// Conditions of Wait.
const (
	WaitNotRunning = "not-running"
	WaitNextExit   = "next-exit"
	WaitRemoved    = "removed"
)

// WaitResult is how a container ended.
type WaitResult struct {
	ExitCode int
	Err      error // the container could not start, or the pod ended before the condition came true
}

// LogOptions selects what of the output is read. Neither Stdout nor Stderr: nothing.
type LogOptions struct {
	Follow       bool
	Since, Until time.Time // zero: no bound
	Tail         int       // number of last lines; negative: all
	Stdout       bool
	Stderr       bool
}

// Chunk is a piece of output: what one read of the pipe or terminal gave.
type Chunk struct {
	Stream byte // 1 stdout, 2 stderr
	Time   time.Time
	Bytes  []byte // valid until the next call of Next
}

// AttachOptions selects the streams of an attachment.
type AttachOptions struct {
	Stdin, Stdout, Stderr bool
	Logs                  bool // begin with what was written before, since byte 0
	Stream                bool // go on with what comes; without it only Logs is given
}

// ExecConfig is a process to run inside a running container.
type ExecConfig struct {
	Cmd                   []string
	Env                   []string // added to the container's own
	User                  string   // empty: the container's own
	WorkingDir            string   // empty: the container's own
	TTY                   bool
	Stdin, Stdout, Stderr bool
	Privileged            bool
	DetachKeys            string   // kept for inspect; the API's side obeys it
	ConsoleSize           *[2]uint // height, width
}

// ExecState is what is known of an exec.
type ExecState struct {
	Running  bool
	ExitCode *int // nil until it has ended
	Pid      int  // in the machine
}

// Change is one path that differs from the image.
type Change struct {
	Kind int // ChangeModified, ChangeAdded or ChangeDeleted
	Path string
}

// Kinds of Change, with docker's numbers.
const (
	ChangeModified = 0
	ChangeAdded    = 1
	ChangeDeleted  = 2
)

// HealthResult is one run of a health check.
type HealthResult struct {
	Start, End time.Time
	ExitCode   int // 0 healthy, -1 when it could not run or took too long
	Output     string
}

// Health is what the health check knows.
type Health struct {
	Status        string // "starting", "healthy" or "unhealthy"
	FailingStreak int
	Log           []HealthResult // the last five, oldest first
}

// Stats are the counters of a running container.
type Stats struct {
	Read     time.Time
	CPU      CPUStats
	Memory   MemoryStats
	Pids     PidsStats
	IO       []IOStats
	Networks map[string]NetworkStats // of the pod: containers share its network
}

// CPUStats are times in nanoseconds.
type CPUStats struct {
	Total, User, System uint64
	Host                uint64 // what all CPUs of the machine did since its start
	Online              int
	Periods             uint64
	ThrottledPeriods    uint64
	ThrottledTime       uint64
}

// MemoryStats are bytes.
type MemoryStats struct {
	Usage    uint64
	MaxUsage uint64
	Limit    uint64            // the container's, or the machine's memory when it has none
	Failures uint64            // how often the limit was hit
	Stat     map[string]uint64 // memory.stat
}

// PidsStats counts processes and threads.
type PidsStats struct {
	Current uint64
	Limit   uint64 // 0: none
}

// IOStats are the counters of one block device.
type IOStats struct {
	Major, Minor          uint64
	ReadBytes, WriteBytes uint64
	ReadOps, WriteOps     uint64
}

// NetworkStats are the counters of one interface.
type NetworkStats struct {
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}
