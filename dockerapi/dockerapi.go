// Package dockerapi is the wire of the Docker Engine API as every server of this project speaks it: routes with
// their version prefix, errors and their statuses, hijacked connections and stream frames, filters, times and
// detach keys. The JSON types themselves come from github.com/moby/moby/api.
//
//	api := dockerapi.New(dockerapi.Config{Engine: "28.2.2", Log: log}, []dockerapi.Route{
//		{Method: "GET", Path: "/containers/{id}/json", Handle: inspect},
//	})
//	http.Serve(listener, api)
package dockerapi

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"path"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// Version is an API version 1.N, as its N.
type Version int

// The versions that are served. A request without a version prefix gets MaxVersion.
const (
	MinVersion Version = 41
	MaxVersion Version = 50
)

func (v Version) String() string { return "1." + strconv.Itoa(int(v)) }

// parseVersion reads what stands behind "/v" in a path.
func parseVersion(s string) (Version, error) {
	major, minor, ok := strings.Cut(s, ".")
	if !ok || len(s) > 16 {
		return 0, NotFound("page not found")
	}
	a, err := strconv.Atoi(major)
	if err != nil {
		return 0, NotFound("page not found")
	}
	b, err := strconv.Atoi(minor)
	if err != nil {
		return 0, NotFound("page not found")
	}
	switch {
	case a < 1 || a == 1 && Version(b) < MinVersion:
		return 0, BadRequest("client version %s is too old. Minimum supported API version is %s, please upgrade your client to a newer version", s, MinVersion)
	case a > 1 || Version(b) > MaxVersion:
		return 0, BadRequest("client version %s is too new. Maximum supported API version is %s", s, MaxVersion)
	}
	return Version(b), nil
}

// Request is a request as a handler gets it.
type Request struct {
	*http.Request
	Version Version
	vars    map[string]string
}

// Var returns what stood in the path for {name}.
func (r *Request) Var(name string) string { return r.vars[name] }

// Query returns the first value of a query parameter, or "".
func (r *Request) Query(name string) string { return r.FormValue(name) }

// Bool reads a query parameter as docker does: absent, empty, "0", "no", "false" and "none" are false.
func (r *Request) Bool(name string) bool { return r.BoolOr(name, false) }

// BoolOr is Bool with a value for a parameter that is absent.
func (r *Request) BoolOr(name string, absent bool) bool {
	if _, ok := r.Form[name]; !ok {
		return absent
	}
	switch strings.ToLower(strings.TrimSpace(r.Form.Get(name))) {
	case "", "0", "no", "false", "none":
		return false
	}
	return true
}

// Int reads a query parameter as a number, zero when it is absent.
func (r *Request) Int(name string) (int, error) {
	s := r.Form.Get(name)
	if s == "" {
		return 0, nil
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		return 0, BadRequest("invalid value for %s: %q is not a number", name, s)
	}
	return n, nil
}

// Handler answers one request. A returned error is written as docker's JSON with the status that [Status] gives it,
// unless the answer has already begun; then it is only logged.
type Handler func(w http.ResponseWriter, r *Request) error

// Route is one endpoint. To add one, add a row to the table handed to [New]. Path segments in braces match one
// segment; a name that ends in "+" matches one or more ("/images/{name+}/json"). GET does not imply HEAD.
type Route struct {
	Method string
	Path   string
	Handle Handler
	Since  Version // first version that knows the endpoint; zero: all that are served
}

// Config is what all routes of a server share.
type Config struct {
	Engine string       // required; the engine version of the Server header, "28.2.2"
	Log    *slog.Logger // required
	// Answered is told of every request when its handler has returned; may be nil.
	Answered func(Answer)
}

// Answer is how a request went.
type Answer struct {
	Method, Route string // of the table's row; "" when none matched
	Status        int    // 101 for a connection that was taken
	Took          time.Duration
}

// RequestID is the header that names a request, in answers and in logs. A client may choose it.
const RequestID = "X-Request-Id"

// requestID is the client's name for a request, or a new one.
func requestID(asked string) string {
	odd := func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || r == '-')
	}
	if asked != "" && len(asked) <= 64 && !strings.ContainsFunc(asked, odd) {
		return asked
	}
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails since Go 1.24
	return hex.EncodeToString(b[:])
}

type route struct {
	Route
	segments []string
}

type api struct {
	config Config
	routes []route
}

