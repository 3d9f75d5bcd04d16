//go:build unix

package certs

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
)

// TestFIFO has in the directory what would never be read to its end.
func TestFIFO(t *testing.T) {
	dir, o := t.TempDir(), kds.Chain(snp.LineTurin, snp.SignerVCEK)
	file := filepath.Join(dir, fileName(o))
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(file, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, Config{Dir: dir}).Fetch(t.Context(), o); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("got %v", err)
	}
	cache := open(t, Config{Dir: dir, Upstream: publish(t, newChip(t, snp.LineTurin, snp.SignerVCEK, 1))})
	if b, err := cache.Fetch(t.Context(), o); err != nil || len(b) == 0 {
		t.Errorf("it is not replaced: %d bytes, %v", len(b), err)
	}
}
