package checkpoint

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/undo"
)

// Start is what a process is started with, beside its image.
type Start struct {
	Memory *os.File            // what Freeze wrote
	Files  map[string]*os.File // by role
	Filter []unix.SockFilter   // seccomp's, from the process's first own instruction on; empty: none
	// Ready says that the process will have to be fast when it goes on: it gets a copy of all its memory now, its code in huge
	// pages, and not page by page.
	Ready bool
	// Tie ties the process's life to something that outlives the thread which starts it; it is called before the process goes
	// on. Without one the process ends with that thread.
	Tie func(pid int) error
}

// Thaw starts a process from an image. Of cmd it sets Path, Args, the standard files and ExtraFiles, and starts it; the caller
// waits for it.
//
// The goroutine must be locked to its thread, and the thread must stay until the process has ended or is tied to something else. At
// no moment does the process outlive it before that: until then it has Pdeathsig, which exec keeps.
func Thaw(cmd *exec.Cmd, img *Image, s Start) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("thaw process: %w", err)
		}
	}()
	var u undo.Stack
	defer u.Run()
	table, made, err := img.open(s.Files)
	u.Push(func() {
		for _, f := range made {
			_ = f.Close()
		}
	})
	if err != nil {
		return err
	}
	own := len(table) // the number of the memory's descriptor
	table = append(table, s.Memory)
	cmd.Path, cmd.Args = img.Program, []string{img.Program}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = table[0], table[1], table[2]
	cmd.ExtraFiles = table[3:]
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Ptrace, cmd.SysProcAttr.Pdeathsig = true, unix.SIGKILL
	if err := cmd.Start(); err != nil {
		return err
	}
	if err := img.restore(cmd.Process.Pid, own, s); err != nil {
		kill(cmd.Process.Pid)
		_ = cmd.Wait()
		if end := cmd.ProcessState; end != nil && end.Sys().(syscall.WaitStatus).Signal() != unix.SIGKILL {
			return fmt.Errorf("%s ended at once: %v", img.Program, end)
		}
		if errors.Is(err, unix.ESRCH) { // it had begun to end when we killed it: our signal hides its own
			return fmt.Errorf("%s ended at once", img.Program)
		}
		return err
	}
	return nil
}

// open makes the process's descriptors: a table by number, and what of it is ours to close.
func (img *Image) open(files map[string]*os.File) (table, made []*os.File, err error) {
	for _, d := range img.Descriptors {
		if d.Number < 0 || d.Number > 1000 {
			return nil, made, fmt.Errorf("descriptor %d: want less than a thousand", d.Number)
		}
		for len(table) <= d.Number {
			table = append(table, nil)
		}
		var f *os.File
		switch d.Kind {
		case KindNull:
			f, err = os.OpenFile(os.DevNull, d.Flags&unix.O_ACCMODE, 0)
		case KindRandom:
			f, err = os.OpenFile("/dev/urandom", d.Flags&unix.O_ACCMODE, 0)
		case KindEvent:
			var fd int
			fd, err = unix.Eventfd(uint(d.Value), unix.EFD_CLOEXEC|d.Flags&unix.EFD_NONBLOCK)
			f = os.NewFile(uintptr(fd), d.Kind)
		case KindSignal:
			var set unix.Sigset_t
			set.Val[0] = d.Value
			var fd int
			fd, err = unix.Signalfd(-1, &set, unix.SFD_CLOEXEC|d.Flags&unix.SFD_NONBLOCK)
			f = os.NewFile(uintptr(fd), d.Kind)
		case KindOther:
			if table[d.Number] = files[d.Role]; table[d.Number] == nil {
				err = fmt.Errorf("descriptor %d: there is no %q", d.Number, d.Role)
			}
		default:
			err = fmt.Errorf("descriptor %d is of kind %q", d.Number, d.Kind)
		}
		if err != nil {
			return nil, made, err
		}
		if f != nil {
			made = append(made, f)
			table[d.Number] = f
		}
	}
	for i := range 3 { // what nobody has gets /dev/null, as with exec.Cmd
		if i < len(table) && table[i] != nil {
			continue
		}
		f, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
		if err != nil {
			return nil, made, err
		}
		made = append(made, f)
		table = append(table, make([]*os.File, max(0, i+1-len(table)))...)
		table[i] = f
	}
	return table, made, nil
}

