package image

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

// pullShared pulls two images that share a layer: one, two.
func pullShared(t *testing.T, s *Store) (one, two *Image) {
	t.Helper()
	r := newRegistry(t)
	base := makeLayer(t, makeTar(t, map[string][]byte{"base": noise(10_000)}), "gzip")
	for i, p := range []**Image{&one, &two} {
		own := makeLayer(t, makeTar(t, map[string][]byte{"own": noise(20_000 * (i + 1))}), "gzip")
		img, err := s.Pull(t.Context(), parse(t, r.push(t, fmt.Sprintf("img%d", i), makeImage(t, base, own))), anonymous())
		if err != nil {
			t.Fatal(err)
		}
		*p = img
	}
	return one, two
}

func ids(layers []Layer) []digest.Digest {
	var out []digest.Digest
	for _, l := range layers {
		out = append(out, l.DiffID)
	}
	return out
}

func (s *Store) has(l Layer) bool { _, err := s.layer(l.DiffID); return err == nil }

func TestRemoveAndUsage(t *testing.T) {
	s := openStore(t)
	one, two := pullShared(t, s)
	u, err := s.Usage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if want := one.Size() + two.Size() - one.Layers[0].Size; u.Bytes != want || u.Layers != 3 {
		t.Errorf("got %d bytes in %d layers, want %d in 3", u.Bytes, u.Layers, want)
	}
	for _, iu := range u.Images {
		if iu.Shared != one.Layers[0].Size || iu.Size != iu.Image.Size() {
			t.Errorf("%s: got size %d, shared %d, want %d, %d", iu.Image.Ref, iu.Size, iu.Shared, iu.Image.Size(), one.Layers[0].Size)
		}
	}
	removed, err := s.Remove(t.Context(), one)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(ids(one.Layers[1:]), removed.Layers); diff != "" {
		t.Errorf("removed layers (-want +got):\n%s", diff)
	}
	if !s.has(two.Layers[0]) || !s.has(two.Layers[1]) {
		t.Error("the other image lost a layer")
	}
	if _, err := s.Remove(t.Context(), one); !errors.Is(err, ErrNotFound) {
		t.Errorf("second removal: got %v", err)
	}
	if _, err := s.Get(t.Context(), parse(t, one.Source)); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v for an image that was removed", err)
	}
	if _, err := s.Prune(t.Context(), PruneOptions{All: true}); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{dirLayers, dirBlobs, dirImages} {
		if left := storeFiles(t, s, dir); len(left) > 0 {
			t.Errorf("%s holds %v", dir, left)
		}
	}
}

