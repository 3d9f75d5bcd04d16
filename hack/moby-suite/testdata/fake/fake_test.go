package fake

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// call asks the server under test, which DOCKER_HOST names.
func call(method, path string) (int, string, error) {
	socket := strings.TrimPrefix(os.Getenv("DOCKER_HOST"), "unix://")
	c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", socket) }}}
	req, err := http.NewRequest(method, "http://server"+path, nil)
	if err != nil {
		return 0, "", err
	}
	resp, err := c.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(b), err
}

func want(t *testing.T, method, path string, code int) string {
	t.Helper()
	got, text, err := call(method, path)
	if err != nil {
		t.Fatal(err)
	}
	if got != code {
		t.Fatalf("assertion failed: %s %s: got %d %s, want %d", method, path, got, text, code)
	}
	return text
}

func TestMain(m *testing.M) {
	if _, _, err := call("GET", "/images/busybox:latest/json"); err != nil {
		panic(err)
	}
	fmt.Println("INFO: TestMain prints, too")
	os.Exit(m.Run())
}

func BenchmarkNothing(*testing.B) {}

func TestEnvironment(t *testing.T) {
	if v := os.Getenv("DOCKER_API_VERSION"); v != "1.44" {
		t.Errorf("DOCKER_API_VERSION: got %q, want the server's", v)
	}
	if v := os.Getenv("KCRADLE_LEAK"); v != "" {
		t.Errorf("KCRADLE_LEAK: got %q of the caller's environment", v)
	}
	if _, err := os.Stat("beside"); err != nil {
		t.Errorf("the package's own directory is not the current one: %v", err)
	}
	fmt.Print("no newline at the end")
}

func TestFails(t *testing.T) {
	t.Log("narration")
	t.Run("good", func(*testing.T) {})
	t.Run("bad", func(t *testing.T) {
		t.Log("building")
		t.Error("assertion failed:\n--- got\n+++ want")
	})
	t.Run("skipped", func(t *testing.T) { t.Skip("no such thing here") })
}

func TestSkips(t *testing.T) { t.Skip("not on this machine") }

func TestPanics(t *testing.T) {
	done := make(chan bool)
	go func() { panic("a goroutine of its own") }()
	<-done
}

func TestExits(t *testing.T) { os.Exit(0) }

func TestHangs(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	cmd.Stdout = os.Stdout
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(os.Getenv("TMPDIR"), "sleeper")
	if err := os.WriteFile(path, []byte(strconv.Itoa(cmd.Process.Pid)), 0o644); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // not select: Go would notice that nothing can happen any more
}

func TestOwnDaemon(t *testing.T) {
	if out, err := exec.Command("dockerd", "--config-file", "/dev/null", "a b").CombinedOutput(); err != nil {
		t.Fatalf("failed to start daemon: %v: %s", err, out)
	}
}

func TestLeavesThings(t *testing.T) {
	want(t, "POST", "/containers/create", 201)
	want(t, "DELETE", "/images/busybox:glibc", 200)
}

func TestFindsNothingOfThem(t *testing.T) {
	if text := want(t, "GET", "/containers/json", 200); strings.TrimSpace(text) != "[]" {
		t.Errorf("assertion failed: got containers %s", text)
	}
	want(t, "GET", "/images/busybox:glibc/json", 200)
}

func TestKillsTheServer(t *testing.T) { _, _, _ = call("POST", "/die") }

func TestFindsAnother(t *testing.T) { want(t, "GET", "/images/busybox:latest/json", 200) }
