package daemon

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/moby/moby/api/types/events"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/image"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/spec"
)

// house is a daemon whose machines are this test's: what says to be a supervisor is, what answers inside is a handler.
type house struct {
	t      *testing.T
	root   string
	socket string
	d      *Daemon

	mu    sync.Mutex
	guest func(c *fakeMachine) http.Handler // of the next machines
	live  map[string]*fakeMachine           // by the bundle's directory
}

// fakeMachine is a supervisor without a machine.
type fakeMachine struct {
	b     *bundle.Bundle
	lock  *bundle.Lock
	ended chan struct{}
	once  sync.Once
	close []func()

	mu    sync.Mutex
	state bundle.State
	news  chan struct{}
}

// openHouse is a daemon with the image "tiny" and guests that behave.
func openHouse(t *testing.T) *house {
	t.Helper()
	need.Command(t, "mkfs.ext4", "apt-get install e2fsprogs")
	h := &house{t: t, root: t.TempDir(), guest: obedient, live: map[string]*fakeMachine{}}
	h.open()
	t.Cleanup(func() {
		h.d.Close()
		h.mu.Lock()
		defer h.mu.Unlock()
		for _, m := range h.live {
			m.end(bundle.End{Reason: bundle.EndStopped})
		}
	})
	if status, body := h.call("POST", "/images/load", "", tinyImage(t)); status != http.StatusOK || !strings.Contains(body, "Loaded image") {
		t.Fatalf("load: %d %s", status, body)
	}
	return h
}

// open opens the daemon and serves it on a socket of its own.
func (h *house) open() {
	h.t.Helper()
	log := slog.New(slog.DiscardHandler)
	store, err := image.Open(h.root, log)
	if err != nil {
		h.t.Fatal(err)
	}
	h.d, err = Open(h.t.Context(), Config{Root: h.root, Store: store, Packages: h.root, Version: "test", Log: log, Launch: h.launch})
	if err != nil {
		h.t.Fatal(err)
	}
	h.socket = filepath.Join(h.t.TempDir(), "s")
	l, err := net.Listen("unix", h.socket)
	if err != nil {
		h.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	d := h.d
	go func() { served <- d.Serve(ctx, l) }()
	h.t.Cleanup(func() {
		cancel()
		if err := <-served; err != nil {
			h.t.Error(err)
		}
	})
}

func (h *house) launch(_ context.Context, dir string, _ LaunchOptions) error {
	b, err := bundle.Open(dir)
	if err != nil {
		return err
	}
	m := &fakeMachine{b: b, ended: make(chan struct{}), news: make(chan struct{})}
	if m.lock, err = b.Lock(); err != nil {
		return err
	}
	m.state = bundle.State{Version: bundle.Version, Phase: bundle.PhaseRunning, Pid: os.Getpid(), Started: time.Now().UTC(),
		Containers: []spec.State{{Container: b.Pod.Containers[0].Name, Status: spec.StatusCreated}}}
	if err := b.SetState(m.state); err != nil {
		return err
	}
	inside, err := b.Listen(bundle.VdockerSocket)
	if err != nil {
		return err
	}
	control, err := b.Listen(bundle.ControlSocket)
	if err != nil {
		return err
	}
	h.mu.Lock()
	srv := &http.Server{Handler: h.guest(m), ErrorLog: slog.NewLogLogger(slog.DiscardHandler, slog.LevelDebug)}
	h.live[dir] = m
	h.mu.Unlock()
	m.close = append(m.close, func() { srv.Close() }, func() { inside.Close() }, func() { control.Close() })
	go srv.Serve(inside)
	go func() {
		for {
			c, err := control.Accept()
			if err != nil {
				return
			}
			go m.serve(c)
		}
	}()
	return nil
}

// serve is the supervisor's control socket.
func (m *fakeMachine) serve(c net.Conn) {
	defer c.Close()
	kind, _, err := spec.ReadFrame(c, nil)
	if err != nil {
		return
	}
	switch kind {
	case spec.FrameStop:
		go m.end(bundle.End{Reason: bundle.EndStopped, ExitCode: 137})
		<-m.ended
	case spec.FrameWatch:
		for {
			m.mu.Lock()
			raw, _ := json.Marshal(m.state)
			news := m.news
			m.mu.Unlock()
			if spec.WriteFrame(c, spec.FrameReport, raw) != nil {
				return
			}
			select {
			case <-news:
			case <-m.ended:
				return
			}
		}
	}
}

// set changes what the supervisor says of its container.
func (m *fakeMachine) set(f func(*spec.State)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	list := []spec.State{m.state.Containers[0]}
	f(&list[0])
	m.state.Containers = list
	close(m.news)
	m.news = make(chan struct{})
	_ = m.b.SetState(m.state)
}

func (m *fakeMachine) end(how bundle.End) {
	m.once.Do(func() {
		how.Time = time.Now().UTC()
		m.mu.Lock()
		c := &m.state.Containers[0]
		if c.Status == spec.StatusRunning {
			c.Status, c.ExitCode, c.Finished = spec.StatusExited, 137, time.Now().UTC()
		}
		m.state.Phase, m.state.End, m.state.Pid = bundle.PhaseEnded, &how, 0
		_ = m.b.SetState(m.state)
		m.mu.Unlock()
		_ = m.lock.Unlock() // who hears of the end finds the bundle free
		close(m.ended)
		for _, f := range m.close {
			f()
		}
	})
}

// obedient is a guest whose container runs once it is started, and ends when it is killed.
func obedient(m *fakeMachine) http.Handler {
	ended := make(chan struct{})
	var once sync.Once
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case strings.HasSuffix(r.URL.Path, "/events"):
			w.WriteHeader(http.StatusOK)
			_ = http.NewResponseController(w).Flush()
			select {
			case <-ended:
				_ = json.NewEncoder(w).Encode(events.Message{Type: events.ContainerEventType, Action: events.ActionDie,
					Actor: events.Actor{Attributes: map[string]string{"exitCode": "137"}}, TimeNano: time.Now().UnixNano()})
				_ = http.NewResponseController(w).Flush()
				<-r.Context().Done()
			case <-r.Context().Done():
			}
		case strings.HasSuffix(r.URL.Path, "/start"):
			m.set(func(s *spec.State) { s.Status, s.Started, s.Pid = spec.StatusRunning, time.Now().UTC(), 1 })
			w.WriteHeader(http.StatusNoContent)
		case strings.HasSuffix(r.URL.Path, "/kill"), strings.HasSuffix(r.URL.Path, "/stop"):
			w.WriteHeader(http.StatusNoContent)
			m.set(func(s *spec.State) {
				s.Status, s.ExitCode, s.Finished, s.Pid = spec.StatusExited, 137, time.Now().UTC(), 0
			})
			once.Do(func() { close(ended) })
		default:
			http.NotFound(w, r)
		}
	})
}

