package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
)

// The tests run in a network namespace of their own, which plays the host: its loopback, an "outside" device with
// addresses of its own, an unreachable network. A guest is another namespace whose tap device is bridged to the wire,
// so a real kernel's TCP/IP speaks to the stack.
const (
	namespaceEnv = "NETWORK_TEST_NAMESPACE"

	outside4 = "198.51.100.10"
	outside6 = "2001:db8:1::10"
	nowhere4 = "203.0.113.9" // the host has an unreachable route to it
	nowhere6 = "2001:db8:dead::9"
)

func TestMain(m *testing.M) {
	if os.Getenv(namespaceEnv) == "" && os.Geteuid() == 0 {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), namespaceEnv+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		err := cmd.Run()
		var exit *exec.ExitError
		switch {
		case err == nil:
			os.Exit(0)
		case errors.As(err, &exit):
			os.Exit(max(1, exit.ExitCode()))
		}
		fmt.Fprintln(os.Stderr, "network tests: make a namespace:", err)
		os.Exit(1)
	}
	if os.Getenv(namespaceEnv) == "1" {
		if err := makeHost(); err != nil {
			fmt.Fprintln(os.Stderr, "network tests: prepare the namespace:", err)
			os.Exit(1)
		}
		os.Setenv(namespaceEnv, "2") // fuzz workers find it ready
	}
	os.Exit(m.Run())
}

// makeHost sets up the namespace that plays the host.
func makeHost() error {
	if err := linkUp("lo"); err != nil {
		return err
	}
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "outside0"}, PeerName: "outside1"}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("add outside0: %w", err)
	}
	if err := addAddress("outside0", outside4+"/24"); err != nil {
		return err
	}
	if err := addAddress("outside0", outside6+"/64"); err != nil {
		return err
	}
	if err := errors.Join(linkUp("outside0"), linkUp("outside1")); err != nil {
		return err
	}
	for _, s := range []string{nowhere4 + "/24", nowhere6 + "/64"} {
		p := netip.MustParsePrefix(s).Masked()
		dst := &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
		if err := netlink.RouteAdd(&netlink.Route{Dst: dst, Type: unix.RTN_UNREACHABLE}); err != nil {
			return fmt.Errorf("add route to %s: %w", s, err)
		}
	}
	return nil
}

func linkUp(name string) error {
	l, err := netlink.LinkByName(name)
	if err == nil {
		err = netlink.LinkSetUp(l)
	}
	if err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func addAddress(name, prefix string) error {
	l, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	a, err := netlink.ParseAddr(prefix)
	if err != nil {
		return err
	}
	a.Flags = unix.IFA_F_NODAD
	if err := netlink.AddrAdd(l, a); err != nil {
		return fmt.Errorf("add %s to %s: %w", prefix, name, err)
	}
	return nil
}

// namespace asks for the world that TestMain makes.
func namespace(t testing.TB) {
	t.Helper()
	need.Root(t)
	need.File(t, tunDevice, "modprobe tun")
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// testLog writes what the wire says to the test's output.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", strings.TrimSpace(string(b)))
	return len(b), nil
}

// openWire opens a user wire that ends with the test.
func openWire(t testing.TB, c Config) *user {
	t.Helper()
	c.Mode = User
	w, err := Open(context.Background(), c, discard())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := w.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return w.(*user)
}

// guest is a network namespace at the other end of a wire.
type guest struct {
	t     testing.TB
	ns    netns.NsHandle
	taps  sync.Map // by tag, *os.File
	conn  net.Conn
	plan  plan
	pumps sync.WaitGroup

	plugged bool
}

// startGuest does what a machine does with its wire.
func startGuest(t testing.TB, u *user) *guest {
	t.Helper()
	g := makeGuest(t, u)
	g.plug()
	return g
}

// makeGuest is a guest whose wire carries nothing before plug.
func makeGuest(t testing.TB, u *user) *guest {
	t.Helper()
	namespace(t)
	g := &guest{t: t, plan: u.plan}
	conn, err := net.FileConn(u.File())
	if err != nil {
		t.Fatal(err)
	}
	g.conn = conn
	if err := u.CloseFile(); err != nil {
		t.Fatal(err)
	}
	ready := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlock: the thread goes with its namespace
		ready <- func() (err error) {
			if g.ns, err = netns.New(); err != nil {
				return fmt.Errorf("make a namespace: %w", err)
			}
			return g.setUp(u.Guest())
		}()
	}()
	if err := <-ready; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		g.taps.Range(func(_, tap any) bool { return tap.(*os.File).Close() == nil })
		_ = g.conn.Close()
		g.pumps.Wait()
		_ = g.ns.Close()
	})
	return g
}

