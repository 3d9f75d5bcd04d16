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
	count func() // is told of each event

	mu        sync.Mutex
	past      []events.Message
	listeners map[chan events.Message]bool
	closed    bool
}

func newBus() *bus { return &bus{count: func() {}, listeners: map[chan events.Message]bool{}} }

func (b *bus) publish(m events.Message) {
	b.count()
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

// listen returns what is kept since a time and what is to come. The channel is closed when its reader is too slow, or when the
// daemon ends.
func (b *bus) listen(from time.Time) (past []events.Message, live <-chan events.Message, cancel func()) {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := make(chan events.Message, eventBacklog)
	if b.closed {
		close(l)
	} else {
		b.listeners[l] = true
	}
	past = slices.Clone(b.past)
	past = slices.DeleteFunc(past, func(m events.Message) bool { return eventTime(m).Before(from) })
	return past, l, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		delete(b.listeners, l)
	}
}

// close ends every listener's stream.
func (b *bus) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for l := range b.listeners {
		close(l)
	}
	clear(b.listeners)
}

func (d *Daemon) serveEvents(w http.ResponseWriter, r *dockerapi.Request) error {
	return dockerapi.Events[events.Message]{
		Listen: d.events.listen,
		Time:   eventTime,
		Show: func(m events.Message, f dockerapi.Filters) any {
			if eventMatches(f, m) {
				return eventShape(m)
			}
			return nil
		},
	}.Serve(w, r)
}

func eventTime(m events.Message) time.Time { return time.Unix(0, m.TimeNano) }

// oldMessage has what clients up to 1.51 also find at the top.
type oldMessage struct {
	Status string `json:"status,omitempty"`
	ID     string `json:"id,omitempty"`
	From   string `json:"from,omitempty"`
	events.Message
}

func eventShape(m events.Message) oldMessage {
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
