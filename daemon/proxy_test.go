package daemon

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/events"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi"
)

// passing serves the daemon's side on a Unix socket, which is returned, in front of a machine that answers with guest.
func passing(t *testing.T, guest http.HandlerFunc) string {
	t.Helper()
	b := &bundle.Bundle{Dir: t.TempDir()}
	if err := os.Mkdir(b.RunDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	inside, err := b.Listen(bundle.VdockerSocket)
	if err != nil {
		t.Fatal(err)
	}
	machine := &http.Server{Handler: guest}
	go machine.Serve(inside)
	t.Cleanup(func() { machine.Close() })

	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	c := &Container{d: &Daemon{ctx: ctx}, id: strings.Repeat("a", 64), b: b}
	log := slog.New(slog.DiscardHandler)
	api := dockerapi.New(dockerapi.Config{Engine: EngineVersion, Log: log}, []dockerapi.Route{
		{Method: "GET", Path: "/containers/{id}/x", Handle: func(w http.ResponseWriter, r *dockerapi.Request) error { return c.pass(w, r, c.inPath(r)) }},
		{Method: "POST", Path: "/containers/{id}/x", Handle: func(w http.ResponseWriter, r *dockerapi.Request) error { return c.pass(w, r, c.inPath(r)) }},
	})
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	front := dockerapi.Server(api, log)
	go front.Serve(l)
	t.Cleanup(func() { front.Close() })
	return path
}

// A request comes to the machine under the container's ID, whole, however its body is sent; the answer comes back as it is.
func TestPass(t *testing.T) {
	socket := passing(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		w.Header().Set("X-Own", "yes")
		w.WriteHeader(http.StatusTeapot)
		fmt.Fprintf(w, "%s %s %s %d %v", r.Method, r.URL.RequestURI(), r.Header.Get("X-Client"), len(body), err)
	})
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", socket)
	}}}
	id := strings.Repeat("a", 64)
	large := bytes.Repeat([]byte("x"), 3<<20)
	for _, tc := range []struct {
		name, method, path string
		body               io.Reader
		want               string
	}{
		{"no body", "GET", "/v1.44/containers/web/x?a=b%20c", nil, "GET /v1.44/containers/" + id + "/x?a=b%20c me 0 <nil>"},
		{"no version", "GET", "/containers/web/x", nil, "GET /v1.50/containers/" + id + "/x me 0 <nil>"},
		{"a body of known length", "POST", "/v1.44/containers/web/x", bytes.NewReader(large), "POST /v1.44/containers/" + id + "/x me 3145728 <nil>"},
		{"a body in chunks", "POST", "/v1.44/containers/web/x", io.MultiReader(bytes.NewReader(large)), "POST /v1.44/containers/" + id + "/x me 3145728 <nil>"},
		{"an empty body", "POST", "/v1.44/containers/web/x", nil, "POST /v1.44/containers/" + id + "/x me 0 <nil>"},
	} {
		req, err := http.NewRequestWithContext(t.Context(), tc.method, "http://d"+tc.path, tc.body)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-Client", "me")
		resp, err := client.Do(req)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if string(got) != tc.want || err != nil || resp.StatusCode != http.StatusTeapot || resp.Header.Get("X-Own") != "yes" {
			t.Errorf("%s: got %d %q, %v; want 418 %q", tc.name, resp.StatusCode, got, err, tc.want)
		}
	}
}

// An upgraded connection is two streams: the end of one is not the end of the other.
func TestPassUpgrade(t *testing.T) {
	socket := passing(t, func(w http.ResponseWriter, _ *http.Request) {
		conn, buf, err := http.NewResponseController(w).Hijack()
		if err != nil {
			return
		}
		defer conn.Close()
		io.WriteString(conn, "HTTP/1.1 101 UPGRADED\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n\r\n")
		in, err := io.ReadAll(buf.Reader) // until the client's half-close
		fmt.Fprintf(conn, "got %q, %v", in, err)
	})
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	// What follows the request at once is not lost.
	io.WriteString(conn, "POST /v1.44/containers/web/x HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Length: 0\r\n\r\nearly ")
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("upgrade: got %v, %v", resp, err)
	}
	io.WriteString(conn, "late")
	conn.(*net.UnixConn).CloseWrite()
	got, err := io.ReadAll(r)
	if string(got) != `got "early late", <nil>` || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}

