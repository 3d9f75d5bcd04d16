package checkpoint

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Freeze writes the memory of a process to a new file, and returns the rest. It kills the process, a child of the caller,
// whose threads should all wait for something at this time; the caller waits for its end, by other means than wait(2) until
// then, which would take what Freeze is told. role says what a descriptor is for the caller, "" when it does not know; one
// that Thaw cannot make by itself and that has no role is an error.
func Freeze(pid int, memory *os.File, role func(Descriptor) string) (img *Image, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("freeze process %d: %w", pid, err)
		}
	}()
	// The kernel takes requests only from the thread that traces.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer kill(pid)
	tids, err := settle(pid, patience)
	if err != nil {
		return nil, err
	}
	img = &Image{}
	if img.Host, err = Host(); err != nil {
		return nil, err
	}
	if img.Program, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil {
		return nil, err
	}
	if err := img.readDescriptors(pid, role); err != nil {
		return nil, err
	}
	if err := img.readMaps(pid); err != nil {
		return nil, err
	}
	if err := img.readLayout(pid); err != nil {
		return nil, err
	}
	if err := img.findWorkspace(); err != nil {
		return nil, err
	}
	for _, tid := range tids {
		t, err := readThread(pid, tid)
		if err != nil {
			return nil, err
		}
		img.Threads = append(img.Threads, t)
	}
	if err := img.copyMemory(pid, memory); err != nil {
		return nil, err
	}
	// What only the process itself can be told. Its memory has been read, and is written over.
	return img, img.ask(pid, tids)
}

// Freeze waits so long for all threads to wait for something, and looks so often.
const (
	patience = 5 * time.Second
	look     = 2 * time.Millisecond
)

// settle stops all threads of a process at a moment when each of them waits for something. What a thread that runs has in its
// hands is often marked with its number, as a lock is.
func settle(pid int, patience time.Duration) ([]int, error) {
	for deadline := time.Now().Add(patience); ; time.Sleep(look) {
		tids, err := seize(pid)
		if err != nil {
			return nil, err
		}
		busy := 0
		for _, tid := range tids {
			var regs unix.PtraceRegs
			if err := unix.PtraceGetRegs(tid, &regs); err != nil {
				return nil, os.NewSyscallError("ptrace", err)
			}
			if !waits(&regs) {
				busy = tid
				break
			}
		}
		switch {
		case busy == 0:
			return tids, nil
		case time.Now().After(deadline):
			return nil, fmt.Errorf("thread %d does not come to rest within %v", busy, patience)
		}
		for _, tid := range tids {
			if err := unix.PtraceDetach(tid); err != nil {
				return nil, os.NewSyscallError("ptrace", err)
			}
		}
	}
}

// waits says whether a thread was interrupted while it waited for an event: not for a lock, which somebody else holds.
func waits(r *unix.PtraceRegs) bool {
	if !interrupted(r) {
		return false
	}
	const private = 128 // FUTEX_PRIVATE_FLAG; with FUTEX_WAIT, 0, it is how the C library waits for a lock
	return r.Orig_rax != unix.SYS_FUTEX || r.Rsi != private
}

// seize stops all threads of a process; the first is the main one.
func seize(pid int) (tids []int, err error) {
	for {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
		if err != nil {
			return tids, err
		}
		more := false
		for _, e := range entries {
			tid, err := strconv.Atoi(e.Name())
			if err != nil || slices.Contains(tids, tid) {
				continue
			}
			more = true
			if err := unix.PtraceSeize(tid); errors.Is(err, unix.ESRCH) {
				continue // it ended meanwhile
			} else if err != nil {
				return tids, os.NewSyscallError("ptrace", err)
			}
			tids = append(tids, tid)
			if err := unix.PtraceInterrupt(tid); err != nil {
				return tids, os.NewSyscallError("ptrace", err)
			}
			if _, err := await(tid); err != nil {
				return tids, err
			}
		}
		if !more {
			slices.SortFunc(tids, func(a, b int) int {
				if a == pid || b == pid {
					return map[bool]int{true: -1, false: 1}[a == pid]
				}
				return a - b
			})
			return tids, nil
		}
	}
}

// readThread reads what a stopped thread is doing.
func readThread(pid, tid int) (t Thread, err error) {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/comm", pid, tid))
	if err != nil {
		return t, err
	}
	t.Name = strings.TrimSuffix(string(name), "\n")
	if err := unix.PtraceGetRegs(tid, &t.Registers); err != nil {
		return t, os.NewSyscallError("ptrace", err)
	}
	repeat(&t.Registers)
	if t.Extended, err = extended(tid); err != nil {
		return t, err
	}
	if t.Mask, err = signalMask(tid); err != nil {
		return t, err
	}
	if t.Robust, err = robustList(tid); err != nil {
		return t, err
	}
	t.Sequences, err = sequences(tid)
	return t, err
}

