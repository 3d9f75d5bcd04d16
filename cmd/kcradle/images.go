package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"text/tabwriter"
	"text/template"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/image"
)

type imagesOptions struct {
	JSON    bool
	Format  string
	Quiet   bool
	Digests bool
	Verify  bool
	Words   []string
}

func newImages(a *app) *cobra.Command {
	var o imagesOptions
	cmd := &cobra.Command{
		Use:   "images [flags] [IMAGE…]",
		Short: "List the images in the store",
		Long: `images lists the images in the store, or the given ones. SIZE is what an image's layers take on the disk, SHARED the
part of it that other images use, too. The last line counts every layer once.`,
		Example: `  kcradle images
  kcradle images --format '{{.Name}} {{.ID}}'
  kcradle images --verify debian:12`,
		ValidArgsFunction: completeImages(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Words = args
			return listImages(cmd.Context(), a, o)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.JSON, "json", false, "as JSON, one array")
	f.StringVar(&o.Format, "format", "", "a Go `template` for each image, with the fields of --json")
	f.BoolVarP(&o.Quiet, "quiet", "q", false, "only the image IDs")
	f.BoolVar(&o.Digests, "digests", false, "the digests of the manifests, too")
	f.BoolVar(&o.Verify, "verify", false, "read every layer of the images and compare it with what was written")
	cmd.MarkFlagsMutuallyExclusive("json", "format", "quiet")
	return cmd
}

// imageRow is an image as --json shows it.
type imageRow struct {
	Name    string          // as docker shows it
	ID      digest.Digest   // of the configuration
	Digest  digest.Digest   // of the manifest
	Created *time.Time      `json:",omitempty"`
	Pulled  time.Time       //
	Source  string          // as it was written
	Size    int64           // bytes on the disk
	Shared  int64           // the part of it that other images use, too
	Layers  []digest.Digest // diffIDs, oldest first
	Bundles []string        // that use the image
}

func listImages(ctx context.Context, a *app, o imagesOptions) error {
	store, err := image.Open(a.Root, a.Log)
	if err != nil {
		return err
	}
	usage, err := store.Usage(ctx)
	if err != nil {
		return err
	}
	var want []*image.Image
	if len(o.Words) > 0 {
		if want, err = findImages(ctx, store, o.Words); err != nil {
			return err
		}
	}
	rows := []imageRow{}
	for _, u := range usage.Images {
		if want != nil && !slices.ContainsFunc(want, func(i *image.Image) bool { return i.Ref == u.Image.Ref }) {
			continue
		}
		if o.Verify {
			for _, l := range image.Unique(u.Image.Layers) {
				if err := store.VerifyLayer(l); err != nil {
					return fmt.Errorf("%s: %w", familiar(u.Image.Ref), err)
				}
			}
		}
		row := imageRow{
			Name: familiar(u.Image.Ref), ID: u.Image.ConfigDigest, Digest: u.Image.Digest, Created: u.Image.Config.Created,
			Pulled: u.Image.Pulled, Source: u.Image.Source, Size: u.Size, Shared: u.Shared,
			Layers: []digest.Digest{}, Bundles: append([]string{}, u.Bundles...),
		}
		for _, l := range u.Image.Layers {
			row.Layers = append(row.Layers, l.DiffID)
		}
		rows = append(rows, row)
	}
	return printImages(a, o, rows, usage)
}

func printImages(a *app, o imagesOptions, rows []imageRow, usage *image.Usage) error {
	switch {
	case o.JSON:
		e := json.NewEncoder(a.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(rows)
	case o.Format != "":
		t, err := template.New("format").Parse(o.Format)
		if err != nil {
			return usageError{fmt.Errorf("invalid argument %q for \"--format\" flag: %w", o.Format, err)}
		}
		for _, r := range rows {
			if err := t.Execute(a.Stdout, r); err != nil {
				return err
			}
			if _, err := fmt.Fprintln(a.Stdout); err != nil {
				return err
			}
		}
		return nil
	case o.Quiet:
		for _, r := range rows {
			if _, err := fmt.Fprintln(a.Stdout, shortID(r.ID)); err != nil {
				return err
			}
		}
		return nil
	}
	w := tabwriter.NewWriter(a.Stdout, 0, 0, 3, ' ', 0)
	fmt.Fprint(w, "IMAGE\tID\t")
	if o.Digests {
		fmt.Fprint(w, "DIGEST\t")
	}
	fmt.Fprintln(w, "CREATED\tSIZE\tSHARED\tUSED BY")
	for _, r := range rows {
		created := "N/A"
		if r.Created != nil {
			created = units.HumanDuration(time.Since(*r.Created)) + " ago"
		}
		fmt.Fprintf(w, "%s\t%s\t", r.Name, shortID(r.ID))
		if o.Digests {
			fmt.Fprintf(w, "%s\t", r.Digest)
		}
		used := ""
		if n := len(r.Bundles); n == 1 {
			used = r.Bundles[0]
		} else if n > 1 {
			used = fmt.Sprintf("%d bundles", n)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", created, units.HumanSize(float64(r.Size)), units.HumanSize(float64(r.Shared)), used)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if len(o.Words) > 0 || len(rows) == 0 {
		return nil
	}
	_, err := fmt.Fprintf(a.Stdout, "%d layers, %s on the disk\n", usage.Layers, units.HumanSize(float64(usage.Bytes+usage.Blobs+usage.Ingest)))
	return err
}
