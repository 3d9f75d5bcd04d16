// Bench measures kcradle against the least a machine can do and against docker on the same host, and prints one table:
//
//	make bench                        # or, after make build, as root: go run ./hack/bench [-n 10] [-only TEXT]
//
// Every case is run once per round, the rounds begin with another case each time, and what is printed is the median: the
// host's moods meet all cases alike. The first byte is when this program reads it from the command's stdout.
//
// The floor is QEMU with the flags that kcradle gave it, the same kernel, and a static /init that prints a line and
// halts. Docker is Debian's dockerd with its runc, started by this program with a store of its own, without networks.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"
)

func main() {
	var c config
	flag.IntVar(&c.rounds, "n", 10, "rounds")
	flag.StringVar(&c.kcradle, "kcradle", "bin/kcradle", "the program to measure")
	flag.StringVar(&c.only, "only", "", "run the cases whose name contains one of these, with commas between them")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, c); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

type config struct {
	rounds  int
	kcradle string
	only    string
}

// sample is what one run of a case yields: durations, or a rate in bytes per second.
type sample map[string]float64

// benchCase is a row of the table of cases. To add one, add a row; its results are the rows of the printed table.
type benchCase struct {
	name    string
	results []result
	once    func(ctx context.Context, b *bench) (sample, error)
}

// result is a row of the printed table.
type result struct {
	key    string // in the case's sample
	label  string
	rate   bool    // bytes per second, not seconds
	bytes  bool    // a size, not a duration
	over   string  // "CASE/KEY" that this is divided by
	target float64 // what the ratio, or a size, may be at most; 0: no target
}

const mib = 1 << 20

// cases is the table.
func cases() []benchCase {
	return append([]benchCase{
		{"floor", []result{
			{key: "first", label: "floor (bare QEMU): first byte"},
			{key: "exit", label: "floor (bare QEMU): exit"},
		}, runFloor},
		{"kcradle run", []result{
			{key: "first", label: "kcradle run, cold: first byte", over: "floor/first", target: 1.25},
			{key: "exit", label: "kcradle run, cold: exit", over: "floor/exit"},
		}, runKcradle},
		{"docker run", []result{
			{key: "first", label: "docker run --rm: first byte"},
			{key: "exit", label: "docker run --rm: exit"},
		}, runDocker},
		{"template", []result{
			{key: "first", label: "kcradle run, template: first byte", over: "docker run/first", target: 0.7},
			{key: "exit", label: "kcradle run, template: exit", over: "docker run/exit", target: 1.15},
		}, runTemplate},
		{"pool", []result{
			{key: "first", label: "kcradle run, pool: first byte", over: "docker run/first", target: 0.35},
			{key: "exit", label: "kcradle run, pool: exit", over: "docker run/exit", target: 1.15},
		}, runPool},
		{"python docker", []result{{key: "first", label: "docker run, Debian with Python: first byte"}}, runPython(overDocker)},
		{"python cold", []result{
			{key: "first", label: "kcradle run, cold, Debian with Python: first byte", over: "python docker/first"},
		}, runPython(overCold)},
		{"python template", []result{
			{key: "first", label: "kcradle run, template, Debian with Python: first byte", over: "python docker/first"},
		}, runPython(overTemplate)},
		{"python pool", []result{
			{key: "first", label: "kcradle run, pool, Debian with Python: first byte", over: "python docker/first"},
		}, runPython(overPool)},
		{"mariadb docker", []result{{key: "ready", label: "docker start, MariaDB: ready for connections"}}, runMariaDB(overDocker)},
		{"mariadb cold", []result{
			{key: "ready", label: "kcradle run, cold, MariaDB: ready for connections", over: "mariadb docker/ready"},
		}, runMariaDB(overCold)},
		{"mariadb template", []result{
			{key: "ready", label: "kcradle run, template, MariaDB: ready for connections", over: "mariadb docker/ready"},
		}, runMariaDB(overTemplate)},
		{"exec in pod", []result{
			{key: "first", label: "docker exec in a pod: first byte"},
			{key: "exit", label: "docker exec in a pod: exit"},
		}, execPod},
		{"exec in docker", []result{
			{key: "first", label: "docker exec in docker: first byte", over: "exec in pod/first"},
			{key: "exit", label: "docker exec in docker: exit", over: "exec in pod/exit"},
		}, execDocker},
		{"summon", []result{{key: "exit", label: "kcradle summon of an archive, empty store"}}, runSummon},
		{"load", []result{{key: "exit", label: "docker load of the same archive", over: "summon/exit"}}, runLoad},
		{"cp to pod", []result{{key: "rate", label: "docker cp to a pod", rate: true}}, cpToPod},
		{"cp to docker", []result{{key: "rate", label: "docker cp to docker", rate: true, over: "cp to pod/rate"}}, cpToDocker},
		{"cp from pod", []result{{key: "rate", label: "docker cp from a pod", rate: true}}, cpFromPod},
		{"cp from docker", []result{{key: "rate", label: "docker cp from docker", rate: true, over: "cp from pod/rate"}}, cpFromDocker},
		{"supervisor", []result{{key: "private", label: "supervisor: private memory", bytes: true, target: 25 * mib}}, supervisorMemory},
	}, engineCases()...)
}

