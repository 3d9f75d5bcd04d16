package dockerapi

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
)

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

func testAPI(routes ...Route) http.Handler {
	return New(Config{Engine: "1.2.3", Log: quiet()}, routes)
}

func TestRoutes(t *testing.T) {
	echo := func(w http.ResponseWriter, r *Request) error {
		_, err := fmt.Fprintf(w, "%s %s %s", r.Version, r.Var("id"), r.Var("name"))
		return err
	}
	h := testAPI(
		Route{Method: "GET", Path: "/_ping", Handle: echo},
		Route{Method: "GET", Path: "/containers/json", Handle: echo},
		Route{Method: "GET", Path: "/containers/{id}/json", Handle: echo},
		Route{Method: "GET", Path: "/images/{name+}/json", Handle: echo},
		Route{Method: "DELETE", Path: "/images/{name+}", Handle: echo},
		Route{Method: "GET", Path: "/later", Handle: echo, Since: 44},
		Route{Method: "GET", Path: "/panic", Handle: func(http.ResponseWriter, *Request) error { panic("at the disco") }},
		Route{Method: "GET", Path: "/fail", Handle: func(http.ResponseWriter, *Request) error { return errors.New("<broken>") }},
		Route{Method: "GET", Path: "/same", Handle: func(http.ResponseWriter, *Request) error { return fmt.Errorf("start: %w", ErrNotModified) }},
	)
	for _, tt := range []struct {
		method, path string
		status       int
		want         string
	}{
		{"GET", "/_ping", 200, "1.50  "},
		{"GET", "/v1.41/_ping", 200, "1.41  "},
		{"GET", "/v1.50/containers/json", 200, "1.50  "},
		{"GET", "/v1.44/containers/web/json", 200, "1.44 web "},
		{"GET", "/v1.44/containers//web/json", 200, "1.44 web "},
		{"GET", "/images/host:5000/a/b:c/json", 200, "1.50  host:5000/a/b:c"},
		{"DELETE", "/images/a/b", 200, "1.50  a/b"},
		{"HEAD", "/_ping", 404, ""},
		{"POST", "/_ping", 404, `{"message":"page not found"}`},
		{"GET", "/images/json", 404, `{"message":"page not found"}`},
		{"GET", "/", 404, `{"message":"page not found"}`},
		{"GET", "/v1.41", 404, `{"message":"page not found"}`},
		{"GET", "/v1.41/later", 404, `{"message":"page not found"}`},
		{"GET", "/v1.44/later", 200, "1.44  "},
		{"GET", "/volumes-are-not-v1", 404, `{"message":"page not found"}`},
		{"GET", "/v1/_ping", 404, `{"message":"page not found"}`},
		{"GET", "/v1.x/_ping", 404, `{"message":"page not found"}`},
		{"GET", "/v1.40/_ping", 400, `{"message":"client version 1.40 is too old. Minimum supported API version is 1.41, please upgrade your client to a newer version"}`},
		{"GET", "/v0.50/_ping", 400, `{"message":"client version 0.50 is too old. Minimum supported API version is 1.41, please upgrade your client to a newer version"}`},
		{"GET", "/v1.51/_ping", 400, `{"message":"client version 1.51 is too new. Maximum supported API version is 1.50"}`},
		{"GET", "/v2.0/_ping", 400, `{"message":"client version 2.0 is too new. Maximum supported API version is 1.50"}`},
		{"GET", "/panic", 500, `{"message":"internal error: at the disco"}`},
		{"GET", "/fail", 500, `{"message":"<broken>"}`},
		{"GET", "/same", 304, ""},
	} {
		t.Run(tt.method+" "+tt.path, func(t *testing.T) {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest(tt.method, tt.path, nil))
			got := strings.TrimSuffix(w.Body.String(), "\n")
			if tt.method == "HEAD" {
				got = ""
			}
			if w.Code != tt.status || got != tt.want {
				t.Errorf("got %d %q, want %d %q", w.Code, got, tt.status, tt.want)
			}
			if got := w.Header().Get("Api-Version") + " " + w.Header().Get("Server"); got != "1.50 Docker/1.2.3 (linux)" {
				t.Errorf("Api-Version and Server: got %q", got)
			}
		})
	}
}

