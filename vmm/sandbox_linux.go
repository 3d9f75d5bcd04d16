package vmm

import (
	"golang.org/x/sys/unix"
)

// sandboxFilter is for a machine that was thawed what -sandbox is for one that QEMU started (see sandbox): its system call
// filter is not a part of the process's memory.
var sandboxFilter = denying(
	[]uint32{
		// QEMU's own list of what nothing in it calls
		unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_SYSLOG, unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_KEXEC_LOAD,
		unix.SYS_AFS_SYSCALL, unix.SYS_GETPMSG, unix.SYS_PUTPMSG, unix.SYS_SECURITY, unix.SYS_TUXCALL, unix.SYS_VSERVER,
		// obsolete
		unix.SYS__SYSCTL, unix.SYS_CREATE_MODULE, unix.SYS_GET_KERNEL_SYMS, unix.SYS_QUERY_MODULE, unix.SYS_SYSFS, unix.SYS_USELIB,
		unix.SYS_USTAT,
		// elevateprivileges
		unix.SYS_SETUID, unix.SYS_SETGID, unix.SYS_SETPGID, unix.SYS_SETSID, unix.SYS_SETREUID, unix.SYS_SETREGID, unix.SYS_SETRESUID,
		unix.SYS_SETRESGID, unix.SYS_SETFSUID, unix.SYS_SETFSGID,
		// spawn
		unix.SYS_FORK, unix.SYS_VFORK, unix.SYS_EXECVE, unix.SYS_EXECVEAT, unix.SYS_UNSHARE, unix.SYS_SETNS,
	},
	[]uint32{ // resourcecontrol
		unix.SYS_SETPRIORITY, unix.SYS_SCHED_SETPARAM, unix.SYS_SCHED_SETSCHEDULER, unix.SYS_SCHED_SETAFFINITY, unix.SYS_SCHED_SETATTR,
	})

// denying is a filter under which some system calls end the process, and others fail. A thread may be made, a process not.
func denying(fatal, failing []uint32) []unix.SockFilter {
	const (
		jumpIf    = unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K
		jumpAbove = unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K
		jumpBits  = unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K
		give      = unix.BPF_RET | unix.BPF_K
		kill      = unix.SECCOMP_RET_KILL_PROCESS
		otherABI  = 0x40000000 // x32
	)
	f := []unix.SockFilter{
		load(4), // arch
		{Code: jumpIf, K: unix.AUDIT_ARCH_X86_64, Jt: 1},
		{Code: give, K: kill},
		load(0), // nr
		{Code: jumpAbove, K: otherABI, Jf: 1},
		{Code: give, K: kill},
		{Code: jumpIf, K: unix.SYS_CLONE3, Jf: 1}, // its flags cannot be seen; the C library falls back to clone
		{Code: give, K: unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)},
	}
	for _, nr := range fatal {
		f = append(f, unix.SockFilter{Code: jumpIf, K: nr, Jf: 1}, unix.SockFilter{Code: give, K: kill})
	}
	for _, nr := range failing {
		f = append(f, unix.SockFilter{Code: jumpIf, K: nr, Jf: 1}, unix.SockFilter{Code: give, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)})
	}
	return append(f,
		unix.SockFilter{Code: jumpIf, K: unix.SYS_CLONE, Jf: 3},
		load(16), // flags
		unix.SockFilter{Code: jumpBits, K: unix.CLONE_THREAD, Jt: 1},
		unix.SockFilter{Code: give, K: kill},
		unix.SockFilter{Code: give, K: unix.SECCOMP_RET_ALLOW},
	)
}
