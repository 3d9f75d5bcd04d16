package pod

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/kcradle/kcradle/guest/network"
	"github.com/kcradle/kcradle/guest/reap"
	"github.com/kcradle/kcradle/spec"
)

// Host is who is told what happens. It is called from one goroutine per container.
type Host interface {
	Output(o spec.Output) error
	State(s spec.State) error
}

// Config is what a pod runs on.
type Config struct {
	Pod       *spec.Pod       // required; valid
	Placement *spec.Placement // required

	Layers  map[string]string // required: directory of each layer, by diffID
	Scratch string            // required: directory for writable layers and logs; kept over restarts of the machine
	Volumes map[string]string // directory of each volume's file system
	Binds   []string          // source of each bind mount, in the order of Pod.Binds
	Run     string            // required: directory for what lives as long as the machine
	Cgroup  string            // required: cgroup v2 directory that holds no process

	Reaper   *reap.Reaper // required; running
	InitFile string       // our own binary, for containers that want a reaper as their first process
	Host     Host         // nil: nobody
	Log      *slog.Logger // required
}

// Pod is the set of containers of one machine.
type Pod struct {
	cfg        Config
	containers []*Container
	events     events
	pumps      sync.WaitGroup
	work       sync.WaitGroup // what spawn started
	ctx        context.Context
	cancel     context.CancelFunc

	mu       sync.Mutex
	wire     spec.Network
	names    map[string]*Container
	execs    map[string]*Exec
	used     map[string]bool // volumes that were mounted since the machine started
	stopping bool
	closed   bool
	clients  int           // attachments, log readers and exec sessions that are open
	idle     chan struct{} // closed when there are none any more; nil when nobody waits
	ended    chan struct{} // closed when the pod has nothing left to run
	isEnded  bool
}

// New makes the pod's containers, none of them started.
func New(cfg Config) (*Pod, error) {
	p := &Pod{
		cfg:   cfg,
		names: map[string]*Container{},
		execs: map[string]*Exec{},
		used:  map[string]bool{},
		ended: make(chan struct{}),
		wire:  cfg.Placement.Network,
	}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	hosts, err := network.Hosts(cfg.Pod, &cfg.Placement.Network)
	if err != nil {
		return nil, err
	}
	resolv, err := network.ResolvConf(cfg.Pod, &cfg.Placement.Network)
	if err != nil {
		return nil, err
	}
	files := []file{
		{"/etc/hosts", hosts},
		{"/etc/hostname", network.HostName(cfg.Pod) + "\n"},
		{"/etc/resolv.conf", resolv},
	}
	for i := range cfg.Pod.Containers {
		c, err := newContainer(p, i, files)
		if err != nil {
			p.cancel()
			return nil, fmt.Errorf("container %s: %w", cfg.Pod.Containers[i].Name, err)
		}
		p.containers = append(p.containers, c)
		p.names[c.name] = c
	}
	for _, c := range p.containers {
		if cfg.Host != nil {
			c.log.pumped(c.log.position())
			p.pumps.Go(c.pump.run)
		}
		c.publish(nil)
		p.Emit(Event{Action: "create", Container: c.ID()})
	}
	return p, nil
}

// Spec is the owner's document. It must not be changed.
func (p *Pod) Spec() *spec.Pod { return p.cfg.Pod }

// Placement is what the host assigned. It must not be changed. Its Network is that of the start: see Network.
func (p *Pod) Placement() *spec.Placement { return p.cfg.Placement }

// Network is the pod's wire as it is now.
func (p *Pod) Network() spec.Network {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.wire
}

// SetNetwork says that the pod's wire is another now. The containers' /etc/hosts follow; what they have written there stays.
func (p *Pod) SetNetwork(n spec.Network) error {
	p.mu.Lock()
	old := p.wire
	p.wire = n
	p.mu.Unlock()
	before, err := network.HostLines(p.cfg.Pod, &old)
	if err != nil {
		return err
	}
	after, err := network.HostLines(p.cfg.Pod, &n)
	if err != nil {
		return err
	}
	for _, c := range p.containers {
		if err := c.setHosts(before, after); err != nil {
			return fmt.Errorf("container %s: %w", c.Name(), err)
		}
	}
	return nil
}