func TestReadJSON(t *testing.T) {
	for _, tt := range []struct {
		name, media, body string
		optional          bool
		status            int
		want              string
	}{
		{"object", "application/json", `{"A":"x"}` + "\n", false, 0, "x"},
		{"charset", "Application/JSON; charset=utf-8", `{"A":"x"}`, false, 0, "x"},
		{"no type", "", `{"A":"x"}`, false, 0, "x"},
		{"empty, optional", "", "", true, 0, ""},
		{"empty", "", " ", false, 400, "invalid JSON: got EOF while reading request body"},
		{"cut off", "", `{"A":`, false, 400, "invalid JSON: got EOF while reading request body"},
		{"two", "", `{"A":"x"} {}`, false, 400, "unexpected content after JSON"},
		{"rest", "", `{"A":"x"}]`, false, 400, "unexpected content after JSON"},
		{"other type", "text/plain", `{}`, false, 400, "unsupported Content-Type header (text/plain): must be 'application/json'"},
		{"wrong kind", "", `{"A":1}`, false, 400, "invalid JSON: json: cannot unmarshal number"},
		{"huge", "", strings.Repeat(" ", MaxBody+1), true, 413, "too large"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := httptest.NewRequest("POST", "/", strings.NewReader(tt.body))
			r.Header.Set("Content-Type", tt.media)
			var v struct{ A string }
			err := ReadJSON(&Request{Request: r}, &v, tt.optional)
			if tt.status == 0 {
				if err != nil || v.A != tt.want {
					t.Errorf("got %q %v, want %q", v.A, err, tt.want)
				}
				return
			}
			if err == nil || Status(err) != tt.status || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v (status %d), want %q (%d)", err, Status(err), tt.want, tt.status)
			}
		})
	}
}

func TestFilters(t *testing.T) {
	for _, tt := range []struct {
		name, in string
		want     Filters
		err      string
	}{
		{"none", "", Filters{}, ""},
		{"sets", `{"name":{"b":true,"a":true,"c":false},"label":{}}`, Filters{"name": {"a", "b"}}, ""},
		{"lists", `{"name":["b","a"]}`, Filters{"name": {"b", "a"}}, ""},
		{"null", `null`, Filters{}, ""},
		{"unknown", `{"nom":{"a":true}}`, nil, "invalid filter 'nom'"},
		{"no JSON", `name=a`, nil, "invalid filter"},
		{"no map", `["name"]`, nil, "invalid filter"},
		{"huge", strings.Repeat("x", maxFilters+1), nil, "more than the limit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := ParseFilters(tt.in, "name", "label")
			if tt.err != "" {
				if err == nil || Status(err) != 400 || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got %v, want 400 with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("filters (-want +got):\n%s", d)
			}
		})
	}
	f := Filters{"name": {"^we"}, "id": {"abc"}, "label": {"a=1", "b"}}
	for _, tt := range []struct {
		name string
		got  bool
		want bool
	}{
		{"expression", f.Match("name", "web"), true},
		{"expression elsewhere", f.Match("name", "awe"), false},
		{"prefix", f.Prefix("id", "abcdef"), true},
		{"no prefix", f.Prefix("id", "xabc"), false},
		{"exact", f.Exact("id", "abcd"), false},
		{"not asked", f.Exact("status", "running"), true},
		{"labels", f.Labels("label", map[string]string{"a": "1", "b": "x"}), true},
		{"label's value", f.Labels("label", map[string]string{"a": "2", "b": "x"}), false},
		{"label missing", f.Labels("label", map[string]string{"a": "1"}), false},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: got %t", tt.name, tt.got)
		}
	}
}

