// Package tsc measures the frequency of the host's time stamp counter. An emulated guest reads the host's counter, has
// no paravirtual clock to learn its frequency from, and fails to calibrate it against an emulated timer when the host
// is busy; a guest that was told keeps a proper clock.
//
//	khz, err := tsc.KHz(ctx) // for kernel.Emulation
package tsc

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

// ErrUnusable says that this host's counter changes its pace, or does not exist.
var ErrUnusable = errors.New("tsc: the time stamp counter of this host is not constant")

// window is how long the counter is watched: the two readings are good to a microsecond or better, so the result is
// good to 50 parts in a million, a tenth of what the kernel's own calibration allows itself.
const window = 20 * time.Millisecond

// KHz measures for 20 milliseconds and returns thousands of cycles per second.
func KHz(ctx context.Context) (uint32, error) {
	info, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return 0, fmt.Errorf("measure the time stamp counter: %w", err)
	}
	if !constant(string(info)) {
		return 0, ErrUnusable
	}
	c0, t0 := read()
	timer := time.NewTimer(window)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	c1, t1 := read()
	khz := frequency(c1-c0, t1.Sub(t0))
	if khz == 0 {
		return 0, ErrUnusable
	}
	return khz, nil
}

// constant reports whether all processors of a /proc/cpuinfo count at one pace.
func constant(info string) bool {
	seen := false
	for line := range strings.Lines(info) {
		name, flags, _ := strings.Cut(line, ":")
		if strings.TrimSpace(name) != "flags" {
			continue
		}
		if !slices.Contains(strings.Fields(flags), "constant_tsc") {
			return false
		}
		seen = true
	}
	return seen
}

// frequency is zero for what no processor does: below 100 MHz, above 20 GHz.
func frequency(cycles uint64, elapsed time.Duration) uint32 {
	if elapsed <= 0 {
		return 0
	}
	khz := float64(cycles) / elapsed.Seconds() / 1000
	if khz < 100_000 || khz > 20_000_000 {
		return 0
	}
	return uint32(khz + 0.5)
}

// read pairs the counter with the clock: of several attempts the one that was disturbed least.
func read() (cycles uint64, at time.Time) {
	best := ^uint64(0)
	for range 64 {
		before := counter()
		now := time.Now()
		after := counter()
		if d := after - before; d < best {
			best, cycles, at = d, before+d/2, now
		}
	}
	return cycles, at
}
