package spec

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// PodVersion is the version of the pod document this code writes and the newest it reads.
//
// History:
//   - 1: first version.
const PodVersion = 1

// Bounds of a pod document. They are far above what real pods need and far below what hurts.
const (
	MaxPodBytes   = 4 << 20
	MaxContainers = 64
	MaxLayers     = 127 // of one image, docker's own limit
	MaxVolumes    = 16
)

// Pod is what the owner asked for: the containers of one machine. Its canonical bytes (see [Pod.Encode]) are
// DIR/pod.json; in an attested pod they are measured. Nothing in it depends on the host.
type Pod struct {
	Version  int    `json:"version"`            // required; see PodVersion
	Name     string `json:"name"`               // required; a DNS label
	Hostname string `json:"hostname,omitempty"` // empty: the name
	Domain   string `json:"domainname,omitempty"`

	// VCPUs and Memory size the machine. Memory is what the containers get together; the guest's own need
	// is added to it by the host. Zero: the host's default.
	VCPUs  int   `json:"vcpus,omitempty"`
	Memory int64 `json:"memory,omitempty"` // bytes

	DNS        []string `json:"dns,omitempty"`         // nameserver addresses; empty: the placement's
	DNSSearch  []string `json:"dns_search,omitempty"`  //
	DNSOptions []string `json:"dns_options,omitempty"` //
	ExtraHosts []Host   `json:"extra_hosts,omitempty"`

	Containers []Container `json:"containers"` // required, 1 to MaxContainers, in order of their start
	Volumes    []Volume    `json:"volumes,omitempty"`
	Ports      []Port      `json:"ports,omitempty"`
}

// HostGateway is the address in an extra host that stands for the host's own.
const HostGateway = "host-gateway"

// Host is a line of /etc/hosts. Address HostGateway stands for the host.
type Host struct {
	Name    string `json:"name"`
	Address string `json:"address"`
}

// Port is a published port of the pod, as docker's -p.
type Port struct {
	Proto         string `json:"proto"`             // "tcp" or "udp"
	ContainerPort uint16 `json:"container_port"`    // 1 to 65535
	HostIP        string `json:"host_ip,omitempty"` // empty: every address
	HostPort      uint16 `json:"host_port"`         // 0: a free one
	// HostPortEnd makes it a range: the first free one from HostPort to HostPortEnd. Zero: HostPort alone.
	HostPortEnd uint16 `json:"host_port_end,omitempty"`
}

// Image is where a container's files come from.
type Image struct {
	Ref      string   `json:"ref"`              // as the owner wrote it
	Digest   string   `json:"digest,omitempty"` // of the manifest, "sha256:…"
	ConfigID string   `json:"config"`           // digest of the image configuration, docker's image ID
	Layers   []string `json:"layers"`           // diffIDs "sha256:…", oldest first; may be empty
}

