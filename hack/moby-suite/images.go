package main

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/kcradle/kcradle/test/images"
)

// suiteImages are those that the suite takes for granted, each with the recipe of ours that stands in for it. The suite
// looks for the first six before it runs anything, and would ask Docker's registry for what it does not find; a test of
// package container wants the seventh.
var suiteImages = []struct{ ref, recipe string }{
	{"busybox:latest", "busybox-bin"},
	{"busybox:glibc", "busybox-bin"},
	{"hello-world:frozen", "hello"},
	{"hello-world:amd64", "hello"},
	{"hello-world:arm64", "hello-arm64"},
	{"debian:bookworm-slim", "debian"},
	{"arm32v7/hello-world:latest", "hello-arm"},
}

// archive is an image as POST /images/load takes it.
type archive struct{ ref, path string }

// archivesIn says where the archives are that prepareImages made in dir.
func archivesIn(dir string) []archive {
	var out []archive
	for _, img := range suiteImages {
		out = append(out, archive{img.ref, filepath.Join(dir, strings.NewReplacer("/", "-", ":", "-").Replace(img.ref)+".tar")})
	}
	return out
}

// prepareImages makes an archive of each image in dir. Images are built in the cache at cacheDir, which may be empty.
func prepareImages(ctx context.Context, cacheDir, dir string, log io.Writer) error {
	cache, err := images.Open(cacheDir, log)
	if err != nil {
		return err
	}
	for i, a := range archivesIn(dir) {
		b, err := cache.Build(ctx, suiteImages[i].recipe)
		if err != nil {
			return err
		}
		img, err := b.Image()
		if err != nil {
			return err
		}
		if img, err = dated(img, i); err != nil {
			return fmt.Errorf("make %s: %w", a.ref, err)
		}
		if err := images.Save(a.path, a.ref, img); err != nil {
			return fmt.Errorf("save %s: %w", a.ref, err)
		}
	}
	return nil
}

// dated returns img as if it were made n seconds later, so that two names of one recipe are two images, as those of the
// registry are: what a server does with an image of two names is another matter.
func dated(img v1.Image, n int) (v1.Image, error) {
	cf, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	cf = cf.DeepCopy()
	cf.Created.Time = cf.Created.Add(time.Duration(n) * time.Second)
	return mutate.ConfigFile(img, cf)
}
