package container

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Cgroup is a container's control group, version 2.
type Cgroup struct {
	root string // mount point of the hierarchy
	dir  string
}

// setting is one value written to a file of a cgroup.
type setting struct{ file, value string }

// settings translates OCI resources into files of cgroup v2.
func settings(r *specs.LinuxResources) ([]setting, error) {
	var out []setting
	add := func(file, value string) { out = append(out, setting{file, value}) }
	if m := r.Memory; m != nil {
		if m.Reservation != nil && *m.Reservation > 0 {
			add("memory.low", bytesOrMax(*m.Reservation))
		}
		if m.Limit != nil && *m.Limit != 0 {
			add("memory.max", bytesOrMax(*m.Limit))
		}
		// OCI counts memory and swap together, cgroup v2 swap alone. Docker's default is as much swap as memory.
		switch {
		case m.Swap != nil && *m.Swap < 0:
			add("memory.swap.max", "max")
		case m.Swap != nil && *m.Swap > 0:
			if m.Limit == nil || *m.Limit <= 0 {
				return nil, errors.New("a swap limit needs a memory limit")
			}
			if *m.Swap < *m.Limit {
				return nil, errors.New("minimum memoryswap limit should be larger than memory limit")
			}
			add("memory.swap.max", strconv.FormatInt(*m.Swap-*m.Limit, 10))
		case m.Limit != nil && *m.Limit > 0:
			add("memory.swap.max", strconv.FormatInt(*m.Limit, 10))
		}
	}
	if c := r.CPU; c != nil {
		if c.Shares != nil && *c.Shares != 0 {
			add("cpu.weight", strconv.FormatUint(weight(*c.Shares), 10))
		}
		if c.Quota != nil && *c.Quota != 0 || c.Period != nil && *c.Period != 0 {
			quota, period := "max", uint64(100000)
			if c.Quota != nil && *c.Quota > 0 {
				quota = strconv.FormatInt(*c.Quota, 10)
			}
			if c.Period != nil && *c.Period != 0 {
				period = *c.Period
			}
			add("cpu.max", quota+" "+strconv.FormatUint(period, 10))
		}
		if c.Cpus != "" {
			add("cpuset.cpus", c.Cpus)
		}
		if c.Mems != "" {
			add("cpuset.mems", c.Mems)
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil && *p.Limit != 0 {
		add("pids.max", bytesOrMax(*p.Limit))
	}
	if b := r.BlockIO; b != nil {
		if b.Weight != nil && *b.Weight != 0 {
			add("io.weight", "default "+strconv.FormatUint(uint64(*b.Weight), 10))
		}
		for _, l := range []struct {
			key     string
			devices []specs.LinuxThrottleDevice
		}{
			{"rbps", b.ThrottleReadBpsDevice}, {"wbps", b.ThrottleWriteBpsDevice},
			{"riops", b.ThrottleReadIOPSDevice}, {"wiops", b.ThrottleWriteIOPSDevice},
		} {
			for _, d := range l.devices {
				add("io.max", fmt.Sprintf("%d:%d %s=%d", d.Major, d.Minor, l.key, d.Rate))
			}
		}
	}
	for _, key := range slices.Sorted(maps.Keys(r.Unified)) {
		if strings.Contains(key, "/") || strings.HasPrefix(key, "cgroup.") {
			return nil, fmt.Errorf("cgroup file %q may not be set", key)
		}
		add(key, r.Unified[key])
	}
	return out, nil
}

// weight translates docker's CPU shares (2 to 262144, default 1024) into a weight (1 to 10000, default 100), as runc did
// for years: 1024 shares are weight 39.
func weight(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

func bytesOrMax(n int64) string {
	if n < 0 {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}

// NewCgroup makes a container's cgroup under the hierarchy mounted at root and sets its limits. A cgroup of that name
// that is left over and empty is taken.
func NewCgroup(root, name string, r *specs.LinuxResources) (*Cgroup, error) {
	want, err := settings(r)
	if err != nil {
		return nil, err
	}
	g := &Cgroup{root: root, dir: filepath.Join(root, name)}
	if err := os.Mkdir(g.dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	for _, s := range want {
		if err := g.write(s.file, s.value); err != nil {
			g.Remove(context.Background())
			return nil, fmt.Errorf("set %s to %q: %w", s.file, s.value, err)
		}
	}
	return g, nil
}

// Update changes limits of a living cgroup.
func (g *Cgroup) Update(r *specs.LinuxResources) error {
	want, err := settings(r)
	if err != nil {
		return err
	}
	for _, s := range want {
		if err := g.write(s.file, s.value); err != nil {
			return fmt.Errorf("set %s to %q: %w", s.file, s.value, err)
		}
	}
	return nil
}

// Dir is the cgroup's directory.
func (g *Cgroup) Dir() string { return g.dir }

// write writes a file without creating it: in a hierarchy that lacks the controller the file is missing.
func (g *Cgroup) write(file, value string) error {
	f, err := os.OpenFile(filepath.Join(g.dir, file), os.O_WRONLY, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			controller, _, _ := strings.Cut(file, ".")
			return fmt.Errorf("the kernel's cgroup hierarchy has no controller %q: %w", controller, err)
		}
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}

// open opens the cgroup, or one below it, for clone3.
func (g *Cgroup) open(sub string) (int, error) {
	dir := filepath.Join(g.dir, sub)
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open cgroup %s: %w", dir, err)
	}
	return fd, nil
}

// openOf opens the cgroup that a process of the container is in.
func (g *Cgroup) openOf(pid int) (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return -1, fmt.Errorf("find the cgroup of process %d: %w", pid, err)
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			rel, err := filepath.Rel(g.dir, filepath.Join(g.root, path))
			if err != nil || strings.HasPrefix(rel, "..") {
				return -1, fmt.Errorf("process %d is in cgroup %s, outside of its container's", pid, path)
			}
			return g.open(rel)
		}
	}
	return -1, fmt.Errorf("process %d has no cgroup", pid)
}

// OOMKills counts processes that the kernel killed because the container had no memory left. Without a memory
// controller there are none.
func (g *Cgroup) OOMKills() (uint64, error) {
	m, err := g.Numbers("memory.events")
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	return m["oom_kill"], err
}

// Numbers reads a flat file of keys and numbers such as memory.stat.
func (g *Cgroup) Numbers(file string) (map[string]uint64, error) {
	b, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		return nil, err
	}
	return numbers(b), nil
}

func numbers(b []byte) map[string]uint64 {
	m := map[string]uint64{}
	s := bufio.NewScanner(bytes.NewReader(b))
	for s.Scan() {
		key, value, ok := strings.Cut(s.Text(), " ")
		if n, err := strconv.ParseUint(value, 10, 64); ok && err == nil {
			m[key] = n
		}
	}
	return m
}

// Number reads a file of one number. ok is false for "max" and for files that are not there.
func (g *Cgroup) Number(file string) (n uint64, ok bool) {
	b, err := os.ReadFile(filepath.Join(g.dir, file))
	if err != nil {
		return 0, false
	}
	n, err = strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return n, err == nil
}

// IO reads io.stat: for each device its counters.
func (g *Cgroup) IO() (map[string]map[string]uint64, error) {
	b, err := os.ReadFile(filepath.Join(g.dir, "io.stat"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	out := map[string]map[string]uint64{}
	for line := range strings.Lines(string(b)) {
		words := strings.Fields(line)
		if len(words) < 2 {
			continue
		}
		m := map[string]uint64{}
		for _, w := range words[1:] {
			key, value, _ := strings.Cut(w, "=")
			if n, err := strconv.ParseUint(value, 10, 64); err == nil {
				m[key] = n
			}
		}
		out[words[0]] = m
	}
	return out, nil
}

// Pids lists the processes of the cgroup and of those below it.
func (g *Cgroup) Pids() ([]int, error) {
	var out []int
	err := filepath.WalkDir(g.dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) && path != g.dir {
				return nil
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			// A threaded cgroup names its processes in its parent; one that vanished has none.
			if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
				return nil
			}
			return err
		}
		for line := range strings.Lines(string(b)) {
			if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil {
				out = append(out, pid)
			}
		}
		return nil
	})
	return out, err
}

