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

// What may differ: IDs, times, the process numbers of docker top; what a shell says to a terminal when it happens to be
// fast enough; what the client logs when a copy is refused before it has sent all.
func rewrites() []rewrite {
	re := regexp.MustCompile
	return []rewrite{
		{re(`\x1b\[6n|\r[%>] \x1b\[J`), ""},
		{re(`(?m)^time="[^"]*" level=error msg="([^"\\]|\\.)*"\n`), ""},
		{re(`(?m)^((?:root +)?)\d+ +((?:\d+ +\d+ +\d\d:\d\d)|sleep)`), "$1<pid> $2"},
		{re(`<pid> \d+ +\d+ +\d\d:\d\d`), "<pid> <parent> <C> <start>"},
		{re(`\b[0-9a-f]{64}\b`), "<id>"},
		{re(`\b[0-9a-f]{12}\b`), "<id>"},
		{re(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|[+-]\d\d:\d\d)`), "<time>"},
		{re(`\d{4}-\d\d-\d\d \d\d:\d\d:\d\d( [+-]\d{4} [A-Z]+)?`), "<time>"},
		{re(`(Less than a second|About a minute|About an hour|\d+ (seconds?|minutes?|hours?))( ago)?`), "<duration>$3"},
	}
}

// Debian's dockerd is 20.10, the pod speaks as 28 does: it begins its errors in lower case.
var capital = regexp.MustCompile(`Error response from daemon: (Cannot|Container|Invalid) `)

func (r result) normal() result {
	for _, s := range []*string{&r.Stdout, &r.Stderr} {
		for _, w := range rewrites() {
			*s = w.pattern.ReplaceAllString(*s, w.with)
		}
		*s = capital.ReplaceAllStringFunc(*s, strings.ToLower)
	}
	return r
}
