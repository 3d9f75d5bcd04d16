package servers

import (
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
)

func TestServers(t *testing.T) {
	need.Root(t)
	need.Command(t, "dockerd", "hack/deps test")
	need.Command(t, "docker-registry", "hack/deps test")
	need.Command(t, "containerd", "hack/deps test")

	t.Run("dockerd", func(t *testing.T) {
		d, err := StartDockerd(t.Context(), shortDir(t))
		if err != nil {
			t.Fatal(err)
		}
		defer d.Stop()
		out, err := d.Docker(t.Context(), "version", "--format", "{{.Server.Os}}").CombinedOutput()
		if err != nil || strings.TrimSpace(string(out)) != "linux" {
			t.Errorf("docker version: got %q, %v", out, err)
		}
		d.Stop()
		d.Stop()
	})
	t.Run("containerd", func(t *testing.T) {
		c, err := StartContainerd(t.Context(), shortDir(t))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Stop()
		if out, err := c.Ctr(t.Context(), "version").CombinedOutput(); err != nil {
			t.Errorf("ctr version: %v\n%s", err, out)
		}
	})
	t.Run("registry", func(t *testing.T) {
		r, err := StartRegistry(t.Context(), shortDir(t))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Stop()
		resp, err := http.Get("http://" + r.Addr + "/v2/")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusOK {
			t.Errorf("GET /v2/: got %s, want 200", resp.Status)
		}
	})
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := TempDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}
