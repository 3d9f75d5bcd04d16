package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"time"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
	"github.com/kcradle/kcradle/vmm/template"
)

// plan is a machine before it is started, and what its guest will be told of it.
type plan struct {
	host    vmm.Host
	mode    network.Mode
	pkg     *bundle.Package
	layers  []bundle.Layer
	volumes []bundle.Volume
	wire    network.Wire
	config  vmm.Config
}

// makePlan looks at a bundle and at the host, and opens the wire.
func makePlan(ctx context.Context, a *app, b *bundle.Bundle, pod *spec.Pod, o runOptions) (*plan, error) {
	nc, err := networkConfig(pod, o)
	if err != nil {
		return nil, err
	}
	p := &plan{mode: nc.Mode}
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
	if p.wire, err = network.Open(ctx, nc, a.Log); err != nil {
		return nil, err
	}
	runAs, err := vmm.Unprivileged(p.host.Engine)
	if err != nil {
		a.Log.Warn("QEMU runs as root", "error", err)
	}
	p.config = machineConfig(machineInput{
		Bundle: b, Pod: pod, Package: p.pkg, Layers: p.layers, Volumes: p.volumes, Engine: p.host.Engine, QEMU: p.host.QEMU.Path,
		HostCPUs: runtime.NumCPU(), Wire: machineWire(p.mode, p.wire), RunAs: runAs, TSCKHz: p.host.TSCKHz, CID: contextID(),
	})
	return p, nil
}

func (p *plan) close() { p.wire.Close() }

// placement is what the guest is told of the machine.
func (p *plan) placement() spec.Placement {
	return spec.Placement{
		Layers: extents(p.layers), Volumes: volumeDrives(p.volumes),
		Network: guestNetwork(p.mode, p.wire.Guest(), p.wire.Ports()),
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
	if p.mode == network.Tap {
		return errNoTemplate
	}
	return nil
}

// begun is a machine that has been started, from a template or not.
type begun struct {
	plan     *plan
	log      *slog.Logger
	running  *vmm.Machine
	store    *template.Store
	template *template.Template // nil: it boots
}

// begin starts the machine of a plan, from a template if there is one. It returns at once.
func begin(ctx context.Context, p *plan, store *template.Store, log *slog.Logger) (*begun, error) {
	b := &begun{plan: p, log: log, store: store}
	if store != nil {
		b.find()
	}
	var err error
	if b.template != nil {
		config := p.config
		config.Restore = &b.template.Snapshot
		if b.running, err = vmm.Start(ctx, config, log); err == nil {
			return b, nil
		}
		// Whatever it is, the host or the template: booting does not need it.
		log.Warn("a machine could not be restored and boots", "template", b.template.Key, "error", err)
		b.template = nil
	}
	b.running, err = vmm.Start(ctx, p.config, log)
	return b, err
}

func (b *begun) find() {
	shape, err := b.plan.shape()
	if err == nil {
		b.template, err = b.store.Find(shape)
	}
	if err != nil && !errors.Is(err, template.ErrNone) {
		b.log.Warn("no template can be used", "error", err)
	}
}

// restoreTimeout is how long a restored guest may take to answer; it is a matter of a tenth of a second.
const restoreTimeout = 20 * time.Second

// machine returns the machine, when it is clear that it lives: one that was restored has answered. If it does not, the
// template is set aside, and the machine boots.
func (b *begun) machine(ctx context.Context) (*vmm.Machine, error) {
	if b.template != nil {
		rctx, cancel := context.WithTimeoutCause(ctx, restoreTimeout, fmt.Errorf("no answer within %v", restoreTimeout))
		err := b.running.Ready(rctx)
		cancel()
		if err != nil && ctx.Err() == nil {
			b.store.SetAside(b.template.Key, err)
			b.template = nil
			b.abandon()
			if b.running, err = vmm.Start(ctx, b.plan.config, b.log); err != nil {
				return nil, err
			}
		}
	}
	if b.template != nil {
		b.log.Debug("machine restored", "template", b.template.Key)
	}
	return b.running, nil
}

// abandon ends the machine.
func (b *begun) abandon() {
	if b.running != nil {
		b.running.Kill()
		b.running.Wait()
	}
}
