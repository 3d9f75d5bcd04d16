package main

import (
	"bufio"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"math"
	"net/netip"
	"os"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/docker/go-units"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kcradle/kcradle/spec"
)

// containerOptions is what a user says of one container, in docker's own notation. Flags of summon and entries of a pod
// file both fill it; [containerOptions.container] merges it with the image's configuration.
type containerOptions struct {
	Name  string
	Image string

	Entrypoint    []string
	EntrypointSet bool // an empty entrypoint was asked for, too
	Cmd           []string

	Env      []string
	EnvFiles []string
	WorkDir  string
	User     string
	GroupAdd []string

	TTY, Interactive, Init bool

	Volumes  []string // -v
	Mounts   []string // --mount
	Tmpfs    []string
	ReadOnly bool
	ShmSize  string

	Memory, MemorySwap, MemoryReservation string
	CPUs                                  string
	CPUShares                             uint64
	CPUSet                                string
	PidsLimit                             int64
	OOMScoreAdj                           int

	Labels      []string
	LabelFiles  []string
	Restart     string
	StopSignal  string
	StopTimeout *int

	Ulimits         []string
	CapAdd, CapDrop []string
	Privileged      bool
	SecurityOpt     []string
	Sysctls         []string
	Expose          []string

	NoHealthcheck                                         bool
	HealthCmd                                             string
	HealthTest                                            []string // pod files: the image notation
	HealthInterval, HealthTimeout, HealthStart, HealthGap time.Duration
	HealthRetries                                         int

	After       []spec.Dependency
	NonCritical bool
}

// imageConfig is the part of an image's configuration that makes a container.
type imageConfig = dockerspec.DockerOCIImageConfig

// container merges options and image. It also names the volumes that the container uses. The caller fills ID, Created
// and Image.
func (o *containerOptions) container(img imageConfig) (c spec.Container, volumes []string, err error) {
	c = spec.Container{
		Name: o.Name, WorkingDir: img.WorkingDir, User: img.User, GroupAdd: o.GroupAdd,
		TTY: o.TTY, OpenStdin: o.Interactive, StdinOnce: o.Interactive, Init: o.Init,
		StopSignal: img.StopSignal, StopTimeout: o.StopTimeout, ReadOnly: o.ReadOnly, Privileged: o.Privileged,
		OOMScoreAdj: o.OOMScoreAdj, After: o.After, NonCritical: o.NonCritical,
	}
	// docker's rule: a new entrypoint also forgets the image's command.
	c.Entrypoint, c.Cmd = img.Entrypoint, img.Cmd
	if o.EntrypointSet {
		c.Entrypoint, c.Cmd = o.Entrypoint, nil
	}
	if len(o.Cmd) > 0 {
		c.Cmd = o.Cmd
	}
	if len(c.Args()) == 0 {
		return c, nil, errors.New("no command specified: the image has none (append one: -- CMD ARG…)")
	}
	if o.WorkDir != "" {
		if !path.IsAbs(o.WorkDir) {
			return c, nil, fmt.Errorf("the working directory '%s' is invalid, it needs to be an absolute path", o.WorkDir)
		}
		c.WorkingDir = o.WorkDir
	}
	if c.WorkingDir != "" && !path.IsAbs(c.WorkingDir) { // what an image says is relative to its root
		c.WorkingDir = "/" + c.WorkingDir
	}
	if o.User != "" {
		c.User = o.User
	}
	if o.StopSignal != "" {
		c.StopSignal = o.StopSignal
	}
	if c.StopSignal != "" {
		if _, err := parseSignal(c.StopSignal); err != nil {
			return c, nil, err
		}
	}
	if c.Env, err = o.environment(img.Env); err != nil {
		return c, nil, err
	}
	if c.Labels, err = o.labels(img.Labels); err != nil {
		return c, nil, err
	}
	if c.ExposedPorts, err = exposed(img.ExposedPorts, o.Expose); err != nil {
		return c, nil, err
	}
	if c.Mounts, volumes, err = o.mounts(); err != nil {
		return c, nil, err
	}
	if c.Restart, err = parseRestart(o.Restart); err != nil {
		return c, nil, err
	}
	if c.Healthcheck, err = o.healthcheck(img.Healthcheck); err != nil {
		return c, nil, err
	}
	return c, volumes, o.limits(&c)
}

