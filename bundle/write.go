package bundle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/undo"
	"github.com/kcradle/kcradle/spec"
)

// Config is what Write makes a bundle of.
type Config struct {
	Pod *spec.Pod // required

	// Layers says where the EROFS image of each of the pod's layers lies.
	Layers map[string]string // diffID → file

	Packages string // required; the directory of the installed machine packages
	Cache    string // required; where empty file systems are kept

	ScratchSize int64 // bytes; zero: DefaultDiskSize

	// Volumes are disks that outlive the bundle: where the one of each of these volumes lies. The others are the bundle's own.
	Volumes map[string]string // name → file, absolute

	// Portable copies layers and machine package instead of linking to them.
	Portable bool
	// Replace allows a bundle in the place. Its volumes are kept where the new pod has volumes of the same names and
	// sizes; everything else of it goes. A running bundle is never replaced.
	Replace bool

	// Files are further files of the bundle, by name, for its owner alone: what another program knows of the pod.
	Files map[string][]byte

	Store, Writer string // see Meta
}

// Write makes the bundle dir, whole or not at all: dir must not exist, be empty, or (with Replace) be a bundle that
// does not run. Its parent must exist.
func Write(ctx context.Context, dir string, c Config) (*Bundle, error) {
	b, err := write(ctx, dir, c)
	if err != nil {
		return nil, fmt.Errorf("write bundle %s: %w", dir, err)
	}
	return b, nil
}

func write(ctx context.Context, dir string, c Config) (*Bundle, error) {
	podJSON, err := c.Pod.Encode()
	if err != nil {
		return nil, err
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		dir = real
	}
	old, release, err := checkPlace(dir, c.Replace)
	if err != nil {
		return nil, err
	}
	defer release()

	var u undo.Stack
	defer u.Run()
	tmp, err := os.MkdirTemp(filepath.Dir(dir), filepath.Base(dir)+".tmp-*")
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w (make the directory above it first)", err)
		}
		return nil, err
	}
	u.Push(func() { os.RemoveAll(tmp) })

	b := &Bundle{Dir: tmp, Pod: c.Pod, PodJSON: podJSON,
		Meta: Meta{Version: Version, Created: time.Now().UTC(), Writer: c.Writer, Store: c.Store}}
	if err := b.fill(ctx, c, old); err != nil {
		return nil, err
	}
	// Everything is on disk before the name is: a crash leaves no bundle that looks whole.
	for _, name := range []string{podFile, metaFile, "."} {
		if err := syncFile(filepath.Join(tmp, name)); err != nil {
			return nil, err
		}
	}
	if err := place(tmp, dir, old != nil); err != nil {
		return nil, err
	}
	u.Keep()
	if old != nil { // after the exchange the old one has the temporary name
		if err := os.RemoveAll(tmp); err != nil {
			return nil, fmt.Errorf("remove the replaced bundle: %w", err)
		}
	}
	b.Dir = dir
	return b, nil
}

// checkPlace says whether dir may become a bundle. old is what it replaces; release gives its lock back.
func checkPlace(dir string, replace bool) (old *Bundle, release func(), err error) {
	release = func() {}
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, release, nil
	case errors.Is(err, unix.ENOTDIR):
		return nil, nil, errors.New("there is a file of that name")
	case err != nil:
		return nil, nil, err
	case len(entries) == 0:
		return nil, release, nil
	case !Is(dir):
		return nil, nil, fmt.Errorf("the directory holds something else (%s)", entries[0].Name())
	case !replace:
		return nil, nil, ErrExists
	}
	old, err = Open(dir)
	if err != nil { // of a newer version, or damaged: it can still be held, and can be replaced
		old = &Bundle{Dir: dir, Pod: &spec.Pod{}}
	}
	lock, err := old.Lock()
	if err != nil {
		return nil, nil, err
	}
	return old, func() { lock.Unlock() }, nil
}

