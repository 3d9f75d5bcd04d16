package lan

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
)

func member(n byte, names ...string) Member {
	return Member{MAC: MAC{2, 0, 0, 0, 0, n}, Addresses: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, n})}, Names: names}
}

func frame(to MAC, payload string) []byte {
	return append(append(append(to[:], 2, 0, 0, 0, 0, 1), 8, 0), payload...)
}

func mustJoin(t testing.TB, dir string, m Member, deliver func([]byte)) *LAN {
	t.Helper()
	l, err := Join(dir, m, deliver)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func TestSend(t *testing.T) {
	dir := t.TempDir()
	type heard struct {
		who  byte
		what string
	}
	got := make(chan heard, 100)
	join := func(n byte, names ...string) *LAN {
		return mustJoin(t, dir, member(n, names...), func(b []byte) { got <- heard{n, string(b[14:])} })
	}
	one, _, _ := join(1, "one"), join(2, "two", "pair"), join(3, "three", "pair")
	if !one.Send(frame(MAC{2, 0, 0, 0, 0, 2}, "to two")) || one.Send(frame(MAC{2, 0, 0, 0, 0, 7}, "to nobody")) || one.Send([]byte("short")) {
		t.Error("Send does not say whether there is such a member")
	}
	if h := <-got; h != (heard{2, "to two"}) {
		t.Errorf("heard %v", h)
	}
	one.Flood(frame(MAC{255, 255, 255, 255, 255, 255}, "to all"))
	first, second := <-got, <-got
	if first.what != "to all" || second.what != "to all" || first.who+second.who != 5 {
		t.Errorf("heard %v and %v, want both others to hear it", first, second)
	}
	for i := range 50 { // in order
		one.Send(frame(MAC{2, 0, 0, 0, 0, 3}, strings.Repeat("x", i)))
	}
	for i := range 50 {
		if h := <-got; h.who != 3 || len(h.what) != i {
			t.Fatalf("frame %d: heard %v", i, h)
		}
	}
	if mac, ok := one.Neighbour(netip.MustParseAddr("10.0.0.3")); !ok || mac != (MAC{2, 0, 0, 0, 0, 3}) {
		t.Errorf("neighbour: got %v, %v", mac, ok)
	}
	if _, ok := one.Neighbour(netip.MustParseAddr("10.0.0.9")); ok {
		t.Error("nobody is a neighbour")
	}
	late := join(4, "Late")
	if a := one.Lookup("late"); !slices.Equal(a, []netip.Addr{netip.MustParseAddr("10.0.0.4")}) {
		t.Errorf("one who came later: got %v", a)
	}
	if a := one.Lookup("pair"); len(a) != 2 {
		t.Errorf("two of one name: got %v", a)
	}
	if a := one.Lookup("one"); len(a) != 1 {
		t.Errorf("itself: got %v", a)
	}
	if name, ok := one.Reverse(netip.MustParseAddr("10.0.0.3")); !ok || name != "three" {
		t.Errorf("reverse: got %q, %v", name, ok)
	}
	late.Leave()
	if a := one.Lookup("late"); a != nil {
		t.Errorf("one who has left: got %v", a)
	}
	if one.Send(frame(MAC{2, 0, 0, 0, 0, 4}, "too late")) {
		t.Error("a frame went to one who has left")
	}
}

// What a member does not take is lost; whoever sends it does not wait, and others hear theirs.
func TestDeafMember(t *testing.T) {
	dir := t.TempDir()
	block, entered := make(chan struct{}), make(chan struct{})
	var once sync.Once
	var delivered atomic.Int64
	one := mustJoin(t, dir, member(1), func([]byte) {})
	mustJoin(t, dir, member(2), func([]byte) {
		once.Do(func() { close(entered) })
		<-block
		delivered.Add(1)
	})
	defer close(block)
	answered := make(chan struct{})
	mustJoin(t, dir, member(3), func([]byte) { close(answered) })
	big := frame(MAC{2, 0, 0, 0, 0, 2}, strings.Repeat("x", 1486))
	one.Send(big)
	<-entered
	for range 10_000 { // 15 MB
		if !one.Send(big) {
			t.Fatal("the member is gone")
		}
	}
	p := one.peer(MAC{2, 0, 0, 0, 0, 2})
	p.mu.Lock()
	if n := len(p.pending); n > maxPending {
		t.Errorf("%d bytes wait, more than the limit of %d", n, maxPending)
	}
	p.mu.Unlock()
	one.Send(frame(MAC{2, 0, 0, 0, 0, 3}, "x"))
	<-answered
}

// Members come and go, and send meanwhile.
func TestMany(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	var heard atomic.Int64
	for n := byte(1); n <= 8; n++ {
		wg.Go(func() {
			for range 20 {
				l, err := Join(dir, member(n, "all"), func([]byte) { heard.Add(1) })
				if err != nil {
					t.Error(err)
					return
				}
				for other := byte(1); other <= 8; other++ {
					l.Send(frame(MAC{2, 0, 0, 0, 0, other}, "x"))
				}
				l.Flood(frame(MAC{255, 255, 255, 255, 255, 255}, "y"))
				if len(l.Lookup("all")) == 0 {
					t.Error("a member does not find itself")
				}
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if heard.Load() == 0 {
		t.Error("nobody heard anything")
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// Files that are no member's are nothing.
func TestStrangers(t *testing.T) {
	dir := t.TempDir()
	one := mustJoin(t, dir, member(1), func([]byte) {})
	for name, body := range map[string]string{
		"0200000000ff.json": `{"mac":"02:00:00:00:00:fe","names":["liar"]}`, "020000000003.json": `{"mac":`, "x.json": "{}", "0300000000aa.json": `{"mac":"03:00:00:00:00:aa","names":["group"]}`,
		"020000000004.json": `{"mac":"02:00:00:00:00:04","names":["` + strings.Repeat("x", maxFile) + `"]}`,
		"020000000005.json": `{"mac":"02:00:00:00:00:05","addresses":["10.0.0.5"],"names":["dead"]}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(body), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got := one.all(); len(got) != 1 || got[0].Names[0] != "dead" {
		t.Errorf("got %d members, want the one whose file is right", len(got))
	}
	if a := one.Lookup("dead"); a != nil {
		t.Errorf("one behind whom nobody is: got %v", a)
	}
	for _, m := range []Member{{}, {MAC: MAC{1, 2, 3, 4, 5, 6}}} {
		if _, err := Join(dir, m, func([]byte) {}); err == nil || !strings.Contains(err.Error(), "one machine") {
			t.Errorf("%v joined: %v", m.MAC, err)
		}
	}
	if _, err := Join(filepath.Join(dir, "nowhere"), member(2), func([]byte) {}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a network that is not there: got %v", err)
	}
	// One who was killed left both names; the next of that address takes them.
	again := mustJoin(t, dir, member(5, "risen"), func([]byte) {})
	if a := one.Lookup("risen"); len(a) != 1 {
		t.Errorf("after a killed one: got %v", a)
	}
	if err := again.Rename([]string{"other"}); err != nil {
		t.Fatal(err)
	}
	if len(one.Lookup("other")) != 1 || len(one.Lookup("risen")) != 0 {
		t.Error("a new name is not seen")
	}
}

func FuzzReadFrames(f *testing.F) {
	two := binary.BigEndian.AppendUint32(append([]byte{0, 0, 0, 3}, "abc"...), 0)
	f.Add(two)
	f.Add([]byte{0xff, 0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var whole, parts [][]byte
		err := ReadFrames(bytes.NewReader(b), 64, func(f []byte) { whole = append(whole, slices.Clone(f)) })
		err2 := ReadFrames(iotest.OneByteReader(bytes.NewReader(b)), 64, func(f []byte) { parts = append(parts, slices.Clone(f)) })
		if (err == nil) != (err2 == nil) || !slices.EqualFunc(whole, parts, bytes.Equal) {
			t.Fatalf("in one piece: %d frames, %v; in many: %d, %v", len(whole), err, len(parts), err2)
		}
		if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) && !errors.Is(err, ErrFrame) {
			t.Fatal(err)
		}
	})
}
