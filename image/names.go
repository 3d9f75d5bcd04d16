package image

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// Summary is an image as docker counts images: by ID, with all its names. It is a value.
type Summary struct {
	ID digest.Digest // of the configuration
	// Image is the image under the name that it got last.
	Image *Image
	// Names are the names under which the store keeps it, sorted; see Image.Ref.
	Names []string
	// RepoTags are those of them that are docker names with a tag, as docker shows them ("debian:12").
	RepoTags []string
	// RepoDigests are the manifests that registries have for it ("debian@sha256:…").
	RepoDigests []string
	// Parent is the ID of the image that it was committed from, if one of its names knows.
	Parent digest.Digest
	// Dangling: it has no name any more, because another image has it now, or it never had one.
	Dangling bool
	// LastTagged is when it got its last name.
	LastTagged time.Time
	// Size is the disk use of its layers, each counted once; Shared is the part that other images have, too.
	Size, Shared int64
}

// taggedName is the docker name with a tag that a record has, or nil.
func taggedName(key string) reference.NamedTagged {
	n, err := reference.ParseNormalizedNamed(key)
	if err != nil || n.String() != key { // an ID, or another transport's spelling
		return nil
	}
	if _, ok := n.(reference.Digested); ok {
		return nil
	}
	t, _ := n.(reference.NamedTagged)
	return t
}

// repoDigest is the name by digest that a registry has for the image of a record, or nil.
func (i *Image) repoDigest() reference.Canonical {
	n, err := reference.ParseNormalizedNamed(i.Ref)
	if err != nil || n.String() != i.Ref || i.Transport != Registry {
		return nil
	}
	if c, ok := n.(reference.Canonical); ok {
		return c
	}
	// A name that the image got here says nothing about what that name's registry has.
	src, err := ParseReference(i.Source)
	if err != nil || src.named == nil || src.named.Name() != n.Name() {
		return nil
	}
	c, err := reference.WithDigest(reference.TrimNamed(n), i.Digest)
	if err != nil {
		return nil
	}
	return c
}

// danglingName is the name of a record without one: the image's ID.
func danglingName(id digest.Digest) string { return id.String() }

// Images returns every image once, the newest first, those of one time by ID.
func (s *Store) Images(ctx context.Context) ([]*Summary, error) {
	all, err := s.List(ctx)
	if err != nil {
		return nil, err
	}
	return summarize(all), nil
}

func summarize(all []*Image) []*Summary {
	byID := map[digest.Digest]*Summary{}
	users := map[digest.Digest]int{} // images that have a layer
	var out []*Summary
	for _, img := range all {
		u := byID[img.ConfigDigest]
		if u == nil {
			u = &Summary{ID: img.ConfigDigest, Size: img.Size()}
			byID[u.ID] = u
			out = append(out, u)
			for _, l := range Unique(img.Layers) {
				users[l.DiffID]++
			}
		}
		if u.Image == nil || img.Pulled.After(u.LastTagged) {
			u.Image, u.LastTagged = img, img.Pulled
		}
		if img.Parent != "" {
			u.Parent = img.Parent
		}
		if img.Ref != danglingName(u.ID) {
			u.Names = append(u.Names, img.Ref)
		}
		if t := taggedName(img.Ref); t != nil {
			u.RepoTags = append(u.RepoTags, reference.FamiliarString(t))
		}
		if c := img.repoDigest(); c != nil {
			u.RepoDigests = append(u.RepoDigests, reference.FamiliarString(c))
		}
	}
	for _, u := range out {
		slices.Sort(u.Names)
		slices.Sort(u.RepoTags)
		slices.Sort(u.RepoDigests)
		u.RepoDigests = slices.Compact(u.RepoDigests)
		u.Dangling = len(u.Names) == 0
		for _, l := range Unique(u.Image.Layers) {
			if users[l.DiffID] > 1 {
				u.Shared += l.Size
			}
		}
	}
	slices.SortFunc(out, func(a, b *Summary) int {
		return cmp.Or(b.Image.Created().Compare(a.Image.Created()), cmp.Compare(a.ID, b.ID))
	})
	return out
}

// Created is when the image was made, as its configuration says; the zero time if it does not.
func (i *Image) Created() time.Time {
	if i.Config.Created == nil {
		return time.Time{}
	}
	return *i.Config.Created
}

// Lookup finds the image that a word of docker's API names: a name (without a tag: latest), a name by digest, an ID or
// the beginning of one. ErrNotFound, or ErrAmbiguous if several IDs begin so.
func (s *Store) Lookup(ctx context.Context, word string) (*Summary, error) {
	all, err := s.Images(ctx)
	if err != nil {
		return nil, err
	}
	u, _, err := lookup(all, word)
	return u, err
}

// ErrAmbiguous says that more than one image is meant.
var ErrAmbiguous = errors.New("more than one image is meant")

// lookup finds an image in what Images returned. It says by which name, empty if by ID.
func lookup(all []*Summary, word string) (*Summary, string, error) {
	if ref, err := ParseReference(word); err == nil {
		key := ref.Key()
		for _, u := range all {
			if slices.Contains(u.Names, key) {
				return u, key, nil
			}
			if c, ok := ref.named.(reference.Canonical); ok && slices.Contains(u.RepoDigests, reference.FamiliarString(c)) {
				return u, key, nil
			}
		}
	}
	var hit *Summary
	if prefix := strings.TrimPrefix(word, "sha256:"); prefix != "" && strings.Trim(prefix, "0123456789abcdef") == "" {
		for _, u := range all {
			if !strings.HasPrefix(u.ID.Encoded(), prefix) && u.Image.Digest.Encoded() != prefix {
				continue
			}
			if hit != nil {
				return nil, "", fmt.Errorf("%s: %w: say more of its ID", word, ErrAmbiguous)
			}
			hit = u
		}
	}
	if hit == nil {
		return nil, "", fmt.Errorf("%s: %w in the store", clip(word), ErrNotFound)
	}
	return hit, "", nil
}

func clip(s string) string {
	if len(s) > 200 {
		return s[:200] + "…"
	}
	return s
}
