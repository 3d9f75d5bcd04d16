// Package guest is PID 1 of a machine: a table of named phases from the kernel's hand-over to the last unmount. The
// packages below it do the work; this one says in which order.
//
//	err := guest.Run(ctx, guest.Config{Machine: guest.NewMachine(), API: api, Log: log})
package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/kcradle/kcradle/guest/early"
	"github.com/kcradle/kcradle/guest/hostdir"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/guest/reap"
	"github.com/kcradle/kcradle/spec"
)

// Machine is what the phases do to the machine itself. Tests put a host's directories in its place.
type Machine interface {
	// Early makes the machine usable and returns the digest of the only pod it may run, "" for any.
	Early() (podDigest string, err error)
	// Channel opens the control channel.
	Channel(ctx context.Context) (Channel, error)
	// Clock sets the wall clock, Slew makes it later by d in the course of time, Seed sets the random state.
	Clock(now time.Time) error
	Slew(d time.Duration) error
	Seed(entropy []byte) error
	// Network sets up the pod's wire, and changes it when it is called again.
	Network(n *spec.Network) error
	// Mount mounts what the pod needs; Unmount takes it away again and fails when data may not be on disk.
	Mount(p *spec.Pod, l *spec.Placement) (*Mounts, error)
	Unmount() error
	// Clear leaves no trace of what Network and Mount did, once Unmount has succeeded.
	Clear() error
}

// Channel is the guest's end of the control channel.
type Channel interface {
	Listen(port uint32) (net.Listener, error)
	Ready() // every listener stands
}

// Mounts says where things are.
type Mounts struct {
	Layers   map[string]string // by diffID
	Scratch  string
	Volumes  map[string]string // by name
	Run      string            // a directory in memory
	Cgroup   string
	InitFile string // our own binary, when a container asks for it
}

// API serves the Docker Engine API on l until ctx ends. source waits for the launch.
type API func(ctx context.Context, l net.Listener, source func(context.Context) (*pod.Pod, error), log *slog.Logger) error

// Config is what PID 1 runs with.
type Config struct {
	Machine Machine      // required
	API     API          // nil: no API
	Log     *slog.Logger // required; the console
}

// guest is the state that the phases hand on.
type guest struct {
	cfg     Config
	m       Machine
	log     *slog.Logger
	reaper  *reap.Reaper
	digest  string
	ended   map[string]int64 // when each phase ended, nanoseconds since the kernel's start
	channel Channel
	control net.Listener
	shares  *hostdir.Dirs
	host    *host
	doc     *spec.Pod
	place   *spec.Placement
	mounts  *Mounts
	binds   []string

	api     sync.WaitGroup
	stopAPI context.CancelFunc

	calm     func()        // ends what is special about a launch
	launched chan struct{} // closed when pod or failure is set
	pod      *pod.Pod
	failure  error
}

// phase is a row of the table. To add one, add a row: it runs after those above it, and its name appears in the time
// table that the host gets with the last frame.
type phase struct {
	name string
	run  func(*guest, context.Context) error
}

// boot are the phases of every machine, before anything of its pod is known; a template is taken behind the last one, or
// behind a rehearsal.
var boot = []phase{
	{"early", (*guest).early},
	{"listen", (*guest).listen},
	{"ready", (*guest).ready},
}

// launch are the phases that make a pod of the machine. One that fails ends it, and the host is told why.
var launch = []phase{
	{"launch", (*guest).receive},
	{"clock", (*guest).clock},
	{"network", (*guest).network},
	{"disks", (*guest).disks},
	{"shares", (*guest).mountShares},
	{"containers", (*guest).containers},
	{"start", (*guest).start},
}

// end are the phases after the pod has ended. They all run, whatever fails.
var end = []phase{
	{"stop", (*guest).stop},
	{"unmount", (*guest).unmount},
}

// Run runs the machine to its end. An error means that it never came to "ready".
func Run(ctx context.Context, cfg Config) error {
	g := &guest{
		cfg: cfg, m: cfg.Machine, log: cfg.Log,
		reaper:   reap.New(),
		ended:    map[string]int64{},
		launched: make(chan struct{}),
	}
	quit := make(chan struct{})
	reaped := make(chan struct{})
	go func() { defer close(reaped); g.reaper.Run(quit) }()
	defer func() { close(quit); <-reaped }()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer g.close()
	for _, p := range boot {
		if err := g.run(ctx, p); err != nil {
			return err
		}
	}
	// No time for the collector before the pod runs, unless it is about memory.
	percent := debug.SetGCPercent(-1)
	debug.SetMemoryLimit(launchMemory)
	g.calm = func() {
		if g.place != nil && g.place.Rehearsal {
			return // what the rehearsal had stays with us, for the pod
		}
		debug.SetGCPercent(percent)
		debug.SetMemoryLimit(math.MaxInt64)
	}
	for {
		rehearsed, err := g.live(ctx)
		if !rehearsed || err != nil {
			return err
		}
		if err := g.renew(ctx); err != nil {
			return err
		}
	}
}

// launchMemory is how much memory a launch may take before it is collected, in bytes; it takes less than a tenth of that.
const launchMemory = 64 << 20

