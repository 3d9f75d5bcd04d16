package image

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/klauspost/compress/gzip"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/servers"
)

// run runs a command of the test and returns its output.
func run(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", strings.Join(cmd.Args, " "), err, out)
	}
	return string(out)
}

// serverDir is a directory with a short path.
func serverDir(t testing.TB) string {
	t.Helper()
	dir, err := servers.TempDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// threeLayers is an image of which every layer matters, and its archive as docker save writes it.
func threeLayers(t testing.TB) (img v1.Image, archive string) {
	t.Helper()
	img = makeImage(t,
		makeLayer(t, makeTar(t, map[string][]byte{"bin/a": noise(150_000), "etc/b": []byte("low")}), "gzip"),
		makeLayer(t, makeTar(t, map[string][]byte{"etc/.wh.b": nil}), "gzip"),
		makeLayer(t, makeTar(t, map[string][]byte{"c": noise(70_000)}), "gzip"))
	tag, err := name.NewTag("test/three:latest")
	if err != nil {
		t.Fatal(err)
	}
	archive = filepath.Join(t.TempDir(), "three.tar")
	if err := tarball.WriteToFile(archive, tag, img); err != nil {
		t.Fatal(err)
	}
	return img, archive
}

func diffIDs(t testing.TB, img v1.Image) []string {
	t.Helper()
	c, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, d := range c.RootFS.DiffIDs {
		out = append(out, d.String())
	}
	return out
}

func layerIDs(img *Image) []string {
	var out []string
	for _, l := range img.Layers {
		out = append(out, l.DiffID.String())
	}
	return out
}

func TestPullFiles(t *testing.T) {
	img, archive := threeLayers(t)
	dir := t.TempDir()
	l, err := layout.Write(filepath.Join(dir, "layout"), empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.AppendImage(img, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "v1"})); err != nil {
		t.Fatal(err)
	}
	other := makeImage(t, makeLayer(t, makeTar(t, map[string][]byte{"x": nil}), "gzip"))
	if err := l.AppendImage(other, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "v2"})); err != nil {
		t.Fatal(err)
	}
	ociTar := filepath.Join(dir, "oci.tar")
	run(t, exec.Command("tar", "-C", filepath.Join(dir, "layout"), "-cf", ociTar, "."))
	zipped := archive + ".gz"
	b, err := os.ReadFile(archive)
	if err != nil {
		t.Fatal(err)
	}
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.Close(), os.WriteFile(zipped, z.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
	half := filepath.Join(dir, "half.tar")
	if err := os.WriteFile(half, b[:len(b)/2], 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		ref   string
		kind  error
		words string
	}{
		{ref: "docker-archive:" + archive},
		{ref: "docker-archive:" + archive + ":test/three"},
		{ref: "docker-archive:" + zipped},
		{ref: "oci:" + filepath.Join(dir, "layout") + ":v1"},
		{ref: "oci-archive:" + ociTar + ":v1"},
		{ref: "docker-archive:" + archive + ":other", kind: ErrNotFound, words: "test/three:latest"},
		{ref: "docker-archive:" + ociTar, kind: ErrUnsupported, words: "write oci-archive:"},
		{ref: "docker-archive:" + filepath.Join(dir, "none"), kind: ErrNotFound, words: "there is no"},
		{ref: "docker-archive:" + dir, kind: ErrUnsupported, words: "oci:"},
		{ref: "docker-archive:" + half, words: "EOF"},
		{ref: "oci:" + filepath.Join(dir, "layout"), words: "2 images; say which"},
		{ref: "oci:" + filepath.Join(dir, "layout") + ":v3", kind: ErrNotFound, words: "v1, v2"},
		{ref: "oci:" + dir, kind: ErrUnsupported, words: "no OCI layout"},
		{ref: "oci-archive:" + archive, kind: ErrUnsupported, words: "no OCI layout"},
	} {
		t.Run(strings.ReplaceAll(filepath.Base(test.ref), ":", " "), func(t *testing.T) {
			s := openStore(t)
			got, err := s.Pull(t.Context(), parse(t, test.ref), anonymous())
			if test.words != "" {
				wantError(t, err, test.kind, test.words)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(diffIDs(t, img), layerIDs(got)); diff != "" {
				t.Errorf("layers (-want +got):\n%s", diff)
			}
		})
	}
	t.Run("load", func(t *testing.T) {
		s := openStore(t)
		f, err := os.Open(archive)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		for name, r := range map[string]io.Reader{"file": f, "stream": bytes.NewReader(z.Bytes())} {
			images, err := s.Load(t.Context(), r, anonymous())
			if err != nil || len(images) != 1 || images[0].Ref != "docker.io/test/three:latest" {
				t.Errorf("%s: got %v, %v", name, images, err)
			}
		}
		if img, err := s.Pull(t.Context(), parse(t, "test/three"), PullOptions{DockerHost: "unix:///nonexistent", Policy: Missing}); err != nil || len(img.Layers) != 3 {
			t.Errorf("what was loaded is not found: %v", err)
		}
		all, err := s.Load(t.Context(), mustOpen(t, ociTar), anonymous())
		if err != nil || len(all) != 2 {
			t.Errorf("oci archive: got %d images, %v", len(all), err)
		}
	})
	t.Run("damaged layout", func(t *testing.T) {
		layers, err := img.Layers()
		if err != nil {
			t.Fatal(err)
		}
		d, _ := layers[0].Digest()
		blob := filepath.Join(dir, "layout/blobs/sha256", d.Hex)
		b, err := os.ReadFile(blob)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)/2] ^= 1
		if err := os.WriteFile(blob, b, 0o600); err != nil {
			t.Fatal(err)
		}
		s := openStore(t)
		_, err = s.Pull(t.Context(), parse(t, "oci:"+filepath.Join(dir, "layout")+":v1"), anonymous())
		wantError(t, err, ErrCorrupt)
		if left := storeFiles(t, s, dirIngest); len(left) > 0 {
			t.Errorf("ingest holds %v", left)
		}
	})
}

