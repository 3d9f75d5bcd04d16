package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// ingestAge is how long an interrupted download waits to be resumed before garbage collection takes it.
const ingestAge = 7 * 24 * time.Hour

// Removed tells what was taken from the store.
type Removed struct {
	Images []string        // names
	Layers []digest.Digest // diffIDs
	Bytes  int64           // disk space that is free again
}

// Remove takes the names of images, as Find returned them, from the store and then what nobody needs any more. Layers
// that a bundle uses stay.
func (s *Store) Remove(ctx context.Context, images ...*Image) (Removed, error) {
	var out Removed
	l, err := s.lock(ctx)
	if err != nil {
		return out, err
	}
	defer l.unlock()
	for _, img := range images {
		err := os.Remove(s.path(dirImages, recordFile(img.Ref)))
		if errors.Is(err, fs.ErrNotExist) {
			return out, fmt.Errorf("remove %s: %w in the store", img.Ref, ErrNotFound)
		}
		if err != nil {
			return out, fmt.Errorf("remove %s: %w", img.Ref, err)
		}
		out.Images = append(out.Images, img.Ref)
	}
	if err := s.collectLocked(&out, ingestAge); err != nil {
		return out, fmt.Errorf("collect garbage: %w", err)
	}
	return out, nil
}

// PruneOptions say what Prune takes.
type PruneOptions struct {
	All    bool // images that no bundle uses, too
	Ingest bool // interrupted downloads of any age, too
}

// Prune takes what nobody needs from the store: dangling images that no bundle uses, layers without image or bundle,
// interrupted downloads.
func (s *Store) Prune(ctx context.Context, o PruneOptions) (Removed, error) {
	var out Removed
	l, err := s.lock(ctx)
	if err != nil {
		return out, err
	}
	defer l.unlock()
	if err := s.removeUnusedLocked(&out, o.All); err != nil {
		return out, fmt.Errorf("prune images: %w", err)
	}
	age := ingestAge
	if o.Ingest {
		age = 0
	}
	if err := s.collectLocked(&out, age); err != nil {
		return out, fmt.Errorf("collect garbage: %w", err)
	}
	return out, nil
}

// removeUnusedLocked removes the names of images of which no lease holds every layer; without all only dangling ones.
func (s *Store) removeUnusedLocked(out *Removed, all bool) error {
	leases, err := s.leasesLocked()
	if err != nil {
		return err
	}
	records, err := s.records()
	if err != nil {
		return err
	}
	for _, r := range records {
		if !all && r.Name != danglingName(r.Config) {
			continue
		}
		used := slices.ContainsFunc(leases, func(l *lease) bool {
			return !slices.ContainsFunc(r.DiffIDs, func(d digest.Digest) bool { return !slices.Contains(l.Layers, d) })
		})
		if used {
			continue
		}
		if err := os.Remove(s.path(dirImages, recordFile(r.Name))); err != nil {
			return err
		}
		out.Images = append(out.Images, r.Name)
	}
	return nil
}

// roots are the layers and blobs that someone needs.
type roots struct{ layers, blobs map[digest.Digest]bool }

func (s *Store) rootsLocked() (roots, error) {
	r := roots{map[digest.Digest]bool{}, map[digest.Digest]bool{}}
	leases, err := s.leasesLocked()
	if err != nil {
		return r, err
	}
	for _, l := range leases {
		for _, d := range l.Layers {
			r.layers[d] = true
		}
		for _, d := range l.Blobs {
			r.blobs[d] = true
		}
	}
	records, err := s.records()
	if err != nil {
		return r, err
	}
	for _, rec := range records {
		for _, d := range rec.DiffIDs {
			r.layers[d] = true
		}
		r.blobs[rec.Config], r.blobs[rec.Manifest.Digest] = true, true
		b, err := s.readBlob(rec.Manifest.Digest)
		if err != nil {
			continue // the image is not whole; List says so
		}
		if m, err := parseManifest(b); err == nil {
			for _, l := range m.Layers {
				r.blobs[l.Digest] = true
			}
		}
	}
	return r, nil
}

func (s *Store) collectLocked(out *Removed, age time.Duration) error {
	r, err := s.rootsLocked()
	if err != nil {
		return err
	}
	if err := s.collectLayers(out, r); err != nil {
		return err
	}
	blobs, err := os.ReadDir(s.path(dirBlobs))
	if err != nil {
		return err
	}
	for _, e := range blobs {
		if r.blobs[digest.NewDigestFromEncoded(digest.SHA256, e.Name())] {
			continue
		}
		n, err := removeFile(s.path(dirBlobs, e.Name()))
		if err != nil {
			return err
		}
		out.Bytes += n
	}
	return s.collectIngest(out, age)
}

func (s *Store) collectLayers(out *Removed, r roots) error {
	entries, err := os.ReadDir(s.path(dirLayers))
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, isImage := strings.CutSuffix(e.Name(), extImage)
		if !isImage {
			name, _, _ = strings.Cut(e.Name(), ".")
		}
		id := digest.NewDigestFromEncoded(digest.SHA256, name)
		if r.layers[id] || id.Validate() != nil {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(s.layerPath(id), &st); err == nil && st.Nlink > 1 {
			continue // a bundle without a lease links to it
		}
		n, err := removeFile(s.path(dirLayers, e.Name()))
		if err != nil {
			return err
		}
		out.Bytes += n
		if isImage {
			out.Layers = append(out.Layers, id)
		}
	}
	return nil
}

