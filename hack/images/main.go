// Images builds container images from Debian packages into the test cache and prints where they are.
//
//	go run ./hack/images [-cache DIR] [-archive] [NAME…]
//
// Without a name it builds all of them.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/kcradle/kcradle/test/images"
)

func main() {
	dir := flag.String("cache", "", "cache directory (default $KCRADLE_TEST_CACHE, then "+images.DefaultDir+")")
	archive := flag.Bool("archive", false, "print the path of the docker archive, not of the OCI layout")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *dir, *archive, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, dir string, archive bool, names []string) error {
	cache, err := images.Open(dir, os.Stderr)
	if err != nil {
		return err
	}
	if len(names) == 0 {
		names = images.Names()
	}
	for _, name := range names {
		b, err := cache.Build(ctx, name)
		if err != nil {
			return err
		}
		if archive {
			fmt.Println(b.Archive)
		} else {
			fmt.Println(b.Layout)
		}
	}
	return nil
}
