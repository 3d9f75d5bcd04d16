package daemon

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"
	"github.com/moby/moby/api/types/container"

	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
)

// parse reads a request as a client sends it.
func parse(t testing.TB, body string) *request {
	t.Helper()
	q := &request{}
	if err := json.Unmarshal([]byte(body), q); err != nil {
		t.Fatal(err)
	}
	if q.Config == nil {
		q.Config = &container.Config{}
	}
	if q.HostConfig == nil {
		q.HostConfig = &container.HostConfig{}
	}
	return q
}

func testImage() dockerspec.DockerOCIImageConfig {
	var img dockerspec.DockerOCIImageConfig
	img.Entrypoint, img.Cmd = []string{"/entry"}, []string{"serve"}
	img.Env = []string{"PATH=/bin", "A=image", "B=image"}
	img.WorkingDir, img.User = "srv", "www"
	img.Labels = map[string]string{"from": "image", "both": "image"}
	img.ExposedPorts = map[string]struct{}{"80": {}, "53/UDP": {}}
	img.Volumes = map[string]struct{}{"/data/": {}}
	return img
}

// What a client leaves out is the image's; what it says outweighs the image.
func TestTranslate(t *testing.T) {
	w, err := translate(parse(t, `{"Env":["A=own","B","C=own"],"Labels":{"both":"own"},"ExposedPorts":{"443/tcp":{}},
		"HostConfig":{"Memory":67108864,"NanoCpus":1500000000,"PidsLimit":50,"Binds":["named:/n:ro","/host:/h"],
		"PortBindings":{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":"8080"}],"53/udp":[{"HostPort":"5000-5010"}]},
		"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":3},"CapAdd":["net_admin"],"Ulimits":[{"Name":"nofile","Soft":5,"Hard":-1}],
		"StorageOpt":{"size":"20G"},"Tmpfs":{"/t":"size=1m"},"ExtraHosts":["me:host-gateway"],"SecurityOpt":["no-new-privileges","seccomp=unconfined"]}}`), testImage(), nil)
	if err != nil {
		t.Fatal(err)
	}
	c := w.pod.Containers[0]
	want := spec.Container{
		Entrypoint: []string{"/entry"}, Cmd: []string{"serve"}, Env: []string{"A=own", "C=own", "PATH=/bin"}, WorkingDir: "/srv", User: "www",
		Labels:       map[string]string{"from": "image", "both": "own"},
		ExposedPorts: []string{"443/tcp", "53/udp", "80/tcp"},
		Mounts: []spec.Mount{
			{Type: "volume", Source: "named", Target: "/n", ReadOnly: true}, {Type: "bind", Source: "/host", Target: "/h"},
			{Type: "tmpfs", Target: "/t", Options: []string{"size=1m"}}, {Type: "volume", Target: "/data"},
		},
		CapAdd: []string{"CAP_NET_ADMIN"}, NoNewPrivs: true, Restart: spec.Restart{Name: "on-failure", MaxRetries: 3},
		Ulimits: c.Ulimits, Resources: c.Resources,
	}
	if d := cmp.Diff(want, c); d != "" {
		t.Errorf("container (-want +got):\n%s", d)
	}
	if u := c.Ulimits[0]; u.Type != "RLIMIT_NOFILE" || u.Soft != 5 || u.Hard != 1<<64-1 {
		t.Errorf("ulimit: got %+v", u)
	}
	if r := c.Resources; *r.Memory.Limit != 64<<20 || *r.CPU.Quota != 150000 || *r.CPU.Period != 100000 || *r.Pids.Limit != 50 {
		t.Errorf("resources: got %+v", r)
	}
	if d := cmp.Diff([]spec.Port{
		{Proto: "udp", ContainerPort: 53, HostPort: 5000, HostPortEnd: 5010},
		{Proto: "tcp", ContainerPort: 80, HostIP: "127.0.0.1", HostPort: 8080},
	}, w.pod.Ports); d != "" {
		t.Errorf("ports (-want +got):\n%s", d)
	}
	if w.pod.Memory != 64<<20 || w.pod.VCPUs != 2 || w.scratch != 20<<30 || w.network != network.Shared {
		t.Errorf("machine: got memory %d, vCPUs %d, scratch %d, network %s", w.pod.Memory, w.pod.VCPUs, w.scratch, w.network)
	}
	if len(w.volumes) != 2 || w.volumes[0].name != "named" || !w.volumes[1].anonymous || w.volumes[1].mount != 3 {
		t.Errorf("volumes: got %+v", w.volumes)
	}
}

