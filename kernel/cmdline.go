package kernel

import (
	"fmt"
	"strconv"
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

// Emulation is what the kernel must be told about a machine that no hardware executes (TCG).
type Emulation struct {
	CPUs   int    // required: the machine's processors
	TSCKHz uint32 // the host's time stamp counter, as package tsc measures it; zero: not known
}

// hz is CONFIG_HZ of the kernel; a test holds it to that.
const hz = 250

// A token is one word of the command line with the reason it is there. To add one, add a row: what cannot be
// explained in a sentence, or measured, does not belong here. "virtio_mmio.device=" tokens are not ours: QEMU appends
// one for each device.
type token[P any] struct {
	text   string
	reason string
	when   func(P) bool // nil: always
}

var tokens = []token[Params]{
	{"console=hvc0", "the kernel log, and a panic's last words, go to the virtio console: there is no UART", nil},
	{"quiet", "only warnings and worse are printed: every line on hvc0 is an exit to QEMU", func(p Params) bool { return !p.Verbose }},
	{"panic=-1", "a panic restarts at once, and -no-reboot turns that into QEMU's exit: the supervisor learns of it without a time-out", nil},
	{"reboot=t", "restart is a triple fault: there is no keyboard controller, ACPI or BIOS to ask first", nil},
	{"noreplace-smp", "a kernel that finds one processor would rewrite each of its lock prefixes through a temporary mapping: a tenth of an emulated boot, for nothing afterwards", nil},
	{"no_timer_check", "the timer of a virtual machine works; the kernel would wait ten ticks to see it", nil},
	{"initcall_blacklist=jent_mod_init", "the jitter generator's self-test at boot; the DRBG that would read it, for the nonces of IPsec, does without it and uses the kernel's own pool", nil},
	{"fb_tunnels=none", "no tunl0, gre0, sit0, ip6tnl0 and their like in every pod: they cost time at boot and puzzle people", nil},
	{"dummy.numdummies=0", "no dummy0 either; ip link add makes what is wanted", nil},
	{"ifb.numifbs=0", "no ifb0 and ifb1: likewise", nil},
}

// emulated is said to a machine under TCG, after the tokens above. A machine with hardware virtualization has KVM's
// clock and the deadline timer instead, and is told none of it.
var emulated = []token[Emulation]{
	{"tsc_early_khz=", "the guest reads the host's counter but cannot learn its pace: measured against an emulated timer on a busy host that fails, and leaves a clock of 4 ms steps that loses time", func(e Emulation) bool { return e.TSCKHz != 0 }},
	{"tsc=reliable", "the watchdog would compare the counter with ticks that arrive late, and throw the good one away", func(e Emulation) bool { return e.TSCKHz != 0 }},
	{"lpj=", "every processor after the first would count loops for a sixth of a second; this follows from the counter", func(e Emulation) bool { return e.TSCKHz != 0 && e.CPUs > 1 }},
	{"mitigations=off", "an emulated processor does not speculate, and what guards against that does not outlive the translation; it costs a seventh of a start", nil},
	{"GODEBUG=cpu.sse42=off", "for /init, whose environment it becomes: a package of its makes a table with an instruction for that, by 48,000 calls out of translated code, 13 ms; without it the table is calculated, in one", nil},
	{"nolapic_timer", "the local APIC's timer would be calibrated for a tenth of a second and more; with several processors it is needed all the same, or there are no timers below a tick", func(e Emulation) bool { return e.CPUs == 1 }},
}

// CommandLine composes the kernel's command line. It is a pure function of its argument, so that a verifier can
// repeat it.
func CommandLine(p Params) (string, error) {
	words := choose(tokens, p)
	if p.PodDigest != "" {
		if err := checkDigest(p.PodDigest); err != nil {
			return "", err
		}
		words = append(words, "cradle.pod="+p.PodDigest)
	}
	return strings.Join(words, " "), nil
}

// Emulated returns what is appended to the command line, after a space, when the machine is emulated; it may be empty.
// Like CommandLine it is pure.
func Emulated(e Emulation) string {
	words := choose(emulated, e)
	for i, w := range words {
		switch w {
		case "tsc_early_khz=":
			words[i] += strconv.FormatUint(uint64(e.TSCKHz), 10)
		case "lpj=":
			words[i] += strconv.FormatUint(uint64(e.TSCKHz)*1000/hz, 10)
		}
	}
	return strings.Join(words, " ")
}

func choose[P any](table []token[P], p P) []string {
	var words []string
	for _, t := range table {
		if t.when == nil || t.when(p) {
			words = append(words, t.text)
		}
	}
	return words
}

func checkDigest(s string) error {
	hex, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(hex) != 64 || strings.Trim(hex, "0123456789abcdef") != "" {
		return fmt.Errorf("kernel: pod digest %.80q: want sha256: and 64 lower-case hex digits", s)
	}
	return nil
}