func TestParseTime(t *testing.T) {
	now := time.Date(2026, 3, 4, 5, 6, 7, 8, time.UTC)
	for _, tt := range []struct {
		in   string
		want time.Time
	}{
		{"", time.Time{}},
		{"0", time.Time{}},
		{"-62135596800.000000000", time.Time{}},
		{"1136073845", time.Unix(1136073845, 0)},
		{"1136073845.5", time.Unix(1136073845, 500000000)},
		{"1136073845.000000001", time.Unix(1136073845, 1)},
		{"10m", now.Add(-10 * time.Minute)},
		{"1h30m", now.Add(-90 * time.Minute)},
		{"2006-01-02T15:04:05.999999999Z", time.Date(2006, 1, 2, 15, 4, 5, 999999999, time.UTC)},
		{"2006-01-02T15:04:05+02:00", time.Date(2006, 1, 2, 13, 4, 5, 0, time.UTC)},
		{"2006-01-02T15:04", time.Date(2006, 1, 2, 15, 4, 0, 0, time.UTC)},
		{"2006-01-02", time.Date(2006, 1, 2, 0, 0, 0, 0, time.UTC)},
	} {
		got, err := ParseTime(tt.in, now)
		if err != nil || !got.Equal(tt.want) {
			t.Errorf("ParseTime(%q): got %v %v, want %v", tt.in, got, err, tt.want)
		}
	}
	for _, in := range []string{"tomorrow", "1.", "1.0000000001", "9223372036854775807", "1.-5", strings.Repeat("1", 65)} {
		if got, err := ParseTime(in, now); err == nil || Status(err) != 400 {
			t.Errorf("ParseTime(%q): got %v %v, want status 400", in, got, err)
		}
	}
}

func TestDetachKeys(t *testing.T) {
	for in, want := range map[string]string{"": "\x10\x11", "ctrl-a": "\x01", "a,ctrl-b,DEL": "a\x02\x7f"} {
		got, err := DetachKeys(in)
		if err != nil || string(got) != want {
			t.Errorf("DetachKeys(%q): got %q %v, want %q", in, got, err, want)
		}
	}
	if _, err := DetachKeys("ctrl-ü"); err == nil || err.Error() != "invalid escape keys (ctrl-ü) provided" || Status(err) != 400 {
		t.Errorf("DetachKeys of nonsense: got %v", err)
	}
}

func TestFrames(t *testing.T) {
	var b strings.Builder
	w := NewFrameWriter(&b)
	for _, f := range []struct {
		stream byte
		text   string
	}{{Stdout, "out"}, {Stderr, ""}, {Stderr, "err\x00"}} {
		if err := w.WriteFrame(f.stream, []byte(f.text)); err != nil {
			t.Fatal(err)
		}
	}
	want := "\x01\x00\x00\x00\x00\x00\x00\x03out" + "\x02\x00\x00\x00\x00\x00\x00\x00" + "\x02\x00\x00\x00\x00\x00\x00\x04err\x00"
	if d := cmp.Diff(want, b.String()); d != "" {
		t.Errorf("frames (-want +got):\n%s", d)
	}
	r := strings.NewReader(b.String())
	for _, want := range []string{"1out", "2", "2err\x00"} {
		stream, p, err := ReadFrame(r, nil)
		if got := fmt.Sprint(stream) + string(p); err != nil || got != want {
			t.Errorf("ReadFrame: got %q %v, want %q", got, err, want)
		}
	}
	if _, _, err := ReadFrame(r, nil); err != io.EOF {
		t.Errorf("ReadFrame at the end: got %v", err)
	}
	for _, bad := range []string{"\x03\x00\x00\x00\x00\x00\x00\x00", "\x01\x00\x00\x01\x00\x00\x00\x00", "\x01\x00\x00\x00\xff\xff\xff\xff"} {
		if _, _, err := ReadFrame(strings.NewReader(bad), nil); err == nil {
			t.Errorf("ReadFrame(%q): no error", bad)
		}
	}
	if _, _, err := ReadFrame(strings.NewReader("\x01\x00\x00\x00\x00\x00\x00\x05abc"), nil); err != io.ErrUnexpectedEOF {
		t.Errorf("ReadFrame of half a frame: got %v", err)
	}
}

