package main

import (
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
)

func TestVerdict(t *testing.T) {
	pod := &spec.Pod{Containers: []spec.Container{{Name: "a"}}}
	for _, tt := range []struct {
		name            string
		state           spec.State
		exit            vmm.Exit
		done            *spec.Done
		failure         *spec.Failure
		stopped, killed bool
		reason          string
		code            int
		message         string // in it
	}{
		{name: "by itself", state: spec.State{Status: "exited", ExitCode: 3}, done: &spec.Done{Clean: true}, reason: bundle.EndDone, code: 3},
		{name: "stopped", state: spec.State{Status: "exited", ExitCode: 143}, done: &spec.Done{}, stopped: true, reason: bundle.EndStopped, code: 143},
		{name: "could not start", state: spec.State{Status: "exited", ExitCode: 127, Error: "no such file"}, done: &spec.Done{},
			reason: bundle.EndDone, code: 127, message: "no such file"},
		{name: "launch failed", failure: &spec.Failure{Phase: "disks", Message: "bad magic"}, done: &spec.Done{},
			reason: bundle.EndLaunch, code: 125, message: "launch the pod: disks: bad magic"},
		{name: "killed while booting", state: spec.State{Status: "created"}, exit: vmm.Exit{Reason: vmm.Killed}, stopped: true, killed: true,
			reason: bundle.EndStopped, code: 137},
		{name: "killed for not stopping", state: spec.State{Status: "running"}, exit: vmm.Exit{Reason: vmm.Killed}, stopped: true, killed: true,
			reason: bundle.EndStopped, code: 137, message: "killed before it had stopped"},
		{name: "QEMU killed", state: spec.State{Status: "running"}, exit: vmm.Exit{Reason: vmm.Signalled, Message: "QEMU was killed"},
			reason: bundle.EndMachine, code: 137, message: "QEMU was killed"},
		{name: "QEMU did not start", state: spec.State{Status: "created"}, exit: vmm.Exit{Reason: vmm.QEMUFailure, Message: "did not start"},
			reason: bundle.EndMachine, code: 125, message: "did not start"},
		{name: "out of memory", state: spec.State{Status: "running"}, exit: vmm.Exit{Reason: vmm.HostMemory, Message: "ran out of memory"},
			reason: bundle.EndOOM, code: 137, message: "ran out of memory"},
		{name: "panic", state: spec.State{Status: "running"}, exit: vmm.Exit{Reason: vmm.GuestPanic, Message: "panicked", Console: "Kernel panic"},
			reason: bundle.EndPanic, code: 137, message: "panicked (the kernel's log: /b/run/console.log)"},
		{name: "deaf", state: spec.State{Status: "running"}, exit: vmm.Exit{Reason: vmm.Killed}, reason: bundle.EndMachine, code: 137, message: "stopped answering"},
		{name: "no last word", state: spec.State{Status: "running"}, exit: vmm.Exit{Reason: vmm.GuestReset, Message: "restarted"},
			reason: bundle.EndPanic, code: 137, message: "without a last word"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := &supervisor{pod: pod, bundle: &bundle.Bundle{Dir: "/b"}, log: slog.New(slog.DiscardHandler)}
			tt.state.Container = "a"
			st := &bundle.State{Containers: []spec.State{tt.state}}
			end := s.verdict(st, tt.exit, tt.done, tt.failure, tt.stopped, tt.killed, io.EOF)
			if end.Reason != tt.reason || end.ExitCode != tt.code || !strings.Contains(end.Message, tt.message) || tt.message == "" && end.Message != "" {
				t.Errorf("got %q %d %q, want %q %d %q", end.Reason, end.ExitCode, end.Message, tt.reason, tt.code, tt.message)
			}
			if tt.state.Status == "running" && (st.Containers[0].Status != "exited" || st.Containers[0].ExitCode != 137) {
				t.Errorf("a container that died with its machine: got %+v", st.Containers[0])
			}
		})
	}
}

