package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/internal/undo"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/share"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
)

// supervisor owns one start of a pod: the lock of its bundle, the machine, the wire, the logs and the sockets. One
// goroutine, in loop, owns what changes; the others send it events.
type supervisor struct {
	app    *app
	opts   runOptions
	bundle *bundle.Bundle
	pod    *spec.Pod
	log    *slog.Logger

	attachStdin bool
	detached    bool     // nobody looks at stdout
	report      *os.File // where to tell of the start; nil: nowhere

	events chan any      // see the event types
	gone   chan struct{} // closed when loop has ended: events are not read any more

	machine *vmm.Machine
	plan    *plan
	mode    network.Mode
	beside  func() // what is done once the start is over; nil: nothing

	mu      sync.Mutex
	held    []net.Conn    // to other kcradles that wait for the end of this process
	latest  bundle.State  // what the loop knows, as of its last change
	changed chan struct{} // closed when latest is replaced
}

// Events of the loop.
type (
	launched  struct{ conn net.Conn }
	stateNews struct{ state spec.State }
	launchErr struct{ failure spec.Failure }
	guestDone struct{ done spec.Done }
	readerEnd struct{ err error }
	stopAsked struct{ timeout *int }
	killAsked struct{}
	signalled struct {
		signal spec.Signal
		reply  chan error // nil: nobody waits
	}
	rewireAsked struct{ reply chan error } // with room for the answer
	rewireDone  struct{ done spec.Done }
	outputEnd   struct{ err error }
	firstOutput struct{}
	detachAsk   struct{}
	clockAsked  struct{ echo int64 }
)

// silentStart is how long a container may run without a word until its start counts as over. What is done then would take
// processors that the start needs.
const silentStart = time.Second

// send gives the loop an event; false when the loop has ended.
func (s *supervisor) send(e any) bool {
	select {
	case s.events <- e:
		return true
	case <-s.gone:
		return false
	}
}

// run is the whole life of a pod. The order of the first half is that of what QEMU needs.
func (s *supervisor) run(ctx context.Context) (code int, err error) {
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)
	signal.Ignore(unix.SIGPIPE, unix.SIGTTOU)
	if ctx.Err() != nil { // it came before we listened
		return 130, nil
	}
	// main's context ends by the first signal; this verb has its own manners, see signals.
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()

	defer func() { s.tell(startReport{Code: code, Error: text(err)}) }() // a no-op once the start was told
	lock, err := s.bundle.Lock()
	if err != nil {
		return exitOwnFailure, err
	}
	defer lock.Unlock()
	state := bundle.State{Phase: bundle.PhaseStarting, Pid: os.Getpid(), Started: time.Now().UTC(), Network: string(s.mode)}
	end, err := s.supervise(ctx, &state, signals)
	if err != nil {
		end = bundle.End{Reason: bundle.EndHost, Message: err.Error(), ExitCode: exitOwnFailure}
	}
	end.Time = time.Now().UTC()
	state.Phase, state.End, state.Pid, state.MachinePid = bundle.PhaseEnded, &end, 0, 0
	if werr := s.bundle.SetState(state); werr != nil { // how the containers ended is still worth an exit code
		s.log.Error("the state on disk is old", "error", werr)
	}
	if err != nil {
		return exitOwnFailure, err
	}
	if end.Message != "" {
		return end.ExitCode, errors.New(end.Message)
	}
	return end.ExitCode, nil
}

// tuneRuntime keeps the supervisor small: it moves bytes, and there is one for every pod. It collects garbage at once.
func tuneRuntime() {
	runtime.GOMAXPROCS(min(runtime.NumCPU(), 4))
	debug.SetGCPercent(50)
}

