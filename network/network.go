// Package network gives a machine its wire: no network at all, an in-process user-mode stack behind QEMU's stream
// netdev (no root, no helper process), or a tap device that the caller prepared.
//
//	ports, err := network.ParsePorts("127.0.0.1:8080:80")
//	w, err := network.Open(ctx, network.Config{Mode: network.User, Ports: ports}, log)
//	defer w.Close()
//	cmd.ExtraFiles = append(cmd.ExtraFiles, w.File()) // descriptor 3 in QEMU
//	args = append(args, "-netdev", w.Netdev("net0", 3), "-device", "virtio-net-device,netdev=net0,mac="+w.Guest().MAC.String())
//
// docs/network.md says what each mode can and cannot do.
package network

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"
)

// Mode is the kind of wire.
type Mode string

// The modes.
const (
	None Mode = "none" // loopback only
	User Mode = "user" // the in-process stack
	Tap  Mode = "tap"  // a tap device prepared by the caller
)

// MTU bounds. IPv6 wants at least 1280; 65520 is the most that QEMU's stream framing and an IP packet carry well.
const (
	DefaultMTU = 1500
	MinMTU     = 1280
	MaxMTU     = 65520
)

// Config says how a machine gets its wire.
type Config struct {
	Mode Mode             // required
	MAC  net.HardwareAddr // of the guest's interface; nil: a random local one
	MTU  int              // zero: DefaultMTU, with Tap the device's own

	// Ports are published on the host. Only with User.
	Ports []Port
	// Hosts are names that DNS answers itself, beside host.docker.internal and gateway.docker.internal. Only with User.
	Hosts map[string]netip.Addr
	// End is our end of a wire that the machine has already, a stream socket; nil: a new one. Only with User. The wire
	// owns it when Open has succeeded.
	End *os.File
	// NoHost keeps the guest from the host's loopback: HostIP is not answered. Only with User.
	NoHost bool
	// Shared puts the machine on Segments, of which there may be none, instead of a wire of its own. Only with User.
	Shared   bool
	Segments []Segment

	born time.Time // when the wire was opened; zero: now

	DNS    []netip.Addr // upstream servers (User) or the guest's servers (Tap); empty: the host's resolvers
	Search []string     // search domains; nil: the host's

	// Device is the name of the tap device. Required with Tap, forbidden otherwise.
	Device string
	// Addresses of the guest, at least one; at most one per family is usual. Required with Tap, forbidden otherwise.
	Addresses []netip.Prefix
	// Gateways are the default routes, at most one per family. Only with Tap.
	Gateways []netip.Addr
}

// Guest is what the guest must be told of its wire, as plain values. The zero value is a guest with loopback only.
type Guest struct {
	MAC        net.HardwareAddr // of the machine's device; nil: there is none
	MTU        int              // of that device
	Interfaces []Interface
	DNS        []netip.Addr // nameservers
	Search     []string     // search domains
	HostIP     netip.Addr   // what host.docker.internal and host-gateway stand for; invalid: nothing
	// Resolver says that the guest is to answer DNS at an address of its own, by asking the first of DNS: networks come and go.
	Resolver bool
}

// Interface is one of the guest's.
type Interface struct {
	Tag       int // of IEEE 802.1Q, on the machine's device; 0: the device itself
	MAC       net.HardwareAddr
	MTU       int
	Addresses []netip.Prefix
	Gateways  []netip.Addr // default routes, at most one per family
}

// Wire is a machine's connection to the world, open from before the machine starts until after it has ended.
type Wire interface {
	// File is the descriptor that QEMU inherits, nil without a network. It belongs to the wire; call CloseFile in the
	// parent once QEMU has been started, or the end of QEMU is never noticed.
	File() *os.File
	// CloseFile closes File. It may be called twice.
	CloseFile() error
	// Netdev is the argument of QEMU's -netdev for File as descriptor fd of QEMU, empty without a network.
	Netdev(id string, fd int) string
	// Guest is what the guest must be told.
	Guest() Guest
	// Ports are the published ports as they are really bound: every address and port named, ranges and zeros resolved.
	Ports() []Port
	// SetSegments puts the machine on other networks. What a network that stays carries goes on. Only with Config.Shared.
	SetSegments([]Segment) error
	// Close ends every connection and waits for everything that the wire started. It may be called twice.
	Close() error
}

// Shared is the word for the networks of a bundle's SegmentsFile.
const Shared = "shared"

