// Command hello stands in for /init where a test needs a static program.
package main

import "fmt"

func main() { fmt.Println("hello") }
