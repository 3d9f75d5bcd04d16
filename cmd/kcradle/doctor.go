package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/vmm"
)

// What a host should have, in bytes.
const (
	leastDisk     = 512 << 20 // a small image and its scratch disk
	goodDisk      = 5 << 30
	leastMemory   = 256 << 20 // a small pod
	dockerTimeout = 5 * time.Second
)

// States of a need.
const (
	needOK      = "ok"
	needNote    = "note"    // pods run, with less
	needMissing = "missing" // no pod runs, when it is required
)

// diagnosis is one line of the doctor.
type diagnosis struct {
	Name     string `json:"name"`
	State    string `json:"state"`
	Required bool   `json:"required"` // without it no pod runs
	Found    string `json:"found"`
	Remedy   string `json:"remedy,omitempty"` // the one thing to do
}

func newDoctorCommand(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Say what this host lacks to run pods, and the remedy",
		Long: `doctor looks at everything that kcradle needs on this host and says what it found. What is missing comes with
the one remedy. The exit code is 0 when pods can run, 1 otherwise.`,
		Example: "  kcradle doctor\n  kcradle doctor --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return doctor(cmd.Context(), a, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func doctor(ctx context.Context, a *app, asJSON bool) error {
	list := diagnose(ctx, a.Root)
	ok := healthy(list)
	if err := printDiagnoses(a, list, ok, asJSON); err != nil {
		return err
	}
	if !ok {
		return &exitError{code: 1}
	}
	return nil
}

func healthy(list []diagnosis) bool {
	for _, d := range list {
		if d.Required && d.State == needMissing {
			return false
		}
	}
	return true
}

func printDiagnoses(a *app, list []diagnosis, ok, asJSON bool) error {
	if asJSON {
		e := json.NewEncoder(a.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(struct {
			OK    bool        `json:"ok"`
			Needs []diagnosis `json:"needs"`
		}{ok, list})
	}
	w := tabwriter.NewWriter(a.Stdout, 0, 8, 2, ' ', 0)
	for _, d := range list {
		fmt.Fprintf(w, "%s\t%s\t%s\n", d.State, d.Name, d.Found)
		if d.Remedy != "" {
			fmt.Fprintf(w, "\t\t→ %s\n", d.Remedy)
		}
	}
	if ok {
		fmt.Fprintln(w, "\nPods can run here.")
	} else {
		fmt.Fprintln(w, "\nPods cannot run here: see what is missing.")
	}
	return w.Flush()
}

// diagnose looks at everything. To add a need, add a row.
func diagnose(ctx context.Context, root string) []diagnosis {
	host, err := vmm.Probe(ctx, "") // not what an earlier run found: what is
	return []diagnosis{
		platformNeed(runtime.GOOS, runtime.GOARCH),
		qemuNeed(host, err),
		engineNeed(host),
		userNeed(host.Engine),
		packageNeed(packagesDir()),
		diskNeed(root),
		memoryNeed("/proc/meminfo"),
		deviceNeed("vhost-vsock", "/dev/vhost-vsock", "the control channel runs over virtio-serial instead", "modprobe vhost_vsock"),
		deviceNeed("tun", "/dev/net/tun", "pods cannot use --network tap", "modprobe tun"),
		dockerNeed(ctx),
	}
}

func platformNeed(goos, arch string) diagnosis {
	d := diagnosis{Name: "platform", Required: true, State: needOK, Found: goos + "/" + arch}
	if goos != "linux" || arch != "amd64" {
		d.State, d.Remedy = needMissing, "run kcradle on linux/amd64"
	}
	return d
}

func qemuNeed(h vmm.Host, err error) diagnosis {
	d := diagnosis{Name: "qemu", Required: true, State: needOK, Found: fmt.Sprintf("%s, version %s", h.QEMU.Path, h.QEMU.Version)}
	var none *vmm.NoQEMUError
	var old *vmm.OldQEMUError
	switch {
	case errors.As(err, &none):
		d.State, d.Found, d.Remedy = needMissing, "no "+none.Path, "apt-get install qemu-system-x86"
	case errors.As(err, &old):
		d.State, d.Remedy = needMissing, fmt.Sprintf("install QEMU %s or newer (Debian 12 and later have one): apt-get install qemu-system-x86", vmm.MinQEMU)
	case err != nil:
		d.State, d.Found, d.Remedy = needMissing, err.Error(), "apt-get install --reinstall qemu-system-x86"
	}
	return d
}

func engineNeed(h vmm.Host) diagnosis {
	d := diagnosis{Name: "engine", Required: true, State: needOK, Found: fmt.Sprintf("%s: %s", h.Engine, h.Reason), Remedy: h.Remedy}
	if h.Engine != vmm.KVM {
		d.State = needNote
	}
	return d
}

func userNeed(e vmm.Engine) diagnosis {
	d := diagnosis{Name: "user", State: needOK}
	if os.Geteuid() != 0 {
		d.Found = fmt.Sprintf("user %d, whom QEMU runs as", os.Geteuid())
		return d
	}
	c, err := vmm.Unprivileged(e)
	if err != nil {
		d.State, d.Found, d.Remedy = needNote, err.Error(), "chgrp kvm /dev/kvm && chmod 660 /dev/kvm"
		return d
	}
	d.Found = fmt.Sprintf("root; QEMU runs as a user of its own (%d in this process)", c.UID)
	return d
}

func packageNeed(dir string) diagnosis {
	dir = filepath.Join(dir, "pkg-default")
	d := diagnosis{Name: "machine package", Required: true, State: needOK}
	p, err := bundle.OpenPackage(dir)
	if err != nil {
		d.State, d.Found, d.Remedy = needMissing, err.Error(), "make build, or make install; KCRADLE_PACKAGES names another directory"
		return d
	}
	d.Found = fmt.Sprintf("%s: Linux %s, kernel %s, initrd %s", dir, p.Manifest.Linux,
		units.HumanSize(float64(p.Manifest.Kernel.Size)), units.HumanSize(float64(p.Manifest.Initrd.Size)))
	return d
}

// diskNeed looks at the state directory, or at what it would be made in.
func diskNeed(root string) diagnosis {
	d := diagnosis{Name: "disk", Required: true, State: needOK}
	dir := root
	for {
		_, err := os.Stat(dir)
		if err == nil || filepath.Dir(dir) == dir {
			break
		}
		dir = filepath.Dir(dir)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		d.State, d.Found, d.Remedy = needMissing, (&os.PathError{Op: "statfs", Path: dir, Err: err}).Error(), "name another state directory with --root"
		return d
	}
	if err := unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
		d.State, d.Found, d.Remedy = needMissing, fmt.Sprintf("%s cannot be written (%v)", dir, err), "name another state directory with --root"
		return d
	}
	return judgeDisk(d, root, int64(st.Bavail)*st.Bsize)
}

