package shape

import (
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/spec"
)

func TestStatus(t *testing.T) {
	now := time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	for _, tt := range []struct {
		state spec.State
		want  string
	}{
		{spec.State{Status: "created"}, "Created"},
		{spec.State{Status: "created", ExitCode: 127, Finished: ago(time.Second)}, "Created"},
		{spec.State{Status: "running", Started: ago(2 * time.Minute)}, "Up 2 minutes"},
		{spec.State{Status: "running", Started: ago(500 * time.Millisecond)}, "Up Less than a second"},
		{spec.State{Status: "running", Started: ago(2 * time.Minute), Health: "healthy"}, "Up 2 minutes (healthy)"},
		{spec.State{Status: "running", Started: ago(3 * time.Hour), Health: "starting"}, "Up 3 hours (health: starting)"},
		{spec.State{Status: "running", Started: ago(50 * time.Hour), Health: "unhealthy"}, "Up 2 days (unhealthy)"},
		{spec.State{Status: "paused", Started: ago(time.Minute), Health: "healthy"}, "Up About a minute (Paused)"},
		{spec.State{Status: "restarting", ExitCode: 2, Started: ago(time.Hour), Finished: ago(5 * time.Second)}, "Restarting (2) 5 seconds ago"},
		{spec.State{Status: "exited", Started: ago(time.Hour), Finished: ago(3 * time.Second)}, "Exited (0) 3 seconds ago"},
		{spec.State{Status: "exited", ExitCode: 137, Started: ago(time.Hour), Finished: ago(60 * 24 * time.Hour)}, "Exited (137) 2 months ago"},
		{spec.State{Status: "dead"}, "Dead"},
	} {
		if got := Status(tt.state, now); got != tt.want {
			t.Errorf("%+v: got %q, want %q", tt.state, got, tt.want)
		}
	}
}

// Each filter alone, over three containers, the newest first.
func TestSelect(t *testing.T) {
	since := time.Unix(1, 0)
	list := []Candidate{
		{ID: "c3", Name: "new", State: spec.State{Status: "created"}, Exposed: []string{"53/udp"}},
		{ID: "b2", Name: "web", State: spec.State{Status: "running", Started: since, Health: "healthy"}, Labels: map[string]string{"tier": "front"},
			Published: []string{"80/tcp"}, Exposed: []string{"80/tcp"}, Mounts: []spec.Mount{{Source: "data", Target: "/data"}}},
		{ID: "a1", Name: "old", State: spec.State{Status: "exited", ExitCode: 3, Started: since, Finished: since}},
	}
	for i := range list {
		c := &list[i]
		c.Ancestor = func(w string) bool { return w == "image" && c.Name != "old" }
		c.Network = func(w string) bool { return w == "bridge" && c.Name == "web" }
	}
	find := func(ref string) (string, error) {
		for _, c := range list {
			if c.Name == ref {
				return c.ID, nil
			}
		}
		return "", dockerapi.NotFound("No such container: %s", ref)
	}
	for _, tt := range []struct{ query, want string }{
		{"", "web"},
		{"all=1", "new web old"},
		{"limit=2", "new web"},
		{`filters={"status":["exited"]}`, "old"},
		{`filters={"status":["gone"]}`, "invalid filter 'status=gone'"},
		{`all=1&filters={"name":["^/?w"]}`, "web"},
		{`all=1&filters={"id":["a1"]}`, "old"},
		{`all=1&filters={"label":["tier=front"]}`, "web"},
		{`all=1&filters={"label":["tier=back"]}`, ""},
		{`all=1&filters={"exited":["3"]}`, "old"},
		{`all=1&filters={"exited":["0"]}`, ""},
		{`all=1&filters={"health":["healthy"]}`, "web"},
		{`all=1&filters={"health":["none"]}`, "new old"},
		{`all=1&filters={"before":["web"]}`, "old"},
		{`all=1&filters={"since":["web"]}`, "new"},
		{`all=1&filters={"since":["nobody"]}`, "no such container nobody"},
		{`all=1&filters={"ancestor":["image"]}`, "new web"},
		{`all=1&filters={"network":["bridge"]}`, "web"},
		{`all=1&filters={"volume":["data"]}`, "web"},
		{`all=1&filters={"volume":["/data"]}`, "web"},
		{`all=1&filters={"publish":["80"]}`, "web"},
		{`all=1&filters={"expose":["50-60/udp"]}`, "new"},
		{`all=1&filters={"is-task":["true"]}`, ""},
		{`all=1&filters={"color":["red"]}`, "invalid filter 'color'"},
	} {
		form, err := url.ParseQuery(strings.NewReplacer(`"`, "%22", "^", "%5E").Replace(tt.query))
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		s, err := Select(&dockerapi.Request{Request: &http.Request{Form: form}}, find)
		if err != nil {
			got = err.Error()
		} else {
			var names []string
			for _, i := range s.Apply(list) {
				names = append(names, list[i].Name)
			}
			got = strings.Join(names, " ")
		}
		if got != tt.want {
			t.Errorf("%s: got %q, want %q", tt.query, got, tt.want)
		}
	}
}

func TestCommand(t *testing.T) {
	args := []string{"sh", "-c", "echo a b"}
	if got, want := Command(args), "sh -c 'echo a b'"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if !slices.Equal(args, []string{"sh", "-c", "echo a b"}) {
		t.Errorf("the arguments became %q", args)
	}
}

// Whatever a client asks for is refused in words or selects containers of the list, each once and in its order.
func FuzzSelect(f *testing.F) {
	f.Add("1", "2", `{"status":["exited"],"name":["a.*"]}`)
	f.Add("", "-1", `{"publish":{"80-90/tcp":true},"before":["x"]}`)
	list := []Candidate{
		{ID: "b", Name: "x", State: spec.State{Status: "running"}, Published: []string{"80/tcp"}},
		{ID: "a", Name: "y", State: spec.State{Status: "exited", Started: time.Unix(1, 0)}},
	}
	for i := range list {
		list[i].Ancestor, list[i].Network = func(string) bool { return true }, func(string) bool { return false }
	}
	f.Fuzz(func(t *testing.T, all, limit, filters string) {
		form := url.Values{"all": {all}, "limit": {limit}, "filters": {filters}}
		s, err := Select(&dockerapi.Request{Request: &http.Request{Form: form}}, func(ref string) (string, error) { return ref, nil })
		if err != nil {
			return
		}
		last := -1
		for _, i := range s.Apply(list) {
			if i <= last || i >= len(list) {
				t.Fatalf("index %d after %d", i, last)
			}
			last = i
		}
	})
}
