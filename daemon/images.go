package daemon

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/moby/moby/api/types/events"
	imagetypes "github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/registry"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

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

// lookup finds one image by name or ID.
func (d *Daemon) lookup(ctx context.Context, name string) (*image.Summary, error) {
	u, err := d.cfg.Store.Lookup(ctx, name)
	switch {
	case errors.Is(err, image.ErrNotFound):
		return nil, dockerapi.NotFound("No such image: %s", withTag(name))
	case err != nil:
		return nil, dockerapi.BadRequest("%w", err)
	}
	return u, nil
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
	var before, since time.Time
	for key, into := range map[string]*time.Time{"before": &before, "since": &since} {
		for _, ref := range f[key] {
			u, err := d.lookup(r.Context(), ref)
			if err != nil {
				return err
			}
			if t := u.Image.Created(); into.IsZero() || t.After(*into) == (key == "since") { // all of them have to match
				*into = t
			}
		}
	}
	until := time.Time{}
	for _, v := range f["until"] {
		t, err := dockerapi.ParseTime(v, time.Now())
		if err != nil {
			return err
		}
		if until.IsZero() || t.Before(until) {
			until = t
		}
	}
	all, err := d.cfg.Store.Images(r.Context())
	if err != nil {
		return err
	}
	out := []imagetypes.Summary{}
	for _, u := range all {
		made := u.Image.Created()
		switch {
		case len(f["dangling"]) > 0 && dangling != u.Dangling, !f.Labels("label", u.Image.Config.Config.Labels),
			!before.IsZero() && !made.Before(before), !since.IsZero() && !made.After(since), !until.IsZero() && !made.Before(until):
			continue
		}
		tags := append([]string{}, u.RepoTags...)
		if len(f["reference"]) > 0 {
			tags = slices.DeleteFunc(tags, func(t string) bool {
				return !slices.ContainsFunc(f["reference"], func(p string) bool { return matches(p, t) })
			})
			if len(tags) == 0 {
				continue
			}
		}
		s := summarizeImage(u)
		s.RepoTags = tags
		if r.Bool("shared-size") {
			s.SharedSize = u.Shared
		}
		out = append(out, s)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// summarizeImage is an image in docker's list.
func summarizeImage(u *image.Summary) imagetypes.Summary {
	return imagetypes.Summary{
		ID: string(u.ID), ParentID: string(u.Parent), RepoTags: append([]string{}, u.RepoTags...), RepoDigests: append([]string{}, u.RepoDigests...),
		Created: u.Image.Created().Unix(), Size: u.Size, SharedSize: -1, Containers: -1, Labels: u.Image.Config.Config.Labels,
	}
}

func (d *Daemon) imageInspect(w http.ResponseWriter, r *dockerapi.Request) error {
	u, err := d.lookup(r.Context(), r.Var("name"))
	if err != nil {
		return err
	}
	cfg := u.Image.Config
	if p := r.Query("platform"); p != "" && r.Version >= 49 {
		var want struct{ OS, Architecture string }
		if err := json.Unmarshal([]byte(p), &want); err != nil {
			return dockerapi.BadRequest("invalid platform %q: want JSON of os and architecture", p)
		}
		if want.OS != cfg.OS || normalArchitecture(want.Architecture) != normalArchitecture(cfg.Architecture) {
			return dockerapi.NotFound("image with reference %s was found but its platform (%s/%s) does not match the specified platform (%s/%s)",
				r.Var("name"), cfg.OS, cfg.Architecture, want.OS, want.Architecture)
		}
	}
	layers := []string{}
	for _, l := range cfg.RootFS.DiffIDs {
		layers = append(layers, string(l))
	}
	// The configuration goes out as it is in the image.
	var raw struct {
		Config        json.RawMessage `json:"config"`
		DockerVersion string          `json:"docker_version"`
	}
	if err := json.Unmarshal(u.Image.RawConfig, &raw); err != nil {
		return fmt.Errorf("read the configuration of image %s: %w", u.ID, err)
	}
	out := map[string]any{
		"Id": u.ID, "RepoTags": append([]string{}, u.RepoTags...), "RepoDigests": append([]string{}, u.RepoDigests...),
		"Parent": u.Parent, "Comment": u.Image.Comment(), "Created": u.Image.Created().UTC().Format(time.RFC3339Nano),
		"DockerVersion": raw.DockerVersion, "Author": cfg.Author, "Config": raw.Config, "Architecture": cfg.Architecture, "Os": cfg.OS,
		"Size": u.Size, "GraphDriver": map[string]any{"Name": storageDriver, "Data": map[string]string{}},
		"RootFS":   map[string]any{"Type": "layers", "Layers": layers},
		"Metadata": map[string]any{"LastTagTime": u.LastTagged.UTC().Format(time.RFC3339Nano)},
	}
	if r.Version < 44 {
		out["VirtualSize"] = u.Size
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

func (d *Daemon) imageHistory(w http.ResponseWriter, r *dockerapi.Request) error {
	u, err := d.lookup(r.Context(), r.Var("name"))
	if err != nil {
		return err
	}
	steps, err := d.cfg.Store.History(r.Context(), u.Image)
	if err != nil {
		return err
	}
	out := []imagetypes.HistoryResponseItem{}
	for i, s := range steps {
		item := imagetypes.HistoryResponseItem{ID: "<missing>", Created: s.Created.Unix(), CreatedBy: s.CreatedBy, Tags: s.RepoTags, Size: s.Size, Comment: s.Comment}
		if s.ID != "" {
			item.ID = string(s.ID)
		}
		if i == 0 {
			item.Tags = u.RepoTags
		}
		out = append(out, item)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// imageTag gives an image another name.
func (d *Daemon) imageTag(w http.ResponseWriter, r *dockerapi.Request) error {
	u, err := d.lookup(r.Context(), r.Var("name"))
	if err != nil {
		return err
	}
	ref, err := newName(r.Query("repo"), r.Query("tag"))
	if err != nil {
		return err
	}
	if err := d.cfg.Store.Tag(r.Context(), u.Image, ref); err != nil {
		return err
	}
	d.imageEvent(events.ActionTag, string(u.ID), ref.Familiar())
	w.WriteHeader(http.StatusCreated)
	return nil
}

// newName is a name that an image is to get.
func newName(repo, tag string) (image.Reference, error) {
	if tag != "" {
		repo += ":" + tag
	}
	ref, err := image.ParseReference("docker://" + repo)
	if err != nil {
		return ref, dockerapi.BadRequest("invalid reference format: %w", err)
	}
	if strings.Contains(repo, "@") {
		return ref, dockerapi.BadRequest("refusing to create a tag with a digest reference")
	}
	if familiarWithoutTag(ref.Familiar()) == string(digest.Canonical) {
		return ref, dockerapi.BadRequest("refusing to create an ambiguous tag using digest algorithm as name")
	}
	return ref, nil
}

// normalArchitecture is the name that images have for what machines call themselves.
func normalArchitecture(s string) string {
	switch s = strings.ToLower(s); s {
	case "x86_64", "x86-64":
		return "amd64"
	case "aarch64":
		return "arm64"
	}
	return s
}

// knownArchitectures are those that a single word may mean.
var knownArchitectures = []string{"386", "amd64", "arm", "arm64", "loong64", "mips64le", "ppc64le", "riscv64", "s390x", "sparc64"}

// parsePlatform reads OS, ARCHITECTURE or OS/ARCHITECTURE[/VARIANT] with docker's words for what is wrong.
func parsePlatform(s string) (os, arch string, err error) {
	parts := strings.Split(strings.ToLower(s), "/")
	for _, p := range parts {
		if p == "" || strings.Trim(p, "abcdefghijklmnopqrstuvwxyz0123456789_.-") != "" || len(parts) > 3 {
			return "", "", dockerapi.BadRequest("%q is an invalid OS component of %q: platform specifier component must match [A-Za-z0-9_.-]+", p, s)
		}
	}
	if len(parts) > 1 {
		return parts[0], normalArchitecture(parts[1]), nil
	}
	switch arch = normalArchitecture(parts[0]); {
	case parts[0] == "linux":
		return "linux", "amd64", nil
	case parts[0] == "macos" || parts[0] == "darwin" || parts[0] == "windows" || parts[0] == "freebsd":
		return parts[0], "amd64", nil
	case slices.Contains(knownArchitectures, arch):
		return "linux", arch, nil
	}
	return "", "", dockerapi.BadRequest("%q: unknown operating system or architecture: invalid argument", s)
}

func (d *Daemon) imageEvent(action events.Action, id, name string) {
	d.events.publish(daemonEvent(events.ImageEventType, action, id, map[string]string{"name": name}))
}

// save writes images as an archive that docker load reads.
func (d *Daemon) save(w http.ResponseWriter, r *dockerapi.Request) error {
	names := r.Form["names"]
	if name := r.Var("name"); name != "" {
		names = []string{name}
	}
	if len(r.Form["platform"]) > 1 {
		return dockerapi.BadRequest("multiple platform parameters not supported")
	}
	w.Header().Set("Content-Type", "application/x-tar")
	err := d.cfg.Store.Save(r.Context(), w, names) // what is not there it says before it writes anything
	switch {
	case errors.Is(err, image.ErrNotFound) && len(names) == 1:
		return dockerapi.NotFound("No such image: %s", withTag(names[0]))
	case errors.Is(err, image.ErrNotFound):
		return dockerapi.NotFound("%w", err)
	case err != nil:
		return err
	}
	for _, n := range names {
		if u, err := d.lookup(r.Context(), n); err == nil {
			d.imageEvent(events.ActionSave, string(u.ID), string(u.ID))
		}
	}
	return nil
}

// withRegistry asks a registry, which is given as the first part of a name. One on this host's loopback is, as docker has it, spoken
// to without TLS when it has none.
func (d *Daemon) withRegistry(name string, ask func(plain []string) error) error {
	err := ask(d.cfg.PlainHTTP)
	host, _, _ := strings.Cut(name, "/")
	if errors.Is(err, image.ErrPlainHTTP) && d.insecure(host) {
		return ask(append(slices.Clone(d.cfg.PlainHTTP), host))
	}
	return err
}

// insecure says whether HOST[:PORT] is this host's loopback, or has an address of a network whose registries may be spoken to
// without TLS.
func (d *Daemon) insecure(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	a, err := netip.ParseAddr(strings.Trim(host, "[]"))
	return host == "localhost" || err == nil && slices.ContainsFunc(d.insecureNetworks(), func(p netip.Prefix) bool { return p.Contains(a) })
}

// insecureNetworks are the loopback's, and those that were named.
func (d *Daemon) insecureNetworks() []netip.Prefix {
	out := []netip.Prefix{netip.MustParsePrefix("::1/128"), netip.MustParsePrefix("127.0.0.0/8")}
	for _, s := range d.cfg.PlainHTTP {
		if p, err := netip.ParsePrefix(s); err == nil {
			out = append(out, p)
		}
	}
	return out
}

// push sends an image to its registry.
func (d *Daemon) push(w http.ResponseWriter, r *dockerapi.Request) error {
	name := r.Var("name")
	if tag := r.Query("tag"); tag != "" {
		name += ":" + tag
	}
	ref, err := image.ParseReference("docker://" + name)
	if err != nil {
		return dockerapi.BadRequest("invalid reference format: %w", err)
	}
	if _, err := d.cfg.Store.Get(r.Context(), ref); errors.Is(err, image.ErrNotFound) {
		return dockerapi.NotFound("An image does not exist locally with the tag: %s", familiarWithoutTag(ref.Familiar()))
	} else if err != nil {
		return err
	}
	var o image.PushOptions
	if o.Keychain, err = keychain(r.Header.Get("X-Registry-Auth")); err != nil {
		return err
	}
	t := &teller{out: dockerapi.NewJSONStream(w), last: map[digest.Digest]time.Time{}, verb: "Pushing", done: "Pushed", exists: "Layer already exists"}
	t.say(progress{Status: fmt.Sprintf("The push refers to repository [%s]", familiarWithoutTag(ref.Name()))})
	o.Progress = t.event
	var desc ocispec.Descriptor
	err = d.withRegistry(ref.Name(), func(plain []string) (err error) {
		o.PlainHTTP = plain
		desc, err = d.cfg.Store.Push(r.Context(), ref, o)
		return err
	})
	if err != nil {
		return t.fail(err)
	}
	t.say(progress{Status: fmt.Sprintf("%s: digest: %s size: %d", lastTag(ref.Familiar()), desc.Digest, desc.Size)})
	d.imageEvent(events.ActionPush, ref.Familiar(), familiarWithoutTag(ref.Familiar()))
	return nil
}

// importImage makes an image of a tar of a root file system.
func (d *Daemon) importImage(w http.ResponseWriter, r *dockerapi.Request) error {
	if src := r.Query("fromSrc"); src != "-" {
		return dockerapi.Errorf(http.StatusNotImplemented, "import from %q is refused: the daemon fetches nothing but from registries; give the archive on standard input", src)
	}
	o := image.ImportOptions{Changes: r.Form["changes"], Message: r.Query("message")}
	if p := r.Query("platform"); p != "" {
		os, arch, err := parsePlatform(p)
		if err != nil {
			return err
		}
		if os != "linux" {
			return dockerapi.BadRequest("operating system is not supported: %s", os)
		}
		o.Architecture = arch
	}
	if repo := r.Query("repo"); repo != "" {
		var err error
		if o.Ref, err = newName(repo, r.Query("tag")); err != nil {
			return err
		}
	}
	if err := http.NewResponseController(w).EnableFullDuplex(); err != nil {
		return err
	}
	img, err := d.cfg.Store.Import(r.Context(), r.Body, o)
	if errors.Is(err, image.ErrChange) {
		return dockerapi.BadRequest("%w", err)
	}
	if err != nil {
		return err
	}
	d.imageEvent(events.ActionImport, string(img.ConfigDigest), string(img.ConfigDigest))
	return dockerapi.NewJSONStream(w).Write(progress{Status: string(img.ConfigDigest)})
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
	// first goes before whatever is said first: there is an image, and the answer is no error any more.
	first *progress

	verb, done, exists string // docker's words
}

// fail says the error, which is the whole answer when nothing else was said.
func (t *teller) fail(err error) error {
	t.mu.Lock()
	begun := t.out.Begun()
	t.mu.Unlock()
	if !begun {
		return err
	}
	t.say(progress{ErrorObj: &progressError{err.Error()}, Error: err.Error()})
	return nil
}

func (t *teller) say(p progress) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.first != nil {
		_ = t.out.Write(*t.first)
		t.first = nil
	}
	_ = t.out.Write(p) // a client that has gone ends the request's context
}

func (t *teller) event(e image.Event) {
	if e.Layer == "" {
		if e.Message != "" {
			t.say(progress{Status: e.Message})
		}
		return
	}
	shown := e.Blob
	if shown == "" {
		shown = e.Layer
	}
	p := progress{ID: shown.Encoded()[:12], Detail: &progressDetail{}}
	switch e.State {
	case image.Waiting:
		p.Status = "Waiting"
	case image.Exists:
		p.Status = t.exists
	case image.Done:
		p.Status = t.done
	case image.Retrying:
		p.Status = fmt.Sprintf("Retrying in %d seconds", int(e.Wait.Seconds()+0.999))
	case image.Mounted:
		p.Status = "Mounted from " + e.Message
	case image.Compressing:
		p.Status = "Preparing"
	case image.Pulling, image.Pushing:
		t.mu.Lock()
		soon := time.Since(t.last[e.Layer]) < 100*time.Millisecond
		if !soon {
			t.last[e.Layer] = time.Now()
		}
		t.mu.Unlock()
		if soon {
			return
		}
		p.Status, p.Detail = t.verb, &progressDetail{Current: e.Current, Total: e.Total}
	}
	t.say(p)
}

// pull brings an image in.
func (d *Daemon) pull(w http.ResponseWriter, r *dockerapi.Request) error {
	name, tag := r.Query("fromImage"), r.Query("tag")
	if name == "" {
		return d.importImage(w, r)
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
	options := image.PullOptions{Policy: image.Always}
	if p := r.Query("platform"); p != "" {
		os, arch, err := parsePlatform(p)
		if err != nil {
			return err
		}
		options.Platform = os + "/" + arch
	}
	if options.Keychain, err = keychain(r.Header.Get("X-Registry-Auth")); err != nil {
		return err
	}
	t := &teller{out: dockerapi.NewJSONStream(w), last: map[digest.Digest]time.Time{}, verb: "Downloading", done: "Pull complete", exists: "Already exists"}
	t.first = &progress{Status: "Pulling from " + familiarWithoutTag(ref.Familiar()), ID: lastTag(ref.Familiar())}
	options.Progress = t.event
	var img *image.Image
	err = d.withRegistry(ref.Name(), func(plain []string) (err error) {
		options.PlainHTTP = plain
		img, err = d.cfg.Store.Pull(r.Context(), ref, options)
		return err
	})
	switch {
	case errors.Is(err, image.ErrUnauthorized):
		return t.fail(dockerapi.NotFound("pull access denied for %s, repository does not exist or may require 'docker login': %w", familiarWithoutTag(ref.Familiar()), err))
	case errors.Is(err, image.ErrNotFound):
		return t.fail(dockerapi.NotFound("manifest for %s not found: manifest unknown: %w", ref.Familiar(), err))
	case err != nil:
		return t.fail(err)
	}
	t.say(progress{Status: "Digest: " + string(img.Digest)})
	t.say(progress{Status: "Status: Downloaded newer image for " + ref.Familiar()})
	d.imageEvent(events.ActionPull, ref.Familiar(), familiarWithoutTag(ref.Familiar()))
	return nil
}

func lastTag(s string) string {
	if rest := strings.TrimPrefix(s[len(familiarWithoutTag(s)):], ":"); rest != "" {
		return rest
	}
	return "latest"
}

// keychain are the credentials of a request's X-Registry-Auth header; nil if it has none. What the header says is for whatever
// registry is asked: the client has chosen it so.
func keychain(header string) (authn.Keychain, error) {
	if header == "" {
		return nil, nil
	}
	raw, err := base64.URLEncoding.DecodeString(header)
	if err != nil {
		raw, err = base64.RawURLEncoding.DecodeString(header)
	}
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
	return image.Credentials{Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken}.Keychain(), nil
}

// loadImages reads what docker save wrote.
func (d *Daemon) loadImages(w http.ResponseWriter, r *dockerapi.Request) error {
	if err := http.NewResponseController(w).EnableFullDuplex(); err != nil { // the answer begins before the archive ends
		return err
	}
	t := &teller{out: dockerapi.NewJSONStream(w), last: map[digest.Digest]time.Time{}, verb: "Downloading", done: "Pull complete", exists: "Already exists"}
	options := image.PullOptions{AnyPlatform: true}
	if !r.Bool("quiet") {
		options.Progress = t.event
	}
	images, err := d.cfg.Store.Load(r.Context(), r.Body, options)
	if err != nil {
		return t.fail(err)
	}
	_, _ = io.Copy(io.Discard, io.LimitReader(r.Body, 1<<20)) // what follows the archive
	for _, img := range images {
		if ref, err := image.ParseReference(img.Ref); err == nil && ref.Name() != "" {
			t.say(progress{Stream: "Loaded image: " + ref.Familiar() + "\n"})
			d.imageEvent(events.ActionLoad, string(img.ConfigDigest), ref.Familiar())
			continue
		}
		t.say(progress{Stream: "Loaded image ID: " + string(img.ConfigDigest) + "\n"})
	}
	return nil
}

// imageRemove does what docker rmi does.
func (d *Daemon) imageRemove(w http.ResponseWriter, r *dockerapi.Request) error {
	name := r.Var("name")
	done, err := d.cfg.Store.Delete(context.WithoutCancel(r.Context()), name, image.DeleteOptions{Force: r.Bool("force"), Users: d.imageUsers})
	switch {
	case errors.Is(err, image.ErrNotFound):
		return dockerapi.NotFound("No such image: %s", withTag(name))
	case errors.Is(err, image.ErrConflict):
		if inner := errors.Unwrap(err); errors.Is(inner, image.ErrConflict) { // the client says itself what it was about
			err = inner
		}
		return dockerapi.Conflict("%w", err)
	case errors.Is(err, image.ErrAmbiguous):
		return dockerapi.BadRequest("%w", err)
	case err != nil:
		return err
	}
	return dockerapi.WriteJSON(w, http.StatusOK, d.deleted(done.Items))
}

// deleted are a deletion's items as docker shows them; it tells of them, too.
func (d *Daemon) deleted(items []image.DeletedItem) []imagetypes.DeleteResponse {
	out := []imagetypes.DeleteResponse{}
	for _, i := range items {
		out = append(out, imagetypes.DeleteResponse{Untagged: i.Untagged, Deleted: i.Deleted})
		if i.Untagged != "" {
			d.imageEvent(events.ActionUnTag, i.Untagged, i.Untagged)
		} else {
			d.imageEvent(events.ActionDelete, i.Deleted, i.Deleted)
		}
	}
	return out
}

// imageUsers are the containers that were made of an image.
func (d *Daemon) imageUsers(id digest.Digest) []image.User {
	var out []image.User
	for _, c := range d.all() {
		if c.b.Pod.Containers[0].Image.ConfigID == string(id) {
			out = append(out, image.User{Name: c.id[:12], Running: c.look().running()})
		}
	}
	return out
}

// imagePrune removes the images without a name, or with dangling=false all that no container uses.
func (d *Daemon) imagePrune(w http.ResponseWriter, r *dockerapi.Request) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "dangling", "label", "label!", "until")
	if err != nil {
		return err
	}
	dangling, err := f.Bool("dangling", true)
	if err != nil {
		return err
	}
	until := time.Time{}
	for _, v := range f["until"] {
		if until, err = dockerapi.ParseTime(v, time.Now()); err != nil {
			return err
		}
	}
	ctx := context.WithoutCancel(r.Context())
	all, err := d.cfg.Store.Images(ctx)
	if err != nil {
		return err
	}
	report := imagetypes.PruneReport{ImagesDeleted: []imagetypes.DeleteResponse{}}
	for _, u := range all {
		labels := u.Image.Config.Config.Labels
		if dangling && !u.Dangling || len(d.imageUsers(u.ID)) > 0 || !f.Labels("label", labels) ||
			!until.IsZero() && !u.Image.Created().Before(until) ||
			slices.ContainsFunc(f["label!"], func(l string) bool { return dockerapi.Filters{"label": {l}}.Labels("label", labels) }) {
			continue
		}
		done, err := d.cfg.Store.Delete(ctx, string(u.ID), image.DeleteOptions{Force: true, Users: d.imageUsers})
		if errors.Is(err, image.ErrNotFound) || errors.Is(err, image.ErrConflict) { // somebody was faster
			continue
		}
		if err != nil {
			return err
		}
		report.ImagesDeleted = append(report.ImagesDeleted, d.deleted(done.Items)...)
		report.SpaceReclaimed += uint64(done.Bytes)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, report)
}

// distribution says what a registry has under a name.
func (d *Daemon) distribution(w http.ResponseWriter, r *dockerapi.Request) error {
	ref, err := image.ParseReference("docker://" + r.Var("name"))
	if err != nil {
		return dockerapi.BadRequest("invalid reference format: %w", err)
	}
	var o image.PullOptions
	if o.Keychain, err = keychain(r.Header.Get("X-Registry-Auth")); err != nil {
		return err
	}
	var out registry.DistributionInspect
	err = d.withRegistry(ref.Name(), func(plain []string) (err error) {
		o.PlainHTTP = plain
		out.Descriptor, out.Platforms, err = image.Distribution(r.Context(), ref, o)
		return err
	})
	switch {
	case errors.Is(err, image.ErrUnauthorized):
		return dockerapi.Errorf(http.StatusUnauthorized, "%w", err)
	case errors.Is(err, image.ErrNotFound):
		return dockerapi.NotFound("%w", err)
	case err != nil:
		return err
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// login says whether credentials are good. The client keeps them, not the daemon.
func (d *Daemon) login(w http.ResponseWriter, r *dockerapi.Request) error {
	var c registry.AuthConfig
	if err := dockerapi.ReadJSON(r, &c, false); err != nil {
		return err
	}
	err := d.withRegistry(c.ServerAddress, func(plain []string) error {
		return image.Login(r.Context(), c.ServerAddress, image.Credentials{
			Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken,
		}, plain)
	})
	if errors.Is(err, image.ErrUnauthorized) {
		return dockerapi.Errorf(http.StatusUnauthorized, "%w", err)
	}
	if err != nil {
		return err
	}
	return dockerapi.WriteJSON(w, http.StatusOK, registry.AuthResponse{Status: "Login Succeeded"})
}

// search is answered honestly.
func (d *Daemon) search(http.ResponseWriter, *dockerapi.Request) error {
	return dockerapi.Errorf(http.StatusNotImplemented, "search is not offered: name the image")
}

// matches is docker's rule for the filter reference: a pattern of the whole name as docker shows it, or of it without the tag.
func matches(pattern, name string) bool {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return false
	}
	ok, err := reference.FamiliarMatch(pattern, n)
	return err == nil && ok
}
