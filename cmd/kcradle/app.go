package main

import (
	"io"
	"log/slog"
	"time"

	"github.com/kcradle/kcradle/snp/verify"
)

// app is what every verb gets from main: its streams, its logger and the state directory.
type app struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Log            *slog.Logger
	Root           string // state directory: the image store, cached probes, templates

	// What attestation rests on. Only tests have others than main's.
	Now   func() time.Time
	Roots verify.Roots // AMD's
	KDS   string       // AMD's key distribution service; empty: where it is
}
