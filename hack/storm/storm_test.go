package main

import (
	"bytes"
	"path/filepath"
	"testing"
	"time"

	"github.com/kcradle/kcradle/internal/need"
)

// A short storm, always the same choices.
func TestStorm(t *testing.T) {
	need.Root(t)
	need.Command(t, "qemu-system-x86_64", "hack/deps test")
	need.Command(t, "docker", "hack/deps test")
	need.Command(t, "debootstrap", "hack/deps test")
	program := need.File(t, filepath.Join("..", "..", "bin", "kcradle"), "make build")
	t.Setenv("KCRADLE_TEMPLATES", "off")
	c := config{Kcradle: program, Seed: 1, Kills: 10, Workers: 2, Pause: 6 * time.Second, Log: lines{t}}
	if err := run(t.Context(), c); err != nil {
		t.Error(err)
	}
}

// lines writes to a test's log.
type lines struct{ t *testing.T }

func (l lines) Write(p []byte) (int, error) {
	l.t.Logf("%s", bytes.TrimSpace(p))
	return len(p), nil
}