func run(ctx context.Context, c config) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("dockerd needs root (sudo make bench)")
	}
	if c.rounds < 1 {
		return fmt.Errorf("%d rounds measure nothing", c.rounds)
	}
	var list []benchCase
	for _, k := range cases() {
		if slices.ContainsFunc(strings.Split(c.only, ","), func(s string) bool { return strings.Contains(k.name, s) }) {
			list = append(list, k)
		}
	}
	if len(list) == 0 {
		return fmt.Errorf("no case's name contains %q", c.only)
	}
	b, err := setUp(ctx, c)
	if err != nil {
		return err
	}
	defer b.tearDown()
	samples := map[string][]float64{}
	for round := range c.rounds {
		for i := range list {
			k := list[(i+round)%len(list)]
			start := time.Now()
			s, err := k.once(ctx, b)
			if err != nil {
				return fmt.Errorf("%s: %w", k.name, err)
			}
			for key, v := range s {
				samples[k.name+"/"+key] = append(samples[k.name+"/"+key], v)
			}
			fmt.Fprintf(os.Stderr, "round %d of %d: %s took %.2f s\n", round+1, c.rounds, k.name, time.Since(start).Seconds())
		}
	}
	fmt.Println(b.host())
	return table(list, samples)
}

func table(list []benchCase, samples map[string][]float64) error {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "median\tfastest\tslowest\tratio\ttarget\t  what")
	for _, k := range list {
		for _, r := range k.results {
			v := slices.Sorted(slices.Values(samples[k.name+"/"+r.key]))
			show := func(x float64) string {
				switch {
				case r.rate:
					return fmt.Sprintf("%.0f MiB/s", x/mib)
				case r.bytes:
					return fmt.Sprintf("%.1f MiB", x/mib)
				}
				return fmt.Sprintf("%.3f s", x)
			}
			m := median(v)
			ratio, target := "", ""
			if base := slices.Sorted(slices.Values(samples[r.over])); len(base) > 0 {
				ratio = fmt.Sprintf("%.2f × %s", m/median(base), r.over)
				if r.target > 0 {
					target = verdict(m/median(base), r.target, fmt.Sprintf("%.2f", r.target))
				}
			} else if r.over == "" && r.target > 0 {
				target = verdict(m, r.target, show(r.target))
			}
			fast, slow := v[0], v[len(v)-1]
			if r.rate {
				fast, slow = slow, fast
			}
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t  %s\n", show(m), show(fast), show(slow), ratio, target, r.label)
		}
	}
	return w.Flush()
}

func verdict(got, limit float64, text string) string {
	if got <= limit {
		return "≤ " + text + " met"
	}
	return "≤ " + text + " MISSED"
}

// median of sorted, not empty values.
func median(v []float64) float64 {
	n := len(v)
	if n%2 == 1 {
		return v[n/2]
	}
	return (v[n/2-1] + v[n/2]) / 2
}
