package daemon

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"
	apinet "github.com/moby/moby/api/types/network"
	"github.com/opencontainers/go-digest"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/image"
	"github.com/kcradle/kcradle/internal/undo"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
)

func (d *Daemon) create(w http.ResponseWriter, r *dockerapi.Request) error {
	var q request
	if err := dockerapi.ReadJSON(r, &q, false); err != nil {
		return err
	}
	if q.Config == nil {
		return dockerapi.BadRequest("config cannot be empty in order to create a container")
	}
	if q.HostConfig == nil {
		q.HostConfig = &container.HostConfig{}
	}
	switch p := r.Query("platform"); p {
	case "", image.Platform, "linux":
	default:
		return dockerapi.NotFound("platform %s: machines here are %s only", p, image.Platform)
	}
	if n := q.NetworkingConfig; n != nil && r.Version < 44 && len(n.EndpointsConfig) > 1 {
		return dockerapi.BadRequest("Container cannot be created with multiple network endpoints: %s", strings.Join(slices.Sorted(maps.Keys(n.EndpointsConfig)), ", "))
	}
	name := trimSlash(r.Query("name"))
	c, warnings, err := d.newContainer(context.WithoutCancel(r.Context()), name, &q)
	if err != nil {
		return err
	}
	return dockerapi.WriteJSON(w, http.StatusCreated, container.CreateResponse{ID: c.id, Warnings: append([]string{}, warnings...)})
}

