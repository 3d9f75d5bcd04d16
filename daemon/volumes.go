package daemon

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/bundle"
)

// A volume is the directory ROOT/volumes/NAME with its disk in it.
const volumeDisk = "disk.ext4"

func (d *Daemon) volumePath(name string) string {
	return filepath.Join(d.cfg.Root, volumesDir, name, volumeDisk)
}

// ensureVolume returns the disk of a volume; made says that it was not there before.
func (d *Daemon) ensureVolume(ctx context.Context, v volumeUse) (made bool, path string, err error) {
	path = d.volumePath(v.name)
	if _, err := os.Stat(path); err == nil {
		return false, path, nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return false, "", err
	}
	dir := filepath.Dir(path)
	tmp, err := os.MkdirTemp(filepath.Dir(dir), v.name+".tmp-*")
	if err != nil {
		return false, "", err
	}
	defer os.RemoveAll(tmp) // after the rename there is nothing of that name
	if err := os.Chmod(tmp, 0o711); err != nil {
		return false, "", err
	}
	if err := bundle.NewVolume(ctx, filepath.Join(d.cfg.Root, "cache"), filepath.Join(tmp, volumeDisk), 0); err != nil {
		return false, "", err
	}
	if err := os.Rename(tmp, dir); errors.Is(err, unix.ENOTEMPTY) || errors.Is(err, unix.EEXIST) { // somebody was faster
		return false, path, nil
	} else if err != nil {
		return false, "", err
	}
	return true, path, nil
}

func (d *Daemon) removeVolume(name string) error {
	return os.RemoveAll(filepath.Join(d.cfg.Root, volumesDir, name))
}
