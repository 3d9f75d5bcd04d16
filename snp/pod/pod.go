// Package pod reads of a pod.json what somebody who verifies a pod can hold it to: its images, and what in it reaches
// beyond them.
//
//	p, err := pod.Parse(b)
//	fmt.Println(pod.DigestOf(b), p.Containers[0].Image.Digest, p.HostMounts())
//
// The whole document, with a sentence for each field, is kcradle's spec/pod.go. A field that is not known there may do
// anything, so Parse refuses it here too. Whether the bytes are those of an attested pod is not this package's question:
// package verify compares their digest.
package pod

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/kcradle/kcradle/snp/internal/strict"
)

// Version is the version of the pod document that this code reads.
const Version = 1

// MaxBytes bounds a pod document, in bytes.
const MaxBytes = 4 << 20

// Digest is a SHA-256 as containers write it.
type Digest [sha256.Size]byte

// DigestOf returns the pod digest of a pod.json: the SHA-256 of its bytes.
func DigestOf(b []byte) Digest { return sha256.Sum256(b) }

const prefix = "sha256:"

// ParseDigest reads sha256: and 64 lower case hexadecimal digits.
func ParseDigest(s string) (Digest, error) {
	var d Digest
	err := d.UnmarshalText([]byte(s))
	return d, err
}

// String returns what ParseDigest reads.
func (d Digest) String() string { return prefix + hex.EncodeToString(d[:]) }

// MarshalText writes what ParseDigest reads.
func (d Digest) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// UnmarshalText is ParseDigest.
func (d *Digest) UnmarshalText(b []byte) error {
	if len(b) < len(prefix) || string(b[:len(prefix)]) != prefix {
		return fmt.Errorf("%.80q, want %s and 64 hexadecimal digits", b, prefix)
	}
	var read Digest
	if err := strict.Hex(read[:], b[len(prefix):]); err != nil {
		return err
	}
	*d = read
	return nil
}

// Pod is what of a pod.json is held against somebody's wishes.
type Pod struct {
	Name       string
	Containers []Container // in the order of their start
	Volumes    []string    // names of the volumes that the pod keeps
}

// Container is one container of a Pod.
type Container struct {
	Name       string
	Image      Image
	Binds      []string // directories of the host in it
	Privileged bool
	Devices    int      // devices of the machine in it
	CapAdd     []string // capabilities beyond the usual
}

// Image is where a container's files come from.
type Image struct {
	Ref    string // as the owner wrote it
	Digest Digest // of the manifest; zero: the pod names none
	Config Digest // of the image configuration, docker's image ID
}

// HostMounts returns the directories of the host that containers have mounted, which the host may change at any time.
func (p *Pod) HostMounts() (out []string) {
	for _, c := range p.Containers {
		for _, b := range c.Binds {
			out = append(out, c.Name+": "+b)
		}
	}
	return out
}

// UnverifiedVolumes returns the volumes whose content the guest does not verify: as of version 1, all.
func (p *Pod) UnverifiedVolumes() []string { return p.Volumes }

// Privileges returns what lets containers act as the machine, which may ask for reports in the pod's name.
func (p *Pod) Privileges() (out []string) {
	for _, c := range p.Containers {
		if c.Privileged {
			out = append(out, c.Name+": privileged")
		}
		if c.Devices > 0 {
			out = append(out, c.Name+": devices of the machine")
		}
		for _, name := range c.CapAdd {
			if !ownCapability(name) {
				out = append(out, c.Name+": capability "+name)
			}
		}
	}
	return out
}

// ownCapabilities are those that reach no further than the container, or the pod's network and share of the processors:
// docker's default set, and a few that are often added.
var ownCapabilities = []string{
	"AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE", "NET_RAW", "SETFCAP",
	"SETGID", "SETPCAP", "SETUID", "SYS_CHROOT",
	"IPC_LOCK", "LEASE", "LINUX_IMMUTABLE", "NET_ADMIN", "NET_BROADCAST", "SYS_NICE", "SYS_RESOURCE",
}

// ownCapability reads a name as docker does: in any case, with CAP_ before it or not.
func ownCapability(name string) bool {
	return slices.Contains(ownCapabilities, strings.TrimPrefix(strings.ToUpper(name), "CAP_"))
}

// Images returns the images of the containers, each manifest and configuration once.
func (p *Pod) Images() (out []Image) {
	for _, c := range p.Containers {
		if !slices.ContainsFunc(out, func(i Image) bool { return i.Digest == c.Image.Digest && i.Config == c.Image.Config }) {
			out = append(out, c.Image)
		}
	}
	return out
}