// Containers returns the containers in the order of the document.
func (p *Pod) Containers() []*Container { return p.containers }

// Find returns the container of a full ID, a name with or without a slash before it, or a unique beginning of an ID, in
// this order.
func (p *Pod) Find(ref string) (*Container, error) {
	for _, c := range p.containers {
		if c.ID() == ref {
			return c, nil
		}
	}
	p.mu.Lock()
	c, ok := p.names[strings.TrimPrefix(ref, "/")]
	p.mu.Unlock()
	if ok {
		return c, nil
	}
	var found *Container
	for _, c := range p.containers {
		if ref != "" && strings.HasPrefix(c.ID(), ref) {
			if found != nil {
				return nil, fmt.Errorf("%s: %w", ref, ErrAmbiguous)
			}
			found = c
		}
	}
	if found == nil {
		return nil, fmt.Errorf("%s: %w", ref, ErrNotFound)
	}
	return found, nil
}

// Start starts the containers in order, each when its conditions are met, unless the placement holds them. It returns
// when the last one was started or given up; what becomes of them is told by their states.
func (p *Pod) Start(ctx context.Context) {
	if p.cfg.Placement.Hold {
		return
	}
	for _, c := range p.containers {
		if err := c.awaitConditions(ctx); err != nil {
			if ctx.Err() != nil {
				return
			}
			c.giveUp(fmt.Errorf("unable to start container process: %w", err))
			continue
		}
		if err := c.Start(ctx); err != nil && !errors.Is(err, ErrAlready) {
			p.cfg.Log.Error("container did not start", "container", c.Name(), "error", err)
		}
	}
}

// Done is closed when the pod has ended: every critical container has ended by itself, or one of them failed, and
// nothing will restart them. With Placement.Linger that never happens.
func (p *Pod) Done() <-chan struct{} { return p.ended }

// evaluate looks whether the pod has ended. It is called after each final end of a container.
func (p *Pod) evaluate() {
	if p.cfg.Placement.Linger {
		return
	}
	critical := 0
	for _, c := range p.containers {
		if !c.doc.NonCritical {
			critical++
		}
	}
	all := true
	failed := false
	for _, c := range p.containers {
		if c.doc.NonCritical && critical > 0 {
			continue
		}
		over, code := c.over()
		all = all && over
		failed = failed || over && code != 0
	}
	if !all && !failed {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.isEnded {
		p.isEnded = true
		close(p.ended)
	}
}

// Stop stops every container in reverse order: its stop signal, the grace (nil: the container's own), SIGKILL. Nothing
// is restarted any more.
func (p *Pod) Stop(ctx context.Context, timeout *int) {
	p.mu.Lock()
	p.stopping = true
	p.mu.Unlock()
	for i := len(p.containers) - 1; i >= 0; i-- {
		c := p.containers[i]
		if err := c.stop(ctx, StopOptions{Timeout: timeout}, false); err != nil && !errors.Is(err, ErrAlready) {
			p.cfg.Log.Error("stop container", "container", c.Name(), "error", err)
		}
	}
}

// spawn runs fn, which Close waits for, unless the pod is closed.
func (p *Pod) spawn(fn func()) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.work.Go(fn)
	return true
}

// enter counts a client whose last bytes Close lets through; leave may be called twice.
func (p *Pod) enter() (leave func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.clients++
	var once sync.Once
	return func() {
		once.Do(func() {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.clients--
			if p.clients == 0 && p.idle != nil {
				close(p.idle)
				p.idle = nil
			}
		})
	}
}

// clientGrace is how long clients may take to read the rest once the last container has ended.
const clientGrace = time.Second

func (p *Pod) awaitClients() {
	p.mu.Lock()
	var idle chan struct{}
	if p.clients > 0 {
		idle = make(chan struct{})
		p.idle = idle
	}
	p.mu.Unlock()
	if idle == nil {
		return
	}
	t := time.NewTimer(clientGrace)
	defer t.Stop()
	select {
	case <-idle:
	case <-t.C:
	}
}

func (p *Pod) isStopping() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.stopping
}

