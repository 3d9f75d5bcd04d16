package image

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/erofs/go-erofs"
	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/image/layer"
	"github.com/kcradle/kcradle/internal/need"
)

// readLayer reads a file out of a layer in the store.
func readLayer(t testing.TB, l Layer, file string) []byte {
	t.Helper()
	f, err := os.Open(l.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fsys, err := erofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	b, err := fsReadFile(fsys, file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestPull(t *testing.T) {
	r := newRegistry(t)
	plain := makeTar(t, map[string][]byte{"a": []byte("plain")})
	ref := r.push(t, "kinds", makeImage(t,
		makeLayer(t, plain, "plain"),
		makeLayer(t, makeTar(t, map[string][]byte{"b": []byte("gzip")}), "gzip"),
		makeLayer(t, makeTar(t, map[string][]byte{"c": []byte("zstd")}), "zstd"),
		makeLayer(t, plain, "plain"), // a layer may be there twice
	))
	s := openStore(t)
	var states []State
	o := anonymous()
	o.Progress = func(e Event) {
		if e.State != "" && !slices.Contains(states, e.State) {
			states = append(states, e.State)
		}
	}
	img, err := s.Pull(t.Context(), parse(t, ref), o)
	if err != nil {
		t.Fatal(err)
	}
	if len(img.Layers) != 4 || img.Layers[0].Path != img.Layers[3].Path {
		t.Fatalf("got layers %v", img.Layers)
	}
	for i, want := range map[int][2]string{0: {"a", "plain"}, 1: {"b", "gzip"}, 2: {"c", "zstd"}} {
		if got := readLayer(t, img.Layers[i], want[0]); string(got) != want[1] {
			t.Errorf("layer %d: got %q, want %q", i, got, want[1])
		}
		if err := s.VerifyLayer(img.Layers[i]); err != nil {
			t.Error(err)
		}
	}
	if got := img.Config.Config.Healthcheck; got == nil || !slices.Equal(got.Test, []string{"CMD", "true"}) {
		t.Errorf("got health check %v", got)
	}
	if diff := cmp.Diff([]State{Waiting, Pulling, Done}, states); diff != "" {
		t.Errorf("states (-want +got):\n%s", diff)
	}
	if left := storeFiles(t, s, dirIngest); len(left) > 0 {
		t.Errorf("ingest holds %v", left)
	}
	if left := storeFiles(t, s, dirLeases); len(left) > 0 {
		t.Errorf("leases holds %v", left)
	}

	// The second pull asks nothing, one with Always only for the manifest.
	before, _ := r.asked("")
	again, err := s.Pull(t.Context(), parse(t, ref), anonymous())
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(img, again); diff != "" {
		t.Errorf("second pull (-first +second):\n%s", diff)
	}
	if after, _ := r.asked(""); after != before {
		t.Errorf("the second pull asked the registry %d times", after-before)
	}
	o = anonymous()
	o.Policy = Always
	if _, err := s.Pull(t.Context(), parse(t, ref), o); err != nil {
		t.Fatal(err)
	}
	for _, l := range img.Layers[:3] {
		if n, _ := r.asked("/v2/kinds/blobs/" + l.Blob.Digest.String()); n != 1 {
			t.Errorf("layer %s: fetched %d times, want once", l.Blob.Digest, n)
		}
	}
}

func TestPullKeepsBlobs(t *testing.T) {
	r := newRegistry(t)
	ref := r.push(t, "keep", makeImage(t, makeLayer(t, makeTar(t, map[string][]byte{"a": noise(300_000)}), "gzip")))
	s := openStore(t)
	o := anonymous()
	o.KeepBlobs = true
	img, err := s.Pull(t.Context(), parse(t, ref), o)
	if err != nil {
		t.Fatal(err)
	}
	d := img.Layers[0].Blob.Digest
	if b, err := s.readBlob(d); err != nil || len(b) == 0 {
		t.Errorf("kept blob: %v", err)
	}
	if _, err := s.Prune(t.Context(), PruneOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.readBlob(d); err != nil {
		t.Errorf("kept blob after prune: %v", err)
	}
}

func TestPull127Layers(t *testing.T) {
	r := newRegistry(t)
	var layers []v1.Layer
	for i := range MaxLayers + 1 {
		layers = append(layers, makeLayer(t, makeTar(t, map[string][]byte{fmt.Sprint(i): noise(10)}), "gzip"))
	}
	s := openStore(t)
	img, err := s.Pull(t.Context(), parse(t, r.push(t, "many", makeImage(t, layers[:MaxLayers]...))), anonymous())
	if err != nil {
		t.Fatal(err)
	}
	if len(img.Layers) != MaxLayers {
		t.Errorf("got %d layers, want %d", len(img.Layers), MaxLayers)
	}
	_, err = s.Pull(t.Context(), parse(t, r.push(t, "toomany", makeImage(t, layers...))), anonymous())
	wantError(t, err, ErrUnsupported, "128 layers, the limit is 127")
}

func TestPullIndex(t *testing.T) {
	r := newRegistry(t)
	amd := makeImage(t, makeLayer(t, makeTar(t, map[string][]byte{"amd64": nil}), "gzip"))
	arm := makeImage(t, makeLayer(t, makeTar(t, map[string][]byte{"arm64": nil}), "gzip"))
	entry := func(img v1.Image, os, arch, variant string) mutate.IndexAddendum {
		return mutate.IndexAddendum{Add: img, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: os, Architecture: arch, Variant: variant}}}
	}
	s := openStore(t)
	img, err := s.Pull(t.Context(), parse(t, r.push(t, "multi", mutate.AppendManifests(empty.Index,
		entry(arm, "linux", "arm64", "v8"), entry(arm, "linux", "amd64", "v3"), entry(amd, "linux", "amd64", ""), entry(arm, "unknown", "unknown", "")))), anonymous())
	if err != nil {
		t.Fatal(err)
	}
	if want, _ := amd.Digest(); img.Digest.String() != want.String() {
		t.Errorf("got %s, want the plain amd64 one, %s", img.Digest, want)
	}
	_, err = s.Pull(t.Context(), parse(t, r.push(t, "armonly", mutate.AppendManifests(empty.Index,
		entry(arm, "linux", "arm64", "v8"), entry(arm, "windows", "amd64", "")))), anonymous())
	wantError(t, err, ErrPlatform, "linux/arm64/v8, windows/amd64")
}

// TestPullRefuses pulls what must be refused, in words, leaving nothing behind.
func TestPullRefuses(t *testing.T) {
	good := makeTar(t, map[string][]byte{"a": noise(200_000)})
	withType := func(t *testing.T, mt types.MediaType) v1.Image {
		return makeImage(t, blob{static.NewLayer(good, mt), hashOf(t, good)})
	}
	layerPath := func(r *http.Request, img v1.Image) bool {
		layers, _ := img.Layers()
		d, _ := layers[0].Digest()
		return strings.HasSuffix(r.URL.Path, "/blobs/"+d.String())
	}
	type setup func(t *testing.T, r *testRegistry) string // returns the reference
	for _, test := range []struct {
		name    string
		setup   setup
		options func(*PullOptions)
		kind    error
		words   []string
	}{
		{name: "unknown image", kind: ErrNotFound, words: []string{"no such image"},
			setup: func(t *testing.T, r *testRegistry) string { return "docker+http://" + r.host + "/no/such:1" }},
		{name: "unauthorized", kind: ErrUnauthorized, words: []string{"docker login"},
			setup: func(t *testing.T, r *testRegistry) string {
				r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
					w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
					w.WriteHeader(http.StatusUnauthorized)
					return true
				}
				return "docker+http://" + r.host + "/private"
			}},
		{name: "plain HTTP not named", words: []string{"does not speak TLS", "--plain-http", "docker+http://"},
			setup: func(t *testing.T, r *testRegistry) string {
				return "docker://" + strings.TrimPrefix(r.push(t, "x", withType(t, types.OCIUncompressedLayer)), "docker+http://")
			}},
		{name: "wrong manifest digest", kind: ErrCorrupt, words: []string{"manifest"},
			setup: func(t *testing.T, r *testRegistry) string {
				ref := r.push(t, "x", withType(t, types.OCIUncompressedLayer))
				r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
					if !strings.Contains(req.URL.Path, "/manifests/") {
						return false
					}
					w.Header().Set("Docker-Content-Digest", "sha256:"+strings.Repeat("0", 64))
					fmt.Fprint(w, `{"schemaVersion":2}`)
					return true
				}
				return ref
			}},
		{name: "pinned digest", kind: ErrCorrupt,
			setup: func(t *testing.T, r *testRegistry) string {
				img := withType(t, types.OCIUncompressedLayer)
				r.push(t, "x", img)
				d, _ := img.Digest()
				r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
					if !strings.Contains(req.URL.Path, "/manifests/") {
						return false
					}
					fmt.Fprint(w, `{"schemaVersion":2,"manifests":[]}`)
					return true
				}
				return "docker+http://" + r.host + "/x@" + d.String()
			}},
		{name: "wrong layer bytes", kind: ErrCorrupt, words: []string{"content does not match"},
			setup: func(t *testing.T, r *testRegistry) string {
				img := withType(t, types.OCIUncompressedLayer)
				ref := r.push(t, "x", img)
				r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
					if !layerPath(req, img) {
						return false
					}
					bad := bytes.Clone(good)
					bad[1000] ^= 1 // in the file's content: the tar stays right
					w.Write(bad)
					return true
				}
				return ref
			}},
		{name: "wrong diffID", kind: ErrCorrupt, words: []string{"configuration says"},
			setup: func(t *testing.T, r *testRegistry) string {
				return r.push(t, "x", makeImage(t, blob{static.NewLayer(good, types.OCIUncompressedLayer), hashOf(t, nil)}))
			}},
		{name: "truncated layer", words: []string{"ends after 5000 of"},
			setup: func(t *testing.T, r *testRegistry) string {
				img := withType(t, types.OCIUncompressedLayer)
				ref := r.push(t, "x", img)
				r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
					if !layerPath(req, img) {
						return false
					}
					w.Write(good[min(len(good), rangeStart(req)):5000])
					return true
				}
				return ref
			}},
		{name: "truncated gzip with a right digest", words: []string{"unexpected EOF"},
			setup: func(t *testing.T, r *testRegistry) string {
				l := makeLayer(t, good, "gzip")
				rc, _ := l.Compressed()
				b := make([]byte, 5000)
				if _, err := rc.Read(b); err != nil {
					t.Fatal(err)
				}
				return r.push(t, "x", makeImage(t, blob{static.NewLayer(b, types.OCILayer), hashOf(t, good)}))
			}},
		{name: "gzip bomb", kind: layer.ErrLimit, words: []string{"--max-layer-size"},
			options: func(o *PullOptions) { o.Limits.Bytes = 10 << 20 },
			setup: func(t *testing.T, r *testRegistry) string {
				return r.push(t, "x", makeImage(t, makeLayer(t, makeTar(t, map[string][]byte{"zeros": make([]byte, 50<<20)}), "gzip")))
			}},
		{name: "arm64", kind: ErrPlatform, words: []string{"linux/arm64", "linux/amd64"},
			setup: func(t *testing.T, r *testRegistry) string {
				img := withType(t, types.OCIUncompressedLayer)
				c, _ := img.ConfigFile()
				c = c.DeepCopy()
				c.Architecture = "arm64"
				img, err := mutate.ConfigFile(img, c)
				if err != nil {
					t.Fatal(err)
				}
				return r.push(t, "x", img)
			}},
		{name: "artifact", kind: ErrUnsupported, words: []string{"OCI artifact", "application/vnd.cncf.helm.config.v1+json"},
			setup: func(t *testing.T, r *testRegistry) string {
				return r.push(t, "x", mutate.ConfigMediaType(withType(t, types.OCIUncompressedLayer), "application/vnd.cncf.helm.config.v1+json"))
			}},
		{name: "encrypted layer", kind: ErrUnsupported, words: []string{"encrypted", "--decryption-key"},
			setup: func(t *testing.T, r *testRegistry) string {
				return r.push(t, "x", withType(t, "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"))
			}},
		{name: "foreign layer", kind: ErrUnsupported, words: []string{"foreign layer"},
			setup: func(t *testing.T, r *testRegistry) string {
				img := withType(t, types.OCIUncompressedLayer)
				m, err := img.RawManifest()
				if err != nil {
					t.Fatal(err)
				}
				r.push(t, "x", img)
				b := bytes.ReplaceAll(m, []byte(types.OCIUncompressedLayer), []byte("application/vnd.oci.image.layer.nondistributable.v1.tar"))
				return r.push(t, "x", raw{b, types.OCIManifestSchema1})
			}},
		{name: "unknown layer type", kind: ErrUnsupported, words: []string{"application/x-cpio", "not known"},
			setup: func(t *testing.T, r *testRegistry) string { return r.push(t, "x", withType(t, "application/x-cpio")) }},
		{name: "schema 1", kind: ErrUnsupported, words: []string{"schema 1"},
			setup: func(t *testing.T, r *testRegistry) string {
				ref := "docker+http://" + r.host + "/x"
				r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
					if !strings.Contains(req.URL.Path, "/manifests/") {
						return false
					}
					w.Header().Set("Content-Type", dockerSchema1Sig)
					fmt.Fprint(w, `{"schemaVersion":1,"fsLayers":[]}`)
					return true
				}
				return ref
			}},
		{name: "endless manifest", kind: ErrUnsupported, words: []string{"more than"},
			setup: func(t *testing.T, r *testRegistry) string {
				r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
					if !strings.Contains(req.URL.Path, "/manifests/") {
						return false
					}
					w.Write(bytes.Repeat([]byte(" "), maxDocument+2))
					return true
				}
				return "docker+http://" + r.host + "/x"
			}},
		{name: "escaping layer", kind: layer.ErrInvalid, words: []string{"leads out of the layer"},
			setup: func(t *testing.T, r *testRegistry) string {
				return r.push(t, "x", makeImage(t, makeLayer(t, makeTar(t, map[string][]byte{"a/../../etc/passwd": []byte("x")}), "gzip")))
			}},
	} {
		t.Run(test.name, func(t *testing.T) {
			r := newRegistry(t)
			ref := test.setup(t, r)
			s := openStore(t)
			o := anonymous()
			if test.options != nil {
				test.options(&o)
			}
			img, err := s.Pull(t.Context(), parse(t, ref), o)
			if err == nil {
				t.Fatalf("got image %v, want an error", img)
			}
			wantError(t, err, test.kind, test.words...)
			for _, dir := range []string{dirLayers, dirImages, dirLeases} {
				if left := storeFiles(t, s, dir); len(left) > 0 {
					t.Errorf("%s holds %v", dir, left)
				}
			}
			for _, f := range storeFiles(t, s, dirIngest) {
				if !strings.HasSuffix(f, ".part") { // which a later pull may resume
					t.Errorf("ingest holds %s", f)
				}
			}
		})
	}
}

