package daemon

import (
	"context"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi"
)

// logs of a container that runs are its machine's to give, those of another lie in its bundle.
func (d *Daemon) logs(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	if !r.Bool("stdout") && !r.Bool("stderr") {
		return dockerapi.BadRequest("Bad parameters: you must choose at least one stream")
	}
	if f := c.look(); f.running() {
		return c.pass(w, r, c.inPath(r))
	}
	o, err := logQuery(r)
	if err != nil {
		return err
	}
	tty := c.look().rec.Config.Tty
	w.Header().Set("Content-Type", dockerapi.StreamMedia(r.Version, !tty))
	w.WriteHeader(http.StatusOK)
	if o.tail == 0 {
		return nil
	}
	return o.write(r.Context(), w, c.b.LogPath(c.id), tty)
}

// logOptions are those of a request for what lies on disk.
type logOptions struct {
	since, until   time.Time
	tail           int // lines; negative: all
	stdout, stderr bool
	timestamps     bool
}

func logQuery(r *dockerapi.Request) (o logOptions, err error) {
	now := time.Now()
	o = logOptions{tail: -1, stdout: r.Bool("stdout"), stderr: r.Bool("stderr"), timestamps: r.Bool("timestamps")}
	if o.since, err = dockerapi.ParseTime(r.Query("since"), now); err != nil {
		return o, err
	}
	if o.until, err = dockerapi.ParseTime(r.Query("until"), now); err != nil {
		return o, err
	}
	if t := r.Query("tail"); t != "" && t != "all" {
		if n, err := strconv.Atoi(t); err == nil && n >= 0 {
			o.tail = n
		}
	}
	return o, nil
}

func (o logOptions) wants(r bundle.Record) bool {
	switch {
	case r.Stream == "stdout" && !o.stdout, r.Stream == "stderr" && !o.stderr,
		!o.since.IsZero() && r.Time.Before(o.since), !o.until.IsZero() && r.Time.After(o.until):
		return false
	}
	return true
}

// write writes a log in docker's form. It is read twice where only its end is wanted.
func (o logOptions) write(ctx context.Context, w http.ResponseWriter, path string, tty bool) error {
	skip := 0
	if o.tail >= 0 {
		lines, within := 0, false // a last line without its end is one, too
		err := bundle.ReadLog(path, func(r bundle.Record) error {
			if o.wants(r) {
				if !within {
					lines++
				}
				within = !strings.HasSuffix(r.Log, "\n")
			}
			return ctx.Err()
		})
		if err != nil {
			return err
		}
		skip = max(0, lines-o.tail)
	}
	midLine := false
	frames := dockerapi.NewFrameWriter(w)
	return bundle.ReadLog(path, func(r bundle.Record) error {
		if !o.wants(r) {
			return ctx.Err()
		}
		whole := strings.HasSuffix(r.Log, "\n")
		if skip > 0 {
			if whole {
				skip--
			}
			return ctx.Err()
		}
		text := r.Log
		if o.timestamps && !midLine {
			text = r.Time.UTC().Format("2006-01-02T15:04:05.000000000Z07:00") + " " + text
		}
		midLine = !whole
		stream := byte(1)
		if r.Stream == "stderr" {
			stream = 2
		}
		var err error
		if tty {
			_, err = w.Write([]byte(text))
		} else {
			err = frames.WriteFrame(stream, []byte(text))
		}
		return err
	})
}
