package vdocker

import (
	"cmp"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/dockerapi/shape"
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
func (v view) running() bool { return shape.Running(v.state) }

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
		Command: shape.Command(v.spec.Args()), Created: v.spec.Created.Unix(), Labels: labels(v.spec),
		State: container.ContainerState(v.state.Status), Status: shape.Status(v.state, now), Mounts: mountPoints(p, v),
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
	keep, err := shape.Select(r, func(ref string) (string, error) {
		c, err := find(p, ref)
		if err != nil {
			return "", err
		}
		return c.ID(), nil
	})
	if err != nil {
		return err
	}
	now := time.Now()
	all := newestFirst(p)
	candidates := make([]shape.Candidate, len(all))
	for i, v := range all {
		candidates[i] = candidate(p, v)
	}
	out := []summary{}
	for _, i := range keep.Apply(candidates) {
		s := summarize(p, all[i], r.Version, now)
		if r.Bool("size") {
			rw, fs, err := all[i].c.Size(r.Context())
			if err != nil {
				return err
			}
			s.SizeRw, s.SizeFs = &rw, &fs
		}
		out = append(out, s)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// candidate is what the filters of the list are about.
func candidate(p *pod.Pod, v view) shape.Candidate {
	c := shape.Candidate{
		ID: v.id, Name: v.name, State: v.state, Labels: v.spec.Labels, Mounts: v.spec.Mounts, Exposed: exposed(p, v.spec),
		Ancestor: func(ref string) bool { return imageIs(v.spec.Image, ref) },
		Network:  func(ref string) bool { return networkIs(p, ref) },
	}
	for _, port := range publishedBy(p, v.spec) {
		c.Published = append(c.Published, fmt.Sprintf("%d/%s", port.ContainerPort, port.Proto))
	}
	return c
}
