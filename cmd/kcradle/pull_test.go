package main

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"

	"github.com/kcradle/kcradle/image"
)

// plainLayer is an uncompressed layer whose diffID is its digest.
type plainLayer struct{ v1.Layer }

func (l plainLayer) DiffID() (v1.Hash, error) { return l.Digest() }

// saveImage writes an image of one layer as docker save would.
func saveImage(t *testing.T, ref, content string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "file", Mode: 0o644, Size: int64(len(content))}); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(w, content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	img, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: "amd64", RootFS: v1.RootFS{Type: "layers"}})
	if err != nil {
		t.Fatal(err)
	}
	if img, err = mutate.AppendLayers(img, plainLayer{static.NewLayer(b.Bytes(), types.DockerUncompressedLayer)}); err != nil {
		t.Fatal(err)
	}
	tag, err := name.NewTag(ref)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "image.tar")
	if err := tarball.WriteToFile(file, tag, img); err != nil {
		t.Fatal(err)
	}
	return file
}

// TestImageVerbs goes through the verbs on images as a user would.
func TestImageVerbs(t *testing.T) {
	root := t.TempDir()
	a := saveImage(t, "me/a:1", "content of a")
	b := saveImage(t, "me/b:1", "content of b")
	kcradle := func(stdin io.Reader, args ...string) (code int, stdout, stderr string) {
		var out, errs bytes.Buffer
		code = realMain(append([]string{"--root", root}, args...), stdin, &out, &errs)
		return code, out.String(), errs.String()
	}
	open := func(file string) io.Reader {
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	archive := open(b)
	for _, step := range []struct {
		name   string
		args   []string
		stdin  io.Reader
		code   int
		stdout []string
		stderr []string
	}{
		{name: "empty store", args: []string{"images"}, stdout: []string{"IMAGE"}},
		{name: "load a file", args: []string{"load", "-i", a}, stdout: []string{"Loaded image: me/a:1\n"}, stderr: []string{"Pull complete"}},
		{name: "load from stdin", args: []string{"load", "-q"}, stdin: archive, stdout: []string{"Loaded image: me/b:1\n"}},
		{name: "load what is no archive", args: []string{"load", "-i", "/proc/self/exe"}, code: 1, stderr: []string{"kcradle load: load: not a supported image"}},
		{name: "load what is not there", args: []string{"load", "-i", "/no/such"}, code: 1, stderr: []string{"no such file"}},
		{name: "list", args: []string{"images", "--digests"}, stdout: []string{"me/a:1", "me/b:1", "sha256:", "2 layers"}},
		{name: "list by format", args: []string{"images", "--format", "{{.Name}}={{.Shared}}"}, stdout: []string{"me/a:1=0\nme/b:1=0\n"}},
		{name: "list with a bad format", args: []string{"images", "--format", "{{.Nope"}, code: 1, stderr: []string{"--format", "--help"}},
		{name: "list one, verified", args: []string{"images", "--verify", "-q", "me/a:1"}},
		{name: "pull again", args: []string{"pull", "docker-archive:" + a + ":me/a:1"}, stdout: []string{"docker.io/me/a:1@sha256:"}, stderr: []string{"Already exists"}},
		{name: "pull quietly", args: []string{"pull", "-q", "docker-archive:" + a}},
		{name: "pull nonsense", args: []string{"pull", "NOT A NAME"}, code: 1, stderr: []string{"parse image reference", "--help"}},
		{name: "pull for another platform", args: []string{"pull", "--platform", "linux/arm64", "docker-archive:" + a}, code: 1, stderr: []string{"linux/amd64"}},
		{name: "pull with a bad size", args: []string{"pull", "--max-layer-size", "much", "docker-archive:" + a}, code: 1, stderr: []string{"--max-layer-size"}},
		{name: "pull too much", args: []string{"pull", "--max-layer-size", "100", "docker-archive:" + saveImage(t, "me/c:1", "c")}, code: 1, stderr: []string{"limit exceeded"}},
		{name: "rmi", args: []string{"rmi", "me/b:1"}, stdout: []string{"Untagged: me/b:1", "Deleted: sha256:", "reclaimed"}},
		{name: "rmi again", args: []string{"rmi", "me/b:1"}, code: 1, stderr: []string{"no such image"}},
		{name: "rmi again, forced", args: []string{"rmi", "-f", "me/b:1"}},
		{name: "prune", args: []string{"prune"}, stdout: []string{"Total reclaimed space: 0B"}},
		{name: "prune all", args: []string{"prune", "--all"}, stdout: []string{"Untagged: me/a:1", "Deleted: sha256:"}},
	} {
		t.Run(step.name, func(t *testing.T) {
			if step.stdin == nil {
				step.stdin = strings.NewReader("")
			}
			code, stdout, stderr := kcradle(step.stdin, step.args...)
			if code != step.code {
				t.Errorf("got code %d, want %d: %s", code, step.code, stderr)
			}
			for _, want := range step.stdout {
				if !strings.Contains(stdout, want) {
					t.Errorf("stdout: got %q, want %q in it", stdout, want)
				}
			}
			for _, want := range step.stderr {
				if !strings.Contains(stderr, want) {
					t.Errorf("stderr: got %q, want %q in it", stderr, want)
				}
			}
		})
	}
	_, out, _ := kcradle(nil, "images", "--json")
	var rows []imageRow
	if err := json.Unmarshal([]byte(out), &rows); err != nil || len(rows) != 0 {
		t.Errorf("the empty store as JSON: %q, %v", out, err)
	}
}

func TestLines(t *testing.T) {
	var b bytes.Buffer
	p := newProgress(&b, "debian:12", false)
	id := digest.FromString("layer")
	for _, e := range []image.Event{
		{Message: "pulling from docker://debian:12"},
		{Layer: id, Blob: id, State: image.Waiting},
		{Layer: id, Blob: id, State: image.Pulling, Current: 1, Total: 2_000_000},
		{Layer: id, Blob: id, State: image.Pulling, Current: 2, Total: 2_000_000},
		{Layer: id, Blob: id, State: image.Retrying, Message: "connection reset"},
		{Layer: id, Blob: id, State: image.Pulling, Current: 3, Total: 2_000_000},
		{Layer: id, Blob: id, State: image.Done},
	} {
		p.event(e)
	}
	p.close()
	s := shortID(id)
	want := "debian:12: pulling from docker://debian:12\n" + s + ": Waiting\n" + s + ": Pulling 2MB\n" + s + ": Retrying: connection reset\n" +
		s + ": Pulling 2MB\n" + s + ": Pull complete\n"
	if b.String() != want {
		t.Errorf("got:\n%s\nwant:\n%s", b.String(), want)
	}
}
