package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	maxArchiveEntries = 100_000
	containerdName    = "io.containerd.image.name" // annotation of an index: the image's full name
)

// files are the files of an archive or of a directory.
type files interface {
	// open returns a file's bytes from an offset on and its size.
	open(name string, offset int64) (io.ReadCloser, int64, error)
}

// archive is a tar file with an index of what is in it.
type archive struct {
	f       *os.File
	entries map[string]section
}

type section struct {
	off, size int64
	link      string // another entry instead
}

// newArchive reads the index of an uncompressed tar file, which it takes over. Contents are skipped, not read.
func newArchive(f *os.File) (*archive, error) {
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	a := &archive{f: f, entries: map[string]section{}}
	tr := tar.NewReader(f)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			return a, nil
		}
		if err != nil {
			return nil, fmt.Errorf("%w: it is no tar archive, or a damaged one: %w", ErrUnsupported, err)
		}
		if n == maxArchiveEntries {
			return nil, fmt.Errorf("%w: an archive of more than %d entries", ErrUnsupported, n)
		}
		name := path.Clean("/" + h.Name)[1:]
		switch h.Typeflag {
		case tar.TypeReg:
			for k := range h.PAXRecords {
				if strings.HasPrefix(k, "GNU.sparse.") {
					return nil, fmt.Errorf("%w: %.100q is sparse in the archive", ErrUnsupported, name)
				}
			}
			off, err := f.Seek(0, io.SeekCurrent)
			if err != nil {
				return nil, err
			}
			a.entries[name] = section{off: off, size: h.Size}
		case tar.TypeSymlink:
			a.entries[name] = section{link: path.Clean("/" + path.Join(path.Dir(name), h.Linkname))[1:]}
		case tar.TypeLink:
			a.entries[name] = section{link: path.Clean("/" + h.Linkname)[1:]}
		}
	}
}

// open implements files.
func (a *archive) open(name string, offset int64) (io.ReadCloser, int64, error) {
	name = path.Clean("/" + name)[1:]
	for range 8 {
		e, ok := a.entries[name]
		if !ok {
			break
		}
		if e.link != "" {
			name = e.link
			continue
		}
		r := io.NewSectionReader(a.f, e.off, e.size)
		if _, err := r.Seek(offset, io.SeekStart); err != nil {
			return nil, 0, err
		}
		return io.NopCloser(r), e.size, nil
	}
	return nil, 0, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
}

func (a *archive) close() error { return a.f.Close() }

// directory is an OCI layout on disk.
type directory struct{ root *os.Root }

