package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/spec"
)

// newFrameReader saves system calls: a frame's header and its payload come with one.
func newFrameReader(r io.Reader) *bufio.Reader { return bufio.NewReaderSize(r, 64<<10) }

// output is where the containers' output goes: a log for each, and in the foreground our own streams. It is for one
// goroutine.
type output struct {
	bundle  *bundle.Bundle
	pod     *spec.Pod
	streams [2]io.Writer // nil: nobody looks
	logs    []*bundle.Log
	failed  []bool // a log that could not be written is reported once

	// With several containers each line says whose it is.
	lines [][2][]byte // what is not yet a whole line
	width int
}

// maxPrefixedLine is where a line without an end is cut when lines are prefixed.
const maxPrefixedLine = 16 << 10

func newOutput(b *bundle.Bundle, p *spec.Pod, stdout, stderr io.Writer, detached bool) *output {
	n := len(p.Containers)
	o := &output{bundle: b, pod: p, logs: make([]*bundle.Log, n), failed: make([]bool, n)}
	if !detached {
		o.streams = [2]io.Writer{stdout, stderr}
	}
	if n > 1 {
		o.lines = make([][2][]byte, n)
		for _, c := range p.Containers {
			o.width = max(o.width, len(c.Name))
		}
	}
	return o
}

// write takes a piece of output. An error means that nobody reads our own streams any more; a log that cannot be
// written is reported and costs the log alone.
func (o *output) write(out spec.Output, log *slog.Logger) error {
	i := out.Container
	if i >= len(o.logs) {
		return fmt.Errorf("output of container %d: the pod has %d", i, len(o.logs))
	}
	if err := o.toLog(i, out); err != nil && !o.failed[i] {
		o.failed[i] = true
		log.Error("the container's log is incomplete", "container", o.pod.Containers[i].Name, "error", err)
	}
	w := o.streams[out.Stream-1]
	if w == nil {
		return nil
	}
	var err error
	if o.lines == nil {
		_, err = w.Write(out.Bytes)
	} else {
		err = o.prefixed(w, i, out)
	}
	if err != nil {
		o.streams[out.Stream-1] = nil
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

func (o *output) toLog(i int, out spec.Output) error {
	if o.logs[i] == nil {
		l, err := bundle.OpenLog(o.bundle.LogPath(o.pod.Containers[i].ID))
		if err != nil {
			return err
		}
		o.logs[i] = l
	}
	return o.logs[i].Write(out.Stream, out.Time, out.Bytes)
}

func (o *output) prefixed(w io.Writer, i int, out spec.Output) error {
	rest := &o.lines[i][out.Stream-1]
	*rest = append(*rest, out.Bytes...)
	var text []byte
	for len(*rest) > 0 {
		n := bytes.IndexByte(*rest, '\n') + 1
		if n == 0 {
			if len(*rest) < maxPrefixedLine {
				break
			}
			n = maxPrefixedLine
		}
		text = fmt.Appendf(text, "%-*s | %s", o.width, o.pod.Containers[i].Name, (*rest)[:n])
		if text[len(text)-1] != '\n' {
			text = append(text, '\n')
		}
		*rest = (*rest)[n:]
	}
	if len(text) == 0 {
		return nil
	}
	_, err := w.Write(text)
	return err
}

// close writes what is left of lines without an end, and closes the logs.
func (o *output) close() error {
	var errs []error
	for i := range o.lines {
		for s, rest := range o.lines[i] {
			if w := o.streams[s]; len(rest) > 0 && w != nil {
				_, err := fmt.Fprintf(w, "%-*s | %s\n", o.width, o.pod.Containers[i].Name, rest)
				errs = append(errs, err)
			}
		}
	}
	for _, l := range o.logs {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}
