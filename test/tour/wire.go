package tour

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
)

// request is one request without the docker client.
type request struct {
	method, path, body string
	headers            map[string]string
	show               []string // headers of the answer to compare
}

func (h Host) do(t *testing.T, q request) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), stepTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, q.method, "http://docker"+q.path, strings.NewReader(q.body))
	if err != nil {
		t.Fatal(err)
	}
	if q.body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for k, v := range q.headers {
		req.Header.Set(k, v)
	}
	res, err := h.HTTP().Do(req)
	if err != nil {
		t.Fatalf("%s: %v", h.Name, err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Errorf("%s: read answer: %v", h.Name, err)
	}
	out := fmt.Sprintln(res.StatusCode)
	for _, k := range q.show {
		out += fmt.Sprintf("%s: %s\n", k, res.Header.Get(k))
	}
	return out + string(b)
}

// same sends one request to both hosts and compares the answers.
func (r *tour) same(name string, q request) {
	r.Helper()
	r.Run(name, func(t *testing.T) {
		var got [2]result
		for side, h := range []Host{r.ours, r.theirs} {
			got[side] = result{Stdout: h.do(t, q)}.normal()
		}
		if d := cmp.Diff(got[1].Stdout, got[0].Stdout); d != "" {
			t.Errorf("dockerd's answer (-), the pod's (+):\n%s", d)
		}
	})
}

// wire looks at what the client hides.
func (r *tour) wire() {
	both := []string{"Content-Type", "Ostype", "Docker-Experimental", "Cache-Control", "Pragma"}
	r.same("GET _ping", request{method: "GET", path: "/_ping", show: both})
	r.same("HEAD _ping", request{method: "HEAD", path: "/_ping", show: append(both, "Content-Length")})
	r.same("GET _ping of a version", request{method: "GET", path: "/v1.41/_ping", show: both})
	r.same("no such page", request{method: "GET", path: "/v1.41/nonesuch", show: []string{"Content-Type"}})
	r.same("no such method", request{method: "PATCH", path: "/v1.41/containers/json", show: []string{"Content-Type"}})
	r.same("start of what runs", request{method: "POST", path: "/v1.41/containers/main/start"})
	r.same("stop of what does not", request{method: "POST", path: "/v1.41/containers/quick/stop"})
	r.same("error's type", request{method: "GET", path: "/v1.41/containers/nobody/json", show: []string{"Content-Type"}})
	r.same("list by filters in a list", request{method: "GET", path: `/v1.41/containers/json?filters={"name":["nobody"]}`})
	r.same("list by no filters", request{method: "GET", path: `/v1.41/containers/json?filters={"name":{"nobody":true}}`})
	r.same("logs of no stream", request{method: "GET", path: "/v1.41/containers/lines/logs"})
	r.same("logs raw of a terminal", request{method: "GET", path: "/v1.41/containers/shell/logs?stdout=1&tail=1"})
	r.same("wait for what has ended", request{method: "POST", path: "/v1.41/containers/fail/wait", show: []string{"Content-Type"}})
	r.same("exec of no command", request{method: "POST", path: "/v1.41/containers/main/exec", body: "{}"})
	r.same("no such exec", request{method: "GET", path: "/v1.41/exec/nonesuch/json"})
	r.same("start of no such exec", request{method: "POST", path: "/v1.41/exec/nonesuch/start", body: "{}"})
	r.same("archive of no path", request{method: "GET", path: "/v1.41/containers/main/archive"})
	r.same("archive of nothing there", request{method: "GET", path: "/v1.41/containers/main/archive?path=/nonesuch"})
	r.same("archive into nothing", request{method: "PUT", path: "/v1.41/containers/main/archive?path=/nonesuch"})
	r.same("changes of nobody", request{method: "GET", path: "/v1.41/containers/nobody/changes"})

	for _, tt := range []struct{ path, want string }{
		{"/v1.24/_ping", "client version 1.24 is too old. Minimum supported API version is 1.41, please upgrade your client to a newer version"},
		{"/v9.99/_ping", "client version 9.99 is too new. Maximum supported API version is 1.50"},
	} {
		r.Run("version "+tt.path, func(t *testing.T) {
			if !r.ours.Pod {
				t.Skip("for a pod only")
			}
			if got, want := r.ours.do(t, request{method: "GET", path: tt.path}), fmt.Sprintf("400\n{\"message\":%q}\n", tt.want); got != want {
				t.Errorf("got %q, want %q", got, want)
			}
		})
	}
	r.Run("path stat", func(t *testing.T) {
		for _, path := range []string{"/c/f", "/c/flink", "/c/broken", "/c/up", "/c/tolink/", "/c/dir/.", "/", "/c/fifo"} {
			var got [2]string
			for side, h := range []Host{r.ours, r.theirs} {
				out := h.do(t, request{method: "HEAD", path: "/v1.41/containers/main/archive?path=" + path, show: []string{"X-Docker-Container-Path-Stat"}})
				_, v, _ := strings.Cut(strings.TrimSpace(out), ": ")
				b, err := base64.StdEncoding.DecodeString(v)
				if err != nil {
					t.Errorf("%s: %s: %v of %q", h.Name, path, err, out)
				}
				// Times are the files'; how large a directory is, the file system's.
				got[side] = regexp.MustCompile(`"mtime":"[^"]*"`).ReplaceAllString(string(b), "<time>")
				if strings.Contains(got[side], `"mode":2147`) {
					got[side] = regexp.MustCompile(`"size":\d+`).ReplaceAllString(got[side], "<size>")
				}
			}
			if got[0] != got[1] {
				t.Errorf("%s: dockerd says %s, the pod %s", path, got[1], got[0])
			}
		}
	})
	r.Run("exec on the wire", r.execWire)
	r.Run("attach by websocket", r.webSocket)
}

