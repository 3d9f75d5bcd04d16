package network

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/kcradle/kcradle/initrd"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/kernel"
)

// qmp is just enough of QEMU's monitor to ask one thing.
type qmp struct {
	conn net.Conn
	r    *bufio.Reader
}

func (q *qmp) ask(t *testing.T, command string, arguments any) json.RawMessage {
	t.Helper()
	if err := json.NewEncoder(q.conn).Encode(map[string]any{"execute": command, "arguments": arguments}); err != nil {
		t.Fatal(err)
	}
	for {
		line, err := q.r.ReadBytes('\n')
		if err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		var answer struct {
			Return json.RawMessage `json:"return"`
			Error  json.RawMessage `json:"error"`
		}
		if err := json.Unmarshal(line, &answer); err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		switch {
		case answer.Error != nil:
			t.Fatalf("%s: %s", command, answer.Error)
		case answer.Return != nil:
			return answer.Return
		}
	}
}

// startQEMU starts a stopped machine with this wire and returns its monitor, and a function that ends it.
func startQEMU(t *testing.T, w Wire) (*qmp, func()) {
	t.Helper()
	qemu := need.Command(t, "qemu-system-x86_64", "apt-get install qemu-system-x86")
	ours, theirs, err := socketPair()
	if err != nil {
		t.Fatal(err)
	}
	var stderr strings.Builder
	cmd := exec.Command(qemu,
		"-M", "microvm,acpi=off", "-accel", "tcg", "-m", "64", "-nodefaults", "-no-user-config", "-nographic", "-S",
		"-chardev", "socket,id=qmp,fd=3", "-mon", "chardev=qmp,mode=control",
		"-netdev", w.Netdev("net0", 4),
		"-device", fmt.Sprintf("virtio-net-device,netdev=net0,mac=%s,host_mtu=%d", w.Guest().MAC, w.Guest().MTU))
	cmd.ExtraFiles = []*os.File{theirs, w.File()}
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = theirs.Close()
	if err := w.CloseFile(); err != nil {
		t.Error(err)
	}
	ended := false
	end := func() {
		if !ended {
			ended = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			_ = ours.Close()
		}
	}
	t.Cleanup(func() {
		end()
		if t.Failed() {
			t.Logf("QEMU says: %s", stderr.String())
		}
	})
	_ = ours.SetDeadline(time.Now().Add(30 * time.Second))
	q := &qmp{ours, bufio.NewReader(ours)}
	if _, err := q.r.ReadBytes('\n'); err != nil { // the greeting
		t.Fatalf("QEMU did not start: %v", err)
	}
	q.ask(t, "qmp_capabilities", struct{}{})
	return q, end
}

// QEMU takes the wire of the stack by its descriptor, brings the link up, and its end is noticed.
func TestQEMUStream(t *testing.T) {
	w, err := Open(t.Context(), Config{Mode: User, MTU: MaxMTU, Ports: []Port{
		{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), ContainerPort: 80},
	}}, testLog(t))
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	q, end := startQEMU(t, w)
	var filters []struct {
		MainMac string `json:"main-mac"`
	}
	if err := json.Unmarshal(q.ask(t, "query-rx-filter", map[string]any{}), &filters); err != nil {
		t.Fatal(err)
	}
	if len(filters) != 1 || filters[0].MainMac != w.Guest().MAC.String() {
		t.Errorf("the device is %+v, want the MAC address %s", filters, w.Guest().MAC)
	}
	info := string(q.ask(t, "human-monitor-command", map[string]any{"command-line": "info network"}))
	if !strings.Contains(info, "net0") || !strings.Contains(info, "type=stream") {
		t.Errorf("info network: %s", info)
	}
	end()
	select {
	case <-w.(*user).reader:
	case <-time.After(10 * time.Second):
		t.Error("the end of QEMU was not noticed")
	}
	c, err := net.Dial("tcp", join(w.Ports()[0].HostIP, w.Ports()[0].HostPort))
	if err == nil { // else the reset came even earlier
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		_, err = c.Read(make([]byte, 1))
		_ = c.Close()
	}
	if !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("a client after the end of QEMU: got %v, want a reset", err)
	}
}

func TestQEMUTap(t *testing.T) {
	namespace(t)
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "qemutap0"}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(link)
	w, err := Open(t.Context(), Config{
		Mode: Tap, Device: "qemutap0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.1.2.3/24")},
	}, discard())
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	q, _ := startQEMU(t, w)
	info := string(q.ask(t, "human-monitor-command", map[string]any{"command-line": "info network"}))
	if !strings.Contains(info, "type=tap") {
		t.Errorf("info network: %s", info)
	}
}

