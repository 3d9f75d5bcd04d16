package vdocker

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/spec"
)

// view is one container, its facts taken at one moment.
type view struct {
	c     *pod.Container
	id    string
	name  string
	spec  spec.Container
	state spec.State
}

func look(c *pod.Container) view {
	return view{c: c, id: c.ID(), name: c.Name(), spec: c.Spec(), state: c.State()}
}

// newestFirst returns the containers in docker's order.
func newestFirst(p *pod.Pod) []view {
	var out []view
	for _, c := range slices.Backward(p.Containers()) { // made at one time, the later one counts as newer
		out = append(out, look(c))
	}
	slices.SortStableFunc(out, func(a, b view) int { return cmp.Compare(b.spec.Created.UnixNano(), a.spec.Created.UnixNano()) })
	return out
}

// running reports what docker calls running: paused and restarting containers are.
func (v view) running() bool {
	return v.state.Status == spec.StatusRunning || v.state.Status == spec.StatusPaused || v.state.Status == spec.StatusRestarting
}

// status is the text of docker ps.
func (v view) status(now time.Time) string {
	since := func(t time.Time) string { return units.HumanDuration(now.Sub(t)) }
	switch v.state.Status {
	case spec.StatusPaused:
		return "Up " + since(v.state.Started) + " (Paused)"
	case spec.StatusRestarting:
		return fmt.Sprintf("Restarting (%d) %s ago", v.state.ExitCode, since(v.state.Finished))
	case spec.StatusRunning:
		switch v.state.Health {
		case "", "none":
			return "Up " + since(v.state.Started)
		case "starting":
			return "Up " + since(v.state.Started) + " (health: starting)"
		}
		return "Up " + since(v.state.Started) + " (" + v.state.Health + ")"
	case spec.StatusDead:
		return "Dead"
	}
	switch {
	case v.state.Started.IsZero():
		return "Created"
	case v.state.Finished.IsZero():
		return ""
	}
	return fmt.Sprintf("Exited (%d) %s ago", v.state.ExitCode, since(v.state.Finished))
}

// command is the process as one line.
func (v view) command() string {
	args := v.spec.Args()
	for i, a := range args {
		if i > 0 && strings.Contains(a, " ") {
			args[i] = "'" + a + "'"
		}
	}
	return strings.Join(args, " ")
}

// summary is container.Summary as API versions up to 1.50 have it.
type summary struct {
	container.Summary
	Ports   []portSummary
	Health  *struct{} `json:",omitempty"` // of 1.52
	SizeRw  *int64    `json:",omitempty"`
	SizeFs  *int64    `json:"SizeRootFs,omitempty"`
	Network any       `json:"NetworkSettings"`
}

// portSummary is container.PortSummary without an address where nothing is published.
type portSummary struct {
	IP          string `json:",omitempty"`
	PrivatePort uint16
	PublicPort  uint16 `json:",omitempty"`
	Type        string
}

func summarize(p *pod.Pod, v view, version dockerapi.Version, now time.Time) summary {
	s := summary{Ports: portSummaries(p, v)}
	s.Summary = container.Summary{
		ID: v.id, Names: []string{"/" + v.name}, Image: shownRef(v.spec.Image.Ref), ImageID: v.spec.Image.ConfigID,
		Command: v.command(), Created: v.spec.Created.Unix(), Labels: labels(v.spec),
		State: container.ContainerState(v.state.Status), Status: v.status(now), Mounts: mountPoints(p, v),
	}
	s.HostConfig.NetworkMode = networkName(p)
	s.Network = map[string]any{"Networks": endpoints(p, v, version)}
	return s
}

func labels(c spec.Container) map[string]string {
	if c.Labels == nil {
		return map[string]string{}
	}
	return c.Labels
}

