package daemon

import (
	"context"
	"errors"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/spec"
)

// start boots the machine if it is not there yet and starts the container in it.
func (d *Daemon) start(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	if err := c.start(context.WithoutCancel(r.Context())); err != nil {
		return err
	}
	return noContent(w)
}

func (c *Container) start(ctx context.Context) (err error) {
	c.life.Lock()
	defer c.life.Unlock()
	defer c.d.metrics.action("start", time.Now(), &err)
	begun := time.Now()
	f := c.look()
	switch {
	case f.state.Status == spec.StatusPaused:
		return dockerapi.Conflict("cannot start a paused container, try unpause instead")
	case f.running():
		return dockerapi.ErrNotModified
	}
	if f.ran { // a start that is over
		if err := c.halt(ctx, nil); err != nil {
			return err
		}
	}
	booted := f.machine == nil
	err = c.free(ctx)
	c.mu.Lock()
	exits := c.exits
	c.mu.Unlock()
	var m *machine
	if err == nil {
		m, err = c.boot(ctx)
	}
	c.d.forgetExecs(c)
	if size := f.rec.HostConfig.ConsoleSize; err == nil && f.rec.Config.Tty && size != [2]uint{} {
		err = c.ask(ctx, c.d.bounds.patience, "POST", c.path("/resize"), url.Values{"h": {strconv.Itoa(int(size[0]))}, "w": {strconv.Itoa(int(size[1]))}}, nil, nil)
	}
	if err == nil {
		err = c.ask(ctx, c.d.bounds.patience, "POST", c.path("/start"), nil, nil, nil)
	}
	if err != nil {
		return c.startFailed(ctx, err)
	}
	// The answer has overtaken the news.
	news, cancel := context.WithTimeout(ctx, c.d.bounds.told)
	defer cancel()
	before := f.state.Started
	_ = c.until(news, func() bool {
		return c.state.Started.After(before) && (c.alive || c.exits > exits) || c.machine != m
	})
	if way := c.look().way; booted && way != "" { // not one that attach has started before
		c.d.metrics.starts.WithLabelValues(way).Observe(time.Since(begun).Seconds())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rec.Stopped, c.rec.StartError, c.rec.StartedCode = false, "", 0
	return c.saveLocked()
}

// free refuses a container whose volumes another machine has: a disk belongs to one.
func (c *Container) free(ctx context.Context) error {
	soon, cancel := context.WithTimeout(ctx, c.d.bounds.told)
	defer cancel()
	for _, v := range c.b.Pod.Volumes {
		for _, o := range c.d.all() {
			if o == c || !slices.ContainsFunc(o.b.Pod.Volumes, func(x spec.Volume) bool { return x.Name == v.Name }) {
				continue
			}
			f := o.look()
			if f.machine != nil && f.ran && !f.running() { // its container has ended: a moment later it is gone
				_ = o.gone(soon, f.machine)
				f = o.look()
			}
			if f.machine != nil {
				return dockerapi.Conflict("volume %s is in use by container %s: a volume is a disk, and a disk belongs to one machine at a time", v.Name, f.rec.Name)
			}
		}
	}
	return nil
}

// startFailed ends the machine of a container that could not be started and keeps the reason.
func (c *Container) startFailed(ctx context.Context, cause error) error {
	code := 128
	if dockerapi.Status(cause) == http.StatusBadRequest {
		code = 127
		var s struct{ State struct{ ExitCode int } }
		if c.ask(ctx, c.d.bounds.patience, "GET", c.path("/json"), nil, nil, &s) == nil && s.State.ExitCode != 0 {
			code = s.State.ExitCode
		}
	}
	c.mu.Lock()
	c.rec.StartError, c.rec.StartedCode = cause.Error(), code
	err := c.saveLocked()
	c.mu.Unlock()
	if herr := c.halt(ctx, nil); herr != nil {
		err = errors.Join(err, herr)
	}
	if err != nil {
		c.d.log.Warn("after a start that failed", "container", c.id, "error", err)
	}
	c.change(func() { c.exits++; c.exitCode = code })
	if c.look().rec.HostConfig.AutoRemove {
		if err := c.delete(ctx, true); err != nil {
			c.d.log.Warn("a container that was to remove itself is still there", "container", c.id, "error", err)
		}
	}
	return cause
}

// stopQuery are the parameters of stop and restart.
func stopQuery(r *dockerapi.Request) (url.Values, *int, error) {
	q := url.Values{}
	if s := r.Query("signal"); s != "" && r.Version >= 42 {
		q.Set("signal", s)
	}
	t := r.Query("t")
	if t == "" {
		return q, nil, nil
	}
	n, err := strconv.Atoi(t)
	if err != nil {
		return nil, nil, dockerapi.BadRequest("strconv.Atoi: parsing %q: invalid syntax", t)
	}
	q.Set("t", t)
	return q, &n, nil
}

func (d *Daemon) stop(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	q, timeout, err := stopQuery(r)
	if err != nil {
		return err
	}
	if err := c.stop(context.WithoutCancel(r.Context()), q, timeout); err != nil {
		return err
	}
	return noContent(w)
}

// stop stops the container; its machine ends with it.
func (c *Container) stop(ctx context.Context, q url.Values, timeout *int) error {
	f := c.look()
	if !f.running() {
		return dockerapi.ErrNotModified
	}
	if err := c.willed(); err != nil {
		return err
	}
	var err error
	if grace := c.grace(timeout); grace < 0 { // it may take as long as it likes
		err = c.api().Do(ctx, "POST", c.path("/stop"), q, nil, nil)
	} else {
		err = c.ask(ctx, grace+c.d.bounds.patience, "POST", c.path("/stop"), q, nil, nil)
	}
	if err != nil && dockerapi.Status(err) == http.StatusInternalServerError { // it may have gone meanwhile, or be deaf
		now := 0
		err = c.halt(ctx, &now)
	}
	if err != nil {
		return err
	}
	if f.machine != nil {
		if err := c.gone(ctx, f.machine); err != nil {
			return err
		}
	}
	c.emit(events.ContainerEventType, events.ActionStop, nil)
	return nil
}

// willed notes that the container is to end because somebody wants so.
func (c *Container) willed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.rec.Stopped = true
	return c.saveLocked()
}

