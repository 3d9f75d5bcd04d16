package spec

import (
	"fmt"
	"time"
)

// Placement is what the host decided for one start of a pod. An attested pod takes it as a hint, never as truth.
type Placement struct {
	Now     time.Time `json:"now"`     // wall clock of the host when the placement was sent
	Entropy []byte    `json:"entropy"` // 64 bytes for the guest's random pool

	// Layers says where on the layers drive each layer's EROFS image lies.
	Layers  []Extent `json:"layers,omitempty"`
	Volumes []Drive  `json:"volumes,omitempty"` // of Pod.Volumes, by name

	Shares []Share `json:"shares,omitempty"` // of Pod.Binds, in its order

	Network Network `json:"network"`

	// Hold leaves the containers in state "created": the API starts them.
	Hold bool `json:"hold,omitempty"`
	// Linger keeps the machine up after the last container has ended.
	Linger bool `json:"linger,omitempty"`
	// Rehearsal makes the guest ready for another pod when this one has ended: it takes everything of this one away, then
	// ends the stream, and waits for the next.
	Rehearsal bool `json:"rehearsal,omitempty"`
}

// ParsePlacement reads a placement strictly: what a guest does not know it would do wrong, and a volume mounted from the
// wrong place is lost.
func ParsePlacement(b []byte) (*Placement, error) {
	var p Placement
	if err := strict(b, &p); err != nil {
		return nil, fmt.Errorf("parse placement: %w (is the machine package of another version than kcradle?)", err)
	}
	return &p, nil
}

// ParseNetwork reads a network as strictly.
func ParseNetwork(b []byte) (*Network, error) {
	var n Network
	if err := strict(b, &n); err != nil {
		return nil, fmt.Errorf("parse network: %w (is the machine package of another version than kcradle?)", err)
	}
	return &n, nil
}

// Extent is a run of bytes on the drive SerialLayers, both numbers multiples of 4096.
type Extent struct {
	DiffID string `json:"diff_id"`
	Offset int64  `json:"offset"` // bytes
	Length int64  `json:"length"` // bytes
}

// Drive says where a volume is: a block device of its own, or a part of one that holds several.
type Drive struct {
	Name   string `json:"name"`             // of the volume
	Serial string `json:"serial"`           // of the virtio-blk device
	Offset int64  `json:"offset,omitempty"` // bytes, a multiple of 4096
	Length int64  `json:"length,omitempty"` // bytes, a multiple of 4096; 0: the whole device
}

// Share says what the host serves for a bind mount.
type Share struct {
	File string `json:"file,omitempty"` // name of the file in the served directory; empty: the directory itself
}

// Network is the pod's wire as the guest must set it up. Without interfaces there is only loopback.
type Network struct {
	Mode       string      `json:"mode"` // "none", "user" or "tap"; shown by inspect
	Interfaces []Interface `json:"interfaces,omitempty"`
	DNS        []string    `json:"dns,omitempty"` // nameserver addresses
	DNSSearch  []string    `json:"dns_search,omitempty"`
	HostIP     string      `json:"host_ip,omitempty"`   // what host-gateway and host.docker.internal resolve to
	Published  []Port      `json:"published,omitempty"` // the ports as really bound
	// Resolver says that the pod's resolver is an address of its own, ResolverAddress, behind which the guest asks the first
	// of DNS: networks come and go while the pod runs.
	Resolver bool `json:"resolver,omitempty"`
}

// ResolverAddress answers DNS in a pod on shared networks; it is docker's.
const ResolverAddress = "127.0.0.11"

// Interface is one network device, found by its MAC address, or with a tag made on top of the machine's.
type Interface struct {
	Name      string   `json:"name"`          // inside the pod, "eth0"
	Tag       int      `json:"tag,omitempty"` // of IEEE 802.1Q
	MAC       string   `json:"mac"`           //
	MTU       int      `json:"mtu"`           //
	Addresses []string `json:"addresses"`     // prefixes, IPv4 and IPv6: "10.0.2.15/24"
	Gateways  []string `json:"gateways"`      // default routes, at most one per family
}
