package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The suite, pinned by the digest that Go's checksum database has for it.
const (
	suiteModule  = "github.com/docker/docker"
	suiteVersion = "v28.5.2+incompatible"
	suiteSum     = "h1:DBX0Y0zAjZbSrm1uzOkdr1onVghKaftjlSWt4AFexzM="
	// suiteAPI is the version of the API that the suite's client speaks when nobody tells it another.
	suiteAPI = "1.51"
)

// suite is the compiled suite in its cache.
type suite struct {
	dir string // holds src and bin
	log io.Writer
}

// packagePattern is what a package below integration may be called.
var packagePattern = regexp.MustCompile(`^[a-z0-9]+(/[a-z0-9]+)*$`)

// program is a package's test binary.
func (s *suite) program(pkg string) string {
	return filepath.Join(s.dir, "bin", strings.ReplaceAll(pkg, "/", "-")+".test")
}

// workDir is the directory that a package's tests expect to run in.
func (s *suite) workDir(pkg string) string { return filepath.Join(s.dir, "src", "integration", pkg) }

// prepareSuite fetches the suite and compiles the tests of packages, as far as cache has not got them. What is compiled
// is kept by the suite's version and Go's.
func prepareSuite(ctx context.Context, cache string, packages []string, log io.Writer) (_ *suite, err error) {
	goVersion, err := exec.CommandContext(ctx, "go", "env", "GOVERSION").Output()
	if err != nil {
		return nil, fmt.Errorf("ask go for its version: %w", err)
	}
	version, _, _ := strings.Cut(suiteVersion, "+")
	s := &suite{
		dir: filepath.Join(cache, version+"-"+strings.TrimSpace(string(goVersion))),
		log: log,
	}
	if err := os.MkdirAll(filepath.Join(s.dir, "bin"), 0o755); err != nil {
		return nil, err
	}
	unlock, err := lock(ctx, filepath.Join(s.dir, "lock"))
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	for _, pkg := range packages {
		if !packagePattern.MatchString(pkg) {
			return nil, fmt.Errorf("package %q: want a directory below integration, such as container or network/bridge", pkg)
		}
		if exists(s.program(pkg)) && exists(s.workDir(pkg)) {
			continue
		}
		if err := s.fetch(ctx); err != nil {
			return nil, fmt.Errorf("fetch %s@%s: %w", suiteModule, suiteVersion, err)
		}
		if err := s.compile(ctx, pkg); err != nil {
			return nil, fmt.Errorf("compile integration/%s: %w", pkg, err)
		}
	}
	return s, nil
}

// fetch makes s.dir/src: the module's tree, with the lists of modules under the names that Go looks for.
func (s *suite) fetch(ctx context.Context) (err error) {
	src := filepath.Join(s.dir, "src")
	if exists(src) {
		return nil
	}
	fmt.Fprintf(s.log, "moby-suite: fetching %s@%s\n", suiteModule, suiteVersion)
	tmp, err := os.MkdirTemp(s.dir, ".src-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	// Outside any module, so that no go.mod learns of it.
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", suiteModule+"@"+suiteVersion)
	cmd.Dir, cmd.Env = tmp, goEnvironment(tmp)
	out, runErr := cmd.Output()
	var got struct{ Dir, Sum, Error string }
	if err := json.Unmarshal(out, &got); err != nil {
		return errors.Join(runErr, fmt.Errorf("read go's answer: %w", err))
	}
	if got.Error != "" || runErr != nil {
		return errors.Join(errors.New(got.Error), runErr)
	}
	if got.Sum != suiteSum {
		return fmt.Errorf("its digest is %s, want %s", got.Sum, suiteSum)
	}
	tree := filepath.Join(tmp, "src")
	// The copy is writable, as the tree in the module cache is not.
	if err := os.CopyFS(tree, os.DirFS(got.Dir)); err != nil {
		return err
	}
	for _, name := range []string{"mod", "sum"} {
		if err := os.Rename(filepath.Join(tree, "vendor."+name), filepath.Join(tree, "go."+name)); err != nil {
			return err
		}
	}
	// All that a module's archive has of vendor is its table of contents, which makes go look for the rest.
	if err := os.RemoveAll(filepath.Join(tree, "vendor")); err != nil {
		return err
	}
	return os.Rename(tree, src)
}

func (s *suite) compile(ctx context.Context, pkg string) (err error) {
	fmt.Fprintf(s.log, "moby-suite: compiling integration/%s\n", pkg)
	begin := time.Now()
	tmp := s.program(pkg) + ".new"
	defer func() {
		if rmErr := os.Remove(tmp); !errors.Is(rmErr, fs.ErrNotExist) {
			err = errors.Join(err, rmErr)
		}
	}()
	src := filepath.Join(s.dir, "src")
	// Without -trimpath: its assertions read their own source for what they print.
	cmd := exec.CommandContext(ctx, "go", "test", "-c", "-o", tmp, "./integration/"+pkg)
	cmd.Dir, cmd.Env = src, goEnvironment(src)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w\n%s", err, tail(out, 8<<10))
	}
	if err := os.Rename(tmp, s.program(pkg)); err != nil {
		return fmt.Errorf("%w (no tests in integration/%s?)", err, pkg)
	}
	fmt.Fprintf(s.log, "moby-suite: integration/%s compiled in %.0f s\n", pkg, time.Since(begin).Seconds())
	return nil
}

// goEnvironment is ours without what would make go work in another module than the one at dir.
func goEnvironment(dir string) []string {
	return append(os.Environ(), "PWD="+dir, "GO111MODULE=on", "GOWORK=off", "GOFLAGS=-buildvcs=false", "CGO_ENABLED=0")
}

// lock takes the file at path for this process.
func lock(ctx context.Context, path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	got := make(chan error, 1)
	// A cancelled wait lasts until the other process is done or this one ends: closing does not wake flock.
	go func() { got <- unix.Flock(int(f.Fd()), unix.LOCK_EX) }()
	select {
	case err := <-got:
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		return f.Close, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another run that uses %s: %w", path, ctx.Err())
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// tail is the last n bytes of b.
func tail(b []byte, n int) []byte {
	if len(b) > n {
		return b[len(b)-n:]
	}
	return b
}
