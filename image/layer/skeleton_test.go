package layer

import (
	"archive/tar"
	"bytes"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/kcradle/kcradle/internal/need"
)

// assemble puts a tar together. The helper convert does it with every tar of this package's tests.
func assemble(skeleton []byte, image io.ReaderAt, id digest.Digest) ([]byte, error) {
	s, err := OpenSkeleton(bytes.NewReader(skeleton), int64(len(skeleton)))
	if err != nil {
		return nil, err
	}
	t, err := s.Tar(image, id)
	if err != nil {
		return nil, err
	}
	defer t.Close()
	return io.ReadAll(t)
}

// split converts a tar and returns image, skeleton and diffID.
func split(t testing.TB, b []byte) (image, skeleton []byte, id digest.Digest) {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "layer")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var s bytes.Buffer
	r, err := Convert(t.Context(), bytes.NewReader(b), f, Options{SpoolDir: t.TempDir(), Skeleton: &s})
	if err != nil {
		t.Fatal(err)
	}
	if image, err = os.ReadFile(f.Name()); err != nil {
		t.Fatal(err)
	}
	return image, s.Bytes(), r.DiffID
}

// TestAssemble puts together tars whose files have no place of their own in the tree, or another than their name says.
func TestAssemble(t *testing.T) {
	noise := func(n int, seed byte) string {
		b := make([]byte, n)
		for i := range b {
			b[i] = byte(i*i>>3) ^ byte(i>>7) ^ seed
		}
		return string(b)
	}
	end := tarOf(t, file("a", "x", 0o644))
	for name, b := range map[string][]byte{
		"one of each kind": everything(t),
		"a file twice": tarOf(t, file("a", noise(10_000, 1), 0o644), file("a", noise(9_000, 2), 0o644), file("a", noise(70_000, 3), 0o644),
			file("a", "last", 0o644)),
		"a directory replaced": tarOf(t, file("d/a", noise(5000, 1), 0o644), file("d/b", noise(100, 2), 0o644), link(tar.TypeSymlink, "d", "e"),
			file("d/a", noise(300, 3), 0o644)),
		"through symbolic links": tarOf(t, dir("usr/lib", 0o755), link(tar.TypeSymlink, "lib", "usr/lib"), file("lib/x", noise(4321, 1), 0o755),
			link(tar.TypeLink, "usr/y", "lib/x"), file("usr/lib/x", "other", 0o644)),
		"whiteouts with content": tarOf(t, file(".wh.a", noise(6000, 1), 0o644), file("d/.wh..wh..opq", "text", 0o644)),
		"more behind the end":    append(bytes.Clone(end), noise(12_345, 9)...),
		"no end":                 end[:1024],
		"nothing":                nil,
		"odd names":              tarOf(t, file("./a//b", "1", 0o644), file("/c", "2", 0o644), file("\xff\xfe", noise(4099, 1), 0o644)),
		"holes": tarOf(t, file("h", strings.Repeat("\x00", 200_000)+noise(70_000, 1)+strings.Repeat("\x00", 150_000), 0o644),
			file("z", strings.Repeat("\x00", 1<<20), 0o644), file("z", "not a hole", 0o644)),
		"replaced after a hole": tarOf(t, file("h", noise(70_000, 1)+strings.Repeat("\x00", 200_000)+"end", 0o644), dir("h", 0o755)),
	} {
		t.Run(name, func(t *testing.T) {
			image, skeleton, id := split(t, b)
			got, err := assemble(skeleton, bytes.NewReader(image), id)
			if err != nil || !bytes.Equal(got, b) {
				t.Errorf("got %d bytes, %v, want %d", len(got), err, len(b))
			}
		})
	}
}

// TestAssembleSparse puts together what GNU tar makes of a file with holes, in each of its formats.
func TestAssembleSparse(t *testing.T) {
	program := need.Command(t, "tar", "apt-get install tar")
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, at := range []int64{0, 5 << 20, 9<<20 + 7} {
		if _, err := f.WriteAt([]byte(strings.Repeat("data", 3000)), at); err != nil {
			t.Fatal(err)
		}
	}
	for _, format := range [][]string{{"--format=gnu"}, {"--format=pax", "--sparse-version=0.0"}, {"--format=pax", "--sparse-version=0.1"}, {"--format=pax", "--sparse-version=1.0"}} {
		b, err := exec.Command(program, append(format, "--sparse", "-C", dir, "-cf", "-", "sparse")...).Output()
		if err != nil {
			t.Fatal(err)
		}
		if len(b) > 1<<20 {
			t.Errorf("%v: the tar has %d bytes: nothing is sparse here", format, len(b))
		}
		image, skeleton, id := split(t, b)
		if got, err := assemble(skeleton, bytes.NewReader(image), id); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%v: got %d bytes, %v, want %d", format, len(got), err, len(b))
		}
	}
}

// TestDamagedSkeleton damages each part in turn.
func TestDamagedSkeleton(t *testing.T) {
	b := everything(t)
	image, skeleton, id := split(t, b)
	check := func(what string, image, skeleton []byte) {
		t.Helper()
		if _, err := assemble(skeleton, bytes.NewReader(image), id); !errors.Is(err, ErrSkeleton) {
			t.Errorf("%s: got error %v, want %v", what, err, ErrSkeleton)
		}
	}
	refused := 0
	for at := 0; at < len(skeleton); at += 41 {
		bad := bytes.Clone(skeleton)
		bad[at] ^= 0x10
		// There are bits without a meaning in what zstd writes.
		switch got, err := assemble(bad, bytes.NewReader(image), id); {
		case errors.Is(err, ErrSkeleton):
			refused++
		case err != nil || !bytes.Equal(got, b):
			t.Errorf("byte %d of %d: got %d bytes, error %v", at, len(skeleton), len(got), err)
		}
	}
	if want := len(skeleton) / 41; refused < want-5 {
		t.Errorf("%d of %d damaged skeletons were refused", refused, want)
	}
	for _, n := range []int{0, 10, skeletonTrailer, len(skeleton) / 2, len(skeleton) - 1} {
		check("a short one", image, skeleton[:n])
	}
	i := bytes.Index(image, []byte("0123456789abcdef"))
	bad := bytes.Clone(image)
	bad[i]++
	check("another image", bad, skeleton)
	check("a short image", image[:len(image)/2], skeleton)
	newer := bytes.Clone(skeleton)
	newer[len(newer)-skeletonTrailer+7]++
	if _, err := assemble(newer, bytes.NewReader(image), id); !strings.Contains(err.Error(), "newer kcradle") {
		t.Errorf("a newer version: %v", err)
	}
}

func FuzzSkeleton(f *testing.F) {
	image, skeleton, id := split(f, tarOf(f, file("a", "content", 0o644), file("a", strings.Repeat("x", 5000), 0o644)))
	f.Add(skeleton)
	f.Add(skeleton[len(skeleton)-skeletonTrailer:])
	f.Fuzz(func(t *testing.T, b []byte) {
		// A right checksum, so that what stands behind it is looked at.
		if n := len(b); n >= skeletonTrailer {
			sum := crc32.Checksum(b[n-skeletonTrailer:n-4], crc32.MakeTable(crc32.Castagnoli))
			b = append(bytes.Clone(b[:n-4]), byte(sum), byte(sum>>8), byte(sum>>16), byte(sum>>24))
		}
		got, err := assemble(b, bytes.NewReader(image), id)
		if err == nil && digest.FromBytes(got) != id {
			t.Errorf("another tar was taken for the layer's: %d bytes", len(got))
		}
	})
}
