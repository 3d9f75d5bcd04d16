package vdocker_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/test/tour"
)

// docker runs the real client and returns what it says.
func docker(t *testing.T, h tour.Host, env []string, args ...string) string {
	t.Helper()
	need.Command(t, "docker", "hack/deps test")
	cmd := h.Docker(t.Context(), args...)
	cmd.Env = append(cmd.Env, env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("docker %s: %v: %s", strings.Join(args, " "), err, stderr.String())
	}
	return string(out)
}

// A pod with a network, published ports, volumes and a health check shows them in every version of the API.
func TestInspect(t *testing.T) {
	place := spec.Placement{Network: spec.Network{
		Mode: "user",
		Interfaces: []spec.Interface{{
			Name: "eth0", MAC: "02:00:00:00:00:01", MTU: 1500,
			Addresses: []string{"10.0.2.15/24", "fd00::15/64"}, Gateways: []string{"10.0.2.2", "fd00::2"},
		}},
		Published: []spec.Port{
			{Proto: "tcp", ContainerPort: 80, HostIP: "127.0.0.1", HostPort: 8080},
			{Proto: "udp", ContainerPort: 53, HostPort: 5353},
		},
	}}
	h, g := start(t, place,
		spec.Container{
			Name: "web", Image: spec.Image{Ref: "registry.example/team/web:1.2"}, Cmd: []string{"sleep", "1000000"},
			ExposedPorts: []string{"443/tcp"},
			Healthcheck:  &spec.Healthcheck{Test: []string{"CMD-SHELL", "echo fine"}, Interval: 50 * time.Millisecond},
			Mounts:       []spec.Mount{{Type: spec.MountTmpfs, Target: "/run", Options: []string{"size=1m", "mode=755"}}},
		},
		spec.Container{Name: "dns", Image: spec.Image{Ref: "dns"}, Cmd: []string{"sleep", "1000000"}, ExposedPorts: []string{"53/udp"}},
	)
	g.State("web", func(s spec.State) bool { return s.Health == "healthy" })
	g.Status("dns", spec.StatusRunning)
	for _, v := range []int{41, 43, 47, 50} { // where members came and went
		env := []string{fmt.Sprintf("DOCKER_API_VERSION=1.%d", v)}
		t.Run(env[0], func(t *testing.T) {
			for _, tt := range []struct {
				args []string
				want string
			}{
				{[]string{"version", "--format", "{{.Server.Version}} {{.Server.APIVersion}} {{.Server.MinAPIVersion}}"}, "28.2.2 1.50 1.41\n"},
				{[]string{"info", "--format", "{{.Containers}} {{.ContainersRunning}} {{.Images}} {{.Name}} {{.CgroupVersion}} {{.ServerVersion}} {{.Swarm.LocalNodeState}}"}, "2 2 2 pod 2 28.2.2 inactive\n"},
				{[]string{"ps", "--format", "{{.Names}} {{.Ports}} {{.Networks}}", "-f", "name=web"}, "web 443/tcp, 127.0.0.1:8080->80/tcp user\n"},
				{[]string{"ps", "--format", "{{.Names}} {{.Ports}}", "-f", "name=dns"}, "dns 0.0.0.0:5353->53/udp\n"},
				{[]string{"ps", "--format", "{{.Names}}", "-f", "publish=80"}, "web\n"},
				{[]string{"ps", "--format", "{{.Names}}", "-f", "expose=443"}, "web\n"},
				{[]string{"ps", "--format", "{{.Names}}", "-f", "network=user", "-f", "health=healthy"}, "web\n"},
				{[]string{"port", "web"}, "80/tcp -> 127.0.0.1:8080\n"},
				{[]string{"inspect", "-f", "{{.NetworkSettings.IPAddress}} {{.NetworkSettings.Gateway}} {{.NetworkSettings.MacAddress}} {{.NetworkSettings.GlobalIPv6Address}}", "web"}, "10.0.2.15 10.0.2.2 02:00:00:00:00:01 fd00::15\n"},
				{[]string{"inspect", "-f", "{{with .NetworkSettings.Networks.user}}{{.IPAddress}}/{{.IPPrefixLen}} {{.IPv6Gateway}}{{end}}", "web"}, "10.0.2.15/24 fd00::2\n"},
				{[]string{"inspect", "-f", "{{json .NetworkSettings.Ports}} {{json .HostConfig.PortBindings}}", "web"}, `{"443/tcp":null,"80/tcp":[{"HostIp":"127.0.0.1","HostPort":"8080"}]} {}` + "\n"},
				{[]string{"inspect", "-f", "{{.State.Health.Status}} {{(index .State.Health.Log 0).Output}}", "web"}, "healthy fine\n\n"},
				{[]string{"inspect", "-f", "{{json .HostConfig.Tmpfs}} {{json .Mounts}}", "web"}, `{"/run":"size=1m,mode=755"} []` + "\n"},
				{[]string{"images", "--format", "{{.Repository}}:{{.Tag}}"}, "registry.example/team/web:1.2\ndns:latest\n"},
				{[]string{"image", "inspect", "-f", "{{json .RepoTags}}", "docker.io/library/dns"}, `["dns:latest"]` + "\n"},
				{[]string{"network", "ls", "--format", "{{.Name}} {{.Driver}} {{.Scope}}"}, "user user local\n"},
				{[]string{"network", "inspect", "-f", "{{range .IPAM.Config}}{{.Subnet}} {{.Gateway}} {{end}}{{len .Containers}}", "user"}, "10.0.2.0/24 10.0.2.2 fd00::/64 fd00::2 2\n"},
				{[]string{"volume", "ls", "-q"}, ""},
				{[]string{"system", "df", "--format", "{{.Type}} {{.TotalCount}} {{.Active}}"}, "Images 2 2\nContainers 2 2\nLocal Volumes 0 0\nBuild Cache 0 0\n"},
			} {
				if got := docker(t, h, env, tt.args...); got != tt.want {
					t.Errorf("docker %s: got %q, want %q", strings.Join(tt.args, " "), got, tt.want)
				}
			}
			if got := docker(t, h, env, "ps", "--format", "{{.Status}}", "-f", "name=web"); !strings.HasPrefix(got, "Up ") || !strings.HasSuffix(got, " (healthy)\n") {
				t.Errorf("status: got %q", got)
			}
			// CPU and memory columns need two samples, and the limit of a machine without one.
			got := strings.Fields(docker(t, h, env, "stats", "--no-stream", "--format", "{{.Name}} {{.CPUPerc}} {{.PIDs}} {{.MemUsage}}", "web"))
			if len(got) < 3 || got[0] != "web" || !strings.HasSuffix(got[1], "%") {
				t.Errorf("stats: got %q", got)
			}
		})
	}
	t.Run("events of health", func(t *testing.T) {
		got := docker(t, h, nil, "events", "--since", "1h", "--until", "0s", "-f", "event=health_status", "--format", "{{.Action}} {{.Actor.Attributes.name}}")
		if got != "health_status: healthy web\n" {
			t.Errorf("got %q", got)
		}
	})
	t.Run("newest by default", func(t *testing.T) {
		var c struct {
			NetworkSettings struct{ Networks map[string]map[string]any }
		}
		if err := json.Unmarshal(ask(t, h, 200, "GET", "/containers/web/json", ""), &c); err != nil {
			t.Fatal(err)
		}
		if _, ok := c.NetworkSettings.Networks["user"]["GwPriority"]; !ok {
			t.Errorf("GwPriority of 1.48 is missing: %v", c.NetworkSettings.Networks)
		}
	})
}

