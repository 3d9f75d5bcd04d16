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
		// Of dockerd's host, whenever it looks at limits.
		{re(`IPv4 forwarding is disabled. Networking will not work.\n`), ""},
		{re(`(Less than a second|About a minute|About an hour|\d+ (seconds?|minutes?|hours?))( ago)?`), "<duration>$3"},
	}
}

// Debian's dockerd is 20.10, the pod speaks as 28 does.
func newer() []rewrite {
	re := regexp.MustCompile
	return []rewrite{
		// The pod has no runc and no shim, whose names stand before and behind what they could not do.
		{re(`failed to create shim task: OCI runtime create failed: runc create failed: |OCI runtime exec failed: exec failed: `), ""},
		{re(`(unable to start container process: .*): unknown`), "$1"},
		// What stood twice stands once.
		{re(`no such image: (\S+): No such image`), "No such image"},
		// Later versions tell for how long a container ran.
		{re(`"execDuration":"\d+",`), ""},
		// The words for a wrong restart policy.
		{re(`invalid restart policy '(\w+)'`), "invalid restart policy: unknown policy '$1'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'"},
		{re(`maximum retry count cannot be used with restart policy '\w+'`), "invalid restart policy: maximum retry count can only be used with 'on-failure'"},
		// An exec whose program is not there ended with 126.
		{re(`("ExitCode"|exec_die .*"exitCode"):"?12[67]"?`), "$1:12N"},
	}
}

// capital is where 20.10 begins what 28 has in lower case.
var capital = regexp.MustCompile(`(Error response from daemon|cannot kill container: \S+): (Cannot|Container|Invalid) `)

func (r result) normal() result {
	for _, s := range []*string{&r.Stdout, &r.Stderr} {
		for _, w := range append(rewrites(), newer()...) {
			*s = w.pattern.ReplaceAllString(*s, w.with)
		}
		for range 2 { // a capital may follow another
			*s = capital.ReplaceAllStringFunc(*s, func(m string) string {
				i := strings.LastIndex(m, ": ") + 2
				return m[:i] + strings.ToLower(m[i:i+1]) + m[i+1:]
			})
		}
	}
	return r
}
