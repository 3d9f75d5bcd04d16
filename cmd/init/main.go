// Command init is PID 1 of a machine. It takes no arguments; what it says goes to the console, which the host keeps.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"

	"github.com/kcradle/kcradle/guest"
	"github.com/kcradle/kcradle/guest/container"
	"github.com/kcradle/kcradle/guest/early"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/guest/vdocker"
)

func main() {
	if filepath.Base(os.Args[0]) == filepath.Base(container.InitTarget) {
		os.Exit(reap(os.Args))
	}
	// The main thread stands for the process in /proc/1: threads that change their root are others.
	runtime.LockOSThread()
	// A thread that starts a container keeps its processor until execve is through, and that may wait for a file that this
	// process serves: a program in a directory of the host.
	runtime.GOMAXPROCS(max(2, runtime.NumCPU()))
	if os.Getpid() != 1 {
		fmt.Fprintln(os.Stderr, "init: this is PID 1 of a kcradle machine and does nothing elsewhere")
		os.Exit(1)
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	err := guest.Run(context.Background(), guest.Config{Machine: guest.NewMachine(log), API: api, Log: log})
	if err != nil {
		log.Error("init", "error", err)
	}
	// A panic of this process ends the machine, too: the kernel's own, which restarts it.
	if err := early.PowerOff(); err != nil {
		panic(err)
	}
	select {}
}

func api(ctx context.Context, l net.Listener, source func(context.Context) (*pod.Pod, error), log *slog.Logger) error {
	return vdocker.Serve(ctx, l, vdocker.New(source, log), log)
}
