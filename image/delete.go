package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// ErrConflict says that an image is not removed because something needs it.
var ErrConflict = errors.New("conflict")

// User is a container that an image was used for.
type User struct {
	Name    string // as the error names it: the container's short ID, or a bundle's directory
	Running bool
}

// DeleteOptions of Store.Delete. The zero value is fine.
type DeleteOptions struct {
	// Force removes an image by ID from several repositories, and one that containers which do not run use. Of one
	// that a running container uses only the names go.
	Force bool
	// Users says who uses an image. It is called under the store's lock and must not use the store. Nil: the bundles
	// that lease all of the image's layers, as if they did not run.
	Users func(id digest.Digest) []User
}

// Deletion tells what Delete did.
type Deletion struct {
	// Items are docker's answer: names, then the image's ID if it is gone, then its layers that are gone by their
	// chain IDs, the topmost first.
	Items []DeletedItem
	Removed
}

// DeletedItem has one of its fields set.
type DeletedItem struct{ Untagged, Deleted string }

// Delete does what docker rmi does. A name goes; with an image's last name the image goes. An ID takes the image with
// all its names if they are of one repository, otherwise only with Force. ErrConflict if containers use the image.
// Layers that another image or a bundle needs stay.
func (s *Store) Delete(ctx context.Context, word string, o DeleteOptions) (*Deletion, error) {
	l, err := s.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer l.unlock()
	all, err := s.Images(ctx)
	if err != nil {
		return nil, err
	}
	u, name, err := lookup(all, word)
	if errors.Is(err, ErrNotFound) {
		if out, err := s.deleteBrokenLocked(word); out != nil || err != nil {
			return out, err
		}
	}
	if err != nil {
		return nil, err
	}
	d := deletion{store: s, force: o.Force, word: word, image: u, names: slices.Clone(u.Names)}
	if o.Users != nil {
		d.users = o.Users(u.ID)
	} else if d.users, err = s.bundlesLocked(u.Image); err != nil {
		return nil, err
	}
	if name != "" {
		err = d.byName(name)
	} else {
		err = d.byID()
	}
	if err == nil && len(d.out.Items) > 0 {
		if err = s.collectLocked(&d.out.Removed, ingestAge); err != nil {
			err = fmt.Errorf("collect garbage: %w", err)
		}
		d.layers()
	}
	if err != nil {
		return &d.out, fmt.Errorf("remove %s: %w", clip(word), err)
	}
	return &d.out, nil
}

// deleteBrokenLocked takes the name of an image that is not whole; nil if there is none.
func (s *Store) deleteBrokenLocked(word string) (*Deletion, error) {
	ref, err := ParseReference(word)
	if err != nil {
		return nil, nil
	}
	err = os.Remove(s.path(dirImages, recordFile(ref.Key())))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	out := &Deletion{Items: []DeletedItem{{Untagged: ref.Familiar()}}, Removed: Removed{Images: []string{ref.Key()}}}
	if err == nil {
		err = s.collectLocked(&out.Removed, ingestAge)
	}
	if err != nil {
		return out, fmt.Errorf("remove %s: %w", clip(word), err)
	}
	return out, nil
}

// bundlesLocked are the bundles that lease all layers of an image.
func (s *Store) bundlesLocked(img *Image) ([]User, error) {
	leases, err := s.leasesLocked()
	if err != nil {
		return nil, fmt.Errorf("read leases: %w", err)
	}
	var out []User
	for _, l := range leases {
		missing := slices.ContainsFunc(img.Layers, func(i Layer) bool { return !slices.Contains(l.Layers, i.DiffID) })
		if len(img.Layers) > 0 && !missing && !strings.HasPrefix(l.Owner, "pull ") {
			out = append(out, User{Name: l.Owner})
		}
	}
	return out, nil
}

// deletion is a removal in progress, under the store's lock.
type deletion struct {
	store *Store
	force bool
	word  string
	image *Summary
	names []string // records that are still there
	users []User
	gone  bool // the image itself
	out   Deletion
}

