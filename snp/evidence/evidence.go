// Package evidence keeps what a pod was verified with in a file, so that the decision can be made again, elsewhere and later:
//
//	s, err := evidence.Parse(file)
//	x, err := s.Expect(nonce)
//	result := verifier.Verify(ctx, s.Evidence(), x)
//
// The nonce has to come from elsewhere: whoever hands in a file with a nonce of his own proves nothing to anybody.
package evidence

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/internal/strict"
	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/snp/verify"
)

// Version is the version of the evidence file that this code reads and writes:
//
//	1  the first
const Version = 1

// Bounds of what is in a file, in bytes.
const (
	maxKey  = 16 << 10
	maxFile = 2*(snp.Size+kds.MaxVEK+kds.MaxCRL+maxKey) + 6*(kds.MaxChain+pod.MaxBytes) // as text, at its longest
)

// Stored is an evidence file.
type Stored struct {
	At       time.Time // when it was stored, by the word of who did; zero: not said
	Report   []byte    // required, snp.Size bytes
	VEK      []byte    // DER; empty: not stored
	Chain    []byte    // PEM; empty: not stored
	CRL      []byte    // DER; empty: not stored
	Pod      []byte    // pod.json; empty: a bare report
	Nonce    [32]byte  // of a pod
	Key      []byte    // of a pod, see snp.Binding
	Exporter [32]byte  // of a pod
}

// file is Stored as it is written. Documents are text, everything else hexadecimal digits.
type file struct {
	Version  int          `json:"version" strict:"required"`
	Time     instant      `json:"time,omitzero"`
	Report   strict.Bytes `json:"report" strict:"required"`
	VEK      strict.Bytes `json:"vek,omitempty"`
	Chain    string       `json:"chain,omitempty"`
	CRL      strict.Bytes `json:"crl,omitempty"`
	Pod      string       `json:"pod,omitempty"`
	Nonce    strict.Bytes `json:"nonce,omitempty"`
	Key      strict.Bytes `json:"key,omitempty"`
	Exporter strict.Bytes `json:"exporter,omitempty"`
}

// instant is a time in UTC to the second.
type instant struct{ time.Time }

// MarshalText writes the time as RFC 3339 has it.
func (i instant) MarshalText() ([]byte, error) { return []byte(i.UTC().Format(time.RFC3339)), nil }

// UnmarshalText reads what MarshalText writes, and no other way to write a time.
func (i *instant) UnmarshalText(b []byte) error {
	t, err := time.Parse(time.RFC3339, string(b))
	if err != nil || t.UTC().Format(time.RFC3339) != string(b) {
		return fmt.Errorf("%.80q, want a time such as 2026-01-02T15:04:05Z", b)
	}
	i.Time = t.UTC()
	return nil
}

// MarshalJSON writes the time as text.
func (i instant) MarshalJSON() ([]byte, error) {
	b, err := i.MarshalText()
	return []byte(`"` + string(b) + `"`), err
}

// Parse reads an evidence file. As in a policy, unknown fields and loose spellings are errors. What the bytes in it say is
// for a verifier.
func Parse(b []byte) (*Stored, error) {
	var f file
	if err := strict.Decode(b, strict.Limits{Bytes: maxFile, Depth: 1, Entries: 32}, &f); err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	if f.Version != Version {
		return nil, fmt.Errorf("evidence: version: %d is not known here, want %d", f.Version, Version)
	}
	s := &Stored{
		At: f.Time.Time, Report: f.Report, VEK: f.VEK, Chain: []byte(f.Chain), CRL: f.CRL, Pod: []byte(f.Pod), Key: f.Key,
	}
	for _, field := range []struct {
		name string
		from []byte
		to   *[32]byte
	}{{"nonce", f.Nonce, &s.Nonce}, {"exporter", f.Exporter, &s.Exporter}} {
		if n := len(field.from); n != 0 && n != len(field.to) {
			return nil, fmt.Errorf("evidence: %s: %d bytes, want %d", field.name, n, len(field.to))
		}
		copy(field.to[:], field.from)
	}
	if err := s.validate(); err != nil {
		return nil, err
	}
	return s, nil
}

// validate holds the parts against their bounds, and wants the parts of a pod to be there together.
func (s *Stored) validate() error {
	for _, part := range []struct {
		name string
		b    []byte
		most int
	}{
		{"vek", s.VEK, kds.MaxVEK},
		{"chain", s.Chain, kds.MaxChain},
		{"crl", s.CRL, kds.MaxCRL},
		{"pod", s.Pod, pod.MaxBytes},
		{"key", s.Key, maxKey},
	} {
		if len(part.b) > part.most {
			return fmt.Errorf("evidence: %s: %d bytes, more than %d", part.name, len(part.b), part.most)
		}
	}
	if len(s.Report) != snp.Size {
		return fmt.Errorf("evidence: report: %d bytes, want %d", len(s.Report), snp.Size)
	}
	of := map[string]bool{"pod": len(s.Pod) > 0, "nonce": s.Nonce != [32]byte{}, "key": len(s.Key) > 0, "exporter": s.Exporter != [32]byte{}}
	for _, name := range []string{"nonce", "key", "exporter"} {
		if of[name] != of["pod"] {
			return errors.New("evidence: pod, nonce, key and exporter belong together: of a pod all four are there, of a bare report none")
		}
	}
	return nil
}

// Encode returns the bytes that Parse reads.
func (s *Stored) Encode() ([]byte, error) {
	if err := s.validate(); err != nil {
		return nil, err
	}
	f := file{
		Version: Version, Time: instant{s.At}, Report: s.Report, VEK: s.VEK, Chain: string(s.Chain), CRL: s.CRL,
		Pod: string(s.Pod), Key: s.Key,
	}
	if len(s.Pod) > 0 {
		f.Nonce, f.Exporter = s.Nonce[:], s.Exporter[:]
	}
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("evidence: %w", err)
	}
	if back, err := Parse(b); err != nil || string(back.Pod) != string(s.Pod) || string(back.Chain) != string(s.Chain) {
		return nil, errors.New("evidence: pod or chain is not UTF-8")
	}
	return append(b, '\n'), nil
}

// Evidence returns what is to be verified.
func (s *Stored) Evidence() verify.Evidence {
	return verify.Evidence{Report: s.Report, VEK: s.VEK, Chain: s.Chain, CRL: s.CRL, Pod: s.Pod}
}

// Expect returns what a verifier who chose nonce expects of the evidence. Key and connection are the stored ones: of a
// connection that is gone a report can only say that it was the pod's. A bare report has no nonce; expect its report data
// yourself.
func (s *Stored) Expect(nonce [32]byte) verify.Expectation {
	return verify.Expectation{Nonce: nonce, Key: s.Key, Exporter: s.Exporter, Stored: true, StoredAt: s.At}
}
