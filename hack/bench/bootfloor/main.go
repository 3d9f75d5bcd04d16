// Command bootfloor measures how long a kernel takes from exec of QEMU to the first line of a static /init, for
// several kernels or settings in one interleaved run, and prints medians and ratios.
//
//	go run ./hack/bench/bootfloor -n 21 \
//		ours=build/pkg-default/vmlinux base=/tmp/kernel-base/vmlinux
//
// A setting is NAME=VMLINUX, followed by any number of ,append=TOKEN ,memory=MIB ,cpu=MODEL ,smp=N ,arg=QEMUARG and
// ,plain: the command line that any kernel needs, without what makes ours faster. In MODEL and QEMUARG a colon stands
// for a comma. The first setting is what the others are compared with; without any, the kernel of the source tree is
// measured.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/kcradle/kcradle/initrd"
	"github.com/kcradle/kcradle/kernel"
	"github.com/kcradle/kcradle/kernel/tsc"
)

const marker = "cradle-bootfloor: init"

type setting struct {
	name    string
	kernel  string
	tokens  []string
	memory  string
	cpu     string
	smp     int
	args    []string
	plain   bool // without the tokens that make our boot faster
	samples []time.Duration
	work    []time.Duration
}

func parseSetting(s string) (*setting, error) {
	fields := strings.Split(s, ",")
	name, path, ok := strings.Cut(fields[0], "=")
	if !ok || name == "" || path == "" {
		return nil, fmt.Errorf("setting %q: want NAME=VMLINUX[,append=TOKEN][,memory=MIB][,cpu=MODEL][,smp=N][,arg=QEMUARG][,plain]", s)
	}
	out := &setting{name: name, kernel: path, memory: "256", cpu: "max", smp: 1}
	for _, f := range fields[1:] {
		key, value, _ := strings.Cut(f, "=")
		switch key {
		case "append":
			out.tokens = append(out.tokens, value)
		case "memory":
			out.memory = value
		case "cpu":
			out.cpu = strings.ReplaceAll(value, ":", ",")
		case "smp":
			n, err := strconv.Atoi(value)
			if err != nil || n < 1 {
				return nil, fmt.Errorf("setting %q: bad number of processors %q", s, value)
			}
			out.smp = n
		case "plain":
			out.plain = true
		case "arg":
			out.args = append(out.args, strings.ReplaceAll(value, ":", ","))
		default:
			return nil, fmt.Errorf("setting %q: unknown key %q", s, key)
		}
	}
	return out, nil
}

func (s *setting) argv(initrd, cmdline string) []string {
	return append([]string{
		"-accel", "tcg,thread=single", "-cpu", s.cpu, "-m", s.memory, "-smp", strconv.Itoa(s.smp),
		"-M", "microvm,acpi=off,x-option-roms=off,isa-serial=off",
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-chardev", "stdio,id=log,signal=off",
		"-device", "virtio-serial-device", "-device", "virtconsole,chardev=log",
		"-kernel", s.kernel, "-initrd", initrd,
		"-append", cmdline,
	}, s.args...)
}

func (s *setting) commandLine(ours string, khz uint32) string {
	words := []string{ours, kernel.Emulated(kernel.Emulation{CPUs: s.smp, TSCKHz: khz})}
	if s.plain {
		words = []string{"console=hvc0 quiet panic=-1 reboot=t"}
	}
	return strings.Join(append(words, s.tokens...), " ")
}

// boot runs one machine and returns the time from exec to the marker, and the processor time of its whole life, which
// is steadier where other work shares the processors.
func (s *setting) boot(ctx context.Context, initrd, cmdline string) (took, work time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", s.argv(initrd, cmdline)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, 0, err
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, 0, err
	}
	var log bytes.Buffer
	lines := bufio.NewScanner(io.TeeReader(out, &log))
	for lines.Scan() {
		if took == 0 && strings.Contains(lines.Text(), marker) {
			took = time.Since(start)
		}
	}
	if err := errors.Join(lines.Err(), cmd.Wait()); err != nil {
		return 0, 0, fmt.Errorf("boot %s: %w\n%s%s", s.name, err, stderr.Bytes(), log.Bytes())
	}
	if took == 0 {
		return 0, 0, fmt.Errorf("boot %s: the machine ended before /init spoke\n%s", s.name, log.Bytes())
	}
	return took, cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), nil
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Stdout, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "bootfloor:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, w io.Writer, args []string) (err error) {
	flags := flag.NewFlagSet("bootfloor", flag.ContinueOnError)
	n := flags.Int("n", 11, "runs of each setting, interleaved")
	tree := flags.String("tree", ".", "the source tree")
	all := flags.Bool("all", false, "print every sample")
	if err := flags.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bootfloor-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()

	specs := flags.Args()
	if len(specs) == 0 {
		vmlinux := filepath.Join(dir, "vmlinux")
		if err := kernel.Unpack(ctx, os.DirFS(filepath.Join(*tree, "kernel")), vmlinux); err != nil {
			return err
		}
		specs = []string{"ours=" + vmlinux}
	}
	var settings []*setting
	for _, s := range specs {
		parsed, err := parseSetting(s)
		if err != nil {
			return err
		}
		settings = append(settings, parsed)
	}

	init := filepath.Join(dir, "init")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags=-s", "-o", init, "./hack/bench/bootfloor/guest")
	build.Dir = *tree
	build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("build the guest: %w\n%s", err, out)
	}
	archive := filepath.Join(dir, "initrd.cpio")
	if err := initrd.Write(ctx, archive, init); err != nil {
		return err
	}
	cmdline, err := kernel.CommandLine(kernel.Params{})
	if err != nil {
		return err
	}
	khz, err := tsc.KHz(ctx)
	if err != nil && !errors.Is(err, tsc.ErrUnusable) {
		return err
	}

	for i := range *n + 1 { // the first round warms the page cache and is not counted
		for _, s := range settings {
			took, work, err := s.boot(ctx, archive, s.commandLine(cmdline, khz))
			if err != nil {
				return err
			}
			if i > 0 {
				s.samples = append(s.samples, took)
				s.work = append(s.work, work)
			}
		}
	}
	return report(w, settings, *n, *all)
}

func report(w io.Writer, settings []*setting, n int, all bool) error {
	fmt.Fprintf(w, "exec of QEMU to /init's first line, emulated (TCG, no hardware virtualization), %d interleaved runs\n", n)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "setting\tmin ms\tmedian ms\tmax ms\tratio\tcpu ms\t")
	first := median(settings[0].samples)
	for _, s := range settings {
		slices.Sort(s.samples)
		fmt.Fprintf(t, "%s\t%.0f\t%.0f\t%.0f\t%.2f\t%.0f\t\n", s.name, ms(s.samples[0]), ms(median(s.samples)),
			ms(s.samples[len(s.samples)-1]), float64(median(s.samples))/float64(first), ms(median(s.work)))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if all {
		for _, s := range settings {
			fmt.Fprintln(w, s.name, s.samples)
		}
	}
	return nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func median(d []time.Duration) time.Duration {
	s := slices.Sorted(slices.Values(d))
	if len(s)%2 == 1 {
		return s[len(s)/2]
	}
	return (s[len(s)/2-1] + s[len(s)/2]) / 2
}
