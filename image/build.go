package image

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kcradle/kcradle/image/layer"
)

// Transports of images that were made here.
const (
	Imported  Transport = "import"
	Committed Transport = "commit"
)

// parentAnnotation names, in the manifest of a committed image, the ID of the image it was made from.
const parentAnnotation = "io.kcradle.parent"

// ImportOptions of Store.Import. The zero value is fine.
type ImportOptions struct {
	Ref     Reference // the image's name; the zero Reference: none, it is then a dangling image
	Changes []string  // Dockerfile instructions, see ApplyChanges
	Message string    // the comment in the image's history
	// Architecture is that of the image's programs; empty: amd64. An image of another one does not run here.
	Architecture string
	Created      time.Time // zero: now
	Limits       layer.Limits
}

// Import makes an image of one layer from a tar of a root file system, which may be compressed (gzip, zstd, bzip2), as
// docker import does.
func (s *Store) Import(ctx context.Context, tar io.Reader, o ImportOptions) (*Image, error) {
	img, err := s.doImport(ctx, tar, o)
	if err != nil {
		return nil, fmt.Errorf("import: %w", explain(err, s.dir))
	}
	return img, nil
}

func (s *Store) doImport(ctx context.Context, tar io.Reader, o ImportOptions) (*Image, error) {
	p := PullOptions{Limits: o.Limits}
	if err := p.check(); err != nil {
		return nil, err
	}
	config, err := ApplyChanges(RunConfig{}, o.Changes)
	if err != nil {
		return nil, err
	}
	b := build{store: s, ref: o.Ref, transport: Imported, limits: o.Limits, run: config, architecture: o.Architecture}
	b.history = ocispec.History{Comment: o.Message}
	b.created = o.Created
	return b.make(ctx, tar)
}

// CommitOptions of Store.Commit. The zero value is fine.
type CommitOptions struct {
	Ref Reference // the image's name; the zero Reference: none, it is then a dangling image
	// Config replaces the configuration of the base's containers; nil: it stays.
	Config  *RunConfig
	Changes []string // Dockerfile instructions that change it, see ApplyChanges
	Author  string
	Comment string
	// CreatedBy stands in the history as what made the layer: the container's command.
	CreatedBy string
	Created   time.Time // zero: now
	Limits    layer.Limits
}

// Commit makes an image of another one's layers and one more, given as the tar of a layer (whiteouts included), as
// docker commit does. A tar without entries adds no layer. The base must not change meanwhile, but may be removed: its
// layers are held.
func (s *Store) Commit(ctx context.Context, base *Image, tar io.Reader, o CommitOptions) (*Image, error) {
	img, err := s.commit(ctx, base, tar, o)
	if err != nil {
		return nil, fmt.Errorf("commit: %w", explain(err, s.dir))
	}
	return img, nil
}

func (s *Store) commit(ctx context.Context, base *Image, tar io.Reader, o CommitOptions) (*Image, error) {
	if o.Limits.Bytes < 0 || o.Limits.Entries < 0 {
		return nil, errors.New("negative limit")
	}
	config := base.Config.Config
	if o.Config != nil {
		config = *o.Config
	}
	config, err := ApplyChanges(config, o.Changes)
	if err != nil {
		return nil, err
	}
	b := build{store: s, ref: o.Ref, transport: Committed, limits: o.Limits, run: config, base: base, author: o.Author}
	b.history = ocispec.History{Author: o.Author, CreatedBy: o.CreatedBy, Comment: o.Comment}
	b.created = o.Created
	return b.make(ctx, tar)
}

// build is an image in the making.
type build struct {
	store        *Store
	ref          Reference
	transport    Transport
	limits       layer.Limits
	run          RunConfig
	base         *Image // nil: none
	author       string
	architecture string          // empty: the base's, or amd64
	history      ocispec.History // of the new layer
	created      time.Time
}

