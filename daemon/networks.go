package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/events"
	apinet "github.com/moby/moby/api/types/network"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/network/lan"
	"github.com/kcradle/kcradle/spec"
)

// Networks that every host has.
const (
	bridgeNetwork = "bridge" // the one a container gets without asking: names do not resolve on it
	noneNetwork   = "none"
)

// Drivers as docker calls them.
const (
	bridgeDriver = "bridge"
	nullDriver   = "null"
)

// Options of a network that mean something here.
const (
	optionMTU    = "com.docker.network.driver.mtu"
	optionICC    = "com.docker.network.bridge.enable_icc"
	optionLabels = "com.docker.network."
)

// hostNetwork is a network of this host: a directory in which the machines on it meet, and the file that says what it is.
type hostNetwork struct {
	dir string // empty: of none
	doc networkDoc
}

// networkFile is that file.
const networkFile = "network.json"

// networkVersion is its version.
//
// History:
//   - 1: first version.
const networkVersion = 1

type networkDoc struct {
	Version    int               `json:"version"`
	Name       string            `json:"name"`
	ID         string            `json:"id"`
	Created    time.Time         `json:"created"`
	Driver     string            `json:"driver"`
	Subnets    []subnet          `json:"subnets"` // at most one per family
	Internal   bool              `json:"internal,omitempty"`
	Attachable bool              `json:"attachable,omitempty"`
	MTU        int               `json:"mtu"`
	Isolated   bool              `json:"isolated,omitempty"` // its machines do not reach each other
	IPAM       map[string]string `json:"ipam_options,omitempty"`
	Options    map[string]string `json:"options"`
	Labels     map[string]string `json:"labels"`
}

// subnet is the addresses of one family.
type subnet struct {
	Prefix  netip.Prefix          `json:"prefix"`
	Range   netip.Prefix          `json:"range,omitzero"` // addresses are given out of it; zero: of all of Prefix
	Gateway netip.Addr            `json:"gateway"`
	Taken   map[string]netip.Addr `json:"taken,omitempty"` // by things that are not here
}

func (n *hostNetwork) predefined() bool {
	return n.doc.Name == bridgeNetwork || n.doc.Name == noneNetwork
}

func (n *hostNetwork) event(action events.Action, attributes map[string]string) events.Message {
	all := map[string]string{"name": n.doc.Name, "type": n.doc.Driver}
	maps.Copy(all, attributes)
	return daemonEvent(events.NetworkEventType, action, n.doc.ID, all)
}

// readNetworks reads those that are there, and makes bridge when it is not.
func (d *Daemon) readNetworks() error {
	root := filepath.Join(d.cfg.Root, networksDir)
	entries, err := os.ReadDir(root)
	if err != nil {
		return err
	}
	d.networks = map[string]*hostNetwork{}
	for _, e := range entries {
		dir := filepath.Join(root, e.Name())
		if strings.HasPrefix(e.Name(), ".") { // half made, or half removed
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			continue
		}
		n, err := readNetwork(dir)
		if err != nil {
			d.log.Error("a network cannot be read and is left alone", "dir", dir, "error", err)
			continue
		}
		d.networks[n.doc.ID] = n
	}
	none := networkDoc{Name: noneNetwork, ID: stableID("network", noneNetwork), Created: d.started.UTC(), Driver: nullDriver}
	d.networks[none.ID] = &hostNetwork{doc: none}
	if _, err := d.findNetwork(bridgeNetwork); err == nil {
		return nil
	}
	bridge := networkDoc{Name: bridgeNetwork, ID: stableID("network", bridgeNetwork), Driver: bridgeDriver, MTU: network.DefaultMTU,
		Options: map[string]string{"com.docker.network.bridge.default_bridge": "true", optionICC: "true", optionMTU: strconv.Itoa(network.DefaultMTU)}}
	_, err = d.addNetwork(bridge, []netip.Prefix{{}})
	return err
}