func (d *Daemon) restart(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	q, timeout, err := stopQuery(r)
	if err != nil {
		return err
	}
	ctx := context.WithoutCancel(r.Context())
	c.change(func() { c.keeping = true })
	defer c.change(func() { c.keeping = false })
	if c.look().running() {
		if err := c.stop(ctx, q, timeout); err != nil && !errors.Is(err, dockerapi.ErrNotModified) {
			return err
		}
	}
	if err := c.start(ctx); err != nil && !errors.Is(err, dockerapi.ErrNotModified) {
		return err
	}
	c.emit(events.ContainerEventType, events.ActionRestart, nil)
	return noContent(w)
}

// kill sends a signal. SIGKILL returns when the container has ended.
func (d *Daemon) kill(w http.ResponseWriter, r *dockerapi.Request) error {
	c, err := d.find(r.Var("id"))
	if err == nil {
		err = c.kill(context.WithoutCancel(r.Context()), r.Query("signal"))
	}
	if err != nil {
		return dockerapi.Errorf(dockerapi.Status(err), "cannot kill container: %s: %w", r.Var("id"), err)
	}
	return noContent(w)
}

func (c *Container) kill(ctx context.Context, signal string) error {
	f := c.look()
	if !f.running() {
		return notRunning(c, f)
	}
	q := url.Values{}
	if signal != "" {
		q.Set("signal", signal)
	}
	last := false
	switch signal {
	case "", "9", "KILL", "SIGKILL":
		last = true
	}
	err := c.ask(ctx, c.d.bounds.slack, "POST", c.path("/kill"), q, nil, nil)
	if err != nil && last && dockerapi.Status(err) == http.StatusInternalServerError { // it is deaf
		now := 0
		if err := c.willed(); err != nil {
			return err
		}
		return c.halt(ctx, &now)
	}
	if err != nil {
		// Without the words that go around it here, too.
		return dockerapi.Errorf(dockerapi.Status(err), "%s", strings.TrimPrefix(err.Error(), "cannot kill container: "+c.id+": "))
	}
	if last {
		if err := c.willed(); err != nil {
			return err
		}
		news, cancel := context.WithTimeout(ctx, 2*c.d.bounds.told)
		defer cancel()
		_ = c.until(news, func() bool { return c.machine != f.machine || c.state.Finished.After(f.state.Started) })
	}
	return nil
}

