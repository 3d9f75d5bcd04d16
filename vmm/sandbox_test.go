package vmm

import (
	"os/exec"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
)

// TestSandboxFilter compares the filter of thawed machines with the one that QEMU itself puts on for -sandbox: what QEMU does
// not let through, it must not let through either.
func TestSandboxFilter(t *testing.T) {
	need.Root(t) // the kernel shows filters to nobody else
	qemu := need.Command(t, "qemu-system-x86_64", "apt-get install qemu-system-x86")
	cmd := exec.Command(qemu, "-machine", "none", "-nodefaults", "-display", "none", "-sandbox", sandbox, "-qmp", "stdio")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	if _, err := out.Read(make([]byte, 1)); err != nil { // the greeting: it is up
		t.Fatal(err)
	}
	theirs, err := filterOf(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	const calls = 512
	denied := 0
	for nr := uint32(0); nr < calls; nr++ {
		for _, flags := range []uint64{0, unix.CLONE_THREAD | unix.CLONE_VM | unix.CLONE_SIGHAND | unix.CLONE_FS | unix.CLONE_FILES |
			unix.CLONE_SYSVSEM | unix.CLONE_SETTLS | unix.CLONE_PARENT_SETTID | unix.CLONE_CHILD_CLEARTID} {
			q, o := verdict(t, theirs, nr, flags), verdict(t, sandboxFilter, nr, flags)
			if q != unix.SECCOMP_RET_ALLOW {
				denied++
				if o == unix.SECCOMP_RET_ALLOW {
					t.Errorf("system call %d with %#x: QEMU's filter says %#x, ours allows it", nr, flags, q)
				}
			}
		}
	}
	if denied < 30 {
		t.Errorf("QEMU denies %d of all: is that its filter?", denied)
	}
	for _, nr := range []uint32{unix.SYS_READ, unix.SYS_FUTEX, unix.SYS_MMAP, unix.SYS_FALLOCATE, unix.SYS_MUNMAP, unix.SYS_EXIT_GROUP} {
		if o := verdict(t, sandboxFilter, nr, 0); o != unix.SECCOMP_RET_ALLOW {
			t.Errorf("system call %d, which QEMU needs: %#x", nr, o)
		}
	}
}

// verdict interprets the few instructions that such filters have.
func verdict(t *testing.T, f []unix.SockFilter, nr uint32, first uint64) uint32 {
	data := map[uint32]uint32{0: nr, 4: unix.AUDIT_ARCH_X86_64, 16: uint32(first), 20: uint32(first >> 32)}
	a := uint32(0)
	for i := 0; i < len(f); i++ {
		jump := func(yes bool) {
			if yes {
				i += int(f[i].Jt)
			} else {
				i += int(f[i].Jf)
			}
		}
		switch c := f[i]; c.Code {
		case unix.BPF_LD | unix.BPF_W | unix.BPF_ABS:
			a = data[c.K]
		case unix.BPF_ALU | unix.BPF_AND | unix.BPF_K:
			a &= c.K
		case unix.BPF_JMP | unix.BPF_JA:
			i += int(c.K)
		case unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K:
			jump(a == c.K)
		case unix.BPF_JMP | unix.BPF_JGE | unix.BPF_K:
			jump(a >= c.K)
		case unix.BPF_JMP | unix.BPF_JGT | unix.BPF_K:
			jump(a > c.K)
		case unix.BPF_JMP | unix.BPF_JSET | unix.BPF_K:
			jump(a&c.K != 0)
		case unix.BPF_RET | unix.BPF_K:
			return c.K
		default:
			t.Fatalf("instruction %#x", c.Code)
		}
	}
	t.Fatal("the filter has no end")
	return 0
}

// filterOf reads the newest filter of a process.
func filterOf(pid int) ([]unix.SockFilter, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.PtraceSeize(pid); err != nil {
		return nil, err
	}
	if err := unix.PtraceInterrupt(pid); err != nil {
		return nil, err
	}
	if _, err := unix.Wait4(pid, nil, unix.WALL, nil); err != nil {
		return nil, err
	}
	return newestFilter(pid)
}
