package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/initrd"
	"github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
	"github.com/kcradle/kcradle/vmm/pool"
)

// payload is the size of the file that docker cp copies.
const payload = 64 * mib

// containerName is the name of the container that runs all the time, in the pod and in docker.
const containerName = "bench"

// bench is what is set up once.
type bench struct {
	kcradle string
	dir     string // holds all state; short
	dockerd *servers.Dockerd
	pool    *exec.Cmd // nil: not started yet
	engines *engines  // nil: not started yet

	archive  string // of the image that summon and docker load take
	ref      string // its tag
	runDir   string // bundle that prints a line
	podDir   string // bundle that runs all the time
	file     string // of payload bytes
	floor    []string
	pod      bundle.State
	qemuPath string
}

func setUp(ctx context.Context, c config) (_ *bench, err error) {
	b := &bench{}
	if b.kcradle, err = filepath.Abs(c.kcradle); err != nil {
		return nil, err
	}
	if _, err := os.Stat(b.kcradle); err != nil {
		return nil, fmt.Errorf("%w (make build)", err)
	}
	if b.dir, err = servers.TempDir(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			b.tearDown()
		}
	}()
	cache, err := images.Open("", os.Stderr)
	if err != nil {
		return nil, err
	}
	busybox, err := cache.Build(ctx, "busybox")
	if err != nil {
		return nil, err
	}
	nginx, err := cache.Build(ctx, "nginx")
	if err != nil {
		return nil, err
	}
	b.archive, b.ref = nginx.Archive, nginx.Ref

	if b.dockerd, err = startDockerd(ctx, b.dir); err != nil {
		return nil, err
	}
	b.runDir, b.podDir = filepath.Join(b.dir, "run"), filepath.Join(b.dir, "pod")
	b.file = filepath.Join(b.dir, "payload")
	if err := writeNoise(b.file, payload); err != nil {
		return nil, err
	}
	source := "docker-archive:" + busybox.Archive
	forever := []string{"sleep", "1000000"}
	for _, cmd := range []*exec.Cmd{
		b.dockerd.Docker(ctx, "load", "--quiet", "--input", busybox.Archive),
		b.dockerd.Docker(ctx, append([]string{"run", "-d", "--network", "none", "--name", containerName, busybox.Ref}, forever...)...),
		b.command(ctx, "summon", b.runDir, source, "--", "echo", "hello"),
		b.command(ctx, append([]string{"summon", "--name", containerName, b.podDir, source, "--"}, forever...)...),
		b.command(ctx, "run", "-d", "--network", "none", b.podDir),
	} {
		if err := quiet(cmd); err != nil {
			return nil, err
		}
	}
	opened, err := bundle.Open(b.podDir)
	if err != nil {
		return nil, err
	}
	state, ok, err := opened.State()
	if err != nil || !ok {
		return nil, fmt.Errorf("state of %s: %w", b.podDir, err)
	}
	b.pod = state
	return b, b.prepareFloor(ctx)
}

func startDockerd(ctx context.Context, dir string) (*servers.Dockerd, error) {
	dir = filepath.Join(dir, "d")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	return servers.StartDockerd(ctx, dir)
}

func (b *bench) tearDown() {
	if b.podDir != "" {
		_ = b.command(context.Background(), "kill", b.podDir).Run() // it may not have been started
	}
	if b.pool != nil {
		_ = b.pool.Process.Signal(syscall.SIGTERM)
		_ = b.pool.Wait()
	}
	if b.engines != nil {
		b.engines.stop()
	}
	if b.dockerd != nil {
		_ = b.dockerd.Docker(context.Background(), "rm", "-f", containerName).Run()
		b.dockerd.Stop()
	}
	if err := os.RemoveAll(b.dir); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
	}
}

// command is kcradle with a state directory of its own.
func (b *bench) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, b.kcradle, args...)
	cmd.Env = append(os.Environ(), "KCRADLE_TEMPLATES=off", "KCRADLE_ROOT="+filepath.Join(b.dir, "root"))
	return cmd
}

