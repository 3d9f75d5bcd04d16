package vdocker

import (
	"bytes"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/swarm"
	"github.com/moby/moby/api/types/system"
	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/spec"
)

func (s *server) ping(w http.ResponseWriter, r *dockerapi.Request) error {
	h := w.Header()
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	h.Set("Builder-Version", "1") // no BuildKit: nothing is built here
	h.Set("Swarm", "inactive")
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if r.Method == http.MethodHead {
		h.Set("Content-Length", "0")
		w.WriteHeader(http.StatusOK)
		return nil
	}
	_, err := w.Write([]byte("OK"))
	return err
}

// build says what this program was built from.
func build() (version, commit, date string) {
	version, commit, date = "devel", "unknown", ""
	b, ok := debug.ReadBuildInfo()
	if !ok {
		return version, commit, date
	}
	if b.Main.Version != "" && b.Main.Version != "(devel)" {
		version = b.Main.Version
	}
	for _, s := range b.Settings {
		switch s.Key {
		case "vcs.revision":
			commit = s.Value[:min(7, len(s.Value))]
		case "vcs.time":
			date = s.Value
		}
	}
	return version, commit, date
}

func kernel() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

func (s *server) version(w http.ResponseWriter, _ *dockerapi.Request) error {
	own, commit, date := build()
	out := system.VersionResponse{
		Platform: system.PlatformInfo{Name: "kcradle pod"},
		Version:  EngineVersion, APIVersion: dockerapi.MaxVersion.String(), MinAPIVersion: dockerapi.MinVersion.String(),
		GitCommit: commit, GoVersion: runtime.Version(), Os: runtime.GOOS, Arch: runtime.GOARCH,
		KernelVersion: kernel(), BuildTime: date,
	}
	out.Components = []system.ComponentVersion{
		{Name: "Engine", Version: EngineVersion, Details: map[string]string{
			"ApiVersion": out.APIVersion, "MinAPIVersion": out.MinAPIVersion, "Arch": out.Arch, "Os": out.Os,
			"GitCommit": commit, "GoVersion": out.GoVersion, "KernelVersion": out.KernelVersion, "BuildTime": date,
			"Experimental": "false",
		}},
		{Name: "kcradle", Version: own, Details: map[string]string{"GitCommit": commit}},
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// memory is the machine's memory in bytes.
func memory() int64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(b) {
		if f := bytes.Fields(line); len(f) >= 2 && string(f[0]) == "MemTotal:" {
			kib, _ := strconv.ParseInt(string(f[1]), 10, 64)
			return kib << 10
		}
	}
	return 0
}

func (s *server) info(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	own, commit, _ := build()
	fds, _ := os.ReadDir("/proc/self/fd")
	out := system.Info{
		ID: podUUID(p), Images: len(podImages(p)), Driver: storageDriver, DriverStatus: [][2]string{{"Layers", "erofs"}},
		Plugins:     system.PluginsInfo{Volume: []string{"local"}, Network: []string{networkDriver(p)}, Log: []string{logDriver}},
		MemoryLimit: true, SwapLimit: true, CPUCfsPeriod: true, CPUCfsQuota: true, CPUShares: true, CPUSet: true, PidsLimit: true,
		IPv4Forwarding: true, NFd: len(fds), NGoroutines: runtime.NumGoroutine(), SystemTime: time.Now().UTC().Format(time.RFC3339Nano),
		LoggingDriver: logDriver, CgroupDriver: "cgroupfs", CgroupVersion: "2",
		KernelVersion: kernel(), OperatingSystem: "kcradle pod " + own, OSType: runtime.GOOS, Architecture: machine(),
		NCPU: runtime.NumCPU(), MemTotal: memory(), DockerRootDir: "/", Name: hostname(p), Labels: []string{},
		RegistryConfig: &registry.ServiceConfig{
			InsecureRegistryCIDRs: nil, IndexConfigs: map[string]*registry.IndexInfo{}, Mirrors: []string{},
		},
		IndexServerAddress: "https://index.docker.io/v1/",
		ServerVersion:      EngineVersion,
		Runtimes:           map[string]system.RuntimeWithStatus{runtimeName: {Runtime: system.Runtime{Path: "/init"}}},
		DefaultRuntime:     runtimeName, Swarm: swarm.Info{LocalNodeState: swarm.LocalNodeStateInactive},
		InitBinary: "/init", InitCommit: system.Commit{ID: commit}, SecurityOptions: []string{"name=cgroupns"},
		CDISpecDirs: []string{}, Warnings: []string{},
	}
	for _, c := range p.Containers() {
		out.Containers++
		switch c.State().Status {
		case spec.StatusRunning, spec.StatusRestarting:
			out.ContainersRunning++
		case spec.StatusPaused:
			out.ContainersPaused++
		default:
			out.ContainersStopped++
		}
	}
	legacy := struct {
		system.Info
		BridgeNfIptables  *bool `json:",omitempty"`
		BridgeNfIP6tables *bool `json:"BridgeNfIp6tables,omitempty"`
	}{Info: out}
	if r.Version < 50 {
		legacy.BridgeNfIptables, legacy.BridgeNfIP6tables = new(bool), new(bool)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, legacy)
}

func machine() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return runtime.GOARCH
	}
	return unix.ByteSliceToString(u.Machine[:])
}

