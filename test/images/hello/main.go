// Hello is all there is in the images "hello", "hello-arm64" and "hello-arm": it says that it ran, and on what.
package main

import (
	"fmt"
	"runtime"
)

func main() {
	fmt.Printf("Hello from a container!\nThis is a static program for %s/%s.\n", runtime.GOOS, runtime.GOARCH)
}