func (b *build) make(ctx context.Context, tar io.Reader) (_ *Image, err error) {
	s := b.store
	if b.ref.pinned() != "" {
		return nil, fmt.Errorf("%s is a name by digest; only a registry gives such names", b.ref)
	}
	var layers []Layer
	if b.base != nil {
		layers = b.base.Layers
		release, err := s.leaseLayers(ctx, string(b.transport), layers)
		if err != nil {
			return nil, err
		}
		defer release()
	}
	if b.created.IsZero() {
		b.created = time.Now()
	}
	b.created = b.created.UTC()

	// The layer's name is known when it was read; until then another one is locked.
	name := string(b.transport) + "-" + rand.Text()
	lock, err := lockFile(ctx, s.path(dirLocks, lockName(name)), nil)
	if err != nil {
		return nil, err
	}
	defer func() {
		err = errors.Join(err, lock.remove())
		lock.unlock()
	}()
	w, err := s.newLayerWork(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, w.close()) }()
	z, err := decompress(ctxReader{ctx, tar})
	if err != nil {
		return nil, err
	}
	defer z.Close()
	res, err := w.convert(ctx, z, b.limits)
	if err != nil {
		return nil, err
	}
	if b.base != nil && res.Entries == 0 {
		b.history.EmptyLayer = true
		return b.record(ctx, layers)
	}
	if len(layers) == MaxLayers {
		return nil, fmt.Errorf("%w: the image would have %d layers, the limit is %d; build it with fewer", ErrUnsupported, len(layers)+1, MaxLayers)
	}
	release, err := s.leaseWork(ctx, string(b.transport), []digest.Digest{res.DiffID}, nil)
	if err != nil {
		return nil, err
	}
	defer release()
	l, err := s.installNew(ctx, w, res)
	if err != nil {
		return nil, err
	}
	return b.record(ctx, append(layers[:len(layers):len(layers)], l))
}

// leaseLayers holds layers that are there: ErrNotFound if one is not.
func (s *Store) leaseLayers(ctx context.Context, what string, layers []Layer) (release func(), err error) {
	var ids []digest.Digest
	for _, l := range layers {
		ids = append(ids, l.DiffID)
	}
	if release, err = s.leaseWork(ctx, what, ids, nil); err != nil {
		return nil, err
	}
	for _, id := range ids {
		if _, err := s.layer(id); err != nil {
			release()
			return nil, fmt.Errorf("layer %s: %w: it was removed meanwhile; pull the image again: %w", id, ErrNotFound, err)
		}
	}
	return release, nil
}

// installNew gives a converted layer its names, unless the store has it.
func (s *Store) installNew(ctx context.Context, w *layerWork, res layer.Result) (Layer, error) {
	lock, err := lockFile(ctx, s.path(dirLocks, lockName(res.DiffID.Encoded())), nil)
	if err != nil {
		return Layer{}, err
	}
	defer lock.unlock()
	l, err := s.layer(res.DiffID)
	if err == nil {
		err = s.hasSkeleton(res.DiffID)
	}
	if err != nil {
		if err := w.install(res); err != nil {
			return Layer{}, err
		}
		if l, err = s.layer(res.DiffID); err != nil {
			return Layer{}, err
		}
	}
	l.Blob = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: res.DiffID, Size: res.TarSize}
	return l, lock.remove()
}

// record writes configuration and manifest and gives the image its name.
func (b *build) record(ctx context.Context, layers []Layer) (*Image, error) {
	s := b.store
	c := Config{Config: b.run}
	if b.base != nil {
		c.Image = b.base.Config.Image
		c.History = c.History[:len(c.History):len(c.History)]
	}
	c.OS = "linux"
	if c.Architecture = cmp.Or(b.architecture, c.Architecture); c.Architecture == "" {
		c.Architecture = "amd64"
	}
	c.Created, c.Author = &b.created, b.author
	b.history.Created = &b.created
	c.History = append(c.History, b.history)
	c.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{}}
	var blobs []ocispec.Descriptor
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, l.DiffID)
		d := l.Blob
		d.MediaType = ociLayerType(d.MediaType)
		blobs = append(blobs, d)
	}
	config, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	if _, err := parseConfig(config); err != nil {
		return nil, err
	}
	var annotations map[string]string
	if b.base != nil {
		annotations = map[string]string{parentAnnotation: b.base.ConfigDigest.String()}
	}
	manifest, err := describe(config, blobs, annotations)
	if err != nil {
		return nil, err
	}
	f := &found{
		names: []string{danglingName(digest.FromBytes(config))}, source: string(b.transport), transport: b.transport,
		manifest: manifest, config: config, diffIDs: c.RootFS.DiffIDs, layers: blobs,
	}
	if b.ref.named != nil {
		f.names = []string{b.ref.Key()}
	}
	release, err := s.leaseWork(ctx, string(b.transport), nil, []digest.Digest{digest.FromBytes(config), digest.FromBytes(manifest)})
	if err != nil {
		return nil, err
	}
	defer release()
	p := &pull{store: s, found: f}
	return p.record(context.WithoutCancel(ctx), digest.FromBytes(manifest), digest.FromBytes(config))
}

// ociLayerType is the OCI media type of a layer of docker's or OCI's.
func ociLayerType(t string) string {
	switch t {
	case dockerLayer:
		return ocispec.MediaTypeImageLayer
	case dockerLayerGzip:
		return ocispec.MediaTypeImageLayerGzip
	case dockerLayerZstd:
		return ocispec.MediaTypeImageLayerZstd
	}
	return t
}
