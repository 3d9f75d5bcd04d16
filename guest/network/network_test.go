package network

import (
	"io"
	"net"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"

	"github.com/kcradle/kcradle/guest/sandboxtest"
	"github.com/kcradle/kcradle/spec"
)

func TestMain(m *testing.M) { sandboxtest.Inside(m) }

func placed() *spec.Network {
	return &spec.Network{
		Interfaces: []spec.Interface{{
			Name: "eth0", MAC: "02:00:00:00:00:07", MTU: 1400,
			Addresses: []string{"10.0.2.15/24", "fd00::15/64"}, Gateways: []string{"10.0.2.2", "fd00::2"},
		}},
		DNS: []string{"10.0.2.3"}, DNSSearch: []string{"example.org"}, HostIP: "10.0.2.2",
	}
}

func TestUp(t *testing.T) {
	sandboxtest.NeedInside(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	mac, _ := net.ParseMAC("02:00:00:00:00:07")
	// A pair, so that there is a carrier.
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "virt7", HardwareAddr: mac}, PeerName: "peer"}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(veth)
	if err := Loopback(); err != nil {
		t.Fatal(err)
	}
	n := placed()
	if _, err := Up(n); err != nil {
		t.Fatal(err)
	}
	checkUp(t)
	n.Interfaces[0].MAC = "02:00:00:00:00:99"
	if _, err := Up(n); err == nil || !strings.Contains(err.Error(), "no interface with the MAC address 02:00:00:00:00:99") {
		t.Errorf("unknown MAC address, and two that it could be: %v", err)
	}
}

// TestDown takes a wire down and up again, as a rehearsal and the pod behind it do, with another MAC address the second time.
func TestDown(t *testing.T) {
	sandboxtest.NeedInside(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "virt8"}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(tap); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(tap)
	if err := Loopback(); err != nil {
		t.Fatal(err)
	}
	n := placed()
	w, err := Up(n)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Down(); err != nil {
		t.Fatal(err)
	}
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL); err != nil || len(addrs) != 0 || link.Attrs().Flags&net.FlagUp != 0 {
		t.Errorf("down, and still %v, %v, %v", addrs, link.Attrs().Flags, err)
	}
	n.Interfaces[0].MAC = "02:00:00:00:00:99"
	if _, err := Up(n); err != nil {
		t.Fatal(err)
	}
	checkUp(t)
	if link, err = netlink.LinkByName("eth0"); err != nil || link.Attrs().HardwareAddr.String() != n.Interfaces[0].MAC {
		t.Errorf("MAC address %v, %v", link.Attrs().HardwareAddr, err)
	}
}

// TestChange makes another wire of one that is up: none, another, and the first again.
func TestChange(t *testing.T) {
	sandboxtest.NeedInside(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	mac, _ := net.ParseMAC("02:00:00:00:00:07")
	veth := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "virt7", HardwareAddr: mac}, PeerName: "peer"}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	defer netlink.LinkDel(veth)
	w, err := Up(placed())
	if err != nil {
		t.Fatal(err)
	}
	state := func() (out []string) {
		t.Helper()
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			t.Fatal(err)
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_V4)
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			out = append(out, a.IPNet.String())
		}
		routes, err := netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{LinkIndex: link.Attrs().Index}, netlink.RT_FILTER_OIF)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range routes {
			if r.Gw != nil {
				out = append(out, "by "+r.Gw.String())
			}
		}
		return append(out, link.Attrs().HardwareAddr.String())
	}
	other := placed()
	other.Interfaces[0].MAC, other.Interfaces[0].Addresses, other.Interfaces[0].Gateways = "02:00:00:00:00:08", []string{"172.18.0.2/16"}, nil
	routed := placed()
	routed.Interfaces[0].MAC, routed.Interfaces[0].Addresses, routed.Interfaces[0].Gateways = "02:00:00:00:00:08", []string{"172.18.0.2/16"}, []string{"172.18.0.1"}
	for _, step := range []struct {
		name string
		to   *spec.Network
		want []string
	}{
		{"none", &spec.Network{}, []string{"02:00:00:00:00:07"}},
		{"another", other, []string{"172.18.0.2/16", "02:00:00:00:00:08"}},
		{"the same with a route", routed, []string{"172.18.0.2/16", "by 172.18.0.1", "02:00:00:00:00:08"}},
		{"the same without", other, []string{"172.18.0.2/16", "02:00:00:00:00:08"}},
		{"the first", placed(), []string{"10.0.2.15/24", "by 10.0.2.2", "02:00:00:00:00:07"}},
	} {
		if err := w.Change(step.to); err != nil {
			t.Fatalf("%s: %v", step.name, err)
		}
		if d := cmp.Diff(step.want, state()); d != "" {
			t.Errorf("%s (-want +got):\n%s", step.name, d)
		}
	}
	checkUp(t)
}

