package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"runtime"
	"time"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
	"github.com/kcradle/kcradle/vmm/pool"
	"github.com/kcradle/kcradle/vmm/template"
)

// plan is a machine before it is started, and what its guest will be told of it.
type plan struct {
	app     *app
	host    vmm.Host
	pkg     *bundle.Package
	layers  []bundle.Layer
	volumes []bundle.Volume
	network network.Config
	wire    network.Wire // set by connect
	config  vmm.Config   // before connect, its wire has no file
}

// makePlan looks at a bundle and at the host.
func makePlan(ctx context.Context, a *app, b *bundle.Bundle, pod *spec.Pod, o runOptions) (*plan, error) {
	nc, err := networkConfig(pod, o)
	if err != nil {
		return nil, err
	}
	p := &plan{app: a, network: nc}
	if p.pkg, err = b.Package(); err != nil {
		return nil, err
	}
	if p.layers, err = b.Layers(); err != nil {
		return nil, err
	}
	if p.volumes, err = b.Volumes(); err != nil {
		return nil, err
	}
	if p.host, err = probe(ctx, a.Log, a.Root, o.Engine); err != nil {
		return nil, err
	}
	runAs, err := vmm.Unprivileged(p.host.Engine)
	if err != nil {
		a.Log.Warn("QEMU runs as root", "error", err)
	}
	p.config = machineConfig(machineInput{
		Bundle: b, Pod: pod, Package: p.pkg, Layers: p.layers, Volumes: p.volumes, Engine: p.host.Engine, QEMU: p.host.QEMU.Path,
		HostCPUs: runtime.NumCPU(), RunAs: runAs, TSCKHz: p.host.TSCKHz, CID: contextID(),
	})
	if nc.Mode == network.User {
		p.config.Wire = &vmm.Wire{Kind: vmm.WireStream, MTU: network.DefaultMTU}
	}
	return p, nil
}

// connect opens the wire. end is ours of one that the machine has already, nil for a new one.
func (p *plan) connect(ctx context.Context, end *os.File) (err error) {
	p.close()
	c := p.network
	c.End = end
	if p.wire, err = network.Open(ctx, c, p.app.Log); err != nil {
		return err
	}
	p.config.Wire = machineWire(c.Mode, p.wire)
	return nil
}

func (p *plan) close() {
	if p.wire != nil {
		p.wire.Close()
		p.wire = nil
	}
}

// placement is what the guest is told of the machine.
func (p *plan) placement() spec.Placement {
	return spec.Placement{
		Layers: extents(p.layers), Volumes: volumeDrives(p.volumes),
		Network: guestNetwork(p.network.Mode, p.wire.Guest(), p.wire.Ports()),
	}
}

// shape is what a template of this machine depends on.
func (p *plan) shape() (template.Shape, error) {
	return template.ShapeOf(p.config, p.pkg.Manifest.Kernel.Digest, p.pkg.Manifest.Initrd.Digest)
}

// errNoTemplate says that machines of this kind always boot.
var errNoTemplate = errors.New("a machine on a tap device boots: its template would need a device like it")

// templatable says whether a template can be made of such a machine.
func (p *plan) templatable() error {
	if p.network.Mode == network.Tap {
		return errNoTemplate
	}
	return nil
}

// begun is a machine that has been started: taken from the pool, restored from a template, or booting.
type begun struct {
	plan     *plan
	log      *slog.Logger
	running  *vmm.Machine
	store    *template.Store
	pooled   bool
	stale    bool               // the template should be made anew
	over     func()             // tells the pool that the start is over
	template *template.Template // nil: it did not come from one
	control  net.Conn           // to the guest, which has got the pod; nil before machine, and while the machine boots
}

// begin starts the machine of a plan in the fastest way there is, and opens its wire. store is nil when it must boot.
func begin(ctx context.Context, p *plan, store *template.Store, log *slog.Logger) (*begun, error) {
	b := &begun{plan: p, log: log, store: store, over: func() {}}
	if store == nil {
		return b, b.start(ctx)
	}
	shape, err := p.shape()
	if err != nil {
		log.Warn("no template can be used", "error", err)
		b.store = nil
		return b, b.start(ctx)
	}
	if b.take(ctx, shape) {
		return b, nil
	}
	if b.template, err = store.Find(shape); err != nil && !errors.Is(err, template.ErrNone) {
		log.Warn("no template can be used", "error", err)
	}
	return b, b.start(ctx)
}

// take takes a machine from the pool, if one runs and has one.
func (b *begun) take(ctx context.Context, shape template.Shape) bool {
	taken, err := pool.Take(ctx, poolSocket(b.plan.app), pool.Request{Shape: shape, Config: poolConfig(b.plan.config)})
	if err == nil {
		b.over = taken.Started
		if b.running, err = vmm.Adopt(ctx, taken.Machine, b.plan.config, b.log); err == nil {
			if err = b.plan.connect(ctx, taken.Wire); err == nil {
				b.pooled = true
				return true
			}
			b.abandon()
		}
		b.over()
		if taken.Wire != nil {
			taken.Wire.Close()
		}
	}
	if !errors.Is(err, pool.ErrNoPool) && !errors.Is(err, pool.ErrNone) {
		b.log.Warn("no machine of the pool could be used", "error", err)
	}
	return false
}