// environment is docker's: files, then flags, then what the image sets and they do not; a later value replaces an earlier
// one in its place, and a name without a value that the caller does not have is taken away.
func (o *containerOptions) environment(image []string) ([]string, error) {
	var asked []string
	for _, name := range o.EnvFiles {
		lines, err := readEnvFile(name)
		if err != nil {
			return nil, err
		}
		asked = append(asked, lines...)
	}
	var out []string
	named := map[string]bool{}
	for _, e := range append(asked, o.Env...) {
		key, _, hasValue := strings.Cut(e, "=")
		if key == "" {
			return nil, fmt.Errorf("invalid environment variable: %s", e)
		}
		named[key] = true
		if !hasValue { // the caller's own, when set
			v, ok := os.LookupEnv(key)
			if !ok {
				out = slices.DeleteFunc(out, func(x string) bool { return strings.HasPrefix(x, key+"=") })
				continue
			}
			e = key + "=" + v
		}
		if i := slices.IndexFunc(out, func(x string) bool { return strings.HasPrefix(x, key+"=") }); i >= 0 {
			out[i] = e
		} else {
			out = append(out, e)
		}
	}
	for _, e := range image {
		key, _, _ := strings.Cut(e, "=")
		if !named[key] {
			out = append(out, e)
		}
	}
	return out, nil
}

// readEnvFile reads docker's env and label files: a variable per line, # begins a comment line.
func readEnvFile(name string) ([]string, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var out []string
	s := bufio.NewScanner(io.LimitReader(f, spec.MaxPodBytes))
	s.Buffer(nil, spec.MaxPodBytes)
	for n := 1; s.Scan(); n++ {
		line := s.Text()
		if n == 1 {
			line = strings.TrimPrefix(line, "\uFEFF")
		}
		line = strings.TrimLeft(line, " \t")
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		key, _, _ := strings.Cut(line, "=")
		switch {
		case key == "":
			return nil, fmt.Errorf("%s: line %d: no variable name on line '%s'", name, n, line)
		case strings.ContainsAny(key, " \t"):
			return nil, fmt.Errorf("%s: line %d: variable '%s' contains whitespaces", name, n, key)
		}
		out = append(out, line)
	}
	if err := s.Err(); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return out, nil
}

func (o *containerOptions) labels(img map[string]string) (map[string]string, error) {
	out := map[string]string{}
	for k, v := range img {
		out[k] = v
	}
	var more []string
	for _, name := range o.LabelFiles {
		lines, err := readEnvFile(name)
		if err != nil {
			return nil, err
		}
		more = append(more, lines...)
	}
	for _, l := range append(more, o.Labels...) {
		k, v, _ := strings.Cut(l, "=")
		if k == "" {
			return nil, fmt.Errorf("invalid label '%s': empty name", l)
		}
		out[k] = v
	}
	if len(out) == 0 {
		return nil, nil
	}
	return out, nil
}

func exposed(img map[string]struct{}, more []string) ([]string, error) {
	set := map[string]bool{}
	for p := range img {
		set[withProto(p)] = true
	}
	for _, p := range more {
		ports, proto, _ := strings.Cut(withProto(p), "/")
		first, last, isRange := strings.Cut(ports, "-")
		a, err1 := strconv.ParseUint(first, 10, 16)
		b := a
		var err2 error
		if isRange {
			b, err2 = strconv.ParseUint(last, 10, 16)
		}
		if err1 != nil || err2 != nil || a == 0 || b < a || proto != "tcp" && proto != "udp" {
			return nil, fmt.Errorf("invalid range format for --expose: %s", p)
		}
		for n := a; n <= b; n++ {
			set[strconv.FormatUint(n, 10)+"/"+proto] = true
		}
	}
	var out []string
	for p := range set {
		out = append(out, p)
	}
	slices.Sort(out)
	return out, nil
}

