// Package daemon offers the Docker Engine API of a host: every container is a bundle with a machine of its own.
//
//	d, err := daemon.Open(ctx, daemon.Config{…}) // takes up what runs
//	err = d.Serve(ctx, listener)
//	d.Close()                                    // what runs goes on
//
// What concerns the inside of a running container (exec, attach, logs, archives, …) goes to its machine's vdocker as bytes.
// The daemon itself keeps nothing that a restart could lose: a container is the directory ROOT/containers/ID, a bundle with one
// more file (docker.json), and its supervisor is a process of its own.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/image"
)

// EngineVersion is the version of docker's engine whose behaviour is served.
const EngineVersion = "28.2.2"

// maxClients bounds the connections served at one time; more wait to be accepted.
const maxClients = 4096

// Config is what a daemon works with. What is not said to be optional is required.
type Config struct {
	Root     string       // the state directory
	Store    *image.Store // in Root
	Packages string       // the directory of the machine packages
	Version  string       // of kcradle
	// Launch starts the supervisor of the bundle in a directory and returns when its pod is launched with its containers
	// held back. The supervisor outlives this process.
	Launch func(ctx context.Context, dir string, o LaunchOptions) error
	Log    *slog.Logger
	// PlainHTTP are the registries (HOST[:PORT]) that may be spoken to without TLS; may be empty.
	PlainHTTP []string
	// HostGateway is what host-gateway stands for, instead of the gateway of a container's network; may be empty.
	HostGateway []net.IP
}

// LaunchOptions are those of one start.
type LaunchOptions struct {
	Network string // "none", or "shared": as the bundle's network.SegmentsFile says
}

// Daemon serves the API.
type Daemon struct {
	cfg     Config
	log     *slog.Logger
	started time.Time
	lock    *os.File
	events  *bus
	metrics *metrics
	bounds  bounds
	handler http.Handler

	ctx     context.Context // ends with the daemon
	cancel  context.CancelFunc
	workers sync.WaitGroup

	// nets is held by one act at a time that gives out addresses, or makes or removes a network. It is taken before mu.
	nets     sync.Mutex
	networks map[string]*hostNetwork // by ID

	mu         sync.Mutex
	containers map[string]*Container // by ID
	names      map[string]string     // name → ID; also of those that are being made
	execs      map[string]*Container // by the exec's ID
}

// ErrServed is returned (wrapped) by Open when another daemon has the state directory.
var ErrServed = errors.New("another daemon serves this state directory")

// Directories and files below the state directory.
const (
	containersDir = "containers"
	volumesDir    = "volumes"
	networksDir   = "networks"
	lockFile      = "daemon.lock"
)

// Open makes a daemon of what the state directory holds. Half-made containers are removed, running ones are taken up again.
func Open(ctx context.Context, c Config) (*Daemon, error) {
	d := &Daemon{cfg: c, log: c.Log, started: time.Now(), events: newBus(), bounds: bounds{patience, slack, told}, containers: map[string]*Container{},
		names: map[string]string{}, execs: map[string]*Container{}}
	d.metrics = newMetrics(d)
	d.events.count = d.metrics.events.Inc
	if err := d.open(ctx); err != nil {
		return nil, fmt.Errorf("open the daemon's state %s: %w", c.Root, err)
	}
	return d, nil
}

func (d *Daemon) open(ctx context.Context) (err error) {
	for _, dir := range []string{containersDir, volumesDir, networksDir} {
		if err := os.MkdirAll(filepath.Join(d.cfg.Root, dir), 0o711); err != nil {
			return err
		}
	}
	if d.lock, err = os.OpenFile(filepath.Join(d.cfg.Root, lockFile), os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			d.lock.Close()
		}
	}()
	if err := unix.Flock(int(d.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return ErrServed
	} else if err != nil {
		return fmt.Errorf("lock %s: %w", d.lock.Name(), err)
	}
	d.ctx, d.cancel = context.WithCancel(context.WithoutCancel(ctx))
	d.handler = dockerapi.New(dockerapi.Config{Engine: EngineVersion, Log: d.log, Answered: d.metrics.answered}, d.routes())
	return d.takeUp(ctx)
}

