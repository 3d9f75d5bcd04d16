package early

import (
	"encoding/binary"
	"unsafe" // clock_settime and an ioctl take addresses that x/sys/unix has no function for

	"golang.org/x/sys/unix"
)

func clockSettime(ts *unix.Timespec) error {
	if _, _, errno := unix.Syscall(unix.SYS_CLOCK_SETTIME, unix.CLOCK_REALTIME, uintptr(unsafe.Pointer(ts)), 0); errno != 0 {
		return errno
	}
	return nil
}

// addEntropy is RNDADDENTROPY with a struct rand_pool_info (linux/random.h): bits, bytes, data.
func addEntropy(fd int, b []byte) error {
	const rndAddEntropy = 0x40085203 // _IOW('R', 3, int[2])
	info := make([]byte, 8+len(b))
	binary.NativeEndian.PutUint32(info[0:], uint32(8*len(b)))
	binary.NativeEndian.PutUint32(info[4:], uint32(len(b)))
	copy(info[8:], b)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndAddEntropy, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return errno
	}
	// Take it up now: what reads next must not see the state from before.
	const rndReseedCRNG = 0x5207 // _IO('R', 7)
	unix.Syscall(unix.SYS_IOCTL, uintptr(fd), rndReseedCRNG, 0)
	return nil
}
