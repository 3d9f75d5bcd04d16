package main

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/kernel"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
)

// Sizes of a machine whose pod names none.
const (
	defaultMemory = 1 << 30 // bytes for the containers; what is not used goes back to the host
	defaultVCPUs  = 4       // at most, and no more than the host has
)

// volumeDevices is how many volumes get a block device each, which is what a microvm has places for beside the network. More
// than that share one, which cannot give freed blocks back to the host.
const volumeDevices = 3

// guestMemory is what the guest itself needs beside what its containers were promised: the kernel with its page
// tables and init. It grows with the machine, because the kernel keeps 64 bytes for each page of 4 KiB.
func guestMemory(pod int64) int64 { return 64<<20 + pod/48 }

// step rounds a machine's memory up to the next of few sizes, so that machines of about the same size share a template: a
// power of two, or one and a quarter, a half or three quarters of one. Limits of containers are exact, whatever the
// machine has.
func step(memory int64) int64 {
	p := int64(128 << 20)
	for p < memory/2 {
		p *= 2
	}
	for _, quarters := range []int64{4, 5, 6, 7, 8} {
		if n := p / 4 * quarters; n >= memory {
			return n
		}
	}
	return memory // more than two to the 62nd
}

// podMemory is what the containers get together.
func podMemory(p *spec.Pod) int64 {
	if p.Memory > 0 {
		return p.Memory
	}
	// Limits are promises: the machine must be able to keep all of them.
	var sum int64
	for _, c := range p.Containers {
		if m := c.Resources.Memory; m != nil && m.Limit != nil && *m.Limit > 0 {
			sum += *m.Limit
		}
	}
	return max(sum, defaultMemory)
}

// machineInput is everything that a machine is made from.
type machineInput struct {
	Bundle   *bundle.Bundle
	Pod      *spec.Pod // of the bundle, with the overrides of this start
	Package  *bundle.Package
	Layers   []bundle.Layer
	Volumes  []bundle.Volume
	Engine   vmm.Engine
	QEMU     string
	HostCPUs int
	Wire     *vmm.Wire
	CID      uint32
	RunAs    *vmm.Credential
	TSCKHz   uint32 // of the host
}

// machineConfig turns a bundle into a machine. It is pure.
func machineConfig(in machineInput) vmm.Config {
	memory := podMemory(in.Pod)
	c := vmm.Config{
		Name:        "kcradle:" + in.Pod.Name,
		Engine:      in.Engine,
		QEMU:        in.QEMU,
		Kernel:      in.Package.KernelPath(),
		Initrd:      in.Package.InitrdPath(),
		CommandLine: in.Package.Manifest.CommandLine,
		VCPUs:       in.Pod.VCPUs,
		Memory:      step(memory + guestMemory(memory)),
		Wire:        in.Wire,
		Console:     filepath.Join(in.Bundle.RunDir(), "console.log"),
		CID:         in.CID,
		RunAs:       in.RunAs,
	}
	if c.VCPUs == 0 {
		c.VCPUs = max(1, min(in.HostCPUs, defaultVCPUs))
		if in.Engine == vmm.TCG { // in software each more costs a tenth of the boot
			c.VCPUs = 1
		}
	}
	if in.Engine == vmm.TCG {
		c.CommandLine += " " + kernel.Emulated(kernel.Emulation{CPUs: c.VCPUs, TSCKHz: in.TSCKHz})
	}
	c.Drives = append(c.Drives, vmm.Drive{Serial: spec.SerialScratch, Path: in.Bundle.ScratchPath()})
	layers := vmm.Drive{Serial: spec.SerialLayers, ReadOnly: true, Blank: len(in.Layers) == 0}
	for _, l := range in.Layers {
		layers.Extents = append(layers.Extents, vmm.Extent{Path: l.Path, Size: l.Size})
	}
	c.Drives = append(c.Drives, layers)
	if len(in.Volumes) > volumeDevices {
		d := vmm.Drive{Serial: spec.SerialVolumes}
		for _, v := range in.Volumes {
			d.Extents = append(d.Extents, vmm.Extent{Path: v.Path, Size: v.Size})
		}
		c.Drives = append(c.Drives, d)
	} else {
		for i, v := range in.Volumes {
			c.Drives = append(c.Drives, vmm.Drive{Serial: spec.VolumeSerial(i), Path: v.Path})
		}
	}
	// Over virtio-serial the control channel needs no place of its own: AF_VSOCK gives way to a drive.
	if c.CID != 0 && errors.Is(c.Validate(), vmm.ErrSlots) {
		c.CID = 0
	}
	return c
}

