package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
)

// runOptions are the flags of run.
type runOptions struct {
	Dir    string
	Detach bool

	Interactive, TTY bool
	DetachKeys       string

	Linger, Hold bool
	NoTemplate   bool

	Network  string
	Publish  []string
	IPs      []string
	Gateways []string

	Memory string
	CPUs   string
	Engine string

	// SuperviseFD is set in a process that another kcradle started as the supervisor: where to report the start.
	SuperviseFD int
	// Terminal says that this supervisor has a terminal that its parent looks after.
	Terminal bool
}

func newRun(a *app) *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run [flags] DIR",
		Short: "Start a bundle",
		Long: `run starts the machine of a bundle and the containers in it, and is their supervisor until they end.

In the foreground it shows the containers' output, and ends with the container's exit code (of a pod of several: the
first failure of a critical one). 125 says that kcradle itself failed, 126 and 127 that the command could not be
executed or found, 137 that the machine died under the container.

Ctrl-C goes to the container, as every other signal does. A second Ctrl-C within two seconds stops the pod in order, a
third one kills the machine. SIGTERM and SIGHUP stop the pod in order. On a terminal of the container's own (-it),
Ctrl-C is a key like any other, and ctrl-p ctrl-q detaches.`,
		Example: `  kcradle run /tmp/vm
  kcradle run -d -p 8080:80 /tmp/vm
  kcradle run -it /tmp/shell
  kcradle run --network none /tmp/vm < input > output
  kcradle run --network tap:tap0 --ip 192.0.2.10/24 --gateway 192.0.2.1 /tmp/vm`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeBundles(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Dir = args[0]
			code, err := run(cmd.Context(), a, o)
			if err != nil || code != 0 {
				return &exitError{code, err}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&o.Detach, "detach", "d", false, "run in the background and print the bundle's directory once the container has started")
	f.BoolVarP(&o.Interactive, "interactive", "i", false, "pass standard input to the container")
	f.BoolVarP(&o.TTY, "tty", "t", false, "give the container a terminal")
	f.StringVar(&o.DetachKeys, "detach-keys", "ctrl-p,ctrl-q", "keys that detach from the container's terminal")
	f.BoolVar(&o.Linger, "linger", false, "keep the machine when the last container has ended")
	f.BoolVar(&o.Hold, "hold", false, "boot, and leave the containers created: the API starts them")
	f.BoolVar(&o.NoTemplate, "no-template", false, "boot, even where a machine at rest could be used; make none")
	f.StringArrayVarP(&o.Publish, "publish", "p", nil, "publish a port as docker does, beside those of the bundle")
	f.StringArrayVar(&o.IPs, "ip", nil, "the pod's `address/bits` on a tap")
	f.StringArrayVar(&o.Gateways, "gateway", nil, "default route on a tap, one per family")
	machineFlags(f, &o)
	f.IntVar(&o.SuperviseFD, "supervise-fd", 0, "")
	f.BoolVar(&o.Terminal, "supervise-terminal", false, "")
	_ = f.MarkHidden("supervise-fd")
	_ = f.MarkHidden("supervise-terminal")
	completeMachineFlags(cmd)
	return cmd
}

// machineFlags are the flags that a machine depends on before anything of its pod is known.
func machineFlags(f *pflag.FlagSet, o *runOptions) {
	f.StringVar(&o.Network, "network", "user", "none, user or tap:`NAME`")
	f.StringVarP(&o.Memory, "memory", "m", "", "memory of the containers together, instead of the bundle's")
	f.StringVar(&o.CPUs, "cpus", "", "number of CPUs of the machine, instead of the bundle's")
	f.StringVar(&o.Engine, "engine", "", "kvm or tcg (default: what works here, see kcradle doctor)")
}

