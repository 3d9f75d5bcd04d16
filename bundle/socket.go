package bundle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/spec"
)

// Sockets in the run directory, served by the supervisor.
const (
	VdockerSocket = "vdocker.sock" // the Docker Engine API of the pod
	ControlSocket = "control.sock" // frames of spec/control.go: Stop, Signal, Network and Watch in; closed when the pod has ended
)

// Listen listens on a socket in the run directory, which only the owner can connect to. The directory's path may have any
// length: a socket's name is bounded, that of a descriptor is short.
func (b *Bundle) Listen(name string) (net.Listener, error) {
	d, err := os.OpenFile(b.RunDir(), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	defer d.Close()
	old := unix.Umask(0o177)
	l, err := net.Listen("unix", "/proc/self/fd/"+strconv.Itoa(int(d.Fd()))+"/"+name)
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", filepath.Join(b.RunDir(), name), err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	return &namedListener{l, filepath.Join(b.RunDir(), name)}, nil
}

// namedListener removes the socket's name when it is closed: its own name is gone with the descriptor.
type namedListener struct {
	net.Listener
	path string
}

func (l *namedListener) Close() error {
	os.Remove(l.path)
	return l.Listener.Close()
}

// Dial is the other side of Listen.
func (b *Bundle) Dial(ctx context.Context, name string) (net.Conn, error) {
	d, err := os.OpenFile(b.RunDir(), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var dialer net.Dialer
	return dialer.DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(int(d.Fd()))+"/"+name)
}

// DialVdocker connects to the Docker Engine API of a running pod.
func (b *Bundle) DialVdocker(ctx context.Context) (net.Conn, error) {
	c, err := b.Dial(ctx, VdockerSocket)
	if err != nil {
		if _, running := b.Running(); !running {
			return nil, fmt.Errorf("%s is not running (start it: kcradle run -d %s)", b.Dir, b.Dir)
		}
		return nil, err
	}
	return c, nil
}

// DialControl connects to the supervisor; nil without an error when there is none.
func (b *Bundle) DialControl(ctx context.Context) (net.Conn, error) {
	// A supervisor that has just begun, or is about to end, holds the lock without listening.
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		pid, running := b.Running()
		if !running {
			return nil, nil
		}
		c, err := b.Dial(ctx, ControlSocket)
		if err == nil {
			return c, nil
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return nil, fmt.Errorf("reach the supervisor (pid %d) of %s: %w", pid, b.Dir, err)
		}
	}
}

// AwaitEnd waits for the end of a control connection, which is the end of the supervisor.
func AwaitEnd(ctx context.Context, c net.Conn) error {
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := io.Copy(io.Discard, c)
	return ended(ctx, err)
}

// ended is err without what the end of a supervisor looks like.
func ended(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if _, reset := errors.AsType[*net.OpError](err); reset || errors.Is(err, io.EOF) { // it was killed: gone as well
		return nil
	}
	return err
}

// Stop stops the pod and waits until its supervisor has given the bundle back. A pod that does not run is stopped. timeout
// is in seconds; nil: each container's own.
func (b *Bundle) Stop(ctx context.Context, timeout *int) error {
	c, err := b.DialControl(ctx)
	if c == nil || err != nil {
		return err
	}
	defer c.Close()
	raw, err := json.Marshal(spec.Stop{Timeout: timeout})
	if err != nil {
		return err
	}
	if err := spec.WriteFrame(c, spec.FrameStop, raw); err != nil {
		return fmt.Errorf("stop %s: %w", b.Dir, err)
	}
	return AwaitEnd(ctx, c)
}

// Signal sends a signal to a container of the running pod.
func (b *Bundle) Signal(ctx context.Context, s spec.Signal) error {
	raw, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := b.order(ctx, spec.FrameSignal, raw); err != nil {
		return fmt.Errorf("signal %s: %w", b.Dir, err)
	}
	return nil
}

// Rewire tells the supervisor that the file which says what networks the pod is on has changed, and waits until the pod is on
// those.
func (b *Bundle) Rewire(ctx context.Context) error {
	if err := b.order(ctx, spec.FrameNetwork, nil); err != nil {
		return fmt.Errorf("change the networks of %s: %w", b.Dir, err)
	}
	return nil
}

// order gives the supervisor an order and waits until it was carried out.
func (b *Bundle) order(ctx context.Context, kind byte, payload []byte) error {
	c, err := b.DialControl(ctx)
	if err != nil {
		return err
	}
	if c == nil {
		return errors.New("it is not running")
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := spec.WriteFrame(c, kind, payload); err != nil {
		return err
	}
	_, answer, err := spec.ReadFrame(c, nil)
	if err != nil {
		return err
	}
	var done spec.Done
	if err := json.Unmarshal(answer, &done); err != nil {
		return err
	}
	if done.Message != "" {
		return errors.New(done.Message)
	}
	return nil
}

// Watch calls fn with the state as it is and as it changes, until the supervisor has ended: nil then. A state may be left
// out when a newer one is there already. A pod that does not run is not watched.
func (b *Bundle) Watch(ctx context.Context, fn func(State)) error {
	c, err := b.DialControl(ctx)
	if c == nil || err != nil {
		return err
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	if err := spec.WriteFrame(c, spec.FrameWatch, nil); err != nil {
		return fmt.Errorf("watch %s: %w", b.Dir, err)
	}
	buf := make([]byte, 4096)
	for {
		kind, payload, err := spec.ReadFrame(c, buf)
		if err != nil {
			return ended(ctx, err)
		}
		if kind != spec.FrameReport {
			continue
		}
		var s State
		if err := json.Unmarshal(payload, &s); err != nil {
			return fmt.Errorf("watch %s: %w", b.Dir, err)
		}
		fn(s)
	}
}
