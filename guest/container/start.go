package container

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/guest/reap"
	"github.com/kcradle/kcradle/internal/undo"
)

// Running is a started process. Its files are ours to close.
type Running struct {
	*reap.Child
	PidFD *os.File // names the process even after it has ended

	Stdin          *os.File // nil unless asked for; with a terminal nil
	Stdout, Stderr *os.File // with a terminal nil
	Terminal       *os.File // the master; nil without a terminal
}

// Close closes the files that are left.
func (r *Running) Close() {
	for _, f := range []*os.File{r.PidFD, r.Stdin, r.Stdout, r.Stderr, r.Terminal} {
		if f != nil {
			f.Close()
		}
	}
}

// Signal sends a signal to the process. It fails with os.ErrClosed after Close and with ESRCH once the process was reaped.
func (r *Running) Signal(sig syscall.Signal) error {
	var serr error
	err := r.withPidFD(func(fd int) { serr = unix.PidfdSendSignal(fd, sig, nil, 0) })
	return errors.Join(err, serr)
}

// withPidFD calls fn with the descriptor, which stays open meanwhile.
func (r *Running) withPidFD(fn func(fd int)) error {
	raw, err := r.PidFD.SyscallConn()
	if err != nil {
		return err
	}
	return raw.Control(func(fd uintptr) { fn(int(fd)) })
}

// Start starts a container's first process in new namespaces and in the cgroup. When the program cannot be executed
// the error is a *StartError.
func Start(r *reap.Reaper, c *Config, cgroup *Cgroup) (*Running, error) {
	p := c.Process
	p.Stdout, p.Stderr = true, true
	cc := *c
	cc.Process = p
	t, err := newTable(&cc)
	if err != nil {
		return nil, AsStartError(err)
	}
	fd, err := cgroup.open("")
	if err != nil {
		return nil, AsStartError(err)
	}
	defer unix.Close(fd)
	return start(r, t, &p, fd)
}

// Join starts a further process in the container whose first process first is.
func Join(r *reap.Reaper, first *Running, p *Process, cgroup *Cgroup) (*Running, error) {
	pidfd := -1
	var derr error
	err := first.withPidFD(func(fd int) { pidfd, derr = unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3) })
	if err = errors.Join(err, derr); err != nil {
		return nil, AsStartError(fmt.Errorf("join container: %w", err))
	}
	defer unix.Close(pidfd)
	t, err := newExecTable(p, first.Pid(), pidfd)
	if err != nil {
		return nil, AsStartError(err)
	}
	fd, err := cgroup.open("")
	if err != nil {
		return nil, AsStartError(err)
	}
	run, err := start(r, t, p, fd)
	unix.Close(fd)
	if err != nil && isBusy(err) {
		// The container distributes its resources among cgroups of its own (systemd, dockerd): processes may be
		// in its leaves only. Where its first process is, others may be.
		fd, cerr := cgroup.openOf(first.Pid())
		if cerr != nil {
			return nil, AsStartError(cerr)
		}
		defer unix.Close(fd)
		return start(r, t, p, fd)
	}
	return run, err
}

func isBusy(err error) bool {
	se := AsStartError(err)
	return se.Err == syscall.EBUSY && strings.HasPrefix(se.Msg, cloneFailed)
}

const cloneFailed = "clone the container's process"

// start runs a table.
func start(r *reap.Reaper, t *Table, p *Process, cgroup int) (*Running, error) {
	regs := make([]uintptr, t.thread.regs)
	for i := range regs {
		regs[i] = ^uintptr(0)
	}
	var u undo.Stack // what is undone on failure
	defer u.Run()
	var theirs []int // what the child has when it runs
	defer func() {
		for _, fd := range theirs {
			unix.Close(fd)
		}
	}()
	run := &Running{}
	if !p.TTY {
		for i, s := range []struct {
			want bool
			ours **os.File
			name string
		}{{p.Stdin, &run.Stdin, "stdin"}, {p.Stdout, &run.Stdout, "stdout"}, {p.Stderr, &run.Stderr, "stderr"}} {
			if !s.want {
				fd, err := unix.Open("/dev/null", unix.O_RDWR|unix.O_CLOEXEC, 0)
				if err != nil {
					return nil, AsStartError(&fs.PathError{Op: "open", Path: "/dev/null", Err: err})
				}
				theirs, regs[i] = append(theirs, fd), uintptr(fd)
				continue
			}
			var fds [2]int
			if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
				return nil, AsStartError(fmt.Errorf("make a pipe for %s: %w", s.name, err))
			}
			ours, their := fds[0], fds[1]
			if i == 0 {
				ours, their = their, ours
			}
			theirs, regs[i] = append(theirs, their), uintptr(their)
			if p.User.UID != 0 {
				// So that the process may open it again by its name, /dev/stdout.
				unix.Fchown(their, int(p.User.UID), -1)
			}
			unix.SetNonblock(ours, true)
			*s.ours = os.NewFile(uintptr(ours), s.name)
		}
	}
	u.Push(run.Close)

	type result struct {
		pid, pidfd int
		err        error
	}
	ch := make(chan result, 1)
	child, err := r.Start(func() (int, error) {
		go func() {
			// This thread changes its root and its namespaces; it ends with the goroutine, because it stays locked.
			runtime.LockOSThread()
			var res result
			defer func() { ch <- res }()
			if i, errno := runSteps(t.thread.steps, regs); errno != 0 {
				s := t.thread.steps[i]
				if t.thread.holdsFD(i) {
					unix.Close(int(regs[regTmp]))
				}
				res.err = &StartError{Code: 125, Msg: fmt.Sprintf("unable to start container process: %s: %v", s.Text(), errno), Err: errno}
				return
			}
			t.child.leaveOut()
			// On the heap: the child writes it while it shares our memory.
			out := new(outcome)
			res.pid, res.pidfd, res.err = cloneSteps(t.flags, cgroup, t.child.steps, regs, out)
			if res.err != nil {
				res.err = &StartError{Code: 125, Msg: fmt.Sprintf("%s: %v", cloneFailed, res.err), Err: res.err}
				return
			}
			if out.step >= 0 {
				unix.Close(res.pidfd)
				var last Step
				if int(out.step) < len(t.child.steps) {
					last = t.child.steps[out.step]
				}
				if last.kind == kindExec && syscall.Errno(out.errno) == syscall.EACCES {
					// The kernel calls a directory "permission denied". This thread still sees the container's files.
					var st unix.Stat_t
					if unix.Chdir(p.Cwd) == nil && unix.Stat(last.path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
						out.errno = uint32(syscall.EISDIR)
					}
				}
				res.err = failure(t.child.steps, *out, p.Args[0])
			}
		}()
		res := <-ch
		runtime.KeepAlive(t)
		if res.err == nil {
			run.PidFD = os.NewFile(uintptr(res.pidfd), "pidfd")
		}
		return res.pid, res.err
	})
	for i, fd := range regs {
		if int(fd) < 0 || i < regMaster && !p.TTY {
			continue
		}
		if i == regStdin || i >= regSources {
			unix.Close(int(fd))
		}
	}
	if master := int(regs[regMaster]); master >= 0 {
		// Whatever stands at that name in the container: only a terminal's master is taken for one.
		run.Terminal = os.NewFile(uintptr(master), "terminal")
	}
	if err != nil {
		return nil, err
	}
	run.Child = child
	u.Keep()
	return run, nil
}
