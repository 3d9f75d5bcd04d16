package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
)

// origins are the real servers that images are taken from.
type origins struct {
	registry   *servers.Registry
	dockerd    *servers.Dockerd
	containerd *servers.Containerd
}

func startOrigins(t *testing.T) *origins {
	t.Helper()
	for _, c := range []string{"dockerd", "containerd", "ctr", "docker-registry"} {
		need.Command(t, c, "hack/deps test")
	}
	var o origins
	var err error
	if o.registry, err = servers.StartRegistry(t.Context(), tempDir(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.registry.Stop)
	if o.dockerd, err = servers.StartDockerd(t.Context(), tempDir(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.dockerd.Stop)
	if o.containerd, err = servers.StartContainerd(t.Context(), tempDir(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(o.containerd.Stop)
	return &o
}

// offer puts the image where kind says and returns how kcradle is told of it.
func (o *origins) offer(t *testing.T, kind string, b *images.Built) string {
	t.Helper()
	switch kind {
	case "registry":
		img, err := b.Image()
		if err != nil {
			t.Fatal(err)
		}
		tag, err := name.NewTag(o.registry.Addr+"/"+b.Ref, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(tag, img, remote.WithContext(t.Context())); err != nil {
			t.Fatal(err)
		}
		return "docker://" + tag.String()
	case "dockerd":
		succeed(t, o.dockerd.Docker(t.Context(), "load", "--quiet", "--input", b.Archive))
		return "docker-daemon:" + b.Ref
	case "containerd":
		succeed(t, o.containerd.Ctr(t.Context(), "images", "import", "--no-unpack", b.Archive))
		return "containerd:docker.io/" + b.Ref
	case "oci":
		return "oci:" + b.Layout
	case "archive":
		return "docker-archive:" + b.Archive
	}
	t.Fatalf("no origin %q", kind)
	return ""
}

// environment tells kcradle where the servers are.
func (o *origins) environment(t *testing.T) {
	t.Setenv("DOCKER_HOST", o.dockerd.Host)
	t.Setenv("CONTAINERD_ADDRESS", o.containerd.Socket)
	t.Setenv("KCRADLE_PLAIN_HTTP", o.registry.Addr)
}

// TestOrigins takes one image from every place there is and gets the same image each time.
func TestOrigins(t *testing.T) {
	kcradle(t)
	o := startOrigins(t)
	o.environment(t)
	b := image(t, "nginx")
	var ids []string
	for _, kind := range []string{"oci", "archive", "registry", "dockerd", "containerd"} {
		source := o.offer(t, kind, b)
		succeed(t, command(t, "pull", source))
		p := summon(t, source)
		pod, err := os.ReadFile(filepath.Join(p.dir, "pod.json"))
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, kind+" "+layersOf(t, pod))
	}
	for i := range ids {
		_, got, _ := strings.Cut(ids[i], " ")
		_, want, _ := strings.Cut(ids[0], " ")
		if got != want {
			t.Errorf("layers: got %s, want those of %s", ids[i], ids[0])
		}
	}
}

// TestServices runs what people run, each image from another place, and does with each what people do.
func TestServices(t *testing.T) {
	kcradle(t)
	o := startOrigins(t)
	o.environment(t)

	for _, test := range []struct {
		image, origin string
		flags         []string
		port          string
		ready         string // in the log
		talk          func(t *testing.T, addr string)
		exec          []string
		want          string // in exec's output
		logged        string // by then
	}{
		{
			image: "nginx", origin: "registry", port: "80/tcp",
			// nginx says nothing when it is ready; its log has the first request.
			talk: func(t *testing.T, addr string) {
				if got := get(t, "http://"+addr+"/"); !strings.Contains(got, "Served from a cradle") {
					t.Errorf("GET /: got %q", got)
				}
				if got := get(t, "http://"+addr+"/health"); got != "ok\n" {
					t.Errorf("GET /health: got %q, want ok", got)
				}
			},
			exec: []string{"nginx", "-v"}, want: "nginx version", logged: `"GET /health HTTP/1.1" 200`,
		},
		{
			image: "redis", origin: "dockerd", port: "6379/tcp", ready: "Ready to accept connections",
			talk: func(t *testing.T, addr string) {
				got := dialogue(t, addr, "PING\r\nSET cradle rocks\r\nGET cradle\r\nQUIT\r\n")
				if want := "+PONG\r\n+OK\r\n$5\r\nrocks\r\n+OK\r\n"; got != want {
					t.Errorf("redis: got %q, want %q", got, want)
				}
			},
			exec: []string{"redis-cli", "get", "cradle"}, want: "rocks", logged: "Ready to accept connections",
		},
		{
			image: "web", origin: "containerd", port: "8080/tcp", ready: "listening on 8080", flags: []string{"-e", "GREETING=good day"},
			talk: func(t *testing.T, addr string) {
				if got := get(t, "http://"+addr+"/"); !strings.Contains(got, `"greeting": "good day"`) {
					t.Errorf("GET /: got %q, want our greeting", got)
				}
				note := strings.Repeat("n", 100<<10)
				resp, err := client.Post("http://"+addr+"/notes", "text/plain", strings.NewReader(note))
				if err != nil {
					t.Fatal(err)
				}
				resp.Body.Close()
				if got, want := get(t, "http://"+addr+"/notes"), fmt.Sprintf(`{"notes": [%q]}`+"\n", note); got != want {
					t.Errorf("GET /notes: got %d bytes, want the note of %d", len(got), len(note))
				}
			},
			exec: []string{"python3", "-c", "import os; print('uid', os.getuid() > 0, os.getcwd())"}, want: "uid True /srv/app",
			logged: `"POST /notes HTTP/1.1" 201`,
		},
	} {
		t.Run(test.image, func(t *testing.T) {
			source := o.offer(t, test.origin, image(t, test.image))
			port, _, _ := strings.Cut(test.port, "/")
			p := summon(t, source, append([]string{"-p", "127.0.0.1::" + port}, test.flags...)...)
			p.start()
			if test.ready != "" {
				p.waitLog(test.ready)
			}
			addr := p.address(test.port)
			if test.ready == "" {
				waitHTTP(t, "http://"+addr+"/")
			}
			test.talk(t, addr)

			if out, err := p.docker(append([]string{"exec", p.name}, test.exec...)...).CombinedOutput(); err != nil || !strings.Contains(string(out), test.want) {
				t.Errorf("docker exec %v: got %q, %v; want %q in it", test.exec, out, err, test.want)
			}
			p.waitLog(test.logged)
			copyRoundTrip(t, p)

			if out := succeed(t, p.docker("ps", "--format", "{{.Names}} {{.State}}")); out != p.name+" running\n" {
				t.Errorf("docker ps: got %q, want it running", out)
			}
			succeed(t, p.docker("stop", p.name))
			if out := succeed(t, p.docker("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", p.name)); out != "exited 0\n" {
				t.Errorf("docker inspect after stop: got %q, want exited 0", out)
			}
			p.stop()
		})
	}
}

var client = &http.Client{Timeout: time.Minute}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("GET %s: %v", url, err)
	}
	return string(b)
}

// waitHTTP waits for a server that has no other way to say that it is there than to answer.
func waitHTTP(t *testing.T, url string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startTimeout)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := client.Do(req)
		if err == nil {
			resp.Body.Close()
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("GET %s: still no answer: %v", url, err)
		}
	}
}