// serveUnix serves h on a unix socket, and fails the test when a goroutine is left behind.
func serveUnix(t *testing.T, h http.Handler) string {
	t.Helper()
	before := runtime.NumGoroutine()
	dir, err := os.MkdirTemp("", "dockerapi-") // short enough for a socket's name
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	srv := Server(h, quiet())
	done := make(chan error, 1)
	go func() { done <- srv.Serve(l) }()
	t.Cleanup(func() {
		_ = srv.Close()
		<-done
		_ = os.RemoveAll(dir)
		deadline := time.Now().Add(10 * time.Second)
		for runtime.NumGoroutine() > before && time.Now().Before(deadline) {
			runtime.Gosched()
			time.Sleep(time.Millisecond) // goroutines that have ended take a moment to be counted out
		}
		if n := runtime.NumGoroutine(); n > before {
			stacks := make([]byte, 1<<20)
			t.Errorf("%d goroutines are left, %d were there before:\n%s", n, before, stacks[:runtime.Stack(stacks, true)])
		}
	})
	return path
}

// mirror answers a hijacked connection with what it gets, and says how it ended.
func mirror(multiplexed bool) Handler {
	return func(w http.ResponseWriter, r *Request) error {
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return err
		}
		s, err := Hijack(w, r, multiplexed)
		if err != nil {
			return err
		}
		_, _ = io.Copy(s, s)
		_, _ = s.Write([]byte("<end>"))
		s.Finish(nil)
		return nil
	}
}

func TestHijack(t *testing.T) {
	path := serveUnix(t, testAPI(
		Route{Method: "POST", Path: "/mux", Handle: mirror(true)},
		Route{Method: "POST", Path: "/raw", Handle: mirror(false)},
	))
	for _, tt := range []struct {
		name, path, headers string
		status, media       string
	}{
		{"upgrade", "/mux", "Connection: Upgrade\r\nUpgrade: tcp\r\n", "HTTP/1.1 101 UPGRADED", mediaMultiplexed},
		{"upgrade before 1.42", "/v1.41/mux", "Connection: Upgrade\r\nUpgrade: tcp\r\n", "HTTP/1.1 101 UPGRADED", mediaRaw},
		{"upgrade with a terminal", "/raw", "Connection: Upgrade\r\nUpgrade: tcp\r\n", "HTTP/1.1 101 UPGRADED", mediaRaw},
		{"without upgrade", "/mux", "", "HTTP/1.1 200 OK", mediaRaw},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			// What follows the body at once, in the same write, is the stream's.
			if _, err := fmt.Fprintf(c, "POST %s HTTP/1.1\r\nHost: d\r\n%sContent-Length: 2\r\n\r\n{}early ", tt.path, tt.headers); err != nil {
				t.Fatal(err)
			}
			r := bufio.NewReader(c)
			var head []string
			for {
				line, err := r.ReadString('\n')
				if err != nil {
					t.Fatal(err)
				}
				if line = strings.TrimSpace(line); line == "" {
					break
				}
				head = append(head, line)
			}
			all := strings.Join(head, "\n")
			if head[0] != tt.status || !strings.Contains(all, "Content-Type: "+tt.media) || !strings.Contains(all, "Api-Version: 1.50") {
				t.Errorf("head: got\n%s\nwant %s with %s", all, tt.status, tt.media)
			}
			if got := strings.Contains(all, "Upgrade: tcp"); got != (tt.headers != "") {
				t.Errorf("head has Upgrade: %t", got)
			}
			if _, err := c.Write([]byte("late")); err != nil {
				t.Fatal(err)
			}
			if err := c.(*net.UnixConn).CloseWrite(); err != nil {
				t.Fatal(err)
			}
			got, err := io.ReadAll(r)
			if err != nil || string(got) != "early late<end>" {
				t.Errorf("stream: got %q %v", got, err)
			}
		})
	}
}

