package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
)

type logsOptions struct {
	Follow     bool
	Tail       string
	Since      string
	Until      string
	Timestamps bool
	Console    bool
}

func newLogs(a *app) *cobra.Command {
	var o logsOptions
	cmd := &cobra.Command{
		Use:   "logs [flags] DIR[:CONTAINER]",
		Short: "Show a container's output, also of a pod that does not run any more",
		Long: `logs shows what is in the bundle's logs directory: the output of every start, newest last, at most 32 MiB for each
container. --console shows the kernel's log of the last start instead.`,
		Example: `  kcradle logs -f --tail 20 /tmp/vm
  kcradle logs --since 10m -t /tmp/shop:web`,
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeContainers(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			return logs(cmd.Context(), a, args[0], o)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&o.Follow, "follow", "f", false, "go on with what comes until the pod ends")
	f.StringVarP(&o.Tail, "tail", "n", "all", "number of lines from the end")
	f.StringVar(&o.Since, "since", "", "only what came after a time (2006-01-02T15:04:05Z) or in the last duration (10m)")
	f.StringVar(&o.Until, "until", "", "only what came before a time or duration")
	f.BoolVarP(&o.Timestamps, "timestamps", "t", false, "put the time before each line")
	f.BoolVar(&o.Console, "console", false, "the kernel's log")
	return cmd
}

// logPrinter writes records as docker logs does.
type logPrinter struct {
	out, err     io.Writer
	since, until time.Time
	timestamps   bool
	midLine      [2]bool // the stream's last record was no whole line
}

func (p *logPrinter) print(r bundle.Record) error {
	if !p.since.IsZero() && r.Time.Before(p.since) || !p.until.IsZero() && r.Time.After(p.until) {
		return nil
	}
	w, i := p.out, 0
	if r.Stream == "stderr" {
		w, i = p.err, 1
	}
	text := r.Log
	if p.timestamps && !p.midLine[i] {
		text = r.Time.UTC().Format("2006-01-02T15:04:05.000000000Z") + " " + text
	}
	p.midLine[i] = !strings.HasSuffix(r.Log, "\n")
	_, err := io.WriteString(w, text)
	return err
}

func logs(ctx context.Context, a *app, arg string, o logsOptions) error {
	t, err := openTarget(arg)
	if err != nil {
		return err
	}
	if o.Console {
		f, err := os.Open(filepath.Join(t.bundle.RunDir(), "console.log"))
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(a.Stdout, f)
		return err
	}
	p := &logPrinter{out: a.Stdout, err: a.Stderr, timestamps: o.Timestamps}
	now := time.Now()
	if p.since, err = parseWhen(o.Since, now); err != nil {
		return usageError{fmt.Errorf("--since: %w", err)}
	}
	if p.until, err = parseWhen(o.Until, now); err != nil {
		return usageError{fmt.Errorf("--until: %w", err)}
	}
	tail := -1
	if o.Tail != "" && o.Tail != "all" {
		if tail, err = strconv.Atoi(o.Tail); err != nil || tail < 0 {
			return usageError{fmt.Errorf("invalid argument %q for \"-n, --tail\" flag: want a number of lines or all", o.Tail)}
		}
	}
	r := bundle.NewLogReader(t.bundle.LogPath(t.container.ID))
	defer r.Close()
	if o.Follow {
		return followLog(ctx, t.bundle, r, p, tail)
	}
	return printTail(r, p, tail)
}

// printTail prints what is there: everything, or the last lines.
func printTail(r *bundle.LogReader, p *logPrinter, tail int) error {
	if tail < 0 {
		return r.Read(p.print)
	}
	// A line may be several records, so the ring holds lines.
	var ring [][]bundle.Record
	whole := true
	err := r.Read(func(rec bundle.Record) error {
		if whole || len(ring) == 0 {
			ring = append(ring, nil)
			if len(ring) > tail {
				ring = ring[1:]
			}
		}
		whole = strings.HasSuffix(rec.Log, "\n")
		if len(ring) > 0 {
			ring[len(ring)-1] = append(ring[len(ring)-1], rec)
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, line := range ring {
		for _, rec := range line {
			if err := p.print(rec); err != nil {
				return err
			}
		}
	}
	return nil
}

// followLog prints what is there and what comes, until the pod has ended.
func followLog(ctx context.Context, b *bundle.Bundle, r *bundle.LogReader, p *logPrinter, tail int) error {
	// Both watches begin before the first look, so that nothing falls in between.
	changes, err := watchDir(filepath.Dir(b.LogPath("x")))
	if err != nil {
		return err
	}
	defer changes.Close()
	control, err := b.DialControl(ctx)
	if err != nil {
		return err
	}
	ended := make(chan struct{})
	if control == nil {
		close(ended)
	} else {
		defer control.Close()
		go func() {
			defer close(ended)
			_ = bundle.AwaitEnd(ctx, control) // however it ended
		}()
	}
	changed := make(chan error)
	done := make(chan struct{})
	defer close(done)
	go func() {
		buf := make([]byte, 64<<10)
		for {
			_, err := changes.Read(buf)
			select {
			case changed <- err:
			case <-done:
				return
			}
			if err != nil {
				return
			}
		}
	}()
	if err := printTail(r, p, tail); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ended:
			return r.Read(p.print)
		case err := <-changed:
			if err != nil {
				return fmt.Errorf("watch the log: %w", err)
			}
			if err := r.Read(p.print); err != nil {
				return err
			}
		}
	}
}

// watchDir is readable whenever something is written in a directory.
func watchDir(dir string) (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_MODIFY|unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		f.Close()
		return nil, &os.PathError{Op: "watch", Path: dir, Err: err}
	}
	return f, nil
}

// parseWhen reads docker's times: a duration before now, RFC 3339 with parts left out, or seconds since 1970.
func parseWhen(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04", "2006-01-02"} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	if f, err := strconv.ParseFloat(s, 64); err == nil {
		return time.Unix(0, int64(f*float64(time.Second))), nil
	}
	return time.Time{}, errors.New("want a time, a duration or seconds since 1970, got " + strconv.Quote(s))
}
