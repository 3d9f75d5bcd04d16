package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	apinet "github.com/moby/moby/api/types/network"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
)

// request is what a client asks for when it creates a container.
type request struct {
	container.CreateRequest
	// Of versions up to 1.43, in Config.
	MacAddress string
}

// wish is a request in our own terms.
type wish struct {
	pod       spec.Pod // without its image, ID and name
	volumes   []volumeUse
	network   string // mode of the machine's wire: "none" or "shared"
	endpoints []endpointWish
	scratch   int64 // bytes of the writable disk; zero: the default
	// Warnings for the client.
	warnings []string
}

// volumeUse is a volume that a mount of the request names, or an anonymous one.
type volumeUse struct {
	name      string // empty: anonymous, to be named
	mount     int    // index in the container's mounts
	labels    map[string]string
	options   map[string]string
	anonymous bool
}

// A refusal is a field of a request that no machine here can honour, with the reason. Silence would be a lie.
type refusal struct {
	field string
	set   bool
	why   string
}

const ownKernel = "a container has a machine and a kernel of its own, and nothing of the host's to share"

// refusals is the table of what is refused. A field that is not here is honoured or means nothing on Linux.
func refusals(r *request) []refusal {
	c, h := r.Config, r.HostConfig
	return []refusal{
		{"Config.ArgsEscaped", c.ArgsEscaped, "it is of Windows"},
		{"HostConfig.CgroupParent", h.CgroupParent != "", ownKernel},
		{"HostConfig.Cgroup", h.Cgroup != "", ownKernel},
		{"HostConfig.CgroupnsMode", !slices.Contains([]container.CgroupnsMode{"", "private"}, h.CgroupnsMode), ownKernel},
		{"HostConfig.IpcMode", !slices.Contains([]container.IpcMode{"", "private", "shareable", "none"}, h.IpcMode), ownKernel},
		{"HostConfig.PidMode", h.PidMode != "" && h.PidMode != "private", ownKernel},
		{"HostConfig.UTSMode", h.UTSMode != "", ownKernel},
		{"HostConfig.BlkioWeightDevice", len(h.BlkioWeightDevice) > 0, ownKernel},
		{"HostConfig.BlkioDeviceReadBps", len(h.BlkioDeviceReadBps) > 0, ownKernel},
		{"HostConfig.BlkioDeviceWriteBps", len(h.BlkioDeviceWriteBps) > 0, ownKernel},
		{"HostConfig.BlkioDeviceReadIOps", len(h.BlkioDeviceReadIOps) > 0, ownKernel},
		{"HostConfig.BlkioDeviceWriteIOps", len(h.BlkioDeviceWriteIOps) > 0, ownKernel},
		{"HostConfig.CpuRealtimePeriod", h.CPURealtimePeriod != 0, "the machine's kernel has no real-time groups"},
		{"HostConfig.CpuRealtimeRuntime", h.CPURealtimeRuntime != 0, "the machine's kernel has no real-time groups"},
		{"HostConfig.Devices", len(h.Devices) > 0, ownKernel},
		{"HostConfig.DeviceCgroupRules", len(h.DeviceCgroupRules) > 0, ownKernel},
		{"HostConfig.DeviceRequests", len(h.DeviceRequests) > 0, ownKernel},
		{"HostConfig.Umask", h.Umask != nil, "it is not known here yet"},
		{"HostConfig.VolumeDriver", h.VolumeDriver != "" && h.VolumeDriver != localDriver, "volumes are disks of this host: there is the driver local alone"},
		{"HostConfig.LogConfig.Type", !slices.Contains([]string{"", logDriver, "local"}, h.LogConfig.Type), "logs are kept in the form of " + logDriver + " alone"},
		{"HostConfig.Isolation", !h.Isolation.IsDefault(), "it is of Windows"},
		{"HostConfig.CpuCount", h.CPUCount != 0, "it is of Windows"},
		{"HostConfig.CpuPercent", h.CPUPercent != 0, "it is of Windows"},
		{"HostConfig.IOMaximumIOps", h.IOMaximumIOps != 0, "it is of Windows"},
		{"HostConfig.IOMaximumBandwidth", h.IOMaximumBandwidth != 0, "it is of Windows"},
	}
}

