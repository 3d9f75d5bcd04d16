package main

import (
	"io"
	"log/slog"
)

// app is what every verb gets from main: its streams, its logger and the state directory.
type app struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Log            *slog.Logger
	Root           string // state directory: the image store, cached probes, templates
}
