package tour

import (
	"regexp"
	"strings"
)

// rewrite is one replacement that both sides' output goes through before it is compared.
type rewrite struct {
	pattern *regexp.Regexp
	with    string
}

// What may differ: IDs, times, and process numbers.
func rewrites() []rewrite {
	re := regexp.MustCompile
	return []rewrite{
		{re(`\b[0-9a-f]{64}\b`), "<id>"},
		{re(`\b[0-9a-f]{12}\b`), "<id>"},
		{re(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|[+-]\d\d:\d\d)`), "<time>"},
		{re(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d( [+-]\d{4} [A-Z]+)?`), "<time>"},
		{re(`(Less than a second|About a minute|About an hour|\d+ (seconds?|minutes?|hours?))( ago)?`), "<duration>$3"},
	}
}

// Debian's dockerd is 20.10, the pod speaks as 28 does. Where the wording has changed in between, the old one is
// rewritten to the new.
func newWordings() []rewrite {
	re := regexp.MustCompile
	return []rewrite{
		// 28 begins its errors in lower case.
		{re(`Error response from daemon: (Cannot|Container|Invalid) `), "Error response from daemon: \x00$1 "},
	}
}

func (r result) normal() result {
	for _, s := range []*string{&r.Stdout, &r.Stderr} {
		for _, w := range append(rewrites(), newWordings()...) {
			*s = w.pattern.ReplaceAllString(*s, w.with)
		}
		for i := strings.IndexByte(*s, 0); i >= 0; i = strings.IndexByte(*s, 0) {
			*s = (*s)[:i] + strings.ToLower((*s)[i+1:i+2]) + (*s)[i+2:]
		}
	}
	return r
}
