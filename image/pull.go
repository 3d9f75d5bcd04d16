package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/image/layer"
)

// Policy says when a pull asks the source.
type Policy string

// The policies, docker's. An empty one is Missing.
const (
	Missing Policy = "missing" // local sources: always, it is cheap; registries: if the store has no such image
	Always  Policy = "always"
	Never   Policy = "never" // only what the store has
)

// defaultParallel is how many layers are worked on at a time.
const defaultParallel = 4

// PullOptions of Store.Pull. The zero value is fine.
type PullOptions struct {
	Platform string // empty or linux/amd64
	Policy   Policy // empty: Missing
	// AnyPlatform keeps images of an archive that cannot run here, as docker load does.
	AnyPlatform bool
	// PlainHTTP are the registries (HOST[:PORT]) that may be spoken to without TLS. Nothing else makes a registry
	// one of them, not even its being on this machine.
	PlainHTTP []string
	// Progress is told what happens, one event at a time. It must not block for long. May be nil.
	Progress func(Event)
	Parallel int // layers at a time; zero: 4
	// KeepBlobs keeps the compressed layers, too, so that the image can be pushed or saved with the digests it had.
	KeepBlobs bool
	// Limits bound a layer. With Limits.Bytes zero it may unpack to 64 GiB, and to 200 times its size where that
	// is more than 4 GiB.
	Limits layer.Limits
	// Keychain has the registries' credentials; nil: docker's configuration and its credential helpers.
	Keychain authn.Keychain
	// DockerHost is the daemon's address, "unix:///…" or "tcp://…"; empty: $DOCKER_HOST, else docker's default.
	DockerHost string
	// Containerd is the socket of a containerd; empty: $CONTAINERD_ADDRESS, else containerd's default.
	Containerd string
	// Namespace is the containerd's; empty: $CONTAINERD_NAMESPACE, else "default".
	Namespace string
}

func (o *PullOptions) check() error {
	switch o.Policy {
	case "":
		o.Policy = Missing
	case Missing, Always, Never:
	default:
		return fmt.Errorf("pull policy %q is not known (known: missing, always, never)", o.Policy)
	}
	switch o.Platform {
	case "", Platform, "amd64", "linux/x86_64":
	default:
		return fmt.Errorf("platform %q: machines are %s only", o.Platform, Platform)
	}
	if o.Parallel < 0 || o.Limits.Bytes < 0 || o.Limits.Entries < 0 {
		return errors.New("negative limit")
	}
	if o.Parallel == 0 {
		o.Parallel = defaultParallel
	}
	if o.Keychain == nil {
		o.Keychain = authn.DefaultKeychain
	}
	return nil
}

// found is an image at its source.
type found struct {
	names     []string // under which the store will keep it
	source    string
	transport Transport
	manifest  []byte
	config    []byte
	diffIDs   []digest.Digest
	layers    []ocispec.Descriptor // as stored; in the order of diffIDs
	// open returns a layer's stored bytes from an offset on.
	open func(ctx context.Context, n int, offset int64) (io.ReadCloser, error)
	// remote sources fail at times: they are asked again, and what was read is kept for the next pull.
	remote bool
	// unhashed: the digests of layers are not those of the stored bytes. Only the diffID can be checked.
	unhashed bool
}

// Pull makes an image be in the store and returns it. Layers that are there already cost nothing; those that another
// process works on at the moment are waited for.
func (s *Store) Pull(ctx context.Context, ref Reference, o PullOptions) (*Image, error) {
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("pull %s: %w", ref, err)
	}
	img, err := s.pull(ctx, ref, o)
	if err == nil && !o.AnyPlatform {
		err = img.Runs() // the store may have got it otherwise
	}
	if err != nil {
		return nil, fmt.Errorf("pull %s: %w", ref, explain(err, s.dir))
	}
	return img, nil
}

// explain adds the remedy to errors of the system that have one.
func explain(err error, dir string) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w; make room on the disk of %s, for example with: kcradle prune --all", err, dir)
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w; choose another state directory with --root", err)
	case errors.Is(err, layer.ErrLimit):
		return fmt.Errorf("%w; if you trust the image, allow more with --max-layer-size", err)
	}
	return err
}

func (s *Store) pull(ctx context.Context, ref Reference, o PullOptions) (*Image, error) {
	if o.Policy == Never {
		return s.Get(ctx, ref)
	}
	switch ref.transport {
	case Any:
		img, err := s.pullDaemon(ctx, ref, o)
		if err == nil || !errors.Is(err, errNoDaemon) && !errors.Is(err, ErrNotFound) {
			return img, err
		}
		s.log.Debug("the docker daemon has no such image", "image", ref.String(), "err", err)
		return s.pullRegistry(ctx, ref, o)
	case Registry:
		return s.pullRegistry(ctx, ref, o)
	case DockerDaemon:
		return s.pullDaemon(ctx, ref, o)
	case Containerd:
		return s.pullContainerd(ctx, ref, o)
	case OCILayout:
		return s.pullLayout(ctx, ref, o)
	case DockerArchive, OCIArchive:
		return s.pullArchive(ctx, ref, o)
	}
	return nil, fmt.Errorf("transport %q is not known", ref.transport)
}

