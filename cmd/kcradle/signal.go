package main

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// sigRTMIN is where real-time signals begin for programs: the C library keeps two for itself.
const sigRTMIN, sigMax = 34, 64

// parseSignal reads a signal as docker does: a number, or a name with or without SIG, RTMIN+n and RTMAX-n too.
func parseSignal(s string) (syscall.Signal, error) {
	if n, err := strconv.Atoi(s); err == nil {
		if n < 1 || n > sigMax {
			return 0, fmt.Errorf("invalid signal: %s", s)
		}
		return syscall.Signal(n), nil
	}
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if n := unix.SignalNum("SIG" + name); n != 0 {
		return n, nil
	}
	for prefix, base := range map[string]int{"RTMIN": sigRTMIN, "RTMAX": sigMax} {
		rest, ok := strings.CutPrefix(name, prefix)
		if !ok {
			continue
		}
		n := 0
		if rest != "" {
			var err error
			if n, err = strconv.Atoi(rest); err != nil { // "+3" and "-3" are numbers
				break
			}
		}
		if n += base; n >= sigRTMIN && n <= sigMax {
			return syscall.Signal(n), nil
		}
	}
	return 0, fmt.Errorf("invalid signal: %s", s)
}
