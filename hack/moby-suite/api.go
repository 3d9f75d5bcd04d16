package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	// callTimeout bounds a call that a server answers from what it knows.
	callTimeout = 30 * time.Second
	// removeTimeout bounds the removal of one thing: a container may have to end first.
	removeTimeout = time.Minute
	// loadTimeout bounds the loading of one image.
	loadTimeout = 10 * time.Minute
	// maxAnswer bounds what is read of an answer, in bytes.
	maxAnswer = 16 << 20
)

// api calls a server, without a version in the path: it then speaks its own newest.
type api struct {
	client *http.Client
	base   string
}

// newAPI makes a client for host, which is as DOCKER_HOST has it: unix:// or tcp://, without TLS.
func newAPI(host string) (*api, error) {
	u, err := url.Parse(host)
	if err != nil {
		return nil, err
	}
	network, address := u.Scheme, u.Host
	switch {
	case u.Scheme == "unix" && u.Path != "":
		address = u.Path
	case u.Scheme == "tcp" && u.Host != "":
	default:
		return nil, fmt.Errorf("host %q: want unix:///PATH or tcp://HOST:PORT", host)
	}
	var d net.Dialer
	return &api{base: "http://server", client: &http.Client{Transport: &http.Transport{
		DialContext:  func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, network, address) },
		MaxIdleConns: 1, IdleConnTimeout: 10 * time.Second,
	}}}, nil
}

// call sends a request and returns what came back. An answer that is not 2xx is an *answerError.
func (a *api) call(ctx context.Context, timeout time.Duration, method, path string, body io.Reader) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, a.base+path, body)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/x-tar")
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, errors.Unwrap(err))
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("%s %s: %w", method, path, err)
	}
	if len(b) > maxAnswer {
		return nil, fmt.Errorf("%s %s: an answer of more than %d MiB", method, path, maxAnswer>>20)
	}
	if resp.StatusCode/100 != 2 {
		return nil, &answerError{method, path, resp.StatusCode, string(bytes.TrimSpace(tail(b, 1<<10)))}
	}
	return b, nil
}

// answerError is a server's refusal.
type answerError struct {
	method, path string
	code         int
	text         string
}

func (e *answerError) Error() string {
	return fmt.Sprintf("%s %s: %d %s", e.method, e.path, e.code, e.text)
}

func (a *api) get(ctx context.Context, path string, into any) error {
	b, err := a.call(ctx, callTimeout, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("GET %s: %w", path, err)
	}
	return nil
}

func (a *api) ping(ctx context.Context) error {
	_, err := a.call(ctx, callTimeout, http.MethodGet, "/_ping", nil)
	return err
}

// version is what a server says of itself.
type version struct {
	Version    string `json:"version"`
	APIVersion string `json:"apiVersion"`
	Platform   string `json:"platform,omitempty"`
	Kernel     string `json:"kernel,omitempty"`
	Driver     string `json:"storageDriver,omitempty"`
}

func (a *api) version(ctx context.Context) (version, error) {
	var v struct {
		Version, APIVersion, KernelVersion string
		Platform                           struct{ Name string }
	}
	if err := a.get(ctx, "/version", &v); err != nil {
		return version{}, err
	}
	var info struct{ Driver string }
	if err := a.get(ctx, "/info", &info); err != nil {
		return version{}, err
	}
	return version{v.Version, v.APIVersion, v.Platform.Name, v.KernelVersion, info.Driver}, nil
}

// load gives the server an image. What goes wrong there is in the answer, whose status is 200 all the same.
func (a *api) load(ctx context.Context, img archive) error {
	f, err := os.Open(img.path)
	if err != nil {
		return err
	}
	defer f.Close()
	answer, err := a.call(ctx, loadTimeout, http.MethodPost, "/images/load?quiet=1", f)
	if err != nil {
		return fmt.Errorf("load %s: %w", img.ref, err)
	}
	for dec := json.NewDecoder(bytes.NewReader(answer)); ; {
		var m struct{ Error string }
		if err := dec.Decode(&m); err != nil {
			break // the end, or text; what counts is whether the image is there
		}
		if m.Error != "" {
			return fmt.Errorf("load %s: %s", img.ref, m.Error)
		}
	}
	if ok, err := a.has(ctx, img.ref); err != nil || !ok {
		return errors.Join(fmt.Errorf("load %s: the server took it and does not know it", img.ref), err)
	}
	return nil
}