// New returns the handler of a table of routes. What no row matches is 404 "page not found", for a wrong method too.
func New(c Config, table []Route) http.Handler {
	a := &api{config: c, routes: make([]route, len(table))}
	for i, r := range table {
		a.routes[i] = route{r, strings.Split(strings.Trim(r.Path, "/"), "/")}
	}
	return a
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h := w.Header()
	h.Set("Server", "Docker/"+a.config.Engine+" ("+runtime.GOOS+")")
	h.Set("Api-Version", MaxVersion.String())
	h.Set("Docker-Experimental", "false")
	h.Set("Ostype", runtime.GOOS)
	id := requestID(r.Header.Get(RequestID))
	h.Set(RequestID, id)
	r.Header.Set(RequestID, id) // for whoever it is handed on to
	log := a.config.Log.With("request", id)
	begun := &answer{ResponseWriter: w}
	start := time.Now()
	defer func() {
		took := time.Since(start)
		status := begun.status
		if status == 0 {
			status = http.StatusOK
		}
		log.Debug("request", "method", r.Method, "path", r.URL.Path, "status", status, "took", took)
		if a.config.Answered != nil {
			a.config.Answered(Answer{begun.row.Method, begun.row.Path, status, took})
		}
	}()
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if p == http.ErrAbortHandler {
			panic(p)
		}
		log.Error("handler panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
		if begun.begun {
			panic(http.ErrAbortHandler) // the client must see a broken answer, not a short one
		}
		writeError(begun, fmt.Errorf("internal error: %v", p))
	}()
	err := a.serve(begun, r)
	switch {
	case err == nil:
	case begun.begun:
		log.Debug("answer ended early", "method", r.Method, "path", r.URL.Path, "err", err)
	default:
		if Status(err) == http.StatusInternalServerError {
			log.Warn("request failed", "method", r.Method, "path", r.URL.Path, "err", err)
		}
		writeError(begun, err)
	}
}

func (a *api) serve(w *answer, r *http.Request) error {
	p := path.Clean("/" + r.URL.Path)
	version := MaxVersion
	if rest, ok := strings.CutPrefix(p, "/v"); ok && rest != "" && rest[0] >= '0' && rest[0] <= '9' {
		s, tail, _ := strings.Cut(rest, "/")
		v, err := parseVersion(s)
		if err != nil {
			return err
		}
		version, p = v, "/"+tail
	}
	segments := strings.Split(strings.Trim(p, "/"), "/")
	for _, t := range a.routes {
		if t.Method != r.Method || version < t.Since {
			continue
		}
		vars, ok := match(t.segments, segments)
		if !ok {
			continue
		}
		w.row = t.Route
		// Only the query: the bodies of this API are JSON and streams, never forms.
		query := r.URL.Query()
		r.Form, r.PostForm = query, query
		return t.Handle(w, &Request{Request: r, Version: version, vars: vars})
	}
	return NotFound("page not found")
}

// match compares a path with a pattern and returns the variables.
func match(pattern, path []string) (map[string]string, bool) {
	var vars map[string]string
	for i, p := range pattern {
		name, isVar := strings.CutPrefix(p, "{")
		if !isVar {
			if len(path) == 0 || path[0] != p {
				return nil, false
			}
			path = path[1:]
			continue
		}
		n := 1
		name = strings.TrimSuffix(name, "}")
		if long, ok := strings.CutSuffix(name, "+"); ok {
			name, n = long, len(path)-(len(pattern)-i-1)
		}
		if n < 1 || len(path) < n || path[0] == "" {
			return nil, false
		}
		if vars == nil {
			vars = make(map[string]string, 1)
		}
		vars[name] = strings.Join(path[:n], "/")
		path = path[n:]
	}
	return vars, len(path) == 0
}

// answer notes whether an answer has begun, and what it answers.
type answer struct {
	http.ResponseWriter
	begun  bool
	status int
	row    Route
}

func (w *answer) WriteHeader(status int) {
	w.begun, w.status = true, status
	w.ResponseWriter.WriteHeader(status)
}

func (w *answer) Write(b []byte) (int, error) {
	w.begun = true
	return w.ResponseWriter.Write(b)
}

// Unwrap is for http.ResponseController, which also flushes and hijacks.
func (w *answer) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// hijacked says that the connection has been taken; nothing more may be written by the server.
func (w *answer) hijacked() { w.begun, w.status = true, http.StatusSwitchingProtocols }

// Bounds on what a client may send before anything is known of it.
const (
	MaxBody        = 4 << 20 // of a JSON body
	maxHeaderBytes = 64 << 10
	headerTimeout  = 30 * time.Second
	idleTimeout    = 3 * time.Minute
)

// Server returns a server with the bounds every API of this project has: on headers, on the time they take, on idle
// connections. Bodies are bounded where they are read, streams by nothing.
func Server(h http.Handler, log *slog.Logger) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
}
