package tsc

import (
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

func TestConstant(t *testing.T) {
	good := "processor\t: 0\nflags\t\t: fpu constant_tsc sse\n"
	for _, tc := range []struct {
		name, info string
		want       bool
	}{
		{"one", good, true},
		{"two", good + "\n" + good, true},
		{"one of two", good + strings.Replace(good, "constant_tsc", "tsc", 1), false},
		{"a longer word", strings.Replace(good, "constant_tsc", "constant_tsc_x", 1), false},
		{"none", "", false},
	} {
		if got := constant(tc.info); got != tc.want {
			t.Errorf("%s: got %v, want %v", tc.name, got, tc.want)
		}
	}
}

func TestFrequency(t *testing.T) {
	for _, tc := range []struct {
		cycles  uint64
		elapsed time.Duration
		want    uint32
	}{
		{2_596_120_000, time.Second, 2_596_120},
		{25_961_200, 10 * time.Millisecond, 2_596_120},
		{0, time.Second, 0},
		{1, 0, 0},
		{1 << 63, time.Second, 0},
		{1000, -time.Second, 0},
	} {
		if got := frequency(tc.cycles, tc.elapsed); got != tc.want {
			t.Errorf("%d cycles in %v: got %d kHz, want %d", tc.cycles, tc.elapsed, got, tc.want)
		}
	}
}

// TestKHz: two measurements agree to one part in a thousand, which they would not if the readings were not paired.
func TestKHz(t *testing.T) {
	first, err := KHz(t.Context())
	if info, _ := os.ReadFile("/proc/cpuinfo"); !constant(string(info)) {
		if !errors.Is(err, ErrUnusable) {
			t.Errorf("without a constant counter: got %v, want %v", err, ErrUnusable)
		}
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	second, err := KHz(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if d := max(first, second) - min(first, second); d > first/1000 {
		t.Errorf("measured %d and %d kHz", first, second)
	}
	t.Logf("%d and %d kHz", first, second)
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := KHz(done); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v", err)
	}
}