// TestPullWithLogin pulls from a registry that wants the login that docker has.
func TestPullWithLogin(t *testing.T) {
	r := newRegistry(t)
	ref := r.push(t, "private", makeImage(t, makeLayer(t, makeTar(t, map[string][]byte{"a": nil}), "gzip")))
	r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
		if user, password, _ := req.BasicAuth(); user == "me" && password == "secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	}
	dir := t.TempDir()
	config := fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, r.host, base64.StdEncoding.EncodeToString([]byte("me:secret")))
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("DOCKER_CONFIG", dir)
	if _, err := openStore(t).Pull(t.Context(), parse(t, ref), PullOptions{}); err != nil {
		t.Error(err)
	}
	_, err := openStore(t).Pull(t.Context(), parse(t, ref), anonymous())
	wantError(t, err, ErrUnauthorized, r.host)
}

// TestPullWithoutDaemon falls back to the registry when no docker daemon answers, or has no such image.
func TestPullWithoutDaemon(t *testing.T) {
	r := newRegistry(t)
	ref := strings.TrimPrefix(r.push(t, "x", makeImage(t, makeLayer(t, makeTar(t, map[string][]byte{"a": nil}), "gzip"))), "docker+http://")
	silent := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", silent)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	srv := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `{"message":"No such image"}`)
	})}
	done := make(chan error)
	go func() { done <- srv.Serve(l) }()
	defer func() { srv.Close(); <-done }()
	for _, host := range []string{"unix:///nonexistent", "tcp://127.0.0.1:1", "ssh://somewhere", "unix://" + silent} {
		o := anonymous()
		o.DockerHost, o.PlainHTTP = host, []string{r.host}
		if _, err := openStore(t).Pull(t.Context(), parse(t, ref), o); err != nil {
			t.Errorf("%s: %v", host, err)
		}
		_, err := openStore(t).Pull(t.Context(), parse(t, "docker-daemon:"+ref), o)
		if err == nil || !errors.Is(err, errNoDaemon) && !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: docker-daemon: got %v", host, err)
		}
	}
}

