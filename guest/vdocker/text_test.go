package vdocker

import (
	"testing"
	"time"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/spec"
)

func TestImageNames(t *testing.T) {
	digest := "sha256:0123456789012345678901234567890123456789012345678901234567890123"
	id := "sha256:abcdef6789012345678901234567890123456789012345678901234567890123"
	img := func(ref string) spec.Image { return spec.Image{Ref: ref, Digest: digest, ConfigID: id} }
	for _, tt := range []struct {
		image spec.Image
		ref   string
		want  bool
	}{
		{img("nginx"), "nginx", true},
		{img("nginx"), "nginx:latest", true},
		{img("nginx"), "docker.io/library/nginx", true},
		{img("docker.io/library/nginx:1.27"), "nginx:1.27", true},
		{img("nginx:1.27"), "nginx", false},
		{img("docker://host:5000/a/b"), "host:5000/a/b:latest", true},
		{img("docker-daemon:tour:latest"), "tour", true},
		{img("nginx"), "nginx@" + digest, true},
		{img("nginx"), "nginx@" + id, false},
		{img("nginx"), id, true},
		{img("nginx"), "abcdef67", true},
		{img("nginx"), "sha256:abcdef67", true},
		{img("docker-archive:/tmp/x.tar"), "docker-archive:/tmp/x.tar", true},
		{img("docker-archive:/tmp/x.tar"), "x", false},
		{img("nginx"), "", false},
		{img("nginx"), "ngin", false},
	} {
		if got := imageIs(tt.image, tt.ref); got != tt.want {
			t.Errorf("%s is %s: got %t", tt.image.Ref, tt.ref, got)
		}
	}
	i := &podImage{Image: img("nginx"), refs: []string{"nginx", "docker-archive:x.tar", "host:1/y@" + digest}}
	tags, digests := i.names()
	if len(tags) != 1 || tags[0] != "nginx:latest" || len(digests) != 2 || digests[0] != "host:1/y@"+digest {
		t.Errorf("names: got %q %q", tags, digests)
	}
}

// Lines that come in pieces, and two streams in turn, get one prefix each.
func TestPrefixes(t *testing.T) {
	at := time.Date(2026, 5, 6, 7, 8, 9, 10, time.UTC)
	const stamp = "2026-05-06T07:08:09.000000010Z "
	p := prefixer{timestamps: true, details: true}
	for _, tt := range []struct {
		stream   byte
		in, want string
	}{
		{1, "a\nb", stamp + " a\n" + stamp + " b"},
		{2, "x", stamp + " x"},
		{1, "c\n", "c\n"},
		{2, "y\n\n", "y\n" + stamp + " \n"},
		{1, "", ""},
		{1, "d\n", stamp + " d\n"},
	} {
		if got := string(p.add(pod.Chunk{Stream: tt.stream, Time: at, Bytes: []byte(tt.in)})); got != tt.want {
			t.Errorf("%q: got %q, want %q", tt.in, got, tt.want)
		}
	}
}

func TestErrors(t *testing.T) {
	for _, tt := range []struct {
		name string
		err  error
		want int
	}{
		{"already", pod.ErrAlready, 304}, {"conflict", pod.ErrConflict, 409}, {"invalid", pod.ErrInvalid, 400},
		{"own status", dockerapi.NotFound("x"), 404}, {"anything", errOther{}, 500},
	} {
		if got := dockerapi.Status(failed(nil, tt.err)); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.name, got, tt.want)
		}
	}
	if failed(nil, nil) != nil {
		t.Error("no error became one")
	}
}

type errOther struct{}

func (errOther) Error() string { return "other" }
