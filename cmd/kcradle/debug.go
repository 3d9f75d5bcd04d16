package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/daemon"
)

// debugReport is what kcradle debug shows of a pod.
type debugReport struct {
	Dir        string        `json:"dir"`
	Name       string        `json:"name"`
	Running    bool          `json:"running"`
	State      *bundle.State `json:"state,omitempty"`   // of the present or last start
	Command    []string      `json:"command,omitempty"` // QEMU's, while it runs
	Console    []string      `json:"console"`           // the last lines of the guest kernel's log
	Supervisor []string      `json:"supervisor"`        // and of the supervisor's
}

func newDebug(a *app) *cobra.Command {
	var lines int
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "debug [flags] POD",
		Short: "Show how a pod's machine was started, and what it and its supervisor say",
		Long: `debug shows what is known of a pod's present or last start: its state, the path its machine came up by (cold, template or
pool), when each phase was over, QEMU's command line while it runs, and the ends of the guest kernel's and the supervisor's logs.
It changes nothing and asks nothing inside, so that a pod that does not answer can be looked at, too.

POD is a bundle's directory, or a container of the daemon's: its name, its ID, or the beginning of that.`,
		Example: `  kcradle debug /tmp/vm
  kcradle debug web
  kcradle debug --json web | jq .state.phases`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeBundles(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return debugPod(cmd.Context(), a, args[0], lines, asJSON)
		},
	}
	cmd.Flags().IntVarP(&lines, "lines", "n", 20, "how many lines of each log")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print one JSON document")
	return cmd
}

func debugPod(_ context.Context, a *app, arg string, lines int, asJSON bool) error {
	if lines < 0 {
		return usageError{fmt.Errorf("invalid argument \"%d\" for \"--lines\" flag: want zero or more", lines)}
	}
	dir := arg
	if !bundle.Is(dir) {
		var err error
		if dir, err = daemon.FindBundle(a.Root, arg); err != nil {
			return err
		}
	}
	b, err := bundle.Open(dir)
	if err != nil {
		return err
	}
	r := debugReport{Dir: b.Dir, Name: b.Pod.Name}
	state, ok, err := b.State()
	if err != nil {
		return err
	}
	if ok {
		r.State = &state
	}
	_, r.Running = b.Running()
	if r.Running && state.MachinePid > 0 {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", state.MachinePid))
		if err == nil && len(raw) > 0 {
			r.Command = strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
		}
	}
	if r.Console, err = lastLines(filepath.Join(b.RunDir(), "console.log"), lines); err != nil {
		return err
	}
	if r.Supervisor, err = lastLines(filepath.Join(b.RunDir(), "supervisor.log"), lines); err != nil {
		return err
	}
	if asJSON {
		e := json.NewEncoder(a.Stdout)
		e.SetEscapeHTML(false)
		e.SetIndent("", "  ")
		return e.Encode(r)
	}
	return r.write(a.Stdout)
}

func (r debugReport) write(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "pod\t%s\nbundle\t%s\n", r.Name, r.Dir)
	if s := r.State; s == nil {
		fmt.Fprintf(w, "state\tnever started\n")
	} else {
		fmt.Fprintf(w, "state\t%s\n", s.Phase)
		for _, row := range [][2]string{{"path", s.Path}, {"engine", s.Engine}, {"network", s.Network}, {"started", s.Started.Format(time.RFC3339Nano)}} {
			if row[1] != "" {
				fmt.Fprintf(w, "%s\t%s\n", row[0], row[1])
			}
		}
		if r.Running {
			fmt.Fprintf(w, "processes\tsupervisor %d, machine %d\n", s.Pid, s.MachinePid)
		}
		for _, c := range s.Containers {
			fmt.Fprintf(w, "container\t%s: %s", c.Container, c.Status)
			if !c.Finished.IsZero() {
				fmt.Fprintf(w, ", exit code %d", c.ExitCode)
			}
			if c.Error != "" {
				fmt.Fprintf(w, ": %s", printable(c.Error))
			}
			fmt.Fprintln(w)
		}
		if e := s.End; e != nil {
			fmt.Fprintf(w, "end\t%s, exit code %d %s\n", e.Reason, e.ExitCode, printable(e.Message))
		}
		for _, m := range s.Phases {
			where := "phase"
			if m.Guest {
				where = "guest phase" // since its kernel's start
			}
			fmt.Fprintf(w, "%s\t%8.3f s  %s\n", where, m.After.Seconds(), printable(m.Name))
		}
	}
	if err := w.Flush(); err != nil {
		return err
	}
	section := func(title string, lines []string) {
		if len(lines) > 0 {
			fmt.Fprintf(out, "\n%s\n", title)
			for _, l := range lines {
				fmt.Fprintf(out, "  %s\n", l)
			}
		}
	}
	section("QEMU's command line", commandLines(r.Command))
	section("the guest kernel's log", r.Console)
	section("the supervisor's log", r.Supervisor)
	return nil
}

// commandLines are words as a shell reads them, one option a line.
func commandLines(words []string) (out []string) {
	for i, w := range words {
		if w == "" || strings.ContainsFunc(w, func(r rune) bool {
			return !unicode.IsLetter(r) && !unicode.IsDigit(r) && !strings.ContainsRune("-_=+./,:@%", r)
		}) {
			w = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
		}
		if i == 0 || strings.HasPrefix(w, "-") || len(out) == 1 {
			out = append(out, w)
		} else {
			out[len(out)-1] += " " + w
		}
	}
	for i := range max(0, len(out)-1) {
		out[i] += ` \`
	}
	return out
}

// lastLines are the last n lines of a file, fit for a terminal; none when there is no file.
func lastLines(path string, n int) ([]string, error) {
	out := []string{}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return out, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	const most = 256 << 10 // of what a guest or a supervisor may have written
	b, err := io.ReadAll(io.NewSectionReader(f, max(0, fi.Size()-most), most))
	if err != nil {
		return nil, err
	}
	text := strings.TrimRight(string(b), "\n\r")
	if text == "" {
		return out, nil
	}
	all := strings.Split(text, "\n")
	for _, l := range all[max(0, len(all)-n):] {
		out = append(out, printable(l))
	}
	return out, nil
}

// printable is text without what a terminal would obey.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) || r == '\t' {
			return r
		}
		return -1
	}, s)
}
