package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/kcradle/kcradle/image"
)

// asks are the seeds: what clients say to each endpoint that reads a query or a body. The IDs of a running test's container are
// "box", its network "net", its volume "vol".
var asks = []struct{ method, path, query, body string }{
	{"GET", "/containers/json", `all=1&limit=2&size=1&filters={"status":["exited"],"label":["a=b"],"ancestor":["tiny"],"before":["box"]}`, ""},
	{"POST", "/containers/create", "name=a.b-c&platform=linux/amd64", `{"Image":"tiny","Cmd":["x"],"Env":["A=b"],"ExposedPorts":{"80/tcp":{}},"Volumes":{"/v":{}},` +
		`"Healthcheck":{"Test":["CMD","x"],"Interval":1000000},"HostConfig":{"Binds":["vol:/d:ro"],"PortBindings":{"80/tcp":[{"HostIp":"127.0.0.1","HostPort":"0"}]},` +
		`"Mounts":[{"Type":"tmpfs","Target":"/t"}],"RestartPolicy":{"Name":"on-failure","MaximumRetryCount":3},"Memory":67108864,"NanoCpus":500000000,"Ulimits":[{"Name":"nofile","Soft":1,"Hard":2}],` +
		`"LogConfig":{"Type":"json-file","Config":{}},"Tmpfs":{"/x":"size=1m"},"Sysctls":{"a":"b"},"ExtraHosts":["a:1.2.3.4"],"Links":["box:b"],"VolumesFrom":["box:ro"],"Dns":["1.1.1.1"],"CapAdd":["ALL"],"SecurityOpt":["no-new-privileges"]},` +
		`"NetworkingConfig":{"EndpointsConfig":{"net":{"Aliases":["x"],"IPAMConfig":{"IPv4Address":"10.1.2.3"},"MacAddress":"02:00:00:00:00:01"}}}}`},
	{"POST", "/containers/prune", `filters={"until":["10m"],"label!":["a"]}`, ""},
	{"GET", "/containers/box/json", "size=1", ""},
	{"GET", "/containers/box/logs", "stdout=1&stderr=1&since=1.5&until=10m&tail=3&timestamps=1", ""},
	{"POST", "/containers/box/start", "detachKeys=ctrl-a", ""},
	{"POST", "/containers/box/stop", "t=1&signal=TERM", ""},
	{"POST", "/containers/box/restart", "t=0", ""},
	{"POST", "/containers/box/kill", "signal=SIGHUP", ""},
	{"POST", "/containers/box/rename", "name=box", ""},
	{"POST", "/containers/box/update", "", `{"Memory":67108864,"MemorySwap":-1,"PidsLimit":10,"RestartPolicy":{"Name":"always"}}`},
	{"POST", "/containers/box/wait", "condition=next-exit", ""},
	{"POST", "/containers/box/exec", "", `{"Cmd":["x"],"AttachStdout":true,"ConsoleSize":[1,2]}`},
	{"POST", "/containers/box/attach", "stream=1&detachKeys=a", ""},
	{"DELETE", "/containers/none", "v=1&force=1&link=1", ""},
	{"POST", "/commit", "container=none&repo=a&tag=b&pause=0&changes=CMD+x", `{"Cmd":["x"],"Labels":{"a":"b"}}`},
	{"GET", "/events", `since=1&until=2&filters={"type":["container"],"event":["die"]}`, ""},
	{"GET", "/networks", `filters={"driver":["bridge"],"type":["custom"],"dangling":["true"]}`, ""},
	{"POST", "/networks/create", "", `{"Name":"more","Driver":"bridge","Internal":true,"EnableIPv6":true,"Labels":{"a":"b"},"Options":{"com.docker.network.driver.mtu":"1400"},` +
		`"IPAM":{"Driver":"default","Config":[{"Subnet":"10.5.0.0/16","IPRange":"10.5.1.0/24","Gateway":"10.5.0.1","AuxiliaryAddresses":{"a":"10.5.0.9"}}]}}`},
	{"POST", "/networks/net/connect", "", `{"Container":"box","EndpointConfig":{"Aliases":["b"],"IPAMConfig":{"IPv4Address":"10.9.0.3"}}}`},
	{"POST", "/networks/net/disconnect", "", `{"Container":"box","Force":true}`},
	{"GET", "/networks/net", "verbose=1&scope=local", ""},
	{"POST", "/networks/prune", `filters={"until":["1h"]}`, ""},
	{"GET", "/volumes", `filters={"dangling":["true"],"name":["v"],"label":["a"]}`, ""},
	{"POST", "/volumes/create", "", `{"Name":"vol","Driver":"local","DriverOpts":{"size":"16m"},"Labels":{"a":"b"}}`},
	{"POST", "/volumes/prune", `filters={"all":["true"]}`, ""},
	{"DELETE", "/volumes/vol", "force=1", ""},
	{"GET", "/images/json", `all=1&digests=1&filters={"reference":["t*"],"dangling":["false"],"since":["tiny"]}`, ""},
	{"POST", "/images/create", "fromSrc=-&repo=imported&tag=1&message=m&changes=ENV+A=b", "no tar"},
	{"POST", "/images/load", "quiet=1", "no tar"},
	{"GET", "/images/get", "names=tiny", ""},
	{"GET", "/images/search", "term=x&limit=1", ""},
	{"POST", "/images/prune", `filters={"dangling":["true"]}`, ""},
	{"GET", "/images/tiny/json", "manifests=1", ""},
	{"GET", "/images/tiny/history", "", ""},
	{"POST", "/images/tiny/tag", "repo=a/b&tag=c", ""},
	{"DELETE", "/images/a/b:c", "force=1&noprune=1", ""},
	{"GET", "/system/df", "type=image&type=volume", ""},
	{"GET", "/containers/deaf/alias/json", "", ""},
	{"POST", "/swarm/init", "", "{}"},
	{"POST", "/swarm/join", "", "{}"},
	{"POST", "/swarm/leave", "force=1", ""},
	{"POST", "/build/prune", "all=1", ""},
	{"POST", "/auth", "", `{"username":"a","password":"b","serveraddress":"127.0.0.1:1"}`},
}

