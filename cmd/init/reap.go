package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/term"
)

// reap is the first process of a container that asked for one: it starts the program, passes signals on, buries orphans
// and ends as the program does. args are those of docker-init: the program stands behind "--".
func reap(args []string) int {
	args = args[1:]
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		fmt.Fprintln(os.Stderr, "docker-init: no program to run")
		return 1
	}
	path, err := exec.LookPath(args[0])
	if err != nil {
		return refuse(args[0], err)
	}
	signals := make(chan os.Signal, 64)
	signal.Notify(signals)
	attr := &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	}
	if term.IsTerminal(0) {
		attr.Sys.Foreground, attr.Sys.Ctty = true, 0
	}
	child, err := os.StartProcess(path, args, attr)
	if err != nil {
		return refuse(args[0], err)
	}
	for {
		s := (<-signals).(syscall.Signal)
		switch s {
		case syscall.SIGCHLD:
			if code, over := bury(child.Pid); over {
				return code
			}
		case syscall.SIGURG: // the Go runtime's own
		default:
			syscall.Kill(child.Pid, s)
		}
	}
}

// bury waits for whatever has ended.
func bury(child int) (code int, over bool) {
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, syscall.WNOHANG, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil || pid == 0:
			return code, over
		case pid == child:
			over, code = true, ws.ExitStatus()
			if ws.Signaled() {
				code = 128 + int(ws.Signal())
			}
		}
	}
}

func refuse(name string, err error) int {
	fmt.Fprintf(os.Stderr, "docker-init: exec %s: %v\n", name, err)
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, os.ErrNotExist) {
		return 127
	}
	return 126
}
