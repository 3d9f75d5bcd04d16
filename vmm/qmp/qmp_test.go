package qmp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}` + "\n"

// serve plays QEMU: each line it receives is answered by the next of answers.
func serve(t *testing.T, answers ...string) net.Conn {
	a, b := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer b.Close()
		r := bufio.NewReader(b)
		for i, answer := range append([]string{greeting}, answers...) {
			if i > 0 {
				if _, err := r.ReadString('\n'); err != nil {
					return
				}
			}
			if _, err := io.WriteString(b, answer); err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { _ = a.Close(); <-done })
	return a
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestExecute(t *testing.T) {
	c, err := Dial(testContext(t), serve(t,
		`{"return": {}, "id": 1}`+"\n",
		`{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}`+"\n"+`{"return": {"status": "paused"}, "id": 2}`+"\n",
		`{"id": 3, "error": {"class": "CommandNotFound", "desc": "no such thing"}}`+"\n",
	))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got, want := c.Version(), (Version{7, 2, 22}); got != want {
		t.Errorf("version: got %v, want %v", got, want)
	}
	var status struct{ Status string }
	if err := c.Execute(testContext(t), "query-status", nil, &status); err != nil || status.Status != "paused" {
		t.Errorf("query-status: got %+v and %v", status, err)
	}
	if e := <-c.Events(); e.Name != "STOP" || !e.Time.Equal(time.Unix(1, 2000)) {
		t.Errorf("event: got %+v", e)
	}
	var e *Error
	if err := c.Execute(testContext(t), "x", nil, nil); !errors.As(err, &e) || err.Error() != "qmp x: no such thing" {
		t.Errorf("failing command: got %v", err)
	}
	if err := c.Execute(testContext(t), "y", nil, nil); !errors.Is(err, ErrClosed) && !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("command behind the end: got %v, want %v", err, ErrClosed)
	}
	if _, open := <-c.Events(); open {
		t.Error("events are open behind the end")
	}
}

func TestDialRefuses(t *testing.T) {
	tests := []struct{ name, input, want string }{
		{"end", "", "EOF"},
		{"cut", `{"QMP"`, "unexpected EOF"},
		{"other", `{"return": {}}` + "\n", "no greeting"},
		{"garbage", "SSH-2.0\n", "parse"},
		{"endless", strings.Repeat("x", maxMessage+1), "longer than"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			a, b := net.Pipe()
			go func() { _, _ = io.WriteString(b, test.input); _ = b.Close() }()
			_, err := Dial(testContext(t), a)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
	t.Run("silence", func(t *testing.T) {
		a, b := net.Pipe()
		defer b.Close()
		ctx, cancel := context.WithTimeout(testContext(t), 20*time.Millisecond)
		defer cancel()
		if _, err := Dial(ctx, a); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want a deadline error", err)
		}
	})
}

func TestExecuteWithFileNeedsSocket(t *testing.T) {
	c, err := Dial(testContext(t), serve(t, `{"return": {}, "id": 1}`+"\n", "\n"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.ExecuteWithFile(testContext(t), "getfd", nil, os.Stdin, nil); err == nil || !strings.Contains(err.Error(), "unix socket") {
		t.Errorf("got %v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte(greeting))
	f.Add([]byte(`{"id": 18446744073709551615, "return": null}` + "\n" + `{"event": "RESET"}` + "\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bufio.NewReaderSize(bytes.NewReader(b), 64)
		for {
			if _, err := read(r); err != nil {
				return
			}
		}
	})
}
