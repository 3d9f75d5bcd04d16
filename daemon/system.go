package daemon

import (
	"crypto/sha256"
	"encoding/hex"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/build"
	"github.com/moby/moby/api/types/events"
	"github.com/moby/moby/api/types/registry"
	"github.com/moby/moby/api/types/system"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/spec"
)

func (d *Daemon) ping(w http.ResponseWriter, r *dockerapi.Request) error {
	h := w.Header()
	h.Set("Cache-Control", "no-cache, no-store, must-revalidate")
	h.Set("Pragma", "no-cache")
	h.Set("Builder-Version", "1")
	h.Set("Swarm", "inactive")
	h.Set("Content-Type", "text/plain; charset=utf-8")
	if r.Method == http.MethodHead {
		h.Set("Content-Length", "0")
		return nil
	}
	_, err := w.Write([]byte("OK"))
	return err
}

func (d *Daemon) version(w http.ResponseWriter, _ *dockerapi.Request) error {
	var u unix.Utsname
	_ = unix.Uname(&u) // it has no way to fail
	kernel := unix.ByteSliceToString(u.Release[:])
	return dockerapi.WriteJSON(w, http.StatusOK, system.VersionResponse{
		Platform:   system.PlatformInfo{Name: "kcradle"},
		Version:    EngineVersion,
		APIVersion: dockerapi.MaxVersion.String(), MinAPIVersion: dockerapi.MinVersion.String(),
		Os: runtime.GOOS, Arch: runtime.GOARCH, KernelVersion: kernel, GoVersion: runtime.Version(),
		Components: []system.ComponentVersion{{Name: "Engine", Version: EngineVersion, Details: map[string]string{
			"ApiVersion": dockerapi.MaxVersion.String(), "MinAPIVersion": dockerapi.MinVersion.String(), "Os": runtime.GOOS,
			"Arch": runtime.GOARCH, "KernelVersion": kernel, "GoVersion": runtime.Version(), "Experimental": "false",
		}}, {Name: "kcradle", Version: d.cfg.Version}},
	})
}

func (d *Daemon) info(w http.ResponseWriter, r *dockerapi.Request) error {
	out := system.Info{
		ID: stableID("host", d.cfg.Root)[:36], Driver: storageDriver, DockerRootDir: d.cfg.Root, NCPU: runtime.NumCPU(),
		OSType: runtime.GOOS, Architecture: "x86_64", ServerVersion: EngineVersion, LoggingDriver: logDriver,
		CgroupDriver: "cgroupfs", CgroupVersion: "2", DefaultRuntime: runtimeName, NGoroutines: runtime.NumGoroutine(),
		Runtimes:    map[string]system.RuntimeWithStatus{runtimeName: {Runtime: system.Runtime{Path: runtimeName}}},
		MemoryLimit: true, SwapLimit: true, CPUCfsPeriod: true, CPUCfsQuota: true, CPUShares: true, CPUSet: true, PidsLimit: true,
		IPv4Forwarding: true, OomKillDisable: false, SystemTime: time.Now().Format(time.RFC3339Nano), Isolation: "",
		IndexServerAddress: "https://index.docker.io/v1/", SecurityOptions: []string{"name=machine", "name=cgroupns"},
		Plugins: system.PluginsInfo{Volume: []string{localDriver}, Network: []string{"bridge", "null"}, Log: []string{logDriver}},
		Labels:  []string{}, DriverStatus: [][2]string{{"Backing Filesystem", "erofs, ext4"}},
	}
	out.RegistryConfig = d.registryConfig()
	out.Debug = d.log.Enabled(r.Context(), slog.LevelDebug)
	if fds, err := os.ReadDir("/proc/self/fd"); err == nil {
		out.NFd = len(fds)
	}
	out.Name, _ = os.Hostname()
	var u unix.Utsname
	_ = unix.Uname(&u)
	out.KernelVersion = unix.ByteSliceToString(u.Release[:])
	out.OperatingSystem = osName()
	var si unix.Sysinfo_t
	if unix.Sysinfo(&si) == nil {
		out.MemTotal = int64(si.Totalram) * int64(si.Unit)
	}
	for _, c := range d.all() {
		f := c.look()
		out.Containers++
		switch {
		case f.state.Status == spec.StatusPaused:
			out.ContainersPaused++
		case f.running():
			out.ContainersRunning++
		default:
			out.ContainersStopped++
		}
	}
	images, err := d.cfg.Store.List(r.Context())
	if err != nil {
		return err
	}
	ids := map[string]bool{}
	for _, img := range images {
		ids[string(img.ConfigDigest)] = true
	}
	out.Images = len(ids)
	if r.Version >= 50 {
		return dockerapi.WriteJSON(w, http.StatusOK, out)
	}
	return dockerapi.WriteJSON(w, http.StatusOK, struct {
		system.Info
		BridgeNfIptables, BridgeNfIp6tables bool //nolint:revive // docker's spelling
	}{Info: out})
}

