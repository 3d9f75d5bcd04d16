package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/dockerapi/client"
	"github.com/kcradle/kcradle/dockerapi/shape"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
)

// recordFile is what the daemon knows of a container beside its bundle.
const recordFile = "docker.json"

// recordVersion is the version of that file.
//
// History:
//   - 1: first version; every container is on bridge or on none.
//   - 2: the container's networks.
const recordVersion = 2

// record is that file.
type record struct {
	Version     int                  `json:"version"`
	Name        string               `json:"name"`
	Config      container.Config     `json:"config"` // with the image's own merged in, as inspect shows it
	HostConfig  container.HostConfig `json:"host_config"`
	Network     string               `json:"network"` // mode of the machine's wire: "none" or "shared"
	Endpoints   []endpoint           `json:"endpoints,omitempty"`
	Stopped     bool                 `json:"stopped,omitempty"`      // by somebody's will: no policy starts it again
	Anonymous   []string             `json:"anonymous,omitempty"`    // volumes that go with rm -v
	StartError  string               `json:"start_error,omitempty"`  // why the last start failed
	StartedCode int                  `json:"started_code,omitempty"` // the exit code that goes with it
	Last        *spec.State          `json:"last,omitempty"`         // how the container was when it last ended
}

func (r *record) parse(raw []byte) error {
	if err := json.Unmarshal(raw, r); err != nil {
		return err
	}
	if r.Version < 1 || r.Version > recordVersion {
		return fmt.Errorf("version %d: %w", r.Version, spec.ErrNewer)
	}
	return nil
}

// Container is one container: a bundle, and while it runs a supervisor.
type Container struct {
	d  *Daemon
	id string
	b  *bundle.Bundle

	// life is held by one act at a time that begins or ends a machine, or removes the container.
	life sync.Mutex

	mu       sync.Mutex
	rec      record
	state    spec.State
	ports    []spec.Port                // as bound; of a running machine
	attached map[string]network.Segment // the networks its machine is on, by ID; replaced, never changed
	machine  *machine                   // nil: none
	way      string                     // how it came up
	pids     [2]int                     // of its supervisor and its machine
	visitors int                        // calls that need the machine although the container does not run
	alive    bool                       // "start" was told and "die" was not
	exits    int                        // how many "die" were told
	exitCode int                        // of the last
	removing bool
	keeping  bool // it is to start again: its end is none that removes it
	removed  bool
	changed  chan struct{} // closed when something above has changed
}

// machine is one start of the container's supervisor.
type machine struct {
	ended  chan struct{} // closed when it is gone and the container's state is final
	ran    bool          // the container has run in it; its lock is the container's
	silent bool          // its supervisor says nothing more; its lock is the container's
}

func newContainer(d *Daemon, b *bundle.Bundle) *Container {
	c := &Container{d: d, id: b.Pod.Containers[0].ID, b: b, changed: make(chan struct{})}
	c.state = spec.State{Container: b.Pod.Containers[0].Name, Status: spec.StatusCreated}
	return c
}

// change calls f with the lock held and tells those who wait.
func (c *Container) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
	close(c.changed)
	c.changed = make(chan struct{})
}

// facts is a container at one moment.
type facts struct {
	rec      record
	state    spec.State
	ports    []spec.Port
	attached map[string]network.Segment
	machine  *machine
	ran      bool // the container has run in that machine
	way      string
	pids     [2]int
}

func (c *Container) look() facts {
	c.mu.Lock()
	defer c.mu.Unlock()
	return facts{c.rec, c.state, c.ports, c.attached, c.machine, c.machine != nil && c.machine.ran, c.way, c.pids}
}

func (c *Container) name() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.rec.Name
}

// running reports what docker calls running: paused and restarting containers are.
func (f facts) running() bool { return shape.Running(f.state) }