// Names of what docker has several of.
const (
	localDriver = "local"
	logDriver   = "json-file"
	runtimeName = "kcradle"
)

// translate turns a request and the image's own configuration into a pod. It is pure: what depends on this host's state (other
// containers, volumes, ports) is its caller's; from are the mounts of the containers that VolumesFrom names.
func translate(r *request, img dockerspec.DockerOCIImageConfig, from []spec.Mount) (*wish, error) {
	h := r.HostConfig
	for what, bad := range map[string]bool{
		"UTS mode: " + string(h.UTSMode): !h.UTSMode.Valid(), "PID mode: " + string(h.PidMode): !h.PidMode.Valid(),
		"IPC mode: " + string(h.IpcMode): !h.IpcMode.Valid(), "userns mode: " + string(h.UsernsMode): !h.UsernsMode.Valid(),
		"cgroup namespace mode: " + string(h.CgroupnsMode): !h.CgroupnsMode.Valid(),
	} {
		if bad {
			return nil, dockerapi.BadRequest("invalid %s", what)
		}
	}
	for _, e := range r.Env {
		if name, _, _ := strings.Cut(e, "="); name == "" {
			return nil, dockerapi.BadRequest("invalid environment variable: %s", e)
		}
	}
	if _, empty := h.Annotations[""]; empty {
		return nil, dockerapi.BadRequest("invalid Annotations: the empty string is not permitted as an annotation key")
	}
	for _, f := range refusals(r) {
		if f.set {
			return nil, dockerapi.BadRequest("%s is refused: %s", f.field, f.why)
		}
	}
	w := &wish{}
	c, err := w.container(r, img, from)
	if err != nil {
		return nil, err
	}
	p := spec.Pod{Version: spec.PodVersion, Hostname: r.Hostname, Domain: r.Domainname, DNSSearch: h.DNSSearch, DNSOptions: h.DNSOptions}
	for _, a := range h.DNS {
		p.DNS = append(p.DNS, a.String())
	}
	for _, s := range h.ExtraHosts {
		host, err := extraHost(s)
		if err != nil {
			return nil, err
		}
		p.ExtraHosts = append(p.ExtraHosts, host)
	}
	if w.network, err = networkMode(r); err != nil {
		return nil, err
	}
	if w.endpoints, err = endpointWishes(r); err != nil {
		return nil, err
	}
	if p.Ports, err = ports(r, img); err != nil {
		return nil, err
	}
	p.Memory, p.VCPUs = h.Memory, int(math.Ceil(float64(h.NanoCPUs)/1e9))
	for k, v := range h.StorageOpt {
		if k != "size" {
			return nil, dockerapi.BadRequest("unknown option %s for storage driver %s", k, storageDriver)
		}
		if w.scratch, err = units.RAMInBytes(v); err != nil || w.scratch <= 0 {
			return nil, dockerapi.BadRequest("invalid size %q in HostConfig.StorageOpt", v)
		}
	}
	p.Containers = []spec.Container{*c}
	w.pod = p
	return w, nil
}

// storageDriver is what stacks a container's file system; docker calls it so too.
const storageDriver = "overlay2"