// repeat lets a thread that was interrupted in a system call begin it again, as the kernel would (signal(7)): it has left the
// number of the call and one of its own error numbers, from 512 on, in the registers.
func repeat(r *unix.PtraceRegs) {
	if interrupted(r) {
		r.Rax = r.Orig_rax
		r.Rip -= 2 // the length of the instruction
	}
	r.Orig_rax = ^uint64(0)
}

// interrupted says whether a thread was stopped in a system call that it is to begin again.
func interrupted(r *unix.PtraceRegs) bool {
	if int64(r.Orig_rax) < 0 {
		return false
	}
	switch -int64(r.Rax) {
	case 512, 513, 514, 516: // ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK
		return true
	}
	return false
}

// readDescriptors reads what the process has open.
func (img *Image) readDescriptors(pid int, role func(Descriptor) string) error {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		d := Descriptor{}
		if d.Number, err = strconv.Atoi(e.Name()); err != nil {
			return err
		}
		path := filepath.Join(dir, e.Name())
		if d.Link, err = os.Readlink(path); err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return &os.PathError{Op: "stat", Path: path, Err: err}
		}
		d.Inode, d.Device, d.Type = st.Ino, st.Dev, st.Mode&unix.S_IFMT
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, d.Number))
		if err != nil {
			return err
		}
		flags, err := infoNumber(info, "flags:", 8)
		if err != nil {
			return err
		}
		d.Flags = int(flags)
		switch {
		case d.Link == "anon_inode:[eventfd]":
			d.Kind = KindEvent
			d.Value, err = infoNumber(info, "eventfd-count:", 16)
		case d.Link == "anon_inode:[signalfd]":
			d.Kind = KindSignal
			d.Value, err = infoNumber(info, "sigmask:", 16)
		case d.Type == unix.S_IFCHR && unix.Major(st.Rdev) == 1 && unix.Minor(st.Rdev) == 3:
			d.Kind = KindNull
		case d.Type == unix.S_IFCHR && unix.Major(st.Rdev) == 1 && unix.Minor(st.Rdev) == 9:
			d.Kind = KindRandom
		default:
			if d.Role = role(d); d.Role == "" {
				err = fmt.Errorf("descriptor %d is %s, which cannot be made again", d.Number, d.Link)
			}
		}
		if err != nil {
			return err
		}
		img.Descriptors = append(img.Descriptors, d)
	}
	slices.SortFunc(img.Descriptors, func(a, b Descriptor) int { return a.Number - b.Number })
	return nil
}

// infoNumber is a line of /proc/PID/fdinfo.
func infoNumber(info []byte, name string, base int) (uint64, error) {
	for line := range strings.Lines(string(info)) {
		if value, ok := strings.CutPrefix(line, name); ok {
			return strconv.ParseUint(strings.TrimSpace(value), base, 64)
		}
	}
	return 0, fmt.Errorf("fdinfo has no %s", name)
}

// readMaps reads what is mapped.
func (img *Image) readMaps(pid int) error {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return err
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	before := 0 // mappings before the one that is described
	for s.Scan() {
		line := s.Text()
		if flags, ok := strings.CutPrefix(line, "VmFlags:"); ok {
			if len(img.Maps) == before {
				continue // the kernel's
			}
			if err := img.Maps[before].readFlags(strings.Fields(flags)); err != nil {
				return err
			}
			continue
		}
		// "start-end perms offset device inode  path"; the others are "Name:  number kB"
		fields := strings.SplitN(line, " ", 6)
		if len(fields) < 6 || strings.HasSuffix(fields[0], ":") {
			continue
		}
		before = len(img.Maps)
		if err := img.readMap(fields); err != nil {
			return fmt.Errorf("parse %q: %w", line, err)
		}
	}
	return s.Err()
}

// readFlags reads the kernel's flags of a mapping.
func (m *Map) readFlags(flags []string) error {
	m.Huge = slices.Contains(flags, "hg")
	for _, f := range []string{"lo", "io", "ht", "sf", "wf"} { // locked, of a device, huge pages of a pool, synchronous, wiped on fork
		if slices.Contains(flags, f) {
			return fmt.Errorf("memory at %#x has the flag %s", m.Start, f)
		}
	}
	return nil
}

