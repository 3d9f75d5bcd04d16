package main

import (
	"bytes"
	"encoding/binary"
	"strings"

	"golang.org/x/sys/unix"
)

// The program of a rehearsal: a file that has an interpreter, as most programs have a dynamic linker, and the interpreter, which
// does what a C library does before main, and then what small programs do. None of it has an effect; results are not looked at.
const (
	rehearsalProgram     = "rehearsal"
	rehearsalPath        = "/usr/bin/" + rehearsalProgram
	rehearsalInterpreter = "/usr/bin/interpreter"
	rehearsalWord        = "ready\n"

	programBase     = 0x400000
	programSize     = 3 << 20 // of the code: more than is read ahead at once
	interpreterBase = 0x10000000
	interpreterSize = 1 << 20
	stringsOffset   = 0x200  // in the file, behind its headers
	codeOffset      = 0x1000 // at the next page
	dataSize        = 0x8e80 // in the file, behind the code; not whole pages, as in most programs
	roomSize        = 0x4000 // behind the data; in the file there is none of it
	programData     = programBase + programSize
	interpreterData = interpreterBase + interpreterSize
	roomAddress     = (interpreterData + dataSize + 0xfff) &^ 0xfff

	programPath      = rehearsalPath + "\x00"
	interpreterPath  = "/bin/interpreter\x00"
	exePath          = "/proc/self/exe\x00"
	nullPath         = "/dev/null\x00"
	rehearsalStrings = programPath + exePath + nullPath + rehearsalWord
)

// stringAddress is where a part of rehearsalStrings is.
func stringAddress(s string) uint32 {
	return interpreterBase + stringsOffset + uint32(strings.Index(rehearsalStrings, s))
}

func rehearsalCode() []byte {
	var a assembler
	const (
		cwd      = 0xffffff9c // AT_FDCWD
		any      = 0xffffffff // wait4: any child
		room     = roomAddress
		page     = 0x1000
		anywhere = unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
		rw       = unix.PROT_READ | unix.PROT_WRITE
	)
	self, exe, null := stringAddress(programPath), stringAddress(exePath), stringAddress(nullPath)

	// The linker: the heap, a library, its pages, thread-local storage, memory that is for reading only from then on.
	a.call(unix.SYS_BRK)
	a.call(unix.SYS_ARCH_PRCTL, 0x1002, room) // ARCH_SET_FS
	a.call(unix.SYS_MMAP, 0, 2*page, rw, anywhere, 0xffffffff)
	a.touch(true)
	a.call(unix.SYS_ACCESS, self, unix.R_OK)
	a.call(unix.SYS_OPENAT, cwd, self, unix.O_RDONLY|unix.O_CLOEXEC) // descriptor 3: the first that is free
	a.call(unix.SYS_READ, 3, room, 0x340)
	a.call(unix.SYS_PREAD64, 3, room, 0x38, 0x40)
	a.call(unix.SYS_NEWFSTATAT, cwd, self, room)
	a.call(unix.SYS_FSTAT, 3, room)
	a.call(unix.SYS_MMAP, 0, programSize, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_DENYWRITE, 3)
	a.touch(false)
	a.call(unix.SYS_MMAP, 0, 4*page, rw, unix.MAP_PRIVATE, 3, 0x20000)
	a.touch(false)
	a.touch(true)
	a.call(unix.SYS_CLOSE, 3)
	a.call(unix.SYS_SET_TID_ADDRESS, room)
	a.call(unix.SYS_SET_ROBUST_LIST, room, 24)
	a.call(unix.SYS_RSEQ, room+0x400, 32, 0, 0x53053053)
	for at := uint32(0x10000); at < programSize; at += 0xf000 { // more than is mapped around a fault
		a.load(programBase + at)
		a.touch(false)
		if at < interpreterSize {
			a.load(interpreterBase + at)
			a.touch(false)
		}
	}
	for at := uint32(0); at < dataSize; at += page {
		a.load(interpreterData + at)
		if at&page == 0 { // some of it is read before it is written to
			a.touch(false)
		}
		a.touch(true)
	}
	a.call(unix.SYS_MPROTECT, interpreterData, 4*page, unix.PROT_READ)
	a.call(unix.SYS_MPROTECT, programData, page, unix.PROT_READ)
	a.call(unix.SYS_MPROTECT, interpreterBase+0x80000, 0x20000, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC)
	a.call(unix.SYS_MPROTECT, interpreterBase+0x80000, 0x20000, unix.PROT_READ|unix.PROT_EXEC)

	// The C library.
	a.call(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_STACK, 0, room)
	a.call(unix.SYS_READLINK, exe, room, 0x100)
	a.call(unix.SYS_READLINKAT, cwd, exe, room, 0x100)
	a.call(unix.SYS_GETRANDOM, room, 8, 0)
	a.call(unix.SYS_BRK)
	a.grow(0x21000)
	a.touch(false)
	a.call(unix.SYS_MUNMAP, programBase+0x80000, 0x10000)

	// What small programs do.
	a.call(unix.SYS_GETUID)
	a.call(unix.SYS_GETPPID)
	a.call(unix.SYS_UNAME, room)
	a.call(unix.SYS_GETCWD, room, 0x100)
	a.call(unix.SYS_PRCTL, unix.PR_GET_NAME, room)
	a.call(unix.SYS_RT_SIGACTION, uint32(unix.SIGINT), 0, room, 8)
	a.call(unix.SYS_RT_SIGPROCMASK, 0, 0, room, 8)
	a.call(unix.SYS_SIGALTSTACK, 0, room)
	a.call(unix.SYS_SCHED_GETAFFINITY, 0, 0x80, room)
	a.call(unix.SYS_IOCTL, 1, unix.TCGETS, room)
	a.call(unix.SYS_FCNTL, 1, unix.F_GETFL)
	a.call(unix.SYS_OPENAT, cwd, null, unix.O_RDWR)
	a.call(unix.SYS_DUP2, 3, 4)
	a.call(unix.SYS_WRITE, 4, self, 1)
	a.call(unix.SYS_CLOSE, 3)
	a.call(unix.SYS_CLOSE, 4)
	a.call(unix.SYS_PIPE2, room, 0)
	a.call(unix.SYS_CLONE, uint32(unix.SIGCHLD))
	a.child(func(a *assembler) {
		a.load(room)
		a.touch(true)
		a.call(unix.SYS_WRITE, 4, self, 1)
		a.call(unix.SYS_EXIT_GROUP, 0)
	})
	a.call(unix.SYS_READ, 3, room, 8)
	a.call(unix.SYS_WAIT4, any, 0, 0, 0)
	a.call(unix.SYS_WRITE, 1, stringAddress(rehearsalWord), uint32(len(rehearsalWord)))
	a.call(unix.SYS_EXIT_GROUP, 0)
	return a
}

