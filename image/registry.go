package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/image/layer"
)

// ErrPlainHTTP says that a registry would have to be spoken to without TLS and was not named as one of those.
var ErrPlainHTTP = errors.New("plain HTTP is not allowed")

// registry is a repository of a registry, with an authenticated client.
type registry struct {
	host   string
	repo   string
	scheme string
	client *http.Client

	// What the client is made of, for another one of the library's.
	registry name.Registry
	name     name.Repository
	auth     authn.Authenticator
	guard    http.RoundTripper
}

// dialRegistry speaks the registry's authentication handshake, for a scope as transport.PullScope.
func dialRegistry(ctx context.Context, ref Reference, o PullOptions, scope string) (*registry, error) {
	repo, err := name.NewRepository(ref.domain()+"/"+ref.repository(), name.Insecure)
	if err != nil {
		return nil, err
	}
	host := repo.RegistryStr()
	plain := ref.plainHTTP || slices.Contains(o.PlainHTTP, ref.domain()) || slices.Contains(o.PlainHTTP, host)
	r := undialed(repo.Registry, plain)
	r.repo, r.name = repo.RepositoryStr(), repo
	if r.auth, err = authn.Resolve(ctx, o.Keychain, repo); err != nil {
		return nil, fmt.Errorf("find credentials for %s: %w", host, err)
	}
	return r, r.dial(ctx, []string{repo.Scope(scope)})
}

// undialed is a registry that nothing was said to yet.
func undialed(reg name.Registry, plain bool) *registry {
	host := reg.RegistryStr()
	base := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 20 * time.Second}).DialContext,
		ForceAttemptHTTP2:     true,
		TLSHandshakeTimeout:   20 * time.Second,
		ResponseHeaderTimeout: stallTimeout,
		IdleConnTimeout:       30 * time.Second,
		MaxIdleConnsPerHost:   16,
		DisableCompression:    true, // a blob is the bytes with its digest, not what they would unpack to
	}
	r := &registry{host: host, scheme: "https", registry: reg, guard: schemes{host: host, plain: plain, next: base}}
	if plain {
		r.scheme = "http"
	}
	return r
}

// dial speaks the authentication handshake.
func (r *registry) dial(ctx context.Context, scopes []string) error {
	return retry(ctx, func() error {
		t, err := transport.NewWithContext(ctx, r.registry, r.auth, r.guard, scopes)
		if err != nil {
			return r.explain(err)
		}
		r.client = &http.Client{Transport: t}
		return nil
	})
}

// schemes lets requests to the registry go over the one scheme it was named with, and no request fall back from TLS to
// plain HTTP: the library below would do so for names that look local.
type schemes struct {
	host  string
	plain bool
	next  http.RoundTripper
}

func (s schemes) RoundTrip(r *http.Request) (*http.Response, error) {
	switch {
	case r.URL.Scheme == "http" && !s.plain:
		return nil, fmt.Errorf("%s: %w", r.URL.Host, ErrPlainHTTP)
	case r.URL.Scheme == "https" && s.plain && r.URL.Host == s.host:
		return nil, fmt.Errorf("%s was named as a registry that speaks plain HTTP", r.URL.Host)
	}
	return s.next.RoundTrip(r)
}

// explain turns a registry's error into ours, with the remedy.
func (r *registry) explain(err error) error {
	var te *transport.Error
	if errors.As(err, &te) {
		switch te.StatusCode {
		case http.StatusUnauthorized, http.StatusForbidden:
			return fmt.Errorf("%w by %s: there is no such repository, or it wants a login: docker login %s: %w", ErrUnauthorized, r.host, r.host, err)
		case http.StatusNotFound:
			return fmt.Errorf("%w at %s: %w", ErrNotFound, r.host, err)
		}
		return err
	}
	if errors.Is(err, http.ErrSchemeMismatch) || errors.Is(err, ErrPlainHTTP) && errors.Is(err, unix.ECONNREFUSED) ||
		strings.Contains(err.Error(), "HTTP response to HTTPS client") {
		return fmt.Errorf("%s does not speak TLS; if it is meant to be spoken to without, say so: --plain-http %s, or docker+http://%s/…: %w",
			r.host, r.host, r.host, ErrPlainHTTP)
	}
	return err
}

