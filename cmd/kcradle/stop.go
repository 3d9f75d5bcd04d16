package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/url"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/image"
	"github.com/kcradle/kcradle/spec"
)

func newStop(a *app) *cobra.Command {
	var timeout int
	cmd := &cobra.Command{
		Use:   "stop [flags] DIR[:CONTAINER]…",
		Short: "Stop pods in order, or single containers",
		Long: `stop asks every container to end (by its stop signal), kills it after its grace, writes the disks and switches the
machine off. DIR:CONTAINER stops one container, as docker stop does, and the machine stays up.`,
		Example: `  kcradle stop /tmp/vm
  kcradle stop -t 60 /tmp/vm
  kcradle stop /tmp/shop:web`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeBundles(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			var t *int
			if cmd.Flags().Changed("time") {
				t = &timeout
			}
			return each(args, func(arg string) error { return stop(cmd.Context(), a, arg, t) })
		},
	}
	cmd.Flags().IntVarP(&timeout, "time", "t", 10, "seconds until the container is killed; -1 waits for ever (default: the container's own)")
	return cmd
}

// each does something with every argument, and prints those that went well, as docker does.
func each(args []string, f func(string) error) error {
	var errs []error
	for _, arg := range args {
		errs = append(errs, f(arg))
	}
	return errors.Join(errs...)
}

func stop(ctx context.Context, a *app, arg string, timeout *int) error {
	t, err := openTarget(arg)
	if err != nil {
		return err
	}
	if t.named {
		q := url.Values{}
		if timeout != nil {
			q.Set("t", strconv.Itoa(*timeout))
		}
		err = newClient(t.bundle).do(ctx, "POST", t.path("/stop"), q, nil, nil)
	} else {
		err = stopPod(ctx, t.bundle, timeout)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.Stdout, arg)
	return err
}

// stopPod stops a pod and waits until its supervisor has given the bundle back. A pod that does not run is stopped.
func stopPod(ctx context.Context, b *bundle.Bundle, timeout *int) error {
	c, err := dialControl(ctx, b)
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
	return waitControl(ctx, c)
}

// dialControl connects to the supervisor of a bundle; nil without an error when there is none.
func dialControl(ctx context.Context, b *bundle.Bundle) (net.Conn, error) {
	// A supervisor that has just begun, or is about to end, holds the lock without listening.
	for wait := 2 * time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		pid, running := b.Running()
		if !running {
			return nil, nil
		}
		c, err := dialIn(ctx, b.RunDir(), controlSocket)
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

// waitControl waits for the end of the connection, which is the end of the supervisor.
func waitControl(ctx context.Context, c net.Conn) error {
	stop := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	_, err := io.Copy(io.Discard, c)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var reset *net.OpError
	if errors.As(err, &reset) { // it was killed: gone as well
		return nil
	}
	return err
}

func newKill(a *app) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "kill [flags] DIR[:CONTAINER]…",
		Short: "Send a signal to a pod's first container, or to the named one",
		Long: `kill sends a signal. Without a container KILL ends the whole pod at once, though its disks are still written; any
other signal goes to the first container. DIR:CONTAINER is docker kill on that container.`,
		Example: `  kcradle kill /tmp/vm
  kcradle kill -s HUP /tmp/vm
  kcradle kill -s USR1 /tmp/shop:web`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeBundles(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return each(args, func(arg string) error { return kill(cmd.Context(), a, arg, name) })
		},
	}
	cmd.Flags().StringVarP(&name, "signal", "s", "KILL", "signal, by name or number")
	return cmd
}

func kill(ctx context.Context, a *app, arg, name string) error {
	sig, err := parseSignal(name)
	if err != nil {
		return err
	}
	t, err := openTarget(arg)
	if err != nil {
		return err
	}
	if _, running := t.bundle.Running(); !running {
		return fmt.Errorf("%s is not running", t)
	}
	switch {
	case t.named:
		err = newClient(t.bundle).do(ctx, "POST", t.path("/kill"), url.Values{"signal": {strconv.Itoa(int(sig))}}, nil, nil)
	case sig == 9:
		now := 0
		err = stopPod(ctx, t.bundle, &now)
	default:
		err = signalPod(ctx, t.bundle, spec.Signal{Signal: int(sig)})
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.Stdout, arg)
	return err
}