func TestLease(t *testing.T) {
	s := openStore(t)
	one, two := pullShared(t, s)
	bundle := filepath.Join(t.TempDir(), "vm")
	if err := os.Mkdir(bundle, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.Lease(t.Context(), bundle, ids(one.Layers)); err != nil {
		t.Fatal(err)
	}
	if u, err := s.Usage(t.Context()); err != nil || len(u.Bundles) != 1 || u.Bundles[0].Dir != bundle || !slices.Equal(u.Images[0].Bundles, []string{bundle}) {
		t.Errorf("usage: %+v, %v", u, err)
	}
	removed, err := s.Prune(t.Context(), PruneOptions{All: true})
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(removed.Images, []string{two.Ref}) || !s.has(one.Layers[0]) || !s.has(one.Layers[1]) || s.has(two.Layers[1]) {
		t.Errorf("prune beside a bundle: removed %+v", removed)
	}
	// The name goes, the bundle's layers stay.
	if _, err := s.Remove(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	if !s.has(one.Layers[0]) || !s.has(one.Layers[1]) {
		t.Error("a bundle lost its layers to rmi")
	}
	// The bundle is gone: so is what it held.
	if err := os.Remove(bundle); err != nil {
		t.Fatal(err)
	}
	if removed, err = s.Prune(t.Context(), PruneOptions{}); err != nil || len(removed.Layers) != 2 {
		t.Errorf("prune after the bundle is gone: %+v, %v", removed, err)
	}
	wantError(t, s.Lease(t.Context(), bundle, ids(one.Layers)), ErrNotFound, "pull the image again")
}

func TestReleaseFreesLayers(t *testing.T) {
	s := openStore(t)
	one, _ := pullShared(t, s)
	bundle := t.TempDir()
	if err := s.Lease(t.Context(), bundle, ids(one.Layers)); err != nil {
		t.Fatal(err)
	}
	for range 2 { // it may be called twice
		if err := s.Release(t.Context(), bundle); err != nil {
			t.Fatal(err)
		}
	}
	if removed, err := s.Prune(t.Context(), PruneOptions{All: true}); err != nil || len(removed.Layers) != 3 {
		t.Errorf("prune: %+v, %v", removed, err)
	}
}

// TestHardLinkKeepsLayer moves a bundle away from its lease: its links hold the layers.
func TestHardLinkKeepsLayer(t *testing.T) {
	s := openStore(t)
	one, _ := pullShared(t, s)
	link := filepath.Join(filepath.Dir(s.Dir()), "link")
	if err := os.Link(one.Layers[1].Path, link); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prune(t.Context(), PruneOptions{All: true}); err != nil {
		t.Fatal(err)
	}
	if !s.has(one.Layers[1]) || s.has(one.Layers[0]) {
		t.Error("a linked layer is gone, or one without a link is not")
	}
}

// TestUnmountedBundle asks about bundles whose directory is missing.
func TestUnmountedBundle(t *testing.T) {
	dir := t.TempDir()
	for _, test := range []struct {
		name  string
		lease lease
		want  bool
	}{
		{"there", lease{Owner: dir, Device: "x"}, true},
		{"removed", lease{Owner: filepath.Join(dir, "gone"), Device: device(dir)}, false},
		{"removed with its parents", lease{Owner: filepath.Join(dir, "a/b/gone"), Device: device(dir)}, false},
		{"on a disk that is not mounted", lease{Owner: filepath.Join(dir, "disk/vm"), Device: "0123456789abcdef"}, true},
		{"on a tmpfs of another boot", lease{Owner: filepath.Join(dir, "gone")}, false},
	} {
		if got := test.lease.alive(); got != test.want {
			t.Errorf("%s: got alive %v, want %v", test.name, got, test.want)
		}
	}
}

func TestPruneLeavesPullsAlone(t *testing.T) {
	s := openStore(t)
	one, _ := pullShared(t, s)
	hold, err := s.leasePull(t.Context(), "x", ids(one.Layers), []digest.Digest{one.ConfigDigest})
	if err != nil {
		t.Fatal(err)
	}
	defer hold.unlock()
	work := s.path(dirIngest, one.Layers[1].DiffID.Encoded()+".erofs")
	if err := os.WriteFile(work, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	lock, err := lockFile(t.Context(), s.path(dirLocks, lockName(one.Layers[1].DiffID.Encoded())), nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prune(t.Context(), PruneOptions{All: true, Ingest: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(work); err != nil || !s.has(one.Layers[0]) || !s.has(one.Layers[1]) {
		t.Errorf("a pull in progress lost its work: %v", err)
	}
	lock.unlock()
	hold.unlock()
	if _, err := s.Prune(t.Context(), PruneOptions{All: true, Ingest: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(work); err == nil || s.has(one.Layers[0]) {
		t.Error("what a dead pull held is still there")
	}
}

func TestFindAndTag(t *testing.T) {
	s := openStore(t)
	one, two := pullShared(t, s)
	if err := s.Tag(t.Context(), one, parse(t, "other:1")); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		word string
		want []string
		err  bool
	}{
		{word: one.Source, want: []string{one.Ref}},
		{word: "other:1", want: []string{"docker.io/library/other:1"}},
		{word: one.ConfigDigest.Encoded()[:12], want: []string{one.Ref, "docker.io/library/other:1"}},
		{word: two.Digest.String(), want: []string{two.Ref}},
		{word: "abc", err: true},
		{word: "nothere", err: true},
		{word: "0000", err: true},
	} {
		found, err := s.Find(t.Context(), test.word)
		if (err != nil) != test.err {
			t.Errorf("find %s: %v", test.word, err)
		}
		var got []string
		for _, img := range found {
			got = append(got, img.Ref)
		}
		slices.Sort(got)
		slices.Sort(test.want)
		if !slices.Equal(got, test.want) {
			t.Errorf("find %s: got %v, want %v", test.word, got, test.want)
		}
	}
}

// TestDamagedStore pulls again what a disk has lost or a newer version has written.
func TestDamagedStore(t *testing.T) {
	s := openStore(t)
	r := newRegistry(t)
	ref := parse(t, r.push(t, "x", makeImage(t, makeLayer(t, makeTar(t, map[string][]byte{"a": noise(100_000)}), "gzip"))))
	img, err := s.Pull(t.Context(), ref, anonymous())
	if err != nil {
		t.Fatal(err)
	}
	l := img.Layers[0]
	if err := os.Truncate(l.Path, l.Size-4096); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), ref); !errors.Is(err, ErrNotFound) {
		t.Errorf("get: got %v, want that it is not there", err)
	}
	if img, err = s.Pull(t.Context(), ref, anonymous()); err != nil {
		t.Fatal(err)
	}
	if err := s.VerifyLayer(img.Layers[0]); err != nil {
		t.Error(err)
	}
	f, err := os.OpenFile(l.Path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, 50_000); err != nil {
		t.Fatal(err)
	}
	wantError(t, s.VerifyLayer(img.Layers[0]), ErrCorrupt, "rm "+l.Path)

	if err := os.WriteFile(s.path("version"), []byte("2\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err = Open(filepath.Dir(s.Dir()), nil)
	wantError(t, err, nil, "newer kcradle")
}

func TestLockFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	a, err := lockFile(t.Context(), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	waited := false
	_, err = lockFile(ctx, path, func() { waited = true; cancel() })
	if !errors.Is(err, context.Canceled) || !waited {
		t.Errorf("a second lock: got %v (waited %v)", err, waited)
	}
	// A lock on a file that was removed guards nothing.
	if err := a.remove(); err != nil {
		t.Fatal(err)
	}
	b, err := lockFile(t.Context(), path, nil)
	if err != nil {
		t.Fatal(err)
	}
	a.unlock()
	if _, err := tryLockFile(path); err == nil {
		t.Error("the lock was given away twice")
	}
	b.unlock()
}

func TestPolicyNever(t *testing.T) {
	s := openStore(t)
	o := anonymous()
	o.Policy = Never
	_, err := s.Pull(t.Context(), parse(t, "docker+http://127.0.0.1:1/x"), o)
	wantError(t, err, ErrNotFound)
	o.Policy = "sometimes"
	_, err = s.Pull(t.Context(), parse(t, "x"), o)
	wantError(t, err, nil, "sometimes", "missing, always, never")
	o = anonymous()
	o.Platform = "linux/arm64"
	_, err = s.Pull(t.Context(), parse(t, "x"), o)
	wantError(t, err, nil, "linux/arm64", "linux/amd64")
}

func FuzzStoreDocuments(f *testing.F) {
	d := digest.FromString("x")
	for _, v := range []any{
		record{Version: 1, Name: "x", Config: d, DiffIDs: []digest.Digest{d}, Pulled: time.Unix(1, 0).UTC()},
		lease{Version: 1, Owner: "/x", Layers: []digest.Digest{d}},
		document{SchemaVersion: 2, MediaType: dockerManifestList},
	} {
		b, err := json.Marshal(v)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"` + d.String() + `","size":1},"layers":[]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := parseRecord(b); err == nil {
			again, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := parseRecord(again); err != nil {
				t.Errorf("a record that was read cannot be read again: %v", err)
			}
		}
		if l, err := parseLease(b); err == nil {
			for _, d := range l.Layers {
				if checkDigest(d) != nil {
					t.Errorf("lease with layer %q", d)
				}
			}
		}
		if m, err := parseManifest(b); err == nil {
			for _, l := range append(m.Layers, *m.Config) {
				if checkDigest(l.Digest) != nil || l.Size < 0 {
					t.Errorf("manifest with %v", l)
				}
			}
		}
		if c, err := parseConfig(b); err == nil && len(c.RootFS.DiffIDs) > MaxLayers {
			t.Error("configuration with too many layers")
		}
	})
}

func FuzzContainerdMessage(f *testing.F) {
	f.Add(protoField(protoNumber(nil, 2, 7), 1, "x"))
	f.Add([]byte{0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f})
	f.Fuzz(func(t *testing.T, b []byte) {
		var total int
		err := protoFields(b, func(field int, value []byte, _ uint64) {
			if field <= 0 {
				t.Errorf("field %d", field)
			}
			total += len(value)
		})
		if err == nil && total > len(b) {
			t.Errorf("%d bytes in fields of a message of %d", total, len(b))
		}
	})
}
