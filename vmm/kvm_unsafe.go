//go:build linux && amd64

package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe" // the KVM API takes addresses of structures, and shares struct kvm_run by mmap

	"golang.org/x/sys/unix"
)

const kvmDevice = "/dev/kvm"

// Requests and exit reasons of linux/kvm.h.
const (
	kvmGetAPIVersion       = 0xAE00
	kvmCreateVM            = 0xAE01
	kvmGetVCPUMmapSize     = 0xAE04
	kvmGetSupportedCPUID   = 0xC008AE05
	kvmCreateVCPU          = 0xAE41
	kvmSetUserMemoryRegion = 0x4020AE46
	kvmSetTSSAddress       = 0xAE47
	kvmRun                 = 0xAE80
	kvmSetRegs             = 0x4090AE82
	kvmGetSregs            = 0x8138AE83
	kvmSetSregs            = 0x4138AE84
	kvmSetCPUID2           = 0x4008AE90

	kvmExitIO            = 2
	kvmExitShutdown      = 8
	kvmExitInternalError = 17
)

// kvmSegment, kvmTable, kvmSregs, kvmRegs, kvmMemoryRegion are the structures of the same names in asm/kvm.h and
// linux/kvm.h.
type kvmSegment struct {
	base                                 uint64
	limit                                uint32
	selector                             uint16
	kind, present, dpl, db, s, l, g, avl uint8
	unusable, padding                    uint8
}

type kvmTable struct {
	base    uint64
	limit   uint16
	padding [3]uint16
}

type kvmSregs struct {
	cs, ds, es, fs, gs, ss, tr, ldt kvmSegment
	gdt, idt                        kvmTable
	cr0, cr2, cr3, cr4, cr8         uint64
	efer, apicBase                  uint64
	interrupts                      [4]uint64
}

type kvmRegs struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags uint64
}

type kvmMemoryRegion struct {
	slot, flags              uint32
	guestAddress, size, from uint64
}

// Places in the probe's memory.
const (
	probeMemory = 64 << 10
	probePML4   = 0x1000
	probePDPT   = 0x2000
	probePD     = 0x3000
	probeIDT    = 0x4000
	probeGDT    = 0x5000
	probeCode   = 0x6000
	probeData   = 0x7000
	probeStack  = 0x9000

	probePort   = 0x10
	probeResult = 'K'
)

// probeRounds of the payload take a processor well under a millisecond. What emulates instructions fails at the first
// round, or is found out by the deadline.
const probeRounds = 1000

// errEmulated says that /dev/kvm works and that no processor stands behind it.
var errEmulated = errors.New("the processor's virtualization is emulated here")

// runsInHardware executes a small program in 64-bit mode by KVM. It returns nil when the processor did it in time.
func runsInHardware(deadline time.Duration) error {
	kvm, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer kvm.Close()
	if v, err := ioctl(kvm.Fd(), kvmGetAPIVersion, 0); err != nil || v != 12 {
		return fmt.Errorf("KVM's API version is %d, not 12 (%v)", v, err)
	}
	vm, err := ioctl(kvm.Fd(), kvmCreateVM, 0)
	if err != nil {
		return fmt.Errorf("create a VM: %w", err)
	}
	defer unix.Close(int(vm))
	// Older processors of Intel need a place for a task state segment.
	_, _ = ioctl(vm, kvmSetTSSAddress, 0xFFFBD000)

	memory, err := unix.Mmap(-1, 0, probeMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("memory of the VM: %w", err)
	}
	defer unix.Munmap(memory)
	writeProbe(memory)
	region := kvmMemoryRegion{size: probeMemory, from: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	if _, err := ioctl(vm, kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&region))); err != nil {
		return fmt.Errorf("memory of the VM: %w", err)
	}
	vcpu, err := ioctl(vm, kvmCreateVCPU, 0)
	if err != nil {
		return fmt.Errorf("create a vCPU: %w", err)
	}
	defer unix.Close(int(vcpu))
	size, err := ioctl(kvm.Fd(), kvmGetVCPUMmapSize, 0)
	if err != nil {
		return fmt.Errorf("size of a vCPU: %w", err)
	}
	run, err := unix.Mmap(int(vcpu), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("state of a vCPU: %w", err)
	}
	defer unix.Munmap(run)
	if err := enterLongMode(kvm.Fd(), vcpu); err != nil {
		return err
	}

	// KVM_RUN returns on its own after microseconds, or it is left: the flag makes it return at its next entry, the
	// signal makes it leave. The Go runtime ignores a SIGURG that it did not send.
	var over atomic.Bool
	thread := make(chan int, 1)
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		thread <- unix.Gettid()
		for {
			_, err := ioctl(vcpu, kvmRun, 0)
			if errors.Is(err, unix.EINTR) {
				if over.Load() {
					result <- fmt.Errorf("%w: %d steps were not done after %v", errEmulated, probeRounds, deadline)
					return
				}
				continue
			}
			if err != nil {
				result <- fmt.Errorf("run a vCPU: %w", err)
				return
			}
			result <- judge(run)
			return
		}
	}()
	tid := <-thread
	timer := time.NewTimer(deadline)
	defer timer.Stop()
	select {
	case err := <-result:
		return err
	case <-timer.C:
	}
	over.Store(true)
	immediateExit := (*uint32)(unsafe.Pointer(&run[0])) // request_interrupt_window, immediate_exit, padding
	atomic.StoreUint32(immediateExit, 1<<8)
	_ = unix.Tgkill(os.Getpid(), tid, unix.SIGURG)
	return <-result
}