// podDocker is the docker client speaking to the pod.
func (b *bench) podDocker(ctx context.Context, args ...string) *exec.Cmd {
	return servers.Client(ctx, "unix://"+filepath.Join(b.podDir, "run/vdocker.sock"), args...)
}

// writeNoise makes a file of bytes that do not compress.
func writeNoise(path string, n int64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = io.CopyN(f, rand.Reader, n)
	return err
}

func quiet(cmd *exec.Cmd) error {
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: %w\n%s", strings.Join(append([]string{filepath.Base(cmd.Path)}, cmd.Args[1:]...), " "), err, bytes.TrimSpace(out.Bytes()))
	}
	return nil
}

// measure runs cmd; want is what its stdout must hold.
func measure(cmd *exec.Cmd, want string) (sample, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	var b [1]byte
	_, readErr := io.ReadFull(out, b[:])
	first := time.Since(start)
	rest, restErr := io.ReadAll(out)
	err = cmd.Wait()
	exit := time.Since(start)
	if err := errors.Join(err, readErr, restErr); err != nil {
		return nil, fmt.Errorf("%s: %w\n%s%s\n%s", filepath.Base(cmd.Path), err, b, rest, bytes.TrimSpace(stderr.Bytes()))
	}
	if got := string(b[:]) + string(rest); !strings.Contains(got, want) {
		return nil, fmt.Errorf("%s printed %q, want %q in it", filepath.Base(cmd.Path), got, want)
	}
	return sample{"first": first.Seconds(), "exit": exit.Seconds()}, nil
}

// timed runs cmd and returns how long it took.
func timed(cmd *exec.Cmd) (float64, error) {
	start := time.Now()
	if err := quiet(cmd); err != nil {
		return 0, err
	}
	return time.Since(start).Seconds(), nil
}

func runFloor(ctx context.Context, b *bench) (sample, error) {
	return measure(exec.CommandContext(ctx, b.qemuPath, b.floor...), "floor")
}

func runKcradle(ctx context.Context, b *bench) (sample, error) {
	return measure(b.command(ctx, "run", "--network", "none", b.runDir), "hello")
}

// warm is kcradle with templates, in a state directory of that name.
func (b *bench) warm(ctx context.Context, root string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, b.kcradle, args...)
	cmd.Env = append(os.Environ(), "KCRADLE_TEMPLATES=2GiB", "KCRADLE_ROOT="+filepath.Join(b.dir, root))
	return cmd
}

func runTemplate(ctx context.Context, b *bench) (sample, error) {
	if err := quiet(b.warm(ctx, "template", "template", "warm", "--network", "none", b.runDir)); err != nil { // the first time it takes long
		return nil, err
	}
	return measure(b.warm(ctx, "template", "run", "--network", "none", b.runDir), "hello")
}

// poolSize is how many machines stand ready before each start.
const poolSize = 2

func runPool(ctx context.Context, b *bench) (sample, error) {
	cmd, err := b.pooled(ctx, b.runDir)
	if err != nil {
		return nil, err
	}
	return measure(cmd, "hello")
}

// pooled is a start of a bundle by a machine of the pool, which stands ready.
func (b *bench) pooled(ctx context.Context, dir string) (*exec.Cmd, error) {
	if b.pool == nil {
		b.pool = b.warm(ctx, "pool", "pool", "--size", strconv.Itoa(poolSize), "--network", "none", b.runDir)
		b.pool.Cancel = func() error { return b.pool.Process.Signal(syscall.SIGTERM) }
		b.pool.Stderr = os.Stderr
		if err := b.pool.Start(); err != nil {
			return nil, err
		}
	}
	return b.warm(ctx, "pool", "run", "--network", "none", dir), b.awaitPool(ctx)
}

