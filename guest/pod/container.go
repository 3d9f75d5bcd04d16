package pod

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/guest/container"
	"github.com/kcradle/kcradle/guest/rootfs"
	"github.com/kcradle/kcradle/spec"
)

// Container is one container of a pod.
//
//	created ──start──► running ──ends──► exited ──start──► running
//	                   │   ▲  └──ends, policy says so──► restarting ──► running
//	                   ▼   │                                 └──stop──► exited
//	                   paused
type Container struct {
	pod   *Pod
	index int
	doc   *spec.Container // never changed
	files []file
	log   *outputLog
	pump  *pump
	op    chan struct{} // held by whoever starts or stops; capacity 1

	prepared struct {
		mu   sync.Mutex
		done bool
		view int // number of views given out so far
	}

	mu       sync.Mutex
	name     string
	limits   spec.Resources // as updated
	policy   spec.Restart   // as updated
	state    spec.State
	changed  chan struct{} // closed at each change of state, then replaced
	run      *run          // the current or last run; nil before the first
	next     chan struct{} // closed when the next run has begun, then replaced
	exits    uint64        // how often a run has ended for good or to be restarted
	timer    *time.Timer   // of a pending restart
	backoff  time.Duration
	finished bool // ended by itself, and nothing will restart it
	ever     bool // has been started since the machine is up
	size     [2]uint16
	health   *Health
	execs    []string
}

// run is one life of a container's first process.
type run struct {
	proc   *container.Running
	cgroup *container.Cgroup
	begin  int64 // log offset at which its output begins
	began  time.Time
	stdin  *input        // nil without
	ended  chan struct{} // closed when its end is in the state
	stop   context.CancelFunc
	ctx    context.Context // ends with the run

	end int64 // log offset behind its output; valid once ended is closed

	manual bool // guarded by Container.mu: the API stopped it
}

// Intervals of restarts, as docker has them.
const (
	backoffFirst = 100 * time.Millisecond
	backoffMax   = time.Minute
	backoffReset = 10 * time.Second
)

// drainGrace is how long output is waited for after the last process that we know of has ended.
const drainGrace = time.Second

func newContainer(p *Pod, index int, files []file) (*Container, error) {
	doc := &p.cfg.Pod.Containers[index]
	log, err := openLog(p.cfg.Scratch+"/"+spec.ScratchLogs+"/"+doc.ID, logLimit)
	if err != nil {
		return nil, err
	}
	c := &Container{
		pod: p, index: index, doc: doc, files: files, log: log,
		op:      make(chan struct{}, 1),
		name:    doc.Name,
		limits:  doc.Resources,
		policy:  doc.Restart,
		state:   spec.State{Container: doc.Name, Status: spec.StatusCreated},
		changed: make(chan struct{}),
		next:    make(chan struct{}),
	}
	c.pump = &pump{c: c, host: p.cfg.Host, cursor: log.position()}
	if hc := doc.Healthcheck; hasHealthcheck(hc) {
		c.health = &Health{Status: healthStarting}
		c.state.Health = healthStarting
	}
	return c, nil
}

// ID is the container's, 64 hex digits.
func (c *Container) ID() string { return c.doc.ID }

// Index is the container's place in the pod.
func (c *Container) Index() int { return c.index }

// Name is the container's, which Rename changes.
func (c *Container) Name() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.name
}

// Spec is what the owner asked for, with the current name, limits and restart policy.
func (c *Container) Spec() spec.Container {
	c.mu.Lock()
	defer c.mu.Unlock()
	doc := *c.doc
	doc.Name, doc.Resources, doc.Restart = c.name, c.limits, c.policy
	return doc
}

// State is what is known of the container now.
func (c *Container) State() spec.State {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state
}

func (c *Container) wrap(err error) error { return fmt.Errorf("container %s: %w", c.Name(), err) }

// publish changes the state, tells the host and wakes everyone who waits for a change.
func (c *Container) publish(change func(*spec.State)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.publishLocked(change)
}

func (c *Container) publishLocked(change func(*spec.State)) {
	if change != nil {
		change(&c.state)
	}
	close(c.changed)
	c.changed = make(chan struct{})
	c.pump.state(c.log.position(), c.state)
}

// lock takes the right to start or stop.
func (c *Container) lock(ctx context.Context) error {
	select {
	case c.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return c.wrap(ctx.Err())
	}
}

