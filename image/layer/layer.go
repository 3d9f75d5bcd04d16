// Package layer turns an image layer, a tar, into an EROFS file that overlayfs can stack.
//
//	result, err := layer.Convert(ctx, tarStream, file, layer.Options{})
//	fmt.Println(result.DiffID, result.Size)
//
// The tree is the one docker's overlay2 driver makes of the same tar: whiteouts become character devices 0:0, opaque
// directories carry trusted.overlay.opaque, directories that the tar only implies belong to root with mode 0755, an
// entry for the root directory itself changes nothing but its time. Where docker and the OCI specification differ on
// a path that is both whited out and present in one layer, the specification is followed.
//
// Nothing is unpacked on the host: names and links are resolved in memory, inside the layer. With the skeleton that
// Convert writes beside the image, the tar can be put together again, byte for byte (OpenSkeleton).
package layer

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/kcradle/kcradle/image/erofs"
)

// Limits bound what a layer may ask for. A zero field means the default.
type Limits struct {
	Bytes   int64 // of the uncompressed tar, and of the files in it; default 64 GiB
	Entries int   // of the tar; default 4 million
}

// Defaults of Limits.
const (
	DefaultBytes   = 64 << 30
	DefaultEntries = 4 << 20
)

const (
	maxPath      = 4095 // Linux' PATH_MAX without its NUL
	maxSymlinks  = 40   // that are followed in one name, as in Linux
	maxMajor     = 1<<12 - 1
	maxMinor     = 1<<20 - 1
	maxID        = math.MaxUint32 - 1 // the last one means "no change"
	xattrRecord  = "SCHILY.xattr."
	overlayXattr = "trusted.overlay."
	opaqueXattr  = overlayXattr + "opaque"

	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// ErrLimit says that a layer wants more than its limits allow.
var ErrLimit = errors.New("limit exceeded")

// ErrInvalid says that a tar describes what cannot be.
var ErrInvalid = errors.New("invalid layer")

// Options of Convert.
type Options struct {
	Limits   Limits
	SpoolDir string // for temporary files without names; empty: the system's directory
	// Skeleton gets what is needed beside the image to put the tar together again, see OpenSkeleton. May be nil.
	Skeleton io.Writer
}

// Result describes a converted layer.
type Result struct {
	DiffID  digest.Digest // of the uncompressed tar
	TarSize int64
	Size    int64  // of the EROFS file
	CRC     uint32 // see erofs.Checksum
	Entries int    // of the tar
	Inodes  int
}

// Convert reads an uncompressed tar to its end and writes it as an EROFS image to an empty file, which stays the
// caller's. The same tar gives the same image.
func Convert(ctx context.Context, r io.Reader, f *os.File, o Options) (_ Result, err error) {
	if o.Limits.Bytes == 0 {
		o.Limits.Bytes = DefaultBytes
	}
	if o.Limits.Entries == 0 {
		o.Limits.Entries = DefaultEntries
	}
	w, err := erofs.NewWriter(f, erofs.Options{SpoolDir: o.SpoolDir})
	if err != nil {
		return Result{}, err
	}
	defer func() { err = errors.Join(err, w.Close()) }()

	skeleton, err := newSkeletonWriter(o.Skeleton)
	if err != nil {
		return Result{}, err
	}
	h := digest.SHA256.Digester()
	in := newAhead(ctx, r, h.Hash(), o.Limits.Bytes)
	defer in.close()
	t := tree{w: w, limits: o.Limits, skeleton: skeleton}
	seen := skeleton.tee(in)
	tr := tar.NewReader(seen)
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return Result{}, in.explain(err)
		}
		if err := t.add(hdr, tr); err != nil {
			return Result{}, in.explain(fmt.Errorf("entry %s: %w", short(hdr.Name), err))
		}
	}
	// What stands after the end of the archive belongs to the digest.
	if _, err := io.Copy(io.Discard, seen); err != nil {
		return Result{}, in.explain(err)
	}
	id := h.Digest()
	var uuid [16]byte
	copy(uuid[:], h.Hash().Sum(nil))
	uuid[6] = uuid[6]&0x0f | 0x80 // version 8: ours to define
	uuid[8] = uuid[8]&0x3f | 0x80
	res, err := w.Finish(uuid)
	if err != nil {
		return Result{}, err
	}
	if skeleton != nil {
		if err := skeleton.finish(w, in.total, t.entries, res); err != nil {
			return Result{}, fmt.Errorf("write the layer's skeleton: %w", err)
		}
	}
	return Result{DiffID: id, TarSize: in.total, Size: res.Size, CRC: res.CRC, Entries: t.entries, Inodes: res.Inodes}, nil
}