// call asks the daemon and returns the status and the whole body.
func (h *house) call(method, path, kind string, body []byte) (int, string) {
	status, out, err := h.try(method, path, kind, body)
	if err != nil {
		h.t.Errorf("%s %s: %v", method, path, err)
	}
	return status, out
}

func (h *house) try(method, path, kind string, body []byte) (int, string, error) {
	socket := h.socket
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}
	req, err := http.NewRequest(method, "http://d"+path, bytes.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	if kind != "" {
		req.Header.Set("Content-Type", kind)
	}
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(out), err
}

// want is a call whose status is known.
func (h *house) want(status int, method, path, body string) string {
	h.t.Helper()
	got, out := h.call(method, path, "application/json", []byte(body))
	if got != status {
		h.t.Errorf("%s %s: got %d %s, want %d", method, path, got, strings.TrimSpace(out), status)
	}
	return out
}

// run makes a container and starts it.
func (h *house) run(name, more string) {
	h.t.Helper()
	h.want(http.StatusCreated, "POST", "/containers/create?name="+name, `{"Image":"tiny","Cmd":["x"],"HostConfig":{"NetworkMode":"none"`+more+`}}`)
	h.want(http.StatusNoContent, "POST", "/containers/"+name+"/start", "")
}

// behave says how the guests of the next machines are.
func (h *house) behave(guest func(*fakeMachine) http.Handler) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.guest = guest
}

