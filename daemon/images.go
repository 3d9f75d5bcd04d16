package daemon

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/moby/moby/api/types/events"
	imagetypes "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/image"
)

// withTag is a reference as docker names one that it has not found.
func withTag(s string) string {
	ref, err := image.ParseReference(s)
	if err != nil {
		return s
	}
	return ref.Familiar()
}

// familiarWithoutTag is what a filter may name an image by.
func familiarWithoutTag(s string) string {
	if i := strings.LastIndexByte(s, ':'); i > strings.LastIndexByte(s, '/') {
		return s[:i]
	}
	return s
}

// familiar is the store's name of an image as docker shows it.
func familiar(name string) string {
	if ref, err := image.ParseReference(name); err == nil {
		return ref.Familiar()
	}
	return name
}

// named is an image with all its names.
type named struct {
	*image.Image
	tags, digests []string
}

// byID returns the store's images, one for each ID, the newest first.
func (d *Daemon) byID(ctx context.Context) ([]*named, error) {
	all, err := d.cfg.Store.List(ctx)
	if err != nil {
		return nil, err
	}
	ids := map[digest.Digest]*named{}
	var out []*named
	for _, img := range all {
		n := ids[img.ConfigDigest]
		if n == nil {
			n = &named{Image: img, tags: []string{}, digests: []string{}}
			ids[img.ConfigDigest], out = n, append(out, n)
		}
		ref, err := image.ParseReference(img.Ref)
		if err != nil || ref.Name() == "" {
			continue
		}
		name := ref.Familiar()
		if repo, _, pinned := strings.Cut(name, "@"); pinned {
			n.digests = append(n.digests, name)
			_ = repo
			continue
		}
		n.tags = append(n.tags, name)
	}
	slices.SortStableFunc(out, func(a, b *named) int { return created(b.Image).Compare(created(a.Image)) })
	return out, nil
}

func created(i *image.Image) time.Time {
	if i.Config.Created != nil {
		return *i.Config.Created
	}
	return time.Time{}
}

