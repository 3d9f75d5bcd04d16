// Storm kills the daemon, its supervisors and their machines with SIGKILL, at random, while containers, volumes and networks are
// made, used and removed. Then it looks whether anything is lost that was acknowledged, whether anything is left over, whether
// docker ps tells the truth, and whether all of it can be removed:
//
//	make build && go run ./hack/storm -seed 7 -kills 200      # as root
//
// The same seed makes the same choices; what they meet is a matter of the clock.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

func main() {
	c := config{Log: os.Stderr}
	flag.StringVar(&c.Kcradle, "kcradle", "bin/kcradle", "the program to try")
	flag.StringVar(&c.Archive, "image", "", "archive of docker save with the image test/busybox; empty: it is made")
	flag.Uint64Var(&c.Seed, "seed", uint64(time.Now().UnixNano()), "of all choices")
	flag.IntVar(&c.Kills, "kills", 100, "how many processes are killed")
	flag.IntVar(&c.Workers, "workers", 3, "how many act at a time, each on a container, a volume and a network of its own")
	flag.DurationVar(&c.Pause, "pause", 1500*time.Millisecond, "the longest time between two kills")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, c); err != nil {
		fmt.Fprintln(os.Stderr, "storm:", err)
		os.Exit(1)
	}
}

// config is what one storm is.
type config struct {
	Kcradle string
	Archive string
	Seed    uint64
	Kills   int
	Workers int
	Pause   time.Duration
	Log     io.Writer
}
