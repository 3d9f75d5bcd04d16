package image

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// saved is an image on its way into an archive.
type saved struct {
	img  *Image
	tags []reference.NamedTagged // under which it is saved
}

// Save writes images as docker save does: an OCI layout with uncompressed layers in a tar, and in it the manifest.json
// that docker load of any age reads. A name is saved with its image; a name without a tag means every tag of that
// repository; an image by ID is saved without a name. The same images give the same bytes.
//
// Nothing is written before every image was found and its layers can be given back (else ErrNoTar). An error later
// leaves an archive that is cut short.
func (s *Store) Save(ctx context.Context, w io.Writer, refs []string) error {
	if err := s.save(ctx, w, refs); err != nil {
		return fmt.Errorf("save: %w", err)
	}
	return nil
}

func (s *Store) save(ctx context.Context, w io.Writer, refs []string) error {
	if len(refs) == 0 {
		return errors.New("no image is named")
	}
	all, err := s.Images(ctx)
	if err != nil {
		return err
	}
	images, err := chooseSaved(all, refs)
	if err != nil {
		return err
	}
	a := archiveWriter{documents: map[string][]byte{}, layers: map[digest.Digest]Layer{}}
	var ids []digest.Digest
	for _, i := range images {
		for _, l := range i.img.Layers {
			a.layers[l.DiffID] = l
			ids = append(ids, l.DiffID)
		}
	}
	release, err := s.leaseWork(ctx, "save", ids, nil)
	if err != nil {
		return err
	}
	defer release()
	sizes := map[digest.Digest]int64{}
	for id, l := range a.layers {
		t, err := s.OpenLayer(ctx, l)
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w: it was removed meanwhile: %w", ErrNotFound, err)
		}
		if err != nil {
			return err
		}
		sizes[id] = t.Size
		if err := t.Close(); err != nil {
			return err
		}
	}
	if err := a.describe(images, sizes); err != nil {
		return err
	}
	return a.write(ctx, s, w)
}

// chooseSaved finds the images that the words name, each once, in the order in which they are named first.
func chooseSaved(all []*Summary, refs []string) ([]*saved, error) {
	var out []*saved
	add := func(u *Summary, tag reference.NamedTagged) {
		i := slices.IndexFunc(out, func(o *saved) bool { return o.img.ConfigDigest == u.ID })
		if i < 0 {
			i = len(out)
			out = append(out, &saved{img: u.Image})
		}
		if tag != nil && !slices.ContainsFunc(out[i].tags, func(t reference.NamedTagged) bool { return t.String() == tag.String() }) {
			out[i].tags = append(out[i].tags, tag)
		}
	}
	for _, word := range refs {
		found := false
		if n, err := reference.ParseNormalizedNamed(word); err == nil && reference.IsNameOnly(n) {
			for _, u := range all {
				for _, name := range u.Names {
					if t := taggedName(name); t != nil && t.Name() == n.Name() {
						add(u, t)
						found = true
					}
				}
			}
		}
		if found {
			continue
		}
		u, name, err := lookup(all, word)
		if err != nil {
			return nil, err
		}
		add(u, taggedName(name))
	}
	for _, i := range out {
		slices.SortFunc(i.tags, func(a, b reference.NamedTagged) int { return strings.Compare(a.String(), b.String()) })
	}
	return out, nil
}

// archiveWriter is an archive with all that is small in memory.
type archiveWriter struct {
	documents map[string][]byte // by their names in the archive
	layers    map[digest.Digest]Layer
	sizes     map[digest.Digest]int64 // of the layers' tars
}

// savedImage is an entry of manifest.json as it is written.
type savedImage struct {
	Config       string
	RepoTags     []string
	Layers       []string
	LayerSources map[digest.Digest]ocispec.Descriptor `json:",omitempty"`
}

// describe makes the documents.
func (a *archiveWriter) describe(images []*saved, sizes map[digest.Digest]int64) error {
	a.sizes = sizes
	index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	manifest := []savedImage{}
	repositories := map[string]map[string]string{} // name → tag → the last layer; docker before 1.10 read it
	for _, i := range images {
		m := savedImage{Config: blobName(i.img.ConfigDigest), Layers: []string{}, LayerSources: map[digest.Digest]ocispec.Descriptor{}}
		var layers []ocispec.Descriptor
		for _, l := range i.img.Layers {
			d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: l.DiffID, Size: sizes[l.DiffID]}
			m.Layers = append(m.Layers, blobName(l.DiffID))
			m.LayerSources[l.DiffID] = d
			layers = append(layers, d)
		}
		b, err := describe(i.img.RawConfig, layers, nil)
		if err != nil {
			return err
		}
		d := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromBytes(b), Size: int64(len(b))}
		a.documents[blobName(d.Digest)] = b
		a.documents[blobName(i.img.ConfigDigest)] = i.img.RawConfig
		for _, t := range i.tags {
			m.RepoTags = append(m.RepoTags, reference.FamiliarString(t))
			named := d
			named.Annotations = map[string]string{containerdName: t.String(), ocispec.AnnotationRefName: t.Tag()}
			index.Manifests = append(index.Manifests, named)
			if n := len(i.img.Layers); n > 0 {
				repo := reference.FamiliarName(t)
				if repositories[repo] == nil {
					repositories[repo] = map[string]string{}
				}
				repositories[repo][t.Tag()] = i.img.Layers[n-1].DiffID.Encoded()
			}
		}
		if len(i.tags) == 0 {
			index.Manifests = append(index.Manifests, d)
		}
		manifest = append(manifest, m)
	}
	documents := map[string]any{
		"index.json":            index,
		"manifest.json":         manifest,
		ocispec.ImageLayoutFile: ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion},
	}
	if len(repositories) > 0 {
		documents["repositories"] = repositories
	}
	for name, v := range documents {
		b, err := json.Marshal(v)
		if err != nil {
			return err
		}
		a.documents[name] = append(b, '\n')
	}
	return nil
}

// write writes the archive: directories, then the files by name; times and owners are zero.
func (a *archiveWriter) write(ctx context.Context, s *Store, w io.Writer) error {
	tw := tar.NewWriter(w)
	for _, dir := range []string{"blobs/", "blobs/sha256/"} {
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
			return err
		}
	}
	names := slices.Collect(maps.Keys(a.documents))
	layers := map[string]Layer{}
	for id, l := range a.layers {
		layers[blobName(id)] = l
		names = append(names, blobName(id))
	}
	slices.Sort(names)
	for _, name := range names {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		l, isLayer := layers[name]
		size := int64(len(a.documents[name]))
		if isLayer {
			size = a.sizes[l.DiffID]
		}
		if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size}); err != nil {
			return err
		}
		if !isLayer {
			if _, err := tw.Write(a.documents[name]); err != nil {
				return err
			}
			continue
		}
		if err := copyLayer(ctx, s, tw, l); err != nil {
			return err
		}
	}
	return tw.Close()
}

func copyLayer(ctx context.Context, s *Store, w io.Writer, l Layer) (err error) {
	t, err := s.OpenLayer(ctx, l)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.Close()) }()
	if _, err := io.CopyBuffer(w, t, make([]byte, 256<<10)); err != nil {
		return fmt.Errorf("layer %s: %w", l.DiffID, err)
	}
	return nil
}
