package image

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseReference(t *testing.T) {
	wd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	d := "sha256:" + strings.Repeat("ab", 32)
	for _, test := range []struct {
		in        string
		transport Transport
		key       string // empty: refused
		path      string
	}{
		{in: "busybox", key: "docker.io/library/busybox:latest"},
		{in: "me/app:1.2", key: "docker.io/me/app:1.2"},
		{in: "localhost/app", key: "localhost/app:latest"},
		{in: "127.0.0.1:5000/app:x", key: "127.0.0.1:5000/app:x"},
		{in: "app:1@" + d, key: "docker.io/library/app@" + d},
		{in: "docker:20.10", key: "docker.io/library/docker:20.10"}, // an image called docker
		{in: "oci", key: "docker.io/library/oci:latest"},
		{in: "docker://busybox", transport: Registry, key: "docker.io/library/busybox:latest"},
		{in: "docker+http://h:1/a/b", transport: Registry, key: "h:1/a/b:latest"},
		{in: "docker-daemon:busybox:1", transport: DockerDaemon, key: "docker.io/library/busybox:1"},
		{in: "docker-daemon:" + d, transport: DockerDaemon, key: "docker-daemon:" + d},
		{in: "containerd:docker.io/library/x:1", transport: Containerd, key: "docker.io/library/x:1"},
		{in: "oci:/l", transport: OCILayout, key: "oci:/l", path: "/l"},
		{in: "oci:l:v1", transport: OCILayout, key: "oci:" + filepath.Join(wd, "l") + ":v1", path: filepath.Join(wd, "l")},
		{in: "oci-archive:/a.tar:x", transport: OCIArchive, key: "oci-archive:/a.tar:x", path: "/a.tar"},
		{in: "docker-archive:/a.tar", transport: DockerArchive, key: "docker-archive:/a.tar", path: "/a.tar"},
		{in: "docker-archive:/a.tar:x:1", transport: DockerArchive, key: "docker.io/library/x:1", path: "/a.tar"},
		{in: ""}, {in: "UPPER"}, {in: "a b"}, {in: "-x"}, {in: "x:"}, {in: "x@sha256:12"}, {in: "oci:"}, {in: "oci:/x:"},
		{in: "dir:/x"}, {in: "https://example.com/x"}, {in: "docker://"}, {in: "docker+http:x"}, {in: "docker-daemon:"},
		{in: "docker-archive:/x:UPPER"}, {in: "x\x00y"}, {in: "oci:/x\ny"}, {in: strings.Repeat("a", 70_000)},
	} {
		r, err := ParseReference(test.in)
		if (err == nil) != (test.key != "") {
			t.Errorf("%.50q: got error %v", test.in, err)
			continue
		}
		if err != nil {
			if len(err.Error()) > 600 {
				t.Errorf("%.50q: the error has %d bytes", test.in, len(err.Error()))
			}
			continue
		}
		if r.Transport() != test.transport || r.Key() != test.key || r.Path() != test.path || r.String() != test.in {
			t.Errorf("%q: got %q, key %q, path %q, want %q, %q, %q", test.in, r.Transport(), r.Key(), r.Path(), test.transport, test.key, test.path)
		}
	}
}

func FuzzParseReference(f *testing.F) {
	for _, s := range []string{"busybox", "docker://a/b:c", "oci:/x:y", "docker-archive:f:x:1", "docker-daemon:sha256:" + strings.Repeat("0", 64), "a@sha256:" + strings.Repeat("1", 64)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseReference(s)
		if err != nil {
			return
		}
		if r.Key() == "" || r.String() != s {
			t.Errorf("%q: key %q, text %q", s, r.Key(), r.String())
		}
		// The key of a name is a reference to the same image.
		if r.Name() != "" && r.Transport() != DockerArchive {
			again, err := ParseReference(r.Key())
			if err == nil && again.Transport() == Any && again.Key() != r.Key() {
				t.Errorf("%q: key %q is read as %q", s, r.Key(), again.Key())
			}
		}
	})
}
