package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/vmm"
	"github.com/kcradle/kcradle/vmm/pool"
	"github.com/kcradle/kcradle/vmm/template"
)

// poolDir is where the pool of a state directory lives.
func poolDir(a *app) string { return filepath.Join(a.Root, "pool") }

func poolSocket(a *app) string { return filepath.Join(poolDir(a), "pool.sock") }

type poolOptions struct {
	Size, Limit int
	Reserve     string
	Status      bool
	JSON        bool
	Run         runOptions
	Dirs        []string
}

func newPool(a *app) *cobra.Command {
	var o poolOptions
	cmd := &cobra.Command{
		Use:   "pool [flags] [DIR…]",
		Short: "Keep machines ready, for the next starts",
		Long: `pool keeps machines that were restored and have rehearsed a start. They stand still, and take no processor time; the next
kcradle run takes one and has only to launch its pod. Which kinds it keeps, the pool learns from the starts that ask for
them, after a template was made; the bundles on the command line it has ready from the beginning.

It runs until it is ended. Pods that took a machine do not need it any more.`,
		Example: `  kcradle pool --size 8 &
  kcradle pool --network none /tmp/vm
  kcradle pool --status`,
		ValidArgsFunction: completeBundles(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Dirs = args
			if o.Status {
				return poolStatus(cmd.Context(), a, o)
			}
			return runPool(cmd.Context(), a, o)
		},
	}
	f := cmd.Flags()
	f.IntVar(&o.Size, "size", 4, "how many machines of a kind to keep ready")
	f.IntVar(&o.Limit, "limit", 16, "how many machines to keep ready altogether")
	f.StringVar(&o.Reserve, "reserve", "1g", "memory of the host that stays available: below it no machine is made")
	f.BoolVar(&o.Status, "status", false, "show what the running pool has, and end")
	f.BoolVar(&o.JSON, "json", false, "with --status: as JSON")
	machineFlags(f, &o.Run)
	completeMachineFlags(cmd)
	return cmd
}

func runPool(ctx context.Context, a *app, o poolOptions) error {
	store, err := templateStore(a)
	if err != nil || store == nil {
		return errors.Join(err, errTemplatesOff(store))
	}
	reserve, err := byteSize("--reserve", o.Reserve)
	if err != nil {
		return err
	}
	cfg := pool.Config{Store: store, Size: o.Size, Limit: o.Limit, Log: a.Log, Prepare: func(ctx context.Context, m *vmm.Machine, r pool.Request) error {
		return prepare(ctx, a, m, r)
	}}
	if reserve != nil {
		cfg.Reserve = *reserve
	}
	p, err := pool.New(cfg)
	if err != nil {
		return usageError{err}
	}
	for _, dir := range o.Dirs {
		r, err := wanted(ctx, a, store, o.Run, dir)
		if err != nil {
			return fmt.Errorf("%s: %w", dir, err)
		}
		p.Want(r)
	}
	lock, err := lockPool(a)
	if err != nil {
		return err
	}
	defer lock.Close()
	l, err := pool.Listen(poolSocket(a))
	if err != nil {
		return err
	}
	defer os.Remove(poolSocket(a))
	return p.Serve(ctx, l)
}

// lockPool makes this process the only pool of the state directory.
func lockPool(a *app) (*os.File, error) {
	if err := os.MkdirAll(poolDir(a), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(filepath.Join(poolDir(a), "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		f.Close()
		return nil, fmt.Errorf("a pool runs already for %s (kcradle pool --status)", a.Root)
	}
	return f, nil
}

// wanted is what a start of a bundle would ask for. The template is made if there is none.
func wanted(ctx context.Context, a *app, store *template.Store, o runOptions, dir string) (pool.Request, error) {
	o.Dir = dir
	shape, config, err := warm(ctx, a, store, o, false, true)
	return pool.Request{Shape: shape, Config: poolConfig(config)}, err
}

// poolConfig is a machine of a plan's shape that belongs to nobody.
func poolConfig(c vmm.Config) vmm.Config {
	c = blankConfig(c)
	c.RunAs = nil
	if c.Wire != nil {
		c.Wire = &vmm.Wire{Kind: c.Wire.Kind, MTU: c.Wire.MTU}
	}
	return c
}

// prepare rehearses a machine with a network as a pod's would be.
func prepare(ctx context.Context, a *app, m *vmm.Machine, r pool.Request) error {
	for range template.Rehearsals {
		if err := rehearse(ctx, m, filepath.Join(a.Root, "cache"), rehearsalNetwork(r.Config.Wire)); err != nil {
			return err
		}
	}
	return nil
}

func poolStatus(ctx context.Context, a *app, o poolOptions) error {
	st, err := pool.Ask(ctx, poolSocket(a))
	if err != nil {
		return err
	}
	if o.JSON {
		e := json.NewEncoder(a.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(st)
	}
	w := tabwriter.NewWriter(a.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "TEMPLATE\tREADY\tTAKEN\tASKED")
	for _, s := range st.Shapes {
		fmt.Fprintf(w, "%s\t%d\t%d\t%d\n", s.Key, s.Ready, s.Taken, s.Asked)
	}
	return w.Flush()
}
