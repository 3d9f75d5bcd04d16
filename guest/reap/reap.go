// Package reap owns the children of PID 1: it holds the only wait4(-1), hands each status to the one who started the
// child, and buries the orphans that the kernel gives to PID 1.
//
//	r := reap.New()
//	go r.Run(nil)
//	child, err := r.Start(func() (pid int, err error) { … })
//	status := <-child.Done()
package reap

import (
	"errors"
	"sync"
	"syscall"
)

// Exit is how a child ended.
type Exit struct {
	Status syscall.WaitStatus
	Usage  syscall.Rusage
}

// Code is the exit code as a shell and docker give it: 128 plus the number of the signal that ended the process.
func (e Exit) Code() int {
	if e.Status.Signaled() {
		return 128 + int(e.Status.Signal())
	}
	return e.Status.ExitStatus()
}

// Child is a started process.
type Child struct {
	pid  int
	done chan struct{}
	exit Exit // written once before done is closed
}

// Pid is the process ID in our PID namespace. It may belong to another process once Done is closed.
func (c *Child) Pid() int { return c.pid }

// Done is closed when the process has ended and was reaped.
func (c *Child) Done() <-chan struct{} { return c.done }

// Exit says how the process ended. It may be called only after Done is closed.
func (c *Child) Exit() Exit { return c.exit }

// Reaper waits for every child of this process. Nothing else in the process may wait for a child: not os/exec, not
// os.Process.Wait.
type Reaper struct {
	kick chan struct{} // a child was started; capacity 1

	mu       sync.Mutex
	starting int               // calls of Start whose child is not registered yet
	early    map[int]Exit      // ended while starting > 0, not known yet whose they are
	children map[int]*Child    // registered and not ended
	orphans  uint64            // reaped children that nobody started
	wait     func() waitResult // wait4, replaced in tests
}

type waitResult struct {
	pid  int
	exit Exit
	err  error
}

// New returns a reaper that does nothing until Run is called.
func New() *Reaper {
	return &Reaper{
		kick:     make(chan struct{}, 1),
		early:    map[int]Exit{},
		children: map[int]*Child{},
		wait:     wait4,
	}
}

// Start calls fork, which must start exactly one child of this process or fail, and registers the child. A child that
// ends before fork returns is not lost.
func (r *Reaper) Start(fork func() (pid int, err error)) (*Child, error) {
	r.mu.Lock()
	r.starting++
	r.mu.Unlock()

	pid, err := fork()

	r.mu.Lock()
	defer r.mu.Unlock()
	r.starting--
	var c *Child
	if err == nil {
		c = &Child{pid: pid, done: make(chan struct{})}
		if exit, ok := r.early[pid]; ok {
			delete(r.early, pid)
			c.exit = exit
			close(c.done)
		} else {
			r.children[pid] = c
		}
	}
	if r.starting == 0 && len(r.early) > 0 {
		r.orphans += uint64(len(r.early))
		clear(r.early)
	}
	// Even after an error there may be a child to bury: one whose exec failed.
	select {
	case r.kick <- struct{}{}:
	default:
	}
	return c, err
}

// Orphans counts reaped processes that were not started by Start.
func (r *Reaper) Orphans() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.orphans
}

// Run reaps until stop is closed and no child is left. PID 1 never closes stop.
func (r *Reaper) Run(stop <-chan struct{}) {
	for {
		w := r.wait()
		switch {
		case w.err == nil:
			r.ended(w.pid, w.exit)
		case errors.Is(w.err, syscall.EINTR):
		default: // ECHILD: no child. Orphans come only from descendants of a child, so the next one is Start's.
			select {
			case <-r.kick:
			case <-stop:
				return
			}
		}
	}
}

func (r *Reaper) ended(pid int, exit Exit) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c, ok := r.children[pid]; ok {
		delete(r.children, pid)
		c.exit = exit
		close(c.done)
		return
	}
	if r.starting > 0 {
		r.early[pid] = exit
		return
	}
	r.orphans++
}

func wait4() waitResult {
	var w waitResult
	w.pid, w.err = syscall.Wait4(-1, &w.exit.Status, syscall.WALL, &w.exit.Usage)
	return w
}
