package vdocker

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// docs/vdocker.md lists every row of the table of routes, and nothing else.
func TestDocumentation(t *testing.T) {
	b, err := os.ReadFile("../../docs/vdocker.md")
	if err != nil {
		t.Fatal(err)
	}
	var documented, served []string
	for _, m := range regexp.MustCompile("(?m)^\\| ([A-Z]+) \\| `([^`]+)` \\| (full|partial|absent) \\| (.*)\\|$").FindAllStringSubmatch(string(b), -1) {
		documented = append(documented, m[1]+" "+m[2])
		if m[3] != "full" && strings.TrimSpace(m[4]) == "" {
			t.Errorf("%s %s is %s, and the table does not say why", m[1], m[2], m[3])
		}
	}
	for _, r := range new(server).routes() {
		served = append(served, r.Method+" "+strings.ReplaceAll(r.Path, "+}", "}"))
	}
	slices.Sort(documented)
	slices.Sort(served)
	if d := cmp.Diff(served, documented); d != "" {
		t.Errorf("routes served (-), documented (+):\n%s", d)
	}
	if s := slices.Compact(slices.Clone(served)); len(s) != len(served) {
		t.Error("a route is served twice")
	}
}

// What the engine's own description of API 1.50 lists is served or refused in words.
func TestNothingForgotten(t *testing.T) {
	listed := `GET /containers/json, POST /containers/create, GET /containers/{id}/json, GET /containers/{id}/top, GET /containers/{id}/logs,
GET /containers/{id}/changes, GET /containers/{id}/export, GET /containers/{id}/stats, POST /containers/{id}/resize, POST /containers/{id}/start,
POST /containers/{id}/stop, POST /containers/{id}/restart, POST /containers/{id}/kill, POST /containers/{id}/update, POST /containers/{id}/rename,
POST /containers/{id}/pause, POST /containers/{id}/unpause, POST /containers/{id}/attach, GET /containers/{id}/attach/ws, POST /containers/{id}/wait,
DELETE /containers/{id}, HEAD /containers/{id}/archive, GET /containers/{id}/archive, PUT /containers/{id}/archive, POST /containers/prune,
GET /images/json, POST /build, POST /build/prune, POST /images/create, GET /images/{name}/json, GET /images/{name}/history, POST /images/{name}/push,
POST /images/{name}/tag, DELETE /images/{name}, GET /images/search, POST /images/prune, POST /auth, GET /info, GET /version, GET /_ping, HEAD /_ping,
POST /commit, GET /events, GET /system/df, GET /images/{name}/get, GET /images/get, POST /images/load, POST /containers/{id}/exec, POST /exec/{id}/start,
POST /exec/{id}/resize, GET /exec/{id}/json, GET /volumes, POST /volumes/create, GET /volumes/{name}, PUT /volumes/{name}, DELETE /volumes/{name},
POST /volumes/prune, GET /networks, GET /networks/{id}, DELETE /networks/{id}, POST /networks/create, POST /networks/{id}/connect,
POST /networks/{id}/disconnect, POST /networks/prune, GET /plugins, GET /plugins/privileges, POST /plugins/pull, GET /plugins/{name}/json,
DELETE /plugins/{name}, POST /plugins/{name}/enable, POST /plugins/{name}/disable, POST /plugins/{name}/upgrade, POST /plugins/create,
POST /plugins/{name}/push, POST /plugins/{name}/set, GET /nodes, GET /nodes/{id}, DELETE /nodes/{id}, POST /nodes/{id}/update, GET /swarm,
POST /swarm/init, POST /swarm/join, POST /swarm/leave, POST /swarm/update, GET /swarm/unlockkey, POST /swarm/unlock, GET /services,
POST /services/create, GET /services/{id}, DELETE /services/{id}, POST /services/{id}/update, GET /services/{id}/logs, GET /tasks, GET /tasks/{id},
GET /tasks/{id}/logs, GET /secrets, POST /secrets/create, GET /secrets/{id}, DELETE /secrets/{id}, POST /secrets/{id}/update, GET /configs,
POST /configs/create, GET /configs/{id}, DELETE /configs/{id}, POST /configs/{id}/update, GET /distribution/{name}/json, POST /session`
	served := map[string]bool{}
	for _, r := range new(server).routes() {
		served[r.Method+" "+strings.ReplaceAll(r.Path, "+}", "}")] = true
	}
	for _, line := range strings.Split(strings.ReplaceAll(listed, "\n", " "), ", ") {
		if !served[strings.TrimSpace(line)] {
			t.Errorf("%s is neither served nor refused", line)
		}
	}
}