// podUUID is an identity in the form docker gives its daemons'.
func podUUID(p *pod.Pod) string {
	id := derivedID("pod", p.Spec().Containers[0].ID)
	return fmt.Sprintf("%s-%s-%s-%s-%s", id[:8], id[8:12], id[12:16], id[16:20], id[20:32])
}

func (s *server) diskUsage(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	types := r.Form["type"]
	wanted := func(t string) bool { return len(types) == 0 || slices.Contains(types, t) }
	for _, t := range types {
		if t != "container" && t != "image" && t != "volume" && t != "build-cache" {
			return dockerapi.BadRequest("unknown object type: %s", t)
		}
	}
	out := struct {
		LayersSize  int64
		Images      []imageSummary
		Containers  []summary
		Volumes     []*volume.Volume
		BuildCache  []struct{}
		BuilderSize *int64 `json:",omitempty"`
	}{}
	if wanted("image") {
		out.Images = []imageSummary{}
		for _, l := range p.Placement().Layers {
			out.LayersSize += l.Length
		}
		for _, i := range podImages(p) {
			out.Images = append(out.Images, imageSummary{Summary: i.summary()})
		}
	}
	if wanted("container") {
		out.Containers = []summary{}
		now := time.Now()
		for _, v := range newestFirst(p) {
			one := summarize(p, v, r.Version, now)
			if rw, fs, err := v.c.Size(r.Context()); err == nil {
				one.SizeRw, one.SizeFs = &rw, &fs
			}
			out.Containers = append(out.Containers, one)
		}
	}
	if wanted("volume") {
		out.Volumes = podVolumes(p, true)
	}
	if wanted("build-cache") {
		out.BuildCache = []struct{}{}
	}
	if r.Version < 42 {
		out.BuilderSize = new(int64)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// --- events ---

// message is events.Message with the members that versions up to 1.51 repeat for containers.
type message struct {
	Status string `json:"status,omitempty"`
	ID     string `json:"id,omitempty"`
	From   string `json:"from,omitempty"`
	events.Message
}

func newMessage(p *pod.Pod, e pod.Event) message {
	m := message{Message: events.Message{
		Type: events.ContainerEventType, Action: events.Action(e.Action), Scope: "local",
		Actor: events.Actor{ID: e.Container, Attributes: map[string]string{}},
		Time:  e.Time.Unix(), TimeNano: e.Time.UnixNano(),
	}}
	if c, err := p.Find(e.Container); err == nil {
		for k, v := range c.Spec().Labels {
			m.Actor.Attributes[k] = v
		}
		m.From = shownRef(c.Spec().Image.Ref)
		m.Actor.Attributes["image"], m.Actor.Attributes["name"] = m.From, c.Name()
	}
	for k, v := range e.Attributes {
		m.Actor.Attributes[k] = v
	}
	m.Status, m.ID = e.Action, e.Container
	return m
}

// eventFilter decides which events a client sees.
type eventFilter struct {
	pod *pod.Pod
	f   dockerapi.Filters
}

func (e eventFilter) includes(m message) bool {
	action, _, _ := strings.Cut(string(m.Action), ":")
	event := e.f.Exact("event", string(m.Action)) || e.f.Exact("event", action)
	name := m.Actor.Attributes["name"]
	return event &&
		e.f.Exact("type", string(m.Type)) &&
		e.f.Exact("scope", m.Scope) &&
		(e.f.Prefix("container", m.Actor.ID) || e.f.Prefix("container", name)) &&
		e.image(m) &&
		e.f.Labels("label", m.Actor.Attributes) &&
		// Only containers have events here; who asks for other things' sees none.
		!slices.ContainsFunc([]string{"config", "daemon", "network", "node", "plugin", "secret", "service", "volume"},
			func(k string) bool { return len(e.f[k]) > 0 })
}

func (e eventFilter) image(m message) bool {
	if len(e.f["image"]) == 0 {
		return true
	}
	c, err := e.pod.Find(m.Actor.ID)
	return err == nil && slices.ContainsFunc(e.f["image"], func(ref string) bool { return imageIs(c.Spec().Image, ref) })
}

func (s *server) events(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	return dockerapi.Events[pod.Event]{
		Listen: p.Events,
		Time:   func(e pod.Event) time.Time { return e.Time },
		Show: func(e pod.Event, f dockerapi.Filters) any {
			if m := newMessage(p, e); (eventFilter{p, f}).includes(m) {
				return m
			}
			return nil
		},
	}.Serve(w, r)
}
