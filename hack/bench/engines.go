package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
)

// engine is a server of the Docker API: our daemon, or dockerd. Both do the same things with the same client.
type engine string

const (
	ours   engine = "kcradle daemon"
	theirs engine = "dockerd"
)

// Sizes of what the engines are measured with.
const (
	manyContainers = 100
	logBytes       = 100 * mib
	fileBytes      = 1 << 30
)

// engineRow is a measurement of both engines. To add one, add a row.
type engineRow struct {
	name string // of the case, behind the engine's
	what string
	rate bool
	once func(*engines, context.Context, engine) (sample, error)
}

var engineRows = []engineRow{
	{"run", "docker run --rm, to its exit", false, (*engines).run},
	{"exec", "docker exec, to its exit", false, (*engines).exec},
	{"ps", "docker ps -a with 100 containers", false, (*engines).ps},
	{"logs", "docker logs of 100 MiB, of what runs", true, (*engines).logs},
	{"stopped logs", "docker logs of 100 MiB, of what has stopped", true, (*engines).stoppedLogs},
	{"cp in", "docker cp of 1 GiB, in", true, (*engines).cpIn},
	{"cp out", "docker cp of 1 GiB, out", true, (*engines).cpOut},
	{"pull", "docker pull of nginx, from a registry of this host", false, (*engines).pull},
	{"load", "docker load of nginx", false, (*engines).load},
}

// engineCases are the rows of the table of cases: ours, then theirs, over which ours is divided.
func engineCases() (out []benchCase) {
	for _, row := range engineRows {
		for _, e := range []engine{theirs, ours} {
			r := result{key: "took", label: fmt.Sprintf("%s: %s", e, row.what), rate: row.rate}
			if e == ours {
				r.over = fmt.Sprintf("%s %s/took", theirs, row.name)
			}
			out = append(out, benchCase{fmt.Sprintf("%s %s", e, row.name), []result{r}, func(ctx context.Context, b *bench) (sample, error) {
				if b.engines == nil {
					var err error
					if b.engines, err = startEngines(ctx, b); err != nil {
						return nil, err
					}
				}
				return row.once(b.engines, ctx, e)
			}})
		}
	}
	return out
}

// engines are both servers, with what the rows have made in them so far.
type engines struct {
	b        *bench
	daemon   *servers.Daemon
	registry *servers.Registry
	made     map[string]bool // by engine and row
	file     string          // of fileBytes
}

func startEngines(ctx context.Context, b *bench) (_ *engines, err error) {
	dir := filepath.Join(b.dir, "k")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Join(dir, "r"), 0o755); err != nil {
		return nil, err
	}
	g := &engines{b: b, made: map[string]bool{}, file: filepath.Join(b.dir, "large")}
	if g.registry, err = servers.StartRegistry(ctx, filepath.Join(dir, "r")); err != nil {
		return nil, err
	}
	// The daemon is started as a user starts it, but for the registry without TLS.
	if err := os.Setenv("KCRADLE_PLAIN_HTTP", g.registry.Addr); err != nil {
		return nil, err
	}
	if g.daemon, err = servers.StartDaemon(ctx, dir, b.kcradle); err != nil {
		g.stop()
		return nil, err
	}
	cache, err := images.Open("", os.Stderr)
	if err == nil {
		var busybox *images.Built
		if busybox, err = cache.Build(ctx, "busybox"); err == nil {
			err = quiet(g.docker(ctx, ours, "load", "--quiet", "--input", busybox.Archive))
		}
	}
	if err == nil {
		err = writeNoise(g.file, fileBytes)
	}
	if err != nil {
		g.stop()
		return nil, err
	}
	return g, nil
}

// stop ends what was started, and the containers of our daemon, which outlive it.
func (g *engines) stop() {
	ctx := context.Background()
	if g.daemon != nil {
		if out, err := g.docker(ctx, ours, "ps", "-aq").Output(); err == nil && len(out) > 0 {
			_ = g.docker(ctx, ours, append([]string{"rm", "-f"}, strings.Fields(string(out))...)...).Run()
		}
		g.daemon.Stop()
	}
	if out, err := g.docker(ctx, theirs, "ps", "-aq").Output(); err == nil && len(out) > 0 {
		_ = g.docker(ctx, theirs, append([]string{"rm", "-f"}, strings.Fields(string(out))...)...).Run()
	}
	g.registry.Stop()
}

func (g *engines) docker(ctx context.Context, e engine, args ...string) *exec.Cmd {
	if e == ours {
		return servers.Client(ctx, g.daemon.Host, args...)
	}
	return g.b.dockerd.Docker(ctx, args...)
}

// once runs commands the first time that an engine needs what they make.
func (g *engines) once(ctx context.Context, e engine, what string, commands ...[]string) error {
	if g.made[string(e)+what] {
		return nil
	}
	for _, args := range commands {
		if err := quiet(g.docker(ctx, e, args...)); err != nil {
			return err
		}
	}
	g.made[string(e)+what] = true
	return nil
}

func took(t float64, err error) (sample, error) { return sample{"took": t}, err }

func speed(bytes float64, t float64, err error) (sample, error) {
	return sample{"took": bytes / t}, err
}

