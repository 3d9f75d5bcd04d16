package vmm

import (
	"errors"
	"strings"
	"syscall"
	"testing"
)

func TestExit(t *testing.T) {
	exited := func(code int) syscall.WaitStatus { return syscall.WaitStatus(code << 8) }
	killed := func(sig syscall.Signal) syscall.WaitStatus { return syscall.WaitStatus(sig) }
	const panicked = "[1.0] Kernel panic - not syncing: first\nrebooted\n[ 2.5] Kernel panic - not syncing: VFS: \x1b[31mno root\r\n"
	tests := []struct {
		name   string
		ending ending
		status syscall.WaitStatus
		want   Reason
		says   string
	}{
		{"reset", ending{greeted: true, shutdown: "guest-reset"}, exited(0), GuestReset, "restarted"},
		{"power off", ending{greeted: true, shutdown: "guest-shutdown"}, exited(0), GuestShutdown, "switched itself off"},
		{"too fast for the protocol", ending{}, exited(0), GuestReset, "ended the machine"},
		{"panic", ending{greeted: true, shutdown: "guest-reset", console: []byte(panicked)}, exited(0), GuestPanic, "panicked: VFS: ?[31mno root"},
		{"panic device", ending{greeted: true, shutdown: "guest-panic"}, exited(0), GuestPanic, "panicked"},
		{"killed by us", ending{greeted: true, killed: true}, killed(syscall.SIGKILL), Killed, "was killed"},
		{"killed by us after a panic", ending{greeted: true, killed: true, console: []byte(panicked)}, killed(syscall.SIGKILL), Killed, "was killed"},
		{"emulation failure", ending{greeted: true, engine: true, stderr: []byte("KVM internal error. Suberror: 1\nemulation failure\nRAX=0\n")}, killed(syscall.SIGKILL), EngineFailure, "KVM internal error. Suberror: 1"},
		{"KVM is not to be used", ending{kvm: true, stderr: []byte("Could not access KVM kernel module: Permission denied\nqemu: failed to initialize kvm: Permission denied\n")}, exited(1), EngineFailure, "failed to initialize kvm"},
		{"KVM's failure crashes QEMU", ending{kvm: true, stderr: []byte("qemu: kvm_buf_set_msrs: Assertion failed.\n")}, killed(syscall.SIGABRT), EngineFailure, "kvm_buf_set_msrs"},
		{"host out of memory", ending{greeted: true, hostOOM: "its kernel says so"}, killed(syscall.SIGKILL), HostMemory, "ran out of memory"},
		{"somebody's SIGKILL", ending{greeted: true}, killed(syscall.SIGKILL), Signalled, "not by kcradle"},
		{"crash", ending{greeted: true, stderr: []byte("qemu: assertion failed\n\n")}, killed(syscall.SIGABRT), Signalled, "(aborted): qemu: assertion failed"},
		{"SIGTERM", ending{greeted: true, shutdown: "host-signal"}, exited(0), Signalled, "asked to end"},
		{"start failure", ending{stderr: []byte("warning: x\nqemu: no such device\n")}, exited(1), QEMUFailure, "did not start (exit code 1): qemu: no such device"},
		{"failure", ending{greeted: true}, exited(3), QEMUFailure, "gave up (exit code 3)"},
		{"lost", ending{greeted: true, waitError: errors.New("no child")}, exited(0), QEMUFailure, "lost: no child"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			test.ending.status = test.status
			x := test.ending.exit()
			if x.Reason != test.want || !strings.Contains(x.Message, test.says) {
				t.Errorf("got %s (%s), want %s with %q", x.Reason, x.Message, test.want, test.says)
			}
			if strings.ContainsAny(x.Console, "\x1b\r") {
				t.Errorf("console with control characters: %q", x.Console)
			}
			if orderly := test.want == GuestReset || test.want == GuestShutdown; orderly != (x.Err() == nil) {
				t.Errorf("error: %v", x.Err())
			}
		})
	}
}
