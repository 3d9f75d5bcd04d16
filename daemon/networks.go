package daemon

import (
	"net/http"
	"net/netip"
	"strings"
	"time"

	"github.com/kcradle/kcradle/dockerapi"
)

// shownNetwork is a network as docker shows it.
type shownNetwork struct {
	Name, ID   string
	Created    time.Time
	Scope      string
	Driver     string
	EnableIPv4 bool
	EnableIPv6 bool
	IPAM       ipam
	Internal   bool
	Attachable bool
	Ingress    bool
	ConfigFrom struct{ Network string }
	ConfigOnly bool
	Containers map[string]networkContainer
	Options    map[string]string
	Labels     map[string]string
}

type ipam struct {
	Driver  string
	Options map[string]string
	Config  []ipamConfig
}

type ipamConfig struct{ Subnet, Gateway string }

type networkContainer struct{ Name, EndpointID, MacAddress, IPv4Address, IPv6Address string }

// networksThere are those that every host has. Each machine on bridge is alone on a wire of its own, so that all of them have one
// address; what they publish is the host's.
func (d *Daemon) networksThere() []shownNetwork {
	none := shownNetwork{Name: "none", Driver: "null", Scope: "local", IPAM: ipam{Driver: "default", Config: []ipamConfig{}}}
	bridge := shownNetwork{Name: "bridge", Driver: "bridge", Scope: "local", EnableIPv4: true,
		IPAM: ipam{Driver: "default", Config: []ipamConfig{{netip.MustParsePrefix(userGateway + "/24").Masked().String(), userGateway}}}}
	out := []shownNetwork{bridge, none}
	for i := range out {
		n := &out[i]
		n.ID, n.Created = networkID(n.Name), d.started.UTC()
		n.Containers, n.Options, n.Labels = map[string]networkContainer{}, map[string]string{}, map[string]string{}
		for _, c := range d.all() {
			if f := c.look(); f.running() && networkName(f.rec) == n.Name {
				x := networkContainer{Name: f.rec.Name, EndpointID: stableID("endpoint", c.id, n.Name)}
				if n.Name == "bridge" {
					x.IPv4Address = userAddress + "/24"
				}
				n.Containers[c.id] = x
			}
		}
	}
	return out
}

func (d *Daemon) networks(w http.ResponseWriter, r *dockerapi.Request) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "dangling", "driver", "id", "label", "name", "scope", "type")
	if err != nil {
		return err
	}
	out := []shownNetwork{}
	for _, n := range d.networksThere() {
		if !f.Match("name", n.Name) || !f.Prefix("id", n.ID) || !f.Exact("driver", n.Driver) || !f.Exact("scope", n.Scope) ||
			!f.Labels("label", n.Labels) || !f.Exact("type", "builtin") {
			continue
		}
		n.Containers = map[string]networkContainer{} // a list does not say
		out = append(out, n)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func (d *Daemon) networkInspect(w http.ResponseWriter, r *dockerapi.Request) error {
	ref := r.Var("id")
	for _, n := range d.networksThere() {
		if n.Name == ref || len(ref) >= 4 && strings.HasPrefix(n.ID, ref) {
			return dockerapi.WriteJSON(w, http.StatusOK, n)
		}
	}
	return dockerapi.NotFound("network %s not found", ref)
}

// noNetworks refuses what would need a wire between machines.
func (d *Daemon) noNetworks(http.ResponseWriter, *dockerapi.Request) error {
	return dockerapi.Errorf(http.StatusNotImplemented, "networks that several containers share are not offered yet: publish ports, or summon the containers as one pod")
}

func (d *Daemon) networkPrune(w http.ResponseWriter, _ *dockerapi.Request) error {
	return dockerapi.WriteJSON(w, http.StatusOK, struct{ NetworksDeleted []string }{})
}
