// Package initrd writes the guest's initial file system: one static program as /init, and the one node it cannot
// start without. The bytes depend on that program alone, so that two builds of the same source can be compared
// and an attested machine can be measured.
//
//	err := initrd.Write(ctx, "build/pkg-default/initrd.cpio", "build/init")
package initrd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// MaxInit is the largest /init accepted. The initrd is copied into every machine and measured in attested ones; a
// program that outgrows this has pulled in a library it should not have.
const MaxInit = 12_000_000

// ErrTooLarge says that the program given as /init is larger than MaxInit.
var ErrTooLarge = errors.New("initrd: /init is too large")

// entries is what an initrd holds beside /init. The kernel's own built-in archive already brings /dev and
// /dev/console; /dev/null is missing there, and Go's runtime opens it when a machine without console starts /init
// with closed standard streams.
var entries = []Header{
	{Name: "dev", Mode: ModeDir | 0o755},
	{Name: "dev/null", Mode: ModeChar | 0o666, Major: 1, Minor: 3},
}

// Build writes the initrd whose /init is the size bytes that init delivers. It fails when init delivers more or
// fewer, or when size is above MaxInit.
func Build(w io.Writer, init io.Reader, size int64) error {
	if size > MaxInit {
		return fmt.Errorf("%w: %d bytes, at most %d; build it stripped (-trimpath -ldflags=-s)", ErrTooLarge, size, MaxInit)
	}
	if size <= 0 {
		return fmt.Errorf("initrd: /init has %d bytes", size)
	}
	a := NewWriter(w)
	for _, h := range entries {
		if err := a.Add(h, nil); err != nil {
			return err
		}
	}
	if err := a.Add(Header{Name: "init", Mode: ModeFile | 0o755, Size: size}, init); err != nil {
		return err
	}
	return a.Close()
}

// Write builds the initrd of the program at path init and puts it at dst, whole or not at all.
func Write(ctx context.Context, dst, init string) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	src, err := os.Open(init)
	if err != nil {
		return fmt.Errorf("open /init of the initrd: %w", err)
	}
	defer src.Close()
	info, err := src.Stat()
	if err != nil {
		return fmt.Errorf("stat /init of the initrd: %w", err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("initrd: %s is not a regular file", init)
	}
	tmp, err := os.CreateTemp(filepath.Dir(dst), ".initrd-*")
	if err != nil {
		return fmt.Errorf("write initrd %s: %w", dst, err)
	}
	defer func() {
		if err != nil {
			tmp.Close() // fails when it is closed already, which is fine here
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()
	if err := Build(tmp, src, info.Size()); err != nil {
		return fmt.Errorf("write initrd %s: %w", dst, err)
	}
	if err := tmp.Chmod(0o644); err != nil {
		return fmt.Errorf("write initrd %s: %w", dst, err)
	}
	if err := tmp.Sync(); err != nil {
		return fmt.Errorf("write initrd %s: %w", dst, err)
	}
	if err := tmp.Close(); err != nil {
		return fmt.Errorf("write initrd %s: %w", dst, err)
	}
	if err := os.Rename(tmp.Name(), dst); err != nil {
		return fmt.Errorf("write initrd %s: %w", dst, err)
	}
	return nil
}