// Kill kills every process of the cgroup.
func (g *Cgroup) Kill() error { return g.write("cgroup.kill", "1") }

// Freeze stops every process of the cgroup, or lets them go on, and returns when that is so.
func (g *Cgroup) Freeze(ctx context.Context, frozen bool) error {
	value := "0"
	if frozen {
		value = "1"
	}
	if err := g.write("cgroup.freeze", value); err != nil {
		return fmt.Errorf("freeze cgroup: %w", err)
	}
	return g.await(ctx, "frozen", value)
}

// await waits until a key of cgroup.events has a value. The kernel announces each change of the file.
func (g *Cgroup) await(ctx context.Context, key, value string) error {
	f, err := os.Open(filepath.Join(g.dir, "cgroup.events"))
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 256)
	for {
		n, err := unix.Pread(int(f.Fd()), buf, 0)
		if err != nil {
			return fmt.Errorf("read cgroup.events: %w", err)
		}
		if m := numbers(buf[:n]); strconv.FormatUint(m[key], 10) == value {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return fmt.Errorf("wait for %s %s of cgroup: %w", key, value, err)
		}
		// In slices, so that the end of ctx is seen.
		_, err = unix.Poll([]unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}, 100)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("poll cgroup.events: %w", err)
		}
	}
}

// Remove kills what is left in the cgroup and removes it with those below it.
func (g *Cgroup) Remove(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	if err := os.Remove(g.dir); err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	g.Kill()
	if err := g.await(ctx, "populated", "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// Deepest first.
	var dirs []string
	filepath.WalkDir(g.dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := os.Remove(dirs[i]); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove cgroup: %w", err)
		}
	}
	return nil
}