func (c *Container) unlock() { <-c.op }

// Start starts the container. It returns ErrAlready when it runs; a failure to start is a *container.StartError.
func (c *Container) Start(ctx context.Context) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	c.mu.Lock()
	status := c.state.Status
	if c.timer != nil {
		c.timer.Stop()
		c.timer = nil
	}
	c.backoff = 0
	c.mu.Unlock()
	switch status {
	case spec.StatusRunning:
		return c.wrap(ErrAlready)
	case spec.StatusPaused:
		return c.wrap(ErrPaused)
	}
	return c.start(0)
}

// start starts a run. The caller holds op.
func (c *Container) start(restarts int) error {
	if c.pod.isStopping() {
		return &container.StartError{Code: 125, Msg: "the pod is being stopped"}
	}
	if err := c.launch(restarts); err != nil {
		se := container.AsStartError(err)
		c.giveUp(se)
		return se
	}
	return nil
}

// giveUp records that the container could not start.
func (c *Container) giveUp(err error) {
	se := container.AsStartError(err)
	c.mu.Lock()
	c.exits++
	c.finished = true
	c.publishLocked(func(s *spec.State) {
		if s.Status != spec.StatusCreated {
			s.Status = spec.StatusExited
		}
		s.Pid, s.ExitCode, s.Signal, s.Error = 0, se.Code, 0, se.Msg
		s.Finished = time.Now().UTC()
		s.ManualStop = false
	})
	c.mu.Unlock()
	c.pod.evaluate()
}

// CgroupName is the name of the i-th container's cgroup.
func CgroupName(i int) string { return "c" + strconv.Itoa(i) }

func (c *Container) launch(restarts int) error {
	if err := c.prepare(); err != nil {
		return err
	}
	cfg, err := c.config()
	if err != nil {
		return err
	}
	c.mu.Lock()
	cfg.Process.Size = c.size
	size, limits := c.size, c.limits
	c.mu.Unlock()
	cgroup, err := container.NewCgroup(c.pod.cfg.Cgroup, CgroupName(c.index), &limits.LinuxResources)
	if err != nil {
		return err
	}
	// Alone in its machine, a container reaches no files but its own on the machine's disks, and the kernel's look at a
	// device program is a noticeable part of a start.
	if !c.doc.Privileged && len(c.pod.containers) > 1 {
		if err := cgroup.LimitDevices(c.doc.Devices); err != nil {
			return errors.Join(err, cgroup.Remove(context.Background()))
		}
	}
	proc, err := container.Start(c.pod.cfg.Reaper, cfg, cgroup)
	if err != nil {
		return errors.Join(err, cgroup.Remove(context.Background()))
	}
	r := &run{
		proc: proc, cgroup: cgroup, begin: c.log.position(), began: time.Now(),
		ended: make(chan struct{}),
	}
	r.ctx, r.stop = context.WithCancel(c.pod.ctx)
	if c.doc.OpenStdin {
		r.stdin = newInput(proc)
	}
	c.mu.Lock()
	c.run = r
	c.finished, c.ever = false, true
	if proc.Terminal != nil && c.size != size { // it came while the process started
		if err := resize(proc.Terminal, c.size); err != nil {
			c.pod.cfg.Log.Error("size of a terminal", "container", c.name, "error", err)
		}
	}
	c.publishLocked(func(s *spec.State) {
		*s = spec.State{
			Container: s.Container, Status: spec.StatusRunning, Pid: proc.Pid(), Started: r.began.UTC(),
			Restarts: restarts, Finished: s.Finished,
		}
		if c.health != nil {
			c.health = &Health{Status: healthStarting, Log: c.health.Log}
			s.Health = healthStarting
		}
	})
	close(c.next)
	c.next = make(chan struct{})
	c.mu.Unlock()

	var streams sync.WaitGroup
	if proc.Terminal != nil {
		streams.Go(func() { c.collect(1, proc.Terminal, r) })
	} else {
		streams.Go(func() { c.collect(1, proc.Stdout, r) })
		streams.Go(func() { c.collect(2, proc.Stderr, r) })
	}
	c.pod.spawn(func() { c.watch(r, &streams) })
	if hasHealthcheck(c.doc.Healthcheck) {
		c.pod.spawn(func() { c.watchHealth(r) })
	}
	c.pod.Emit(Event{Action: "start", Container: c.ID()})
	return nil
}