// Archives go where they may, with the owners that were asked for, and nowhere else.
func TestArchive(t *testing.T) {
	h, g := start(t, spec.Placement{},
		spec.Container{Name: "user", Cmd: []string{"sleep", "1000000"}, User: "user",
			Mounts: []spec.Mount{{Type: spec.MountTmpfs, Target: "/scratch"}}},
		spec.Container{Name: "sealed", Cmd: []string{"sleep", "1000000"}, ReadOnly: true},
	)
	g.Status("user", spec.StatusRunning)
	g.Status("sealed", spec.StatusRunning)
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("of the machine"), 0o644); err != nil {
		t.Fatal(err)
	}
	archive := func(headers ...*tar.Header) string {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range headers {
			body := "body of " + h.Name
			if h.Typeflag == tar.TypeReg {
				h.Size = int64(len(body))
			}
			if h.Mode == 0 {
				h.Mode = 0o755
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
			if h.Typeflag == tar.TypeReg {
				_, _ = io.WriteString(w, body)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.String()
	}
	put := func(container, query, body string) (int, string) {
		req, err := http.NewRequestWithContext(t.Context(), "PUT", "http://docker/containers/"+container+"/archive?"+query, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		res, err := h.HTTP().Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, strings.TrimSpace(string(b))
	}
	file := &tar.Header{Name: "f", Typeflag: tar.TypeReg, Uid: 77, Gid: 88}
	dir := &tar.Header{Name: "d/", Typeflag: tar.TypeDir, Uid: 77, Gid: 88}
	for _, tt := range []struct {
		name, container, query, body string
		status                       int
		message                      string
	}{
		{"owners of the archive", "user", "path=/tmp", archive(dir, file), 200, ""},
		{"owner of the container", "user", "path=/home&copyUIDGID=1", archive(dir, file), 200, ""},
		{"compressed", "user", "path=/root", gzipped(t, archive(file)), 200, ""},
		{"directory over a file", "user", "path=/tmp&noOverwriteDirNonDir=1", archive(&tar.Header{Name: "f/", Typeflag: tar.TypeDir}), 500, "cannot overwrite non-directory"},
		{"file over a directory", "user", "path=/tmp&noOverwriteDirNonDir=1", archive(&tar.Header{Name: "d", Typeflag: tar.TypeReg}), 500, "cannot overwrite directory"},
		{"not a directory", "user", "path=/etc/passwd", archive(file), 400, "extraction point is not a directory"},
		{"not there", "user", "path=/nonesuch", archive(file), 404, "Could not find the file /nonesuch in container user"},
		{"no path", "user", "", archive(file), 400, "bad parameter: pathcannot be empty"},
		{"read-only root", "sealed", "path=/tmp", archive(file), 403, "container rootfs is marked read-only"},
		{"outside", "user", "path=/tmp", archive(&tar.Header{Name: "../../../escaped", Typeflag: tar.TypeReg}), 500, ""},
		{"through a link", "user", "path=/tmp", archive(&tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: filepath.Dir(secret)}, &tar.Header{Name: "l/x", Typeflag: tar.TypeReg}), 200, ""},
		{"not an archive", "user", "path=/tmp", strings.Repeat("nonsense", 200), 500, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status, got := put(tt.container, tt.query, tt.body)
			if status != tt.status || !strings.Contains(got, tt.message) {
				t.Errorf("got %d %s, want %d with %q", status, got, tt.status, tt.message)
			}
		})
	}
	got := docker(t, h, nil, "exec", "-u", "0", "user", "sh", "-c", "cd / && stat -c '%n %u:%g' tmp/d tmp/f home/d home/f root/f; cat root/f")
	want := "tmp/d 77:88\ntmp/f 77:88\nhome/d 1000:1000\nhome/f 1000:1000\nroot/f 77:88\nbody of f"
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("files in the container (-want +got):\n%s", d)
	}
	t.Run("links stay inside", func(t *testing.T) {
		docker(t, h, nil, "exec", "-u", "0", "user", "sh", "-c", "ln -s "+secret+" /tmp/out; ln -s /../../../.."+filepath.Dir(secret)+" /tmp/outdir; ln -s loop /tmp/loop; mkdir -p /deep"+filepath.Dir(secret))
		for _, path := range []string{"/tmp/out/", "/tmp/outdir/secret", "/tmp/loop/x", "/tmp/../../../../.." + secret} {
			status := map[string]int{"/tmp/loop/x": 500}[path]
			if status == 0 {
				status = 404
			}
			ask(t, h, status, "GET", "/containers/user/archive?path="+url.QueryEscape(path), "")
		}
		if b, err := os.ReadFile(secret); err != nil || string(b) != "of the machine" {
			t.Errorf("the machine's file: %q %v", b, err)
		}
		if _, err := os.Stat(filepath.Join(filepath.Dir(secret), "x")); err == nil {
			t.Error("a file was written outside the container")
		}
	})
}

func gzipped(t *testing.T, s string) string {
	cmd := exec.Command("gzip")
	cmd.Stdin = strings.NewReader(s)
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}