func withProto(port string) string {
	if strings.Contains(port, "/") {
		return strings.ToLower(port)
	}
	return port + "/tcp"
}

// mounts reads -v, --mount and --tmpfs, and names the volumes among them.
func (o *containerOptions) mounts() (mounts []spec.Mount, volumes []string, err error) {
	for _, v := range o.Volumes {
		m, err := parseVolume(v)
		if err != nil {
			return nil, nil, err
		}
		mounts = append(mounts, m)
	}
	for _, s := range o.Mounts {
		m, err := parseMount(s)
		if err != nil {
			return nil, nil, fmt.Errorf("invalid argument %q for \"--mount\" flag: %w", s, err)
		}
		mounts = append(mounts, m)
	}
	for _, s := range o.Tmpfs {
		target, options, _ := strings.Cut(s, ":")
		m := spec.Mount{Type: spec.MountTmpfs, Target: path.Clean(target)}
		if options != "" {
			m.Options = strings.Split(options, ",")
		}
		mounts = append(mounts, m)
	}
	seen := map[string]bool{}
	for i := range mounts {
		m := &mounts[i]
		if !path.IsAbs(m.Target) {
			return nil, nil, fmt.Errorf("invalid mount path: '%s' mount path must be absolute", m.Target)
		}
		if m.Target = path.Clean(m.Target); m.Target == "/" {
			return nil, nil, errors.New("invalid mount path: destination can't be '/'")
		}
		if seen[m.Target] {
			return nil, nil, fmt.Errorf("duplicate mount point: %s", m.Target)
		}
		seen[m.Target] = true
		if m.Type == spec.MountVolume && !slices.Contains(volumes, m.Source) {
			volumes = append(volumes, m.Source)
		}
	}
	return mounts, volumes, nil
}

