// Package bundle is the directory between summon and run: everything one pod needs to start, and what is left of its
// last start. A person can read it, copy it and tar it.
//
//	b, err := bundle.Write(ctx, dir, bundle.Config{Pod: pod, Layers: files, Packages: "/usr/lib/kcradle"})
//	b, err := bundle.Open(dir)        // strict: a newer format is refused in words
//	lock, err := b.Lock()             // one supervisor at a time
//
// The files:
//
//	bundle.json              format version, who wrote it, the store that keeps its layers
//	pod.json                 the owner's document, canonical bytes
//	cradle -> pkg-default    which machine package boots it
//	pkg-default, pkg-snp     links to the installed machine packages
//	layers/<hex>.erofs       links into the store (hard ones where they can be), or copies in a portable bundle
//	scratch.ext4             the writable layer, sparse
//	volumes/<name>.ext4      the named volumes, sparse
//	run/                     lock, state.json, sockets, console.log
//	logs/<container>.log     output, in docker's json-file format
package bundle

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/spec"
)

// Version is the version of the format this code writes and the newest it reads.
//
// History:
//   - 1: first version.
const Version = 1

// Names inside a bundle.
const (
	metaFile    = "bundle.json"
	podFile     = "pod.json"
	cradleLink  = "cradle"
	layersDir   = "layers"
	volumesDir  = "volumes"
	scratchFile = "scratch.ext4"
	runDir      = "run"
	logsDir     = "logs"

	// PackageDefault and PackageSNP are the machine packages a bundle links to.
	PackageDefault = "pkg-default"
	PackageSNP     = "pkg-snp"
)

// maxMetaBytes bounds bundle.json, state.json and manifest.json.
const maxMetaBytes = 4 << 20

var (
	// ErrNotBundle is returned (wrapped) for a directory that is no bundle.
	ErrNotBundle = errors.New("not a bundle (write one with: kcradle summon DIR IMAGE)")
	// ErrRunning is returned (wrapped) when a supervisor holds the bundle.
	ErrRunning = errors.New("is running")
	// ErrExists is returned (wrapped) by Write for a bundle that is there already.
	ErrExists = errors.New("a bundle is there already (replace it with --force)")
)

// Meta is bundle.json.
type Meta struct {
	Version int       `json:"version"`         // required; see Version
	Created time.Time `json:"created"`         // UTC
	Writer  string    `json:"writer"`          // "kcradle v1.2.3"
	Store   string    `json:"store,omitempty"` // the image store that keeps the layers for this bundle; empty: copies
}

// Bundle is an opened bundle. It holds no file open.
type Bundle struct {
	Dir  string // absolute
	Meta Meta
	Pod  *spec.Pod
	// PodJSON are the exact bytes of pod.json.
	PodJSON []byte
}

// Open reads a bundle. It checks both documents, not the layers (see [Bundle.Layers]).
func Open(dir string) (*Bundle, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("open bundle: %w", err)
	}
	b := &Bundle{Dir: abs}
	meta, err := readBounded(filepath.Join(abs, metaFile), maxMetaBytes)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			if _, err := os.Stat(abs); err != nil {
				return nil, fmt.Errorf("open bundle: %w", err)
			}
			return nil, fmt.Errorf("open bundle %s: %w", dir, ErrNotBundle)
		}
		return nil, fmt.Errorf("open bundle: %w", err)
	}
	if err := decodeVersioned(meta, &b.Meta, Version); err != nil {
		return nil, fmt.Errorf("open bundle: %s: %w", filepath.Join(abs, metaFile), err)
	}
	if b.PodJSON, err = readBounded(filepath.Join(abs, podFile), spec.MaxPodBytes); err != nil {
		return nil, fmt.Errorf("open bundle: %w", err)
	}
	if b.Pod, err = spec.ParsePod(b.PodJSON); err != nil {
		return nil, fmt.Errorf("open bundle: %s: %w", filepath.Join(abs, podFile), err)
	}
	return b, nil
}

// Is reports whether dir looks like a bundle of any version.
func Is(dir string) bool {
	fi, err := os.Stat(filepath.Join(dir, metaFile))
	return err == nil && fi.Mode().IsRegular()
}

// ScratchPath is the writable disk.
func (b *Bundle) ScratchPath() string { return filepath.Join(b.Dir, scratchFile) }

// VolumePath is the disk of a named volume.
func (b *Bundle) VolumePath(name string) string {
	return filepath.Join(b.Dir, volumesDir, name+".ext4")
}

