package vmm

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// warden answers two system calls of a restored machine's QEMU, which would otherwise harm the snapshot that it shares
// with others:
//
//   - QEMU opens the memory for reading and writing, although it maps a private copy. It gets a descriptor that can only
//     be read, whoever it runs as.
//   - What a guest frees QEMU cuts out of the file, in every version, although the mapping is private. It is told that this
//     is done; it goes on to drop its private pages, which is what gives the host its memory back.
//
// The kernel stops the calling thread until the answer (seccomp_unotify(2)). Nothing else rests on these answers: what the
// warden lets pass, the kernel decides with QEMU's own rights.
type warden struct {
	path   string   // by which QEMU opens the memory
	memory *os.File // read only
	device uint64
	inode  uint64

	mu       sync.Mutex
	listener *os.File // nil: not yet, or closed
	closed   bool
	ended    sync.WaitGroup
}

// newWarden guards a file that QEMU inherits.
func newWarden(memory *os.File, inherited []*os.File) (*warden, error) {
	return guardMemory("/proc/self/fd/"+strconv.Itoa(firstFile+slices.Index(inherited, memory)), memory)
}

// guardMemory guards a file that QEMU opens by a path.
func guardMemory(path string, memory *os.File) (*warden, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(memory.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: memory.Name(), Err: err}
	}
	// Our own descriptor: that of the caller is QEMU's, and closed when it has started.
	fd, err := unix.FcntlInt(memory.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	return &warden{
		path:   path,
		memory: os.NewFile(uintptr(fd), memory.Name()), device: st.Dev, inode: st.Ino,
	}, nil
}

// adoptWarden goes on with what another process's warden did; file is the memory, listener what it listened to.
func adoptWarden(path string, memory, listener *os.File) (*warden, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(memory.Fd()), &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: memory.Name(), Err: err}
	}
	if err := unix.SetNonblock(int(listener.Fd()), true); err != nil {
		return nil, os.NewSyscallError("fcntl", err)
	}
	w := &warden{path: path, memory: memory, device: st.Dev, inode: st.Ino, listener: listener}
	w.ended.Go(w.serve)
	return w, nil
}

// punch is fallocate's mode for giving blocks back.
const punch = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE

// wardenFilter asks the warden about openat for reading and writing, and about holes.
var wardenFilter = []unix.SockFilter{
	load(4), // arch
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.AUDIT_ARCH_X86_64, Jf: 8},
	load(0), // nr
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_OPENAT, Jf: 3},
	load(16 + 2*8), // flags
	{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: unix.O_ACCMODE},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.O_RDWR, Jt: 4, Jf: 3},
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: unix.SYS_FALLOCATE, Jf: 2},
	load(16 + 1*8), // mode
	{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: punch, Jt: 1},
	{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW},
	{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_USER_NOTIF},
}

// load reads 32 bits of struct seccomp_data.
func load(offset uint32) unix.SockFilter {
	return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: offset}
}

// enter puts the calling thread, and what it starts from now on, under the warden. The thread must be locked and must not
// be used for anything else afterwards. Of a nil warden it does nothing.
func (w *warden) enter() error {
	if w == nil {
		return nil
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	fd, err := installFilter(wardenFilter)
	if err != nil {
		return fmt.Errorf("watch QEMU's system calls: %w (restoring a machine needs Linux 5.14 and the right to use seccomp)", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return os.NewSyscallError("fcntl", err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.listener = os.NewFile(uintptr(fd), "seccomp")
	if w.closed {
		_ = w.listener.Close()
		return os.ErrClosed
	}
	w.ended.Go(w.serve)
	return nil
}

// close ends the warden; calls that wait fail from then on. Of a nil warden it does nothing.
func (w *warden) close() {
	if w == nil {
		return
	}
	w.mu.Lock()
	if !w.closed {
		w.closed = true
		if w.listener != nil {
			_ = w.listener.Close()
		}
	}
	w.mu.Unlock()
	w.ended.Wait()
	_ = w.memory.Close()
}

// serve answers until nobody is left who could ask.
func (w *warden) serve() {
	raw, err := w.listener.SyscallConn()
	if err != nil {
		return
	}
	for over := false; !over; {
		err := raw.Read(func(fd uintptr) bool {
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			n, err := unix.Poll(p, 0)
			switch {
			case err != nil || n == 0:
				return false // wait
			case p[0].Revents&unix.POLLIN == 0:
				over = true
				return true
			}
			if q, err := receive(fd); err == nil { // else it was killed meanwhile
				w.answer(fd, q)
			}
			return true
		})
		over = over || err != nil
	}
}

// answer decides about one call.
func (w *warden) answer(listener uintptr, q *notification) {
	switch q.nr {
	case unix.SYS_OPENAT:
		// Of what cannot be read the kernel decides.
		if readString(int(q.pid), uintptr(q.args[1]), len(w.path)+1) == w.path+"\x00" {
			if err := giveFile(listener, q.id, int(w.memory.Fd())); err == nil {
				return
			}
		}
	case unix.SYS_FALLOCATE:
		var st unix.Stat_t
		err := unix.Stat(fmt.Sprintf("/proc/%d/fd/%d", q.pid, int32(q.args[0])), &st)
		if err == nil && st.Dev == w.device && st.Ino == w.inode {
			respond(listener, response{id: q.id})
			return
		}
	}
	respond(listener, response{id: q.id, flags: unix.SECCOMP_USER_NOTIF_FLAG_CONTINUE})
}

// readString reads n bytes of another process; "" when it cannot.
func readString(pid int, address uintptr, n int) string {
	b := make([]byte, n)
	local := []unix.Iovec{{Base: &b[0], Len: uint64(n)}}
	got, err := unix.ProcessVMReadv(pid, local, []unix.RemoteIovec{{Base: address, Len: n}}, 0)
	if err != nil || got != n {
		return ""
	}
	return string(b)
}