// tree is the layer as it grows.
type tree struct {
	w       *erofs.Writer
	limits  Limits
	entries int
	content int64 // bytes of files

	skeleton *skeletonWriter
}

// add applies one entry.
func (t *tree) add(hdr *tar.Header, content io.Reader) error {
	if t.entries++; t.entries > t.limits.Entries {
		return fmt.Errorf("%w: more than %d entries", ErrLimit, t.limits.Entries)
	}
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	name, err := clean(hdr.Name)
	if err != nil {
		return err
	}
	meta, err := attributes(hdr)
	if err != nil {
		return err
	}
	root := t.w.Root()
	if name == "." {
		root.Mtime, root.MtimeNsec = meta.Mtime, meta.MtimeNsec
		return nil
	}
	parent, base, err := t.parent(name)
	if err != nil {
		return err
	}
	if strings.HasPrefix(base, whiteoutPrefix) {
		return t.whiteout(parent, base, meta)
	}
	old := parent.Child(base)
	switch hdr.Typeflag {
	case tar.TypeDir:
		if old != nil && old.IsDir() {
			return apply(old, meta)
		}
		meta.Mode |= erofs.TypeDirectory
		if old != nil && isWhiteout(old) {
			if err := meta.SetXattr(opaqueXattr, "y"); err != nil {
				return err
			}
		}
	case tar.TypeReg, '\x00', tar.TypeCont, tar.TypeGNUSparse:
		meta.Mode |= erofs.TypeRegular
		// A sparse file may be large beyond measure in a short tar.
		if hdr.Size < 0 || hdr.Size > t.limits.Bytes-t.content {
			return fmt.Errorf("%w: the layer unpacks to more than %d bytes", ErrLimit, t.limits.Bytes)
		}
		t.content += hdr.Size
		t.skeleton.begin(hdr)
		c, err := t.w.Content(content, hdr.Size)
		if err != nil {
			return err
		}
		meta.SetContent(c)
		if err := t.skeleton.end(meta, hdr.Size); err != nil {
			return err
		}
	case tar.TypeSymlink:
		switch {
		case hdr.Linkname == "":
			return fmt.Errorf("%w: symbolic link to nothing", ErrInvalid)
		case len(hdr.Linkname) > erofs.MaxTarget:
			return fmt.Errorf("%w: the target of a symbolic link has %d bytes, the limit is %d", ErrInvalid, len(hdr.Linkname), erofs.MaxTarget)
		case strings.ContainsRune(hdr.Linkname, 0):
			return fmt.Errorf("%w: NUL in the target of a symbolic link", ErrInvalid)
		}
		meta.Mode = erofs.TypeSymlink | 0o777
		meta.Target = hdr.Linkname
	case tar.TypeLink:
		return t.link(parent, base, hdr.Linkname, meta)
	case tar.TypeChar, tar.TypeBlock:
		if hdr.Devmajor < 0 || hdr.Devmajor > maxMajor || hdr.Devminor < 0 || hdr.Devminor > maxMinor {
			return fmt.Errorf("%w: there is no device %d:%d", ErrInvalid, hdr.Devmajor, hdr.Devminor)
		}
		meta.Mode |= erofs.TypeCharDevice
		if hdr.Typeflag == tar.TypeBlock {
			meta.Mode = meta.Mode&^erofs.TypeMask | erofs.TypeBlockDevice
		}
		meta.Rdev = erofs.MakeDevice(uint32(hdr.Devmajor), uint32(hdr.Devminor))
	case tar.TypeFifo:
		meta.Mode |= erofs.TypeFIFO
	default:
		return fmt.Errorf("%w: entry type %q is not known", ErrInvalid, hdr.Typeflag)
	}
	return parent.Put(base, meta)
}

