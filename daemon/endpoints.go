package daemon

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/moby/moby/api/types/events"
	apinet "github.com/moby/moby/api/types/network"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/network/lan"
)

// endpoint is a container's place on a network, as its owner wants it.
type endpoint struct {
	Network  string                     `json:"network"` // ID; empty: not known before the first start
	Name     string                     `json:"name"`    // of the network
	IPAM     *apinet.EndpointIPAMConfig `json:"ipam,omitempty"`
	MAC      lan.MAC                    `json:"mac,omitzero"`
	Aliases  []string                   `json:"aliases,omitempty"`
	Links    []string                   `json:"links,omitempty"` // CONTAINER:ALIAS
	Priority int                        `json:"priority,omitempty"`
}

func endpointID(container, network string) string { return stableID("endpoint", container, network) }

// endpointWish is an endpoint before its network is looked for.
type endpointWish struct {
	ref      string // name or ID of the network
	settings *apinet.EndpointSettings
}

// endpointWishes are the networks a new container is to be on, first the one of its NetworkMode. It is pure.
func endpointWishes(q *request) ([]endpointWish, error) {
	first := string(q.HostConfig.NetworkMode)
	if first == "" || first == "default" {
		first = bridgeNetwork
	}
	wishes := []endpointWish{{ref: first}}
	if q.NetworkingConfig != nil {
		for _, ref := range slices.Sorted(maps.Keys(q.NetworkingConfig.EndpointsConfig)) {
			s := q.NetworkingConfig.EndpointsConfig[ref]
			if ref == first || ref == "default" && first == bridgeNetwork {
				wishes[0].settings = s
				continue
			}
			wishes = append(wishes, endpointWish{ref, s})
		}
	}
	if q.MacAddress != "" {
		if wishes[0].settings = wishes[0].settings.Copy(); wishes[0].settings == nil {
			wishes[0].settings = &apinet.EndpointSettings{}
		}
		if err := wishes[0].settings.MacAddress.UnmarshalText([]byte(q.MacAddress)); err != nil {
			return nil, dockerapi.BadRequest("invalid MAC address %s", q.MacAddress)
		}
	}
	return wishes, nil
}

// endpoints finds the networks of a new container.
func (d *Daemon) endpoints(wishes []endpointWish, links []string) ([]endpoint, error) {
	var out []endpoint
	for i, w := range wishes {
		n, err := d.findNetwork(w.ref)
		if dockerapi.Status(err) == http.StatusNotFound { // as with docker, it may be made before the start
			n, err = &hostNetwork{doc: networkDoc{Name: w.ref}}, nil
		}
		if err != nil {
			return nil, err
		}
		if n.doc.Name == noneNetwork {
			if len(wishes) > 1 {
				return nil, dockerapi.BadRequest("container cannot be connected to multiple networks with one of the networks in private (none) mode")
			}
			return nil, nil
		}
		settings := w.settings
		if i == 0 && len(links) > 0 {
			if settings = settings.Copy(); settings == nil {
				settings = &apinet.EndpointSettings{}
			}
			settings.Links = append(settings.Links, links...)
		}
		e, err := d.endpoint(n, settings)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(out, func(o endpoint) bool { return o.Name == e.Name }) {
			return nil, dockerapi.BadRequest("network %s is named twice", n.doc.Name)
		}
		out = append(out, e)
	}
	return out, nil
}