func completeMachineFlags(cmd *cobra.Command) {
	_ = cmd.RegisterFlagCompletionFunc("network", cobra.FixedCompletions([]string{"none", "user", "tap:"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("engine", cobra.FixedCompletions([]string{"kvm", "tcg"}, cobra.ShellCompDirectiveNoFileComp))
}

// machineArgs are the flags of machineFlags as they were given.
func (o runOptions) machineArgs() []string {
	var args []string
	for flag, v := range map[string]string{"--network": o.Network, "--memory": o.Memory, "--cpus": o.CPUs, "--engine": o.Engine} {
		if v != "" {
			args = append(args, flag+"="+v)
		}
	}
	return args
}

// run starts a bundle and returns its exit code. An error is kcradle's own, and then the code is 125.
func run(ctx context.Context, a *app, o runOptions) (int, error) {
	b, err := bundle.Open(o.Dir)
	if err != nil {
		return exitOwnFailure, err
	}
	pod, err := override(b.Pod, o)
	if err != nil {
		return exitOwnFailure, err
	}
	first := &pod.Containers[0]
	attachStdin := first.OpenStdin && !o.Detach && (o.SuperviseFD == 0 || o.Terminal)
	terminal := attachStdin && first.TTY && isTerminal(a.Stdin)
	if o.TTY && o.Interactive && !o.Detach && !terminal && o.SuperviseFD == 0 {
		return exitOwnFailure, errors.New("the input device is not a TTY")
	}
	if o.SuperviseFD == 0 {
		switch {
		case o.Detach:
			return detach(ctx, a, b, o)
		case terminal:
			return superviseTerminal(ctx, a, b, o)
		}
	}
	s := &supervisor{
		app: a, opts: o, bundle: b, pod: pod, log: a.Log,
		attachStdin: attachStdin || o.Terminal,
		events:      make(chan any),
		gone:        make(chan struct{}),
	}
	if o.SuperviseFD != 0 {
		s.report = os.NewFile(uintptr(o.SuperviseFD), "report")
		s.detached = !o.Terminal
	}
	return s.run(ctx)
}

// override applies the flags of one start to a copy of the pod.
func override(p *spec.Pod, o runOptions) (*spec.Pod, error) {
	out := *p
	out.Containers = append([]spec.Container(nil), p.Containers...)
	first := &out.Containers[0]
	if o.Interactive {
		first.OpenStdin, first.StdinOnce = true, true
	}
	if o.TTY {
		first.TTY = true
	}
	ports, err := parsePublish(o.Publish)
	if err != nil {
		return nil, err
	}
	out.Ports = append(append([]spec.Port(nil), p.Ports...), ports...)
	if m, err := byteSize("-m, --memory", o.Memory); err != nil {
		return nil, err
	} else if m != nil {
		if *m < minMemory {
			return nil, errors.New("minimum memory limit allowed is 6MB")
		}
		out.Memory = *m
	}
	cpus, err := parseCPUs(o.CPUs)
	if err != nil {
		return nil, err
	}
	if cpus > 0 {
		out.VCPUs = int(math.Ceil(cpus))
	}
	return &out, out.Validate()
}

// networkConfig reads the flags of the wire.
func networkConfig(p *spec.Pod, o runOptions) (network.Config, error) {
	mode, device, err := network.ParseMode(o.Network)
	if err != nil {
		return network.Config{}, err
	}
	c := network.Config{Mode: mode, Device: device, Shared: o.Network == network.Shared}
	if c.Shared {
		if c.Segments, err = segments(o.Dir); err != nil {
			return c, err
		}
	}
	if c.Ports, err = networkPorts(p.Ports); err != nil {
		return c, err
	}
	if mode == network.None && len(o.Publish) == 0 {
		c.Ports = nil // the bundle's wishes; those of this very command line are refused by the network
	}
	for _, s := range o.IPs {
		a, err := netip.ParsePrefix(s)
		if err != nil {
			return c, fmt.Errorf("invalid argument %q for \"--ip\" flag: want ADDRESS/BITS", s)
		}
		c.Addresses = append(c.Addresses, a)
	}
	for _, s := range o.Gateways {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return c, fmt.Errorf("invalid argument %q for \"--gateway\" flag: want an address", s)
		}
		c.Gateways = append(c.Gateways, a)
	}
	for _, s := range p.DNS {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return c, fmt.Errorf("dns %q: %w", s, err)
		}
		c.DNS = append(c.DNS, a)
	}
	c.Search = p.DNSSearch
	return c, nil
}

// segments reads which shared networks a bundle is on.
func segments(dir string) ([]network.Segment, error) {
	b, err := os.ReadFile(filepath.Join(dir, network.SegmentsFile))
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("%s is on no shared networks: only containers of kcradle daemon are", dir)
	}
	if err != nil {
		return nil, err
	}
	return network.ParseSegments(b)
}

// probe finds the engine. A cache that cannot be written is no reason not to start.
func probe(ctx context.Context, log *slog.Logger, root, engine string) (vmm.Host, error) {
	h, err := vmm.Probe(ctx, root)
	if err != nil {
		var none *vmm.NoQEMUError
		var old *vmm.OldQEMUError
		if errors.As(err, &none) || errors.As(err, &old) || h.Engine == "" || h.QEMU.Version == (vmm.QEMUVersion{}) {
			return h, err
		}
		log.Debug("the probe's answer is not kept", "error", err)
	}
	switch engine {
	case "":
	case string(vmm.KVM), string(vmm.TCG):
		h.Engine, h.Reason = vmm.Engine(engine), "asked for"
	default:
		return h, fmt.Errorf("invalid argument %q for \"--engine\" flag: want kvm or tcg", engine)
	}
	return h, nil
}

func isTerminal(r any) bool {
	f, ok := r.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// stopSlack is what a machine gets beyond the grace of its containers before it is killed: for syncing its disks.
const stopSlack = 20 * time.Second

// stopGrace is how long an orderly stop may take; zero: for ever.
func stopGrace(p *spec.Pod, timeout *int) time.Duration {
	grace := 0
	for _, c := range p.Containers {
		t := 10
		if c.StopTimeout != nil {
			t = *c.StopTimeout
		}
		if timeout != nil {
			t = *timeout
		}
		if t < 0 {
			return 0
		}
		grace = max(grace, t)
	}
	return time.Duration(grace)*time.Second + stopSlack
}
