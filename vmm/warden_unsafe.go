package vmm

import (
	"runtime"
	"unsafe" // seccomp(2) and its ioctls take addresses of structures that x/sys/unix has no functions for

	"golang.org/x/sys/unix"
)

// notification is struct seccomp_notif of linux/seccomp.h.
type notification struct {
	id    uint64
	pid   uint32 // of the thread
	flags uint32
	nr    int32
	arch  uint32
	ip    uint64
	args  [6]uint64
}

// response is struct seccomp_notif_resp.
type response struct {
	id    uint64
	value int64
	error int32
	flags uint32
}

// addFD is struct seccomp_notif_addfd.
type addFD struct {
	id         uint64
	flags      uint32
	source     uint32
	target     uint32
	targetFlag uint32
}

// installFilter puts the calling thread under a filter and returns the descriptor that hears of what it asks about.
func installFilter(filter []unix.SockFilter) (int, error) {
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	fd, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_NEW_LISTENER, uintptr(unsafe.Pointer(&program)))
	runtime.KeepAlive(filter)
	if errno != 0 {
		return 0, errno
	}
	return int(fd), nil
}

// receive takes the next notification; there must be one.
func receive(listener uintptr) (*notification, error) {
	var q notification // the kernel demands zeros
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, listener, unix.SECCOMP_IOCTL_NOTIF_RECV, uintptr(unsafe.Pointer(&q))); errno != 0 {
		return nil, errno
	}
	return &q, nil
}

// respond answers. A thread that was killed meanwhile needs no answer.
func respond(listener uintptr, r response) {
	unix.Syscall(unix.SYS_IOCTL, listener, unix.SECCOMP_IOCTL_NOTIF_SEND, uintptr(unsafe.Pointer(&r)))
}

// giveFile answers with a new descriptor of a file of ours.
func giveFile(listener uintptr, id uint64, fd int) error {
	const send = 2 // SECCOMP_ADDFD_FLAG_SEND, Linux 5.14
	a := addFD{id: id, flags: send, source: uint32(fd), targetFlag: unix.O_CLOEXEC}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, listener, unix.SECCOMP_IOCTL_NOTIF_ADDFD, uintptr(unsafe.Pointer(&a))); errno != 0 {
		return errno
	}
	return nil
}
