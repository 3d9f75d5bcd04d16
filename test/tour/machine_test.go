package tour

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/servers"
)

// The tour through a pod in a real machine, by the socket that kcradle run serves.
func TestMachine(t *testing.T) {
	need.Long(t)
	need.Root(t)
	need.Command(t, "docker", "hack/deps test")
	need.Command(t, "dockerd", "hack/deps test")
	need.Command(t, "qemu-system-x86_64", "hack/deps test")
	path := os.Getenv("KCRADLE")
	if path == "" {
		path = "../../bin/kcradle"
	}
	kcradle, err := filepath.Abs(need.File(t, path, "make build"))
	if err != nil {
		t.Fatal(err)
	}
	dir, err := servers.TempDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Mkdir(filepath.Join(dir, "d"), 0o755); err != nil {
		t.Fatal(err)
	}
	d, err := servers.StartDockerd(t.Context(), filepath.Join(dir, "d"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	theirs := Host{Name: "dockerd", Address: d.Host}
	if err := Import(t.Context(), theirs, busyboxRoot(t)); err != nil {
		t.Fatal(err)
	}
	if err := Create(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	run := func(args ...string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), kcradle, args...)
		cmd.Env = append(os.Environ(), "KCRADLE_TEMPLATES=off", "KCRADLE_ROOT="+filepath.Join(dir, "root"), "DOCKER_HOST="+d.Host)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("kcradle %v: %v: %s", args, err, out)
		}
	}
	file := filepath.Join(dir, "pod.json")
	b, err := json.MarshalIndent(podFile(), "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o644); err != nil {
		t.Fatal(err)
	}
	bundle := filepath.Join(dir, "vm")
	run("summon", "--pod", file, bundle)
	t.Cleanup(func() {
		cmd := exec.Command(kcradle, "kill", bundle)
		cmd.Env = append(os.Environ(), "KCRADLE_TEMPLATES=off", "KCRADLE_ROOT="+filepath.Join(dir, "root"))
		_ = cmd.Run()
		if b, err := os.ReadFile(filepath.Join(bundle, "run/console.log")); t.Failed() && err == nil {
			t.Logf("console: %s", b[max(0, len(b)-4096):])
		}
	})
	run("run", "-d", "--hold", "--linger", "--network", "none", bundle)
	Run(t, Host{Name: "the pod", Address: "unix://" + filepath.Join(bundle, "run/vdocker.sock"), Pod: true, Limits: true}, theirs)
}

// podFile is what kcradle summon --pod reads, with the tour's containers.
func podFile() map[string]any {
	var list []map[string]any
	for _, c := range containers() {
		m := map[string]any{"name": c.Name, "image": Ref, "args": c.Cmd, "critical": false}
		for key, value := range map[string]bool{"tty": c.TTY, "stdin_open": c.OpenStdin, "read_only": c.ReadOnly} {
			if value {
				m[key] = true
			}
		}
		if len(c.Env) > 0 {
			m["env"] = c.Env
		}
		if len(c.Labels) > 0 {
			m["labels"] = c.Labels
		}
		if c.User != "" {
			m["user"] = c.User
		}
		if c.WorkingDir != "" {
			m["working_dir"] = c.WorkingDir
		}
		if c.StopTimeout != nil {
			m["stop_timeout"] = *c.StopTimeout
		}
		list = append(list, m)
	}
	return map[string]any{"name": "tour", "memory": "256m", "containers": list}
}