// collect reads one stream of the container into the log.
func (c *Container) collect(stream byte, f *os.File, r *run) {
	s := newStream(f, r.proc.Done(), drainGrace)
	defer s.stop()
	size := minRead
	buf := make([]byte, size)
	for {
		n, err := s.Read(buf)
		if n > 0 {
			c.log.append(stream, time.Now(), buf[:n])
		}
		if err != nil {
			return
		}
		if n == size && size < maxRecord {
			size *= 2
			buf = make([]byte, size)
		}
	}
}

// watch waits for the end of a run and decides what follows.
func (c *Container) watch(r *run, streams *sync.WaitGroup) {
	<-r.proc.Done()
	exit := r.proc.Exit()
	finished := time.Now()
	streams.Wait()
	r.stop()
	// Before the cgroup goes: its counters go with it.
	kills, err := r.cgroup.OOMKills()
	if err != nil {
		c.pod.cfg.Log.Error("read memory.events", "container", c.Name(), "error", err)
	}
	if err := r.cgroup.Remove(context.Background()); err != nil {
		c.pod.cfg.Log.Error("remove cgroup", "container", c.Name(), "error", err)
	}
	if r.stdin != nil {
		r.stdin.close()
	}
	r.proc.Close()
	r.end = c.log.position()

	code := exit.Code()
	if kills > 0 {
		c.pod.Emit(Event{Action: "oom", Container: c.ID()})
	}
	c.pod.Emit(Event{Time: finished, Action: "die", Container: c.ID(), Attributes: map[string]string{
		"exitCode":     strconv.Itoa(code),
		"execDuration": strconv.Itoa(int(finished.Sub(r.began).Seconds())),
	}})

	c.mu.Lock()
	restart := c.wantsRestartLocked(r, code)
	if finished.Sub(r.began) >= backoffReset {
		c.backoff = 0
	}
	wait := c.backoff
	if wait == 0 {
		wait = backoffFirst
	}
	if restart {
		c.backoff = min(2*wait, backoffMax)
	}
	c.finished = !restart && !r.manual
	c.exits++
	c.publishLocked(func(s *spec.State) {
		s.Status = spec.StatusExited
		if restart {
			s.Status = spec.StatusRestarting
		}
		s.Pid, s.ExitCode, s.Finished = 0, code, finished.UTC()
		s.OOMKilled = kills > 0
		s.ManualStop = r.manual
		if exit.Status.Signaled() {
			s.Signal = int(exit.Status.Signal())
		}
		if s.Health != "" && s.Health != healthUnhealthy {
			s.Health = healthUnhealthy // docker: a container that does not run is not healthy
			c.health.Status = healthUnhealthy
		}
	})
	if restart {
		restarts := c.state.Restarts + 1
		c.timer = time.AfterFunc(wait, func() { c.restart(r, restarts) })
	}
	close(r.ended)
	c.mu.Unlock()
	c.log.wake() // readers of this run see its end
	if !restart {
		c.pod.evaluate()
	}
}

func (c *Container) wantsRestartLocked(r *run, code int) bool {
	if r.manual || c.pod.isStopping() {
		return false
	}
	switch p := c.policy; p.Name {
	case "always", "unless-stopped":
		return true
	case "on-failure":
		return code != 0 && (p.MaxRetries == 0 || c.state.Restarts < p.MaxRetries)
	}
	return false
}

// restart is what the timer of a pending restart calls.
func (c *Container) restart(after *run, restarts int) {
	if c.lock(c.pod.ctx) != nil {
		return
	}
	defer c.unlock()
	c.mu.Lock()
	due := c.run == after && c.state.Status == spec.StatusRestarting && c.timer != nil
	c.timer = nil
	c.mu.Unlock()
	if !due {
		return
	}
	if err := c.start(restarts); err != nil {
		c.pod.cfg.Log.Error("container did not restart", "container", c.Name(), "error", err)
	}
}

// current returns the run in progress.
func (c *Container) current() (*run, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch c.state.Status {
	case spec.StatusRunning, spec.StatusPaused:
		return c.run, nil
	}
	return nil, fmt.Errorf("container %s: %w", c.name, ErrNotRunning)
}