// RunDir holds what belongs to one start.
func (b *Bundle) RunDir() string { return filepath.Join(b.Dir, runDir) }

// LogPath is the output log of a container.
func (b *Bundle) LogPath(containerID string) string {
	return filepath.Join(b.Dir, logsDir, containerID+".log")
}

// Layer is one layer image as the machine gets it.
type Layer struct {
	DiffID string
	Path   string // of the EROFS image, links resolved
	Size   int64
}

// Layers resolves the layers in the order of the layers drive ([spec.Pod.Layers]).
func (b *Bundle) Layers() ([]Layer, error) {
	var out []Layer
	for _, id := range b.Pod.Layers() {
		path := filepath.Join(b.Dir, layersDir, layerName(id))
		real, err := filepath.EvalSymlinks(path)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w (summon the bundle again, or pull its image)", id, err)
		}
		fi, err := os.Stat(real)
		if err != nil {
			return nil, fmt.Errorf("layer %s: %w", id, err)
		}
		if !fi.Mode().IsRegular() || fi.Size() == 0 {
			return nil, fmt.Errorf("layer %s: %s is no layer image", id, real)
		}
		out = append(out, Layer{DiffID: id, Path: real, Size: fi.Size()})
	}
	return out, nil
}

// Volume is the disk of a named volume: raw ext4, sparse.
type Volume struct {
	Name string
	Path string
	Size int64 // bytes, as the guest sees it
}

// Volumes resolves the pod's volumes, in its order.
func (b *Bundle) Volumes() ([]Volume, error) {
	var out []Volume
	for _, v := range b.Pod.Volumes {
		path := b.VolumePath(v.Name)
		fi, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("volume %s: %w (summon the bundle again)", v.Name, err)
		}
		if !fi.Mode().IsRegular() || fi.Size() == 0 {
			return nil, fmt.Errorf("volume %s: %s is no disk", v.Name, path)
		}
		out = append(out, Volume{Name: v.Name, Path: path, Size: fi.Size()})
	}
	return out, nil
}

func layerName(diffID string) string { return strings.TrimPrefix(diffID, "sha256:") + ".erofs" }

// Package opens the machine package that DIR/cradle names.
func (b *Bundle) Package() (*Package, error) {
	link := filepath.Join(b.Dir, cradleLink)
	target, err := os.Readlink(link)
	if err != nil {
		return nil, fmt.Errorf("machine package: %w (ln -sf %s %s)", err, PackageDefault, link)
	}
	dir := target
	if !filepath.IsAbs(dir) {
		dir = filepath.Join(b.Dir, dir)
	}
	p, err := OpenPackage(dir)
	if errors.Is(err, fs.ErrNotExist) {
		name := strings.TrimPrefix(filepath.Base(target), "pkg-")
		hint := "install it, or choose another: ln -sfn " + PackageDefault + " " + link
		if filepath.Base(target) == PackageDefault {
			hint = "build it with: make build"
		}
		return nil, fmt.Errorf("the %s machine package is not installed: %s points at nothing (%s)", name, dir, hint)
	}
	return p, err
}

// decodeVersioned decodes strict JSON whose "version" must be 1 to newest; a newer one is [spec.ErrNewer].
func decodeVersioned(b []byte, into any, newest int) error {
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	if v.Version > newest {
		return fmt.Errorf("version %d: %w", v.Version, spec.ErrNewer)
	}
	if v.Version < 1 {
		return fmt.Errorf("version: want 1 to %d, got %d", newest, v.Version)
	}
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	return d.Decode(into)
}

func readBounded(path string, limit int64) ([]byte, error) {
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
		return nil, fmt.Errorf("read %s: more than the limit of %d bytes", path, limit)
	}
	return b, nil
}

// writeAtomic replaces path by a file with these bytes: a reader sees the old or the new ones, never a part.
func writeAtomic(path string, b []byte, mode fs.FileMode) error {
	return writeAtomicIn(path, b, mode, 0)
}

// writeAtomicIn is writeAtomic, with room bytes taken on disk whatever b is long.
func writeAtomicIn(path string, b []byte, mode fs.FileMode, room int64) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // after the rename there is nothing of that name
	if room > 0 {
		err = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, room)
		if errors.Is(err, unix.EOPNOTSUPP) { // a file system that does not know this
			err = nil
		}
		if err != nil {
			err = &fs.PathError{Op: "fallocate", Path: f.Name(), Err: err}
		}
	}
	if err == nil {
		_, err = f.Write(b)
	}
	if cerr := f.Chmod(mode); err == nil {
		err = cerr
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}