func (d *Daemon) images(w http.ResponseWriter, r *dockerapi.Request) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "dangling", "label", "before", "since", "until", "reference")
	if err != nil {
		return err
	}
	dangling, err := f.Bool("dangling", false)
	if err != nil {
		return err
	}
	all, err := d.byID(r.Context())
	if err != nil {
		return err
	}
	out := []imagetypes.Summary{}
	for _, n := range all {
		if len(f["dangling"]) > 0 && dangling != (len(n.tags) == 0) || !f.Labels("label", n.Config.Config.Labels) {
			continue
		}
		if len(f["reference"]) > 0 && !slices.ContainsFunc(n.tags, func(t string) bool { return f.Match("reference", t) || f.Exact("reference", familiarWithoutTag(t)) }) {
			continue
		}
		out = append(out, imagetypes.Summary{
			ID: string(n.ConfigDigest), RepoTags: n.tags, RepoDigests: n.digests, Created: created(n.Image).Unix(),
			Size: n.Size(), SharedSize: -1, Containers: -1, Labels: n.Config.Config.Labels,
		})
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// imageOf finds one image by name or ID.
func (d *Daemon) imageOf(ctx context.Context, name string) (*named, error) {
	found, err := d.cfg.Store.Find(ctx, name)
	if errors.Is(err, image.ErrNotFound) || err == nil && len(found) == 0 {
		return nil, dockerapi.NotFound("No such image: %s", withTag(name))
	}
	if err != nil {
		return nil, dockerapi.BadRequest("%w", err)
	}
	all, err := d.byID(ctx)
	if err != nil {
		return nil, err
	}
	for _, n := range all {
		if n.ConfigDigest == found[0].ConfigDigest {
			return n, nil
		}
	}
	return nil, dockerapi.NotFound("No such image: %s", withTag(name))
}

func (d *Daemon) imageInspect(w http.ResponseWriter, r *dockerapi.Request) error {
	n, err := d.imageOf(r.Context(), r.Var("name"))
	if err != nil {
		return err
	}
	cfg := n.Config
	layers := []string{}
	for _, l := range cfg.RootFS.DiffIDs {
		layers = append(layers, string(l))
	}
	// The configuration goes out as it is in the image.
	var raw struct {
		Config        json.RawMessage `json:"config"`
		DockerVersion string          `json:"docker_version"`
		Comment       string          `json:"comment"`
	}
	if err := json.Unmarshal(n.RawConfig, &raw); err != nil {
		return fmt.Errorf("read the configuration of image %s: %w", n.ConfigDigest, err)
	}
	out := map[string]any{
		"Id": n.ConfigDigest, "RepoTags": n.tags, "RepoDigests": n.digests, "Parent": "", "Comment": raw.Comment,
		"Created": created(n.Image).UTC().Format(time.RFC3339Nano), "DockerVersion": raw.DockerVersion, "Author": cfg.Author,
		"Config": raw.Config, "Architecture": cfg.Architecture, "Os": cfg.OS, "Size": n.Size(),
		"GraphDriver": map[string]any{"Name": storageDriver, "Data": map[string]string{}},
		"RootFS":      map[string]any{"Type": "layers", "Layers": layers},
		"Metadata":    map[string]any{"LastTagTime": n.Pulled.UTC().Format(time.RFC3339Nano)},
	}
	if r.Version < 44 {
		out["VirtualSize"] = n.Size()
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// progress is a line of docker's progress.
type progress struct {
	Status   string          `json:"status,omitempty"`
	Stream   string          `json:"stream,omitempty"`
	Detail   *progressDetail `json:"progressDetail,omitempty"`
	ID       string          `json:"id,omitempty"`
	ErrorObj *progressError  `json:"errorDetail,omitempty"`
	Error    string          `json:"error,omitempty"`
}

type progressDetail struct {
	Current int64 `json:"current,omitempty"`
	Total   int64 `json:"total,omitempty"`
}

type progressError struct {
	Message string `json:"message"`
}

// teller turns the store's events into docker's lines.
type teller struct {
	mu   sync.Mutex
	out  *dockerapi.JSONStream
	last map[digest.Digest]time.Time
}

func (t *teller) say(p progress) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_ = t.out.Write(p) // a client that has gone ends the request's context
}

func (t *teller) event(e image.Event) {
	if e.Layer == "" {
		if e.Message != "" {
			t.say(progress{Status: e.Message})
		}
		return
	}
	p := progress{ID: e.Blob.Encoded()[:12], Detail: &progressDetail{}}
	switch e.State {
	case image.Waiting:
		p.Status = "Waiting"
	case image.Exists:
		p.Status = "Already exists"
	case image.Done:
		p.Status = "Pull complete"
	case image.Retrying:
		p.Status = fmt.Sprintf("Retrying in %d seconds", int(e.Wait.Seconds()+0.999))
	case image.Pulling:
		t.mu.Lock()
		soon := time.Since(t.last[e.Layer]) < 100*time.Millisecond
		if !soon {
			t.last[e.Layer] = time.Now()
		}
		t.mu.Unlock()
		if soon {
			return
		}
		p.Status, p.Detail = "Downloading", &progressDetail{Current: e.Current, Total: e.Total}
	}
	t.say(p)
}

// pull brings an image in.
func (d *Daemon) pull(w http.ResponseWriter, r *dockerapi.Request) error {
	name, tag := r.Query("fromImage"), r.Query("tag")
	if name == "" {
		return dockerapi.Errorf(http.StatusNotImplemented, "import from %q is not offered: load an archive instead", r.Query("fromSrc"))
	}
	switch {
	case strings.HasPrefix(tag, "sha256:"):
		name += "@" + tag
	case tag != "":
		name += ":" + tag
	}
	ref, err := image.ParseReference("docker://" + name)
	if err != nil {
		return dockerapi.BadRequest("invalid reference format: %w", err)
	}
	options := image.PullOptions{Policy: image.Always, Platform: r.Query("platform")}
	if h := r.Header.Get("X-Registry-Auth"); h != "" {
		if options.Keychain, err = keychain(h); err != nil {
			return err
		}
	}
	out, err := dockerapi.NewJSONStream(w)
	if err != nil {
		return err
	}
	t := &teller{out: out, last: map[digest.Digest]time.Time{}}
	t.say(progress{Status: "Pulling from " + familiarWithoutTag(ref.Familiar()), ID: lastTag(ref.Familiar())})
	options.Progress = t.event
	img, err := d.cfg.Store.Pull(r.Context(), ref, options)
	if err != nil {
		t.say(progress{ErrorObj: &progressError{err.Error()}, Error: err.Error()})
		return nil
	}
	t.say(progress{Status: "Digest: " + string(img.Digest)})
	t.say(progress{Status: "Status: Downloaded newer image for " + ref.Familiar()})
	d.events.publish(daemonEvent(events.ImageEventType, events.ActionPull, ref.Familiar(), map[string]string{"name": familiarWithoutTag(ref.Familiar())}))
	return nil
}

func lastTag(s string) string {
	if rest := strings.TrimPrefix(s[len(familiarWithoutTag(s)):], ":"); rest != "" {
		return rest
	}
	return "latest"
}

// keychain are the credentials of a request's header.
func keychain(header string) (authn.Keychain, error) {
	raw, err := base64.URLEncoding.DecodeString(header)
	if err != nil {
		return nil, dockerapi.BadRequest("invalid X-Registry-Auth header: %w", err)
	}
	var c registry.AuthConfig
	if err := json.Unmarshal(raw, &c); err != nil {
		return nil, dockerapi.BadRequest("invalid X-Registry-Auth header: %w", err)
	}
	if c == (registry.AuthConfig{}) {
		return nil, nil
	}
	return credentials{authn.AuthConfig{Username: c.Username, Password: c.Password, Auth: c.Auth, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken}}, nil
}

// credentials are given to whatever registry is asked: the client has chosen them for it.
type credentials struct{ config authn.AuthConfig }

func (c credentials) Resolve(authn.Resource) (authn.Authenticator, error) {
	return authn.FromConfig(c.config), nil
}

// loadImages reads what docker save wrote.
func (d *Daemon) loadImages(w http.ResponseWriter, r *dockerapi.Request) error {
	if err := http.NewResponseController(w).EnableFullDuplex(); err != nil { // the answer begins before the archive ends
		return err
	}
	out, err := dockerapi.NewJSONStream(w)
	if err != nil {
		return err
	}
	t := &teller{out: out, last: map[digest.Digest]time.Time{}}
	options := image.PullOptions{}
	if !r.Bool("quiet") {
		options.Progress = t.event
	}
	images, err := d.cfg.Store.Load(r.Context(), r.Body, options)
	if err != nil {
		t.say(progress{ErrorObj: &progressError{err.Error()}, Error: err.Error()})
		return nil
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, 1<<20)) // what follows the archive
	for _, img := range images {
		if ref, err := image.ParseReference(img.Ref); err == nil && ref.Name() != "" {
			t.say(progress{Stream: "Loaded image: " + ref.Familiar() + "\n"})
			d.events.publish(daemonEvent(events.ImageEventType, events.ActionLoad, string(img.ConfigDigest), map[string]string{"name": ref.Familiar()}))
			continue
		}
		t.say(progress{Stream: "Loaded image ID: " + string(img.ConfigDigest) + "\n"})
	}
	return nil
}

// imageRemove takes a name away, and the image with its last one.
func (d *Daemon) imageRemove(w http.ResponseWriter, r *dockerapi.Request) error {
	ctx := context.WithoutCancel(r.Context())
	name := r.Var("name")
	found, err := d.cfg.Store.Find(ctx, name)
	if errors.Is(err, image.ErrNotFound) || err == nil && len(found) == 0 {
		return dockerapi.NotFound("No such image: %s", withTag(name))
	}
	if err != nil {
		return dockerapi.BadRequest("%w", err)
	}
	n, err := d.imageOf(ctx, name)
	if err != nil {
		return err
	}
	force := r.Bool("force")
	last := len(found) == len(n.tags)+len(n.digests) || len(n.tags)+len(n.digests) <= 1
	if len(found) > 1 && !force {
		return dockerapi.Conflict("conflict: unable to delete %s (must be forced) - image is referenced in multiple repositories", short(n.ConfigDigest))
	}
	if last {
		for _, c := range d.all() {
			f := c.look()
			if c.b.Pod.Containers[0].Image.ConfigID != string(n.ConfigDigest) {
				continue
			}
			if f.running() {
				return dockerapi.Conflict("conflict: unable to delete %s (cannot be forced) - image is being used by running container %s", short(n.ConfigDigest), c.id[:12])
			}
			if !force {
				return dockerapi.Conflict("conflict: unable to remove repository reference %q (must force) - container %s is using its referenced image %s", name, c.id[:12], short(n.ConfigDigest))
			}
		}
	}
	removed, err := d.cfg.Store.Remove(ctx, found...)
	if err != nil {
		return err
	}
	out := []imagetypes.DeleteResponse{}
	for _, ref := range removed.Images {
		out = append(out, imagetypes.DeleteResponse{Untagged: familiar(ref)})
		d.events.publish(daemonEvent(events.ImageEventType, events.ActionUnTag, string(n.ConfigDigest), map[string]string{"name": string(n.ConfigDigest)}))
	}
	if last {
		out = append(out, imagetypes.DeleteResponse{Deleted: string(n.ConfigDigest)})
		for _, l := range removed.Layers {
			out = append(out, imagetypes.DeleteResponse{Deleted: string(l)})
		}
		d.events.publish(daemonEvent(events.ImageEventType, events.ActionDelete, string(n.ConfigDigest), map[string]string{"name": string(n.ConfigDigest)}))
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func short(d digest.Digest) string { return d.Encoded()[:12] }
