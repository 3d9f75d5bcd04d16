package dockerapi

import (
	"net/http"
	"time"
)

// Events is a source of what GET /events sends.
type Events[E any] struct {
	// Listen returns what is kept of the events since a time, and those to come until cancel is called. The channel is closed
	// when its reader is too slow, or when nothing more can come.
	Listen func(from time.Time) (past []E, live <-chan E, cancel func())
	Time   func(E) time.Time
	// Show is an event as clients get it; nil when the filters leave it out.
	Show func(E, Filters) any
}

// Serve answers GET /events: with since, what is kept from then on; then what comes, until the time until or the client's end.
func (s Events[E]) Serve(w http.ResponseWriter, r *Request) error {
	f, err := ParseFilters(r.Query("filters"), "config", "container", "daemon", "event", "image", "label",
		"network", "node", "plugin", "scope", "secret", "service", "type", "volume")
	if err != nil {
		return err
	}
	now := time.Now()
	since, err := ParseTime(r.Query("since"), now)
	if err != nil {
		return err
	}
	until, err := ParseTime(r.Query("until"), now)
	if err != nil {
		return err
	}
	if !since.IsZero() && !until.IsZero() && until.Before(since) {
		return BadRequest("`since` time (%s) cannot be after `until` time (%s)", r.Query("since"), r.Query("until"))
	}
	from := since
	if since.IsZero() {
		from = now
	}
	past, live, cancel := s.Listen(from)
	defer cancel()
	out := NewJSONStream(w)
	if err := out.Begin(); err != nil {
		return err
	}
	send := func(e E) error {
		if !until.IsZero() && s.Time(e).After(until) {
			return nil
		}
		if m := s.Show(e, f); m != nil {
			return out.Write(m)
		}
		return nil
	}
	if !since.IsZero() {
		for _, e := range past {
			if err := send(e); err != nil {
				return err
			}
		}
	}
	var end <-chan time.Time
	if !until.IsZero() {
		t := time.NewTimer(time.Until(until))
		defer t.Stop()
		end = t.C
	}
	for {
		// What has happened goes out before the end that was asked for.
		select {
		case e, ok := <-live:
			if !ok {
				return nil
			}
			if err := send(e); err != nil {
				return err
			}
			continue
		default:
		}
		select {
		case <-r.Context().Done():
			return nil
		case <-end:
			return nil
		case e, ok := <-live:
			if !ok {
				return nil
			}
			if err := send(e); err != nil {
				return err
			}
		}
	}
}
