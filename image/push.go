package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

const (
	// settleTimeout is how long a registry may think about a blob of which it has all bytes.
	settleTimeout = 5 * time.Minute
)

// Credentials are a login at a registry that somebody else keeps, as the Docker API's X-Registry-Auth carries it.
type Credentials struct {
	Username, Password string
	IdentityToken      string // for an OAuth2 token server, instead of a password
	RegistryToken      string // a bearer token for the registry itself
}

// Keychain makes them those of every registry that is asked.
func (c Credentials) Keychain() authn.Keychain {
	return keychain{authn.FromConfig(authn.AuthConfig{
		Username: c.Username, Password: c.Password, IdentityToken: c.IdentityToken, RegistryToken: c.RegistryToken,
	})}
}

type keychain struct{ auth authn.Authenticator }

// Resolve implements authn.Keychain.
func (k keychain) Resolve(authn.Resource) (authn.Authenticator, error) { return k.auth, nil }

// PushOptions of Store.Push. The zero value is fine.
type PushOptions struct {
	// PlainHTTP are the registries (HOST[:PORT]) that may be spoken to without TLS.
	PlainHTTP []string
	// Keychain has the registries' credentials; nil: docker's configuration and its credential helpers.
	Keychain authn.Keychain
	// Progress is told what happens, one event at a time. It must not block for long. May be nil.
	Progress func(Event)
	Parallel int // layers at a time; zero: 4
}

// Push sends the image that the store keeps under a name to that name's registry and returns its manifest's descriptor
// there. Blobs that the registry has are not sent; those of another repository of the same registry are mounted. A layer
// of which the store has the compressed blob (see PullOptions.KeepBlobs) is sent as it is, another one is compressed
// again: then the manifest is a new one, and the image has another digest than where it came from, though the same ID.
// The store remembers what the registry has then.
func (s *Store) Push(ctx context.Context, ref Reference, o PushOptions) (ocispec.Descriptor, error) {
	d, err := s.push(ctx, ref, o)
	if err != nil {
		return d, fmt.Errorf("push %s: %w", ref, explain(err, s.dir))
	}
	return d, nil
}

func (s *Store) push(ctx context.Context, ref Reference, o PushOptions) (ocispec.Descriptor, error) {
	var none ocispec.Descriptor
	switch {
	case ref.named == nil || ref.transport != Any && ref.transport != Registry:
		return none, errors.New("only a name says which registry is meant")
	case ref.pinned() != "":
		return none, errors.New("a digest cannot be pushed to; push a tag")
	}
	po := PullOptions{PlainHTTP: o.PlainHTTP, Keychain: o.Keychain, Parallel: o.Parallel}
	if err := po.check(); err != nil {
		return none, err
	}
	img, err := s.get(ref.Key())
	if err != nil {
		return none, err
	}
	release, err := s.leaseImage(ctx, "push", img)
	if err != nil {
		return none, err
	}
	defer release()
	r, err := dialRegistry(ctx, ref, po, transport.PushScope)
	if err != nil {
		return none, err
	}
	p := &push{store: s, ref: ref, img: img, reg: r, progress: o.Progress}
	if p.others, err = s.candidates(ctx, img); err != nil {
		return none, err
	}
	p.opts = []remote.Option{
		remote.WithTransport(r.guard), remote.WithAuth(r.auth), remote.WithRetryPredicate(transient),
		remote.WithRetryBackoff(remote.Backoff{Duration: firstWait, Factor: 2, Steps: maxAttempts}),
	}
	if p.pusher, err = remote.NewPusher(p.opts...); err != nil {
		return none, err
	}
	p.tell(Event{Message: "pushing to " + ref.named.Name()})
	layers, err := p.layers(ctx, po.Parallel)
	if err != nil {
		return none, r.explain(err)
	}
	d, manifest, err := p.manifest(ctx, layers)
	if err != nil {
		return none, r.explain(err)
	}
	if err := s.pushed(context.WithoutCancel(ctx), ref, img, manifest); err != nil {
		return none, fmt.Errorf("it is in the registry, but the store does not know: %w", err)
	}
	return d, nil
}

