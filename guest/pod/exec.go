package pod

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"strconv"
	"sync"
	"syscall"

	"github.com/kcradle/kcradle/guest/container"
	"github.com/kcradle/kcradle/spec"
)

// Exec is a process that was or will be started in a running container.
type Exec struct {
	id  string
	c   *Container
	run *run
	cfg ExecConfig

	over chan struct{} // closed when the end is in the state

	mu      sync.Mutex
	started bool
	proc    *container.Running // nil until started
	state   ExecState
	size    [2]uint16
}

// maxExecs bounds how many ended execs are remembered.
const maxExecs = 256

// Exec makes an exec, which Start starts. The container must run.
func (c *Container) Exec(cfg ExecConfig) (*Exec, error) {
	if len(cfg.Cmd) == 0 {
		return nil, fmt.Errorf("no exec command specified: %w", ErrInvalid)
	}
	r, err := c.current()
	if err != nil {
		return nil, err
	}
	if c.State().Status == spec.StatusPaused {
		return nil, c.wrap(ErrPaused)
	}
	var b [32]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, err
	}
	e := &Exec{id: hex.EncodeToString(b[:]), c: c, run: r, cfg: cfg, over: make(chan struct{})}
	if cfg.ConsoleSize != nil {
		if e.size, err = terminalSize(cfg.ConsoleSize[0], cfg.ConsoleSize[1]); err != nil {
			return nil, c.wrap(err)
		}
	}
	p := c.pod
	p.mu.Lock()
	defer p.mu.Unlock()
	p.execs[e.id] = e
	c.mu.Lock()
	defer c.mu.Unlock()
	c.execs = append(c.execs, e.id)
	for len(c.execs) > maxExecs {
		// The oldest that does not run is forgotten.
		i := 0
		for i < len(c.execs)-1 && p.execs[c.execs[i]].State().Running {
			i++
		}
		delete(p.execs, c.execs[i])
		c.execs = append(c.execs[:i:i], c.execs[i+1:]...)
	}
	return e, nil
}

// ErrNoExec says that there is no such exec.
var ErrNoExec = fmt.Errorf("no such exec instance: %w", ErrNotFound)

// Exec returns an exec by its full ID.
func (p *Pod) Exec(id string) (*Exec, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	e, ok := p.execs[id]
	if !ok {
		return nil, fmt.Errorf("%s: %w", id, ErrNoExec)
	}
	return e, nil
}

// Execs are the IDs of the execs that have not ended.
func (c *Container) Execs() []string {
	p := c.pod
	p.mu.Lock()
	defer p.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []string
	for _, id := range c.execs {
		if s := p.execs[id].State(); s.ExitCode == nil {
			out = append(out, id)
		}
	}
	return out
}

// ID is 64 hex digits.
func (e *Exec) ID() string { return e.id }

// Container is the one that the exec runs in.
func (e *Exec) Container() *Container { return e.c }

// Config is what was asked for.
func (e *Exec) Config() ExecConfig { return e.cfg }

// State is what is known now.
func (e *Exec) State() ExecState {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.state
}

