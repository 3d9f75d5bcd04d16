package pod

import (
	"context"
	"errors"
	"io"
	"syscall"
	"time"

	"github.com/kcradle/kcradle/spec"
)

var errTodo = errors.New("not implemented yet")

// Pod is the set of containers of one machine.
type Pod struct {
	doc       *spec.Pod
	placement *spec.Placement
}

// Container is one container of a pod.
type Container struct{}

// Exec is a process that was or will be started in a running container.
type Exec struct{}

// ExecSession is a started exec with its streams.
type ExecSession struct {
	Stdin          io.WriteCloser // nil unless asked for; Close is an end of file for the process only
	Stdout, Stderr io.Reader      // with a terminal only Stdout; they end when the process has and all is read
}

// LogReader reads the output of a container.
type LogReader struct{}

// Attachment is a client's end of a container's streams.
type Attachment struct {
	Stdin io.WriteCloser // nil unless asked for and the container has one; Close obeys StdinOnce
}

func (p *Pod) Spec() *spec.Pod            { return p.doc }
func (p *Pod) Placement() *spec.Placement { return p.placement }

func (p *Pod) Containers() []*Container            { return nil }
func (p *Pod) Find(ref string) (*Container, error) { return nil, ErrNotFound }
func (p *Pod) Exec(id string) (*Exec, error)       { return nil, ErrNotFound }
func (p *Pod) Emit(e Event)                        {}
func (p *Pod) Events(since time.Time) (past []Event, live <-chan Event, cancel func()) {
	return nil, nil, func() {}
}

func (c *Container) ID() string                                          { return "" }
func (c *Container) Name() string                                        { return "" }
func (c *Container) Index() int                                          { return 0 }
func (c *Container) Spec() spec.Container                                { return spec.Container{} }
func (c *Container) State() spec.State                                   { return spec.State{} }
func (c *Container) Health() *Health                                     { return nil }
func (c *Container) Execs() []string                                     { return nil }
func (c *Container) Rename(name string) error                            { return errTodo }
func (c *Container) Start(ctx context.Context) error                     { return errTodo }
func (c *Container) Stop(ctx context.Context, o StopOptions) error       { return errTodo }
func (c *Container) Restart(ctx context.Context, o StopOptions) error    { return errTodo }
func (c *Container) Kill(ctx context.Context, sig syscall.Signal) error  { return errTodo }
func (c *Container) Pause(ctx context.Context) error                     { return errTodo }
func (c *Container) Unpause(ctx context.Context) error                   { return errTodo }
func (c *Container) Wait(cond string) (<-chan WaitResult, func(), error) { return nil, nil, errTodo }
func (c *Container) Resize(height, width uint) error                     { return errTodo }
func (c *Container) Logs(o LogOptions) (*LogReader, error)               { return nil, errTodo }
func (c *Container) Attach(o AttachOptions) (*Attachment, error)         { return nil, errTodo }
func (c *Container) Exec(cfg ExecConfig) (*Exec, error)                  { return nil, errTodo }
// Top: package guest/ps lists processes as ps(1) does: ps.List("/proc", pids of the cgroup tree, psArgs).
func (c *Container) Top(psArgs []string) (titles []string, rows [][]string, err error) {
	return nil, nil, errTodo
}
func (c *Container) Stats() (Stats, error)                                  { return Stats{}, errTodo }
func (c *Container) Changes(ctx context.Context) ([]Change, error)          { return nil, errTodo }
func (c *Container) Root() (dir string, release func(), err error)          { return "", nil, errTodo }
func (c *Container) Size(ctx context.Context) (rw, rootfs int64, err error) { return 0, 0, errTodo }

func (e *Exec) ID() string                                                { return "" }
func (e *Exec) Container() *Container                                     { return nil }
func (e *Exec) Config() ExecConfig                                        { return ExecConfig{} }
func (e *Exec) State() ExecState                                          { return ExecState{} }
func (e *Exec) Resize(height, width uint) error                           { return errTodo }
func (e *Exec) Start(ctx context.Context) (*ExecSession, error)           { return nil, errTodo }
func (s *ExecSession) Wait(ctx context.Context) (exitCode int, err error) { return 0, errTodo }
func (s *ExecSession) Close()                                             {}

func (r *LogReader) Next(ctx context.Context) (Chunk, error)  { return Chunk{}, io.EOF }
func (r *LogReader) Close()                                   {}
func (a *Attachment) Next(ctx context.Context) (Chunk, error) { return Chunk{}, io.EOF }
func (a *Attachment) Close()                                  {}
