package vmm

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
)

// The tests here start QEMU on kernels of a few bytes, to see processes, files and ends. Linux guests are booted in
// internal/vmtest.

var (
	codeReset = []byte{0x0F, 0x01, 0x1D, 0, 0, 0, 0, 0xCC} // lidt [0]; int3: without handlers, the processor shuts down
	codeHang  = []byte{0xFA, 0xF4, 0xEB, 0xFC}             // cli; again: hlt; jmp again
)

// tinyKernel writes an ELF file with a PVH entry (XEN_ELFNOTE_PHYS32_ENTRY of xen/elfnote.h) that runs code in 32-bit
// mode.
func tinyKernel(t testing.TB, code []byte) string {
	t.Helper()
	const at = 0x100000
	var b bytes.Buffer
	put := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) }
	const headers, note = 64 + 2*56, 12 + 4 + 8
	b.Write([]byte{0x7F, 'E', 'L', 'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0})
	put([]uint16{2, 62})                      // executable, x86-64
	put(uint32(1))                            // version
	put([]uint64{at + headers + note, 64, 0}) // entry, program headers, section headers
	put(uint32(0))                            // flags
	put([]uint16{64, 56, 2, 64, 0, 0})        // sizes
	put([]uint32{1, 7})                       // PT_LOAD, rwx
	put([]uint64{0, at, at})                  // offset, addresses
	put([]uint64{4096, 4096, 4096})           // sizes, alignment
	put([]uint32{4, 4})                       // PT_NOTE, r
	put([]uint64{headers, at + headers, at + headers})
	put([]uint64{note, note, 4})
	put([]uint32{4, 8, 18})
	b.WriteString("Xen\x00")
	put(uint64(at + headers + note))
	b.Write(code)
	b.Write(make([]byte, 4096-b.Len()))
	path := filepath.Join(t.TempDir(), "kernel")
	if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func qemu(t testing.TB) string {
	return need.Command(t, QEMUProgram, "apt-get install qemu-system-x86")
}

func tinyConfig(t testing.TB, code []byte) Config {
	return Config{Engine: TCG, QEMU: qemu(t), Kernel: tinyKernel(t, code), Memory: 64 << 20}
}

func start(t testing.TB, c Config) *Machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	m, err := Start(ctx, c, slog.New(slog.DiscardHandler))
	if err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		m.Kill()
		m.Wait()
		cancel()
	})
	return m
}

func TestGuestReset(t *testing.T) {
	x := start(t, tinyConfig(t, codeReset)).Wait()
	if x.Reason != GuestReset || x.Err() != nil {
		t.Errorf("got %+v, want %s", x, GuestReset)
	}
}

func TestStatusAndKill(t *testing.T) {
	m := start(t, tinyConfig(t, codeHang))
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if s, err := m.Status(ctx); s != "running" || err != nil {
		t.Errorf("status: got %q and %v", s, err)
	}
	m.Kill()
	x := m.Wait()
	if x.Reason != Killed || x.Signal != syscall.SIGKILL || x.Err() == nil {
		t.Errorf("got %+v, want %s", x, Killed)
	}
	if _, err := m.Status(ctx); err == nil {
		t.Error("a machine that has ended has a status")
	}
	if _, err := m.Dial(ctx, 1); err == nil {
		t.Error("a machine that has ended can be dialed")
	}
	m.Kill() // harmless
}

func TestKilledBySomebodyElse(t *testing.T) {
	for sig, want := range map[syscall.Signal]string{
		syscall.SIGKILL: "SIGKILL",
		syscall.SIGSEGV: "segmentation fault",
		syscall.SIGTERM: "asked to end",
	} {
		t.Run(sig.String(), func(t *testing.T) {
			m := start(t, tinyConfig(t, codeHang))
			if _, err := m.QMP(t.Context()); err != nil {
				t.Fatal(err)
			}
			// A dial that waits is told, too.
			dialed := make(chan error, 1)
			go func() {
				_, err := m.Dial(t.Context(), 1)
				dialed <- err
			}()
			if err := syscall.Kill(m.PID(), sig); err != nil {
				t.Fatal(err)
			}
			x := m.Wait()
			if x.Reason != Signalled || !strings.Contains(x.Message, want) || x.Err() == nil {
				t.Errorf("got %+v, want %s with %q", x, Signalled, want)
			}
			var e *ExitError
			if err := <-dialed; !errors.As(err, &e) || e.Exit.Reason != Signalled {
				t.Errorf("dial: got %v, want the machine's end", err)
			}
		})
	}
}