// Container is one container as its owner asked for it, with the image's own configuration merged in.
// Field meanings are those of docker's Config and HostConfig; what is zero is docker's default.
type Container struct {
	ID    string `json:"id"`   // required; 64 hex digits
	Name  string `json:"name"` // required; docker's name rule, unique in the pod
	Image Image  `json:"image"`

	Created time.Time `json:"created"` // when the container was summoned, UTC

	// Entrypoint and Cmd are kept apart for inspect; the process is their concatenation (required non-empty).
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	Env        []string `json:"env,omitempty"`
	WorkingDir string   `json:"working_dir,omitempty"`
	User       string   `json:"user,omitempty"` // name|uid[:group|gid], resolved inside the image
	GroupAdd   []string `json:"group_add,omitempty"`

	TTY       bool `json:"tty,omitempty"`
	OpenStdin bool `json:"open_stdin,omitempty"`
	StdinOnce bool `json:"stdin_once,omitempty"`
	Init      bool `json:"init,omitempty"` // a reaper as the container's PID 1

	StopSignal  string `json:"stop_signal,omitempty"`  // empty: SIGTERM
	StopTimeout *int   `json:"stop_timeout,omitempty"` // seconds; nil: 10; negative: wait for ever

	Labels       map[string]string `json:"labels,omitempty"`
	ExposedPorts []string          `json:"exposed_ports,omitempty"` // "80/tcp"

	Mounts   []Mount `json:"mounts,omitempty"`
	ReadOnly bool    `json:"read_only,omitempty"`
	ShmSize  int64   `json:"shm_size,omitempty"` // bytes; zero: 64 MiB
	NoShm    bool    `json:"no_shm,omitempty"`   // there is no /dev/shm
	// WritableCgroups lets the container make cgroups below its own.
	WritableCgroups bool `json:"writable_cgroups,omitempty"`
	Privileged      bool `json:"privileged,omitempty"`

	// MaskedPaths are covered, ReadonlyPaths cannot be written; nil: DefaultMaskedPaths and DefaultReadonlyPaths. A privileged
	// container has none.
	MaskedPaths   *[]string `json:"masked_paths,omitempty"`
	ReadonlyPaths *[]string `json:"readonly_paths,omitempty"`

	CapAdd      []string            `json:"cap_add,omitempty"`
	CapDrop     []string            `json:"cap_drop,omitempty"`
	NoNewPrivs  bool                `json:"no_new_privileges,omitempty"`
	Ulimits     []specs.POSIXRlimit `json:"ulimits,omitempty"`
	Sysctls     map[string]string   `json:"sysctls,omitempty"`
	OOMScoreAdj int                 `json:"oom_score_adj,omitempty"`
	Resources   Resources           `json:"resources,omitzero"` // cgroup v2: memory, swap, cpu, pids, block io
	Devices     []specs.LinuxDevice `json:"devices,omitempty"`

	Restart     Restart      `json:"restart,omitzero"`
	Healthcheck *Healthcheck `json:"healthcheck,omitempty"`

	// After names containers that must have started (or, with Completed, ended with 0) before this one starts.
	After []Dependency `json:"after,omitempty"`
	// NonCritical: the pod does not end when this container ends for good. The pod ends when every critical
	// container has, or one of them failed with nothing left to restart it.
	NonCritical bool `json:"non_critical,omitempty"`
}

// Resources are limits as the OCI runtime specification has them. Its JSON methods keep encoding/json from looking at all the
// types below it for every pod: the guest parses one on the way to its first process.
type Resources struct{ specs.LinuxResources }

// MarshalJSON encodes r as the specification says.
func (r Resources) MarshalJSON() ([]byte, error) { return json.Marshal(r.LinuxResources) }

// UnmarshalJSON decodes r strictly.
func (r *Resources) UnmarshalJSON(b []byte) error { return strict(b, &r.LinuxResources) }

// Dependency is one condition for a container's start.
type Dependency struct {
	Container string `json:"container"` // name
	Condition string `json:"condition"` // "started", "healthy" or "completed"
}

// Conditions of a Dependency.
const (
	ConditionStarted   = "started"
	ConditionHealthy   = "healthy"
	ConditionCompleted = "completed"
)

// Restart is docker's restart policy.
type Restart struct {
	Name       string `json:"name,omitempty"` // "", "no", "on-failure", "always", "unless-stopped"
	MaxRetries int    `json:"max_retries,omitempty"`
}

// Healthcheck is docker's health check; zero durations mean docker's defaults. Durations are nanoseconds.
type Healthcheck struct {
	Test          []string      `json:"test"` // ["NONE"], ["CMD", …] or ["CMD-SHELL", "…"]
	Interval      time.Duration `json:"interval,omitempty"`
	Timeout       time.Duration `json:"timeout,omitempty"`
	StartPeriod   time.Duration `json:"start_period,omitempty"`
	StartInterval time.Duration `json:"start_interval,omitempty"`
	Retries       int           `json:"retries,omitempty"`
}

// Mount kinds.
const (
	MountVolume = "volume" // a Volume of the pod, by name
	MountTmpfs  = "tmpfs"
	MountBind   = "bind" // a directory of the host, shared over 9p on the control channel
)

