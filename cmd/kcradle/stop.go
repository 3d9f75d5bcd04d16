package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"strconv"

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
		err = t.api().Do(ctx, "POST", t.path("/stop"), q, nil, nil)
	} else {
		err = t.bundle.Stop(ctx, timeout)
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.Stdout, arg)
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
		err = t.api().Do(ctx, "POST", t.path("/kill"), url.Values{"signal": {strconv.Itoa(int(sig))}}, nil, nil)
	case sig == 9:
		now := 0
		err = t.bundle.Stop(ctx, &now)
	default:
		err = t.bundle.Signal(ctx, spec.Signal{Signal: int(sig)})
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(a.Stdout, arg)
	return err
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
		if err := t.api().Do(ctx, "POST", t.path("/wait"), nil, nil, &answer); err != nil {
			return err
		}
		_, err = fmt.Fprintln(a.Stdout, answer.StatusCode)
		return err
	}
	c, err := t.bundle.DialControl(ctx)
	if err != nil {
		return err
	}
	if c != nil {
		defer c.Close()
		if err := bundle.AwaitEnd(ctx, c); err != nil {
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
		if err := b.Stop(ctx, &now); err != nil {
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