// pause and unpause answer when the container's state says so.
func (d *Daemon) pause(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	return c.freeze(w, r, "/pause", spec.StatusPaused)
}

func (d *Daemon) unpause(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	return c.freeze(w, r, "/unpause", spec.StatusRunning)
}

func (c *Container) freeze(w http.ResponseWriter, r *dockerapi.Request, act, status string) error {
	f := c.look()
	if !f.running() {
		if act == "/pause" {
			return notRunning(c, f)
		}
		return dockerapi.Errorf(http.StatusInternalServerError, "Container %s is not paused", c.id)
	}
	if err := c.ask(context.WithoutCancel(r.Context()), c.d.bounds.patience, "POST", c.path(act), nil, nil, nil); err != nil {
		return err
	}
	news, cancel := context.WithTimeout(r.Context(), c.d.bounds.told)
	defer cancel()
	_ = c.until(news, func() bool { return c.state.Status == status || c.machine != f.machine })
	c.emit(events.ContainerEventType, events.Action(act[1:]), nil)
	return noContent(w)
}

func (d *Daemon) rename(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	name := trimSlash(r.Query("name"))
	if name == "" {
		return dockerapi.BadRequest("Neither old nor new names may be empty")
	}
	old := c.name()
	if name == old {
		return dockerapi.BadRequest("Renaming a container with the same name as its current name")
	}
	if !validName(name) {
		return dockerapi.BadRequest("Error when allocating new name: %w", invalidName("/"+name))
	}
	if err := d.reserve(name, c.id); err != nil {
		return dockerapi.Errorf(dockerapi.Status(err), "Error when allocating new name: %w", err)
	}
	c.mu.Lock()
	c.rec.Name = name
	err := c.saveLocked()
	if err != nil {
		c.rec.Name = old
	}
	c.mu.Unlock()
	if err != nil {
		d.release(name)
		return err
	}
	d.release(old)
	if err := c.renamed(context.WithoutCancel(r.Context())); err != nil {
		d.log.Warn("the new name of a container does not resolve on its networks", "container", c.id, "error", err)
	}
	c.emit(events.ContainerEventType, events.ActionRename, map[string]string{"oldName": "/" + old})
	return noContent(w)
}