// tinyImage is an archive as docker save writes it, of an image with one file.
func tinyImage(t testing.TB) []byte {
	t.Helper()
	files := func(list ...any) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for i := 0; i < len(list); i += 2 {
			content := list[i+1].([]byte)
			if err := w.WriteHeader(&tar.Header{Name: list[i].(string), Mode: 0o755, Size: int64(len(content))}); err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(content); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	layer := files("x", []byte("program"))
	config := fmt.Appendf(nil, `{"architecture":"amd64","os":"linux","config":{"Cmd":["/x"]},"rootfs":{"type":"layers","diff_ids":["sha256:%x"]}}`, sha256.Sum256(layer))
	return files("config.json", config, "layer.tar", layer, "manifest.json", []byte(`[{"Config":"config.json","RepoTags":["tiny:latest"],"Layers":["layer.tar"]}]`))
}

// deafTo is an obedient guest that never answers what ends in one of these.
func deafTo(paths ...string) func(*fakeMachine) http.Handler {
	return func(m *fakeMachine) http.Handler {
		good := obedient(m)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			for _, p := range paths {
				if strings.HasSuffix(r.URL.Path, p) {
					<-r.Context().Done()
					panic(http.ErrAbortHandler)
				}
			}
			good.ServeHTTP(w, r)
		})
	}
}

// hurry gives machines little time.
func (h *house) hurry() {
	h.d.bounds = bounds{200 * time.Millisecond, time.Second, 200 * time.Millisecond}
}

// A guest that never answers holds up whoever asks for it, for a while, and nobody else; it can be ended.
func TestDeafGuest(t *testing.T) {
	h := openHouse(t)
	h.hurry()
	for _, tc := range []struct {
		name, deaf   string
		status       int // of the call
		method, path string
		body         string
		want         string
	}{
		{"stop", "/stop", 204, "POST", "/stop?t=0", "", ""},
		{"kill", "/kill", 204, "POST", "/kill", "", ""},
		{"a signal", "/kill", 500, "POST", "/kill?signal=HUP", "", "has not answered"},
		{"pause", "/pause", 500, "POST", "/pause", "", "has not answered"},
		{"exec", "/exec", 500, "POST", "/exec", `{"Cmd":["x"]}`, "has not answered"},
		{"update", "/update", 500, "POST", "/update", `{"Memory":67108864,"MemorySwap":67108864}`, "has not answered"},
		{"rm -f", "/kill", 204, "DELETE", "?force=1", "", ""},
		{"restart", "/stop", 204, "POST", "/restart?t=0", "", ""},
	} {
		h.behave(deafTo(tc.deaf))
		h.run("deaf", "")
		out := h.want(tc.status, tc.method, "/containers/deaf"+tc.path, tc.body)
		if !strings.Contains(out, tc.want) {
			t.Errorf("%s: got %s, want %q in it", tc.name, out, tc.want)
		}
		h.want(200, "GET", "/containers/json?all=1", "")
		if status, out := h.call("DELETE", "/containers/deaf?force=1", "", nil); status != 204 && status != 404 {
			t.Errorf("%s: rm -f: status %d %s", tc.name, status, out)
		}
	}

	// One that does not even let itself be started, or listened to.
	for _, deaf := range []string{"/start", "/events"} {
		h.behave(deafTo(deaf))
		h.want(201, "POST", "/containers/create?name=deaf", `{"Image":"tiny","HostConfig":{"NetworkMode":"none"}}`)
		h.want(500, "POST", "/containers/deaf/start", "")
		h.want(204, "DELETE", "/containers/deaf", "") // its machine has gone
	}

	// An exec that nobody knows is asked for everywhere.
	h.behave(deafTo("/json"))
	h.run("deaf", "")
	h.want(404, "GET", "/exec/"+strings.Repeat("0", 64)+"/json", "")
	h.want(204, "DELETE", "/containers/deaf?force=1", "")
}

// A daemon that starts beside a machine which does not answer serves all the same, and can end it.
func TestDeafGuestTakenUp(t *testing.T) {
	h := openHouse(t)
	h.run("deaf", "")
	h.d.Close()
	h.mu.Lock()
	m := h.live[h.d.all()[0].b.Dir]
	h.mu.Unlock()
	// The guest goes silent, the supervisor does not.
	if err := os.Remove(filepath.Join(m.b.RunDir(), bundle.VdockerSocket)); err != nil {
		t.Fatal(err)
	}
	l, err := m.b.Listen(bundle.VdockerSocket) // accepts, and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h.open()
	h.hurry()
	if out := h.want(200, "GET", "/containers/json", ""); !strings.Contains(out, `"/deaf"`) {
		t.Errorf("ps: got %s", out)
	}
	h.want(204, "DELETE", "/containers/deaf?force=1", "")
}

