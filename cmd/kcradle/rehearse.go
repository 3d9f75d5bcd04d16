package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/image/erofs"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
)

// rehearse lets a machine whose drives are blank run a pod of one small program from its start to its end, with a layer and
// a writable disk of its own, and then start it once more on that disk. Afterwards its drives are blank again, and the
// guest waits for a pod. What a first start has to find, to allocate and, emulated, to translate, the next one has.
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
	// An image of one layer, and one of two: there the guest has to cut the drive.
	for layers := 1; layers <= 2; layers++ {
		p := spec.Placement{Network: wire, Rehearsal: true}
		for i := range layers {
			p.Layers = append(p.Layers, spec.Extent{DiffID: rehearsalDigest(i), Length: size})
		}
		if err := rehearsal(ctx, m, p); err != nil {
			return fmt.Errorf("rehearse: %w", err)
		}
		m.Disconnect() // the next host begins a new session, too
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
	return spec.Network{Mode: string(network.User), Resolver: true, DNS: []string{"192.0.2.1"}, Interfaces: []spec.Interface{{
		Name: "eth0", MAC: "02:00:00:00:00:02", MTU: w.MTU,
		Addresses: []string{"192.0.2.2/24", "2001:db8::2/64"}, Gateways: []string{"192.0.2.1", "2001:db8::1"},
	}}}
}

// memoryPath is a name of a file that has none.
func memoryPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }

// rehearsalDigest is the digest of the i-th layer. Any will do.
func rehearsalDigest(i int) string { return spec.PodDigest([]byte{byte(i)}) }

// rehearsalPod is a pod of one container that has of everything what most images have.
func rehearsalPod(layers []spec.Extent) *spec.Pod {
	c := spec.Container{
		ID: rehearsalDigest(0)[len("sha256:"):], Name: rehearsalProgram, Created: time.Unix(0, 0).UTC(),
		Image:      spec.Image{Ref: rehearsalProgram + ":latest", ConfigID: rehearsalDigest(0)},
		Entrypoint: []string{rehearsalProgram}, Cmd: []string{"one", "two"}, WorkingDir: "/root", StopSignal: "SIGTERM",
		Env:    []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"},
		Labels: map[string]string{"one": "1", "two": "2"}, ExposedPorts: []string{"80/tcp"},
	}
	for _, l := range layers {
		c.Image.Layers = append(c.Image.Layers, l.DiffID)
	}
	return &spec.Pod{Version: spec.PodVersion, Name: rehearsalProgram, Containers: []spec.Container{c}}
}

// rehearsal launches the pod and reads what the guest says until it ends the stream.
func rehearsal(ctx context.Context, m *vmm.Machine, p spec.Placement) error {
	doc, err := rehearsalPod(p.Layers).Encode()
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
	if err := errors.Join(spec.WriteFrame(conn, spec.FramePod, doc), sendPlacement(conn, p)); err != nil {
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
		case spec.FrameClock:
			c, err := spec.ParseClock(payload)
			if err != nil {
				return err
			}
			c.Now = time.Now()
			if err := spec.WriteFrame(conn, spec.FrameClock, c.Append(nil)); err != nil {
				return err
			}
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

// sendPlacement begins a launch, when the guest has the pod, with the time and entropy of this moment.
func sendPlacement(w io.Writer, p spec.Placement) error {
	p.Now, p.Entropy = time.Now(), make([]byte, 64)
	_, _ = rand.Read(p.Entropy) // never fails since Go 1.24
	placement, err := json.Marshal(p)
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

// writeRehearsalLayer writes what most images have: directories for the mounts of a container, its users, and programs where PATH
// leads over a link.
func writeRehearsalLayer(f *os.File) error {
	w, err := erofs.NewWriter(f, erofs.Options{})
	if err != nil {
		return err
	}
	defer w.Close()
	dirs := map[string]*erofs.Inode{"/": w.Root()}
	for _, name := range []string{"/dev", "/etc", "/proc", "/root", "/run", "/sys", "/tmp", "/usr", "/usr/bin", "/var"} {
		dirs[name] = &erofs.Inode{Mode: erofs.TypeDirectory | 0o755}
		if err := dirs[path.Dir(name)].Put(path.Base(name), dirs[name]); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"/bin": "usr/bin", "/usr/bin/sh": rehearsalProgram} {
		if err := dirs[path.Dir(name)].Put(path.Base(name), &erofs.Inode{Mode: erofs.TypeSymlink | 0o777, Target: target}); err != nil {
			return err
		}
	}
	for name, data := range map[string][]byte{
		"/etc/passwd":        []byte("root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/usr/sbin/nologin\n"),
		"/etc/group":         []byte("root:x:0:\ndaemon:x:1:\nadm:x:4:daemon,root\n"),
		rehearsalPath:        executable(programBase, programSize, nil, interpreterPath),
		rehearsalInterpreter: executable(interpreterBase, interpreterSize, rehearsalCode(), rehearsalStrings),
	} {
		c, err := w.Content(bytes.NewReader(data), int64(len(data)))
		if err != nil {
			return err
		}
		file := &erofs.Inode{Mode: erofs.TypeRegular | 0o755}
		file.SetContent(c)
		if err := dirs[path.Dir(name)].Put(path.Base(name), file); err != nil {
			return err
		}
	}
	_, err = w.Finish([16]byte{})
	return err
}