// leaseImage holds all of an image.
func (s *Store) leaseImage(ctx context.Context, what string, img *Image) (func(), error) {
	var layers []digest.Digest
	blobs := []digest.Digest{img.ConfigDigest, img.Digest}
	for _, l := range img.Layers {
		layers, blobs = append(layers, l.DiffID), append(blobs, l.Blob.Digest)
	}
	return s.leaseWork(ctx, what, layers, blobs)
}

// candidate is a blob that holds a layer, and where it was seen.
type candidate struct {
	ocispec.Descriptor
	repo reference.Named // nil: not known
}

// candidates are the blobs that may be in the registry already: those that the image's own manifest names, then those
// that the store has seen to hold a layer. Where they were seen the store's images tell.
func (s *Store) candidates(ctx context.Context, img *Image) (map[digest.Digest][]candidate, error) {
	all, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	repos := map[digest.Digest]reference.Named{} // blob → repository
	for _, i := range append(all, img) {
		src, err := ParseReference(i.Source)
		if err != nil || i.Transport != Registry || src.named == nil {
			continue
		}
		for _, l := range i.Layers {
			repos[l.Blob.Digest] = reference.TrimNamed(src.named)
		}
	}
	out := map[digest.Digest][]candidate{}
	for _, l := range Unique(img.Layers) {
		var have []candidate
		// The manifest that the store itself made of an image without one names uncompressed tars: no registry has them.
		if l.Blob.Digest != l.DiffID || repos[l.Blob.Digest] != nil {
			have = append(have, candidate{l.Blob, repos[l.Blob.Digest]})
		}
		for _, d := range s.verifiedBlobs(l.DiffID) {
			if d.Digest != l.Blob.Digest {
				have = append(have, candidate{d, repos[d.Digest]})
			}
		}
		out[l.DiffID] = have
	}
	return out, nil
}

// push is a push in progress.
type push struct {
	store    *Store
	ref      Reference
	img      *Image
	reg      *registry
	opts     []remote.Option
	pusher   *remote.Pusher
	others   map[digest.Digest][]candidate
	progress func(Event)
	mu       sync.Mutex // one event at a time
}

func (p *push) tell(e Event) {
	if p.progress == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.progress(e)
}

