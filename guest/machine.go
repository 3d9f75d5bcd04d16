package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/guest/disk"
	"github.com/kcradle/kcradle/guest/early"
	"github.com/kcradle/kcradle/guest/network"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm/channel"
)

// runDir is where the guest keeps what lives as long as the machine.
const runDir = "/run/kcradle"

const cgroupRoot = "/sys/fs/cgroup"

// keptCgroup is one that stays for ever, empty: the kernel rewrites its own code when the first of its cgroups comes, and when the
// last one goes.
const keptCgroup = cgroupRoot + "/kept"

// machine is the real one.
type machine struct {
	log     *slog.Logger
	drives  map[string]disk.Drive
	mounted []mounted // writable ones, in order
	others  []string  // other mounts, in order
	cut     []string  // devices of the device mapper, in order
	wire    *network.Wire
}

type mounted struct {
	dir   string
	drive disk.Drive
}

var _ Machine = (*machine)(nil)

// NewMachine is the machine that this process is PID 1 of.
func NewMachine(log *slog.Logger) Machine { return &machine{log: log} }

func (m *machine) Early() (string, error) {
	if err := early.Mount(); err != nil {
		return "", err
	}
	if err := early.CalmMonitor(); err != nil {
		m.log.Warn("the runtime's monitor wakes up often", "error", err)
	}
	if err := early.Controllers(cgroupRoot); err != nil {
		return "", err
	}
	if err := early.Settings(); err != nil {
		return "", err
	}
	if err := network.Loopback(); err != nil {
		return "", err
	}
	var err error
	if m.drives, err = disk.Drives(); err != nil { // none comes later
		return "", err
	}
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return "", err
	}
	return podDigest(string(b))
}

// podDigest finds cradle.pod= on the kernel's command line. It is measured in an attested machine; given twice it is an
// attempt to get round that.
func podDigest(cmdline string) (string, error) {
	digest := ""
	for _, word := range strings.Fields(cmdline) {
		d, ok := strings.CutPrefix(word, "cradle.pod=")
		if !ok {
			continue
		}
		if digest != "" || d == "" {
			return "", fmt.Errorf("kernel command line: want one cradle.pod=, got %q", cmdline)
		}
		digest = d
	}
	return digest, nil
}

func (m *machine) Channel(ctx context.Context) (Channel, error) { return channel.Open(ctx, m.log) }

func (m *machine) Clock(now time.Time) error { return early.SetClock(now) }

func (m *machine) Slew(d time.Duration) error { return early.SlewClock(d) }

func (m *machine) Seed(entropy []byte) error { return early.Seed(entropy) }

func (m *machine) Network(n *spec.Network) (err error) {
	if m.wire != nil {
		return m.wire.Change(n)
	}
	m.wire, err = network.Up(n)
	return err
}

func (m *machine) Mount(p *spec.Pod, l *spec.Placement) (*Mounts, error) {
	drives := m.drives
	out := &Mounts{
		Layers: map[string]string{}, Volumes: map[string]string{},
		Scratch: filepath.Join(runDir, "scratch"),
		Run:     filepath.Join(runDir, "pod"),
		Cgroup:  cgroupRoot,
	}
	if _, err := ensureDir(out.Run); err != nil {
		return nil, err
	}
	if err := m.layers(p, l, drives, out); err != nil {
		return nil, err
	}
	scratch, err := disk.Find(drives, spec.SerialScratch)
	if err != nil {
		return nil, err
	}
	if err := m.writable(scratch, out.Scratch); err != nil {
		return nil, fmt.Errorf("writable disk of the bundle: %w", err)
	}
	placed := map[string]spec.Drive{}
	for _, d := range l.Volumes {
		placed[d.Name] = d
	}
	for i, v := range p.Volumes {
		at := placed[v.Name]
		d, err := disk.Find(drives, at.Serial)
		if err != nil {
			return nil, fmt.Errorf("volume %s: %w", v.Name, err)
		}
		if at.Length != 0 {
			if d, err = m.linear("volume"+strconv.Itoa(i), d, at.Offset, at.Length, disk.Writable); err != nil {
				return nil, fmt.Errorf("volume %s: %w", v.Name, err)
			}
		}
		dir := filepath.Join(runDir, "volumes", v.Name)
		if err := m.writable(d, dir); err != nil {
			return nil, fmt.Errorf("volume %s: %w", v.Name, err)
		}
		out.Volumes[v.Name] = dir
	}
	if wantsInit(p) {
		// A name for our own binary that a copy of our mount namespace has, too.
		out.InitFile = filepath.Join(runDir, "init")
		f, err := os.Create(out.InitFile)
		if err != nil {
			return nil, err
		}
		f.Close()
		if err := unix.Mount("/proc/self/exe", out.InitFile, "", unix.MS_BIND, ""); err != nil {
			return nil, fmt.Errorf("bind our own binary: %w", err)
		}
		m.others = append(m.others, out.InitFile)
	}
	return out, nil
}

