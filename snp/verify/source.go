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
	// Fetch returns the body under o.URL(). Its error wraps ErrUnreachable if somebody who has it did not answer.
	Fetch(ctx context.Context, o kds.Object) ([]byte, error)
}

// ErrUnreachable is what a Source's error wraps when the service was asked and gave no answer, or none of use: asking again
// later may help.
var ErrUnreachable = errors.New("the service does not answer")

// missing is the outcome of a check whose certificate or list could not be had.
func missing(err error) Check {
	c := Check{Status: Missing, Message: err.Error()}
	if errors.Is(err, ErrUnreachable) {
		c.Status = Unreachable
	}
	return c
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
