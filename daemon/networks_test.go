package daemon

import (
	"encoding/json"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/network/lan"
)

// bare is a daemon with networks alone.
func bare(t *testing.T) *Daemon {
	t.Helper()
	d := &Daemon{cfg: Config{Root: t.TempDir()}, log: slog.New(slog.DiscardHandler), events: newBus(), containers: map[string]*Container{}, names: map[string]string{}}
	if err := os.Mkdir(filepath.Join(d.cfg.Root, networksDir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.readNetworks(); err != nil {
		t.Fatal(err)
	}
	return d
}

func wanted(t testing.TB, body string) *networkRequest {
	t.Helper()
	var q networkRequest
	if err := json.Unmarshal([]byte(body), &q); err != nil {
		t.Fatal(err)
	}
	return &q
}

// add makes a network as a client asks for it.
func add(t *testing.T, d *Daemon, body string) (*hostNetwork, error) {
	t.Helper()
	doc, subnets, _, err := wanted(t, body).doc()
	if err != nil {
		return nil, err
	}
	doc.ID = newID()
	return d.addNetwork(doc, subnets)
}

func TestNetworks(t *testing.T) {
	d := bare(t)
	bridge, err := d.findNetwork("bridge")
	if err != nil || len(bridge.doc.Subnets) != 1 || !strings.HasPrefix(bridge.doc.Subnets[0].Prefix.String(), "172.") {
		t.Fatalf("bridge: got %+v, %v", bridge, err)
	}
	first, err := add(t, d, `{"Name":"first"}`)
	if err != nil {
		t.Fatal(err)
	}
	if first.doc.Subnets[0].Prefix.Overlaps(bridge.doc.Subnets[0].Prefix) {
		t.Errorf("two networks have addresses in common: %v", first.doc.Subnets)
	}
	six, err := add(t, d, `{"Name":"six","EnableIPv6":true,"IPAM":{"Config":[{"Subnet":"10.5.0.0/16","IPRange":"10.5.1.0/24","Gateway":"10.5.9.9","AuxiliaryAddresses":{"x":"10.5.1.1"}}]}}`)
	if err != nil {
		t.Fatal(err)
	}
	if len(six.doc.Subnets) != 2 || !six.doc.Subnets[1].Prefix.Addr().Is6() || six.doc.Subnets[0].Gateway.String() != "10.5.9.9" {
		t.Errorf("got %+v", six.doc.Subnets)
	}
	for body, want := range map[string]string{
		`{"Name":"first"}`: "network with name first already exists",
		`{"Name":"over","IPAM":{"Config":[{"Subnet":"10.5.3.0/24"}]}}`: "Pool overlaps with other one on this address space",
	} {
		if _, err := add(t, d, body); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", body, err, want)
		}
	}
	for _, ref := range []string{"first", first.doc.ID, first.doc.ID[:12]} {
		if n, err := d.findNetwork(ref); err != nil || n != first {
			t.Errorf("find %s: got %v, %v", ref, n, err)
		}
	}
	if _, err := d.findNetwork("nowhere"); dockerapi.Status(err) != 404 {
		t.Errorf("a network that is not there: got %v", err)
	}
	if err := d.removeNetwork(bridge); err == nil || !strings.Contains(err.Error(), "pre-defined") {
		t.Errorf("removal of bridge: got %v", err)
	}
	if err := d.removeNetwork(first); err != nil {
		t.Error(err)
	}
	if err := d.removeNetwork(first); dockerapi.Status(err) != 404 {
		t.Errorf("a second removal: got %v", err)
	}

	// The next daemon finds them; what was half made, or is of a dead machine, it removes.
	half := filepath.Join(d.cfg.Root, networksDir, ".new-1")
	stale := filepath.Join(six.dir, lan.Files(lan.MAC{2, 0, 0, 0, 0, 1})[0])
	if err := os.Mkdir(half, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(stale, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.readNetworks(); err != nil {
		t.Fatal(err)
	}
	d.sweepNetworks()
	for _, path := range []string{half, stale} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is still there", path)
		}
	}
	again, err := d.findNetwork("six")
	if err != nil {
		t.Fatal(err)
	}
	if x, y := mustJSON(t, six.doc), mustJSON(t, again.doc); x != y {
		t.Errorf("after a restart: got %s, want %s", y, x)
	}
	var names []string
	for _, n := range d.allNetworks() {
		names = append(names, n.doc.Name)
	}
	if d := cmp.Diff([]string{"bridge", "none", "six"}, names); d != "" {
		t.Errorf("names (-want +got):\n%s", d)
	}
}

func mustJSON(t *testing.T, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestNetworkRefusals(t *testing.T) {
	for body, want := range map[string]string{
		`{}`:                               "invalid network name: name is empty",
		`{"Name":"bridge"}`:                "operation is not permitted on predefined bridge network",
		`{"Name":"a/b"}`:                   "invalid network name (a/b)",
		`{"Name":"xx","Driver":"overlay"}`: `plugin "overlay" not found`,
		`{"Name":"xx","Driver":"host"}`:    `only one instance of "host" network is allowed`,
		`{"Name":"xx","Scope":"swarm"}`:    "Scope swarm is refused",
		`{"Name":"xx","Ingress":true}`:     "Ingress is refused",
		`{"Name":"xx","ConfigOnly":true}`:  "ConfigOnly",
		`{"Name":"xx","EnableIPv4":false}`: "IPv4 or IPv6 must be enabled",
		`{"Name":"xx","Options":{"com.docker.network.driver.mtu":"9000"}}`:                    "want 68 to 1500",
		`{"Name":"xx","Options":{"com.docker.network.bridge.enable_ip_masquerade":"false"}}`:  "is refused",
		`{"Name":"xx","Options":{"com.docker.network.bridge.gateway_mode_ipv4":"routed"}}`:    "is refused",
		`{"Name":"xx","Options":{"com.docker.network.bridge.host_binding_ipv4":"127.0.0.1"}}`: "name the address with the port",
		`{"Name":"xx","Options":{"odd":"1"}}`:                                                 "option odd is unknown",
		`{"Name":"xx","IPAM":{"Driver":"dhcp"}}`:                                              "IPAM.Driver dhcp is refused",
		`{"Name":"xx","IPAM":{"Config":[{"Subnet":"10.0.0.1/8"}]}}`:                           "it should be 10.0.0.0/8",
		`{"Name":"xx","IPAM":{"Config":[{"Subnet":"nonsense"}]}}`:                             "invalid CIDR block notation",
		`{"Name":"xx","IPAM":{"Config":[{"Subnet":"10.0.0.0/31"}]}}`:                          "no room",
		`{"Name":"xx","IPAM":{"Config":[{"Subnet":"127.0.0.0/8"}]}}`:                          "machines cannot have such addresses",
		`{"Name":"xx","IPAM":{"Config":[{"Subnet":"fd00::/64"}]}}`:                            "IPv6 is not enabled",
		`{"Name":"xx","IPAM":{"Config":[{"Gateway":"10.0.0.1"}]}}`:                            "need a Subnet",
		`{"Name":"xx","IPAM":{"Config":[{"Subnet":"10.0.0.0/8","Gateway":"11.0.0.1"}]}}`:      "parent subnet is 10.0.0.0/8",
		`{"Name":"xx","IPAM":{"Config":[{"Subnet":"10.0.0.0/24","IPRange":"10.0.0.0/8"}]}}`:   "want a part of 10.0.0.0/24",
		`{"Name":"xx","IPAM":{"Config":[{"Subnet":"10.0.0.0/24"},{"Subnet":"10.0.1.0/24"}]}}`: "one subnet of a family",
	} {
		if _, _, _, err := wanted(t, body).doc(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", body, err, want)
		}
	}
	_, _, warning, err := wanted(t, `{"Name":"xx","Options":{"com.docker.network.bridge.name":"br7"}}`).doc()
	if err != nil || !strings.Contains(warning, "com.docker.network.bridge.name") {
		t.Errorf("an option without meaning: got the warning %q, %v", warning, err)
	}
}

func TestChooseAddress(t *testing.T) {
	addr := netip.MustParseAddr
	small := subnet{Prefix: netip.MustParsePrefix("10.0.0.0/28"), Gateway: addr("10.0.0.1"), Taken: map[string]netip.Addr{"x": addr("10.0.0.2")}}
	taken := map[netip.Addr]bool{}
	var got []string
	for {
		a, err := small.choose(netip.Addr{}, taken)
		if err != nil {
			if dockerapi.Status(err) != 403 {
				t.Errorf("a full network: got %v", err)
			}
			break
		}
		taken[a] = true
		got = append(got, a.String())
	}
	// Neither the network, the gateway, what is taken elsewhere nor broadcast.
	want := strings.Fields("10.0.0.3 10.0.0.4 10.0.0.5 10.0.0.6 10.0.0.7 10.0.0.8 10.0.0.9 10.0.0.10 10.0.0.11 10.0.0.12 10.0.0.13 10.0.0.14")
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("addresses (-want +got):\n%s", d)
	}
	if _, err := small.choose(addr("10.0.0.5"), taken); err == nil || !strings.Contains(err.Error(), "already in use") {
		t.Errorf("an address that another has: got %v", err)
	}
	ranged := subnet{Prefix: netip.MustParsePrefix("10.0.0.0/8"), Range: netip.MustParsePrefix("10.1.2.0/24"), Gateway: addr("10.1.2.0")}
	if a, err := ranged.choose(netip.Addr{}, nil); err != nil || a != addr("10.1.2.1") {
		t.Errorf("out of a range: got %v, %v", a, err)
	}
	macs := map[lan.MAC]bool{}
	m := macOf("", addr("172.17.0.2"), macs)
	if m.String() != "02:42:ac:11:00:02" {
		t.Errorf("MAC address: got %v", m)
	}
	macs[m] = true
	if m := macOf("", addr("172.17.0.2"), macs); m.String() != "02:42:ac:11:00:03" {
		t.Errorf("MAC address when that is taken: got %v", m)
	}
}

func TestEndpointWishes(t *testing.T) {
	for body, want := range map[string]string{
		`{}`: "bridge",
		`{"HostConfig":{"NetworkMode":"default"}}`: "bridge",
		`{"HostConfig":{"NetworkMode":"mine"}}`:    "mine",
		`{"HostConfig":{"NetworkMode":"mine"},"NetworkingConfig":{"EndpointsConfig":{"mine":{"Aliases":["a"]},"other":{},"another":{}}}}`: "mine(a) another other",
		`{"NetworkingConfig":{"EndpointsConfig":{"default":{"Aliases":["a"]}}}}`:                                                          "bridge(a)",
		`{"MacAddress":"02:00:00:00:00:07","HostConfig":{"NetworkMode":"mine"}}`:                                                          "mine(02:00:00:00:00:07)",
		`{"MacAddress":"nonsense"}`: "invalid MAC address nonsense",
	} {
		wishes, err := endpointWishes(parse(t, body))
		var words []string
		if err != nil {
			words = []string{err.Error()}
		}
		for _, w := range wishes {
			word := w.ref
			if w.settings != nil && len(w.settings.Aliases)+len(w.settings.MacAddress) > 0 {
				word += "(" + strings.Join(append(slices.Clone(w.settings.Aliases), w.settings.MacAddress.String()), "") + ")"
			}
			words = append(words, word)
		}
		if got := strings.Join(words, " "); got != want {
			t.Errorf("%s: got %s, want %s", body, got, want)
		}
	}
}

// Whatever a client sends is refused in words or becomes a network that machines can be on.
func FuzzNetworkCreate(f *testing.F) {
	f.Add(`{"Name":"net","IPAM":{"Config":[{"Subnet":"10.0.0.0/24","IPRange":"10.0.0.128/25","Gateway":"10.0.0.254","AuxiliaryAddresses":{"a":"10.0.0.129"}}]}}`)
	f.Add(`{"Name":"net","EnableIPv6":true,"Options":{"com.docker.network.driver.mtu":"1400"}}`)
	f.Fuzz(func(t *testing.T, body string) {
		var q networkRequest
		if json.Unmarshal([]byte(body), &q) != nil {
			return
		}
		doc, wanted, _, err := q.doc()
		if err != nil {
			return
		}
		if len(wanted) == 0 || len(wanted) > 2 {
			t.Fatalf("%d subnets", len(wanted))
		}
		for i, s := range doc.Subnets {
			a, err := s.choose(netip.Addr{}, nil)
			if err != nil {
				continue // so small that nobody has room
			}
			if !s.Prefix.Contains(a) || a == s.Gateway {
				t.Fatalf("%s out of %+v", a, s)
			}
			seg := network.Segment{Name: doc.Name, MTU: doc.MTU, MAC: macOf("0", a, nil), Gateways: []netip.Addr{s.Gateway},
				Addresses: []netip.Prefix{netip.PrefixFrom(a, s.Prefix.Bits())}}
			b, err := network.EncodeSegments([]network.Segment{seg})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := network.ParseSegments(b); err != nil {
				t.Fatalf("subnet %d of %s: %v", i, body, err)
			}
		}
	})
}
