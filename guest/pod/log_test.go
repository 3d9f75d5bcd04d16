package pod

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func newLog(t *testing.T, dir string, max int64) *outputLog {
	t.Helper()
	l, err := openLog(dir, max)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func all(l *outputLog) func() (int64, bool) {
	end := l.position()
	return func() (int64, bool) { return end, true }
}

// content reads everything from an offset.
func content(t *testing.T, l *outputLog, off int64) string {
	t.Helper()
	c := cursor{log: l, off: off, end: all(l)}
	var b strings.Builder
	for {
		r, err := c.next(context.Background())
		if err == io.EOF {
			return b.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		b.Write(r.bytes)
	}
}

func TestLogFilesAndMemory(t *testing.T) {
	l := newLog(t, t.TempDir(), 64<<20)
	var want strings.Builder
	for i := range 200 {
		line := fmt.Sprintf("%05d %s\n", i, strings.Repeat("x", 8000)) // together far more than memory keeps
		want.WriteString(line)
		l.append(1, time.Now(), []byte(line))
	}
	if l.tailSize > tailLimit {
		t.Errorf("%d bytes in memory", l.tailSize)
	}
	if got := content(t, l, 0); got != want.String() {
		t.Errorf("got %d bytes, want %d", len(got), want.Len())
	}
}

func TestLogOutlivesTheMachine(t *testing.T) {
	dir := t.TempDir()
	l, err := openLog(dir, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	l.append(1, time.Now(), []byte("first\n"))
	l.append(2, time.Now(), []byte("torn\n"))
	if err := l.close(); err != nil {
		t.Fatal(err)
	}
	// The machine died in the middle of the second record.
	files, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files: %v, %v", files, err)
	}
	info, err := os.Stat(files[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(files[0], info.Size()-2); err != nil {
		t.Fatal(err)
	}
	l = newLog(t, dir, 1<<20)
	l.append(1, time.Now(), []byte("second run\n"))
	if got := content(t, l, l.begin()); got != "first\nsecond run\n" {
		t.Errorf("got %q", got)
	}
}

// Many short runs leave few files, and lose nothing.
func TestLogManyRuns(t *testing.T) {
	dir := t.TempDir()
	var want strings.Builder
	for i := range 200 {
		l, err := openLog(dir, 64<<20)
		if err != nil {
			t.Fatal(err)
		}
		for j := range 3 {
			line := fmt.Sprintf("%d %d %s\n", i, j, strings.Repeat("x", 200))
			want.WriteString(line)
			l.append(byte(1+j%2), time.Now(), []byte(line))
		}
		if err := l.close(); err != nil {
			t.Fatal(err)
		}
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.log"))
	if err != nil || len(files) > 3 {
		t.Errorf("%d files, %v", len(files), err)
	}
	l := newLog(t, dir, 64<<20)
	if got := content(t, l, 0); got != want.String() {
		t.Errorf("got %d bytes, want %d", len(got), want.Len())
	}
}

func TestLogRotates(t *testing.T) {
	dir := t.TempDir()
	const max = 1 << 20
	l := newLog(t, dir, max)
	line := bytes.Repeat([]byte("y"), 1000)
	for range 5000 {
		l.append(1, time.Now(), line)
	}
	var size int64
	files, _ := filepath.Glob(filepath.Join(dir, "*.log"))
	for _, f := range files {
		info, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		size += info.Size()
	}
	if size > max || size < max/4 {
		t.Errorf("the files take %d bytes; the bound is %d", size, max)
	}
	// A reader of the beginning gets what is left.
	if n := len(content(t, l, 0)); n == 0 || int64(n) > max {
		t.Errorf("%d bytes are left", n)
	}
}

// TestLogWaitsForThePump has a writer that is ahead of the host by the whole log.
func TestLogWaitsForThePump(t *testing.T) {
	const max = 256 << 10
	l := newLog(t, t.TempDir(), max)
	l.pumped(0)
	line := bytes.Repeat([]byte("z"), 1000)
	const lines = 1000
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range lines {
			l.append(1, time.Now(), line)
		}
	}()
	n := 0
	c := cursor{log: l, end: func() (int64, bool) { return 0, false }}
	for n < lines*len(line) {
		r, err := c.next(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		n += len(r.bytes)
		l.pumped(c.off)
	}
	<-done
	if n != lines*len(line) {
		t.Errorf("the pump got %d bytes of %d", n, lines*len(line))
	}

	// A pump that is gone holds nobody up.
	l.pumped(math.MaxInt64)
	for range lines {
		l.append(1, time.Now(), line)
	}
}

func TestLogFullDisk(t *testing.T) {
	dir := t.TempDir()
	l := newLog(t, dir, 1<<20)
	l.append(1, time.Now(), []byte("stored\n"))
	// No more files can be made.
	l.mu.Lock()
	l.dir = filepath.Join(dir, "gone")
	l.writing = nil
	l.mu.Unlock()
	l.append(1, time.Now(), []byte("in memory\n"))
	if got := content(t, l, 0); got != "stored\nin memory\n" {
		t.Errorf("got %q", got)
	}
}

func TestLogTail(t *testing.T) {
	l := newLog(t, t.TempDir(), 1<<20)
	at := func(s int64) time.Time { return time.Unix(s, 0) }
	for i, s := range []struct {
		stream byte
		text   string
	}{{1, "one\ntwo\nthr"}, {2, "error\n"}, {1, "ee\nfour"}, {1, "\nfive\n"}} {
		l.append(s.stream, at(int64(i+1)), []byte(s.text))
	}
	for _, tt := range []struct {
		name string
		o    LogOptions
		want string
	}{
		{"all", LogOptions{Tail: -1, Stdout: true, Stderr: true}, "one\ntwo\nthrerror\nee\nfour\nfive\n"},
		{"none", LogOptions{Tail: 0, Stdout: true, Stderr: true}, ""},
		{"nothing asked", LogOptions{Tail: -1}, ""},
		{"last", LogOptions{Tail: 1, Stdout: true}, "five\n"},
		{"last two", LogOptions{Tail: 2, Stdout: true}, "four\nfive\n"},
		{"line in two pieces", LogOptions{Tail: 3, Stdout: true}, "three\nfour\nfive\n"},
		{"more than there are", LogOptions{Tail: 100, Stdout: true}, "one\ntwo\nthree\nfour\nfive\n"},
		{"stderr", LogOptions{Tail: 5, Stderr: true}, "error\n"},
		{"since", LogOptions{Tail: -1, Stdout: true, Since: at(3)}, "ee\nfour\nfive\n"},
		{"until", LogOptions{Tail: -1, Stdout: true, Stderr: true, Until: at(2)}, "one\ntwo\nthrerror\n"},
		{"tail until", LogOptions{Tail: 1, Stderr: true, Stdout: true, Until: at(2)}, "error\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := l.newReader(tt.o, all(l))
			if err != nil {
				t.Fatal(err)
			}
			if got := read(t, r.Next); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestEnvironmentOrder(t *testing.T) {
	got := environment("host", true, "/root", []string{"B=2", "PATH=/x", "TERM", "C"}, []string{"B=3", "D="})
	want := "PATH=/x HOSTNAME=host B=3 D= HOME=/root"
	if s := strings.Join(got, " "); s != want {
		t.Errorf("got %q, want %q", s, want)
	}
	if got := environment("h", false, "/root", []string{"HOME=/else"}); got[len(got)-1] != "HOME=/else" {
		t.Errorf("HOME as the user set it is overridden: %v", got)
	}
}

func TestTmpfsOptions(t *testing.T) {
	const def = 2 | 4 | 8 // nosuid, nodev, noexec of linux/mount.h
	for _, tt := range []struct {
		in    []string
		flags uintptr
		data  string
		err   bool
	}{
		{nil, def, "", false},
		{[]string{"size=64m,mode=1777"}, def, "size=64m,mode=1777", false},
		{[]string{"exec", "size=1k"}, 2 | 4, "size=1k", false},
		{[]string{"ro,suid,dev,exec"}, 1, "", false},
		{[]string{"ro,rw"}, def, "", false},
		{[]string{"size"}, 0, "", true},
		{[]string{"source=/etc"}, 0, "", true},
	} {
		flags, data, err := tmpfsOptions(tt.in)
		if (err != nil) != tt.err || err == nil && (flags != tt.flags || data != tt.data) {
			t.Errorf("%q: got %#x, %q, %v", tt.in, flags, data, err)
		}
	}
}

func FuzzTmpfsOptions(f *testing.F) {
	f.Add("size=64m,mode=1777,exec")
	f.Add("ro,,defaults")
	f.Fuzz(func(t *testing.T, s string) {
		_, data, err := tmpfsOptions([]string{s})
		if err != nil {
			return
		}
		for _, o := range strings.Split(data, ",") {
			if key, _, _ := strings.Cut(o, "="); o != "" && !tmpfsData[key] {
				t.Errorf("%q let %q through", s, o)
			}
		}
	})
}

func TestParseSignal(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want int
	}{
		{"TERM", 15}, {"sigterm", 15}, {"9", 9}, {"SIGRTMIN+3", 37}, {"RTMAX-1", 63}, {"SIGWINCH", 28}, {"64", 64},
		{"0", 0}, {"65", 0}, {"NOPE", 0}, {"", 0}, {"SIGRTMIN+99", 0},
	} {
		got, err := ParseSignal(tt.in)
		if int(got) != tt.want || (err != nil) != (tt.want == 0) {
			t.Errorf("%q: got %d, %v, want %d", tt.in, got, err, tt.want)
		}
	}
}