// docker's rules of entrypoint and command.
func TestTranslateArgs(t *testing.T) {
	for body, want := range map[string]string{
		`{}`:                                     "/entry serve",
		`{"Cmd":["x"]}`:                          "/entry x",
		`{"Entrypoint":["/e"]}`:                  "/e",
		`{"Entrypoint":["/e"],"Cmd":["x"]}`:      "/e x",
		`{"Entrypoint":[""],"Cmd":["x"]}`:        "x",
		`{"Entrypoint":[],"Cmd":["x"]}`:          "x",
		`{"Cmd":[]}`:                             "/entry serve",
		`{"Entrypoint":[""]}`:                    "no command specified",
		`{"Cmd":["x"],"WorkingDir":"relative"}`:  "the working directory 'relative' is invalid, it needs to be an absolute path",
		`{"HostConfig":{"Memory":4096}}`:         "Minimum memory limit allowed is 6MB",
		`{"HostConfig":{"Binds":["a:b"]}}`:       "create a: \"a\" includes invalid characters for a local volume name, only \"[a-zA-Z0-9][a-zA-Z0-9_.-]\" are allowed. If you intended to pass a host directory, use absolute path",
		`{"HostConfig":{"Binds":["/a:/"]}}`:      "invalid specification: destination can't be '/'",
		`{"HostConfig":{"Binds":["/a:/b:odd"]}}`: "invalid volume specification: '/a:/b:odd': invalid mode: odd",
		`{"HostConfig":{"AutoRemove":true,"RestartPolicy":{"Name":"always"}}}`: "can't create 'AutoRemove' container with restart policy",
	} {
		w, err := translate(parse(t, body), testImage(), nil)
		got := ""
		if err != nil {
			got = err.Error()
		} else {
			got = strings.Join(w.pod.Containers[0].Args(), " ")
		}
		if got != want {
			t.Errorf("%s:\n got %s\nwant %s", body, got, want)
		}
	}
}

// honoured are the fields of a request that translate, or what calls it, obeys. Together with the refusals they are all
// there are: a field that the API gains is in neither list and fails the test.
var honoured = strings.Fields(`
	Config.Hostname Config.Domainname Config.User Config.AttachStdin Config.AttachStdout Config.AttachStderr Config.ExposedPorts
	Config.Tty Config.OpenStdin Config.StdinOnce Config.Env Config.Cmd Config.Healthcheck Config.Image Config.Volumes
	Config.WorkingDir Config.Entrypoint Config.NetworkDisabled Config.OnBuild Config.Labels Config.StopSignal Config.StopTimeout
	Config.Shell
	HostConfig.Binds HostConfig.ContainerIDFile HostConfig.NetworkMode HostConfig.PortBindings HostConfig.RestartPolicy
	HostConfig.AutoRemove HostConfig.ConsoleSize HostConfig.Annotations HostConfig.CapAdd HostConfig.CapDrop HostConfig.Dns
	HostConfig.DnsOptions HostConfig.DnsSearch HostConfig.ExtraHosts HostConfig.Links HostConfig.MaskedPaths HostConfig.ReadonlyPaths HostConfig.GroupAdd HostConfig.OomScoreAdj
	HostConfig.Privileged HostConfig.PublishAllPorts HostConfig.ReadonlyRootfs HostConfig.SecurityOpt HostConfig.StorageOpt
	HostConfig.Tmpfs HostConfig.VolumesFrom HostConfig.ShmSize HostConfig.Sysctls HostConfig.Runtime HostConfig.Mounts HostConfig.Init
	HostConfig.CpuShares HostConfig.Memory HostConfig.NanoCpus HostConfig.BlkioWeight HostConfig.CpuPeriod HostConfig.CpuQuota
	HostConfig.CpusetCpus HostConfig.CpusetMems HostConfig.MemoryReservation HostConfig.MemorySwap HostConfig.MemorySwappiness
	HostConfig.OomKillDisable HostConfig.UsernsMode HostConfig.PidsLimit HostConfig.Ulimits
`)

func TestEveryField(t *testing.T) {
	known := map[string]bool{}
	for _, f := range honoured {
		known[f] = true
	}
	for _, r := range refusals(parse(t, `{}`)) {
		if r.set {
			t.Errorf("an empty request is refused for %s", r.field)
		}
		if known[r.field] {
			t.Errorf("%s is both honoured and refused", r.field)
		}
		known[r.field] = true
	}
	known["HostConfig.LogConfig"] = known["HostConfig.LogConfig.Type"] // its options bound a log that is bounded
	var fields func(prefix string, typ reflect.Type)
	fields = func(prefix string, typ reflect.Type) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			if f.Anonymous {
				fields(prefix, f.Type)
				continue
			}
			name := f.Name
			if tag, _, _ := strings.Cut(f.Tag.Get("json"), ","); tag != "" {
				name = tag
			}
			if !known[prefix+name] {
				t.Errorf("%s%s is neither honoured nor refused", prefix, name)
			}
		}
	}
	fields("Config.", reflect.TypeFor[container.Config]())
	fields("HostConfig.", reflect.TypeFor[container.HostConfig]())
}