// link gives an existing file of the layer another name. As with tar and docker, the entry's attributes are then
// those of the file.
func (t *tree) link(parent *erofs.Inode, base, target string, meta *erofs.Inode) error {
	// A leading ../ leads nowhere else: the layer is the root of its own world.
	dir, last, err := t.walk(strings.TrimPrefix(path.Clean("/"+target), "/"), false)
	if err != nil {
		return fmt.Errorf("hard link to %s: %w", short(target), err)
	}
	var file *erofs.Inode
	if dir != nil {
		file = dir.Child(last)
	}
	switch {
	case file == nil:
		return fmt.Errorf("%w: hard link to %s, which is not in this layer", ErrInvalid, short(target))
	case file.IsDir():
		return fmt.Errorf("%w: hard link to the directory %s", ErrInvalid, short(target))
	}
	if err := apply(file, meta); err != nil {
		return err
	}
	return parent.Put(base, file)
}

// whiteout hides what lower layers have.
func (t *tree) whiteout(parent *erofs.Inode, base string, meta *erofs.Inode) error {
	if base == whiteoutOpaque {
		return parent.SetXattr(opaqueXattr, "y")
	}
	name := strings.TrimPrefix(base, whiteoutPrefix)
	if name == "" || name == "." || name == ".." {
		return fmt.Errorf("%w: whiteout of no file", ErrInvalid)
	}
	if old := parent.Child(name); old != nil {
		// Whiteouts are about lower layers only; what this layer brings stays.
		if old.IsDir() {
			return old.SetXattr(opaqueXattr, "y")
		}
		return nil
	}
	return parent.Put(name, &erofs.Inode{
		Mode: erofs.TypeCharDevice, UID: meta.UID, GID: meta.GID, Mtime: meta.Mtime, MtimeNsec: meta.MtimeNsec,
	})
}

func isWhiteout(i *erofs.Inode) bool {
	return i.Mode&erofs.TypeMask == erofs.TypeCharDevice && i.Rdev == 0
}

// parent finds the directory of a clean name, making what is missing on the way.
func (t *tree) parent(name string) (*erofs.Inode, string, error) { return t.walk(name, true) }

// walk resolves all but the last part of a clean name inside the layer, following symbolic links. With create, missing
// directories are made; without, a missing one gives a nil directory.
func (t *tree) walk(name string, create bool) (*erofs.Inode, string, error) {
	parts := strings.Split(name, "/")
	last := parts[len(parts)-1]
	todo := parts[:len(parts)-1]
	dirs := []*erofs.Inode{t.w.Root()} // the way down, for ".."
	links := 0
	for len(todo) > 0 {
		part := todo[0]
		todo = todo[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			if len(dirs) > 1 {
				dirs = dirs[:len(dirs)-1]
			}
			continue
		}
		dir := dirs[len(dirs)-1]
		next := dir.Child(part)
		switch {
		case next == nil || isWhiteout(next):
			if !create {
				return nil, "", nil
			}
			made := &erofs.Inode{Mode: erofs.TypeDirectory | 0o755}
			if next != nil {
				if err := made.SetXattr(opaqueXattr, "y"); err != nil {
					return nil, "", err
				}
			}
			if err := dir.Put(part, made); err != nil {
				return nil, "", fmt.Errorf("%w: %w", ErrInvalid, err)
			}
			dirs = append(dirs, made)
		case next.IsDir():
			dirs = append(dirs, next)
		case next.Mode&erofs.TypeMask == erofs.TypeSymlink:
			if links++; links > maxSymlinks {
				return nil, "", fmt.Errorf("%w: more than %d symbolic links on the way", ErrInvalid, maxSymlinks)
			}
			if strings.HasPrefix(next.Target, "/") {
				dirs = dirs[:1]
			}
			todo = append(strings.Split(next.Target, "/"), todo...)
		default:
			return nil, "", fmt.Errorf("%w: %s on the way is not a directory", ErrInvalid, short(part))
		}
		if len(dirs) > maxPath/2+1 {
			return nil, "", fmt.Errorf("%w: path is too deep", ErrInvalid)
		}
	}
	return dirs[len(dirs)-1], last, nil
}

