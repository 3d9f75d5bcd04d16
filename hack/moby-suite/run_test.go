package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
)

// fakeSuite is a suite of one package, "fake", compiled from testdata as moby's are from its module.
func fakeSuite(t *testing.T) *suite {
	t.Helper()
	need.Long(t)
	s := &suite{dir: t.TempDir(), log: io.Discard}
	dir := s.workDir("fake")
	for _, d := range []string{dir, filepath.Join(s.dir, "bin")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	source, err := os.ReadFile("testdata/fake/fake_test.go")
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		filepath.Join(dir, "fake_test.go"):    string(source),
		filepath.Join(dir, "beside"):          "",
		filepath.Join(s.dir, "src", "go.mod"): "module example.org/fake\n\ngo 1.24\n",
	} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.compile(t.Context(), "fake"); err != nil {
		t.Fatal(err)
	}
	return s
}

// fakeArchives are the suite's images by name, with nothing in them.
func fakeArchives(t *testing.T, dir string) []archive {
	t.Helper()
	as := archivesIn(dir)
	for _, a := range as {
		if err := images.Save(a.path, a.ref, empty.Image); err != nil {
			t.Fatal(err)
		}
	}
	return as
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := servers.TempDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// The whole way with a daemon that is started, a suite that is compiled, and tests that do their worst.
func TestRun(t *testing.T) {
	s := fakeSuite(t)
	t.Setenv("KCRADLE_LEAK", "yes")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	srv, err := startDaemon(t.Context(), self, dir, fakeArchives(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	defer srv.stop()
	var log bytes.Buffer
	var table bytes.Buffer
	c := &config{packages: []string{"fake"}, out: &table}
	rep, err := c.runAll(t.Context(), &runner{suite: s, server: srv, dir: dir, timeout: 5 * time.Second, log: &log})
	if err != nil {
		t.Fatalf("%v\n%s", err, log.String())
	}
	want := []struct {
		name   string
		status status
		reason string // a part of it
	}{
		{"TestEnvironment", passed, ""},
		{"TestFails", failed, "bad: assertion failed: --- got +++ want"},
		{"TestSkips", skipped, "not on this machine"},
		{"TestPanics", failed, "panic: a goroutine of its own"},
		{"TestExits", failed, "ended without a verdict"},
		{"TestHangs", timedOut, "no end within 5s"},
		{"TestOwnDaemon", unjudged, "failed to start daemon"},
		{"TestLeavesThings", passed, ""},
		{"TestFindsNothingOfThem", passed, ""},
		{"TestKillsTheServer", failed, "the server ended"},
		{"TestFindsAnother", passed, ""},
	}
	p := rep.pkg("fake")
	if len(p.Tests) != len(want) || len(p.All) != len(want) {
		t.Fatalf("got %d tests of %v, want %d\n%s", len(p.Tests), p.All, len(want), log.String())
	}
	for i, w := range want {
		got := p.Tests[i]
		if got.Name != w.name || got.Status != w.status || !strings.Contains(got.Reason, w.reason) {
			t.Errorf("got %s %s %q, want %s %s %q\n%s", got.Name, got.Status, got.Reason, w.name, w.status, w.reason, got.Output)
		}
	}
	if p.Passed != 4 || p.Failed != 4 || p.Skipped != 1 || p.TimedOut != 1 || p.Unjudged != 1 {
		t.Errorf("got %d passed, %d failed, %d skipped, %d timed out, %d unjudged, want 4, 4, 1, 1, 1",
			p.Passed, p.Failed, p.Skipped, p.TimedOut, p.Unjudged)
	}
	hung := rep.find(test{"fake", "TestHangs"})
	if !strings.Contains(hung.Output, "goroutine ") || !strings.Contains(hung.Output, "TestHangs") {
		t.Errorf("the output of a hanging test does not say where it hung: %s", hung.Output)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "t", "sleeper")); err != nil {
		t.Error(err)
	} else if pid, err := strconv.Atoi(string(b)); err != nil {
		t.Error(err)
	} else {
		waitGone(t, pid)
	}
	killer := rep.find(test{"fake", "TestKillsTheServer"})
	if rep.Restarts != 1 || killer.Trouble != "the server ended" || !strings.Contains(killer.ServerLog, "asked to die") {
		t.Errorf("got %d restarts, trouble %q, log %q, want one restart after the server's end, with its log",
			rep.Restarts, killer.Trouble, killer.ServerLog)
	}
	if subs := rep.find(test{"fake", "TestFails"}).Subtests; len(subs) != 3 || subs[2].Reason != "no such thing here" {
		t.Errorf("got subtests %+v, want three, the last skipped with its reason", subs)
	}

	// The list keeps what passed, and a later run that does not do as well is found out.
	list := updateList(nil, rep)
	if len(list) != 4 {
		t.Errorf("got a list of %v, want the four tests that passed", list)
	}
	c.list, c.check = filepath.Join(dir, "list.txt"), true
	if err := os.WriteFile(c.list, []byte(formatList(append(list, test{"fake", "TestSkips"}))), 0o644); err != nil {
		t.Fatal(err)
	}
	code, err := c.conclude(rep, srv, nil)
	if code != 1 || err == nil || !strings.Contains(err.Error(), "fake TestSkips: skip: not on") {
		t.Errorf("check of a list with a test that was skipped: got %d, %v, want 1 and its name", code, err)
	}
	c.check, c.update, c.json = false, true, filepath.Join(dir, "all.json")
	if code, err := c.conclude(rep, srv, nil); code != 0 || err != nil {
		t.Errorf("update: got %d, %v", code, err)
	}
	if got, err := readList(c.list); err != nil || len(got) != 4 {
		t.Errorf("the updated list: got %v, %v, want four tests", got, err)
	}
	numbers := "fake       4       4          1        1         1  11"
	for _, line := range []string{numbers, "fake TestSkips", "fake TestHangs: no end within 5s"} {
		if got := strings.Contains(table.String(), line); got != (line != "fake TestSkips") {
			t.Errorf("line %q in the table: got %v, want the numbers and what did not pass\n%s", line, got, table.String())
		}
	}
	if code, _ := c.conclude(rep, srv, errors.New("interrupted")); code != 2 {
		t.Errorf("an unfinished run: got %d, want 2", code)
	}
}

// waitGone waits for the end of a process that was killed: it may come after kill has returned.
func waitGone(t *testing.T, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 10_000); n != 1 || err != nil {
		t.Errorf("process %d of a test that hung still runs (%v)", pid, err)
	}
}

func TestOwnDaemonIsGiven(t *testing.T) {
	s := fakeSuite(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	given := filepath.Join(dir, "it's given")
	args := filepath.Join(dir, "args")
	if err := os.WriteFile(given, []byte("#!/bin/sh\nprintf '%s\\n' \"$@\" >"+args+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	srv, err := startDaemon(t.Context(), self, dir, fakeArchives(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	defer srv.stop()
	r := &runner{
		suite: s, server: srv, dir: dir, dockerd: quote(given), timeout: time.Minute, run: regexp.MustCompile("OwnDaemon"), log: io.Discard,
	}
	rep, err := (&config{packages: []string{"fake"}, run: r.run}).runAll(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	if got := rep.find(test{"fake", "TestOwnDaemon"}); got == nil || got.Status != passed || !got.OwnDaemon {
		t.Errorf("got %+v, want passed, with a daemon of its own", got)
	}
	if list := updateList(nil, rep); len(list) != 0 {
		t.Errorf("got a list of %v, want none: the test says nothing of the server", list)
	}
	b, err := os.ReadFile(args)
	if want := "--config-file\n" + r.config() + "\na b\n"; err != nil || string(b) != want {
		t.Errorf("the daemon's arguments: got %q, %v, want %q", b, err, want)
	}
}

// A server that runs already keeps what it had, and is not started again.
func TestGivenServer(t *testing.T) {
	s := fakeSuite(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := shortDir(t)
	d, err := servers.StartDaemon(t.Context(), dir, self)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Stop()
	a, err := newAPI(d.Host)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.call(t.Context(), callTimeout, "POST", "/containers/create", nil); err != nil {
		t.Fatal(err)
	}
	srv, err := startGiven(t.Context(), d.Host, fakeArchives(t, dir))
	if err != nil {
		t.Fatal(err)
	}
	run := regexp.MustCompile("LeavesThings|Kills|FindsAnother")
	r := &runner{suite: s, server: srv, dir: dir, timeout: time.Minute, run: run, log: io.Discard}
	rep, err := (&config{packages: []string{"fake"}, run: r.run}).runAll(t.Context(), r)
	if err == nil || !strings.Contains(err.Error(), "does not answer any more") {
		t.Errorf("a run whose server was killed: got %v, want that it does not answer", err)
	}
	if n := len(rep.pkg("fake").Tests); n != 2 {
		t.Errorf("got %d results, want those of the test before and of the one that killed it", n)
	}
	if left := rep.find(test{"fake", "TestLeavesThings"}); left.Trouble != "" {
		t.Errorf("got trouble %q, want none: what was there before stays", left.Trouble)
	}
}

func TestStartFails(t *testing.T) {
	dir := shortDir(t)
	script := filepath.Join(dir, "daemon")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho no such verb: $1 >&2\nexit 4\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	_, err := startDaemon(t.Context(), script, dir, nil)
	if err == nil || !strings.Contains(err.Error(), "no such verb: daemon") {
		t.Errorf("got %v, want the daemon's last words", err)
	}
}

func TestBounded(t *testing.T) {
	b := &bounded{max: 10}
	for _, s := range []string{"abc", "defgh", "ijk", "lmnop"} {
		if n, err := b.Write([]byte(s)); n != len(s) || err != nil {
			t.Fatalf("Write(%q): got %d, %v", s, n, err)
		}
	}
	if got, want := string(b.Bytes()), "abcde\n[6 bytes left out]\nlmnop"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	small := &bounded{max: 10}
	_, _ = small.Write([]byte("0123456789"))
	if got := string(small.Bytes()); got != "0123456789" {
		t.Errorf("got %q, want all of it", got)
	}
}