func (img *Image) readMap(fields []string) error {
	from, to, _ := strings.Cut(fields[0], "-")
	m := Map{File: -1}
	var err error
	if m.Start, err = strconv.ParseUint(from, 16, 64); err != nil {
		return err
	}
	if m.End, err = strconv.ParseUint(to, 16, 64); err != nil {
		return err
	}
	name := strings.TrimSpace(fields[5])
	if m.Start >= 1<<47 { // [vsyscall] is the same everywhere
		return nil
	}
	if strings.HasPrefix(name, "[v") {
		m.Name = name
		img.Kernel = append(img.Kernel, m.Area)
		return nil
	}
	perms := fields[1]
	// What is shared and only read is as good as private.
	if len(perms) != 4 || perms[3] != 'p' && (perms[1] != '-' || name == "") {
		return errors.New("it is shared")
	}
	for i, p := range []int{unix.PROT_READ, unix.PROT_WRITE, unix.PROT_EXEC} {
		if perms[i] != '-' {
			m.Protection |= p
		}
	}
	if strings.HasPrefix(name, "/") {
		if m.Offset, err = strconv.ParseInt(fields[2], 16, 64); err != nil {
			return err
		}
		inode, err := strconv.ParseUint(fields[4], 10, 64)
		if err != nil {
			return err
		}
		if m.File, err = img.file(name, inode); err != nil {
			return err
		}
	}
	if name == stackName {
		m.Name = name
		// It would grow when needed, and does not any more.
		m.Start = m.End - max(m.End-m.Start, stackSize)
	}
	if n := len(img.Maps); n > 0 && img.Maps[n-1].End > m.Start {
		return errors.New("no room for the stack")
	}
	img.Maps = append(img.Maps, m)
	return nil
}

const stackName = "[stack]" // of the main thread

// stackSize is what the main thread's stack has at most, as setrlimit(2) usually has it.
const stackSize = 8 << 20

// file is the index of a mapped file.
func (img *Image) file(path string, inode uint64) (int, error) {
	for i, f := range img.Files {
		if f.Path == path {
			return i, nil
		}
	}
	f := File{Path: path, Descriptor: -1, Inode: inode}
	for _, d := range img.Descriptors {
		if d.Role != "" && d.Type == unix.S_IFREG && d.Inode == inode && d.Link == path {
			f.Descriptor = d.Number
			f.Device = d.Device
			break
		}
	}
	if f.Descriptor < 0 {
		now, err := describeFile(path)
		if err != nil {
			return 0, err
		}
		if now.Inode != inode {
			return 0, fmt.Errorf("%s was replaced", path)
		}
		f = now
	}
	img.Files = append(img.Files, f)
	return len(img.Files) - 1, nil
}

// readLayout reads the addresses in /proc/PID/stat: see proc(5).
func (img *Image) readLayout(pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return err
	}
	_, rest, _ := strings.Cut(string(b[bytes.LastIndexByte(b, ')'):]), " ")
	fields := strings.Fields(rest) // from the third on
	if len(fields) < 50 {
		return fmt.Errorf("parse stat: %q", b)
	}
	// start and end of code and data, start of the heap, its end (asked for later), start of the stack, arguments, environment
	for i, n := range []int{26, 27, 45, 46, 47, 47, 28, 48, 49, 50, 51} {
		if img.Layout.Addresses[i], err = strconv.ParseUint(fields[n-3], 10, 64); err != nil {
			return err
		}
	}
	img.Layout.Auxiliary, err = os.ReadFile(fmt.Sprintf("/proc/%d/auxv", pid))
	return err
}

// heapEnd is the index in Layout of the heap's end.
const heapEnd = 5

// findWorkspace finds addresses that nobody uses: far below where the kernel maps anything by itself.
func (img *Image) findWorkspace() error {
	areas := slices.Clone(img.Kernel)
	for _, m := range img.Maps {
		areas = append(areas, m.Area)
	}
	for start := uint64(4 << 30); start < 1<<40; start += 4 << 30 {
		if !slices.ContainsFunc(areas, func(a Area) bool { return a.Start < start+reserved && start < a.End }) {
			img.Workspace = start
			return nil
		}
	}
	return errors.New("no room for a workspace")
}

// reserved is how much is free from Workspace on: the workspace itself, and a place for what the kernel maps.
const reserved = 64 << 20

// Bits of /proc/PID/pagemap.
const (
	pagePresent = 1 << 63
	pageSwapped = 1 << 62
	pageOfFile  = 1 << 61
)

