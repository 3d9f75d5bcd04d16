package tour

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/servers"
)

// The tour itself must be right: two dockerds are the same to it.
func TestTwoDaemons(t *testing.T) {
	need.Root(t)
	need.Command(t, "docker", "hack/deps test")
	need.Command(t, "dockerd", "hack/deps test")
	root := busyboxRoot(t)
	var hosts [2]Host
	for i, name := range []string{"one", "other"} {
		dir, err := servers.TempDir()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.RemoveAll(dir) })
		d, err := servers.StartDockerd(t.Context(), dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(d.Stop)
		hosts[i] = Host{Name: name, Address: d.Host, Limits: true}
		if err := Import(t.Context(), hosts[i], root); err != nil {
			t.Fatal(err)
		}
		if err := Create(t.Context(), hosts[i]); err != nil {
			t.Fatal(err)
		}
	}
	Run(t, hosts[0], hosts[1])
}

func busyboxRoot(t *testing.T) string {
	busybox := need.Command(t, "busybox", "hack/deps test")
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		t.Fatal(err)
	}
	root := t.TempDir()
	for _, d := range []string{"bin", "etc", "tmp", "root"} {
		if err := os.Mkdir(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(busybox)
	if err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string]string{
		"bin/busybox": string(b),
		"etc/passwd":  "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000:User:/tmp:/bin/sh\n",
		"etc/group":   "root:x:0:\nuser:x:1000:\n",
	} {
		mode := os.FileMode(0o644)
		if strings.HasPrefix(name, "bin/") {
			mode = 0o755
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(root, "tmp"), 0o1777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(string(list)) {
		if name != "busybox" {
			if err := os.Symlink("busybox", filepath.Join(root, "bin", name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	return root
}