func TestRefusals(t *testing.T) {
	for body, field := range map[string]string{
		`{"HostConfig":{"PidMode":"host"}}`:                               "HostConfig.PidMode",
		`{"HostConfig":{"IpcMode":"container:x"}}`:                        "HostConfig.IpcMode",
		`{"HostConfig":{"Devices":[{"PathOnHost":"/dev/kvm"}]}}`:          "HostConfig.Devices",
		`{"HostConfig":{"DeviceRequests":[{"Count":-1}]}}`:                "HostConfig.DeviceRequests",
		`{"HostConfig":{"LogConfig":{"Type":"syslog"}}}`:                  "HostConfig.LogConfig.Type",
		`{"HostConfig":{"NetworkMode":"host"}}`:                           "HostConfig.NetworkMode host",
		`{"HostConfig":{"SecurityOpt":["apparmor=docker-default"]}}`:      "HostConfig.SecurityOpt",
		`{"HostConfig":{"UTSMode":"host"}}`:                               "HostConfig.UTSMode",
		`{"HostConfig":{"CgroupParent":"/x"}}`:                            "HostConfig.CgroupParent",
		`{"HostConfig":{"PortBindings":{"80/sctp":[{"HostPort":"80"}]}}}`: "HostConfig.PortBindings",
	} {
		_, err := translate(parse(t, body), testImage(), nil)
		if err == nil || !strings.HasPrefix(err.Error(), field) || !strings.Contains(err.Error(), "refused: ") {
			t.Errorf("%s: got %v, want a refusal that names %s", body, err, field)
		}
	}
}

// Whatever a client sends is refused in words or becomes a pod that can be written.
func FuzzCreate(f *testing.F) {
	f.Add(`{"Image":"x","Cmd":["a"],"HostConfig":{"Binds":["v:/v"],"PortBindings":{"80/tcp":[{"HostPort":"1-2"}]}}}`)
	f.Add(`{"Image":"x","HostConfig":{"Mounts":[{"Type":"tmpfs","Target":"/t","TmpfsOptions":{"SizeBytes":1}}],"Tmpfs":{"/x":""}}}`)
	f.Fuzz(func(t *testing.T, body string) {
		q := &request{}
		if json.Unmarshal([]byte(body), q) != nil || q.Config == nil {
			return
		}
		if q.HostConfig == nil {
			q.HostConfig = &container.HostConfig{}
		}
		w, err := translate(q, testImage(), nil)
		if err != nil {
			return
		}
		for _, v := range w.volumes {
			if v.mount >= len(w.pod.Containers[0].Mounts) || w.pod.Containers[0].Mounts[v.mount].Type != spec.MountVolume {
				t.Errorf("volume %+v: no such mount", v)
			}
		}
		p := w.pod
		p.Name = "x"
		c := &p.Containers[0]
		c.ID, c.Name, c.Image.ConfigID = strings.Repeat("0", 64), "xx", "sha256:"+strings.Repeat("0", 64)
		for i := range c.Mounts {
			if c.Mounts[i].Type == spec.MountVolume {
				c.Mounts[i].Source = "vv"
			}
		}
		p.Volumes = []spec.Volume{{Name: "vv"}}
		_ = p.Validate() // must say yes or no
	})
}

// What an image says of itself is the container's own from then on: inspect shows it, and commit keeps it.
func TestMerged(t *testing.T) {
	img := testImage()
	img.Shell = []string{"/bin/ash", "-c"}
	q := parse(t, `{"Image":"x","Volumes":{"/own":{}},"ExposedPorts":{"90/tcp":{}},"Healthcheck":{"Retries":7}}`)
	img.Healthcheck = &dockerspec.HealthcheckConfig{Test: []string{"CMD", "check"}}
	w, err := translate(q, img, nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &w.pod.Containers[0]
	c.ID = strings.Repeat("ab", 32)
	b, err := json.Marshal(merged(q.Config, c, img))
	if err != nil {
		t.Fatal(err)
	}
	var got struct {
		Hostname              string
		Cmd, Shell            []string
		ExposedPorts, Volumes map[string]struct{}
		Healthcheck           dockerspec.HealthcheckConfig
	}
	if err := json.Unmarshal(b, &got); err != nil {
		t.Fatal(err)
	}
	want := got
	want.Hostname, want.Cmd, want.Shell = "abababababab", []string{"serve"}, img.Shell
	want.ExposedPorts = map[string]struct{}{"80/tcp": {}, "53/udp": {}, "90/tcp": {}}
	want.Volumes = map[string]struct{}{"/data/": {}, "/own": {}}
	want.Healthcheck = dockerspec.HealthcheckConfig{Test: []string{"CMD", "check"}, Retries: 7}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("configuration (-want +got):\n%s", d)
	}
}
