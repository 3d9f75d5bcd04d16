package main

import (
	"context"
	"fmt"
	"io"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/image"
)

type rmiOptions struct {
	Force bool
	Words []string
}

func newRmi(a *app) *cobra.Command {
	var o rmiOptions
	cmd := &cobra.Command{
		Use:   "rmi [flags] IMAGE…",
		Short: "Remove images from the store",
		Long: `rmi removes images, by name or by the beginning of an ID, and the layers that nothing else needs. Layers that a bundle
uses stay until the bundle is removed, so bundles go on working.`,
		Example: `  kcradle rmi debian:12
  kcradle rmi -f 4f4fb700ef54`,
		Args:              cobra.MinimumNArgs(1),
		ValidArgsFunction: completeImages(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Words = args
			return rmi(cmd.Context(), a, o)
		},
	}
	cmd.Flags().BoolVarP(&o.Force, "force", "f", false, "all names of an ID; no complaint about images that are not there")
	return cmd
}

func rmi(ctx context.Context, a *app, o rmiOptions) error {
	store, err := image.Open(a.Root, a.Log)
	if err != nil {
		return err
	}
	var all []*image.Image
	for _, word := range o.Words {
		found, err := findImages(ctx, store, []string{word})
		if err != nil {
			if o.Force {
				continue
			}
			return err
		}
		if len(found) > 1 && !o.Force {
			return fmt.Errorf("%s has %d names; remove one of them by its name, or all with -f", word, len(found))
		}
		all = append(all, found...)
	}
	removed, err := store.Remove(ctx, unique(all)...)
	if err != nil {
		return err
	}
	return printRemoved(a.Stdout, removed)
}

func unique(images []*image.Image) []*image.Image {
	seen := map[string]bool{}
	var out []*image.Image
	for _, img := range images {
		if !seen[img.Ref] {
			seen[img.Ref] = true
			out = append(out, img)
		}
	}
	return out
}

// printRemoved says what was removed, in docker's words.
func printRemoved(w io.Writer, r image.Removed) error {
	for _, name := range r.Images {
		if _, err := fmt.Fprintf(w, "Untagged: %s\n", familiar(name)); err != nil {
			return err
		}
	}
	for _, id := range r.Layers {
		if _, err := fmt.Fprintf(w, "Deleted: %s\n", id); err != nil {
			return err
		}
	}
	_, err := fmt.Fprintf(w, "Total reclaimed space: %s\n", units.HumanSize(float64(r.Bytes)))
	return err
}