func signalPod(ctx context.Context, b *bundle.Bundle, s spec.Signal) error {
	c, err := dialControl(ctx, b)
	if err != nil {
		return err
	}
	if c == nil {
		return fmt.Errorf("%s is not running", b.Dir)
	}
	defer c.Close()
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	raw, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := spec.WriteFrame(c, spec.FrameSignal, raw); err != nil {
		return fmt.Errorf("signal %s: %w", b.Dir, err)
	}
	_, answer, err := spec.ReadFrame(c, nil)
	if err != nil {
		return fmt.Errorf("signal %s: %w", b.Dir, err)
	}
	var done spec.Done
	if err := json.Unmarshal(answer, &done); err != nil {
		return fmt.Errorf("signal %s: %w", b.Dir, err)
	}
	if done.Message != "" {
		return fmt.Errorf("signal %s: %s", b.Dir, done.Message)
	}
	return nil
}

func newWait(a *app) *cobra.Command {
	return &cobra.Command{
		Use:               "wait DIR[:CONTAINER]",
		Short:             "Wait until a pod or a container has ended and print its exit code",
		Example:           "  kcradle run -d /tmp/job && kcradle wait /tmp/job",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeContainers(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return wait(cmd.Context(), a, args[0])
		},
	}
}

func wait(ctx context.Context, a *app, arg string) error {
	t, err := openTarget(arg)
	if err != nil {
		return err
	}
	if t.named {
		var answer struct{ StatusCode int }
		if err := newClient(t.bundle).do(ctx, "POST", t.path("/wait"), nil, nil, &answer); err != nil {
			return err
		}
		_, err = fmt.Fprintln(a.Stdout, answer.StatusCode)
		return err
	}
	c, err := dialControl(ctx, t.bundle)
	if err != nil {
		return err
	}
	if c != nil {
		defer c.Close()
		if err := waitControl(ctx, c); err != nil {
			return err
		}
	}
	st, started, err := t.bundle.State()
	if err != nil {
		return err
	}
	if !started || st.End == nil {
		return fmt.Errorf("%s was never run", t)
	}
	if st.End.Message != "" {
		a.Log.Info("the pod has ended", "reason", st.End.Reason, "message", st.End.Message)
	}
	_, err = fmt.Fprintln(a.Stdout, st.End.ExitCode)
	return err
}

func newRm(a *app) *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm [flags] DIR…",
		Short: "Remove bundles with their disks, volumes and logs",
		Example: `  kcradle rm /tmp/vm
  kcradle rm -f /tmp/vm   # stops it first, without grace`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeBundles(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return each(args, func(arg string) error { return rm(cmd.Context(), a, arg, force) })
		},
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill a pod that runs; a bundle that is not there is no error")
	return cmd
}

func rm(ctx context.Context, a *app, dir string, force bool) error {
	b, err := bundle.Open(dir)
	if err != nil {
		if force && errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	}
	if force {
		now := 0
		if err := stopPod(ctx, b, &now); err != nil {
			return err
		}
	}
	if err := b.Remove(); err != nil {
		if errors.Is(err, bundle.ErrRunning) {
			return fmt.Errorf("%w; stop it first: kcradle stop %s, or rm -f", err, dir)
		}
		return err
	}
	if b.Meta.Store != "" {
		store, err := image.Open(b.Meta.Store, a.Log)
		if err == nil {
			err = store.Release(ctx, b.Dir)
		}
		if err != nil { // garbage collection notices by itself that the bundle is gone
			a.Log.Debug("the layers stay leased for now", "error", err)
		}
	}
	_, err = fmt.Fprintln(a.Stdout, dir)
	return err
}
