package vmm

import (
	"bytes"
	"fmt"
	"strings"
	"syscall"
	"unicode"
)

// Reason is why a machine ended.
type Reason string

const (
	GuestReset    Reason = "guest-reset"    // the guest restarted itself: how a guest without ACPI ends in order
	GuestShutdown Reason = "guest-shutdown" // the guest switched itself off
	GuestPanic    Reason = "guest-panic"    // the guest's kernel panicked
	EngineFailure Reason = "engine-failure" // the engine could not execute the guest
	Killed        Reason = "killed"         // by Kill, or because the context of Start ended
	HostMemory    Reason = "host-memory"    // the host's kernel killed QEMU to free memory
	Signalled     Reason = "signalled"      // somebody else's signal ended QEMU
	QEMUFailure   Reason = "qemu-failure"   // QEMU gave up by itself, or never came up
)

// Exit is a machine's end.
type Exit struct {
	Reason  Reason
	Message string         // a sentence's worth, without a full stop
	Signal  syscall.Signal // that ended QEMU; 0: none
	Code    int            // QEMU's exit code, when no signal ended it
	Stderr  string         // the end of what QEMU said
	Console string         // the end of the kernel's log, fit for a terminal
}

// Orderly says that the guest ended the machine by itself, without a panic.
func (e Exit) Orderly() bool { return e.Reason == GuestReset || e.Reason == GuestShutdown }

// Err is nil for an orderly end.
func (e Exit) Err() error {
	if e.Orderly() {
		return nil
	}
	return &ExitError{e}
}

// ExitError is the end of a machine that did not end in order.
type ExitError struct{ Exit Exit }

func (e *ExitError) Error() string { return e.Exit.Message }

// ending is what was seen until the process was gone.
type ending struct {
	kvm       bool   // the engine was KVM
	killed    bool   // by us
	greeted   bool   // QEMU came up
	engine    bool   // the engine reported an internal error
	shutdown  string // reason of QEMU's SHUTDOWN event
	status    syscall.WaitStatus
	hostOOM   string // the host's word that it killed QEMU for memory; empty: none
	stderr    []byte
	console   []byte
	waitError error
}

// exit draws the conclusion. The order matters: what is told first explains what follows from it.
func (e ending) exit() Exit {
	x := Exit{Stderr: strings.TrimSpace(string(e.stderr)), Console: terminalText(e.console)}
	if e.status.Signaled() {
		x.Signal = e.status.Signal()
	} else {
		x.Code = e.status.ExitStatus()
	}
	panicked := panicLine(e.console)
	switch {
	case e.waitError != nil:
		x.Reason, x.Message = QEMUFailure, fmt.Sprintf("QEMU was lost: %v", e.waitError)
	case e.engine:
		x.Reason, x.Message = EngineFailure, "the engine could not execute the guest ("+lastWords(e.stderr, "internal error")+"); try --engine tcg"
	case e.killed:
		x.Reason, x.Message = Killed, "the machine was killed"
	case x.Signal != 0 && e.hostOOM != "":
		x.Reason, x.Message = HostMemory, "the host ran out of memory and killed QEMU ("+e.hostOOM+"); give the pod less memory or the host more"
	case e.kvm && x.Signal != syscall.SIGKILL && (x.Signal != 0 || x.Code != 0) && bytes.Contains(bytes.ToLower(e.stderr), []byte("kvm")):
		x.Reason, x.Message = EngineFailure, "QEMU could not use KVM ("+lastWords(e.stderr, "")+"); try --engine tcg"
	case x.Signal == syscall.SIGKILL:
		x.Reason, x.Message = Signalled, "QEMU was killed (SIGKILL), and not by kcradle; if the host ran out of memory its kernel log says so"
	case x.Signal != 0:
		x.Reason, x.Message = Signalled, fmt.Sprintf("QEMU was ended by a signal (%v)%s", x.Signal, parenthesis(lastWords(e.stderr, "")))
	case panicked != "":
		x.Reason, x.Message = GuestPanic, "the guest's kernel panicked: "+panicked
	case e.shutdown == "guest-panic":
		x.Reason, x.Message = GuestPanic, "the guest's kernel panicked"
	case e.shutdown == "guest-reset":
		x.Reason, x.Message = GuestReset, "the guest restarted"
	case e.shutdown == "guest-shutdown":
		x.Reason, x.Message = GuestShutdown, "the guest switched itself off"
	case e.shutdown == "host-signal", e.shutdown == "host-qmp-quit":
		x.Reason, x.Message = Signalled, "QEMU was asked to end by somebody else than kcradle"
	case x.Code == 0:
		// The guest was faster than QEMU's control protocol, which tells nothing before its handshake.
		x.Reason, x.Message = GuestReset, "the guest ended the machine"
	case !e.greeted:
		x.Reason, x.Message = QEMUFailure, fmt.Sprintf("QEMU did not start (exit code %d)%s", x.Code, parenthesis(lastWords(e.stderr, "")))
	default:
		x.Reason, x.Message = QEMUFailure, fmt.Sprintf("QEMU gave up (exit code %d)%s", x.Code, parenthesis(lastWords(e.stderr, "")))
	}
	return x
}

func parenthesis(s string) string {
	if s == "" {
		return ""
	}
	return ": " + s
}

// lastWords is the first line of stderr with a given word, else its last line that is not empty.
func lastWords(stderr []byte, word string) string {
	var last string
	for line := range strings.Lines(string(stderr)) {
		line = strings.TrimSpace(line)
		if line == "" {
			continue
		}
		if word != "" && strings.Contains(line, word) {
			return line
		}
		last = line
	}
	return last
}

// panicLine is what the guest's kernel says when it panics. The guest writes it, so it explains an end and decides nothing.
func panicLine(console []byte) string {
	const mark = "Kernel panic - not syncing: "
	i := bytes.LastIndex(console, []byte(mark))
	if i < 0 {
		return ""
	}
	line, _, _ := bytes.Cut(console[i+len(mark):], []byte("\n"))
	return printable(line, 200)
}

// printable is a line of somebody else's bytes, fit for a terminal.
func printable(b []byte, limit int) string {
	b = bytes.TrimSpace(b)
	if len(b) > limit {
		b = b[:limit]
	}
	return strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, string(b))
}

// terminalText is printable for many lines.
func terminalText(b []byte) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == '\r':
			return -1
		case r == '\n', r == '\t', unicode.IsPrint(r):
			return r
		}
		return '?'
	}, string(b))
}