// merge is how many pages may lie between two that are written together.
const merge = 16

// copyMemory writes the process's own memory to a file.
func (img *Image) copyMemory(pid int, memory *os.File) error {
	pages, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", pid))
	if err != nil {
		return err
	}
	defer pages.Close()
	out := bufio.NewWriterSize(memory, 1<<20)
	at := int64(0)
	for i := range img.Maps {
		m := &img.Maps[i]
		if m.Protection == 0 {
			continue
		}
		runs, err := m.own(pages)
		if err != nil {
			return err
		}
		buf := make([]byte, 1<<20)
		for _, r := range runs {
			m.Pieces = append(m.Pieces, Piece{Start: r.Start, Length: r.End - r.Start, Offset: at})
			for from := r.Start; from < r.End; {
				b := buf[:min(uint64(len(buf)), r.End-from)]
				if err := peek(pid, from, b); err != nil {
					return err
				}
				if _, err := out.Write(b); err != nil {
					return err
				}
				from += uint64(len(b))
				at += int64(len(b))
			}
		}
	}
	return out.Flush()
}

// own lists the pages of a mapping that the process has written to, those that lie close to each other together.
func (m Map) own(pages io.ReaderAt) (runs []Area, err error) {
	b := make([]byte, 8<<10)
	for from := m.Start; from < m.End; {
		n := min(uint64(len(b)/8), (m.End-from)/pageSize)
		if _, err := pages.ReadAt(b[:8*n], int64(from/pageSize*8)); err != nil {
			return nil, fmt.Errorf("read pagemap: %w", err)
		}
		for i := range n {
			p := binary.LittleEndian.Uint64(b[8*i:])
			if p&(pagePresent|pageSwapped) == 0 || p&pageOfFile != 0 {
				continue
			}
			start := from + i*pageSize
			if k := len(runs) - 1; k >= 0 && start-runs[k].End <= merge*pageSize {
				runs[k].End = start + pageSize
			} else {
				runs = append(runs, Area{Start: start, End: start + pageSize})
			}
		}
		from += n * pageSize
	}
	return runs, nil
}

// signals is how many there are.
const signals = 64

// ask has the process tell what the kernel tells nobody else: what signals do, where threads have their numbers, and the
// end of the heap.
func (img *Image) ask(pid int, tids []int) error {
	w, err := place(pid, img.Workspace)
	if err != nil {
		return err
	}
	var calls []call
	for s := 1; s <= signals; s++ {
		calls = append(calls, call{what: "rt_sigaction", number: unix.SYS_RT_SIGACTION, args: [6]uint64{uint64(s), 0, w.add(make([]byte, 32)), 8}})
	}
	calls = append(calls, call{what: "brk", number: unix.SYS_BRK})
	if _, err := w.run(pid, calls); err != nil {
		return err
	}
	img.Layout.Addresses[heapEnd] = uint64(calls[signals].result)
	for _, c := range calls[:signals] {
		var b [32]byte
		if err := peek(pid, c.args[2], b[:]); err != nil {
			return err
		}
		var a Action
		for i := range a {
			a[i] = binary.LittleEndian.Uint64(b[8*i:])
		}
		img.Actions = append(img.Actions, a)
	}
	for i, tid := range tids {
		w.data = nil
		at := w.add(make([]byte, 8))
		stack := w.add(make([]byte, 24))
		if _, err := w.run(tid, []call{
			{what: "prctl", number: unix.SYS_PRCTL, args: [6]uint64{unix.PR_GET_TID_ADDRESS, at}},
			{what: "sigaltstack", number: unix.SYS_SIGALTSTACK, args: [6]uint64{0, stack}},
		}); err != nil {
			return err
		}
		var b [8]byte
		if err := peek(pid, at, b[:]); err != nil {
			return err
		}
		img.Threads[i].ID = binary.LittleEndian.Uint64(b[:])
		if err := peek(pid, img.Threads[i].ID, b[:4]); err != nil {
			return fmt.Errorf("thread %d's number: %w", tid, err)
		}
		if got := binary.LittleEndian.Uint32(b[:]); int(got) != tid {
			return fmt.Errorf("thread %d's number is %d in its memory", tid, got)
		}
		var alt [24]byte
		if err := peek(pid, stack, alt[:]); err != nil {
			return err
		}
		if binary.LittleEndian.Uint32(alt[8:])&2 == 0 { // SS_DISABLE
			return fmt.Errorf("thread %d has a stack for signals", tid)
		}
	}
	return nil
}