// takeUp reads every container's directory.
func (d *Daemon) takeUp(ctx context.Context) error {
	volumes := filepath.Join(d.cfg.Root, volumesDir)
	half, err := os.ReadDir(volumes)
	if err != nil {
		return err
	}
	for _, e := range half {
		if strings.HasPrefix(e.Name(), ".") {
			if err := os.RemoveAll(filepath.Join(volumes, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := d.readNetworks(); err != nil {
		return err
	}
	dir := filepath.Join(d.cfg.Root, containersDir)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if strings.Contains(e.Name(), ".tmp-") || strings.Contains(e.Name(), ".rm-") { // half made, or half removed
			if err := os.RemoveAll(path); err != nil {
				return err
			}
			continue
		}
		c, err := d.load(path)
		if err != nil {
			d.log.Error("a container cannot be read and is left alone", "dir", path, "error", err)
			continue
		}
		d.containers[c.id], d.names[c.rec.Name] = c, c.id
	}
	for _, c := range d.containers {
		if err := c.takeUp(ctx); err != nil {
			d.log.Error("a running container cannot be taken up", "container", c.id, "error", err)
		}
	}
	d.sweepNetworks()
	return nil
}

// Serve serves the API on a listener until ctx is done.
func (d *Daemon) Serve(ctx context.Context, l net.Listener) error {
	srv := dockerapi.Server(d.handler, d.log)
	srv.BaseContext = func(net.Listener) context.Context { return ctx }
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(dockerapi.Limit(l, maxClients)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve docker API: %w", err)
	}
	return nil
}

// Close lets go of everything. Containers go on.
func (d *Daemon) Close() error {
	d.cancel()
	d.events.close()
	d.workers.Wait()
	return d.lock.Close()
}

func (d *Daemon) routes() []dockerapi.Route {
	table := []dockerapi.Route{
		{Method: "HEAD", Path: "/_ping", Handle: d.ping},
		{Method: "GET", Path: "/_ping", Handle: d.ping},
		{Method: "GET", Path: "/version", Handle: d.version},
		{Method: "GET", Path: "/info", Handle: d.info},
		{Method: "GET", Path: "/events", Handle: d.serveEvents},

		{Method: "GET", Path: "/containers/json", Handle: d.list},
		{Method: "POST", Path: "/containers/create", Handle: d.create},
		{Method: "POST", Path: "/containers/prune", Handle: d.prune},
		{Method: "GET", Path: "/containers/{id}/json", Handle: d.about(d.inspect)},
		{Method: "GET", Path: "/containers/{id}/{alias}/json", Handle: d.linkInspect},
		{Method: "GET", Path: "/containers/{id}/logs", Handle: d.about(d.logs)},
		{Method: "POST", Path: "/containers/{id}/start", Handle: d.about(d.start)},
		{Method: "POST", Path: "/containers/{id}/stop", Handle: d.about(d.stop)},
		{Method: "POST", Path: "/containers/{id}/restart", Handle: d.about(d.restart)},
		{Method: "POST", Path: "/containers/{id}/kill", Handle: d.kill},
		{Method: "POST", Path: "/containers/{id}/pause", Handle: d.about(d.pause)},
		{Method: "POST", Path: "/containers/{id}/unpause", Handle: d.about(d.unpause)},
		{Method: "POST", Path: "/containers/{id}/rename", Handle: d.about(d.rename)},
		{Method: "POST", Path: "/containers/{id}/update", Handle: d.update},
		{Method: "POST", Path: "/containers/{id}/wait", Handle: d.about(d.wait)},
		{Method: "DELETE", Path: "/containers/{id}", Handle: d.about(d.remove)},

		{Method: "POST", Path: "/containers/{id}/attach", Handle: d.about(d.attach)},
		{Method: "GET", Path: "/containers/{id}/attach/ws", Handle: d.about(d.attach)},
		{Method: "POST", Path: "/containers/{id}/exec", Handle: d.execCreate},
		{Method: "POST", Path: "/exec/{id}/start", Handle: d.exec},
		{Method: "POST", Path: "/exec/{id}/resize", Handle: d.exec},
		{Method: "GET", Path: "/exec/{id}/json", Handle: d.exec},
		{Method: "GET", Path: "/containers/{id}/top", Handle: d.about(d.inside)},
		{Method: "GET", Path: "/containers/{id}/stats", Handle: d.about(d.stats)},
		{Method: "POST", Path: "/containers/{id}/resize", Handle: d.about(d.inside)},
		{Method: "GET", Path: "/containers/{id}/changes", Handle: d.about(d.files)},
		{Method: "GET", Path: "/containers/{id}/export", Handle: d.about(d.files)},
		{Method: "HEAD", Path: "/containers/{id}/archive", Handle: d.about(d.files)},
		{Method: "GET", Path: "/containers/{id}/archive", Handle: d.about(d.files)},
		{Method: "PUT", Path: "/containers/{id}/archive", Handle: d.about(d.files)},

		{Method: "GET", Path: "/networks", Handle: d.networkList},
		{Method: "POST", Path: "/networks/create", Handle: d.networkCreate},
		{Method: "POST", Path: "/networks/prune", Handle: d.networkPrune},
		{Method: "GET", Path: "/networks/{id}", Handle: d.networkInspect},
		{Method: "POST", Path: "/networks/{id}/connect", Handle: d.networkConnect},
		{Method: "POST", Path: "/networks/{id}/disconnect", Handle: d.networkDisconnect},
		{Method: "DELETE", Path: "/networks/{id}", Handle: d.networkRemove},

		{Method: "GET", Path: "/distribution/{name+}/json", Handle: d.distribution},
		{Method: "POST", Path: "/auth", Handle: d.login},
		{Method: "POST", Path: "/commit", Handle: d.commit},
		{Method: "GET", Path: "/system/df", Handle: d.diskUsage},

		{Method: "GET", Path: "/volumes", Handle: d.volumes},
		{Method: "POST", Path: "/volumes/create", Handle: d.volumeCreate},
		{Method: "POST", Path: "/volumes/prune", Handle: d.volumePrune},
		{Method: "GET", Path: "/volumes/{name}", Handle: d.volumeInspect},
		{Method: "DELETE", Path: "/volumes/{name}", Handle: d.volumeRemove},

		{Method: "GET", Path: "/images/json", Handle: d.images},
		{Method: "POST", Path: "/images/create", Handle: d.pull},
		{Method: "POST", Path: "/images/load", Handle: d.loadImages},
		{Method: "GET", Path: "/images/get", Handle: d.save},
		{Method: "GET", Path: "/images/search", Handle: d.search},
		{Method: "POST", Path: "/images/prune", Handle: d.imagePrune},
		{Method: "GET", Path: "/images/{name+}/json", Handle: d.imageInspect},
		{Method: "GET", Path: "/images/{name+}/history", Handle: d.imageHistory},
		{Method: "GET", Path: "/images/{name+}/get", Handle: d.save},
		{Method: "POST", Path: "/images/{name+}/tag", Handle: d.imageTag},
		{Method: "POST", Path: "/images/{name+}/push", Handle: d.push},
		{Method: "DELETE", Path: "/images/{name+}", Handle: d.imageRemove},
	}
	return append(table, absent()...)
}

// about finds the container that {id} names before it calls h.
func (d *Daemon) about(h func(http.ResponseWriter, *dockerapi.Request, *Container) error) dockerapi.Handler {
	return func(w http.ResponseWriter, r *dockerapi.Request) error {
		c, err := d.find(r.Var("id"))
		if err != nil {
			return err
		}
		return h(w, r, c)
	}
}

// find looks a container up by ID, name, or the beginning of its ID, in docker's order.
func (d *Daemon) find(ref string) (*Container, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if c := d.containers[ref]; c != nil {
		return c, nil
	}
	if c := d.containers[d.names[strings.TrimPrefix(ref, "/")]]; c != nil {
		return c, nil
	}
	var found *Container
	for id, c := range d.containers {
		if ref != "" && strings.HasPrefix(id, ref) {
			if found != nil {
				return nil, dockerapi.BadRequest("multiple IDs found with provided prefix: %s", ref)
			}
			found = c
		}
	}
	if found == nil {
		return nil, dockerapi.NotFound("No such container: %s", ref)
	}
	return found, nil
}

// all returns the containers.
func (d *Daemon) all() []*Container {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := make([]*Container, 0, len(d.containers))
	for _, c := range d.containers {
		out = append(out, c)
	}
	return out
}

// load reads a container's directory.
func (d *Daemon) load(dir string) (*Container, error) {
	b, err := bundle.Open(dir)
	if err != nil {
		return nil, err
	}
	raw, err := b.File(recordFile)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: a bundle that no daemon has made", dir)
	}
	if err != nil {
		return nil, err
	}
	c := newContainer(d, b)
	if err := c.rec.parse(raw); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, recordFile), err)
	}
	return c, d.upgradeNetworks(&c.rec)
}
