package tour

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
)

//go:embed testdata/daemon.sh
var daemonScript string

// difference is what may differ between dockerd 20.10 and the daemon, and why.
type difference struct {
	lines string // regular expression over the script's lines; empty: all
	why   string
	find  *regexp.Regexp // in what both say
	with  string
}

// TestDaemon walks testdata/daemon.sh with dockerd and with ours.
func TestDaemon(t *testing.T) {
	need.Long(t)
	need.Root(t)
	for _, program := range []string{"docker", "dockerd", "qemu-system-x86_64", "debootstrap", "iptables"} {
		need.Command(t, program, "hack/deps test")
	}
	path := os.Getenv("KCRADLE")
	if path == "" {
		path = "../../bin/kcradle"
	}
	kcradle, err := filepath.Abs(need.File(t, path, "make build"))
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("KCRADLE_TEMPLATES", "off")
	cache, err := images.Open("", os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := cache.Build(t.Context(), "busybox")
	if err != nil {
		t.Fatal(err)
	}
	dirs := [2]string{}
	for i := range dirs {
		if dirs[i], err = servers.TempDir(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dirs[i]) })
	}
	ours, err := servers.StartDaemon(t.Context(), dirs[0], kcradle)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(ours.Stop)
	theirs := dockerdAlone(t, dirs[1])
	hosts := [2]Host{{Name: "kcradle", Address: ours.Host}, {Name: "dockerd", Address: theirs.Host}}
	t.Cleanup(func() {
		for _, h := range hosts {
			_ = h.shell(context.Background(), "/", "docker rm -fv $(docker ps -aq)").Run() // what a failure has left
		}
	})
	for i, h := range hosts {
		if out, err := h.Docker(t.Context(), "load", "-i", busybox.Archive).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v: %s", h.Name, err, out)
		}
		dirs[i] = filepath.Join(dirs[i], "files")
		if err := os.Mkdir(dirs[i], 0o755); err != nil {
			t.Fatal(err)
		}
	}
	used := map[string]bool{}
	for line := range strings.Lines(daemonScript) {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		t.Run(line, func(t *testing.T) {
			var got [2]result
			var errs [2]error
			var both sync.WaitGroup
			for i, h := range hosts {
				both.Go(func() {
					got[i], errs[i] = h.line(t.Context(), dirs[i], strings.ReplaceAll(line, "IMG", strings.TrimSuffix(busybox.Ref, ":latest")))
				})
			}
			both.Wait()
			if err := errors.Join(errs[:]...); err != nil {
				t.Fatal(err)
			}
			for _, d := range differences() {
				if d.lines != "" && !regexp.MustCompile(d.lines).MatchString(line) {
					continue
				}
				for i := range got {
					for _, s := range []*string{&got[i].Stdout, &got[i].Stderr} {
						if d.find.MatchString(*s) {
							used[d.why] = true
							*s = d.find.ReplaceAllString(*s, d.with)
						}
					}
				}
			}
			if d := cmp.Diff(got[1].normal(), got[0].normal()); d != "" {
				t.Errorf("dockerd's answer (-), ours (+):\n%s", d)
			}
		})
	}
	for _, d := range differences() {
		if !used[d.why] && !t.Failed() {
			t.Errorf("a difference that is none any more: %s", d.why)
		}
	}
}

// dockerdAlone starts a dockerd with its bridge, in a network namespace that nothing else is in.
func dockerdAlone(t *testing.T, dir string) *servers.Dockerd {
	t.Helper()
	var d *servers.Dockerd
	var err error
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the thread ends with its goroutine
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return
		}
		var lo netlink.Link
		if lo, err = netlink.LinkByName("lo"); err != nil {
			return
		}
		if err = netlink.LinkSetUp(lo); err != nil {
			return
		}
		d, err = servers.StartDockerdWithNetworks(t.Context(), dir)
	}()
	<-done
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	return d
}

// shell is a line of the script.
func (h Host) shell(ctx context.Context, dir, line string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "sh", "-c", line)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+h.Address, "DOCKER_CONFIG=/nonexistent", "DOCKER_CONTEXT=", "DOCKER_CLI_HINTS=false", "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (h Host) line(ctx context.Context, dir, line string) (result, error) {
	ctx, cancel := context.WithTimeout(ctx, stepTimeout)
	defer cancel()
	cmd := h.shell(ctx, dir, line)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	r := result{Stdout: strings.ReplaceAll(stdout.String(), dir, "@"), Stderr: strings.ReplaceAll(stderr.String(), dir, "@"), Code: cmd.ProcessState.ExitCode()}
	if ctx.Err() != nil {
		return r, fmt.Errorf("%s has not ended within %s\nstdout: %.2000s\nstderr: %.2000s", h.Name, stepTimeout, r.Stdout, r.Stderr)
	}
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		return r, fmt.Errorf("%s: %w", h.Name, err)
	}
	return r, nil
}

// differences is the whole list.
func differences() []difference {
	re := regexp.MustCompile
	return []difference{
		// 28 says something else than 20.10.
		{why: "the name of the default network", lines: "HostConfig.CapDrop", find: re(` (default|bridge) null`), with: " NETWORK null"},
		{why: "words for a running container that is removed", find: re(`You cannot remove a running container .*|cannot remove container "/\w+": container is running: .*`), with: "container is running"},
		{why: "who says that a signal is none", find: re(`cannot kill container: goes: (invalid signal)`), with: "$1"},
		{why: "the code of an exec whose program is not there", lines: "exec goes no-such-program", find: re(`12[67]`), with: "12N"},
		{why: "words for addresses that are taken", find: re(`(invalid pool request: )?Pool overlaps with other one on this address space.*`), with: "Pool overlaps"},
		{why: "words for a subnet that is none", find: re(`[Ii]nvalid (network config:\s+invalid )?subnet nonsense.*`), with: "invalid subnet"},
		{why: "words for a network that is in use", find: re(`network net1( id \S+)? has active endpoints( \(name:.*\))?`), with: "network net1 has active endpoints"},
		// A machine is not a host's process.
		{why: "there are as many processors as a machine can have", find: re(`to \d+\.00, as there are .*`), with: "to N"},
		{why: "columns of ps are known here, not there", lines: "docker top goes nonsense", find: re(`ps(: error| nonsense): .*`), with: "ps: …"},
		{why: "a machine knows its container by ID", find: re(`(Could not find the file \S+ in container) \S+`), with: "$1"},
		{why: "a name without a tag is completed", find: re(`No such image: nonesuch:latest`), with: "No such image: nonesuch"},
	}
}