func judgeDisk(d diagnosis, root string, free int64) diagnosis {
	d.Found = fmt.Sprintf("%s free for %s", units.BytesSize(float64(free)), root)
	switch {
	case free < leastDisk:
		d.State, d.Remedy = needMissing, "make room (kcradle prune), or name another state directory with --root"
	case free < goodDisk:
		d.State, d.Remedy = needNote, "make room for larger images: kcradle prune"
	}
	return d
}

func memoryNeed(meminfo string) diagnosis {
	d := diagnosis{Name: "memory", Required: true, State: needOK}
	b, err := os.ReadFile(meminfo)
	if err != nil {
		d.State, d.Found, d.Remedy = needNote, err.Error(), "mount /proc"
		return d
	}
	available, err := parseAvailable(string(b))
	if err != nil {
		d.State, d.Found = needNote, err.Error()
		return d
	}
	d.Found = units.BytesSize(float64(available)) + " available"
	switch {
	case available < leastMemory:
		d.State, d.Remedy = needMissing, "stop something, or add memory"
	case available < defaultMemory+guestMemory(defaultMemory):
		d.State, d.Remedy = needNote, fmt.Sprintf("a pod may take up to %s: give -m less to summon, stop something, or add memory", units.BytesSize(defaultMemory))
	}
	return d
}

// parseAvailable reads MemAvailable of /proc/meminfo, in bytes.
func parseAvailable(meminfo string) (int64, error) {
	for line := range strings.Lines(meminfo) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "MemAvailable:" && f[2] == "kB" {
			kib, err := strconv.ParseInt(f[1], 10, 53)
			if err != nil {
				return 0, fmt.Errorf("parse available memory: %w", err)
			}
			return kib << 10, nil
		}
	}
	return 0, errors.New("the kernel does not say how much memory is available")
}

// deviceNeed is a device that pods run without.
func deviceNeed(name, path, without, load string) diagnosis {
	d := diagnosis{Name: name, State: needOK, Found: path}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	switch {
	case err == nil:
		_ = f.Close()
	case errors.Is(err, fs.ErrPermission):
		d.State, d.Found, d.Remedy = needNote, fmt.Sprintf("this user has no rights on %s: %s", path, without), "usermod -aG kvm $USER, or run as root"
	default:
		d.State, d.Found, d.Remedy = needNote, fmt.Sprintf("no %s: %s", path, without), load
	}
	return d
}

func dockerNeed(ctx context.Context) diagnosis {
	d := diagnosis{Name: "docker client", State: needOK}
	path, err := exec.LookPath("docker")
	if err != nil {
		d.State, d.Found, d.Remedy = needNote, "no docker client: kcradle's own verbs (exec, logs, cp, ps …) do without", "apt-get install docker-cli (Debian 12: docker.io)"
		return d
	}
	ctx, cancel := context.WithTimeout(ctx, dockerTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		d.State, d.Found, d.Remedy = needNote, fmt.Sprintf("%s --version: %v", path, err), "install a docker client that works: apt-get install docker-cli"
		return d
	}
	d.Found = path + ", " + strings.TrimSpace(string(out))
	return d
}
