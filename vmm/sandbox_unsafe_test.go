package vmm

import (
	"errors"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// newestFilter is the seccomp filter that a process that is being traced has put on last.
func newestFilter(pid int) ([]unix.SockFilter, error) {
	const getFilter = 0x420c // PTRACE_SECCOMP_GET_FILTER
	n, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, getFilter, uintptr(pid), 0, 0, 0, 0)
	if errno != 0 {
		return nil, errno
	}
	if n == 0 {
		return nil, errors.New("an empty filter")
	}
	f := make([]unix.SockFilter, n)
	_, _, errno = unix.RawSyscall6(unix.SYS_PTRACE, getFilter, uintptr(pid), 0, uintptr(unsafe.Pointer(&f[0])), 0, 0)
	runtime.KeepAlive(f)
	if errno != 0 {
		return nil, errno
	}
	return f, nil
}