func readNetwork(dir string) (*hostNetwork, error) {
	b, err := os.ReadFile(filepath.Join(dir, networkFile))
	if err != nil {
		return nil, err
	}
	n := &hostNetwork{dir: dir}
	if err := json.Unmarshal(b, &n.doc); err != nil {
		return nil, err
	}
	if n.doc.Version < 1 || n.doc.Version > networkVersion {
		return nil, fmt.Errorf("version %d: %w", n.doc.Version, spec.ErrNewer)
	}
	if n.doc.ID != filepath.Base(dir) {
		return nil, fmt.Errorf("it is of network %s", n.doc.ID)
	}
	return n, nil
}

// addNetwork makes a network, whole or not at all. wanted are the families: a prefix without an address is chosen here.
func (d *Daemon) addNetwork(doc networkDoc, wanted []netip.Prefix) (*hostNetwork, error) {
	d.nets.Lock()
	defer d.nets.Unlock()
	for _, o := range d.networks {
		if o.doc.Name == doc.Name {
			return nil, dockerapi.Conflict("network with name %s already exists", doc.Name)
		}
	}
	for i, p := range wanted {
		if p.IsValid() {
			if o := d.overlaps(p); o != nil {
				return nil, dockerapi.Errorf(http.StatusForbidden, "invalid pool request: Pool overlaps with other one on this address space: %s is of network %s", p, o.doc.Name)
			}
			continue
		}
		var err error
		if wanted[i], err = d.freeSubnet(); err != nil {
			return nil, err
		}
		doc.Subnets = append(doc.Subnets, subnet{Prefix: wanted[i], Gateway: wanted[i].Addr().Next()})
	}
	slices.SortFunc(doc.Subnets, func(a, b subnet) int { return a.Prefix.Addr().BitLen() - b.Prefix.Addr().BitLen() })
	doc.Version, doc.Created = networkVersion, time.Now().UTC()
	root := filepath.Join(d.cfg.Root, networksDir)
	tmp, err := os.MkdirTemp(root, ".new-*")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp) // after the rename there is nothing of that name
	b, err := json.MarshalIndent(doc, "", "  ")
	if err != nil {
		return nil, err
	}
	n := &hostNetwork{dir: filepath.Join(root, doc.ID), doc: doc}
	if err := os.WriteFile(filepath.Join(tmp, networkFile), append(b, '\n'), 0o600); err != nil {
		return nil, err
	}
	if err := os.Rename(tmp, n.dir); err != nil {
		return nil, err
	}
	d.networks[doc.ID] = n
	return n, nil
}

// pools are the subnets that are given out, docker's own defaults.
func pools(yield func(netip.Prefix) bool) {
	for i := 17; i < 32; i++ {
		if !yield(netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(i), 0, 0}), 16)) {
			return
		}
	}
	for i := 0; i < 256; i += 16 {
		if !yield(netip.PrefixFrom(netip.AddrFrom4([4]byte{192, 168, byte(i), 0}), 20)) {
			return
		}
	}
}

// overlaps is a network that has addresses of p. The lock of networks is held.
func (d *Daemon) overlaps(p netip.Prefix) *hostNetwork {
	for _, n := range d.networks {
		for _, s := range n.doc.Subnets {
			if s.Prefix.Overlaps(p) {
				return n
			}
		}
	}
	return nil
}

// freeSubnet is one that neither a network nor this host has: machines could not reach what is there.
func (d *Daemon) freeSubnet() (netip.Prefix, error) {
	taken := network.HostPrefixes()
	for p := range pools {
		if d.overlaps(p) == nil && !slices.ContainsFunc(taken, p.Overlaps) {
			return p, nil
		}
	}
	return netip.Prefix{}, dockerapi.Errorf(http.StatusInternalServerError, "all predefined address pools have been fully subnetted: name a subnet")
}

// findNetwork finds a network by its ID, its name, or a unique beginning of its ID, in this order.
func (d *Daemon) findNetwork(ref string) (*hostNetwork, error) {
	d.nets.Lock()
	defer d.nets.Unlock()
	return d.findNetworkLocked(ref)
}