// extents says where each layer lies on the layers drive: one behind the other, each rounded up.
func extents(layers []bundle.Layer) []spec.Extent {
	var out []spec.Extent
	at := int64(0)
	for _, l := range layers {
		n := aligned(l.Size)
		out = append(out, spec.Extent{DiffID: l.DiffID, Offset: at, Length: n})
		at += n
	}
	return out
}

// volumeDrives says where each volume is.
func volumeDrives(volumes []bundle.Volume) []spec.Drive {
	var out []spec.Drive
	at := int64(0)
	for i, v := range volumes {
		d := spec.Drive{Name: v.Name, Serial: spec.VolumeSerial(i)}
		if len(volumes) > volumeDevices {
			d.Serial, d.Offset, d.Length = spec.SerialVolumes, at, aligned(v.Size)
			at += d.Length
		}
		out = append(out, d)
	}
	return out
}

// aligned is the length that a file takes among the extents of a drive.
func aligned(size int64) int64 {
	return (size + vmm.ExtentAlignment - 1) / vmm.ExtentAlignment * vmm.ExtentAlignment
}

// guestNetwork is what the guest is told of its wire.
func guestNetwork(mode network.Mode, g network.Guest, ports []network.Port) spec.Network {
	n := spec.Network{Mode: string(mode), DNSSearch: g.Search, Published: specPorts(ports), Resolver: g.Resolver}
	if g.HostIP.IsValid() {
		n.HostIP = g.HostIP.String()
	}
	for _, a := range g.DNS {
		n.DNS = append(n.DNS, a.String())
	}
	for _, i := range g.Interfaces {
		out := spec.Interface{Name: fmt.Sprintf("eth%d", i.Tag), Tag: i.Tag, MAC: i.MAC.String(), MTU: i.MTU}
		for _, a := range i.Addresses {
			out.Addresses = append(out.Addresses, a.String())
		}
		for _, a := range i.Gateways {
			out.Gateways = append(out.Gateways, a.String())
		}
		n.Interfaces = append(n.Interfaces, out)
	}
	return n
}

func specPorts(ports []network.Port) []spec.Port {
	var out []spec.Port
	for _, p := range ports {
		s := spec.Port{Proto: p.Proto, ContainerPort: p.ContainerPort, HostPort: p.HostPort, HostPortEnd: p.HostPortEnd}
		if p.HostIP.IsValid() {
			s.HostIP = p.HostIP.String()
		}
		out = append(out, s)
	}
	return out
}

func networkPorts(ports []spec.Port) ([]network.Port, error) {
	var out []network.Port
	for _, p := range ports {
		n := network.Port{Proto: p.Proto, ContainerPort: p.ContainerPort, HostPort: p.HostPort, HostPortEnd: p.HostPortEnd}
		if p.HostIP != "" {
			a, err := netip.ParseAddr(p.HostIP)
			if err != nil {
				return nil, fmt.Errorf("port %d: %w", p.ContainerPort, err)
			}
			n.HostIP = a
		}
		out = append(out, n)
	}
	return out, nil
}

// parsePublish reads every -p.
func parsePublish(list []string) ([]spec.Port, error) {
	var out []spec.Port
	for _, s := range list {
		ports, err := network.ParsePorts(s)
		if err != nil {
			return nil, fmt.Errorf("invalid argument %q for \"-p, --publish\" flag: %w", s, err)
		}
		out = append(out, specPorts(ports)...)
	}
	return out, nil
}

// podName makes a DNS label of a directory's name.
func podName(dir string) string {
	var b strings.Builder
	for _, r := range strings.ToLower(filepath.Base(dir)) {
		switch {
		case r >= 'a' && r <= 'z' || r >= '0' && r <= '9':
			b.WriteRune(r)
		case b.Len() > 0:
			b.WriteByte('-')
		}
	}
	name := b.String()
	if len(name) > 63 {
		name = name[:63]
	}
	if name = strings.TrimRight(name, "-"); name == "" {
		return "pod"
	}
	return name
}