func (s *server) list(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "ancestor", "before", "expose", "exited", "health", "id",
		"isolation", "label", "name", "network", "publish", "since", "status", "volume", "is-task")
	if err != nil {
		return err
	}
	limit, err := r.Int("limit")
	if err != nil {
		return err
	}
	keep, err := newSelection(p, f, r.Bool("all"), limit)
	if err != nil {
		return err
	}
	now := time.Now()
	out := []summary{}
	for _, v := range keep.apply(newestFirst(p)) {
		s := summarize(p, v, r.Version, now)
		if r.Bool("size") {
			rw, fs, err := v.c.Size(r.Context())
			if err != nil {
				return err
			}
			s.SizeRw, s.SizeFs = &rw, &fs
		}
		out = append(out, s)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// selection decides which containers docker ps shows.
type selection struct {
	pod           *pod.Pod
	filters       dockerapi.Filters
	all           bool
	limit         int
	before, since *pod.Container
	exited        []int
	isTask        bool
	publish       []string // "80/tcp"
	expose        []string
}

func newSelection(p *pod.Pod, f dockerapi.Filters, all bool, limit int) (*selection, error) {
	s := &selection{pod: p, filters: f, all: all, limit: limit}
	for _, v := range f["status"] {
		if container.ValidateContainerState(container.ContainerState(v)) != nil {
			return nil, dockerapi.BadRequest("invalid filter 'status=%s'", v)
		}
		s.all = true
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
	var err error
	if s.isTask, err = f.Bool("is-task", false); err != nil {
		return nil, err
	}
	for key, out := range map[string]*[]string{"publish": &s.publish, "expose": &s.expose} {
		for _, v := range f[key] {
			ports, err := network.ParsePortRange(v)
			if err != nil {
				return nil, dockerapi.BadRequest("invalid filter '%s=%s': %w", key, v, err)
			}
			for port := range ports.All() {
				*out = append(*out, port.String())
			}
		}
	}
	for key, out := range map[string]**pod.Container{"before": &s.before, "since": &s.since} {
		for _, ref := range f[key] {
			if *out, err = find(p, ref); err != nil {
				return nil, dockerapi.Errorf(dockerapi.Status(err), "no such container %s", ref)
			}
		}
	}
	return s, nil
}

func (s *selection) apply(in []view) []view {
	var out []view
	before := s.before
	for _, v := range in {
		if s.limit > 0 && len(out) == s.limit {
			break
		}
		if s.since != nil && v.c == s.since {
			break
		}
		if before != nil {
			if v.c == before {
				before = nil
			}
			continue
		}
		if s.includes(v) {
			out = append(out, v)
		}
	}
	return out
}

func (s *selection) includes(v view) bool {
	f := s.filters
	health := cmp.Or(v.state.Health, string(container.NoHealthcheck))
	switch {
	case !v.running() && !s.all && s.limit <= 0,
		!f.Match("name", v.name) && !f.Match("name", "/"+v.name),
		!f.Match("id", v.id),
		s.isTask,
		!f.Labels("label", v.spec.Labels),
		!f.Exact("status", v.state.Status),
		!f.Exact("health", health),
		!f.Exact("isolation", ""):
		return false
	}
	if len(s.exited) > 0 && (v.running() || v.state.Started.IsZero() || !slices.Contains(s.exited, v.state.ExitCode)) {
		return false
	}
	if values := f["volume"]; len(values) > 0 && !slices.ContainsFunc(v.spec.Mounts, func(m spec.Mount) bool {
		return slices.Contains(values, m.Source) || slices.Contains(values, m.Target)
	}) {
		return false
	}
	if values := f["ancestor"]; len(values) > 0 && !slices.ContainsFunc(values, func(ref string) bool { return imageIs(v.spec.Image, ref) }) {
		return false
	}
	if values := f["network"]; len(values) > 0 && !slices.ContainsFunc(values, func(ref string) bool { return networkIs(s.pod, ref) }) {
		return false
	}
	if len(s.publish) > 0 && !slices.ContainsFunc(publishedBy(s.pod, v.spec), func(p spec.Port) bool {
		return slices.Contains(s.publish, fmt.Sprintf("%d/%s", p.ContainerPort, p.Proto))
	}) {
		return false
	}
	if len(s.expose) > 0 && !slices.ContainsFunc(exposed(s.pod, v.spec), func(p string) bool { return slices.Contains(s.expose, p) }) {
		return false
	}
	return true
}