func (d *Daemon) findNetworkLocked(ref string) (*hostNetwork, error) {
	if n, ok := d.networks[ref]; ok {
		return n, nil
	}
	var found []*hostNetwork
	for _, n := range d.networks {
		if n.doc.Name == ref {
			return n, nil
		}
		if ref != "" && strings.HasPrefix(n.doc.ID, ref) {
			found = append(found, n)
		}
	}
	switch len(found) {
	case 0:
		return nil, dockerapi.NotFound("network %s not found", ref)
	case 1:
		return found[0], nil
	}
	return nil, dockerapi.BadRequest("network %s is ambiguous (%d matches found based on ID prefix)", ref, len(found))
}

// allNetworks are all, by name.
func (d *Daemon) allNetworks() []*hostNetwork {
	d.nets.Lock()
	defer d.nets.Unlock()
	return slices.SortedFunc(maps.Values(d.networks), func(a, b *hostNetwork) int { return strings.Compare(a.doc.Name, b.doc.Name) })
}

// show is the network as docker shows it; with the containers that are on it when asked for one by name.
func (d *Daemon) show(n *hostNetwork, containers bool) apinet.Inspect {
	doc := &n.doc
	out := apinet.Inspect{
		Network: apinet.Network{
			Name: doc.Name, ID: doc.ID, Created: doc.Created, Scope: "local", Driver: doc.Driver, Internal: doc.Internal, Attachable: doc.Attachable,
			IPAM: apinet.IPAM{Driver: "default", Options: doc.IPAM, Config: []apinet.IPAMConfig{}}, Options: map[string]string{}, Labels: map[string]string{},
		},
		Containers: map[string]apinet.EndpointResource{},
	}
	maps.Copy(out.Options, doc.Options)
	maps.Copy(out.Labels, doc.Labels)
	for _, s := range doc.Subnets {
		out.EnableIPv4, out.EnableIPv6 = out.EnableIPv4 || s.Prefix.Addr().Is4(), out.EnableIPv6 || s.Prefix.Addr().Is6()
		out.IPAM.Config = append(out.IPAM.Config, apinet.IPAMConfig{Subnet: s.Prefix, IPRange: s.Range, Gateway: s.Gateway, AuxAddress: s.Taken})
	}
	if !containers {
		return out
	}
	for _, c := range d.all() {
		f := c.look()
		e, ok := f.attached[doc.ID]
		if !f.running() || !ok && (doc.Name != noneNetwork || f.rec.Network != string(network.None)) {
			continue
		}
		r := apinet.EndpointResource{Name: f.rec.Name, EndpointID: endpointID(c.id, doc.ID), MacAddress: apinet.HardwareAddr(e.MAC[:])}
		if !ok {
			r.MacAddress = nil
		}
		for _, a := range e.Addresses {
			if a.Addr().Is4() {
				r.IPv4Address = a
			} else {
				r.IPv6Address = a
			}
		}
		out.Containers[c.id] = r
	}
	return out
}