// pullRegistry asks the store first, then the registry.
func (s *Store) pullRegistry(ctx context.Context, ref Reference, o PullOptions) (*Image, error) {
	if o.Policy == Missing {
		r, err := s.readRecord(recordFile(ref.Key()))
		if err == nil && (ref.transport == Any || r.Transport == Registry) {
			img, err := s.load(r)
			if err == nil {
				return img, nil
			}
			s.log.Debug("the store's copy cannot be used", "image", r.Name, "err", err)
		}
	}
	f, err := findRemote(ctx, ref, o)
	if err != nil {
		return nil, err
	}
	return s.fetch(ctx, f, o)
}

// resolve follows an index to the manifest for linux/amd64 and reads the configuration.
func resolve(top []byte, mediaType string, read func(ocispec.Descriptor) ([]byte, error)) (*found, error) {
	doc, mt := top, mediaType
	for depth := 0; ; depth++ {
		d, err := parseDocument(doc, mt)
		if err != nil {
			return nil, err
		}
		if !d.isIndex() {
			break
		}
		if depth == 4 {
			return nil, fmt.Errorf("%w: indexes inside indexes", ErrUnsupported)
		}
		desc, err := d.choose()
		if err != nil {
			return nil, err
		}
		if doc, err = read(desc); err != nil {
			return nil, fmt.Errorf("read manifest %s: %w", desc.Digest, err)
		}
		if err := checkBytes(desc, doc); err != nil {
			return nil, fmt.Errorf("read manifest %s: %w", desc.Digest, err)
		}
		mt = desc.MediaType
	}
	m, err := parseManifest(doc)
	if err != nil {
		return nil, err
	}
	config, err := read(*m.Config)
	if err != nil {
		return nil, fmt.Errorf("read configuration %s: %w", m.Config.Digest, err)
	}
	if err := checkBytes(*m.Config, config); err != nil {
		return nil, fmt.Errorf("read configuration %s: %w", m.Config.Digest, err)
	}
	c, err := parseConfig(config)
	if err != nil {
		return nil, err
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return nil, fmt.Errorf("%w: the manifest has %d layers, the configuration %d", ErrUnsupported, len(m.Layers), len(c.RootFS.DiffIDs))
	}
	return &found{manifest: doc, config: config, diffIDs: c.RootFS.DiffIDs, layers: m.Layers}, nil
}

func checkBytes(d ocispec.Descriptor, b []byte) error {
	if int64(len(b)) != d.Size {
		return fmt.Errorf("%w: %d bytes, not %d", ErrCorrupt, len(b), d.Size)
	}
	if got := digest.FromBytes(b); got != d.Digest {
		return fmt.Errorf("%w: it has %s", ErrCorrupt, got)
	}
	return nil
}

