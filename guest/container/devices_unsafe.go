package container

import (
	"encoding/binary"
	"os"
	"runtime"
	"unsafe" // bpf(2) takes a structure with addresses

	"golang.org/x/sys/unix"
)

func closeFD(fd int) { unix.Close(fd) }

// attachDeviceProgram loads a program and attaches it to a cgroup, which keeps it as long as it lives.
func attachDeviceProgram(cgroup int, prog []byte) error {
	const license = "GPL\x00" // its bytes are in the program's text and do not move, which a slice of them might
	// union bpf_attr for BPF_PROG_LOAD: type, number of instructions, their address, the licence's.
	load := make([]byte, 128)
	binary.NativeEndian.PutUint32(load[0:], unix.BPF_PROG_TYPE_CGROUP_DEVICE)
	binary.NativeEndian.PutUint32(load[4:], uint32(len(prog)/8))
	binary.NativeEndian.PutUint64(load[8:], uint64(address(prog)))
	binary.NativeEndian.PutUint64(load[16:], uint64(uintptr(unsafe.Pointer(unsafe.StringData(license)))))
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_LOAD, uintptr(unsafe.Pointer(&load[0])), uintptr(len(load)))
	runtime.KeepAlive(prog)
	if errno != 0 {
		return os.NewSyscallError("BPF_PROG_LOAD", errno)
	}
	defer unix.Close(int(fd))
	// … for BPF_PROG_ATTACH: target, program, type, flags. Others may attach theirs below it, which can only refuse more.
	attach := make([]byte, 128)
	binary.NativeEndian.PutUint32(attach[0:], uint32(cgroup))
	binary.NativeEndian.PutUint32(attach[4:], uint32(fd))
	binary.NativeEndian.PutUint32(attach[8:], unix.BPF_CGROUP_DEVICE)
	binary.NativeEndian.PutUint32(attach[12:], unix.BPF_F_ALLOW_MULTI)
	_, _, errno = unix.Syscall(unix.SYS_BPF, unix.BPF_PROG_ATTACH, uintptr(unsafe.Pointer(&attach[0])), uintptr(len(attach)))
	if errno != 0 {
		return os.NewSyscallError("BPF_PROG_ATTACH", errno)
	}
	return nil
}
