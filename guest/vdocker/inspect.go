package vdocker

import (
	"cmp"
	"net/http"
	"net/netip"
	"slices"
	"strings"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/storage"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/dockerapi/shape"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/spec"
)

// The types of the API module are those of newer versions. What versions up to 1.50 have beside them stands here,
// in structs that shadow the members.
type (
	inspectResponse struct {
		container.InspectResponse
		Config          config
		HostConfig      hostConfig
		GraphDriver     storage.DriverData
		NetworkSettings networkSettings
	}
	config struct {
		container.Config
		ExposedPorts map[string]struct{} `json:",omitempty"`
		OnBuild      []string
	}
	hostConfig struct {
		container.HostConfig
		PortBindings portMap
		// Of 1.41 only.
		KernelMemory    *int64 `json:",omitempty"`
		KernelMemoryTCP *int64 `json:",omitempty"`
	}
	networkSettings struct {
		Bridge                 string
		SandboxID              string
		SandboxKey             string
		Ports                  portMap
		HairpinMode            bool
		LinkLocalIPv6Address   string
		LinkLocalIPv6PrefixLen int
		SecondaryIPAddresses   []struct{}
		SecondaryIPv6Addresses []struct{}
		EndpointID             string
		Gateway                netip.Addr
		GlobalIPv6Address      netip.Addr
		GlobalIPv6PrefixLen    int
		IPAddress              netip.Addr
		IPPrefixLen            int
		IPv6Gateway            netip.Addr
		MacAddress             network.HardwareAddr
		Networks               map[string]*endpoint
	}
)