// judge reads struct kvm_run.
func judge(run []byte) error {
	switch reason := binary.LittleEndian.Uint32(run[8:]); reason {
	case kvmExitIO:
		// direction, size, port, count, data_offset
		port, offset := binary.LittleEndian.Uint16(run[34:]), binary.LittleEndian.Uint64(run[40:])
		if port == probePort && offset < uint64(len(run)) && run[offset] == probeResult {
			return nil
		}
		return fmt.Errorf("%w: it gave a wrong result", errEmulated)
	case kvmExitInternalError:
		return fmt.Errorf("%w: an instruction failed (internal error, suberror %d)", errEmulated, binary.LittleEndian.Uint32(run[32:]))
	case kvmExitShutdown:
		return fmt.Errorf("%w: the guest crashed at its first instructions", errEmulated)
	default:
		return fmt.Errorf("%w: the guest was left with reason %d", errEmulated, reason)
	}
}

// writeProbe lays out page tables, descriptor tables and the program.
func writeProbe(m []byte) {
	put := func(at int, v uint64) { binary.LittleEndian.PutUint64(m[at:], v) }
	put(probePML4, probePDPT|3) // present, writable
	put(probePDPT, probePD|3)
	put(probePD, 0|0x83)                 // the first 2 MiB as one page
	put(probeGDT+8, 0x00AF9B000000FFFF)  // 64-bit code, selector 8
	put(probeGDT+16, 0x00CF93000000FFFF) // data, selector 16

	program := []byte{
		0x41, 0xB8, 0, 0, 0, 0, // mov r8d, probeRounds
		0xBF, 0, 0, 0, 0, // mov edi, probeData
		0x31, 0xDB, // xor ebx, ebx
		0x31, 0xC9, // xor ecx, ecx
		// again:
		0xF0, 0x48, 0x0F, 0xC7, 0x0F, // lock cmpxchg16b [rdi]
		0xCC,             // int3
		0x41, 0xFF, 0xC8, // dec r8d
		0x75, 0xF5, // jnz again
		0xB0, probeResult, // mov al, probeResult
		0xE6, probePort, // out probePort, al
		0xF4, // hlt
	}
	binary.LittleEndian.PutUint32(program[2:], probeRounds)
	binary.LittleEndian.PutUint32(program[7:], probeData)
	handler := probeCode + copy(m[probeCode:], program)
	copy(m[handler:], []byte{0x48, 0xCF}) // iretq

	gate := probeIDT + 3*16 // #BP
	put(gate, uint64(handler)&0xFFFF|8<<16|0x8E<<40|uint64(handler)>>16<<48)
}

func enterLongMode(kvm, vcpu uintptr) error {
	// struct kvm_cpuid2 with room for its entries of 40 bytes
	const entries = 256
	cpuid := make([]uint64, 1+entries*5)
	*(*uint32)(unsafe.Pointer(&cpuid[0])) = entries
	if _, err := ioctl(kvm, kvmGetSupportedCPUID, uintptr(unsafe.Pointer(&cpuid[0]))); err != nil {
		return fmt.Errorf("features of a vCPU: %w", err)
	}
	if _, err := ioctl(vcpu, kvmSetCPUID2, uintptr(unsafe.Pointer(&cpuid[0]))); err != nil {
		return fmt.Errorf("features of a vCPU: %w", err)
	}
	var s kvmSregs
	if _, err := ioctl(vcpu, kvmGetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return fmt.Errorf("registers of a vCPU: %w", err)
	}
	s.cs = kvmSegment{limit: 0xFFFFFFFF, selector: 8, kind: 11, present: 1, s: 1, l: 1, g: 1}
	data := kvmSegment{limit: 0xFFFFFFFF, selector: 16, kind: 3, present: 1, db: 1, s: 1, g: 1}
	s.ds, s.es, s.fs, s.gs, s.ss = data, data, data, data, data
	s.gdt = kvmTable{base: probeGDT, limit: 3*8 - 1}
	s.idt = kvmTable{base: probeIDT, limit: 4*16 - 1}
	s.cr3 = probePML4
	s.cr4 = 1<<5 | 1<<9                // PAE, OSFXSR
	s.cr0 = 1<<0 | 1<<1 | 1<<5 | 1<<31 // PE, MP, NE, PG
	s.efer = 1<<8 | 1<<10              // LME, LMA
	if _, err := ioctl(vcpu, kvmSetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return fmt.Errorf("registers of a vCPU: %w", err)
	}
	r := kvmRegs{rip: probeCode, rsp: probeStack, rflags: 2}
	if _, err := ioctl(vcpu, kvmSetRegs, uintptr(unsafe.Pointer(&r))); err != nil {
		return fmt.Errorf("registers of a vCPU: %w", err)
	}
	return nil
}

func ioctl(fd, request, argument uintptr) (uintptr, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, request, argument)
	if errno != 0 {
		return 0, os.NewSyscallError("ioctl", errno)
	}
	return r, nil
}