func (r *registry) get(ctx context.Context, path string, header http.Header) (*http.Response, error) {
	return r.ask(ctx, http.MethodGet, path, header)
}

// has says whether the repository has a blob.
func (r *registry) has(ctx context.Context, d digest.Digest) (bool, error) {
	found := false
	err := retry(ctx, func() error {
		ctx, cancel := context.WithTimeout(ctx, stallTimeout)
		defer cancel()
		resp, err := r.ask(ctx, http.MethodHead, "blobs/"+d.String(), nil)
		if errors.Is(err, ErrNotFound) {
			return nil
		}
		if err != nil {
			return err
		}
		found = true
		return resp.Body.Close()
	})
	return found, err
}

func (r *registry) ask(ctx context.Context, method, path string, header http.Header) (*http.Response, error) {
	return r.askAt(ctx, method, "/v2/"+r.repo+"/"+path, header)
}

// askAt is ask with the whole path.
func (r *registry) askAt(ctx context.Context, method, path string, header http.Header) (*http.Response, error) {
	u := url.URL{Scheme: r.scheme, Host: r.host, Path: path}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), nil)
	if err != nil {
		return nil, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	resp, err := r.client.Do(req)
	if err != nil {
		return nil, r.explain(err)
	}
	if err := transport.CheckError(resp, http.StatusOK, http.StatusPartialContent); err != nil {
		resp.Body.Close()
		return nil, r.explain(err)
	}
	return resp, nil
}

// document reads something small.
func (r *registry) document(ctx context.Context, path string, header http.Header) (b []byte, h http.Header, err error) {
	err = retry(ctx, func() error {
		ctx, cancel := context.WithTimeout(ctx, stallTimeout)
		defer cancel()
		resp, err := r.get(ctx, path, header)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		b, err = io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
		if err == nil && len(b) > maxDocument {
			err = fmt.Errorf("%w: more than %d bytes", ErrUnsupported, maxDocument)
		}
		h = resp.Header
		return err
	})
	return b, h, err
}

// blob opens a blob from an offset on.
func (r *registry) blob(ctx context.Context, d ocispec.Descriptor, offset int64) (io.ReadCloser, error) {
	h := http.Header{}
	if offset > 0 {
		h.Set("Range", "bytes="+strconv.FormatInt(offset, 10)+"-")
	}
	resp, err := r.get(ctx, "blobs/"+d.Digest.String(), h)
	if err != nil {
		return nil, err
	}
	if offset > 0 && resp.StatusCode == http.StatusPartialContent {
		if want := fmt.Sprintf("bytes %d-", offset); !strings.HasPrefix(resp.Header.Get("Content-Range"), want) {
			resp.Body.Close()
			return nil, fmt.Errorf("%s sent the range %.100q, not from byte %d on", r.host, resp.Header.Get("Content-Range"), offset)
		}
		return resp.Body, nil
	}
	// A registry that knows no ranges sends all of it.
	if _, err := io.CopyN(io.Discard, resp.Body, offset); err != nil {
		resp.Body.Close()
		return nil, noEOF(err)
	}
	return resp.Body, nil
}

// retry repeats an act whose error may be gone the next time.
func retry(ctx context.Context, act func() error) error {
	for try := 1; ; try++ {
		err := act()
		if err == nil || try >= maxAttempts-1 || !transient(err) || ctx.Err() != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(backoff(try)):
		}
	}
}

// acceptManifests is what manifests are asked for with.
func acceptManifests() http.Header {
	return http.Header{"Accept": {strings.Join([]string{
		ocispec.MediaTypeImageIndex, dockerManifestList, ocispec.MediaTypeImageManifest, dockerManifest,
	}, ", ")}}
}