// plug begins to carry frames.
func (g *guest) plug() {
	g.plugged = true
	g.taps.Range(func(tag, tap any) bool {
		g.pumps.Go(func() { g.fromTap(tag.(int), tap.(*os.File)) })
		return true
	})
	g.pumps.Go(func() {
		_ = readFrames(g.conn, func(b []byte) {
			b, tag := untag(b)
			if tap, ok := g.taps.Load(tag); ok {
				_, _ = tap.(*os.File).Write(b)
			}
		})
	})
}

// setUp configures the namespace of the calling thread as a guest's init would.
func (g *guest) setUp(spec Guest) error {
	if err := linkUp("lo"); err != nil {
		return err
	}
	for _, i := range spec.Interfaces {
		if err := g.setUpInterface(i); err != nil {
			return err
		}
	}
	return nil
}

// makeTap makes a device whose frames have a tag on the wire; the kernel that runs this test may know no VLAN.
func (g *guest) makeTap(name string, tag int) error {
	fd, err := unix.Open(tunDevice, unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
		return fmt.Errorf("make %s: %w", name, err)
	}
	t := os.NewFile(uintptr(fd), name)
	g.taps.Store(tag, t)
	if g.plugged {
		g.pumps.Go(func() { g.fromTap(tag, t) })
	}
	return nil
}

// setUpInterface sets one up, as the guest's init does.
func (g *guest) setUpInterface(i Interface) error {
	name := fmt.Sprintf("eth%d", i.Tag)
	if err := g.makeTap(name, i.Tag); err != nil {
		return err
	}
	l, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	if err := errors.Join(netlink.LinkSetHardwareAddr(l, i.MAC), netlink.LinkSetMTU(l, i.MTU)); err != nil {
		return fmt.Errorf("configure %s: %w", name, err)
	}
	for _, a := range i.Addresses {
		if err := addAddress(name, a.String()); err != nil {
			return err
		}
	}
	if err := linkUp(name); err != nil {
		return err
	}
	for _, gw := range i.Gateways {
		if err := netlink.RouteAdd(&netlink.Route{Gw: gw.AsSlice(), LinkIndex: l.Attrs().Index}); err != nil {
			return fmt.Errorf("add route by %s: %w", gw, err)
		}
	}
	return nil
}

func (g *guest) fromTap(tag int, tap *os.File) {
	l := newLink(g.conn, make([]byte, 6), make([]byte, 6), maxFrame, tag)
	buf := make([]byte, maxFrame)
	for {
		n, err := tap.Read(buf)
		if err != nil {
			return
		}
		l.writeFrame(buf[:n])
	}
}

// do runs f on a thread inside the guest.
func (g *guest) do(f func()) {
	g.t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		err := netns.Set(g.ns)
		if err == nil {
			f()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		g.t.Errorf("enter the guest: %v", err)
	}
}

// dial connects from the guest. A single literal address is dialed on the calling thread.
func (g *guest) dial(network, address string) (c net.Conn, err error) {
	g.do(func() { c, err = (&net.Dialer{Timeout: 20 * time.Second}).Dial(network, address) })
	return c, err
}

func (g *guest) mustDial(network, address string) net.Conn {
	g.t.Helper()
	c, err := g.dial(network, address)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = c.Close() })
	return c
}

// listen listens in the guest.
func (g *guest) listen(network, address string) net.Listener {
	g.t.Helper()
	var l net.Listener
	var err error
	g.do(func() { l, err = net.Listen(network, address) })
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = l.Close() })
	return l
}

func (g *guest) listenPacket(network, address string) net.PacketConn {
	g.t.Helper()
	var c net.PacketConn
	var err error
	g.do(func() { c, err = net.ListenPacket(network, address) })
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = c.Close() })
	return c
}

// run runs a program in the guest and returns what it says.
func (g *guest) run(name string, args ...string) (out string, err error) {
	g.do(func() {
		var b []byte
		b, err = exec.Command(name, args...).CombinedOutput()
		out = string(b)
	})
	return out, err
}

// listenHost listens in the namespace that plays the host.
func listenHost(t testing.TB, network, address string) net.Listener {
	t.Helper()
	l, err := net.Listen(network, address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func port(a net.Addr) uint16 {
	switch a := a.(type) {
	case *net.TCPAddr:
		return uint16(a.Port)
	case *net.UDPAddr:
		return uint16(a.Port)
	}
	panic("network: internal error: address of another kind")
}

func join(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }
