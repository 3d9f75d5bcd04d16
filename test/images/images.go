// Package images makes the container images of the demo, the tests and the benchmark from Debian packages of the
// machine it runs on: no registry is asked, only the machine's own apt sources. Each image is built once, kept in a
// cache directory under the digest of its recipe, and offered as an OCI layout and as an archive of docker save's form.
//
//	cache, err := images.Open("", os.Stderr)
//	built, err := cache.Build(ctx, "mariadb")
//	kcradle summon DIR oci:<built.Layout>
package images

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"golang.org/x/sys/unix"
)

// DefaultDir is where images are kept when neither the caller nor KCRADLE_TEST_CACHE says otherwise.
const DefaultDir = "/var/cache/kcradle-test"

// Cache is a directory of built images. Several processes may use one at a time.
type Cache struct {
	dir string
	log io.Writer
}

// Built is an image in the cache. It stays until somebody removes the cache's directory.
type Built struct {
	Name    string
	Ref     string // the tag in Archive: "test/NAME:latest"
	Layout  string // directory of an OCI layout that holds this image alone, tagged "latest"
	Archive string // a file as docker save writes it, layers uncompressed
}

// Open returns the cache at dir, which is made when it does not exist. An empty dir means KCRADLE_TEST_CACHE, then
// DefaultDir. Progress and the output of failing builds go to log.
func Open(dir string, log io.Writer) (*Cache, error) {
	if dir == "" {
		dir = os.Getenv("KCRADLE_TEST_CACHE")
	}
	if dir == "" {
		dir = DefaultDir
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	return &Cache{dir: dir, log: log}, nil
}

// Names lists the images there are recipes for, in the order of the table.
func Names() []string {
	var names []string
	for _, r := range recipes() {
		names = append(names, r.name)
	}
	return names
}

// Build returns the image called name and makes it first when the cache has not got it. It needs to be root for those
// that hold Debian packages.
func (c *Cache) Build(ctx context.Context, name string) (*Built, error) {
	r, err := find(name)
	if err != nil {
		return nil, err
	}
	host, err := readHost(ctx)
	if err != nil {
		return nil, err
	}
	key, err := r.key(host)
	if err != nil {
		return nil, err
	}
	b := c.built(name, key)
	if exists(b.Layout) {
		return b, nil
	}
	if r.root() && os.Geteuid() != 0 {
		return nil, fmt.Errorf("build image %s: devices and owners of an image can be made by root only (run as root)", name)
	}
	unlock, err := c.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if exists(b.Layout) {
		return b, nil
	}
	start := time.Now()
	fmt.Fprintf(c.log, "image %s: building from Debian packages\n", name)
	if err := c.build(ctx, r, host, filepath.Dir(b.Layout)); err != nil {
		return nil, fmt.Errorf("build image %s: %w", name, err)
	}
	fmt.Fprintf(c.log, "image %s: built in %.1f s\n", name, time.Since(start).Seconds())
	return b, nil
}

// Image opens the built image.
func (b *Built) Image() (v1.Image, error) {
	index, err := layout.ImageIndexFromPath(b.Layout)
	if err != nil {
		return nil, fmt.Errorf("open image %s: %w", b.Name, err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		return nil, fmt.Errorf("open image %s: %w", b.Name, err)
	}
	if len(m.Manifests) != 1 {
		return nil, fmt.Errorf("open image %s: layout %s holds %d images, want 1", b.Name, b.Layout, len(m.Manifests))
	}
	return index.Image(m.Manifests[0].Digest)
}

func (c *Cache) built(name, key string) *Built {
	dir := filepath.Join(c.dir, "images", name+"-"+key[:16])
	return &Built{
		Name:    name,
		Ref:     ref(name),
		Layout:  filepath.Join(dir, "oci"),
		Archive: filepath.Join(dir, "docker.tar"),
	}
}

func ref(name string) string { return "test/" + name + ":latest" }

// lock takes the cache for one builder.
func (c *Cache) lock(ctx context.Context) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(c.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, err
	}
	got := make(chan error, 1)
	// The waiter ends with the lock or with the file: closing does not wake flock, so a cancelled wait lasts until the
	// other builder is done or this process ends.
	go func() { got <- unix.Flock(int(f.Fd()), unix.LOCK_EX) }()
	select {
	case err := <-got:
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
		}
		return func() { f.Close() }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for another builder of %s: %w", c.dir, ctx.Err())
	}
}

// atomically makes dir by handing fill a new directory beside it and renaming that when fill has succeeded.
func atomically(dir string, fill func(tmp string) error) (err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".new-")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(tmp))
		}
	}()
	if err := fill(tmp); err != nil {
		return err
	}
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	return os.Rename(tmp, dir)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func find(name string) (*recipe, error) {
	rs := recipes()
	i := slices.IndexFunc(rs, func(r *recipe) bool { return r.name == name })
	if i < 0 {
		return nil, fmt.Errorf("no recipe for an image %q (there are %s)", name, strings.Join(Names(), ", "))
	}
	return rs[i], nil
}

// root says that the image is made in a root directory, which only root can.
func (r *recipe) root() bool {
	if r.base || len(r.packages) > 0 || r.script != "" {
		return true
	}
	p, err := find(r.parent)
	return err == nil && p.root()
}

// key is the digest of all that shapes the image.
func (r *recipe) key(h *host) (string, error) {
	parent := ""
	if r.parent != "" {
		p, err := find(r.parent)
		if err != nil {
			return "", err
		}
		if parent, err = p.key(h); err != nil {
			return "", err
		}
	}
	b, err := json.Marshal(struct {
		Version, Parent, Codename, Busybox string
		Packages                           []string
		Script                             string
		Files                              []file
		Config                             v1.Config
		Zstd                               bool
		Arch                               string `json:",omitempty"`
	}{r.version, parent, h.codename, h.busybox, r.packages, r.script, r.files, r.config, r.zstd, r.arch})
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:]), nil
}
