package vmtest

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
	"github.com/kcradle/kcradle/vmm/channel"
)

const guest = "./guest"

// client speaks to the guest program's port of commands.
type client struct {
	t testing.TB
	c net.Conn
	r *bufio.Reader
}

func control(vm *VM) *client {
	c := vm.Dial(spec.PortControl)
	return &client{vm.t, c, bufio.NewReader(c)}
}

func (c *client) send(format string, args ...any) {
	c.t.Helper()
	if _, err := fmt.Fprintf(c.c, format+"\n", args...); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) ask(format string, args ...any) string {
	c.t.Helper()
	c.send(format, args...)
	s, err := c.r.ReadString('\n')
	if err != nil || strings.HasPrefix(s, "error: ") {
		c.t.Fatalf("%s: got %q and %v", fmt.Sprintf(format, args...), s, err)
	}
	return strings.TrimSpace(s)
}

// TestBoot says how long each step takes.
func TestBoot(t *testing.T) {
	o := Options{Init: guest}
	c := Config(t, o)
	begun := time.Now()
	vm := Boot(t, Options{Kernel: c.Kernel, Initrd: c.Initrd})
	if err := vm.Ready(vm.Context()); err != nil {
		t.Fatal(err)
	}
	ready := time.Now()
	e := vm.Dial(spec.PortVdocker)
	if _, err := e.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(e, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	first := time.Now()
	again := control(vm)
	version := again.ask("read /proc/version")
	t.Logf("engine %s: ready after %v, first stream's first byte %v later, the second's %v later", c.Engine, ready.Sub(begun), first.Sub(ready), time.Since(first))
	if !strings.HasPrefix(version, "Linux version") {
		t.Errorf("version: %q", version)
	}
	if err := e.Close(); err != nil {
		t.Error(err)
	}
}

func TestExits(t *testing.T) {
	c := Config(t, Options{Init: guest})
	tests := []struct {
		name string
		end  func(*VM)
		want vmm.Reason
		says string
	}{
		{"guest restarts", func(vm *VM) { control(vm).send("restart") }, vmm.GuestReset, "restarted"},
		{"guest panics", func(vm *VM) { control(vm).send("sysrq c") }, vmm.GuestPanic, "sysrq triggered crash"},
		{"QEMU is killed", func(vm *VM) { _ = syscall.Kill(vm.PID(), syscall.SIGKILL) }, vmm.Signalled, "SIGKILL"},
		{"we kill", func(vm *VM) { vm.Kill() }, vmm.Killed, "killed"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			console := filepath.Join(t.TempDir(), "console.log")
			vm := Boot(t, Options{Kernel: c.Kernel, Initrd: c.Initrd, Console: console})
			// A stream that is open meanwhile breaks; it does not end as if all had been said.
			open := vm.Dial(spec.PortVdocker)
			test.end(vm)
			if _, err := io.ReadAll(open); !errors.Is(err, channel.ErrBroken) {
				t.Errorf("open stream: got %v, want %v", err, channel.ErrBroken)
			}
			x := vm.Wait()
			if x.Reason != test.want || !strings.Contains(x.Message, test.says) {
				t.Errorf("got %s (%s), want %s with %q", x.Reason, x.Message, test.want, test.says)
			}
			if log, err := os.ReadFile(console); err != nil || test.want == vmm.GuestPanic && !bytes.Contains(log, []byte("Kernel panic")) {
				t.Errorf("console.log: %q, %v", log, err)
			}
		})
	}
	t.Run("init ends", func(t *testing.T) {
		// A panic before the guest is ready, while the host still waits.
		vm := Boot(t, Options{Kernel: c.Kernel, Initrd: c.Initrd, CommandLine: "rdinit=/nonexistent"})
		_, err := vm.Machine.Dial(vm.Context(), spec.PortControl)
		var e *vmm.ExitError
		if !errors.As(err, &e) || e.Exit.Reason != vmm.GuestPanic {
			t.Errorf("dial: got %v, want the guest's panic", err)
		}
	})
}