func (m *machine) layers(p *spec.Pod, l *spec.Placement, drives map[string]disk.Drive, out *Mounts) error {
	want := p.Layers()
	if len(want) == 0 {
		return nil
	}
	d, err := disk.Find(drives, spec.SerialLayers)
	if err != nil {
		return err
	}
	extents := map[string]spec.Extent{}
	for _, e := range l.Layers {
		extents[e.DiffID] = e
	}
	for i, id := range want {
		e, ok := extents[id]
		if !ok {
			return fmt.Errorf("the host did not say where layer %s is", id)
		}
		layer := d
		// One layer alone is mounted from the drive itself. A file system and the device mapper cannot share a drive.
		if e.Offset != 0 || len(want) > 1 {
			if layer, err = m.linear("layer"+strconv.Itoa(i), d, e.Offset, e.Length, disk.ReadOnly); err != nil {
				return fmt.Errorf("layer %s: %w", id, err)
			}
		}
		dir := filepath.Join(runDir, "layers", strconv.Itoa(i))
		if err := disk.MountLayer(layer.Path, dir); err != nil {
			return fmt.Errorf("layer %s: %w", id, err)
		}
		m.others = append(m.others, dir)
		out.Layers[id] = dir
	}
	return nil
}

func (m *machine) linear(name string, d disk.Drive, offset, length int64, access disk.Access) (disk.Drive, error) {
	out, err := disk.Linear(name, d, offset, length, access)
	if err == nil {
		m.cut = append(m.cut, name)
	}
	return out, err
}

func (m *machine) writable(d disk.Drive, dir string) error {
	if err := disk.MountWritable(d, dir); err != nil {
		return err
	}
	m.mounted = append(m.mounted, mounted{dir, d})
	return nil
}

// freeLimit is how long a file system may take to end after it was unmounted.
const freeLimit = 5 * time.Second

func (m *machine) Unmount() error {
	unix.Sync()
	var errs []error
	for i := len(m.mounted) - 1; i >= 0; i-- {
		if err := unix.Unmount(m.mounted[i].dir, unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("unmount %s: %w", m.mounted[i].dir, err))
		}
	}
	for i := len(m.mounted) - 1; i >= 0; i-- {
		if err := disk.AwaitFree(m.mounted[i].drive, freeLimit); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (m *machine) Clear() error {
	var errs []error
	for _, dir := range slices.Backward(m.others) {
		errs = append(errs, unix.Unmount(dir, unix.UMOUNT_NOFOLLOW))
	}
	for _, name := range slices.Backward(m.cut) {
		errs = append(errs, disk.Remove(name))
	}
	m.mounted, m.others, m.cut = nil, nil, nil
	// The kernel makes a hundred files for a cgroup: the next pod finds that of its first container made.
	for _, dir := range []string{keptCgroup, filepath.Join(cgroupRoot, pod.CgroupName(0))} {
		if err := os.Mkdir(dir, 0o755); !errors.Is(err, fs.ErrExist) {
			errs = append(errs, err)
		}
	}
	// Nothing is mounted below any more, or the removal fails and harms nothing: layers are read-only.
	errs = append(errs, os.RemoveAll(runDir), m.wire.Down())
	m.wire = nil
	return errors.Join(errs...)
}
