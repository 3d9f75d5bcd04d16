package images

import (
	"archive/tar"
	"bytes"
	"debug/elf"
	"errors"
	"io"
	"os"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/kcradle/kcradle/internal/need"
)

func TestHello(t *testing.T) {
	need.Long(t)
	need.File(t, busyboxPath, "hack/deps test")
	cache, err := Open(t.TempDir(), os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name    string
		machine elf.Machine
		want    v1.Platform
	}{
		{"hello", elf.EM_X86_64, v1.Platform{OS: "linux", Architecture: "amd64"}},
		{"hello-arm64", elf.EM_AARCH64, v1.Platform{OS: "linux", Architecture: "arm64"}},
		{"hello-arm", elf.EM_ARM, v1.Platform{OS: "linux", Architecture: "arm", Variant: "v7"}},
	} {
		b, err := cache.Build(t.Context(), tc.name)
		if err != nil {
			t.Fatal(err)
		}
		img, err := b.Image()
		if err != nil {
			t.Fatal(err)
		}
		cf, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if got := cf.Platform(); !got.Equals(tc.want) {
			t.Errorf("%s: got platform %v, want %v", tc.name, got, tc.want)
		}
		program := onlyFile(t, img)
		f, err := elf.NewFile(bytes.NewReader(program))
		if err != nil {
			t.Fatalf("%s: %v", tc.name, err)
		}
		if f.Machine != tc.machine {
			t.Errorf("%s: got a program for %v, want %v", tc.name, f.Machine, tc.machine)
		}
		if libs, err := f.ImportedLibraries(); len(libs) > 0 {
			t.Errorf("%s: got a program that wants %v (%v), want a static one", tc.name, libs, err)
		}
	}
}

// onlyFile returns the content of the one file in img.
func onlyFile(t *testing.T, img v1.Image) []byte {
	t.Helper()
	rc := mutate.Extract(img)
	defer rc.Close()
	tr := tar.NewReader(rc)
	h, err := tr.Next()
	if err != nil {
		t.Fatal(err)
	}
	if h.Name != "hello" || h.Mode != 0o755 {
		t.Errorf("got %s with mode %o, want hello with 755", h.Name, h.Mode)
	}
	b, err := io.ReadAll(tr)
	if err != nil {
		t.Fatal(err)
	}
	if h, err := tr.Next(); !errors.Is(err, io.EOF) {
		t.Errorf("after hello: got %v, %v, want the end", h, err)
	}
	return b
}
