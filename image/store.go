package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kcradle/kcradle/image/erofs"
)

// storeVersion is the version of the store's files.
//
// History:
//   - 1: first version.
const storeVersion = 1

// The store's directories. docs/images.md describes what lies in them.
const (
	dirBlobs  = "blobs/sha256" // manifests and configurations, compressed layers if asked for, by digest
	dirLayers = "layers"       // a layer's files by diffID, see below
	dirImages = "images"       // a record per name
	dirLeases = "leases"       // who uses which layers
	dirIngest = "ingest"       // what is not verified yet
	dirLocks  = "locks"
)

// The files of a layer.
const (
	extImage    = ".erofs"
	extRecord   = ".json"
	extSkeleton = ".skeleton" // what its tar needs beside the image; layers of older stores have none
	extBlobs    = ".blobs"    // compressed blobs that were seen to hold the layer; may be missing
)

// Bounds of the store's and the sources' documents.
const (
	maxDocument = 8 << 20 // manifest, index, configuration, record
	maxRecords  = 100_000
)

// Store is a directory of images, safe for many processes at once. It holds nothing open: it need not be closed.
type Store struct {
	dir string
	log *slog.Logger
}

// DefaultRoot is the state directory where none is named: /var/lib/kcradle for root, $XDG_DATA_HOME/kcradle for others.
func DefaultRoot() (string, error) {
	if os.Geteuid() == 0 {
		return "/var/lib/kcradle", nil
	}
	if d := os.Getenv("XDG_DATA_HOME"); filepath.IsAbs(d) {
		return filepath.Join(d, "kcradle"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find the state directory: %w", err)
	}
	return filepath.Join(home, ".local/share/kcradle"), nil
}

// Open opens the store in a state directory (empty: DefaultRoot), making it where there is none. It lives in the
// directory "store" there.
func Open(root string, log *slog.Logger) (*Store, error) {
	if root == "" {
		var err error
		if root, err = DefaultRoot(); err != nil {
			return nil, err
		}
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	s := &Store{dir: filepath.Join(root, "store"), log: log}
	if err := s.open(); err != nil {
		return nil, fmt.Errorf("open image store %s: %w", s.dir, err)
	}
	return s, nil
}

func (s *Store) open() error {
	version := filepath.Join(s.dir, "version")
	b, err := os.ReadFile(version)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// Layers can be opened by who knows their digest, so that a machine monitor without rights can be given
		// their paths; nobody else can list them.
		for _, d := range []struct {
			name string
			perm fs.FileMode
		}{
			{"", 0o711}, {dirLayers, 0o711}, {"blobs", 0o700}, {dirBlobs, 0o700}, {dirImages, 0o700},
			{dirLeases, 0o700}, {dirIngest, 0o700}, {dirLocks, 0o700},
		} {
			if err := os.MkdirAll(filepath.Join(s.dir, d.name), d.perm); err != nil {
				return err
			}
		}
		return s.writeFile(version, fmt.Appendf(nil, "%d\n", storeVersion), 0o644)
	case err != nil:
		return err
	}
	var v int
	if _, err := fmt.Sscan(string(b), &v); err != nil || v < 1 {
		return fmt.Errorf("its version file says %.20q", b)
	}
	if v > storeVersion {
		return fmt.Errorf("it has version %d, written by a newer kcradle; upgrade kcradle to use it", v)
	}
	return nil
}

// Dir is the store's directory.
func (s *Store) Dir() string { return s.dir }

func (s *Store) path(elem ...string) string { return filepath.Join(s.dir, filepath.Join(elem...)) }

func (s *Store) layerPath(id digest.Digest) string {
	return s.path(dirLayers, id.Encoded()+extImage)
}

func (s *Store) blobPath(d digest.Digest) string { return s.path(dirBlobs, d.Encoded()) }

// lock takes the lock under which records and leases change and garbage is collected. It is held for moments only.
func (s *Store) lock(ctx context.Context) (*fileLock, error) {
	return lockFile(ctx, s.path(dirLocks, "store"), nil)
}

// record is an image as the store remembers it.
type record struct {
	Version   int                `json:"version"`
	Name      string             `json:"name"`
	Source    string             `json:"source"`
	Transport Transport          `json:"transport"` // where it was found in the end
	Manifest  ocispec.Descriptor `json:"manifest"`
	Config    digest.Digest      `json:"config"`
	DiffIDs   []digest.Digest    `json:"diff_ids"`
	Pulled    time.Time          `json:"pulled"`
}

// layerRecord is what the store knows of a layer beside its EROFS file.
type layerRecord struct {
	Version int           `json:"version"`
	DiffID  digest.Digest `json:"diff_id"`
	Size    int64         `json:"size"`
	CRC     uint32        `json:"crc"` // erofs.Checksum
	TarSize int64         `json:"tar_size"`
	Entries int           `json:"entries"`
}

func recordFile(name string) string {
	h := sha256.Sum256([]byte(name))
	return hex.EncodeToString(h[:]) + ".json"
}

// writeFile writes a file so that it is there whole or not at all, even after a power cut.
func (s *Store) writeFile(path string, b []byte, perm fs.FileMode) (err error) {
	f, err := os.CreateTemp(s.path(dirIngest), "file-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = f.Write(b)
	return errors.Join(err, commit(f, path, perm))
}

// commit closes a file and gives it its final name once its bytes are on the disk.
func commit(f *os.File, path string, perm fs.FileMode) error {
	err := f.Chmod(perm)
	if err == nil {
		err = f.Sync()
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// readFile reads a file of the store that is no larger than it may be.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(b)) > limit {
		return nil, fmt.Errorf("read %s: more than %d bytes", path, limit)
	}
	return b, nil
}

// decodeStrict reads one JSON value without unknown fields.
func decodeStrict(b []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("data after the document")
	}
	return nil
}

func checkDigest(d digest.Digest) error {
	if d.Validate() != nil || d.Algorithm() != digest.SHA256 {
		return fmt.Errorf("%.100q is not a sha256 digest", d)
	}
	return nil
}

// parseRecord reads the record of an image.
func parseRecord(b []byte) (*record, error) {
	var v struct{ Version int }
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, err
	}
	if v.Version < 1 || v.Version > storeVersion {
		return nil, fmt.Errorf("version %d is not known; a newer kcradle wrote it", v.Version)
	}
	var r record
	if err := decodeStrict(b, &r); err != nil {
		return nil, err
	}
	if r.Name == "" || len(r.Name) > 2*MaxReference || len(r.DiffIDs) > MaxLayers {
		return nil, errors.New("name or layers out of bounds")
	}
	for _, d := range append([]digest.Digest{r.Manifest.Digest, r.Config}, r.DiffIDs...) {
		if err := checkDigest(d); err != nil {
			return nil, err
		}
	}
	return &r, nil
}

