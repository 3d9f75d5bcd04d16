package layer

import (
	"io"
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkConvert converts the tar named by LAYER_TAR: LAYER_TAR=root.tar go test -bench Convert ./image/layer
// With LAYER_SKELETON=no without its skeleton.
func BenchmarkConvert(b *testing.B) {
	name := os.Getenv("LAYER_TAR")
	if name == "" {
		b.Skip("needs a tar (LAYER_TAR=FILE)")
	}
	dir := b.TempDir()
	for b.Loop() {
		in, err := os.Open(name)
		if err != nil {
			b.Fatal(err)
		}
		out, err := os.Create(filepath.Join(dir, "out.erofs"))
		if err != nil {
			b.Fatal(err)
		}
		o := Options{SpoolDir: dir}
		skeleton, err := os.Create(filepath.Join(dir, "out.skeleton"))
		if err != nil {
			b.Fatal(err)
		}
		if os.Getenv("LAYER_SKELETON") != "no" {
			o.Skeleton = skeleton
		}
		r, err := Convert(b.Context(), in, out, o)
		if err != nil {
			b.Fatal(err)
		}
		if fi, err := skeleton.Stat(); err == nil {
			b.ReportMetric(float64(fi.Size()), "skeleton-bytes")
		}
		skeleton.Close()
		in.Close()
		out.Close()
		b.SetBytes(r.TarSize)
		b.ReportMetric(float64(r.Size)/float64(r.TarSize), "size-ratio")
		if keep := os.Getenv("LAYER_OUT"); keep != "" {
			if err := os.Rename(out.Name(), keep); err != nil {
				b.Fatal(err)
			}
		}
	}
}

// BenchmarkAssemble puts that tar together again.
func BenchmarkAssemble(b *testing.B) {
	name := os.Getenv("LAYER_TAR")
	if name == "" {
		b.Skip("needs a tar (LAYER_TAR=FILE)")
	}
	dir := b.TempDir()
	in, err := os.Open(name)
	if err != nil {
		b.Fatal(err)
	}
	defer in.Close()
	var files [2]*os.File
	for i, name := range []string{"image", "skeleton"} {
		if files[i], err = os.Create(filepath.Join(dir, name)); err != nil {
			b.Fatal(err)
		}
		defer files[i].Close()
	}
	r, err := Convert(b.Context(), in, files[0], Options{SpoolDir: dir, Skeleton: files[1]})
	if err != nil {
		b.Fatal(err)
	}
	fi, err := files[1].Stat()
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(r.TarSize)
	for b.Loop() {
		s, err := OpenSkeleton(files[1], fi.Size())
		if err != nil {
			b.Fatal(err)
		}
		t, err := s.Tar(files[0], r.DiffID)
		if err != nil {
			b.Fatal(err)
		}
		if n, err := io.Copy(io.Discard, t); err != nil || n != r.TarSize {
			b.Fatal(n, err)
		}
		if err := t.Close(); err != nil {
			b.Fatal(err)
		}
	}
}
