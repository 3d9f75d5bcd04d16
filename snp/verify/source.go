package verify

import (
	"context"
	"errors"
	"fmt"

	"github.com/kcradle/kcradle/snp/kds"
)

// Source hands out what AMD's key distribution service publishes: over the network, from a cache, or from a directory.
// What it returns is not trusted.
type Source interface {
	// Fetch returns the body under o.URL().
	Fetch(ctx context.Context, o kds.Object) ([]byte, error)
}

var errNoSource = errors.New("not given, and there is no source to ask")

// fetch asks the source, if there is one.
func (s *session) fetch(ctx context.Context, o kds.Object) ([]byte, error) {
	if s.Source == nil {
		return nil, fmt.Errorf("%s: %w", o.URL(), errNoSource)
	}
	b, err := s.Source.Fetch(ctx, o)
	if err != nil {
		return nil, fmt.Errorf("fetch %s: %w", o.URL(), err)
	}
	if len(b) == 0 {
		return nil, fmt.Errorf("fetch %s: nothing came", o.URL())
	}
	return b, nil
}
