package checkpoint

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Requests of ptrace(2) that take memory of ours.
const (
	getRegisterSet      = 0x4204
	setRegisterSet      = 0x4205
	getSignalMask       = 0x420a
	setSignalMask       = 0x420b
	getRseqConfig       = 0x420f
	extendedRegisterSet = 0x202 // NT_X86_XSTATE
)

func ptrace(request, tid int, address uintptr, data unsafe.Pointer) (uintptr, error) {
	n, _, errno := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), address, uintptr(data), 0, 0)
	runtime.KeepAlive(data)
	if errno != 0 {
		return 0, os.NewSyscallError("ptrace", errno)
	}
	return n, nil
}

// extended reads a thread's registers beside the general ones.
func extended(tid int) ([]byte, error) {
	b := make([]byte, 16<<10)
	v := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	if _, err := ptrace(getRegisterSet, tid, extendedRegisterSet, unsafe.Pointer(&v)); err != nil {
		return nil, err
	}
	return b[:v.Len], nil
}

func setExtended(tid int, b []byte) error {
	v := unix.Iovec{Base: &b[0], Len: uint64(len(b))}
	_, err := ptrace(setRegisterSet, tid, extendedRegisterSet, unsafe.Pointer(&v))
	return err
}

func signalMask(tid int) (uint64, error) {
	var m uint64
	_, err := ptrace(getSignalMask, tid, unsafe.Sizeof(m), unsafe.Pointer(&m))
	return m, err
}

func setMask(tid int, m uint64) error {
	_, err := ptrace(setSignalMask, tid, unsafe.Sizeof(m), unsafe.Pointer(&m))
	return err
}

// sequences is a thread's registration of restartable sequences, nil when it has none.
func sequences(tid int) (*[4]uint64, error) {
	var c struct {
		address                         uint64
		size, signature, flags, reserve uint32
	}
	if _, err := ptrace(getRseqConfig, tid, unsafe.Sizeof(c), unsafe.Pointer(&c)); err != nil {
		return nil, err
	}
	if c.address == 0 {
		return nil, nil
	}
	return &[4]uint64{c.address, uint64(c.size), uint64(c.signature), uint64(c.flags)}, nil
}

// robustList is a thread's list of locks to let go of when it dies.
func robustList(tid int) (out [2]uint64, err error) {
	_, _, errno := unix.Syscall(unix.SYS_GET_ROBUST_LIST, uintptr(tid), uintptr(unsafe.Pointer(&out[0])), uintptr(unsafe.Pointer(&out[1])))
	if errno != 0 {
		return out, os.NewSyscallError("get_robust_list", errno)
	}
	return out, nil
}
