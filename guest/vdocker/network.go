package vdocker

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/moby/api/types/network"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/spec"
)

// A pod has one network, shared by its containers; it is called after its mode. derivedID makes the 64 hex digits that
// docker's things have for a thing that has none of its own: the same for the same names.
func derivedID(names ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(names, "\x00")))
	return hex.EncodeToString(sum[:])
}

func networkName(p *pod.Pod) string { return cmp.Or(p.Network().Mode, "none") }

func networkID(p *pod.Pod) string {
	return derivedID("network", p.Spec().Containers[0].ID, networkName(p))
}

// networkIs reports whether ref names the pod's network.
func networkIs(p *pod.Pod, ref string) bool {
	return ref == networkName(p) || ref != "" && strings.HasPrefix(networkID(p), ref)
}

func networkDriver(p *pod.Pod) string {
	if networkName(p) == "none" {
		return "null"
	}
	return networkName(p)
}

// exposed lists the ports a container exposes, with those published through it.
func exposed(p *pod.Pod, c spec.Container) []string {
	out := slices.Clone(c.ExposedPorts)
	for _, port := range publishedBy(p, c) {
		if s := fmt.Sprintf("%d/%s", port.ContainerPort, port.Proto); !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	slices.Sort(out)
	return out
}

// publishedBy lists the pod's published ports that belong to a container: those it exposes, and with the first
// container also those that none exposes.
func publishedBy(p *pod.Pod, c spec.Container) []spec.Port {
	var out []spec.Port
	for _, port := range p.Network().Published {
		s := fmt.Sprintf("%d/%s", port.ContainerPort, port.Proto)
		owner := slices.IndexFunc(p.Spec().Containers, func(c spec.Container) bool { return slices.Contains(c.ExposedPorts, s) })
		if p.Spec().Containers[max(owner, 0)].ID == c.ID {
			out = append(out, port)
		}
	}
	return out
}

func hostIP(port spec.Port) string { return cmp.Or(port.HostIP, "0.0.0.0") }

func portSummaries(p *pod.Pod, v view) []portSummary {
	out := []portSummary{}
	if !v.running() {
		return out
	}
	published := publishedBy(p, v.spec)
	for _, s := range exposed(p, v.spec) {
		port, err := network.ParsePort(s)
		if err != nil {
			continue
		}
		entry := portSummary{PrivatePort: port.Num(), Type: string(port.Proto())}
		bound := false
		for _, pub := range published {
			if pub.ContainerPort == port.Num() && pub.Proto == string(port.Proto()) {
				e := entry
				e.IP, e.PublicPort = hostIP(pub), pub.HostPort
				out, bound = append(out, e), true
			}
		}
		if !bound {
			out = append(out, entry)
		}
	}
	return out
}

// portMap is network.PortMap with text for addresses, as all versions up to 1.50 have it.
type portMap map[string][]portBinding

type portBinding struct{ HostIp, HostPort string } //nolint:revive // docker's spelling

// bindings returns the ports of NetworkSettings, or, as asked for, of HostConfig.
func bindings(p *pod.Pod, v view, asked bool) portMap {
	out := portMap{}
	if !asked && !v.running() {
		return out
	}
	if !asked {
		for _, s := range exposed(p, v.spec) {
			out[s] = nil
		}
	}
	ports := publishedBy(p, v.spec)
	if asked {
		ports = askedBy(p, v.spec)
	}
	for _, port := range ports {
		s := fmt.Sprintf("%d/%s", port.ContainerPort, port.Proto)
		b := portBinding{hostIP(port), strconv.Itoa(int(port.HostPort))}
		if asked {
			b.HostIp = port.HostIP
			if port.HostPort == 0 {
				b.HostPort = ""
			}
		}
		out[s] = append(out[s], b)
	}
	return out
}

// askedBy is publishedBy for what the pod's document asks for, before anything is bound.
func askedBy(p *pod.Pod, c spec.Container) []spec.Port {
	var out []spec.Port
	for _, port := range p.Spec().Ports {
		s := fmt.Sprintf("%d/%s", port.ContainerPort, port.Proto)
		owner := slices.IndexFunc(p.Spec().Containers, func(c spec.Container) bool { return slices.Contains(c.ExposedPorts, s) })
		if p.Spec().Containers[max(owner, 0)].ID == c.ID {
			out = append(out, port)
		}
	}
	return out
}

// address is what one interface gives the containers.
type address struct {
	mac                  network.HardwareAddr
	ip4, gateway4        netip.Addr
	ip6, gateway6        netip.Addr
	prefixLen4, prefLen6 int
	subnets              []network.IPAMConfig
}

// addresses reads the first interface of the placement; others are the machine's own affair.
func addresses(p *pod.Pod) address {
	var a address
	interfaces := p.Network().Interfaces
	if len(interfaces) == 0 {
		return a
	}
	i := interfaces[0]
	_ = a.mac.UnmarshalText([]byte(i.MAC)) // one that is none is shown as none
	for _, s := range i.Gateways {
		if g, err := netip.ParseAddr(s); err == nil {
			if g.Is4() {
				a.gateway4 = g
			} else {
				a.gateway6 = g
			}
		}
	}
	for _, s := range i.Addresses {
		prefix, err := netip.ParsePrefix(s)
		if err != nil {
			continue
		}
		c := network.IPAMConfig{Subnet: prefix.Masked()}
		if prefix.Addr().Is4() {
			a.ip4, a.prefixLen4, c.Gateway = prefix.Addr(), prefix.Bits(), a.gateway4
		} else {
			a.ip6, a.prefLen6, c.Gateway = prefix.Addr(), prefix.Bits(), a.gateway6
		}
		a.subnets = append(a.subnets, c)
	}
	return a
}

func endpointID(p *pod.Pod, v view) string { return derivedID("endpoint", v.id, networkName(p)) }

// endpoint is network.EndpointSettings without what a version does not have yet.
type endpoint struct {
	network.EndpointSettings
	DNSNames   any  `json:",omitempty"` // since 1.44
	GwPriority *int `json:",omitempty"` // since 1.48
}

// endpoints is the member Networks of NetworkSettings.
func endpoints(p *pod.Pod, v view, version dockerapi.Version) map[string]*endpoint {
	e := &endpoint{EndpointSettings: network.EndpointSettings{NetworkID: networkID(p)}}
	if version >= 44 {
		e.DNSNames = []string(nil)
	}
	if version >= 48 {
		e.GwPriority = new(int)
	}
	if v.running() {
		a := addresses(p)
		e.EndpointID = endpointID(p, v)
		e.Gateway, e.IPAddress, e.IPPrefixLen, e.MacAddress = a.gateway4, a.ip4, a.prefixLen4, a.mac
		e.IPv6Gateway, e.GlobalIPv6Address, e.GlobalIPv6PrefixLen = a.gateway6, a.ip6, a.prefLen6
	}
	return map[string]*endpoint{networkName(p): e}
}

// inspectNetwork describes the pod's network; with its containers when asked for one by name.
func inspectNetwork(p *pod.Pod, containers bool) network.Inspect {
	a := addresses(p)
	n := network.Network{
		Name: networkName(p), ID: networkID(p), Created: p.Spec().Containers[0].Created, Scope: "local",
		Driver: networkDriver(p), EnableIPv4: a.ip4.IsValid(), EnableIPv6: a.ip6.IsValid(),
		IPAM:    network.IPAM{Driver: "default", Config: slices.Clone(a.subnets)},
		Options: map[string]string{}, Labels: map[string]string{},
	}
	if n.IPAM.Config == nil {
		n.IPAM.Config = []network.IPAMConfig{}
	}
	out := network.Inspect{Network: n, Containers: map[string]network.EndpointResource{}}
	if !containers {
		return out
	}
	for _, v := range newestFirst(p) {
		if !v.running() {
			continue
		}
		e := network.EndpointResource{Name: v.name, EndpointID: endpointID(p, v), MacAddress: a.mac}
		if a.ip4.IsValid() {
			e.IPv4Address = netip.PrefixFrom(a.ip4, a.prefixLen4)
		}
		if a.ip6.IsValid() {
			e.IPv6Address = netip.PrefixFrom(a.ip6, a.prefLen6)
		}
		out.Containers[v.id] = e
	}
	return out
}

func (s *server) networks(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "dangling", "driver", "id", "label", "name", "scope", "type")
	if err != nil {
		return err
	}
	dangling, err := f.Bool("dangling", false)
	if err != nil {
		return err
	}
	out := []network.Inspect{}
	n := inspectNetwork(p, false)
	if !dangling && f.Exact("driver", n.Driver) && f.Match("id", n.ID) && f.Match("name", n.Name) &&
		f.Exact("scope", n.Scope) && f.Exact("type", "builtin") && f.Labels("label", nil) {
		out = append(out, n)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func (s *server) networkInspect(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	if !networkIs(p, r.Var("id")) {
		return dockerapi.NotFound("network %s not found", r.Var("id"))
	}
	return dockerapi.WriteJSON(w, http.StatusOK, inspectNetwork(p, true))
}
