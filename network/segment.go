package network

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/kcradle/kcradle/network/lan"
)

// maxSegments bounds the networks of one machine, each of which may have a stack.
const maxSegments = 16

// Segment is a network of this host that the machine is on.
type Segment struct {
	// Tag tells the networks of one machine apart: frames of the network 0 have none, those of others that tag of IEEE 802.1Q.
	Tag  int    `json:"tag"`
	Name string `json:"name"`
	// Dir is where the machines on this network meet; empty: this one is alone on it.
	Dir       string         `json:"dir,omitempty"`
	MAC       lan.MAC        `json:"mac"`
	MTU       int            `json:"mtu"`
	Addresses []netip.Prefix `json:"addresses"` // at most one per family
	// Gateways answer DNS, and route unless the network is Internal; one for each family of Addresses.
	Gateways []netip.Addr `json:"gateways"`
	Default  bool         `json:"default,omitempty"`  // the default routes go this way
	Internal bool         `json:"internal,omitempty"` // reaches the other machines on it alone
	// Resolve says that the names of the others resolve; those of Links do anyhow.
	Resolve bool              `json:"resolve,omitempty"`
	Names   []string          `json:"names,omitempty"` // of this machine
	Links   map[string]string `json:"links,omitempty"` // names that stand for others' names, for this machine alone
}

// SegmentsFile is the file of a bundle that says which networks its pod is on, for a start on shared networks.
const SegmentsFile = "networks.json"

// segmentsVersion is the version of that file.
//
// History:
//   - 1: first version.
const segmentsVersion = 1

type segmentsFile struct {
	Version  int       `json:"version"`
	Segments []Segment `json:"networks"`
}

// EncodeSegments is the content of a SegmentsFile.
func EncodeSegments(list []Segment) ([]byte, error) {
	b, err := json.MarshalIndent(segmentsFile{segmentsVersion, list}, "", "  ")
	return append(b, '\n'), err
}

// ParseSegments reads it.
func ParseSegments(b []byte) ([]Segment, error) {
	var f segmentsFile
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		return nil, fmt.Errorf("read %s: %w", SegmentsFile, err)
	}
	if f.Version != segmentsVersion {
		return nil, fmt.Errorf("read %s: version %d is not %d", SegmentsFile, f.Version, segmentsVersion)
	}
	return f.Segments, checkSegments(f.Segments)
}

func checkSegments(list []Segment) error {
	if len(list) > maxSegments {
		return fmt.Errorf("segments: %d networks are more than the limit of %d", len(list), maxSegments)
	}
	tags := map[int]bool{}
	for _, s := range list {
		err := func() error {
			if s.Tag < 0 || s.Tag > 4094 || tags[s.Tag] {
				return fmt.Errorf("tag %d: want one of 0 to 4094 for each", s.Tag)
			}
			tags[s.Tag] = true
			if s.MAC.Multicast() || s.MAC == (lan.MAC{}) {
				return fmt.Errorf("%s is not a unicast Ethernet address", s.MAC)
			}
			if s.MTU < 68 || s.MTU > MaxMTU {
				return fmt.Errorf("mtu: want 68 to %d, got %d", MaxMTU, s.MTU)
			}
			for _, list := range [][]netip.Addr{s.Gateways, prefixAddresses(s.Addresses)} {
				families := map[bool]bool{}
				for _, a := range list {
					if !unicast(a) || a.IsLoopback() || a.Is4In6() || families[a.Is4()] {
						return fmt.Errorf("address %s: want one host's, and one per family", a)
					}
					families[a.Is4()] = true
				}
			}
			return nil
		}()
		if err != nil {
			return fmt.Errorf("network %s: %w", s.Name, err)
		}
	}
	return nil
}

func prefixAddresses(list []netip.Prefix) (out []netip.Addr) {
	for _, p := range list {
		out = append(out, p.Addr())
	}
	return out
}

// alone is the only network of a machine that has a wire of its own.
func alone(c Config, p plan) Segment {
	return Segment{
		Name: string(User), MAC: lan.MAC(c.MAC), MTU: c.MTU, Default: true,
		Addresses: []netip.Prefix{netip.PrefixFrom(p.guest4, p.net4.Bits()), netip.PrefixFrom(p.guest6, p.net6.Bits())},
		Gateways:  []netip.Addr{p.gateway4, p.gateway6},
	}
}