// volumeName is docker's rule. Expressions are compiled when they are used: run has no time for summon's.
var volumeName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{1,127}$`) })

// parseVolume reads docker's -v: NAME:/path[:options] or /host/path:/path[:options].
func parseVolume(s string) (spec.Mount, error) {
	parts := strings.Split(s, ":")
	if len(parts) == 1 {
		return spec.Mount{}, fmt.Errorf("invalid volume specification: '%s': name it (NAME:%s); what a container writes elsewhere is kept in the bundle anyway", s, s)
	}
	if len(parts) > 3 || parts[0] == "" || parts[1] == "" {
		return spec.Mount{}, fmt.Errorf("invalid volume specification: '%s'", s)
	}
	m := spec.Mount{Source: parts[0], Target: parts[1]}
	if len(parts) == 3 {
		for _, opt := range strings.Split(parts[2], ",") {
			switch opt {
			case "ro":
				m.ReadOnly = true
			case "nocopy":
				m.NoCopy = true
			case "rw", "", "z", "Z", "cached", "delegated", "consistent": // as in docker: no effect here
			default:
				return spec.Mount{}, fmt.Errorf("invalid volume specification: '%s': invalid mode: %s", s, opt)
			}
		}
	}
	switch {
	case strings.HasPrefix(m.Source, "/"):
		m.Type, m.Source = spec.MountBind, path.Clean(m.Source)
	case strings.HasPrefix(m.Source, ".") || strings.HasPrefix(m.Source, "~"):
		dir, err := os.Getwd()
		if err != nil || m.Source[0] == '~' {
			return spec.Mount{}, fmt.Errorf("invalid volume specification: '%s': name the host's directory absolutely", s)
		}
		m.Type, m.Source = spec.MountBind, path.Join(dir, m.Source)
	case !volumeName().MatchString(m.Source):
		return spec.Mount{}, fmt.Errorf("create %s: %q includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path", m.Source, m.Source)
	default:
		m.Type = spec.MountVolume
	}
	return m, nil
}

// parseMount reads docker's --mount, a line of CSV.
func parseMount(s string) (spec.Mount, error) {
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return spec.Mount{}, err
	}
	m := spec.Mount{Type: spec.MountVolume}
	for _, f := range fields {
		key, value, hasValue := strings.Cut(f, "=")
		switch strings.ToLower(key) {
		case "type":
			m.Type = strings.ToLower(value)
		case "source", "src":
			m.Source = value
		case "target", "destination", "dst":
			m.Target = value
		case "readonly", "ro":
			m.ReadOnly = true
			if hasValue {
				if m.ReadOnly, err = strconv.ParseBool(value); err != nil {
					return m, fmt.Errorf("invalid value for %s: %s", key, value)
				}
			}
		case "volume-nocopy":
			m.NoCopy = !hasValue || value == "true" || value == "1"
		case "tmpfs-size":
			n, err := units.RAMInBytes(value)
			if err != nil {
				return m, fmt.Errorf("invalid value for %s: %s", key, value)
			}
			m.Options = append(m.Options, "size="+strconv.FormatInt(n, 10))
		case "tmpfs-mode":
			if _, err := strconv.ParseUint(value, 8, 32); err != nil {
				return m, fmt.Errorf("invalid value for %s: %s", key, value)
			}
			m.Options = append(m.Options, "mode="+value)
		default:
			return m, fmt.Errorf("unexpected key '%s' in '%s'", key, f)
		}
	}
	switch {
	case m.Target == "":
		return m, errors.New("target is required")
	case m.Type == spec.MountBind && !path.IsAbs(m.Source):
		return m, errors.New("bind needs an absolute source")
	case m.Type == spec.MountVolume && m.Source == "":
		return m, errors.New("volume needs a source: name it")
	case m.Type == spec.MountVolume && !volumeName().MatchString(m.Source):
		return m, fmt.Errorf("%q is not a volume name", m.Source)
	case m.Type != spec.MountBind && m.Type != spec.MountVolume && m.Type != spec.MountTmpfs:
		return m, fmt.Errorf("unknown mount type %q (known: volume, bind, tmpfs)", m.Type)
	}
	return m, nil
}

func parseRestart(s string) (spec.Restart, error) {
	name, count, hasCount := strings.Cut(s, ":")
	r := spec.Restart{Name: name}
	switch name {
	case "", "no", "always", "unless-stopped", "on-failure":
	default:
		return r, fmt.Errorf("invalid restart policy: unknown policy '%s'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'", name)
	}
	if hasCount {
		n, err := strconv.Atoi(count)
		switch {
		case name != "on-failure":
			return r, errors.New("invalid restart policy: maximum retry count can only be used with 'on-failure'")
		case err != nil || n < 0:
			return r, errors.New("invalid restart policy format: maximum retry count must be an integer")
		}
		r.MaxRetries = n
	}
	if name == "no" {
		r.Name = ""
	}
	return r, nil
}

func (o *containerOptions) healthcheck(img *dockerspec.HealthcheckConfig) (*spec.Healthcheck, error) {
	h := spec.Healthcheck{}
	if img != nil {
		h = spec.Healthcheck{Test: img.Test, Interval: img.Interval, Timeout: img.Timeout,
			StartPeriod: img.StartPeriod, StartInterval: img.StartInterval, Retries: img.Retries}
	}
	set := o.HealthCmd != "" || len(o.HealthTest) > 0 || o.HealthInterval != 0 || o.HealthTimeout != 0 ||
		o.HealthStart != 0 || o.HealthGap != 0 || o.HealthRetries != 0
	if o.NoHealthcheck {
		if set {
			return nil, errors.New("--no-healthcheck conflicts with --health-* options")
		}
		return &spec.Healthcheck{Test: []string{"NONE"}}, nil
	}
	for _, d := range []struct {
		flag  string
		given time.Duration
		into  *time.Duration
	}{
		{"--health-interval", o.HealthInterval, &h.Interval}, {"--health-timeout", o.HealthTimeout, &h.Timeout},
		{"--health-start-period", o.HealthStart, &h.StartPeriod}, {"--health-start-interval", o.HealthGap, &h.StartInterval},
	} {
		if d.given < 0 || d.given > 0 && d.given < time.Millisecond {
			return nil, fmt.Errorf("%s cannot be less than 1ms", d.flag)
		}
		if d.given > 0 {
			*d.into = d.given
		}
	}
	if o.HealthRetries < 0 {
		return nil, errors.New("--health-retries cannot be negative")
	}
	if o.HealthRetries > 0 {
		h.Retries = o.HealthRetries
	}
	if o.HealthCmd != "" {
		h.Test = []string{"CMD-SHELL", o.HealthCmd}
	}
	if len(o.HealthTest) > 0 {
		h.Test = o.HealthTest
	}
	if len(h.Test) == 0 {
		return nil, nil
	}
	switch h.Test[0] {
	case "NONE", "CMD", "CMD-SHELL":
	default:
		return nil, fmt.Errorf("healthcheck: want NONE, CMD or CMD-SHELL first, got %q", h.Test[0])
	}
	return &h, nil
}

// minMemory is docker's own least limit.
const minMemory = 6 << 20

// limits fills resources, ulimits, capabilities and what else confines the container.
func (o *containerOptions) limits(c *spec.Container) error {
	var mem specs.LinuxMemory
	var err error
	if mem.Limit, err = byteSize("-m, --memory", o.Memory); err != nil {
		return err
	}
	if mem.Limit != nil && *mem.Limit < minMemory {
		return errors.New("minimum memory limit allowed is 6MB")
	}
	if o.MemorySwap == "-1" {
		unlimited := int64(-1)
		mem.Swap = &unlimited
	} else if mem.Swap, err = byteSize("--memory-swap", o.MemorySwap); err != nil {
		return err
	}
	switch {
	case mem.Swap != nil && mem.Limit == nil:
		return errors.New("you should always set the memory limit when using the memoryswap limit")
	case mem.Swap != nil && *mem.Swap >= 0 && *mem.Swap < *mem.Limit:
		return errors.New("minimum memoryswap limit should be larger than memory limit")
	}
	if mem.Reservation, err = byteSize("--memory-reservation", o.MemoryReservation); err != nil {
		return err
	}
	if mem != (specs.LinuxMemory{}) {
		c.Resources.Memory = &mem
	}
	cpus, err := parseCPUs(o.CPUs)
	if err != nil {
		return err
	}
	if cpus > 0 || o.CPUShares > 0 || o.CPUSet != "" {
		c.Resources.CPU = &specs.LinuxCPU{Cpus: o.CPUSet}
		if cpus > 0 {
			period, quota := uint64(100000), int64(math.Round(cpus*100000))
			c.Resources.CPU.Period, c.Resources.CPU.Quota = &period, &quota
		}
		if o.CPUShares > 0 {
			c.Resources.CPU.Shares = &o.CPUShares
		}
	}
	if o.PidsLimit != 0 {
		limit := o.PidsLimit
		c.Resources.Pids = &specs.LinuxPids{Limit: &limit}
	}
	if o.OOMScoreAdj < -1000 || o.OOMScoreAdj > 1000 {
		return fmt.Errorf("invalid value %d, range for oom score adj is [-1000, 1000]", o.OOMScoreAdj)
	}
	if n, err := byteSize("--shm-size", o.ShmSize); err != nil {
		return err
	} else if n != nil {
		c.ShmSize = *n
	}
	for _, s := range o.Ulimits {
		u, err := units.ParseUlimit(s)
		if err != nil {
			return fmt.Errorf("invalid argument %q for \"--ulimit\" flag: %w", s, err)
		}
		c.Ulimits = append(c.Ulimits, specs.POSIXRlimit{
			Type: "RLIMIT_" + strings.ToUpper(u.Name), Soft: uint64(u.Soft), Hard: uint64(u.Hard)}) // -1: RLIM_INFINITY
	}
	if c.CapAdd, err = capabilities(o.CapAdd); err != nil {
		return err
	}
	if c.CapDrop, err = capabilities(o.CapDrop); err != nil {
		return err
	}
	for _, s := range o.SecurityOpt {
		switch s {
		case "no-new-privileges", "no-new-privileges:true", "no-new-privileges=true":
			c.NoNewPrivs = true
		case "no-new-privileges:false", "no-new-privileges=false":
		default:
			return fmt.Errorf("invalid --security-opt: %q (known: no-new-privileges; a machine of its own needs no seccomp, AppArmor or SELinux of the host)", s)
		}
	}
	for _, s := range o.Sysctls {
		k, v, ok := strings.Cut(s, "=")
		if !ok || k == "" {
			return fmt.Errorf("invalid argument %q for \"--sysctl\" flag: want NAME=VALUE", s)
		}
		if c.Sysctls == nil {
			c.Sysctls = map[string]string{}
		}
		c.Sysctls[k] = v
	}
	return nil
}

func byteSize(flag, s string) (*int64, error) {
	if s == "" || s == "0" {
		return nil, nil
	}
	n, err := units.RAMInBytes(s)
	if err == nil && n < 0 {
		err = errors.New("negative")
	}
	if err != nil {
		return nil, fmt.Errorf("invalid argument %q for %q flag: %w", s, flag, err)
	}
	return &n, nil
}

func parseCPUs(s string) (float64, error) {
	if s == "" || s == "0" {
		return 0, nil
	}
	n, err := strconv.ParseFloat(s, 64)
	if err != nil || math.IsNaN(n) || n < 0.001 || n > 64 {
		return 0, fmt.Errorf("invalid argument %q for \"--cpus\" flag: want a number between 0.001 and 64", s)
	}
	return n, nil
}

var capabilityName = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`^CAP_[A-Z_]+$`) })

func capabilities(list []string) ([]string, error) {
	var out []string
	for _, s := range list {
		name := strings.ToUpper(s)
		if name != "ALL" {
			if !strings.HasPrefix(name, "CAP_") {
				name = "CAP_" + name
			}
			if !capabilityName().MatchString(name) {
				return nil, fmt.Errorf("invalid capability: %q", s)
			}
		}
		if !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out, nil
}

// parseHost reads docker's --add-host: NAME:ADDRESS or NAME=ADDRESS, the address in brackets or not.
func parseHost(s string) (spec.Host, error) {
	name, addr, ok := strings.Cut(s, "=")
	if !ok {
		name, addr, ok = strings.Cut(s, ":")
	}
	if !ok || name == "" {
		return spec.Host{}, fmt.Errorf("bad format for add-host: %q", s)
	}
	if addr == "host-gateway" {
		return spec.Host{Name: name, Address: addr}, nil
	}
	a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(addr, "["), "]"))
	if err != nil {
		return spec.Host{}, fmt.Errorf("invalid IP address in add-host: %q", addr)
	}
	return spec.Host{Name: name, Address: a.String()}, nil
}

func parseAddrs(flag string, list []string) ([]string, error) {
	for _, s := range list {
		if _, err := netip.ParseAddr(s); err != nil {
			return nil, fmt.Errorf("invalid argument %q for %q flag: %s is not an ip address", s, flag, s)
		}
	}
	return list, nil
}