// open implements files.
func (d directory) open(name string, offset int64) (io.ReadCloser, int64, error) {
	f, err := d.root.Open(name)
	if err != nil {
		return nil, 0, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	if err == nil {
		_, err = f.Seek(offset, io.SeekStart)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, fi.Size(), nil
}

// readDocument reads a small file.
func readDocument(fs files, name string) ([]byte, error) {
	r, size, err := fs.open(name, 0)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	if size > maxDocument {
		return nil, fmt.Errorf("%w: %s has %d bytes, the limit is %d", ErrUnsupported, name, size, maxDocument)
	}
	return io.ReadAll(io.LimitReader(r, maxDocument))
}

// openArchive opens a tar file of the user's; a compressed one, or one that is no file, is unpacked into the store first.
func (s *Store) openArchive(ctx context.Context, file string, o PullOptions) (*archive, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, sourcePath(file, err)
	}
	a, err := s.archiveOf(ctx, f, o)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	return a, nil
}

// archiveOf takes over f if there is no error.
func (s *Store) archiveOf(ctx context.Context, f *os.File, o PullOptions) (*archive, error) {
	fi, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if fi.IsDir() {
		return nil, fmt.Errorf("%w: it is a directory; for an OCI layout write oci:%s", ErrUnsupported, f.Name())
	}
	if fi.Mode().IsRegular() {
		head := make([]byte, 6)
		n, err := f.ReadAt(head, 0)
		if err != nil && err != io.EOF {
			return nil, err
		}
		if n == 6 && !compressed(head) {
			return newArchive(f)
		}
	}
	a, err := s.spoolArchive(ctx, f, o.Limits)
	if err != nil {
		return nil, err
	}
	f.Close()
	return a, nil
}

func compressed(head []byte) bool {
	for _, magic := range []string{"\x1f\x8b", "\x28\xb5\x2f\xfd", "BZh", "\xfd7zXZ\x00"} {
		if bytes.HasPrefix(head, []byte(magic)) {
			return true
		}
	}
	return false
}

// dockerImage is an entry of a docker archive's manifest.json.
type dockerImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// dockerImages reads manifest.json; fs.ErrNotExist if there is none.
func (a *archive) dockerImages() ([]dockerImage, error) {
	b, err := readDocument(a, "manifest.json")
	if err != nil {
		return nil, err
	}
	var m []dockerImage
	if err := json.Unmarshal(b, &m); err != nil {
		return nil, fmt.Errorf("%w: manifest.json: %w", ErrUnsupported, err)
	}
	return m, nil
}

// dockerImage finds the one image of a docker archive that match wants.
func (a *archive) dockerImage(match func(dockerImage) bool) (*found, error) {
	all, err := a.dockerImages()
	if errors.Is(err, fs.ErrNotExist) {
		if _, ok := a.entries["index.json"]; ok {
			return nil, fmt.Errorf("%w: it is an OCI archive; write oci-archive:FILE", ErrUnsupported)
		}
		return nil, fmt.Errorf("%w: it is no docker archive, it has no manifest.json", ErrUnsupported)
	}
	if err != nil {
		return nil, err
	}
	var hit []dockerImage
	var names []string
	for _, m := range all {
		if match(m) {
			hit = append(hit, m)
		}
		names = append(names, m.RepoTags...)
	}
	switch {
	case len(hit) == 0:
		return nil, fmt.Errorf("%w in the archive; it has: %.1000s", ErrNotFound, strings.Join(names, ", "))
	case len(hit) > 1:
		return nil, fmt.Errorf("the archive has %d images; say which, as in docker-archive:FILE:NAME: %.1000s", len(hit), strings.Join(names, ", "))
	}
	return a.fromDocker(hit[0])
}

// fromDocker reads an image of a docker archive.
func (a *archive) fromDocker(m dockerImage) (*found, error) {
	config, err := readDocument(a, m.Config)
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	c, err := parseConfig(config)
	if err != nil {
		return nil, err
	}
	if len(c.RootFS.DiffIDs) != len(m.Layers) {
		return nil, fmt.Errorf("%w: manifest.json has %d layers, the configuration %d", ErrUnsupported, len(m.Layers), len(c.RootFS.DiffIDs))
	}
	f := &found{config: config, diffIDs: c.RootFS.DiffIDs, unhashed: true}
	for i, name := range m.Layers {
		r, size, err := a.open(name, 0)
		if err != nil {
			return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(m.Layers), err)
		}
		r.Close()
		f.layers = append(f.layers, ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: f.diffIDs[i], Size: size})
	}
	f.open = func(_ context.Context, n int, offset int64) (io.ReadCloser, error) {
		r, _, err := a.open(m.Layers[n], offset)
		return r, err
	}
	f.manifest, err = describe(config, f.layers, nil)
	return f, err
}

func (s *Store) pullArchive(ctx context.Context, ref Reference, o PullOptions) (*Image, error) {
	a, err := s.openArchive(ctx, ref.path, o)
	if err != nil {
		return nil, err
	}
	defer a.close()
	if ref.transport == OCIArchive {
		return s.pullFiles(ctx, a, ref, o)
	}
	f, err := a.dockerImage(func(m dockerImage) bool {
		for _, tag := range m.RepoTags {
			if n, err := reference.ParseDockerRef(tag); err == nil && ref.named != nil && n.String() == ref.named.String() {
				return true
			}
		}
		return ref.named == nil
	})
	if err != nil {
		return nil, err
	}
	f.names, f.source, f.transport = []string{ref.Key()}, ref.String(), ref.transport
	return s.fetch(ctx, f, o)
}

