package main

import (
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"
)

// newDocs is for make: it writes man pages and completions.
func newDocs(*app) *cobra.Command {
	return &cobra.Command{
		Use:     "docs DIR",
		Short:   "Write man pages and shell completions",
		Example: "  kcradle docs build/docs",
		Hidden:  true,
		Args:    cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return writeDocs(cmd.Root(), args[0])
		},
	}
}

// writeDocs writes DIR/man/*.1 and DIR/completions/*. The date is that of the commit, so that the same commit makes the
// same pages.
func writeDocs(root *cobra.Command, dir string) error {
	root.DisableAutoGenTag = true
	root.InitDefaultCompletionCmd()
	man, shells := filepath.Join(dir, "man"), filepath.Join(dir, "completions")
	for _, d := range []string{man, shells} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return err
		}
	}
	b := buildInfo()
	date, err := time.Parse(time.RFC3339, b.Time)
	if err != nil {
		date = time.Unix(0, 0)
	}
	header := &doc.GenManHeader{Title: "KCRADLE", Section: "1", Source: "kcradle " + b.Version, Manual: "kcradle", Date: &date}
	if err := doc.GenManTree(root, header, man); err != nil {
		return fmt.Errorf("write man pages: %w", err)
	}
	for name, write := range map[string]func(string) error{
		"kcradle.bash": func(f string) error { return root.GenBashCompletionFileV2(f, true) },
		"_kcradle":     root.GenZshCompletionFile,
		"kcradle.fish": func(f string) error { return root.GenFishCompletionFile(f, true) },
	} {
		if err := write(filepath.Join(shells, name)); err != nil {
			return fmt.Errorf("write completion %s: %w", name, err)
		}
	}
	return nil
}
