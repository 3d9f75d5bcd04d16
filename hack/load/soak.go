package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

// census counts what starts might leave behind.
type census map[string]float64

// count is a row of a census; slack is by how much it may grow, and perBundle how much more for each bundle.
type count struct {
	name      string
	slack     float64
	perBundle float64
	count     func(*load) (float64, error)
}

// counts is the table of a census. To add a row, add a row.
var counts = []count{
	{"processes of kcradle and QEMU", 0, 0, (*load).processes},
	{"unix sockets", 0, 0, lines("/proc/net/unix")},
	{"network links", 0, 0, entries("/sys/class/net")},
	{"mounts", 0, 0, lines("/proc/self/mountinfo")},
	{"control groups", 0, 0, cgroups},
	{"files", 0, 0, (*load).files},
	{"disk, MiB", 4, 66, (*load).disk}, // the journal of a bundle's disk is used round and round: 64 MiB, in the end
	{"descriptors of the pool", 0, 0, (*load).poolDescriptors},
	{"private memory of the pool, MiB", 16, 0, (*load).poolMemory},
	{"memory of the host in use, MiB", 128, 0, func(*load) (float64, error) { used, err := memoryUsed(); return used / mib, err }},
}

func lines(path string) func(*load) (float64, error) {
	return func(*load) (float64, error) {
		b, err := os.ReadFile(path)
		return float64(strings.Count(string(b), "\n")), err
	}
}

func entries(path string) func(*load) (float64, error) {
	return func(*load) (float64, error) {
		e, err := os.ReadDir(path)
		return float64(len(e)), err
	}
}

func cgroups(*load) (float64, error) {
	n := 0.0
	err := filepath.WalkDir("/sys/fs/cgroup", func(_ string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			n++
		}
		return nil // others come and go meanwhile
	})
	return n, err
}

func (l *load) files() (float64, error) {
	list, err := l.fileList()
	return float64(len(list)), err
}

func (l *load) fileList() (list []string, err error) {
	err = filepath.WalkDir(l.dir, func(path string, _ fs.DirEntry, err error) error {
		list = append(list, path)
		return err
	})
	return list, err
}

// disk is what everything of ours takes.
func (l *load) disk() (sum float64, err error) {
	err = filepath.WalkDir(l.dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		sum += float64(info.Sys().(*syscall.Stat_t).Blocks) * 512 / mib
		return nil
	})
	return sum, err
}

// processes counts those that run our program or QEMU.
func (l *load) processes() (float64, error) {
	all, err := filepath.Glob("/proc/[0-9]*/exe")
	n := 0.0
	for _, p := range all {
		exe, err := os.Readlink(p)
		if err == nil && (exe == l.kcradle || strings.HasPrefix(filepath.Base(exe), "qemu-system-")) {
			n++
		}
	}
	return n, err
}

func (l *load) poolDescriptors() (float64, error) {
	e, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", l.pool.Process.Pid))
	return float64(len(e)), err
}

func (l *load) poolMemory() (float64, error) {
	var m memory
	err := m.add(l.pool.Process.Pid)
	return m.private / mib, err
}

func (l *load) census() (census, error) {
	c := census{}
	var errs []error
	for _, k := range counts {
		n, err := k.count(l)
		c[k.name] = n
		errs = append(errs, err)
	}
	return c, errors.Join(errs...)
}

// Bounds of what ends in the background: kernels free mounts, sockets and memory some time after the processes have ended.
const (
	calmPause   = 500 * time.Millisecond
	calmTimeout = 30 * time.Second
)

// calm takes censuses until one counts no more than the one before it, or until the last is what there is.
func (l *load) calm(ctx context.Context) (census, error) {
	ctx, cancel := context.WithTimeout(ctx, calmTimeout)
	defer cancel()
	last, err := l.census()
	for err == nil {
		select {
		case <-ctx.Done():
			return last, nil
		case <-time.After(calmPause):
		}
		var c census
		if c, err = l.census(); err != nil {
			return nil, err
		}
		if !slices.ContainsFunc(counts, func(k count) bool { return c[k.name] < last[k.name]-k.slack/8 }) {
			return c, nil
		}
		last = c
	}
	return nil, err
}

// soakPool is how many machines the pool keeps.
const soakPool = 2

// soak starts and ends many pods, and compares what there is before and after. The first start of each bundle in
// each way is not counted: it leaves what a first start leaves.
func (l *load) soak(ctx context.Context) error {
	if err := l.startPool(ctx, soakPool); err != nil {
		return err
	}
	ways := strings.Split(l.ways, ",")
	run := func(what string, n int) int {
		return l.each(ctx, what, n, func(ctx context.Context, worker, i int) error {
			return l.once(ctx, ways[i%len(ways)], worker)
		})
	}
	for _, way := range ways {
		for worker := range l.bundles {
			if err := l.once(ctx, way, worker); err != nil {
				return fmt.Errorf("first start: %w", err)
			}
		}
	}
	settle := func() (census, error) {
		if err := l.awaitPool(ctx, soakPool); err != nil {
			return nil, err
		}
		return l.calm(ctx)
	}
	before, err := settle()
	if err != nil {
		return err
	}
	known, err := l.fileList()
	if err != nil {
		return err
	}
	start := time.Now()
	failed := run("soak", l.n)
	took := time.Since(start)
	after, err := settle()
	if err != nil {
		return err
	}
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "before\tafter\t\t  what, of %d starts in %.0f s, %d failed\n", l.n, took.Seconds(), failed)
	grown := 0
	for _, k := range counts {
		mark := ""
		if after[k.name] > before[k.name]+k.slack+k.perBundle*float64(len(l.bundles)) {
			mark = "GREW"
			grown++
		}
		fmt.Fprintf(w, "%.0f\t%.0f\t%s\t  %s\n", before[k.name], after[k.name], mark, k.name)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	now, err := l.fileList()
	if err != nil {
		return err
	}
	for _, path := range now {
		if !slices.Contains(known, path) {
			fmt.Println("new:", path)
		}
	}
	if failed > 0 || grown > 0 {
		return fmt.Errorf("%d starts failed, %d counts grew", failed, grown)
	}
	return nil
}