// layers makes every layer be in the registry and returns what they are there, in the image's order.
func (p *push) layers(ctx context.Context, parallel int) ([]ocispec.Descriptor, error) {
	unique := Unique(p.img.Layers)
	there := make([]ocispec.Descriptor, len(unique))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for n, l := range unique {
		p.tell(Event{Layer: l.DiffID, Blob: l.Blob.Digest, State: Waiting})
		g.Go(func() error {
			d, err := p.layer(ctx, l)
			if err != nil {
				return fmt.Errorf("layer %s: %w", l.DiffID, err)
			}
			there[n] = d
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var out []ocispec.Descriptor
	for _, l := range p.img.Layers {
		out = append(out, there[slices.IndexFunc(unique, func(u Layer) bool { return u.DiffID == l.DiffID })])
	}
	return out, nil
}

// layer makes one layer be in the registry.
func (p *push) layer(ctx context.Context, l Layer) (ocispec.Descriptor, error) {
	for _, c := range p.others[l.DiffID] {
		done, err := p.known(ctx, l, c)
		if done || err != nil {
			return c.Descriptor, err
		}
	}
	return p.compressed(ctx, l)
}

// known tries a blob that holds the layer: the registry has it, or another repository there, or the store kept it.
func (p *push) known(ctx context.Context, l Layer, c candidate) (bool, error) {
	e := Event{Layer: l.DiffID, Blob: c.Digest, State: Exists, Current: c.Size, Total: c.Size}
	has, err := p.reg.has(ctx, c.Digest)
	if err != nil {
		return false, err
	}
	if has {
		p.tell(e)
		return true, nil
	}
	if c.repo != nil && reference.Domain(c.repo) == p.ref.domain() && reference.Path(c.repo) != p.ref.repository() {
		mounted, err := p.mount(ctx, c)
		if err != nil {
			return false, err
		}
		if mounted {
			e.State, e.Message = Mounted, reference.Path(c.repo)
			p.tell(e)
			return true, nil
		}
	}
	f, err := os.Open(p.store.blobPath(c.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Size() != c.Size {
		return false, err // a disk that lost its end; the layer is compressed again
	}
	return true, p.upload(ctx, l, c.Descriptor, f)
}

// errNoBytes stops the library where it would send a blob that the store has not.
var errNoBytes = errors.New("the store has not the blob")

// mount asks the registry to take a blob from another of its repositories.
func (p *push) mount(ctx context.Context, c candidate) (bool, error) {
	from, err := name.NewRepository(c.repo.Name(), name.Insecure)
	if err != nil {
		return false, err
	}
	l := &sentBlob{desc: c.Descriptor, open: func() (io.ReadCloser, error) { return nil, errNoBytes }}
	err = remote.WriteLayer(p.reg.name, &remote.MountableLayer{Layer: l, Reference: from.Tag("latest")},
		append(slices.Clone(p.opts), remote.WithContext(ctx))...)
	var te *transport.Error
	switch {
	case err == nil:
		return true, nil
	case ctx.Err() != nil:
		return false, context.Cause(ctx)
	case errors.Is(err, errNoBytes), errors.As(err, &te): // no right to read there, perhaps
		p.store.log.Debug("the registry does not mount the blob", "blob", c.Digest, "from", c.repo.Name(), "err", err)
		return false, nil
	}
	return false, err
}

// compressed compresses a layer into a nameless file and sends that.
func (p *push) compressed(ctx context.Context, l Layer) (d ocispec.Descriptor, err error) {
	t, err := p.store.OpenLayer(ctx, l)
	if err != nil {
		return d, err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	f, err := p.store.nameless()
	if err != nil {
		return d, err
	}
	defer f.Close()
	e := Event{Layer: l.DiffID, Blob: l.Blob.Digest, State: Compressing, Total: t.Size}
	p.tell(e)
	h := digest.SHA256.Digester()
	z := gzip.NewWriter(io.MultiWriter(f, h.Hash()))
	in := &progressReader{r: t, tell: func(n int64) { e.Current = n; p.tell(e) }}
	if _, err := io.CopyBuffer(z, in, make([]byte, 256<<10)); err != nil {
		return d, err
	}
	if err := z.Close(); err != nil {
		return d, err
	}
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return d, err
	}
	d = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayerGzip, Digest: h.Digest(), Size: size}
	if err := p.store.addVerifiedBlob(l.DiffID, d); err != nil {
		return d, err
	}
	has, err := p.reg.has(ctx, d.Digest)
	if err != nil {
		return d, err
	}
	if has {
		p.tell(Event{Layer: l.DiffID, Blob: d.Digest, State: Exists, Current: size, Total: size})
		return d, nil
	}
	return d, p.upload(ctx, l, d, f)
}

// upload sends a blob.
func (p *push) upload(ctx context.Context, l Layer, d ocispec.Descriptor, f io.ReaderAt) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stalled := fmt.Errorf("the registry took nothing for %v: %w", stallTimeout, os.ErrDeadlineExceeded)
	stall := time.AfterFunc(settleTimeout, func() { cancel(stalled) })
	defer stall.Stop()
	e := Event{Layer: l.DiffID, Blob: d.Digest, State: Pushing, Total: d.Size}
	p.tell(e)
	blob := &sentBlob{desc: d, open: func() (io.ReadCloser, error) {
		e := e // of this attempt
		r := &progressReader{r: io.NewSectionReader(f, 0, d.Size), tell: func(n int64) { e.Current = n; p.tell(e) }}
		r.read = func(n int64) {
			if n == d.Size {
				stall.Reset(settleTimeout)
			} else {
				stall.Reset(stallTimeout)
			}
		}
		return io.NopCloser(r), nil
	}}
	if err := p.pusher.Upload(ctx, p.reg.name, blob); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		return err
	}
	e.State, e.Current = Done, d.Size
	p.tell(e)
	return nil
}

// manifest sends configuration and manifest: the image's own one if its layers are in the registry as it names them.
func (p *push) manifest(ctx context.Context, layers []ocispec.Descriptor) (ocispec.Descriptor, []byte, error) {
	var d ocispec.Descriptor
	b, err := p.store.readBlob(p.img.Digest)
	if err != nil {
		return d, nil, err
	}
	m, err := parseManifest(b)
	if err != nil {
		return d, nil, err
	}
	config := *m.Config
	same := slices.EqualFunc(m.Layers, layers, func(a, b ocispec.Descriptor) bool { return a.Digest == b.Digest })
	d.MediaType = m.MediaType
	if !same {
		for i := range layers {
			layers[i].MediaType = ociLayerType(layers[i].MediaType)
			layers[i] = ocispec.Descriptor{MediaType: layers[i].MediaType, Digest: layers[i].Digest, Size: layers[i].Size}
		}
		if b, err = describe(p.img.RawConfig, layers, nil); err != nil {
			return d, nil, err
		}
		d.MediaType, config.MediaType = ocispec.MediaTypeImageManifest, ocispec.MediaTypeImageConfig
	}
	if d.MediaType == "" {
		d.MediaType = ocispec.MediaTypeImageManifest
	}
	d.Digest, d.Size = digest.FromBytes(b), int64(len(b))
	if err := p.pusher.Upload(ctx, p.reg.name, static.NewLayer(p.img.RawConfig, types.MediaType(config.MediaType))); err != nil {
		return d, nil, fmt.Errorf("configuration: %w", err)
	}
	if err := p.pusher.Put(ctx, p.reg.name.Tag(p.ref.target()), rawManifest{b, types.MediaType(d.MediaType)}); err != nil {
		return d, nil, fmt.Errorf("manifest: %w", err)
	}
	p.tell(Event{Message: fmt.Sprintf("%s: digest: %s size: %d", p.ref.target(), d.Digest, d.Size)})
	return d, b, nil
}

// pushed remembers what the registry has under a name.
func (s *Store) pushed(ctx context.Context, ref Reference, img *Image, manifest []byte) error {
	d := digest.FromBytes(manifest)
	release, err := s.leaseWork(ctx, "push", nil, []digest.Digest{d})
	if err != nil {
		return err
	}
	defer release()
	if err := s.writeBlob(d, manifest); err != nil {
		return err
	}
	l, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer l.unlock()
	r, err := s.readRecord(recordFile(ref.Key()))
	if errors.Is(err, fs.ErrNotExist) || err == nil && r.Config != img.ConfigDigest {
		return nil // the name went elsewhere meanwhile
	}
	if err != nil {
		return err
	}
	r.Source, r.Transport, r.Manifest = ref.String(), Registry, ocispec.Descriptor{Digest: d, Size: int64(len(manifest))}
	return s.writeRecord(r)
}

// sentBlob is a blob as the library sends it.
type sentBlob struct {
	desc ocispec.Descriptor
	open func() (io.ReadCloser, error)
}

var _ v1.Layer = (*sentBlob)(nil)

func (b *sentBlob) Digest() (v1.Hash, error)             { return v1.NewHash(b.desc.Digest.String()) }
func (b *sentBlob) DiffID() (v1.Hash, error)             { return v1.Hash{}, errNoBytes } // nobody asks
func (b *sentBlob) Compressed() (io.ReadCloser, error)   { return b.open() }
func (b *sentBlob) Uncompressed() (io.ReadCloser, error) { return nil, errNoBytes }
func (b *sentBlob) Size() (int64, error)                 { return b.desc.Size, nil }
func (b *sentBlob) MediaType() (types.MediaType, error) {
	return types.MediaType(b.desc.MediaType), nil
}

// rawManifest is a manifest as it is.
type rawManifest struct {
	body []byte
	mt   types.MediaType
}

func (r rawManifest) RawManifest() ([]byte, error)        { return r.body, nil }
func (r rawManifest) MediaType() (types.MediaType, error) { return r.mt, nil }

// progressReader tells how far it was read, now and then.
type progressReader struct {
	r       io.Reader
	n, told int64
	tell    func(n int64)
	read    func(n int64) // at each read; may be nil
}

func (p *progressReader) Read(b []byte) (int, error) {
	n, err := p.r.Read(b)
	p.n += int64(n)
	if p.read != nil {
		p.read(p.n)
	}
	if p.n-p.told >= 256<<10 {
		p.told = p.n
		p.tell(p.n)
	}
	return n, err
}