// Close unmounts what the pod mounted, after everything was sent to the host. The containers must have been stopped.
func (p *Pod) Close() error {
	p.awaitClients()
	p.mu.Lock()
	p.stopping, p.closed = true, true
	p.mu.Unlock()
	p.cancel()
	p.work.Wait()
	var errs []error
	for _, c := range p.containers {
		c.pump.finish()
	}
	p.pumps.Wait()
	for _, c := range p.containers {
		errs = append(errs, c.release())
	}
	p.events.close()
	return errors.Join(errs...)
}

// Signal sends a signal from the host's side, which is no stop by the API. The empty name means the first container.
func (p *Pod) Signal(s spec.Signal) error {
	c := p.containers[0]
	if s.Container != "" {
		var err error
		if c, err = p.Find(s.Container); err != nil {
			return err
		}
	}
	return c.signal(s.Signal)
}

// Rename gives a container another name.
func (c *Container) Rename(name string) error {
	name = strings.TrimPrefix(name, "/")
	if !validName(name) {
		return fmt.Errorf("name %q: only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed: %w", name, ErrInvalid)
	}
	p := c.pod
	p.mu.Lock()
	if other, ok := p.names[name]; ok {
		p.mu.Unlock()
		if other == c {
			return fmt.Errorf("renaming a container with the same name as its current name: %w", ErrInvalid)
		}
		return fmt.Errorf("container name %q is used by container %s: %w", name, other.ID(), ErrConflict)
	}
	c.mu.Lock()
	old := c.name
	delete(p.names, old)
	c.name = name
	p.names[name] = c
	c.mu.Unlock()
	p.mu.Unlock()
	p.Emit(Event{Action: "rename", Container: c.ID(), Attributes: map[string]string{"oldName": "/" + old}})
	return nil
}

func validName(s string) bool {
	if len(s) == 0 || len(s) > 128 {
		return false
	}
	for i, r := range s {
		ok := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || i > 0 && (r == '_' || r == '.' || r == '-')
		if !ok {
			return false
		}
	}
	return true
}

// volume returns the directory that holds a volume's content as name "_data", so that lost+found stays out of sight.
func (p *Pod) volume(name string) (base string, used bool, err error) {
	base, ok := p.cfg.Volumes[name]
	if !ok {
		return "", false, fmt.Errorf("the machine has no disk for the volume %q", name)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	used = p.used[name]
	p.used[name] = true
	return base, used, nil
}

func (p *Pod) dir(c *Container, parts ...string) string {
	return strings.Join(append([]string{p.cfg.Run, "c", c.ID()}, parts...), "/") // filepath.Join would look at each byte of it
}

// events is the history of the pod, bounded, and those who listen to it.
type events struct {
	mu     sync.Mutex
	past   []Event
	live   map[chan Event]bool
	closed bool
}

const (
	eventHistory = 256 // as docker
	eventQueue   = 64
)

// Emit records an event and tells those who listen. Its time is set when it is zero.
func (p *Pod) Emit(e Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	v := &p.events
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.past) == eventHistory {
		v.past = append(v.past[:0], v.past[1:]...)
	}
	v.past = append(v.past, e)
	for ch := range v.live {
		select {
		case ch <- e:
		default: // too slow: it is dropped, and sees that by the closed channel
			delete(v.live, ch)
			close(ch)
		}
	}
}

// Events returns what happened since a time, as far as it is remembered, and what happens from now on; nothing falls
// between the two. The channel is closed for a subscriber that does not keep up, after cancel, and with the pod.
func (p *Pod) Events(since time.Time) (past []Event, live <-chan Event, cancel func()) {
	v := &p.events
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, e := range v.past {
		if !e.Time.Before(since) {
			past = append(past, e)
		}
	}
	ch := make(chan Event, eventQueue)
	if v.closed {
		close(ch)
		return past, ch, func() {}
	}
	if v.live == nil {
		v.live = map[chan Event]bool{}
	}
	v.live[ch] = true
	return past, ch, func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.live[ch] {
			delete(v.live, ch)
			close(ch)
		}
	}
}

func (v *events) close() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.closed = true
	for ch := range v.live {
		delete(v.live, ch)
		close(ch)
	}
}
