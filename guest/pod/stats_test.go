package pod

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseHostCPU(t *testing.T) {
	total, online, err := parseHostCPU(strings.NewReader("cpu  1 2 3 4 5 6 7 8 900 900\ncpu0 1 1 1 1 1 1 1 1 1 1\ncpu1 1 1 1 1 1 1 1 1 1 1\nintr 5\n"))
	if err != nil || total != 36*1e7 || online != 2 {
		t.Errorf("got %d ns on %d CPUs (%v), want 360000000 on 2: guest time is contained in user time", total, online, err)
	}
	if _, _, err := parseHostCPU(strings.NewReader("cpu  x\n")); err == nil {
		t.Error("no error for a counter that is no number")
	}
}

func TestParseNetDev(t *testing.T) {
	const in = `Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo: 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9 9
  eth0: 1 2 3 4 0 0 0 0 5 6 7 8 0 0 0 0
`
	got, err := parseNetDev(strings.NewReader(in))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]NetworkStats{"eth0": {1, 2, 3, 4, 5, 6, 7, 8}}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("parseNetDev (-want +got):\n%s", d)
	}
	if _, err := parseNetDev(strings.NewReader("eth0: 1 2 3\n")); err == nil {
		t.Error("no error for a line that is too short")
	}
}

func TestParseMemTotal(t *testing.T) {
	if n, err := parseMemTotal(strings.NewReader("MemFree: 1 kB\nMemTotal:  4 kB\n")); err != nil || n != 4096 {
		t.Errorf("got %d, %v; want 4096", n, err)
	}
	if _, err := parseMemTotal(strings.NewReader("")); err == nil {
		t.Error("no error without the line")
	}
}