func (w *wish) container(r *request, img dockerspec.DockerOCIImageConfig, from []spec.Mount) (*spec.Container, error) {
	cfg, h := r.Config, r.HostConfig
	c := &spec.Container{
		Entrypoint: cfg.Entrypoint, Cmd: cfg.Cmd, WorkingDir: cmp.Or(cfg.WorkingDir, img.WorkingDir), User: cmp.Or(cfg.User, img.User),
		GroupAdd: h.GroupAdd, TTY: cfg.Tty, OpenStdin: cfg.OpenStdin, StdinOnce: cfg.StdinOnce,
		StopSignal: cmp.Or(cfg.StopSignal, img.StopSignal), StopTimeout: cfg.StopTimeout,
		ReadOnly: h.ReadonlyRootfs, Privileged: h.Privileged, OOMScoreAdj: h.OomScoreAdj, ShmSize: h.ShmSize, NoShm: h.IpcMode.IsNone(),
		Sysctls: h.Sysctls, Init: h.Init != nil && *h.Init,
	}
	if h.MaskedPaths != nil {
		c.MaskedPaths = &h.MaskedPaths
	}
	if h.ReadonlyPaths != nil {
		c.ReadonlyPaths = &h.ReadonlyPaths
	}
	// docker's rule: a command alone keeps the image's entrypoint, an entrypoint forgets the image's command. A list with one
	// empty word takes the image's entrypoint away.
	if len(c.Cmd) == 0 && len(c.Entrypoint) == 0 {
		c.Cmd = img.Cmd
	}
	if c.Entrypoint == nil {
		c.Entrypoint = img.Entrypoint
	}
	if len(c.Entrypoint) == 1 && c.Entrypoint[0] == "" {
		c.Entrypoint = nil
	}
	if len(c.Args()) == 0 {
		return nil, dockerapi.BadRequest("no command specified")
	}
	if c.WorkingDir != "" && !path.IsAbs(c.WorkingDir) {
		if cfg.WorkingDir != "" {
			return nil, dockerapi.BadRequest("the working directory '%s' is invalid, it needs to be an absolute path", cfg.WorkingDir)
		}
		c.WorkingDir = "/" + c.WorkingDir
	}
	if c.WorkingDir != "" {
		c.WorkingDir = path.Clean(c.WorkingDir)
	}
	c.Env = environment(img.Env, cfg.Env)
	c.Labels = maps.Clone(img.Labels)
	for k, v := range cfg.Labels {
		if c.Labels == nil {
			c.Labels = map[string]string{}
		}
		c.Labels[k] = v
	}
	for p := range img.ExposedPorts {
		c.ExposedPorts = append(c.ExposedPorts, withProto(p))
	}
	for p := range cfg.ExposedPorts {
		c.ExposedPorts = append(c.ExposedPorts, p.String())
	}
	slices.Sort(c.ExposedPorts)
	c.ExposedPorts = slices.Compact(c.ExposedPorts)
	var err error
	if err = w.mounts(c, r, img, from); err != nil {
		return nil, err
	}
	if c.Restart, err = restart(h); err != nil {
		return nil, err
	}
	if c.Healthcheck, err = healthcheck(cfg.Healthcheck, img.Healthcheck); err != nil {
		return nil, err
	}
	if err = security(c, h); err != nil {
		return nil, err
	}
	return c, w.resources(c, h)
}

// environment is what a container gets of [mergedEnv]: a name without a value takes the image's away.
func environment(img, own []string) []string {
	return slices.DeleteFunc(mergedEnv(img, own), func(e string) bool { return !strings.Contains(e, "=") })
}

// mergedEnv is the image's, with the client's in place of what it names.
func mergedEnv(img, own []string) []string {
	out := slices.Clone(own)
	names := map[string]bool{}
	for _, e := range own {
		name, _, _ := strings.Cut(e, "=")
		names[name] = true
	}
	for _, e := range img {
		if name, _, _ := strings.Cut(e, "="); !names[name] {
			out = append(out, e)
		}
	}
	return out
}

func withProto(port string) string {
	if strings.Contains(port, "/") {
		return strings.ToLower(port)
	}
	return port + "/tcp"
}

// restart is the policy, by docker's rules.
func restart(h *container.HostConfig) (spec.Restart, error) {
	p := h.RestartPolicy
	r := spec.Restart{Name: string(p.Name), MaxRetries: p.MaximumRetryCount}
	switch p.Name {
	case "", "no":
		r.Name = ""
		if p.MaximumRetryCount != 0 {
			return r, dockerapi.BadRequest("invalid restart policy: maximum retry count can only be used with 'on-failure'")
		}
	case "always", "unless-stopped":
		if p.MaximumRetryCount != 0 {
			return r, dockerapi.BadRequest("invalid restart policy: maximum retry count can only be used with 'on-failure'")
		}
	case "on-failure":
		if p.MaximumRetryCount < 0 {
			return r, dockerapi.BadRequest("invalid restart policy: maximum retry count cannot be negative")
		}
	default:
		return r, dockerapi.BadRequest("invalid restart policy: unknown policy '%s'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'", p.Name)
	}
	if h.AutoRemove && r.Name != "" {
		return r, dockerapi.BadRequest("can't create 'AutoRemove' container with restart policy")
	}
	return r, nil
}

