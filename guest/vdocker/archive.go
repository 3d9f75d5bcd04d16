package vdocker

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/go-archive"
	"github.com/moby/go-archive/compression"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/sys/user"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/spec"
)

// pathStatHeader carries a container.PathStat, JSON in base64.
const pathStatHeader = "X-Docker-Container-Path-Stat"

// place is a path in a container: as it was asked for, made absolute, and with the links of all but its last element
// followed.
type place struct {
	abs      string // keeps a trailing "/" or "/."
	resolved string
	stat     container.PathStat
}

// locate must run in the container's root.
func locate(path string) (place, error) {
	p := place{abs: archive.PreserveTrailingDotOrSeparator(filepath.Join("/", path), path)}
	dir, base := filepath.Split(p.abs)
	dir, err := follow(dir)
	if err != nil {
		return p, err
	}
	p.resolved = strings.TrimSuffix(dir, "/") + "/" + base
	fi, err := os.Lstat(p.resolved)
	if err != nil {
		return p, err
	}
	p.stat = container.PathStat{Name: filepath.Base(p.abs), Size: fi.Size(), Mode: fi.Mode(), Mtime: fi.ModTime()}
	if fi.Mode()&os.ModeSymlink != 0 {
		if p.stat.LinkTarget, err = follow(p.abs); err != nil {
			return p, err
		}
	}
	return p, nil
}

// missing gives docker's wording to a path that is not there.
func missing(k call, path string, err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return dockerapi.NotFound("Could not find the file %s in container %s", path, k.Var("id"))
	}
	return err
}

func setPathStat(w http.ResponseWriter, st container.PathStat) error {
	b, err := json.Marshal(st)
	if err != nil {
		return fmt.Errorf("encode path stat: %w", err)
	}
	w.Header().Set(pathStatHeader, base64.StdEncoding.EncodeToString(b))
	return nil
}

// subject is what the three archive calls are about: the path they want, and the container's root until release.
func subject(k call) (path, root string, release func(), err error) {
	path = k.Query("path")
	if path == "" {
		return "", "", nil, dockerapi.BadRequest("bad parameter: pathcannot be empty")
	}
	if strings.ContainsRune(path, 0) {
		return "", "", nil, dockerapi.BadRequest("bad parameter: 'path' holds a NUL byte")
	}
	root, release, err = k.c.Root()
	return path, root, release, err
}

func (s *server) archiveStat(w http.ResponseWriter, k call) error {
	path, root, release, err := subject(k)
	if err != nil {
		return err
	}
	defer release()
	var p place
	if err := inRoot(root, func() error {
		p, err = locate(path)
		return err
	}); err != nil {
		return missing(k, path, err)
	}
	return setPathStat(w, p.stat)
}

func (s *server) archiveGet(w http.ResponseWriter, k call) error {
	path, root, release, err := subject(k)
	if err != nil {
		return err
	}
	defer release()
	err = inRoot(root, func() error {
		p, err := locate(path)
		if err != nil {
			return err
		}
		if err := setPathStat(w, p.stat); err != nil {
			return err
		}
		// Entries are called after the last element asked for, also where that is a link to something else.
		dir, base := p.resolved, "."
		if !p.stat.Mode.IsDir() {
			dir, base = filepath.Split(p.resolved)
		}
		k.emit("archive-path", nil)
		return sendTar(w, "application/x-tar", dir, archive.TarResourceRebaseOpts(base, filepath.Base(p.abs)))
	})
	return missing(k, path, err)
}

// sendTar answers with a directory as an archive. It must run in the root that dir is in.
func sendTar(w http.ResponseWriter, media, dir string, o *archive.TarOptions) error {
	t, err := archive.NewTarballer(dir, o)
	if err != nil {
		return fmt.Errorf("archive %s: %w", dir, err)
	}
	w.Header().Set("Content-Type", media)
	w.WriteHeader(http.StatusOK)
	r := t.Reader()
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(w, r)
		_ = r.Close() // a client that has gone ends the archive
		sent <- err
	}()
	t.Do()
	return <-sent
}

func (s *server) archivePut(w http.ResponseWriter, k call) error {
	path, root, release, err := subject(k)
	if err != nil {
		return err
	}
	defer release()
	content, err := compression.DecompressStream(k.Body)
	if err != nil {
		return dockerapi.BadRequest("read archive: %w", err)
	}
	defer content.Close()
	o, done, err := archive.WithProcSelfFD(&archive.TarOptions{NoOverwriteDirNonDir: k.Bool("noOverwriteDirNonDir")})
	if err != nil {
		return fmt.Errorf("prepare extraction: %w", err)
	}
	defer done()
	cs := k.c.Spec()
	err = inRoot(root, func() error {
		// The last element is followed too: an archive may go to a link to a directory.
		dir, err := follow(filepath.Join("/", path))
		if err != nil {
			return err
		}
		fi, err := os.Lstat(dir)
		if err != nil {
			return err
		}
		if !fi.IsDir() {
			return dockerapi.BadRequest("extraction point is not a directory")
		}
		if err := writable(cs, dir); err != nil {
			return err
		}
		if k.Bool("copyUIDGID") && cs.User != "" {
			if o.ChownOpts, err = owner(cs.User); err != nil {
				return err
			}
		}
		return archive.Unpack(content, dir, o)
	})
	if err != nil {
		return missing(k, path, err)
	}
	k.emit("extract-to-dir", nil)
	w.WriteHeader(http.StatusOK)
	return nil
}

// writable refuses what the container itself could not write.
func writable(c spec.Container, dir string) error {
	best := ""
	readOnly, what := c.ReadOnly, "container rootfs is marked read-only"
	for _, m := range c.Mounts {
		target := filepath.Clean(m.Target)
		if len(target) > len(best) && (dir == target || strings.HasPrefix(dir, strings.TrimSuffix(target, "/")+"/")) {
			best, readOnly, what = target, m.ReadOnly, "mounted volume is marked read-only"
		}
	}
	if readOnly {
		return dockerapi.Errorf(http.StatusForbidden, "%s", what)
	}
	return nil
}

// owner resolves a container's user, in its root.
func owner(name string) (*archive.ChownOpts, error) {
	u, err := user.GetExecUserPath(name, nil, "/etc/passwd", "/etc/group")
	if err != nil {
		return nil, dockerapi.BadRequest("%w", err)
	}
	return &archive.ChownOpts{UID: u.Uid, GID: u.Gid}, nil
}

func (s *server) export(w http.ResponseWriter, k call) error {
	root, release, err := k.c.Root()
	if err != nil {
		return err
	}
	defer release()
	k.emit("export", nil)
	return inImageRoot(root, func() error {
		return sendTar(w, "application/octet-stream", "/", &archive.TarOptions{})
	})
}