// newContainer makes a container: the bundle with all that belongs to it, or nothing.
func (d *Daemon) newContainer(ctx context.Context, name string, q *request) (_ *Container, _ []string, err error) {
	defer d.metrics.action("create", time.Now(), &err)
	if _, err := image.ParseReference("docker://" + q.Image); err != nil && strings.Trim(strings.TrimPrefix(q.Image, "sha256:"), "0123456789abcdef") != "" {
		return nil, nil, dockerapi.BadRequest("invalid reference format")
	}
	found, err := d.lookup(ctx, q.Image)
	if err != nil {
		return nil, nil, err
	}
	img := found.Image
	from, err := d.mountsFrom(q.HostConfig.VolumesFrom)
	if err != nil {
		return nil, nil, err
	}
	wish, err := translate(q, img.Config.Config, from)
	if err != nil {
		return nil, nil, err
	}
	if len(d.cfg.HostGateway) > 0 {
		for i, h := range wish.pod.ExtraHosts {
			if h.Address == spec.HostGateway {
				wish.pod.ExtraHosts[i].Address = d.cfg.HostGateway[0].String()
			}
		}
	}
	var endpoints []endpoint
	if wish.network != string(network.None) {
		endpoints, err = d.endpoints(wish.endpoints, q.HostConfig.Links)
		if dockerapi.Status(err) == http.StatusNotFound { // that would be the image, and clients pull it
			err = dockerapi.BadRequest("%w", err)
		}
		if err != nil {
			return nil, nil, err
		}
		if endpoints == nil {
			wish.network = string(network.None)
		}
	}
	if err := img.Runs(); err != nil {
		wish.warnings = append(wish.warnings, fmt.Sprintf("The requested image's platform (%s/%s) does not match the detected host platform (%s) and no specific platform was requested", img.Config.OS, img.Config.Architecture, image.Platform))
	}
	for _, m := range wish.pod.Containers[0].Mounts {
		if m.Type == spec.MountBind {
			if err := d.bindSource(q, m); err != nil {
				return nil, nil, err
			}
		}
	}
	id := newID()
	if name == "" {
		name, err = d.inventName(id)
	} else {
		err = d.reserve(name, id)
	}
	if err != nil {
		return nil, nil, err
	}
	var u undo.Stack
	defer u.Run()
	u.Push(func() { d.release(name) })

	pod := wish.pod
	pod.Name = id[:12]
	if pod.Hostname == "" {
		pod.Hostname = id[:12]
	}
	ctr := &pod.Containers[0]
	ctr.ID, ctr.Name, ctr.Created = id, name, time.Now().UTC()
	ctr.Image = spec.Image{Ref: q.Image, Digest: string(img.Digest), ConfigID: string(img.ConfigDigest)}
	// A restart by policy is the machine's while it lives, and the daemon's afterwards.
	cfg := bundle.Config{
		Pod: &pod, Layers: map[string]string{}, Packages: d.cfg.Packages, Cache: filepath.Join(d.cfg.Root, "cache"),
		ScratchSize: wish.scratch, Store: d.cfg.Root, Writer: "kcradle " + d.cfg.Version, Volumes: map[string]string{},
	}
	var layers []digest.Digest
	for _, l := range img.Layers {
		ctr.Image.Layers = append(ctr.Image.Layers, string(l.DiffID))
		cfg.Layers[string(l.DiffID)] = l.Path
		layers = append(layers, l.DiffID)
	}
	rec := record{Version: recordVersion, Name: name, Config: merged(q.Config, ctr, img.Config.Config), HostConfig: *q.HostConfig,
		Network: wish.network, Endpoints: endpoints}
	defaults(&rec)
	for _, v := range wish.volumes {
		if v.anonymous {
			v.name = newID()
			v.labels = maps.Clone(v.labels)
			if v.labels == nil {
				v.labels = map[string]string{}
			}
			v.labels[anonymousLabel] = ""
			rec.Anonymous = append(rec.Anonymous, v.name)
		}
		made, path, err := d.ensureVolume(ctx, v)
		if err != nil {
			return nil, nil, err
		}
		if made && v.anonymous {
			u.Push(func() { _ = d.removeVolume(v.name) })
		}
		ctr.Mounts[v.mount].Source = v.name
		cfg.Volumes[v.name] = path
		if !slices.ContainsFunc(pod.Volumes, func(o spec.Volume) bool { return o.Name == v.name }) {
			pod.Volumes = append(pod.Volumes, spec.Volume{Name: v.name})
		}
	}
	if err := pod.Validate(); err != nil {
		return nil, nil, dockerapi.BadRequest("%w", err)
	}
	raw, err := json.MarshalIndent(&rec, "", "  ")
	if err != nil {
		return nil, nil, err
	}
	cfg.Files = map[string][]byte{recordFile: append(raw, '\n')}
	dir := filepath.Join(d.cfg.Root, containersDir, id)
	if err := d.cfg.Store.Lease(ctx, dir, layers); err != nil {
		return nil, nil, err
	}
	u.Push(func() { _ = d.cfg.Store.Release(context.WithoutCancel(ctx), dir) })
	b, err := bundle.Write(ctx, dir, cfg)
	if err != nil {
		return nil, nil, err
	}
	c := newContainer(d, b)
	c.rec = rec
	d.mu.Lock()
	d.containers[id] = c
	d.mu.Unlock()
	u.Keep()
	c.emit(events.ContainerEventType, events.ActionCreate, nil)
	return c, wish.warnings, nil
}

// mountsFrom are the volumes and binds of other containers: NAME[:ro].
func (d *Daemon) mountsFrom(list []string) ([]spec.Mount, error) {
	var out []spec.Mount
	for _, s := range list {
		ref, mode, _ := strings.Cut(s, ":")
		if mode != "" && mode != "ro" && mode != "rw" {
			return nil, dockerapi.BadRequest("invalid mode for volumes-from: %s", mode)
		}
		c, err := d.find(ref)
		if err != nil {
			return nil, dockerapi.BadRequest("%w", err)
		}
		for _, m := range c.b.Pod.Containers[0].Mounts {
			if m.Type == spec.MountTmpfs {
				continue
			}
			m.ReadOnly = m.ReadOnly || mode == "ro"
			out = append(out, m)
		}
	}
	return out, nil
}

