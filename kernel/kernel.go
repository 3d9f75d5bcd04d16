// Package kernel holds the guest's kernel: its configuration with a reason for every option, its command line with a
// reason for every word, the script that builds it, and the built artefact with its provenance.
//
//	err := kernel.Unpack(ctx, os.DirFS("kernel"), "build/pkg-default/vmlinux")
//	cmdline, err := kernel.CommandLine(kernel.Params{})
//
// kernel/build.sh makes the artefact again, byte for byte; docs/kernel.md tells how and why.
package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// Files of the artefact, in the directory of this package.
const (
	ArtifactFile   = "vmlinux.zst"     // the kernel, compressed
	DigestFile     = "vmlinux.sha256"  // the digest of the uncompressed kernel, as sha256sum(1) prints it
	ProvenanceFile = "provenance.json" // what it was made of
	ConfigFile     = "vmlinux.config"  // the complete configuration it was built with
)

// maxSize bounds what is unpacked: a damaged or foreign archive must not fill the disk.
const maxSize = 128 << 20

// ErrDigest says that the artefact is not the kernel that its digest file names.
var ErrDigest = errors.New("kernel: digest differs")

// Provenance says what the artefact was made of.
type Provenance struct {
	Version      int    `json:"version"` // of this document: 1
	Package      string `json:"package"` // the Debian package the source is from
	Release      string `json:"release"` // its version
	TarballSHA   string `json:"tarballSha256"`
	Kernel       string `json:"kernel"`       // uname -r
	Inputs       string `json:"inputsSha256"` // see InputsDigest
	Config       string `json:"configSha256"` // of ConfigFile
	Compiler     string `json:"compiler"`
	Linker       string `json:"linker"`
	Vmlinux      string `json:"vmlinuxSha256"`
	VmlinuxBytes int64  `json:"vmlinuxBytes"`
	ZstdBytes    int64  `json:"zstdBytes"`
}

// ReadProvenance reads the provenance of the artefact in dir.
func ReadProvenance(dir fs.FS) (Provenance, error) {
	b, err := fs.ReadFile(dir, ProvenanceFile)
	if err != nil {
		return Provenance{}, fmt.Errorf("read kernel provenance: %w", err)
	}
	var p Provenance
	d := json.NewDecoder(strings.NewReader(string(b)))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		return Provenance{}, fmt.Errorf("read kernel provenance: %w", err)
	}
	if p.Version != 1 {
		return Provenance{}, fmt.Errorf("read kernel provenance: version %d, this program knows 1", p.Version)
	}
	return p, nil
}

// Digest returns the SHA-256 that the uncompressed kernel of dir must have, in hex.
func Digest(dir fs.FS) (string, error) {
	b, err := fs.ReadFile(dir, DigestFile)
	if err != nil {
		return "", fmt.Errorf("read kernel digest: %w", err)
	}
	sum, name, ok := strings.Cut(strings.TrimSpace(string(b)), "  ")
	if !ok || name != "vmlinux" || checkDigest("sha256:"+sum) != nil {
		return "", fmt.Errorf("read kernel digest: %s is not a line of sha256sum(1) for vmlinux", DigestFile)
	}
	return sum, nil
}

