package main

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/bundle"
)

type completion = func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective)

// completeBundles offers the known bundles, and directories beside.
func completeBundles(a *app) completion {
	return func(_ *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		var out []string
		for _, dir := range knownBundles(a) {
			if strings.HasPrefix(dir, word) {
				out = append(out, dir)
			}
		}
		if len(out) == 0 || strings.HasPrefix(word, ".") {
			return nil, cobra.ShellCompDirectiveFilterDirs
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeContainers offers DIR:CONTAINER as well.
func completeContainers(a *app) completion {
	return func(_ *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveDefault
		}
		var out []string
		for _, dir := range knownBundles(a) {
			b, err := bundle.Open(dir)
			if err != nil {
				continue
			}
			candidates := []string{dir}
			if len(b.Pod.Containers) > 1 {
				for _, c := range b.Pod.Containers {
					candidates = append(candidates, dir+":"+c.Name)
				}
			}
			for _, c := range candidates {
				if strings.HasPrefix(c, word) {
					out = append(out, c)
				}
			}
		}
		if len(out) == 0 {
			return nil, cobra.ShellCompDirectiveFilterDirs
		}
		return out, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeDirThenImage is for summon: a new directory, then an image, then the command.
func completeDirThenImage(a *app) completion {
	images := completeImages(a)
	return func(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
		switch len(args) {
		case 0:
			return nil, cobra.ShellCompDirectiveFilterDirs
		case 1:
			return images(cmd, nil, word)
		}
		return nil, cobra.ShellCompDirectiveDefault
	}
}

// knownBundles is for completion, which runs before the flags were looked at.
func knownBundles(a *app) []string {
	root := a.Root
	if root == "" {
		root = defaultRoot()
	}
	dirs, err := bundle.Known(root)
	if err != nil {
		return nil
	}
	if wd, err := os.Getwd(); err == nil {
		for i, d := range dirs { // as a person would write it
			if rel, err := filepath.Rel(wd, d); err == nil && !strings.HasPrefix(rel, "..") && rel != "." {
				dirs[i] = rel
			}
		}
	}
	return dirs
}
