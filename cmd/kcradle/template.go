package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/vmm"
	"github.com/kcradle/kcradle/vmm/template"
)

// templatesVariable is the environment variable of the disk budget.
const templatesVariable = "KCRADLE_TEMPLATES"

// templateStore is the store of templates, nil when the environment forbids it.
func templateStore(a *app) (*template.Store, error) {
	budget := int64(template.DefaultBudget)
	switch v := os.Getenv(templatesVariable); v {
	case "":
	case "off":
		return nil, nil
	default:
		n, err := units.RAMInBytes(v)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("%s=%q: want a size, or off", templatesVariable, v)
		}
		budget = n
	}
	return template.Open(filepath.Join(a.Root, "templates"), budget, a.Log), nil
}

// templates is the store for this start, nil when none may be used.
func (s *supervisor) templates(p *plan) (*template.Store, error) {
	if s.opts.NoTemplate || p.templatable() != nil {
		return nil, nil
	}
	return templateStore(s.app)
}

func newTemplate(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "template",
		Short: "Machines at rest, from which others start",
		Long: `A template is a machine that was stopped when it was ready for a pod. From it a machine is there in a tenth of a second,
without a boot. run makes one by itself after the first start of a machine of its kind, and uses it from then on: see
--no-template of kcradle run, and docs/templates.md.

Environment:
  KCRADLE_TEMPLATES   how much disk the templates may take (default 2GiB); off: none is made and none is used`,
		Example: `  kcradle template ls
  kcradle template warm /tmp/vm
  kcradle template rm --all`,
		Args: cobra.NoArgs,
	}
	cmd.AddCommand(newTemplateLs(a), newTemplateWarm(a), newTemplateRm(a))
	return cmd
}

// templateRow is a template as --json shows it.
type templateRow struct {
	Key     string
	Engine  string
	VCPUs   string
	Memory  string
	Network string
	Drives  int
	Created time.Time
	Used    time.Time
	Frozen  string // whether QEMU is in it, too: yes, no, or stale
	Size    int64  // bytes on disk
	Damage  string `json:",omitempty"` // why it is not used
}

func newTemplateLs(a *app) *cobra.Command {
	var asJSON, check bool
	cmd := &cobra.Command{
		Use:   "ls [flags]",
		Short: "List the templates",
		Long: `ls lists the templates, the one that was used last first. FROZEN says whether QEMU's process is in it, which makes starts fast
where QEMU emulates the processor; one that is stale was made before the host booted, or before a library of QEMU was
replaced, and the next start makes another. SIZE is what it takes on the disk. Of a damaged one it says what is wrong; the next
start that would use it sets it aside and makes another.`,
		Example: `  kcradle template ls
  kcradle template ls --check`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return listTemplates(cmd.Context(), a, asJSON, check) },
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, one array")
	cmd.Flags().BoolVar(&check, "check", false, "read the memory of each and compare it with what was written")
	return cmd
}

