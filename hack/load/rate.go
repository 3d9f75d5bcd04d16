package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"
)

// rate starts pods as fast as they end.
func (l *load) rate(ctx context.Context) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "pods\tat a time\ttook\tper second\tfailed\t  way")
	failures := 0
	for way := range strings.SplitSeq(l.ways, ",") {
		note := ""
		if way == "pool" {
			if err := l.startPool(ctx, l.parallel); err != nil {
				return err
			}
		}
		start := time.Now()
		failed := l.each(ctx, way, l.n, func(ctx context.Context, worker, _ int) error { return l.once(ctx, way, worker) })
		took := time.Since(start)
		failures += failed
		if way == "pool" {
			n, err := l.taken(ctx)
			if err != nil {
				return err
			}
			note = fmt.Sprintf(" (%d of them; the others from the template: the pool makes machines when no start is under way)", n)
			if err := l.stopPool(); err != nil {
				return err
			}
		}
		fmt.Fprintf(w, "%d\t%d\t%.1f s\t%.2f\t%d\t  %s%s\n", l.n, l.parallel, took.Seconds(), float64(l.n)/took.Seconds(), failed, way, note)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if failures > 0 {
		return fmt.Errorf("%d starts failed", failures)
	}
	return nil
}