// Resize sets the size of the terminal; before the start it is remembered.
func (e *Exec) Resize(height, width uint) error {
	size, err := terminalSize(height, width)
	if err != nil {
		return err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.size = size
	if e.proc != nil && e.proc.Terminal != nil && e.state.Running {
		return resize(e.proc.Terminal, size)
	}
	return nil
}

// ExecSession is a started exec with its streams.
type ExecSession struct {
	Stdin          io.WriteCloser // nil unless asked for; Close is an end of file for the process only
	Stdout, Stderr io.Reader      // with a terminal only Stdout; they end when the process has and all is read

	e       *Exec
	proc    *container.Running
	stdin   *input
	streams []*stream
	once    sync.Once
	leave   func()
}

// Start starts the exec. It can be started once; ErrAlready otherwise. A failure to start is a *container.StartError, and
// is the exec's end. The session must be closed.
func (e *Exec) Start(ctx context.Context) (*ExecSession, error) {
	e.mu.Lock()
	if e.started {
		e.mu.Unlock()
		return nil, fmt.Errorf("exec %s: %w", e.id, ErrAlready)
	}
	e.started = true
	size := e.size
	e.mu.Unlock()

	switch r, err := e.c.current(); {
	case err != nil:
		return nil, err
	case r != e.run:
		return nil, e.c.wrap(ErrNotRunning)
	case e.c.State().Status == spec.StatusPaused:
		return nil, e.c.wrap(ErrPaused)
	}
	proc, err := e.c.join(e.run, e.cfg, size)
	if err != nil {
		se := container.AsStartError(err)
		code := se.Code
		if code == 125 {
			code = 126 // of an exec docker says so whatever kept it from starting
		}
		e.ended(code)
		return nil, se
	}
	s := &ExecSession{e: e, proc: proc, leave: e.c.pod.enter()}
	e.mu.Lock()
	e.proc = proc
	e.state = ExecState{Running: true, Pid: proc.Pid()}
	if proc.Terminal != nil && e.size != size { // it came while the process started
		err = resize(proc.Terminal, e.size)
	}
	e.mu.Unlock()
	if err != nil {
		e.c.pod.cfg.Log.Error("size of a terminal", "exec", e.id, "error", err)
	}
	if e.cfg.Stdin {
		s.stdin = newInput(proc)
		w, err := s.stdin.writer()
		if err != nil {
			s.Close()
			return nil, err
		}
		s.Stdin = &execInput{s: s, w: w}
	}
	if proc.Terminal != nil {
		s.streams = append(s.streams, newStream(proc.Terminal, proc.Done(), drainGrace))
		s.Stdout = s.streams[0]
	} else {
		if proc.Stdout != nil {
			st := newStream(proc.Stdout, proc.Done(), drainGrace)
			s.streams = append(s.streams, st)
			s.Stdout = st
		}
		if proc.Stderr != nil {
			st := newStream(proc.Stderr, proc.Done(), drainGrace)
			s.streams = append(s.streams, st)
			s.Stderr = st
		}
	}
	e.c.pod.spawn(func() {
		<-proc.Done()
		code := proc.Exit().Code()
		e.ended(code)
		e.c.pod.Emit(Event{Action: "exec_die", Container: e.c.ID(), Attributes: map[string]string{
			"execID": e.id, "exitCode": strconv.Itoa(code),
		}})
	})
	return s, nil
}

// join starts a further process in a run.
func (c *Container) join(r *run, cfg ExecConfig, size [2]uint16) (*container.Running, error) {
	user, cwd := cfg.User, cfg.WorkingDir
	if user == "" {
		user = c.doc.User
	}
	if cwd == "" {
		cwd = c.doc.WorkingDir
	}
	p, err := c.process(cfg.Cmd, cfg.Env, user, cwd, cfg.TTY)
	if err != nil {
		return nil, err
	}
	if cfg.Privileged {
		p.Bounding = container.AllCapabilities
	}
	p.Stdin, p.Stdout, p.Stderr, p.Size = cfg.Stdin, cfg.Stdout, cfg.Stderr, size
	return container.Join(c.pod.cfg.Reaper, r.proc, &p, r.cgroup)
}

func (e *Exec) ended(code int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.state = ExecState{ExitCode: &code, Pid: e.state.Pid}
	close(e.over)
}

// Wait waits for the process's end. When it returns, the exec's state tells of it.
func (s *ExecSession) Wait(ctx context.Context) (exitCode int, err error) {
	select {
	case <-s.e.over:
		return s.proc.Exit().Code(), nil
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// Signal sends a signal to the process.
func (s *ExecSession) Signal(sig syscall.Signal) error {
	return s.e.c.send(&run{proc: s.proc}, sig)
}

// Close closes the streams. The process goes on, as docker's does when its client goes; its output is then thrown away.
func (s *ExecSession) Close() {
	s.once.Do(func() {
		s.leave()
		if s.stdin != nil {
			s.stdin.close()
		}
		if s.proc.Terminal != nil || isEnded(&run{proc: s.proc}) {
			s.release()
			return
		}
		// A process that writes into a closed pipe dies; one whose client is gone must not.
		s.e.c.pod.spawn(func() {
			var wg sync.WaitGroup
			for _, st := range s.streams {
				wg.Go(func() { io.Copy(io.Discard, st) })
			}
			wg.Wait()
			<-s.proc.Done()
			s.release()
		})
	})
}

func (s *ExecSession) release() {
	for _, st := range s.streams {
		st.stop()
	}
	s.e.mu.Lock()
	defer s.e.mu.Unlock()
	s.proc.Close()
	s.e.proc = nil
}

type execInput struct {
	s *ExecSession
	w *inputWriter
}

func (i *execInput) Write(b []byte) (int, error) { return i.w.Write(b) }

func (i *execInput) Close() error {
	if !i.s.stdin.tty {
		i.s.stdin.close()
	}
	return nil
}