func listTemplates(ctx context.Context, a *app, asJSON, check bool) error {
	store, err := templateStore(a)
	if err != nil || store == nil {
		return errors.Join(err, errTemplatesOff(store))
	}
	list, damaged, err := store.List()
	if err != nil {
		return err
	}
	rows := []templateRow{}
	for _, t := range list {
		row := describeTemplate(t)
		if check {
			if err := t.Check(ctx); err != nil {
				row.Damage = err.Error()
			}
		}
		rows = append(rows, row)
	}
	for key, err := range damaged {
		rows = append(rows, templateRow{Key: key, Damage: err.Error()})
	}
	if asJSON {
		e := json.NewEncoder(a.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(rows)
	}
	w := tabwriter.NewWriter(a.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "KEY\tENGINE\tVCPUS\tMEMORY\tNETWORK\tDRIVES\tFROZEN\tCREATED\tUSED\tSIZE")
	for _, r := range rows {
		if r.Damage != "" {
			fmt.Fprintf(w, "%s\tdamaged: %s\n", r.Key, r.Damage)
			continue
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s ago\t%s ago\t%s\n", r.Key, r.Engine, r.VCPUs, r.Memory, r.Network, r.Drives, r.Frozen,
			units.HumanDuration(time.Since(r.Created)), units.HumanDuration(time.Since(r.Used)), units.HumanSize(float64(r.Size)))
	}
	return w.Flush()
}

func errTemplatesOff(store *template.Store) error {
	if store == nil {
		return fmt.Errorf("%s=off: there are no templates here", templatesVariable)
	}
	return nil
}

// describeTemplate reads QEMU's options as a person would.
func describeTemplate(t *template.Template) templateRow {
	row := templateRow{Key: t.Key, Network: "none", Frozen: "no", Created: t.Created, Used: t.Used, Size: t.Size}
	switch {
	case t.Stale():
		row.Frozen = "stale"
	case t.Frozen():
		row.Frozen = "yes"
	}
	args := t.Shape.Args
	for i := 0; i+1 < len(args); i++ {
		value := args[i+1]
		switch args[i] {
		case "-accel":
			row.Engine, _, _ = strings.Cut(value, ",")
		case "-smp":
			row.VCPUs = value
		case "-m":
			row.Memory = value + "iB"
		case "-netdev":
			row.Network = "user"
		case "-blockdev":
			row.Drives++
		}
	}
	return row
}

func newTemplateWarm(a *app) *cobra.Command {
	var o runOptions
	var quiet, again, noWait bool
	cmd := &cobra.Command{
		Use:   "warm [flags] DIR…",
		Short: "Make the templates that bundles would start from",
		Long: `warm boots a machine such as kcradle run would start for the bundle, lets it run a small program of its own, and keeps it
as a template. Nothing of the bundle goes into it. Where there is one already, nothing happens; while another process makes
one, warm waits.`,
		Example: `  kcradle template warm /tmp/vm
  kcradle template warm --network none -m 512m /tmp/vm`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeBundles(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			store, err := templateStore(a)
			if err != nil || store == nil {
				return errors.Join(err, errTemplatesOff(store))
			}
			for _, dir := range args {
				o.Dir = dir
				shape, _, err := warm(cmd.Context(), a, store, o, again, !noWait)
				if err != nil {
					return fmt.Errorf("%s: %w", dir, err)
				}
				if !quiet {
					fmt.Fprintln(a.Stdout, shape.Key())
				}
			}
			return nil
		},
	}
	f := cmd.Flags()
	machineFlags(f, &o)
	f.BoolVarP(&quiet, "quiet", "q", false, "do not print the key of each")
	f.BoolVar(&again, "again", false, "make it anew where there is one")
	f.BoolVar(&noWait, "no-wait", false, "fail while another process makes one")
	completeMachineFlags(cmd)
	return cmd
}

// makeTimeout bounds the making of a template, so that a machine that hangs does not stay for ever.
const makeTimeout = 3 * time.Minute

// warm makes the template that a bundle would start from, unless there is one and again is not set, and returns what kind of
// machine it is. While another process makes one it waits, or returns [template.ErrBusy].
func warm(ctx context.Context, a *app, store *template.Store, o runOptions, again, wait bool) (template.Shape, vmm.Config, error) {
	fail := func(err error) (template.Shape, vmm.Config, error) { return template.Shape{}, vmm.Config{}, err }
	b, err := bundle.Open(o.Dir)
	if err != nil {
		return fail(err)
	}
	pod, err := override(b.Pod, o)
	if err != nil {
		return fail(err)
	}
	p, err := makePlan(ctx, a, b, pod, o)
	if err != nil {
		return fail(err)
	}
	defer p.close()
	if err := p.templatable(); err != nil {
		return fail(err)
	}
	if err := p.connect(ctx, nil); err != nil {
		return fail(err)
	}
	shape, err := p.shape()
	if err != nil {
		return fail(err)
	}
	for {
		if t, err := store.Find(shape); err == nil && !again && !t.Stale() {
			return shape, p.config, nil
		}
		err := makeTemplate(ctx, a, store, p, shape)
		if !errors.Is(err, template.ErrBusy) || !wait {
			return shape, p.config, err
		}
		if err := store.Wait(ctx); err != nil {
			return fail(err)
		}
		// Perhaps it was this one.
	}
}

// makeTemplate makes the template of a plan.
func makeTemplate(ctx context.Context, a *app, store *template.Store, p *plan, shape template.Shape) error {
	ctx, cancel := context.WithTimeoutCause(ctx, makeTimeout, fmt.Errorf("it took longer than %v", makeTimeout))
	defer cancel()
	config := blankConfig(p.config)
	return store.Make(ctx, shape, config, func(ctx context.Context, m *vmm.Machine) error {
		return rehearse(ctx, m, filepath.Join(a.Root, "cache"), rehearsalNetwork(config.Wire))
	})
}

// blankConfig is the machine of a plan with nothing of its pod.
func blankConfig(c vmm.Config) vmm.Config {
	c.Name, c.Console = "kcradle:template", ""
	drives := c.Drives
	c.Drives = nil
	for _, d := range drives {
		c.Drives = append(c.Drives, vmm.Drive{Serial: d.Serial, ReadOnly: d.ReadOnly, Blank: true})
	}
	return c
}

func newTemplateRm(a *app) *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "rm [flags] [KEY…]",
		Short: "Remove templates",
		Long:  `rm removes templates. Machines that started from them go on.`,
		Example: `  kcradle template rm --all
  kcradle template rm 3f1c`,
		RunE: func(_ *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return usageError{errors.New("name the templates to remove, or say --all")}
			}
			return removeTemplates(a, args)
		},
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return templateKeys(a), cobra.ShellCompDirectiveNoFileComp
		},
	}
	cmd.Flags().BoolVarP(&all, "all", "a", false, "every one")
	return cmd
}