func TestChannelInGuest(t *testing.T) {
	vm := Boot(t, Options{Init: guest})
	t.Run("200 dials", func(t *testing.T) {
		if err := vm.Ready(vm.Context()); err != nil {
			t.Fatal(err)
		}
		var worst, sum time.Duration
		for i := range 200 {
			begun := time.Now()
			c := vm.Dial(spec.PortVdocker)
			want := fmt.Sprintf("dial %d", i)
			if _, err := io.WriteString(c, want); err != nil {
				t.Fatal(err)
			}
			if err := c.(channel.Conn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(c)
			if err != nil || string(got) != want {
				t.Fatalf("got %q and %v, want %q", got, err, want)
			}
			_ = c.Close()
			d := time.Since(begun)
			worst, sum = max(worst, d), sum+d
		}
		t.Logf("dial, write, half-close, echo, close: mean %v, worst %v", sum/200, worst)
	})
	t.Run("64 MiB", func(t *testing.T) {
		c := vm.Dial(spec.PortVdocker)
		defer c.Close()
		const size = 64 << 20
		sent, got := sha256.New(), sha256.New()
		begun := time.Now()
		done := make(chan error, 1)
		go func() {
			_, err := io.Copy(io.MultiWriter(c, sent), io.LimitReader(rand.Reader, size))
			done <- errors.Join(err, c.(channel.Conn).CloseWrite())
		}()
		n, err := io.Copy(got, c)
		if err := errors.Join(err, <-done); err != nil || n != size || !bytes.Equal(got.Sum(nil), sent.Sum(nil)) {
			t.Fatalf("%d of %d bytes came back, equal: %v, error %v", n, size, bytes.Equal(got.Sum(nil), sent.Sum(nil)), err)
		}
		d := time.Since(begun)
		t.Logf("64 MiB there and back at once: %v, %.0f MB/s each way", d, size/d.Seconds()/1e6)
	})
	t.Run("refused", func(t *testing.T) {
		c := vm.Dial(77)
		defer c.Close()
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, channel.ErrRefused) {
			t.Errorf("got %v, want %v", err, channel.ErrRefused)
		}
	})
}

// The host's connection is taken from under the session, in the middle of frames: the next dial works, and nothing old
// is heard on it.
func TestHostComesBack(t *testing.T) {
	vm := Boot(t, Options{Init: guest})
	for i := range 10 {
		c := vm.Dial(spec.PortVdocker)
		want := bytes.Repeat([]byte{byte('a' + i)}, 300_000)
		go func() { _, _ = c.Write(bytes.Repeat(want, 4)) }()
		got := make([]byte, len(want))
		if _, err := io.ReadFull(c, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("session %d: the echo differs, error %v", i, err)
		}
		vm.Disconnect()
		if _, err := io.Copy(io.Discard, c); !errors.Is(err, channel.ErrBroken) {
			t.Fatalf("session %d: got %v, want %v", i, err, channel.ErrBroken)
		}
	}
}

func TestDrives(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, size int) (string, []byte) {
		b := make([]byte, size)
		_, _ = rand.Read(b)
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path, b
	}
	a, abytes := file("a", 3*4096)
	b, bbytes := file("b", 4096+1000)
	d, dbytes := file("c", 1<<20)
	scratch := filepath.Join(dir, "scratch")
	if err := os.WriteFile(scratch, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(scratch, 64<<20); err != nil {
		t.Fatal(err)
	}
	o := Options{InitFile: Build(t, guest), Drives: []vmm.Drive{
		{Serial: spec.SerialScratch, Path: scratch},
		{Serial: spec.SerialLayers, ReadOnly: true, Extents: []vmm.Extent{{Path: a, Size: int64(len(abytes))}, {Path: b, Size: int64(len(bbytes))}, {Path: d, Size: 1 << 19}, {Path: a, Size: int64(len(abytes))}}},
	}}
	vm := Boot(t, o)
	c := control(vm)
	whole := append([]byte(nil), abytes...)
	whole = append(whole, bbytes...)
	whole = append(whole, make([]byte, 2*4096-len(bbytes))...)
	whole = append(whole, dbytes[:1<<19]...)
	whole = append(whole, abytes...)
	if got, want := c.ask("disk layers"), fmt.Sprintf("vdb %d ro=1 %x", len(whole), sha256.Sum256(whole)); got != want {
		t.Errorf("layers: got %q, want %q", got, want)
	}
	c.ask("fill scratch 7 32")
	// What the guest has synced survives QEMU.
	_ = syscall.Kill(vm.PID(), syscall.SIGKILL)
	vm.Wait()
	got, err := os.ReadFile(scratch)
	if err != nil || !bytes.Equal(got[:32<<20], bytes.Repeat([]byte{7}, 32<<20)) || !bytes.Equal(got[32<<20:], make([]byte, 32<<20)) {
		t.Errorf("scratch differs from what the guest synced, error %v", err)
	}
	before := blocks(t, scratch)
	vm = Boot(t, o)
	c = control(vm)
	if got, want := c.ask("disk scratch"), fmt.Sprintf("vda %d ro=0 %x", 64<<20, sha256.Sum256(got)); got != want {
		t.Errorf("scratch, second boot: got %q, want %q", got, want)
	}
	// What the guest discards goes back to the host's file system.
	c.ask("discard scratch")
	if after := blocks(t, scratch); before < 32<<20 || after > 1<<20 {
		t.Errorf("scratch takes %d bytes before the discard and %d after", before, after)
	}
}

