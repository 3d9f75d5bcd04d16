package images

import (
	"archive/tar"
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

//go:embed hello/main.go
var helloSource []byte

const (
	helloVersion = "1"
	goarm        = "7" // the oldest ARM that Debian's armhf runs on
)

func helloConfig() v1.Config { return v1.Config{Env: []string{pathEnv}, Cmd: []string{"/hello"}} }

// helloLayers is one layer: the program, static, for one architecture.
func helloLayers(arch string) func(*host) ([]writeLayer, error) {
	return func(*host) ([]writeLayer, error) {
		binary, err := buildHello(arch)
		if err != nil {
			return nil, err
		}
		return []writeLayer{func(tw *tar.Writer) error { return regular(tw, "hello", 0o755, binary) }}, nil
	}
}

// buildHello compiles the program in a directory of its own, outside any module, so that it does not matter where the
// caller runs.
func buildHello(arch string) ([]byte, error) {
	dir, err := os.MkdirTemp("", "kcradle-hello-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(filepath.Join(dir, "main.go"), helloSource, 0o644); err != nil {
		return nil, err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", "hello", "main.go")
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "PWD="+dir, "CGO_ENABLED=0", "GOFLAGS=", "GOWORK=off",
		"GOOS=linux", "GOARCH="+arch, "GOARM="+goarm)
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile hello for %s: %w: %s", arch, err, strings.TrimSpace(string(out)))
	}
	return os.ReadFile(filepath.Join(dir, "hello"))
}
