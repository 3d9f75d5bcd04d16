// Package client speaks the Docker Engine API to a server of this project over connections that its caller makes. The moby
// client would do, and would bring OpenTelemetry along.
//
//	c := client.Client{Dial: bundle.DialVdocker}
//	err := c.Do(ctx, "POST", "/containers/web/stop", nil, nil, nil)
package client

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"

	"github.com/kcradle/kcradle/dockerapi"
)

// Client asks one server, over a connection for each request.
type Client struct {
	Dial func(ctx context.Context) (net.Conn, error)
}

// maxAnswer bounds what is read of an answer that is kept in memory.
const maxAnswer = 16 << 20

// Do sends one request. body (JSON) and into may be nil.
func (c Client) Do(ctx context.Context, method, path string, query url.Values, body, into any) error {
	var r io.Reader
	header := http.Header{}
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		r = bytes.NewReader(b)
		header.Set("Content-Type", "application/json")
	}
	resp, err := c.Stream(ctx, method, path, query, header, r)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if into == nil {
		_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, maxAnswer))
		return err
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(into); err != nil {
		return fmt.Errorf("%s %s: read the answer: %w", method, path, err)
	}
	return nil
}

// Stream sends one request and returns its answer, which the caller closes. An answer that is no success is a
// [*dockerapi.Error].
func (c Client) Stream(ctx context.Context, method, path string, query url.Values, header http.Header, body io.Reader) (*http.Response, error) {
	t := &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.Dial(ctx) },
		DisableKeepAlives: true, DisableCompression: true,
	}
	u := url.URL{Scheme: "http", Host: "vdocker", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), body)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := t.RoundTrip(req)
	if err != nil {
		return nil, fmt.Errorf("ask the pod: %w", err)
	}
	if err := refused(resp); err != nil {
		resp.Body.Close()
		return nil, err
	}
	return resp, nil
}

// refused is docker's error in an answer that is none of success.
func refused(resp *http.Response) error {
	if resp.StatusCode < 400 {
		return nil
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return err
	}
	var e struct{ Message string }
	if json.Unmarshal(b, &e) != nil || e.Message == "" {
		e.Message = fmt.Sprintf("%s: %s", resp.Status, strings.TrimSpace(string(b)))
	}
	return &dockerapi.Error{Status: resp.StatusCode, Err: errors.New(e.Message)}
}

// Hijacked is a connection that has left HTTP: what was asked goes in, what runs answers.
type Hijacked struct {
	net.Conn
	r *bufio.Reader
	// Multiplexed says that stdout and stderr come in frames.
	Multiplexed bool
}

func (h *Hijacked) Read(b []byte) (int, error) { return h.r.Read(b) }

// CloseWrite ends the input and lets output go on.
func (h *Hijacked) CloseWrite() error {
	if w, ok := h.Conn.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

// Hijack sends a POST that turns into a stream. body (JSON) may be nil.
func (c Client) Hijack(ctx context.Context, path string, query url.Values, body any) (*Hijacked, error) {
	var b []byte
	if body != nil {
		var err error
		if b, err = json.Marshal(body); err != nil {
			return nil, err
		}
	}
	u := url.URL{Scheme: "http", Host: "vdocker", Path: path, RawQuery: query.Encode()}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, u.String(), bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", "tcp")
	conn, err := c.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("ask the pod: %w", err)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	r := bufio.NewReader(conn)
	err = req.Write(conn)
	var resp *http.Response
	if err == nil {
		resp, err = http.ReadResponse(r, req)
	}
	if err == nil {
		err = refused(resp)
	}
	if err == nil && resp.StatusCode != http.StatusSwitchingProtocols {
		err = fmt.Errorf("ask the pod: POST %s: the answer is %s, not a stream", path, resp.Status)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &Hijacked{conn, r, strings.Contains(resp.Header.Get("Content-Type"), "multiplexed")}, nil
}
