// Load measures kcradle under load, on a host with docker beside it:
//
//	go run ./hack/load rate  [-n 200] [-parallel 8]   # pods per second, in each way to start them, and over docker
//	go run ./hack/load idle  [-n 100] [-parallel 8]   # memory of pods that wait, and of docker's containers
//	go run ./hack/load soak  [-n 1000] [-parallel 4]  # many starts and stops; what is left of them afterwards
//	go run ./hack/load exec  [-n 1000] [-parallel 4]  # many starts, each with an exec at once
//
// after make build, as root. It ends with 1 when a start failed or something was left behind.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
	"github.com/kcradle/kcradle/vmm/pool"
)

type config struct {
	kcradle  string
	n        int
	parallel int
	ways     string
}

// kinds is the table of measurements. To add one, add a row.
var kinds = []struct {
	name     string
	n        int // by default
	parallel int
	ways     string
	run      func(*load, context.Context) error
}{
	{"rate", 200, 8, "docker,pool,template,cold", (*load).rate},
	{"idle", 100, 8, "docker,template", (*load).idle},
	{"soak", 1000, 4, "pool,template", (*load).soak},
	{"exec", 1000, 4, "pool,template", (*load).execs},
}

func main() {
	if len(os.Args) < 2 {
		usage()
	}
	for _, k := range kinds {
		if k.name != os.Args[1] {
			continue
		}
		var c config
		f := flag.NewFlagSet(k.name, flag.ExitOnError)
		f.StringVar(&c.kcradle, "kcradle", "bin/kcradle", "the program to measure")
		f.IntVar(&c.n, "n", k.n, "how many pods")
		f.IntVar(&c.parallel, "parallel", k.parallel, "how many are started at a time")
		f.StringVar(&c.ways, "ways", k.ways, "docker, pool, template, cold")
		_ = f.Parse(os.Args[2:]) // ends the program on a failure
		ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
		defer stop()
		l, err := setUp(ctx, c)
		if err == nil {
			err = errors.Join(k.run(l, ctx), l.tearDown())
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "load:", err)
			os.Exit(1)
		}
		return
	}
	usage()
}

func usage() {
	fmt.Fprintln(os.Stderr, "usage: load rate|idle|soak|exec [-n N] [-parallel N] [-ways LIST]")
	os.Exit(2)
}

// load is what is set up once.
type load struct {
	config
	dir     string // holds all state; short
	image   *images.Built
	dockerd *servers.Dockerd
	pool    *exec.Cmd
	bundles []string // of a program that prints a line, one for each that runs at a time
}

func setUp(ctx context.Context, c config) (_ *load, err error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("dockerd needs root")
	}
	if c.n < 1 || c.parallel < 1 {
		return nil, fmt.Errorf("%d pods, %d at a time: want at least one of each", c.n, c.parallel)
	}
	l := &load{config: c}
	if l.kcradle, err = filepath.Abs(c.kcradle); err != nil {
		return nil, err
	}
	if l.dir, err = servers.TempDir(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.tearDown())
		}
	}()
	cache, err := images.Open("", os.Stderr)
	if err != nil {
		return nil, err
	}
	if l.image, err = cache.Build(ctx, "busybox"); err != nil {
		return nil, err
	}
	if l.uses("docker") {
		dir := filepath.Join(l.dir, "d")
		if err := os.Mkdir(dir, 0o755); err != nil {
			return nil, err
		}
		if l.dockerd, err = servers.StartDockerd(ctx, dir); err != nil {
			return nil, err
		}
		if err := quiet(l.dockerd.Docker(ctx, "load", "--quiet", "--input", l.image.Archive)); err != nil {
			return nil, err
		}
	}
	for i := range c.parallel {
		dir := filepath.Join(l.dir, "b"+strconv.Itoa(i))
		if err := l.summon(ctx, dir, "echo", "hello"); err != nil {
			return nil, err
		}
		l.bundles = append(l.bundles, dir)
	}
	return l, quiet(l.command(ctx, "template", "template", "warm", "--network", "none", l.bundles[0]))
}

func (l *load) tearDown() error {
	if l.pool != nil {
		_ = l.pool.Process.Signal(syscall.SIGTERM)
		_ = l.pool.Wait() // a signal is its end
	}
	if l.dockerd != nil {
		l.dockerd.Stop()
	}
	return os.RemoveAll(l.dir)
}

