package main

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/image"
)

func newPrune(a *app) *cobra.Command {
	var o image.PruneOptions
	cmd := &cobra.Command{
		Use:   "prune [flags]",
		Short: "Remove what no image and no bundle needs from the store",
		Long: `prune removes layers that belong to no image and no bundle, and what was interrupted: downloads older than a week, with
--all of any age. With --all it removes images that no bundle uses, too. What a pull works on at the moment stays.`,
		Example: `  kcradle prune
  kcradle prune --all`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return prune(cmd.Context(), a, o)
		},
	}
	cmd.Flags().BoolVarP(&o.All, "all", "a", false, "images that no bundle uses, and interrupted downloads of any age")
	return cmd
}

func prune(ctx context.Context, a *app, o image.PruneOptions) error {
	store, err := image.Open(a.Root, a.Log)
	if err != nil {
		return err
	}
	o.Ingest = o.All
	removed, err := store.Prune(ctx, o)
	if err != nil {
		return err
	}
	return printRemoved(a.Stdout, removed)
}