// testBundle writes a bundle without images.
func testBundle(t *testing.T) *bundle.Bundle {
	t.Helper()
	id := newID()
	b, err := bundle.Write(t.Context(), filepath.Join(t.TempDir(), "vm"), bundle.Config{
		Pod: &spec.Pod{Version: 1, Name: "vm", Containers: []spec.Container{{ID: id, Name: "web", Cmd: []string{"x"},
			Image: spec.Image{ConfigID: "sha256:" + id}}}},
		Packages: "/nowhere", Cache: t.TempDir(), ScratchSize: 16 << 20,
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestLogs(t *testing.T) {
	b := testBundle(t)
	l, err := bundle.OpenLog(b.LogPath(b.Pod.Containers[0].ID))
	if err != nil {
		t.Fatal(err)
	}
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	for _, w := range []struct {
		stream byte
		at     int64
		text   string
	}{{1, 1, "one\n"}, {2, 2, "two\n"}, {1, 3, "thr"}, {1, 4, "ee\nfour\n"}} {
		if err := l.Write(w.stream, at(w.at), []byte(w.text)); err != nil {
			t.Fatal(err)
		}
	}
	l.Close()
	for _, tt := range []struct {
		name     string
		o        logsOptions
		out, err string
	}{
		{"all", logsOptions{}, "one\nthree\nfour\n", "two\n"},
		{"tail counts lines, not pieces", logsOptions{Tail: "2"}, "three\nfour\n", ""},
		{"nothing", logsOptions{Tail: "0"}, "", ""},
		{"since", logsOptions{Since: "3"}, "three\nfour\n", ""},
		{"until", logsOptions{Until: "2"}, "one\n", "two\n"},
		{"follow ends with the pod", logsOptions{Follow: true}, "one\nthree\nfour\n", "two\n"},
		{"times", logsOptions{Timestamps: true, Tail: "2"}, "1970-01-01T00:00:03.000000000Z three\n1970-01-01T00:00:04.000000000Z four\n", ""},
	} {
		var out, errs strings.Builder
		a := &app{Stdout: &out, Stderr: &errs, Log: slog.New(slog.DiscardHandler)}
		if err := logs(t.Context(), a, b.Dir, tt.o); err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if d := cmp.Diff([]string{tt.out, tt.err}, []string{out.String(), errs.String()}); d != "" {
			t.Errorf("%s (-want +got):\n%s", tt.name, d)
		}
	}
}

// A follower of a running pod sees what comes, across a rotation, and ends with the supervisor.
func TestLogsFollow(t *testing.T) {
	b := testBundle(t)
	lock, err := b.Lock()
	if err != nil {
		t.Fatal(err)
	}
	l, err := b.Listen(bundle.ControlSocket)
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	followed := make(chan error, 1)
	go func() {
		a := &app{Stdout: w, Stderr: io.Discard, Log: slog.New(slog.DiscardHandler)}
		followed <- logs(t.Context(), a, b.Dir, logsOptions{Follow: true})
		w.Close()
	}()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	path := b.LogPath(b.Pod.Containers[0].ID)
	for i, text := range []string{"one\n", "two\n"} {
		log, err := bundle.OpenLog(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := log.Write(1, time.Unix(int64(i), 0), []byte(text)); err != nil {
			t.Fatal(err)
		}
		log.Close()
		got := make([]byte, 4)
		if _, err := io.ReadFull(r, got); err != nil || string(got) != text {
			t.Fatalf("followed: got %q, %v; want %q", got, err, text)
		}
		if err := os.Rename(path, path+".1"); err != nil {
			t.Fatal(err)
		}
	}
	lock.Unlock()
	conn.Close()
	l.Close()
	if rest, err := io.ReadAll(r); err != nil || len(rest) > 0 {
		t.Errorf("after the end: got %q, %v", rest, err)
	}
	if err := <-followed; err != nil {
		t.Error(err)
	}
}

// Each direction ends for itself.
func TestCloseWrite(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	closeWrite(c, nil)
	if b, err := io.ReadAll(s); len(b) != 0 || err != nil {
		t.Errorf("after the end of one direction: got %q, %v", b, err)
	}
	if _, err := s.Write([]byte("x")); err != nil {
		t.Errorf("the other direction: %v", err)
	}
	closeWrite(s, io.ErrUnexpectedEOF)
	if b, err := io.ReadAll(c); string(b) != "x" || err != nil {
		t.Errorf("got %q, %v", b, err)
	}
}

func TestTargets(t *testing.T) {
	b := testBundle(t)
	for _, tt := range []struct {
		arg, name string
		named     bool
		err       string
	}{
		{b.Dir, "web", false, ""}, {b.Dir + ":web", "web", true, ""}, {b.Dir + ":" + b.Pod.Containers[0].ID[:12], "web", true, ""},
		{b.Dir + ":db", "", false, `has no container "db" (it has: web)`}, {"/nowhere:x", "", false, "/nowhere: no such file"},
	} {
		got, err := openTarget(tt.arg)
		if tt.err != "" {
			if err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("%s: got %v, want an error with %q", tt.arg, err, tt.err)
			}
			continue
		}
		if err != nil || got.container.Name != tt.name || got.named != tt.named {
			t.Errorf("%s: got %+v, %v", tt.arg, got, err)
		}
	}
	for arg, want := range map[string]string{
		b.Dir + ":/etc/x": "/etc/x", b.Dir + ":web:/etc/x": "/etc/x", b.Dir + ":etc/x": "etc/x",
		"-": "", "./a:b": "", "/etc/passwd": "", "/nowhere:/x": "",
	} {
		_, got, ok, err := splitPath(arg)
		if err != nil || got != want || ok != (want != "") {
			t.Errorf("splitPath(%q): got %q, %v, %v; want %q", arg, got, ok, err, want)
		}
	}
}