// A daemon that is killed between the start of a machine and that of its container leaves a machine that nobody wants.
func TestHalfStartedTakenUp(t *testing.T) {
	h := openHouse(t)
	h.want(201, "POST", "/containers/create?name=half", `{"Image":"tiny","HostConfig":{"NetworkMode":"none"}}`)
	h.run("runs", "")
	h.run("over", "")
	over, err := h.d.find("over")
	if err != nil {
		t.Fatal(err)
	}
	half, err := h.d.find("half")
	if err != nil {
		t.Fatal(err)
	}
	if err := h.d.cfg.Launch(t.Context(), half.b.Dir, LaunchOptions{}); err != nil {
		t.Fatal(err)
	}
	h.mu.Lock()
	m, n := h.live[half.b.Dir], h.live[over.b.Dir]
	h.mu.Unlock()
	h.d.Close()
	n.set(func(s *spec.State) {
		s.Status, s.ExitCode, s.Finished, s.Pid = spec.StatusExited, 3, time.Now().UTC(), 0
	}) // and its machine waits
	h.open()
	<-m.ended
	<-n.ended
	if out := h.want(200, "GET", "/containers/json", ""); !strings.Contains(out, `"/runs"`) || strings.Contains(out, `"/half"`) || strings.Contains(out, `"/over"`) {
		t.Errorf("ps: got %s", out)
	}
	h.want(204, "POST", "/containers/half/start", "")
}

// A guest that answers with garbage.
func TestGarbage(t *testing.T) {
	for name, answer := range map[string]string{
		"no HTTP":     "\x00\xff\xfe garbage\r\n\r\n",
		"no JSON":     "HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\ngarbage",
		"odd JSON":    "HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n" + `[{"Type":["a"]},1234]`[:20],
		"cut short":   "HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{",
		"a redirect":  "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
		"odd status":  "HTTP/1.1 999 \r\nContent-Length: 0\r\n\r\n",
		"a long line": "HTTP/1.1 200 OK\r\nX: " + strings.Repeat("x", 8<<20),
	} {
		t.Run(name, func(t *testing.T) {
			h := openHouse(t)
			h.behave(func(m *fakeMachine) http.Handler {
				good := obedient(m)
				return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					if strings.HasSuffix(r.URL.Path, "/events") || strings.HasSuffix(r.URL.Path, "/start") {
						good.ServeHTTP(w, r)
						return
					}
					conn, _, err := http.NewResponseController(w).Hijack()
					if err != nil {
						return
					}
					io.WriteString(conn, answer)
					conn.Close()
				})
			})
			h.run("odd", "")
			h.hurry()
			for _, c := range []struct{ method, path, body string }{
				{"POST", "/exec", `{"Cmd":["x"]}`}, {"GET", "/json", ""}, {"GET", "/top", ""}, {"GET", "/stats?stream=0", ""},
				{"GET", "/logs?stdout=1", ""}, {"GET", "/archive?path=/", ""}, {"POST", "/pause", ""}, {"POST", "/kill?signal=HUP", ""},
			} {
				_, _, _ = h.try(c.method, "/containers/odd"+c.path, "application/json", []byte(c.body)) // whatever comes
			}
			if out := h.want(200, "GET", "/containers/json", ""); !strings.Contains(out, `"/odd"`) {
				t.Errorf("ps: got %s", out)
			}
			h.want(204, "DELETE", "/containers/odd?force=1", "")
		})
	}
}