// fetch brings what was found into the store.
func (s *Store) fetch(ctx context.Context, f *found, o PullOptions) (*Image, error) {
	if !o.AnyPlatform {
		c, err := parseConfig(f.config)
		if err == nil {
			err = runs(&c)
		}
		if err != nil {
			return nil, err
		}
	}
	p := &pull{store: s, found: f, opts: o}
	manifest, config := digest.FromBytes(f.manifest), digest.FromBytes(f.config)
	blobs := []digest.Digest{manifest, config}
	if o.KeepBlobs && !f.unhashed {
		for _, l := range f.layers {
			blobs = append(blobs, l.Digest)
		}
	}
	release, err := s.leaseWork(ctx, f.source, f.diffIDs, blobs)
	if err != nil {
		return nil, err
	}
	defer release()
	p.tell(Event{Message: "pulling from " + f.source})
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(o.Parallel)
	seen := map[digest.Digest]bool{}
	for n, id := range f.diffIDs {
		if seen[id] {
			continue
		}
		seen[id] = true
		p.tell(Event{Layer: id, Blob: f.layers[n].Digest, State: Waiting, Total: f.layers[n].Size})
		g.Go(func() error {
			if err := p.layer(ctx, n); err != nil {
				return fmt.Errorf("layer %s: %w", f.layers[n].Digest, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return p.record(context.WithoutCancel(ctx), manifest, config)
}

// pull is a pull in progress.
type pull struct {
	store *Store
	found *found
	opts  PullOptions
	mu    sync.Mutex // one event at a time
}

func (p *pull) tell(e Event) {
	if p.opts.Progress == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.opts.Progress(e)
}

// record writes the documents and gives the image its names.
func (p *pull) record(ctx context.Context, manifest, config digest.Digest) (*Image, error) {
	s, f := p.store, p.found
	if err := s.writeBlob(config, f.config); err != nil {
		return nil, err
	}
	if err := s.writeBlob(manifest, f.manifest); err != nil {
		return nil, err
	}
	l, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer l.unlock()
	var first *record
	for _, name := range f.names {
		r := &record{
			Version: storeVersion, Name: name, Source: f.source, Transport: f.transport, Config: config, DiffIDs: f.diffIDs,
			Manifest: ocispec.Descriptor{Digest: manifest, Size: int64(len(f.manifest))}, Pulled: time.Now().UTC(),
		}
		if first == nil {
			first = r
		}
		if err := s.nameLocked(r); err != nil {
			return nil, err
		}
	}
	return s.load(first)
}

// layer makes one layer be in the store.
func (p *pull) layer(ctx context.Context, n int) error {
	s, f := p.store, p.found
	id, desc := f.diffIDs[n], f.layers[n]
	event := Event{Layer: id, Blob: desc.Digest, Total: desc.Size}
	have := func() bool {
		_, err := s.layer(id)
		if err == nil {
			// What an older kcradle converted has none: the layer is made again, so that it can be given back.
			err = s.hasSkeleton(id)
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.Debug("the store's copy cannot be used", "layer", id, "err", err)
		}
		if err == nil && p.opts.KeepBlobs && !f.unhashed {
			_, err = os.Stat(s.blobPath(desc.Digest))
		}
		return err == nil
	}
	if !have() {
		lock, err := lockFile(ctx, s.path(dirLocks, lockName(id.Encoded())), func() {
			e := event
			e.State, e.Message = Waiting, "for another pull of the same layer"
			p.tell(e)
		})
		if err != nil {
			return err
		}
		defer lock.unlock()
		if !have() {
			if err := p.make(ctx, n, event); err != nil {
				return err
			}
			event.State, event.Current = Done, desc.Size
			p.tell(event)
			return lock.remove() // only after success: what an interrupted pull leaves is found by it
		}
	}
	event.State, event.Current = Exists, desc.Size
	p.tell(event)
	return nil
}

// make reads, verifies and converts a layer under its lock.
func (p *pull) make(ctx context.Context, n int, event Event) error {
	s, f := p.store, p.found
	id, desc := f.diffIDs[n], f.layers[n]
	for {
		d := &download{
			ctx: ctx, size: desc.Size, remote: f.remote,
			open: func(ctx context.Context, offset int64) (io.ReadCloser, error) { return f.open(ctx, n, offset) },
			tell: func(e Event) {
				e.Layer, e.Blob, e.Total = event.Layer, event.Blob, event.Total
				p.tell(e)
			},
		}
		if !f.unhashed {
			// The digest of an uncompressed layer is its diffID: hashed once is enough where nothing is resumed.
			if f.remote || desc.Digest != id {
				d.want = desc.Digest
			}
			if f.remote || p.opts.KeepBlobs {
				d.part = s.path(dirIngest, id.Encoded()+"."+desc.Digest.Encoded()[:16]+".part")
			}
		}
		err := p.convert(ctx, d, id)
		resumed := d.resumed
		err = errors.Join(err, d.finish(err))
		if err == nil && d.want != "" {
			if err := s.addVerifiedBlob(id, desc); err != nil {
				return err
			}
		}
		if err == nil && p.opts.KeepBlobs && d.part != "" {
			return p.keep(d.part, desc.Digest)
		}
		if err == nil && d.part != "" {
			return os.Remove(d.part)
		}
		// What an earlier pull left may be what is wrong. Once more without it.
		if resumed && errors.Is(err, ErrCorrupt) && ctx.Err() == nil {
			s.log.Debug("the resumed download is not what was promised; again from its start", "layer", id)
			continue
		}
		return err
	}
}

// keep gives a verified compressed layer its name.
func (p *pull) keep(part string, d digest.Digest) error {
	f, err := os.OpenFile(part, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return commit(f, p.store.blobPath(d), 0o600)
}

// convert writes the EROFS file of what d downloads; only a layer of which digest, size and diffID are right gets its
// name.
func (p *pull) convert(ctx context.Context, d *download, id digest.Digest) (err error) {
	s := p.store
	w, err := s.newLayerWork(id.Encoded())
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	tarStream, err := decompress(d)
	if err != nil {
		return d.prefer(err)
	}
	defer tarStream.Close()
	limits := p.opts.Limits
	if limits.Bytes == 0 {
		// Real layers shrink by a factor of 2 to 20. 64 GiB out of a few megabytes is an attack.
		limits.Bytes = min(layer.DefaultBytes, max(4<<30, 200*d.size))
	}
	res, err := w.convert(ctx, tarStream, limits)
	if err != nil {
		return d.prefer(err)
	}
	if err := d.verify(); err != nil {
		return err
	}
	if res.DiffID != id {
		return fmt.Errorf("%w: unpacked it has %s, the image's configuration says %s", ErrCorrupt, res.DiffID, id)
	}
	return w.install(res)
}

// sourcePath makes errors about a file of the user's name it.
func sourcePath(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: there is no %s", ErrNotFound, filepath.Clean(path))
	}
	return err
}
