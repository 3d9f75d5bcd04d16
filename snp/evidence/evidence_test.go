package evidence

import (
	"bytes"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/sim"
	"github.com/kcradle/kcradle/snp/verify"
)

var clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

const document = `{"version":1,"name":"p","containers":[{"name":"c","image":{"ref":"ä:1",` +
	`"config":"sha256:0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b"}}]}`

func full() *Stored {
	return &Stored{
		At: clock, Report: bytes.Repeat([]byte{1}, snp.Size), VEK: []byte{2}, Chain: []byte("-----\nchain\n"), CRL: []byte{3},
		Pod: []byte(document), Nonce: [32]byte{4}, Key: []byte{5}, Exporter: [32]byte{31: 6},
	}
}

func encode(t testing.TB, s *Stored) []byte {
	t.Helper()
	b, err := s.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	for name, s := range map[string]*Stored{
		"full":        full(),
		"bare report": {Report: make([]byte, snp.Size), VEK: []byte{1}},
		"no certificates": func() *Stored {
			s := full()
			s.VEK, s.Chain, s.CRL, s.At = nil, nil, nil, time.Time{}
			return s
		}(),
	} {
		b := encode(t, s)
		got, err := Parse(b)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, b)
		}
		if again := encode(t, got); !bytes.Equal(again, b) {
			t.Errorf("%s: got\n%s\nwant\n%s", name, again, b)
		}
		if !bytes.Equal(got.Pod, s.Pod) || !got.At.Equal(s.At) || got.Nonce != s.Nonce || got.Exporter != s.Exporter {
			t.Errorf("%s: got %+v", name, got)
		}
		if e := got.Evidence(); !bytes.Equal(e.Report, s.Report) || !bytes.Equal(e.VEK, s.VEK) || !bytes.Equal(e.Chain, s.Chain) ||
			!bytes.Equal(e.CRL, s.CRL) || !bytes.Equal(e.Pod, s.Pod) {
			t.Errorf("%s: got %+v", name, e)
		}
	}
	got, err := Parse(encode(t, full()))
	if err != nil || !reflect.DeepEqual(got, full()) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestRefusals(t *testing.T) {
	good := string(encode(t, full()))
	for _, tt := range []struct{ name, old, new, want string }{
		{"version 2", `"version": 1`, `"version": 2`, "version: 2 is not known here, want 1"},
		{"unknown field", `"vek"`, `"vcek"`, "vcek: no such field"},
		{"trusted by its own word", `"version": 1`, `"version": 1, "verified": true`, "verified: no such field"},
		{"short report", `"report": "01`, `"report": "`, "report: 1183 bytes, want 1184"},
		{"no report", `"report"`, `"raport"`, "raport: no such field"},
		{"base64", `"vek": "02"`, `"vek": "Ag=="`, "vek: 'A' after 0 characters"},
		{"upper case", `"vek": "02"`, `"vek": "0A"`, "vek: 'A' after 1 characters"},
		{"list of numbers", `"vek": "02"`, `"vek": [2]`, "vek: a list, want a string"},
		{"long certificate", `"vek": "02"`, `"vek": "` + strings.Repeat("02", kds.MaxVEK+1) + `"`, "vek: 16385 bytes, more than 16384"},
		{"long chain", `"chain": "`, `"chain": "` + strings.Repeat("x", kds.MaxChain), "chain: 65548 bytes, more than 65536"},
		{"long list", `"crl": "03"`, `"crl": "` + strings.Repeat("02", kds.MaxCRL+1) + `"`, "crl: 1048577 bytes"},
		{"long pod", `"pod": "`, `"pod": "` + strings.Repeat(" ", pod.MaxBytes), "pod: "},
		{"long key", `"key": "05"`, `"key": "` + strings.Repeat("02", maxKey+1) + `"`, "key: 16385 bytes"},
		{"short nonce", `"nonce": "04`, `"nonce": "`, "nonce: 31 bytes, want 32"},
		{"long exporter", `"exporter": "`, `"exporter": "00`, "exporter: 33 bytes, want 32"},
		{"nonce of zeros", `"nonce": "04`, `"nonce": "00`, "belong together"},
		{"no key", `"key": "05",`, ``, "belong together"},
		{"pod of a bare report", `"pod": "`, `"pod": "", "crl": "`, "crl: stands there twice"},
		{"time of day", `T12:00:00Z`, `T12:00:00+01:00`, "time: "},
		{"fraction of a second", `T12:00:00Z`, `T12:00:00.5Z`, "time: "},
		{"number for a time", `"2026-03-01T12:00:00Z"`, `1`, "time: a number, want a string"},
	} {
		b := strings.Replace(good, tt.old, tt.new, 1)
		if b == good {
			t.Fatalf("%s: nothing changed", tt.name)
		}
		if s, err := Parse([]byte(b)); s != nil || err == nil || !strings.HasPrefix(err.Error(), "evidence: ") || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want …%s…", tt.name, err, tt.want)
		}
	}
	if _, err := Parse(bytes.Repeat([]byte(" "), maxFile+1)); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("got %v", err)
	}
	for name, change := range map[string]func(*Stored){
		"short report":   func(s *Stored) { s.Report = s.Report[1:] },
		"no nonce":       func(s *Stored) { s.Nonce = [32]byte{} },
		"no pod":         func(s *Stored) { s.Pod = nil },
		"pod in Latin-1": func(s *Stored) { s.Pod = []byte("{\"\xe4\":1}") },
		"long key":       func(s *Stored) { s.Key = make([]byte, maxKey+1) },
	} {
		s := full()
		change(s)
		if b, err := s.Encode(); err == nil {
			t.Errorf("%s: got %s", name, b)
		}
	}
}