// document is a pod.json with the names of spec.Pod. A test in test/snp holds them against each other.
type document struct {
	Version    int         `json:"version" strict:"required"`
	Name       string      `json:"name" strict:"required"`
	Hostname   strict.Any  `json:"hostname"`
	Domain     strict.Any  `json:"domainname"`
	VCPUs      strict.Any  `json:"vcpus"`
	Memory     strict.Any  `json:"memory"`
	DNS        strict.Any  `json:"dns"`
	DNSSearch  strict.Any  `json:"dns_search"`
	DNSOptions strict.Any  `json:"dns_options"`
	ExtraHosts strict.Any  `json:"extra_hosts"`
	Containers []container `json:"containers" strict:"required"`
	Volumes    []volume    `json:"volumes"`
	Ports      strict.Any  `json:"ports"`
}

type container struct {
	ID           strict.Any   `json:"id"`
	Name         string       `json:"name" strict:"required"`
	Image        image        `json:"image" strict:"required"`
	Created      strict.Any   `json:"created"`
	Entrypoint   strict.Any   `json:"entrypoint"`
	Cmd          strict.Any   `json:"cmd"`
	Env          strict.Any   `json:"env"`
	WorkingDir   strict.Any   `json:"working_dir"`
	User         strict.Any   `json:"user"`
	GroupAdd     strict.Any   `json:"group_add"`
	TTY          strict.Any   `json:"tty"`
	OpenStdin    strict.Any   `json:"open_stdin"`
	StdinOnce    strict.Any   `json:"stdin_once"`
	Init         strict.Any   `json:"init"`
	StopSignal   strict.Any   `json:"stop_signal"`
	StopTimeout  strict.Any   `json:"stop_timeout"`
	Labels       strict.Any   `json:"labels"`
	ExposedPorts strict.Any   `json:"exposed_ports"`
	Mounts       []mount      `json:"mounts"`
	ReadOnly     strict.Any   `json:"read_only"`
	ShmSize      strict.Any   `json:"shm_size"`
	NoShm        strict.Any   `json:"no_shm"`
	Cgroups      strict.Any   `json:"writable_cgroups"`
	Masked       strict.Any   `json:"masked_paths"`
	Unwritable   strict.Any   `json:"readonly_paths"`
	Privileged   bool         `json:"privileged"`
	CapAdd       []string     `json:"cap_add"`
	CapDrop      strict.Any   `json:"cap_drop"`
	NoNewPrivs   strict.Any   `json:"no_new_privileges"`
	Ulimits      strict.Any   `json:"ulimits"`
	Sysctls      strict.Any   `json:"sysctls"`
	OOMScoreAdj  strict.Any   `json:"oom_score_adj"`
	Resources    strict.Any   `json:"resources"`
	Devices      []strict.Any `json:"devices"`
	Restart      strict.Any   `json:"restart"`
	Healthcheck  strict.Any   `json:"healthcheck"`
	After        strict.Any   `json:"after"`
	NonCritical  strict.Any   `json:"non_critical"`
}

type image struct {
	Ref      string     `json:"ref"`
	Digest   Digest     `json:"digest"`
	ConfigID Digest     `json:"config" strict:"required"`
	Layers   strict.Any `json:"layers"`
}

type mount struct {
	Type     string     `json:"type" strict:"required"`
	Source   string     `json:"source"`
	Target   strict.Any `json:"target"`
	ReadOnly strict.Any `json:"read_only"`
	NoCopy   strict.Any `json:"no_copy"`
	Without  strict.Any `json:"non_recursive"`
	Options  strict.Any `json:"options"`
}

type volume struct {
	Name string     `json:"name" strict:"required"`
	Size strict.Any `json:"size"`
}

// Parse reads a pod.json. Unknown fields and kinds of mounts are errors, as are names that stand twice. What it does not
// return it has not checked; the guest has.
func Parse(b []byte) (*Pod, error) {
	var d document
	if err := strict.Decode(b, strict.Limits{Bytes: MaxBytes, Depth: 16, Entries: 1 << 16}, &d); err != nil {
		return nil, fmt.Errorf("pod: %w", err)
	}
	if d.Version != Version {
		return nil, fmt.Errorf("pod: version %d is not known here, want %d", d.Version, Version)
	}
	if len(d.Containers) == 0 {
		return nil, errors.New("pod: no containers")
	}
	p := &Pod{Name: d.Name}
	for i, c := range d.Containers {
		out := Container{
			Name:       c.Name,
			Image:      Image{Ref: c.Image.Ref, Digest: c.Image.Digest, Config: c.Image.ConfigID},
			Privileged: c.Privileged, Devices: len(c.Devices), CapAdd: c.CapAdd,
		}
		for j, m := range c.Mounts {
			switch m.Type {
			case "bind":
				out.Binds = append(out.Binds, m.Source)
			case "volume", "tmpfs":
			default:
				return nil, fmt.Errorf("pod: containers[%d].mounts[%d].type: %q is not known here", i, j, m.Type)
			}
		}
		p.Containers = append(p.Containers, out)
	}
	for _, v := range d.Volumes {
		p.Volumes = append(p.Volumes, v.Name)
	}
	return p, nil
}
