package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/internal/need"
	testimages "github.com/kcradle/kcradle/test/images"
)

// The scripts of testdata/script need no machine, those of testdata/machine boot one for each run:
//
//	go test ./cmd/kcradle -run TestScripts
//	go test ./cmd/kcradle -run 'TestMachine/signals'

// programDir is where program builds; TestMain makes and removes it.
var programDir string

// program builds kcradle once for all tests: a supervisor starts its own program again.
var program = sync.OnceValues(func() (string, error) {
	out, err := exec.Command("go", "build", "-o", filepath.Join(programDir, "kcradle"), ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return programDir, nil
})

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		if programDir, err = os.MkdirTemp("", "kcradle-script-"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(programDir)
		if err := os.Chmod(programDir, 0o755); err != nil { // some tests run it as another user
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

func params(t *testing.T, dir string, vars ...string) testscript.Params {
	bin, err := program()
	if err != nil {
		t.Fatal(err)
	}
	return testscript.Params{
		Dir:                dir,
		RequireUniqueNames: true,
		Setup: func(e *testscript.Env) error {
			e.Setenv("PATH", bin+":/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
			e.Setenv("KCRADLE_BIN", filepath.Join(bin, "kcradle"))
			e.Setenv("KCRADLE_ROOT", filepath.Join(e.WorkDir, "root"))
			for _, v := range vars {
				name, value, _ := strings.Cut(v, "=")
				e.Setenv(name, value)
			}
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits": exits, "killpid": killpid, "until": until, "says": says,
		},
	}
}

// exits CODE PROGRAM ARG…: runs it and wants the exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG…")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		got = exit.ExitCode()
	} else if err != nil {
		ts.Fatalf("%v", err)
	}
	if got != want {
		ts.Fatalf("exit code: got %d, want %d", got, want)
	}
}

// killpid supervisor|machine SIGNAL DIR: kills a process of a running bundle.
func killpid(ts *testscript.TestScript, neg bool, args []string) {
	b, err := bundle.Open(ts.MkAbs(args[2]))
	ts.Check(err)
	st, _, err := b.State()
	ts.Check(err)
	pid := st.Pid
	if args[0] == "machine" {
		pid = st.MachinePid
	}
	if pid < 2 {
		ts.Fatalf("no %s runs: %+v", args[0], st)
	}
	sig, err := parseSignal(args[1])
	ts.Check(err)
	ts.Check(syscall.Kill(pid, sig))
}

// until PHASE DIR: waits until the bundle is starting, running (its first container is), or ended.
func until(ts *testscript.TestScript, neg bool, args []string) {
	b, err := bundle.Open(ts.MkAbs(args[1]))
	ts.Check(err)
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		st, ok, err := b.State()
		ts.Check(err)
		running := len(st.Containers) > 0 && st.Containers[0].Status == "running"
		switch {
		case ok && args[0] == "running" && running, ok && args[0] == "starting" && st.MachinePid != 0 && !running,
			ok && args[0] == "ended" && st.Phase == bundle.PhaseEnded:
			return
		}
		if time.Since(begun) > time.Minute {
			ts.Fatalf("%s is not %s after a minute: %+v", args[1], args[0], st)
		}
	}
}

// says DIR TEXT: waits until the first container has written it. A container that is process 1 of its namespace and has
// not set its traps yet loses signals.
func says(ts *testscript.TestScript, neg bool, args []string) {
	b, err := bundle.Open(ts.MkAbs(args[0]))
	ts.Check(err)
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		var text strings.Builder
		ts.Check(bundle.ReadLog(b.LogPath(b.Pod.Containers[0].ID), func(r bundle.Record) error {
			text.WriteString(r.Log)
			return nil
		}))
		if strings.Contains(text.String(), args[1]) {
			return
		}
		if time.Since(begun) > time.Minute {
			ts.Fatalf("%s has not said %q after a minute: %q", args[0], args[1], text.String())
		}
	}
}

func TestScripts(t *testing.T) {
	testscript.Run(t, params(t, "testdata/script"))
}

// machine is what a test needs to boot something.
type machine struct{ kcradle, packages, image string }

func machineNeeds(t *testing.T) machine {
	t.Helper()
	need.Root(t)
	need.Command(t, "qemu-system-x86_64", "hack/deps test")
	need.Command(t, "debootstrap", "hack/deps test")
	manifest := need.File(t, "../../build/pkg-default/manifest.json", "make build")
	abs, err := filepath.Abs(filepath.Dir(filepath.Dir(manifest)))
	if err != nil {
		t.Fatal(err)
	}
	cache, err := testimages.Open("", os.Stderr)
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := cache.Build(t.Context(), "busybox")
	if err != nil {
		t.Fatal(err)
	}
	bin, err := program()
	if err != nil {
		t.Fatal(err)
	}
	return machine{filepath.Join(bin, "kcradle"), abs, "docker-archive:" + busybox.Archive}
}

func TestMachine(t *testing.T) {
	m := machineNeeds(t)
	testscript.Run(t, params(t, "testdata/machine", "KCRADLE_PACKAGES="+m.packages, "IMAGE="+m.image, "KCRADLE_TEMPLATES=off"))
}