// ParseMode reads the value of a --network flag: "none", "user" (also "", "default" and "bridge", docker's words for
// the network one gets without asking, and Shared) or "tap:NAME".
func ParseMode(s string) (mode Mode, device string, err error) {
	switch {
	case s == "" || s == "default" || s == "bridge" || s == Shared || s == string(User):
		return User, "", nil
	case s == string(None):
		return None, "", nil
	case strings.HasPrefix(s, "tap:"):
		device = strings.TrimPrefix(s, "tap:")
		if err := checkDevice(device); err != nil {
			return "", "", fmt.Errorf("parse network %q: %w", s, err)
		}
		return Tap, device, nil
	}
	return "", "", fmt.Errorf("parse network %q: want none, user or tap:NAME", s)
}

// Validate says what is wrong with a configuration.
func (c *Config) Validate() error {
	if c.MTU != 0 && (c.MTU < MinMTU || c.MTU > MaxMTU) {
		return fmt.Errorf("mtu: want %d to %d, got %d", MinMTU, MaxMTU, c.MTU)
	}
	if c.MAC != nil && (len(c.MAC) != 6 || c.MAC[0]&1 != 0 || [6]byte(c.MAC) == [6]byte{}) {
		return fmt.Errorf("mac: %s is not a unicast Ethernet address", c.MAC)
	}
	switch c.Mode {
	case None:
		if len(c.Ports) > 0 {
			return fmt.Errorf("publish %s: a pod without network has no ports; use --network user", c.Ports[0])
		}
	case User:
		if len(c.Addresses) > 0 || len(c.Gateways) > 0 {
			return errors.New("addresses: the user network has fixed ones; give your own with --network tap:NAME")
		}
	case Tap:
		if err := checkDevice(c.Device); err != nil {
			return err
		}
		if len(c.Ports) > 0 {
			return fmt.Errorf("publish %s: a tap device has no published ports, the pod is reached by its address; use --network user", c.Ports[0])
		}
		if len(c.Addresses) == 0 {
			return fmt.Errorf("tap %s: the guest's address is missing; give it with --ip ADDRESS/BITS", c.Device)
		}
		for _, p := range c.Addresses {
			if !p.IsValid() || !p.Addr().IsValid() || p.Addr().IsMulticast() || p.Addr().IsUnspecified() || p.Addr().IsLoopback() {
				return fmt.Errorf("tap %s: %s is not an address a guest can have", c.Device, p)
			}
		}
		families := map[bool]bool{}
		for _, g := range c.Gateways {
			if !g.IsValid() || families[g.Is4()] {
				return fmt.Errorf("tap %s: gateway %s: want at most one per family", c.Device, g)
			}
			families[g.Is4()] = true
		}
	default:
		return fmt.Errorf("mode: want none, user or tap, got %q", c.Mode)
	}
	if c.Mode != User && c.End != nil {
		return errors.New("end: only the user network goes on with a wire that is there")
	}
	if c.Shared && c.Mode != User || !c.Shared && len(c.Segments) > 0 {
		return errors.New("segments: only the user network can be on shared ones")
	}
	if err := checkSegments(c.Segments); err != nil {
		return err
	}
	if c.Mode != Tap && c.Device != "" {
		return fmt.Errorf("device: %q is only for a tap", c.Device)
	}
	if len(c.Ports) > maxPorts {
		return fmt.Errorf("publish: %d ports are more than the limit of %d", len(c.Ports), maxPorts)
	}
	for _, p := range c.Ports {
		if err := p.Validate(); err != nil {
			return err
		}
	}
	return nil
}

// Open makes the wire of one machine. Published ports are bound when it returns; a connection that arrives before the
// guest runs waits for it. The context bounds Open alone, not the wire.
func Open(ctx context.Context, c Config, log *slog.Logger) (Wire, error) {
	if err := c.Validate(); err != nil {
		return nil, fmt.Errorf("open network: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("open network: %w", err)
	}
	if c.MAC == nil {
		c.MAC = randomMAC()
	}
	var w Wire
	var err error
	switch c.Mode {
	case User:
		w, err = openUser(ctx, c, log)
	case Tap:
		w, err = openTap(c, log)
	default:
		w = none{}
	}
	if err != nil {
		return nil, fmt.Errorf("open network: %w", err)
	}
	return w, nil
}

// randomMAC is a unicast, locally administered address.
func randomMAC() net.HardwareAddr {
	mac := make(net.HardwareAddr, 6)
	_, _ = rand.Read(mac) // never fails since Go 1.24
	mac[0] = mac[0]&^1 | 2
	return mac
}

// none is the wire of a machine without network.
type none struct{}

var _ Wire = none{}

func (none) File() *os.File              { return nil }
func (none) CloseFile() error            { return nil }
func (none) Netdev(string, int) string   { return "" }
func (none) Guest() Guest                { return Guest{} }
func (none) Ports() []Port               { return nil }
func (none) SetSegments([]Segment) error { return errNotShared }
func (none) Close() error                { return nil }

var errNotShared = errors.New("this machine's wire is its own: it was not started on shared networks")
