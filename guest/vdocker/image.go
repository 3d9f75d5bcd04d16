package vdocker

import (
	"net/http"
	"slices"
	"strings"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/storage"
	"github.com/moby/moby/api/types/volume"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/dockerapi/shape"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/spec"
)

// podImage is an image that containers of the pod were made from. What its configuration was before the owner's flags
// is not in the pod; the first container's is shown.
type podImage struct {
	spec.Image
	of         spec.Container
	refs       []string // as written, each once
	containers int
	size       int64
}

func podImages(p *pod.Pod) []*podImage {
	length := map[string]int64{}
	for _, l := range p.Placement().Layers {
		length[l.DiffID] = l.Length
	}
	var out []*podImage
	for _, c := range p.Spec().Containers {
		i := slices.IndexFunc(out, func(o *podImage) bool { return o.ConfigID == c.Image.ConfigID })
		if i < 0 {
			i = len(out)
			img := &podImage{Image: c.Image, of: c}
			for _, l := range c.Image.Layers {
				img.size += length[l]
			}
			out = append(out, img)
		}
		out[i].containers++
		if !slices.Contains(out[i].refs, c.Image.Ref) {
			out[i].refs = append(out[i].refs, c.Image.Ref)
		}
	}
	return out
}

// names splits references into docker's tags and digests. References of files and layouts are neither.
func (i *podImage) names() (tags, digests []string) {
	tags, digests = []string{}, []string{}
	for _, ref := range i.refs {
		name, tag, ok := splitRef(ref)
		if !ok {
			continue
		}
		if tag != "" {
			tags = append(tags, name+":"+tag)
		}
		if i.Digest != "" {
			digests = append(digests, name+"@"+i.Digest)
		}
	}
	slices.Sort(digests)
	return tags, slices.Compact(digests)
}

// shownRef is a reference as docker ps shows it: without the names of sources that docker itself has.
func shownRef(ref string) string {
	return strings.TrimPrefix(strings.TrimPrefix(ref, "docker://"), "docker-daemon:")
}

// splitRef cuts NAME[:TAG][@DIGEST]; without both the tag is "latest".
func splitRef(ref string) (name, tag string, ok bool) {
	ref = shownRef(ref)
	for _, transport := range []string{"docker-archive:", "oci:", "oci-archive:", "containerd:"} {
		if strings.HasPrefix(ref, transport) {
			return "", "", false
		}
	}
	name, _, digested := strings.Cut(ref, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		return name[:i], name[i+1:], true
	}
	if digested {
		return name, "", true
	}
	return name, "latest", name != ""
}

// imageIs reports whether a client's reference means an image: by ID, its beginning, name or digest.
func imageIs(i spec.Image, ref string) bool {
	if ref == "" {
		return false
	}
	if ref == i.Ref || ref == shownRef(i.Ref) || ref == i.ConfigID || strings.HasPrefix(strings.TrimPrefix(i.ConfigID, "sha256:"), strings.TrimPrefix(ref, "sha256:")) {
		return true
	}
	name, tag, ok := splitRef(i.Ref)
	if !ok {
		return false
	}
	_, digest, byDigest := strings.Cut(ref, "@")
	wantName, wantTag, ok := splitRef(ref)
	if !ok || familiar(wantName) != familiar(name) {
		return false
	}
	if byDigest {
		return digest == i.Digest
	}
	return wantTag == tag
}

// familiar takes away what docker adds to short names.
func familiar(name string) string {
	for _, prefix := range []string{"docker.io/library/", "index.docker.io/library/", "docker.io/", "library/"} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			return rest
		}
	}
	return name
}

func (i *podImage) summary() image.Summary {
	tags, digests := i.names()
	return image.Summary{
		ID: i.ConfigID, RepoTags: tags, RepoDigests: digests, Created: i.of.Created.Unix(), Size: i.size,
		SharedSize: -1, Containers: int64(i.containers), Labels: labels(i.of),
	}
}

// imageSummary is image.Summary with what older versions have beside it.
type imageSummary struct {
	image.Summary
	VirtualSize *int64 `json:",omitempty"` // until 1.43
}

