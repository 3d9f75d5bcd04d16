package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// clones is how many machines TestClones compares.
const clones = 50

// TestClones starts many machines from one template, and looks for what two of them have in common.
func TestClones(t *testing.T) {
	m := machineNeeds(t)
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	env := append(os.Environ(), "KCRADLE_ROOT="+filepath.Join(dir, "root"), "KCRADLE_PACKAGES="+m.packages, "KCRADLE_TEMPLATES=2GiB")
	run := func(args ...string) ([]byte, error) {
		cmd := exec.Command(m.kcradle, args...)
		cmd.Env = env
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err == nil && args[0] == "--log-level" && !strings.Contains(errs.String(), "machine restored") {
			err = fmt.Errorf("it was not restored")
		}
		if err != nil {
			err = fmt.Errorf("%s: %w\n%s", strings.Join(args, " "), err, errs.String())
		}
		return out, err
	}
	build := exec.Command("go", "build", "-o", filepath.Join(dir, "clone"), "./testdata/clone")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	l := timeServer(t)
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	const bundles = 2
	for i := range bundles {
		name := filepath.Join(dir, fmt.Sprint("vm", i))
		if _, err := run("summon", "-q", "-v", filepath.Join(dir, "clone")+":/clone:ro", name, m.image, "--", "/clone", "host.docker.internal:"+port); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := run("template", "warm", filepath.Join(dir, "vm0")); err != nil {
		t.Fatal(err)
	}
	type facts struct {
		Random, Urandom, UUID, BootID, Hostname, MAC, Stack string
		Port                                                int
		Sequence                                            uint32
		Offset, RTT, Monotonic                              time.Duration
		Backwards                                           bool
	}
	var all []facts
	for i := range clones {
		out, err := run("--log-level", "debug", "run", filepath.Join(dir, fmt.Sprint("vm", i%bundles)))
		var f facts
		if err == nil {
			err = json.Unmarshal(out, &f)
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, f)
	}
	if len(all) != clones {
		t.Fatalf("%d machines", len(all))
	}
	for name, value := range map[string]func(facts) string{
		"getrandom": func(f facts) string { return f.Random }, "urandom": func(f facts) string { return f.Urandom },
		"uuid": func(f facts) string { return f.UUID }, "boot id": func(f facts) string { return f.BootID },
		"MAC address": func(f facts) string { return f.MAC }, "stack": func(f facts) string { return f.Stack },
		"sequence number": func(f facts) string { return fmt.Sprint(f.Sequence) }, "port": func(f facts) string { return fmt.Sprint(f.Port) },
	} {
		seen := map[string]int{}
		for _, f := range all {
			seen[value(f)]++
		}
		// Ports are drawn from 28,000: one pair that is equal by chance comes once in twenty tests, two do not.
		if need := map[bool]int{true: clones - 2, false: clones}[name == "port"]; len(seen) < need || seen[""] > 0 {
			t.Errorf("%s: %d different ones in %d machines: %v", name, len(seen), clones, seen)
		}
	}
	names := map[string]bool{}
	var off []time.Duration
	for _, f := range all {
		names[f.Hostname] = true
		off = append(off, f.Offset.Abs()-f.RTT/2)
		if f.Backwards || f.Monotonic <= 0 || f.Monotonic > time.Hour {
			t.Errorf("the monotonic clock: %v, backwards %v", f.Monotonic, f.Backwards)
		}
	}
	if len(names) != bundles || !names["vm0"] || !names["vm1"] {
		t.Errorf("host names: %v", names)
	}
	// A clock is set by a message, so a host that is busy elsewhere makes it late: nine of ten must be good, none bad.
	slices.Sort(off)
	if nine, last := off[clones*9/10], off[clones-1]; nine > 20*time.Millisecond || last > 200*time.Millisecond {
		t.Errorf("clocks: nine of ten are up to %v off, the worst is %v", nine, last)
	}
	t.Logf("%d machines; clocks are off by %v at the median, %v at worst", len(all), off[clones/2], off[clones-1])
}

// timeServer answers each line with the time, nanoseconds since 1970.
func timeServer(t *testing.T) net.Listener {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				for s := bufio.NewScanner(c); s.Scan(); {
					fmt.Fprintln(c, time.Now().UnixNano())
				}
			}()
		}
	}()
	return l
}
