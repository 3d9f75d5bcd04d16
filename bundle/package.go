package bundle

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// PackageVersion is the version of a machine package's manifest.
//
// History:
//   - 1: first version.
const PackageVersion = 1

const (
	manifestFile = "manifest.json"
	kernelFile   = "vmlinux"
	initrdFile   = "initrd.cpio"
)

// Manifest is manifest.json of a machine package.
type Manifest struct {
	Version int       `json:"version"` // required; see PackageVersion
	Name    string    `json:"name"`    // "default"
	Built   time.Time `json:"built,omitzero"`
	Commit  string    `json:"commit,omitempty"`  // of the sources
	Release string    `json:"release,omitempty"` // kcradle's version
	Linux   string    `json:"linux,omitempty"`   // the kernel's version
	// CommandLine is what this kernel is booted with on every engine, before what the machine adds.
	CommandLine string `json:"command_line"`
	Kernel      File   `json:"kernel"`
	Initrd      File   `json:"initrd"`
}

// File is one file of a machine package.
type File struct {
	Digest string `json:"digest"` // "sha256:…"
	Size   int64  `json:"size"`
}

// Package is an installed machine package.
type Package struct {
	Dir      string
	Manifest Manifest
}

// OpenPackage reads a machine package and checks that its files have the promised sizes.
func OpenPackage(dir string) (*Package, error) {
	raw, err := readBounded(filepath.Join(dir, manifestFile), maxMetaBytes)
	if err != nil {
		return nil, fmt.Errorf("open machine package: %w", err)
	}
	p := &Package{Dir: dir}
	if err := decodeVersioned(raw, &p.Manifest, PackageVersion); err != nil {
		return nil, fmt.Errorf("open machine package: %s: %w", filepath.Join(dir, manifestFile), err)
	}
	for path, f := range map[string]File{p.KernelPath(): p.Manifest.Kernel, p.InitrdPath(): p.Manifest.Initrd} {
		fi, err := os.Stat(path)
		if err != nil {
			return nil, fmt.Errorf("open machine package: %w", err)
		}
		if fi.Size() != f.Size {
			return nil, fmt.Errorf("open machine package: %s has %d bytes, its manifest says %d (make build)", path, fi.Size(), f.Size)
		}
	}
	return p, nil
}

// KernelPath is the uncompressed kernel.
func (p *Package) KernelPath() string { return filepath.Join(p.Dir, kernelFile) }

// InitrdPath is the archive with /init.
func (p *Package) InitrdPath() string { return filepath.Join(p.Dir, initrdFile) }

// WriteManifest writes manifest.json beside the files it speaks of.
func WriteManifest(dir string, m Manifest) error {
	m.Version = PackageVersion
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	if err := writeAtomic(filepath.Join(dir, manifestFile), append(raw, '\n'), 0o644); err != nil {
		return fmt.Errorf("write manifest: %w", err)
	}
	return nil
}