// execWire runs an exec in both of the protocol's forms and compares every byte.
func (r *tour) execWire(t *testing.T) {
	for _, tt := range []struct{ name, create, start, headers, input string }{
		{"upgrade", `{"AttachStdout":true,"AttachStderr":true,"Cmd":["sh","-c","echo out; sleep 0.2; echo err >&2"]}`, `{}`, "Connection: Upgrade\r\nUpgrade: tcp\r\n", ""},
		{"without upgrade", `{"AttachStdout":true,"AttachStderr":true,"Cmd":["sh","-c","echo out; sleep 0.2; echo err >&2"]}`, `{}`, "", ""},
		{"input", `{"AttachStdin":true,"AttachStdout":true,"Cmd":["cat"]}`, `{"Detach":false,"Tty":false}`, "Connection: Upgrade\r\nUpgrade: tcp\r\n", "early\n"},
		{"terminal", `{"AttachStdout":true,"Tty":true,"Cmd":["echo","x"]}`, `{"Tty":true}`, "Connection: Upgrade\r\nUpgrade: tcp\r\n", ""},
		{"only stderr", `{"AttachStderr":true,"Cmd":["sh","-c","echo out; echo err >&2"]}`, `{}`, "Connection: Upgrade\r\nUpgrade: tcp\r\n", ""},
		{"detached", `{"Cmd":["true"]}`, `{"Detach":true}`, "", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var got [2]result
			for side, h := range []Host{r.ours, r.theirs} {
				out := h.do(t, request{method: "POST", path: "/v1.41/containers/main/exec", body: tt.create})
				_, body, _ := strings.Cut(out, "\n")
				var created struct{ ID string }
				if err := json.Unmarshal([]byte(body), &created); err != nil || len(created.ID) != 64 {
					t.Fatalf("%s: create: got %q", h.Name, out)
				}
				c, err := h.Dial(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(stepTimeout))
				fmt.Fprintf(c, "POST /v1.41/exec/%s/start HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\n%sContent-Length: %d\r\n\r\n%s",
					created.ID, tt.headers, len(tt.start), tt.start)
				br := bufio.NewReader(c)
				res, err := http.ReadResponse(br, nil)
				if err != nil {
					t.Fatalf("%s: %v", h.Name, err)
				}
				// An answer with a length ends by itself; a stream ends with the connection.
				var from io.Reader = res.Body
				if res.StatusCode == http.StatusSwitchingProtocols {
					from = br
				}
				if tt.input != "" {
					if _, err := io.WriteString(c, tt.input); err != nil {
						t.Fatal(err)
					}
					if err := c.(*net.UnixConn).CloseWrite(); err != nil {
						t.Fatal(err)
					}
				}
				b, err := io.ReadAll(from)
				if err != nil {
					t.Errorf("%s: read stream: %v", h.Name, err)
				}
				text := fmt.Sprintf("%s %s %q %q\n%q\n", res.Proto, res.Status, res.Header.Get("Content-Type"), res.Header.Get("Upgrade"), b)
				text += awaitExec(t, h, created.ID)
				text += h.do(t, request{method: "POST", path: "/v1.41/exec/" + created.ID + "/start", body: `{"Detach":true}`})
				got[side] = result{Stdout: text}.normal()
			}
			if d := cmp.Diff(got[1].Stdout, got[0].Stdout); d != "" {
				t.Errorf("dockerd's answer (-), the pod's (+):\n%s", d)
			}
		})
	}
}

