package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDaemonArgs(t *testing.T) {
	dir := t.TempDir()
	empty, full := filepath.Join(dir, "empty"), filepath.Join(dir, "full")
	for path, body := range map[string]string{empty: "{}\n", full: `{"debug":true}`} {
		if err := os.WriteFile(path, []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for args, want := range map[string]string{
		"--config-file /dev/null --data-root /r --exec-root /e --pidfile /p --userland-proxy=true --host unix:///s --debug --storage-driver overlay2": "--root /r --log-level debug daemon --pidfile=/p --host=unix:///s",
		"--data-root=/r -H unix:///s -D --live-restore --config-file " + empty:                                                                        "--root /r --log-level debug daemon --host=unix:///s",
		"--data-root /r --config-file " + full: "no configuration file",
		"--data-root /r --live-restore=false":  "nothing like dockerd's --live-restore=false",
		"--data-root /r --bip 10.0.0.1/8":      "nothing like dockerd's flag --bip",
		"--data-root":                          "needs a value",
		"--host unix:///s":                     "without --data-root",
		"stray":                                "flags alone",
	} {
		got, err := daemonArgs(strings.Fields(args))
		if err != nil {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("%s: got %v, want %s", args, err, want)
			}
			continue
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: got %s, want %s", args, strings.Join(got, " "), want)
		}
	}
}
