package main

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// watchClock says when somebody sets this host's wall clock, until ctx ends (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET).
func watchClock(ctx context.Context, log *slog.Logger) <-chan struct{} {
	jumps := make(chan struct{}, 1)
	f, err := clockTimer()
	if err != nil {
		log.Debug("changes of the host's clock are noticed late", "error", err)
		return jumps
	}
	stop := context.AfterFunc(ctx, func() { f.Close() })
	go func() {
		defer stop()
		defer f.Close()
		for {
			_, err := f.Read(make([]byte, 8))
			if !errors.Is(err, unix.ECANCELED) {
				return // closed; it never expires
			}
			select {
			case jumps <- struct{}{}:
			default: // somebody is about to look
			}
		}
	}()
	return jumps
}

// clockTimer is a timer for the end of time, which ends early when the wall clock is set.
func clockTimer() (*os.File, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("timerfd_create", err)
	}
	f := os.NewFile(uintptr(fd), "timer")
	never := unix.ItimerSpec{Value: unix.Timespec{Sec: math.MaxInt32 << 1}}
	if err := unix.TimerfdSettime(fd, unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, &never, nil); err != nil {
		f.Close()
		return nil, os.NewSyscallError("timerfd_settime", err)
	}
	return f, nil
}
