package daemon

import (
	"io/fs"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/spec"
)

func formatTime(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// inspect shows a container as docker does.
func (d *Daemon) inspect(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	f := c.look()
	s := &c.b.Pod.Containers[0]
	args := s.Args()
	out := map[string]any{
		"Id": c.id, "Created": formatTime(s.Created), "Path": args[0], "Args": append([]string{}, args[1:]...),
		"State": c.shownState(f), "Image": s.Image.ConfigID, "ResolvConfPath": "", "HostnamePath": "", "HostsPath": "",
		"LogPath": c.b.LogPath(c.id), "Name": "/" + f.rec.Name, "RestartCount": f.state.Restarts, "Driver": storageDriver,
		"Platform": "linux", "MountLabel": "", "ProcessLabel": "", "AppArmorProfile": "", "ExecIDs": d.execsOf(c),
		"HostConfig": f.rec.HostConfig, "GraphDriver": map[string]any{"Name": storageDriver, "Data": map[string]string{}},
		"Mounts": c.mountPoints(s), "Config": f.rec.Config, "NetworkSettings": c.networkSettings(f),
	}
	if f.running() && f.state.Health != "" { // the log of the checks is the machine's
		var inside struct {
			State struct{ Health *container.Health }
		}
		if err := c.api().Do(r.Context(), "GET", c.path("/json"), nil, nil, &inside); err == nil && inside.State.Health != nil {
			out["State"].(*container.State).Health = inside.State.Health
		}
	}
	if r.Bool("size") {
		out["SizeRw"], out["SizeRootFs"] = c.diskUse(), c.diskUse()
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func (c *Container) shownState(f facts) *container.State {
	st := &container.State{
		Status: container.ContainerState(f.state.Status), Running: f.running(), Paused: f.state.Status == spec.StatusPaused,
		Restarting: f.state.Status == spec.StatusRestarting, Dead: f.state.Status == spec.StatusDead, OOMKilled: f.state.OOMKilled,
		Pid: f.state.Pid, ExitCode: f.state.ExitCode, Error: f.state.Error,
		StartedAt: formatTime(f.state.Started), FinishedAt: formatTime(f.state.Finished),
	}
	if f.state.Health != "" {
		st.Health = &container.Health{Status: container.HealthStatus(f.state.Health)}
	}
	return st
}

// execsOf are the execs of a container that the daemon knows; nil, as docker says it, for none.
func (d *Daemon) execsOf(c *Container) []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var out []string
	for id, of := range d.execs {
		if of == c {
			out = append(out, id)
		}
	}
	slices.Sort(out)
	return out
}

// mountPoints lists volumes and binds; tmpfs mounts are in HostConfig.
func (c *Container) mountPoints(s *spec.Container) []container.MountPoint {
	out := []container.MountPoint{}
	for _, m := range s.Mounts {
		mp := container.MountPoint{Type: mount.Type(m.Type), Source: m.Source, Destination: m.Target, RW: !m.ReadOnly}
		switch m.Type {
		case spec.MountVolume:
			mp.Name, mp.Driver, mp.Mode, mp.Source = m.Source, localDriver, "z", c.d.volumePath(m.Source)
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
	slices.SortFunc(out, func(a, b container.MountPoint) int { return strings.Compare(a.Destination, b.Destination) })
	return out
}

// portBindings are the ports as bound, by "80/tcp".
func portBindings(f facts, exposed []string) map[string][]map[string]string {
	out := map[string][]map[string]string{}
	if !f.running() {
		return out
	}
	for _, p := range exposed {
		out[p] = nil
	}
	for _, p := range f.ports {
		key := portName(p)
		ip := p.HostIP
		if ip == "" {
			ip = "0.0.0.0"
		}
		out[key] = append(out[key], map[string]string{"HostIp": ip, "HostPort": portString(p.HostPort)})
	}
	return out
}

func (c *Container) networkSettings(f facts) map[string]any {
	name := networkName(f.rec)
	endpoint := map[string]any{"IPAMConfig": nil, "Links": nil, "Aliases": nil, "DriverOpts": nil, "GwPriority": 0,
		"NetworkID": networkID(name), "EndpointID": "", "Gateway": "", "IPAddress": "", "MacAddress": "", "IPPrefixLen": 0,
		"IPv6Gateway": "", "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0, "DNSNames": nil}
	if f.running() {
		endpoint["EndpointID"] = stableID("endpoint", c.id, name)
		if name == "bridge" { // every machine is alone on a wire of its own
			endpoint["Gateway"], endpoint["IPAddress"], endpoint["IPPrefixLen"] = userGateway, userAddress, 24
		}
	}
	out := map[string]any{"Bridge": "", "SandboxID": "", "SandboxKey": "", "HairpinMode": false, "LinkLocalIPv6Address": "",
		"LinkLocalIPv6PrefixLen": 0, "SecondaryIPAddresses": nil, "SecondaryIPv6Addresses": nil,
		"Ports": portBindings(f, c.b.Pod.Containers[0].ExposedPorts), "Networks": map[string]any{name: endpoint}}
	for _, k := range []string{"EndpointID", "Gateway", "IPAddress", "IPPrefixLen", "MacAddress", "IPv6Gateway", "GlobalIPv6Address", "GlobalIPv6PrefixLen"} {
		out[k] = endpoint[k]
	}
	if f.running() {
		out["SandboxID"] = stableID("sandbox", c.id)
	}
	return out
}

// Addresses on the wire of a machine that is alone, see docs/network.md.
const (
	userGateway = "10.0.2.2"
	userAddress = "10.0.2.15"
)

// diskUse is what the container has written, in bytes on the host's disk.
func (c *Container) diskUse() int64 {
	return blocks(c.b.ScratchPath(), filepath.Dir(c.b.LogPath(c.id)))
}

// blocks is what files and directories take on the host's disk, in bytes.
func blocks(paths ...string) int64 {
	var n int64
	for _, path := range paths {
		_ = filepath.WalkDir(path, func(_ string, e fs.DirEntry, err error) error {
			if err != nil {
				return nil // it is about to go
			}
			if fi, err := e.Info(); err == nil && fi.Mode().IsRegular() {
				if st, ok := fi.Sys().(*syscall.Stat_t); ok {
					n += st.Blocks * 512
				}
			}
			return nil
		})
	}
	return n
}

// status is the text of docker ps.
func (f facts) status(now time.Time) string {
	since := func(t time.Time) string { return units.HumanDuration(now.Sub(t)) }
	switch f.state.Status {
	case spec.StatusPaused:
		return "Up " + since(f.state.Started) + " (Paused)"
	case spec.StatusRestarting:
		return "Restarting (" + itoa(f.state.ExitCode) + ") " + since(f.state.Finished) + " ago"
	case spec.StatusRunning:
		switch f.state.Health {
		case "", "none":
			return "Up " + since(f.state.Started)
		case "starting":
			return "Up " + since(f.state.Started) + " (health: starting)"
		}
		return "Up " + since(f.state.Started) + " (" + f.state.Health + ")"
	case spec.StatusDead:
		return "Dead"
	}
	if f.state.Started.IsZero() {
		return "Created"
	}
	return "Exited (" + itoa(f.state.ExitCode) + ") " + since(f.state.Finished) + " ago"
}

func (d *Daemon) list(w http.ResponseWriter, r *dockerapi.Request) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "ancestor", "before", "expose", "exited", "health", "id",
		"isolation", "label", "name", "network", "publish", "since", "status", "volume", "is-task")
	if err != nil {
		return err
	}
	limit, err := r.Int("limit")
	if err != nil {
		return err
	}
	all := d.all()
	slices.SortFunc(all, func(a, b *Container) int {
		return b.b.Pod.Containers[0].Created.Compare(a.b.Pod.Containers[0].Created)
	})
	now := time.Now()
	out := []map[string]any{}
	for _, c := range all {
		x := c.look()
		if limit > 0 && len(out) == limit {
			break
		}
		if !x.running() && !r.Bool("all") && limit <= 0 && len(f["status"]) == 0 ||
			!f.Match("name", x.rec.Name) && !f.Match("name", "/"+x.rec.Name) || !f.Match("id", c.id) ||
			!f.Labels("label", x.rec.Config.Labels) || !f.Exact("status", x.state.Status) {
			continue
		}
		s := c.summary(x, now)
		if a := x.rec.HostConfig.Annotations; r.Version >= 46 && len(a) > 0 {
			s["HostConfig"].(map[string]any)["Annotations"] = a
		}
		out = append(out, s)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func (c *Container) summary(f facts, now time.Time) map[string]any {
	s := &c.b.Pod.Containers[0]
	ports := []map[string]any{}
	for _, p := range f.ports {
		m := map[string]any{"PrivatePort": p.ContainerPort, "PublicPort": p.HostPort, "Type": p.Proto}
		if a, err := netip.ParseAddr(p.HostIP); err == nil {
			m["IP"] = a.String()
		} else {
			m["IP"] = "0.0.0.0"
		}
		ports = append(ports, m)
	}
	return map[string]any{"Id": c.id, "Names": []string{"/" + f.rec.Name}, "Image": f.rec.Config.Image, "ImageID": s.Image.ConfigID,
		"Command": strings.Join(s.Args(), " "), "Created": s.Created.Unix(), "Ports": ports, "Labels": f.rec.Config.Labels,
		"State": f.state.Status, "Status": f.status(now), "HostConfig": map[string]any{"NetworkMode": networkName(f.rec)},
		"NetworkSettings": map[string]any{"Networks": c.networkSettings(f)["Networks"]}, "Mounts": c.mountPoints(s)}
}