const busyboxRef = "test/busybox"

// standing is a container that runs all the time.
func (g *engines) standing(ctx context.Context, e engine) error {
	return g.once(ctx, e, "standing", []string{"run", "-d", "--network", "none", "--name", "standing", busyboxRef, "sleep", "1000000"})
}

func (g *engines) run(ctx context.Context, e engine) (sample, error) {
	return took(timed(g.docker(ctx, e, "run", "--rm", "--network", "none", busyboxRef, "true")))
}

func (g *engines) exec(ctx context.Context, e engine) (sample, error) {
	if err := g.standing(ctx, e); err != nil {
		return nil, err
	}
	return took(timed(g.docker(ctx, e, "exec", "standing", "true")))
}

func (g *engines) ps(ctx context.Context, e engine) (sample, error) {
	var create [][]string
	for i := range manyContainers {
		create = append(create, []string{"create", "--network", "none", "--name", "many" + strconv.Itoa(i), busyboxRef, "true"})
	}
	if err := g.once(ctx, e, "many", create...); err != nil {
		return nil, err
	}
	return took(timed(g.docker(ctx, e, "ps", "-a")))
}

// logOf is a container that has written logBytes, in lines of 100 bytes.
func (g *engines) logOf(ctx context.Context, e engine, name, then string) error {
	line := strings.Repeat("x", 99)
	return g.once(ctx, e, name, []string{"run", "-d", "--network", "none", "--name", name, busyboxRef, "sh", "-c",
		fmt.Sprintf("yes %s | head -c %d; touch /done; %s", line, logBytes, then)})
}

func (g *engines) logs(ctx context.Context, e engine) (sample, error) {
	if err := g.logOf(ctx, e, "talker", "exec sleep 1000000"); err != nil {
		return nil, err
	}
	for g.docker(ctx, e, "exec", "talker", "test", "-e", "/done").Run() != nil {
		select {
		case <-time.After(100 * time.Millisecond): // nobody tells
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return g.readLogs(ctx, e, "talker")
}

func (g *engines) stoppedLogs(ctx context.Context, e engine) (sample, error) {
	if err := g.logOf(ctx, e, "told", "true"); err != nil {
		return nil, err
	}
	if err := quiet(g.docker(ctx, e, "wait", "told")); err != nil {
		return nil, err
	}
	return g.readLogs(ctx, e, "told")
}

// readLogs counts what comes: an engine may keep less than was written.
func (g *engines) readLogs(ctx context.Context, e engine, name string) (sample, error) {
	cmd := g.docker(ctx, e, "logs", name)
	n := counter(0)
	cmd.Stdout = &n
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return nil, err
	}
	t := time.Since(start).Seconds()
	if n < logBytes {
		fmt.Fprintf(os.Stderr, "%s has kept %d MiB of the log's %d\n", e, n/mib, logBytes/mib)
	}
	return speed(float64(n), t, nil)
}

type counter int64

func (c *counter) Write(b []byte) (int, error) {
	*c += counter(len(b))
	return len(b), nil
}

func (g *engines) cpIn(ctx context.Context, e engine) (sample, error) {
	if err := g.standing(ctx, e); err != nil {
		return nil, err
	}
	t, err := timed(g.docker(ctx, e, "cp", "-q", g.file, "standing:/large"))
	return speed(fileBytes, t, err)
}

func (g *engines) cpOut(ctx context.Context, e engine) (sample, error) {
	if err := g.standing(ctx, e); err != nil {
		return nil, err
	}
	if g.docker(ctx, e, "exec", "standing", "test", "-e", "/large").Run() != nil {
		if err := quiet(g.docker(ctx, e, "cp", "-q", g.file, "standing:/large")); err != nil {
			return nil, err
		}
	}
	out := filepath.Join(g.b.dir, "large-copied")
	defer os.Remove(out)
	t, err := timed(g.docker(ctx, e, "cp", "-q", "standing:/large", out))
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(out)
	if err == nil && info.Size() != fileBytes {
		err = fmt.Errorf("docker cp copied %d bytes of %d", info.Size(), fileBytes)
	}
	return speed(fileBytes, t, err)
}

// pull pulls from the registry, into which the image was pushed by dockerd.
func (g *engines) pull(ctx context.Context, e engine) (sample, error) {
	ref := g.registry.Addr + "/bench:1"
	if err := g.once(ctx, theirs, "pushed", []string{"load", "--quiet", "--input", g.b.archive}, []string{"tag", g.b.ref, ref},
		[]string{"push", "--quiet", ref}, []string{"image", "rm", ref, g.b.ref}); err != nil {
		return nil, err
	}
	t, err := timed(g.docker(ctx, e, "pull", "--quiet", ref))
	if err != nil {
		return nil, err
	}
	return took(t, quiet(g.docker(ctx, e, "image", "rm", ref)))
}

func (g *engines) load(ctx context.Context, e engine) (sample, error) {
	t, err := timed(g.docker(ctx, e, "load", "--quiet", "--input", g.b.archive))
	if err != nil {
		return nil, err
	}
	return took(t, quiet(g.docker(ctx, e, "image", "rm", g.b.ref)))
}