// byName takes a name, and with the last one the image.
func (d *deletion) byName(name string) error {
	if !slices.Contains(d.names, name) {
		// A registry's digest of an image that was pulled by tag: there is no record of it to be removed.
		return fmt.Errorf("%w: it is the digest of %s; remove that name", ErrConflict, strings.Join(d.image.RepoTags, ", "))
	}
	if !d.force && oneRepository(d.names) && len(d.users) > 0 {
		return fmt.Errorf("%w: unable to remove repository reference %q (must force) - container %s is using its referenced image %s",
			ErrConflict, d.word, d.users[0].Name, shortID(d.image.ID))
	}
	running := slices.ContainsFunc(d.users, func(u User) bool { return u.Running })
	last := !slices.ContainsFunc(d.names, func(n string) bool {
		return n != name && !(isCanonical(n) && repositoryOf(n) == repositoryOf(name))
	})
	if last && running {
		// The image stays for its container. Its record without a name is there before the one with a name goes.
		if err := d.dangle(name); err != nil {
			return err
		}
	}
	if err := d.untag(name); err != nil {
		return err
	}
	// The digests of a repository go with its last tag.
	repo := repositoryOf(name)
	if !isCanonical(name) && !slices.ContainsFunc(d.names, func(n string) bool { return !isCanonical(n) && repositoryOf(n) == repo }) {
		for _, n := range slices.Clone(d.names) {
			if isCanonical(n) && repositoryOf(n) == repo {
				if err := d.untag(n); err != nil {
					return err
				}
			}
		}
	}
	if len(d.names) > 0 || last && running {
		return nil
	}
	return d.remove()
}

// byID takes the image with all its names.
func (d *deletion) byID() error {
	for _, u := range d.users {
		switch {
		case u.Running:
			return fmt.Errorf("%w: unable to delete %s (cannot be forced) - image is being used by running container %s",
				ErrConflict, shortID(d.image.ID), u.Name)
		case !d.force:
			return fmt.Errorf("%w: unable to delete %s (must be forced) - image is being used by stopped container %s",
				ErrConflict, shortID(d.image.ID), u.Name)
		}
	}
	if !d.force && !oneRepository(d.names) {
		return fmt.Errorf("%w: unable to delete %s (must be forced) - image is referenced in multiple repositories",
			ErrConflict, shortID(d.image.ID))
	}
	for _, n := range slices.Clone(d.names) {
		if err := d.untag(n); err != nil {
			return err
		}
	}
	return d.remove()
}

// untag removes a record with a name.
func (d *deletion) untag(name string) error {
	s := d.store
	img, err := s.get(name)
	if err != nil {
		return err
	}
	if err := os.Remove(s.path(dirImages, recordFile(name))); err != nil {
		return err
	}
	d.names = slices.DeleteFunc(d.names, func(n string) bool { return n == name })
	d.out.Images = append(d.out.Images, name)
	shown := name
	if n, err := reference.ParseNormalizedNamed(name); err == nil && n.String() == name {
		shown = reference.FamiliarString(n)
	}
	d.out.Items = append(d.out.Items, DeletedItem{Untagged: shown})
	// What the registry called it goes with the last name of that repository.
	if c := img.repoDigest(); c != nil && c.String() != name {
		left := slices.ContainsFunc(d.names, func(n string) bool { return n == c.String() || repositoryOf(n) == c.Name() && !isCanonical(n) })
		if !left {
			d.out.Items = append(d.out.Items, DeletedItem{Untagged: reference.FamiliarString(c)})
		}
	}
	return nil
}

// dangle writes the image's record without a name.
func (d *deletion) dangle(name string) error {
	r, err := d.store.readRecord(recordFile(name))
	if err != nil {
		return err
	}
	r.Name = danglingName(r.Config)
	return d.store.writeRecord(r)
}

// remove takes the image, which has no name any more.
func (d *deletion) remove() error {
	err := os.Remove(d.store.path(dirImages, recordFile(danglingName(d.image.ID))))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d.gone = true
	d.out.Items = append(d.out.Items, DeletedItem{Deleted: d.image.ID.String()})
	return nil
}

// layers adds the image's layers that garbage collection took.
func (d *deletion) layers() {
	if !d.gone {
		return
	}
	chains := make([]digest.Digest, 0, len(d.image.Image.Layers))
	for _, l := range d.image.Image.Layers {
		chains = append(chains, l.DiffID)
	}
	chains = identity.ChainIDs(chains)
	for i := len(chains) - 1; i >= 0; i-- {
		if slices.Contains(d.out.Removed.Layers, d.image.Image.Layers[i].DiffID) {
			d.out.Items = append(d.out.Items, DeletedItem{Deleted: chains[i].String()})
		}
	}
}

// repositoryOf is the repository of a record's name; of a name that is no docker name, the name.
func repositoryOf(name string) string {
	if n, err := reference.ParseNormalizedNamed(name); err == nil && n.String() == name {
		return n.Name()
	}
	return name
}

func isCanonical(name string) bool {
	n, err := reference.ParseNormalizedNamed(name)
	if err != nil || n.String() != name {
		return false
	}
	_, ok := n.(reference.Canonical)
	return ok
}

// oneRepository says whether names are at most one tag and digests of the same repository.
func oneRepository(names []string) bool {
	tags := 0
	for _, n := range names {
		if repositoryOf(n) != repositoryOf(names[0]) {
			return false
		}
		if !isCanonical(n) {
			tags++
		}
	}
	return tags <= 1
}

// shortID is an ID as docker shows it.
func shortID(id digest.Digest) string { return id.Encoded()[:12] }