// A real machine: our kernel, virtio-net, QEMU's stream. Every byte of both families arrives both ways, with small
// frames and with the largest.
func TestMachine(t *testing.T) {
	qemu := need.Command(t, "qemu-system-x86_64", "apt-get install qemu-system-x86")
	dir := t.TempDir()
	vmlinux, init, ramdisk := filepath.Join(dir, "vmlinux"), filepath.Join(dir, "init"), filepath.Join(dir, "initrd")
	if err := kernel.Unpack(t.Context(), os.DirFS("../kernel"), vmlinux); err != nil {
		t.Fatal(err)
	}
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", init, "./testdata/guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the guest: %v\n%s", err, out)
	}
	if err := initrd.Write(t.Context(), ramdisk, init); err != nil {
		t.Fatal(err)
	}
	words, err := kernel.CommandLine(kernel.Params{})
	if err != nil {
		t.Fatal(err)
	}
	const size = 16 << 20
	for _, mtu := range []int{DefaultMTU, 9000, MaxMTU} {
		t.Run(fmt.Sprintf("mtu %d", mtu), func(t *testing.T) {
			w, err := Open(t.Context(), Config{Mode: User, MTU: mtu}, testLog(t))
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			l := listenHost(t, "tcp", "127.0.0.1:0")
			u := w.(*user)
			words := fmt.Sprintf("%s TEST_MTU=%d TEST_BYTES=%d TEST_ADDR4=%s TEST_ADDR6=%s TEST_HOST4=%s TEST_HOST6=%s", words, mtu, size,
				u.guest.Interfaces[0].Addresses[0], u.guest.Interfaces[0].Addresses[1], join(u.plan.host4, port(l.Addr())), join(u.plan.host6, port(l.Addr())))
			var out strings.Builder
			cmd := exec.Command(qemu,
				"-M", "microvm,acpi=off,x-option-roms=off,isa-serial=off", "-accel", "tcg", "-cpu", "max", "-m", "128",
				"-nodefaults", "-no-user-config", "-nographic", "-no-reboot", "-global", "virtio-mmio.force-legacy=off",
				"-kernel", vmlinux, "-initrd", ramdisk, "-append", words,
				"-chardev", "stdio,id=console", "-device", "virtio-serial-device", "-device", "virtconsole,chardev=console",
				"-netdev", w.Netdev("net0", 3),
				"-device", fmt.Sprintf("virtio-net-device,netdev=net0,mac=%s,host_mtu=%d", w.Guest().MAC, mtu))
			cmd.ExtraFiles = []*os.File{w.File()}
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			defer func() {
				_ = cmd.Process.Kill()
				<-ended
				if t.Failed() {
					t.Logf("the machine says: %s", out.String())
				}
			}()
			if err := w.CloseFile(); err != nil {
				t.Fatal(err)
			}
			_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(2 * time.Minute))
			for _, family := range []string{"IPv4", "IPv6"} {
				for range 3 {
					c, err := l.Accept()
					if err != nil {
						t.Fatal(err)
					}
					_ = c.SetDeadline(time.Now().Add(2 * time.Minute))
					serveMachine(t, c, family, size)
					_ = c.Close()
				}
			}
			last, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			_ = last.Close()
			select {
			case err := <-ended:
				ended <- err
				if err != nil {
					t.Errorf("QEMU: %v", err)
				}
			case <-time.After(30 * time.Second):
				t.Error("the machine does not end")
			}
		})
	}
}

// serveMachine is the host's side of one of the guest's connections.
func serveMachine(t *testing.T, c net.Conn, family string, size int64) {
	t.Helper()
	var what [1]byte
	if _, err := io.ReadFull(c, what[:]); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	switch what[0] {
	case 'u':
		n, err := io.Copy(io.Discard, c)
		if n != size || err != nil {
			t.Errorf("%s: the guest's %d bytes: got %d, %v", family, size, n, err)
		}
	case 'd':
		if _, err := io.Copy(c, stream(3, size)); err != nil {
			t.Errorf("%s: send: %v", family, err)
		}
		if err := c.(*net.TCPConn).CloseWrite(); err != nil {
			t.Error(err)
		}
		if _, err := io.Copy(io.Discard, c); err != nil { // until the guest has read everything
			t.Errorf("%s: the guest's end: %v", family, err)
		}
	case 'e':
		size /= 8 // with the largest frames the guest's delayed acknowledgements make this slow
		want := sum(t, stream(3, size))
		sent := make(chan error, 1)
		go func() {
			_, err := io.Copy(c, stream(3, size))
			sent <- errors.Join(err, c.(*net.TCPConn).CloseWrite())
		}()
		if sum(t, c) != want {
			t.Errorf("%s: what came back is not what was sent", family)
		}
		if err := <-sent; err != nil {
			t.Errorf("%s: send: %v", family, err)
		}
	}
	d := time.Since(start)
	t.Logf("%s %c: %d MiB in %v, %.2f Gbit/s", family, what[0], size>>20, d.Round(time.Millisecond), float64(size)*8/d.Seconds()/1e9)
}