// addressPlan is that of a network of several machines. Its gateway stands for the host, as with docker.
func (s *Segment) addressPlan() (p plan) {
	for _, a := range s.Addresses {
		if a.Addr().Is4() {
			p.guest4, p.net4 = a.Addr(), a.Masked()
		} else {
			p.guest6, p.net6 = a.Addr(), a.Masked()
		}
	}
	for _, a := range s.Gateways {
		if a.Is4() {
			p.gateway4 = a
		} else {
			p.gateway6 = a
		}
	}
	p.host4, p.host6 = p.gateway4, p.gateway6
	return p
}

// segment is one network of a machine, with its stack.
type segment struct {
	Segment
	plan   plan
	link   *link
	lan    *lan.LAN // nil: nobody else is there
	cancel context.CancelFunc
	gate   gate // of the stack's flows

	build sync.Once
	net   *netstack // valid after build
	make  func() *netstack

	names sync.Mutex // guards Names and Links
}

// join makes a segment of the wire.
func (u *user) join(w Segment) (*segment, error) {
	s := &segment{Segment: w, plan: u.plan}
	if u.config.Shared {
		s.plan = w.addressPlan()
	}
	s.link = newLink(u.conn, gatewayMAC(w.MAC[:]), w.MAC[:], w.MTU, w.Tag)
	if w.Dir != "" {
		m := lan.Member{MAC: w.MAC, Addresses: prefixAddresses(w.Addresses), Names: w.Names}
		var err error
		if s.lan, err = lan.Join(w.Dir, m, s.toGuest); err != nil {
			return nil, err
		}
	}
	var run context.Context
	run, s.cancel = context.WithCancel(u.run)
	s.make = func() *netstack {
		return newNetstack(run, u.machine, stackConfig{
			plan: s.plan, noHost: u.config.NoHost, internal: w.Internal, link: s.link, dns: u.resolver, gate: &s.gate, log: u.log, born: u.config.born,
		})
	}
	return s, nil
}

// stack builds the stack when it is first needed. It is nil when the segment was closed before that.
func (s *segment) stack() *netstack {
	s.build.Do(func() { s.net = s.make() })
	return s.net
}

// same says whether a segment is this one, but for names.
func (s *segment) same(w Segment) bool {
	return s.Tag == w.Tag && s.Name == w.Name && s.Dir == w.Dir && s.MAC == w.MAC && s.MTU == w.MTU && s.Internal == w.Internal &&
		s.Resolve == w.Resolve && s.Default == w.Default && slices.Equal(s.Addresses, w.Addresses) && slices.Equal(s.Gateways, w.Gateways)
}

func (s *segment) rename(w Segment) error {
	s.names.Lock()
	defer s.names.Unlock()
	s.Names, s.Links = w.Names, maps.Clone(w.Links)
	if s.lan == nil {
		return nil
	}
	return s.lan.Rename(w.Names)
}

// lookup resolves a name on this network.
func (s *segment) lookup(name string) []netip.Addr {
	if s.lan == nil {
		return nil
	}
	s.names.Lock()
	links := s.Links
	s.names.Unlock()
	for alias, target := range links {
		if strings.EqualFold(alias, name) {
			return s.lan.Lookup(target)
		}
	}
	if !s.Resolve {
		return nil
	}
	if base, suffix := len(name)-len(s.Name)-1, "."+s.Name; base > 0 && strings.EqualFold(name[base:], suffix) {
		name = name[:base]
	}
	return s.lan.Lookup(name)
}

// leave makes the others on the network forget this machine, and ends what the segment carries. It does not wait.
func (s *segment) leave() {
	if s.lan != nil {
		s.lan.Leave()
	}
}

// drain waits for the flows that still carry what the guest has sent, or until late.
func (s *segment) drain(late <-chan time.Time) {
	s.build.Do(func() {}) // nothing builds the stack from here on
	if s.net == nil {
		return
	}
	select {
	case <-s.net.carried.none():
	case <-late:
	}
}