// dialogue sends all at once and returns what comes until the other side closes.
func dialogue(t *testing.T, addr, send string) string {
	t.Helper()
	conn, err := net.DialTimeout("tcp", addr, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, send); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Fatalf("read from %s: %v after %q", addr, err, b)
	}
	return string(b)
}

// copyRoundTrip copies a file into the container and back, and a directory out of it.
func copyRoundTrip(t *testing.T, p *pod) {
	t.Helper()
	dir := tempDir(t)
	want := make([]byte, 3<<20+17)
	_, _ = rand.Read(want)
	if err := os.WriteFile(filepath.Join(dir, "in"), want, 0o640); err != nil {
		t.Fatal(err)
	}
	succeed(t, p.docker("cp", filepath.Join(dir, "in"), p.name+":/tmp/copied"))
	succeed(t, p.docker("cp", p.name+":/tmp/copied", filepath.Join(dir, "out")))
	got, err := os.ReadFile(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("docker cp in and out: got %d bytes that differ from the %d sent", len(got), len(want))
	}
	info, err := os.Stat(filepath.Join(dir, "out"))
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o640 {
		t.Errorf("docker cp in and out: got mode %v, want 0640", info.Mode())
	}

	succeed(t, p.docker("cp", p.name+":/etc/alternatives", filepath.Join(dir, "alternatives")))
	listed, err := exec.Command("find", filepath.Join(dir, "alternatives"), "-type", "l", "-printf", "%P -> %l\n").Output()
	if err != nil {
		t.Fatal(err)
	}
	inside := succeed(t, p.docker("exec", p.name, "find", "/etc/alternatives", "-type", "l", "-printf", "%P -> %l\n"))
	if d := cmp.Diff(sortLines(inside), sortLines(string(listed))); d != "" {
		t.Errorf("docker cp of a directory (-inside +copied):\n%s", d)
	}
}
