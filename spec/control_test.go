package spec

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestFrames(t *testing.T) {
	var b bytes.Buffer
	want := []struct {
		kind    byte
		payload string
	}{{FramePod, "{}"}, {FrameStop, ""}, {FrameOutput, "hello"}}
	for _, f := range want {
		if err := WriteFrame(&b, f.kind, []byte(f.payload)); err != nil {
			t.Fatal(err)
		}
	}
	whole := bytes.Clone(b.Bytes())
	buf := make([]byte, 3)
	for _, f := range want {
		kind, payload, err := ReadFrame(&b, buf)
		if err != nil || kind != f.kind || string(payload) != f.payload {
			t.Errorf("ReadFrame: got %q %q %v, want %q %q", kind, payload, err, f.kind, f.payload)
		}
	}
	if _, _, err := ReadFrame(&b, nil); err != io.EOF {
		t.Errorf("ReadFrame at the end: got %v, want EOF", err)
	}
	if _, _, err := ReadFrame(bytes.NewReader(whole[:6]), nil); err != io.ErrUnexpectedEOF {
		t.Errorf("ReadFrame of half a frame: got %v, want unexpected EOF", err)
	}
	if err := WriteFrame(io.Discard, FramePod, make([]byte, MaxFrame+1)); err == nil {
		t.Error("WriteFrame wrote more than MaxFrame")
	}
	huge := binary.BigEndian.AppendUint32([]byte{FrameOutput}, 1<<31)
	if _, _, err := ReadFrame(bytes.NewReader(huge), nil); err == nil || errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("ReadFrame of a length over the limit: got %v, want the limit's error", err)
	}
}

func TestOutput(t *testing.T) {
	want := Output{Container: 3, Stream: 2, Time: time.Unix(0, 1234567890123456789), Bytes: []byte("x\x00y")}
	got, err := ParseOutput(want.Append(nil))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("output after a round trip (-want +got):\n%s", d)
	}
	for _, b := range [][]byte{nil, make([]byte, OutputHeader-1), make([]byte, OutputHeader)} {
		if _, err := ParseOutput(b); err == nil {
			t.Errorf("ParseOutput(%v): no error", b)
		}
	}
}

func FuzzReadFrame(f *testing.F) {
	f.Add([]byte("P\x00\x00\x00\x02{}O\x00\x00\x00\x00"))
	f.Add([]byte("O\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		var again bytes.Buffer
		for {
			kind, payload, err := ReadFrame(r, nil)
			if err != nil {
				break
			}
			if kind == FrameOutput {
				if o, err := ParseOutput(payload); err == nil && !bytes.Equal(o.Append(nil), payload) {
					t.Errorf("output frame %x does not survive a round trip", payload)
				}
			}
			if err := WriteFrame(&again, kind, payload); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.HasPrefix(b, again.Bytes()) {
			t.Errorf("frames of %x do not survive a round trip", b)
		}
	})
}

func TestClock(t *testing.T) {
	for _, want := range []Clock{{}, {Echo: 12345}, {Now: time.Unix(0, 1_700_000_000_123_456_789), Echo: -1}} {
		b := want.Append(nil)
		got, err := ParseClock(b)
		if err != nil || !got.Now.Equal(want.Now) || got.Echo != want.Echo {
			t.Errorf("got %+v and %v, want %+v", got, err, want)
		}
		if _, err := ParseClock(b[1:]); err == nil {
			t.Error("got no error for a payload that is cut")
		}
	}
}
