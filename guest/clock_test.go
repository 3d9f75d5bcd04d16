package guest

import (
	"testing"
	"time"
)

func TestCorrection(t *testing.T) {
	const ms = time.Millisecond
	for _, tc := range []struct {
		name        string
		behind, way time.Duration
		first       bool
		step, slew  time.Duration
	}{
		{"right", 0, ms, true, 0, 0},
		{"within what is unknown", 2 * ms, 4 * ms, true, 0, 0},
		{"late at first", 30 * ms, 4 * ms, true, 30 * ms, 0},
		{"late", 30 * ms, 4 * ms, false, 0, 30 * ms},
		{"early at first", -30 * ms, 4 * ms, true, 0, -30 * ms},
		{"early", -30 * ms, 4 * ms, false, 0, -30 * ms},
		{"an hour late", time.Hour, 4 * ms, false, time.Hour, 0},
		{"an hour early", -time.Hour, 4 * ms, false, -time.Hour, 0},
		{"an hour early at first", -time.Hour, 4 * ms, true, -time.Hour, 0},
		{"a slow answer", 600 * ms, 400 * ms, false, 0, 600 * ms},
	} {
		if step, slew := correction(tc.behind, tc.way, tc.first); step != tc.step || slew != tc.slew {
			t.Errorf("%s: got step %v and slew %v, want %v and %v", tc.name, step, slew, tc.step, tc.slew)
		}
	}
}
