package main

import (
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/initrd"
	"github.com/kcradle/kcradle/internal/undo"
	"github.com/kcradle/kcradle/kernel"
)

type packageOptions struct {
	Dir    string
	Kernel string // directory of the kernel package
	Init   string
}

func newPackage(a *app) *cobra.Command {
	var o packageOptions
	cmd := &cobra.Command{
		Use:   "package [flags] DIR",
		Short: "Make a machine package: kernel, initrd and manifest",
		Long: `package writes what a machine boots from: the unpacked kernel, the initrd with the given /init, and a manifest with
their digests. A bundle's cradle link names the machine package to boot.`,
		Example: "  kcradle package --kernel kernel --init build/init build/pkg-default",
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Dir = args[0]
			return makePackage(cmd.Context(), a, o)
		},
	}
	cmd.Flags().StringVar(&o.Kernel, "kernel", "kernel", "`directory` with the built kernel")
	cmd.Flags().StringVar(&o.Init, "init", "build/init", "the guest's static /init")
	return cmd
}

// makePackage writes a machine package whole or not at all.
func makePackage(ctx context.Context, a *app, o packageOptions) error {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), "."+filepath.Base(dir)+".*")
	if err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run()
	u.Push(func() { os.RemoveAll(tmp) })
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	if err := checkStatic(o.Init); err != nil {
		return err
	}
	b := buildInfo()
	m := bundle.Manifest{Name: "default", Commit: b.Commit, Release: b.Version}
	if t, err := time.Parse(time.RFC3339, b.Time); err == nil {
		m.Built = t // of the commit, so that the same commit makes the same package
	}
	if m.CommandLine, err = kernel.CommandLine(kernel.Params{}); err != nil {
		return err
	}
	tree := os.DirFS(o.Kernel)
	provenance, err := kernel.ReadProvenance(tree)
	if err != nil {
		return err
	}
	m.Linux = provenance.Kernel
	p := bundle.Package{Dir: tmp}
	if err := kernel.Unpack(ctx, tree, p.KernelPath()); err != nil {
		return err
	}
	if err := initrd.Write(ctx, p.InitrdPath(), o.Init); err != nil {
		return err
	}
	if m.Kernel, err = describe(p.KernelPath()); err != nil {
		return err
	}
	if m.Initrd, err = describe(p.InitrdPath()); err != nil {
		return err
	}
	if err := bundle.WriteManifest(tmp, m); err != nil {
		return err
	}
	if err := os.Rename(tmp, dir); err != nil { // something is there
		old := tmp + ".old"
		if err := os.Rename(dir, old); err != nil {
			return err
		}
		u.Push(func() { os.RemoveAll(old) })
		if err := os.Rename(tmp, dir); err != nil {
			return err
		}
	}
	_, err = fmt.Fprintln(a.Stdout, dir)
	return err
}

// checkStatic refuses an /init that wants a dynamic linker: there is nothing beside it, and the kernel would panic.
func checkStatic(path string) error {
	f, err := elf.Open(path)
	if err != nil {
		return fmt.Errorf("init: %w", err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return fmt.Errorf("init: %s is dynamically linked (build it with CGO_ENABLED=0)", path)
		}
	}
	return nil
}

func describe(path string) (bundle.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return bundle.File{}, err
	}
	defer f.Close()
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err != nil {
		return bundle.File{}, err
	}
	return bundle.File{Digest: "sha256:" + hex.EncodeToString(h.Sum(nil)), Size: n}, nil
}
