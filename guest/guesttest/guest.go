// Package guesttest starts a guest on a host, as root, in namespaces of its own, with directories where a machine has
// disks:
//
//	func TestMain(m *testing.M) { guesttest.Main(m, api) }
//	func TestX(t *testing.T) {
//		h := guesttest.Start(t, doc, map[string]string{"web": guesttest.Busybox(t)})
//		conn, err := h.DialVdocker(ctx)
//		…
//	}
package guesttest

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/guest"
	"github.com/kcradle/kcradle/guest/early"
	"github.com/kcradle/kcradle/guest/sandboxtest"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/spec"
)

const envGuest = "KCRADLE_GUESTTEST_GUEST"

// Busybox is sandboxtest.Busybox.
func Busybox(t testing.TB) string {
	t.Helper()
	return sandboxtest.Busybox(t)
}

// Main runs the tests of a package, or, in a process that Start made, the guest with that API.
func Main(m *testing.M, api guest.API) {
	if os.Getenv(envGuest) == "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread()
	if err := runGuest(api); err != nil {
		fmt.Fprintln(os.Stderr, "guesttest: guest:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// order is what Start tells the guest process, in the environment.
type order struct {
	Dir    string            // of the test: sockets, scratch, volumes
	Cgroup string            //
	Layers map[string]string // by diffID
}

func runGuest(api guest.API) error {
	if err := sandboxtest.Settle(); err != nil {
		return err
	}
	var o order
	if err := json.Unmarshal([]byte(os.Getenv(envGuest)), &o); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	return guest.Run(context.Background(), guest.Config{Machine: &fakeMachine{order: o}, API: api, Log: log})
}

// fakeMachine has directories of the host where a machine has disks, and sockets where it has a channel.
type fakeMachine struct{ order order }

func (m *fakeMachine) Early() (string, error) { return "", early.Controllers(m.order.Cgroup) }

func (m *fakeMachine) Channel(context.Context) (guest.Channel, error) { return m, nil }

// Clock tells the test by how much the clock would be set.
func (m *fakeMachine) Clock(now time.Time) error {
	f, err := os.OpenFile(filepath.Join(m.order.Dir, clockPipe), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintln(f, time.Until(now).Round(time.Second))
	return err
}

func (m *fakeMachine) Slew(time.Duration) error { return nil }

func (m *fakeMachine) Seed([]byte) error { return nil }

func (m *fakeMachine) Network(*spec.Network) error { return nil }

func (m *fakeMachine) Listen(port uint32) (net.Listener, error) {
	return net.Listen("unix", filepath.Join(m.order.Dir, strconv.Itoa(int(port))))
}

func (m *fakeMachine) Ready() {
	ready := os.NewFile(3, "ready")
	ready.Write([]byte{1})
	ready.Close()
}

func (m *fakeMachine) Mount(p *spec.Pod, _ *spec.Placement) (*guest.Mounts, error) {
	out := &guest.Mounts{
		Layers: m.order.Layers, Scratch: filepath.Join(m.order.Dir, "scratch"), Run: filepath.Join(m.order.Dir, "run"),
		Cgroup: m.order.Cgroup, Volumes: map[string]string{}, InitFile: os.Getenv(envInitFile),
	}
	for _, v := range p.Volumes {
		dir := filepath.Join(m.order.Dir, "volumes", v.Name)
		if err := os.MkdirAll(filepath.Join(dir, "lost+found"), 0o700); err != nil {
			return nil, err
		}
		out.Volumes[v.Name] = dir
	}
	return out, os.MkdirAll(out.Run, 0o755)
}

func (m *fakeMachine) Unmount() error { return nil }
func (m *fakeMachine) Clear() error   { return nil }

// clockPipe is where a guest says that its clock was set.
const clockPipe = "clock"

// envInitFile names a built cmd/init for tests of Container.Init.
const envInitFile = "KCRADLE_GUESTTEST_INIT"

// Host is the host's side of a guest.
type Host struct {
	t    testing.TB
	dir  string
	cmd  *exec.Cmd
	conn net.Conn
	read chan struct{} // closed when the control stream has ended
	sets *bufio.Reader // of the clock, see clockPipe

	mu      sync.Mutex // guards what follows, and writing to conn
	ahead   time.Duration
	changed chan struct{}
	output  map[int]*[3]strings.Builder
	states  map[string][]spec.State
	done    *spec.Done
	failure *spec.Failure
}

// Options are what a start may have beside the pod.
type Options struct {
	Placement spec.Placement
	Dir       string // of an earlier guest, whose disks are taken over; empty: new ones
}

// Start runs a pod. roots gives each container by name the directory of its image. Names, IDs and image configurations
// that are empty are filled in. The guest is stopped when the test ends.
func Start(t testing.TB, doc *spec.Pod, roots map[string]string) *Host {
	t.Helper()
	return StartWith(t, doc, roots, Options{})
}

// StartWith is Start with options.
func StartWith(t testing.TB, doc *spec.Pod, roots map[string]string, opts Options) *Host {
	t.Helper()
	need.Root(t)
	h := newHost(t)
	h.dir = opts.Dir
	if h.dir == "" {
		dir, err := os.MkdirTemp("", "kcradle-guest-") // t.TempDir is too long for a socket's name
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		h.dir = dir
	}
	for _, s := range []uint32{spec.PortControl, spec.PortVdocker, spec.PortShare} {
		os.Remove(filepath.Join(h.dir, strconv.Itoa(int(s))))
	}
	o := order{Dir: h.dir, Layers: map[string]string{}}
	for name, dir := range roots {
		c := doc.Container(name)
		if c == nil {
			t.Fatalf("the pod has no container %q", name)
		}
		if c.Image.Layers == nil {
			c.Image.Layers = []string{"sha256:" + hexOf("layer", dir)}
			o.Layers[c.Image.Layers[0]] = dir
		}
	}
	pipe := filepath.Join(h.dir, clockPipe)
	if err := unix.Mkfifo(pipe, 0o600); err != nil && !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	sets, err := os.OpenFile(pipe, os.O_RDWR, 0) // no writer waits for us
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sets.Close() })
	h.sets = bufio.NewReader(sets)
	cgroup, remove, err := sandboxtest.MakeCgroup()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(remove)
	o.Cgroup = cgroup

	env, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer ready.Close()
	h.cmd = exec.Command("/proc/self/exe")
	h.cmd.Args[0] = os.Args[0]
	h.cmd.Env = append(os.Environ(), envGuest+"="+string(env))
	h.cmd.Stdout, h.cmd.Stderr = os.Stderr, os.Stderr
	h.cmd.ExtraFiles = []*os.File{theirs}
	h.cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: sandboxtest.Namespaces}
	err = h.cmd.Start()
	theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.end)
	if _, err := io.ReadFull(ready, make([]byte, 1)); err != nil {
		t.Fatalf("guest did not become ready: %v", err)
	}
	if h.conn, err = net.Dial("unix", filepath.Join(h.dir, strconv.Itoa(int(spec.PortControl)))); err != nil {
		t.Fatal(err)
	}
	h.launch(doc, &opts.Placement)
	return h
}

