package daemon

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/image"
)

// commit makes an image of a container: the image it was made of, and what it has changed as one more layer.
func (d *Daemon) commit(w http.ResponseWriter, r *dockerapi.Request) error {
	var config *container.Config
	if err := dockerapi.ReadJSON(r, &config, true); err != nil {
		return err
	}
	c, err := d.find(r.Query("container"))
	if err != nil {
		return err
	}
	f := c.look()
	s := &c.b.Pod.Containers[0]
	base, err := d.cfg.Store.Lookup(r.Context(), s.Image.ConfigID)
	if err != nil {
		return dockerapi.NotFound("the image of container %s is gone: %w", f.rec.Name, err)
	}
	o := image.CommitOptions{Changes: r.Form["changes"], Author: r.Query("author"), Comment: r.Query("comment"), CreatedBy: strings.Join(s.Args(), " ")}
	o.Config = runConfig(&f.rec.Config)
	if config != nil {
		mergeConfig(o.Config, config)
	}
	if repo := r.Query("repo"); repo != "" {
		if o.Ref, err = newName(repo, r.Query("tag")); err != nil {
			return err
		}
	}
	ctx := context.WithoutCancel(r.Context())
	if f.running() && r.BoolOr("pause", true) && f.state.Status != "paused" {
		if err := c.ask(ctx, c.d.bounds.patience, "POST", c.path("/pause"), nil, nil, nil); err != nil {
			return err
		}
		defer func() {
			if err := c.ask(ctx, c.d.bounds.patience, "POST", c.path("/unpause"), nil, nil, nil); err != nil {
				d.log.Error("a container stays paused after a commit", "container", c.id, "error", err)
			}
		}()
	}
	if !f.running() {
		leave, err := c.visit(ctx)
		if err != nil {
			return err
		}
		defer leave()
	}
	layer, stop := c.changes(ctx)
	defer stop()
	img, err := d.cfg.Store.Commit(ctx, base.Image, layer, o)
	if errors.Is(err, image.ErrChange) {
		return dockerapi.BadRequest("%w", err)
	}
	if err != nil {
		return err
	}
	c.emit(events.ContainerEventType, events.ActionCommit, map[string]string{"comment": o.Comment, "imageID": string(img.ConfigDigest), "imageRef": o.Ref.Familiar()})
	if o.Ref.Name() != "" {
		d.imageEvent(events.ActionTag, string(img.ConfigDigest), o.Ref.Familiar())
	}
	return dockerapi.WriteJSON(w, http.StatusCreated, container.CommitResponse{ID: string(img.ConfigDigest)})
}

// runConfig is a container's configuration as an image says it.
func runConfig(c *container.Config) *image.RunConfig {
	out := &image.RunConfig{}
	out.User, out.Env, out.Entrypoint, out.Cmd = c.User, c.Env, c.Entrypoint, c.Cmd
	out.WorkingDir, out.Labels, out.StopSignal, out.Volumes = c.WorkingDir, c.Labels, c.StopSignal, c.Volumes
	out.OnBuild, out.Shell = c.OnBuild, c.Shell
	for p := range c.ExposedPorts {
		if out.ExposedPorts == nil {
			out.ExposedPorts = map[string]struct{}{}
		}
		out.ExposedPorts[p.String()] = struct{}{}
	}
	if h := c.Healthcheck; h != nil {
		out.Healthcheck = &dockerspec.HealthcheckConfig{Test: h.Test, Interval: h.Interval, Timeout: h.Timeout, StartPeriod: h.StartPeriod,
			StartInterval: h.StartInterval, Retries: h.Retries}
	}
	return out
}

// mergeConfig changes what the body of a commit names.
func mergeConfig(into *image.RunConfig, c *container.Config) {
	from := runConfig(c)
	if from.User != "" {
		into.User = from.User
	}
	if from.WorkingDir != "" {
		into.WorkingDir = from.WorkingDir
	}
	if len(from.Cmd) > 0 {
		into.Cmd = from.Cmd
	}
	if len(from.Entrypoint) > 0 {
		into.Entrypoint = from.Entrypoint
	}
	into.Env = environment(into.Env, from.Env)
	for k, v := range from.Labels {
		if into.Labels == nil {
			into.Labels = map[string]string{}
		}
		into.Labels[k] = v
	}
	for p := range from.ExposedPorts {
		if into.ExposedPorts == nil {
			into.ExposedPorts = map[string]struct{}{}
		}
		into.ExposedPorts[p] = struct{}{}
	}
	if from.Healthcheck != nil {
		into.Healthcheck = from.Healthcheck
	}
}

// maxChanges bounds the list of paths that a container has changed: a guest tells it.
const maxChanges = 1 << 20

// changes is the tar of a layer with what the container has changed. Its machine, which must be there, tells both the list
// and the files; neither is believed beyond that: the store takes the tar apart as any other.
func (c *Container) changes(ctx context.Context) (layer io.Reader, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	r, w := io.Pipe()
	go func() { w.CloseWithError(c.writeChanges(ctx, w)) }()
	return r, func() {
		cancel()
		r.Close()
	}
}

func (c *Container) writeChanges(ctx context.Context, w io.Writer) error {
	var list []container.FilesystemChange
	if err := c.api().Do(ctx, "GET", c.path("/changes"), nil, nil, &list); err != nil {
		return err
	}
	if len(list) > maxChanges {
		return fmt.Errorf("the container has changed %d paths, the limit is %d", len(list), maxChanges)
	}
	changed := map[string]bool{}
	out := tar.NewWriter(w)
	for _, x := range list {
		name := strings.TrimPrefix(path.Clean("/"+x.Path), "/")
		if x.Kind != container.ChangeDelete {
			changed[name] = true
			continue
		}
		dir, base := path.Split(name)
		if err := out.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: dir + whiteout + base, Mode: 0o600}); err != nil {
			return err
		}
	}
	if len(changed) > 0 {
		resp, err := c.api().Stream(ctx, "GET", c.path("/export"), nil, nil, nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if err := copyEntries(out, tar.NewReader(resp.Body), changed); err != nil {
			return err
		}
	}
	return out.Close()
}

// whiteout is the beginning of the name of a file that hides another one of the layers below (OCI image specification).
const whiteout = ".wh."

// copyEntries copies the entries with these names. A hard link to a file that is not among them cannot be told in a layer.
func copyEntries(out *tar.Writer, in *tar.Reader, names map[string]bool) error {
	for {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if !names[strings.Trim(path.Clean("/"+h.Name), "/")] {
			continue
		}
		if h.Typeflag == tar.TypeLink && !names[strings.Trim(path.Clean("/"+h.Linkname), "/")] {
			return fmt.Errorf("%s is a hard link to %s, which the container has not changed: such a container cannot be committed", h.Name, h.Linkname)
		}
		if err := out.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(out, in); err != nil {
			return err
		}
	}
}
