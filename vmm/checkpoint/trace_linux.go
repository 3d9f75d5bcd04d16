package checkpoint

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"
)

// code is what a stopped process executes in place of its program: the system calls of a table, one after the other. RBX
// points to the table, whose entries have eight words: number, six arguments, result. The number -1 is the end.
var code = []byte{
	0x48, 0x8b, 0x03, // next: mov (%rbx), %rax
	0x48, 0x83, 0xf8, 0xff, // cmp $-1, %rax
	0x74, 0x24, // je done
	0x48, 0x8b, 0x7b, 0x08, // mov 8(%rbx), %rdi
	0x48, 0x8b, 0x73, 0x10, // mov 16(%rbx), %rsi
	0x48, 0x8b, 0x53, 0x18, // mov 24(%rbx), %rdx
	0x4c, 0x8b, 0x53, 0x20, // mov 32(%rbx), %r10
	0x4c, 0x8b, 0x43, 0x28, // mov 40(%rbx), %r8
	0x4c, 0x8b, 0x4b, 0x30, // mov 48(%rbx), %r9
	0x0f, 0x05, // syscall
	0x48, 0x89, 0x43, 0x38, // mov %rax, 56(%rbx)
	0x48, 0x83, 0xc3, 0x40, // add $64, %rbx
	0xeb, 0xd3, // jmp next
	0xcc, // done: int3
}

// call is a system call in a table.
type call struct {
	what   string // for an error
	number int
	args   [6]uint64
	want   *uint64 // its result; nil: none that is an error
	may    bool    // it may fail
	result int64
}

// entry is how long a call is in the table.
const entry = 64

// workspace is memory of a stopped process in which it executes calls: the code, then data that calls point to and get, then
// the table.
type workspace struct {
	pid    int
	start  uint64
	length uint64
	data   []byte // written before the table is run
}

// Sizes of a workspace's parts.
const (
	pageSize      = 4096
	maxData       = 1 << 20
	maxCalls      = 1 << 15
	workspaceSize = pageSize + maxData + maxCalls*entry
)

// place makes the workspace in a process whose main thread has stopped anywhere, by writing over what it would execute next.
func place(pid int, start uint64) (*workspace, error) {
	w := &workspace{pid: pid, start: start, length: workspaceSize}
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(pid, &regs); err != nil {
		return nil, os.NewSyscallError("ptrace", err)
	}
	if _, err := unix.PtracePokeText(pid, uintptr(regs.Rip), []byte{0x0f, 0x05, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc, 0xcc}); err != nil {
		return nil, os.NewSyscallError("ptrace", err)
	}
	at := regs.Rip
	regs.Orig_rax = ^uint64(0)
	regs.Rax = unix.SYS_MMAP
	regs.Rdi, regs.Rsi, regs.Rdx = start, w.length, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC
	regs.R10, regs.R8, regs.R9 = unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_FIXED_NOREPLACE, ^uint64(0), 0
	regs.Rip = at
	if err := unix.PtraceSetRegs(pid, &regs); err != nil {
		return nil, os.NewSyscallError("ptrace", err)
	}
	if _, err := proceed(pid); err != nil {
		return nil, err
	}
	if err := unix.PtraceGetRegs(pid, &regs); err != nil {
		return nil, os.NewSyscallError("ptrace", err)
	}
	if regs.Rax != start {
		return nil, fmt.Errorf("map a workspace: %w", unix.Errno(-int64(regs.Rax)))
	}
	return w, poke(pid, start, code)
}

// add puts data into the workspace and returns its address.
func (w *workspace) add(b []byte) uint64 {
	for len(w.data)%8 != 0 {
		w.data = append(w.data, 0)
	}
	at := w.start + pageSize + uint64(len(w.data))
	w.data = append(w.data, b...)
	return at
}

// run lets a thread execute calls and reads their results. born are the threads that they began, stopped. The thread's
// registers are lost.
func (w *workspace) run(tid int, calls []call) (born []int, err error) {
	if len(calls) >= maxCalls || len(w.data) > maxData {
		return nil, fmt.Errorf("%d calls with %d bytes of data are more than there is room for", len(calls), len(w.data))
	}
	table := w.start + pageSize + maxData
	var b bytes.Buffer
	for _, c := range calls {
		_ = binary.Write(&b, binary.LittleEndian, uint64(c.number))
		_ = binary.Write(&b, binary.LittleEndian, c.args[:])
		_ = binary.Write(&b, binary.LittleEndian, int64(0))
	}
	_ = binary.Write(&b, binary.LittleEndian, ^uint64(0))
	if err := poke(w.pid, w.start+pageSize, w.data); err != nil {
		return nil, err
	}
	if err := poke(w.pid, table, b.Bytes()); err != nil {
		return nil, err
	}
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(tid, &regs); err != nil {
		return nil, os.NewSyscallError("ptrace", err)
	}
	regs.Rip, regs.Rbx, regs.Orig_rax = w.start, table, ^uint64(0)
	if err := unix.PtraceSetRegs(tid, &regs); err != nil {
		return nil, os.NewSyscallError("ptrace", err)
	}
	if born, err = proceed(tid); err != nil {
		return nil, err
	}
	out := make([]byte, entry*len(calls))
	if err := peek(w.pid, table, out); err != nil {
		return nil, err
	}
	for i := range calls {
		r := int64(binary.LittleEndian.Uint64(out[entry*i+56:]))
		calls[i].result = r
		switch c := calls[i]; {
		case c.may:
		case r < 0 && r > -4096:
			return nil, fmt.Errorf("%s: %w", c.what, unix.Errno(-r))
		case c.want != nil && uint64(r) != *c.want:
			return nil, fmt.Errorf("%s: result %d instead of %d", c.what, r, *c.want)
		}
	}
	return born, nil
}

