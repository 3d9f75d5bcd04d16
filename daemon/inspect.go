package daemon

import (
	"context"
	"io/fs"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/dockerapi/shape"
	"github.com/kcradle/kcradle/spec"
)

// inspect shows a container as docker does.
func (d *Daemon) inspect(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	f := c.look()
	f.rec.HostConfig.Links = c.shownLinks(f)
	s := &c.b.Pod.Containers[0]
	args := s.Args()
	out := map[string]any{
		"Id": c.id, "Created": shape.Time(s.Created), "Path": args[0], "Args": append([]string{}, args[1:]...),
		"State": c.shownState(f), "Image": s.Image.ConfigID, "ResolvConfPath": "", "HostnamePath": "", "HostsPath": "",
		"LogPath": c.b.LogPath(c.id), "Name": "/" + f.rec.Name, "RestartCount": f.state.Restarts, "Driver": storageDriver,
		"Platform": "linux", "MountLabel": "", "ProcessLabel": "", "AppArmorProfile": "", "ExecIDs": d.execsOf(c),
		"HostConfig": f.rec.HostConfig, "GraphDriver": map[string]any{"Name": storageDriver, "Data": map[string]string{}},
		"Mounts": c.mountPoints(s), "Config": f.rec.Config, "NetworkSettings": c.networkSettings(f, r.Version),
	}
	if f.running() && f.state.Health != "" { // the log of the checks is the machine's
		var inside struct {
			State struct{ Health *container.Health }
		}
		ctx, cancel := context.WithTimeout(r.Context(), d.bounds.told)
		defer cancel()
		if err := c.api().Do(ctx, "GET", c.path("/json"), nil, nil, &inside); err == nil && inside.State.Health != nil {
			out["State"].(*container.State).Health = inside.State.Health
		}
	}
	if r.Bool("size") {
		out["SizeRw"], out["SizeRootFs"] = c.diskUse(), c.diskUse()
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func (c *Container) shownState(f facts) *container.State {
	st := shape.State(f.state)
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
			mp.Propagation = c.propagation(m.Target)
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

// propagation is what was asked for a bind.
func (c *Container) propagation(target string) mount.Propagation {
	h := c.look().rec.HostConfig
	for _, m := range h.Mounts {
		if m.Target == target && m.BindOptions != nil && m.BindOptions.Propagation != "" {
			return m.BindOptions.Propagation
		}
	}
	for _, b := range h.Binds {
		parts := strings.Split(b, ":")
		if len(parts) == 3 && parts[1] == target {
			for o := range strings.SplitSeq(parts[2], ",") {
				if slices.Contains([]mount.Propagation{mount.PropagationSlave, mount.PropagationRSlave, mount.PropagationPrivate}, mount.Propagation(o)) {
					return mount.Propagation(o)
				}
			}
		}
	}
	return mount.PropagationRPrivate
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

func (c *Container) networkSettings(f facts, version dockerapi.Version) map[string]any {
	networks := c.shownNetworks(f, version)
	out := map[string]any{"Bridge": "", "SandboxID": "", "SandboxKey": "", "HairpinMode": false, "LinkLocalIPv6Address": "",
		"LinkLocalIPv6PrefixLen": 0, "SecondaryIPAddresses": nil, "SecondaryIPv6Addresses": nil,
		"Ports": portBindings(f, c.b.Pod.Containers[0].ExposedPorts), "Networks": networks}
	first, ok := networks[bridgeNetwork].(map[string]any) // the only one that is shown twice
	if !ok {
		first = c.shownEndpoint(f, endpoint{}, version)
	}
	for _, k := range []string{"EndpointID", "Gateway", "IPAddress", "IPPrefixLen", "MacAddress", "IPv6Gateway", "GlobalIPv6Address", "GlobalIPv6PrefixLen"} {
		out[k] = first[k]
	}
	if f.running() {
		out["SandboxID"] = stableID("sandbox", c.id)
	}
	return out
}

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

// newestFirst returns the containers in docker's order.
func (d *Daemon) newestFirst() []*Container {
	all := d.all()
	slices.SortFunc(all, func(a, b *Container) int {
		return b.b.Pod.Containers[0].Created.Compare(a.b.Pod.Containers[0].Created)
	})
	return all
}

func (d *Daemon) list(w http.ResponseWriter, r *dockerapi.Request) error {
	keep, err := shape.Select(r, func(ref string) (string, error) {
		c, err := d.find(ref)
		if err != nil {
			return "", err
		}
		return c.id, nil
	})
	if err != nil {
		return err
	}
	now := time.Now()
	all := d.newestFirst()
	seen := make([]facts, len(all))
	candidates := make([]shape.Candidate, len(all))
	for i, c := range all {
		seen[i] = c.look()
		candidates[i] = d.candidate(r.Context(), c, seen[i])
	}
	out := []map[string]any{}
	for _, i := range keep.Apply(candidates) {
		c, x := all[i], seen[i]
		s := c.summary(x, now, r.Version)
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

// candidate is what the filters of the list are about.
func (d *Daemon) candidate(ctx context.Context, c *Container, x facts) shape.Candidate {
	own := &c.b.Pod.Containers[0]
	out := shape.Candidate{
		ID: c.id, Name: x.rec.Name, State: x.state, Labels: x.rec.Config.Labels, Mounts: own.Mounts, Exposed: own.ExposedPorts,
		Ancestor: func(ref string) bool {
			if ref == x.rec.Config.Image {
				return true
			}
			u, err := d.cfg.Store.Lookup(ctx, ref) // what is not there has no descendants
			return err == nil && string(u.ID) == own.Image.ConfigID
		},
		Network: func(ref string) bool {
			return slices.ContainsFunc(x.rec.Endpoints, func(e endpoint) bool {
				return ref == e.Name || ref != "" && strings.HasPrefix(e.Network, ref)
			}) || x.rec.Network == noneNetwork && ref == noneNetwork
		},
	}
	for _, p := range x.ports { // those of the host
		out.Published = append(out.Published, portString(p.HostPort)+"/"+p.Proto)
	}
	return out
}

func (c *Container) summary(f facts, now time.Time, version dockerapi.Version) map[string]any {
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
	return map[string]any{"Id": c.id, "Names": c.allNames(f), "Image": f.rec.Config.Image, "ImageID": s.Image.ConfigID,
		"Command": shape.Command(s.Args()), "Created": s.Created.Unix(), "Ports": ports, "Labels": f.rec.Config.Labels,
		"State": f.state.Status, "Status": shape.Status(f.state, now), "HostConfig": map[string]any{"NetworkMode": f.rec.HostConfig.NetworkMode},
		"NetworkSettings": map[string]any{"Networks": c.shownNetworks(f, version)}, "Mounts": c.mountPoints(s)}
}