// templateKeys lists what can be removed.
func templateKeys(a *app) []string {
	root := *a
	if root.Root == "" {
		root.Root = defaultRoot()
	}
	if root.Log == nil {
		root.Log = slog.New(slog.DiscardHandler)
	}
	store, err := templateStore(&root)
	if err != nil || store == nil {
		return nil
	}
	list, damaged, err := store.List()
	if err != nil {
		return nil
	}
	var keys []string
	for _, t := range list {
		keys = append(keys, t.Key)
	}
	for key := range damaged {
		keys = append(keys, key)
	}
	return keys
}

// removeTemplates removes those whose keys begin as the words do, or all.
func removeTemplates(a *app, words []string) error {
	store, err := templateStore(a)
	if err != nil || store == nil {
		return errors.Join(err, errTemplatesOff(store))
	}
	keys := templateKeys(a)
	if len(words) > 0 {
		var want []string
		for _, w := range words {
			var found []string
			for _, k := range keys {
				if strings.HasPrefix(k, w) {
					found = append(found, k)
				}
			}
			if len(found) != 1 || w == "" {
				return fmt.Errorf("%d templates have a key that begins with %q (kcradle template ls)", len(found), w)
			}
			want = append(want, found[0])
		}
		keys = want
	}
	for _, k := range keys {
		if err := store.Remove(k); err != nil {
			return err
		}
		if _, err := fmt.Fprintln(a.Stdout, k); err != nil {
			return err
		}
	}
	return nil
}

// warmBeside makes the template of this start in a process of its own, which outlives this one and gives way to everything
// else on the host. What it has to say goes to a file beside the templates.
func warmBeside(a *app, o runOptions) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(a.Root, 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(a.Root, "template.log"), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	if o.Network == network.Shared { // a template is of a kind of wire, and is to be on no network
		o.Network = string(network.User)
	}
	args := append([]string{"--root", a.Root, "--log-level", logLevel(a.Log), "template", "warm", "--quiet", "--no-wait"}, o.machineArgs()...)
	cmd := exec.Command(self, append(args, "--", dir)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	_ = unix.Setpriority(unix.PRIO_PROCESS, cmd.Process.Pid, 19)
	return cmd.Process.Release()
}