func (d *Daemon) networkList(w http.ResponseWriter, r *dockerapi.Request) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "dangling", "driver", "id", "label", "name", "scope", "type")
	if err != nil {
		return err
	}
	if _, given := f["dangling"]; given {
		if _, err := f.Bool("dangling", false); err != nil {
			return err
		}
	}
	for _, v := range f["type"] {
		if v != "builtin" && v != "custom" {
			return dockerapi.BadRequest("invalid filter: 'type'='%s'", v)
		}
	}
	out := []apinet.Inspect{}
	for _, n := range d.allNetworks() {
		x := d.show(n, false)
		kind := "custom"
		if n.predefined() {
			kind = "builtin"
		}
		if !f.Match("name", x.Name) || !f.Prefix("id", x.ID) || !f.Exact("driver", x.Driver) || !f.Exact("scope", x.Scope) ||
			!f.Labels("label", x.Labels) || !f.Exact("type", kind) {
			continue
		}
		if _, given := f["dangling"]; given {
			wanted, _ := f.Bool("dangling", false)
			if wanted != (!n.predefined() && len(d.on(n)) == 0) {
				continue
			}
		}
		out = append(out, x)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func (d *Daemon) networkInspect(w http.ResponseWriter, r *dockerapi.Request) error {
	if s := r.Query("scope"); s != "" && s != "local" {
		return dockerapi.NotFound("network %s not found", r.Var("id"))
	}
	n, err := d.findNetwork(r.Var("id"))
	if err != nil {
		return err
	}
	return dockerapi.WriteJSON(w, http.StatusOK, d.show(n, true))
}

// users are the containers that are on a network now.
func (d *Daemon) on(n *hostNetwork) (out []*Container) {
	for _, c := range d.all() {
		if _, ok := c.look().attached[n.doc.ID]; ok {
			out = append(out, c)
		}
	}
	return out
}

// networkRequest is what a client asks for. Addresses are text, so that a wrong one is refused in words.
type networkRequest struct {
	Name           string
	CheckDuplicate bool // of versions up to 1.43: two of one name are refused always
	Driver         string
	Scope          string
	EnableIPv4     *bool
	EnableIPv6     *bool
	IPAM           *struct {
		Driver  string
		Options map[string]string
		Config  []struct {
			Subnet, IPRange, Gateway string
			AuxiliaryAddresses       map[string]string
		}
	}
	Internal   bool
	Attachable bool
	Ingress    bool
	ConfigOnly bool
	ConfigFrom *struct{ Network string }
	Options    map[string]string
	Labels     map[string]string
}

func (d *Daemon) networkCreate(w http.ResponseWriter, r *dockerapi.Request) error {
	var q networkRequest
	if err := dockerapi.ReadJSON(r, &q, false); err != nil {
		return err
	}
	doc, wanted, warning, err := q.doc()
	if err != nil {
		return err
	}
	doc.ID = newID()
	n, err := d.addNetwork(doc, wanted)
	if err != nil {
		return err
	}
	d.events.publish(n.event(events.ActionCreate, nil))
	return dockerapi.WriteJSON(w, http.StatusCreated, apinet.CreateResponse{ID: doc.ID, Warning: warning})
}

// doc turns a request into a network. It is pure. wanted are the subnets, those without an address to be chosen.
func (q *networkRequest) doc() (doc networkDoc, wanted []netip.Prefix, warning string, err error) {
	refuse := func(format string, args ...any) (networkDoc, []netip.Prefix, string, error) {
		return networkDoc{}, nil, "", dockerapi.BadRequest(format, args...)
	}
	switch {
	case strings.TrimSpace(q.Name) == "":
		return refuse("invalid network name: name is empty")
	case q.Name == bridgeNetwork || q.Name == noneNetwork || q.Name == "host" || q.Name == "default":
		return networkDoc{}, nil, "", dockerapi.Errorf(http.StatusForbidden, "operation is not permitted on predefined %s network", q.Name)
	case !validName(q.Name) || len(q.Name) > maxNetworkName:
		return refuse("invalid network name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed, at most %d of them", q.Name, maxNetworkName)
	case q.Driver != "" && q.Driver != "default" && q.Driver != bridgeDriver:
		if q.Driver == "host" || q.Driver == nullDriver {
			return networkDoc{}, nil, "", dockerapi.Errorf(http.StatusForbidden, "only one instance of %q network is allowed", q.Driver)
		}
		return networkDoc{}, nil, "", dockerapi.NotFound("could not find plugin %s in v1 plugin registry: plugin %q not found (networks here are of the driver bridge)", q.Driver, q.Driver)
	case q.Scope != "" && q.Scope != "local":
		return refuse("Scope %s is refused: networks here are of one host", q.Scope)
	case q.Ingress:
		return refuse("Ingress is refused: there is no swarm here")
	case q.ConfigOnly || q.ConfigFrom != nil && q.ConfigFrom.Network != "":
		return refuse("ConfigOnly and ConfigFrom are refused: they belong to drivers that are not offered here")
	}
	doc = networkDoc{Name: q.Name, Driver: bridgeDriver, Internal: q.Internal, Attachable: q.Attachable, MTU: network.DefaultMTU,
		Options: maps.Clone(q.Options), Labels: maps.Clone(q.Labels)}
	var without []string
	for _, k := range slices.Sorted(maps.Keys(q.Options)) {
		v := q.Options[k]
		switch k {
		case optionMTU:
			if doc.MTU, err = strconv.Atoi(v); err != nil || doc.MTU < 68 || doc.MTU > network.DefaultMTU {
				return refuse("option %s: want 68 to %d, got %q", k, network.DefaultMTU, v)
			}
		case optionICC:
			icc, err := strconv.ParseBool(v)
			if err != nil {
				return refuse("option %s: %q is neither true nor false", k, v)
			}
			doc.Isolated = !icc
		case "com.docker.network.bridge.enable_ip_masquerade":
			if on, err := strconv.ParseBool(v); err != nil || !on {
				return refuse("option %s is refused: what leaves a machine leaves it by this host's own addresses", k)
			}
		case "com.docker.network.bridge.gateway_mode_ipv4", "com.docker.network.bridge.gateway_mode_ipv6":
			if v != "nat" {
				return refuse("option %s=%s is refused: what leaves a machine leaves it by this host's own addresses", k, v)
			}
		case "com.docker.network.bridge.host_binding_ipv4", "com.docker.network.bridge.trusted_host_interfaces":
			return refuse("option %s is refused: name the address with the port (-p ADDRESS:PORT:PORT)", k)
		default:
			if !strings.HasPrefix(k, optionLabels) {
				return refuse("option %s is unknown", k)
			}
			without = append(without, k)
		}
	}
	if len(without) > 0 {
		warning = "without meaning here, where no bridge device is made: " + strings.Join(without, ", ")
	}
	wanted, err = q.subnets(&doc)
	return doc, wanted, warning, err
}

// maxNetworkName bounds the name of a network; with it and a container's name every name of DNS fits.
const maxNetworkName = 128

// subnets reads the addresses that a client wants.
func (q *networkRequest) subnets(doc *networkDoc) (wanted []netip.Prefix, err error) {
	want4, want6 := q.EnableIPv4 == nil || *q.EnableIPv4, q.EnableIPv6 != nil && *q.EnableIPv6
	if !want4 && !want6 {
		return nil, dockerapi.BadRequest("IPv4 or IPv6 must be enabled")
	}
	seen := map[bool]bool{}
	if q.IPAM != nil {
		if q.IPAM.Driver != "" && q.IPAM.Driver != "default" {
			return nil, dockerapi.BadRequest("IPAM.Driver %s is refused: addresses are given out by this daemon (driver default)", q.IPAM.Driver)
		}
		doc.IPAM = maps.Clone(q.IPAM.Options)
		for i, c := range q.IPAM.Config {
			bad := func(what, value string, why any) error {
				return dockerapi.BadRequest("invalid network config:\ninvalid %s %s: %v", what, value, why)
			}
			if c.Subnet == "" {
				if c.IPRange != "" || c.Gateway != "" || len(c.AuxiliaryAddresses) > 0 {
					return nil, dockerapi.BadRequest("IPAM.Config[%d]: a range, a gateway or addresses need a Subnet", i)
				}
				continue
			}
			p, err := netip.ParsePrefix(c.Subnet)
			if err != nil {
				return nil, bad("subnet", c.Subnet, "invalid CIDR block notation")
			}
			if p != p.Masked() {
				return nil, bad("subnet", c.Subnet, "it should be "+p.Masked().String())
			}
			s := subnet{Prefix: p}
			four := p.Addr().Is4()
			switch {
			case seen[four]:
				return nil, dockerapi.BadRequest("IPAM.Config[%d]: a network has one subnet of a family", i)
			case p.Addr().Is4In6() || p.Addr().IsMulticast() || p.Addr().IsLoopback() || p.Addr().IsUnspecified() || p.Bits() < 8:
				return nil, bad("subnet", c.Subnet, "machines cannot have such addresses")
			case four && p.Bits() > 30 || !four && p.Bits() > 126:
				return nil, bad("subnet", c.Subnet, "there is no room in it for a gateway and a machine")
			case four && !want4:
				return nil, bad("subnet", c.Subnet, "IPv4 is not enabled")
			case !four && !want6:
				return nil, bad("subnet", c.Subnet, "IPv6 is not enabled")
			}
			seen[four] = true
			within := func(what, value string) (netip.Addr, error) {
				a, err := netip.ParseAddr(value)
				if err != nil {
					return a, bad(what, value, "invalid address")
				}
				if !p.Contains(a) || a == p.Addr() || a == last(p) && four {
					return a, bad(what, value, "parent subnet is "+p.String())
				}
				return a, nil
			}
			s.Gateway = p.Addr().Next()
			if c.Gateway != "" {
				if s.Gateway, err = within("gateway address", c.Gateway); err != nil {
					return nil, err
				}
			}
			if c.IPRange != "" {
				if s.Range, err = netip.ParsePrefix(c.IPRange); err != nil || s.Range != s.Range.Masked() || !p.Overlaps(s.Range) || s.Range.Bits() < p.Bits() {
					return nil, bad("ip-range", c.IPRange, "want a part of "+p.String())
				}
			}
			for _, name := range slices.Sorted(maps.Keys(c.AuxiliaryAddresses)) {
				a, err := within("auxiliary address", c.AuxiliaryAddresses[name])
				if err != nil {
					return nil, err
				}
				if s.Taken == nil {
					s.Taken = map[string]netip.Addr{}
				}
				s.Taken[name] = a
			}
			doc.Subnets = append(doc.Subnets, s)
			wanted = append(wanted, p)
		}
	}
	if want4 && !seen[true] {
		wanted = append(wanted, netip.Prefix{})
	}
	if want6 && !seen[false] {
		id := newID()[:10] // RFC 4193: 40 bits that nobody else has
		p := netip.MustParsePrefix(fmt.Sprintf("fd%s:%s:%s::/64", id[:2], id[2:6], id[6:10]))
		doc.Subnets = append(doc.Subnets, subnet{Prefix: p, Gateway: p.Addr().Next()})
		wanted = append(wanted, p)
	}
	return wanted, nil
}

// last is the last address of a prefix.
func last(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func (d *Daemon) networkRemove(w http.ResponseWriter, r *dockerapi.Request) error {
	n, err := d.findNetwork(r.Var("id"))
	if err != nil {
		return err
	}
	if err := d.vacate(r.Context(), n); err != nil {
		return err
	}
	if err := d.removeNetwork(n); err != nil {
		return err
	}
	return noContent(w)
}

// vacate waits for machines whose containers have ended: a moment later they are gone.
func (d *Daemon) vacate(ctx context.Context, n *hostNetwork) error {
	ctx, cancel := context.WithTimeout(ctx, d.bounds.told)
	defer cancel()
	for _, c := range d.on(n) {
		f := c.look()
		if f.running() || f.machine == nil {
			continue
		}
		if err := c.gone(ctx, f.machine); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
	}
	return nil
}

func (d *Daemon) removeNetwork(n *hostNetwork) error {
	if n.predefined() {
		return dockerapi.Errorf(http.StatusForbidden, "%s is a pre-defined network and cannot be removed", n.doc.Name)
	}
	d.nets.Lock()
	defer d.nets.Unlock()
	if d.networks[n.doc.ID] != n {
		return dockerapi.NotFound("network %s not found", n.doc.Name)
	}
	if users := d.on(n); len(users) > 0 {
		var names []string
		for _, c := range users {
			names = append(names, fmt.Sprintf("name:%q id:%q", c.name(), endpointID(c.id, n.doc.ID)[:12]))
		}
		slices.Sort(names)
		return dockerapi.Errorf(http.StatusForbidden, "error while removing network: network %s has active endpoints (%s)", n.doc.Name, strings.Join(names, ", "))
	}
	gone := filepath.Join(filepath.Dir(n.dir), ".rm-"+n.doc.ID)
	if err := os.Rename(n.dir, gone); err != nil {
		return err
	}
	delete(d.networks, n.doc.ID)
	if err := os.RemoveAll(gone); err != nil {
		d.log.Warn("a network that was removed has left something", "dir", gone, "error", err)
	}
	d.events.publish(n.event(events.ActionDestroy, nil))
	return nil
}

func (d *Daemon) networkPrune(w http.ResponseWriter, r *dockerapi.Request) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "label", "label!", "until")
	if err != nil {
		return err
	}
	until := time.Time{}
	if v := f["until"]; len(v) > 0 {
		if until, err = dockerapi.ParseTime(v[0], time.Now()); err != nil {
			return err
		}
	}
	var deleted []string
	for _, n := range d.allNetworks() {
		if n.predefined() || len(d.on(n)) > 0 || !f.Labels("label", n.doc.Labels) || !until.IsZero() && n.doc.Created.After(until) {
			continue
		}
		if slices.ContainsFunc(f["label!"], func(l string) bool { return dockerapi.Filters{"label": {l}}.Labels("label", n.doc.Labels) }) {
			continue
		}
		if err := d.removeNetwork(n); err != nil {
			if dockerapi.Status(err) == http.StatusForbidden || errors.Is(err, os.ErrNotExist) { // somebody was quicker
				continue
			}
			return err
		}
		deleted = append(deleted, n.doc.Name)
	}
	d.events.publish(daemonEvent(events.NetworkEventType, events.ActionPrune, "", map[string]string{"reclaimed": "0"}))
	return dockerapi.WriteJSON(w, http.StatusOK, struct{ NetworksDeleted []string }{deleted})
}