// One event without an end does not fill the daemon's memory, and the container's end is known all the same.
func TestEndlessEvent(t *testing.T) {
	h := openHouse(t)
	sent := make(chan int64, 1)
	h.behave(func(m *fakeMachine) http.Handler {
		good := obedient(m)
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if !strings.HasSuffix(r.URL.Path, "/events") {
				good.ServeHTTP(w, r)
				return
			}
			var n int64
			_, err := io.WriteString(w, `{"Action":"`)
			for piece := strings.Repeat("x", 64<<10); err == nil && n < 64*maxEvent; n += int64(len(piece)) {
				_, err = io.WriteString(w, piece)
			}
			sent <- n
		})
	})
	h.run("long", "")
	if n := <-sent; n >= 64*maxEvent {
		t.Errorf("the daemon has read %d bytes of one event", n)
	}
	h.want(204, "POST", "/containers/long/kill", "")
	h.want(204, "DELETE", "/containers/long?force=1", "")
}

// 200 containers are made, and removed, at one time.
func TestManyAtOnce(t *testing.T) {
	h := openHouse(t)
	const n = 200
	all := func(f func(i int) error) {
		t.Helper()
		errs := make([]error, n)
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { errs[i] = f(i) })
		}
		wg.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(status int, method, path, body string) error {
		got, out, err := h.try(method, path, "application/json", []byte(body))
		if err == nil && got != status {
			err = fmt.Errorf("%s %s: got %d %s, want %d", method, path, got, out, status)
		}
		return err
	}
	all(func(i int) error {
		return expect(201, "POST", fmt.Sprintf("/containers/create?name=n%d", i), `{"Image":"tiny","Volumes":{"/v":{}}}`)
	})
	if got := strings.Count(h.want(200, "GET", "/containers/json?all=1", ""), `"Id"`); got != n {
		t.Errorf("ps -a: got %d containers, want %d", got, n)
	}
	all(func(i int) error { // half of them are asked for twice, at once
		status := 204
		if i%2 == 1 {
			i--
		}
		got, out, err := h.try("DELETE", fmt.Sprintf("/containers/n%d?v=1", i), "", nil)
		if err == nil && got != status && got != 404 && got != 409 {
			err = fmt.Errorf("rm n%d: got %d %s", i, got, out)
		}
		return err
	})
	all(func(i int) error {
		if i%2 == 0 {
			return nil
		}
		return expect(204, "DELETE", fmt.Sprintf("/containers/n%d?v=1", i), "")
	})

	// One name, 200 wishes: one is granted.
	var mu sync.Mutex
	got := map[int]int{}
	all(func(int) error {
		status, _, err := h.try("POST", "/containers/create?name=one", "application/json", []byte(`{"Image":"tiny"}`))
		mu.Lock()
		defer mu.Unlock()
		got[status]++
		return err
	})
	if got[201] != 1 || got[409] != n-1 {
		t.Errorf("%d wishes for one name: got %v", n, got)
	}
	h.want(204, "DELETE", "/containers/one", "")
	for _, dir := range []string{containersDir, volumesDir} {
		left, err := os.ReadDir(filepath.Join(h.root, dir))
		if err != nil || len(left) > 0 {
			t.Errorf("%s: left behind %v, %v", dir, left, err)
		}
	}
	if out := h.want(200, "DELETE", "/images/tiny", ""); !strings.Contains(out, "Deleted") { // no lease keeps it
		t.Errorf("rmi: got %s", out)
	}
}

// The clock jumps: what has happened is still told by its time, also when that is no order any more.
func TestEventsClockJumps(t *testing.T) {
	b := newBus()
	at := func(sec int64, name string) events.Message {
		return events.Message{Type: events.ContainerEventType, Action: "start", Actor: events.Actor{ID: name}, TimeNano: sec * 1e9}
	}
	for _, m := range []events.Message{at(100, "a"), at(5000, "forward"), at(50, "back"), at(101, "b")} {
		b.publish(m)
	}
	past, live, cancel := b.listen(time.Unix(100, 0))
	defer cancel()
	var got []string
	for _, m := range past {
		got = append(got, m.Actor.ID)
	}
	if s := strings.Join(got, " "); s != "a forward b" {
		t.Errorf("since 100: got %q", s)
	}
	b.publish(at(1, "old")) // what comes now is told whatever time it bears
	if m := <-live; m.Actor.ID != "old" {
		t.Errorf("live: got %q", m.Actor.ID)
	}
	if _, err := dockerapi.ParseTime("9999999999999999999", time.Now()); dockerapi.Status(err) != 400 {
		t.Errorf("a time beyond all: got %v", err)
	}
}