// TestForward asks the pod's own resolver, whose server changes.
func TestForward(t *testing.T) {
	sandboxtest.NeedInside(t)
	if err := Loopback(); err != nil {
		t.Fatal(err)
	}
	serve := func(at, answer string) {
		udp, err := net.ListenPacket("udp", at+":53")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { udp.Close() })
		go func() {
			buf := make([]byte, 512)
			for {
				n, from, err := udp.ReadFrom(buf)
				if err != nil {
					return
				}
				udp.WriteTo(append([]byte("xx not this one"), buf[:0]...), from) // to another question
				udp.WriteTo([]byte(string(buf[:n])+answer), from)
			}
		}()
		tcp, err := net.Listen("tcp", at+":53")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { tcp.Close() })
		go func() {
			for {
				c, err := tcp.Accept()
				if err != nil {
					return
				}
				b, _ := io.ReadAll(c)
				c.Write([]byte(string(b) + answer))
				c.Close()
			}
		}()
	}
	serve("127.0.0.2", "2")
	serve("127.0.0.3", "3")
	w, err := Up(&spec.Network{Resolver: true, DNS: []string{"127.0.0.2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Down()
	ask := func(network string) string {
		t.Helper()
		c, err := net.Dial(network, spec.ResolverAddress+":53")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(20 * time.Second))
		c.Write([]byte("question over " + network))
		if tc, ok := c.(*net.TCPConn); ok {
			tc.CloseWrite()
		}
		b := make([]byte, 512)
		n, _ := c.Read(b)
		return string(b[:n])
	}
	for server, want := range map[string]string{"127.0.0.2": "2", "127.0.0.3": "3"} {
		if err := w.Change(&spec.Network{Resolver: true, DNS: []string{server}}); err != nil {
			t.Fatal(err)
		}
		for _, network := range []string{"udp", "tcp"} {
			if got := ask(network); got != "question over "+network+want {
				t.Errorf("%s by %s: got %q", network, server, got)
			}
		}
	}
}

// checkUp looks for what placed asks for.
func checkUp(t *testing.T) {
	t.Helper()
	link, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	if link.Attrs().MTU != 1400 || link.Attrs().Flags&net.FlagUp == 0 {
		t.Errorf("link: %+v", link.Attrs())
	}
	addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, a := range addrs {
		if !a.IP.IsLinkLocalUnicast() {
			got = append(got, a.IPNet.String())
		}
	}
	if d := cmp.Diff([]string{"10.0.2.15/24", "fd00::15/64"}, got); d != "" {
		t.Errorf("addresses (-want +got):\n%s", d)
	}
	for family, want := range map[int]string{netlink.FAMILY_V4: "10.0.2.2", netlink.FAMILY_V6: "fd00::2"} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{LinkIndex: link.Attrs().Index}, netlink.RT_FILTER_OIF)
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for _, r := range routes {
			found = found || r.Gw.String() == want
		}
		if !found {
			t.Errorf("no route by %s: %v", want, routes)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil || lo.Attrs().Flags&net.FlagUp == 0 {
		t.Errorf("loopback: %v, %v", lo, err)
	}
}

func TestHosts(t *testing.T) {
	const head = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::\tip6-localnet\nff00::\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n"
	for _, tt := range []struct {
		name string
		pod  spec.Pod
		net  *spec.Network
		want string
		err  string
	}{
		{"plain", spec.Pod{Name: "web"}, placed(), head + "10.0.2.2\thost.docker.internal\n10.0.2.15\tweb\nfd00::15\tweb\n", ""},
		{"none", spec.Pod{Name: "web"}, &spec.Network{}, head, ""},
		{"domain and extra", spec.Pod{Name: "web", Hostname: "h", Domain: "d.org", ExtraHosts: []spec.Host{
			{Name: "db", Address: "192.0.2.1"}, {Name: "host.docker.internal", Address: "host-gateway"},
		}}, placed(), head + "192.0.2.1\tdb\n10.0.2.2\thost.docker.internal\n10.0.2.15\th.d.org h\nfd00::15\th.d.org h\n", ""},
		{"no gateway", spec.Pod{Name: "web", ExtraHosts: []spec.Host{{Name: "h", Address: "host-gateway"}}}, &spec.Network{}, "", "no address for the host"},
		{"two lines", spec.Pod{Name: "web", ExtraHosts: []spec.Host{{Name: "h\n1.2.3.4 evil", Address: "1.1.1.1"}}}, placed(), "", "extra host"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Hosts(&tt.pod, tt.net)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("hosts (-want +got):\n%s", d)
			}
		})
	}
}

func TestResolvConf(t *testing.T) {
	for _, tt := range []struct {
		name string
		pod  spec.Pod
		want string
	}{
		{"the host's", spec.Pod{}, "nameserver 10.0.2.3\nsearch example.org\n"},
		{"the owner's", spec.Pod{DNS: []string{"1.1.1.1", "2606:4700::1111"}, DNSSearch: []string{"a", "b"}, DNSOptions: []string{"ndots:2"}},
			"nameserver 1.1.1.1\nnameserver 2606:4700::1111\nsearch a b\noptions ndots:2\n"},
		{"no search", spec.Pod{DNSSearch: []string{"."}}, "nameserver 10.0.2.3\n"},
	} {
		if got, err := ResolvConf(&tt.pod, placed()); err != nil || got != tt.want {
			t.Errorf("%s: got %q, %v, want %q", tt.name, got, err, tt.want)
		}
	}
	if _, err := ResolvConf(&spec.Pod{DNS: []string{"x\noptions evil"}}, placed()); err == nil {
		t.Error("a nameserver that is no address was taken")
	}
}