// merged is the client's configuration with the image's own in it, as inspect shows it.
func merged(cfg *container.Config, c *spec.Container, img dockerspec.DockerOCIImageConfig) container.Config {
	out := *cfg
	out.Entrypoint, out.Cmd, out.Env, out.Labels = c.Entrypoint, c.Cmd, mergedEnv(img.Env, cfg.Env), c.Labels
	out.WorkingDir, out.User, out.StopSignal = c.WorkingDir, c.User, c.StopSignal
	if out.Hostname == "" && c.ID != "" {
		out.Hostname = c.ID[:12]
	}
	if out.Labels == nil {
		out.Labels = map[string]string{}
	}
	out.ExposedPorts = nil
	for _, s := range c.ExposedPorts {
		if p, err := apinet.ParsePort(s); err == nil { // one of an image may be none
			if out.ExposedPorts == nil {
				out.ExposedPorts = apinet.PortSet{}
			}
			out.ExposedPorts[p] = struct{}{}
		}
	}
	if len(img.Volumes) > 0 {
		out.Volumes = maps.Clone(img.Volumes)
		maps.Copy(out.Volumes, cfg.Volumes)
	}
	if h := c.Healthcheck; h != nil {
		out.Healthcheck = &container.HealthConfig{Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod,
			StartInterval: h.StartInterval, Retries: h.Retries}
	}
	if len(out.Shell) == 0 {
		out.Shell = img.Shell
	}
	return out
}

// defaults fills in what docker shows where a client has said nothing.
func defaults(r *record) {
	h := &r.HostConfig
	if h.NetworkMode == "" || h.NetworkMode.IsDefault() {
		h.NetworkMode = "bridge"
	}
	if h.RestartPolicy.Name == "" {
		h.RestartPolicy.Name = container.RestartPolicyDisabled
	}
	if h.LogConfig.Type == "" {
		h.LogConfig.Type = logDriver
	}
	if h.LogConfig.Config == nil {
		h.LogConfig.Config = map[string]string{}
	}
	if h.ShmSize == 0 {
		h.ShmSize = 64 << 20
	}
	if h.IpcMode == "" {
		h.IpcMode = container.IPCModePrivate
	}
	if h.CgroupnsMode == "" {
		h.CgroupnsMode = container.CgroupnsModePrivate
	}
	if h.Runtime == "" {
		h.Runtime = runtimeName
	}
	if h.Privileged {
		h.MaskedPaths, h.ReadonlyPaths = nil, nil
		return
	}
	if h.MaskedPaths == nil {
		h.MaskedPaths = spec.DefaultMaskedPaths()
	}
	if h.ReadonlyPaths == nil {
		h.ReadonlyPaths = spec.DefaultReadonlyPaths()
	}
}

// bindSource checks, or as docker does for -v makes, the host's side of a bind.
func (d *Daemon) bindSource(q *request, m spec.Mount) error {
	_, err := os.Stat(m.Source)
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, l := range q.HostConfig.Mounts {
		if l.Target == m.Target && !(l.BindOptions != nil && l.BindOptions.CreateMountpoint) {
			return dockerapi.BadRequest("invalid mount config for type \"bind\": bind source path does not exist: %s", m.Source)
		}
	}
	return os.MkdirAll(m.Source, 0o755)
}

func newID() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails since Go 1.24
	return hex.EncodeToString(b)
}

func trimSlash(s string) string { return strings.TrimPrefix(s, "/") }

// validName is docker's rule for the name of a container.
func validName(s string) bool {
	for i := range len(s) {
		b := s[i]
		alnum := b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9'
		if !alnum && (i == 0 || b != '_' && b != '.' && b != '-') {
			return false
		}
	}
	return len(s) >= 2 && len(s) <= 128
}

func invalidName(name string) error {
	return dockerapi.BadRequest("Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", name)
}

// reserve takes a name for a container.
func (d *Daemon) reserve(name, id string) error {
	if !validName(name) {
		return invalidName(name)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if other, taken := d.names[name]; taken {
		return dockerapi.Conflict("Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+name, other)
	}
	d.names[name] = id
	return nil
}

// release gives a name back.
func (d *Daemon) release(name string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.names, name)
}

// inventName takes a name that nobody has chosen.
func (d *Daemon) inventName(id string) (string, error) {
	for try := 0; ; try++ {
		name := inventName()
		if try >= 10 {
			name = fmt.Sprintf("%s%d", name, try)
		}
		if err := d.reserve(name, id); err == nil || try == 100 {
			return name, err
		}
	}
}