func mustOpen(t testing.TB, name string) *os.File {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// TestServers takes one image from Debian's own registry, dockerd and containerd, where skopeo, docker and ctr put it.
func TestServers(t *testing.T) {
	need.Root(t)
	skopeo := need.Command(t, "skopeo", "apt-get install skopeo")
	need.Command(t, "docker-registry", "apt-get install docker-registry")
	need.Command(t, "dockerd", "apt-get install docker.io")
	need.Command(t, "containerd", "apt-get install containerd")
	img, archive := threeLayers(t)
	want := diffIDs(t, img)
	check := func(t *testing.T, got *Image, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, layerIDs(got)); diff != "" {
			t.Errorf("layers (-want +got):\n%s", diff)
		}
		if !slices.Equal(got.Config.Config.Cmd, []string{"/run"}) {
			t.Errorf("got command %q", got.Config.Config.Cmd)
		}
	}
	copyImage := func(t *testing.T, to ...string) {
		run(t, exec.Command(skopeo, append([]string{"--insecure-policy", "copy", "--quiet", "docker-archive:" + archive}, to...)...))
	}

	t.Run("registry", func(t *testing.T) {
		r, err := servers.StartRegistry(t.Context(), serverDir(t))
		if err != nil {
			t.Fatal(err)
		}
		defer r.Stop()
		copyImage(t, "--dest-tls-verify=false", "docker://"+r.Addr+"/three:v1")
		copyImage(t, "--dest-tls-verify=false", "--dest-compress-format=zstd", "--format=oci", "docker://"+r.Addr+"/three:zstd")
		for _, tag := range []string{"v1", "zstd"} {
			got, err := openStore(t).Pull(t.Context(), parse(t, "docker+http://"+r.Addr+"/three:"+tag), anonymous())
			check(t, got, err)
		}
		o := anonymous()
		o.PlainHTTP = []string{r.Addr}
		o.DockerHost = "unix:///nonexistent"
		got, err := openStore(t).Pull(t.Context(), parse(t, r.Addr+"/three:v1"), o)
		check(t, got, err)
		_, err = openStore(t).Pull(t.Context(), parse(t, "docker://"+r.Addr+"/three:v1"), anonymous())
		wantError(t, err, nil, "does not speak TLS")
		_, err = openStore(t).Pull(t.Context(), parse(t, "docker+http://"+r.Addr+"/three:v2"), anonymous())
		wantError(t, err, ErrNotFound)
	})
	t.Run("dockerd", func(t *testing.T) {
		d, err := servers.StartDockerd(t.Context(), serverDir(t))
		if err != nil {
			t.Fatal(err)
		}
		defer d.Stop()
		run(t, d.Docker(t.Context(), "load", "--quiet", "--input", archive))
		o := anonymous()
		o.DockerHost = d.Host
		s := openStore(t)
		for _, ref := range []string{"docker-daemon:test/three", "test/three"} {
			got, err := s.Pull(t.Context(), parse(t, ref), o)
			check(t, got, err)
			if got.Ref != "docker.io/test/three:latest" {
				t.Errorf("got name %s", got.Ref)
			}
		}
		id := strings.TrimSpace(run(t, d.Docker(t.Context(), "images", "-q", "--no-trunc")))
		got, err := s.Pull(t.Context(), parse(t, "docker-daemon:"+id), o)
		check(t, got, err)
		if got.ConfigDigest.String() != id {
			t.Errorf("got ID %s, docker says %s", got.ConfigDigest, id)
		}
		_, err = s.Pull(t.Context(), parse(t, "docker-daemon:nothing/here"), o)
		wantError(t, err, ErrNotFound, "No such image")

		// What docker save writes.
		saved := filepath.Join(t.TempDir(), "saved.tar")
		run(t, d.Docker(t.Context(), "save", "--output", saved, "test/three"))
		got, err = openStore(t).Pull(t.Context(), parse(t, "docker-archive:"+saved), anonymous())
		check(t, got, err)

		// A new image under the same name is noticed.
		run(t, d.Docker(t.Context(), "import", "--change", "CMD /other", mustOpen(t, archive).Name(), "test/three"))
		got, err = s.Pull(t.Context(), parse(t, "test/three"), o)
		if err != nil || len(got.Layers) != 1 {
			t.Errorf("after a new import: got %v, %v", got, err)
		}
	})
	t.Run("containerd", func(t *testing.T) {
		c, err := servers.StartContainerd(t.Context(), serverDir(t))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Stop()
		run(t, c.Ctr(t.Context(), "images", "import", "--no-unpack", archive))
		o := anonymous()
		o.Containerd = c.Socket
		s := openStore(t)
		got, err := s.Pull(t.Context(), parse(t, "containerd:docker.io/test/three"), o)
		check(t, got, err)
		_, err = s.Pull(t.Context(), parse(t, "containerd:nothing/here"), o)
		wantError(t, err, ErrNotFound, "namespace default")
		o.Namespace = "other"
		_, err = s.Pull(t.Context(), parse(t, "containerd:test/three"), o)
		wantError(t, err, ErrNotFound, "namespace other")
		o.Containerd = filepath.Join(t.TempDir(), "none")
		_, err = s.Pull(t.Context(), parse(t, "containerd:test/three"), o)
		wantError(t, err, nil, "speak to containerd at "+o.Containerd)
	})
}