// restore makes of a process that has stopped before its program's first instruction the one of the image.
func (img *Image) restore(pid, memory int, s Start) error {
	if status, err := await(pid); err != nil {
		return err
	} else if status.StopSignal() != unix.SIGTRAP {
		return fmt.Errorf("it stopped by %v", status.StopSignal())
	}
	if err := unix.PtraceSetOptions(pid, unix.PTRACE_O_EXITKILL|unix.PTRACE_O_TRACECLONE); err != nil {
		return os.NewSyscallError("ptrace", err)
	}
	kernel, err := kernelAreas(pid)
	if err != nil {
		return err
	}
	w, err := place(pid, img.Workspace)
	if err != nil {
		return err
	}
	calls, err := img.clear(w, kernel)
	if err != nil {
		return err
	}
	mapping, err := s.mapping()
	if err != nil {
		return err
	}
	calls = append(calls, img.fill(w, memory, mapping)...)
	calls = append(calls, img.settle(w, s.Filter)...)
	born, err := w.run(pid, calls)
	if err != nil {
		return err
	}
	tids := append([]int{pid}, born...)
	if len(tids) != len(img.Threads) {
		return fmt.Errorf("%d threads instead of %d", len(tids), len(img.Threads))
	}
	if err := poke(pid, img.Threads[0].ID, binary.LittleEndian.AppendUint32(nil, uint32(pid))); err != nil {
		return err
	}
	for i, tid := range tids {
		w.data = nil
		if _, err := w.run(tid, img.Threads[i].calls(w)); err != nil {
			return fmt.Errorf("thread %q: %w", img.Threads[i].Name, err)
		}
	}
	if s.Tie != nil {
		if err := s.Tie(pid); err != nil {
			return err
		}
		w.data = nil
		if _, err := w.run(pid, []call{{what: "prctl(PR_SET_PDEATHSIG)", number: unix.SYS_PRCTL, args: [6]uint64{unix.PR_SET_PDEATHSIG, 0}}}); err != nil {
			return err
		}
	}
	if err := w.remove(kernelArea(img.Kernel, "[vdso]")); err != nil {
		return err
	}
	for i, tid := range tids {
		t := img.Threads[i]
		regs := t.Registers
		if err := errors.Join(unix.PtraceSetRegs(tid, &regs), setExtended(tid, t.Extended), setMask(tid, t.Mask)); err != nil {
			return err
		}
	}
	// In reverse: when the main thread runs, all do.
	for _, tid := range slices.Backward(tids) {
		if err := unix.PtraceDetach(tid); err != nil {
			return os.NewSyscallError("ptrace", err)
		}
	}
	return nil
}

// kernelAreas is where the kernel has put what it maps into a process that has just begun.
func kernelAreas(pid int) ([]Area, error) {
	var img Image
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.SplitN(line, " ", 6)
		if len(fields) < 6 || !strings.HasPrefix(strings.TrimSpace(fields[5]), "[v") {
			continue
		}
		if err := img.readMap(fields); err != nil {
			return nil, err
		}
	}
	return img.Kernel, nil
}

func kernelArea(areas []Area, name string) Area {
	for _, a := range areas {
		if a.Name == name {
			return a
		}
	}
	return Area{}
}

// clear removes everything from a process but its workspace, and moves what the kernel has mapped to where the image's
// threads know it.
func (img *Image) clear(w *workspace, kernel []Area) (calls []call, err error) {
	if len(kernel) != len(img.Kernel) {
		return nil, errors.New("the kernel maps other things into a process than it did")
	}
	// First aside: old and new places may overlap.
	aside := w.start + reserved/2
	for i, a := range kernel {
		to := img.Kernel[i]
		if a.Name != to.Name || a.End-a.Start != to.End-to.Start {
			return nil, fmt.Errorf("the kernel's %s is not as it was", a.Name)
		}
		calls = append(calls, move(a, aside+a.Start-kernel[0].Start))
	}
	for _, a := range []Area{{Start: 0, End: w.start}, {Start: w.start + reserved, End: 1<<47 - pageSize}} {
		calls = append(calls, call{what: "munmap", number: unix.SYS_MUNMAP, args: [6]uint64{a.Start, a.End - a.Start}})
	}
	for i, a := range kernel {
		from := aside + a.Start - kernel[0].Start
		calls = append(calls, move(Area{Start: from, End: from + a.End - a.Start}, img.Kernel[i].Start))
	}
	return calls, nil
}

