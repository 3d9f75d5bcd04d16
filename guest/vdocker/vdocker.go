// Package vdocker serves the Docker Engine API for the containers of a pod, inside its machine. It translates: what a
// container is and does is package pod's, what is said on the wire is package dockerapi's. docs/vdocker.md lists every
// endpoint.
//
//	h := vdocker.New(func(ctx context.Context) (*pod.Pod, error) { … }, log)  // waits for the launch
//	err := vdocker.Serve(ctx, listener, h, log)
package vdocker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/guest/container"
	"github.com/kcradle/kcradle/guest/pod"
)

// EngineVersion is the version of docker's engine whose behaviour is served.
const EngineVersion = "28.2.2"

// maxClients bounds the connections served at one time; more wait to be accepted.
const maxClients = 1024

// Source returns the pod. Before the launch it waits, until ctx is done.
type Source func(ctx context.Context) (*pod.Pod, error)

type server struct {
	source Source
	log    *slog.Logger
}

// New returns the handler of the API. It may be served before the pod is launched: calls that need it wait. The first call
// makes it, so that the pod's start need not wait for what nobody may ever use.
func New(source Source, log *slog.Logger) http.Handler {
	handler := sync.OnceValue(func() http.Handler {
		s := &server{source: source, log: log}
		return dockerapi.New(dockerapi.Config{Engine: EngineVersion, Log: log}, s.routes())
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { handler().ServeHTTP(w, r) })
}

// Serve serves h on l until ctx is done, then closes l and every connection.
func Serve(ctx context.Context, l net.Listener, h http.Handler, log *slog.Logger) error {
	srv := dockerapi.Server(h, log)
	srv.BaseContext = func(net.Listener) context.Context { return ctx }
	stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
	defer stop()
	if err := srv.Serve(dockerapi.Limit(l, maxClients)); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve docker API: %w", err)
	}
	return nil
}

// routes is the table of what is served. To add an endpoint, add a row here or to absent, and one to docs/vdocker.md.
func (s *server) routes() []dockerapi.Route {
	table := []dockerapi.Route{
		{Method: "HEAD", Path: "/_ping", Handle: s.ping},
		{Method: "GET", Path: "/_ping", Handle: s.ping},
		{Method: "GET", Path: "/version", Handle: s.version},
		{Method: "GET", Path: "/info", Handle: s.pod(s.info)},
		{Method: "GET", Path: "/events", Handle: s.pod(s.events)},
		{Method: "GET", Path: "/system/df", Handle: s.pod(s.diskUsage)},

		{Method: "GET", Path: "/containers/json", Handle: s.pod(s.list)},
		{Method: "GET", Path: "/containers/{id}/json", Handle: s.container(s.inspect)},
		{Method: "GET", Path: "/containers/{id}/top", Handle: s.container(s.top)},
		{Method: "GET", Path: "/containers/{id}/logs", Handle: s.container(s.logs)},
		{Method: "GET", Path: "/containers/{id}/changes", Handle: s.container(s.changes)},
		{Method: "GET", Path: "/containers/{id}/export", Handle: s.container(s.export)},
		{Method: "GET", Path: "/containers/{id}/stats", Handle: s.container(s.stats)},
		{Method: "POST", Path: "/containers/{id}/resize", Handle: s.container(s.resize)},
		{Method: "POST", Path: "/containers/{id}/start", Handle: s.container(s.start)},
		{Method: "POST", Path: "/containers/{id}/stop", Handle: s.container(s.stop)},
		{Method: "POST", Path: "/containers/{id}/restart", Handle: s.container(s.restart)},
		{Method: "POST", Path: "/containers/{id}/kill", Handle: s.pod(s.kill)},
		{Method: "POST", Path: "/containers/{id}/rename", Handle: s.container(s.rename)},
		{Method: "POST", Path: "/containers/{id}/update", Handle: s.container(s.update)},
		{Method: "POST", Path: "/containers/{id}/pause", Handle: s.container(s.pause)},
		{Method: "POST", Path: "/containers/{id}/unpause", Handle: s.container(s.unpause)},
		{Method: "POST", Path: "/containers/{id}/attach", Handle: s.container(s.attach)},
		{Method: "GET", Path: "/containers/{id}/attach/ws", Handle: s.container(s.attachWebSocket)},
		{Method: "POST", Path: "/containers/{id}/wait", Handle: s.container(s.wait)},
		{Method: "HEAD", Path: "/containers/{id}/archive", Handle: s.container(s.archiveStat)},
		{Method: "GET", Path: "/containers/{id}/archive", Handle: s.container(s.archiveGet)},
		{Method: "PUT", Path: "/containers/{id}/archive", Handle: s.container(s.archivePut)},
		{Method: "POST", Path: "/containers/{id}/exec", Handle: s.container(s.execCreate)},
		{Method: "POST", Path: "/exec/{id}/start", Handle: s.exec(s.execStart)},
		{Method: "POST", Path: "/exec/{id}/resize", Handle: s.exec(s.execResize)},
		{Method: "GET", Path: "/exec/{id}/json", Handle: s.exec(s.execInspect)},

		{Method: "GET", Path: "/images/json", Handle: s.pod(s.images)},
		{Method: "GET", Path: "/images/{name+}/json", Handle: s.pod(s.imageInspect)},
		{Method: "GET", Path: "/images/{name+}/history", Handle: s.pod(s.imageHistory)},
		{Method: "GET", Path: "/networks", Handle: s.pod(s.networks)},
		{Method: "GET", Path: "/networks/{id}", Handle: s.pod(s.networkInspect)},
		{Method: "GET", Path: "/volumes", Handle: s.pod(s.volumes)},
		{Method: "GET", Path: "/volumes/{name}", Handle: s.pod(s.volumeInspect)},
		{Method: "GET", Path: "/plugins", Handle: emptyList},
	}
	return append(table, s.absent()...)
}

