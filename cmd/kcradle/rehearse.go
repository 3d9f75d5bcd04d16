package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/image/erofs"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
)

// rehearse lets a machine whose drives are blank run a pod of one small program from its start to its end, with a layer and
// a writable disk of its own. Afterwards its drives are blank again, and the guest waits for a pod. What a first start
// has to find, to allocate and, emulated, to translate, the next one has.
func rehearse(ctx context.Context, m *vmm.Machine, cache string, wire spec.Network) error {
	layer, err := rehearsalLayer()
	if err != nil {
		return err
	}
	defer layer.Close()
	size, err := layer.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	scratch, err := bundle.TemporaryDisk(ctx, cache)
	if err != nil {
		return err
	}
	defer scratch.Close()
	drives := []vmm.Drive{
		{Serial: spec.SerialScratch, Path: memoryPath(scratch)},
		{Serial: spec.SerialLayers, ReadOnly: true, Extents: []vmm.Extent{{Path: memoryPath(layer), Size: size}}},
	}
	if err := m.Ready(ctx); err != nil {
		return err
	}
	for _, d := range drives {
		if err := m.Attach(ctx, d); err != nil {
			return err
		}
	}
	if err := rehearsal(ctx, m, spec.Placement{
		Layers: []spec.Extent{{DiffID: rehearsalDiffID, Length: size}}, Network: wire, Rehearsal: true,
	}); err != nil {
		return fmt.Errorf("rehearse: %w", err)
	}
	for _, d := range drives {
		if err := m.Attach(ctx, vmm.Drive{Serial: d.Serial, ReadOnly: d.ReadOnly, Blank: true}); err != nil {
			return err
		}
	}
	return nil
}

// rehearsalNetwork is what a guest on a wire is told while it rehearses.
func rehearsalNetwork(w *vmm.Wire) spec.Network {
	if w == nil {
		return spec.Network{Mode: string(network.None)}
	}
	return spec.Network{Mode: string(network.User), Interfaces: []spec.Interface{{
		Name: "eth0", MAC: "02:00:00:00:00:02", MTU: w.MTU,
		Addresses: []string{"192.0.2.2/24", "2001:db8::2/64"}, Gateways: []string{"192.0.2.1", "2001:db8::1"},
	}}}
}

// memoryPath is a name of a file that has none.
func memoryPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

const (
	rehearsalProgram = "rehearsal"
	rehearsalWord    = "ready\n"
)

var rehearsalDiffID = spec.PodDigest([]byte(rehearsalProgram)) // any digest will do

// rehearsal launches the pod and reads what the guest says until it ends the stream.
func rehearsal(ctx context.Context, m *vmm.Machine, p spec.Placement) error {
	pod := spec.Pod{Version: spec.PodVersion, Name: rehearsalProgram, Containers: []spec.Container{{
		ID: spec.PodDigest(nil)[len("sha256:"):], Name: rehearsalProgram, Cmd: []string{"/" + rehearsalProgram},
		Image: spec.Image{ConfigID: rehearsalDiffID, Layers: []string{rehearsalDiffID}},
	}}}
	doc, err := pod.Encode()
	if err != nil {
		return err
	}
	conn, err := m.Dial(ctx, spec.PortControl)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := sendPod(conn, doc, p); err != nil {
		return err
	}
	var output []byte
	var clean bool
	for {
		kind, payload, err := spec.ReadFrame(conn, nil)
		switch {
		case err == io.EOF && clean && string(output) == rehearsalWord:
			return nil
		case err == io.EOF:
			return fmt.Errorf("the guest said %q, clean %v", output, clean)
		case err != nil:
			return err
		}
		switch kind {
		case spec.FrameOutput:
			o, err := spec.ParseOutput(payload)
			if err != nil {
				return err
			}
			output = append(output, o.Bytes...)
		case spec.FrameError:
			return errors.New(string(payload))
		case spec.FrameDone:
			var d spec.Done
			if err := json.Unmarshal(payload, &d); err != nil {
				return err
			}
			clean = d.Clean
		}
	}
}

// sendPod begins a launch: the pod's bytes, then the placement with the time and entropy of this moment.
func sendPod(w io.Writer, doc []byte, p spec.Placement) error {
	p.Now, p.Entropy = time.Now(), make([]byte, 64)
	_, _ = rand.Read(p.Entropy) // never fails since Go 1.24
	placement, err := json.Marshal(p)
	if err == nil {
		err = spec.WriteFrame(w, spec.FramePod, doc)
	}
	if err == nil {
		err = spec.WriteFrame(w, spec.FramePlacement, placement)
	}
	return err
}