func (s *Store) readRecord(file string) (*record, error) {
	b, err := readFile(s.path(dirImages, file), maxDocument)
	if err != nil {
		return nil, err
	}
	r, err := parseRecord(b)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", s.path(dirImages, file), err)
	}
	return r, nil
}

// records reads every record, sorted by name. One that cannot be read is reported and left out.
func (s *Store) records() ([]*record, error) {
	entries, err := os.ReadDir(s.path(dirImages))
	if err != nil {
		return nil, err
	}
	if len(entries) > maxRecords {
		return nil, fmt.Errorf("%s holds more than %d images", s.dir, maxRecords)
	}
	var out []*record
	for _, e := range entries {
		r, err := s.readRecord(e.Name())
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b *record) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// load makes an image from its record; fs.ErrNotExist if any of its files is gone.
func (s *Store) load(r *record) (*Image, error) {
	img := &Image{
		Ref: r.Name, Source: r.Source, Transport: r.Transport, Digest: r.Manifest.Digest, ConfigDigest: r.Config, Pulled: r.Pulled,
	}
	var err error
	if img.RawConfig, err = s.readBlob(r.Config); err != nil {
		return nil, err
	}
	if img.Config, err = parseConfig(img.RawConfig); err != nil {
		return nil, err
	}
	m, err := s.readBlob(r.Manifest.Digest)
	if err != nil {
		return nil, err
	}
	manifest, err := parseManifest(m)
	if err != nil {
		return nil, err
	}
	if len(manifest.Layers) != len(r.DiffIDs) {
		return nil, fmt.Errorf("manifest %s has %d layers, the configuration %d", r.Manifest.Digest, len(manifest.Layers), len(r.DiffIDs))
	}
	if parent := digest.Digest(manifest.Annotations[parentAnnotation]); r.Transport == Committed && checkDigest(parent) == nil {
		img.Parent = parent
	}
	for i, id := range r.DiffIDs {
		l, err := s.layer(id)
		if err != nil {
			return nil, err
		}
		l.Blob = manifest.Layers[i]
		img.Layers = append(img.Layers, l)
	}
	return img, nil
}

// layer returns a layer that is in the store, whole: fs.ErrNotExist otherwise.
func (s *Store) layer(id digest.Digest) (Layer, error) {
	l, _, err := s.layerRecord(id)
	return l, err
}

func (s *Store) layerRecord(id digest.Digest) (Layer, *layerRecord, error) {
	path := s.layerPath(id)
	b, err := readFile(s.path(dirLayers, id.Encoded()+extRecord), maxDocument)
	if err != nil {
		return Layer{}, nil, err
	}
	var r layerRecord
	if err := decodeStrict(b, &r); err != nil {
		return Layer{}, nil, fmt.Errorf("read record of layer %s: %w", id, err)
	}
	fi, err := os.Stat(path)
	if err != nil {
		return Layer{}, nil, err
	}
	if r.DiffID != id || fi.Size() != r.Size || r.Size%erofs.BlockSize != 0 {
		// A disk that lost the end of a file; the layer is made again.
		return Layer{}, nil, fmt.Errorf("layer %s has %d bytes, not %d: %w", id, fi.Size(), r.Size, fs.ErrNotExist)
	}
	return Layer{DiffID: id, Path: path, Size: r.Size}, &r, nil
}

// VerifyLayer reads a layer's file to its end and compares it with what was written.
func (s *Store) VerifyLayer(l Layer) error {
	_, r, err := s.layerRecord(l.DiffID)
	if err != nil {
		return err
	}
	f, err := os.Open(l.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	crc, err := erofs.Checksum(f, r.Size)
	if err != nil {
		return fmt.Errorf("verify layer %s: %w", l.DiffID, err)
	}
	if crc != r.CRC {
		return fmt.Errorf("verify layer %s: %w; remove it with: rm %s", l.DiffID, ErrCorrupt, l.Path)
	}
	return nil
}

// readBlob reads a small blob, checking its digest.
func (s *Store) readBlob(d digest.Digest) ([]byte, error) {
	b, err := readFile(s.blobPath(d), maxDocument)
	if err != nil {
		return nil, err
	}
	if digest.FromBytes(b) != d {
		return nil, fmt.Errorf("read blob %s: %w", d, ErrCorrupt)
	}
	return b, nil
}

// writeBlob keeps a small blob whose digest was checked.
func (s *Store) writeBlob(d digest.Digest, b []byte) error {
	if old, err := s.readBlob(d); err == nil && bytes.Equal(old, b) {
		return nil
	}
	return s.writeFile(s.blobPath(d), b, 0o600)
}

// Get returns the image that the store keeps for a reference, or ErrNotFound.
func (s *Store) Get(_ context.Context, ref Reference) (*Image, error) {
	return s.get(ref.Key())
}

func (s *Store) get(name string) (*Image, error) {
	r, err := s.readRecord(recordFile(name))
	if err == nil {
		var img *Image
		if img, err = s.load(r); err == nil {
			return img, nil
		}
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s: %w in the store", name, ErrNotFound)
	}
	return nil, fmt.Errorf("read image %s: %w", name, err)
}

// List returns every image, sorted by name. Images whose files are gone are left out and said to the log.
func (s *Store) List(_ context.Context) ([]*Image, error) {
	records, err := s.records()
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	out := make([]*Image, 0, len(records))
	for _, r := range records {
		img, err := s.load(r)
		if errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("image is not whole; pull it again", "image", r.Name, "err", err)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list images: %s: %w", r.Name, err)
		}
		out = append(out, img)
	}
	return out, nil
}

// Find returns the images that a word of the user's names: one by its reference, or all that have a digest
// (configuration or manifest) that starts with it.
func (s *Store) Find(ctx context.Context, word string) ([]*Image, error) {
	if ref, err := ParseReference(word); err == nil {
		img, err := s.Get(ctx, ref)
		if err == nil {
			return []*Image{img}, nil
		}
		if !errors.Is(err, ErrNotFound) {
			return nil, err
		}
	}
	prefix := strings.TrimPrefix(word, "sha256:")
	if len(prefix) < 4 || strings.Trim(prefix, "0123456789abcdef") != "" {
		return nil, fmt.Errorf("%s: %w in the store", word, ErrNotFound)
	}
	all, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	var out []*Image
	ids := map[digest.Digest]bool{}
	for _, img := range all {
		if strings.HasPrefix(img.ConfigDigest.Encoded(), prefix) || strings.HasPrefix(img.Digest.Encoded(), prefix) {
			out = append(out, img)
			ids[img.ConfigDigest] = true
		}
	}
	switch {
	case len(out) == 0:
		return nil, fmt.Errorf("%s: %w in the store", word, ErrNotFound)
	case len(ids) > 1:
		return nil, fmt.Errorf("%s: %d images have a digest that starts so; say more of it", word, len(ids))
	}
	return out, nil
}

// Tag gives an image another name, which it takes from the image that had it.
func (s *Store) Tag(ctx context.Context, img *Image, ref Reference) error {
	if ref.pinned() != "" {
		return fmt.Errorf("tag %s: %s is a name by digest; only a registry gives such names", img.Ref, ref)
	}
	l, err := s.lock(ctx)
	if err != nil {
		return err
	}
	defer l.unlock()
	r, err := s.recordOf(img)
	if err != nil {
		return fmt.Errorf("tag %s: %w", img.Ref, err)
	}
	r.Name, r.Pulled = ref.Key(), time.Now().UTC()
	if err := s.nameLocked(r); err != nil {
		return fmt.Errorf("tag %s: %w", img.Ref, err)
	}
	return nil
}

// recordOf is the record of an image, or if its name is gone another one of it.
func (s *Store) recordOf(img *Image) (*record, error) {
	r, err := s.readRecord(recordFile(img.Ref))
	if err == nil && r.Config == img.ConfigDigest {
		return r, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	all, err := s.records()
	if err != nil {
		return nil, err
	}
	for _, r := range all {
		if r.Config == img.ConfigDigest {
			return r, nil
		}
	}
	return nil, fmt.Errorf("%w in the store", ErrNotFound)
}

// nameLocked writes a record under its name. An image that loses its last name by that, and had one as docker's, stays
// as a dangling one; one that gets a name is none any more.
func (s *Store) nameLocked(r *record) error {
	old, err := s.readRecord(recordFile(r.Name))
	switch {
	case err == nil && old.Config != r.Config && taggedName(r.Name) != nil:
		all, err := s.records()
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(all, func(o *record) bool { return o.Config == old.Config && o.Name != r.Name }) {
			old.Name = danglingName(old.Config)
			if err := s.writeRecord(old); err != nil {
				return err
			}
		}
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		s.log.Warn("a record that cannot be read is replaced", "image", r.Name, "err", err)
	}
	if err := s.writeRecord(r); err != nil {
		return err
	}
	if name := danglingName(r.Config); r.Name != name {
		if err := os.Remove(s.path(dirImages, recordFile(name))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func (s *Store) writeRecord(r *record) error {
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return s.writeFile(s.path(dirImages, recordFile(r.Name)), append(b, '\n'), 0o600)
}
