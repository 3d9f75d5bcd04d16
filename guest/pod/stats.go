package pod

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/kcradle/kcradle/guest/ps"
)

// clockTick is USER_HZ: the kernel shows times to user space in hundredths of a second on every machine Linux runs on
// that we do.
const clockTick = 100

// Stats reads the counters of a running container.
func (c *Container) Stats() (Stats, error) {
	r, err := c.current()
	if err != nil {
		return Stats{}, err
	}
	g := r.cgroup
	s := Stats{Read: time.Now()}
	cpu, err := g.Numbers("cpu.stat")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Stats{}, c.wrap(err)
	}
	s.CPU = CPUStats{
		Total: cpu["usage_usec"] * 1000, User: cpu["user_usec"] * 1000, System: cpu["system_usec"] * 1000,
		Periods: cpu["nr_periods"], ThrottledPeriods: cpu["nr_throttled"], ThrottledTime: cpu["throttled_usec"] * 1000,
	}
	if err := readProc("/proc/stat", func(r io.Reader) (err error) {
		s.CPU.Host, s.CPU.Online, err = parseHostCPU(r)
		return err
	}); err != nil {
		return Stats{}, c.wrap(err)
	}
	s.Memory.Usage, _ = g.Number("memory.current")
	s.Memory.MaxUsage, _ = g.Number("memory.peak")
	if limit, ok := g.Number("memory.max"); ok {
		s.Memory.Limit = limit
	} else if err := readProc("/proc/meminfo", func(r io.Reader) (err error) {
		s.Memory.Limit, err = parseMemTotal(r)
		return err
	}); err != nil {
		return Stats{}, c.wrap(err)
	}
	if m, err := g.Numbers("memory.events"); err == nil {
		s.Memory.Failures = m["max"]
	}
	if m, err := g.Numbers("memory.stat"); err == nil {
		s.Memory.Stat = m
	}
	var ok bool
	if s.Pids.Current, ok = g.Number("pids.current"); !ok {
		pids, err := g.Pids()
		if err != nil {
			return Stats{}, c.wrap(err)
		}
		s.Pids.Current = uint64(len(pids))
	}
	s.Pids.Limit, _ = g.Number("pids.max")
	disks, err := g.IO()
	if err != nil {
		return Stats{}, c.wrap(err)
	}
	for dev, m := range disks {
		major, minor, _ := strings.Cut(dev, ":")
		st := IOStats{ReadBytes: m["rbytes"], WriteBytes: m["wbytes"], ReadOps: m["rios"], WriteOps: m["wios"]}
		st.Major, _ = strconv.ParseUint(major, 10, 64)
		st.Minor, _ = strconv.ParseUint(minor, 10, 64)
		s.IO = append(s.IO, st)
	}
	slices.SortFunc(s.IO, func(a, b IOStats) int { return int(a.Major*1000+a.Minor) - int(b.Major*1000+b.Minor) })
	if err := readProc("/proc/net/dev", func(r io.Reader) (err error) {
		s.Networks, err = parseNetDev(r)
		return err
	}); err != nil {
		return Stats{}, c.wrap(err)
	}
	return s, nil
}

func readProc(path string, parse func(io.Reader) error) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return parse(f)
}

// parseNetDev reads /proc/net/dev; loopback is left out.
func parseNetDev(r io.Reader) (map[string]NetworkStats, error) {
	out := map[string]NetworkStats{}
	s := bufio.NewScanner(r)
	for s.Scan() {
		name, rest, ok := strings.Cut(s.Text(), ":")
		name = strings.TrimSpace(name)
		if !ok || name == "lo" {
			continue
		}
		f := strings.Fields(rest)
		if len(f) < 16 {
			return nil, fmt.Errorf("parse /proc/net/dev: %q is too short", s.Text())
		}
		var n [12]uint64
		for i := range n {
			var err error
			if n[i], err = strconv.ParseUint(f[i], 10, 64); err != nil {
				return nil, fmt.Errorf("parse /proc/net/dev: %w", err)
			}
		}
		out[name] = NetworkStats{
			RxBytes: n[0], RxPackets: n[1], RxErrors: n[2], RxDropped: n[3],
			TxBytes: n[8], TxPackets: n[9], TxErrors: n[10], TxDropped: n[11],
		}
	}
	return out, s.Err()
}

// parseHostCPU adds up what all CPUs did (user to steal; guest time is contained in user time) and counts them.
func parseHostCPU(r io.Reader) (nanoseconds uint64, online int, err error) {
	s := bufio.NewScanner(r)
	for s.Scan() {
		f := strings.Fields(s.Text())
		if len(f) == 0 || !strings.HasPrefix(f[0], "cpu") {
			continue
		}
		if f[0] != "cpu" {
			online++
			continue
		}
		for _, w := range f[1:min(len(f), 9)] {
			n, err := strconv.ParseUint(w, 10, 64)
			if err != nil {
				return 0, 0, fmt.Errorf("parse /proc/stat: %w", err)
			}
			nanoseconds += n * (1e9 / clockTick)
		}
	}
	return nanoseconds, online, s.Err()
}

func parseMemTotal(r io.Reader) (uint64, error) {
	s := bufio.NewScanner(r)
	for s.Scan() {
		if rest, ok := strings.CutPrefix(s.Text(), "MemTotal:"); ok {
			n, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("parse /proc/meminfo: %w", err)
			}
			return n * 1024, nil
		}
	}
	return 0, errors.Join(s.Err(), errors.New("parse /proc/meminfo: no MemTotal"))
}

// Top lists the processes of a running container, as ps with these options would; ps need not be in the image. Process
// IDs are those of the machine.
func (c *Container) Top(psArgs []string) (titles []string, rows [][]string, err error) {
	r, err := c.current()
	if err != nil {
		return nil, nil, err
	}
	pids, err := r.cgroup.Pids()
	if err != nil {
		return nil, nil, c.wrap(err)
	}
	slices.Sort(pids)
	titles, rows, err = ps.List("/proc", pids, psArgs)
	if errors.Is(err, ps.ErrUsage) {
		return nil, nil, fmt.Errorf("%w: %w", err, ErrInvalid)
	}
	return titles, rows, err
}
