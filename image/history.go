package image

import (
	"context"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// Step is a step of an image's history, as docker history shows it.
type Step struct {
	// ID is that of the image after this step, if the store has it: of the image itself, and of those it was committed
	// from. Else empty; docker writes <missing>.
	ID        digest.Digest
	RepoTags  []string // of that image
	Created   time.Time
	CreatedBy string
	Author    string
	Comment   string
	Layer     digest.Digest // diffID; empty if the step made no layer
	Size      int64         // disk use of the layer
}

// Comment is what the last step of the image's history says.
func (i *Image) Comment() string {
	if n := len(i.Config.History); n > 0 {
		return i.Config.History[n-1].Comment
	}
	return ""
}

// steps are the image's history, the last step first, without IDs. Layers that the history does not speak of are steps
// without words, the oldest ones.
func (i *Image) steps() []Step {
	var out []Step
	layers := i.Layers
	silent := len(layers)
	for _, h := range i.Config.History {
		if !h.EmptyLayer && silent > 0 {
			silent--
		}
	}
	for _, l := range layers[:silent] {
		out = append(out, Step{Layer: l.DiffID, Size: l.Size})
	}
	layers = layers[silent:]
	for _, h := range i.Config.History {
		s := Step{CreatedBy: h.CreatedBy, Author: h.Author, Comment: h.Comment}
		if h.Created != nil {
			s.Created = *h.Created
		}
		if !h.EmptyLayer && len(layers) > 0 {
			s.Layer, s.Size = layers[0].DiffID, layers[0].Size
			layers = layers[1:]
		}
		out = append(out, s)
	}
	slices.Reverse(out)
	return out
}

// History returns the steps that made an image, the last one first.
func (s *Store) History(ctx context.Context, img *Image) ([]Step, error) {
	all, err := s.Images(ctx)
	if err != nil {
		return nil, err
	}
	byID := map[digest.Digest]*Summary{}
	for _, u := range all {
		byID[u.ID] = u
	}
	steps := img.steps()
	id := img.ConfigDigest
	for n := range steps {
		u := byID[id]
		if u == nil {
			break
		}
		steps[n].ID, steps[n].RepoTags = id, u.RepoTags
		id = u.Parent
	}
	return steps, nil
}
