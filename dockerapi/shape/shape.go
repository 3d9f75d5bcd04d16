// Package shape shows containers as docker does: the texts and filters of docker ps, the state of inspect. It knows facts alone; whose
// they are (a pod's in its machine, a host's with all its pods) is its callers'.
package shape

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/spec"
)

// Time is a time in docker's answers.
func Time(t time.Time) string { return t.UTC().Format(time.RFC3339Nano) }

// Running reports what docker calls running: paused and restarting containers are.
func Running(s spec.State) bool {
	return s.Status == spec.StatusRunning || s.Status == spec.StatusPaused || s.Status == spec.StatusRestarting
}

// Status is the text of docker ps.
func Status(s spec.State, now time.Time) string {
	since := func(t time.Time) string { return units.HumanDuration(now.Sub(t)) }
	switch s.Status {
	case spec.StatusPaused:
		return "Up " + since(s.Started) + " (Paused)"
	case spec.StatusRestarting:
		return fmt.Sprintf("Restarting (%d) %s ago", s.ExitCode, since(s.Finished))
	case spec.StatusRunning:
		switch s.Health {
		case "", "none":
			return "Up " + since(s.Started)
		case "starting":
			return "Up " + since(s.Started) + " (health: starting)"
		}
		return "Up " + since(s.Started) + " (" + s.Health + ")"
	case spec.StatusDead:
		return "Dead"
	}
	switch {
	case s.Started.IsZero():
		return "Created"
	case s.Finished.IsZero():
		return ""
	}
	return fmt.Sprintf("Exited (%d) %s ago", s.ExitCode, since(s.Finished))
}

// Command is a process as one line.
func Command(args []string) string {
	args = slices.Clone(args)
	for i, a := range args {
		if i > 0 && strings.Contains(a, " ") {
			args[i] = "'" + a + "'"
		}
	}
	return strings.Join(args, " ")
}

// State is the member State of inspect, without its Health.
func State(s spec.State) *container.State {
	return &container.State{
		Status: container.ContainerState(s.Status), Running: Running(s),
		Paused: s.Status == spec.StatusPaused, Restarting: s.Status == spec.StatusRestarting,
		Dead: s.Status == spec.StatusDead, OOMKilled: s.OOMKilled, Pid: s.Pid,
		ExitCode: s.ExitCode, Error: s.Error, StartedAt: Time(s.Started), FinishedAt: Time(s.Finished),
	}
}

// Candidate is a container that docker ps may show.
type Candidate struct {
	ID, Name string
	State    spec.State
	Labels   map[string]string
	Mounts   []spec.Mount
	// Published and Exposed are ports, "80/tcp".
	Published, Exposed []string
	// Ancestor and Network say whether a word of the user's names its image, or a network of its.
	Ancestor, Network func(word string) bool
}

// Selection decides which containers docker ps shows.
type Selection struct {
	filters         dockerapi.Filters
	all             bool
	limit           int
	before, since   string // IDs; empty: none
	exited          []int
	isTask          bool
	publish, expose []network.PortRange
}

// Select reads the query of GET /containers/json. find looks a container up that a filter names, and returns its ID.
func Select(r *dockerapi.Request, find func(ref string) (id string, err error)) (*Selection, error) {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "ancestor", "before", "expose", "exited", "health", "id",
		"isolation", "label", "name", "network", "publish", "since", "status", "volume", "is-task")
	if err != nil {
		return nil, err
	}
	s := &Selection{filters: f, all: r.Bool("all")}
	if s.limit, err = r.Int("limit"); err != nil {
		return nil, err
	}
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
	if s.isTask, err = f.Bool("is-task", false); err != nil {
		return nil, err
	}
	for key, out := range map[string]*[]network.PortRange{"publish": &s.publish, "expose": &s.expose} {
		for _, v := range f[key] {
			ports, err := network.ParsePortRange(v)
			if err != nil {
				return nil, dockerapi.BadRequest("invalid filter '%s=%s': %w", key, v, err)
			}
			*out = append(*out, ports)
		}
	}
	for key, out := range map[string]*string{"before": &s.before, "since": &s.since} {
		for _, ref := range f[key] {
			if *out, err = find(ref); err != nil {
				return nil, dockerapi.Errorf(dockerapi.Status(err), "no such container %s", ref)
			}
		}
	}
	return s, nil
}

// Apply returns the indexes of those that are shown, of a list in docker's order: the newest first.
func (s *Selection) Apply(in []Candidate) []int {
	var out []int
	before := s.before
	for i := range in {
		if s.limit > 0 && len(out) == s.limit {
			break
		}
		if s.since != "" && in[i].ID == s.since {
			break
		}
		if before != "" {
			if in[i].ID == before {
				before = ""
			}
			continue
		}
		if s.includes(&in[i]) {
			out = append(out, i)
		}
	}
	return out
}

func (s *Selection) includes(c *Candidate) bool {
	f := s.filters
	switch {
	case !Running(c.State) && !s.all && s.limit <= 0,
		!f.Match("name", c.Name) && !f.Match("name", "/"+c.Name),
		!f.Match("id", c.ID),
		s.isTask,
		!f.Labels("label", c.Labels),
		!f.Exact("status", c.State.Status),
		!f.Exact("health", cmp.Or(c.State.Health, string(container.NoHealthcheck))),
		!f.Exact("isolation", ""),
		len(s.exited) > 0 && (Running(c.State) || c.State.Started.IsZero() || !slices.Contains(s.exited, c.State.ExitCode)),
		len(f["ancestor"]) > 0 && !slices.ContainsFunc(f["ancestor"], c.Ancestor),
		len(f["network"]) > 0 && !slices.ContainsFunc(f["network"], c.Network),
		!overlap(s.publish, c.Published), !overlap(s.expose, c.Exposed):
		return false
	}
	values := f["volume"]
	return len(values) == 0 || slices.ContainsFunc(c.Mounts, func(m spec.Mount) bool {
		return slices.Contains(values, m.Source) || slices.Contains(values, m.Target)
	})
}

// overlap reports whether one of those asked for is there, or none was asked for.
func overlap(asked []network.PortRange, there []string) bool {
	return len(asked) == 0 || slices.ContainsFunc(there, func(s string) bool {
		p, err := network.ParsePort(s)
		return err == nil && slices.ContainsFunc(asked, func(r network.PortRange) bool {
			return r.Proto() == p.Proto() && r.Start() <= p.Num() && p.Num() <= r.End()
		})
	})
}
