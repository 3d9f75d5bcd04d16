package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
)

// facts is what the process that works sees of its namespaces.
type facts struct {
	Parent  int
	Args    []string
	Links   []string
	Docker  []string // names in /run/docker
	Orphans bool     // a process that nobody waits for was reaped
}

// fakeRun is that process. With the argument "wait" it ends on a signal only.
func fakeRun(dir string, args []string) int {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM)
	f := facts{Parent: os.Getppid(), Args: args, Orphans: reapsOrphans()}
	links, err := net.Interfaces()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for _, l := range links {
		if l.Flags&net.FlagUp != 0 {
			f.Links = append(f.Links, l.Name)
		}
	}
	slices.Sort(f.Links)
	entries, err := os.ReadDir(runDocker)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for _, e := range entries {
		f.Docker = append(f.Docker, e.Name())
	}
	b, err := json.Marshal(f)
	if err == nil {
		err = writeFile(filepath.Join(dir, "facts"), b)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	if slices.Contains(args, "wait") {
		if f, err := os.OpenFile(filepath.Join(dir, "ready"), os.O_WRONLY, 0); err == nil {
			_, _ = f.Write([]byte{'r'})
			f.Close()
		}
		<-signals
		return 5
	}
	return 7
}

// reapsOrphans makes a process whose parent ends first, and says whether it goes away when it ends, too.
func reapsOrphans() bool {
	r, w, err := os.Pipe()
	if err != nil {
		return false
	}
	defer r.Close()
	cmd := exec.Command("sh", "-c", "sh -c 'echo $$; exec cat' <&3 & ")
	cmd.ExtraFiles = []*os.File{r}
	said, err := cmd.StdoutPipe()
	if err != nil {
		return false
	}
	if err := cmd.Start(); err != nil {
		return false
	}
	var pid int
	_, err = fmt.Fscan(said, &pid)
	w.Close() // cat ends
	if err = errors.Join(err, cmd.Wait()); err != nil {
		return false
	}
	// Nothing tells that a process was reaped by another one.
	for range 1000 {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", pid)); os.IsNotExist(err) {
			return true
		}
		time.Sleep(10 * time.Millisecond)
	}
	return false
}

func TestAlone(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	code, err := runAlone(t.Context(), dir, []string{"-run", "x y"})
	if code != 7 || err != nil {
		t.Fatalf("got %d, %v, want the 7 of the process that works", code, err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "facts"))
	if err != nil {
		t.Fatal(err)
	}
	var f facts
	if err := json.Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	if f.Parent != 1 || !f.Orphans {
		t.Errorf("got parent %d, orphans reaped %v, want 1, true", f.Parent, f.Orphans)
	}
	if want := []string{"eth0", "eth0peer", "lo"}; !slices.Equal(f.Links, want) {
		t.Errorf("got links %v, want %v", f.Links, want)
	}
	if len(f.Docker) != 0 {
		t.Errorf("got %v in %s, want nothing of the machine's", f.Docker, runDocker)
	}
	if want := []string{"-run", "x y"}; !slices.Equal(f.Args, want) {
		t.Errorf("got arguments %q, want %q", f.Args, want)
	}
}

// A run that is told to end ends its server and says how that went.
func TestAloneIsEnded(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	ready := filepath.Join(dir, "ready")
	if err := unix.Mkfifo(ready, 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	f, err := os.OpenFile(ready, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	done := startAlone(ctx, dir)
	if err := f.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Read(make([]byte, 1)); err != nil {
		t.Fatalf("wait until it listens: %v", err)
	}
	cancel()
	if got := waitAlone(t, done); got.code != 5 || got.err != nil {
		t.Errorf("got %d, %v, want the 5 of the process that was told to end", got.code, got.err)
	}
}

// It may be told so before any of its processes listens.
func TestAloneIsEndedAtOnce(t *testing.T) {
	need.Root(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if got := waitAlone(t, startAlone(ctx, t.TempDir())); got.code == 0 {
		t.Errorf("got %d, %v, want a failure", got.code, got.err)
	}
}

type aloneEnd struct {
	code int
	err  error
}

func startAlone(ctx context.Context, dir string) <-chan aloneEnd {
	done := make(chan aloneEnd, 1)
	go func() {
		code, err := runAlone(ctx, dir, []string{"wait"})
		done <- aloneEnd{code, err}
	}()
	return done
}

func waitAlone(t *testing.T, done <-chan aloneEnd) aloneEnd {
	t.Helper()
	select {
	case got := <-done:
		return got
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
		return aloneEnd{}
	}
}