// wait answers when the container has ended, or is gone.
func (d *Daemon) wait(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	c.mu.Lock()
	exits, code := c.exits, c.state.ExitCode
	c.mu.Unlock()
	var over func() bool // with the lock held
	switch cond := r.Query("condition"); cond {
	case "", string(container.WaitConditionNotRunning):
		over = func() bool {
			f := facts{state: c.state}
			return !f.running() && (c.machine == nil || c.exits > exits) || c.removed
		}
	case string(container.WaitConditionNextExit):
		over = func() bool { return c.exits > exits || c.removed }
	case string(container.WaitConditionRemoved):
		over = func() bool { return c.removed }
	default:
		return dockerapi.BadRequest("invalid condition: %q", cond)
	}
	// The client starts the container only after it knows that the wait is registered.
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	if err := http.NewResponseController(w).Flush(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	stop := context.AfterFunc(d.ctx, cancel)
	defer stop()
	if err := c.until(ctx, over); err != nil {
		return err
	}
	c.mu.Lock()
	answer := container.WaitResponse{StatusCode: int64(code)}
	if c.exits > exits {
		answer.StatusCode = int64(c.exitCode)
	} else if c.machine == nil {
		answer.StatusCode = int64(c.state.ExitCode)
	}
	if c.rec.StartError != "" {
		answer.Error = &container.WaitExitError{Message: c.rec.StartError}
	}
	c.mu.Unlock()
	return dockerapi.WriteJSON(bodyOnly{w}, 0, answer)
}

// bodyOnly writes the body of an answer whose header is sent.
type bodyOnly struct{ http.ResponseWriter }

func (bodyOnly) WriteHeader(int) {}

func (d *Daemon) remove(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	if r.Bool("link") {
		return dockerapi.BadRequest("link=1 is refused: there are no links")
	}
	busy := false
	c.change(func() {
		busy = c.removing
		c.removing = true
	})
	if busy {
		return dockerapi.Conflict("removal of container %s is already in progress", c.name())
	}
	defer c.change(func() { c.removing = false })
	c.life.Lock()
	defer c.life.Unlock()
	ctx := context.WithoutCancel(r.Context())
	f := c.look()
	if f.running() {
		if !r.Bool("force") {
			word := "stop the container before removing or force remove"
			if f.state.Status == spec.StatusPaused {
				return dockerapi.Conflict("cannot remove container %q: container is paused and must be unpaused first", "/"+f.rec.Name)
			}
			return dockerapi.Conflict("cannot remove container %q: container is %s: %s", "/"+f.rec.Name, f.state.Status, word)
		}
		if err := c.kill(ctx, "KILL"); err != nil {
			c.d.log.Debug("a container that is removed", "container", c.id, "error", err)
		}
	}
	if err := c.delete(ctx, r.Bool("v")); err != nil {
		return err
	}
	return noContent(w)
}

// delete removes the container with all it has; volumes says whether its anonymous volumes go, too. life must be held.
func (c *Container) delete(ctx context.Context, volumes bool) (err error) {
	defer c.d.metrics.action("delete", time.Now(), &err)
	c.mu.Lock()
	removed := c.removed
	c.mu.Unlock()
	if removed {
		return errRemoved
	}
	now := 0
	if err := c.halt(ctx, &now); err != nil {
		return err
	}
	if err := c.b.Remove(); err != nil {
		return err
	}
	if err := c.d.cfg.Store.Release(ctx, c.b.Dir); err != nil {
		c.d.log.Warn("the store still keeps the layers of a removed container", "container", c.id, "error", err)
	}
	f := c.look()
	c.d.mu.Lock()
	delete(c.d.containers, c.id)
	maps.DeleteFunc(c.d.execs, func(_ string, of *Container) bool { return of == c })
	delete(c.d.names, f.rec.Name)
	c.d.mu.Unlock()
	if volumes {
		for _, name := range f.rec.Anonymous {
			if err := c.d.removeVolume(name); err != nil {
				c.d.log.Warn("an anonymous volume is still there", "volume", name, "error", err)
			}
		}
	}
	c.emit(events.ContainerEventType, events.ActionDestroy, nil)
	c.change(func() { c.removed = true })
	return nil
}

// prune removes the containers that do not run.
func (d *Daemon) prune(w http.ResponseWriter, r *dockerapi.Request) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "label", "label!", "until")
	if err != nil {
		return err
	}
	until := time.Time{}
	if v := f["until"]; len(v) > 0 {
		if until, err = dockerapi.ParseTime(v[0], time.Now()); err != nil {
			return err
		}
	}
	report := container.PruneReport{ContainersDeleted: []string{}}
	ctx := context.WithoutCancel(r.Context())
	for _, c := range d.all() {
		err := func() error {
			c.life.Lock()
			defer c.life.Unlock()
			x := c.look()
			labels := x.rec.Config.Labels
			excluded := false
			for _, l := range f["label!"] {
				excluded = excluded || dockerapi.Filters{"label": {l}}.Labels("label", labels)
			}
			if x.running() || x.machine != nil || excluded || !f.Labels("label", labels) ||
				!until.IsZero() && c.b.Pod.Containers[0].Created.After(until) {
				return nil
			}
			n := c.diskUse()
			if err := c.delete(ctx, false); err != nil {
				return err
			}
			report.ContainersDeleted = append(report.ContainersDeleted, c.id)
			report.SpaceReclaimed += uint64(n)
			return nil
		}()
		if err != nil && !errors.Is(err, errRemoved) {
			return err
		}
	}
	d.events.publish(daemonEvent(events.ContainerEventType, events.ActionPrune, "", map[string]string{"reclaimed": strconv.FormatUint(report.SpaceReclaimed, 10)}))
	return dockerapi.WriteJSON(w, http.StatusOK, report)
}