func newHost(t testing.TB) *Host {
	return &Host{
		t: t, read: make(chan struct{}), changed: make(chan struct{}),
		output: map[int]*[3]strings.Builder{}, states: map[string][]spec.State{},
	}
}

// Launch launches a pod over the control stream of a guest that somebody else started.
func Launch(t testing.TB, conn net.Conn, doc *spec.Pod, place *spec.Placement) *Host {
	t.Helper()
	h := newHost(t)
	h.conn = conn
	t.Cleanup(func() {
		conn.Close()
		<-h.read
	})
	h.launch(doc, place)
	return h
}

func (h *Host) launch(doc *spec.Pod, place *spec.Placement) {
	h.t.Helper()
	if doc.Version == 0 {
		doc.Version = spec.PodVersion
	}
	if doc.Name == "" {
		doc.Name = "pod"
	}
	for i := range doc.Containers {
		c := &doc.Containers[i]
		if c.ID == "" {
			c.ID = hexOf("container", c.Name)
		}
		if c.Image.ConfigID == "" {
			c.Image.ConfigID = "sha256:" + hexOf("image", c.Name)
		}
	}
	b, err := doc.Encode()
	if err != nil {
		h.t.Fatal(err)
	}
	p, err := json.Marshal(place)
	if err != nil {
		h.t.Fatal(err)
	}
	go h.receive()
	if err := errors.Join(spec.WriteFrame(h.conn, spec.FramePod, b), spec.WriteFrame(h.conn, spec.FramePlacement, p)); err != nil {
		h.t.Fatal(err)
	}
}

func hexOf(parts ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(parts, "\x00")))
	return hex.EncodeToString(sum[:])
}

func (h *Host) end() {
	if h.conn != nil {
		h.conn.Close() // an order to stop
		<-h.read
	}
	killed := time.AfterFunc(patience, func() { h.cmd.Process.Kill() })
	if err := h.cmd.Wait(); err != nil && killed.Stop() {
		h.t.Errorf("guest: %v", err)
	} else if err != nil {
		h.t.Errorf("guest did not end within %v after its host went away", patience)
	}
	killed.Stop()
}