// live is a pod's life, from its launch to its last unmount. It says whether that was a rehearsal, without a failure.
func (g *guest) live(ctx context.Context) (rehearsed bool, err error) {
	// The containers' processes outlive a cancelled ctx: they are stopped by the phases of the end.
	var failed *phaseError
	for _, p := range launch {
		if err := g.run(ctx, p); err != nil {
			errors.As(err, &failed)
			break
		}
	}
	g.calm()
	g.mark(failed)
	if failed != nil && g.host != nil {
		g.log.Error("launch failed", "phase", failed.name, "error", failed.err)
		g.host.send(spec.FrameError, spec.Failure{Phase: failed.name, Message: failed.err.Error()})
	}
	if failed == nil {
		g.await(ctx)
	}
	clean := true
	var message error
	for _, p := range end {
		if err := g.run(context.WithoutCancel(ctx), p); err != nil {
			clean, message = false, errors.Join(message, err)
		}
	}
	if g.host != nil {
		done := spec.Done{Clean: clean, Phases: g.ended}
		if message != nil {
			done.Message = message.Error()
			g.log.Error("end of the pod", "error", message)
		}
		g.host.send(spec.FrameDone, done)
		if failed == nil && clean && g.place.Rehearsal {
			return true, nil
		}
		g.host.awaitClose(lastWords)
	} else if failed != nil {
		return false, failed
	}
	return false, nil
}

// renew makes the machine after a rehearsal what it was before, and tells the host so by ending the stream.
func (g *guest) renew(ctx context.Context) error {
	if err := g.m.Clear(); err != nil {
		return fmt.Errorf("clear up after a rehearsal: %w", err)
	}
	host := g.host
	g.doc, g.place, g.mounts, g.binds, g.pod, g.host = nil, nil, nil, nil, nil, nil
	g.launched = make(chan struct{})
	runtime.GC() // what the rehearsal has left
	if err := g.serve(ctx); err != nil {
		return err
	}
	host.close()
	return nil
}

// lastWords is how long the host may take to end the stream after the last frame.
const lastWords = 3 * time.Second

type phaseError struct {
	name string
	err  error
}

func (e *phaseError) Error() string { return "phase " + e.name + ": " + e.err.Error() }
func (e *phaseError) Unwrap() error { return e.err }

func (g *guest) run(ctx context.Context, p phase) error {
	err := p.run(g, ctx)
	g.ended[p.name] = int64(early.SinceBoot())
	if err != nil {
		return &phaseError{p.name, err}
	}
	return nil
}

func (g *guest) early(context.Context) (err error) {
	g.digest, err = g.m.Early()
	return err
}

func (g *guest) listen(ctx context.Context) error {
	var err error
	if g.channel, err = g.m.Channel(ctx); err != nil {
		return err
	}
	if g.control, err = g.channel.Listen(spec.PortControl); err != nil {
		return err
	}
	return g.serve(ctx)
}

// serve opens the ports that belong to one pod.
func (g *guest) serve(ctx context.Context) error {
	api, err := g.channel.Listen(spec.PortVdocker)
	if err != nil {
		return err
	}
	shares, err := g.channel.Listen(spec.PortShare)
	if err != nil {
		return err
	}
	g.shares = hostdir.New(shares, "/run/kcradle/shares")
	if g.cfg.API == nil {
		return nil
	}
	// Not ctx: the API lives until the containers are stopped.
	apiCtx, stop := context.WithCancel(context.WithoutCancel(ctx))
	g.stopAPI = stop
	g.api.Go(func() {
		if err := g.cfg.API(apiCtx, api, g.source, g.log); err != nil && apiCtx.Err() == nil {
			g.log.Error("the API ended", "error", err)
		}
	})
	return nil
}

func (g *guest) ready(context.Context) error {
	g.channel.Ready()
	return nil
}

