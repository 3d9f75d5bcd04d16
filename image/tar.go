package image

import (
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"

	"github.com/opencontainers/go-digest"

	"github.com/kcradle/kcradle/image/layer"
)

// ErrNoTar says that a layer cannot be given back as the tar it was: an older kcradle converted it.
var ErrNoTar = errors.New("the layer's tar cannot be put together again")

// LayerTar is a layer as the tar it was, byte for byte. Read gives io.EOF only if the digest of all of it is the
// layer's diffID.
type LayerTar struct {
	Size int64 // bytes of the tar
	path string
	r    io.Reader
	done []func() error
}

// OpenLayer opens a layer's tar: put together from the EROFS file and the layer's skeleton, or, where there is none,
// unpacked from its kept blob. ErrNoTar if there is neither. Reading ends with ctx. The caller closes it, and holds a
// lease on the layer if another process may remove it.
func (s *Store) OpenLayer(ctx context.Context, l Layer) (*LayerTar, error) {
	t, err := s.openTar(ctx, l)
	if err != nil {
		return nil, fmt.Errorf("open layer %s: %w", l.DiffID, err)
	}
	return t, nil
}

func (s *Store) openTar(ctx context.Context, l Layer) (_ *LayerTar, err error) {
	if err := checkDigest(l.DiffID); err != nil {
		return nil, err
	}
	_, r, err := s.layerRecord(l.DiffID)
	if err != nil {
		return nil, err
	}
	t := &LayerTar{Size: r.TarSize, path: s.layerPath(l.DiffID)}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Close())
		}
	}()
	f, sk, err := s.openSkeleton(l.DiffID)
	if errors.Is(err, fs.ErrNotExist) {
		return t, s.openKept(ctx, l, t)
	}
	if err != nil {
		return t, err
	}
	t.done = append(t.done, f.Close)
	image, err := os.Open(s.layerPath(l.DiffID))
	if err != nil {
		return t, err
	}
	t.done = append(t.done, image.Close)
	tar, err := sk.Tar(image, l.DiffID)
	if err != nil {
		return t, err
	}
	t.done = append(t.done, tar.Close)
	t.r = ctxReader{ctx, tar}
	return t, nil
}

// openKept opens the tar inside a layer's kept blob.
func (s *Store) openKept(ctx context.Context, l Layer, t *LayerTar) error {
	missing := fmt.Errorf("%w: an older kcradle converted it, or its file is damaged; pull the image again: kcradle pull NAME", ErrNoTar)
	if checkDigest(l.Blob.Digest) != nil {
		return missing
	}
	f, err := os.Open(s.blobPath(l.Blob.Digest))
	if errors.Is(err, fs.ErrNotExist) {
		return missing
	}
	if err != nil {
		return err
	}
	t.done = append(t.done, f.Close)
	z, err := decompress(ctxReader{ctx, f})
	if err != nil {
		return err
	}
	t.done = append(t.done, z.Close)
	t.r = &verified{r: io.LimitReader(z, t.Size+1), size: t.Size, want: l.DiffID, hash: digest.SHA256.Hash()}
	return nil
}

// Read implements io.Reader.
func (t *LayerTar) Read(p []byte) (int, error) {
	n, err := t.r.Read(p)
	if errors.Is(err, layer.ErrSkeleton) {
		err = fmt.Errorf("%w: %w; remove it with: rm %s, and pull the image again", ErrCorrupt, err, t.path)
	}
	return n, err
}

// Close lets go of what the reader holds. It may be called twice.
func (t *LayerTar) Close() error {
	var errs []error
	for i := len(t.done) - 1; i >= 0; i-- {
		errs = append(errs, t.done[i]())
	}
	t.done = nil
	return errors.Join(errs...)
}

// verified ends with io.EOF only if what was read is what it should be.
type verified struct {
	r    io.Reader
	n    int64
	size int64
	want digest.Digest
	hash hash.Hash
}

func (v *verified) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.hash.Write(p[:n])
	v.n += int64(n)
	if err == io.EOF {
		if got := digest.NewDigest(digest.SHA256, v.hash); v.n != v.size || got != v.want {
			return n, fmt.Errorf("%w: %d bytes with %s, not %d with %s", ErrCorrupt, v.n, got, v.size, v.want)
		}
	}
	return n, err
}