func rangeStart(r *http.Request) int {
	n, _ := strconv.Atoi(strings.TrimSuffix(strings.TrimPrefix(r.Header.Get("Range"), "bytes="), "-"))
	return n
}

// TestPullResumes cuts every connection after a while: the layer comes in pieces, each byte once.
func TestPullResumes(t *testing.T) {
	content := makeTar(t, map[string][]byte{"a": noise(1 << 20)})
	for _, ranges := range []bool{true, false} {
		t.Run(fmt.Sprintf("ranges %v", ranges), func(t *testing.T) {
			r := newRegistry(t)
			img := makeImage(t, blob{static.NewLayer(content, types.OCIUncompressedLayer), hashOf(t, content)})
			ref := r.push(t, "x", img)
			var starts []int
			var mu sync.Mutex
			r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
				if !strings.HasSuffix(req.URL.Path, hashOf(t, content).String()) {
					return false
				}
				mu.Lock()
				defer mu.Unlock()
				start := rangeStart(req)
				starts = append(starts, start)
				if len(starts) == 2 {
					w.WriteHeader(http.StatusServiceUnavailable)
					return true
				}
				end := min(start+400_000, len(content))
				w.Header().Set("Content-Length", strconv.Itoa(len(content)-start))
				if ranges && start > 0 {
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", start, len(content)-1, len(content)))
					w.WriteHeader(http.StatusPartialContent)
				} else if start > 0 {
					w.Header().Set("Content-Length", strconv.Itoa(len(content)))
					start = 0
				}
				w.Write(content[start:end])
				http.NewResponseController(w).Flush()
				panic(http.ErrAbortHandler) // the connection ends here
			}
			s := openStore(t)
			var retries int
			o := anonymous()
			o.Progress = func(e Event) {
				if e.State == Retrying {
					retries++
				}
			}
			if _, err := s.Pull(t.Context(), parse(t, ref), o); err != nil {
				t.Fatal(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if retries < 2 || len(starts) < 3 || starts[0] != 0 || !slices.IsSorted(starts) {
				t.Errorf("got %d retries, reads from %v", retries, starts)
			}
			if _, sent := r.asked("/v2/x/blobs/" + hashOf(t, content).String()); ranges && sent > int64(len(content)) {
				t.Errorf("got %d bytes for %d", sent, len(content))
			}
		})
	}
}

// TestPullIsKilled kills a pull in the middle of a layer: the next one goes on where it was, even if what it finds is
// damaged.
func TestPullIsKilled(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		t.Run(fmt.Sprintf("damaged %v", damaged), func(t *testing.T) {
			content := makeTar(t, map[string][]byte{"a": noise(3 << 20)})
			r := newRegistry(t)
			ref := r.push(t, "x", makeImage(t, blob{static.NewLayer(content, types.OCIUncompressedLayer), hashOf(t, content)}))
			half := make(chan struct{})
			var once sync.Once
			var mu sync.Mutex
			var starts []int
			r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
				if !strings.HasSuffix(req.URL.Path, hashOf(t, content).String()) {
					return false
				}
				mu.Lock()
				starts = append(starts, rangeStart(req))
				n := len(starts)
				mu.Unlock()
				if n > 1 {
					if rangeStart(req) == 0 {
						return false
					}
					w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", rangeStart(req), len(content)-1, len(content)))
					w.WriteHeader(http.StatusPartialContent)
					w.Write(content[rangeStart(req):])
					return true
				}
				w.Header().Set("Content-Length", strconv.Itoa(len(content)))
				w.Write(content[:2<<20])
				http.NewResponseController(w).Flush()
				once.Do(func() { close(half) })
				<-req.Context().Done() // until the reader is gone
				return true
			}
			s := openStore(t)
			root := filepath.Dir(s.Dir())
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), pullVariable+"="+root+" "+ref)
			cmd.Stderr = testWriter{t}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			<-half
			part := s.path(dirIngest, hashOf(t, content).Hex+"."+hashOf(t, content).Hex[:16]+".part")
			waitFor(t, func() bool { fi, err := os.Stat(part); return err == nil && fi.Size() > 1<<20 })
			if err := cmd.Process.Kill(); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Wait(); err == nil {
				t.Fatal("the pull was not killed")
			}
			if got := storeFiles(t, s, dirLayers); len(got) > 0 {
				t.Errorf("layers holds %v", got)
			}
			if damaged {
				f, err := os.OpenFile(part, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.WriteAt([]byte("damage"), 5000); err != nil {
					t.Fatal(err)
				}
				f.Close()
			}
			img, err := s.Pull(t.Context(), parse(t, ref), anonymous())
			if err != nil {
				t.Fatal(err)
			}
			if got := readLayer(t, img.Layers[0], "a"); !bytes.Contains(content, got) {
				t.Error("the layer has another content")
			}
			mu.Lock()
			defer mu.Unlock()
			if starts[1] < 1<<20 || damaged != (len(starts) == 3) {
				t.Errorf("got reads from %v", starts)
			}
			// What the dead one held is free, and nothing of it stays.
			if _, err := s.Prune(t.Context(), PruneOptions{Ingest: true}); err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{dirIngest, dirLeases} {
				if left := storeFiles(t, s, dir); len(left) > 0 {
					t.Errorf("%s holds %v", dir, left)
				}
			}
		})
	}
}