func (s *supervisor) supervise(ctx context.Context, state *bundle.State, signals <-chan os.Signal) (end bundle.End, err error) {
	var u undo.Stack
	defer u.Run()

	p, err := makePlan(ctx, s.app, s.bundle, s.pod, s.opts)
	if err != nil {
		return end, err
	}
	u.Push(p.close)
	state.Mark("planned")
	s.plan, s.mode = p, p.network.Mode
	state.Network, state.Engine = string(s.mode), string(p.host.Engine)
	shares, err := openShares(s.pod)
	if err != nil {
		return end, err
	}
	u.Push(func() {
		for _, dir := range shares {
			dir.Close()
		}
	})
	if p.host.Engine == vmm.TCG && !p.host.Cached && s.opts.Engine == "" {
		fmt.Fprintf(s.app.Stderr, "kcradle run: slow: no hardware virtualization here: %s\n", p.host.Reason)
	}
	if err := s.clean(); err != nil {
		return end, err
	}
	store, err := s.templates(p)
	if err != nil {
		return end, err
	}
	start, err := begin(ctx, p, store, s.log)
	if err != nil {
		return end, err
	}
	u.Push(start.abandon)
	state.Mark("machine begun")

	// QEMU is on its way; everything from here on happens beside its boot.
	podJSON, err := s.pod.Encode() // canonical: without flags that change the pod these are the bundle's bytes
	if err != nil {
		return end, err
	}
	state.Containers = make([]spec.State, len(s.pod.Containers))
	for i, c := range s.pod.Containers {
		state.Containers[i] = spec.State{Container: c.Name, Status: spec.StatusCreated}
	}
	if err := s.bundle.Remember(s.app.Root); err != nil {
		s.log.Debug("kcradle ps will not find this bundle by itself", "error", err)
	}
	listeners := map[string]net.Listener{}
	for _, name := range []string{bundle.VdockerSocket, bundle.ControlSocket} {
		l, err := s.bundle.Listen(name)
		if err != nil {
			return end, err
		}
		u.Push(func() { l.Close() })
		listeners[name] = l
	}
	if s.machine, err = start.machine(ctx, podJSON); err != nil {
		return end, err
	}
	state.Path = start.path()
	state.Mark("machine handed over")
	s.beside = start.over
	if start.slow() && !start.store.Busy() { // the next start is to be faster
		s.beside = func() {
			if err := warmBeside(s.app, s.opts); err != nil {
				s.log.Warn("no template is made", "error", err)
			}
		}
	}
	if err := p.wire.CloseFile(); err != nil {
		return end, fmt.Errorf("close the wire's end: %w", err)
	}
	placement := p.placement()
	placement.Hold, placement.Linger = s.opts.Hold, s.opts.Linger
	for _, dir := range shares {
		placement.Shares = append(placement.Shares, spec.Share{File: dir.File()})
	}
	state.MachinePid, state.Ports = s.machine.PID(), specPorts(p.wire.Ports())
	s.publish(*state)
	if err := s.bundle.SetState(*state); err != nil {
		return end, err
	}

	var workers sync.WaitGroup
	u.Push(workers.Wait)
	u.Push(sync.OnceFunc(func() { close(s.gone) }))
	wctx, stopWorkers := context.WithCancel(ctx)
	u.Push(stopWorkers)
	for name, serve := range map[string]func(context.Context, net.Conn){bundle.VdockerSocket: s.proxy, bundle.ControlSocket: s.serveControl} {
		u.Push(func() { listeners[name].Close() })
		workers.Go(func() { s.accept(wctx, listeners[name], serve, &workers) })
	}
	workers.Go(func() { s.signals(wctx, signals) })
	workers.Go(func() { s.launch(wctx, start, podJSON, placement) })
	for i, dir := range shares {
		workers.Go(func() { s.serveShare(wctx, i, dir) })
	}
	if s.attachStdin {
		go s.stdin(wctx) // reads a file that cannot be interrupted; it ends with the process
	}
	return s.loop(ctx, state), nil
}

// openShares opens the host's directories and files that the pod mounts.
func openShares(p *spec.Pod) (shares []*share.Share, err error) {
	for _, b := range p.Binds() {
		mode := share.ReadWrite
		if b.Mount.ReadOnly {
			mode = share.ReadOnly
		}
		if b.Mount.NonRecursive {
			mode |= share.NonRecursive
		}
		s, err := share.Open(b.Mount.Source, mode)
		if err != nil {
			for _, s := range shares {
				s.Close()
			}
			return nil, fmt.Errorf("container %s: %w", b.Container, err)
		}
		shares = append(shares, s)
	}
	return shares, nil
}

