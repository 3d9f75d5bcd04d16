package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"text/template"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/spec"
)

type psOptions struct {
	Dirs   []string
	All    bool
	JSON   bool
	Format string
	Quiet  bool
}

func newPs(a *app) *cobra.Command {
	var o psOptions
	cmd := &cobra.Command{
		Use:   "ps [flags] [DIR…]",
		Short: "List bundles and their containers",
		Long: `ps lists the containers of the bundles that this host knows (those that were summoned or run with the same --root),
or of the given ones: the running ones, with -a all.`,
		Example: `  kcradle ps -a
  kcradle ps --json /tmp/vm
  kcradle ps --format '{{.Dir}} {{.Status}}'`,
		ValidArgsFunction: completeBundles(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Dirs = args
			return ps(a, o)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&o.All, "all", "a", false, "also those that do not run")
	f.BoolVar(&o.JSON, "json", false, "as JSON, one array")
	f.StringVar(&o.Format, "format", "", "a Go `template` for each container, with the fields of --json")
	f.BoolVarP(&o.Quiet, "quiet", "q", false, "only the directories")
	cmd.MarkFlagsMutuallyExclusive("json", "format", "quiet")
	return cmd
}

// psRow is one container of the listing.
type psRow struct {
	Dir       string
	Pod       string
	Name      string
	ID        string
	Image     string
	Command   string
	State     string // docker's: created, running, …
	Status    string // for a person
	ExitCode  int
	Health    string
	Engine    string
	Pid       int // of the supervisor
	Ports     string
	CreatedAt time.Time
	Reason    string // how the last start ended
	Message   string
}

func ps(a *app, o psOptions) error {
	dirs := o.Dirs
	all := o.All || len(dirs) > 0
	if len(dirs) == 0 {
		var err error
		if dirs, err = bundle.Known(a.Root); err != nil {
			return err
		}
	}
	rows := []psRow{}
	var errs []error
	for _, dir := range dirs {
		b, err := bundle.Open(dir)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		more, err := psRows(b, time.Now())
		if err != nil {
			errs = append(errs, err)
			continue
		}
		for _, r := range more {
			if all || r.Pid != 0 {
				rows = append(rows, r)
			}
		}
	}
	if err := o.print(a.Stdout, rows); err != nil {
		return err
	}
	return errors.Join(errs...)
}

func psRows(b *bundle.Bundle, now time.Time) ([]psRow, error) {
	st, started, err := b.State()
	if err != nil {
		return nil, err
	}
	var out []psRow
	for i, c := range b.Pod.Containers {
		r := psRow{Dir: b.Dir, Pod: b.Pod.Name, Name: c.Name, ID: c.ID, Image: c.Image.Ref, State: spec.StatusCreated,
			Status: "Created", Command: quoteCommand(c.Args()), CreatedAt: c.Created, Engine: st.Engine}
		if started && st.Phase != bundle.PhaseEnded {
			r.Pid, r.Ports = st.Pid, portList(st.Ports)
		}
		if started && i < len(st.Containers) {
			cs := st.Containers[i]
			r.State, r.ExitCode, r.Health, r.Status = cs.Status, cs.ExitCode, cs.Health, statusText(cs, now)
		}
		if started && st.Phase == bundle.PhaseStarting {
			r.State, r.Status = "starting", "Starting"
		}
		if st.End != nil {
			r.Reason, r.Message = st.End.Reason, st.End.Message
		}
		out = append(out, r)
	}
	return out, nil
}

// statusText is docker's STATUS column.
func statusText(s spec.State, now time.Time) string {
	switch s.Status {
	case spec.StatusRunning, spec.StatusPaused:
		text := "Up " + units.HumanDuration(now.Sub(s.Started))
		if s.Health != "" {
			health := s.Health
			if health == "starting" {
				health = "health: starting"
			}
			text += " (" + health + ")"
		}
		if s.Status == spec.StatusPaused {
			text += " (Paused)"
		}
		return text
	case spec.StatusExited, spec.StatusDead, spec.StatusRestarting:
		if s.Finished.IsZero() { // nobody was there to see it
			return fmt.Sprintf("Exited (%d)", s.ExitCode)
		}
	}
	switch s.Status {
	case spec.StatusRestarting:
		return fmt.Sprintf("Restarting (%d) %s ago", s.ExitCode, units.HumanDuration(now.Sub(s.Finished)))
	case spec.StatusExited, spec.StatusDead:
		return fmt.Sprintf("Exited (%d) %s ago", s.ExitCode, units.HumanDuration(now.Sub(s.Finished)))
	}
	return "Created"
}

// portList is docker's PORTS column.
func portList(ports []spec.Port) string {
	var out []string
	for _, p := range ports {
		ip := p.HostIP
		if ip == "" {
			ip = "0.0.0.0"
		}
		out = append(out, net.JoinHostPort(ip, strconv.Itoa(int(p.HostPort)))+"->"+strconv.Itoa(int(p.ContainerPort))+"/"+p.Proto)
	}
	return strings.Join(out, ", ")
}

func quoteCommand(args []string) string {
	s := strings.Join(args, " ")
	if r := []rune(s); len(r) > 20 {
		s = string(r[:19]) + "…"
	}
	return strconv.Quote(s)
}

func (o psOptions) print(w io.Writer, rows []psRow) error {
	switch {
	case o.JSON:
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(rows)
	case o.Format != "":
		t, err := template.New("format").Parse(o.Format)
		if err != nil {
			return usageError{fmt.Errorf("--format: %w", err)}
		}
		for _, r := range rows {
			if err := t.Execute(w, r); err != nil {
				return err
			}
			if _, err := fmt.Fprintln(w); err != nil {
				return err
			}
		}
		return nil
	case o.Quiet:
		last := ""
		for _, r := range rows {
			if r.Dir != last {
				if _, err := fmt.Fprintln(w, r.Dir); err != nil {
					return err
				}
			}
			last = r.Dir
		}
		return nil
	}
	t := tabwriter.NewWriter(w, 0, 8, 3, ' ', 0)
	fmt.Fprintln(t, "DIR\tNAME\tIMAGE\tCOMMAND\tSTATUS\tPORTS")
	for _, r := range rows {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\n", r.Dir, r.Name, r.Image, r.Command, r.Status, r.Ports)
	}
	return t.Flush()
}

func newInspect(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "inspect DIR[:CONTAINER]",
		Short: "Show everything that is known of a bundle, or docker's view of a running container",
		Example: `  kcradle inspect /tmp/vm
  kcradle inspect /tmp/vm:web   # as docker inspect shows it`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeContainers(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return inspect(cmd.Context(), a, args[0])
		},
	}
}