func (s *server) inspect(w http.ResponseWriter, k call) error {
	v := look(k.c)
	out := inspect(k.pod, v, k.Version)
	out.ExecIDs = k.c.Execs()
	if k.Bool("size") {
		rw, fs, err := k.c.Size(k.Context())
		if err != nil {
			return err
		}
		out.SizeRw, out.SizeRootFs = &rw, &fs
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func inspect(p *pod.Pod, v view, version dockerapi.Version) inspectResponse {
	args := v.spec.Args()
	out := inspectResponse{
		InspectResponse: container.InspectResponse{
			ID: v.id, Created: shape.Time(v.spec.Created), Path: args[0], Args: append([]string{}, args[1:]...),
			State: state(v), Image: v.spec.Image.ConfigID, Name: "/" + v.name, RestartCount: v.state.Restarts,
			Driver: storageDriver, Platform: "linux", Mounts: mountPoints(p, v),
		},
		GraphDriver:     storage.DriverData{Name: storageDriver, Data: map[string]string{}},
		Config:          containerConfig(p, v.spec),
		HostConfig:      containerHostConfig(p, v, version),
		NetworkSettings: networking(p, v, version),
	}
	return out
}

// storageDriver is what stacks a container's file system; docker calls it so too.
const storageDriver = "overlay2"

func state(v view) *container.State {
	st := shape.State(v.state)
	h := v.c.Health()
	if h == nil {
		return st
	}
	st.Health = &container.Health{Status: container.HealthStatus(h.Status), FailingStreak: h.FailingStreak}
	for _, r := range h.Log {
		st.Health.Log = append(st.Health.Log, &container.HealthcheckResult{
			Start: r.Start.UTC(), End: r.End.UTC(), ExitCode: r.ExitCode, Output: r.Output,
		})
	}
	return st
}

func hostname(p *pod.Pod) string { return cmp.Or(p.Spec().Hostname, p.Spec().Name) }

func containerConfig(p *pod.Pod, c spec.Container) config {
	out := config{Config: container.Config{
		Hostname: hostname(p), Domainname: p.Spec().Domain, User: c.User,
		AttachStdin: c.OpenStdin && c.StdinOnce, AttachStdout: true, AttachStderr: true,
		Tty: c.TTY, OpenStdin: c.OpenStdin, StdinOnce: c.StdinOnce,
		Env: append([]string{}, c.Env...), Cmd: c.Cmd, Entrypoint: c.Entrypoint,
		Image: shownRef(c.Image.Ref), WorkingDir: c.WorkingDir, Labels: labels(c),
		StopSignal: c.StopSignal, StopTimeout: c.StopTimeout,
	}}
	if ports := exposed(p, c); len(ports) > 0 {
		out.ExposedPorts = make(map[string]struct{}, len(ports))
		for _, port := range ports {
			out.ExposedPorts[port] = struct{}{}
		}
	}
	if h := c.Healthcheck; h != nil {
		out.Healthcheck = &container.HealthConfig{
			Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod,
			StartInterval: h.StartInterval, Retries: h.Retries,
		}
	}
	return out
}

// Paths that a container sees covered or may not write, docker's own lists.
var (
	maskedPaths = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
		"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
		"/sys/devices/virtual/powercap",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

func containerHostConfig(p *pod.Pod, v view, version dockerapi.Version) hostConfig {
	c := v.spec
	h := container.HostConfig{
		LogConfig:     container.LogConfig{Type: logDriver, Config: map[string]string{}},
		NetworkMode:   container.NetworkMode(networkName(p)),
		RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyMode(cmp.Or(c.Restart.Name, "no")), MaximumRetryCount: c.Restart.MaxRetries},
		CapAdd:        c.CapAdd, CapDrop: c.CapDrop, CgroupnsMode: "private", IpcMode: "private",
		DNS: []netip.Addr{}, DNSOptions: append([]string{}, p.Spec().DNSOptions...), DNSSearch: append([]string{}, p.Spec().DNSSearch...),
		GroupAdd: c.GroupAdd, OomScoreAdj: c.OOMScoreAdj, Privileged: c.Privileged, ReadonlyRootfs: c.ReadOnly,
		ShmSize: cmp.Or(c.ShmSize, 64<<20), Sysctls: c.Sysctls, Runtime: runtimeName,
		MaskedPaths: maskedPaths, ReadonlyPaths: readonlyPaths,
	}
	if c.Privileged {
		h.MaskedPaths, h.ReadonlyPaths = nil, nil
	}
	if c.NoNewPrivs {
		h.SecurityOpt = []string{"no-new-privileges"}
	}
	if c.Init {
		h.Init = &c.Init
	}
	for _, s := range p.Spec().DNS {
		if a, err := netip.ParseAddr(s); err == nil {
			h.DNS = append(h.DNS, a)
		}
	}
	for _, e := range p.Spec().ExtraHosts {
		h.ExtraHosts = append(h.ExtraHosts, e.Name+":"+e.Address)
	}
	for _, m := range c.Mounts {
		switch m.Type {
		case spec.MountTmpfs:
			if h.Tmpfs == nil {
				h.Tmpfs = map[string]string{}
			}
			h.Tmpfs[m.Target] = strings.Join(m.Options, ",")
		default:
			mode := ""
			if m.ReadOnly {
				mode = ":ro"
			}
			h.Binds = append(h.Binds, m.Source+":"+m.Target+mode)
		}
	}
	resources(&h, c)
	out := hostConfig{HostConfig: h, PortBindings: bindings(p, v, true)}
	if version < 42 {
		out.KernelMemory, out.KernelMemoryTCP = new(int64), new(int64)
	}
	return out
}

// resources turns limits back into the numbers docker's flags had.
func resources(h *container.HostConfig, c spec.Container) {
	r := c.Resources
	if m := r.Memory; m != nil {
		if m.Limit != nil {
			h.Memory = *m.Limit
		}
		if m.Swap != nil {
			h.MemorySwap = *m.Swap
		}
		if m.Reservation != nil {
			h.MemoryReservation = *m.Reservation
		}
	}
	if cpu := r.CPU; cpu != nil {
		if cpu.Shares != nil {
			h.CPUShares = int64(*cpu.Shares)
		}
		if cpu.Quota != nil && cpu.Period != nil && *cpu.Quota > 0 && *cpu.Period == 100000 {
			h.NanoCPUs = *cpu.Quota * 10000 // as --cpus sets them
		} else {
			if cpu.Quota != nil {
				h.CPUQuota = *cpu.Quota
			}
			if cpu.Period != nil {
				h.CPUPeriod = int64(*cpu.Period)
			}
		}
		h.CpusetCpus, h.CpusetMems = cpu.Cpus, cpu.Mems
	}
	if r.Pids != nil && r.Pids.Limit != nil {
		limit := max(0, *r.Pids.Limit) // docker shows no limit as 0
		h.PidsLimit = &limit
	}
	if b := r.BlockIO; b != nil && b.Weight != nil {
		h.BlkioWeight = *b.Weight
	}
	for _, u := range c.Ulimits {
		name := strings.ToLower(strings.TrimPrefix(u.Type, "RLIMIT_"))
		h.Ulimits = append(h.Ulimits, &units.Ulimit{Name: name, Hard: int64(u.Hard), Soft: int64(u.Soft)})
	}
	for _, d := range c.Devices {
		h.Devices = append(h.Devices, container.DeviceMapping{PathOnHost: d.Path, PathInContainer: d.Path, CgroupPermissions: "rwm"})
	}
}

func networking(p *pod.Pod, v view, version dockerapi.Version) networkSettings {
	n := networkSettings{Ports: bindings(p, v, false), Networks: endpoints(p, v, version)}
	if !v.running() {
		return n
	}
	a := addresses(p)
	n.SandboxID, n.SandboxKey = derivedID("sandbox", v.id), "/proc/1/ns/net"
	n.EndpointID = endpointID(p, v)
	n.Gateway, n.IPAddress, n.IPPrefixLen, n.MacAddress = a.gateway4, a.ip4, a.prefixLen4, a.mac
	n.IPv6Gateway, n.GlobalIPv6Address, n.GlobalIPv6PrefixLen = a.gateway6, a.ip6, a.prefLen6
	return n
}

// mountPoints lists volumes and binds; tmpfs mounts are in HostConfig, as with docker's --tmpfs.
func mountPoints(p *pod.Pod, v view) []container.MountPoint {
	out := []container.MountPoint{}
	for _, m := range v.spec.Mounts {
		mp := container.MountPoint{Type: mount.Type(m.Type), Source: m.Source, Destination: m.Target, RW: !m.ReadOnly}
		switch m.Type {
		case spec.MountVolume:
			mp.Name, mp.Driver, mp.Mode, mp.Source = m.Source, "local", "z", volumePath(m.Source)
		case spec.MountBind:
			mp.Propagation = mount.PropagationRPrivate
		default:
			continue
		}
		if m.ReadOnly {
			mp.Mode = "ro"
		}
		out = append(out, mp)
	}
	slices.SortFunc(out, func(a, b container.MountPoint) int { return cmp.Compare(a.Destination, b.Destination) })
	return out
}

// Names of parts that docker has too, as info and inspect show them.
const (
	runtimeName = "kcradle"
	logDriver   = "json-file" // the name clients know for a driver whose logs can be read
)
