package images

import (
	"archive/tar"
	"fmt"
	"slices"
	"strings"
)

// entry writes a tar entry; a body makes its size.
type entry struct {
	tar.Header
	body []byte
}

func entries(es ...entry) writeLayer {
	return func(tw *tar.Writer) error {
		for _, e := range es {
			h := e.Header
			h.Size = int64(len(e.body))
			if h.ModTime.IsZero() {
				h.ModTime = epoch
			}
			if len(h.PAXRecords) > 0 || len(h.Name) > 255 {
				h.Format = tar.FormatPAX
			}
			if err := tw.WriteHeader(&h); err != nil {
				return fmt.Errorf("write entry %s: %w", h.Name, err)
			}
			if _, err := tw.Write(e.body); err != nil {
				return fmt.Errorf("write entry %s: %w", h.Name, err)
			}
		}
		return nil
	}
}

func dir(name string, mode int64) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeDir, Name: name + "/", Mode: mode}}
}

func text(name string, mode int64, body string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, body: []byte(body)}
}

func symlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}}
}

func hardlink(name, target string) entry {
	return entry{Header: tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}}
}

func device(kind byte, name string, mode, major, minor int64) entry {
	return entry{Header: tar.Header{Typeflag: kind, Name: name, Mode: mode, Devmajor: major, Devminor: minor}}
}

func whiteout(name string) entry {
	i := strings.LastIndexByte(name, '/') + 1
	return text(name[:i]+".wh."+name[i:], 0o644, "")
}

func opaque(dir string) entry { return text(dir+"/.wh..wh..opq", 0o644, "") }

func (e entry) owner(uid, gid int) entry { e.Uid, e.Gid = uid, gid; return e }

func (e entry) xattr(name, value string) entry {
	records := map[string]string{"SCHILY.xattr." + name: value}
	for k, v := range e.PAXRecords {
		records[k] = v
	}
	e.PAXRecords = records
	return e
}

