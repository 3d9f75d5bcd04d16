package image

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/servers"
)

// pushStates pushes and returns the last state of each layer, sorted.
func pushStates(t testing.TB, s *Store, ref string, o PushOptions) (digest.Digest, []State) {
	t.Helper()
	last := map[digest.Digest]State{}
	o.Keychain = anonymous().Keychain
	o.Progress = func(e Event) {
		if e.Layer == "" {
			return
		}
		if e.Total > 0 && e.Current > e.Total {
			t.Errorf("%d of %d bytes in %s", e.Current, e.Total, e.State)
		}
		last[e.Layer] = e.State
	}
	d, err := s.Push(t.Context(), parse(t, ref), o)
	if err != nil {
		t.Fatal(err)
	}
	var out []State
	for _, st := range last {
		out = append(out, st)
	}
	slices.Sort(out)
	for _, dir := range []string{dirIngest, dirLeases} {
		if left := storeFiles(t, s, dir); len(left) > 0 {
			t.Errorf("%s holds %v", dir, left)
		}
	}
	return d.Digest, out
}

// TestPush pushes to Debian's docker-registry what was loaded, and pulls it elsewhere: here and with dockerd.
func TestPush(t *testing.T) {
	need.Root(t)
	need.Command(t, "docker-registry", "apt-get install docker-registry")
	need.Command(t, "dockerd", "apt-get install docker.io")
	_, archive := threeLayers(t)
	s := openStore(t)
	images, err := s.Load(t.Context(), mustOpen(t, archive), anonymous())
	if err != nil {
		t.Fatal(err)
	}
	img := images[0]
	r, err := servers.StartRegistry(t.Context(), serverDir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	plain := PushOptions{PlainHTTP: []string{r.Addr}}
	one, two := r.Addr+"/a/one:v1", r.Addr+"/b/two:v2"
	tag(t, s, img, one, two, r.Addr+"/a/one:again")

	d, states := pushStates(t, s, one, plain)
	if diff := cmp.Diff([]State{Done, Done, Done}, states); diff != "" {
		t.Errorf("first push (-want +got):\n%s", diff)
	}
	// Elsewhere it is the same image.
	other := openStore(t)
	po := anonymous()
	po.PlainHTTP, po.DockerHost = []string{r.Addr}, "unix:///nonexistent"
	got, err := other.Pull(t.Context(), parse(t, one), po)
	if err != nil {
		t.Fatal(err)
	}
	if got.Digest != d || got.ConfigDigest != img.ConfigDigest || !slices.Equal(layerIDs(got), layerIDs(img)) {
		t.Errorf("pulled: %s %s, pushed %s %s", got.Digest, got.ConfigDigest, d, img.ConfigDigest)
	}
	docker, err := servers.StartDockerd(t.Context(), serverDir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer docker.Stop()
	run(t, docker.Docker(t.Context(), "pull", one))
	id := strings.TrimSpace(run(t, docker.Docker(t.Context(), "image", "inspect", "--format", "{{.Id}} {{index .RepoDigests 0}}", one)))
	if want := img.ConfigDigest.String() + " " + r.Addr + "/a/one@" + d.String(); id != want {
		t.Errorf("docker has %s, want %s", id, want)
	}
	// The store knows what the registry has.
	u, err := s.Lookup(t.Context(), one)
	if err != nil || !slices.Equal(u.RepoDigests, []string{r.Addr + "/a/one@" + d.String()}) {
		t.Errorf("got digests %v, %v", u.RepoDigests, err)
	}
	// Again, under another tag, and in another repository.
	for ref, want := range map[string][]State{one: {Exists, Exists, Exists}, r.Addr + "/a/one:again": {Exists, Exists, Exists}, two: {Mounted, Mounted, Mounted}} {
		again, states := pushStates(t, s, ref, plain)
		if diff := cmp.Diff(want, states); diff != "" || again != d {
			t.Errorf("%s: digest %s, want %s; states (-want +got):\n%s", ref, again, d, diff)
		}
	}
	// What was pulled is pushed with its digest: from the kept blobs, or because they come out the same.
	r2, err := servers.StartRegistry(t.Context(), serverDir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer r2.Stop()
	for _, keep := range []bool{true, false} {
		third := openStore(t)
		po.KeepBlobs = keep
		got, err := third.Pull(t.Context(), parse(t, two), po)
		if err != nil {
			t.Fatal(err)
		}
		ref := fmt.Sprintf("%s/kept-%v:x", r2.Addr, keep)
		tag(t, third, got, ref)
		again, states := pushStates(t, third, ref, PushOptions{PlainHTTP: []string{r2.Addr}})
		if diff := cmp.Diff([]State{Done, Done, Done}, states); diff != "" || again != d {
			t.Errorf("kept blobs %v: digest %s, want %s; states (-want +got):\n%s", keep, again, d, diff)
		}
	}
	// A committed image sends its own layer only.
	c, err := s.Commit(t.Context(), img, strings.NewReader(string(makeTar(t, map[string][]byte{"n": noise(9000)}))), CommitOptions{Ref: parse(t, r.Addr+"/a/one:new")})
	if err != nil {
		t.Fatal(err)
	}
	if _, states := pushStates(t, s, c.Ref, plain); !slices.Equal(states, []State{Done, Exists, Exists, Exists}) {
		t.Errorf("a committed image: %v", states)
	}
	run(t, docker.Docker(t.Context(), "pull", r.Addr+"/a/one:new"))
}

// pushRegistry is a registry in this process of which spoil answers some requests. It counts PATCHes and PUTs.
func pushRegistry(t testing.TB, spoil func(w http.ResponseWriter, r *http.Request) bool) (host string, count func(method string) int) {
	t.Helper()
	inner := ggcr.New(ggcr.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	var mu sync.Mutex
	counts := map[string]int{}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		counts[r.Method]++
		mu.Unlock()
		if spoil == nil || !spoil(w, r) {
			inner.ServeHTTP(w, r)
		}
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://"), func(m string) int {
		mu.Lock()
		defer mu.Unlock()
		return counts[m]
	}
}

func TestPushWithLogin(t *testing.T) {
	host, _ := pushRegistry(t, func(w http.ResponseWriter, r *http.Request) bool {
		if user, password, _ := r.BasicAuth(); user == "me" && password == "secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	s := openStore(t)
	one, _ := pullShared(t, s)
	ref := host + "/private:1"
	tag(t, s, one, ref)
	o := PushOptions{PlainHTTP: []string{host}, Keychain: Credentials{Username: "me", Password: "secret"}.Keychain()}
	if _, err := s.Push(t.Context(), parse(t, ref), o); err != nil {
		t.Error(err)
	}
	for _, c := range []Credentials{{}, {Username: "me", Password: "wrong"}} {
		o.Keychain = c.Keychain()
		_, err := s.Push(t.Context(), parse(t, ref), o)
		wantError(t, err, ErrUnauthorized, host)
	}
	po := PullOptions{PlainHTTP: []string{host}, Policy: Always, DockerHost: "unix:///nonexistent", Keychain: Credentials{Username: "me", Password: "secret"}.Keychain()}
	if _, err := openStore(t).Pull(t.Context(), parse(t, ref), po); err != nil {
		t.Error(err)
	}
}

// TestPushRetries pushes to a registry that fails now and then.
func TestPushRetries(t *testing.T) {
	var mu sync.Mutex
	failed := map[string]bool{}
	host, count := pushRegistry(t, func(w http.ResponseWriter, r *http.Request) bool {
		mu.Lock()
		defer mu.Unlock()
		if r.Method == http.MethodGet || failed[r.Method] {
			return false
		}
		failed[r.Method] = true
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	})
	s := openStore(t)
	one, _ := pullShared(t, s)
	ref := host + "/flaky:1"
	tag(t, s, one, ref)
	_, states := pushStates(t, s, ref, PushOptions{PlainHTTP: []string{host}, Parallel: 1})
	if !slices.Equal(states, []State{Done, Done}) || !failed[http.MethodPatch] || !failed[http.MethodPut] || !failed[http.MethodHead] {
		t.Errorf("got states %v, failures %v", states, failed)
	}
	before := count(http.MethodPatch)
	if _, states := pushStates(t, s, ref, PushOptions{PlainHTTP: []string{host}}); !slices.Equal(states, []State{Exists, Exists}) || count(http.MethodPatch) != before {
		t.Errorf("pushed again: states %v, %d uploads more", states, count(http.MethodPatch)-before)
	}
}

// TestPushDistrustsManifests has a manifest that says of a layer the store has that another blob holds it. That blob is in
// the registry, and must not become a part of what others push.
func TestPushDistrustsManifests(t *testing.T) {
	r := newRegistry(t)
	good := makeLayer(t, makeTar(t, map[string][]byte{"a": noise(5000)}), "gzip")
	evil := makeLayer(t, makeTar(t, map[string][]byte{"evil": nil}), "gzip")
	s := openStore(t)
	img := makeImage(t, good)
	r.push(t, "good", img) // for its configuration and manifest
	archive := filepath.Join(t.TempDir(), "good.tar")
	local, err := name.NewTag("local:good")
	if err == nil {
		err = tarball.WriteToFile(archive, local, img)
	}
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := s.Load(t.Context(), mustOpen(t, archive), anonymous())
	if err != nil {
		t.Fatal(err)
	}
	one := loaded[0]
	manifest, err := img.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	goodDigest, err := good.Digest()
	if err != nil {
		t.Fatal(err)
	}
	goodSize, err := good.Size()
	if err != nil {
		t.Fatal(err)
	}
	d, err := evil.Digest()
	if err != nil {
		t.Fatal(err)
	}
	r.push(t, "mirror", makeImage(t, evil)) // the blob is where the good image will be pushed
	manifest = bytes.ReplaceAll(manifest, []byte(goodDigest.String()), []byte(d.String()))
	size, err := evil.Size()
	if err != nil {
		t.Fatal(err)
	}
	manifest = bytes.ReplaceAll(manifest, fmt.Appendf(nil, `"size":%d,"digest":"%s"`, goodSize, d), fmt.Appendf(nil, `"size":%d,"digest":"%s"`, size, d))
	ref := r.push(t, "mirror", raw{manifest, types.OCIManifestSchema1})
	bad, err := s.Pull(t.Context(), parse(t, ref), anonymous())
	if err != nil || bad.Layers[0].Blob.Digest.String() != d.String() || bad.ConfigDigest != one.ConfigDigest {
		t.Fatalf("the other manifest was not taken: %v", err)
	}
	tag(t, s, one, r.host+"/mirror:good")
	pushStates(t, s, r.host+"/mirror:good", PushOptions{PlainHTTP: []string{r.host}})
	got, err := openStore(t).Pull(t.Context(), parse(t, "docker+http://"+r.host+"/mirror:good"), anonymous())
	if err != nil || got.Layers[0].Blob.Digest.String() == d.String() || got.ConfigDigest != one.ConfigDigest {
		t.Errorf("what was pushed: %v, %v", got, err)
	}
}

func TestPushRefuses(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	host, _ := pushRegistry(t, func(_ http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/slow/") && r.Method == http.MethodPatch {
			_, _ = io.Copy(io.Discard, r.Body) // the server notices a client's end only behind its body
			cancel()
			<-r.Context().Done()
			return true
		}
		return false
	})
	s := openStore(t)
	one, two := pullShared(t, s)
	tag(t, s, one, host+"/slow:1", host+"/one:1")
	tag(t, s, two, host+"/two:1")
	if err := errors.Join(os.Remove(s.skeletonPath(two.Layers[1].DiffID))); err != nil {
		t.Fatal(err)
	}
	o := PushOptions{PlainHTTP: []string{host}, Keychain: anonymous().Keychain}
	for _, test := range []struct {
		ref   string
		o     PushOptions
		kind  error
		words string
	}{
		{host + "/none:1", o, ErrNotFound, ""},
		{host + "/one@" + one.Digest.String(), o, nil, "push a tag"},
		{"oci:/tmp/x", o, nil, "only a name"},
		{host + "/one:1", PushOptions{Keychain: o.Keychain}, ErrPlainHTTP, "--plain-http"},
		{host + "/two:1", o, ErrNoTar, "pull the image again"},
	} {
		_, err := s.Push(t.Context(), parse(t, test.ref), test.o)
		wantError(t, err, test.kind, test.words)
	}
	_, err := s.Push(ctx, parse(t, host+"/slow:1"), o)
	wantError(t, err, context.Canceled)
	for _, dir := range []string{dirIngest, dirLeases} {
		if left := storeFiles(t, s, dir); len(left) > 0 {
			t.Errorf("%s holds %v", dir, left)
		}
	}
}