// serveShare serves the i-th of them over a stream of its own until the machine has ended.
func (s *supervisor) serveShare(ctx context.Context, i int, dir *share.Share) {
	conn, err := s.machine.Dial(ctx, spec.PortShare)
	if err == nil {
		stop := context.AfterFunc(ctx, func() { conn.Close() })
		defer stop()
		if _, err = conn.Write(binary.BigEndian.AppendUint16(nil, uint16(i))); err == nil {
			err = dir.Serve(conn)
		}
	}
	if err != nil && ctx.Err() == nil {
		s.log.Debug("a directory of the host is not served any more", "mount", i, "error", err)
	}
}

// clean removes what an earlier supervisor left behind.
func (s *supervisor) clean() error {
	for _, name := range []string{bundle.VdockerSocket, bundle.ControlSocket, "console.log"} {
		if err := os.Remove(filepath.Join(s.bundle.RunDir(), name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("clean up after the last start: %w", err)
		}
	}
	return nil
}

// contextID is a context id on AF_VSOCK where the host has it, and 0 elsewhere. The kernel refuses one that is in use;
// of 4 billion that does not happen.
func contextID() uint32 {
	f, err := os.OpenFile("/dev/vhost-vsock", os.O_RDWR, 0)
	if err != nil {
		return 0
	}
	defer f.Close()
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	return 1<<16 | binary.BigEndian.Uint32(b[:])&^(1<<31)
}

func machineWire(mode network.Mode, w network.Wire) *vmm.Wire {
	if w.File() == nil {
		return nil
	}
	kind := vmm.WireStream
	if mode == network.Tap {
		kind = vmm.WireTap
	}
	g := w.Guest()
	return &vmm.Wire{Kind: kind, File: w.File(), MAC: g.MAC.String(), MTU: g.MTU}
}

// launch sends the pod to the guest and reads what the guest says until its end.
func (s *supervisor) launch(ctx context.Context, start *begun, podJSON []byte, p spec.Placement) {
	conn, err := start.launch(ctx, podJSON, p)
	if err != nil {
		s.send(readerEnd{fmt.Errorf("reach the guest: %w", err)})
		return
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if !s.send(launched{conn}) {
		return
	}
	s.send(readerEnd{s.read(conn)})
}

// read takes the guest's frames apart. Output is written here, so that a state never overtakes it.
func (s *supervisor) read(conn net.Conn) error {
	out := newOutput(s.bundle, s.pod, s.app.Stdout, s.app.Stderr, s.detached)
	defer out.close()
	buf := make([]byte, 64<<10)
	r := newFrameReader(conn)
	silent := true
	for {
		kind, payload, err := spec.ReadFrame(r, buf)
		if err != nil {
			return err
		}
		switch kind {
		case spec.FrameOutput:
			o, err := spec.ParseOutput(payload)
			if err != nil {
				return err
			}
			if err := out.write(o, s.log); err != nil {
				s.send(outputEnd{err})
			}
			if silent {
				silent = false
				s.send(firstOutput{})
			}
		case spec.FrameState:
			var st spec.State
			if err := json.Unmarshal(payload, &st); err != nil {
				return fmt.Errorf("read state: %w", err)
			}
			s.send(stateNews{st})
		case spec.FrameClock:
			c, err := spec.ParseClock(payload)
			if err != nil {
				return err
			}
			s.send(clockAsked{c.Echo})
		case spec.FrameNetwork:
			var d spec.Done
			if err := json.Unmarshal(payload, &d); err != nil {
				return fmt.Errorf("read the answer about the network: %w", err)
			}
			s.send(rewireDone{d})
		case spec.FrameError:
			var f spec.Failure
			if err := json.Unmarshal(payload, &f); err != nil {
				return fmt.Errorf("read failure: %w", err)
			}
			s.send(launchErr{f})
		case spec.FrameDone:
			var d spec.Done
			if err := json.Unmarshal(payload, &d); err != nil {
				return fmt.Errorf("read the last word: %w", err)
			}
			s.send(guestDone{d})
		default:
			s.log.Debug("the guest sent a frame of an unknown kind", "kind", kind)
		}
	}
}

// toGuest writes a frame; only the loop calls it.
func toGuest(conn net.Conn, kind byte, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return writeToGuest(conn, kind, b)
}

// writePatience is how long a guest may take to accept a frame: one that does not read any more must not take the supervisor
// with it.
const writePatience = 5 * time.Second

func writeToGuest(conn net.Conn, kind byte, payload []byte) error {
	if err := conn.SetWriteDeadline(time.Now().Add(writePatience)); err != nil {
		return err
	}
	return spec.WriteFrame(conn, kind, payload)
}

// loop owns the state of the pod until its end, and returns that.
func (s *supervisor) loop(ctx context.Context, state *bundle.State) bundle.End {
	var (
		conn     net.Conn // to the guest
		pending  []signalled
		rewiring []rewireAsked // the guest is at the first
		stopping *stopAsked
		killed   bool
		failure  *spec.Failure
		done     *spec.Done
		lost     error // how the control stream ended
		deaf     bool  // the guest took no answer
		watchdog = newStoppedTimer()
		silence  = newStoppedTimer()
		starting = true
		ran      bool // the first container
	)
	defer watchdog.Stop()
	defer silence.Stop()
	clock := time.NewTicker(clockEvery)
	defer clock.Stop()
	jumps := watchClock(ctx, s.log)
	sayTime := func(c spec.Clock) {
		if conn == nil || done != nil || lost != nil || deaf {
			return
		}
		if err := writeToGuest(conn, spec.FrameClock, c.Append(nil)); err != nil {
			s.log.Debug("tell the guest the time", "error", err)
			deaf = true // and perhaps in the middle of a frame
		}
	}
	set := func() {
		s.publish(*state)
		if err := s.bundle.SetState(*state); err != nil {
			s.log.Error("the state on disk is old", "error", err)
		}
	}
	started := func() {
		if !starting {
			return
		}
		starting = false
		tuneRuntime()
		if s.beside != nil {
			s.beside()
		}
	}
	stop := func(ask stopAsked) {
		stopping = &ask
		if conn == nil { // nothing was launched, nothing can be lost
			killed = true
			s.machine.Kill()
			return
		}
		if grace := stopGrace(s.pod, ask.timeout); grace > 0 {
			watchdog.Reset(grace)
		}
		if err := toGuest(conn, spec.FrameStop, spec.Stop{Timeout: ask.timeout}); err != nil {
			s.log.Error("the guest cannot be reached and is killed", "error", err)
			s.machine.Kill()
		}
	}
	deliver := func(e signalled) {
		err := toGuest(conn, spec.FrameSignal, e.signal)
		if e.reply != nil {
			e.reply <- err
		}
	}
	defer func() {
		for _, e := range rewiring {
			e.reply <- errors.New("the machine ended meanwhile")
		}
	}()
	machineDone := s.machine.Done()
	for machineDone != nil || lost == nil {
		select {
		case <-machineDone:
			machineDone = nil
		case <-clock.C:
			// A guest that did not run for a while, with its host or beside a busy one, has a clock that is late.
			sayTime(spec.Clock{})
		case <-jumps:
			sayTime(spec.Clock{})
		case <-silence.C:
			started()
		case <-watchdog.C:
			s.log.Error("the guest did not stop in time and is killed")
			killed = true
			s.machine.Kill()
		case e := <-s.events:
			switch e := e.(type) {
			case launched:
				conn = e.conn
				state.Phase = bundle.PhaseRunning
				state.Mark("pod launched")
				set()
				if s.opts.Hold { // no container will start by itself
					s.tell(startReport{})
				}
				for _, p := range pending {
					deliver(p)
				}
				pending = nil
				rewiring = s.rewire(conn, rewiring)
			case stateNews:
				s.update(state, e.state)
				set()
				first := state.Containers[0]
				if first.Status != spec.StatusCreated && first.Error == "" {
					s.tell(startReport{})
					if !ran {
						state.Mark("container started")
						set()
					}
					ran = true
					if starting {
						silence.Reset(silentStart)
					}
				}
			case firstOutput:
				started()
			case clockAsked:
				sayTime(spec.Clock{Now: time.Now(), Echo: e.echo})
			case launchErr:
				failure = &e.failure
				watchdog.Reset(stopSlack) // the guest ends by itself
			case guestDone:
				// Everything is on disk: there is nothing to wait for.
				done = &e.done
				for _, name := range slices.SortedFunc(maps.Keys(e.done.Phases), func(a, b string) int { return cmp.Compare(e.done.Phases[a], e.done.Phases[b]) }) {
					state.Phases = append(state.Phases, bundle.Mark{Name: name, After: time.Duration(e.done.Phases[name]), Guest: true})
				}
				s.machine.Kill()
			case readerEnd:
				lost = e.err
				if lost == nil {
					lost = io.EOF
				}
				if machineDone != nil && done == nil {
					watchdog.Reset(5 * time.Second) // it is about to end, or deaf
				}
			case stopAsked:
				if done == nil {
					stop(e)
				}
			case killAsked:
				killed = true
				s.machine.Kill()
			case signalled:
				if conn == nil {
					pending = append(pending, e)
					continue
				}
				deliver(e)
			case rewireAsked:
				rewiring = append(rewiring, e)
				if conn != nil && len(rewiring) == 1 {
					rewiring = s.rewire(conn, rewiring)
				}
			case rewireDone:
				if len(rewiring) > 0 {
					var err error
					if e.done.Message != "" {
						err = errors.New(e.done.Message)
					}
					rewiring[0].reply <- err
					rewiring = s.rewire(conn, rewiring[1:])
				}
			case outputEnd:
				// Nobody reads any more. A program would end by SIGPIPE now.
				s.log.Debug("standard output is closed", "error", e.err)
				if stopping == nil && done == nil {
					stop(stopAsked{})
				}
			case detachAsk:
				s.tell(startReport{Detached: true})
				s.letGoOfTerminal()
			}
		}
	}
	if ran { // and ended without a word
		started()
	}
	return s.verdict(state, s.machine.Wait(), done, failure, stopping != nil, killed, lost)
}

// rewire begins the first of what was asked for that can be begun, and returns those that are left with it.
func (s *supervisor) rewire(conn net.Conn, asked []rewireAsked) []rewireAsked {
	for ; len(asked) > 0; asked = asked[1:] {
		list, err := segments(s.bundle.Dir)
		if err == nil {
			err = s.plan.wire.SetSegments(list)
		}
		if err == nil {
			err = toGuest(conn, spec.FrameNetwork, guestNetwork(s.mode, s.plan.wire.Guest(), s.plan.wire.Ports()))
		}
		if err == nil {
			return asked
		}
		asked[0].reply <- err
	}
	return nil
}

// publish tells the watchers what the pod's state is now.
func (s *supervisor) publish(state bundle.State) {
	state.Containers = slices.Clone(state.Containers)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.latest = state
	if s.changed != nil {
		close(s.changed)
	}
	s.changed = make(chan struct{})
}

// watch writes the state to a client as it is and as it changes, until the client or the pod has gone.
func (s *supervisor) watch(ctx context.Context, c net.Conn) {
	for {
		s.mu.Lock()
		state, changed := s.latest, s.changed
		s.mu.Unlock()
		state.Version = bundle.Version
		b, err := json.Marshal(state)
		if err != nil || c.SetWriteDeadline(time.Now().Add(writePatience)) != nil || spec.WriteFrame(c, spec.FrameReport, b) != nil {
			c.Close() // who does not read misses what follows, and is to notice
			return
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

func (s *supervisor) update(state *bundle.State, news spec.State) {
	for i := range state.Containers {
		if state.Containers[i].Container == news.Container {
			state.Containers[i] = news
			return
		}
	}
	s.log.Warn("the guest speaks of an unknown container", "container", news.Container)
}

// verdict says how a start ended, for a person and for a caller.
func (s *supervisor) verdict(state *bundle.State, exit vmm.Exit, done *spec.Done, failure *spec.Failure, stopped, killed bool, lost error) bundle.End {
	if done != nil && failure == nil {
		end := bundle.End{Reason: bundle.EndDone}
		if stopped {
			end.Reason = bundle.EndStopped
		}
		end.ExitCode, end.Message = podExit(s.pod, state.Containers)
		if !done.Clean {
			s.log.Warn("a file system could not be unmounted", "message", done.Message)
		}
		return end
	}
	started := false
	for i := range state.Containers {
		c := &state.Containers[i]
		if c.Status != spec.StatusCreated {
			started = true
		}
		switch c.Status {
		case spec.StatusRunning, spec.StatusPaused, spec.StatusRestarting: // it died with its machine
			c.Status, c.Pid, c.ExitCode, c.Signal, c.Finished = spec.StatusExited, 0, 137, 9, time.Now().UTC()
			c.Error = "the machine ended: " + exit.Message
		}
	}
	end := bundle.End{ExitCode: exitOwnFailure}
	if started {
		end.ExitCode = 137
	}
	switch {
	case failure != nil:
		end.Reason, end.ExitCode = bundle.EndLaunch, exitOwnFailure
		end.Message = fmt.Sprintf("launch the pod: %s: %s", failure.Phase, failure.Message)
	case stopped && killed && !started:
		end.Reason, end.ExitCode = bundle.EndStopped, 137
	case killed:
		end.Reason, end.Message = bundle.EndStopped, "the machine was killed before it had stopped in order"
	case exit.Reason == vmm.HostMemory:
		end.Reason, end.Message = bundle.EndOOM, exit.Message
	case exit.Reason == vmm.GuestPanic:
		end.Reason, end.Message = bundle.EndPanic, exit.Message
	case exit.Reason == vmm.Killed:
		end.Reason, end.Message = bundle.EndMachine, fmt.Sprintf("the guest stopped answering (%v)", lost)
	case exit.Orderly():
		end.Reason, end.Message = bundle.EndPanic, "the guest ended without a last word: "+exit.Message
	default:
		end.Reason, end.Message = bundle.EndMachine, exit.Message
	}
	if end.Reason != bundle.EndLaunch && exit.Reason != vmm.Killed && strings.TrimSpace(exit.Console) != "" {
		end.Message += " (the kernel's log: " + filepath.Join(s.bundle.RunDir(), "console.log") + ")"
	}
	return end
}

// podExit is the exit code of a pod: the first failure of a critical container, in the pod's order. The message says why
// a container could not start.
func podExit(p *spec.Pod, states []spec.State) (code int, message string) {
	for i, c := range p.Containers {
		st := states[i]
		if c.NonCritical || st.ExitCode == 0 && st.Error == "" {
			continue
		}
		if st.Error != "" {
			message = st.Error
			if len(p.Containers) > 1 {
				message = c.Name + ": " + message
			}
			if st.ExitCode == 0 {
				return exitOwnFailure, message
			}
		}
		return st.ExitCode, message
	}
	return 0, ""
}

// clockEvery is how often the guest is to ask for the time.
const clockEvery = 30 * time.Second

func newStoppedTimer() *time.Timer {
	t := time.NewTimer(time.Hour)
	t.Stop()
	return t
}

// forwarded are the signals that go to the container, or that this process understands itself.
var forwarded = []os.Signal{
	unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGWINCH, unix.SIGCONT,
}

// twice is how soon the second Ctrl-C must follow the first to mean "now, please".
const twice = 2 * time.Second

// signals turns the signals of this process into events.
func (s *supervisor) signals(ctx context.Context, in <-chan os.Signal) {
	var last time.Time
	interrupts := 0
	for {
		select {
		case <-ctx.Done():
			return
		case sig := <-in:
			number := sig.(syscall.Signal)
			switch number {
			case unix.SIGWINCH:
				if s.opts.Terminal {
					s.resize(ctx)
				}
			case unix.SIGTERM:
				s.send(stopAsked{})
			case unix.SIGHUP:
				if !s.opts.Terminal { // with a terminal the parent is gone, and the container lives on
					s.send(stopAsked{})
				}
			case unix.SIGINT:
				if interrupts++; time.Since(last) > twice {
					interrupts = 1
				}
				last = time.Now()
				switch interrupts {
				case 1:
					s.send(signalled{signal: spec.Signal{Signal: int(number)}})
				case 2:
					if !s.detached {
						fmt.Fprintln(s.app.Stderr, "kcradle run: stopping; once more kills the machine")
					}
					s.send(stopAsked{})
				default:
					s.send(killAsked{})
				}
			default:
				s.send(signalled{signal: spec.Signal{Signal: int(number)}})
			}
		}
	}
}

// accept serves a listener until it is closed.
func (s *supervisor) accept(ctx context.Context, l net.Listener, serve func(context.Context, net.Conn), workers *sync.WaitGroup) {
	for {
		c, err := l.Accept()
		if errors.Is(err, net.ErrClosed) || ctx.Err() != nil {
			return
		}
		if err != nil { // out of descriptors, for example: it passes
			s.log.Warn("accept", "error", err)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
			continue
		}
		workers.Go(func() { serve(ctx, c) })
	}
}

// proxy carries bytes between a client and vdocker, each direction closed for itself.
func (s *supervisor) proxy(ctx context.Context, client net.Conn) {
	defer client.Close()
	guest, err := s.machine.Dial(ctx, spec.PortVdocker)
	if err != nil {
		s.log.Debug("a client of vdocker has no guest", "error", err)
		return
	}
	defer guest.Close()
	stop := context.AfterFunc(ctx, func() { client.Close(); guest.Close() })
	defer stop()
	answering, answered := context.WithCancel(ctx)
	defer answered()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := io.Copy(guest, client)
		closeWrite(guest, err)
		// A client that only listens now may go in silence; the guest would notice with its next byte, which may never come.
		dockerapi.AwaitGone(answering, client)
		guest.Close()
	}()
	_, err = io.Copy(client, guest)
	answered()
	// The guest has said everything: an answer is complete, whatever the client still wants to send.
	closeWrite(client, err)
	<-done
}

// closeWrite passes the end of one direction on; after an error both ends of the connection go.
func closeWrite(c net.Conn, err error) {
	if w, ok := c.(interface{ CloseWrite() error }); ok && err == nil {
		w.CloseWrite()
		return
	}
	c.Close()
}

// serveControl answers another kcradle: each frame is an order. The connection stays open until this process has given
// the bundle back and ends, so that its end tells of the pod's.
func (s *supervisor) serveControl(ctx context.Context, c net.Conn) {
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	var watching sync.WaitGroup
	defer watching.Wait()
	watchCtx, unwatch := context.WithCancel(ctx)
	defer unwatch()
	defer func() {
		if stop() { // the client is gone, the pod is not
			c.Close()
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.held = append(s.held, c)
	}()
	buf := make([]byte, 512)
	for {
		kind, payload, err := spec.ReadFrame(c, buf)
		if err != nil {
			break
		}
		switch kind {
		case spec.FrameStop:
			var o spec.Stop
			if json.Unmarshal(payload, &o) != nil || !s.send(stopAsked{o.Timeout}) {
				return
			}
		case spec.FrameSignal:
			e := signalled{reply: make(chan error, 1)}
			if json.Unmarshal(payload, &e.signal) != nil || !s.send(e) {
				return
			}
			select {
			case err := <-e.reply:
				if !answer(c, err) {
					return
				}
			case <-ctx.Done():
				return
			}
		case spec.FrameNetwork:
			e := rewireAsked{make(chan error, 1)}
			if !s.send(e) {
				return
			}
			select {
			case err := <-e.reply:
				if !answer(c, err) {
					return
				}
			case <-ctx.Done():
				return
			}
		case spec.FrameWatch:
			watching.Go(func() { s.watch(watchCtx, c) })
		default:
			return
		}
	}
}

// answer tells a client how its order went; false when it has gone.
func answer(c net.Conn, err error) bool {
	b, _ := json.Marshal(spec.Done{Message: text(err)}) // plain values
	return spec.WriteFrame(c, spec.FrameDone, b) == nil
}

func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
