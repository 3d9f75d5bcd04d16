package network

import (
	"bufio"
	"io"
	"net/netip"
	"os"
	"strings"
)

const (
	resolvConf        = "/etc/resolv.conf"
	maxResolvConf     = 64 << 10
	maxServers        = 8
	maxSearch         = 32
	maxSearchDomain   = 253
	defaultServerIPv4 = "127.0.0.1" // resolv.conf(5): without a nameserver line the one on this machine
)

// resolvers is what a resolv.conf says.
type resolvers struct {
	servers []netip.Addr
	search  []string
}

// readResolvConf reads a resolv.conf as resolv.conf(5) has it. A missing file is an empty one.
func readResolvConf(path string) resolvers {
	f, err := os.Open(path)
	if err != nil {
		return resolvers{}
	}
	defer f.Close()
	return parseResolvConf(io.LimitReader(f, maxResolvConf))
}

func parseResolvConf(r io.Reader) resolvers {
	var c resolvers
	s := bufio.NewScanner(r)
	for s.Scan() {
		line := s.Text()
		if i := strings.IndexAny(line, ";#"); i >= 0 {
			line = line[:i]
		}
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		switch f[0] {
		case "nameserver":
			if a, err := netip.ParseAddr(f[1]); err == nil && len(c.servers) < maxServers {
				c.servers = append(c.servers, a.Unmap())
			}
		case "domain", "search": // the last line wins
			c.search = nil
			for _, d := range f[1:] {
				if d = strings.TrimSuffix(d, "."); d != "" && len(d) <= maxSearchDomain && len(c.search) < maxSearch {
					c.search = append(c.search, d)
				}
			}
		}
	}
	return c
}
