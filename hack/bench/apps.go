package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/kcradle/kcradle/test/images"
)

// way is how a container is started.
type way int

const (
	overDocker way = iota
	overCold
	overTemplate
	overPool
)

// app is an image in docker's store and in a bundle, ready to be started.
type app struct {
	name string
	ref  string
	dir  string
}

// app makes an app at its first use.
func (b *bench) app(ctx context.Context, image string, flags, args []string) (app, error) {
	a := app{name: containerName + "-" + image, dir: filepath.Join(b.dir, image)}
	cache, err := images.Open("", os.Stderr)
	if err != nil {
		return a, err
	}
	built, err := cache.Build(ctx, image)
	if err != nil {
		return a, err
	}
	a.ref = built.Ref
	if _, err := os.Stat(a.dir); err == nil {
		return a, nil
	}
	summon := append(append([]string{"summon"}, flags...), a.dir, "docker-archive:"+built.Archive)
	create := append(append([]string{"create", "--network", "none", "--name", a.name}, flags...), a.ref)
	if args != nil {
		summon, create = append(append(summon, "--"), args...), append(create, args...)
	}
	for _, cmd := range []*exec.Cmd{
		b.command(ctx, summon...),
		b.dockerd.Docker(ctx, "load", "--quiet", "--input", built.Archive),
		b.dockerd.Docker(ctx, create...),
	} {
		if err := quiet(cmd); err != nil {
			return a, err
		}
	}
	return a, nil
}

// start is the command that starts an app in some way and shows its output.
func (b *bench) start(ctx context.Context, a app, w way) (*exec.Cmd, error) {
	switch w {
	case overDocker:
		return b.dockerd.Docker(ctx, "start", "--attach", a.name), nil
	case overTemplate:
		if err := quiet(b.warm(ctx, "template", "template", "warm", "--network", "none", a.dir)); err != nil {
			return nil, err
		}
		return b.warm(ctx, "template", "run", "--network", "none", a.dir), nil
	case overPool:
		return b.pooled(ctx, a.dir)
	}
	return b.command(ctx, "run", "--network", "none", a.dir), nil
}

// runPython measures a program that imports a package and prints a line.
func runPython(w way) func(context.Context, *bench) (sample, error) {
	return func(ctx context.Context, b *bench) (sample, error) {
		a, err := b.app(ctx, "web", nil, []string{"python3", "-c", `import json; print(json.dumps({"hello": "world"}))`})
		if err != nil {
			return nil, err
		}
		cmd, err := b.start(ctx, a, w)
		if err != nil {
			return nil, err
		}
		return measure(cmd, `{"hello": "world"}`)
	}
}

// runMariaDB measures a server whose data directory is there, until it says that it takes connections.
func runMariaDB(w way) func(context.Context, *bench) (sample, error) {
	return func(ctx context.Context, b *bench) (sample, error) {
		_, err := os.Stat(filepath.Join(b.dir, "mariadb"))
		first := err != nil
		a, err := b.app(ctx, "mariadb", []string{"-e", "MARIADB_ALLOW_EMPTY_ROOT_PASSWORD=1"}, nil)
		if err != nil {
			return nil, err
		}
		if first { // makes the data directories
			for _, w := range []way{overDocker, overCold} {
				if _, err := b.untilReady(ctx, a, w); err != nil {
					return nil, err
				}
			}
		}
		return b.untilReady(ctx, a, w)
	}
}

// untilReady starts a MariaDB, and stops it when it is ready.
func (b *bench) untilReady(ctx context.Context, a app, w way) (sample, error) {
	const want = "ready for connections"
	cmd, err := b.start(ctx, a, w)
	if err != nil {
		return nil, err
	}
	out, err := cmd.StderrPipe() // where it logs
	if err != nil {
		return nil, err
	}
	cmd.Stdout = io.Discard
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var ready time.Duration
	var said strings.Builder
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if ready == 0 && strings.Contains(lines.Text(), want) {
			ready = time.Since(start)
			stop := b.command(ctx, "stop", a.dir)
			if w == overDocker {
				stop = b.dockerd.Docker(ctx, "stop", a.name)
			}
			if err := quiet(stop); err != nil {
				return nil, errors.Join(err, cmd.Wait())
			}
		}
		said.WriteString(lines.Text() + "\n")
	}
	if err := cmd.Wait(); err != nil || ready == 0 {
		return nil, fmt.Errorf("%s: ready %v, %w\n%s", filepath.Base(cmd.Path), ready > 0, err, said.String())
	}
	return sample{"ready": ready.Seconds()}, nil
}
