package main

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// The test binary is three other programs, too: a daemon as kcradle's is called, and the two stages of a run in
// namespaces of its own.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "daemon" {
		os.Exit(fakeDaemon(os.Args[2:]))
	}
	switch args, stage, dir := stageOf(os.Args[1:]); stage {
	case stageInit:
		os.Exit(beInit(dir, args))
	case stageRun:
		os.Exit(fakeRun(dir, args))
	}
	os.Exit(m.Run())
}

// fakeDaemon serves as much of the API as this program calls: images that are loaded, containers that have an ID.
func fakeDaemon(args []string) int {
	if len(args) != 4 || args[0] != "-H" || args[2] != "--root" {
		fmt.Fprintln(os.Stderr, "fake daemon: got", args)
		return 2
	}
	if err := os.Mkdir(args[3], 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	l, err := net.Listen("unix", strings.TrimPrefix(args[1], "unix://"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	srv := &http.Server{Handler: new(fakeAPI).mux()}
	go func() {
		<-ended
		srv.Close()
	}()
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

type fakeAPI struct {
	mu         sync.Mutex
	images     []string
	containers int
}

func (f *fakeAPI) mux() *http.ServeMux {
	m := http.NewServeMux()
	handle := func(pattern string, fn func(w http.ResponseWriter, r *http.Request)) {
		m.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			f.mu.Lock()
			defer f.mu.Unlock()
			fn(w, r)
		})
	}
	answer := func(w http.ResponseWriter, v any) { _ = json.NewEncoder(w).Encode(v) }
	handle("GET /_ping", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "OK") })
	handle("GET /version", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, map[string]any{"Version": "0.1", "ApiVersion": "1.44", "Platform": map[string]string{"Name": "fake"}})
	})
	handle("GET /info", func(w http.ResponseWriter, _ *http.Request) { answer(w, map[string]string{"Driver": "none"}) })
	handle("GET /volumes", func(w http.ResponseWriter, _ *http.Request) { answer(w, map[string]any{"Volumes": nil}) })
	handle("GET /networks", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, []map[string]string{{"Id": "1", "Name": "bridge"}})
	})
	handle("POST /images/load", func(w http.ResponseWriter, r *http.Request) {
		tags, err := repoTags(r.Body)
		if err != nil {
			answer(w, map[string]string{"error": err.Error()})
			return
		}
		f.images = append(f.images, tags...)
		answer(w, map[string]string{"stream": "Loaded image"})
	})
	handle("GET /images/json", func(w http.ResponseWriter, _ *http.Request) {
		list := []map[string]any{}
		for _, tag := range f.images {
			list = append(list, map[string]any{"Id": "sha256:" + tag, "RepoTags": []string{tag}})
		}
		answer(w, list)
	})
	handle("GET /images/{path...}", func(w http.ResponseWriter, r *http.Request) {
		if ref := strings.TrimSuffix(r.PathValue("path"), "/json"); !slices.Contains(f.images, ref) {
			http.Error(w, "no such image: "+ref, http.StatusNotFound)
		}
	})
	handle("DELETE /images/{path...}", func(_ http.ResponseWriter, r *http.Request) {
		f.images = slices.DeleteFunc(f.images, func(s string) bool { return s == r.PathValue("path") })
	})
	handle("GET /containers/json", func(w http.ResponseWriter, _ *http.Request) {
		list := []map[string]string{}
		for i := range f.containers {
			list = append(list, map[string]string{"Id": fmt.Sprint(i)})
		}
		answer(w, list)
	})
	handle("POST /containers/create", func(w http.ResponseWriter, _ *http.Request) {
		f.containers++
		w.WriteHeader(http.StatusCreated)
	})
	handle("POST /containers/{id}/unpause", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "not paused", http.StatusConflict)
	})
	handle("DELETE /containers/{id}", func(w http.ResponseWriter, _ *http.Request) {
		f.containers--
		w.WriteHeader(http.StatusNoContent)
	})
	handle("POST /die", func(http.ResponseWriter, *http.Request) {
		fmt.Fprintln(os.Stderr, "fake daemon: asked to die")
		os.Exit(3)
	})
	return m
}

// repoTags reads the names of the images in an archive of docker save's form.
func repoTags(r io.Reader) ([]string, error) {
	tr := tar.NewReader(r)
	for {
		h, err := tr.Next()
		if err != nil {
			return nil, fmt.Errorf("find manifest.json: %w", err)
		}
		if h.Name != "manifest.json" {
			continue
		}
		var m []struct{ RepoTags []string }
		if err := json.NewDecoder(tr).Decode(&m); err != nil {
			return nil, err
		}
		var tags []string
		for _, i := range m {
			tags = append(tags, i.RepoTags...)
		}
		_, err = io.Copy(io.Discard, r)
		return tags, err
	}
}