// A machine that is gone is a refusal, not a broken connection.
func TestPassNobody(t *testing.T) {
	b := &bundle.Bundle{Dir: t.TempDir()}
	c := &Container{d: &Daemon{ctx: t.Context()}, id: "x", b: b}
	err := c.pass(nil, &dockerapi.Request{Request: &http.Request{}}, "/")
	if dockerapi.Status(err) != http.StatusConflict {
		t.Errorf("got %v (status %d), want a conflict", err, dockerapi.Status(err))
	}
}

// Who listens gets everything from then on; who does not read loses the stream and nobody else waits for it.
func TestBus(t *testing.T) {
	b := newBus()
	for i := range keptEvents + 10 {
		b.publish(events.Message{TimeNano: int64(i) + 1})
	}
	past, live, cancel := b.listen(time.Time{})
	defer cancel()
	if len(past) != keptEvents || past[0].TimeNano != 11 {
		t.Errorf("kept: got %d from %d on, want %d from 11 on", len(past), past[0].TimeNano, keptEvents)
	}
	if later, _, cancel := b.listen(time.Unix(0, 20)); len(later) != keptEvents-9 || later[0].TimeNano != 20 {
		t.Errorf("kept since: got %d", len(later))
	} else {
		cancel()
	}
	_, slow, _ := b.listen(time.Time{})
	for i := range eventBacklog + 1 {
		b.publish(events.Message{TimeNano: int64(i)})
		if got := <-live; got.TimeNano != int64(i) {
			t.Fatalf("got event %d, want %d", got.TimeNano, i)
		}
	}
	n := 0
	for range slow { // it ends
		n++
	}
	if n != eventBacklog {
		t.Errorf("the slow one got %d, want the %d that fit", n, eventBacklog)
	}
	b.close()
	if _, ok := <-live; ok {
		t.Error("a listener goes on after the end")
	}
}

func TestEventMatches(t *testing.T) {
	m := events.Message{Type: events.ContainerEventType, Action: "exec_start: sh", Scope: "local",
		Actor: events.Actor{ID: "0123456789", Attributes: map[string]string{"name": "web", "image": "debian:12", "tier": "front"}}}
	for filter, want := range map[string]bool{
		``: true, `{"type":["container"]}`: true, `{"type":["image"]}`: false, `{"event":["exec_start"]}`: true, `{"event":["start"]}`: false,
		`{"container":["web"]}`: true, `{"container":["0123"]}`: true, `{"container":["other"]}`: false, `{"image":["debian"]}`: true,
		`{"image":["debian:12"]}`: true, `{"image":["deb"]}`: false, `{"label":["tier"]}`: true, `{"label":["tier=back"]}`: false,
		`{"container":["other","web"],"type":["container"]}`: true, `{"network":["web"]}`: false,
	} {
		f, err := dockerapi.ParseFilters(filter, "container", "event", "image", "label", "network", "type")
		if err != nil {
			t.Fatal(err)
		}
		if got := eventMatches(f, m); got != want {
			t.Errorf("%s: got %v", filter, got)
		}
	}
}

// A layer has the entries that changed, and no link into what did not.
func TestCopyEntries(t *testing.T) {
	in := func() *tar.Reader {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range []tar.Header{
			{Name: "same", Size: 1, Mode: 0o644}, {Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o755}, {Name: "dir/new", Size: 1, Mode: 0o644},
			{Name: "link", Typeflag: tar.TypeLink, Linkname: "dir/new"},
		} {
			if err := w.WriteHeader(&h); err != nil {
				t.Fatal(err)
			}
			if h.Size > 0 {
				w.Write([]byte("x"))
			}
		}
		w.Close()
		return tar.NewReader(&b)
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := copyEntries(w, in(), map[string]bool{"dir": true, "dir/new": true, "link": true}); err != nil {
		t.Fatal(err)
	}
	w.Close()
	var got []string
	for r := tar.NewReader(&b); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, h.Name)
	}
	if want := []string{"dir/", "dir/new", "link"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if err := copyEntries(tar.NewWriter(io.Discard), in(), map[string]bool{"link": true}); err == nil || !strings.Contains(err.Error(), "link is a hard link to dir/new") {
		t.Errorf("a link to what did not change: got %v", err)
	}
}
