package e2e

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/modules"
	"github.com/kcradle/kcradle/test/servers"
)

// tools is the cache of programs that judge the daemon.
func tools(t *testing.T) *modules.Cache {
	t.Helper()
	need.Long(t)
	c, err := modules.Open("", testWriter{t})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestDaemonCompose is a file of three services, by docker compose: testdata/compose.
func TestDaemonCompose(t *testing.T) {
	need.Command(t, "curl", "hack/deps test")
	plugin, err := tools(t).Program(t.Context(), modules.Compose())
	if err != nil {
		t.Fatal(err)
	}
	h := startHost(t)
	for _, name := range []string{"nginx", "web", "mariadb"} {
		h.docker("load", "-q", "-i", image(t, name).Archive)
	}
	plugins := filepath.Join(h.dir, "config/cli-plugins")
	if err := os.MkdirAll(plugins, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(plugin, filepath.Join(plugins, "docker-compose")); err != nil {
		t.Fatal(err)
	}
	command := func(ctx context.Context, args ...string) *exec.Cmd {
		cmd := servers.Client(ctx, h.d.Host, append([]string{"compose", "-f", "testdata/compose/compose.yaml"}, args...)...)
		cmd.Env = append(cmd.Env, "DOCKER_CONFIG="+filepath.Dir(plugins))
		return cmd
	}
	compose := func(args ...string) string {
		t.Helper()
		return strings.TrimSpace(succeed(t, command(context.WithoutCancel(t.Context()), args...)))
	}
	page := func() string { // servers listen some time after their containers have started
		t.Helper()
		return succeed(t, exec.Command("curl", "-sS", "--fail", "--retry", "100", "--retry-delay", "1", "--retry-all-errors", "http://"+compose("port", "web", "80")))
	}

	compose("up", "-d")
	t.Cleanup(func() { compose("down", "-v", "-t", "1") }) // does nothing after the one below
	h.want("ps", compose("ps", "--format", "{{.Service}} {{.State}} {{.Health}}"), "app running \ndb running healthy\nweb running")
	if got := page(); !strings.HasPrefix(got, "the database is ") || !strings.Contains(got, "MariaDB") {
		t.Errorf("web, app and db: got %q", got)
	}

	// The app was started when the database was healthy, not before.
	events := h.docker("events", "--since", "1h", "--until", "0s", "--format", "{{.Actor.Attributes.name}} {{.Action}}")
	if healthy, started := strings.Index(events, "shop-db-1 health_status: healthy"), strings.Index(events, "shop-app-1 start"); healthy < 0 || started < healthy {
		t.Errorf("app was started before db was healthy: events\n%s", events)
	}

	h.want("exec by name", compose("exec", "-T", "app", "sh", "-c", "getent hosts db | cut -d' ' -f1"),
		h.docker("inspect", "-f", "{{(index .NetworkSettings.Networks \"shop_back\").IPAddress}}", "shop-db-1"))
	cmd := command(t.Context(), "exec", "-T", "app", "sh", "-c", "exit 5")
	if _ = cmd.Run(); cmd.ProcessState.ExitCode() != 5 { // the code says it
		t.Errorf("exec: got exit code %d, want 5", cmd.ProcessState.ExitCode())
	}
	sql := func(s string) string {
		t.Helper()
		return compose("exec", "-T", "db", "mariadb", "-psecret", "-N", "-e", s, "shop")
	}
	sql("create table kept (n int); insert into kept values (42)")

	// Nothing to do the second time; a service that is made again finds its volume.
	before := h.docker("ps", "-q", "--no-trunc")
	compose("up", "-d")
	h.want("up again", h.docker("ps", "-q", "--no-trunc"), before)

	compose("up", "-d", "--force-recreate", "--wait", "db")
	h.want("what was in the volume", sql("select n from kept"), "42")
	if got := page(); !strings.Contains(got, "MariaDB") {
		t.Errorf("after the database was made again: got %q", got)
	}

	// The logs of all of them, until they end.
	ctx, cancel := context.WithTimeout(t.Context(), 2*startTimeout)
	defer cancel()
	logs := command(ctx, "logs", "-f", "--no-color")
	said, err := os.Create(filepath.Join(h.dir, "logs"))
	if err != nil {
		t.Fatal(err)
	}
	defer said.Close()
	logs.Stdout, logs.Stderr = said, said
	t.Cleanup(func() {
		if t.Failed() {
			b, _ := os.ReadFile(said.Name())
			t.Logf("logs -f said:\n%s", b)
		}
	})
	heard := func(text string) int {
		t.Helper()
		b, err := os.ReadFile(said.Name())
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(string(b), text)
	}
	if err := logs.Start(); err != nil {
		t.Fatal(err)
	}
	await(t, "the log of the database", func() bool { return heard("mariadbd: ready for connections") > 0 })
	compose("down", "-v")
	if err := logs.Wait(); err != nil {
		t.Errorf("logs -f: %v", err)
	}
	for _, want := range []string{"app-1  | listening on 8080", "web-1  | ", "mariadbd: Shutdown complete", "web-1 exited with code 0"} {
		if heard(want) == 0 {
			b, _ := os.ReadFile(said.Name())
			t.Errorf("logs -f: no %q in\n%s", want, tail(b))
		}
	}
	h.want("containers after down", h.docker("ps", "-aq"), "")
	h.want("volumes after down", h.docker("volume", "ls", "-q"), "")
	h.want("networks after down", h.docker("network", "ls", "--format", "{{.Name}}"), "bridge\nnone")
}

// TestDaemonTestcontainers is testcontainers-go's own example of its module redis, and its tests that write and read, with an image
// that comes from a registry.
func TestDaemonTestcontainers(t *testing.T) {
	need.Command(t, "docker-registry", "hack/deps test")
	program, dir, err := tools(t).Tests(t.Context(), modules.Redis())
	if err != nil {
		t.Fatal(err)
	}
	reg, err := servers.StartRegistry(t.Context(), tempDir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reg.Stop)
	t.Setenv("KCRADLE_PLAIN_HTTP", reg.Addr)
	h := startHost(t)
	redis := image(t, "redis")
	h.docker("load", "-q", "-i", redis.Archive)
	// What the module expects: arguments are those of the server, which lets everybody in.
	name := reg.Addr + "/redis:7"
	h.docker("create", "--name", "made", redis.Ref)
	h.docker("commit", "-c", `ENTRYPOINT ["sh","-c","exec redis-server \"$@\" --protected-mode no","redis-server"]`, "-c", "CMD []", "made", name)
	h.docker("rm", "-v", "made")
	h.docker("push", "-q", name)
	h.docker("rmi", name, redis.Ref)

	want := []string{"TestIntegrationSetGet", "TestRedisWithConfigFile", "ExampleRun"}
	cmd := exec.CommandContext(t.Context(), program, "-test.v", "-test.run", "^("+strings.Join(want, "|")+")$")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "DOCKER_HOST="+h.d.Host, "DOCKER_CONFIG=/nonexistent", "HOME="+h.dir,
		"TESTCONTAINERS_HUB_IMAGE_NAME_PREFIX="+reg.Addr,
		"TESTCONTAINERS_HOST_OVERRIDE=127.0.0.1", // where it thinks that it is in a container itself, it asks the gateway
		"TESTCONTAINERS_RYUK_DISABLED=true")      // its reaper is an image of its own
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%v", err)
	}
	for _, name := range want {
		if !slices.ContainsFunc(strings.Split(string(out), "\n"), func(l string) bool { return strings.HasPrefix(l, "--- PASS: "+name+" ") }) {
			t.Errorf("%s has not passed", name)
		}
	}
	if t.Failed() {
		t.Logf("%s", out)
	}
	h.want("containers it left", h.docker("ps", "-aq"), "")
}
