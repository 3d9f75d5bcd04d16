// Package modules builds programs and tests of other people's Go modules, to judge ours by. They are built in the test cache, by
// their version and Go's; none of their code enters this repository, and its go.mod does not know them.
//
//	cache, err := modules.Open("", os.Stderr)
//	path, err := cache.Program(ctx, modules.Compose())
package modules

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/kcradle/kcradle/test/images"
)

// Module is a package of a Go module.
type Module struct {
	Name    string // of what is built
	Path    string // of the module
	Version string // of the module
	Sum     string // its digest, as Go's checksum database has it
	Package string // directory in the module; empty: its root
	Flags   []string
	// Beside is a module that its go.mod replaces by a directory that the module does not hold; may be empty.
	Beside string
}

// Compose is docker's plugin compose.
func Compose() Module {
	const path, version = "github.com/docker/compose/v2", "v2.40.3"
	return Module{Name: "docker-compose", Path: path, Version: version, Sum: "h1:XeYkQu1svDtyfZPv5nTwFryQ25ZJMkIlc4pz9HalMPI=",
		Package: "cmd", Flags: []string{"-trimpath", "-ldflags=-s -w -X " + path + "/internal.Version=" + version}}
}

// Redis are the tests and the example of testcontainers-go's module redis.
func Redis() Module {
	return Module{Name: "testcontainers-redis", Path: "github.com/testcontainers/testcontainers-go/modules/redis", Version: "v0.45.0",
		Sum: "h1:U7GClvzAxLc7pjDfFxw3K6+odTa8NbxEa31svO5gl/Q=", Beside: "github.com/testcontainers/testcontainers-go"}
}

// Cache is a directory of what was built.
type Cache struct {
	dir string
	log io.Writer
}

// Open returns the cache below dir. An empty dir means where test/images keeps its images. Progress goes to log.
func Open(dir string, log io.Writer) (*Cache, error) {
	dir, err := filepath.Abs(filepath.Join(cmp.Or(dir, os.Getenv("KCRADLE_TEST_CACHE"), images.DefaultDir), "modules"))
	if err != nil {
		return nil, err
	}
	return &Cache{dir: dir, log: log}, os.MkdirAll(dir, 0o755)
}

// Program returns a program, which is built when the cache has not got it.
func (c *Cache) Program(ctx context.Context, m Module) (path string, err error) {
	path = c.path(m)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	src, err := m.fetch(ctx, c.dir)
	if err != nil {
		return "", err
	}
	return path, c.build(ctx, m, src, path, "build")
}

// Tests returns the program of a package's tests, built when the cache has not got it, and the directory to run it in.
func (c *Cache) Tests(ctx context.Context, m Module) (path, dir string, err error) {
	src, err := m.fetch(ctx, c.dir)
	if err != nil {
		return "", "", err
	}
	path, dir = c.path(m), filepath.Join(src, m.Package)
	if _, err := os.Stat(path); err == nil {
		return path, dir, nil
	}
	return path, dir, c.build(ctx, m, src, path, "test", "-c")
}

func (c *Cache) path(m Module) string {
	return filepath.Join(c.dir, m.Name+"-"+m.Version+"-"+runtime.Version())
}

// fetch returns the directory of the module's tree, in Go's own cache.
func (m Module) fetch(ctx context.Context, outside string) (dir string, err error) {
	// Outside any module, so that no go.mod learns of it.
	cmd := goCommand(ctx, outside, "mod", "download", "-json", m.Path+"@"+m.Version)
	out, err := cmd.Output()
	var got struct{ Dir, Sum, Error string }
	if jerr := json.Unmarshal(out, &got); jerr != nil {
		return "", fmt.Errorf("fetch %s: %w", m.Path, errors.Join(err, jerr))
	}
	switch {
	case got.Error != "":
		return "", fmt.Errorf("fetch %s: %s", m.Path, got.Error)
	case err != nil:
		return "", fmt.Errorf("fetch %s: %w", m.Path, err)
	case got.Sum != m.Sum:
		return "", fmt.Errorf("fetch %s@%s: its digest is %s, want %s", m.Path, m.Version, got.Sum, m.Sum)
	}
	return got.Dir, nil
}

// build builds in the module's tree, which is read-only, with a copy of its go.mod.
func (c *Cache) build(ctx context.Context, m Module, src, path string, verb ...string) (err error) {
	fmt.Fprintf(c.log, "%s: building %s@%s\n", m.Name, m.Path, m.Version)
	begin := time.Now()
	tmp, err := os.MkdirTemp(c.dir, ".new-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	for _, name := range []string{"go.mod", "go.sum"} {
		b, err := os.ReadFile(filepath.Join(src, name))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(tmp, name), b, 0o644); err != nil {
			return err
		}
	}
	mod, out := filepath.Join(tmp, "go.mod"), filepath.Join(tmp, m.Name)
	steps := [][]string{append(append(verb, m.Flags...), "-buildvcs=false", "-mod=mod", "-modfile="+mod, "-o", out, "./"+m.Package)}
	if m.Beside != "" {
		steps = append([][]string{{"mod", "edit", "-dropreplace=" + m.Beside, mod}}, steps...)
	}
	for _, args := range steps {
		if out, err := goCommand(ctx, src, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", m.Name, err, out[max(0, len(out)-8<<10):])
		}
	}
	if err := os.Rename(out, path); err != nil {
		return err
	}
	fmt.Fprintf(c.log, "%s: built in %.0f s\n", m.Name, time.Since(begin).Seconds())
	return nil
}

// goCommand is go as it is here, without what would make it work in another module than the one at dir, or become another version.
func goCommand(ctx context.Context, dir string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PWD="+dir, "GO111MODULE=on", "GOWORK=off", "GOFLAGS=", "GOTOOLCHAIN=local", "CGO_ENABLED=0")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}