// InputsDigest is the SHA-256 over what the artefact is made of: the lines of VERSION, then all options of
// config/*.config sorted, comments left out of both. The same digest in the provenance says that the artefact belongs
// to this configuration. build.sh computes the same.
func InputsDigest(dir fs.FS) (string, error) {
	version, err := fs.ReadFile(dir, "VERSION")
	if err != nil {
		return "", fmt.Errorf("digest kernel inputs: %w", err)
	}
	options, err := Options(dir)
	if err != nil {
		return "", err
	}
	sum := sha256.New()
	for line := range strings.Lines(string(version)) {
		if line, _, _ = strings.Cut(line, "#"); strings.TrimSpace(line) != "" {
			fmt.Fprintln(sum, strings.TrimSpace(line))
		}
	}
	lines := make([]string, len(options))
	for i, o := range options {
		lines[i] = o.Name + "=" + o.Value
	}
	slices.Sort(lines)
	for _, line := range lines {
		fmt.Fprintln(sum, line)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

// Option is one line of a fragment: what is asked of the configuration, and why.
type Option struct {
	Name   string // with CONFIG_
	Value  string // y, n, a number or a quoted string
	Reason string
	File   string // the fragment
}

var optionLine = regexp.MustCompile(`^(CONFIG_[A-Za-z0-9_]+)=(y|n|[0-9]+|"[^"#]*")[ \t]+# (\S.*)$`)

// Options returns the lines of the fragments config/*.config in order. A line without a reason, a line that is no
// option, or an option named twice is an error.
func Options(dir fs.FS) ([]Option, error) {
	files, err := fs.Glob(dir, "config/*.config") // sorted
	if err != nil {
		return nil, err
	}
	var out []Option
	seen := map[string]string{}
	for _, file := range files {
		b, err := fs.ReadFile(dir, file)
		if err != nil {
			return nil, fmt.Errorf("read kernel options: %w", err)
		}
		n := 0
		for line := range strings.Lines(string(b)) {
			n++
			line = strings.TrimRight(line, "\n")
			if line == "" || strings.HasPrefix(line, "#") {
				continue
			}
			m := optionLine.FindStringSubmatch(line)
			if m == nil {
				return nil, fmt.Errorf("%s:%d: want CONFIG_NAME=VALUE # reason, got %q", file, n, line)
			}
			if first, twice := seen[m[1]]; twice {
				return nil, fmt.Errorf("%s:%d: %s is already in %s", file, n, m[1], first)
			}
			seen[m[1]] = file
			out = append(out, Option{Name: m[1], Value: m[2], Reason: m[3], File: file})
		}
	}
	if len(out) == 0 {
		return nil, errors.New("read kernel options: no fragments in config/")
	}
	return out, nil
}

// Unpack writes the uncompressed kernel of dir to dst, whole or not at all: the digest is computed while writing and
// nothing gets the name dst that does not have it.
func Unpack(ctx context.Context, dir fs.FS, dst string) (err error) {
	want, err := Digest(dir)
	if err != nil {
		return err
	}
	src, err := dir.Open(ArtifactFile)
	if err != nil {
		return fmt.Errorf("open kernel: %w", err)
	}
	defer src.Close()
	z, err := zstd.NewReader(src, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxSize))
	if err != nil {
		return fmt.Errorf("unpack kernel: %w", err)
	}
	defer z.Close()
	tmp, err := os.CreateTemp(filepath.Dir(dst), ".vmlinux-*")
	if err != nil {
		return fmt.Errorf("unpack kernel: %w", err)
	}
	defer func() {
		if err != nil {
			tmp.Close() // fails when it is closed already, which is fine here
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()
	sum := sha256.New()
	n, err := io.Copy(io.MultiWriter(tmp, sum), &contextReader{ctx, io.LimitReader(z, maxSize+1)})
	if err != nil {
		return fmt.Errorf("unpack kernel to %s: %w", dst, err)
	}
	if n > maxSize {
		return fmt.Errorf("unpack kernel: more than %d bytes", maxSize)
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != want {
		return fmt.Errorf("%w: %s unpacks to sha256 %s, %s says %s", ErrDigest, ArtifactFile, got, DigestFile, want)
	}
	if err := tmp.Chmod(0o644); err != nil {
		return fmt.Errorf("unpack kernel: %w", err)
	}
	if err := tmp.Sync(); err != nil {
		return fmt.Errorf("unpack kernel: %w", err)
	}
	if err := tmp.Close(); err != nil {
		return fmt.Errorf("unpack kernel: %w", err)
	}
	if err := os.Rename(tmp.Name(), dst); err != nil {
		return fmt.Errorf("unpack kernel: %w", err)
	}
	return nil
}

// contextReader ends a copy between two reads once its context is done.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