// FuzzRequests says anything to any endpoint but those that call a registry. A request may be refused; it may not be a panic, and
// whatever it was, the daemon answers the next one.
func FuzzRequests(f *testing.F) {
	for i, a := range asks {
		f.Add(uint8(i), a.query, []byte(a.body))
	}
	h := fuzzed(f)
	ask := func(method, path, query string, body []byte) recorder {
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond) // some stream for ever
		defer cancel()
		r := httptest.NewRequestWithContext(ctx, method, path, bytes.NewReader(body))
		r.URL.RawQuery = query
		w := recorder{httptest.NewRecorder()}
		h.ServeHTTP(w, r)
		return w
	}
	f.Fuzz(func(t *testing.T, which uint8, query string, body []byte) {
		a := asks[int(which)%len(asks)]
		if a.path == "/images/create" {
			if v, err := url.ParseQuery(query); err != nil || v.Get("fromSrc") == "" || v.Get("fromImage") != "" {
				return
			}
		}
		if a.path == "/auth" && !strings.Contains(string(body), "127.0.0.1:1\"") {
			return
		}
		w := ask(a.method, a.path, query, body)
		if strings.Contains(w.Body.String(), `"message":"internal error:`) {
			t.Errorf("%s %s?%s: %d %s", a.method, a.path, query, w.Code, w.Body)
		}
		if w.Code < 200 || w.Code > 599 {
			t.Errorf("%s %s?%s: status %d", a.method, a.path, query, w.Code)
		}
		var made struct{ ID string }
		if a.path == "/containers/create" && w.Code == http.StatusCreated && json.Unmarshal(w.Body.Bytes(), &made) == nil {
			if w := ask("DELETE", "/containers/"+made.ID, "v=1", nil); w.Code != http.StatusNoContent {
				t.Errorf("what was made by %s %s?%s cannot be removed: %d %s", a.path, query, body, w.Code, w.Body)
			}
		}
		var list []json.RawMessage
		if w := ask("GET", "/containers/json", "all=1", nil); w.Code != http.StatusOK || json.Unmarshal(w.Body.Bytes(), &list) != nil {
			t.Errorf("after %s %s?%s: %d %s", a.method, a.path, query, w.Code, w.Body)
		}
		if len(list) == 0 { // pruned
			ask("POST", "/containers/create", "name=box", []byte(`{"Image":"tiny","HostConfig":{"NetworkMode":"none"}}`))
		}
	})
}