// pod waits for the pod before it calls h.
func (s *server) pod(h func(http.ResponseWriter, *dockerapi.Request, *pod.Pod) error) dockerapi.Handler {
	return func(w http.ResponseWriter, r *dockerapi.Request) error {
		p, err := s.source(r.Context())
		if err != nil {
			return dockerapi.Errorf(http.StatusServiceUnavailable, "wait for the pod: %w", err)
		}
		return h(w, r, p)
	}
}

// call is a request that is about one container.
type call struct {
	*dockerapi.Request
	pod *pod.Pod
	c   *pod.Container
}

// emit tells the events' subscribers what the call did.
func (k call) emit(action string, attributes map[string]string) {
	k.pod.Emit(pod.Event{Time: time.Now(), Action: action, Container: k.c.ID(), Attributes: attributes})
}

// container finds the container that {id} names before it calls h.
func (s *server) container(h func(http.ResponseWriter, call) error) dockerapi.Handler {
	return s.pod(func(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
		c, err := find(p, r.Var("id"))
		if err != nil {
			return err
		}
		return failed(c, h(w, call{r, p, c}))
	})
}

// find is p.Find with docker's wording.
func find(p *pod.Pod, ref string) (*pod.Container, error) {
	c, err := p.Find(ref)
	switch {
	case errors.Is(err, pod.ErrNotFound):
		return nil, dockerapi.NotFound("No such container: %s", ref)
	case errors.Is(err, pod.ErrAmbiguous):
		return nil, dockerapi.BadRequest("multiple IDs found with provided prefix: %s", ref)
	}
	return c, err
}

// execCall is a request that is about one exec.
type execCall struct {
	call
	e *pod.Exec
}

// exec finds the exec that {id} names before it calls h.
func (s *server) exec(h func(http.ResponseWriter, execCall) error) dockerapi.Handler {
	return s.pod(func(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
		e, err := p.Exec(r.Var("id"))
		if errors.Is(err, pod.ErrNotFound) {
			return dockerapi.NotFound("No such exec instance: %s", r.Var("id"))
		}
		if err != nil {
			return err
		}
		c := e.Container()
		return failed(c, h(w, execCall{call{r, p, c}, e}))
	})
}

// failed gives an error of package pod docker's status and wording. It is the one place that does.
func failed(c *pod.Container, err error) error {
	if err == nil {
		return nil
	}
	if _, ok := errors.AsType[*dockerapi.Error](err); ok {
		return err
	}
	if start, ok := errors.AsType[*container.StartError](err); ok {
		if start.Code == 126 || start.Code == 127 {
			return dockerapi.BadRequest("%w", err)
		}
		return err
	}
	switch {
	case errors.Is(err, pod.ErrAlready):
		return dockerapi.ErrNotModified
	case errors.Is(err, pod.ErrNotRunning):
		return dockerapi.Conflict("container %s is not running", c.ID())
	case errors.Is(err, pod.ErrPaused):
		return dockerapi.Conflict("container %s is paused, unpause the container before exec", c.ID())
	case errors.Is(err, pod.ErrConflict):
		return dockerapi.Conflict("%w", err)
	case errors.Is(err, pod.ErrInvalid):
		return dockerapi.BadRequest("%w", err)
	case errors.Is(err, pod.ErrNotFound):
		return dockerapi.NotFound("%w", err)
	}
	return err
}

func emptyList(w http.ResponseWriter, _ *dockerapi.Request) error {
	return dockerapi.WriteJSON(w, http.StatusOK, []struct{}{})
}