func TestContextEndsMachine(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	m, err := Start(ctx, tinyConfig(t, codeHang), nil)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if x := m.Wait(); x.Reason != Killed {
		t.Errorf("got %+v, want %s", x, Killed)
	}
}

func TestStartFails(t *testing.T) {
	garbage := filepath.Join(t.TempDir(), "garbage")
	if err := os.WriteFile(garbage, bytes.Repeat([]byte("no kernel "), 1000), 0o644); err != nil {
		t.Fatal(err)
	}
	short := filepath.Join(t.TempDir(), "short")
	if err := os.WriteFile(short, make([]byte, 4096), 0o644); err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		change func(*Config)
		want   string // in the error of Start
		late   string // in the message of Exit
	}{
		{"no QEMU", func(c *Config) { c.QEMU = "/nonexistent/qemu" }, "apt-get install qemu-system-x86", ""},
		{"no kernel", func(c *Config) { c.Kernel = "/nonexistent/kernel" }, "/nonexistent/kernel: no such file", ""},
		{"kernel is a directory", func(c *Config) { c.Kernel = t.TempDir() }, "not a regular file", ""},
		{"no initrd", func(c *Config) { c.Initrd = "/nonexistent/initrd" }, "/nonexistent/initrd: no such file", ""},
		{"no drive", func(c *Config) { c.Drives = []Drive{{Serial: "x", Path: "/nonexistent/drive"}} }, "drive x: open /nonexistent/drive", ""},
		{"cut layer", func(c *Config) {
			c.Drives = []Drive{{Serial: "x", ReadOnly: true, Extents: []Extent{{short, 4096}, {short, 4097}}}}
		}, "it was cut", ""},
		{"console", func(c *Config) { c.Console = filepath.Join(t.TempDir(), "absent", "log") }, "console log", ""},
		{"garbage kernel", func(c *Config) { c.Kernel = garbage }, "", "QEMU did not start"},
		{"more memory than there is", func(c *Config) { c.Memory = 1 << 50 }, "", "memory"},
	}
	if _, err := os.Stat("/dev/vhost-vsock"); errors.Is(err, fs.ErrNotExist) {
		tests = append(tests, struct {
			name   string
			change func(*Config)
			want   string
			late   string
		}{"no vsock", func(c *Config) { c.CID = 7 }, "modprobe vhost_vsock", ""})
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := tinyConfig(t, codeHang)
			test.change(&c)
			m, err := Start(t.Context(), c, nil)
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Errorf("got %v, want an error with %q", err, test.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			x := m.Wait()
			if x.Reason != QEMUFailure || !strings.Contains(x.Message, test.late) || x.Code == 0 {
				t.Errorf("got %+v, want %s with %q", x, QEMUFailure, test.late)
			}
		})
	}
}

// openFiles counts this process's descriptors.
func openFiles(t *testing.T) int {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func TestNothingIsLeft(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir()) // others use the machine's
	c := tinyConfig(t, codeReset)
	c.Console = filepath.Join(t.TempDir(), "console.log")
	start(t, c).Wait() // what the runtime opens once
	before := openFiles(t)
	for range 3 {
		start(t, c).Wait()
		bad := c
		bad.Drives = []Drive{{Serial: "x", Path: "/nonexistent"}}
		if _, err := Start(t.Context(), bad, nil); err == nil {
			t.Fatal("a missing drive was accepted")
		}
	}
	if after := openFiles(t); after > before {
		t.Errorf("%d descriptors were open before, %d are after", before, after)
	}
	left, err := filepath.Glob(filepath.Join(os.TempDir(), "kcradle-*", "s"))
	if err != nil || len(left) > 0 {
		t.Errorf("sockets left behind: %v (%v)", left, err)
	}
}