// awaitExec returns an exec's state once it does not run.
func awaitExec(t *testing.T, h Host, id string) string {
	for deadline := time.Now().Add(stepTimeout); ; {
		out := h.do(t, request{method: "GET", path: "/v1.41/exec/" + id + "/json"})
		if strings.Contains(out, `"Running":false`) || time.Now().After(deadline) {
			return regexp.MustCompile(`"Pid":\d+`).ReplaceAllString(sortJSON(t, out), `"Pid":N`)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// sortJSON orders the members of the object behind a status line.
func sortJSON(t *testing.T, answer string) string {
	status, body, _ := strings.Cut(answer, "\n")
	var v map[string]any
	if err := json.Unmarshal([]byte(body), &v); err != nil {
		t.Errorf("%v in %q", err, answer)
		return answer
	}
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return status + "\n" + string(b) + "\n"
}

func (r *tour) webSocket(t *testing.T) {
	var got [2]string
	for side, h := range []Host{r.ours, r.theirs} {
		ctx, cancel := context.WithTimeout(t.Context(), stepTimeout)
		defer cancel()
		c, _, err := websocket.Dial(ctx, "ws://docker/v1.41/containers/lines/attach/ws?logs=1&stdout=1&stderr=1&stream=0",
			&websocket.DialOptions{HTTPClient: h.HTTP(), HTTPHeader: http.Header{"Origin": {"http://docker"}}})
		if err != nil {
			t.Fatalf("%s: %v", h.Name, err)
		}
		c.SetReadLimit(-1)
		var all []byte
		for {
			kind, b, err := c.Read(ctx)
			if err != nil {
				if ctx.Err() != nil {
					t.Errorf("%s: the socket is not closed", h.Name)
				}
				break
			}
			if kind != websocket.MessageBinary {
				t.Errorf("%s: message of kind %v", h.Name, kind)
			}
			all = append(all, b...)
		}
		_ = c.CloseNow()
		got[side] = string(all)
	}
	if d := cmp.Diff(got[1], got[0]); d != "" {
		t.Errorf("dockerd's messages (-), the pod's (+):\n%s", d)
	}
	t.Run("input and output", func(t *testing.T) {
		for _, h := range []Host{r.ours, r.theirs} {
			if res := h.run(t, docker("start", "shell")); res.Code != 0 {
				t.Fatalf("%s: %+v", h.Name, res)
			}
			ctx, cancel := context.WithTimeout(t.Context(), stepTimeout)
			defer cancel()
			c, _, err := websocket.Dial(ctx, "ws://docker/v1.41/containers/shell/attach/ws?stream=1&stdin=1&stdout=1&stderr=1",
				&websocket.DialOptions{HTTPClient: h.HTTP(), HTTPHeader: http.Header{"Origin": {"http://docker"}}})
			if err != nil {
				t.Fatalf("%s: %v", h.Name, err)
			}
			if err := c.Write(ctx, websocket.MessageBinary, []byte("echo w$((2+2))w; exit\r")); err != nil {
				t.Fatal(err)
			}
			var all []byte
			for {
				_, b, err := c.Read(ctx)
				if err != nil {
					break
				}
				all = append(all, b...)
			}
			if !bytes.Contains(all, []byte("w4w\r\n")) {
				t.Errorf("%s: got %q", h.Name, all)
			}
			_ = c.CloseNow()
		}
	})
}

// paths collects the members of a JSON value, arrays merged, "*" for names that are data.
func paths(prefix string, v any, dynamic *regexp.Regexp, out map[string]string) {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			p := prefix + "." + k
			if dynamic.MatchString(prefix) {
				p = prefix + ".*"
			}
			paths(p, e, dynamic, out)
		}
		if len(v) == 0 {
			out[prefix] = "object"
		}
	case []any:
		for _, e := range v {
			paths(prefix+"[]", e, dynamic, out)
		}
		if len(v) == 0 {
			out[prefix] = "array"
		}
	case nil:
		out[prefix] = "null"
	default:
		out[prefix] = fmt.Sprintf("%T", v)
	}
}

// shapes compares the members and their types of every JSON answer, in API 1.41, the version that both speak.
func (r *tour) shapes() {
	// Members whose own members' names are data.
	dynamic := regexp.MustCompile(`(Labels|Networks|Containers|Attributes|IndexConfigs|Runtimes|Options|Data|stats|Details|networks)$`)
	for _, tt := range []struct {
		path     string
		missing  string // pattern of what the pod need not have
		more     string // pattern of what it may have
		retyped  string // pattern of what may be of another type, null for empty and the like
		unstable bool
	}{
		{path: "/containers/json?all=1", missing: ``, more: `^\[\]\.(Mounts\[\]|Ports\[\])`},
		{path: "/containers/json?all=1&size=1"},
		{path: "/containers/main/json", more: `^\.HostConfig\.(CgroupnsMode|Annotations|Init)|^\.Config\.StopSignal`, missing: `^\.HostConfig\.KernelMemory`, retyped: `^\.GraphDriver\.Data|^\.ExecIDs|^\.HostConfig\.(Binds|Dns|CapAdd|Links|.*)$|Networks\.\*`},
		{path: "/containers/shell/json", missing: `^\.HostConfig\.KernelMemory`, more: `^\.HostConfig\.(Annotations|Init)`, retyped: `^\.HostConfig\.|Networks\.\*|^\.GraphDriver\.Data|^\.ExecIDs`},
		{path: "/containers/main/json?size=1", missing: `^\.HostConfig\.KernelMemory`, retyped: `^\.HostConfig\.|Networks\.\*|^\.GraphDriver\.Data|^\.ExecIDs`},
		{path: "/containers/main/top"},
		{path: "/containers/main/changes"},
		{path: "/containers/main/stats?stream=0", missing: `blkio_stats\.|^\.memory_stats|throttling|percpu|\.networks|pids_stats\.limit`, more: `memory_stats|blkio_stats|\.networks`, retyped: `blkio_stats`},
		{path: "/containers/quick/stats?stream=0", retyped: `blkio_stats`, missing: `blkio`},
		{path: "/version", more: `Components|Platform`, missing: `Components|^\.BuildTime$`},
		{path: "/info", missing: `^\.(RegistryConfig|Swarm|ContainerdCommit|RuncCommit|InitCommit|Plugins|KernelMemory|OomKillDisable|HttpProxy|Warnings|SystemTime|BridgeNf|DefaultAddressPools|ClusterStore|ClusterAdvertise|CPUShares|SecurityOptions|Runtimes|DriverStatus)`, more: `.`, retyped: `.`},
		{path: "/images/json", missing: `ParentId`, retyped: `.`, more: `.`},
		{path: "/networks/none", retyped: `.`, missing: `^\.(Containers|ConfigFrom|IPAM)`, more: `.`},
		{path: "/volumes", retyped: `.`},
		{path: "/system/df", retyped: `.`, missing: `^\.(Images|Containers|Volumes|BuildCache)`, more: `.`},
	} {
		r.Run("shape of "+tt.path, func(t *testing.T) {
			var got [2]map[string]string
			for side, h := range []Host{r.ours, r.theirs} {
				_, body, _ := strings.Cut(h.do(t, request{method: "GET", path: "/v1.41" + tt.path}), "\n")
				var v any
				if err := json.Unmarshal([]byte(body), &v); err != nil {
					t.Fatalf("%s: %v in %q", h.Name, err, body)
				}
				got[side] = map[string]string{}
				paths("", v, dynamic, got[side])
			}
			allowed := func(pattern, path string) bool {
				return pattern != "" && regexp.MustCompile(pattern).MatchString(path)
			}
			var problems []string
			for p, kind := range got[1] {
				ours, ok := got[0][p]
				switch {
				case !ok && !allowed(tt.missing, p) && !beginsWith(got[0], p):
					problems = append(problems, "missing: "+p+" "+kind)
				case ok && ours != kind && !allowed(tt.retyped, p):
					problems = append(problems, "another type: "+p+" "+kind+", the pod "+ours)
				}
			}
			for p, kind := range got[0] {
				if _, ok := got[1][p]; !ok && !allowed(tt.more, p) && !beginsWith(got[1], p) {
					problems = append(problems, "more: "+p+" "+kind)
				}
			}
			sort.Strings(problems)
			if len(problems) > 0 {
				t.Errorf("differs from dockerd's answer:\n%s", strings.Join(problems, "\n"))
			}
		})
	}
}

// beginsWith reports whether a member stands there in another size: p is a member of an empty object or array, or the
// other way round.
func beginsWith(all map[string]string, p string) bool {
	for q, kind := range all {
		if strings.HasPrefix(q, p+".") || strings.HasPrefix(q, p+"[]") {
			return true
		}
		if (kind == "null" || kind == "object" || kind == "array") && (strings.HasPrefix(p, q+".") || strings.HasPrefix(p, q+"[]")) {
			return true
		}
	}
	return false
}

// recorder keeps what docker events says from the start of the tour to its end.
type recorder struct {
	host  Host
	lines chan string
	stop  context.CancelFunc
	err   error // set before lines is closed
}

// record starts docker events. It need not have subscribed when record returns: the first steps cause no events.
func record(t *testing.T, h Host) *recorder {
	ctx, stop := context.WithCancel(t.Context())
	cmd := h.Docker(ctx, "events", "--filter", "type=container", "--format", `{{.Actor.Attributes.name}} {{.Type}} {{.Action}} {{json .Actor.Attributes}}`)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	rec := &recorder{host: h, lines: make(chan string, 1<<14), stop: stop}
	go func() {
		defer close(rec.lines)
		s := bufio.NewScanner(out)
		s.Buffer(nil, 1<<20)
		for s.Scan() {
			rec.lines <- s.Text()
		}
		rec.err = cmd.Wait()
	}()
	t.Cleanup(func() {
		stop()
		for range rec.lines {
		}
	})
	return rec
}

// until returns what was said, by container, up to the event that a call causes.
func (rec *recorder) until(t *testing.T, mark string, c call) map[string][]string {
	if res := rec.host.run(t, c); res.Code != 0 {
		t.Fatalf("%s: %+v", rec.host.Name, res)
	}
	out := map[string][]string{}
	timeout := time.After(stepTimeout)
	for {
		select {
		case line, ok := <-rec.lines:
			if !ok {
				t.Fatalf("%s: docker events has ended: %v", rec.host.Name, rec.err)
			}
			if strings.Contains(line, mark) {
				return out
			}
			name, what, _ := strings.Cut(result{Stdout: line}.normal().Stdout, " ")
			out[name] = append(out[name], what)
		case <-timeout:
			t.Fatalf("%s: docker events does not tell of %q", rec.host.Name, mark)
		}
	}
}

// settleKilled gives an exec that its container took with it its right code, 137, where a dockerd 20.10 lost a race with
// itself and told of 126: only in dockerd's lines, and only as often as the other side has 137 and dockerd has not.
func settleKilled(dockerd, other []string) {
	count := func(lines []string, want string) (n int) {
		for _, l := range lines {
			if l == want {
				n++
			}
		}
		return n
	}
	for i, line := range dockerd {
		killed := strings.Replace(line, `"exitCode":12N`, `"exitCode":"137"`, 1)
		if killed != line && strings.HasPrefix(line, "container exec_die ") &&
			count(other, killed) > count(dockerd, killed) && count(dockerd, line) > count(other, line) {
			dockerd[i] = killed
		}
	}
}

// events compares what was told of the whole tour.
func (r *tour) events(recorders [2]*recorder) {
	const mark = "the end of the tour"
	r.Run("events", func(t *testing.T) {
		var told [2]map[string][]string
		for side, rec := range recorders {
			told[side] = rec.until(t, mark, docker("exec", "readonly", "echo", mark))
		}
		for _, c := range containers() {
			if c.Name == "readonly" {
				continue // it is used on one side alone
			}
			t.Run(c.Name, func(t *testing.T) {
				var ordered, all [2][]string
				for side, events := range told {
					for _, line := range events[c.Name] {
						_, action, _ := strings.Cut(line, " ")
						if strings.HasPrefix(action, "resize") {
							continue // how often a client says its size is its own affair
						}
						all[side] = append(all[side], line)
						if !strings.HasPrefix(action, "exec_") {
							ordered[side] = append(ordered[side], line)
						}
					}
				}
				for side, rec := range recorders {
					if !rec.host.Pod {
						settleKilled(all[side], all[1-side])
					}
				}
				for side := range all { // the end of an exec may be told after the start of the next
					slices.Sort(all[side])
				}
				if d := cmp.Diff(ordered[1], ordered[0]); d != "" {
					t.Errorf("dockerd's events (-), the pod's (+):\n%s", d)
				}
				if d := cmp.Diff(all[1], all[0]); d != "" {
					t.Errorf("dockerd's events with execs, sorted (-), the pod's (+):\n%s", d)
				}
			})
		}
	})
	r.Run("events of the past", func(t *testing.T) {
		// By each host's own clock: that of a machine without hardware virtualization may be behind.
		clock := func(h Host) string {
			return strings.TrimSpace(h.run(t, docker("info", "--format", "{{.SystemTime}}")).Stdout)
		}
		var told [2][]result
		for side, h := range []Host{r.ours, r.theirs} {
			since := clock(h)
			for _, verb := range []string{"pause", "unpause"} {
				if res := h.run(t, docker(verb, "main")); res.Code != 0 {
					t.Fatalf("%s: %s: %+v", h.Name, verb, res)
				}
			}
			until := clock(h)
			for _, filters := range []string{
				"event=pause container=main", "event=unpause label=tour=yes", "event=pause label=tour=no", "event=pause image=tour",
				"event=pause type=image", "event=pause container=idle", "event=pause event=unpause scope=local",
			} {
				args := []string{"events", "--since", since, "--until", until, "--format", `{{.Type}} {{.Action}} {{json .Actor.Attributes}}`}
				for _, f := range strings.Fields(filters) {
					args = append(args, "--filter", f)
				}
				res := h.run(t, docker(args...)).normal()
				res.Stdout = filters + ": " + res.Stdout
				told[side] = append(told[side], res)
			}
		}
		if d := cmp.Diff(told[1], told[0]); d != "" {
			t.Errorf("dockerd's answer (-), the pod's (+):\n%s", d)
		}
		if !strings.Contains(told[0][0].Stdout, "container pause") {
			t.Errorf("the pause is not told: %+v", told[0][0])
		}
	})
}