// rehearsalLayer is an EROFS image in memory with a program and its interpreter: the kernel starts most programs that way.
func rehearsalLayer() (*os.File, error) {
	fd, err := unix.MemfdCreate("layer", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "layer")
	if err := writeRehearsalLayer(f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func writeRehearsalLayer(f *os.File) error {
	w, err := erofs.NewWriter(f, erofs.Options{})
	if err != nil {
		return err
	}
	defer w.Close()
	for name, program := range map[string][]byte{
		rehearsalProgram:     executable(0x400000, nil, "/"+rehearsalInterpreter),
		rehearsalInterpreter: executable(0x10000000, rehearsalCode, ""),
	} {
		c, err := w.Content(bytes.NewReader(program), int64(len(program)))
		if err != nil {
			return err
		}
		file := &erofs.Inode{Mode: erofs.TypeRegular | 0o755}
		file.SetContent(c)
		if err := w.Root().Put(name, file); err != nil {
			return err
		}
	}
	_, err = w.Finish([16]byte{})
	return err
}

const rehearsalInterpreter = "interpreter"

// rehearsalCode does what a C library does before main, and then says the word. at is where its strings are.
func rehearsalCode(at uint32) []byte {
	const self, word = "/" + rehearsalProgram + "\x00", rehearsalWord
	var a assembler
	const cwd = 0xffffff9c // AT_FDCWD
	a.call(unix.SYS_BRK)
	a.call(unix.SYS_ARCH_PRCTL, 0x1002, at) // ARCH_SET_FS
	a.call(unix.SYS_MMAP, 0, 0x2000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS, 0xffffffff)
	a.touch(true)
	a.call(unix.SYS_ACCESS, at, unix.R_OK)
	a.call(unix.SYS_OPENAT, cwd, at, unix.O_RDONLY|unix.O_CLOEXEC) // descriptor 3: the first that is free
	a.call(unix.SYS_FSTAT, 3, at+0x800)
	a.call(unix.SYS_MMAP, 0, 0x1000, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE, 3)
	a.touch(false)
	a.touch(true)
	a.call(unix.SYS_CLOSE, 3)
	a.call(unix.SYS_SET_TID_ADDRESS, at+0x800)
	a.call(unix.SYS_SET_ROBUST_LIST, at+0x800, 24)
	a.call(unix.SYS_MPROTECT, at&^0xfff, 0x1000, unix.PROT_READ|unix.PROT_WRITE|unix.PROT_EXEC)
	a.call(unix.SYS_PRLIMIT64, 0, unix.RLIMIT_STACK, 0, at+0x800)
	a.call(unix.SYS_GETRANDOM, at+0x800, 8, 0)
	a.call(unix.SYS_BRK)
	a.call(unix.SYS_GETUID)
	a.call(unix.SYS_WRITE, 1, at+uint32(len(self)), uint32(len(word)))
	a.call(unix.SYS_EXIT_GROUP, 0)
	return append([]byte(self+word), a...)
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
	*a = append(le.AppendUint32(append(*a, 0xb8), number), 0x0f, 0x05) // mov eax; syscall
}

// touch reads or writes where the last call's result points to.
func (a *assembler) touch(write bool) {
	if write {
		*a = append(*a, 0x48, 0x89, 0x08) // mov [rax], rcx
		return
	}
	*a = append(*a, 0x48, 0x8b, 0x08) // mov rcx, [rax]
}

// executable is a program for x86-64 at a fixed address. It has either code, which is told where its strings will be and returns them
// before its instructions, or an interpreter.
func executable(base uint64, code func(strings uint32) []byte, interpreter string) []byte {
	const header, entry = 64, 56
	le := binary.LittleEndian
	segments := 1
	if interpreter != "" {
		segments = 2
	}
	start := uint64(header + segments*entry)
	body := []byte(interpreter + "\x00")
	at := base + start
	if code != nil {
		body = code(uint32(at))
		at += uint64(len("/" + rehearsalProgram + "\x00" + rehearsalWord)) // behind the strings
	}
	size := start + uint64(len(body))
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	b = le.AppendUint16(le.AppendUint16(b, 2), 62) // executable, x86-64
	b = le.AppendUint32(b, 1)
	for _, v := range []uint64{at, header, 0} { // entry, program headers, sections
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
	if interpreter != "" {
		segment(3, 4, start, uint64(len(body)), uint64(len(body)), 1) // PT_INTERP
	}
	segment(1, 7, 0, size, 0x4000, 0x1000) // PT_LOAD, with room to write
	return append(b, body...)
}
