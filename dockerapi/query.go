package dockerapi

import (
	"encoding/json"
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/term"
)

// maxFilters bounds the query parameter "filters".
const maxFilters = 64 << 10

// Filters are the values asked for, by key.
type Filters map[string][]string

// ParseFilters reads the query parameter "filters" in both of docker's forms, {"key":{"value":true}} and
// {"key":["value"]}, and refuses keys that are not among the accepted ones.
func ParseFilters(s string, accepted ...string) (Filters, error) {
	f := Filters{}
	if s == "" {
		return f, nil
	}
	if len(s) > maxFilters {
		return nil, BadRequest("invalid filter: %d bytes are more than the limit of %d", len(s), maxFilters)
	}
	var sets map[string]map[string]bool
	if err := json.Unmarshal([]byte(s), &sets); err == nil {
		for k, values := range sets {
			for v, wanted := range values {
				if wanted {
					f[k] = append(f[k], v)
				}
			}
			slices.Sort(f[k])
		}
	} else {
		lists := map[string][]string{}
		if json.Unmarshal([]byte(s), &lists) != nil {
			return nil, BadRequest("invalid filter: %w", err)
		}
		f = lists
	}
	for k := range f {
		if !slices.Contains(accepted, k) {
			return nil, BadRequest("invalid filter '%s'", k)
		}
	}
	return f, nil
}

// Exact reports whether s is among the values of a key, or the key was not asked for.
func (f Filters) Exact(key, s string) bool {
	return len(f[key]) == 0 || slices.Contains(f[key], s)
}

// Match is Exact, or a value matches s as a regular expression.
func (f Filters) Match(key, s string) bool {
	if f.Exact(key, s) {
		return true
	}
	for _, v := range f[key] {
		if re, err := regexp.Compile(v); err == nil && re.MatchString(s) {
			return true
		}
	}
	return false
}

// Prefix is Exact, or s begins with a value.
func (f Filters) Prefix(key, s string) bool {
	return f.Exact(key, s) || slices.ContainsFunc(f[key], func(v string) bool { return strings.HasPrefix(s, v) })
}

// Labels reports whether every value of a key ("name" or "name=value") is among the labels.
func (f Filters) Labels(key string, labels map[string]string) bool {
	for _, v := range f[key] {
		name, want, hasValue := strings.Cut(v, "=")
		got, ok := labels[name]
		if !ok || hasValue && got != want {
			return false
		}
	}
	return true
}

// Bool reads the single value of a key as a boolean.
func (f Filters) Bool(key string, absent bool) (bool, error) {
	switch v := f[key]; {
	case len(v) == 0:
		return absent, nil
	case len(v) == 1 && (v[0] == "1" || v[0] == "true"):
		return true, nil
	case len(v) == 1 && (v[0] == "0" || v[0] == "false"):
		return false, nil
	default:
		return false, BadRequest("invalid filter '%s=%s'", key, v)
	}
}

// ParseTime reads a time as docker's since and until have it: seconds since 1970 with up to nine decimals, RFC 3339
// with or without its smaller parts, or a duration before now. Empty and "0" are the zero time, and so is Go's own in seconds, which
// compose sends for a container that has not been started yet.
func ParseTime(s string, now time.Time) (time.Time, error) {
	if s == "" || s == "0" {
		return time.Time{}, nil
	}
	if len(s) > 64 {
		return time.Time{}, BadRequest("invalid timestamp: %d bytes are too many", len(s))
	}
	if t, ok := parseUnix(s); ok {
		return t, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{
		time.RFC3339Nano, "2006-01-02T15:04:05.999999999", "2006-01-02T15:04Z07:00", "2006-01-02T15:04",
		"2006-01-02T15Z07:00", "2006-01-02T15", "2006-01-02Z07:00", "2006-01-02",
	} {
		if t, err := time.Parse(layout, s); err == nil {
			return t, nil
		}
	}
	return time.Time{}, BadRequest("invalid timestamp %q: want seconds since 1970, an RFC 3339 time or a duration", s)
}

// zeroUnix is the zero time in seconds since 1970.
const zeroUnix = -62135596800

func parseUnix(s string) (time.Time, bool) {
	whole, frac, hasFrac := strings.Cut(s, ".")
	sec, err := strconv.ParseInt(whole, 10, 64)
	if err == nil && sec == zeroUnix {
		return time.Time{}, true
	}
	if err != nil || sec > math.MaxInt64/int64(time.Second) || sec < math.MinInt64/int64(time.Second) {
		return time.Time{}, false
	}
	if !hasFrac {
		return time.Unix(sec, 0), true
	}
	if frac == "" || len(frac) > 9 || strings.Trim(frac, "0123456789") != "" {
		return time.Time{}, false
	}
	nsec, err := strconv.ParseInt(frac+strings.Repeat("0", 9-len(frac)), 10, 64)
	if err != nil {
		return time.Time{}, false
	}
	return time.Unix(sec, nsec), true
}

// DetachKeys reads a key sequence such as "ctrl-p,ctrl-q". Empty is docker's default, that sequence.
func DetachKeys(s string) ([]byte, error) {
	if s == "" {
		return []byte{16, 17}, nil
	}
	if len(s) > 256 {
		return nil, BadRequest("invalid escape keys (%d bytes) provided", len(s))
	}
	b, err := term.ToBytes(s)
	if err != nil {
		return nil, &Error{400, fmt.Errorf("invalid escape keys (%s) provided", s)}
	}
	return b, nil
}
