package pod

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/guest/container"
	"github.com/kcradle/kcradle/guest/network"
	"github.com/kcradle/kcradle/guest/rootfs"
	"github.com/kcradle/kcradle/spec"
)

// file is a file that docker puts into every container.
type file struct{ target, content string }

// prepare mounts the container's root and fills its volumes, once per machine.
func (c *Container) prepare() error {
	c.prepared.mu.Lock()
	defer c.prepared.mu.Unlock()
	if c.prepared.done {
		return nil
	}
	p := c.pod
	writable := p.cfg.Scratch + "/" + spec.ScratchContainers + "/" + c.ID()
	upper, work := writable+"/upper", writable+"/work"
	for _, d := range []string{upper, work, p.dir(c, "rootfs")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	layers, err := c.layers()
	if err != nil {
		return err
	}
	root := p.dir(c, "rootfs")
	if err := rootfs.Mount(root, layers, upper, work); err != nil {
		return err
	}
	if err := c.furnish(root); err != nil {
		return errors.Join(err, unix.Unmount(root, unix.MNT_DETACH))
	}
	c.prepared.done = true
	return nil
}

// layers are the directories of the image, oldest first. An image without layers is one empty directory.
func (c *Container) layers() ([]string, error) {
	var dirs []string
	for _, l := range c.doc.Image.Layers {
		dir, ok := c.pod.cfg.Layers[l]
		if !ok {
			return nil, fmt.Errorf("the machine has no layer %s", l)
		}
		dirs = append(dirs, dir)
	}
	if dirs == nil {
		empty := c.pod.dir(c, "empty")
		if err := os.MkdirAll(empty, 0o755); err != nil {
			return nil, err
		}
		dirs = []string{empty}
	}
	return dirs, nil
}

func (c *Container) furnish(root string) error {
	var targets []string
	for _, f := range c.files {
		targets = append(targets, f.target)
	}
	if err := rootfs.Prepare(root, targets); err != nil {
		return err
	}
	for _, f := range c.files {
		if err := os.WriteFile(c.pod.dir(c, filepath.Base(f.target)), []byte(f.content), 0o644); err != nil {
			return err
		}
	}
	for _, m := range c.doc.Mounts {
		if m.Type != spec.MountVolume {
			continue
		}
		base, used, err := c.pod.volume(m.Source)
		if err != nil {
			return err
		}
		data := filepath.Join(base, spec.VolumeData)
		if err := os.Mkdir(data, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("volume %s: %w", m.Source, err)
		}
		if m.NoCopy {
			continue
		}
		if err := rootfs.CopyUp(root, m.Target, base, spec.VolumeData, used); err != nil {
			return fmt.Errorf("volume %s: %w", m.Source, err)
		}
	}
	return nil
}

// hostsFile is the one of files that changes with the pod's wire.
const (
	hostsFile = "/etc/hosts"
	maxHosts  = 1 << 20 // bytes
)

// setHosts replaces lines of /etc/hosts.
func (c *Container) setHosts(before, after []string) error {
	c.prepared.mu.Lock()
	defer c.prepared.mu.Unlock()
	replace := func(content string) string {
		var out strings.Builder
		for line := range strings.Lines(content) {
			if !slices.Contains(before, strings.TrimSuffix(line, "\n")) {
				out.WriteString(line)
			}
		}
		for _, line := range after {
			out.WriteString(line + "\n")
		}
		return out.String()
	}
	for i, f := range c.files {
		if f.target != hostsFile {
			continue
		}
		c.files = slices.Clone(c.files) // those of the pod's others are their own
		c.files[i].content = replace(f.content)
		if !c.prepared.done {
			continue
		}
		path := c.pod.dir(c, filepath.Base(f.target)) // in place: it is mounted
		fi, err := os.Stat(path)
		if err != nil {
			return err
		}
		if fi.Size() > maxHosts { // the container may write there what it wants
			return fmt.Errorf("%s has more than the %d bytes that are looked through", hostsFile, maxHosts)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(replace(string(b))), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// mounts are what stands in the container beside docker's default mounts, parents first.
func (c *Container) mounts() ([]container.Mount, error) {
	var out []container.Mount
	taken := map[string]bool{}
	for _, m := range c.doc.Mounts {
		target := filepath.Clean(m.Target)
		if taken[target] {
			return nil, fmt.Errorf("duplicate mount point: %s", target)
		}
		if target == "/" {
			return nil, errors.New("invalid mount: destination can't be '/'")
		}
		taken[target] = true
		switch m.Type {
		case spec.MountVolume:
			base, _, err := c.pod.volume(m.Source)
			if err != nil {
				return nil, err
			}
			out = append(out, container.Mount{Source: filepath.Join(base, spec.VolumeData), Target: target, ReadOnly: m.ReadOnly})
		case spec.MountTmpfs:
			flags, data, err := tmpfsOptions(m.Options)
			if err != nil {
				return nil, err
			}
			if m.ReadOnly {
				flags |= unix.MS_RDONLY
			}
			out = append(out, container.Mount{Target: target, Flags: flags, Data: data})
		case spec.MountBind:
			i := c.bindIndex(target)
			if i < 0 || i >= len(c.pod.cfg.Binds) {
				return nil, fmt.Errorf("the machine has no share of the host for the mount point %s", target)
			}
			source := c.pod.cfg.Binds[i]
			info, err := os.Stat(source)
			if err != nil {
				return nil, fmt.Errorf("mount %s of the host: %w", m.Source, err)
			}
			out = append(out, container.Mount{Source: source, Target: target, File: !info.IsDir(), ReadOnly: m.ReadOnly})
		default:
			return nil, fmt.Errorf("mount point %s: unknown type %q", target, m.Type)
		}
	}
	for _, f := range c.files {
		if !taken[f.target] {
			out = append(out, container.Mount{Source: c.pod.dir(c, filepath.Base(f.target)), Target: f.target, File: true})
		}
	}
	slices.SortStableFunc(out, func(a, b container.Mount) int {
		return strings.Count(a.Target, "/") - strings.Count(b.Target, "/")
	})
	return out, nil
}

// bindIndex is the place of a bind mount among all of the pod, -1 when there is none.
func (c *Container) bindIndex(target string) int {
	return slices.IndexFunc(c.pod.cfg.Pod.Binds(), func(b spec.Bind) bool {
		return b.Container == c.doc.Name && filepath.Clean(b.Mount.Target) == target
	})
}

var tmpfsFlags = map[string]struct {
	clear bool
	flag  uintptr
}{
	"ro": {false, unix.MS_RDONLY}, "rw": {true, unix.MS_RDONLY},
	"nosuid": {false, unix.MS_NOSUID}, "suid": {true, unix.MS_NOSUID},
	"nodev": {false, unix.MS_NODEV}, "dev": {true, unix.MS_NODEV},
	"noexec": {false, unix.MS_NOEXEC}, "exec": {true, unix.MS_NOEXEC},
	"sync": {false, unix.MS_SYNCHRONOUS}, "async": {true, unix.MS_SYNCHRONOUS},
	"dirsync": {false, unix.MS_DIRSYNC}, "mand": {false, unix.MS_MANDLOCK}, "nomand": {true, unix.MS_MANDLOCK},
	"noatime": {false, unix.MS_NOATIME}, "atime": {true, unix.MS_NOATIME},
	"nodiratime": {false, unix.MS_NODIRATIME}, "diratime": {true, unix.MS_NODIRATIME},
	"relatime": {false, unix.MS_RELATIME}, "norelatime": {true, unix.MS_RELATIME},
	"strictatime": {false, unix.MS_STRICTATIME}, "nostrictatime": {true, unix.MS_STRICTATIME},
}

var tmpfsData = map[string]bool{
	"size": true, "mode": true, "uid": true, "gid": true, "nr_inodes": true, "nr_blocks": true, "mpol": true, "huge": true,
}

// tmpfsOptions translates options as docker's --tmpfs takes them; nosuid, nodev and noexec hold unless their opposite is
// there. Each element may be a list with commas.
func tmpfsOptions(options []string) (flags uintptr, data string, err error) {
	flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	var values []string
	for _, list := range options {
		for o := range strings.SplitSeq(list, ",") {
			if o == "" || o == "defaults" {
				continue
			}
			if f, ok := tmpfsFlags[o]; ok {
				if f.clear {
					flags &^= f.flag
				} else {
					flags |= f.flag
				}
				continue
			}
			key, _, ok := strings.Cut(o, "=")
			if !ok || !tmpfsData[key] {
				return 0, "", fmt.Errorf("invalid tmpfs option [%q]", o)
			}
			values = append(values, o)
		}
	}
	return flags, strings.Join(values, ","), nil
}

// environment is what docker gives a process: its own defaults, overridden in place by what image and user say (an
// entry without "=" removes a variable), then more, and HOME last unless somebody set it.
func environment(hostname string, tty bool, home string, lists ...[]string) []string {
	env := []string{"PATH=" + container.DefaultPath, "HOSTNAME=" + hostname}
	if tty {
		env = append(env, "TERM=xterm")
	}
	find := func(name string) int {
		return slices.IndexFunc(env, func(e string) bool {
			n, _, _ := strings.Cut(e, "=")
			return n == name
		})
	}
	for _, list := range lists {
		for _, e := range list {
			name, _, set := strings.Cut(e, "=")
			i := find(name)
			switch {
			case !set && i >= 0:
				env = slices.Delete(env, i, i+1)
			case !set:
			case i >= 0:
				env[i] = e
			default:
				env = append(env, e)
			}
		}
	}
	if find("HOME") < 0 {
		env = append(env, "HOME="+home)
	}
	return env
}

// process fills in a process of this container; args, user and so on are those of a first process or an exec.
func (c *Container) process(args, env []string, userSpec, cwd string, tty bool) (container.Process, error) {
	u, err := rootfs.LookupUser(c.pod.dir(c, "rootfs"), userSpec, c.doc.GroupAdd)
	if err != nil {
		return container.Process{}, err
	}
	caps, err := container.Capabilities(c.doc.Privileged, c.doc.CapAdd, c.doc.CapDrop)
	if err != nil {
		return container.Process{}, err
	}
	limits, err := container.Rlimits(c.doc.Ulimits)
	if err != nil {
		return container.Process{}, err
	}
	if cwd == "" {
		cwd = "/"
	}
	return container.Process{
		Args:       args,
		Env:        environment(network.HostName(c.pod.cfg.Pod), tty, u.Home, c.doc.Env, env),
		Cwd:        filepath.Clean(cwd),
		User:       container.User{UID: u.UID, GID: u.GID, Groups: u.Groups},
		Bounding:   caps,
		NoNewPrivs: c.doc.NoNewPrivs,
		Rlimits:    limits,
		TTY:        tty,
	}, nil
}

// config is the whole of a start.
func (c *Container) config() (*container.Config, error) {
	proc, err := c.process(c.doc.Args(), nil, c.doc.User, c.doc.WorkingDir, c.doc.TTY)
	if err != nil {
		return nil, err
	}
	proc.Stdin = c.doc.OpenStdin
	proc.OOMScoreAdj = c.doc.OOMScoreAdj
	mounts, err := c.mounts()
	if err != nil {
		return nil, err
	}
	cfg := &container.Config{
		Rootfs:          c.pod.dir(c, "rootfs"),
		ReadOnly:        c.doc.ReadOnly,
		Hostname:        network.HostName(c.pod.cfg.Pod),
		Domain:          c.pod.cfg.Pod.Domain,
		Mounts:          mounts,
		ShmSize:         c.doc.ShmSize,
		NoShm:           c.doc.NoShm,
		WritableCgroups: c.doc.WritableCgroups,
		MaskedPaths:     c.doc.MaskedPaths, ReadonlyPaths: c.doc.ReadonlyPaths,
		Privileged: c.doc.Privileged,
		Devices:    c.doc.Devices,
		Process:    proc,
	}
	if c.doc.Init {
		cfg.InitFile = c.pod.cfg.InitFile
	}
	for name, value := range c.doc.Sysctls {
		if !container.NamespacedSysctl(name) {
			return nil, fmt.Errorf("sysctl %q is not in a separate kernel namespace", name)
		}
		cfg.Sysctls = append(cfg.Sysctls, container.Sysctl{Name: name, Value: value})
	}
	slices.SortFunc(cfg.Sysctls, func(a, b container.Sysctl) int { return strings.Compare(a.Name, b.Name) })
	if c.doc.Privileged {
		all, err := machineDevices("/dev")
		if err != nil {
			return nil, err
		}
		cfg.Devices = append(all, cfg.Devices...)
	}
	return cfg, nil
}

// machineDevices lists the device nodes of the machine: a privileged container has them all.
func machineDevices(dir string) ([]specs.LinuxDevice, error) {
	var out []specs.LinuxDevice
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.IsDir() {
			switch e.Name() {
			case "pts", "shm", "mqueue", "fd":
				continue
			}
			below, err := machineDevices(path)
			if err != nil {
				return nil, err
			}
			out = append(out, below...)
			continue
		}
		info, err := e.Info()
		if err != nil || info.Mode()&fs.ModeDevice == 0 || e.Name() == "console" || e.Name() == "ptmx" {
			continue
		}
		st := info.Sys().(*syscall.Stat_t)
		mode := info.Mode().Perm()
		d := specs.LinuxDevice{
			Path: path, Type: "b", FileMode: &mode, UID: &st.Uid, GID: &st.Gid,
			Major: int64(unix.Major(st.Rdev)), Minor: int64(unix.Minor(st.Rdev)),
		}
		if info.Mode()&fs.ModeCharDevice != 0 {
			d.Type = "c"
		}
		out = append(out, d)
	}
	return out, nil
}
