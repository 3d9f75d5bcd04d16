package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// layerTar reads a layer's tar.
func layerTar(t testing.TB, s *Store, l Layer) ([]byte, error) {
	t.Helper()
	r, err := s.OpenLayer(t.Context(), l)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	if err == nil && r.Size != int64(len(b)) {
		t.Errorf("the tar has %d bytes, its size says %d", len(b), r.Size)
	}
	return b, errors.Join(err, r.Close(), r.Close())
}

func TestOpenLayer(t *testing.T) {
	var tars [][]byte
	for _, files := range []map[string][]byte{{"a": noise(200_000), "b": nil, "c/d": noise(3000)}, {"c/.wh.d": nil, "z": make([]byte, 300_000)}} {
		tars = append(tars, makeTar(t, files, &tar.Header{Name: "link", Linkname: "a", Typeflag: tar.TypeSymlink}))
	}
	r := newRegistry(t)
	ref := r.push(t, "layers", makeImage(t, makeLayer(t, tars[0], "gzip"), makeLayer(t, tars[1], "zstd")))
	s := openStore(t)
	img, err := s.Pull(t.Context(), parse(t, ref), anonymous())
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range tars {
		if got, err := layerTar(t, s, img.Layers[i]); err != nil || !bytes.Equal(got, want) {
			t.Errorf("layer %d: got %d bytes, %v, want %d", i, len(got), err, len(want))
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	open, err := s.OpenLayer(ctx, img.Layers[0])
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	cancel()
	if _, err := io.ReadAll(open); !errors.Is(err, context.Canceled) {
		t.Errorf("reading after the context's end: %v", err)
	}

	// A layer of an older store has no skeleton. A pull adds it, and the file that bundles link to stays.
	l := img.Layers[0]
	if err := os.Remove(s.skeletonPath(l.DiffID)); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = layerTar(t, s, l)
	wantError(t, err, ErrNoTar, "pull the image again")
	o := anonymous()
	o.Policy = Always
	if _, err := s.Pull(t.Context(), parse(t, ref), o); err != nil {
		t.Fatal(err)
	}
	if got, err := layerTar(t, s, l); err != nil || !bytes.Equal(got, tars[0]) {
		t.Errorf("after a pull: got %d bytes, %v", len(got), err)
	}
	if after, err := os.Stat(l.Path); err != nil || !os.SameFile(before, after) {
		t.Errorf("the layer's file was replaced by one with the same bytes (%v)", err)
	}
	if left := storeFiles(t, s, dirIngest); len(left) > 0 {
		t.Errorf("ingest holds %v", left)
	}

	// A kept blob does as well.
	o.KeepBlobs = true
	if img, err = s.Pull(t.Context(), parse(t, ref), o); err != nil {
		t.Fatal(err)
	}
	for i, l := range img.Layers {
		if err := os.Remove(s.skeletonPath(l.DiffID)); err != nil {
			t.Fatal(err)
		}
		if got, err := layerTar(t, s, l); err != nil || !bytes.Equal(got, tars[i]) {
			t.Errorf("from the kept blob: got %d bytes, %v", len(got), err)
		}
	}
}

// TestDamagedLayerIsNotGivenBack damages image, skeleton and record in turn.
func TestDamagedLayerIsNotGivenBack(t *testing.T) {
	content := bytes.Repeat([]byte("content "), 2000)
	b := makeTar(t, map[string][]byte{"a": content})
	r := newRegistry(t)
	ref := r.push(t, "damaged", makeImage(t, makeLayer(t, b, "gzip")))
	for _, test := range []struct {
		name   string
		damage func(s *Store, l Layer) string // returns the file
		at     func(b []byte) int
		kind   error
	}{
		{"image", func(s *Store, l Layer) string { return l.Path }, func(b []byte) int { return bytes.Index(b, []byte("content ")) }, ErrCorrupt},
		{"skeleton", func(s *Store, l Layer) string { return s.skeletonPath(l.DiffID) }, func([]byte) int { return 20 }, ErrCorrupt},
		{"end of the skeleton", func(s *Store, l Layer) string { return s.skeletonPath(l.DiffID) }, func(b []byte) int { return len(b) - 10 }, ErrNoTar},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := openStore(t)
			img, err := s.Pull(t.Context(), parse(t, ref), anonymous())
			if err != nil {
				t.Fatal(err)
			}
			file := test.damage(s, img.Layers[0])
			raw, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			raw[test.at(raw)] ^= 1
			if err := os.WriteFile(file, raw, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err = layerTar(t, s, img.Layers[0])
			wantError(t, err, test.kind, "pull the image again")
		})
	}
}

func TestSkeletonIsCollected(t *testing.T) {
	s := openStore(t)
	one, two := pullShared(t, s)
	if _, err := s.Remove(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, l := range two.Layers {
		for _, ext := range []string{extImage, extRecord, extSkeleton, extBlobs} {
			want = append(want, l.DiffID.Encoded()+ext)
		}
	}
	slices.Sort(want)
	got := storeFiles(t, s, dirLayers)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("layers holds %s, want %s", strings.Join(got, " "), strings.Join(want, " "))
	}
	// One without its layer, as a crash leaves it.
	if err := os.WriteFile(s.skeletonPath(digest.FromString("x")), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Prune(t.Context(), PruneOptions{}); err != nil {
		t.Fatal(err)
	}
	if got := storeFiles(t, s, dirLayers); len(got) != len(want) {
		t.Errorf("layers holds %v", got)
	}
}