func (s *Store) pullLayout(ctx context.Context, ref Reference, o PullOptions) (*Image, error) {
	root, err := os.OpenRoot(ref.path)
	if err != nil {
		return nil, sourcePath(ref.path, err)
	}
	defer root.Close()
	return s.pullFiles(ctx, directory{root}, ref, o)
}

// pullFiles takes an image out of an OCI layout.
func (s *Store) pullFiles(ctx context.Context, fs files, ref Reference, o PullOptions) (*Image, error) {
	index, err := ociIndex(fs)
	if err != nil {
		return nil, err
	}
	d, err := chooseRef(index, ref.inner)
	if err != nil {
		return nil, err
	}
	f, err := fromLayout(fs, d)
	if err != nil {
		return nil, err
	}
	f.names, f.source, f.transport = []string{ref.Key()}, ref.String(), ref.transport
	return s.fetch(ctx, f, o)
}

// ociIndex reads the index.json of an OCI layout.
func ociIndex(fs files) (*document, error) {
	b, err := readDocument(fs, "index.json")
	if err != nil {
		return nil, fmt.Errorf("%w: it is no OCI layout: %w", ErrUnsupported, err)
	}
	if v, err := readDocument(fs, ocispec.ImageLayoutFile); err == nil {
		var l ocispec.ImageLayout
		if err := json.Unmarshal(v, &l); err != nil || !strings.HasPrefix(l.Version, "1.") {
			return nil, fmt.Errorf("%w: OCI layout of version %.20q", ErrUnsupported, l.Version)
		}
	}
	d, err := parseDocument(b, ocispec.MediaTypeImageIndex)
	if err == nil && !d.isIndex() {
		err = fmt.Errorf("%w: index.json is no index", ErrUnsupported)
	}
	return d, err
}

// chooseRef picks an image of a layout: the one with that name, or the only one.
func chooseRef(index *document, ref string) (ocispec.Descriptor, error) {
	var hit []ocispec.Descriptor
	var names []string
	for _, m := range index.Manifests {
		if !isManifest(m.MediaType) {
			continue
		}
		name := m.Annotations[ocispec.AnnotationRefName]
		full := m.Annotations[containerdName]
		if ref == "" || name == ref || full == ref || m.Digest.String() == ref {
			hit = append(hit, m)
		}
		switch {
		case name != "":
			names = append(names, name)
		case full != "":
			names = append(names, full)
		default:
			names = append(names, m.Digest.String())
		}
	}
	switch {
	case len(hit) == 1:
		return hit[0], checkDescriptor(hit[0], maxDocument)
	case len(hit) == 0:
		return ocispec.Descriptor{}, fmt.Errorf("%w in the layout; it has: %.1000s", ErrNotFound, strings.Join(names, ", "))
	}
	// One image for several platforms, written without an index of its own?
	platforms := *index
	platforms.Manifests = hit
	all := true
	for _, m := range hit {
		all = all && m.Platform != nil && m.Annotations[ocispec.AnnotationRefName] == hit[0].Annotations[ocispec.AnnotationRefName]
	}
	if all {
		return platforms.choose()
	}
	return ocispec.Descriptor{}, fmt.Errorf("the layout has %d images; say which, as in oci:DIR:REF: %.1000s", len(hit), strings.Join(names, ", "))
}

func blobName(d digest.Digest) string { return "blobs/sha256/" + d.Encoded() }