// over says whether the container ended for good by itself, and how.
func (c *Container) over() (bool, int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.finished, c.state.ExitCode
}

// Stop stops the container: its signal, the grace, SIGKILL. It returns ErrAlready when it does not run.
func (c *Container) Stop(ctx context.Context, o StopOptions) error { return c.stop(ctx, o, true) }

func (c *Container) stop(ctx context.Context, o StopOptions, api bool) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	return c.stopHeld(ctx, o, api)
}

// stopHeld is Stop for who holds op.
func (c *Container) stopHeld(ctx context.Context, o StopOptions, api bool) error {
	name := o.Signal
	if name == "" {
		name = c.doc.StopSignal
	}
	sig := syscall.SIGTERM
	if name != "" {
		var err error
		if sig, err = ParseSignal(name); err != nil {
			return c.wrap(err)
		}
	}
	timeout := o.Timeout
	if timeout == nil {
		timeout = c.doc.StopTimeout
	}
	grace := 10 * time.Second
	if timeout != nil {
		grace = time.Duration(*timeout) * time.Second
	}

	c.mu.Lock()
	if c.state.Status == spec.StatusRestarting {
		if c.timer != nil {
			c.timer.Stop()
			c.timer = nil
		}
		c.finished = !api
		c.publishLocked(func(s *spec.State) { s.Status, s.ManualStop = spec.StatusExited, api })
		c.mu.Unlock()
		if api {
			c.pod.Emit(Event{Action: "stop", Container: c.ID()})
		}
		return nil
	}
	r := c.run
	if c.state.Status != spec.StatusRunning && c.state.Status != spec.StatusPaused {
		c.mu.Unlock()
		return c.wrap(ErrAlready)
	}
	paused := c.state.Status == spec.StatusPaused
	r.manual = r.manual || api
	c.mu.Unlock()

	r.awaitHandler(ctx, sig)
	if err := c.send(r, sig); err != nil {
		return c.wrap(err)
	}
	c.emitKill(sig)
	if paused {
		// What is frozen does not see the signal.
		if err := c.thaw(ctx, r); err != nil {
			return err
		}
	}
	var over <-chan time.Time
	if grace >= 0 {
		t := time.NewTimer(grace)
		defer t.Stop()
		over = t.C
	}
	select {
	case <-r.ended:
	case <-over:
		if err := c.send(r, syscall.SIGKILL); err != nil {
			return c.wrap(err)
		}
		c.emitKill(syscall.SIGKILL)
	case <-ctx.Done():
		return c.wrap(ctx.Err())
	}
	select {
	case <-r.ended:
	case <-ctx.Done():
		return c.wrap(ctx.Err())
	}
	if api {
		c.pod.Emit(Event{Action: "stop", Container: c.ID()})
	}
	return nil
}

// Restart stops the container if it runs and starts it.
func (c *Container) Restart(ctx context.Context, o StopOptions) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	if err := c.stopHeld(ctx, o, true); err != nil && !errors.Is(err, ErrAlready) {
		return err
	}
	c.mu.Lock()
	c.backoff = 0
	c.mu.Unlock()
	if err := c.start(0); err != nil {
		return err
	}
	c.pod.Emit(Event{Action: "restart", Container: c.ID()})
	return nil
}

// Kill sends a signal by order of the API. One that is meant to end the container keeps it from being restarted.
func (c *Container) Kill(ctx context.Context, sig syscall.Signal) error {
	r, err := c.current()
	if err != nil {
		return err
	}
	r.awaitHandler(ctx, sig)
	stop, _ := ParseSignal(c.doc.StopSignal)
	switch sig {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGABRT, stop:
		c.mu.Lock()
		r.manual = true
		c.mu.Unlock()
	}
	if err := c.send(r, sig); err != nil {
		return c.wrap(err)
	}
	c.emitKill(sig)
	return nil
}

// emitKill tells of a signal that the API sent, for a stop, too.
func (c *Container) emitKill(sig syscall.Signal) {
	c.pod.Emit(Event{Action: "kill", Container: c.ID(), Attributes: map[string]string{"signal": strconv.Itoa(int(sig))}})
}

// signal passes on a signal that the host's kcradle run got.
func (c *Container) signal(sig int) error {
	r, err := c.current()
	if err != nil {
		return err
	}
	return c.send(r, syscall.Signal(sig))
}

