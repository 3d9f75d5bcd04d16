package main

import (
	"os"
	"unsafe" // BLKDISCARD takes the address of a range

	"golang.org/x/sys/unix"
)

func blockDiscard(f *os.File, size uint64) error {
	const request = 0x1277 // BLKDISCARD of linux/fs.h
	area := [2]uint64{0, size}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(&area))); errno != 0 {
		return os.NewSyscallError("ioctl BLKDISCARD", errno)
	}
	return nil
}