// endpoint checks what a client wants on a network.
func (d *Daemon) endpoint(n *hostNetwork, s *apinet.EndpointSettings) (endpoint, error) {
	e := endpoint{Network: n.doc.ID, Name: n.doc.Name}
	if s == nil {
		return e, nil
	}
	e.IPAM, e.Aliases, e.Priority = s.IPAMConfig, s.Aliases, s.GwPriority
	for _, k := range slices.Sorted(maps.Keys(s.DriverOpts)) {
		return e, dockerapi.BadRequest("DriverOpts %s is refused: there is no driver here that knows it", k)
	}
	if len(s.MacAddress) > 0 {
		if len(s.MacAddress) != len(e.MAC) || lan.MAC(s.MacAddress).Multicast() || lan.MAC(s.MacAddress) == (lan.MAC{}) {
			return e, dockerapi.BadRequest("invalid MAC address %s: want that of one machine", s.MacAddress)
		}
		e.MAC = lan.MAC(s.MacAddress)
	}
	if n.doc.Name == bridgeNetwork && len(e.Aliases) > 0 {
		return e, dockerapi.BadRequest("network-scoped alias is supported only for containers in user defined networks")
	}
	for _, a := range e.Aliases {
		if a == "" || len(a) > 253 || strings.ContainsAny(a, " \t\n") {
			return e, dockerapi.BadRequest("alias %q is no name of a host", a)
		}
	}
	for _, l := range s.Links {
		ref, alias, _ := strings.Cut(l, ":")
		c, err := d.find(trimSlash(ref))
		if err != nil {
			return e, dockerapi.BadRequest("could not get container for %s: %w", ref, err)
		}
		if alias = trimSlash(alias); alias == "" {
			alias = c.name()
		}
		e.Links = append(e.Links, c.id+":"+alias)
	}
	if i := e.IPAM; i != nil {
		if len(i.LinkLocalIPs) > 0 {
			return e, dockerapi.BadRequest("LinkLocalIPs is refused: a machine has one address of a family on a network")
		}
		if n.doc.Name == bridgeNetwork && (i.IPv4Address.IsValid() || i.IPv6Address.IsValid()) {
			return e, dockerapi.BadRequest("invalid endpoint settings:\nuser specified IP address is supported on user defined networks only")
		}
		for _, a := range []netip.Addr{i.IPv4Address, i.IPv6Address} {
			if a.IsValid() && n.doc.ID != "" && !slices.ContainsFunc(n.doc.Subnets, func(s subnet) bool { return s.Prefix.Contains(a) }) {
				return e, dockerapi.BadRequest("invalid endpoint settings:\nno configured subnet contains IP address %s", a)
			}
		}
	}
	return e, nil
}

// attach gives the container its addresses, for a machine that is about to start.
func (c *Container) attach() error {
	c.d.nets.Lock()
	defer c.d.nets.Unlock()
	if err := c.resolveEndpoints(); err != nil {
		return err
	}
	f := c.look()
	endpoints := f.rec.Endpoints
	if f.rec.Network == string(network.None) {
		return nil
	}
	attached := map[string]network.Segment{}
	for i, e := range endpoints {
		s, err := c.segment(e, attached)
		if err != nil {
			return err
		}
		s.Tag = i
		attached[e.Network] = s
	}
	return c.settleSegments(attached)
}

// resolveEndpoints finds the networks that were not there when the container was made. The lock of networks is held.
func (c *Container) resolveEndpoints() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	endpoints := slices.Clone(c.rec.Endpoints)
	found := false
	for i, e := range endpoints {
		if e.Network != "" {
			continue
		}
		n, err := c.d.findNetworkLocked(e.Name)
		if err != nil {
			return err
		}
		endpoints[i].Network, endpoints[i].Name, found = n.doc.ID, n.doc.Name, true
	}
	if !found {
		return nil
	}
	c.rec.Endpoints = endpoints
	return c.saveLocked()
}

// settleSegments writes which networks the container is on, and which of them leads outside. The lock of networks is held.
func (c *Container) settleSegments(attached map[string]network.Segment) error {
	list := slices.SortedFunc(maps.Values(attached), func(a, b network.Segment) int { return a.Tag - b.Tag })
	way := -1
	for i, s := range list {
		list[i].Default = false
		if s.Internal {
			continue
		}
		if p := c.priority(s.Name); way < 0 || p > c.priority(list[way].Name) || p == c.priority(list[way].Name) && s.Name < list[way].Name {
			way = i
		}
	}
	if way >= 0 {
		list[way].Default = true
	}
	b, err := network.EncodeSegments(list)
	if err != nil {
		return err
	}
	if err := c.b.SetFile(network.SegmentsFile, b); err != nil {
		return err
	}
	byID := map[string]network.Segment{}
	for id, s := range attached {
		byID[id] = list[slices.IndexFunc(list, func(o network.Segment) bool { return o.Tag == s.Tag })]
	}
	c.change(func() { c.attached = byID })
	return nil
}