func healthcheck(own *container.HealthConfig, img *dockerspec.HealthcheckConfig) (*spec.Healthcheck, error) {
	h := spec.Healthcheck{}
	if img != nil {
		h = spec.Healthcheck{Test: img.Test, Interval: img.Interval, Timeout: img.Timeout,
			StartPeriod: img.StartPeriod, StartInterval: img.StartInterval, Retries: img.Retries}
	}
	if own != nil {
		if len(own.Test) > 0 {
			h.Test = own.Test
		}
		for _, d := range []struct {
			name  string
			given time.Duration
			into  *time.Duration
		}{
			{"Interval", own.Interval, &h.Interval}, {"Timeout", own.Timeout, &h.Timeout},
			{"StartPeriod", own.StartPeriod, &h.StartPeriod}, {"StartInterval", own.StartInterval, &h.StartInterval},
		} {
			if d.given < 0 || d.given > 0 && d.given < time.Millisecond {
				return nil, dockerapi.BadRequest("%s in Healthcheck cannot be less than 1ms", d.name)
			}
			*d.into = cmp.Or(d.given, *d.into)
		}
		if own.Retries < 0 {
			return nil, dockerapi.BadRequest("Retries in Healthcheck cannot be negative")
		}
		h.Retries = cmp.Or(own.Retries, h.Retries)
	}
	if len(h.Test) == 0 || h.Test[0] == "" {
		return nil, nil
	}
	switch h.Test[0] {
	case "NONE", "CMD", "CMD-SHELL":
		return &h, nil
	}
	return nil, dockerapi.BadRequest("unknown Healthcheck.Test %q: want NONE, CMD or CMD-SHELL first", h.Test[0])
}

// security is what HostConfig says of rights. What only switches off a guard that a machine does not have is no wish.
func security(c *spec.Container, h *container.HostConfig) error {
	for _, s := range h.SecurityOpt {
		key, value, _ := strings.Cut(strings.Replace(s, ":", "=", 1), "=")
		switch {
		case key == "no-new-privileges" && (value == "" || value == "true"):
			c.NoNewPrivs = true
		case key == "no-new-privileges" && value == "false":
		case key == "writable-cgroups" && (value == "" || value == "true"):
			c.WritableCgroups = true
		case key == "writable-cgroups" && value == "false":
		case (key == "seccomp" || key == "apparmor") && value == "unconfined", key == "label" && value == "disable":
		case key == "seccomp" || key == "apparmor" || key == "label":
			return dockerapi.BadRequest("HostConfig.SecurityOpt %q is refused: a machine of its own has no seccomp, AppArmor or SELinux profile of the host; known are no-new-privileges and writable-cgroups", s)
		default:
			return dockerapi.BadRequest("invalid --security-opt 2: %q", s)
		}
	}
	for into, list := range map[*[]string][]string{&c.CapAdd: h.CapAdd, &c.CapDrop: h.CapDrop} {
		for _, s := range list {
			name := strings.ToUpper(s)
			if name != "ALL" && !strings.HasPrefix(name, "CAP_") {
				name = "CAP_" + name
			}
			if strings.Trim(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ_") != "" || name == "CAP_" {
				return dockerapi.BadRequest("invalid capability: %q", s)
			}
			if !slices.Contains(*into, name) {
				*into = append(*into, name)
			}
		}
	}
	switch h.Runtime {
	case "", runtimeName:
	default:
		return dockerapi.BadRequest("unknown or invalid runtime name: %s", h.Runtime)
	}
	return nil
}

// minMemory is docker's own least limit.
const minMemory = 6 << 20