// thaw starts the machine that is frozen in the template, if there is one. When it cannot be used although the host is as it
// was, the template is no good.
func (b *begun) thaw(ctx context.Context) bool {
	if b.template == nil || !b.template.Frozen() {
		return false
	}
	c := b.plan.config
	var ours, theirs *os.File
	var err error
	if c.Wire != nil {
		if ours, theirs, err = vmm.WirePair(); err != nil {
			b.log.Warn("a frozen machine could not be used", "error", err)
			return false
		}
		defer theirs.Close()
	}
	h, err := b.template.Thaw(vmm.ThawConfig{Wire: theirs, RunAs: c.RunAs}, b.log)
	if err == nil {
		if b.running, err = vmm.Adopt(ctx, h, c, b.log); err == nil {
			if err = b.plan.connect(ctx, ours); err == nil {
				return true
			}
			b.abandon()
		}
	}
	if ours != nil {
		ours.Close()
	}
	switch {
	case errors.Is(err, template.ErrStale):
		b.log.Debug("a frozen machine is stale", "template", b.template.Key, "reason", err)
		b.stale = true
	case ctx.Err() == nil:
		b.store.SetAside(b.template.Key, err)
		b.template = nil
	}
	return false
}

// start restores the machine or boots it.
func (b *begun) start(ctx context.Context) error {
	if b.thaw(ctx) {
		return nil
	}
	if err := b.plan.connect(ctx, nil); err != nil {
		return err
	}
	var err error
	if b.template != nil {
		config := b.plan.config
		config.Restore = &b.template.Snapshot
		if b.running, err = vmm.Start(ctx, config, b.log); err == nil {
			return nil
		}
		// Whatever it is, the host or the template: booting does not need it.
		b.log.Warn("a machine could not be restored and boots", "template", b.template.Key, "error", err)
		b.template = nil
	}
	b.running, err = vmm.Start(ctx, b.plan.config, b.log)
	return err
}

// restoreTimeout is how long a restored guest may take to answer; it is a matter of a tenth of a second.
const restoreTimeout = 20 * time.Second

// machine returns the machine, when it is clear that it lives: one that did not boot has answered, and got the pod. If it does
// not answer, it is let go, its template is set aside, and the machine boots.
func (b *begun) machine(ctx context.Context, podJSON []byte) (*vmm.Machine, error) {
	if b.template == nil && !b.pooled {
		return b.running, nil
	}
	rctx, cancel := context.WithTimeoutCause(ctx, restoreTimeout, fmt.Errorf("no answer within %v", restoreTimeout))
	err := b.hand(rctx, podJSON)
	cancel()
	if err != nil && ctx.Err() == nil {
		if b.template != nil {
			b.store.SetAside(b.template.Key, err)
		} else {
			b.log.Warn("a machine of the pool did not answer", "error", err)
		}
		b.template, b.pooled = nil, false
		b.abandon()
		if err := b.start(ctx); err != nil {
			return nil, err
		}
	}
	switch {
	case b.pooled:
		b.log.Debug("machine of the pool")
	case b.template != nil:
		b.log.Debug("machine restored", "template", b.template.Key)
	}
	return b.running, nil
}

// hand gives the guest the pod, which it takes apart while its drives are attached.
func (b *begun) hand(ctx context.Context, podJSON []byte) error {
	conn, err := b.running.Dial(ctx, spec.PortControl)
	if err != nil {
		return err
	}
	b.control = conn
	if err := writeToGuest(conn, spec.FramePod, podJSON); err != nil {
		return fmt.Errorf("send the pod: %w", err)
	}
	return b.running.Attached()
}

// launch begins the launch and returns the stream on which the guest tells of it.
func (b *begun) launch(ctx context.Context, podJSON []byte, p spec.Placement) (net.Conn, error) {
	if b.control == nil {
		if err := b.hand(ctx, podJSON); err != nil {
			return nil, err
		}
	}
	return b.control, errors.Join(b.control.SetWriteDeadline(time.Now().Add(writePatience)), sendPlacement(b.control, p))
}

// slow says whether the machine would have started faster from a template that can be made.
func (b *begun) slow() bool { return b.store != nil && !b.pooled && (b.template == nil || b.stale) }

// path is how the machine came up.
func (b *begun) path() string {
	switch {
	case b.pooled:
		return bundle.PathPool
	case b.template != nil:
		return bundle.PathTemplate
	}
	return bundle.PathCold
}

// abandon ends the machine.
func (b *begun) abandon() {
	if b.control != nil {
		b.control.Close()
		b.control = nil
	}
	if b.running != nil {
		b.running.Kill()
		b.running.Wait()
		b.running = nil
	}
}
