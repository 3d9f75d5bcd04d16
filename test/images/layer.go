package images

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/moby/go-archive"
	"github.com/moby/sys/user"
)

// plainLayer is a layer in an uncompressed file, served as it lies there.
type plainLayer struct {
	path   string
	diffID v1.Hash
	size   int64
}

var _ v1.Layer = plainLayer{}

func (l plainLayer) Digest() (v1.Hash, error)             { return l.diffID, nil }
func (l plainLayer) DiffID() (v1.Hash, error)             { return l.diffID, nil }
func (l plainLayer) Compressed() (io.ReadCloser, error)   { return os.Open(l.path) }
func (l plainLayer) Uncompressed() (io.ReadCloser, error) { return os.Open(l.path) }
func (l plainLayer) Size() (int64, error)                 { return l.size, nil }
func (l plainLayer) MediaType() (types.MediaType, error)  { return types.DockerUncompressedLayer, nil }

// writePlain writes a layer's file.
func writePlain(file string, write func(io.Writer) error) (_ plainLayer, err error) {
	f, err := os.Create(file)
	if err != nil {
		return plainLayer{}, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buf := bufio.NewWriterSize(f, 1<<20)
	sum := sha256.New()
	if err := write(io.MultiWriter(buf, sum)); err != nil {
		return plainLayer{}, err
	}
	if err := buf.Flush(); err != nil {
		return plainLayer{}, err
	}
	info, err := f.Stat()
	if err != nil {
		return plainLayer{}, err
	}
	return plainLayer{file, v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(sum.Sum(nil))}, info.Size()}, nil
}

// writeDifference writes a layer that turns the tree at old into the one at root, as docker's own drivers do.
func writeDifference(w io.Writer, root, old string) error {
	var changes []archive.Change
	var err error
	if old == "" {
		empty, err := os.MkdirTemp("", "kcradle-empty-")
		if err != nil {
			return err
		}
		defer os.Remove(empty)
		old = empty
	}
	if changes, err = archive.ChangesDirs(root, old); err != nil {
		return fmt.Errorf("compare %s with %s: %w", root, old, err)
	}
	r, err := archive.ExportChanges(root, changes, user.IdentityMapping{})
	if err != nil {
		return fmt.Errorf("pack %s: %w", root, err)
	}
	defer r.Close()
	if _, err := io.Copy(w, r); err != nil {
		return fmt.Errorf("pack %s: %w", root, err)
	}
	return nil
}

// epoch dates every file of ours.
var epoch = time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)

// writeFiles is the layer of the recipe's own files, with the directories they need.
func writeFiles(files []file) writeLayer {
	return func(tw *tar.Writer) error {
		made := map[string]bool{".": true}
		var mkdir func(dir string) error
		mkdir = func(dir string) error {
			if made[dir] {
				return nil
			}
			made[dir] = true
			if err := mkdir(path.Dir(dir)); err != nil {
				return err
			}
			return tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir + "/", Mode: 0o755, ModTime: epoch})
		}
		for _, f := range files {
			if err := mkdir(path.Dir(f.Path)); err != nil {
				return err
			}
			if err := regular(tw, f.Path, f.Mode, []byte(f.Body)); err != nil {
				return err
			}
		}
		return nil
	}
}

func regular(tw *tar.Writer, name string, mode int64, body []byte) error {
	err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(body)), ModTime: epoch})
	if err != nil {
		return err
	}
	_, err = tw.Write(body)
	return err
}

// layersOf writes the layers of r and those below it into dir, oldest first.
func (c *Cache) layersOf(ctx context.Context, r *recipe, h *host, dir string) ([]plainLayer, error) {
	var layers []plainLayer
	add := func(write func(io.Writer) error) error {
		l, err := writePlain(filepath.Join(dir, fmt.Sprintf("%s-%d.tar", r.name, len(layers))), write)
		if err != nil {
			return err
		}
		layers = append(layers, l)
		return nil
	}
	addTar := func(write writeLayer) error {
		return add(func(w io.Writer) error {
			tw := tar.NewWriter(w)
			return errors.Join(write(tw), tw.Close())
		})
	}
	if r.parent != "" {
		p, err := find(r.parent)
		if err != nil {
			return nil, err
		}
		if layers, err = c.layersOf(ctx, p, h, dir); err != nil {
			return nil, err
		}
	}
	if r.base {
		root, err := c.root(ctx, r, h)
		if err != nil {
			return nil, err
		}
		if err := add(func(w io.Writer) error { return writeDifference(w, root, "") }); err != nil {
			return nil, err
		}
	}
	if len(r.packages) > 0 || r.script != "" {
		if err := add(func(w io.Writer) error { return c.packageLayer(ctx, r, h, w) }); err != nil {
			return nil, err
		}
	}
	if len(r.files) > 0 {
		if err := addTar(writeFiles(r.files)); err != nil {
			return nil, err
		}
	}
	if r.layers != nil {
		writers, err := r.layers(h)
		if err != nil {
			return nil, err
		}
		for _, write := range writers {
			if err := addTar(write); err != nil {
				return nil, err
			}
		}
	}
	return layers, nil
}

