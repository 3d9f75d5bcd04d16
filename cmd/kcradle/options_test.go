package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kcradle/kcradle/spec"
)

// testImage is an image with everything that options can change.
var testImage = imageConfig{
	ImageConfig: ocispec.ImageConfig{
		Entrypoint: []string{"/entry"}, Cmd: []string{"serve"}, Env: []string{"PATH=/bin", "A=image"},
		User: "web", WorkingDir: "/srv", StopSignal: "SIGQUIT", Labels: map[string]string{"from": "image", "x": "image"},
		ExposedPorts: map[string]struct{}{"80/tcp": {}, "53/udp": {}},
	},
	DockerOCIImageConfigExt: dockerspec.DockerOCIImageConfigExt{
		Healthcheck: &dockerspec.HealthcheckConfig{Test: []string{"CMD", "check"}, Retries: 7},
	},
}

func TestContainerOfImage(t *testing.T) {
	got, volumes, err := (&containerOptions{Name: "web"}).container(testImage)
	if err != nil || volumes != nil {
		t.Fatal(volumes, err)
	}
	want := spec.Container{
		Name: "web", Entrypoint: []string{"/entry"}, Cmd: []string{"serve"}, Env: []string{"PATH=/bin", "A=image"},
		User: "web", WorkingDir: "/srv", StopSignal: "SIGQUIT", Labels: map[string]string{"from": "image", "x": "image"},
		ExposedPorts: []string{"53/udp", "80/tcp"}, Healthcheck: &spec.Healthcheck{Test: []string{"CMD", "check"}, Retries: 7},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("container (-want +got):\n%s", d)
	}
}

func TestContainerOptions(t *testing.T) {
	t.Setenv("FROM_CALLER", "mine")
	os.Unsetenv("NOT_SET_AT_ALL")
	dir := t.TempDir()
	file := filepath.Join(dir, "env")
	if err := os.WriteFile(file, []byte("\uFEFF# comment\n\nB=file\n  C=with = sign\nFROM_CALLER\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	limit, quota, period, pids := int64(64<<20), int64(150000), uint64(100000), int64(50)
	for _, tt := range []struct {
		name string
		o    containerOptions
		want func(*spec.Container)
	}{
		{"entrypoint forgets the command", containerOptions{EntrypointSet: true, Entrypoint: []string{"sh"}},
			func(c *spec.Container) { c.Entrypoint, c.Cmd = []string{"sh"}, nil }},
		{"command keeps the entrypoint", containerOptions{Cmd: []string{"x", "y"}},
			func(c *spec.Container) { c.Cmd = []string{"x", "y"} }},
		{"empty entrypoint and a command", containerOptions{EntrypointSet: true, Cmd: []string{"x"}},
			func(c *spec.Container) { c.Entrypoint, c.Cmd = nil, []string{"x"} }},
		{"environment", containerOptions{EnvFiles: []string{file}, Env: []string{"A=flag", "B=flag", "FROM_CALLER", "NOT_SET_AT_ALL", "E="}},
			func(c *spec.Container) {
				c.Env = []string{"B=flag", "C=with = sign", "FROM_CALLER=mine", "A=flag", "E=", "PATH=/bin"}
			}},
		{"a variable without a value is taken away", containerOptions{Env: []string{"A"}},
			func(c *spec.Container) {
				if _, set := os.LookupEnv("A"); !set {
					c.Env = []string{"PATH=/bin"}
				}
			}},
		{"labels", containerOptions{Labels: []string{"x=flag", "empty"}},
			func(c *spec.Container) { c.Labels = map[string]string{"from": "image", "x": "flag", "empty": ""} }},
		{"volumes", containerOptions{Volumes: []string{"data:/d:ro", "data:/e:nocopy"}, Tmpfs: []string{"/t:size=1m,mode=700"},
			Mounts: []string{"type=tmpfs,dst=/m,tmpfs-size=1m,tmpfs-mode=1770", "src=other,target=/o,readonly"}},
			func(c *spec.Container) {
				c.Mounts = []spec.Mount{
					{Type: "volume", Source: "data", Target: "/d", ReadOnly: true}, {Type: "volume", Source: "data", Target: "/e", NoCopy: true},
					{Type: "tmpfs", Target: "/m", Options: []string{"size=1048576", "mode=1770"}},
					{Type: "volume", Source: "other", Target: "/o", ReadOnly: true},
					{Type: "tmpfs", Target: "/t", Options: []string{"size=1m", "mode=700"}},
				}
			}},
		{"restart", containerOptions{Restart: "on-failure:3"},
			func(c *spec.Container) { c.Restart = spec.Restart{Name: "on-failure", MaxRetries: 3} }},
		{"restart no", containerOptions{Restart: "no"}, func(*spec.Container) {}},
		{"limits", containerOptions{Memory: "64m", CPUs: "1.5", PidsLimit: 50, ShmSize: "1g", OOMScoreAdj: -5},
			func(c *spec.Container) {
				c.Resources.LinuxResources = specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit},
					CPU: &specs.LinuxCPU{Quota: &quota, Period: &period}, Pids: &specs.LinuxPids{Limit: &pids}}
				c.ShmSize, c.OOMScoreAdj = 1<<30, -5
			}},
		{"ulimits", containerOptions{Ulimits: []string{"nofile=1024:2048", "core=-1"}},
			func(c *spec.Container) {
				c.Ulimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1024, Hard: 2048}, {Type: "RLIMIT_CORE", Soft: 1<<64 - 1, Hard: 1<<64 - 1}}
			}},
		{"capabilities", containerOptions{CapAdd: []string{"net_admin", "CAP_SYS_TIME", "NET_ADMIN"}, CapDrop: []string{"all"}},
			func(c *spec.Container) {
				c.CapAdd, c.CapDrop = []string{"CAP_NET_ADMIN", "CAP_SYS_TIME"}, []string{"ALL"}
			}},
		{"no health check", containerOptions{NoHealthcheck: true}, func(c *spec.Container) { c.Healthcheck = &spec.Healthcheck{Test: []string{"NONE"}} }},
		{"health check", containerOptions{HealthCmd: "curl x", HealthInterval: time.Second},
			func(c *spec.Container) {
				c.Healthcheck = &spec.Healthcheck{Test: []string{"CMD-SHELL", "curl x"}, Interval: time.Second, Retries: 7}
			}},
		{"expose", containerOptions{Expose: []string{"90-91", "53/udp"}},
			func(c *spec.Container) { c.ExposedPorts = []string{"53/udp", "80/tcp", "90/tcp", "91/tcp"} }},
		{"the rest", containerOptions{User: "0:0", WorkDir: "/w", StopSignal: "RTMIN+3", Interactive: true, TTY: true, Init: true,
			ReadOnly: true, Privileged: true, SecurityOpt: []string{"no-new-privileges"}, Sysctls: []string{"a.b=c=d"}},
			func(c *spec.Container) {
				c.User, c.WorkingDir, c.StopSignal = "0:0", "/w", "RTMIN+3"
				c.OpenStdin, c.StdinOnce, c.TTY, c.Init, c.ReadOnly, c.Privileged, c.NoNewPrivs = true, true, true, true, true, true, true
				c.Sysctls = map[string]string{"a.b": "c=d"}
			}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			want, _, err := (&containerOptions{}).container(testImage)
			if err != nil {
				t.Fatal(err)
			}
			tt.want(&want)
			got, _, err := tt.o.container(testImage)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Errorf("container (-want +got):\n%s", d)
			}
		})
	}
}

func TestContainerOptionsRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    containerOptions
		want string
	}{
		{"no command", containerOptions{EntrypointSet: true}, "no command specified"},
		{"relative workdir", containerOptions{WorkDir: "srv"}, "the working directory 'srv' is invalid, it needs to be an absolute path"},
		{"signal", containerOptions{StopSignal: "SIGNOT"}, "invalid signal: SIGNOT"},
		{"empty variable", containerOptions{Env: []string{"=x"}}, "invalid environment variable: =x"},
		{"missing env file", containerOptions{EnvFiles: []string{"/nowhere"}}, "open /nowhere: no such file"},
		{"empty label", containerOptions{Labels: []string{"=x"}}, "invalid label"},
		{"anonymous volume", containerOptions{Volumes: []string{"/data"}}, "invalid volume specification: '/data'"},
		{"volume mode", containerOptions{Volumes: []string{"a1:/data:rx"}}, "invalid mode: rx"},
		{"volume name", containerOptions{Volumes: []string{"a b:/data"}}, "includes invalid characters for a local volume name"},
		{"mount on root", containerOptions{Volumes: []string{"a1:/"}}, "destination can't be '/'"},
		{"relative mount", containerOptions{Volumes: []string{"a1:data"}}, "mount path must be absolute"},
		{"twice", containerOptions{Volumes: []string{"a1:/x"}, Tmpfs: []string{"/x/"}}, "duplicate mount point: /x"},
		{"mount key", containerOptions{Mounts: []string{"type=volume,colour=red"}}, "unexpected key 'colour' in 'colour=red'"},
		{"mount type", containerOptions{Mounts: []string{"type=nfs,src=a1,dst=/x"}}, `unknown mount type "nfs"`},
		{"restart", containerOptions{Restart: "sometimes"}, "unknown policy 'sometimes'"},
		{"retries", containerOptions{Restart: "always:3"}, "maximum retry count can only be used with 'on-failure'"},
		{"memory", containerOptions{Memory: "lots"}, `invalid argument "lots" for "-m, --memory" flag: invalid size: 'lots'`},
		{"too little memory", containerOptions{Memory: "4m"}, "minimum memory limit allowed is 6MB"},
		{"swap alone", containerOptions{MemorySwap: "1g"}, "set the memory limit when using the memoryswap limit"},
		{"swap too small", containerOptions{Memory: "1g", MemorySwap: "1m"}, "memoryswap limit should be larger than memory limit"},
		{"cpus", containerOptions{CPUs: "-1"}, `invalid argument "-1" for "--cpus" flag`},
		{"ulimit", containerOptions{Ulimits: []string{"files=1"}}, `invalid argument "files=1" for "--ulimit" flag`},
		{"capability", containerOptions{CapAdd: []string{"NET-ADMIN"}}, `invalid capability: "NET-ADMIN"`},
		{"security", containerOptions{SecurityOpt: []string{"seccomp=x"}}, "invalid --security-opt"},
		{"sysctl", containerOptions{Sysctls: []string{"a"}}, "want NAME=VALUE"},
		{"health", containerOptions{NoHealthcheck: true, HealthCmd: "x"}, "--no-healthcheck conflicts with --health-* options"},
		{"health interval", containerOptions{HealthInterval: time.Microsecond}, "--health-interval cannot be less than 1ms"},
		{"expose", containerOptions{Expose: []string{"90-80"}}, "invalid range format for --expose: 90-80"},
		{"oom score", containerOptions{OOMScoreAdj: 2000}, "range for oom score adj is [-1000, 1000]"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, _, err := tt.o.container(testImage); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

func TestParseSignal(t *testing.T) {
	for in, want := range map[string]int{"9": 9, "KILL": 9, "SIGKILL": 9, "sigterm": 15, "RTMIN": 34, "SIGRTMIN+3": 37, "RTMAX-1": 63, "64": 64,
		"": 0, "0": 0, "65": 0, "SIGNOT": 0, "RTMIN+40": 0, "RTMAX+1": 0} {
		if got, err := parseSignal(in); int(got) != want || (err == nil) != (want > 0) {
			t.Errorf("parseSignal(%q): got %d, %v; want %d", in, got, err, want)
		}
	}
}

func TestParseHost(t *testing.T) {
	for in, want := range map[string]spec.Host{
		"db:10.0.0.1": {Name: "db", Address: "10.0.0.1"}, "db=::1": {Name: "db", Address: "::1"}, "db:::1": {Name: "db", Address: "::1"},
		"db:[::1]": {Name: "db", Address: "::1"}, "h:host-gateway": {Name: "h", Address: "host-gateway"}, "db": {}, ":1.2.3.4": {}, "db:x": {},
	} {
		got, err := parseHost(in)
		if got != want || (err == nil) != (want.Name != "") {
			t.Errorf("parseHost(%q): got %v, %v; want %v", in, got, err, want)
		}
	}
}

func TestPodName(t *testing.T) {
	for in, want := range map[string]string{"/tmp/vm": "vm", "/x/My_Pod.1": "my-pod-1", "/": "pod", "/x/---": "pod", "/x/" + strings.Repeat("a", 70): strings.Repeat("a", 63)} {
		if got := podName(in); got != want {
			t.Errorf("podName(%q): got %q, want %q", in, got, want)
		}
	}
}

func TestDetachKeys(t *testing.T) {
	for in, want := range map[string]string{"ctrl-p,ctrl-q": "\x10\x11", "a,ctrl-[": "a\x1b", "": "", "ctrl-é": "!", "ab": "!", "a,,b": "!"} {
		got, err := detachKeys(in)
		if err != nil {
			got = []byte("!")
		}
		if string(got) != want {
			t.Errorf("detachKeys(%q): got %q, %v; want %q", in, got, err, want)
		}
	}
}

// Keys that only begin like the detach keys reach the container, the detach keys themselves do not.
func TestKeyReader(t *testing.T) {
	for _, tt := range []struct {
		in, want string
		detached bool
	}{
		{"hello", "hello", false}, {"a\x10b", "a\x10b", false}, {"a\x10\x11b", "a", true}, {"\x10\x10\x11", "\x10", true}, {"a\x10", "a\x10", false},
	} {
		for _, size := range []int{1, 3, 100} {
			k := &keyReader{r: strings.NewReader(tt.in), keys: []byte("\x10\x11")}
			var got []byte
			buf := make([]byte, size)
			var err error
			for err == nil {
				var n int
				n, err = k.Read(buf)
				got = append(got, buf[:n]...)
			}
			if string(got) != tt.want || (err == errDetached) != tt.detached {
				t.Errorf("keys %q, %d at once: got %q, %v", tt.in, size, got, err)
			}
		}
	}
}