func (w *wish) resources(c *spec.Container, h *container.HostConfig) error {
	limits, err := resources(&h.Resources)
	if err != nil {
		return err
	}
	c.Resources = *limits
	if h.OomKillDisable != nil && *h.OomKillDisable {
		w.warnings = append(w.warnings, "Your kernel does not support OomKillDisable. OomKillDisable discarded.")
	}
	if h.MemorySwappiness != nil && *h.MemorySwappiness != -1 {
		if *h.MemorySwappiness < 0 || *h.MemorySwappiness > 100 {
			return dockerapi.BadRequest("invalid value: %d, valid memory swappiness range is 0-100", *h.MemorySwappiness)
		}
		w.warnings = append(w.warnings, "Your kernel does not support memory swappiness capabilities or the cgroup is not mounted. Memory swappiness discarded.")
	}
	if h.OomScoreAdj < -1000 || h.OomScoreAdj > 1000 {
		return dockerapi.BadRequest("invalid value %d, range for oom score adj is [-1000, 1000]", h.OomScoreAdj)
	}
	if h.ShmSize < 0 {
		return dockerapi.BadRequest("SHM size can not be less than 0")
	}
	for _, u := range h.Ulimits {
		if u == nil || u.Name == "" {
			return dockerapi.BadRequest("HostConfig.Ulimits: one without a name")
		}
		c.Ulimits = append(c.Ulimits, specs.POSIXRlimit{
			Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard)}) // -1: RLIM_INFINITY
	}
	return nil
}

// resources are the limits that an update may change, too.
func resources(r *container.Resources) (*spec.Resources, error) {
	out := &spec.Resources{}
	switch {
	case r.Memory < 0 || r.Memory > 0 && r.Memory < minMemory:
		return nil, dockerapi.BadRequest("Minimum memory limit allowed is 6MB")
	case r.MemorySwap > 0 && r.Memory == 0:
		return nil, dockerapi.BadRequest("You should always set the Memory limit when using Memoryswap limit, see usage")
	case r.MemorySwap > 0 && r.MemorySwap < r.Memory:
		return nil, dockerapi.BadRequest("Minimum memoryswap limit should be larger than memory limit, see usage")
	case r.MemoryReservation < 0 || r.MemoryReservation > 0 && r.MemoryReservation < minMemory:
		return nil, dockerapi.BadRequest("Minimum memory reservation allowed is 6MB")
	case r.MemoryReservation > r.Memory && r.Memory > 0:
		return nil, dockerapi.BadRequest("Minimum memory limit can not be less than memory reservation limit, see usage")
	case r.NanoCPUs != 0 && (r.CPUPeriod != 0 || r.CPUQuota != 0):
		return nil, dockerapi.BadRequest("Conflicting options: Nano CPUs and CPU Period/Quota cannot both be set")
	case r.NanoCPUs < 0 || r.NanoCPUs > 64e9:
		return nil, dockerapi.BadRequest("Range of CPUs is from 0.01 to 64.00, as there are at most 64 CPUs in a machine")
	case r.CPUPeriod != 0 && (r.CPUPeriod < 1000 || r.CPUPeriod > 1000000):
		return nil, dockerapi.BadRequest("CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)")
	case r.CPUQuota > 0 && r.CPUQuota < 1000:
		return nil, dockerapi.BadRequest("CPU cfs quota can not be less than 1ms (i.e. 1000)")
	case r.CPUShares < 0:
		return nil, dockerapi.BadRequest("invalid CPU shares (%d): value must be a positive integer", r.CPUShares)
	case r.BlkioWeight != 0 && (r.BlkioWeight < 10 || r.BlkioWeight > 1000):
		return nil, dockerapi.BadRequest("Range of blkio weight is from 10 to 1000")
	}
	if r.Memory != 0 || r.MemorySwap != 0 || r.MemoryReservation != 0 {
		out.Memory = &specs.LinuxMemory{Limit: nonZero(r.Memory), Swap: nonZero(r.MemorySwap), Reservation: nonZero(r.MemoryReservation)}
	}
	if r.NanoCPUs != 0 || r.CPUShares != 0 || r.CPUPeriod != 0 || r.CPUQuota != 0 || r.CpusetCpus != "" || r.CpusetMems != "" {
		cpu := &specs.LinuxCPU{Cpus: r.CpusetCpus, Mems: r.CpusetMems, Quota: nonZero(r.CPUQuota)}
		if r.CPUShares != 0 {
			shares := uint64(r.CPUShares)
			cpu.Shares = &shares
		}
		if r.CPUPeriod != 0 {
			period := uint64(r.CPUPeriod)
			cpu.Period = &period
		}
		if r.NanoCPUs != 0 {
			period, quota := uint64(100000), r.NanoCPUs/10000
			cpu.Period, cpu.Quota = &period, &quota
		}
		out.CPU = cpu
	}
	if r.PidsLimit != nil && *r.PidsLimit != 0 {
		out.Pids = &specs.LinuxPids{Limit: r.PidsLimit}
	}
	if r.BlkioWeight != 0 {
		weight := r.BlkioWeight
		out.BlockIO = &specs.LinuxBlockIO{Weight: &weight}
	}
	return out, nil
}

