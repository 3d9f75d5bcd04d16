package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/kcradle/kcradle/image"
)

type loadOptions struct {
	sourceOptions
	Input string
}

func newLoad(a *app) *cobra.Command {
	var o loadOptions
	cmd := &cobra.Command{
		Use:   "load [flags]",
		Short: "Bring the images of an archive into the store",
		Long: `load reads what docker save or an OCI tool wrote, compressed or not, and brings every image in it into the store under
the names it has there.`,
		Example: `  kcradle load -i app.tar
  docker save app | kcradle load`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return load(cmd.Context(), a, o)
		},
	}
	f := cmd.Flags()
	o.flags(f)
	f.StringVarP(&o.Input, "input", "i", "", "the archive (default: standard input)")
	_ = cmd.MarkFlagFilename("input")
	return cmd
}

func load(ctx context.Context, a *app, o loadOptions) error {
	var in io.Reader = a.Stdin
	name := "standard input"
	if o.Input != "" {
		f, err := os.Open(o.Input)
		if err != nil {
			return err
		}
		defer f.Close()
		in, name = f, o.Input
	} else if f, ok := a.Stdin.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return usageError{fmt.Errorf("standard input is a terminal; name the archive with -i, or pipe it in")}
	}
	store, err := image.Open(a.Root, a.Log)
	if err != nil {
		return err
	}
	opts, err := o.pullOptions("")
	if err != nil {
		return err
	}
	p := newProgress(a.Stderr, name, o.Quiet)
	opts.Progress = p.event
	images, err := store.Load(ctx, in, opts)
	p.close()
	for _, img := range images {
		if _, err := fmt.Fprintf(a.Stdout, "Loaded image: %s\n", familiar(img.Ref)); err != nil {
			return err
		}
	}
	return err
}