// A file capability as the kernel keeps it (struct vfs_cap_data of revision 2, with the effective bit): cap_net_raw.
const netRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// oddLayers hold one of everything that a converter of images can get wrong.
func oddLayers(_ *host) ([]writeLayer, error) {
	long := strings.Repeat("a-rather-long-name-", 12)[:200]
	deep := "odd/long"
	var down []entry
	for range 8 {
		deep += "/" + long[:100]
		down = append(down, dir(deep, 0o755))
	}
	sparse := make([]byte, 4<<20)
	copy(sparse[3<<20:], "an island")
	older := tar.Header{Typeflag: tar.TypeReg, Name: "odd/old", Mode: 0o644, ModTime: epoch.AddDate(-40, 0, 0)}

	var many []entry
	many = append(many, dir("odd/many", 0o755))
	for i := range 2000 {
		many = append(many, text(fmt.Sprintf("odd/many/file-%04d", i), 0o644, fmt.Sprint(i)))
	}

	below := entries(slices.Concat(many, []entry{
		dir("odd", 0o755), dir("odd/modes", 0o755),
		text("odd/modes/setuid", 0o4755, "u"), text("odd/modes/setgid", 0o2755, "g"), text("odd/modes/none", 0, "0"),
		text("odd/modes/everything", 0o7777, "7"), dir("odd/modes/sticky", 0o1777), dir("odd/modes/setgid-dir", 0o2775),
		text("odd/modes/owned", 0o640, "o").owner(1234, 4321), dir("odd/modes/owned-dir", 0o750).owner(65534, 65534),
		text("odd/modes/large-owner", 0o644, "l").owner(3000000000, 3000000001),
		text("odd/modes/setuid-owned", 0o4711, "u").owner(8, 12),

		dir("odd/xattrs", 0o755),
		text("odd/xattrs/capability", 0o755, "#!/bin/sh\n").xattr("security.capability", netRaw),
		text("odd/xattrs/user", 0o644, "x").xattr("user.colour", "green").xattr("user.binary", "\x00\x01\xff"),
		dir("odd/xattrs/dir", 0o755).xattr("user.on", "a directory"),
		text("odd/xattrs/long", 0o644, "x").xattr("user.long", strings.Repeat("v", 1000)),

		dir("odd/dev", 0o755),
		device(tar.TypeChar, "odd/dev/null", 0o666, 1, 3), device(tar.TypeBlock, "odd/dev/loop", 0o660, 7, 5).owner(0, 6),
		device(tar.TypeChar, "odd/dev/large-minor", 0o600, 300, 70000), device(tar.TypeFifo, "odd/dev/fifo", 0o622, 0, 0),

		dir("odd/links", 0o755), text("odd/links/first", 0o644, "linked"),
		hardlink("odd/links/second", "odd/links/first"), hardlink("odd/links/third", "odd/links/second"),
		text("odd/links/broken-up", 0o644, "two names"), hardlink("odd/links/broken-up-too", "odd/links/broken-up"),
		symlink("odd/links/relative", "first"), symlink("odd/links/absolute", "/odd/links/first"),
		symlink("odd/links/dangling", "/does/not/exist"), symlink("odd/links/out", "../../../../../../etc/passwd"),
		symlink("odd/links/long", strings.Repeat("x", 1000)), symlink("odd/links/owned", "first").owner(7, 7),
		symlink("odd/links/dir", "../modes"),

		dir("odd/long", 0o755), text("odd/long/"+long, 0o644, "long"), text("odd/long/"+strings.Repeat("ü", 127), 0o644, "255 bytes"),
		text("odd/long/bytes-\xff\xfe", 0o644, "no utf-8"),
		text("odd/long/new\nline", 0o644, "n"), text("odd/long/ space", 0o644, "s"), text(`odd/long/back\slash`, 0o644, "b"),

		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "odd/sparse", Mode: 0o644}, body: sparse},
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "odd/random", Mode: 0o600}, body: noise(1<<20 + 13)},
		text("odd/empty", 0o644, ""), entry{Header: older, body: []byte("before 1990")},
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "odd/4095", Mode: 0o644}, body: noise(4095)},
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "odd/4096", Mode: 0o644}, body: noise(4096)},
		entry{Header: tar.Header{Typeflag: tar.TypeReg, Name: "odd/4097", Mode: 0o644}, body: noise(4097)},

		dir("odd/gone", 0o755), text("odd/gone/file", 0o644, "will go"),
		dir("odd/kept", 0o755), text("odd/kept/one", 0o644, "goes"), text("odd/kept/two", 0o644, "stays"),
		dir("odd/opaque", 0o700), text("odd/opaque/hidden", 0o644, "hidden"), dir("odd/opaque/sub", 0o755), text("odd/opaque/sub/hidden", 0o644, "h"),
		dir("odd/becomes-file", 0o755), text("odd/becomes-file/inner", 0o644, "inner"),
		text("odd/becomes-dir", 0o644, "a file"), symlink("odd/link-becomes-dir", "kept"),
		dir("odd/there-and-back", 0o755), text("odd/there-and-back/first", 0o644, "1"),
		text("odd/changed", 0o644, "before"), text("odd/mode-changed", 0o644, "same"),
		text("odd/implied/by/a/file", 0o644, "whose directories have no entries"),
	}, down, []entry{text(deep+"/file", 0o644, "deep")})...)
	// As in layers that docker makes, each layer has an entry for every directory it touches.
	middle := entries(
		dir("odd", 0o755), dir("odd/kept", 0o755), dir("odd/links", 0o755),
		whiteout("odd/gone"), whiteout("odd/kept/one"),
		dir("odd/opaque", 0o711), opaque("odd/opaque"), text("odd/opaque/new", 0o644, "seen"),
		whiteout("odd/becomes-file"), text("odd/becomes-file", 0o600, "now a file"),
		dir("odd/becomes-dir", 0o755), text("odd/becomes-dir/inner", 0o644, "now a directory"),
		dir("odd/link-becomes-dir", 0o755), text("odd/link-becomes-dir/inner", 0o644, "now a directory"),
		text("odd/there-and-back", 0o644, "a file between"),
		text("odd/changed", 0o600, "after").owner(5, 5), text("odd/mode-changed", 0o755, "same"),
		whiteout("odd/links/broken-up"), text("odd/links/broken-up", 0o644, "a file of its own"),
		whiteout("odd/never-there"),
	)
	top := entries(
		dir("odd", 0o755), dir("odd/kept", 0o755), dir("odd/many", 0o755),
		dir("odd/there-and-back", 0o750), text("odd/there-and-back/second", 0o644, "2"),
		dir("odd/gone", 0o755), text("odd/gone/other", 0o644, "a new one of the old name"),
		text("odd/kept/one", 0o644, "came again"),
		whiteout("odd/many/file-0007"),
	)
	return []writeLayer{below, middle, top}, nil
}

// noise is n bytes that do not compress and are the same every time.
func noise(n int) []byte {
	b := make([]byte, n)
	x := uint64(88172645463325252)
	for i := range b {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i] = byte(x)
	}
	return b
}

// deepLayers are 125, which make 126 with the parent's, each of which adds a file, rewrites a shared one and takes away the one before it.
func deepLayers(_ *host) ([]writeLayer, error) {
	var layers []writeLayer
	for i := range 125 {
		es := []entry{
			dir("deep", 0o755),
			text(fmt.Sprintf("deep/layer-%03d", i), 0o644, fmt.Sprint(i)),
			text("deep/last", 0o644, fmt.Sprint(i)),
		}
		if i%2 == 1 {
			es = append(es, whiteout(fmt.Sprintf("deep/layer-%03d", i-1)))
		}
		layers = append(layers, entries(es...))
	}
	return layers, nil
}
