package main

import "golang.org/x/sys/cpu"

// rdrand and rdseed are the processor's instructions; ok is false when it has no number at the moment.
func rdrand() (n uint64, ok bool)
func rdseed() (n uint64, ok bool)

// hardwareRandom is what the processor draws, where it can.
func hardwareRandom() (out []uint64) {
	for _, draw := range []struct {
		can bool
		f   func() (uint64, bool)
	}{{cpu.X86.HasRDRAND, rdrand}, {cpu.X86.HasRDSEED, rdseed}} {
		for tries := 0; draw.can && tries < 10; tries++ {
			if n, ok := draw.f(); ok {
				out = append(out, n)
				break
			}
		}
	}
	return out
}