func (h *Host) receive() {
	defer close(h.read)
	for {
		kind, b, err := spec.ReadFrame(h.conn, nil)
		h.mu.Lock()
		switch {
		case err != nil:
		case kind == spec.FrameOutput:
			o, perr := spec.ParseOutput(b)
			if perr != nil {
				h.t.Error(perr)
				break
			}
			if h.output[o.Container] == nil {
				h.output[o.Container] = &[3]strings.Builder{}
			}
			h.output[o.Container][o.Stream].Write(o.Bytes)
		case kind == spec.FrameState:
			var s spec.State
			if jerr := json.Unmarshal(b, &s); jerr != nil {
				h.t.Error(jerr)
			}
			h.states[s.Container] = append(h.states[s.Container], s)
		case kind == spec.FrameDone:
			h.done = &spec.Done{}
			if jerr := json.Unmarshal(b, h.done); jerr != nil {
				h.t.Error(jerr)
			}
		case kind == spec.FrameError:
			h.failure = &spec.Failure{}
			if jerr := json.Unmarshal(b, h.failure); jerr != nil {
				h.t.Error(jerr)
			}
		case kind == spec.FrameClock:
			c, perr := spec.ParseClock(b)
			if perr != nil {
				h.t.Error(perr)
				break
			}
			c.Now = time.Now().Add(h.ahead)
			_ = spec.WriteFrame(h.conn, spec.FrameClock, c.Append(nil)) // it may be about to end
		default:
			h.t.Errorf("frame %q came from the guest", kind)
		}
		close(h.changed)
		h.changed = make(chan struct{})
		over := err != nil || h.done != nil
		h.mu.Unlock()
		if over {
			return
		}
	}
}

// patience is far above what anything here takes, even where several machines are emulated at once.
const patience = 90 * time.Second

// await waits until met, called with mu held, says so.
func (h *Host) await(what string, met func() bool) {
	h.t.Helper()
	timeout := time.After(patience)
	for {
		h.mu.Lock()
		ok, changed := met(), h.changed
		h.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-changed:
		case <-h.read:
			h.mu.Lock()
			ok := met()
			h.mu.Unlock()
			if !ok {
				h.t.Fatalf("the guest ended before %s", what)
			}
			return
		case <-timeout:
			h.t.Fatalf("no %s within %v", what, patience)
		}
	}
}

// Dir is what StartWith takes as Options.Dir to go on with the same disks.
func (h *Host) Dir() string { return h.dir }

// DialVdocker connects to the API.
func (h *Host) DialVdocker(ctx context.Context) (net.Conn, error) {
	return (&net.Dialer{}).DialContext(ctx, "unix", filepath.Join(h.dir, strconv.Itoa(int(spec.PortVdocker))))
}

// Send sends a frame with a JSON payload.
func (h *Host) Send(kind byte, v any) {
	h.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		h.t.Fatal(err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := spec.WriteFrame(h.conn, kind, b); err != nil {
		h.t.Fatal(err)
	}
}

// SetClock sets the host's clock, as far as the guest can see, to so much more than this machine's. It returns by how much the
// guest set its own, rounded to seconds.
func (h *Host) SetClock(ahead time.Duration) string {
	h.t.Helper()
	h.mu.Lock()
	h.ahead = ahead
	err := spec.WriteFrame(h.conn, spec.FrameClock, spec.Clock{}.Append(nil))
	h.mu.Unlock()
	if err != nil {
		h.t.Fatal(err)
	}
	line, err := h.sets.ReadString('\n')
	if err != nil {
		h.t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// Done waits for the guest's last word.
func (h *Host) Done() spec.Done {
	h.t.Helper()
	h.await("last frame", func() bool { return h.done != nil })
	return *h.done
}

// Ended waits for the guest to end the stream.
func (h *Host) Ended() {
	h.t.Helper()
	select {
	case <-h.read:
	case <-time.After(patience):
		h.t.Fatalf("the guest did not end the stream within %v", patience)
	}
}

// Failure waits for the launch to fail.
func (h *Host) Failure() spec.Failure {
	h.t.Helper()
	h.await("failure", func() bool { return h.failure != nil })
	return *h.failure
}

// State waits until a container's state is as met wants it and returns it.
func (h *Host) State(name string, met func(spec.State) bool) spec.State {
	h.t.Helper()
	var out spec.State
	h.await("wanted state of "+name, func() bool {
		for _, s := range h.states[name] {
			if met(s) {
				out = s
				return true
			}
		}
		return false
	})
	return out
}

// Status waits for a container to have had a status.
func (h *Host) Status(name, status string) spec.State {
	h.t.Helper()
	return h.State(name, func(s spec.State) bool { return s.Status == status })
}

// Output is what came so far of a stream (1 stdout, 2 stderr) of the container at an index.
func (h *Host) Output(index int, stream byte) string {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.output[index] == nil {
		return ""
	}
	return h.output[index][stream].String()
}

// AwaitOutput waits until the output of a container holds a text.
func (h *Host) AwaitOutput(index int, stream byte, text string) {
	h.t.Helper()
	h.await(fmt.Sprintf("output %q", text), func() bool {
		return h.output[index] != nil && strings.Contains(h.output[index][stream].String(), text)
	})
}