// Mount puts something at a path inside a container.
type Mount struct {
	Type     string `json:"type"`             // MountVolume, MountTmpfs or MountBind
	Source   string `json:"source,omitempty"` // volume name, or host path of a bind
	Target   string `json:"target"`           // absolute path in the container
	ReadOnly bool   `json:"read_only,omitempty"`
	NoCopy   bool   `json:"no_copy,omitempty"` // do not copy the image's content into an empty volume
	// NonRecursive leaves out what the host has mounted below a bind's source.
	NonRecursive bool     `json:"non_recursive,omitempty"`
	Options      []string `json:"options,omitempty"` // tmpfs: mount options such as size=64m, mode=1777
}

// Volume is a named block volume: an ext4 image in the bundle, mounted from a subdirectory.
type Volume struct {
	Name string `json:"name"`           // required; docker's volume name rule
	Size int64  `json:"size,omitempty"` // bytes; zero: the host's default
}

// The rules of names. They are written out, not regular expressions: the guest checks a pod on the way to its first
// process, and compiling expressions with bounds cost more than the rest of the parsing.

// isName: [a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}
func isName(s string) bool {
	if len(s) < 1 || len(s) > 128 {
		return false
	}
	for i := range len(s) {
		c := s[i]
		if !isAlnum(c) && (c < 'A' || c > 'Z') && (i == 0 || c != '_' && c != '.' && c != '-') {
			return false
		}
	}
	return true
}

// isLabel: [a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?
func isLabel(s string) bool {
	if len(s) < 1 || len(s) > 63 || s[0] == '-' || s[len(s)-1] == '-' {
		return false
	}
	for i := range len(s) {
		if !isAlnum(s[i]) && s[i] != '-' {
			return false
		}
	}
	return true
}

// isID: [0-9a-f]{64}
func isID(s string) bool {
	if len(s) != 64 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}

// isDigest: sha256:[0-9a-f]{64}
func isDigest(s string) bool {
	hex, ok := strings.CutPrefix(s, "sha256:")
	return ok && isID(hex)
}

// isAlnum: [a-z0-9]
func isAlnum(c byte) bool { return c >= 'a' && c <= 'z' || c >= '0' && c <= '9' }

// ErrNewer is returned (wrapped) for a document of a version this code does not know.
var ErrNewer = errors.New("written by a newer kcradle; upgrade kcradle to use it")

// ParsePod reads a pod document strictly: one JSON value, no unknown field, a known version, valid content.
func ParsePod(b []byte) (*Pod, error) {
	if len(b) > MaxPodBytes {
		return nil, fmt.Errorf("parse pod: %d bytes are more than the limit of %d", len(b), MaxPodBytes)
	}
	var p Pod
	if err := strict(b, &p); err != nil {
		// What this version does not know may be right in a newer one.
		var v struct {
			Version int `json:"version"`
		}
		if json.Unmarshal(b, &v) == nil && v.Version > PodVersion {
			err = fmt.Errorf("version %d: %w", v.Version, ErrNewer)
		}
		return nil, fmt.Errorf("parse pod: %w", err)
	}
	if p.Version > PodVersion {
		return nil, fmt.Errorf("parse pod: version %d: %w", p.Version, ErrNewer)
	}
	if err := p.Validate(); err != nil {
		return nil, fmt.Errorf("parse pod: %w", err)
	}
	return &p, nil
}

// strict decodes one JSON value without unknown fields and with nothing behind it.
func strict(b []byte, into any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("there is something behind the document")
	}
	return nil
}