// until waits until cond is true of the container; it is called with the lock held.
func (c *Container) until(ctx context.Context, cond func() bool) error {
	for {
		c.mu.Lock()
		ok, changed := cond(), c.changed
		c.mu.Unlock()
		if ok {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// save writes the record. The lock need not be held.
func (c *Container) save() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.saveLocked()
}

func (c *Container) saveLocked() error {
	raw, err := json.MarshalIndent(&c.rec, "", "  ")
	if err != nil {
		return err
	}
	return c.b.SetFile(recordFile, append(raw, '\n'))
}

// api speaks to the container's vdocker.
func (c *Container) api() client.Client { return client.Client{Dial: c.b.DialVdocker} }

// How long a machine may take. A guest belongs to its user: one that never answers must hold up nobody else.
const (
	patience = time.Minute      // for an answer that nothing inside has to be waited for
	slack    = 30 * time.Second // to end, beyond the grace of its container: its supervisor kills it earlier
	told     = 5 * time.Second  // for the news of an act that it has answered already, and for what can be left out
)

// bounds are those; a test has less time.
type bounds struct{ patience, slack, told time.Duration }

// ask is one question to the container's vdocker, which has that long for its answer.
func (c *Container) ask(ctx context.Context, limit time.Duration, method, path string, query url.Values, body, into any) error {
	asking, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := c.api().Do(asking, method, path, query, body, into)
	if err != nil && asking.Err() != nil && ctx.Err() == nil {
		return c.silent(limit)
	}
	return err
}

func (c *Container) silent(limit time.Duration) error {
	return dockerapi.Errorf(http.StatusInternalServerError, "the machine of container %s has not answered for %v: docker rm -f ends it", c.id, limit)
}

// grace is how long the container may take to stop; negative: for ever. timeout is in seconds; nil: its own.
func (c *Container) grace(timeout *int) time.Duration {
	if timeout == nil {
		timeout = c.b.Pod.Containers[0].StopTimeout
	}
	if timeout == nil {
		return 10 * time.Second
	}
	return time.Duration(*timeout) * time.Second
}

// path is the container's path there, with more behind it.
func (c *Container) path(more string) string { return "/containers/" + c.id + more }

// boot starts the container's machine, its container held back, and follows it. life must be held.
func (c *Container) boot(ctx context.Context) (*machine, error) {
	c.mu.Lock()
	m, rec := c.machine, c.rec
	c.mu.Unlock()
	if m != nil {
		return m, nil
	}
	if err := c.attach(); err != nil {
		return nil, err
	}
	if err := c.d.cfg.Launch(ctx, c.b.Dir, LaunchOptions{Network: rec.Network}); err != nil {
		c.change(func() { c.attached = nil })
		return nil, fmt.Errorf("start the machine of container %s: %w", rec.Name, err)
	}
	m, err := c.follow(ctx)
	if err != nil { // nobody would know of it
		now := 0
		if herr := c.b.Stop(ctx, &now); herr != nil {
			err = errors.Join(err, herr)
		}
	}
	return m, err
}

// takeUp finds out how the container is after a start of the daemon.
func (c *Container) takeUp(ctx context.Context) error {
	if _, running := c.b.Running(); running {
		if err := c.reattach(); err != nil {
			return err
		}
		m, err := c.watch(ctx, func(ctx context.Context, m *machine) {
			since := time.Now()
			for ctx.Err() == nil {
				s, err := c.listen(ctx, since)
				if err == nil {
					c.followEvents(m, s)
					return
				}
				c.d.log.Warn("the machine of a container that runs does not answer", "container", c.id, "error", err)
				select {
				case <-time.After(firstAgain):
				case <-ctx.Done():
				}
			}
		})
		if err == nil { // whoever wanted a machine whose container does not run has gone with the last daemon
			c.d.workers.Go(func() {
				if c.look().ran {
					c.settle()
				} else {
					c.abandon(m)
				}
			})
		}
		return err
	}
	if err := c.readEnd(); err != nil {
		return err
	}
	f := c.look()
	switch policy := f.rec.HostConfig.RestartPolicy.Name; {
	case f.state.Started.IsZero():
	case f.rec.HostConfig.AutoRemove: // it ended while nobody was there to do it
		c.d.workers.Go(c.autoRemove)
	case policy == container.RestartPolicyAlways, c.again(f):
		c.d.workers.Go(func() { c.startAgain(0) })
	}
	return nil
}

// again reports whether the container's restart policy wants it back. While its machine lives, the policy is the machine's.
func (c *Container) again(f facts) bool {
	if f.rec.Stopped || c.d.ctx.Err() != nil {
		return false
	}
	switch p := f.rec.HostConfig.RestartPolicy; p.Name {
	case container.RestartPolicyAlways, container.RestartPolicyUnlessStopped:
		return true
	case container.RestartPolicyOnFailure: // the machine has tried as often as it may, unless it died
		s, ok, err := c.b.State()
		return err == nil && ok && s.End != nil && s.End.Reason != bundle.EndDone && s.End.Reason != bundle.EndStopped && f.state.ExitCode != 0
	}
	return false
}

// Waits between restarts after a machine's death.
const (
	firstAgain = 100 * time.Millisecond
	lastAgain  = time.Minute
)

// startAgain starts the container after a while, and after ever longer ones until that works.
func (c *Container) startAgain(wait time.Duration) {
	for ; ; wait = min(max(2*wait, firstAgain), lastAgain) {
		select {
		case <-time.After(wait):
		case <-c.d.ctx.Done():
			return
		}
		c.mu.Lock()
		gone := c.removed || c.rec.Stopped
		c.mu.Unlock()
		if gone {
			return
		}
		err := c.start(c.d.ctx)
		if err == nil || errors.Is(err, dockerapi.ErrNotModified) {
			return
		}
		c.d.log.Warn("a container cannot be started again", "container", c.id, "error", err)
	}
}

// autoRemove removes a container that was to go when it ended.
func (c *Container) autoRemove() {
	c.life.Lock()
	defer c.life.Unlock()
	if err := c.delete(context.WithoutCancel(c.d.ctx), true); err != nil && !errors.Is(err, errRemoved) {
		c.d.log.Error("a container that was to remove itself is still there", "container", c.id, "error", err)
	}
}

// readEnd takes the state from what the last supervisor has left.
func (c *Container) readEnd() error {
	s, ok, err := c.b.State()
	if err != nil {
		return err
	}
	c.change(func() {
		if ok && len(s.Containers) > 0 {
			c.stateLocked(s.Containers[0])
		}
		if c.state.Started.IsZero() && c.rec.Last != nil { // the last machine was not for the container
			c.state = *c.rec.Last
		}
		c.state.Pid = 0
		c.ports = nil
		if c.rec.StartError != "" {
			c.state.Error, c.state.ExitCode = c.rec.StartError, c.rec.StartedCode
		}
	})
	return nil
}

// follow watches a machine until its end. It returns when the first state and the stream of events are there.
func (c *Container) follow(ctx context.Context) (*machine, error) {
	s, err := c.listen(ctx, time.Now())
	if err != nil {
		return nil, err
	}
	return c.watch(ctx, func(_ context.Context, m *machine) { c.followEvents(m, s) })
}

// stream is vdocker's stream of events.
type stream struct {
	body   io.ReadCloser
	cancel context.CancelFunc
}

func (s stream) close() { s.cancel(); s.body.Close() }

// listen begins to hear what vdocker says of its container.
func (c *Container) listen(ctx context.Context, since time.Time) (stream, error) {
	connecting := ctx
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer context.AfterFunc(connecting, cancel)()
	late := time.AfterFunc(c.d.bounds.patience, cancel)
	resp, err := c.api().Stream(ctx, "GET", "/events", url.Values{"since": {strconv.FormatInt(since.Unix(), 10)}}, nil, nil)
	if !late.Stop() {
		if err == nil {
			resp.Body.Close()
		}
		err = c.silent(c.d.bounds.patience)
	}
	if err != nil {
		cancel()
		return stream{}, fmt.Errorf("follow the events of container %s: %w", c.id, err)
	}
	return stream{resp.Body, cancel}, nil
}

// watch watches a machine until its end, and returns when its first state is there. hear passes on what vdocker says; its context
// ends with the supervisor.
func (c *Container) watch(ctx context.Context, hear func(context.Context, *machine)) (*machine, error) {
	m := &machine{ended: make(chan struct{})}
	c.change(func() { c.machine = m })
	first := make(chan struct{})
	hearing, gone := context.WithCancel(c.d.ctx)
	var told sync.WaitGroup
	told.Go(func() { hear(hearing, m) })
	c.d.workers.Go(func() {
		once := sync.OnceFunc(func() { close(first) })
		err := c.b.Watch(c.d.ctx, func(s bundle.State) {
			c.observe(s)
			once()
		})
		once()
		c.change(func() { m.silent = true })
		gone()
		told.Wait()
		if c.d.ctx.Err() != nil { // the daemon ends, the machine does not
			return
		}
		if err != nil {
			c.d.log.Warn("the supervisor is not heard any more", "container", c.id, "error", err)
		}
		c.end(m)
	})
	late := time.NewTimer(c.d.bounds.patience)
	defer late.Stop()
	select {
	case <-first:
		return m, nil
	case <-late.C:
		return m, fmt.Errorf("the supervisor of container %s has not answered for %v", c.id, c.d.bounds.patience)
	case <-ctx.Done():
		return m, context.Cause(ctx)
	}
}

// observe takes a state that the supervisor tells.
func (c *Container) observe(s bundle.State) {
	if len(s.Containers) == 0 {
		return
	}
	c.change(func() {
		c.ports, c.way, c.pids = s.Ports, s.Path, [2]int{s.Pid, s.MachinePid}
		c.stateLocked(s.Containers[0])
	})
}

// stateLocked takes what is said of the container in its machine. One that has not run there is as it was before.
func (c *Container) stateLocked(s spec.State) {
	if s.Started.IsZero() && !c.state.Started.IsZero() {
		return
	}
	c.state = s
	if c.machine != nil && !s.Started.IsZero() {
		c.machine.ran = true
	}
}

// maxEvent bounds one event from inside.
const maxEvent = 1 << 20

// followEvents passes on what vdocker says of its container.
func (c *Container) followEvents(from *machine, s stream) {
	stop := context.AfterFunc(c.d.ctx, s.close)
	defer stop()
	defer s.close()
	limit := &io.LimitedReader{R: s.body}
	dec := json.NewDecoder(limit)
	for {
		limit.N = maxEvent
		var m events.Message
		if err := dec.Decode(&m); err != nil {
			return // with its machine, or with the daemon
		}
		switch m.Type {
		case events.ContainerEventType:
			c.heard(from, m)
		}
	}
}

// heard is one event from inside.
func (c *Container) heard(from *machine, m events.Message) {
	own := map[string]string{}
	for k, v := range m.Actor.Attributes {
		if _, label := c.b.Pod.Containers[0].Labels[k]; !label && k != "image" && k != "name" {
			own[k] = v
		}
	}
	switch m.Action {
	case events.ActionCreate, events.ActionDestroy, events.ActionRename, events.ActionPause, events.ActionUnPause, events.ActionStop: // are told here
		return
	case events.ActionStart:
		c.tellNetworks(events.ActionConnect)
		c.emitAt(time.Unix(0, m.TimeNano), events.ContainerEventType, m.Action, own)
		c.change(func() { c.alive = true })
		return
	case events.ActionDie:
		code, err := strconv.Atoi(own["exitCode"])
		if err != nil {
			code = 255
		}
		if !c.seenEnd(from, time.Unix(0, m.TimeNano)) {
			return // end tells it
		}
		c.died(code, own)
		c.d.workers.Go(c.settle)
		return
	}
	c.emitAt(time.Unix(0, m.TimeNano), events.ContainerEventType, m.Action, own)
}

// seenEnd waits until the container's state shows an end that was heard of: who is told of it looks there. It reports false when the
// supervisor has gone without showing it.
func (c *Container) seenEnd(from *machine, at time.Time) bool {
	ctx, cancel := context.WithTimeout(c.d.ctx, c.d.bounds.told)
	defer cancel()
	silent := false
	_ = c.until(ctx, func() bool {
		over := !shape.Running(c.state) || c.state.Status == spec.StatusRestarting || c.state.Started.After(at)
		silent = from.silent && !over
		return over || silent
	})
	return !silent
}

// died tells the end of the container's process, once.
func (c *Container) died(code int, attributes map[string]string) {
	was := false
	c.change(func() {
		was = c.alive
		c.alive = false
		c.exits++
		c.exitCode = code
	})
	if !was {
		return
	}
	if attributes == nil {
		attributes = map[string]string{}
	}
	attributes["exitCode"] = strconv.Itoa(code)
	c.emit(events.ContainerEventType, events.ActionDie, attributes)
}

// settle ends the machine of a container that has ended for good. A pod ends by itself when its container does; one whose
// container was stopped by the API does not, since the API might start it again.
func (c *Container) settle() {
	m := c.look().machine
	if m == nil {
		return
	}
	ctx, cancel := context.WithTimeout(c.d.ctx, c.d.bounds.told)
	defer cancel()
	over := func(f facts) bool { return !f.running() && !f.state.Finished.Before(f.state.Started) }
	if c.until(ctx, func() bool { return c.machine != m || over(facts{state: c.state}) }) != nil {
		return
	}
	c.life.Lock()
	defer c.life.Unlock()
	if f := c.look(); f.machine != m || !over(f) {
		return
	}
	if err := c.halt(c.d.ctx, nil); err != nil && c.d.ctx.Err() == nil {
		c.d.log.Warn("the machine of a container that has ended goes on", "container", c.id, "error", err)
	}
}

// end is called when the supervisor has gone.
func (c *Container) end(m *machine) {
	if err := c.readEnd(); err != nil {
		c.d.log.Error("how a container ended cannot be read", "container", c.id, "error", err)
	}
	f := c.look()
	c.mu.Lock()
	alive := c.alive
	c.mu.Unlock()
	if alive { // the machine died under it
		c.died(f.state.ExitCode, nil)
	}
	if f.ran {
		c.tellNetworks(events.ActionDisconnect)
	}
	kept := false
	c.change(func() {
		c.machine, c.attached, kept = nil, nil, c.keeping
		if f.ran {
			last := c.state
			c.rec.Last = &last
			if err := c.saveLocked(); err != nil {
				c.d.log.Error("how a container ended is not kept", "container", c.id, "error", err)
			}
		}
	})
	close(m.ended)
	switch {
	case !f.ran:
	case kept:
	case f.rec.HostConfig.AutoRemove:
		c.d.workers.Go(c.autoRemove)
	case c.again(c.look()):
		wait := firstAgain
		if f.state.Finished.Sub(f.state.Started) > 10*time.Second {
			wait = 0
		}
		c.d.workers.Go(func() { c.startAgain(wait) })
	}
}

// halt ends the machine and waits until it is gone. timeout is the grace of the container, in seconds; nil: its own. A supervisor
// that does not do it in time is killed, and its machine with it.
func (c *Container) halt(ctx context.Context, timeout *int) error {
	c.mu.Lock()
	m := c.machine
	c.mu.Unlock()
	if m == nil {
		return nil
	}
	patient, cancel := ctx, context.CancelFunc(func() {})
	if grace := c.grace(timeout); grace >= 0 {
		patient, cancel = context.WithTimeout(ctx, grace+c.d.bounds.slack)
	}
	defer cancel()
	err := c.b.Stop(patient, timeout)
	if err != nil && patient.Err() != nil && ctx.Err() == nil {
		c.d.log.Error("a supervisor does not answer and is killed", "container", c.id, "error", err)
		err = c.b.Kill()
	}
	if err != nil {
		return err
	}
	return c.gone(ctx, m)
}

// gone waits for the end of a machine.
func (c *Container) gone(ctx context.Context, m *machine) error {
	select {
	case <-m.ended:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// emit tells the daemon's clients that something happened to the container.
func (c *Container) emit(kind events.Type, action events.Action, attributes map[string]string) {
	c.emitAt(time.Now(), kind, action, attributes)
}

func (c *Container) emitAt(t time.Time, kind events.Type, action events.Action, attributes map[string]string) {
	f := c.look()
	actor := events.Actor{ID: c.id, Attributes: map[string]string{}}
	for k, v := range f.rec.Config.Labels {
		actor.Attributes[k] = v
	}
	actor.Attributes["image"], actor.Attributes["name"] = f.rec.Config.Image, f.rec.Name
	for k, v := range attributes {
		actor.Attributes[k] = v
	}
	c.d.events.publish(events.Message{Type: kind, Action: action, Actor: actor, Scope: "local", Time: t.Unix(), TimeNano: t.UnixNano()})
}

// noContent is the answer of an act that went well.
func noContent(w http.ResponseWriter) error {
	w.WriteHeader(http.StatusNoContent)
	return nil
}

var errRemoved = dockerapi.NotFound("the container was removed")
