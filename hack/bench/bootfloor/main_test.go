package main

import (
	"strings"
	"testing"
	"time"
)

func TestParseSetting(t *testing.T) {
	s, err := parseSetting("ours=/k/vmlinux,append=a=b,append=c,memory=512,cpu=max:-erms,smp=2,arg=-accel:x,plain")
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Join(s.argv("/i", s.commandLine("none", 1)), " ")
	for _, want := range []string{"-cpu max,-erms -m 512 -smp 2", "-kernel /k/vmlinux -initrd /i", "-append console=hvc0 quiet panic=-1 reboot=t a=b c -accel,x"} {
		if !strings.Contains(line, want) {
			t.Errorf("got %s\nwant … %s …", line, want)
		}
	}
	s, err = parseSetting("ours=/k/vmlinux")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := s.commandLine("base", 2_000_000), "base tsc_early_khz=2000000 tsc=reliable mitigations=off GODEBUG=cpu.sse42=off nolapic_timer"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	for _, bad := range []string{"", "=x", "a=", "a=b,smp=0", "a=b,smp=x", "a=b,what=1"} {
		if _, err := parseSetting(bad); err == nil {
			t.Errorf("setting %q was accepted", bad)
		}
	}
}

func TestMedian(t *testing.T) {
	for _, tc := range []struct {
		in   []time.Duration
		want time.Duration
	}{{[]time.Duration{3, 1, 2}, 2}, {[]time.Duration{4, 1, 3, 2}, 2}, {[]time.Duration{7}, 7}} {
		if got := median(tc.in); got != tc.want {
			t.Errorf("median of %v: got %d, want %d", tc.in, got, tc.want)
		}
	}
}