// proceed lets a thread go on until it executes int3, and returns the threads that it began meanwhile, stopped.
func proceed(tid int) (born []int, err error) {
	for {
		if err := unix.PtraceCont(tid, 0); err != nil {
			return nil, os.NewSyscallError("ptrace", err)
		}
		status, err := await(tid)
		if err != nil {
			return nil, err
		}
		switch {
		case status.StopSignal() == unix.SIGTRAP && status.TrapCause() == unix.PTRACE_EVENT_CLONE:
			n, err := unix.PtraceGetEventMsg(tid)
			if err != nil {
				return nil, os.NewSyscallError("ptrace", err)
			}
			if _, err := await(int(n)); err != nil {
				return nil, err
			}
			born = append(born, int(n))
		case status.StopSignal() == unix.SIGTRAP && status.TrapCause() <= 0:
			return born, nil
		default:
			return nil, fmt.Errorf("thread %d stopped by %v", tid, status.StopSignal())
		}
	}
}

// await waits until a thread stops.
func await(tid int) (unix.WaitStatus, error) {
	var status unix.WaitStatus
	for {
		_, err := unix.Wait4(tid, &status, unix.WALL, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, os.NewSyscallError("wait4", err)
		}
		if !status.Stopped() {
			return 0, fmt.Errorf("thread %d ended (%v)", tid, describe(status))
		}
		return status, nil
	}
}

// kill ends a child that is being traced. Its end is told to nobody before that of its other threads was, and that is told
// only to the thread which traces them.
func kill(pid int) {
	entries, _ := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	_ = unix.Kill(pid, unix.SIGKILL)
	for _, e := range entries {
		tid, err := strconv.Atoi(e.Name())
		if err != nil || tid == pid {
			continue
		}
		for over := false; !over; {
			var status unix.WaitStatus
			_, err := unix.Wait4(tid, &status, unix.WALL, nil)
			over = err == nil && !status.Stopped() || err != nil && !errors.Is(err, unix.EINTR)
		}
	}
}

func describe(s unix.WaitStatus) string {
	if s.Signaled() {
		return s.Signal().String()
	}
	return fmt.Sprintf("status %d", s.ExitStatus())
}

// peek reads memory of a process.
func peek(pid int, address uint64, b []byte) error {
	for len(b) > 0 {
		n, err := unix.ProcessVMReadv(pid, []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}},
			[]unix.RemoteIovec{{Base: uintptr(address), Len: len(b)}}, 0)
		if err != nil {
			return fmt.Errorf("read memory at %#x: %w", address, err)
		}
		address, b = address+uint64(n), b[n:]
	}
	return nil
}

// poke writes memory of a process.
func poke(pid int, address uint64, b []byte) error {
	for len(b) > 0 {
		n, err := unix.ProcessVMWritev(pid, []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}},
			[]unix.RemoteIovec{{Base: uintptr(address), Len: len(b)}}, 0)
		if err != nil {
			return fmt.Errorf("write memory at %#x: %w", address, err)
		}
		address, b = address+uint64(n), b[n:]
	}
	return nil
}

// remove gives the workspace back, by an instruction of the vdso: code cannot go on when it has removed itself.
func (w *workspace) remove(vdso Area) error {
	b := make([]byte, vdso.End-vdso.Start)
	if err := peek(w.pid, vdso.Start, b); err != nil {
		return err
	}
	at := bytes.Index(b, []byte{0x0f, 0x05})
	if at < 0 {
		return errors.New("the vdso has no system call")
	}
	var regs unix.PtraceRegs
	if err := unix.PtraceGetRegs(w.pid, &regs); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	regs.Rip, regs.Rax, regs.Orig_rax = vdso.Start+uint64(at), unix.SYS_MUNMAP, ^uint64(0)
	regs.Rdi, regs.Rsi = w.start, w.length
	if err := unix.PtraceSetRegs(w.pid, &regs); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	if err := unix.PtraceSingleStep(w.pid); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	if _, err := await(w.pid); err != nil {
		return err
	}
	if err := unix.PtraceGetRegs(w.pid, &regs); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	if regs.Rax != 0 {
		return fmt.Errorf("remove the workspace: %w", unix.Errno(-int64(regs.Rax)))
	}
	return nil
}