// connectRequest is what a client asks for when it connects or disconnects a container.
type connectRequest struct {
	Container      string
	EndpointConfig *apinet.EndpointSettings
	Force          bool
}

func (d *Daemon) networkConnect(w http.ResponseWriter, r *dockerapi.Request) error {
	return d.rewired(w, r, func(ctx context.Context, n *hostNetwork, c *Container, q *connectRequest) error {
		return c.connect(ctx, n, q.EndpointConfig)
	})
}

func (d *Daemon) networkDisconnect(w http.ResponseWriter, r *dockerapi.Request) error {
	return d.rewired(w, r, func(ctx context.Context, n *hostNetwork, c *Container, _ *connectRequest) error {
		return c.disconnect(ctx, n)
	})
}

func (d *Daemon) rewired(w http.ResponseWriter, r *dockerapi.Request, do func(context.Context, *hostNetwork, *Container, *connectRequest) error) error {
	var q connectRequest
	if err := dockerapi.ReadJSON(r, &q, false); err != nil {
		return err
	}
	n, err := d.findNetwork(r.Var("id"))
	if err != nil {
		return err
	}
	c, err := d.find(q.Container)
	if err != nil {
		return err
	}
	if err := do(context.WithoutCancel(r.Context()), n, c, &q); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

// sweepNetworks removes what machines that were killed have left in their networks. Nobody would be misled by it; it is only
// looked at in vain.
func (d *Daemon) sweepNetworks() {
	there := map[string]bool{}
	for _, c := range d.containers {
		for _, s := range c.look().attached {
			for _, name := range lan.Files(s.MAC) {
				there[filepath.Join(s.Dir, name)] = true
			}
		}
	}
	for _, n := range d.networks {
		if n.dir == "" {
			continue
		}
		entries, err := os.ReadDir(n.dir)
		if err != nil {
			d.log.Warn("a network's directory cannot be read", "dir", n.dir, "error", err)
			continue
		}
		for _, e := range entries {
			path := filepath.Join(n.dir, e.Name())
			if e.Name() == networkFile || there[path] {
				continue
			}
			if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
				d.log.Warn("what a dead machine left in its network stays", "path", path, "error", err)
			}
		}
	}
}