// close ends the segment. No frame of the guest may be delivered to it any more.
func (s *segment) close() {
	s.build.Do(func() {})
	s.cancel()
	s.gate.shut()
	s.link.close()
	if s.lan != nil {
		_ = s.lan.Close()
	}
	if s.net != nil {
		s.net.close()
	}
	s.gate.wait()
}

const (
	etherVLAN  = 0x8100 // IEEE 802.1Q
	etherSize  = header.EthernetMinimumSize
	vlanHeader = 4
)

// untag takes the tag out of a frame, in place; nil is a frame that is none.
func untag(frame []byte) (_ []byte, tag int) {
	if len(frame) < etherSize {
		return nil, 0
	}
	if frame[12] != etherVLAN>>8 || frame[13] != etherVLAN&0xff {
		return frame, 0
	}
	if len(frame) < etherSize+vlanHeader {
		return nil, 0
	}
	tag = (int(frame[14])<<8 | int(frame[15])) & 0xfff
	if tag == 0 { // a priority alone
		return nil, 0
	}
	copy(frame[vlanHeader:], frame[:12])
	return frame[vlanHeader:], tag
}

// fromGuest takes a frame of the machine: to the stack, or to the others on the network. The machine speaks for itself alone.
func (s *segment) fromGuest(frame []byte) {
	if len(frame) > etherSize+s.MTU {
		return
	}
	if s.lan == nil {
		s.toStack(frame)
		return
	}
	eth, packet := header.Ethernet(frame[:etherSize]), frame[etherSize:]
	to := lan.MAC(frame[:6])
	if lan.MAC(frame[6:12]) != s.MAC {
		return
	}
	switch eth.Type() {
	case header.ARPProtocolNumber:
		if !s.answerARP(packet) {
			s.toStack(frame)
		}
		return
	case header.IPv4ProtocolNumber:
		ip := header.IPv4(packet)
		if !ip.IsValid(len(packet)) || address(ip.SourceAddress()) != s.plan.guest4 {
			return
		}
	case header.IPv6ProtocolNumber:
		ip := header.IPv6(packet)
		if !ip.IsValid(len(packet)) || address(ip.SourceAddress()) != s.plan.guest6 {
			return
		}
		if body := packet[header.IPv6MinimumSize:]; ip.TransportProtocol() == header.ICMPv6ProtocolNumber && isSolicit(body) {
			if !s.answerSolicit(ip, body) {
				s.toStack(frame)
			}
			return
		}
	default:
		return
	}
	switch {
	case to == s.link.mac:
		s.toStack(frame)
	case to.Multicast():
		s.lan.Flood(frame)
	default:
		s.lan.Send(frame)
	}
}

func (s *segment) toStack(frame []byte) {
	if n := s.stack(); n != nil {
		n.deliver(frame)
	}
}

// answerARP answers for another machine: their addresses are known, and none can take that of another.
func (s *segment) answerARP(packet []byte) bool {
	if len(packet) < header.ARPSize {
		return true
	}
	h := header.ARP(packet[:header.ARPSize])
	if !h.IsValid() || h.Op() != header.ARPRequest {
		return true
	}
	target := netip.AddrFrom4([4]byte(h.ProtocolAddressTarget()))
	if target == s.plan.gateway4 {
		return false
	}
	if mac, ok := s.lan.Neighbour(target); ok {
		s.link.replyARP(h, mac)
	}
	return true
}

// answerSolicit does the same for IPv6.
func (s *segment) answerSolicit(ip header.IPv6, body []byte) bool {
	target := address(header.NDPNeighborSolicit(header.ICMPv6(body).MessageBody()).TargetAddress())
	if target == s.plan.gateway6 || ip.HopLimit() != header.NDPHopLimit {
		return false
	}
	if mac, ok := s.lan.Neighbour(target); ok {
		s.link.writeICMP6(macBits(s.MAC[:]), target, s.plan.guest6, header.NDPHopLimit, advert(target, mac, false))
	}
	return true
}

// toGuest takes a frame of another machine.
func (s *segment) toGuest(frame []byte) {
	if len(frame) < etherSize || len(frame) > etherSize+s.MTU {
		return
	}
	if to := lan.MAC(frame); to == s.MAC || to.Multicast() {
		s.link.writeFrame(frame)
	}
}