func (c *Container) priority(name string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, e := range c.rec.Endpoints {
		if e.Name == name {
			return e.Priority
		}
	}
	return 0
}

// segment chooses the addresses of an endpoint. The lock of networks is held.
func (c *Container) segment(e endpoint, others map[string]network.Segment) (network.Segment, error) {
	n, ok := c.d.networks[e.Network]
	if !ok {
		return network.Segment{}, dockerapi.NotFound("network %s not found", e.Network)
	}
	taken, macs := map[netip.Addr]bool{}, map[lan.MAC]bool{}
	for _, o := range c.d.all() {
		if s, ok := o.look().attached[e.Network]; ok && o != c {
			macs[s.MAC] = true
			for _, a := range s.Addresses {
				taken[a.Addr()] = true
			}
		}
	}
	for _, o := range others { // this machine's own other devices
		macs[o.MAC] = true
	}
	s := network.Segment{Name: n.doc.Name, Dir: n.dir, MTU: n.doc.MTU, Internal: n.doc.Internal, Resolve: n.doc.Name != bridgeNetwork}
	if n.doc.Isolated {
		s.Dir = ""
	}
	var static netip.Addr
	for _, sub := range n.doc.Subnets {
		if e.IPAM != nil {
			static = e.IPAM.IPv6Address
			if sub.Prefix.Addr().Is4() {
				static = e.IPAM.IPv4Address
			}
		}
		a, err := sub.choose(static, taken)
		if err != nil {
			return s, dockerapi.Errorf(dockerapi.Status(err), "network %s: %w", n.doc.Name, err)
		}
		s.Addresses = append(s.Addresses, netip.PrefixFrom(a, sub.Prefix.Bits()))
		s.Gateways = append(s.Gateways, sub.Gateway)
	}
	if s.MAC = e.MAC; s.MAC == (lan.MAC{}) {
		s.MAC = macOf(c.id, s.Addresses[0].Addr(), macs)
	} else if macs[s.MAC] {
		return s, dockerapi.Conflict("network %s: another machine has the MAC address %s", n.doc.Name, s.MAC)
	}
	s.Names, s.Links = c.namesOn(e)
	return s, nil
}

// choose returns an address that is free: the one wanted, or the first.
func (s subnet) choose(static netip.Addr, taken map[netip.Addr]bool) (netip.Addr, error) {
	used := func(a netip.Addr) bool {
		if taken[a] || a == s.Gateway || a == s.Prefix.Addr() || a.Is4() && a == last(s.Prefix) {
			return true
		}
		return slices.Contains(slices.Collect(maps.Values(s.Taken)), a)
	}
	if static.IsValid() {
		if used(static) {
			return static, dockerapi.Errorf(http.StatusForbidden, "Address already in use: %s", static)
		}
		return static, nil
	}
	from := s.Prefix
	if s.Range.IsValid() {
		from = s.Range
	}
	for a := from.Addr(); from.Contains(a); a = a.Next() {
		if !used(a) {
			return a, nil
		}
	}
	return netip.Addr{}, dockerapi.Errorf(http.StatusForbidden, "no available IPv4 addresses on this network's address pools: %s", from)
}

// macOf is an address that nobody on the network has: it follows from the machine's IPv4 address, as docker's once did.
func macOf(id string, a netip.Addr, taken map[lan.MAC]bool) lan.MAC {
	m := lan.MAC{0x02, 0x42}
	if a.Is4() {
		b := a.As4()
		copy(m[2:], b[:])
	} else {
		copy(m[2:], id)
	}
	for taken[m] {
		binary.BigEndian.PutUint32(m[2:], binary.BigEndian.Uint32(m[2:])+1)
	}
	return m
}