// has reports whether the server has an image.
func (a *api) has(ctx context.Context, ref string) (bool, error) {
	_, err := a.call(ctx, callTimeout, http.MethodGet, "/images/"+ref+"/json", nil)
	if refused := (*answerError)(nil); errors.As(err, &refused) && refused.code == http.StatusNotFound {
		return false, nil
	}
	return err == nil, err
}

// thing is what a server keeps and a test may leave behind.
type thing struct{ kind, id string }

// The kinds of things, in the order in which they can be removed.
const (
	containerKind = "container"
	imageKind     = "image"
	volumeKind    = "volume"
	networkKind   = "network"
)

// builtIn are the networks that every server has and none removes.
var builtIn = []string{"bridge", "host", "none", "ingress", "docker_gwbridge"}

// things lists what the server keeps. An image is listed under each of its names, or under its ID when it has none.
func (a *api) things(ctx context.Context) ([]thing, error) {
	var (
		containers []struct{ ID string }
		images     []struct {
			ID       string
			RepoTags []string
		}
		volumes struct{ Volumes []struct{ Name string } }
		nets    []struct{ ID, Name string }
	)
	err := errors.Join(
		a.get(ctx, "/containers/json?all=1", &containers),
		a.get(ctx, "/images/json", &images),
		a.get(ctx, "/volumes", &volumes),
		a.get(ctx, "/networks", &nets),
	)
	var out []thing
	for _, c := range containers {
		out = append(out, thing{containerKind, c.ID})
	}
	for _, i := range images {
		tags := slices.DeleteFunc(slices.Clone(i.RepoTags), func(t string) bool { return strings.HasPrefix(t, "<none>") })
		if len(tags) == 0 {
			tags = []string{i.ID}
		}
		for _, t := range tags {
			out = append(out, thing{imageKind, t})
		}
	}
	for _, v := range volumes.Volumes {
		out = append(out, thing{volumeKind, v.Name})
	}
	for _, n := range nets {
		if !slices.Contains(builtIn, n.Name) {
			out = append(out, thing{networkKind, n.ID})
		}
	}
	return out, err
}

func (a *api) remove(ctx context.Context, t thing) error {
	path := map[string]string{
		containerKind: "/containers/" + t.id + "?force=1&v=1",
		imageKind:     "/images/" + t.id + "?force=1",
		volumeKind:    "/volumes/" + url.PathEscape(t.id) + "?force=1",
		networkKind:   "/networks/" + t.id,
	}[t.kind]
	if t.kind == containerKind {
		// A paused one cannot be killed; that it is not paused is no error.
		_, _ = a.call(ctx, callTimeout, http.MethodPost, "/containers/"+t.id+"/unpause", nil)
	}
	_, err := a.call(ctx, removeTimeout, http.MethodDelete, path, nil)
	if refused := (*answerError)(nil); errors.As(err, &refused) && refused.code == http.StatusNotFound {
		return nil
	}
	return err
}

// tidy removes what is not in keep and loads those images again that are missing: the next test finds what the first found.
// Its error says what could not be done; the rest was.
func (a *api) tidy(ctx context.Context, keep []thing, images []archive) error {
	all, err := a.things(ctx)
	for _, t := range all {
		if !slices.Contains(keep, t) {
			err = errors.Join(err, a.remove(ctx, t))
		}
	}
	for _, img := range images {
		if !slices.Contains(all, thing{imageKind, img.ref}) {
			err = errors.Join(err, a.load(ctx, img))
		}
	}
	return err
}