func inspect(ctx context.Context, a *app, arg string) error {
	t, err := openTarget(arg)
	if err != nil {
		return err
	}
	var v any
	if t.named {
		var raw json.RawMessage
		if err := t.api().Do(ctx, "GET", t.path("/json"), nil, nil, &raw); err != nil {
			return err
		}
		v = []json.RawMessage{raw}
	} else {
		st, started, err := t.bundle.State()
		if err != nil {
			return err
		}
		out := struct {
			Dir    string        `json:"dir"`
			Bundle bundle.Meta   `json:"bundle"`
			Cradle string        `json:"cradle"`
			Pod    *spec.Pod     `json:"pod"`
			Digest string        `json:"pod_digest"`
			State  *bundle.State `json:"state,omitempty"`
		}{Dir: t.bundle.Dir, Bundle: t.bundle.Meta, Pod: t.bundle.Pod, Digest: spec.PodDigest(t.bundle.PodJSON)}
		out.Cradle, _ = os.Readlink(t.bundle.Dir + "/cradle") // said when run, if it is missing
		if started {
			out.State = &st
		}
		v = out
	}
	e := json.NewEncoder(a.Stdout)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	return e.Encode(v)
}

func newEnv(a *app) *cobra.Command {
	return &cobra.Command{
		Use:   "env DIR",
		Short: "Print the DOCKER_HOST that makes the docker client work on a bundle",
		Example: `  eval $(kcradle env /tmp/vm)
  docker ps`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeBundles(a),
		RunE: func(_ *cobra.Command, args []string) error {
			b, err := bundle.Open(args[0])
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(a.Stdout, "export DOCKER_HOST=unix://%s\n", b.SocketPath(a.Root, bundle.VdockerSocket))
			return err
		},
	}
}