// TestPullTogether has several processes pull the same image: each layer comes once.
func TestPullTogether(t *testing.T) {
	r := newRegistry(t)
	var layers []v1.Layer
	for i := range 5 {
		layers = append(layers, makeLayer(t, makeTar(t, map[string][]byte{fmt.Sprint(i): noise(1 << 20)}), "gzip"))
	}
	ref := r.push(t, "x", makeImage(t, layers...))
	root := t.TempDir()
	const processes = 4
	out := make([]bytes.Buffer, processes)
	var wg sync.WaitGroup
	for i := range processes {
		wg.Go(func() {
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), pullVariable+"="+root+" "+ref)
			cmd.Stdout, cmd.Stderr = &out[i], testWriter{t}
			if err := cmd.Run(); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for i := range out {
		if out[i].Len() == 0 || out[i].String() != out[0].String() {
			t.Errorf("process %d: got layers %q, process 0 %q", i, out[i].String(), out[0].String())
		}
	}
	for _, l := range layers {
		d, _ := l.Digest()
		if n, _ := r.asked("/v2/x/blobs/" + d.String()); n != 1 {
			t.Errorf("layer %s: fetched %d times, want once", d, n)
		}
	}
}

// TestPullCanceled ends a pull by its context: at once, and leaving what the next one can use.
func TestPullCanceled(t *testing.T) {
	content := makeTar(t, map[string][]byte{"a": noise(1 << 20)})
	r := newRegistry(t)
	ref := r.push(t, "x", makeImage(t, blob{static.NewLayer(content, types.OCIUncompressedLayer), hashOf(t, content)}))
	ctx, cancel := context.WithCancel(t.Context())
	r.spoil = func(w http.ResponseWriter, req *http.Request) bool {
		if !strings.HasSuffix(req.URL.Path, hashOf(t, content).String()) {
			return false
		}
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		w.Write(content[:1000])
		http.NewResponseController(w).Flush()
		cancel()
		<-req.Context().Done()
		return true
	}
	s := openStore(t)
	_, err := s.Pull(ctx, parse(t, ref), anonymous())
	wantError(t, err, context.Canceled)
	if got := storeFiles(t, s, dirLayers); len(got) > 0 {
		t.Errorf("layers holds %v", got)
	}
}

// TestPullFullDisk pulls into file systems of every size up to one that suffices: the disk is full at every stage.
func TestPullFullDisk(t *testing.T) {
	need.Root(t)
	r := newRegistry(t)
	ref := r.push(t, "x", makeImage(t,
		makeLayer(t, makeTar(t, map[string][]byte{"a": noise(200_000), "b": noise(100)}), "gzip"),
		makeLayer(t, makeTar(t, map[string][]byte{"c": noise(100_000)}), "plain")))
	root := t.TempDir()
	enough := false
	for kib := 24; kib <= 1600 && !enough; kib += 24 + kib/8 {
		func() {
			if err := unix.Mount("tmpfs", root, "tmpfs", 0, fmt.Sprintf("size=%dk", kib)); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := unix.Unmount(root, 0); err != nil {
					t.Errorf("unmount with %d KiB: %v", kib, err)
				}
			}()
			s, err := Open(root, nil)
			if errors.Is(err, unix.ENOSPC) {
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			o := anonymous()
			o.Parallel = 1
			img, err := s.Pull(t.Context(), parse(t, ref), o)
			if err == nil {
				enough = true
				if got := readLayer(t, img.Layers[1], "c"); len(got) != 100_000 {
					t.Errorf("got %d bytes", len(got))
				}
				return
			}
			wantError(t, err, unix.ENOSPC, "kcradle prune")
			for _, name := range storeFiles(t, s, dirLayers) {
				id, ok := strings.CutSuffix(name, ".erofs")
				if !ok {
					continue
				}
				l, err := s.layer(digest.NewDigestFromEncoded(digest.SHA256, id))
				if err == nil {
					err = s.VerifyLayer(l)
				}
				if err != nil {
					t.Errorf("with %d KiB a layer is not whole: %v", kib, err)
				}
			}
			if images, err := s.List(t.Context()); err != nil || len(images) > 0 {
				t.Errorf("with %d KiB: got images %v, error %v", kib, images, err)
			}
			if _, err := s.Prune(t.Context(), PruneOptions{All: true, Ingest: true}); err != nil {
				t.Errorf("prune with %d KiB: %v", kib, err)
			}
		}()
	}
	if !enough {
		t.Error("no size sufficed")
	}
}