func (s *server) images(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "before", "dangling", "label", "reference", "since", "until")
	if err != nil {
		return err
	}
	dangling, err := f.Bool("dangling", false)
	if err != nil {
		return err
	}
	until := time.Time{}
	for _, v := range f["until"] {
		if until, err = dockerapi.ParseTime(v, time.Now()); err != nil {
			return err
		}
	}
	out := []imageSummary{}
	for _, i := range podImages(p) {
		sum := i.summary()
		if dangling || !f.Labels("label", sum.Labels) || !until.IsZero() && i.of.Created.After(until) {
			continue
		}
		if refs := f["reference"]; len(refs) > 0 && !slices.ContainsFunc(refs, func(ref string) bool { return imageIs(i.Image, ref) }) {
			continue
		}
		one := imageSummary{Summary: sum}
		if r.Version < 44 {
			one.VirtualSize = &one.Size
		}
		if r.Version < 51 {
			one.Containers = -1
		}
		out = append(out, one)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func findImage(p *pod.Pod, ref string) (*podImage, error) {
	for _, i := range podImages(p) {
		if slices.ContainsFunc(i.refs, func(r string) bool {
			img := i.Image
			img.Ref = r
			return imageIs(img, ref)
		}) {
			return i, nil
		}
	}
	if !strings.Contains(ref, "@") {
		if name, tag, ok := splitRef(ref); ok {
			ref = name + ":" + tag
		}
	}
	return nil, dockerapi.NotFound("No such image: %s", ref)
}

func (s *server) imageInspect(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	i, err := findImage(p, r.Var("name"))
	if err != nil {
		return err
	}
	tags, digests := i.names()
	cfg := containerConfig(p, i.of)
	out := struct {
		image.InspectResponse
		Parent        string
		Comment       string
		DockerVersion string
		Author        string
		Config        *dockerspec.DockerOCIImageConfig
		GraphDriver   storage.DriverData
		VirtualSize   *int64 `json:",omitempty"`
	}{
		InspectResponse: image.InspectResponse{
			ID: i.ConfigID, RepoTags: tags, RepoDigests: digests, Created: shape.Time(i.of.Created),
			Architecture: "amd64", Os: "linux", Size: i.size,
			RootFS: image.RootFS{Type: "layers", Layers: i.Layers},
		},
		GraphDriver: storage.DriverData{Name: storageDriver, Data: map[string]string{}},
		Config:      &dockerspec.DockerOCIImageConfig{},
	}
	out.Config.User, out.Config.ExposedPorts, out.Config.Env = cfg.User, cfg.ExposedPorts, cfg.Env
	out.Config.Entrypoint, out.Config.Cmd, out.Config.WorkingDir = cfg.Entrypoint, cfg.Cmd, cfg.WorkingDir
	out.Config.Labels, out.Config.StopSignal, out.Config.Healthcheck = cfg.Labels, cfg.StopSignal, cfg.Healthcheck
	if r.Version < 44 {
		out.VirtualSize = &i.size
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func (s *server) imageHistory(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	i, err := findImage(p, r.Var("name"))
	if err != nil {
		return err
	}
	length := map[string]int64{}
	for _, l := range p.Placement().Layers {
		length[l.DiffID] = l.Length
	}
	tags, _ := i.names()
	out := []image.HistoryResponseItem{}
	for n, l := range slices.Backward(i.Layers) {
		item := image.HistoryResponseItem{ID: "<missing>", Created: i.of.Created.Unix(), CreatedBy: l, Size: length[l]}
		if n == len(i.Layers)-1 {
			item.ID, item.Tags = i.ConfigID, tags
		}
		out = append(out, item)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// --- volumes ---

// volumePath is where a volume's files lie in the machine.
func volumePath(name string) string { return "/volumes/" + name + "/_data" }

func podVolumes(p *pod.Pod, usage bool) []*volume.Volume {
	out := []*volume.Volume{}
	for _, v := range p.Spec().Volumes {
		one := &volume.Volume{
			Name: v.Name, Driver: "local", Mountpoint: volumePath(v.Name), Scope: "local",
			CreatedAt: p.Spec().Containers[0].Created.UTC().Format(time.RFC3339), Labels: map[string]string{}, Options: map[string]string{},
		}
		if usage {
			one.UsageData = &volume.UsageData{RefCount: volumeUsers(p, v.Name), Size: v.Size}
		}
		out = append(out, one)
	}
	return out
}

func volumeUsers(p *pod.Pod, name string) int64 {
	n := int64(0)
	for _, c := range p.Spec().Containers {
		if slices.ContainsFunc(c.Mounts, func(m spec.Mount) bool { return m.Type == spec.MountVolume && m.Source == name }) {
			n++
		}
	}
	return n
}

func (s *server) volumes(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "dangling", "driver", "label", "name")
	if err != nil {
		return err
	}
	dangling, err := f.Bool("dangling", false)
	if err != nil {
		return err
	}
	out := struct {
		Volumes  []*volume.Volume
		Warnings []string
	}{Volumes: []*volume.Volume{}}
	for _, v := range podVolumes(p, false) {
		unused := volumeUsers(p, v.Name) == 0
		if len(f["dangling"]) > 0 && unused != dangling || !f.Exact("driver", v.Driver) || !f.Match("name", v.Name) || !f.Labels("label", nil) {
			continue
		}
		out.Volumes = append(out.Volumes, v)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func (s *server) volumeInspect(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	for _, v := range podVolumes(p, false) {
		if v.Name == r.Var("name") {
			return dockerapi.WriteJSON(w, http.StatusOK, v)
		}
	}
	return dockerapi.NotFound("get %s: no such volume", r.Var("name"))
}