// keys are made once: they take seconds.
var keys = sync.OnceValues(sim.NewKeys)

// simulated returns stored evidence of a simulated pod that passes, and a verifier that trusts its authority.
func simulated(t testing.TB) (*Stored, *verify.Verifier) {
	t.Helper()
	k, err := keys()
	if err != nil {
		t.Fatal(err)
	}
	authority := sim.NewAuthority(k, snp.LineTurin, snp.SignerVCEK, clock)
	chip, err := authority.NewChip(1)
	if err != nil {
		t.Fatal(err)
	}
	s := full()
	chip.Report.Measurement, chip.Report.HostData = [48]byte{1}, pod.DigestOf(s.Pod)
	data, err := snp.Binding{Nonce: s.Nonce, Key: s.Key, Exporter: s.Exporter, PodDigest: pod.DigestOf(s.Pod)}.ReportData()
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []struct {
		to   *[]byte
		made func() ([]byte, error)
	}{
		{&s.Report, func() ([]byte, error) { return chip.Attest(data, 0) }},
		{&s.VEK, chip.VEKDER}, {&s.Chain, authority.Chain}, {&s.CRL, func() ([]byte, error) { return authority.CRL() }},
	} {
		if *part.to, err = part.made(); err != nil {
			t.Fatal(err)
		}
	}
	root, err := authority.Root()
	if err != nil {
		t.Fatal(err)
	}
	p := policy.Default()
	p.Measurements = []measure.Digest{{1}}
	v, err := verify.New(verify.Config{Now: func() time.Time { return clock }, Roots: verify.Roots{Turin: root}, Policy: p})
	if err != nil {
		t.Fatal(err)
	}
	return s, v
}

// TestAgain makes the decision on a file again, with the nonce that its verifier chose and with another.
func TestAgain(t *testing.T) {
	s, v := simulated(t)
	got, err := Parse(encode(t, s))
	if err != nil {
		t.Fatal(err)
	}
	r := v.Verify(t.Context(), got.Evidence(), got.Expect(s.Nonce))
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	if i := r.Checks; i == nil || r.Summary() == "" || !strings.Contains(r.Summary(), "freshness not checked") {
		t.Errorf("got %s", r.Summary())
	}
	if r := v.Verify(t.Context(), got.Evidence(), got.Expect([32]byte{5})); r.Passed() {
		t.Error("passed with another nonce")
	}
	if r := v.Verify(t.Context(), got.Evidence(), got.Expect([32]byte{})); r.Passed() {
		t.Error("passed without a nonce")
	}
	for name, change := range map[string]func(*Stored){
		"pod":      func(s *Stored) { s.Pod = append(s.Pod, '\n') },
		"key":      func(s *Stored) { s.Key = []byte{6} },
		"exporter": func(s *Stored) { s.Exporter[0]++ },
		"report":   func(s *Stored) { s.Report[0x50]++ },
		"VEK":      func(s *Stored) { s.VEK[100]++ },
	} {
		changed, err := Parse(encode(t, s))
		if err != nil {
			t.Fatal(err)
		}
		change(changed)
		if r := v.Verify(t.Context(), changed.Evidence(), changed.Expect(s.Nonce)); r.Passed() {
			t.Errorf("passed with another %s", name)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(encode(f, full()))
	f.Add(encode(f, &Stored{Report: make([]byte, snp.Size)}))
	f.Add([]byte(`{"version":1,"report":"00","pod":"\ud800"}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Parse(b)
		if err != nil {
			return
		}
		again, err := Parse(encode(t, s))
		if err != nil || !bytes.Equal(encode(t, again), encode(t, s)) {
			t.Errorf("got %+v, %v, want %+v", again, err, s)
		}
	})
}

// BenchmarkVerify is what kcradle verify does with a file, from its bytes to the verdict.
func BenchmarkVerify(b *testing.B) {
	s, v := simulated(b)
	file := encode(b, s)
	b.ReportAllocs()
	for b.Loop() {
		got, err := Parse(file)
		if err != nil {
			b.Fatal(err)
		}
		if err := v.Verify(b.Context(), got.Evidence(), got.Expect(s.Nonce)).Err(); err != nil {
			b.Fatal(err)
		}
	}
}
