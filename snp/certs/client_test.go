package certs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/verify"
)

// answer is one answer of a server.
type answer struct {
	code  int // 0: what is published
	after string
}

func TestClient(t *testing.T) {
	chip := newChip(t, snp.LineTurin, snp.SignerVCEK, 1)
	published := publish(t, chip)
	const s = time.Second
	tests := []struct {
		name    string
		answers []answer // the last one again and again
		waits   []time.Duration
		code    int // of the StatusError; 0: it is there
		after   time.Duration
	}{
		{name: "there", answers: []answer{{}}},
		{name: "no such chip", answers: []answer{{code: 404}}, code: 404},
		{name: "bad request", answers: []answer{{code: 400, after: "7"}}, code: 400},
		{name: "forbidden", answers: []answer{{code: 403}}, code: 403},
		{name: "no content", answers: []answer{{code: 204}}, code: 204},
		{name: "busy, says for how long", answers: []answer{{429, "10"}, {429, "20"}, {}}, waits: []time.Duration{10 * s, 20 * s}},
		{name: "busy until", answers: []answer{{429, clock.Add(42 * s).Format(http.TimeFormat)}, {}}, waits: []time.Duration{42 * s}},
		{name: "busy until a while ago", answers: []answer{{429, clock.Add(-s).Format(http.TimeFormat)}, {}}, waits: []time.Duration{s}},
		{name: "busy, does not say", answers: []answer{{code: 429}, {code: 429}, {code: 429}, {}}, waits: []time.Duration{s, 2 * s, 4 * s}},
		{name: "busy, says rubbish", answers: []answer{{429, "soon"}, {429, "-3"}, {}}, waits: []time.Duration{s, 2 * s}},
		{name: "out of order", answers: []answer{{code: 500}, {code: 502}, {code: 503}, {code: 504}, {}}, waits: []time.Duration{s, 2 * s, 4 * s, 8 * s}},
		{name: "busy, then gone", answers: []answer{{code: 503}, {code: 404}}, waits: []time.Duration{s}, code: 404},
		{name: "busy for ever", answers: []answer{{code: 429}}, waits: []time.Duration{s, 2 * s, 4 * s, 8 * s, 16 * s, 30 * s, 30 * s}, code: 429, after: 30 * s},
		{name: "says at once, for ever", answers: []answer{{429, "0"}}, waits: slices.Repeat([]time.Duration{s}, 9), code: 429, after: s},
		{name: "says tomorrow", answers: []answer{{503, "86400"}}, code: 503, after: 24 * time.Hour},
		{name: "says a number of all bits", answers: []answer{{503, "18446744073709551615"}}, code: 503, after: 1 << 30 * s},
		{name: "says the year 9999", answers: []answer{{503, "Fri, 31 Dec 9999 23:59:59 GMT"}}, code: 503, after: 1 << 30 * s},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			asked := 0
			server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				a := tt.answers[min(asked, len(tt.answers)-1)]
				asked++
				if a.code == 0 {
					published.KDS.ServeHTTP(w, r)
					return
				}
				if a.after != "" {
					w.Header().Set("Retry-After", a.after)
				}
				w.WriteHeader(a.code)
			}))
			defer server.Close()
			var waits []time.Duration
			c := &Client{HTTP: server.Client(), Now: now, Service: server.URL, Wait: func(_ context.Context, d time.Duration) error {
				waits = append(waits, d)
				return nil
			}}
			got, err := c.Fetch(t.Context(), chip.Object())
			if tt.code == 0 {
				if want := published.KDS[chip.Object().URL()]; err != nil || !bytes.Equal(got, want) {
					t.Errorf("got %d bytes, %v", len(got), err)
				}
			} else {
				var status *StatusError
				if !errors.As(err, &status) || status.Code != tt.code || status.RetryAfter != tt.after || status.Object != chip.Object() {
					t.Fatalf("got %v, want status %d, again in %s", err, tt.code, tt.after)
				}
				want := "does not have it"
				if tt.after > 0 {
					want = "try again in " + tt.after.String()
				}
				if !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), server.URL) {
					t.Errorf("got %v, want …%s…", err, want)
				}
			}
			if !slices.Equal(waits, tt.waits) {
				t.Errorf("waited %v, want %v", waits, tt.waits)
			}
			if want := len(tt.waits) + 1; asked != want {
				t.Errorf("asked %d times, want %d", asked, want)
			}
		})
	}
}