func TestWebSocket(t *testing.T) {
	path := serveUnix(t, testAPI(Route{Method: "GET", Path: "/ws", Handle: func(w http.ResponseWriter, r *Request) error {
		s, err := WebSocket(context.Background(), w, r)
		if err != nil {
			return err
		}
		defer s.Close()
		_, _ = io.Copy(s, s)
		return nil
	}}))
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}}}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, _, err := websocket.Dial(ctx, "ws://docker/ws", &websocket.DialOptions{HTTPClient: client})
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Write(ctx, websocket.MessageBinary, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	kind, b, err := c.Read(ctx)
	if err != nil || kind != websocket.MessageBinary || string(b) != "hello" {
		t.Errorf("echo: got %v %q %v", kind, b, err)
	}
	if err := c.Close(websocket.StatusNormalClosure, ""); err != nil {
		t.Error(err)
	}
	client.CloseIdleConnections()
}

// A client that has closed its direction is not gone; one that has closed the connection is.
func TestAwaitGone(t *testing.T) {
	gone := make(chan struct{})
	half := make(chan struct{})
	path := serveUnix(t, testAPI(Route{Method: "POST", Path: "/", Handle: nil}, Route{Method: "POST", Path: "/s", Handle: func(w http.ResponseWriter, r *Request) error {
		s, err := Hijack(w, r, false)
		if err != nil {
			return err
		}
		_, _ = io.Copy(io.Discard, s)
		ctx, cancel := context.WithTimeout(r.Context(), 10*time.Millisecond)
		s.AwaitGone(ctx)
		if ctx.Err() == nil {
			t.Error("a half-closed client is taken for a gone one")
		}
		cancel()
		close(half)
		s.AwaitGone(context.Background())
		close(gone)
		return s.Close()
	}}))
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(c, "POST /s HTTP/1.1\r\nHost: d\r\nContent-Length: 0\r\n\r\n")
	_ = c.(*net.UnixConn).CloseWrite()
	<-half
	_ = c.Close()
	select {
	case <-gone:
	case <-time.After(10 * time.Second):
		t.Error("the client has gone and nobody noticed")
	}
}

func TestJSONStream(t *testing.T) {
	path := serveUnix(t, testAPI(Route{Method: "GET", Path: "/s", Handle: func(w http.ResponseWriter, r *Request) error {
		s := NewJSONStream(w)
		if s.Begun() {
			return errors.New("begun before anything was said")
		}
		for i := range 2 {
			if err := s.Write(map[string]any{"n": i, "html": "<&>"}); err != nil {
				return err
			}
		}
		<-r.Context().Done()
		return r.Context().Err()
	}}))
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	fmt.Fprint(c, "GET /s HTTP/1.1\r\nHost: d\r\n\r\n")
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	d := json.NewDecoder(res.Body)
	for i := range 2 {
		var v struct{ N int }
		if err := d.Decode(&v); err != nil || v.N != i {
			t.Errorf("value %d: got %d %v", i, v.N, err)
		}
	}
}

func TestGarbage(t *testing.T) {
	path := serveUnix(t, testAPI(Route{Method: "GET", Path: "/_ping", Handle: func(w http.ResponseWriter, r *Request) error { return nil }}))
	for _, in := range []string{
		"\x00\x01\x02\r\n\r\n", "GET\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "POST / HTTP/1.1\r\nContent-Length: x\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: d\r\nX: " + strings.Repeat("x", 2*maxHeaderBytes) + "\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
	} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte(in))
		_ = c.(*net.UnixConn).CloseWrite()
		b, _ := io.ReadAll(c)
		if len(b) > 0 && !strings.HasPrefix(string(b), "HTTP/1.1 4") && !strings.HasPrefix(string(b), "HTTP/1.1 505") {
			t.Errorf("%.20q: got %.40q", in, b)
		}
		_ = c.Close()
	}
}