// namesOn are the names of the container on a network, and those that others have for it alone.
func (c *Container) namesOn(e endpoint) (names []string, links map[string]string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	names = []string{c.rec.Name}
	for _, n := range append(slices.Clone(e.Aliases), c.id[:12], c.rec.Config.Hostname) {
		if n != "" && !slices.Contains(names, n) {
			names = append(names, n)
		}
	}
	for _, l := range e.Links {
		id, alias, _ := strings.Cut(l, ":")
		if links == nil {
			links = map[string]string{}
		}
		links[alias] = id[:12] // which every container has among its names
	}
	return names, links
}

// reattach reads what the machine of a running container was given, by this daemon or an earlier one.
func (c *Container) reattach() error {
	b, err := c.b.File(network.SegmentsFile)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	list, err := network.ParseSegments(b)
	if err != nil {
		return err
	}
	attached := map[string]network.Segment{}
	for _, s := range list {
		if n, err := c.d.findNetwork(s.Name); err == nil {
			attached[n.doc.ID] = s
		}
	}
	c.change(func() { c.attached = attached })
	return nil
}

// connect puts the container on one more network.
func (c *Container) connect(ctx context.Context, n *hostNetwork, s *apinet.EndpointSettings) error {
	if n.doc.Name == noneNetwork {
		return dockerapi.Errorf(http.StatusForbidden, "container cannot be connected to multiple networks with one of the networks in private (none) mode")
	}
	e, err := c.d.endpoint(n, s)
	if err != nil {
		return err
	}
	return c.rewire(ctx, n, events.ActionConnect, func(f facts, attached map[string]network.Segment) ([]endpoint, error) {
		if slices.ContainsFunc(f.rec.Endpoints, func(o endpoint) bool { return o.Network == n.doc.ID }) {
			return nil, dockerapi.Errorf(http.StatusForbidden, "endpoint with name %s already exists in network %s", f.rec.Name, n.doc.Name)
		}
		if attached != nil {
			s, err := c.segment(e, attached)
			if err != nil {
				return nil, err
			}
			for used := true; used; {
				if used = slices.ContainsFunc(slices.Collect(maps.Values(attached)), func(o network.Segment) bool { return o.Tag == s.Tag }); used {
					s.Tag++
				}
			}
			attached[n.doc.ID] = s
		}
		return append(slices.Clone(f.rec.Endpoints), e), nil
	})
}

// disconnect takes the container from a network.
func (c *Container) disconnect(ctx context.Context, n *hostNetwork) error {
	return c.rewire(ctx, n, events.ActionDisconnect, func(f facts, attached map[string]network.Segment) ([]endpoint, error) {
		i := slices.IndexFunc(f.rec.Endpoints, func(o endpoint) bool { return o.Network == n.doc.ID })
		if i < 0 {
			return nil, dockerapi.Errorf(http.StatusForbidden, "container %s is not connected to network %s", c.id, n.doc.Name)
		}
		delete(attached, n.doc.ID)
		return slices.Delete(slices.Clone(f.rec.Endpoints), i, i+1), nil
	})
}

