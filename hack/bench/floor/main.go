// Floor is the /init of the benchmark's floor: the least that a machine can do. It prints a line and halts.
package main

import (
	"os"
	"syscall"
)

func main() {
	_, _ = os.Stdout.WriteString("floor\n")
	// With reboot=t and QEMU's -no-reboot a restart is the end of QEMU.
	_ = syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	select {}
}