// awaitPool waits until the pool is full and has nothing to do.
func (b *bench) awaitPool(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for {
		st, err := pool.Ask(ctx, filepath.Join(b.dir, "pool", "pool", "pool.sock"))
		if err == nil && len(st.Shapes) == 1 && st.Shapes[0].Ready == poolSize {
			return nil
		}
		select {
		case <-time.After(50 * time.Millisecond): // it tells nobody
		case <-ctx.Done():
			return fmt.Errorf("the pool was not filled: %+v, %w", st, err)
		}
	}
}

func runDocker(ctx context.Context, b *bench) (sample, error) {
	return measure(b.dockerd.Docker(ctx, "run", "--rm", "--network", "none", "test/busybox", "echo", "hello"), "hello")
}

func execPod(ctx context.Context, b *bench) (sample, error) {
	return measure(b.podDocker(ctx, "exec", containerName, "echo", "hello"), "hello")
}

func execDocker(ctx context.Context, b *bench) (sample, error) {
	return measure(b.dockerd.Docker(ctx, "exec", containerName, "echo", "hello"), "hello")
}

func runSummon(ctx context.Context, b *bench) (sample, error) {
	dir, err := os.MkdirTemp(b.dir, "")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	cmd := b.command(ctx, "--root", filepath.Join(dir, "root"), "summon", filepath.Join(dir, "vm"), "docker-archive:"+b.archive)
	t, err := timed(cmd)
	return sample{"exit": t}, err
}

func runLoad(ctx context.Context, b *bench) (sample, error) {
	t, err := timed(b.dockerd.Docker(ctx, "load", "--quiet", "--input", b.archive))
	if err != nil {
		return nil, err
	}
	return sample{"exit": t}, quiet(b.dockerd.Docker(ctx, "image", "rm", b.ref))
}

func rate(t float64, err error) (sample, error) { return sample{"rate": payload / t}, err }

func cpToPod(ctx context.Context, b *bench) (sample, error) {
	return rate(timed(b.podDocker(ctx, "cp", b.file, containerName+":/tmp/payload")))
}

func cpToDocker(ctx context.Context, b *bench) (sample, error) {
	return rate(timed(b.dockerd.Docker(ctx, "cp", b.file, containerName+":/tmp/payload")))
}

// cpFrom copies the payload out; the first time it is put there before.
func cpFrom(ctx context.Context, b *bench, docker func(context.Context, ...string) *exec.Cmd) (sample, error) {
	if err := docker(ctx, "exec", containerName, "test", "-e", "/tmp/payload").Run(); err != nil {
		if err := quiet(docker(ctx, "cp", b.file, containerName+":/tmp/payload")); err != nil {
			return nil, err
		}
	}
	out := filepath.Join(b.dir, "copied")
	defer os.Remove(out)
	s, err := rate(timed(docker(ctx, "cp", containerName+":/tmp/payload", out)))
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(out)
	if err != nil {
		return nil, err
	}
	if info.Size() != payload {
		return nil, fmt.Errorf("docker cp copied %d bytes of %d", info.Size(), payload)
	}
	return s, nil
}

func cpFromPod(ctx context.Context, b *bench) (sample, error) { return cpFrom(ctx, b, b.podDocker) }
func cpFromDocker(ctx context.Context, b *bench) (sample, error) {
	return cpFrom(ctx, b, b.dockerd.Docker)
}

// supervisorMemory is what would be free again if the supervisor of the running pod were not there.
func supervisorMemory(_ context.Context, b *bench) (sample, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", b.pod.Pid))
	if err != nil {
		return nil, err
	}
	sum := 0.0
	for line := range strings.Lines(string(raw)) {
		if rest, ok := strings.CutPrefix(line, "Private_"); ok {
			f := strings.Fields(rest)
			kib, err := strconv.ParseFloat(f[1], 64)
			if err != nil {
				return nil, err
			}
			sum += kib * 1024
		}
	}
	return sample{"private": sum}, nil
}