// rewire changes the container's networks, and those of its machine when there is one. change works on the networks that the
// machine is on, nil without one, and returns the endpoints.
func (c *Container) rewire(ctx context.Context, n *hostNetwork, action events.Action, change func(facts, map[string]network.Segment) ([]endpoint, error)) error {
	c.life.Lock()
	defer c.life.Unlock()
	f := c.look()
	if f.rec.Network == string(network.None) && (f.machine != nil || action == events.ActionDisconnect) {
		return dockerapi.Errorf(http.StatusForbidden, "container %s has no network device: it was made with the network none; make it anew with another", c.id)
	}
	err := func() error {
		c.d.nets.Lock()
		defer c.d.nets.Unlock()
		var attached map[string]network.Segment
		if f.machine != nil {
			attached = maps.Clone(f.attached)
			if attached == nil {
				attached = map[string]network.Segment{}
			}
		}
		endpoints, err := change(f, attached)
		if err != nil {
			return err
		}
		c.mu.Lock()
		old, mode := c.rec.Endpoints, c.rec.Network
		c.rec.Endpoints, c.rec.Network = endpoints, network.Shared
		if err = c.saveLocked(); err != nil {
			c.rec.Endpoints, c.rec.Network = old, mode
		}
		c.mu.Unlock()
		if err != nil || attached == nil {
			return err
		}
		return c.settleSegments(attached)
	}()
	if err != nil || f.machine == nil {
		return err
	}
	rctx, cancel := context.WithTimeout(ctx, c.d.bounds.told)
	defer cancel()
	if err := c.b.Rewire(rctx); err != nil {
		return err
	}
	if f.running() {
		c.d.events.publish(n.event(action, map[string]string{"container": c.id}))
	}
	return nil
}

// renamed tells the others on the container's networks of its new name.
func (c *Container) renamed(ctx context.Context) error {
	f := c.look()
	if f.machine == nil || len(f.attached) == 0 {
		return nil
	}
	err := func() error {
		c.d.nets.Lock()
		defer c.d.nets.Unlock()
		attached := maps.Clone(f.attached)
		for _, e := range f.rec.Endpoints {
			if s, ok := attached[e.Network]; ok {
				s.Names, s.Links = c.namesOn(e)
				attached[e.Network] = s
			}
		}
		return c.settleSegments(attached)
	}()
	if err != nil {
		return err
	}
	rctx, cancel := context.WithTimeout(ctx, c.d.bounds.told)
	defer cancel()
	return c.b.Rewire(rctx)
}

// tellNetworks tells that the container has come to its networks, or has left them.
func (c *Container) tellNetworks(action events.Action) {
	f := c.look()
	if f.rec.Network == string(network.None) {
		if n, err := c.d.findNetwork(noneNetwork); err == nil {
			c.d.events.publish(n.event(action, map[string]string{"container": c.id}))
		}
		return
	}
	for _, s := range slices.SortedFunc(maps.Values(f.attached), func(a, b network.Segment) int { return a.Tag - b.Tag }) {
		if n, err := c.d.findNetwork(s.Name); err == nil {
			c.d.events.publish(n.event(action, map[string]string{"container": c.id}))
		}
	}
}

// link is one of a container's, by the names of now.
type link struct{ id, target, alias string }

func (c *Container) linked(e endpoint) (out []link) {
	for _, l := range e.Links {
		id, alias, _ := strings.Cut(l, ":")
		target := id
		if o, err := c.d.find(id); err == nil {
			target = o.name()
		}
		out = append(out, link{id, target, alias})
	}
	return out
}

// linkInspect shows the target of a link, CONTAINER/ALIAS.
func (d *Daemon) linkInspect(w http.ResponseWriter, r *dockerapi.Request) error {
	c, err := d.find(r.Var("id"))
	if err != nil {
		return err
	}
	for _, e := range c.look().rec.Endpoints {
		for _, l := range c.linked(e) {
			if strings.TrimPrefix(l.alias, "/") == r.Var("alias") {
				target, err := d.find(l.id)
				if err != nil {
					return err
				}
				return d.inspect(w, r, target)
			}
		}
	}
	return dockerapi.NotFound("No such container: %s/%s", r.Var("id"), r.Var("alias"))
}

// shownLinks are HostConfig.Links as docker shows them: "/db:/web/alias".
func (c *Container) shownLinks(f facts) (out []string) {
	for _, e := range f.rec.Endpoints {
		if e.Name != bridgeNetwork {
			continue
		}
		for _, l := range c.linked(e) {
			out = append(out, "/"+l.target+":/"+f.rec.Name+"/"+l.alias)
		}
	}
	return out
}

