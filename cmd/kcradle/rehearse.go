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
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
)

// rehearse lets a machine whose drives are blank run a pod of one small program from its start to its end, with a layer and
// a writable disk of its own. Afterwards its drives are blank again, and the guest waits for a pod. What a first start
// has to find, to allocate and, emulated, to translate, the next one has.
func rehearse(ctx context.Context, m *vmm.Machine, cache string, network spec.Network) error {
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
		Layers: []spec.Extent{{DiffID: rehearsalDiffID, Length: size}}, Network: network, Rehearsal: true,
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

// rehearsalLayer is an EROFS image in memory with the program.
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
	program := sayAndExit(rehearsalWord)
	c, err := w.Content(bytes.NewReader(program), int64(len(program)))
	if err != nil {
		return err
	}
	file := &erofs.Inode{Mode: erofs.TypeRegular | 0o755}
	file.SetContent(c)
	if err := w.Root().Put(rehearsalProgram, file); err != nil {
		return err
	}
	_, err = w.Finish([16]byte{})
	return err
}

// sayAndExit is a static program for x86-64 that writes a word to its standard output and ends.
func sayAndExit(word string) []byte {
	const base, headers = 0x400000, 64 + 56
	code := []byte{
		0xb8, 1, 0, 0, 0, // mov eax, 1 (write)
		0xbf, 1, 0, 0, 0, // mov edi, 1
		0x48, 0x8d, 0x35, 16, 0, 0, 0, // lea rsi, [rip+16]
		0xba, byte(len(word)), 0, 0, 0, // mov edx, len
		0x0f, 0x05, // syscall
		0xb8, 60, 0, 0, 0, // mov eax, 60 (exit)
		0x31, 0xff, // xor edi, edi
		0x0f, 0x05, // syscall
	}
	size := uint64(headers + len(code) + len(word))
	b := []byte{0x7f, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	le := binary.LittleEndian
	b = le.AppendUint16(le.AppendUint16(b, 2), 62) // executable, x86-64
	b = le.AppendUint32(b, 1)
	for _, v := range []uint64{base + headers, 64, 0} { // entry, program headers, sections
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{64, 56, 1, 64, 0, 0} {
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(le.AppendUint32(b, 1), 5) // PT_LOAD, r-x
	for _, v := range []uint64{0, base, base, size, size, 4096} {
		b = le.AppendUint64(b, v)
	}
	return append(append(b, code...), word...)
}