// source gives the API the pod once it is launched.
func (g *guest) source(ctx context.Context) (*pod.Pod, error) {
	select {
	case <-g.launched:
		return g.pod, g.failure
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// mark says that the launch has succeeded or failed, once.
func (g *guest) mark(failed *phaseError) {
	select {
	case <-g.launched:
		return
	default:
	}
	if failed != nil {
		g.failure = failed
	}
	close(g.launched)
}

// receive waits for the host and takes the pod and the placement.
func (g *guest) receive(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { g.control.Close() })
	defer stop()
	conn, err := g.control.Accept()
	if err != nil {
		return fmt.Errorf("wait for the host: %w", err)
	}
	g.host = newHost(conn)
	kind, b, err := spec.ReadFrame(g.host.r, nil)
	if err != nil {
		return fmt.Errorf("receive the pod: %w", err)
	}
	if kind != spec.FramePod {
		return fmt.Errorf("receive the pod: got frame %q first", kind)
	}
	if g.digest != "" {
		if got := spec.PodDigest(b); got != g.digest {
			return fmt.Errorf("this machine was measured for the pod %s and refuses %s", g.digest, got)
		}
	}
	if g.doc, err = spec.ParsePod(b); err != nil {
		return err
	}
	if kind, b, err = spec.ReadFrame(g.host.r, nil); err != nil {
		return fmt.Errorf("receive the placement: %w", err)
	}
	g.host.received = time.Now()
	if kind != spec.FramePlacement {
		return fmt.Errorf("receive the placement: got frame %q", kind)
	}
	if g.place, err = spec.ParsePlacement(b); err != nil {
		return err
	}
	if g.place.Rehearsal && g.digest != "" {
		return errors.New("a measured machine runs its pod and rehearses none")
	}
	return nil
}

// clock sets the wall clock and the random state: before any code of the pod runs.
func (g *guest) clock(context.Context) error {
	if err := g.m.Seed(g.place.Entropy); err != nil {
		return err
	}
	if g.place.Now.IsZero() {
		return nil
	}
	return g.m.Clock(g.place.Now.Add(time.Since(g.host.received)))
}

func (g *guest) network(context.Context) error { return g.m.Network(&g.place.Network) }

// rewire changes the wire of a pod that was launched.
func (g *guest) rewire(raw []byte) error {
	select {
	case <-g.launched:
	case <-g.host.stopped:
	}
	if g.pod == nil {
		return errors.New("there is no pod to change the network of")
	}
	n, err := spec.ParseNetwork(raw)
	if err != nil {
		return err
	}
	if err := g.m.Network(n); err != nil {
		return err
	}
	return g.pod.SetNetwork(*n)
}

func (g *guest) disks(context.Context) (err error) {
	g.mounts, err = g.m.Mount(g.doc, g.place)
	return err
}

// shareTimeout is how long the host may take to open the streams of its shared directories.
const shareTimeout = 20 * time.Second

func (g *guest) mountShares(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, shareTimeout)
	defer cancel()
	for i, b := range g.doc.Binds() {
		file := ""
		if i < len(g.place.Shares) {
			file = g.place.Shares[i].File
		}
		source, err := g.shares.Mount(ctx, i, file, b.Mount.ReadOnly)
		if err != nil {
			return fmt.Errorf("%s of container %s: %w", b.Mount.Source, b.Container, err)
		}
		g.binds = append(g.binds, source)
	}
	return nil
}

func (g *guest) containers(context.Context) (err error) {
	g.pod, err = pod.New(pod.Config{
		Pod: g.doc, Placement: g.place,
		Layers: g.mounts.Layers, Scratch: g.mounts.Scratch, Volumes: g.mounts.Volumes, Binds: g.binds,
		Run: g.mounts.Run, Cgroup: g.mounts.Cgroup, InitFile: g.mounts.InitFile,
		Reaper: g.reaper, Host: g.host, Log: g.log,
	})
	if err == nil {
		g.mark(nil)
	}
	return err
}

// start starts the containers; the phase ends when the first one runs, or has failed, or waits.
func (g *guest) start(ctx context.Context) error {
	if err := g.host.ask(); err != nil {
		return err
	}
	g.host.serve(g)
	startCtx, cancel := context.WithCancel(ctx)
	g.host.stopStarting = cancel
	started := make(chan struct{})
	g.host.wg.Go(func() {
		defer close(started)
		g.pod.Start(startCtx)
	})
	select {
	case <-started:
	case <-g.pod.Done():
	case <-g.host.stopped:
	}
	return nil
}

// await waits for the pod's end, the host's order to stop it, or the host's own end.
func (g *guest) await(ctx context.Context) {
	select {
	case <-g.pod.Done():
	case <-g.host.stopped:
	case <-ctx.Done():
	}
}

func (g *guest) stop(ctx context.Context) error {
	if g.pod == nil {
		return nil
	}
	if g.host.stopStarting != nil {
		g.host.stopStarting()
	}
	g.host.hurry(flushTimeout)
	g.pod.Stop(ctx, g.host.stopTimeout())
	err := g.pod.Close()
	if g.stopAPI != nil {
		g.stopAPI()
		g.api.Wait()
	}
	return err
}

// flushTimeout is how long the host may take to accept a frame once the pod is being stopped.
const flushTimeout = 60 * time.Second

func (g *guest) unmount(context.Context) error {
	var err error
	if g.shares != nil {
		// The API's clients of port 3 and the mounts' streams end here; the mounts go with the machine.
		if cerr := g.shares.Close(); cerr != nil && !errors.Is(cerr, net.ErrClosed) {
			err = cerr
		}
	}
	return errors.Join(err, g.m.Unmount())
}

func (g *guest) close() {
	g.mark(&phaseError{"boot", errors.New("the machine is ending")})
	if g.stopAPI != nil {
		g.stopAPI()
		g.api.Wait()
	}
	if g.control != nil {
		g.control.Close()
	}
	if g.host != nil {
		g.host.close()
	}
}

// wantsInit says whether a container asks for our binary as its first process.
func wantsInit(p *spec.Pod) bool {
	for _, c := range p.Containers {
		if c.Init {
			return true
		}
	}
	return false
}

// ensureDir makes a directory and returns its path.
func ensureDir(parts ...string) (string, error) {
	dir := filepath.Join(parts...)
	return dir, os.MkdirAll(dir, 0o755)
}