// fill writes everything into b.Dir.
func (b *Bundle) fill(ctx context.Context, c Config, old *Bundle) error {
	if err := os.Chmod(b.Dir, 0o755); err != nil {
		return err
	}
	for name, mode := range map[string]fs.FileMode{layersDir: 0o755, volumesDir: 0o700, runDir: 0o700, logsDir: 0o700} {
		if err := os.Mkdir(filepath.Join(b.Dir, name), mode); err != nil {
			return err
		}
	}
	for _, id := range b.Pod.Layers() {
		if err := ctx.Err(); err != nil {
			return err
		}
		src, ok := c.Layers[id]
		if !ok {
			return fmt.Errorf("layer %s: no file was given for it", id)
		}
		if err := linkOrCopy(ctx, filepath.Join(b.Dir, layersDir, layerName(id)), src, c.Portable); err != nil {
			return fmt.Errorf("layer %s: %w", id, err)
		}
	}
	if err := b.linkPackages(ctx, c); err != nil {
		return err
	}
	if err := newDisk(ctx, c.Cache, scratchDisk, b.ScratchPath(), c.ScratchSize); err != nil {
		return fmt.Errorf("scratch disk: %w", err)
	}
	for _, v := range b.Pod.Volumes {
		if disk := c.Volumes[v.Name]; disk != "" {
			if err := os.Symlink(disk, b.VolumePath(v.Name)); err != nil {
				return fmt.Errorf("volume %s: %w", v.Name, err)
			}
			continue
		}
		if old != nil && keepVolume(b, old, v) {
			continue
		}
		if err := newDisk(ctx, c.Cache, volumeDisk, b.VolumePath(v.Name), v.Size); err != nil {
			return fmt.Errorf("volume %s: %w", v.Name, err)
		}
	}
	meta, err := json.MarshalIndent(b.Meta, "", "  ")
	if err != nil {
		return err
	}
	for name, content := range c.Files {
		if err := os.WriteFile(filepath.Join(b.Dir, name), content, 0o600); err != nil {
			return err
		}
		if err := syncFile(filepath.Join(b.Dir, name)); err != nil {
			return err
		}
	}
	// Environments hold secrets: the owner's eyes only.
	if err := os.WriteFile(filepath.Join(b.Dir, podFile), b.PodJSON, 0o600); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.Dir, metaFile), append(meta, '\n'), 0o644)
}

func (b *Bundle) linkPackages(ctx context.Context, c Config) error {
	packages, err := filepath.Abs(c.Packages)
	if err != nil {
		return err
	}
	for _, name := range []string{PackageDefault, PackageSNP} {
		src, dst := filepath.Join(packages, name), filepath.Join(b.Dir, name)
		if p, err := OpenPackage(src); c.Portable && err == nil {
			if err := os.Mkdir(dst, 0o755); err != nil {
				return err
			}
			for _, f := range []string{manifestFile, kernelFile, initrdFile} {
				if err := copyFile(ctx, filepath.Join(dst, f), filepath.Join(p.Dir, f), 0o644); err != nil {
					return fmt.Errorf("machine package: %w", err)
				}
			}
			continue
		}
		if err := os.Symlink(src, dst); err != nil { // its target may come later
			return err
		}
	}
	return os.Symlink(PackageDefault, filepath.Join(b.Dir, cradleLink))
}

// keepVolume carries a volume over from the replaced bundle. The old name goes with the old bundle.
func keepVolume(b, old *Bundle, v spec.Volume) bool {
	for _, o := range old.Pod.Volumes {
		if o == v {
			return os.Link(old.VolumePath(v.Name), b.VolumePath(v.Name)) == nil
		}
	}
	return false
}

// NewVolume makes the empty disk of a volume, of a size in bytes (zero: DefaultDiskSize).
func NewVolume(ctx context.Context, cache, path string, size int64) error {
	return newDisk(ctx, cache, volumeDisk, path, size)
}

