package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"unsafe" // for the addresses that ioctl(2) and io_uring_setup(2) take

	"golang.org/x/sys/unix"
)

// dmVersions lists the device-mapper targets (DM_LIST_VERSIONS of include/uapi/linux/dm-ioctl.h).
func dmVersions() ([]string, error) {
	const headerSize, size = 312, 16 << 10
	f, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b := make([]byte, size)
	le := binary.LittleEndian
	le.PutUint32(b[0:], 4) // version 4.0.0
	le.PutUint32(b[12:], size)
	le.PutUint32(b[16:], headerSize)
	const listVersions = 3<<30 | headerSize<<16 | 0xfd<<8 | 13
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), listVersions, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
		return nil, fmt.Errorf("DM_LIST_VERSIONS: %w", errno)
	}
	var out []string
	for at := headerSize; at+16 < size; {
		name, _, _ := strings.Cut(string(b[at+16:min(at+80, size)]), "\x00")
		out = append(out, name)
		next := int(le.Uint32(b[at:]))
		if next <= 0 {
			break
		}
		at += next
	}
	return out, nil
}

func ioUringSetup(entries uint32, params []byte) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(entries), uintptr(unsafe.Pointer(&params[0])), 0)
	if errno != 0 {
		return 0, fmt.Errorf("io_uring_setup: %w", errno)
	}
	return int(fd), nil
}