// recorder lets an answer begin before the request has ended, as a connection does.
type recorder struct{ *httptest.ResponseRecorder }

func (recorder) EnableFullDuplex() error { return nil }

// fuzzed is the API of a daemon with a container that cannot be started.
func fuzzed(t testing.TB) http.Handler {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	root := t.TempDir()
	store, err := image.Open(root, log)
	if err != nil {
		t.Fatal(err)
	}
	d, err := Open(context.Background(), Config{Root: root, Store: store, Packages: root, Version: "fuzz", Log: log,
		Launch: func(context.Context, string, LaunchOptions) error { return errors.New("no machines here") }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	for _, a := range []struct{ path, body string }{
		{"/images/load", string(tinyImage(t))},
		{"/networks/create", `{"Name":"net","IPAM":{"Config":[{"Subnet":"10.9.0.0/16"}]}}`},
		{"/containers/create?name=box", `{"Image":"tiny","HostConfig":{"NetworkMode":"net"}}`},
	} {
		w := recorder{httptest.NewRecorder()}
		r := httptest.NewRequest("POST", a.path, strings.NewReader(a.body))
		if strings.HasPrefix(a.body, "{") {
			r.Header.Set("Content-Type", "application/json")
		}
		d.handler.ServeHTTP(w, r)
		if w.Code >= 300 {
			t.Fatalf("%s: %d %s", a.path, w.Code, w.Body)
		}
	}
	return d.handler
}

// The seeds reach every endpoint of the table that reads what a client says, but those that ask a registry.
func TestFuzzReachesAll(t *testing.T) {
	spoken := map[string]bool{ // or nothing is read, or all of it is the machine's to read
		"GET /_ping": true, "HEAD /_ping": true, "GET /version": true, "GET /info": true,
		"POST /images/{name+}/push": true, "GET /distribution/{name+}/json": true,
	}
	d := &Daemon{}
	for _, r := range d.routes() {
		where := r.Method + " " + r.Path
		for _, a := range asks {
			if a.method == r.Method && like(r.Path, a.path) {
				spoken[where] = true
			}
		}
		switch {
		case spoken[where], strings.Contains(where, "/exec/{id}"):
		case strings.HasPrefix(where, "GET /swarm"), len(r.Path) > 1 && strings.Count(r.Path, "/") == 1 && r.Method == "GET", r.Path == "/build":
		case strings.Contains(r.Path, "{id}/top"), strings.Contains(r.Path, "{id}/stats"), strings.Contains(r.Path, "{id}/resize"), strings.Contains(r.Path, "{id}/archive"),
			strings.Contains(r.Path, "{id}/changes"), strings.Contains(r.Path, "{id}/export"), strings.Contains(r.Path, "attach/ws"), strings.Contains(r.Path, "{id}/pause"), strings.Contains(r.Path, "{id}/unpause"):
		case r.Path == "/images/{name+}/get", r.Path == "/volumes/{name}", r.Path == "/networks/{id}": // as their sisters
		default:
			t.Errorf("%s has no seed", where)
		}
	}
}

// like reports whether a path is one of a pattern's.
func like(pattern, path string) bool {
	p, s := strings.Split(pattern, "/"), strings.Split(path, "/")
	if i := strings.Index(pattern, "{name+}"); i >= 0 {
		return strings.HasPrefix(path, pattern[:i]) && strings.HasSuffix(path, pattern[i+len("{name+}"):])
	}
	if len(p) != len(s) {
		return false
	}
	for i := range p {
		if p[i] != s[i] && !strings.HasPrefix(p[i], "{") {
			return false
		}
	}
	return true
}