// SetPod replaces the pod of a bundle: its next start is another one. Layers and volumes must be those it had.
func (b *Bundle) SetPod(p *spec.Pod) error {
	raw, err := p.Encode()
	if err == nil {
		err = writeAtomic(filepath.Join(b.Dir, podFile), raw, 0o600)
	}
	if err != nil {
		return fmt.Errorf("change the pod of %s: %w", b.Dir, err)
	}
	b.Pod, b.PodJSON = p, raw
	return nil
}

// fileRoom is what each of [Config.Files] gets on disk when it is replaced, at least.
const fileRoom = 16 << 10

// SetFile replaces one of [Config.Files]. The contents before are kept beside it as room for the next ones, so that a full disk
// does not keep a container from being stopped.
func (b *Bundle) SetFile(name string, content []byte) error {
	path := filepath.Join(b.Dir, name)
	spare := filepath.Join(b.Dir, "."+name+spareFile)
	err := func() error {
		next := spare + ".next"
		err := writeAtomicIn(next, content, 0o600, fileRoom)
		if errors.Is(err, unix.ENOSPC) {
			next = spare
			if werr := overwrite(spare, content); !errors.Is(werr, fs.ErrNotExist) {
				err = werr
			}
		}
		if err != nil {
			return err
		}
		err = unix.Renameat2(unix.AT_FDCWD, next, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
		if errors.Is(err, unix.ENOENT) { // there was none
			return os.Rename(next, path)
		}
		if err != nil {
			return &os.LinkError{Op: "exchange", Old: next, New: path, Err: err}
		}
		return os.Rename(next, spare)
	}()
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// File reads one of [Config.Files].
func (b *Bundle) File(name string) ([]byte, error) {
	return readBounded(filepath.Join(b.Dir, name), maxMetaBytes)
}

func newDisk(ctx context.Context, cache string, kind diskKind, path string, size int64) error {
	if size == 0 {
		size = DefaultDiskSize
	}
	empty, err := blank(ctx, cache, kind, size)
	if err != nil {
		return err
	}
	return copyFile(ctx, path, empty, 0o600)
}

func linkOrCopy(ctx context.Context, dst, src string, portable bool) error {
	if portable {
		return copyFile(ctx, dst, src, 0o644)
	}
	abs, err := filepath.Abs(src)
	if err != nil {
		return err
	}
	// A hard link outlives the store's own name and a move of the bundle. It needs one file system for both.
	if err := os.Link(abs, dst); err == nil || errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if _, err := os.Stat(abs); err != nil {
		return err
	}
	return os.Symlink(abs, dst)
}

// place gives the finished directory its name. exchange swaps it with what has the name.
func place(tmp, dir string, exchange bool) error {
	var err error
	if exchange {
		err = unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE)
	} else {
		err = os.Rename(tmp, dir) // also over an empty directory
	}
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("rename: %w (is it a mount point? name a directory below it)", err)
	}
	if errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) {
		return errors.New("somebody else wrote into the directory meanwhile")
	}
	if err != nil {
		return fmt.Errorf("rename: %w", err)
	}
	return syncFile(filepath.Dir(dir))
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	return f.Sync()
}

// Remove deletes a bundle that does not run. With volumes and logs, there is no way back.
func (b *Bundle) Remove() error {
	lock, err := b.take() // without a word in it: a full disk is emptied this way
	if err != nil {
		return fmt.Errorf("remove: %w", err)
	}
	defer lock.Unlock()
	// First the name, so that half a bundle is never seen under it.
	dead := b.Dir + ".rm-" + strings.TrimPrefix(filepath.Base(b.Dir), ".")
	if err := os.Rename(b.Dir, dead); err != nil {
		dead = b.Dir // for example a mount point
	}
	if err := os.RemoveAll(dead); err != nil {
		return fmt.Errorf("remove bundle: %w", err)
	}
	return nil
}
