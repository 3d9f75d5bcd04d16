package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kcradle/kcradle/image/layer"
)

// layerWork is a layer on its way into the store, in files of the ingest directory. Who works holds the lock
// lockName(name).
type layerWork struct {
	store           *Store
	image, skeleton *os.File // nil once they have their final names
}

// newLayerWork makes the files, empty; close takes back what install did not.
func (s *Store) newLayerWork(name string) (_ *layerWork, err error) {
	w := &layerWork{store: s}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close())
		}
	}()
	for _, f := range []struct {
		file **os.File
		ext  string
	}{{&w.image, extImage}, {&w.skeleton, extSkeleton}} {
		if *f.file, err = os.OpenFile(s.path(dirIngest, name+f.ext), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600); err != nil {
			return nil, err
		}
	}
	return w, nil
}

func (w *layerWork) close() error {
	var errs []error
	for _, f := range []*os.File{w.image, w.skeleton} {
		if f != nil {
			f.Close()
			errs = append(errs, os.Remove(f.Name()))
		}
	}
	w.image, w.skeleton = nil, nil
	return errors.Join(errs...)
}

// convert reads an uncompressed tar to its end.
func (w *layerWork) convert(ctx context.Context, tar io.Reader, limits layer.Limits) (layer.Result, error) {
	return layer.Convert(ctx, tar, w.image, layer.Options{Limits: limits, SpoolDir: w.store.path(dirIngest), Skeleton: w.skeleton})
}

// install gives the files their names, under the layer's lock. An image that is there already stays the file that
// bundles link to.
func (w *layerWork) install(res layer.Result) error {
	s, id := w.store, res.DiffID
	_, old, err := s.layerRecord(id)
	same := err == nil && old.CRC == res.CRC && old.Size == res.Size
	b, err := json.Marshal(layerRecord{
		Version: storeVersion, DiffID: id, Size: res.Size, CRC: res.CRC, TarSize: res.TarSize, Entries: res.Entries,
	})
	if err != nil {
		return err
	}
	skeleton := w.skeleton
	w.skeleton = nil
	if err := w.commit(skeleton, s.skeletonPath(id), 0o600); err != nil || same {
		return err
	}
	// The record before the image: with the EROFS file the layer is there.
	if err := s.writeFile(s.path(dirLayers, id.Encoded()+extRecord), append(b, '\n'), 0o644); err != nil {
		return err
	}
	image := w.image
	w.image = nil
	return w.commit(image, s.layerPath(id), 0o644)
}

func (w *layerWork) commit(f *os.File, path string, perm fs.FileMode) error {
	if err := commit(f, path, perm); err != nil {
		if rerr := os.Remove(f.Name()); !errors.Is(rerr, fs.ErrNotExist) {
			err = errors.Join(err, rerr)
		}
		return err
	}
	return nil
}

func (s *Store) skeletonPath(id digest.Digest) string {
	return s.path(dirLayers, id.Encoded()+extSkeleton)
}

// openSkeleton opens the skeleton of a layer: fs.ErrNotExist if there is none that fits the image.
func (s *Store) openSkeleton(id digest.Digest) (*os.File, *layer.Skeleton, error) {
	_, r, err := s.layerRecord(id)
	if err != nil {
		return nil, nil, err
	}
	f, err := os.Open(s.skeletonPath(id))
	if err != nil {
		return nil, nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	sk, err := layer.OpenSkeleton(f, fi.Size())
	switch {
	case errors.Is(err, layer.ErrSkeleton):
		// A disk that lost a part of it. It is made again, as a lost layer is.
		err = fmt.Errorf("%w: %w", err, fs.ErrNotExist)
	case err == nil && (sk.ImageSize != r.Size || sk.ImageCRC != r.CRC || sk.TarSize != r.TarSize):
		err = fmt.Errorf("the skeleton of layer %s is that of another image: %w", id, fs.ErrNotExist)
	}
	if err != nil {
		return nil, nil, errors.Join(err, f.Close())
	}
	return f, sk, nil
}

func (s *Store) hasSkeleton(id digest.Digest) error {
	f, _, err := s.openSkeleton(id)
	if err == nil {
		err = f.Close()
	}
	return err
}

// maxBlobs is how many blobs are remembered of a layer.
const maxBlobs = 4

// verifiedBlobs are compressed blobs of which this store itself has seen that they unpack to a layer, the last one
// first. What an image's manifest says of layers that were there already is only its author's word.
func (s *Store) verifiedBlobs(id digest.Digest) []ocispec.Descriptor {
	path := s.path(dirLayers, id.Encoded()+extBlobs)
	b, err := readFile(path, maxDocument)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	var out []ocispec.Descriptor
	if err == nil {
		err = decodeStrict(b, &out)
	}
	for _, d := range out {
		err = errors.Join(err, checkDescriptor(d, maxBlob), checkLayerType(d.MediaType))
	}
	if err != nil || len(out) > maxBlobs {
		s.log.Debug("what is known of a layer's blobs cannot be used", "file", path, "err", err)
		return nil
	}
	return out
}

// addVerifiedBlob remembers a blob. Two processes at once may lose one of theirs.
func (s *Store) addVerifiedBlob(id digest.Digest, d ocispec.Descriptor) error {
	out := []ocispec.Descriptor{{MediaType: ociLayerType(d.MediaType), Digest: d.Digest, Size: d.Size}}
	for _, old := range s.verifiedBlobs(id) {
		if old.Digest != d.Digest && len(out) < maxBlobs {
			out = append(out, old)
		}
	}
	b, err := json.Marshal(out)
	if err != nil {
		return err
	}
	return s.writeFile(s.path(dirLayers, id.Encoded()+extBlobs), append(b, '\n'), 0o600)
}
