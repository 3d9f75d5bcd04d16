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
	"os"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/image/layer"
)

// errNoDaemon says that no docker daemon answers.
var errNoDaemon = errors.New("no docker daemon answers")

const defaultDockerHost = "unix:///var/run/docker.sock"

// daemon is the little of the Docker API that is needed to take an image out.
type daemon struct {
	host   string
	base   string
	client *http.Client
}

func newDaemon(host string) (*daemon, error) {
	if host == "" {
		host = os.Getenv("DOCKER_HOST")
	}
	if host == "" {
		host = defaultDockerHost
	}
	d := &daemon{host: host, base: "http://docker"}
	t := &http.Transport{DisableCompression: true, ResponseHeaderTimeout: stallTimeout}
	scheme, addr, _ := strings.Cut(host, "://")
	switch scheme {
	case "unix":
		t.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", addr)
		}
	case "tcp":
		t.DialContext = (&net.Dialer{Timeout: 5 * time.Second}).DialContext
		if os.Getenv("DOCKER_TLS_VERIFY") != "" {
			return nil, fmt.Errorf("%w: %s wants TLS, which is not supported; save the image with docker save and use docker-archive:FILE", errNoDaemon, host)
		}
		d.base = "http://" + strings.TrimSuffix(addr, "/")
	default:
		return nil, fmt.Errorf("%w: the address %q is not supported (unix:// and tcp:// are); save the image with docker save and use docker-archive:FILE", errNoDaemon, host)
	}
	d.client = &http.Client{Transport: t}
	return d, nil
}

func (d *daemon) get(ctx context.Context, path string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, d.base+(&url.URL{Path: path}).EscapedPath(), nil)
	if err != nil {
		return nil, err
	}
	resp, err := d.client.Do(req)
	if err != nil {
		if errors.Is(err, unix.EACCES) {
			return nil, fmt.Errorf("%w at %s: no right to speak to it; join the group docker: %w", errNoDaemon, d.host, err)
		}
		if errors.Is(ctx.Err(), context.Canceled) {
			return nil, err
		}
		return nil, fmt.Errorf("%w at %s: %w", errNoDaemon, d.host, err)
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer resp.Body.Close()
	var e struct{ Message string }
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 16<<10))
	_ = json.Unmarshal(b, &e) // the status says enough
	if resp.StatusCode == http.StatusNotFound || resp.StatusCode == http.StatusNotImplemented {
		return nil, fmt.Errorf("%w in the docker daemon: %s %.200s", ErrNotFound, resp.Status, e.Message)
	}
	return nil, fmt.Errorf("docker daemon: %s %.200s", resp.Status, e.Message)
}

// inspection is what is needed of GET /images/NAME/json.
type inspection struct {
	ID           string `json:"Id"`
	Os           string
	Architecture string
	RootFS       struct{ Layers []digest.Digest }
}

func (d *daemon) inspect(ctx context.Context, name string) (*inspection, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	resp, err := d.get(ctx, "/images/"+name+"/json")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument))
	if err != nil {
		return nil, err
	}
	var i inspection
	if err := json.Unmarshal(b, &i); err != nil {
		return nil, fmt.Errorf("%w: what it says of the image: %w", errNoDaemon, err)
	}
	return &i, nil
}

// pullDaemon takes an image out of a docker daemon, unless the store has the same one.
func (s *Store) pullDaemon(ctx context.Context, ref Reference, o PullOptions) (*Image, error) {
	d, err := newDaemon(o.DockerHost)
	if err != nil {
		return nil, err
	}
	defer d.client.CloseIdleConnections()
	name := ref.id.String()
	if ref.named != nil {
		name = reference.FamiliarString(ref.named)
	}
	i, err := d.inspect(ctx, name)
	if err != nil {
		return nil, err
	}
	if i.Os != "" && i.Os != "linux" || i.Architecture != "" && i.Architecture != "amd64" {
		return nil, fmt.Errorf("%w: the docker daemon's is for %s/%s", ErrPlatform, i.Os, i.Architecture)
	}
	if img := s.same(ref.Key(), i); img != nil {
		return img, nil
	}
	resp, err := d.get(ctx, "/images/"+name+"/get")
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if o.Progress != nil {
		o.Progress(Event{Message: "exporting from the docker daemon"})
	}
	a, err := s.spoolArchive(ctx, resp.Body, o.Limits)
	if err != nil {
		return nil, fmt.Errorf("export from the docker daemon: %w", err)
	}
	defer a.close()
	f, err := a.dockerImage(func(m dockerImage) bool { return true })
	if err != nil {
		return nil, fmt.Errorf("export from the docker daemon: %w", err)
	}
	if !slices.Equal(f.diffIDs, i.RootFS.Layers) {
		return nil, fmt.Errorf("export from the docker daemon: %w: its layers are not those of the image", ErrCorrupt)
	}
	f.names, f.source, f.transport = []string{ref.Key()}, ref.String(), DockerDaemon
	return s.fetch(ctx, f, o)
}

// same returns the store's image under a name if it is the one the daemon has.
func (s *Store) same(key string, i *inspection) *Image {
	img, err := s.get(key)
	if err != nil {
		return nil
	}
	// Docker's image ID is the configuration's digest, with containerd's store the manifest's.
	if img.ConfigDigest.String() != i.ID && img.Digest.String() != i.ID {
		return nil
	}
	for _, l := range img.Layers {
		if s.hasSkeleton(l.DiffID) != nil {
			return nil // an older kcradle converted it
		}
	}
	return img
}

// spoolArchive copies an archive into a nameless file of the store.
func (s *Store) spoolArchive(ctx context.Context, r io.Reader, limits layer.Limits) (*archive, error) {
	limit := limits.Bytes
	if limit == 0 {
		limit = layer.DefaultBytes
	}
	f, err := s.nameless()
	if err != nil {
		return nil, err
	}
	z, err := decompress(r)
	if err == nil {
		defer z.Close()
		var n int64
		n, err = io.Copy(f, io.LimitReader(ctxReader{ctx, z}, limit+1))
		if err == nil && n > limit {
			err = fmt.Errorf("%w: the archive unpacks to more than %d bytes", layer.ErrLimit, limit)
		}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	a, err := newArchive(f)
	if err != nil {
		f.Close()
		return nil, err
	}
	return a, nil
}

// nameless makes a file that vanishes with the process.
func (s *Store) nameless() (*os.File, error) {
	f, err := os.CreateTemp(s.path(dirIngest), "spool-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// ctxReader ends with its context, between two reads.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c ctxReader) Read(p []byte) (int, error) {
	if c.ctx.Err() != nil {
		return 0, context.Cause(c.ctx)
	}
	return c.r.Read(p)
}