func nonZero(n int64) *int64 {
	if n == 0 {
		return nil
	}
	return &n
}

// networkMode is the wire that the machine gets.
func networkMode(r *request) (string, error) {
	mode := r.HostConfig.NetworkMode
	switch {
	case r.NetworkDisabled || mode.IsNone():
		return string(network.None), nil
	case mode.IsHost():
		return "", dockerapi.BadRequest("HostConfig.NetworkMode host is refused: %s; publish ports instead", ownKernel)
	case mode.IsContainer():
		return "", dockerapi.BadRequest("HostConfig.NetworkMode %s is refused: containers that share a network share a machine; summon them as one pod", mode)
	}
	return network.Shared, nil
}

// extraHost reads NAME:ADDRESS; the address may be host-gateway.
func extraHost(s string) (spec.Host, error) {
	name, addr, ok := strings.Cut(s, ":")
	if !ok || name == "" {
		return spec.Host{}, dockerapi.BadRequest("bad format for add-host: %q", s)
	}
	if addr == spec.HostGateway {
		return spec.Host{Name: name, Address: addr}, nil
	}
	a, err := netip.ParseAddr(strings.Trim(addr, "[]"))
	if err != nil {
		return spec.Host{}, dockerapi.BadRequest("invalid IP address in add-host: %q", addr)
	}
	return spec.Host{Name: name, Address: a.String()}, nil
}

// ports are the published ports: those of PortBindings and, with PublishAllPorts, a free one for each that is exposed.
func ports(r *request, img dockerspec.DockerOCIImageConfig) ([]spec.Port, error) {
	h := r.HostConfig
	var out []spec.Port
	bound := map[string]bool{}
	for port, bindings := range h.PortBindings {
		proto := string(port.Proto())
		if proto != "tcp" && proto != "udp" {
			return nil, dockerapi.BadRequest("HostConfig.PortBindings %s is refused: tcp and udp are published, nothing else", port)
		}
		if len(bindings) == 0 {
			bindings = []apinet.PortBinding{{}}
		}
		bound[port.String()] = true
		for _, b := range bindings {
			p := spec.Port{Proto: proto, ContainerPort: port.Num()}
			if b.HostIP.IsValid() {
				p.HostIP = b.HostIP.String()
			}
			first, last, isRange := strings.Cut(b.HostPort, "-")
			var err error
			if p.HostPort, err = portNumber(first); err == nil && isRange {
				p.HostPortEnd, err = portNumber(last)
			}
			if err == nil && isRange && p.HostPortEnd < p.HostPort {
				err = errors.New("the range ends before it begins")
			}
			if err != nil {
				return nil, dockerapi.BadRequest("invalid port specification: %q: %w", b.HostPort, err)
			}
			out = append(out, p)
		}
	}
	if h.PublishAllPorts {
		exposed := map[string]bool{}
		for p := range img.ExposedPorts {
			exposed[withProto(p)] = true
		}
		for p := range r.Config.ExposedPorts {
			exposed[p.String()] = true
		}
		for p := range exposed {
			port, err := apinet.ParsePort(p)
			if err != nil {
				return nil, dockerapi.BadRequest("exposed port %s: %w", p, err)
			}
			if !bound[p] {
				out = append(out, spec.Port{Proto: string(port.Proto()), ContainerPort: port.Num()})
			}
		}
	}
	slices.SortFunc(out, func(a, b spec.Port) int {
		return cmp.Or(cmp.Compare(a.ContainerPort, b.ContainerPort), cmp.Compare(a.Proto, b.Proto), cmp.Compare(a.HostPort, b.HostPort))
	})
	return out, nil
}

