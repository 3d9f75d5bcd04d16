package kernel

import (
	"fmt"
	"strings"
)

// Params is what shapes the command line of a machine.
type Params struct {
	// PodDigest is the only pod that an attested machine's init accepts, "sha256:<64 hex digits>"; empty in a
	// machine that is not attested. It becomes part of what is measured.
	PodDigest string
	// Verbose leaves out "quiet": every message of the kernel goes to the log, which costs time.
	Verbose bool
}

// A token is one word of the command line with the reason it is there. To add one, add a row: what cannot be
// explained in a sentence, or measured, does not belong here. "virtio_mmio.device=" tokens are not ours: QEMU appends
// one for each device.
type token struct {
	text   string
	reason string
	when   func(Params) bool // nil: always
}

var tokens = []token{
	{"console=hvc0", "the kernel log, and a panic's last words, go to the virtio console: there is no UART", nil},
	{"quiet", "only warnings and worse are printed: every line on hvc0 is an exit to QEMU", func(p Params) bool { return !p.Verbose }},
	{"panic=-1", "a panic restarts at once, and -no-reboot turns that into QEMU's exit: the supervisor learns of it without a time-out", nil},
	{"reboot=t", "restart is a triple fault: there is no keyboard controller, ACPI or BIOS to ask first", nil},
	{"fb_tunnels=none", "no tunl0, gre0, sit0, ip6tnl0 and their like in every pod: they cost time at boot and puzzle people", nil},
	{"dummy.numdummies=0", "no dummy0 either; ip link add makes what is wanted", nil},
	{"ifb.numifbs=0", "no ifb0 and ifb1: likewise", nil},
}

// CommandLine composes the kernel's command line. It is a pure function of its argument, so that a verifier can
// repeat it.
func CommandLine(p Params) (string, error) {
	var words []string
	for _, t := range tokens {
		if t.when == nil || t.when(p) {
			words = append(words, t.text)
		}
	}
	if p.PodDigest != "" {
		if err := checkDigest(p.PodDigest); err != nil {
			return "", err
		}
		words = append(words, "cradle.pod="+p.PodDigest)
	}
	return strings.Join(words, " "), nil
}

func checkDigest(s string) error {
	hex, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return fmt.Errorf("kernel: pod digest %.80q: want sha256: and 64 lower-case hex digits", s)
	}
	return nil
}