// send signals the run's first process. That it has just ended is no error.
func (c *Container) send(r *run, sig syscall.Signal) error {
	if err := r.proc.Signal(sig); err != nil && !errors.Is(err, unix.ESRCH) && !isEnded(r) {
		return fmt.Errorf("send signal %d: %w", sig, err)
	}
	return nil
}

// settleTime is how long a program that has just begun gets to set up its handlers.
const settleTime = time.Second

// awaitHandler waits until the run's first process does something about a signal, for as long as it has only just begun. The kernel
// throws away what the first process of a namespace has no handler for, and whoever stops a container right after its start means it
// to end in order.
func (r *run) awaitHandler(ctx context.Context, sig syscall.Signal) {
	switch sig {
	case unix.SIGKILL, unix.SIGSTOP, unix.SIGCONT, unix.SIGTSTP, unix.SIGTTIN, unix.SIGTTOU, unix.SIGCHLD, unix.SIGURG, unix.SIGWINCH:
		return // it needs no handler, or does nothing without
	}
	tick := time.NewTicker(2 * time.Millisecond) // nobody tells of another's handlers
	defer tick.Stop()
	for time.Since(r.began) < settleTime && !heeds(r.proc.Pid(), sig) {
		select {
		case <-tick.C:
		case <-r.ended:
			return
		case <-ctx.Done():
			return
		}
	}
}

// heeds says whether a process handles, blocks or ignores a signal; of one that is gone nothing is known any more.
func heeds(pid int, sig syscall.Signal) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return true
	}
	for line := range strings.Lines(string(b)) {
		name, mask, _ := strings.Cut(line, ":")
		switch name {
		case "SigBlk", "SigIgn", "SigCgt":
			if n, err := strconv.ParseUint(strings.TrimSpace(mask), 16, 64); err == nil && n&(1<<(sig-1)) != 0 {
				return true
			}
		}
	}
	return false
}

func isEnded(r *run) bool {
	select {
	case <-r.proc.Done():
		return true
	default:
		return false
	}
}

// Pause freezes every process of the container.
func (c *Container) Pause(ctx context.Context) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	r, err := c.current()
	if err != nil {
		return err
	}
	if c.State().Status == spec.StatusPaused {
		return c.wrap(ErrPaused)
	}
	if err := r.cgroup.Freeze(ctx, true); err != nil {
		return c.wrap(err)
	}
	c.publish(func(s *spec.State) {
		if s.Status == spec.StatusRunning {
			s.Status = spec.StatusPaused
		}
	})
	c.pod.Emit(Event{Action: "pause", Container: c.ID()})
	return nil
}

// ErrNotPaused is returned by Unpause.
var ErrNotPaused = errors.New("container is not paused")

// Unpause lets a paused container go on.
func (c *Container) Unpause(ctx context.Context) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	r, err := c.current()
	if err != nil {
		return err
	}
	if c.State().Status != spec.StatusPaused {
		return c.wrap(ErrNotPaused)
	}
	return c.thaw(ctx, r)
}

func (c *Container) thaw(ctx context.Context, r *run) error {
	if err := r.cgroup.Freeze(ctx, false); err != nil && !isEnded(r) {
		return c.wrap(err)
	}
	c.publish(func(s *spec.State) {
		if s.Status == spec.StatusPaused {
			s.Status = spec.StatusRunning
		}
	})
	c.pod.Emit(Event{Action: "unpause", Container: c.ID()})
	return nil
}

// Wait registers for a condition, so that nothing that happens after the call is missed. The channel gives one result.
// Conditions are docker's: "" and not-running are true for a container that does not run now; next-exit and removed wait
// for an end that is yet to come (in a pod a container goes only with its machine).
func (c *Container) Wait(cond string) (<-chan WaitResult, func(), error) {
	switch cond {
	case "", WaitNotRunning, WaitNextExit, WaitRemoved:
	default:
		return nil, nil, fmt.Errorf("invalid condition: %q: %w", cond, ErrInvalid)
	}
	ctx, cancel := context.WithCancel(c.pod.ctx)
	out := make(chan WaitResult, 1)
	c.mu.Lock()
	exits := c.exits
	changed := c.changed
	c.mu.Unlock()
	leave := c.pod.enter()
	if !c.pod.spawn(func() {
		defer leave()
		for {
			c.mu.Lock()
			met := c.exits > exits
			if cond == "" || cond == WaitNotRunning {
				switch c.state.Status {
				case spec.StatusRunning, spec.StatusPaused, spec.StatusRestarting:
					met = false
				default:
					met = true
				}
			}
			res := WaitResult{ExitCode: c.state.ExitCode}
			if met && c.state.Error != "" {
				res.Err = errors.New(c.state.Error)
			}
			changed = c.changed
			c.mu.Unlock()
			if met {
				out <- res
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				out <- WaitResult{Err: ctx.Err()}
				return
			}
		}
	}) {
		leave()
		out <- WaitResult{Err: context.Canceled}
	}
	return out, cancel, nil
}

