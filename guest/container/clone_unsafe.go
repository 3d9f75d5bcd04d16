package container

import (
	"syscall"
	"unsafe" // system call tables are arrays of addresses; runtime hooks are reached by linkname

	"golang.org/x/sys/unix"
)

// The hooks of the Go runtime around a fork. Their names and types are kept stable for users outside the standard
// library, see the comments at their definitions in runtime/proc.go.

//go:linkname runtimeBeforeFork syscall.runtime_BeforeFork
func runtimeBeforeFork()

//go:linkname runtimeAfterFork syscall.runtime_AfterFork
func runtimeAfterFork()

//go:linkname runtimeAfterForkInChild syscall.runtime_AfterForkInChild
func runtimeAfterForkInChild()

// vforkSyscall is in clone_amd64.s.
func vforkSyscall(trap, a1, a2 uintptr) (r1, err uintptr)

// address of the first byte. The caller keeps b reachable; heap objects do not move.
func address(b []byte) uintptr { return uintptr(unsafe.Pointer(&b[0])) }

// pointers makes the NULL-terminated array of strings that execve takes. Both results must stay reachable.
func (t *table) vector(list []string) uintptr {
	v := make([]*byte, len(list)+1)
	for i, s := range list {
		p, err := syscall.BytePtrFromString(s)
		if err != nil && t.err == nil {
			t.err = err
		}
		v[i] = p
	}
	t.ptrs = append(t.ptrs, v)
	return uintptr(unsafe.Pointer(&v[0]))
}

// cloneArgs is struct clone_args of linux/sched.h.
type cloneArgs struct {
	flags, pidFD, childTID, parentTID, exitSignal, stack, stackSize, tls, setTID, setTIDSize, cgroup uint64
}

// outcome is where the child says which step failed: it shares our memory until it executes its program.
type outcome struct {
	step  int32 // index of the failed step; len(steps): none of the programs could be executed
	errno uint32
}

// runSteps runs a table on this thread and returns the index of the step that failed. The caller keeps the memory
// that the steps point to reachable.
func runSteps(steps []Step, regs []uintptr) (int, syscall.Errno) {
	for i := range steps {
		s := &steps[i]
		a := s.args
		for j, u := range s.use {
			if u != 0 {
				a[j] = regs[u-1]
			}
		}
		r, _, errno := syscall.Syscall6(s.nr, a[0], a[1], a[2], a[3], a[4], a[5])
		if errno != 0 && errno != s.ignore[0] && errno != s.ignore[1] && errno != s.ignore[2] {
			return i, errno
		}
		if s.save != 0 && errno == 0 {
			regs[s.save-1] = r
		}
	}
	return len(steps), 0
}

// cloneSteps starts a child that runs the table and returns when the child has executed its program or given up.
// Then out is filled. pidfd is that of the child.
func cloneSteps(flags uint64, cgroup int, steps []Step, regs []uintptr, out *outcome) (pid, pidfd int, err error) {
	fd := new(int32)
	*fd = -1
	args := &cloneArgs{
		flags:      flags | unix.CLONE_VM | unix.CLONE_VFORK | unix.CLONE_PIDFD,
		exitSignal: uint64(syscall.SIGCHLD),
	}
	if cgroup >= 0 {
		args.flags |= unix.CLONE_INTO_CGROUP
		args.cgroup = uint64(cgroup)
	}
	*out = outcome{step: -1}
	// As package syscall does: no descriptor without close-on-exec may be made by others meanwhile.
	syscall.ForkLock.Lock()
	r, errno := cloneChild(args, fd, steps, regs, out)
	runtimeAfterFork()
	syscall.ForkLock.Unlock()
	if errno != 0 {
		return 0, -1, errno
	}
	return int(r), int(*fd), nil
}

// cloneChild returns in the parent only. It is a frame of its own so that the child, which runs on the same stack,
// spoils nothing the parent still needs; between the two hooks nothing may allocate, grow the stack or call what is
// not assembly. Variables are declared before the clone for that reason.
//
//go:noinline
//go:norace
//go:nocheckptr
func cloneChild(args *cloneArgs, pidfd *int32, steps []Step, regs []uintptr, out *outcome) (pid uintptr, errno syscall.Errno) {
	var (
		i, j int
		s    *Step
		a    [6]uintptr
		r, e uintptr
		e1   syscall.Errno
	)
	runtimeBeforeFork()
	// Not earlier: pidfd may be on the stack, and the stack may move until here.
	args.pidFD = uint64(uintptr(unsafe.Pointer(pidfd)))
	r, e = vforkSyscall(unix.SYS_CLONE3, uintptr(unsafe.Pointer(args)), unsafe.Sizeof(*args))
	if e != 0 || r != 0 {
		return r, syscall.Errno(e)
	}

	// The child.
	runtimeAfterForkInChild()
	for i = 0; i < len(steps); i++ {
		s = &steps[i]
		for j = 0; j < 6; j++ {
			a[j] = s.args[j]
			if s.use[j] != 0 {
				a[j] = regs[s.use[j]-1]
			}
		}
		r, _, e1 = syscall.RawSyscall6(s.nr, a[0], a[1], a[2], a[3], a[4], a[5])
		if e1 != 0 && e1 != s.ignore[0] && e1 != s.ignore[1] && e1 != s.ignore[2] {
			break
		}
		if s.save != 0 && e1 == 0 {
			regs[s.save-1] = r
		}
	}
	out.step, out.errno = int32(i), uint32(e1)
	for {
		syscall.RawSyscall(syscall.SYS_EXIT, 253, 0, 0)
	}
}
