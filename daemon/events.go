package daemon

import (
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/moby/moby/api/types/events"

	"github.com/kcradle/kcradle/dockerapi"
)

// Bounds of the events that are kept and of those that wait for a reader.
const (
	keptEvents   = 1024
	eventBacklog = 1024
)

// bus hands events to those who listen, and keeps the last ones.
type bus struct {
	mu        sync.Mutex
	past      []events.Message
	listeners map[chan events.Message]bool
}

func newBus() *bus { return &bus{listeners: map[chan events.Message]bool{}} }

func (b *bus) publish(m events.Message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.past = append(b.past, m); len(b.past) > keptEvents {
		b.past = slices.Clone(b.past[len(b.past)-keptEvents:])
	}
	for l := range b.listeners {
		select {
		case l <- m:
		default: // who does not read loses the stream, not single events
			delete(b.listeners, l)
			close(l)
		}
	}
}

// listen returns what is kept and what is to come. The channel is closed when its reader is too slow.
func (b *bus) listen() (past []events.Message, live <-chan events.Message, cancel func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := make(chan events.Message, eventBacklog)
	b.listeners[l] = true
	return slices.Clone(b.past), l, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.listeners, l)
	}
}

func (d *Daemon) serveEvents(w http.ResponseWriter, r *dockerapi.Request) error {
	f, err := dockerapi.ParseFilters(r.Query("filters"), "config", "container", "daemon", "event", "image", "label",
		"network", "node", "plugin", "scope", "secret", "service", "type", "volume")
	if err != nil {
		return err
	}
	now := time.Now()
	since, err := dockerapi.ParseTime(r.Query("since"), now)
	if err != nil {
		return err
	}
	until, err := dockerapi.ParseTime(r.Query("until"), now)
	if err != nil {
		return err
	}
	if !since.IsZero() && !until.IsZero() && until.Before(since) {
		return dockerapi.BadRequest("`since` time (%s) cannot be after `until` time (%s)", r.Query("since"), r.Query("until"))
	}
	past, live, cancel := d.events.listen()
	defer cancel()
	out, err := dockerapi.NewJSONStream(w)
	if err != nil {
		return err
	}
	send := func(m events.Message) error {
		t := time.Unix(0, m.TimeNano)
		if !until.IsZero() && t.After(until) || !since.IsZero() && t.Before(since) || !eventMatches(f, m) {
			return nil
		}
		return out.Write(eventShape(m, r.Version))
	}
	if !since.IsZero() {
		for _, m := range past {
			if err := send(m); err != nil {
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
		select {
		case m, ok := <-live:
			if !ok {
				return nil
			}
			if err := send(m); err != nil {
				return err
			}
			continue
		default: // what has happened goes out before the end that was asked for
		}
		select {
		case <-r.Context().Done():
			return nil
		case <-d.ctx.Done():
			return nil
		case <-end:
			return nil
		case m, ok := <-live:
			if !ok {
				return nil
			}
			if err := send(m); err != nil {
				return err
			}
		}
	}
}

// oldMessage has what clients up to 1.51 also find at the top.
type oldMessage struct {
	Status string `json:"status,omitempty"`
	ID     string `json:"id,omitempty"`
	From   string `json:"from,omitempty"`
	events.Message
}

func eventShape(m events.Message, _ dockerapi.Version) oldMessage {
	out := oldMessage{Message: m}
	switch m.Type {
	case events.ContainerEventType:
		out.Status, out.ID, out.From = string(m.Action), m.Actor.ID, m.Actor.Attributes["image"]
	case events.ImageEventType:
		out.Status, out.ID = string(m.Action), m.Actor.ID
	}
	return out
}

// eventMatches is docker's rule: values of one key are alternatives, keys all have to match.
func eventMatches(f dockerapi.Filters, m events.Message) bool {
	named := func(key string, kind events.Type, names ...string) bool {
		values := f[key]
		if len(values) == 0 {
			return true
		}
		if m.Type != kind {
			return false
		}
		return slices.ContainsFunc(values, func(v string) bool { return slices.Contains(names, v) || len(v) >= 4 && f.Prefix(key, m.Actor.ID) })
	}
	action := string(m.Action)
	short := action
	if i := slices.Index([]byte(action), ':'); i > 0 {
		short = action[:i]
	}
	image := m.Actor.Attributes["image"]
	if m.Type == events.ImageEventType {
		image = m.Actor.Attributes["name"]
	}
	switch {
	case !f.Exact("type", string(m.Type)),
		!f.Exact("event", action) && !f.Exact("event", short),
		!f.Exact("scope", m.Scope),
		!f.Labels("label", m.Actor.Attributes),
		!named("container", events.ContainerEventType, m.Actor.ID, m.Actor.Attributes["name"]),
		!named("network", events.NetworkEventType, m.Actor.ID, m.Actor.Attributes["name"]),
		!named("volume", events.VolumeEventType, m.Actor.ID),
		len(f["image"]) > 0 && !slices.Contains(f["image"], image) && !slices.Contains(f["image"], familiarWithoutTag(image)),
		len(f["daemon"]) > 0 && m.Type != events.DaemonEventType:
		return false
	}
	return true
}
