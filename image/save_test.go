package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/kcradle/kcradle/internal/need"
	testimages "github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
)

// saveFile saves images to a file of the test's.
func saveFile(t testing.TB, s *Store, refs ...string) string {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "saved.tar"))
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Save(t.Context(), f, refs), f.Close()); err != nil {
		t.Fatal(err)
	}
	return f.Name()
}

// tag gives an image more names.
func tag(t testing.TB, s *Store, img *Image, names ...string) {
	t.Helper()
	for _, n := range names {
		if err := s.Tag(t.Context(), img, parse(t, n)); err != nil {
			t.Fatal(err)
		}
	}
}

// summaries describes what a store has: ID, tags, layers.
func summaries(t testing.TB, s *Store) []string {
	t.Helper()
	all, err := s.Images(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, u := range all {
		out = append(out, u.ID.String()+" "+strings.Join(u.RepoTags, ",")+" "+strings.Join(layerIDs(u.Image), ","))
	}
	slices.Sort(out)
	return out
}

func TestSave(t *testing.T) {
	s := openStore(t)
	one, two := pullShared(t, s)
	tag(t, s, one, "one:1", "one:2", "example.org/other/one:1")
	tag(t, s, two, "two")
	for _, img := range []*Image{one, two} {
		if _, err := s.Remove(t.Context(), img); err != nil { // the names at the test's registry
			t.Fatal(err)
		}
	}
	file := saveFile(t, s, "one", "two:latest", "example.org/other/one:1")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var again bytes.Buffer
	if err := s.Save(t.Context(), &again, []string{"one", "two:latest", "example.org/other/one:1"}); err != nil || !bytes.Equal(again.Bytes(), b) {
		t.Errorf("the second archive has other bytes (%d, %d), %v", again.Len(), len(b), err)
	}
	if left := storeFiles(t, s, dirLeases); len(left) > 0 {
		t.Errorf("leases holds %v", left)
	}

	// What is in it: each blob has its digest, each layer is there once.
	got := map[string][]byte{}
	tr := tar.NewReader(bytes.NewReader(b))
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := got[h.Name]; twice {
			t.Errorf("%s is there twice", h.Name)
		}
		if got[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
		if hex, ok := strings.CutPrefix(h.Name, "blobs/sha256/"); ok && hex != "" && digest.FromBytes(got[h.Name]).Encoded() != hex {
			t.Errorf("%s has %s", h.Name, digest.FromBytes(got[h.Name]))
		}
	}
	if want := 2 + 3 + 2 + 2 + 4; len(got) != want { // directories, layers, configurations, manifests, documents
		t.Errorf("got %d entries, want %d", len(got), want)
	}
	var m []savedImage
	if err := json.Unmarshal(got["manifest.json"], &m); err != nil {
		t.Fatal(err)
	}
	if len(m) != 2 || !slices.Equal(m[0].RepoTags, []string{"one:1", "one:2", "example.org/other/one:1"}) || !slices.Equal(m[1].RepoTags, []string{"two:latest"}) {
		t.Errorf("got manifest.json %s", got["manifest.json"])
	}

	// Back into a store.
	other := openStore(t)
	if _, err := other.Load(t.Context(), mustOpen(t, file), anonymous()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(summaries(t, s), summaries(t, other)); diff != "" {
		t.Errorf("images (-saved +loaded):\n%s", diff)
	}
	third := openStore(t)
	if _, err := third.Pull(t.Context(), parse(t, "oci-archive:"+file+":docker.io/library/one:2"), anonymous()); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(b, mustRead(t, saveFile(t, other, "one", "two:latest", "example.org/other/one:1"))); diff != "" {
		t.Error("saved from the other store the archive has other bytes")
	}

	// By ID without a name; unknown ones; after the context's end.
	id := saveFile(t, s, one.ConfigDigest.Encoded()[:12])
	images, err := openStore(t).Load(t.Context(), mustOpen(t, id), anonymous())
	if err != nil || len(images) != 1 || images[0].Ref != one.ConfigDigest.String() {
		t.Errorf("saved by ID: %v, %v", images, err)
	}
	again.Reset()
	wantError(t, s.Save(t.Context(), &again, []string{"one:1", "none:1"}), ErrNotFound, "none:1")
	wantError(t, s.Save(t.Context(), &again, nil), nil, "no image is named")
	if err := os.Remove(s.skeletonPath(two.Layers[1].DiffID)); err != nil {
		t.Fatal(err)
	}
	wantError(t, s.Save(t.Context(), &again, []string{"one", "two"}), ErrNoTar, "pull the image again")
	if again.Len() > 0 {
		t.Errorf("%d bytes were written of what cannot be saved", again.Len())
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Save(ctx, &again, []string{"one"}); !errors.Is(err, context.Canceled) {
		t.Errorf("after the context's end: %v", err)
	}
	if err := s.Save(t.Context(), &failingWriter{n: 30_000}, []string{"one"}); !errors.Is(err, errWriter) {
		t.Errorf("into a broken pipe: %v", err)
	}
}

var errWriter = errors.New("broken writer")

// failingWriter takes n bytes.
type failingWriter struct{ n int }

func (w *failingWriter) Write(b []byte) (int, error) {
	if w.n -= len(b); w.n < 0 {
		return 0, errWriter
	}
	return len(b), nil
}

func mustRead(t testing.TB, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestSaveForOthers loads what Save wrote with Debian's dockerd and with skopeo, and what docker save wrote with Load.
func TestSaveForOthers(t *testing.T) {
	need.Root(t)
	skopeo := need.Command(t, "skopeo", "apt-get install skopeo")
	need.Command(t, "dockerd", "apt-get install docker.io")
	_, archive := threeLayers(t)
	s := openStore(t)
	images, err := s.Load(t.Context(), mustOpen(t, archive), anonymous())
	if err != nil {
		t.Fatal(err)
	}
	tag(t, s, images[0], "example.org/a/b:v2")
	id := images[0].ConfigDigest.String()
	file := saveFile(t, s, "test/three", "example.org/a/b:v2")

	d, err := servers.StartDockerd(t.Context(), serverDir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Stop()
	out := run(t, d.Docker(t.Context(), "load", "--input", file))
	for _, want := range []string{"test/three:latest", "example.org/a/b:v2"} {
		if !strings.Contains(out, want) {
			t.Errorf("docker load says %q, nothing of %s", out, want)
		}
		if got := strings.TrimSpace(run(t, d.Docker(t.Context(), "image", "inspect", "--format", "{{.Id}}", want))); got != id {
			t.Errorf("%s: dockerd has %s, want %s", want, got, id)
		}
	}
	saved := filepath.Join(t.TempDir(), "docker.tar")
	run(t, d.Docker(t.Context(), "save", "--output", saved, "test/three", "example.org/a/b:v2"))
	back := openStore(t)
	if _, err := back.Load(t.Context(), mustOpen(t, saved), anonymous()); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(summaries(t, s), summaries(t, back)); diff != "" {
		t.Errorf("images (-saved +back from docker save):\n%s", diff)
	}

	// One with everything that a layer can hold: its way is there, here and back again, and compared as bytes.
	cache, err := testimages.Open("", testWriter{t})
	if err != nil {
		t.Fatal(err)
	}
	odd, err := cache.Build(t.Context(), "odd")
	if err != nil {
		t.Fatal(err)
	}
	oddStore := openStore(t)
	if images, err = oddStore.Load(t.Context(), mustOpen(t, odd.Archive), anonymous()); err != nil {
		t.Fatal(err)
	}
	run(t, d.Docker(t.Context(), "load", "--input", saveFile(t, oddStore, odd.Ref)))
	if got, want := strings.TrimSpace(run(t, d.Docker(t.Context(), "image", "inspect", "--format", "{{.Id}}", odd.Ref))), images[0].ConfigDigest.String(); got != want {
		t.Errorf("%s: dockerd has %s, want %s", odd.Ref, got, want)
	}
	original, err := newArchive(mustOpen(t, odd.Archive))
	if err != nil {
		t.Fatal(err)
	}
	m, err := original.dockerImages()
	if err != nil {
		t.Fatal(err)
	}
	for i, name := range m[0].Layers {
		r, _, err := original.open(name, 0)
		if err != nil {
			t.Fatal(err)
		}
		want, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := layerTar(t, oddStore, images[0].Layers[i]); err != nil || !bytes.Equal(got, want) {
			t.Errorf("layer %d of %s: got %d bytes, %v, want %d", i, odd.Ref, len(got), err, len(want))
		}
	}

	for _, ref := range []string{"oci-archive:" + file + ":v2", "docker-archive:" + file + ":test/three:latest"} {
		config := run(t, exec.Command(skopeo, "inspect", "--config", "--raw", ref))
		if got := digest.FromString(config).String(); got != id {
			t.Errorf("%s: skopeo reads a configuration with %s, want %s", ref, got, id)
		}
		run(t, exec.Command(skopeo, "--insecure-policy", "copy", "--quiet", ref, "dir:"+t.TempDir()))
	}
}