// registryConfig says which registries may be spoken to without TLS.
func (d *Daemon) registryConfig() *registry.ServiceConfig {
	c := &registry.ServiceConfig{
		InsecureRegistryCIDRs: d.insecureNetworks(),
		IndexConfigs:          map[string]*registry.IndexInfo{"docker.io": {Name: "docker.io", Mirrors: []string{}, Secure: true, Official: true}},
		Mirrors:               []string{},
	}
	for _, host := range d.cfg.PlainHTTP {
		if _, err := netip.ParsePrefix(host); err == nil {
			continue
		}
		c.IndexConfigs[host] = &registry.IndexInfo{Name: host, Mirrors: []string{}}
	}
	return c
}

// osName is the host's own name of itself.
func osName() string {
	b, err := os.ReadFile("/etc/os-release")
	if err == nil {
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
				return strings.Trim(strings.TrimSpace(v), `"`)
			}
		}
	}
	return "Linux"
}

// stableID is an ID that the same words always have: 64 hex digits.
func stableID(words ...string) string {
	sum := sha256.Sum256([]byte(strings.Join(words, "\x00")))
	return hex.EncodeToString(sum[:])
}

func daemonEvent(kind events.Type, action events.Action, id string, attributes map[string]string) events.Message {
	now := time.Now()
	return events.Message{Type: kind, Action: action, Actor: events.Actor{ID: id, Attributes: attributes}, Scope: "local",
		Time: now.Unix(), TimeNano: now.UnixNano()}
}

// absent are endpoints of what does not exist here, with docker's own answers.
func absent() []dockerapi.Route {
	no := func(status int, text string) dockerapi.Handler {
		return func(http.ResponseWriter, *dockerapi.Request) error { return dockerapi.Errorf(status, "%s", text) }
	}
	swarm := no(http.StatusServiceUnavailable, "This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm join\" to connect this node to swarm and try again.")
	var out []dockerapi.Route
	for _, p := range []string{"/swarm", "/services", "/tasks", "/secrets", "/configs", "/nodes"} {
		out = append(out, dockerapi.Route{Method: "GET", Path: p, Handle: swarm})
	}
	for _, p := range []string{"/swarm/init", "/swarm/join"} {
		out = append(out, dockerapi.Route{Method: "POST", Path: p, Handle: no(http.StatusNotImplemented, "kcradle cannot be part of a swarm: it serves one host")})
	}
	return append(out,
		dockerapi.Route{Method: "POST", Path: "/swarm/leave", Handle: no(http.StatusServiceUnavailable, "This node is not part of a swarm")},
		dockerapi.Route{Method: "POST", Path: "/build/prune", Handle: func(w http.ResponseWriter, _ *dockerapi.Request) error {
			return dockerapi.WriteJSON(w, http.StatusOK, build.CachePruneReport{}) // nothing is built here, so nothing is cached
		}},
		dockerapi.Route{Method: "POST", Path: "/build", Handle: no(http.StatusNotImplemented,
			"kcradle builds no images: build with buildx and a builder elsewhere, then push or load the result")},
		dockerapi.Route{Method: "GET", Path: "/plugins", Handle: func(w http.ResponseWriter, _ *dockerapi.Request) error {
			return dockerapi.WriteJSON(w, http.StatusOK, []struct{}{})
		}},
	)
}

// portName is a container's port as docker writes it: "80/tcp".
func portName(p spec.Port) string { return portString(p.ContainerPort) + "/" + p.Proto }

func portString(n uint16) string { return strconv.Itoa(int(n)) }
