package vdocker_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/guest/guesttest"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/guest/vdocker"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/test/tour"
)

// start runs a pod of these containers in a guest on this machine.
func start(t *testing.T, place spec.Placement, containers ...spec.Container) (tour.Host, *guesttest.Host) {
	t.Helper()
	need.Root(t)
	root := guesttest.Busybox(t)
	doc := &spec.Pod{Name: "pod", Containers: containers}
	roots := map[string]string{}
	soon := 0
	for i := range doc.Containers {
		c := &doc.Containers[i]
		roots[c.Name] = root
		c.Created = time.Now().UTC()
		c.Env = append(c.Env, "PATH="+tour.Path)
		c.StopTimeout = &soon
	}
	place.Linger = true
	h := guesttest.StartWith(t, doc, roots, guesttest.Options{Placement: place})
	return tour.Host{Name: "the pod", Address: "unix://" + filepath.Join(h.Dir(), "1"), Pod: true}, h
}

// ask makes a request and returns the answer's body; the status must be as wanted.
func ask(t *testing.T, h tour.Host, status int, method, path, body string) []byte {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://docker"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := h.HTTP().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != status {
		t.Fatalf("%s %s: got %s %q %v, want %d", method, path, res.Status, b, err, status)
	}
	return b
}

// load is what the guest itself says of its goroutines and descriptors.
type load struct{ NGoroutines, NFd int }

func loadOf(t *testing.T, h tour.Host) load {
	var l load
	if err := json.Unmarshal(ask(t, h, 200, "GET", "/info", ""), &l); err != nil {
		t.Fatal(err)
	}
	return l
}

// unloaded waits until the guest holds no more than before, but for what a connection of the moment takes.
func unloaded(t *testing.T, h tour.Host, before load) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		now := loadOf(t, h)
		if now.NGoroutines <= before.NGoroutines+3 && now.NFd <= before.NFd+2 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("what clients left behind is not given back: %+v, before %+v", now, before)
		}
		time.Sleep(50 * time.Millisecond) // between two questions to another process
	}
}

// open sends a request and leaves the connection to the caller.
func open(t *testing.T, h tour.Host, head, body string) net.Conn {
	t.Helper()
	c, err := h.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(time.Minute))
	if _, err := fmt.Fprintf(c, "%s HTTP/1.1\r\nHost: docker\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", head, len(body), body); err != nil {
		t.Fatal(err)
	}
	return c
}

const upgrade = "HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nX:"

