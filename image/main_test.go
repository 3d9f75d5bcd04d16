package image

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// pullVariable makes the test binary pull an image instead: tests kill it, and run several at once.
const pullVariable = "KCRADLE_TEST_PULL"

func TestMain(m *testing.M) {
	if arg := os.Getenv(pullVariable); arg != "" {
		os.Exit(pullProcess(arg))
	}
	os.Exit(m.Run())
}

// pullProcess pulls "ROOT REF" and prints the layers.
func pullProcess(arg string) int {
	root, text, _ := strings.Cut(arg, " ")
	err := func() error {
		s, err := Open(root, nil)
		if err != nil {
			return err
		}
		ref, err := ParseReference(text)
		if err != nil {
			return err
		}
		img, err := s.Pull(context.Background(), ref, PullOptions{Policy: Always})
		if err != nil {
			return err
		}
		for _, l := range img.Layers {
			fmt.Println(l.DiffID)
		}
		return nil
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func openStore(t testing.TB) *Store {
	t.Helper()
	s, err := Open(t.TempDir(), slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelDebug})))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

type testWriter struct{ t testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.t.Logf("%s", bytes.TrimSpace(b))
	return len(b), nil
}

func parse(t testing.TB, s string) Reference {
	t.Helper()
	r, err := ParseReference(s)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// makeTar makes a tar of files.
func makeTar(t testing.TB, files map[string][]byte, more ...*tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range files {
		h := &tar.Header{Name: name, Mode: 0o644, Size: int64(len(content)), Typeflag: tar.TypeReg}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range more {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func noise(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails
	return b
}

// blob is a layer as given, with any bytes and media type.
type blob struct {
	v1.Layer
	diffID v1.Hash
}

func (b blob) DiffID() (v1.Hash, error) { return b.diffID, nil }

func hashOf(t testing.TB, b []byte) v1.Hash {
	t.Helper()
	h, err := v1.NewHash(digest.FromBytes(b).String())
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// makeLayer makes a layer of a tar; how is gzip, zstd or plain.
func makeLayer(t testing.TB, tarBytes []byte, how string) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	var mt types.MediaType
	switch how {
	case "gzip":
		w := gzip.NewWriter(&b)
		if _, err := w.Write(tarBytes); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		mt = types.OCILayer
	case "zstd":
		w, err := zstd.NewWriter(&b)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(tarBytes); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		mt = types.OCILayerZStd
	default:
		b.Write(tarBytes)
		mt = types.OCIUncompressedLayer
	}
	return blob{static.NewLayer(b.Bytes(), mt), hashOf(t, tarBytes)}
}

// makeImage makes an image for linux/amd64.
func makeImage(t testing.TB, layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.ConfigFile(mutate.MediaType(empty.Image, types.OCIManifestSchema1), &v1.ConfigFile{
		OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{Type: "layers"},
		Config: v1.Config{Cmd: []string{"/run"}, Healthcheck: &v1.HealthConfig{Test: []string{"CMD", "true"}}},
	})
	if err == nil {
		img, err = mutate.AppendLayers(mutate.ConfigMediaType(img, types.OCIConfigJSON), layers...)
	}
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// testRegistry is a registry in this process whose answers a test may spoil.
type testRegistry struct {
	host  string
	spoil func(w http.ResponseWriter, r *http.Request) bool // true: answered
	mu    sync.Mutex
	gets  map[string]int   // of paths
	bytes map[string]int64 // that were sent, of paths
}

func newRegistry(t testing.TB) *testRegistry {
	t.Helper()
	r := &testRegistry{gets: map[string]int{}, bytes: map[string]int64{}}
	inner := ggcr.New(ggcr.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.Method == http.MethodGet {
			r.mu.Lock()
			r.gets[req.URL.Path]++
			r.mu.Unlock()
			w = &countingWriter{w, r, req.URL.Path}
			if r.spoil != nil && r.spoil(w, req) {
				return
			}
		}
		inner.ServeHTTP(w, req)
	}))
	t.Cleanup(srv.Close)
	r.host = strings.TrimPrefix(srv.URL, "http://")
	return r
}

// asked is how often a path was asked for, and how many bytes were sent for it. An empty path: all together.
func (r *testRegistry) asked(path string) (gets int, sent int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p, n := range r.gets {
		if path == "" || p == path {
			gets += n
			sent += r.bytes[p]
		}
	}
	return gets, sent
}

type countingWriter struct {
	http.ResponseWriter
	r    *testRegistry
	path string
}

func (w *countingWriter) Write(b []byte) (int, error) {
	n, err := w.ResponseWriter.Write(b)
	w.r.mu.Lock()
	w.r.bytes[w.path] += int64(n)
	w.r.mu.Unlock()
	return n, err
}

func (w *countingWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// push puts an image into the registry and returns the reference for it.
func (r *testRegistry) push(t testing.TB, repo string, img remote.Taggable) string {
	t.Helper()
	tag, err := name.NewTag(r.host+"/"+repo+":latest", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	switch i := img.(type) {
	case v1.Image:
		err = remote.Write(tag, i)
	case v1.ImageIndex:
		err = remote.WriteIndex(tag, i)
	default:
		err = remote.Put(tag, img)
	}
	if err != nil {
		t.Fatal(err)
	}
	return "docker+http://" + tag.String()
}

// anonymous keeps the machine's own docker configuration out of the tests.
func anonymous() PullOptions {
	return PullOptions{Keychain: authn.NewMultiKeychain()}
}

// storeFiles lists what lies in a directory of the store.
func storeFiles(t testing.TB, s *Store, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(s.path(dir), func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			out = append(out, filepath.Base(p))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// wantError checks an error by kind and words.
func wantError(t testing.TB, err, kind error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("got no error")
	}
	if kind != nil && !errors.Is(err, kind) {
		t.Errorf("got error %q, want one that is %q", err, kind)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("got error %q, want one that says %q", err, w)
		}
	}
}

// raw is a manifest as given.
type raw struct {
	body []byte
	mt   types.MediaType
}

func (r raw) RawManifest() ([]byte, error)        { return r.body, nil }
func (r raw) MediaType() (types.MediaType, error) { return r.mt, nil }
func rawJSON(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// waitFor waits until something outside this process has happened that says nothing of itself.
func waitFor(t testing.TB, done func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !done() {
		if time.Now().After(deadline) {
			t.Fatal("it does not happen")
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func fsReadFile(fsys fs.FS, name string) ([]byte, error) { return fs.ReadFile(fsys, name) }