// prepareFloor makes the floor's initrd and takes its flags from the QEMU that kcradle has started.
func (b *bench) prepareFloor(ctx context.Context) error {
	pid := b.pod.MachinePid
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return err
	}
	args := strings.Split(strings.TrimSuffix(string(raw), "\x00"), "\x00")
	if b.qemuPath, err = os.Readlink(fmt.Sprintf("/proc/%d/exe", pid)); err != nil {
		return err
	}
	archive, err := b.floorInitrd(ctx)
	if err != nil {
		return err
	}
	opened, err := bundle.Open(b.podDir)
	if err != nil {
		return err
	}
	machine, err := opened.Package()
	if err != nil {
		return err
	}
	b.floor, err = floorArgs(args[1:], machine.KernelPath(), archive)
	return err
}

// floorInitrd builds the floor's /init and an initrd of it.
func (b *bench) floorInitrd(ctx context.Context) (string, error) {
	init, archive := filepath.Join(b.dir, "init"), filepath.Join(b.dir, "initrd.cpio")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s -w", "-o", init, "github.com/kcradle/kcradle/hack/bench/floor")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if err := quiet(build); err != nil {
		return "", err
	}
	return archive, initrd.Write(ctx, archive, init)
}

// floorArgs turns the flags of a pod's QEMU into those of the floor: no drives, no wire, no control sockets, the console
// on stdout.
func floorArgs(args []string, kernel, initrd string) ([]string, error) {
	var out []string
	kernelSeen, consoleSeen := false, false
	for i := 0; i < len(args); i++ {
		option := args[i]
		value, has := "", i+1 < len(args) && !strings.HasPrefix(args[i+1], "-")
		if has {
			value = args[i+1]
			i++
		}
		kind, _, _ := strings.Cut(value, ",")
		switch {
		case option == "-blockdev" || option == "-add-fd" || option == "-netdev" || option == "-mon":
			continue
		case option == "-device" && (strings.HasPrefix(kind, "virtio-blk") || strings.HasPrefix(kind, "virtio-net") || strings.HasPrefix(kind, "vhost-vsock")):
			continue
		case option == "-chardev" && strings.Contains(value, "id=qmp"):
			continue
		case option == "-chardev" && strings.Contains(value, "id=console"):
			value, consoleSeen = "stdio,id=console,signal=off", true
		case option == "-chardev" && strings.Contains(value, "id=channel"):
			value = "null,id=channel"
		case option == "-kernel":
			value, kernelSeen = kernel, true
		case option == "-initrd":
			value = initrd
		case option == "-name":
			value = "floor"
		}
		out = append(out, option)
		if has {
			out = append(out, value)
		}
	}
	if !kernelSeen || !consoleSeen {
		return nil, fmt.Errorf("the flags of a pod's QEMU hold no kernel or no console: %q", args)
	}
	return out, nil
}

// host says what the numbers were measured on.
func (b *bench) host() string {
	var lines []string
	engine := "engine " + b.pod.Engine
	if b.pod.Engine == "tcg" {
		engine += " (no hardware virtualization here: QEMU translates every instruction of the guest)"
	}
	lines = append(lines, engine)
	if out, err := exec.Command(b.qemuPath, "--version").Output(); err == nil {
		first, _, _ := strings.Cut(string(out), "\n")
		lines = append(lines, first)
	}
	if raw, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		lines = append(lines, "host kernel "+strings.TrimSpace(string(raw)))
	}
	load := ""
	if raw, err := os.ReadFile("/proc/loadavg"); err == nil {
		load, _, _ = strings.Cut(string(raw), " ")
	}
	lines = append(lines, fmt.Sprintf("%d processors (%s), load %s", runtime.NumCPU(), model(), load))
	return strings.Join(lines, "\n") + "\n"
}

func model() string {
	raw, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(raw)) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}