func portNumber(s string) (uint16, error) {
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseUint(s, 10, 16)
	if err != nil {
		return 0, fmt.Errorf("%q is no port", s)
	}
	return uint16(n), nil
}

// mounts reads Binds, Mounts, Tmpfs and the volumes that image and request want to be there.
func (w *wish) mounts(c *spec.Container, r *request, img dockerspec.DockerOCIImageConfig, from []spec.Mount) error {
	h := r.HostConfig
	add := func(m spec.Mount, v *volumeUse) error {
		if !path.IsAbs(m.Target) {
			return dockerapi.BadRequest("invalid mount path: '%s' mount path must be absolute", m.Target)
		}
		if m.Target = path.Clean(m.Target); m.Target == "/" {
			return dockerapi.BadRequest("invalid specification: destination can't be '/'")
		}
		if slices.ContainsFunc(c.Mounts, func(o spec.Mount) bool { return o.Target == m.Target }) {
			return dockerapi.BadRequest("Duplicate mount point: %s", m.Target)
		}
		if v != nil {
			v.mount = len(c.Mounts)
			w.volumes = append(w.volumes, *v)
		}
		c.Mounts = append(c.Mounts, m)
		return nil
	}
	for _, s := range h.Binds {
		m, v, err := bind(s)
		if err == nil {
			err = add(m, v)
		}
		if err != nil {
			return err
		}
	}
	for _, m := range h.Mounts {
		sm, v, err := longMount(m)
		if err == nil {
			err = add(sm, v)
		}
		if err != nil {
			return err
		}
	}
	for target, options := range h.Tmpfs {
		m := spec.Mount{Type: spec.MountTmpfs, Target: target}
		if options != "" {
			m.Options = strings.Split(options, ",")
		}
		if err := add(m, nil); err != nil {
			return err
		}
	}
	there := func(target string) bool {
		return slices.ContainsFunc(c.Mounts, func(o spec.Mount) bool { return o.Target == target })
	}
	for _, m := range from {
		if there(m.Target) {
			continue
		}
		var v *volumeUse
		if m.Type == spec.MountVolume {
			v = &volumeUse{name: m.Source}
		}
		if err := add(m, v); err != nil {
			return err
		}
	}
	anonymous := map[string]bool{}
	for t := range img.Volumes {
		anonymous[path.Clean(t)] = true
	}
	for t := range r.Config.Volumes {
		anonymous[path.Clean(t)] = true
	}
	for _, t := range slices.Sorted(maps.Keys(anonymous)) {
		if there(t) {
			continue
		}
		if err := add(spec.Mount{Type: spec.MountVolume, Target: t}, &volumeUse{anonymous: true}); err != nil {
			return err
		}
	}
	return nil
}

// bind reads an element of Binds: SOURCE:TARGET[:OPTIONS], or a target alone for an anonymous volume.
func bind(s string) (spec.Mount, *volumeUse, error) {
	parts := strings.Split(s, ":")
	if len(parts) > 3 || slices.Contains(parts, "") {
		return spec.Mount{}, nil, dockerapi.BadRequest("invalid volume specification: '%s'", s)
	}
	if len(parts) == 1 {
		return spec.Mount{Type: spec.MountVolume, Target: parts[0]}, &volumeUse{anonymous: true}, nil
	}
	m := spec.Mount{Source: parts[0], Target: parts[1]}
	if len(parts) == 3 {
		for o := range strings.SplitSeq(parts[2], ",") {
			switch o {
			case "ro":
				m.ReadOnly = true
			case "nocopy":
				m.NoCopy = true
			case "rw", "z", "Z", "cached", "delegated", "consistent", "rprivate", "private", "rslave", "slave": // as they are here
			default:
				return m, nil, dockerapi.BadRequest("invalid volume specification: '%s': invalid mode: %s", s, o)
			}
		}
	}
	if path.IsAbs(m.Source) {
		m.Type, m.Source = spec.MountBind, path.Clean(m.Source)
		return m, nil, nil
	}
	if err := volumeName(m.Source); err != nil {
		return m, nil, err
	}
	m.Type = spec.MountVolume
	return m, &volumeUse{name: m.Source}, nil
}