func (l *load) uses(way string) bool {
	for w := range strings.SplitSeq(l.ways, ",") {
		if w == way {
			return true
		}
	}
	return false
}

func (l *load) summon(ctx context.Context, dir string, args ...string) error {
	return quiet(l.command(ctx, "template", append([]string{"summon", dir, "docker-archive:" + l.image.Archive, "--"}, args...)...))
}

// root is the state directory of a way: only one of them has a pool.
func (l *load) root(way string) string {
	if way == "pool" {
		return filepath.Join(l.dir, "pool")
	}
	return filepath.Join(l.dir, "root")
}

// command is kcradle, which starts machines in that way.
func (l *load) command(ctx context.Context, way string, args ...string) *exec.Cmd {
	templates := "2GiB"
	if way == "cold" {
		templates = "off"
	}
	cmd := exec.CommandContext(ctx, l.kcradle, args...)
	cmd.Env = append(os.Environ(), "KCRADLE_ROOT="+l.root(way), "KCRADLE_TEMPLATES="+templates)
	return cmd
}

func quiet(cmd *exec.Cmd) error {
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w\n%s", filepath.Base(cmd.Path), strings.Join(cmd.Args[1:], " "), err, out)
	}
	return nil
}

// startPool starts the pool and waits until it is full.
func (l *load) startPool(ctx context.Context, size int) error {
	l.pool = l.command(ctx, "pool", "pool", "--size", strconv.Itoa(size), "--limit", strconv.Itoa(size), "--network", "none", l.bundles[0])
	l.pool.Cancel = func() error { return l.pool.Process.Signal(syscall.SIGTERM) }
	l.pool.Stderr = os.Stderr
	if err := l.pool.Start(); err != nil {
		l.pool = nil
		return err
	}
	return l.awaitPool(ctx, size)
}

func (l *load) stopPool() error {
	err := l.pool.Process.Signal(syscall.SIGTERM)
	_ = l.pool.Wait()
	l.pool = nil
	return err
}

func (l *load) awaitPool(ctx context.Context, size int) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	for {
		st, err := pool.Ask(ctx, filepath.Join(l.root("pool"), "pool", "pool.sock"))
		if err == nil && len(st.Shapes) == 1 && st.Shapes[0].Ready == size {
			return nil
		}
		select {
		case <-time.After(100 * time.Millisecond): // it tells nobody
		case <-ctx.Done():
			return fmt.Errorf("the pool was not filled: %+v, %w", st, err)
		}
	}
}

// taken is how many machines the pool has given away.
func (l *load) taken(ctx context.Context) (n int, err error) {
	st, err := pool.Ask(ctx, filepath.Join(l.root("pool"), "pool", "pool.sock"))
	for _, s := range st.Shapes {
		n += s.Taken
	}
	return n, err
}

// each calls f for every number below n, some at a time: worker is below l.parallel. It returns how many failed, and says why.
func (l *load) each(ctx context.Context, what string, n int, f func(ctx context.Context, worker, i int) error) (failed int) {
	var next, failures atomic.Int64
	var wg sync.WaitGroup
	for worker := range l.parallel {
		wg.Go(func() {
			for {
				i := int(next.Add(1)) - 1
				if i >= n || ctx.Err() != nil {
					return
				}
				if err := f(ctx, worker, i); err != nil {
					failures.Add(1)
					fmt.Fprintf(os.Stderr, "%s %d: %v\n", what, i, err)
				}
				if i > 0 && i%100 == 0 {
					fmt.Fprintf(os.Stderr, "%s: %d of %d\n", what, i, n)
				}
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		failures.Add(1)
	}
	return int(failures.Load())
}

// once starts a pod, or a container, that prints a line, and waits for its end.
func (l *load) once(ctx context.Context, way string, worker int) error {
	cmd := l.command(ctx, way, "run", "--network", "none", l.bundles[worker])
	if way == "docker" {
		cmd = l.dockerd.Docker(ctx, "run", "--rm", "--network", "none", l.image.Ref, "echo", "hello")
	}
	out, err := cmd.Output()
	if err == nil && string(out) != "hello\n" {
		err = fmt.Errorf("it printed %q", out)
	}
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = fmt.Errorf("%w: %s", err, exit.Stderr)
	}
	return err
}