func move(a Area, to uint64) call {
	n := a.End - a.Start
	return call{what: "mremap", number: unix.SYS_MREMAP, args: [6]uint64{a.Start, n, n, unix.MREMAP_MAYMOVE | unix.MREMAP_FIXED, to}}
}

// mapping is how memory is brought in.
type mapping struct {
	flags    int  // of mmap(2)
	readCode bool // code is read, into huge pages where the mapping asks for them
}

func (s Start) mapping() (m mapping, err error) {
	if s.Ready {
		return mapping{flags: unix.MAP_POPULATE, readCode: true}, nil
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(s.Memory.Fd()), &st); err != nil {
		return m, os.NewSyscallError("fstatfs", err)
	}
	// Such a file system would not let the process execute what is mapped from it.
	return mapping{readCode: st.Flags&unix.ST_NOEXEC != 0}, nil
}

// fill maps the image's memory. memory is the number of its descriptor.
func (img *Image) fill(w *workspace, memory int, how mapping) (calls []call) {
	mmap := func(what string, a Area, protection, flags, fd int, offset int64) {
		calls = append(calls, call{what: "map " + what, number: unix.SYS_MMAP, args: [6]uint64{
			a.Start, a.End - a.Start, uint64(protection), uint64(unix.MAP_PRIVATE | unix.MAP_FIXED | unix.MAP_NORESERVE | flags),
			uint64(int64(fd)), uint64(offset),
		}})
	}
	free := uint64(img.freeDescriptor(memory))
	for i, f := range img.Files {
		fd := f.Descriptor
		if fd < 0 {
			fd = int(free)
			calls = append(calls, call{
				what: "open " + f.Path, number: unix.SYS_OPENAT, want: &free,
				args: [6]uint64{0, w.add(append([]byte(f.Path), 0)), unix.O_RDONLY | unix.O_CLOEXEC},
			})
		}
		for _, m := range img.Maps {
			if m.File == i {
				mmap(f.Path, m.Area, m.Protection, 0, fd, m.Offset)
			}
		}
		if f.Descriptor < 0 {
			calls = append(calls, call{what: "close " + f.Path, number: unix.SYS_CLOSE, args: [6]uint64{free}})
		}
	}
	for _, m := range img.Maps {
		if m.File < 0 {
			mmap("nothing", m.Area, m.Protection, unix.MAP_ANONYMOUS, -1, 0)
		}
		if m.Huge {
			calls = append(calls, call{what: "madvise", number: unix.SYS_MADVISE, args: [6]uint64{m.Start, m.End - m.Start, unix.MADV_HUGEPAGE}, may: true})
		}
		for _, p := range m.Pieces {
			if m.read(p) || how.readCode && m.Protection&unix.PROT_EXEC != 0 {
				length := p.Length
				calls = append(calls, call{
					what: "read memory", number: unix.SYS_PREAD64, want: &length,
					args: [6]uint64{uint64(memory), p.Start, p.Length, uint64(p.Offset)},
				})
			} else {
				mmap("memory", Area{Start: p.Start, End: p.Start + p.Length}, m.Protection, how.flags, memory, p.Offset)
			}
		}
	}
	return append(calls, call{what: "close", number: unix.SYS_CLOSE, args: [6]uint64{uint64(memory)}})
}

// read says whether a piece of a mapping is to be read and not mapped: a small one, and the stack, since the kernel shows the
// command line, which is there, only from memory of no file.
func (m Map) read(p Piece) bool {
	return m.Protection&unix.PROT_WRITE != 0 && (p.Length <= smallPiece || m.Name == stackName)
}

// smallPiece is what is read faster than it is mapped and then, at the first write, copied.
const smallPiece = 4 * pageSize

// freeDescriptor is the number that the next file which the process opens gets.
func (img *Image) freeDescriptor(memory int) int {
	taken := map[int]bool{0: true, 1: true, 2: true, memory: true}
	for _, d := range img.Descriptors {
		taken[d.Number] = true
	}
	n := 0
	for taken[n] {
		n++
	}
	return n
}