// top reads the manifest or index that a name leads to, with its media type.
func (r *registry) top(ctx context.Context, ref Reference) (b []byte, mediaType string, err error) {
	b, header, err := r.document(ctx, "manifests/"+ref.target(), acceptManifests())
	if err != nil {
		return nil, "", err
	}
	want := ref.pinned()
	if h := digest.Digest(header.Get("Docker-Content-Digest")); want == "" && h.Validate() == nil && h.Algorithm() == digest.SHA256 {
		want = h
	}
	if got := digest.FromBytes(b); want != "" && got != want {
		return nil, "", fmt.Errorf("manifest %s: %w: it has %s", want, ErrCorrupt, got)
	}
	mediaType, _, _ = strings.Cut(header.Get("Content-Type"), ";")
	return b, strings.TrimSpace(mediaType), nil
}

// described reads a small document by its descriptor.
func (r *registry) described(ctx context.Context, d ocispec.Descriptor) ([]byte, error) {
	path := "blobs/"
	if isManifest(d.MediaType) {
		path = "manifests/"
	}
	b, _, err := r.document(ctx, path+d.Digest.String(), acceptManifests())
	return b, err
}

// Distribution asks a registry what a name leads to, and for which platforms there are images.
func Distribution(ctx context.Context, ref Reference, o PullOptions) (d ocispec.Descriptor, platforms []ocispec.Platform, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("look up %s: %w", ref, err)
		}
	}()
	if err := o.check(); err != nil {
		return d, nil, err
	}
	r, err := dialRegistry(ctx, ref, o, transport.PullScope)
	if err != nil {
		return d, nil, err
	}
	top, mediaType, err := r.top(ctx, ref)
	if err != nil {
		return d, nil, err
	}
	doc, err := parseDocument(top, mediaType)
	if err != nil {
		return d, nil, err
	}
	d = ocispec.Descriptor{MediaType: doc.MediaType, Digest: digest.FromBytes(top), Size: int64(len(top))}
	if doc.isIndex() {
		for _, m := range doc.Manifests {
			if m.Platform != nil && m.Platform.OS != "unknown" { // attestations
				platforms = append(platforms, *m.Platform)
			}
		}
		return d, platforms, nil
	}
	if err := checkDescriptor(*doc.Config, maxDocument); err != nil {
		return d, nil, err
	}
	config, err := r.described(ctx, *doc.Config)
	if err != nil {
		return d, nil, err
	}
	if got := digest.FromBytes(config); got != doc.Config.Digest {
		return d, nil, fmt.Errorf("configuration %s: %w: it has %s", doc.Config.Digest, ErrCorrupt, got)
	}
	var p ocispec.Platform
	if err := json.Unmarshal(config, &p); err != nil {
		return d, nil, fmt.Errorf("%w: configuration: %w", ErrUnsupported, err)
	}
	return d, []ocispec.Platform{p}, nil
}

// findRemote finds an image at its registry.
func findRemote(ctx context.Context, ref Reference, o PullOptions) (*found, error) {
	r, err := dialRegistry(ctx, ref, o, transport.PullScope)
	if err != nil {
		return nil, err
	}
	top, mediaType, err := r.top(ctx, ref)
	if err != nil {
		return nil, err
	}
	f, err := resolve(top, mediaType, func(d ocispec.Descriptor) ([]byte, error) { return r.described(ctx, d) })
	if err != nil {
		return nil, err
	}
	f.names, f.source, f.transport, f.remote = []string{ref.Key()}, ref.String(), Registry, true
	f.open = func(ctx context.Context, n int, offset int64) (io.ReadCloser, error) {
		return r.blob(ctx, f.layers[n], offset)
	}
	return f, nil
}

func isLimit(err error) bool { return errors.Is(err, layer.ErrLimit) }

// isSystem says whether an error is this machine's: a full disk has nothing to do with what came.
func isSystem(err error) bool {
	var errno unix.Errno
	return errors.As(err, &errno)
}
