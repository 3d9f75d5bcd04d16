// Command hello386 is built for 386, to be run by the amd64 kernel under test.
package main

import "os"

func main() { os.Stdout.WriteString("hello from 386\n") }
