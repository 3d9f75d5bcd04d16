package e2e

import (
	"encoding/json"
	"os/exec"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
)

// TestDaemonNetworks is about machines that share networks, by the real docker client.
func TestDaemonNetworks(t *testing.T) {
	need.Command(t, "curl", "hack/deps test")
	h := startHost(t)
	const serve = "mkdir /www; echo $0 >/www/index.html; exec httpd -f -h /www"
	get := func(from, url string) string { return h.docker("exec", from, "wget", "-qO-", url) }
	unreached := func(from, url string) {
		t.Helper()
		if out, err := h.command("exec", from, "wget", "-qO-", url).CombinedOutput(); err == nil {
			t.Errorf("%s reached %s: %q", from, url, out)
		}
	}

	front := h.docker("network", "create", "--label", "tier=front", "front")
	h.docker("network", "create", "--internal", "--subnet", "10.77.0.0/24", "--ipv6", "--subnet", "fd00:77::/64", "back")
	h.docker("run", "-d", "--name", "web", "--network", "front", "--network-alias", "www", "-p", "127.0.0.1::80", busybox, "sh", "-c", serve, "web")
	h.docker("run", "-d", "--name", "db", "--network", "back", "--ip", "10.77.0.9", "--hostname", "database", busybox, "sh", "-c", serve, "db")
	h.docker("run", "-d", "--name", "app", "--network", "front", busybox, "sh", "-c", serve, "app")

	// Names: the container's, its aliases, its ID, its host name, with the network's name behind them.
	id := h.docker("inspect", "-f", "{{.Id}}", "web")
	for _, name := range []string{"web", "www", "web.front", "WEB", id[:12]} {
		h.want("by the name "+name, get("app", "http://"+name+"/"), "web")
	}
	unreached("app", "http://db/")
	unreached("app", "http://10.77.0.9/")
	unreached("app", "http://nobody/")
	port := h.docker("port", "web", "80/tcp")
	h.want("by the published port", succeed(t, exec.CommandContext(t.Context(), "curl", "-s", "http://"+port)), "web\n")

	// A second network while the container runs, with a name of its own there; and the way back.
	h.docker("network", "connect", "--alias", "inside", "back", "app")
	h.want("on a second network", get("app", "http://db/"), "db")
	h.want("by the host name", get("app", "http://database/"), "db")
	h.want("over IPv6", get("app", "http://["+h.docker("inspect", "-f", "{{.NetworkSettings.Networks.back.GlobalIPv6Address}}", "db")+"]/"), "db")
	h.want("by an alias of the second network", get("db", "http://inside/"), "app")
	h.want("still on the first", get("app", "http://web/"), "web")
	if hosts := h.docker("exec", "app", "cat", "/etc/hosts"); !strings.Contains(hosts, h.docker("inspect", "-f", "{{.NetworkSettings.Networks.back.IPAddress}}", "app")+"\t") {
		t.Errorf("/etc/hosts does not know the second address:\n%s", hosts)
	}
	if routes := h.docker("exec", "db", "ip", "route"); strings.Contains(routes, "default") {
		t.Errorf("an internal network has a way out: %s", routes)
	}

	// What must not be.
	for msg, args := range map[string][]string{
		"already exists in network back":         {"network", "connect", "back", "app"},
		"is not connected to network back":       {"network", "disconnect", "back", "web"},
		"has active endpoints":                   {"network", "rm", "back"},
		"network with name front already exists": {"network", "create", "front"},
		"is a pre-defined network":               {"network", "rm", "bridge"},
		"network nowhere not found":              {"network", "connect", "nowhere", "app"},
		"Address already in use: 10.77.0.9":      {"network", "connect", "--ip", "10.77.0.9", "back", "web"},
		"no configured subnet contains IP":       {"network", "connect", "--ip", "10.78.0.9", "back", "web"},
	} {
		if got := h.refused(1, args...); !strings.Contains(got, msg) {
			t.Errorf("docker %s: got %q, want %q", strings.Join(args, " "), got, msg)
		}
	}

	// Nobody is needed for it: what a killed daemon leaves goes on, and the next one knows it.
	h.crash()
	h.want("after the daemon's death", get("app", "http://db/"), "db")
	h.docker("rename", "db", "store")
	h.want("by a new name", get("app", "http://store/"), "db")
	unreached("app", "http://db/")
	var attached map[string]struct{ IPAddress, MacAddress, NetworkID string }
	if err := json.Unmarshal([]byte(h.docker("inspect", "-f", "{{json .NetworkSettings.Networks}}", "app")), &attached); err != nil {
		t.Fatal(err)
	}
	if len(attached) != 2 || attached["front"].NetworkID != front || !strings.HasPrefix(attached["back"].IPAddress, "10.77.0.") {
		t.Errorf("networks of app: got %v", attached)
	}
	h.want("containers of a network", h.docker("network", "inspect", "-f", "{{len .Containers}} {{.Internal}}", "back"), "2 true")

	h.docker("network", "disconnect", "front", "app")
	unreached("app", "http://web/")
	h.want("on the other network after that", get("app", "http://store/"), "db")
	h.docker("network", "connect", "front", "app")
	h.want("after it came back", get("app", "http://web/"), "web")

	// A restart has the same networks; who is killed is not found any more.
	h.docker("restart", "-t", "0", "app")
	h.want("after a restart", get("app", "http://web/")+get("app", "http://store/"), "webdb")
	h.docker("kill", "web")
	unreached("app", "http://web/")
	h.want("list", h.docker("network", "ls", "--format", "{{.Name}} {{.Driver}}"), "back bridge\nbridge bridge\nfront bridge\nnone null")
	h.want("filter", h.docker("network", "ls", "-q", "--no-trunc", "-f", "label=tier=front"), front)
	h.want("containers by network", h.docker("ps", "--format", "{{.Names}}", "-f", "network=back"), "app\nstore")

	// The default network: others are reached by address, and by name when they are linked.
	h.docker("run", "-d", "--name", "one", busybox, "sh", "-c", serve, "one")
	h.docker("run", "-d", "--name", "two", "--link", "one:uno", busybox, "sh", "-c", serve, "two")
	h.want("by address", get("two", "http://"+h.docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", "one")+"/"), "one")
	h.want("by a link", get("two", "http://uno/"), "one")
	unreached("two", "http://one/")
	unreached("one", "http://two/")

	h.docker("rm", "-f", "web", "store", "app", "one", "two")
	h.want("prune", h.docker("network", "prune", "-f"), "Deleted Networks:\nback\nfront\n")
	h.want("no network", h.docker("run", "--rm", "--network", "none", busybox, "ls", "/sys/class/net"), "lo")
}