// clean makes an entry's name relative to the layer's root; "." is the root itself.
func clean(name string) (string, error) {
	switch {
	case name == "":
		return "", fmt.Errorf("%w: entry without a name", ErrInvalid)
	case len(name) > maxPath:
		return "", fmt.Errorf("%w: the name has %d bytes, the limit is %d", ErrInvalid, len(name), maxPath)
	case strings.ContainsRune(name, 0):
		return "", fmt.Errorf("%w: NUL in the name", ErrInvalid)
	}
	c := path.Clean(strings.TrimLeft(name, "/"))
	if c == ".." || strings.HasPrefix(c, "../") {
		return "", fmt.Errorf("%w: the name leads out of the layer", ErrInvalid)
	}
	for part := range strings.SplitSeq(c, "/") {
		if len(part) > erofs.MaxName {
			return "", fmt.Errorf("%w: a name of %d bytes, the limit is %d", ErrInvalid, len(part), erofs.MaxName)
		}
	}
	return c, nil
}

// attributes is an inode without a type from an entry's owner, mode, time and extended attributes.
func attributes(hdr *tar.Header) (*erofs.Inode, error) {
	if hdr.Uid < 0 || hdr.Uid > maxID || hdr.Gid < 0 || hdr.Gid > maxID {
		return nil, fmt.Errorf("%w: there is no owner %d:%d", ErrInvalid, hdr.Uid, hdr.Gid)
	}
	i := &erofs.Inode{
		Mode:      uint16(hdr.Mode & 0o7777),
		UID:       uint32(hdr.Uid),
		GID:       uint32(hdr.Gid),
		Mtime:     hdr.ModTime.Unix(),
		MtimeNsec: uint32(hdr.ModTime.Nanosecond()),
	}
	for _, key := range slices.Sorted(maps.Keys(hdr.PAXRecords)) {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if !ok {
			continue
		}
		value := hdr.PAXRecords[key]
		// overlayfs takes orders from these. An image may say that a directory is opaque, and no more.
		if strings.HasPrefix(name, overlayXattr) && (name != opaqueXattr || value != "y") {
			continue
		}
		if err := i.SetXattr(name, value); err != nil {
			if errors.Is(err, erofs.ErrXattrNamespace) {
				continue // as on a file system without such attributes; docker goes on as well
			}
			return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
		}
	}
	return i, nil
}

// apply gives an existing file the attributes of a later entry for it. Extended attributes are added.
func apply(i, meta *erofs.Inode) error {
	if i.Mode&erofs.TypeMask != erofs.TypeSymlink {
		i.Mode = i.Mode&erofs.TypeMask | meta.Mode&0o7777
		i.Mtime, i.MtimeNsec = meta.Mtime, meta.MtimeNsec
	}
	i.UID, i.GID = meta.UID, meta.GID
	for _, name := range meta.XattrNames() {
		v, _ := meta.Xattr(name)
		if err := i.SetXattr(name, v); err != nil {
			return fmt.Errorf("%w: %w", ErrInvalid, err)
		}
	}
	return nil
}

func short(s string) string {
	if len(s) > 200 {
		return fmt.Sprintf("%.200q…", s)
	}
	return fmt.Sprintf("%q", s)
}
