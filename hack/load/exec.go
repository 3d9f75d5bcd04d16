package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// execs starts pods that wait, executes a program in each as soon as it was started, and ends it: whether the control channel is good
// for anything right after a restore, and whether the right answer comes.
func (l *load) execs(ctx context.Context) error {
	ways := strings.Split(l.ways, ",")
	if l.uses("pool") {
		if err := l.startPool(ctx, soakPool); err != nil {
			return err
		}
	}
	for i := range l.bundles {
		if err := l.summon(ctx, l.waiting(i), "sleep", "1000000"); err != nil {
			return err
		}
	}
	start := time.Now()
	failed := l.each(ctx, "exec", l.n, func(ctx context.Context, worker, i int) error {
		way, dir, word := ways[i%len(ways)], l.waiting(worker), strconv.Itoa(i)
		if err := quiet(l.command(ctx, way, "run", "-d", "--network", "none", dir)); err != nil {
			return err
		}
		out, err := l.command(ctx, way, "exec", dir, "echo", word).CombinedOutput()
		if err != nil || string(out) != word+"\n" {
			err = fmt.Errorf("exec answered %q and ended with %v, want %q", out, err, word)
		}
		return errors.Join(err, quiet(l.command(ctx, way, "stop", "-t", "0", dir)))
	})
	fmt.Printf("%d pods, %d at a time, each with an exec at once: %.0f s, %d failed\n", l.n, l.parallel, time.Since(start).Seconds(), failed)
	if failed > 0 {
		return fmt.Errorf("%d of %d failed", failed, l.n)
	}
	return nil
}

// waiting is the bundle of a pod that waits.
func (l *load) waiting(worker int) string { return filepath.Join(l.dir, "w"+strconv.Itoa(worker)) }
