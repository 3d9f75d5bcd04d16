// Moby-suite judges a server of the Docker Engine API by moby's own integration tests:
//
//	go run ./hack/moby-suite                            # Debian's dockerd, for comparison
//	go run ./hack/moby-suite -daemon bin/kcradle        # "bin/kcradle daemon -H unix://SOCKET --root DIR"
//	go run ./hack/moby-suite -H unix:///run/x.sock      # a server that runs already
//
// The suite comes as a Go module, is compiled into the test cache, and is no part of this repository. Each test runs in
// a process of its own with a time-out of its own, and after each the server is put back as it was. A server that this
// program starts as root lives with the tests in namespaces of their own (network, mounts, processes), so the machine's
// network and docker stay as they are, and nothing outlives the run.
//
// With -check it ends with 1 when a test of the kept list did not pass; -update writes that list from this run. It ends
// with 2 when it could not do its work.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
)

// config is the command line.
type config struct {
	args     []string  // as given
	out      io.Writer // for the table
	host     string
	daemon   string
	dockerd  string
	packages []string
	run      *regexp.Regexp
	remote   bool
	timeout  time.Duration
	json     string
	serveLog string
	list     string
	check    bool
	update   bool
}

func main() {
	if len(os.Args) > 2 && os.Args[1] == asDockerd {
		fmt.Fprintln(os.Stderr, "moby-suite:", beDockerd(os.Args[2], os.Args[3:]))
		os.Exit(1)
	}
	args, stage, dir := stageOf(os.Args[1:])
	if stage == stageInit {
		os.Exit(beInit(dir, args))
	}
	c, err := parseArgs(args, os.Stderr)
	if err != nil {
		if !errors.Is(err, flag.ErrHelp) {
			fmt.Fprintln(os.Stderr, "moby-suite:", err)
		}
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal kills
	code, err := 0, error(nil)
	if stage == stageRun {
		code, err = c.judge(ctx, dir, true)
	} else {
		code, err = c.work(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "moby-suite:", err)
	}
	os.Exit(code)
}

// parseArgs reads the command line; how it is used goes to w.
func parseArgs(args []string, w io.Writer) (*config, error) {
	c := &config{args: args, out: os.Stdout}
	f := flag.NewFlagSet("moby-suite", flag.ContinueOnError)
	f.SetOutput(w)
	f.StringVar(&c.host, "H", "", "the `host` of a server that runs already, unix:///PATH or tcp://HOST:PORT")
	f.StringVar(&c.daemon, "daemon", "", "a `program` to start as the server: PROGRAM daemon -H unix://SOCKET --root DIR")
	f.StringVar(&c.dockerd, "dockerd", "", "the `program` for tests that start a dockerd of their own\n"+
		"(default: the server's own, Debian's or with -daemon ours under dockerd's flags; with -H none, and such tests are not judged)")
	packages := f.String("packages", "container,image,system,volume,network", "directories below integration, comma-separated")
	run := f.String("run", "", "only the tests whose names match this `regexp`")
	f.BoolVar(&c.remote, "remote", false, "tell the suite that the server is on another machine; it skips what looks at this one")
	f.DurationVar(&c.timeout, "timeout", 3*time.Minute, "how long a test may take")
	f.StringVar(&c.json, "json", "", "write everything to this `file`, too")
	f.StringVar(&c.serveLog, "log", "", "write the last part of the server's log to this `file`, when it was started here")
	f.StringVar(&c.list, "list", "hack/moby-suite/passing.txt", "the `file` with the tests that must pass")
	f.BoolVar(&c.check, "check", false, "end with 1 when a test of the list did not pass")
	f.BoolVar(&c.update, "update", false, "write the list from this run")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("%q: want flags only", f.Arg(0))
	}
	if c.host != "" && c.daemon != "" {
		return nil, errors.New("-H names a server that runs, -daemon one to start: want one of them")
	}
	if c.check && c.update {
		return nil, errors.New("-check holds the run to the list, -update the list to the run: want one of them")
	}
	if c.timeout <= 0 {
		return nil, fmt.Errorf("-timeout %s: want more than none", c.timeout)
	}
	for p := range strings.SplitSeq(*packages, ",") {
		if !packagePattern.MatchString(p) {
			return nil, fmt.Errorf("-packages: got %q, want directories below integration, such as container,network/bridge", p)
		}
		c.packages = append(c.packages, p)
	}
	if *run != "" {
		re, err := regexp.Compile(*run)
		if err != nil {
			return nil, fmt.Errorf("-run: %w", err)
		}
		c.run = re
	}
	if c.daemon != "" {
		var err error
		if c.daemon, err = filepath.Abs(c.daemon); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// work prepares everything and judges the server, in namespaces of its own where that is possible.
func (c *config) work(ctx context.Context) (code int, err error) {
	own := c.host == ""
	if own && c.daemon == "" && os.Geteuid() != 0 {
		return 2, errors.New("dockerd needs root (run as root, or name a server with -H)")
	}
	if _, err := c.suite(ctx, os.Stderr); err != nil {
		return 2, err
	}
	dir, err := servers.TempDir()
	if err != nil {
		return 2, err
	}
	defer func() {
		if rmErr := os.RemoveAll(dir); rmErr != nil {
			code, err = 2, errors.Join(err, rmErr)
		}
	}()
	if err := prepareImages(ctx, "", dir, os.Stderr); err != nil {
		return 2, err
	}
	if own && os.Geteuid() == 0 {
		return runAlone(ctx, dir, c.args)
	}
	return c.judge(ctx, dir, false)
}

func (c *config) suite(ctx context.Context, log io.Writer) (*suite, error) {
	cache := os.Getenv("KCRADLE_TEST_CACHE")
	if cache == "" {
		cache = images.DefaultDir
	}
	cache, err := filepath.Abs(filepath.Join(cache, "moby-suite"))
	if err != nil {
		return nil, err
	}
	return prepareSuite(ctx, cache, c.packages, log)
}

// judge runs the tests with everything below dir, which holds the images' archives. Alone says that network and
// /run/docker are this run's own.
func (c *config) judge(ctx context.Context, dir string, alone bool) (int, error) {
	suite, err := c.suite(ctx, os.Stderr)
	if err != nil {
		return 2, err
	}
	dockerd := c.dockerd
	var srv *server
	switch archives := archivesIn(dir); {
	case c.host != "":
		srv, err = startGiven(ctx, c.host, archives)
	case c.daemon != "":
		srv, err = startDaemon(ctx, c.daemon, dir, archives)
	default:
		if dockerd == "" {
			dockerd = "dockerd"
		}
		srv, err = startDockerd(ctx, dir, archives, alone)
	}
	if err != nil {
		return 2, err
	}
	defer srv.stop()
	if dockerd != "" {
		if dockerd, err = exec.LookPath(dockerd); err != nil {
			return 2, err
		}
		if dockerd, err = filepath.Abs(dockerd); err != nil {
			return 2, err
		}
	}
	if dockerd != "" {
		dockerd = quote(dockerd)
	} else if c.daemon != "" {
		self, err := os.Executable()
		if err != nil {
			return 2, err
		}
		words := []string{"env"}
		for _, e := range os.Environ() { // of which tests see nothing
			if strings.HasPrefix(e, "KCRADLE_") {
				words = append(words, quote(e))
			}
		}
		dockerd = strings.Join(append(words, quote(self), asDockerd, quote(c.daemon)), " ")
	}
	r := &runner{
		same:  c.dockerd == "" && c.host == "",
		suite: suite, server: srv, dir: dir, dockerd: dockerd, timeout: c.timeout, run: c.run, remote: c.remote, log: os.Stderr,
	}
	report, err := c.runAll(ctx, r)
	return c.conclude(report, srv, err)
}

// runAll runs the packages. The report holds what ran, also on an error.
func (c *config) runAll(ctx context.Context, r *runner) (*report, error) {
	rep := &report{Suite: suiteModule + "@" + suiteVersion, Server: r.server.version, Started: time.Now().UTC(), SameDaemon: r.same}
	if c.run != nil {
		rep.Run = c.run.String()
	}
	err := r.setUp()
	for _, pkg := range c.packages {
		if err != nil {
			break
		}
		var p *packageReport
		p, err = r.packageTests(ctx, pkg)
		rep.Packages = append(rep.Packages, p)
	}
	if ctx.Err() != nil {
		err = errors.New("interrupted: what stands above is not all")
	}
	rep.Seconds = time.Since(rep.Started).Seconds()
	rep.Restarts = r.server.restarts
	if err != nil {
		rep.Error = err.Error()
	}
	return rep, err
}

// conclude writes what is to be written and says how the program ends. runErr is why the run is not whole, if it is not.
func (c *config) conclude(rep *report, srv *server, runErr error) (int, error) {
	errs := []error{runErr, rep.print(c.out)}
	if c.json != "" {
		errs = append(errs, rep.writeJSON(c.json))
	}
	if c.serveLog != "" && srv.process != nil {
		errs = append(errs, writeFile(c.serveLog, []byte(srv.process.Log()+"\n")))
	}
	list, err := readList(c.list)
	if err != nil && (c.check || c.update) {
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		return 2, err // an unfinished run writes no list and passes no check
	}
	if c.update {
		if err := writeFile(c.list, []byte(formatList(updateList(list, rep)))); err != nil {
			return 2, err
		}
	}
	if c.check {
		bad := broken(list, rep)
		if len(bad) > 0 {
			return 1, fmt.Errorf("these tests of %s did not pass:\n  %s", c.list, strings.Join(bad, "\n  "))
		}
		fmt.Fprintf(c.out, "\nevery test of %s that was to run has passed\n", c.list)
	}
	return 0, nil
}
