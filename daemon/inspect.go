package daemon

import (
	"cmp"
	"io/fs"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"

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
	limit, err := r.Int("limit")
	if err != nil {
		return err
	}
	all := d.all()
	slices.SortFunc(all, func(a, b *Container) int { // the newest first, as docker has them
		return b.b.Pod.Containers[0].Created.Compare(a.b.Pod.Containers[0].Created)
	})
	q, err := d.newSelection(r, limit)
	if err != nil {
		return err
	}
	now := time.Now()
	out := []map[string]any{}
	for _, c := range all {
		x := c.look()
		if limit > 0 && len(out) == limit {
			break
		}
		if !q.includes(c, x) {
			continue
		}
		s := c.summary(x, now)
		if a := x.rec.HostConfig.Annotations; r.Version >= 46 && len(a) > 0 {
			s["HostConfig"].(map[string]any)["Annotations"] = a
		}
		if r.Bool("size") {
			s["SizeRw"], s["SizeRootFs"] = c.diskUse(), c.diskUse()
		}
		out = append(out, s)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// selection decides which containers docker ps shows.
type selection struct {
	filters         dockerapi.Filters
	all             bool
	before, since   time.Time // of the containers named so; zero: none
	exited          []int
	isTask          bool
	publish, expose []string // "80/tcp"
	ancestors       []string // image IDs
}

func (d *Daemon) newSelection(r *dockerapi.Request, limit int) (*selection, error) {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "ancestor", "before", "expose", "exited", "health", "id",
		"isolation", "label", "name", "network", "publish", "since", "status", "volume", "is-task")
	if err != nil {
		return nil, err
	}
	s := &selection{filters: f, all: r.Bool("all") || limit > 0 || len(f["status"]) > 0}
	for _, v := range f["status"] {
		if container.ValidateContainerState(container.ContainerState(v)) != nil {
			return nil, dockerapi.BadRequest("invalid filter 'status=%s'", v)
		}
	}
	for _, v := range f["health"] {
		if container.ValidateHealthStatus(container.HealthStatus(v)) != nil {
			return nil, dockerapi.BadRequest("Unrecognised filter value for health: %s", v)
		}
	}
	for _, v := range f["exited"] {
		n, err := strconv.Atoi(v)
		if err != nil {
			return nil, dockerapi.BadRequest("%w", err)
		}
		s.exited = append(s.exited, n)
	}
	if s.isTask, err = f.Bool("is-task", false); err != nil {
		return nil, err
	}
	for key, into := range map[string]*[]string{"publish": &s.publish, "expose": &s.expose} {
		for _, v := range f[key] {
			ports, err := network.ParsePortRange(v)
			if err != nil {
				return nil, dockerapi.BadRequest("invalid filter '%s=%s': %w", key, v, err)
			}
			for port := range ports.All() {
				*into = append(*into, port.String())
			}
		}
	}
	for key, into := range map[string]*time.Time{"before": &s.before, "since": &s.since} {
		for _, ref := range f[key] {
			c, err := d.find(ref)
			if err != nil {
				return nil, dockerapi.Errorf(dockerapi.Status(err), "no such container %s", ref)
			}
			*into = c.b.Pod.Containers[0].Created
		}
	}
	for _, v := range f["ancestor"] {
		if u, err := d.cfg.Store.Lookup(r.Context(), v); err == nil { // what is not there has no descendants
			s.ancestors = append(s.ancestors, string(u.ID))
		}
	}
	return s, nil
}

func (s *selection) includes(c *Container, x facts) bool {
	f, own := s.filters, &c.b.Pod.Containers[0]
	switch {
	case !s.all && !x.running(), s.isTask,
		!f.Match("name", x.rec.Name) && !f.Match("name", "/"+x.rec.Name), !f.Match("id", c.id),
		!f.Labels("label", x.rec.Config.Labels), !f.Exact("status", x.state.Status), !f.Exact("isolation", ""),
		!f.Exact("health", cmp.Or(x.state.Health, string(container.NoHealthcheck))),
		!s.before.IsZero() && !own.Created.Before(s.before), !s.since.IsZero() && !own.Created.After(s.since),
		len(f["ancestor"]) > 0 && !slices.Contains(s.ancestors, own.Image.ConfigID) && !slices.Contains(f["ancestor"], x.rec.Config.Image),
		len(f["network"]) > 0 && !f.Exact("network", networkName(x.rec)) && !f.Prefix("network", networkID(networkName(x.rec))),
		len(s.exited) > 0 && (x.running() || x.state.Started.IsZero() || !slices.Contains(s.exited, x.state.ExitCode)):
		return false
	}
	if v := f["volume"]; len(v) > 0 && !slices.ContainsFunc(own.Mounts, func(m spec.Mount) bool {
		return slices.Contains(v, m.Source) || slices.Contains(v, m.Target)
	}) {
		return false
	}
	if len(s.publish) > 0 && !slices.ContainsFunc(c.b.Pod.Ports, func(p spec.Port) bool { return slices.Contains(s.publish, portName(p)) }) {
		return false
	}
	return len(s.expose) == 0 || slices.ContainsFunc(own.ExposedPorts, func(p string) bool { return slices.Contains(s.expose, p) })
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
