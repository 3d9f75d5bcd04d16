// Command guest is the smallest /init: it prints one line and ends the machine. What a boot costs beyond it is ours.
package main

import (
	"os"
	"syscall"
)

func main() {
	os.Stdout.WriteString("cradle-bootfloor: init\n")
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART) // reboot=t: a triple fault, which -no-reboot turns into QEMU's exit
}