// threadFlags are those with which the C library begins a thread.
const threadFlags = unix.CLONE_VM | unix.CLONE_FS | unix.CLONE_FILES | unix.CLONE_SIGHAND | unix.CLONE_THREAD | unix.CLONE_SYSVSEM |
	unix.CLONE_SETTLS | unix.CLONE_PARENT_SETTID | unix.CLONE_CHILD_CLEARTID

// settle tells the kernel of the process, and begins its other threads.
func (img *Image) settle(w *workspace, filter []unix.SockFilter) (calls []call) {
	// struct prctl_mm_map
	var mm []byte
	for _, a := range img.Layout.Addresses {
		mm = binary.LittleEndian.AppendUint64(mm, a)
	}
	mm = binary.LittleEndian.AppendUint64(mm, w.add(img.Layout.Auxiliary))
	mm = binary.LittleEndian.AppendUint32(mm, uint32(len(img.Layout.Auxiliary)))
	mm = binary.LittleEndian.AppendUint32(mm, ^uint32(0)) // the program stays
	calls = append(calls, call{what: "prctl(PR_SET_MM_MAP)", number: unix.SYS_PRCTL, args: [6]uint64{unix.PR_SET_MM, unix.PR_SET_MM_MAP, w.add(mm), uint64(len(mm))}})
	for i, a := range img.Actions {
		s := unix.Signal(i + 1)
		if s == unix.SIGKILL || s == unix.SIGSTOP {
			continue
		}
		var b []byte
		for _, n := range a {
			b = binary.LittleEndian.AppendUint64(b, n)
		}
		calls = append(calls, call{what: "rt_sigaction", number: unix.SYS_RT_SIGACTION, args: [6]uint64{uint64(s), w.add(b), 0, 8}})
	}
	for _, d := range img.Descriptors { // whoever opened them may have had other wishes
		calls = append(calls, call{what: "fcntl", number: unix.SYS_FCNTL, args: [6]uint64{uint64(d.Number), unix.F_SETFL, uint64(d.Flags & unix.O_NONBLOCK)}})
	}
	calls = append(calls, call{what: "set_tid_address", number: unix.SYS_SET_TID_ADDRESS, args: [6]uint64{img.Threads[0].ID}})
	if len(filter) > 0 {
		var program []byte
		for _, f := range filter {
			program = binary.LittleEndian.AppendUint16(program, f.Code)
			program = append(program, f.Jt, f.Jf)
			program = binary.LittleEndian.AppendUint32(program, f.K)
		}
		head := binary.LittleEndian.AppendUint64(nil, uint64(len(filter)))
		head = binary.LittleEndian.AppendUint64(head, w.add(program))
		calls = append(calls,
			call{what: "prctl(PR_SET_NO_NEW_PRIVS)", number: unix.SYS_PRCTL, args: [6]uint64{unix.PR_SET_NO_NEW_PRIVS, 1}},
			call{what: "seccomp", number: unix.SYS_SECCOMP, args: [6]uint64{unix.SECCOMP_SET_MODE_FILTER, 0, w.add(head)}})
	}
	for _, t := range img.Threads[1:] {
		calls = append(calls, call{what: "clone", number: unix.SYS_CLONE, args: [6]uint64{threadFlags, 0, t.ID, t.ID, t.Registers.Fs_base}})
	}
	return calls
}

// calls tells the kernel of one thread.
func (t Thread) calls(w *workspace) (calls []call) {
	calls = append(calls, call{what: "prctl(PR_SET_NAME)", number: unix.SYS_PRCTL, args: [6]uint64{unix.PR_SET_NAME, w.add(append([]byte(t.Name), 0))}})
	if t.Robust[0] != 0 {
		calls = append(calls, call{what: "set_robust_list", number: unix.SYS_SET_ROBUST_LIST, args: [6]uint64{t.Robust[0], t.Robust[1]}})
	}
	if s := t.Sequences; s != nil {
		calls = append(calls, call{what: "rseq", number: unix.SYS_RSEQ, args: [6]uint64{s[0], s[1], s[3], s[2]}})
	}
	return calls
}