// assembler writes code for x86-64.
type assembler []byte

// call is a system call with arguments of 32 bits; those that are not given are zero.
func (a *assembler) call(number uint32, args ...uint32) {
	le := binary.LittleEndian
	for i, load := range [][]byte{{0xbf}, {0xbe}, {0xba}, {0x41, 0xba}, {0x41, 0xb8}, {0x41, 0xb9}} { // mov edi, esi, edx, r10d, r8d, r9d
		v := uint32(0)
		if i < len(args) {
			v = args[i]
		}
		*a = le.AppendUint32(append(*a, load...), v)
	}
	a.load(number)
	*a = append(*a, 0x0f, 0x05) // syscall
}

// load makes v the last call's result.
func (a *assembler) load(v uint32) {
	*a = binary.LittleEndian.AppendUint32(append(*a, 0xb8), v) // mov eax, v
}

// touch reads or writes where the last call's result points to.
func (a *assembler) touch(write bool) {
	if write {
		*a = append(*a, 0x48, 0x89, 0x08) // mov [rax], rcx
		return
	}
	*a = append(*a, 0x48, 0x8b, 0x08) // mov rcx, [rax]
}

// grow moves the end of the heap, which is the last call's result, up by n, and makes the old end the result.
func (a *assembler) grow(n uint32) {
	*a = append(*a, 0x48, 0x89, 0xc3, 0x48, 0x8d, 0xb8) // mov rbx, rax; lea rdi, [rax+n]
	*a = binary.LittleEndian.AppendUint32(*a, n)
	a.load(unix.SYS_BRK)
	*a = append(*a, 0x0f, 0x05, 0x48, 0x89, 0xd8) // syscall; mov rax, rbx
}

// child is what only the child of a clone does, whose result is the last call's.
func (a *assembler) child(code func(*assembler)) {
	var c assembler
	code(&c)
	*a = append(*a, 0x85, 0xc0, 0x0f, 0x85) // test eax, eax; jnz
	*a = append(binary.LittleEndian.AppendUint32(*a, uint32(len(c))), c...)
}

// executable is a program for x86-64 at a fixed address, of that size, with strings in its first page and code in its second, and
// data behind it. A program without code has the path of an interpreter for strings.
func executable(base, size uint64, code []byte, text string) []byte {
	const header, entry = 64, 56
	le := binary.LittleEndian
	segments := 2
	if code == nil {
		segments = 3
	}
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	b = le.AppendUint16(le.AppendUint16(b, 2), 62) // executable, x86-64
	b = le.AppendUint32(b, 1)
	for _, v := range []uint64{base + codeOffset, header, 0} { // entry, program headers, sections
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{header, entry, uint16(segments), 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	segment := func(kind, flags uint32, offset, size, room, align uint64) {
		b = le.AppendUint32(le.AppendUint32(b, kind), flags)
		for _, v := range []uint64{offset, base + offset, base + offset, size, room, align} {
			b = le.AppendUint64(b, v)
		}
	}
	if code == nil {
		segment(3, 4, stringsOffset, uint64(len(text)), uint64(len(text)), 1) // PT_INTERP
	}
	segment(1, 5, 0, size, size, 0x1000)                     // PT_LOAD: read and executed
	segment(1, 6, size, dataSize, dataSize+roomSize, 0x1000) // and one that is read and written
	file := bytes.Repeat([]byte{0xcc}, int(size+dataSize))
	copy(file, b)
	copy(file[stringsOffset:], text)
	copy(file[codeOffset:], code)
	return file
}