// TestClientBounds has servers that send too much, or break off.
func TestClientBounds(t *testing.T) {
	o := kds.CRL(snp.LineMilan, snp.SignerVCEK)
	endless := func(w http.ResponseWriter, _ *http.Request) {
		for block := make([]byte, 64<<10); ; {
			if _, err := w.Write(block); err != nil {
				return
			}
		}
	}
	short := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		fmt.Fprint(w, "ten bytes.")
	}
	silent := func(w http.ResponseWriter, _ *http.Request) { panic(http.ErrAbortHandler) }
	client := func(t *testing.T, h http.HandlerFunc) *Client {
		server := httptest.NewServer(h)
		t.Cleanup(server.Close)
		return &Client{HTTP: server.Client(), Now: now, Service: server.URL, Wait: func(context.Context, time.Duration) error {
			t.Error("waited")
			return nil
		}}
	}
	var refused *RefusedError
	if b, err := client(t, endless).Fetch(t.Context(), o); b != nil || !errors.As(err, &refused) || !strings.Contains(err.Error(), "more than 1048576 bytes") {
		t.Errorf("endless: got %d bytes, %v", len(b), err)
	}
	if b, err := client(t, short).Fetch(t.Context(), o); b != nil || !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("short: got %d bytes, %v", len(b), err)
	}
	for wait, want := range map[time.Duration]bool{0: false, time.Second: true} {
		if err := error(&StatusError{RetryAfter: wait}); errors.Is(err, verify.ErrUnreachable) != want {
			t.Errorf("told to wait %s: unreachable is not %t", wait, want)
		}
	}
	var unreachable *url.Error
	if b, err := client(t, silent).Fetch(t.Context(), o); b != nil || !errors.As(err, &unreachable) || !errors.Is(err, verify.ErrUnreachable) {
		t.Errorf("silent: got %d bytes, %v", len(b), err)
	}
	gone := httptest.NewServer(http.NotFoundHandler())
	gone.Close()
	if _, err := (&Client{HTTP: gone.Client(), Now: now, Service: gone.URL}).Fetch(t.Context(), o); !errors.As(err, &unreachable) {
		t.Errorf("gone: got %v", err)
	}
	if _, err := client(t, silent).Fetch(t.Context(), kds.Object{}); err == nil {
		t.Error("the zero object is one")
	}
	if _, err := new(Client).Fetch(t.Context(), o); err == nil || !strings.Contains(err.Error(), "required") {
		t.Errorf("got %v", err)
	}
	if _, err := (&Client{HTTP: gone.Client(), Now: now, Service: "::"}).Fetch(t.Context(), o); err == nil {
		t.Error("no address is one")
	}
}

// TestClientCancelled ends a wait, and a question.
func TestClientCancelled(t *testing.T) {
	busy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "60")
		w.WriteHeader(http.StatusTooManyRequests)
	}))
	defer busy.Close()
	o := kds.Chain(snp.LineGenoa, snp.SignerVCEK)
	ctx, cancel := context.WithCancel(t.Context())
	// The real timer, which would take a minute: the wait begins when the clock is read for the header.
	c := &Client{HTTP: busy.Client(), Service: busy.URL, Now: func() time.Time { cancel(); return clock }}
	var status *StatusError
	if _, err := c.Fetch(ctx, o); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	c.Now = now
	if _, err := c.Fetch(ctx, o); !errors.Is(err, context.Canceled) || errors.As(err, &status) {
		t.Errorf("got %v", err)
	}
	if err := c.wait(t.Context(), time.Nanosecond); err != nil {
		t.Error(err)
	}
}

// TestClientToVerdict is the whole road: an empty directory, a server on the loopback, a verdict; then the server is gone.
func TestClientToVerdict(t *testing.T) {
	chip := newChip(t, snp.LineTurin, snp.SignerVCEK, 1)
	server := httptest.NewTLSServer(publish(t, chip).KDS)
	defer server.Close()
	report, err := chip.Attest([64]byte{1}, 0)
	if err != nil {
		t.Fatal(err)
	}
	cache := open(t, Config{Dir: t.TempDir(), Upstream: &Client{HTTP: server.Client(), Now: now, Service: server.URL}})
	for range 2 {
		if err := verified(t, roots(t), cache, verify.Evidence{Report: report}); err != nil {
			t.Error(err)
		}
		server.Close()
	}
}

func FuzzRetryAfter(f *testing.F) {
	for _, s := range []string{"", "0", "10", "-1", "1e3", "18446744073709551615", "18446744073709551616", "Fri, 31 Dec 9999 23:59:59 GMT",
		"Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994", "Thu, 01 Jan 1970 00:00:00 GMT"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if d := retryAfter(s, clock); d != 0 && d < firstWait || d > 1<<30*time.Second {
			t.Errorf("%q: %s", s, d)
		}
	})
}
