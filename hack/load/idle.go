package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"

	"github.com/kcradle/kcradle/bundle"
)

const mib = 1 << 20

// idleLimit is what a hundred pods that wait may take of the host's memory, in bytes.
const idleLimit = 10 << 30

// memory of processes, in bytes.
type memory struct{ pss, private, shared float64 }

func (m *memory) add(pid int) error {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 3 || f[2] != "kB" {
			continue
		}
		kib, err := strconv.ParseFloat(f[1], 64)
		if err != nil {
			return err
		}
		switch name := f[0]; {
		case name == "Pss:":
			m.pss += kib * 1024
		case strings.HasPrefix(name, "Private_") && name != "Private_Hugetlb:":
			m.private += kib * 1024
		case strings.HasPrefix(name, "Shared_") && name != "Shared_Hugetlb:":
			m.shared += kib * 1024
		}
	}
	return nil
}

// memoryUsed is what the host cannot give any more, in bytes.
func memoryUsed() (float64, error) {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	kib := map[string]float64{}
	for line := range strings.Lines(string(b)) {
		name, rest, _ := strings.Cut(line, ":")
		if kib[name], err = strconv.ParseFloat(strings.Fields(rest)[0], 64); err != nil {
			return 0, fmt.Errorf("/proc/meminfo: %w", err)
		}
	}
	return (kib["MemTotal"] - kib["MemAvailable"]) * 1024, nil
}

// idle starts pods that wait, and looks at their memory.
func (l *load) idle(ctx context.Context) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "each: PSS\tprivate\tshared\tall together: the host's loss\t  way")
	var errs []error
	for way := range strings.SplitSeq(l.ways, ",") {
		before, err := memoryUsed()
		if err != nil {
			return err
		}
		dirs := make([]string, l.n)
		pids := make([][]int, l.n)
		failed := l.each(ctx, way, l.n, func(ctx context.Context, _, i int) (err error) {
			dirs[i] = filepath.Join(l.dir, fmt.Sprintf("%s%d", way, i))
			if way == "docker" {
				pids[i], err = l.idleContainer(ctx, i)
			} else {
				pids[i], err = l.idlePod(ctx, way, dirs[i])
			}
			return err
		})
		var sum memory
		for _, list := range pids {
			for _, pid := range list {
				errs = append(errs, sum.add(pid))
			}
		}
		after, err := memoryUsed()
		errs = append(errs, err)
		n := float64(l.n)
		fmt.Fprintf(w, "%.1f MiB\t%.1f MiB\t%.1f MiB\t%.0f MiB\t  %s\n", sum.pss/n/mib, sum.private/n/mib, sum.shared/n/mib, (after-before)/mib, way)
		if failed > 0 {
			errs = append(errs, fmt.Errorf("%s: %d of %d did not start", way, failed, l.n))
		}
		if lost := after - before; way != "docker" && lost > idleLimit/100*n {
			errs = append(errs, fmt.Errorf("%s: %d idle pods take %.0f MiB, want at most %.0f", way, l.n, lost/mib, idleLimit/100*n/mib))
		}
		left := l.each(context.WithoutCancel(ctx), "stop "+way, l.n, func(ctx context.Context, _, i int) error {
			if way == "docker" {
				return quiet(l.dockerd.Docker(ctx, "rm", "-f", "idle"+strconv.Itoa(i)))
			}
			return quiet(l.command(ctx, way, "kill", dirs[i]))
		})
		if left > failed {
			errs = append(errs, fmt.Errorf("%s: %d could not be ended", way, left-failed))
		}
	}
	return errors.Join(errors.Join(errs...), w.Flush())
}

// idlePod starts a pod and returns its processes: supervisor and QEMU.
func (l *load) idlePod(ctx context.Context, way, dir string) ([]int, error) {
	if err := l.summon(ctx, dir, "sleep", "1000000"); err != nil {
		return nil, err
	}
	if err := quiet(l.command(ctx, way, "run", "-d", "--network", "none", dir)); err != nil {
		return nil, err
	}
	b, err := bundle.Open(dir)
	if err != nil {
		return nil, err
	}
	st, ok, err := b.State()
	if err != nil || !ok || st.MachinePid == 0 {
		return nil, fmt.Errorf("state of %s: %+v, %w", dir, st, err)
	}
	return []int{st.Pid, st.MachinePid}, nil
}

// idleContainer starts a container and returns its processes: its own and its shim's, which is its parent.
func (l *load) idleContainer(ctx context.Context, i int) ([]int, error) {
	name := "idle" + strconv.Itoa(i)
	if err := quiet(l.dockerd.Docker(ctx, "run", "-d", "--network", "none", "--name", name, l.image.Ref, "sleep", "1000000")); err != nil {
		return nil, err
	}
	out, err := l.dockerd.Docker(ctx, "inspect", "--format", "{{.State.Pid}}", name).Output()
	if err != nil {
		return nil, err
	}
	pid, err := strconv.Atoi(string(bytes.TrimSpace(out)))
	if err != nil {
		return nil, err
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return nil, err
	}
	// pid (name) state parent
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	parent, err := strconv.Atoi(fields[1])
	return []int{pid, parent}, err
}