// Every kind of device at once, as an unprivileged user, with files that this user has no rights on.
func TestUnprivileged(t *testing.T) {
	need.Root(t)
	c := tinyConfig(t, codeHang)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	secret := func(name string, size int) string {
		b := make([]byte, size)
		_, _ = rand.Read(b)
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	kernel, err := os.ReadFile(c.Kernel)
	if err != nil {
		t.Fatal(err)
	}
	c.Kernel = filepath.Join(dir, "kernel")
	if err := os.WriteFile(c.Kernel, kernel, 0o600); err != nil {
		t.Fatal(err)
	}
	c.Initrd = secret("initrd", 5000)
	c.Console = filepath.Join(dir, "console.log")
	user, err := Unprivileged(TCG)
	if err != nil {
		t.Fatal(err)
	}
	c.RunAs = user
	wire, peer, err := wirePair()
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	defer wire.Close()
	c.Wire = &Wire{Kind: WireStream, File: wire, MAC: "52:54:00:12:34:56", MTU: 1500}
	c.Drives = []Drive{
		{Serial: "scratch", Path: secret("scratch", 1<<20)},
		{Serial: "layers", ReadOnly: true, Extents: []Extent{{secret("a", 8192), 8192}, {secret("b", 5000), 5000}}},
	}
	for i := range 3 { // to all 8 places
		c.Drives = append(c.Drives, Drive{Serial: "volume" + strconv.Itoa(i), Path: secret("v"+strconv.Itoa(i), 4096)})
	}
	m := start(t, c)
	client, err := m.QMP(t.Context())
	if err != nil {
		t.Fatalf("%v: %+v", err, m.Wait())
	}
	var blocks []struct {
		Inserted struct {
			Image struct {
				VirtualSize int64 `json:"virtual-size"`
			} `json:"image"`
			Driver   string `json:"drv"`
			ReadOnly bool   `json:"ro"`
		} `json:"inserted"`
	}
	if err := client.Execute(t.Context(), "query-block", nil, &blocks); err != nil {
		t.Fatal(err)
	}
	if len(blocks) != len(c.Drives) {
		t.Fatalf("%d drives, want %d", len(blocks), len(c.Drives))
	}
	if b := blocks[1].Inserted; b.Driver != "vmdk" || !b.ReadOnly || b.Image.VirtualSize != 16384 {
		t.Errorf("layers: got %+v, want a read-only vmdk of 16384 bytes", b)
	}
	status, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(m.PID()), "status"))
	if err != nil {
		t.Fatal(err)
	}
	id := strconv.Itoa(int(user.UID))
	for _, want := range []string{"Uid:\t" + id + "\t" + id, "Groups:\t \n", "Seccomp:\t2", "NoNewPrivs:\t1"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("QEMU's status lacks %q:\n%s", want, status)
		}
	}
	resident, err := residentSize(m.PID())
	if err != nil || resident < 1<<20 || resident > 1<<30 {
		t.Errorf("resident size: %d, %v", resident, err)
	}
}

func wirePair() (*os.File, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "wire"), os.NewFile(uintptr(fds[1]), "peer"), nil
}

// The host's end of the channel is reachable as soon as Start returns, and only through the machine.
func TestChannelSocketHasNoName(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	f, address, err := listen()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer address.Close()
	l, err := net.FileListener(f)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := address.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := l.Accept(); err != nil {
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(os.TempDir(), "kcradle-*", "s"))
	if err != nil || len(left) > 0 {
		t.Errorf("the socket still has a name: %v (%v)", left, err)
	}
}

// QEMU must not outlive its supervisor, however that ends.
func TestSupervisorIsKilled(t *testing.T) {
	if os.Getenv("KCRADLE_TEST_SUPERVISOR") != "" {
		m, err := Start(context.Background(), tinyConfig(t, codeHang), nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stdout.WriteString("pid " + strconv.Itoa(m.PID()) + "\n"); err != nil {
			t.Fatal(err)
		}
		m.Wait()
		return
	}
	qemu(t)
	cmd := exec.Command(os.Args[0], "-test.run", "^TestSupervisorIsKilled$")
	cmd.Env = append(os.Environ(), "KCRADLE_TEST_SUPERVISOR=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line := make([]byte, 64)
	n, err := out.Read(line)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(strings.TrimPrefix(string(line[:n]), "pid ")))
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	// A pidfd is readable when its process has ended.
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10000); n != 1 || err != nil {
		_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		t.Fatalf("QEMU (pid %d) outlived its supervisor (%v)", pid, err)
	}
}

// Where KVM is there but emulates instructions, a machine that is told to use it anyway ends with the reason: QEMU by
// itself crashes with some processor models, and keeps the machine for a debugger with others. Where the processor does
// it, the same guest restarts.
func TestEngineFailure(t *testing.T) {
	for _, cpu := range []string{"host", "qemu64"} {
		t.Run(cpu, func(t *testing.T) {
			c := tinyConfig(t, codeReset)
			c.Engine, c.cpu = KVM, cpu
			want := EngineFailure
			if runsInHardware(probeDeadline) == nil {
				want = GuestReset
			}
			m := start(t, c)
			select {
			case <-m.Done():
			case <-time.After(30 * time.Second):
				t.Fatal("the machine hangs")
			}
			x := m.Wait()
			t.Log(x.Message)
			if x.Reason != want {
				t.Errorf("got %+v, want %s", x, want)
			}
		})
	}
}
