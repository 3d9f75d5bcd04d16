package servers

import "os"

// TempDir makes a directory whose path is short enough for sockets below it.
func TempDir() (string, error) { return os.MkdirTemp("/var/tmp", "kc-") }
