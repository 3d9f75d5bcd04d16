package layer

import (
	"os"
	"path/filepath"
	"testing"
)

// BenchmarkConvert converts the tar named by LAYER_TAR: LAYER_TAR=root.tar go test -bench Convert ./image/layer
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
		r, err := Convert(b.Context(), in, out, Options{SpoolDir: dir})
		if err != nil {
			b.Fatal(err)
		}
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