// allNames are the container's names as docker lists them: its own, and those that links of others give it.
func (c *Container) allNames(f facts) []string {
	var out []string
	for _, o := range c.d.all() {
		of := o.look()
		for _, e := range of.rec.Endpoints {
			if e.Name != bridgeNetwork {
				continue
			}
			for _, l := range o.linked(e) {
				if l.id == c.id {
					out = append(out, "/"+of.rec.Name+"/"+l.alias)
				}
			}
		}
	}
	slices.Sort(out)
	return append([]string{"/" + f.rec.Name}, out...)
}

// shownEndpoint is one member of NetworkSettings.Networks.
func (c *Container) shownEndpoint(f facts, e endpoint, version dockerapi.Version) map[string]any {
	out := map[string]any{
		"IPAMConfig": nil, "Links": nil, "Aliases": nil, "DriverOpts": nil, "NetworkID": "", "EndpointID": "", "Gateway": "", "IPAddress": "",
		"MacAddress": "", "IPPrefixLen": 0, "IPv6Gateway": "", "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0,
	}
	if version >= 44 {
		out["DNSNames"] = nil
	}
	if version >= 48 {
		out["GwPriority"] = e.Priority
	}
	if e.Network == "" {
		return out
	}
	if e.IPAM != nil {
		out["IPAMConfig"] = e.IPAM
	}
	aliases := e.Aliases
	if version < 45 && e.Name != bridgeNetwork {
		aliases = append(slices.Clone(aliases), c.id[:12])
	}
	if len(aliases) > 0 {
		out["Aliases"] = aliases
	}
	if len(e.Links) > 0 {
		var links []string
		for _, l := range c.linked(e) {
			links = append(links, l.target+":"+l.alias)
		}
		out["Links"] = links
	}
	if e.MAC != (lan.MAC{}) {
		out["MacAddress"] = e.MAC
	}
	out["NetworkID"] = e.Network
	if version >= 44 && e.Name != bridgeNetwork {
		names, _ := c.namesOn(e)
		out["DNSNames"] = names
	}
	s, ok := f.attached[e.Network]
	if !ok || !f.running() {
		return out
	}
	out["EndpointID"], out["MacAddress"] = endpointID(c.id, e.Network), s.MAC
	for i, a := range s.Addresses {
		if a.Addr().Is4() {
			out["IPAddress"], out["IPPrefixLen"], out["Gateway"] = a.Addr(), a.Bits(), s.Gateways[i]
		} else {
			out["GlobalIPv6Address"], out["GlobalIPv6PrefixLen"], out["IPv6Gateway"] = a.Addr(), a.Bits(), s.Gateways[i]
		}
	}
	return out
}

// shownNetworks is NetworkSettings.Networks.
func (c *Container) shownNetworks(f facts, version dockerapi.Version) map[string]any {
	out := map[string]any{}
	if f.rec.Network == string(network.None) {
		e := endpoint{Network: stableID("network", noneNetwork), Name: noneNetwork}
		out[noneNetwork] = c.shownEndpoint(f, e, version)
		if f.running() {
			out[noneNetwork].(map[string]any)["EndpointID"] = endpointID(c.id, e.Network)
		}
	}
	for _, e := range f.rec.Endpoints {
		out[e.Name] = c.shownEndpoint(f, e, version)
	}
	return out
}

// upgradeNetworks makes of a record of version 1 one that names its networks.
func (d *Daemon) upgradeNetworks(r *record) error {
	if r.Version >= 2 {
		return nil
	}
	r.Version = recordVersion
	if r.Network == string(network.None) {
		return nil
	}
	n, err := d.findNetwork(bridgeNetwork)
	if err != nil {
		return fmt.Errorf("put the container on %s: %w", bridgeNetwork, err)
	}
	r.Network, r.Endpoints = network.Shared, []endpoint{{Network: n.doc.ID, Name: n.doc.Name}}
	return nil
}