// await waits until a condition on the state holds.
func (c *Container) await(ctx context.Context, met func() (bool, error)) error {
	for {
		c.mu.Lock()
		ok, err := met()
		changed := c.changed
		c.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// awaitConditions waits for what the container comes after.
func (c *Container) awaitConditions(ctx context.Context) error {
	for _, d := range c.doc.After {
		var on *Container
		for _, o := range c.pod.containers {
			if o.doc.Name == d.Container {
				on = o
			}
		}
		if on == nil {
			return fmt.Errorf("dependency %s: %w", d.Container, ErrNotFound)
		}
		err := on.await(ctx, func() (bool, error) {
			failed := on.finished && on.state.ExitCode != 0
			switch d.Condition {
			case spec.ConditionStarted:
				if on.finished && !on.ever {
					return false, fmt.Errorf("dependency %s did not start", d.Container)
				}
				return on.ever, nil
			case spec.ConditionHealthy:
				if on.doc.Healthcheck == nil {
					return false, fmt.Errorf("dependency %s has no health check", d.Container)
				}
				if on.finished || on.state.Health == healthUnhealthy {
					return false, fmt.Errorf("dependency %s is unhealthy", d.Container)
				}
				return on.state.Health == healthHealthy, nil
			}
			if failed {
				return false, fmt.Errorf("dependency %s did not complete successfully: exit %d", d.Container, on.state.ExitCode)
			}
			return on.finished, nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// Resize sets the size of the terminal, now and for later runs.
func (c *Container) Resize(height, width uint) error {
	size, err := terminalSize(height, width)
	if err != nil {
		return c.wrap(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.size = size
	if c.state.Status == spec.StatusRunning && c.run.proc.Terminal != nil {
		if err := resize(c.run.proc.Terminal, size); err != nil {
			return fmt.Errorf("container %s: %w", c.name, err)
		}
	}
	return nil
}

func terminalSize(height, width uint) ([2]uint16, error) {
	if height > 0xffff || width > 0xffff {
		return [2]uint16{}, fmt.Errorf("terminal of %d rows and %d columns: %w", height, width, ErrInvalid)
	}
	return [2]uint16{uint16(height), uint16(width)}, nil
}

func resize(f *os.File, size [2]uint16) error {
	raw, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var ierr error
	err = raw.Control(func(fd uintptr) {
		ierr = unix.IoctlSetWinsize(int(fd), unix.TIOCSWINSZ, &unix.Winsize{Row: size[0], Col: size[1]})
	})
	if err = errors.Join(err, ierr); err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}

// Logs reads the output of all runs, also of those before the machine was last switched on.
func (c *Container) Logs(o LogOptions) (*LogReader, error) {
	c.mu.Lock()
	r := c.run
	running := c.state.Status == spec.StatusRunning || c.state.Status == spec.StatusPaused || c.state.Status == spec.StatusRestarting
	c.mu.Unlock()
	now := c.log.position()
	end := func() (int64, bool) { return now, true }
	if o.Follow && running {
		end = func() (int64, bool) {
			c.mu.Lock()
			defer c.mu.Unlock()
			switch c.state.Status {
			case spec.StatusRunning, spec.StatusPaused, spec.StatusRestarting:
				return 0, false
			}
			if c.run != nil {
				r = c.run
			}
			return r.end, true
		}
	}
	reader, err := c.log.newReader(o, end)
	if err != nil {
		return nil, c.wrap(err)
	}
	reader.leave = c.pod.enter()
	return reader, nil
}

// Root shows the container's files in a directory: its root with its volumes, without its temporary file systems. It
// is the same running or not. release must be called.
func (c *Container) Root() (dir string, release func(), err error) {
	if err := c.prepare(); err != nil {
		return "", nil, c.wrap(err)
	}
	mounts, err := c.mounts()
	if err != nil {
		return "", nil, c.wrap(err)
	}
	var points []rootfs.Mountpoint
	for _, m := range mounts {
		if m.Source != "" {
			points = append(points, rootfs.Mountpoint{Source: m.Source, Target: m.Target, File: m.File})
		}
	}
	c.prepared.mu.Lock()
	c.prepared.view++
	dir = c.pod.dir(c, "view"+strconv.Itoa(c.prepared.view))
	c.prepared.mu.Unlock()
	unmount, err := rootfs.View(dir, c.pod.dir(c, "rootfs"), points)
	if err != nil {
		return "", nil, c.wrap(err)
	}
	var once sync.Once
	return dir, func() {
		once.Do(func() {
			if err := unmount(); err != nil {
				c.pod.cfg.Log.Error("release view of container", "container", c.Name(), "error", err)
			}
		})
	}, nil
}

// Changes lists what differs from the image.
func (c *Container) Changes(ctx context.Context) ([]Change, error) {
	if err := c.prepare(); err != nil {
		return nil, c.wrap(err)
	}
	layers, err := c.layers()
	if err != nil {
		return nil, c.wrap(err)
	}
	ignore := map[string]bool{}
	for _, m := range c.doc.Mounts {
		for path := m.Target; path != "/" && path != "."; path = parent(path) {
			ignore[path] = true
		}
	}
	for path := c.doc.WorkingDir; path != "/" && path != ""; path = parent(path) {
		ignore[path] = true
	}
	list, err := rootfs.Changes(layers, c.pod.cfg.Scratch+"/c/"+c.ID()+"/upper", ignore)
	if err != nil {
		return nil, c.wrap(err)
	}
	out := make([]Change, len(list))
	for i, ch := range list {
		out[i] = Change{Kind: int(ch.Kind), Path: ch.Path}
	}
	return out, ctx.Err()
}

func parent(path string) string {
	i := strings.LastIndexByte(path, '/')
	if i <= 0 {
		return "/"
	}
	return path[:i]
}

// Size is how many bytes the writable layer takes, and the whole tree.
func (c *Container) Size(ctx context.Context) (rw, rootFS int64, err error) {
	if err := c.prepare(); err != nil {
		return 0, 0, c.wrap(err)
	}
	if rw, err = rootfs.Usage(c.pod.cfg.Scratch + "/c/" + c.ID() + "/upper"); err != nil {
		return 0, 0, c.wrap(err)
	}
	if rootFS, err = rootfs.Usage(c.pod.dir(c, "rootfs")); err != nil {
		return 0, 0, c.wrap(err)
	}
	return rw, rootFS, ctx.Err()
}

// release unmounts the container's root and closes its log.
func (c *Container) release() error {
	c.prepared.mu.Lock()
	defer c.prepared.mu.Unlock()
	var errs []error
	if c.prepared.done {
		c.prepared.done = false
		root := c.pod.dir(c, "rootfs")
		if err := unix.Unmount(root, unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", root, err))
		}
	}
	return errors.Join(append(errs, c.log.close())...)
}

// ParseSignal reads a signal's name, with or without SIG, or its number.
func ParseSignal(s string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > 64 {
			return 0, fmt.Errorf("invalid signal: %s: %w", s, ErrInvalid)
		}
		return syscall.Signal(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return n, nil
	}
	// Real-time signals, as docker names them.
	for _, rt := range []struct {
		prefix     string
		base, sign int
	}{{"SIGRTMIN+", 34, 1}, {"SIGRTMAX-", 64, -1}} {
		if d, ok := strings.CutPrefix(name, rt.prefix); ok {
			if n, err := strconv.Atoi(d); err == nil && n >= 0 && n <= 30 {
				return syscall.Signal(rt.base + rt.sign*n), nil
			}
		}
	}
	switch name {
	case "SIGRTMIN":
		return 34, nil
	case "SIGRTMAX":
		return 64, nil
	}
	return 0, fmt.Errorf("invalid signal: %s: %w", s, ErrInvalid)
}