// Clients that go away in the middle of any stream leave nothing behind.
func TestGoneClients(t *testing.T) {
	h, g := start(t, spec.Placement{},
		spec.Container{Name: "silent", Cmd: []string{"sleep", "1000000"}},
		spec.Container{Name: "loud", Cmd: []string{"sh", "-c", "while :; do echo line; sleep 0.02; done"}},
		spec.Container{Name: "reads", Cmd: []string{"cat"}, OpenStdin: true},
		spec.Container{Name: "tty", Cmd: []string{"sh"}, OpenStdin: true, TTY: true},
		spec.Container{Name: "files", Cmd: []string{"sh", "-c", "head -c 50000000 /dev/zero > /big; sleep 1000000"}},
	)
	exec := func(t *testing.T, cmd string) string {
		var created struct{ ID string }
		if err := json.Unmarshal(ask(t, h, 201, "POST", "/containers/silent/exec",
			`{"AttachStdin":true,"AttachStdout":true,"AttachStderr":true,"Cmd":["sh","-c","`+cmd+`"]}`), &created); err != nil {
			t.Fatal(err)
		}
		return created.ID
	}
	for _, name := range []string{"silent", "loud", "reads", "tty", "files"} {
		g.Status(name, spec.StatusRunning)
	}
	g.AwaitOutput(1, 1, "line")
	for _, tt := range []struct {
		name string
		open func(t *testing.T) net.Conn
	}{
		{"logs of the silent", func(t *testing.T) net.Conn {
			return open(t, h, "GET /containers/silent/logs?follow=1&stdout=1", "")
		}},
		{"logs of the loud", func(t *testing.T) net.Conn {
			return open(t, h, "GET /containers/loud/logs?follow=1&stdout=1", "")
		}},
		{"events", func(t *testing.T) net.Conn { return open(t, h, "GET /events", "") }},
		{"stats", func(t *testing.T) net.Conn { return open(t, h, "GET /containers/loud/stats", "") }},
		{"wait", func(t *testing.T) net.Conn {
			return open(t, h, "POST /containers/silent/wait?condition=next-exit", "")
		}},
		{"attach to the silent", func(t *testing.T) net.Conn {
			return open(t, h, "POST /containers/silent/attach?stream=1&stdout=1&stderr=1 "+upgrade, "")
		}},
		{"attach to the loud", func(t *testing.T) net.Conn {
			return open(t, h, "POST /containers/loud/attach?stream=1&stdout=1&logs=1 "+upgrade, "")
		}},
		{"attach with input", func(t *testing.T) net.Conn {
			return open(t, h, "POST /containers/reads/attach?stream=1&stdin=1&stdout=1 "+upgrade, "")
		}},
		{"attach to the terminal", func(t *testing.T) net.Conn {
			return open(t, h, "POST /containers/tty/attach?stream=1&stdin=1&stdout=1 "+upgrade, "")
		}},
		{"exec that reads", func(t *testing.T) net.Conn {
			return open(t, h, "POST /exec/"+exec(t, "cat")+"/start "+upgrade, "{}")
		}},
		{"exec that writes", func(t *testing.T) net.Conn {
			return open(t, h, "POST /exec/"+exec(t, "head -c 3000000 /dev/zero")+"/start "+upgrade, "{}")
		}},
		{"archive", func(t *testing.T) net.Conn { return open(t, h, "GET /containers/files/archive?path=/big", "") }},
		{"export", func(t *testing.T) net.Conn { return open(t, h, "GET /containers/files/export", "") }},
		{"half an archive", func(t *testing.T) net.Conn {
			c, err := h.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(c, "PUT /containers/silent/archive?path=/tmp HTTP/1.1\r\nHost: d\r\nContent-Length: 1000000\r\n\r\nhalf")
			return c
		}},
		{"half a body", func(t *testing.T) net.Conn {
			c, err := h.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(c, "POST /containers/silent/exec HTTP/1.1\r\nHost: d\r\nContent-Length: 1000000\r\n\r\n{")
			return c
		}},
		{"half a header", func(t *testing.T) net.Conn {
			c, err := h.Dial(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(c, "GET /info HTT")
			return c
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			before := loadOf(t, h)
			for i := range 20 {
				c := tt.open(t)
				if !strings.HasPrefix(tt.name, "half") && i%2 == 0 {
					// One in two goes away after it has seen the beginning, one in four after closing its own direction.
					if _, err := io.ReadFull(c, make([]byte, len("HTTP/1.1 "))); err != nil {
						t.Fatal(err)
					}
					if i%4 == 0 {
						_ = c.(*net.UnixConn).CloseWrite()
					}
				}
				_ = c.Close()
			}
			unloaded(t, h, before)
		})
	}
	t.Run("websocket", func(t *testing.T) {
		before := loadOf(t, h)
		for i := range 20 {
			name := []string{"loud", "silent", "tty"}[i%3]
			c, _, err := websocket.Dial(t.Context(), "ws://docker/containers/"+name+"/attach/ws?stream=1&stdout=1&stdin=1", &websocket.DialOptions{HTTPClient: h.HTTP()})
			if err != nil {
				t.Fatal(err)
			}
			if i%2 == 0 {
				_ = c.Close(websocket.StatusNormalClosure, "")
			} else {
				_ = c.CloseNow()
			}
		}
		unloaded(t, h, before)
	})
	t.Run("thousand at once", func(t *testing.T) {
		before := loadOf(t, h)
		const n = 1000
		conns := make([]net.Conn, n)
		var all sync.WaitGroup
		for i := range conns {
			conns[i] = open(t, h, "GET /containers/loud/logs?follow=1&stdout=1&tail=1", "")
			all.Go(func() {
				if _, err := io.ReadFull(conns[i], make([]byte, len("HTTP/1.1 200 OK\r\n"))); err != nil {
					t.Errorf("client %d: %v", i, err)
				}
			})
		}
		all.Wait()
		if during := loadOf(t, h); during.NFd < n {
			t.Errorf("%d descriptors with %d clients", during.NFd, n)
		}
		// The limit is near; what is above it waits and is served when others go.
		var answers sync.WaitGroup
		for range 100 {
			answers.Go(func() { ask(t, h, 200, "GET", "/containers/json", "") })
		}
		for _, c := range conns {
			_ = c.Close()
		}
		answers.Wait()
		unloaded(t, h, before)
	})
}

// A client that attaches and does not read holds up neither the container nor other clients.
func TestSlowReader(t *testing.T) {
	const size = 20 << 20
	h, g := start(t, spec.Placement{Hold: true}, spec.Container{Name: "writer", Cmd: []string{"sh", "-c", fmt.Sprintf("head -c %d /dev/zero | tr '\\0' y", size)}})
	for _, head := range []string{
		"POST /containers/writer/attach?stream=1&stdout=1 " + upgrade,
		"GET /containers/writer/logs?follow=1&stdout=1",
		"GET /events", "GET /containers/writer/stats",
	} {
		c := open(t, h, head, "")
		if _, err := io.ReadFull(c, make([]byte, len("HTTP/1.1 "))); err != nil {
			t.Fatal(err)
		}
	}
	reader := open(t, h, "POST /containers/writer/attach?stream=1&stdout=1 "+upgrade, "")
	br := bufio.NewReader(reader)
	if _, err := http.ReadResponse(br, nil); err != nil {
		t.Fatal(err)
	}
	ask(t, h, 204, "POST", "/containers/writer/start", "")
	got := 0
	for {
		_, b, err := dockerapi.ReadFrame(br, nil)
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got += len(b)
	}
	if got != size {
		t.Errorf("the client that reads got %d bytes, want %d", got, size)
	}
	if st := g.Status("writer", spec.StatusExited); st.ExitCode != 0 {
		t.Errorf("writer ended with %d", st.ExitCode)
	}
}

// What a container writes in its whole life, however short, reaches a client that attached before the start.
func TestShortLife(t *testing.T) {
	h, _ := start(t, spec.Placement{Hold: true}, spec.Container{Name: "short", Cmd: []string{"sh", "-c", "echo out; echo err >&2"}})
	for i := range 40 {
		c := open(t, h, "POST /containers/short/attach?stream=1&stdout=1&stderr=1 "+upgrade, "")
		br := bufio.NewReader(c)
		if _, err := http.ReadResponse(br, nil); err != nil {
			t.Fatal(err)
		}
		w := open(t, h, "POST /containers/short/wait?condition=next-exit", "")
		wr := bufio.NewReader(w)
		res, err := http.ReadResponse(wr, nil)
		if err != nil {
			t.Fatal(err)
		}
		ask(t, h, 204, "POST", "/containers/short/start", "")
		var out [3]bytes.Buffer
		for {
			stream, b, err := dockerapi.ReadFrame(br, nil)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			out[stream].Write(b)
		}
		if out[1].String() != "out\n" || out[2].String() != "err\n" {
			t.Fatalf("life %d: got %q and %q", i, out[1].String(), out[2].String())
		}
		b, err := io.ReadAll(res.Body)
		if err != nil || string(b) != "{\"StatusCode\":0}\n" {
			t.Fatalf("life %d: wait says %q %v", i, b, err)
		}
		_, _ = c.Close(), w.Close()
	}
}

// Before the launch, what needs the pod waits for it, and what does not is answered.
func TestBeforeLaunch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := vdocker.New(func(ctx context.Context) (*pod.Pod, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}, slog.New(slog.DiscardHandler))
		for _, path := range []string{"/_ping", "/version", "/v1.41/_ping"} {
			w := httptest.NewRecorder()
			h.ServeHTTP(w, httptest.NewRequest("GET", path, nil))
			if w.Code != 200 {
				t.Errorf("%s: %d %s", path, w.Code, w.Body)
			}
		}
		for _, path := range []string{"/info", "/containers/json", "/containers/x/json", "/exec/x/json", "/events"} {
			ctx, cancel := context.WithCancelCause(t.Context())
			w := httptest.NewRecorder()
			done := make(chan struct{})
			go func() {
				defer close(done)
				h.ServeHTTP(w, httptest.NewRequest("GET", path, nil).WithContext(ctx))
			}()
			synctest.Wait()
			select {
			case <-done:
				t.Errorf("%s: answered %d before there is a pod", path, w.Code)
			default:
			}
			cancel(errors.New("the client has gone"))
			<-done
		}
	})
}
