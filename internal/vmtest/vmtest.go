// Package vmtest boots the kernel of this tree in a test, with a Go program as /init.
//
//	vm := vmtest.Boot(t, vmtest.Options{Init: "./testdata/guest"})
//	conn := vm.Dial(spec.PortControl)
//	exit := vm.Wait()
//
// The machine is gone when the test ends; when the test failed, its kernel log is shown.
package vmtest

import (
	"context"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kcradle/kcradle/initrd"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/kernel"
	"github.com/kcradle/kcradle/vmm"
)

// Options says what to boot.
type Options struct {
	// Init is the Go package that is built as /init: an import path, or a directory that begins with "./".
	Init string
	// InitFile is a program that Build has built; it wins over Init.
	InitFile string
	// Initrd is the path of a whole initrd; it wins over both.
	Initrd string

	Kernel      string     // path of a vmlinux; empty: the tree's
	CommandLine string     // appended to the tree's
	Verbose     bool       // every message of the kernel
	Engine      vmm.Engine // empty: what works here
	Memory      int64      // bytes; 0: 256 MiB
	VCPUs       int
	Drives      []vmm.Drive
	Wire        *vmm.Wire
	Console     string // file for the kernel log
	RunAs       *vmm.Credential
	MemoryFile  string        // see vmm.Config
	Restore     *vmm.Snapshot // see vmm.Config
	Transfer    bool          // see vmm.Config.Transferable

	Deadline time.Duration // of the machine's life; 0: two minutes
}

// VM is a machine of a test.
type VM struct {
	*vmm.Machine
	t   testing.TB
	ctx context.Context
	log *syncBuffer
}

// Boot starts a machine; it is killed when the test ends.
func Boot(t testing.TB, o Options) *VM {
	t.Helper()
	need.Command(t, vmm.QEMUProgram, "apt-get install qemu-system-x86")
	if o.Deadline == 0 {
		o.Deadline = 2 * time.Minute
	}
	ctx, cancel := context.WithTimeout(context.Background(), o.Deadline)
	log := &syncBuffer{}
	m, err := vmm.Start(ctx, Config(t, o), slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	return watch(t, ctx, cancel, m, log)
}

// Adopt takes over a machine that was given away.
func Adopt(t testing.TB, h *vmm.Handover, o Options) *VM {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	log := &syncBuffer{}
	m, err := vmm.Adopt(ctx, h, Config(t, o), slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err == nil {
		err = m.Attached()
	}
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	return watch(t, ctx, cancel, m, log)
}

// watch kills the machine when the test ends, and then tells of it if the test has failed.
func watch(t testing.TB, ctx context.Context, cancel context.CancelFunc, m *vmm.Machine, log *syncBuffer) *VM {
	t.Cleanup(func() {
		m.Kill()
		x := m.Wait()
		cancel()
		if t.Failed() {
			t.Logf("the machine ended: %s\nstderr: %s\nlog: %s\nconsole:\n%s", x.Message, x.Stderr, log, x.Console)
		}
	})
	return &VM{Machine: m, t: t, ctx: ctx, log: log}
}

// Config is what Boot starts.
func Config(t testing.TB, o Options) vmm.Config {
	t.Helper()
	host, err := vmm.Probe(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if o.Engine != "" {
		host.Engine = o.Engine
	}
	if o.Kernel == "" {
		o.Kernel = Kernel(t)
	}
	if o.Initrd == "" {
		if o.InitFile == "" {
			o.InitFile = Build(t, o.Init)
		}
		o.Initrd = filepath.Join(t.TempDir(), "initrd.cpio")
		if err := initrd.Write(t.Context(), o.Initrd, o.InitFile); err != nil {
			t.Fatal(err)
		}
	}
	cmdline, err := kernel.CommandLine(kernel.Params{Verbose: o.Verbose})
	if err != nil {
		t.Fatal(err)
	}
	if host.Engine == vmm.TCG {
		cmdline += " " + kernel.Emulated(kernel.Emulation{CPUs: max(1, o.VCPUs), TSCKHz: host.TSCKHz})
	}
	if o.Memory == 0 {
		o.Memory = 256 << 20
	}
	return vmm.Config{
		Name: "kcradle-test", Engine: host.Engine, QEMU: host.QEMU.Path,
		Kernel: o.Kernel, Initrd: o.Initrd, CommandLine: strings.TrimSpace(cmdline + " " + o.CommandLine),
		VCPUs: o.VCPUs, Memory: o.Memory, Drives: o.Drives, Wire: o.Wire, Console: o.Console, RunAs: o.RunAs,
		MemoryFile: o.MemoryFile, Restore: o.Restore, Transferable: o.Transfer,
	}
}

// Kernel unpacks the tree's kernel and returns its path.
func Kernel(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vmlinux")
	if err := kernel.Unpack(t.Context(), os.DirFS(filepath.Join(root(t), "kernel")), path); err != nil {
		t.Fatal(err)
	}
	return path
}

// Build builds a Go package as a static program for /init and returns its path.
func Build(t testing.TB, pkg string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "init")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s", "-o", path, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, out)
	}
	return path
}

// root is the module's directory.
func root(t testing.TB) string {
	t.Helper()
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}").Output()
	if err != nil {
		t.Fatalf("go list -m: %v", err)
	}
	return strings.TrimSpace(string(out))
}

// Context ends with the machine's deadline.
func (vm *VM) Context() context.Context { return vm.ctx }

// Dial is Machine.Dial for a test.
func (vm *VM) Dial(port uint32) net.Conn {
	vm.t.Helper()
	c, err := vm.Machine.Dial(vm.ctx, port)
	if err != nil {
		vm.t.Fatal(err)
	}
	return c
}

// syncBuffer is a log that is written while it is read.
type syncBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
