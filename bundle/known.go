package bundle

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

const knownDir = "bundles"

// Remember notes in the state directory root that there is a bundle at b.Dir, so that [Known] finds it.
func (b *Bundle) Remember(root string) error {
	link := knownLink(root, b.Dir)
	if target, err := os.Readlink(link); err == nil && target == b.Dir {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(link), 0o700); err != nil {
		return fmt.Errorf("remember bundle: %w", err)
	}
	if err := os.Symlink(b.Dir, link); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("remember bundle: %w", err)
	}
	return nil
}

// Known returns the bundles noted in the state directory that are still there, sorted, and forgets the others.
func Known(root string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(root, knownDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list bundles: %w", err)
	}
	var out []string
	for _, e := range entries {
		link := filepath.Join(root, knownDir, e.Name())
		dir, err := os.Readlink(link)
		if err != nil {
			continue
		}
		if _, err := os.Stat(filepath.Join(dir, metaFile)); errors.Is(err, fs.ErrNotExist) {
			os.Remove(link) // best effort: it is looked at again next time
			continue
		}
		out = append(out, dir)
	}
	slices.Sort(out)
	return out, nil
}

func knownLink(root, dir string) string {
	sum := sha256.Sum256([]byte(dir))
	return filepath.Join(root, knownDir, hex.EncodeToString(sum[:8]))
}

// maxSocketPath is what the kernel takes for the name of a Unix socket.
const maxSocketPath = 107

// SocketPath is a path of a socket in the run directory that clients can connect to: where the bundle's own path is too
// long for a socket's name, the one by way of the state directory (see [Bundle.Remember]).
func (b *Bundle) SocketPath(root, name string) string {
	if p := filepath.Join(b.RunDir(), name); len(p) <= maxSocketPath {
		return p
	}
	return filepath.Join(knownLink(root, b.Dir), runDir, name)
}
