package main

import (
	"context"
	"fmt"

	"github.com/kcradle/kcradle/image"
)

func pullImage(ctx context.Context, a *app, store *image.Store, ref image.Reference, quiet bool) (*image.Image, error) {
	return nil, fmt.Errorf("pull %s: not yet", ref)
}