// build makes the image's directory.
func (c *Cache) build(ctx context.Context, r *recipe, h *host, dir string) error {
	work, err := os.MkdirTemp(c.dir, ".layers-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(work)
	layers, err := c.layersOf(ctx, r, h, work)
	if err != nil {
		return err
	}
	return atomically(dir, func(tmp string) error {
		var plain, packed []v1.Layer
		for _, l := range layers {
			plain = append(plain, l)
			opt := []tarball.LayerOption{tarball.WithMediaType(types.OCILayer)}
			if r.zstd {
				opt = []tarball.LayerOption{tarball.WithMediaType(types.OCILayerZStd), tarball.WithCompression(compression.ZStd)}
			}
			p, err := tarball.LayerFromFile(l.path, opt...)
			if err != nil {
				return err
			}
			packed = append(packed, p)
		}
		img, err := assemble(empty.Image, r, plain)
		if err != nil {
			return err
		}
		if err := writeArchive(filepath.Join(tmp, "docker.tar"), ref(r.name), img); err != nil {
			return err
		}
		oci := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
		if img, err = assemble(oci, r, packed); err != nil {
			return err
		}
		// The layout comes last: it is what Build looks for.
		l, err := layout.Write(filepath.Join(tmp, "oci"), empty.Index)
		if err != nil {
			return err
		}
		return l.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "latest"}))
	})
}

func writeArchive(file, ref string, img v1.Image) error {
	tag, err := name.NewTag(ref)
	if err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	return errors.Join(tarball.Write(tag, img, f), f.Close())
}

func assemble(base v1.Image, r *recipe, layers []v1.Layer) (v1.Image, error) {
	img, err := mutate.AppendLayers(base, layers...)
	if err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Variant = platform(r.arch)
	cf.Created = v1.Time{Time: epoch}
	cf.Config = r.config
	return mutate.ConfigFile(img, cf)
}

// platform says how a configuration names the machine that arch, which may be empty, stands for.
func platform(arch string) (os, architecture, variant string) {
	switch arch {
	case "":
		return "linux", "amd64", ""
	case "arm":
		return "linux", "arm", "v" + goarm
	default:
		return "linux", arch, ""
	}
}

// Append returns img with one more layer, which holds files: tests put their own programs on top with it.
func Append(img v1.Image, files map[string]string, config func(*v1.Config)) (v1.Image, error) {
	var fs []file
	for name, source := range files {
		b, err := os.ReadFile(source)
		if err != nil {
			return nil, err
		}
		fs = append(fs, file{Path: name, Mode: 0o755, Body: string(b)})
	}
	slices.SortFunc(fs, func(a, b file) int { return strings.Compare(a.Path, b.Path) })
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		pr, pw := io.Pipe()
		go func() {
			tw := tar.NewWriter(pw)
			pw.CloseWithError(errors.Join(writeFiles(fs)(tw), tw.Close()))
		}()
		return pr, nil
	}, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	if img, err = mutate.AppendLayers(img, l); err != nil {
		return nil, err
	}
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	config(&cf.Config)
	return mutate.ConfigFile(img, cf)
}

// Save writes img as an archive of docker save's form under the tag ref.
func Save(file, ref string, img v1.Image) error { return writeArchive(file, ref, img) }

// Flatten returns an image of one layer that shows the same tree as img.
func Flatten(img v1.Image) (v1.Image, error) {
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return mutate.Extract(img), nil }, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	flat, err := mutate.AppendLayers(empty.Image, l)
	if err != nil {
		return nil, err
	}
	old, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf, err := flat.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.OS, cf.Architecture, cf.Created, cf.Config = old.OS, old.Architecture, old.Created, old.Config
	return mutate.ConfigFile(flat, cf)
}
