package image

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// lease says that someone uses layers. A bundle's lease lives as long as the bundle's directory; a pull's lives as long
// as the process, which holds a lock on its file.
type lease struct {
	Version int             `json:"version"`
	Owner   string          `json:"owner"` // absolute path of a bundle; "pull NAME" for a pull
	Layers  []digest.Digest `json:"layers"`
	Blobs   []digest.Digest `json:"blobs,omitempty"`
	Made    time.Time       `json:"made"`
	// Device identifies the file system the bundle lies on: its fsid, or "" for one that does not outlive a boot.
	Device string `json:"device,omitempty"`
}

const (
	pullLease   = "pull-"
	bundleLease = "bundle-"
)

// Lease keeps layers from garbage collection as long as the directory owner exists; it replaces an earlier lease of the
// same owner. ErrNotFound if a layer is no longer there: pull the image again.
//
// A bundle that was moved within its file system keeps its layers if it links to them with hard links, which
// garbage collection respects; moved otherwise it wants a new lease.
func (s *Store) Lease(ctx context.Context, owner string, layers []digest.Digest) error {
	owner, err := filepath.Abs(owner)
	if err != nil {
		return err
	}
	l, err := s.lock(ctx)
	if err != nil {
		return fmt.Errorf("lease layers for %s: %w", owner, err)
	}
	defer l.unlock()
	for _, id := range layers {
		if err := checkDigest(id); err != nil {
			return fmt.Errorf("lease layers for %s: %w", owner, err)
		}
		if _, err := s.layer(id); errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("lease layers for %s: layer %s: %w: it was removed meanwhile; pull the image again", owner, id, ErrNotFound)
		} else if err != nil {
			return fmt.Errorf("lease layers for %s: %w", owner, err)
		}
	}
	b, err := json.Marshal(lease{
		Version: storeVersion, Owner: owner, Layers: layers, Made: time.Now().UTC(), Device: device(filepath.Dir(owner)),
	})
	if err != nil {
		return err
	}
	if err := s.writeFile(s.path(dirLeases, bundleLease+recordFile(owner)), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("lease layers for %s: %w", owner, err)
	}
	return nil
}

// Release ends the lease of an owner. It may be called twice.
func (s *Store) Release(ctx context.Context, owner string) error {
	owner, err := filepath.Abs(owner)
	if err != nil {
		return err
	}
	l, err := s.lock(ctx)
	if err != nil {
		return fmt.Errorf("release layers of %s: %w", owner, err)
	}
	defer l.unlock()
	err = os.Remove(s.path(dirLeases, bundleLease+recordFile(owner)))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("release layers of %s: %w", owner, err)
	}
	return nil
}

// device identifies the file system of a directory.
func device(dir string) string {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return "unknown"
	}
	if st.Type == unix.TMPFS_MAGIC || st.Type == unix.RAMFS_MAGIC {
		return "" // what is gone from it is gone for good
	}
	return fmt.Sprintf("%08x%08x", uint32(st.Fsid.Val[0]), uint32(st.Fsid.Val[1]))
}

// alive says whether a bundle's lease still holds. Its directory may be missing because its disk is not mounted at
// the moment: such a lease holds.
func (l *lease) alive() bool {
	if _, err := os.Stat(l.Owner); !errors.Is(err, fs.ErrNotExist) {
		return true
	}
	if l.Device == "" {
		return false
	}
	parent := filepath.Dir(l.Owner)
	for {
		_, err := os.Stat(parent)
		if err == nil {
			break
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return true
		}
		parent = filepath.Dir(parent)
	}
	return device(parent) != l.Device
}

func parseLease(b []byte) (*lease, error) {
	var l lease
	if err := decodeStrict(b, &l); err != nil {
		return nil, err
	}
	if l.Version < 1 || l.Version > storeVersion {
		return nil, fmt.Errorf("version %d is not known; a newer kcradle wrote it", l.Version)
	}
	for _, d := range append(append([]digest.Digest(nil), l.Layers...), l.Blobs...) {
		if err := checkDigest(d); err != nil {
			return nil, err
		}
	}
	return &l, nil
}

// leasesLocked returns the leases that hold, removing the dead ones.
func (s *Store) leasesLocked() ([]*lease, error) {
	entries, err := os.ReadDir(s.path(dirLeases))
	if err != nil {
		return nil, err
	}
	var out []*lease
	for _, e := range entries {
		path := s.path(dirLeases, e.Name())
		if strings.HasPrefix(e.Name(), pullLease) {
			// Who gets the lock of a pull's lease knows that the pull is dead.
			l, err := tryLockFile(path)
			if err == nil {
				err = l.remove()
				l.unlock()
				if err != nil {
					return nil, err
				}
				continue
			}
			if !errors.Is(err, unix.EWOULDBLOCK) {
				return nil, err
			}
		}
		b, err := readFile(path, maxDocument)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		l, err := parseLease(b)
		if err != nil {
			return nil, fmt.Errorf("read lease %s: %w", path, err)
		}
		if strings.HasPrefix(e.Name(), bundleLease) && !l.alive() {
			s.log.Debug("bundle is gone, its layers are free", "bundle", l.Owner)
			if err := os.Remove(path); err != nil {
				return nil, err
			}
			continue
		}
		out = append(out, l)
	}
	return out, nil
}

// leasePull keeps what a pull works on from garbage collection until the returned lock is let go, or the process dies.
func (s *Store) leasePull(ctx context.Context, name string, layers, blobs []digest.Digest) (*fileLock, error) {
	b, err := json.Marshal(lease{Version: storeVersion, Owner: "pull " + name, Layers: layers, Blobs: blobs, Made: time.Now().UTC()})
	if err != nil {
		return nil, err
	}
	l, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer l.unlock()
	hold, err := tryLockFile(s.path(dirLeases, pullLease+rand.Text()))
	if err != nil {
		return nil, err
	}
	if _, err := hold.f.Write(b); err != nil {
		return nil, errors.Join(err, hold.remove(), hold.f.Close())
	}
	return hold, nil
}

// leaseWork is leasePull for work that gives back what is there; what it returns lets go.
func (s *Store) leaseWork(ctx context.Context, what string, layers, blobs []digest.Digest) (release func(), err error) {
	hold, err := s.leasePull(ctx, what, layers, blobs)
	if err != nil {
		return nil, err
	}
	return func() {
		if err := hold.remove(); err != nil {
			s.log.Debug("the lease stays behind", "of", what, "err", err)
		}
		hold.unlock()
	}, nil
}