// A connection without a descriptor tells by its deadlines.
func TestAwaitGoneWithoutDescriptor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			AwaitGone(t.Context(), ours)
		}()
		time.Sleep(time.Minute) // of the test's own clock
		select {
		case <-gone:
			t.Error("taken for gone while it is there")
		default:
		}
		_ = theirs.Close()
		<-gone
	})
}

func TestLimit(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	limited := Limit(l, 1)
	accepted := make(chan net.Conn)
	ended := make(chan error, 1)
	go func() {
		for {
			c, err := limited.Accept()
			if err != nil {
				ended <- err
				return
			}
			accepted <- c
		}
	}()
	var clients [2]net.Conn
	for i := range clients {
		if clients[i], err = net.Dial("unix", l.Addr().String()); err != nil {
			t.Fatal(err)
		}
		defer clients[i].Close()
	}
	first := <-accepted
	if _, ok := first.(CloseWriter); !ok {
		t.Error("a limited connection cannot close one direction")
	}
	if err := first.(CloseWriter).CloseWrite(); err != nil {
		t.Error(err)
	}
	select {
	case <-accepted:
		t.Error("a second connection was accepted beside the first")
	case <-time.After(20 * time.Millisecond): // long enough for an accept that does not wait
	}
	_, _ = first.Close(), first.Close()
	second := <-accepted
	defer second.Close()
	if err := limited.Close(); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

// Every answer bears the request's ID, which the client may have chosen, and is told of by its route, not its path.
func TestAnswered(t *testing.T) {
	var got []Answer
	h := New(Config{Engine: "1", Log: slog.New(slog.DiscardHandler), Answered: func(a Answer) { got = append(got, a) }}, []Route{
		{Method: "GET", Path: "/containers/{id}/json", Handle: func(w http.ResponseWriter, r *Request) error {
			if r.Var("id") == "none" {
				return NotFound("no")
			}
			_, err := io.WriteString(w, r.Header.Get(RequestID))
			return err
		}},
		{Method: "GET", Path: "/panic", Handle: func(http.ResponseWriter, *Request) error { panic("x") }},
	})
	ask := func(method, path, id string) *httptest.ResponseRecorder {
		r := httptest.NewRequest(method, path, nil)
		if id != "" {
			r.Header.Set(RequestID, id)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		return w
	}
	if w := ask("GET", "/v1.44/containers/a/json", "mine-1"); w.Header().Get(RequestID) != "mine-1" || w.Body.String() != "mine-1" {
		t.Errorf("a chosen ID: got %q, %q", w.Header().Get(RequestID), w.Body)
	}
	first, second := ask("GET", "/containers/none/json", "").Header().Get(RequestID), ask("GET", "/panic", "").Header().Get(RequestID)
	if len(first) != 16 || first == second {
		t.Errorf("IDs: got %q and %q", first, second)
	}
	for _, odd := range []string{"a b", strings.Repeat("x", 65), "ü"} {
		if got := ask("BREW", "/pot/"+strconv.Itoa(len(odd)), odd).Header().Get(RequestID); got == odd {
			t.Errorf("took %q for an ID", odd)
		}
	}
	for i := range got {
		got[i].Took = 0
	}
	want := []Answer{{"GET", "/containers/{id}/json", 200, 0}, {"GET", "/containers/{id}/json", 404, 0}, {"GET", "/panic", 500, 0},
		{"", "", 404, 0}, {"", "", 404, 0}, {"", "", 404, 0}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("answers (-want +got):\n%s", d)
	}
}