// fromLayout reads an image of an OCI layout.
func fromLayout(fs files, top ocispec.Descriptor) (*found, error) {
	read := func(d ocispec.Descriptor) ([]byte, error) { return readDocument(fs, blobName(d.Digest)) }
	b, err := read(top)
	if err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", top.Digest, err)
	}
	if err := checkBytes(top, b); err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", top.Digest, err)
	}
	f, err := resolve(b, top.MediaType, read)
	if err != nil {
		return nil, err
	}
	f.open = func(_ context.Context, n int, offset int64) (io.ReadCloser, error) {
		r, size, err := fs.open(blobName(f.layers[n].Digest), offset)
		if err == nil && size != f.layers[n].Size {
			r.Close()
			err = fmt.Errorf("%w: %d bytes, not %d", ErrCorrupt, size, f.layers[n].Size)
		}
		return r, err
	}
	return f, nil
}

// Load takes every image (for linux/amd64; with AnyPlatform for any) out of what docker save or an OCI tool wrote, under the names it has there. An
// image without a name is kept under its ID. The reader is best a file.
func (s *Store) Load(ctx context.Context, r io.Reader, o PullOptions) ([]*Image, error) {
	if err := o.check(); err != nil {
		return nil, fmt.Errorf("load: %w", err)
	}
	images, err := s.loadAll(ctx, r, o)
	if err != nil {
		return images, fmt.Errorf("load: %w", explain(err, s.dir))
	}
	return images, nil
}

func (s *Store) loadAll(ctx context.Context, r io.Reader, o PullOptions) ([]*Image, error) {
	var a *archive
	var err error
	if f, ok := r.(*os.File); ok {
		var own *os.File
		if own, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd())); err == nil { // closing it leaves the caller's open
			if a, err = s.archiveOf(ctx, own, o); err != nil {
				own.Close()
			}
		}
	} else {
		a, err = s.spoolArchive(ctx, r, o.Limits)
	}
	if err != nil {
		return nil, err
	}
	defer a.close()
	all, err := a.everyImage()
	if err != nil {
		return nil, err
	}
	var out []*Image
	for _, f := range all {
		img, err := s.fetch(ctx, f, o)
		if err != nil {
			return out, err
		}
		for _, name := range f.names {
			named := *img
			named.Ref = name
			out = append(out, &named)
		}
	}
	return out, nil
}

func (a *archive) everyImage() ([]*found, error) {
	var out []*found
	docker, err := a.dockerImages()
	if err == nil {
		for _, m := range docker {
			f, err := a.fromDocker(m)
			if err != nil {
				return nil, err
			}
			for _, tag := range m.RepoTags {
				n, err := reference.ParseDockerRef(tag)
				if err != nil {
					return nil, fmt.Errorf("%w: tag %.200q: %w", ErrUnsupported, tag, err)
				}
				f.names = append(f.names, n.String())
			}
			f.transport = DockerArchive
			out = append(out, f)
		}
	} else if errors.Is(err, fs.ErrNotExist) {
		index, err := ociIndex(a)
		if err != nil {
			return nil, err
		}
		for _, m := range index.Manifests {
			if !isManifest(m.MediaType) || m.Platform != nil && (m.Platform.OS != "linux" || m.Platform.Architecture != "amd64") {
				continue
			}
			if err := checkDescriptor(m, maxDocument); err != nil {
				return nil, err
			}
			f, err := fromLayout(a, m)
			if err != nil {
				return nil, err
			}
			for _, name := range []string{m.Annotations[containerdName], m.Annotations[ocispec.AnnotationRefName]} {
				// A bare tag is no name.
				if n, err := reference.ParseDockerRef(name); err == nil && strings.ContainsAny(name, "/:") {
					f.names = append(f.names, n.String())
					break
				}
			}
			f.transport = OCIArchive
			out = append(out, f)
		}
	} else {
		return nil, err
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%w: the archive holds no image for %s", ErrUnsupported, Platform)
	}
	for _, f := range out {
		f.source = "an archive"
		if len(f.names) == 0 {
			f.names = []string{digest.FromBytes(f.config).String()}
		}
	}
	return out, nil
}
