package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/image"
	"github.com/kcradle/kcradle/spec"
)

// summonOptions are the flags of summon.
type summonOptions struct {
	Dir       string
	PodFile   string // else Container is the one container
	Container containerOptions

	// Of the pod:
	Hostname, Domainname       string
	Publish                    []string
	DNS, DNSSearch, DNSOptions []string
	AddHosts                   []string
	VolumeSize, ScratchSize    string

	sourceOptions
	Pull     string
	Force    bool
	Portable bool
}

func newSummon(a *app) *cobra.Command {
	var o summonOptions
	var entrypoint string
	var stopTimeout int
	cmd := &cobra.Command{
		Use:   "summon [flags] DIR IMAGE [-- CMD ARG…]\n  kcradle summon [flags] --pod FILE DIR",
		Short: "Make a bundle of an image",
		Long: `summon writes the bundle DIR: a directory with everything that one container, or with --pod several, need to start
in a machine of their own. The flags are docker's and mean the same.

IMAGE is NAME[:TAG][@DIGEST], looked for in the local docker daemon and then in the registry, or one of
docker://NAME, docker-daemon:NAME, docker-archive:FILE[:NAME], oci:DIR[:NAME], oci-archive:FILE, containerd:NAME.

DIR must not exist, or be empty. --force replaces a bundle that does not run; volumes that the new bundle has under the
same name and size keep their contents, everything else of the old bundle goes.`,
		Example: `  kcradle summon /tmp/vm mariadb -e MARIADB_ROOT_PASSWORD=secret -v data:/var/lib/mysql -p 3306:3306
  kcradle summon -it /tmp/shell debian:12 -- bash
  kcradle summon /tmp/hello docker-archive:hello.tar -- echo hello
  kcradle summon --pod shop.yaml /tmp/shop`,
		Args: func(_ *cobra.Command, args []string) error {
			switch {
			case o.PodFile != "" && len(args) != 1:
				return errors.New("with --pod FILE there is one argument: DIR")
			case o.PodFile == "" && len(args) < 2:
				return errors.New("two arguments are needed: DIR and IMAGE")
			}
			return nil
		},
		ValidArgsFunction: completeDirThenImage(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Dir = args[0]
			if o.PodFile != "" {
				var wrong []string
				cmd.Flags().Visit(func(f *pflag.Flag) {
					if f.Annotations[ofContainer] != nil {
						wrong = append(wrong, "--"+f.Name)
					}
				})
				if len(wrong) > 0 {
					return usageError{fmt.Errorf("with --pod the file says what a container is: %v", wrong)}
				}
				return summon(cmd.Context(), a, o)
			}
			o.Container.Image, o.Container.Cmd = args[1], args[2:]
			if cmd.Flags().Changed("entrypoint") {
				o.Container.EntrypointSet = true
				if entrypoint != "" {
					o.Container.Entrypoint = []string{entrypoint}
				}
			}
			if cmd.Flags().Changed("stop-timeout") {
				o.Container.StopTimeout = &stopTimeout
			}
			return summon(cmd.Context(), a, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.PodFile, "pod", "", "a `file` (YAML or JSON, - for standard input) that describes several containers")
	f.BoolVarP(&o.Force, "force", "f", false, "replace a bundle that is there")
	f.BoolVar(&o.Portable, "portable", false, "copy layers and machine package instead of linking to them")
	o.flags(f)
	o.registryFlags(f)
	f.StringVar(&o.Pull, "pull", "missing", "ask the source for the image: always, missing or never")
	f.StringVar(&o.ScratchSize, "scratch-size", "", "size of the writable disk (default 10g; it takes what is written)")
	f.StringVar(&o.VolumeSize, "volume-size", "", "size of each volume (default 10g; it takes what is written)")
	f.StringArrayVarP(&o.Publish, "publish", "p", nil, "publish a port: [[ADDRESS:]HOST:]CONTAINER[/udp]")
	f.StringVar(&o.Hostname, "hostname", "", "hostname (default: the name)")
	f.StringVar(&o.Domainname, "domainname", "", "NIS domain name")
	f.StringArrayVar(&o.DNS, "dns", nil, "DNS server")
	f.StringArrayVar(&o.DNSSearch, "dns-search", nil, "DNS search domain")
	f.StringArrayVar(&o.DNSOptions, "dns-option", nil, "DNS option")
	f.StringArrayVar(&o.AddHosts, "add-host", nil, "a line of /etc/hosts: `NAME:ADDRESS`; the address may be host-gateway")
	containerFlags(f, &o.Container, &entrypoint, &stopTimeout)
	_ = cmd.RegisterFlagCompletionFunc("pull", cobra.FixedCompletions([]string{"always", "missing", "never"}, cobra.ShellCompDirectiveNoFileComp))
	_ = cmd.RegisterFlagCompletionFunc("restart", cobra.FixedCompletions([]string{"no", "always", "unless-stopped", "on-failure:"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// ofContainer marks flags that a pod file replaces.
const ofContainer = "kcradle-container"

// containerFlags are docker's flags for one container.
func containerFlags(all *pflag.FlagSet, o *containerOptions, entrypoint *string, stopTimeout *int) {
	f := pflag.NewFlagSet("container", pflag.ContinueOnError)
	f.StringVar(&o.Name, "name", "", "name of the container (default: that of the directory)")
	f.StringVar(entrypoint, "entrypoint", "", "replace the image's entrypoint, and forget its command")
	f.StringArrayVarP(&o.Env, "env", "e", nil, "set an environment variable; without =VALUE to the caller's")
	f.StringArrayVar(&o.EnvFiles, "env-file", nil, "read environment variables from a file")
	f.StringVarP(&o.WorkDir, "workdir", "w", "", "working directory")
	f.StringVarP(&o.User, "user", "u", "", "user: `NAME|UID[:GROUP|GID]`")
	f.StringArrayVar(&o.GroupAdd, "group-add", nil, "additional group")
	f.BoolVarP(&o.TTY, "tty", "t", false, "a terminal for the container")
	f.BoolVarP(&o.Interactive, "interactive", "i", false, "standard input stays open, and run passes it on")
	f.BoolVar(&o.Init, "init", false, "a reaper as the container's first process")
	f.StringArrayVarP(&o.Volumes, "volume", "v", nil, "a volume or a directory or file of the host: `NAME|/host/path:/path[:ro]`")
	f.StringArrayVar(&o.Mounts, "mount", nil, "a volume, bind or tmpfs in docker's long notation")
	f.StringArrayVar(&o.Tmpfs, "tmpfs", nil, "a tmpfs: `/path[:options]`")
	f.BoolVar(&o.ReadOnly, "read-only", false, "the container's own files cannot be written")
	f.StringVar(&o.ShmSize, "shm-size", "", "size of /dev/shm (default 64m)")
	f.StringVarP(&o.Memory, "memory", "m", "", "memory limit, and the size of the machine beside what its kernel needs")
	f.StringVar(&o.MemorySwap, "memory-swap", "", "limit of memory and swap together; -1 for none")
	f.StringVar(&o.MemoryReservation, "memory-reservation", "", "soft memory limit")
	f.StringVar(&o.CPUs, "cpus", "", "number of CPUs, also fractions")
	f.Uint64VarP(&o.CPUShares, "cpu-shares", "c", 0, "relative weight")
	f.StringVar(&o.CPUSet, "cpuset-cpus", "", "CPUs to run on (0-3, 0,1)")
	f.Int64Var(&o.PidsLimit, "pids-limit", 0, "most processes; -1 for no limit")
	f.IntVar(&o.OOMScoreAdj, "oom-score-adj", 0, "preference when memory runs out (-1000 to 1000)")
	f.StringArrayVarP(&o.Labels, "label", "l", nil, "a label: `NAME[=VALUE]`")
	f.StringArrayVar(&o.LabelFiles, "label-file", nil, "read labels from a file")
	f.StringVar(&o.Restart, "restart", "", "no, always, unless-stopped or on-failure[:`N`]")
	f.StringVar(&o.StopSignal, "stop-signal", "", "signal that asks the container to stop")
	f.IntVar(stopTimeout, "stop-timeout", 10, "seconds until a container that was asked to stop is killed")
	f.StringArrayVar(&o.Ulimits, "ulimit", nil, "a limit: `NAME=SOFT[:HARD]`")
	f.StringArrayVar(&o.CapAdd, "cap-add", nil, "add a capability")
	f.StringArrayVar(&o.CapDrop, "cap-drop", nil, "drop a capability")
	f.BoolVar(&o.Privileged, "privileged", false, "all capabilities and devices of the machine")
	f.StringArrayVar(&o.SecurityOpt, "security-opt", nil, "no-new-privileges")
	f.StringArrayVar(&o.Sysctls, "sysctl", nil, "a kernel parameter: `NAME=VALUE`")
	f.StringArrayVar(&o.Expose, "expose", nil, "a port that inspect shows as exposed")
	f.BoolVar(&o.NoHealthcheck, "no-healthcheck", false, "no health check, whatever the image says")
	f.StringVar(&o.HealthCmd, "health-cmd", "", "command of the health check")
	f.DurationVar(&o.HealthInterval, "health-interval", 0, "time between health checks")
	f.DurationVar(&o.HealthTimeout, "health-timeout", 0, "time one health check may take")
	f.DurationVar(&o.HealthStart, "health-start-period", 0, "time in which failures do not count")
	f.DurationVar(&o.HealthGap, "health-start-interval", 0, "time between health checks in the start period")
	f.IntVar(&o.HealthRetries, "health-retries", 0, "failures in a row that mean unhealthy")
	f.VisitAll(func(x *pflag.Flag) { x.Annotations = map[string][]string{ofContainer: {"true"}} })
	all.AddFlagSet(f)
}

// summon makes the bundle o.Dir.
func summon(ctx context.Context, a *app, o summonOptions) error {
	if o.Platform != "" && o.Platform != image.Platform {
		return fmt.Errorf("platform %s: only %s runs here", o.Platform, image.Platform)
	}
	if !slices.Contains([]image.Policy{image.Always, image.Missing, image.Never}, image.Policy(o.Pull)) {
		return usageError{fmt.Errorf("invalid argument %q for \"--pull\" flag: want always, missing or never", o.Pull)}
	}
	pod, containers, err := o.skeleton(a)
	if err != nil {
		return err
	}
	scratch, err := byteSize("--scratch-size", o.ScratchSize)
	if err != nil {
		return err
	}
	// What can be refused without an image is refused before one is pulled.
	for i := range containers {
		c := &containers[i]
		if _, err := image.ParseReference(c.Image); err != nil {
			return fmt.Errorf("container %s: %w", c.Name, err)
		}
		probe := *c
		probe.Cmd = append([]string{"x"}, c.Cmd...)
		if _, _, err := probe.container(imageConfig{}); err != nil {
			return fmt.Errorf("container %s: %w", c.Name, err)
		}
	}
	store, err := image.Open(a.Root, a.Log)
	if err != nil {
		return err
	}
	cfg := bundle.Config{
		Pod: pod, Layers: map[string]string{}, Packages: packagesDir(), Cache: filepath.Join(a.Root, "cache"),
		Portable: o.Portable, Replace: o.Force, Writer: "kcradle " + buildInfo().Version,
	}
	if scratch != nil {
		cfg.ScratchSize = *scratch
	}
	images := map[string]*image.Image{}
	var leased []digest.Digest
	for i := range containers {
		co := &containers[i]
		img := images[co.Image]
		if img == nil {
			if img, err = getImage(ctx, a, store, co.Image, o); err != nil {
				return err
			}
			images[co.Image] = img
		}
		c, volumes, err := co.container(img.Config.Config)
		if err != nil {
			return fmt.Errorf("container %s: %w", co.Name, err)
		}
		c.ID, c.Created = newID(), time.Now().UTC()
		c.Image = spec.Image{Ref: co.Image, Digest: string(img.Digest), ConfigID: string(img.ConfigDigest)}
		for _, l := range img.Layers {
			c.Image.Layers = append(c.Image.Layers, string(l.DiffID))
			cfg.Layers[string(l.DiffID)] = l.Path
			leased = append(leased, l.DiffID)
		}
		pod.Containers = append(pod.Containers, c)
		if err := addVolumes(pod, volumes, o.VolumeSize); err != nil {
			return err
		}
	}
	if err := pod.Validate(); err != nil {
		return err
	}
	if err := makeSources(containers); err != nil {
		return err
	}
	return writeBundle(ctx, a, store, o, cfg, leased)
}

// makeSources makes the missing host directories of -v, as docker does; --mount wants them to be there.
func makeSources(containers []containerOptions) error {
	for _, c := range containers {
		for _, v := range c.Volumes {
			m, err := parseVolume(v)
			if err != nil {
				return err
			}
			if m.Type == spec.MountBind {
				if _, err := os.Stat(m.Source); errors.Is(err, fs.ErrNotExist) {
					err = os.MkdirAll(m.Source, 0o755)
				}
				if err != nil {
					return fmt.Errorf("container %s: %w", c.Name, err)
				}
			}
		}
		for _, v := range c.Mounts {
			m, err := parseMount(v)
			if err != nil {
				return err
			}
			if _, err := os.Stat(m.Source); m.Type == spec.MountBind && err != nil {
				return fmt.Errorf("container %s: invalid mount config for type \"bind\": bind source path does not exist: %s", c.Name, m.Source)
			}
		}
	}
	return nil
}

// writeBundle writes the bundle under a lease on its layers.
func writeBundle(ctx context.Context, a *app, store *image.Store, o summonOptions, cfg bundle.Config, layers []digest.Digest) error {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return err
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	before, err := bundle.Open(dir)
	if err != nil {
		before = nil
	}
	if !o.Portable {
		cfg.Store = a.Root
		keep := layers
		if before != nil { // until it is replaced, the old bundle needs its layers, too
			for _, id := range before.Pod.Layers() {
				if !slices.Contains(keep, digest.Digest(id)) {
					keep = append(slices.Clip(keep), digest.Digest(id))
				}
			}
		}
		if err := store.Lease(ctx, dir, keep); err != nil && before != nil { // of another store, perhaps
			err = store.Lease(ctx, dir, layers)
		} else if err != nil {
			return err
		}
	}
	b, err := bundle.Write(ctx, dir, cfg)
	if err != nil {
		if before == nil {
			err = errors.Join(err, store.Release(context.WithoutCancel(ctx), dir))
		}
		return err
	}
	if o.Portable {
		err = store.Release(ctx, dir)
	} else {
		err = store.Lease(ctx, dir, layers)
	}
	if err != nil {
		return err
	}
	if err := b.Remember(a.Root); err != nil {
		a.Log.Warn("kcradle ps will not find this bundle by itself", "error", err)
	}
	return nil
}

// skeleton is the pod without its containers, and what is to become of them, in the order of their start.
func (o *summonOptions) skeleton(a *app) (*spec.Pod, []containerOptions, error) {
	abs, err := filepath.Abs(o.Dir)
	if err != nil {
		return nil, nil, err
	}
	p := &spec.Pod{Version: spec.PodVersion, Name: podName(abs), Hostname: o.Hostname, Domain: o.Domainname,
		DNSSearch: o.DNSSearch, DNSOptions: o.DNSOptions}
	var containers []containerOptions
	publish, dns, hosts := o.Publish, o.DNS, o.AddHosts
	cpus, memory := o.Container.CPUs, o.Container.Memory
	if o.PodFile == "" {
		if o.Container.Name == "" {
			o.Container.Name = p.Name
		} else {
			p.Name = podName(o.Container.Name)
		}
		containers = []containerOptions{o.Container}
	} else {
		file, err := readPodFile(o.PodFile, a.Stdin)
		if err != nil {
			return nil, nil, err
		}
		if file.Name != "" {
			p.Name = file.Name
		}
		p.Hostname, p.Domain = cmp.Or(o.Hostname, file.Hostname), cmp.Or(o.Domainname, file.Domainname)
		p.DNSSearch, p.DNSOptions = append(file.DNSSearch, o.DNSSearch...), append(file.DNSOptions, o.DNSOptions...)
		publish, dns, hosts = append(file.Ports, publish...), append(file.DNS, dns...), append(file.ExtraHosts, hosts...)
		cpus, memory = file.CPUs, file.Memory
		for name, v := range file.Volumes {
			size, err := byteSize("volumes."+name+".size", v.Size)
			if err != nil {
				return nil, nil, err
			}
			volume := spec.Volume{Name: name}
			if size != nil {
				volume.Size = *size
			}
			p.Volumes = append(p.Volumes, volume)
		}
		slices.SortFunc(p.Volumes, func(a, b spec.Volume) int { return strings.Compare(a.Name, b.Name) })
		for i := range file.Containers {
			containers = append(containers, file.Containers[i].options())
		}
		if containers, err = inOrder(containers); err != nil {
			return nil, nil, err
		}
	}
	if p.Ports, err = parsePublish(publish); err != nil {
		return nil, nil, err
	}
	if p.DNS, err = parseAddrs("--dns", dns); err != nil {
		return nil, nil, err
	}
	for _, s := range hosts {
		h, err := parseHost(s)
		if err != nil {
			return nil, nil, err
		}
		p.ExtraHosts = append(p.ExtraHosts, h)
	}
	n, err := parseCPUs(cpus)
	if err != nil {
		return nil, nil, err
	}
	p.VCPUs = int(math.Ceil(n))
	m, err := byteSize("-m, --memory", memory)
	if err != nil {
		return nil, nil, err
	}
	if m != nil {
		p.Memory = *m
	}
	return p, containers, nil
}

// inOrder puts containers behind those they come after, and keeps the order of the file otherwise.
func inOrder(in []containerOptions) ([]containerOptions, error) {
	var out []containerOptions
	placed := map[string]bool{}
	for len(out) < len(in) {
		before := len(out)
		for _, c := range in {
			ready := !placed[c.Name]
			for _, d := range c.After {
				ready = ready && placed[d.Container]
			}
			if ready {
				out, placed[c.Name] = append(out, c), true
			}
		}
		if len(out) == before {
			for _, c := range in {
				for _, d := range c.After {
					if !slices.ContainsFunc(in, func(x containerOptions) bool { return x.Name == d.Container }) {
						return nil, fmt.Errorf("container %s: after: there is no container %q", c.Name, d.Container)
					}
				}
			}
			for _, c := range in {
				if !placed[c.Name] {
					return nil, fmt.Errorf("container %s: after: it waits for itself", c.Name)
				}
			}
			return nil, errors.New("containers: a name is there twice")
		}
	}
	return out, nil
}

// addVolumes adds the volumes that a container uses and the pod does not have yet.
func addVolumes(p *spec.Pod, names []string, size string) error {
	n, err := byteSize("--volume-size", size)
	if err != nil {
		return err
	}
	for _, name := range names {
		if slices.ContainsFunc(p.Volumes, func(v spec.Volume) bool { return v.Name == name }) {
			continue
		}
		v := spec.Volume{Name: name}
		if n != nil {
			v.Size = *n
		}
		p.Volumes = append(p.Volumes, v)
	}
	return nil
}

// getImage brings an image into the store, as --pull says.
func getImage(ctx context.Context, a *app, store *image.Store, name string, o summonOptions) (*image.Image, error) {
	ref, err := image.ParseReference(name)
	if err != nil {
		return nil, err
	}
	opts, err := o.pullOptions(image.Policy(o.Pull))
	if err != nil {
		return nil, err
	}
	return pullShown(ctx, a, store, ref, opts, o.Quiet)
}

func newID() string {
	b := make([]byte, 32)
	_, _ = rand.Read(b) // never fails since Go 1.24
	return hex.EncodeToString(b)
}