// collectIngest removes what interrupted pulls left, layer by layer under the layer's lock: what a pull works on at
// the moment stays.
func (s *Store) collectIngest(out *Removed, age time.Duration) error {
	entries, err := os.ReadDir(s.path(dirIngest))
	if err != nil {
		return err
	}
	for _, e := range entries {
		fi, err := e.Info()
		if err != nil {
			continue
		}
		id, _, isLayer := strings.Cut(e.Name(), ".")
		if !isLayer {
			// A small file on its way to its name, or left behind on it. Nobody is that slow.
			if time.Since(fi.ModTime()) > time.Hour {
				if _, err := removeFile(s.path(dirIngest, e.Name())); err != nil {
					return err
				}
			}
			continue
		}
		if time.Since(fi.ModTime()) < age {
			continue
		}
		l, err := tryLockFile(s.path(dirLocks, lockName(id)))
		if errors.Is(err, unix.EWOULDBLOCK) {
			continue
		}
		if err != nil {
			return err
		}
		n, err := removeFile(s.path(dirIngest, e.Name()))
		err = errors.Join(err, l.remove())
		l.unlock()
		if err != nil {
			return err
		}
		out.Bytes += n
	}
	return nil
}

// lockName is the file of the lock that guards the work on a layer.
func lockName(encoded string) string { return "layer-" + encoded }

func removeFile(path string) (int64, error) {
	fi, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	if err := os.Remove(path); err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// Usage is the store's disk use.
type Usage struct {
	Images  []ImageUsage
	Layers  int   // in the store
	Bytes   int64 // of all layers, each counted once
	Blobs   int64 // manifests, configurations, kept compressed layers
	Ingest  int64 // downloads in progress or interrupted
	Bundles []BundleUsage
	// Reclaimable is what Prune with All would free now.
	Reclaimable int64
}

// ImageUsage is the disk use of an image.
type ImageUsage struct {
	Image  *Image
	Size   int64 // of its layers, each counted once
	Shared int64 // the part of Size that other images have, too
	// Bundles are the directories of the bundles that use all of the image's layers.
	Bundles []string
}

// BundleUsage is a bundle that holds layers.
type BundleUsage struct {
	Dir   string
	Bytes int64
}

// Usage counts what the store takes on the disk. Two names of one image do not share with each other.
func (s *Store) Usage(ctx context.Context) (*Usage, error) {
	images, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	l, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	leases, err := s.leasesLocked()
	l.unlock()
	if err != nil {
		return nil, fmt.Errorf("read leases: %w", err)
	}
	u := &Usage{}
	owners := map[digest.Digest]map[digest.Digest]bool{} // layer → images by configuration
	for _, img := range images {
		for _, layer := range img.Layers {
			if owners[layer.DiffID] == nil {
				owners[layer.DiffID] = map[digest.Digest]bool{}
			}
			owners[layer.DiffID][img.ConfigDigest] = true
		}
	}
	leased := map[digest.Digest]bool{}
	for _, le := range leases {
		b := BundleUsage{Dir: le.Owner}
		for _, d := range le.Layers {
			leased[d] = true
			if layer, err := s.layer(d); err == nil {
				b.Bytes += layer.Size
			}
		}
		if !strings.HasPrefix(le.Owner, "pull ") {
			u.Bundles = append(u.Bundles, b)
		}
	}
	for _, img := range images {
		iu := ImageUsage{Image: img, Size: img.Size()}
		for _, layer := range Unique(img.Layers) {
			if len(owners[layer.DiffID]) > 1 {
				iu.Shared += layer.Size
			}
		}
		for _, le := range leases {
			all := !slices.ContainsFunc(img.Layers, func(l Layer) bool { return !slices.Contains(le.Layers, l.DiffID) })
			if all && len(img.Layers) > 0 && !strings.HasPrefix(le.Owner, "pull ") {
				iu.Bundles = append(iu.Bundles, le.Owner)
			}
		}
		u.Images = append(u.Images, iu)
	}
	entries, err := os.ReadDir(s.path(dirLayers))
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), extImage)
		if !ok {
			continue
		}
		fi, err := e.Info()
		if err != nil {
			continue
		}
		u.Layers++
		u.Bytes += fi.Size()
		if !leased[digest.NewDigestFromEncoded(digest.SHA256, name)] {
			u.Reclaimable += fi.Size()
		}
	}
	if u.Blobs, err = dirSize(s.path(dirBlobs)); err != nil {
		return nil, err
	}
	if u.Ingest, err = dirSize(s.path(dirIngest)); err != nil {
		return nil, err
	}
	return u, nil
}

func dirSize(dir string) (int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var n int64
	for _, e := range entries {
		if fi, err := e.Info(); err == nil {
			n += fi.Size()
		}
	}
	return n, nil
}
