package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/moby/go-archive"
	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/dockerapi"
)

type cpOptions struct {
	Archive    bool // keep owners
	FollowLink bool
}

func newCp(a *app) *cobra.Command {
	var o cpOptions
	cmd := &cobra.Command{
		Use:   "cp [flags] DIR[:CONTAINER]:PATH LOCAL|-\n  kcradle cp [flags] LOCAL|- DIR[:CONTAINER]:PATH",
		Short: "Copy files between a running pod and the host",
		Long: `cp copies as docker cp does: a directory is copied with everything in it, DIR/. means what is in it, - is a tar archive
on standard input or output.`,
		Example: `  kcradle cp /tmp/vm:/etc/os-release .
  kcradle cp dump.sql /tmp/shop:db:/tmp/
  kcradle cp /tmp/vm:/var/log - | tar t`,
		Args: cobra.ExactArgs(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			return cp(cmd.Context(), a, args[0], args[1], o)
		},
	}
	cmd.Flags().BoolVarP(&o.Archive, "archive", "a", false, "keep user and group ids")
	cmd.Flags().BoolVarP(&o.FollowLink, "follow-link", "L", false, "copy what a symbolic link in the source points to")
	return cmd
}

// splitPath splits DIR[:CONTAINER]:PATH; ok is false for a local path.
func splitPath(arg string) (t target, inside string, ok bool, err error) {
	if arg == "-" || strings.HasPrefix(arg, "./") || strings.HasPrefix(arg, "../") && !strings.Contains(arg, ":") {
		return t, "", false, nil
	}
	for i := 0; i < len(arg); i++ {
		if arg[i] != ':' {
			continue
		}
		if fi, err := os.Stat(arg[:i]); err != nil || !fi.IsDir() {
			continue
		}
		dir, rest := arg[:i], arg[i+1:]
		if name, more, found := strings.Cut(rest, ":"); found && !strings.Contains(name, "/") {
			dir, rest = dir+":"+name, more
		}
		if rest == "" {
			return t, "", false, fmt.Errorf("%s: no path behind the colon", arg)
		}
		t, err = openTarget(dir)
		return t, rest, true, err
	}
	return t, "", false, nil
}

func cp(ctx context.Context, a *app, from, to string, o cpOptions) error {
	src, srcPath, srcInside, err := splitPath(from)
	if err != nil {
		return err
	}
	dst, dstPath, dstInside, err := splitPath(to)
	if err != nil {
		return err
	}
	switch {
	case srcInside && dstInside:
		return errors.New("copying between pods is not supported: copy to the host first")
	case srcInside:
		return copyOut(ctx, a, src, srcPath, to, o)
	case dstInside:
		return copyIn(ctx, a, from, dst, dstPath, o)
	}
	return usageError{errors.New("neither side is a bundle: want DIR:PATH on one of them")}
}

// pathStat is docker's description of a path in a container.
type pathStat struct {
	Name       string      `json:"name"`
	Size       int64       `json:"size"`
	Mode       os.FileMode `json:"mode"`
	LinkTarget string      `json:"linkTarget"`
}

func readStat(h http.Header) (pathStat, error) {
	var st pathStat
	b, err := base64.StdEncoding.DecodeString(h.Get("X-Docker-Container-Path-Stat"))
	if err == nil {
		err = json.Unmarshal(b, &st)
	}
	if err != nil {
		return st, fmt.Errorf("read the path's description: %w", err)
	}
	return st, nil
}

func (t target) stat(ctx context.Context, p string) (pathStat, error) {
	resp, err := t.api().Stream(ctx, "HEAD", t.path("/archive"), url.Values{"path": {p}}, nil, nil)
	if err != nil {
		if dockerapi.Status(err) == http.StatusNotFound { // an answer to HEAD has no words
			return pathStat{}, fmt.Errorf("could not find the file %s in %s: %w", p, t, os.ErrNotExist)
		}
		return pathStat{}, err
	}
	resp.Body.Close()
	return readStat(resp.Header)
}

func copyOut(ctx context.Context, a *app, t target, inside, local string, o cpOptions) error {
	inside = keepTrailing(path.Join("/", inside), inside)
	rebase := ""
	if o.FollowLink {
		if st, err := t.stat(ctx, inside); err == nil && st.Mode&os.ModeSymlink != 0 {
			link := st.LinkTarget
			if !path.IsAbs(link) {
				link = path.Join(path.Dir(inside), link)
			}
			link, rebase = archive.GetRebaseName(inside, link)
			inside = link
		}
	}
	resp, err := t.api().Stream(ctx, "GET", t.path("/archive"), url.Values{"path": {inside}}, nil, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if local == "-" {
		_, err := io.Copy(a.Stdout, resp.Body)
		return err
	}
	st, err := readStat(resp.Header)
	if err != nil {
		return err
	}
	abs, err := filepath.Abs(local)
	if err != nil {
		return err
	}
	info := archive.CopyInfo{Path: inside, Exists: true, IsDir: st.Mode.IsDir(), RebaseName: rebase}
	var content io.Reader = resp.Body
	if rebase != "" {
		_, base := archive.SplitPathDirEntry(inside)
		r := archive.RebaseArchiveEntries(resp.Body, base, rebase)
		defer r.Close()
		content = r
	}
	return archive.CopyTo(content, info, archive.PreserveTrailingDotOrSeparator(abs, local))
}

func copyIn(ctx context.Context, a *app, local string, t target, inside string, o cpOptions) error {
	dst := archive.CopyInfo{Path: keepTrailing(path.Join("/", inside), inside)}
	st, err := t.stat(ctx, dst.Path)
	if err == nil && st.Mode&os.ModeSymlink != 0 {
		link := st.LinkTarget
		if !path.IsAbs(link) {
			link = path.Join(path.Dir(path.Clean(dst.Path)), link)
		}
		dst.Path = link
		st, err = t.stat(ctx, link)
	}
	switch {
	case err == nil:
		dst.Exists, dst.IsDir = true, st.Mode.IsDir()
	case !errors.Is(err, os.ErrNotExist):
		return err
	}
	q := url.Values{"noOverwriteDirNonDir": {"true"}}
	if o.Archive {
		q.Set("copyUIDGID", "true")
	}
	var content io.Reader
	if local == "-" {
		if !dst.IsDir {
			return fmt.Errorf("destination \"%s:%s\" must be a directory", t, inside)
		}
		q.Set("path", dst.Path)
		content = a.Stdin
	} else {
		abs, err := filepath.Abs(local)
		if err != nil {
			return err
		}
		src, err := archive.CopyInfoSourcePath(archive.PreserveTrailingDotOrSeparator(abs, local), o.FollowLink)
		if err != nil {
			return err
		}
		tar, err := archive.TarResource(src)
		if err != nil {
			return err
		}
		defer tar.Close()
		dir, prepared, err := archive.PrepareArchiveCopy(tar, src, dst)
		if err != nil {
			return err
		}
		defer prepared.Close()
		q.Set("path", dir)
		content = prepared
	}
	header := http.Header{"Content-Type": {"application/x-tar"}}
	resp, err := t.api().Stream(ctx, "PUT", t.path("/archive"), q, header, content)
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// keepTrailing gives a cleaned path the "/" or "/." that the user wrote: both say something about what is meant.
func keepTrailing(cleaned, original string) string {
	return archive.PreserveTrailingDotOrSeparator(cleaned, original)
}
