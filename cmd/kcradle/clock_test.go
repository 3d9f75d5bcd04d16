package main

import (
	"log/slog"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
)

// TestWatchClock sets the clock to what it is.
func TestWatchClock(t *testing.T) {
	need.Root(t)
	jumps := watchClock(t.Context(), slog.New(slog.DiscardHandler))
	for range 3 {
		select {
		case <-jumps:
			t.Fatal("got a jump of a clock that nobody has set")
		default:
		}
		now := unix.NsecToTimeval(time.Now().UnixNano())
		if err := unix.Settimeofday(&now); err != nil {
			t.Fatal(err)
		}
		select {
		case <-jumps:
		case <-time.After(10 * time.Second):
			t.Fatal("the clock was set and nobody noticed")
		}
	}
}