func blocks(t *testing.T, path string) int64 {
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// What the guest frees goes back to the host (free page reporting).
func TestMemoryGoesBack(t *testing.T) {
	vm := Boot(t, Options{Init: guest, Memory: 512 << 20})
	memoryGoesBack(t, vm)
}

func memoryGoesBack(t *testing.T, vm *VM) {
	t.Helper()
	c := control(vm)
	resident := func() int64 {
		m, err := vm.Memory(vm.Context())
		if err != nil {
			t.Fatal(err)
		}
		if m.Total < 400<<20 || m.Total > 512<<20 || m.Free > m.Total {
			t.Fatalf("the guest's own word on its memory: %+v", m)
		}
		return m.Resident
	}
	before := resident()
	c.ask("take 200")
	held := resident()
	c.ask("give")
	// The guest reports free pages every two seconds.
	begun := time.Now()
	after := resident()
	for ; after > before+80<<20 && time.Since(begun) < 30*time.Second; after = resident() {
		select {
		case <-time.After(100 * time.Millisecond):
		case <-vm.Done():
			t.Fatal("the machine ended")
		}
	}
	t.Logf("QEMU's resident size: %d MiB, with 200 MiB taken %d MiB, %v after they were freed %d MiB", before>>20, held>>20, time.Since(begun).Round(100*time.Millisecond), after>>20)
	if held < before+190<<20 || after > before+80<<20 {
		t.Error("the memory did not go back")
	}
}

func TestDialHonoursContext(t *testing.T) {
	vm := Boot(t, Options{Init: guest})
	ctx, cancel := context.WithTimeout(vm.Context(), time.Millisecond)
	defer cancel()
	if _, err := vm.Machine.Dial(ctx, spec.PortControl); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want a deadline error", err)
	}
	control(vm).ask("read /proc/uptime")
}

// The host's kernel kills QEMU for memory: the machine's end says so.
func TestHostOutOfMemory(t *testing.T) {
	need.Root(t)
	// By its user it is known in a PID namespace, too.
	user, err := vmm.Unprivileged(vmm.TCG)
	if err != nil {
		t.Fatal(err)
	}
	vm := Boot(t, Options{Init: guest, Memory: 512 << 20, Engine: vmm.TCG, RunAs: user})
	c := control(vm)
	c.ask("read /proc/uptime")
	limitMemory(t, vm.PID(), 100<<20)
	c.send("take 300")
	x := vm.Wait()
	if x.Reason != vmm.HostMemory || !strings.Contains(x.Message, "ran out of memory") {
		t.Errorf("got %s (%s), want %s", x.Reason, x.Message, vmm.HostMemory)
	}
	t.Log(x.Message)
}

// limitMemory moves a process into a control group of its own, of either version.
func limitMemory(t *testing.T, pid int, limit int64) {
	t.Helper()
	top, file := "/sys/fs/cgroup/memory", "memory.limit_in_bytes"
	if _, err := os.Stat(filepath.Join(top, file)); err != nil {
		top, file = "/sys/fs/cgroup", "memory.max"
		need.File(t, "/sys/fs/cgroup/cgroup.subtree_control", "mount -t cgroup2 none /sys/fs/cgroup")
		if err := os.WriteFile(filepath.Join(top, "cgroup.subtree_control"), []byte("+memory"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	dir, err := os.MkdirTemp(top, "kcradle-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	for _, f := range []struct {
		name  string
		value int64
	}{{file, limit}, {"cgroup.procs", int64(pid)}} {
		if err := os.WriteFile(filepath.Join(dir, f.name), []byte(strconv.FormatInt(f.value, 10)), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
