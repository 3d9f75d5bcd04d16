package vmm

import (
	"testing"
	"time"
)

func TestProbeX(t *testing.T) {
	for range 5 {
		begun := time.Now()
		err := runsInHardware(probeDeadline)
		t.Log(time.Since(begun), err)
	}
	begun := time.Now()
	h, err := Probe(t.Context(), t.TempDir())
	t.Logf("%v %+v %v", time.Since(begun), h, err)
}
