package dockerapi

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
)

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte("\x01\x00\x00\x00\x00\x00\x00\x03out\x02\x00\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x01\x00\x00\x00\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		var again bytes.Buffer
		w := NewFrameWriter(&again)
		for {
			stream, p, err := ReadFrame(r, nil)
			if err != nil {
				break
			}
			if err := w.WriteFrame(stream, p); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.HasPrefix(b, again.Bytes()) {
			t.Errorf("frames of %x do not survive a round trip: %x", b, again.Bytes())
		}
	})
}

func FuzzFilters(f *testing.F) {
	f.Add(`{"name":{"a":true}}`, "a")
	f.Add(`{"name":["^a("]}`, "b")
	f.Fuzz(func(t *testing.T, s, value string) {
		got, err := ParseFilters(s, "name", "label")
		if err != nil {
			if Status(err) != 400 {
				t.Errorf("status %d: %v", Status(err), err)
			}
			return
		}
		for k := range got {
			if k != "name" && k != "label" {
				t.Errorf("accepted the key %q", k)
			}
		}
		if got.Exact("name", value) && !(got.Match("name", value) && got.Prefix("name", value)) {
			t.Errorf("%q is exact but no match of %v", value, got)
		}
		got.Labels("label", map[string]string{value: value})
	})
}

func FuzzParseTime(f *testing.F) {
	now := time.Unix(1700000000, 0)
	for _, s := range []string{"1.5", "10m", "2006-01-02T15:04:05Z", "-1", "0.000000001"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if _, err := ParseTime(s, now); err != nil && Status(err) != 400 {
			t.Errorf("status %d: %v", Status(err), err)
		}
	})
}

func FuzzDetachKeys(f *testing.F) {
	f.Add("ctrl-p,ctrl-q")
	f.Add(",")
	f.Fuzz(func(t *testing.T, s string) {
		b, err := DetachKeys(s)
		if err != nil && Status(err) != 400 {
			t.Errorf("status %d: %v", Status(err), err)
		}
		if err == nil && len(b) == 0 {
			t.Errorf("%q gives no keys and no error", s)
		}
	})
}

func FuzzBodies(f *testing.F) {
	f.Add([]byte(`{"Cmd":["true"],"ConsoleSize":[24,80]}`))
	f.Add([]byte(`{"Detach":true}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range []any{new(container.ExecCreateRequest), new(container.ExecStartRequest)} {
			r := &Request{Request: httptest.NewRequest("POST", "/", bytes.NewReader(b))}
			if err := ReadJSON(r, v, true); err != nil && !slices.Contains([]int{400, 413}, Status(err)) {
				t.Errorf("status %d: %v", Status(err), err)
			}
		}
	})
}

func FuzzPath(f *testing.F) {
	f.Add("/v1.41/containers/x/json")
	f.Add("/v1..1//")
	f.Add("/images/a/b/json")
	ok := func(_ http.ResponseWriter, r *Request) error {
		if r.Version < MinVersion || r.Version > MaxVersion {
			return Errorf(500, "version %s got through", r.Version)
		}
		if r.Var("id") == "" && r.Var("name") == "" {
			return Errorf(500, "no variable")
		}
		return nil
	}
	h := testAPI(Route{Method: "GET", Path: "/containers/{id}/json", Handle: ok}, Route{Method: "GET", Path: "/images/{name+}/json", Handle: ok})
	f.Fuzz(func(t *testing.T, path string) {
		r := httptest.NewRequest("GET", "/", nil)
		r.URL.Path = path
		w := httptest.NewRecorder()
		h.ServeHTTP(w, r)
		if !slices.Contains([]int{200, 400, 404}, w.Code) {
			t.Errorf("%q: status %d: %s", path, w.Code, w.Body)
		}
	})
}