// volumeName is docker's rule for the name of a volume.
func volumeName(s string) error {
	ok := len(s) >= 2 && len(s) <= 128
	for i := range len(s) {
		b := s[i]
		alnum := b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9'
		ok = ok && (alnum || i > 0 && (b == '_' || b == '.' || b == '-'))
	}
	if !ok {
		return dockerapi.BadRequest("create %s: %q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", s, s)
	}
	return nil
}

// longMount reads an element of Mounts.
func longMount(m mount.Mount) (spec.Mount, *volumeUse, error) {
	out := spec.Mount{Source: m.Source, Target: m.Target, ReadOnly: m.ReadOnly}
	bad := func(format string, args ...any) (spec.Mount, *volumeUse, error) {
		return out, nil, dockerapi.BadRequest("invalid mount config for type %q: "+format, append([]any{m.Type}, args...)...)
	}
	if m.Target == "" {
		return bad("field Target must not be empty")
	}
	switch m.Type {
	case mount.TypeBind:
		out.Type = spec.MountBind
		switch {
		case m.Source == "":
			return bad("field Source must not be empty")
		case !path.IsAbs(m.Source):
			return bad("invalid mount path: '%s' mount path must be absolute", m.Source)
		case m.VolumeOptions != nil:
			return bad("field VolumeOptions must not be specified")
		}
		// What the host mounts later below a directory is seen in it, whatever is asked for; what a container mounts, never.
		if b := m.BindOptions; b != nil && (b.Propagation == mount.PropagationShared || b.Propagation == mount.PropagationRShared) {
			return bad("BindOptions.Propagation %s is refused: %s", b.Propagation, ownKernel)
		} else if b != nil && b.ReadOnlyNonRecursive {
			return bad("BindOptions.ReadOnlyNonRecursive is refused: what is read-only here is so with everything below it")
		} else if b != nil {
			out.NonRecursive = b.NonRecursive
		}
		return out, nil, nil
	case mount.TypeVolume:
		out.Type = spec.MountVolume
		v := &volumeUse{name: m.Source, anonymous: m.Source == ""}
		if m.BindOptions != nil {
			return bad("field BindOptions must not be specified")
		}
		if o := m.VolumeOptions; o != nil {
			out.NoCopy, v.labels = o.NoCopy, o.Labels
			switch {
			case o.Subpath != "":
				return bad("VolumeOptions.Subpath is refused: it is not known here yet")
			case o.DriverConfig != nil && o.DriverConfig.Name != "" && o.DriverConfig.Name != localDriver:
				return out, nil, noVolumeDriver(o.DriverConfig.Name)
			case o.DriverConfig != nil && len(o.DriverConfig.Options) > 0:
				return bad("VolumeOptions.DriverConfig.Options is refused: make the volume with its options first (docker volume create)")
			}
		}
		if v.name != "" {
			if err := volumeName(v.name); err != nil {
				return out, nil, err
			}
		}
		return out, v, nil
	case mount.TypeTmpfs:
		out.Type = spec.MountTmpfs
		if m.Source != "" {
			return bad("field Source must not be specified")
		}
		if o := m.TmpfsOptions; o != nil {
			if o.SizeBytes < 0 {
				return bad("size must not be negative")
			}
			if o.SizeBytes > 0 {
				out.Options = append(out.Options, "size="+strconv.FormatInt(o.SizeBytes, 10))
			}
			if o.Mode != 0 {
				out.Options = append(out.Options, fmt.Sprintf("mode=%o", uint32(o.Mode)))
			}
			for _, kv := range o.Options {
				out.Options = append(out.Options, strings.Join(kv, "="))
			}
		}
		if m.ReadOnly {
			out.ReadOnly, out.Options = false, append(out.Options, "ro")
		}
		return out, nil, nil
	}
	return bad("mount type unknown (known: bind, volume, tmpfs)")
}