// Encode returns the canonical bytes of a valid pod: fields in the order of the types, map keys sorted, two
// spaces of indentation (a person reads it), a final newline.
func (p *Pod) Encode() ([]byte, error) {
	if err := p.Validate(); err != nil {
		return nil, fmt.Errorf("encode pod: %w", err)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(p); err != nil {
		return nil, fmt.Errorf("encode pod: %w", err)
	}
	return b.Bytes(), nil
}

// Args is the process of a container: entrypoint, then command.
func (c *Container) Args() []string { return slices.Concat(c.Entrypoint, c.Cmd) }

// Bind is a mount of a host's directory or file in one container.
type Bind struct {
	Container string // name
	Mount     Mount
}

// Binds returns the mounts of kind MountBind in the order of the document; Placement.Shares has the same order.
func (p *Pod) Binds() []Bind {
	var out []Bind
	for _, c := range p.Containers {
		for _, m := range c.Mounts {
			if m.Type == MountBind {
				out = append(out, Bind{Container: c.Name, Mount: m})
			}
		}
	}
	return out
}

// Container returns the container of that name, or nil.
func (p *Pod) Container(name string) *Container {
	for i := range p.Containers {
		if p.Containers[i].Name == name {
			return &p.Containers[i]
		}
	}
	return nil
}

// Layers returns the diffIDs of all images, each once, in order of first use: the order in which they lie on the
// layers drive.
func (p *Pod) Layers() []string {
	var out []string
	seen := map[string]bool{}
	for _, c := range p.Containers {
		for _, l := range c.Image.Layers {
			if !seen[l] {
				seen[l] = true
				out = append(out, l)
			}
		}
	}
	return out
}

// Validate says what is wrong with a pod, naming the field.
func (p *Pod) Validate() error {
	switch {
	case p.Version < 1 || p.Version > PodVersion:
		return fmt.Errorf("version: want 1 to %d, got %d", PodVersion, p.Version)
	case !isLabel(p.Name):
		return fmt.Errorf("name: %q is not a DNS label (a-z, 0-9, -; at most 63)", p.Name)
	case len(p.Hostname) > 253:
		return errors.New("hostname: longer than 253 bytes")
	case p.VCPUs < 0 || p.VCPUs > 64:
		return fmt.Errorf("vcpus: want 0 to 64, got %d", p.VCPUs)
	case p.Memory < 0:
		return fmt.Errorf("memory: negative (%d)", p.Memory)
	case len(p.Containers) == 0:
		return errors.New("containers: a pod needs at least one")
	case len(p.Containers) > MaxContainers:
		return fmt.Errorf("containers: %d are more than the limit of %d", len(p.Containers), MaxContainers)
	case len(p.Volumes) > MaxVolumes:
		return fmt.Errorf("volumes: %d are more than the limit of %d", len(p.Volumes), MaxVolumes)
	}
	volumes := map[string]bool{}
	for i, v := range p.Volumes {
		if !isName(v.Name) {
			return fmt.Errorf("volumes[%d].name: %q is not a volume name", i, v.Name)
		}
		if volumes[v.Name] {
			return fmt.Errorf("volumes[%d].name: %q is there twice", i, v.Name)
		}
		if v.Size < 0 {
			return fmt.Errorf("volumes[%d].size: negative", i)
		}
		volumes[v.Name] = true
	}
	for i, port := range p.Ports {
		if port.Proto != "tcp" && port.Proto != "udp" {
			return fmt.Errorf("ports[%d].proto: want tcp or udp, got %q", i, port.Proto)
		}
		if port.ContainerPort == 0 {
			return fmt.Errorf("ports[%d].container_port: missing", i)
		}
		if port.HostPortEnd != 0 && port.HostPortEnd < port.HostPort {
			return fmt.Errorf("ports[%d].host_port_end: %d is before host_port %d", i, port.HostPortEnd, port.HostPort)
		}
	}
	earlier := map[string]bool{}
	ids := map[string]bool{}
	for i := range p.Containers {
		c := &p.Containers[i]
		if err := c.validate(volumes, earlier); err != nil {
			return fmt.Errorf("containers[%d]%w", i, err)
		}
		if earlier[c.Name] {
			return fmt.Errorf("containers[%d].name: %q is there twice", i, c.Name)
		}
		if ids[c.ID] {
			return fmt.Errorf("containers[%d].id: %q is there twice", i, c.ID)
		}
		earlier[c.Name], ids[c.ID] = true, true
	}
	return nil
}

func (c *Container) validate(volumes, earlier map[string]bool) error {
	switch {
	case !isID(c.ID):
		return fmt.Errorf(".id: %q is not 64 lower-case hex digits", c.ID)
	case !isName(c.Name):
		return fmt.Errorf(".name: %q is not a container name ([a-zA-Z0-9][a-zA-Z0-9_.-]*)", c.Name)
	case len(c.Args()) == 0:
		return errors.New(".cmd: no command specified")
	case len(c.Image.Layers) > MaxLayers:
		return fmt.Errorf(".image.layers: %d are more than the limit of %d", len(c.Image.Layers), MaxLayers)
	case !isDigest(c.Image.ConfigID):
		return fmt.Errorf(".image.config: %q is not a sha256 digest", c.Image.ConfigID)
	case c.Image.Digest != "" && !isDigest(c.Image.Digest):
		return fmt.Errorf(".image.digest: %q is not a sha256 digest", c.Image.Digest)
	case c.WorkingDir != "" && !strings.HasPrefix(c.WorkingDir, "/"):
		return fmt.Errorf(".working_dir: %q is not an absolute path", c.WorkingDir)
	case c.ShmSize < 0:
		return errors.New(".shm_size: negative")
	}
	for field, list := range map[string]*[]string{"masked_paths": c.MaskedPaths, "readonly_paths": c.ReadonlyPaths} {
		if list == nil {
			continue
		}
		if len(*list) > maxPaths {
			return fmt.Errorf(".%s: %d are more than the limit of %d", field, len(*list), maxPaths)
		}
		for i, p := range *list {
			if !strings.HasPrefix(p, "/") || strings.ContainsRune(p, 0) {
				return fmt.Errorf(".%s[%d]: %q is not an absolute path", field, i, p)
			}
		}
	}
	for i, l := range c.Image.Layers {
		if !isDigest(l) {
			return fmt.Errorf(".image.layers[%d]: %q is not a sha256 digest", i, l)
		}
	}
	for i, s := range slices.Concat(c.Args(), c.Env) {
		if strings.ContainsRune(s, 0) {
			return fmt.Errorf(": NUL byte in argument or environment entry %d", i)
		}
	}
	for i, m := range c.Mounts {
		switch {
		case !strings.HasPrefix(m.Target, "/"):
			return fmt.Errorf(".mounts[%d].target: %q is not an absolute path", i, m.Target)
		case m.Type == MountVolume && !volumes[m.Source]:
			return fmt.Errorf(".mounts[%d].source: the pod has no volume %q", i, m.Source)
		case m.Type == MountBind && !strings.HasPrefix(m.Source, "/"):
			return fmt.Errorf(".mounts[%d].source: %q is not an absolute path", i, m.Source)
		case m.Type != MountVolume && m.Type != MountTmpfs && m.Type != MountBind:
			return fmt.Errorf(".mounts[%d].type: want volume, tmpfs or bind, got %q", i, m.Type)
		}
	}
	switch c.Restart.Name {
	case "", "no", "always", "unless-stopped", "on-failure":
	default:
		return fmt.Errorf(".restart.name: want no, always, unless-stopped or on-failure, got %q", c.Restart.Name)
	}
	if c.Restart.MaxRetries < 0 || c.Restart.MaxRetries > 0 && c.Restart.Name != "on-failure" {
		return errors.New(".restart.max_retries: only a positive number, and only with on-failure")
	}
	for i, d := range c.After {
		switch d.Condition {
		case ConditionStarted, ConditionHealthy, ConditionCompleted:
		default:
			return fmt.Errorf(".after[%d].condition: want started, healthy or completed, got %q", i, d.Condition)
		}
		if !earlier[d.Container] {
			return fmt.Errorf(".after[%d].container: no container %q stands before this one", i, d.Container)
		}
	}
	return nil
}

// maxPaths bounds MaskedPaths and ReadonlyPaths.
const maxPaths = 256

// DefaultMaskedPaths are the paths that docker covers.
func DefaultMaskedPaths() []string {
	return []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats",
		"/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
}

// DefaultReadonlyPaths are those that docker makes read-only.
func DefaultReadonlyPaths() []string {
	return []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
}
