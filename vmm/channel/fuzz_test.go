package channel

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"testing"
	"time"
)

func FuzzMessage(f *testing.F) {
	f.Add(message{version, kindHello, transportSerial, 1}.encode(), uint8(0))
	f.Add(bytes.Repeat([]byte{0xFF}, 5000), uint8(3))
	f.Add(append(bytes.Repeat([]byte{0xFF}, 9), magic[:]...), uint8(1))
	f.Fuzz(func(t *testing.T, junk []byte, kind uint8) {
		// Whatever comes before a message, the message is found, unless the junk swallows it by being a message's head.
		want := message{version, kind, transportSerial, 42}
		r := bufio.NewReader(io.MultiReader(bytes.NewReader(junk), bytes.NewReader(bytes.Repeat([]byte{0}, messageSize)), bytes.NewReader(want.encode())))
		skipped := 0
		for {
			m, err := nextMessage(r, &skipped)
			if err != nil {
				t.Fatalf("message lost behind %d bytes: %v", len(junk), err)
			}
			if m == want {
				break
			}
		}
		if skipped > len(junk)+messageSize {
			t.Errorf("skipped %d bytes of %d", skipped, len(junk)+messageSize)
		}
	})
}

// FuzzGuestToHost gives a host whatever a hostile guest may send: it must come back, with an error or a session.
func FuzzGuestToHost(f *testing.F) {
	hello, ack := message{version, kindHello, transportSerial, 1}.encode(), message{version, kindAck, transportSerial, 1}.encode()
	start := append(append([]byte{}, hello...), ack...)
	f.Add(start)
	f.Add(append(start, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 8))                                           // a stream of the guest's own
	f.Add(append(start, 0, 1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0)) // and its port
	f.Add(append(start, 0, 0, 0, 2, 0, 0, 0, 1, 0xFF, 0xFF, 0xFF, 0xFF))                               // more than the window
	f.Add([]byte("\xff\xffkcradle garbage"))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, c := socketpair()
		defer c.Close()
		go func() { _, _ = io.Copy(io.Discard, c) }()
		go func() {
			_, _ = c.Write(b)
			_ = c.(*net.UnixConn).CloseWrite()
		}()
		_ = a.SetReadDeadline(time.Now().Add(10 * time.Second))
		r := bufio.NewReader(a)
		if _, err := meetGuest(r, a, Fresh, 0); err != nil {
			_ = a.Close()
			return
		}
		m, err := newMux(r, a, a.Close, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		if s, err := m.open(1); err == nil {
			_, _ = io.Copy(io.Discard, s)
			_ = s.Close()
		}
		m.close()
	})
}

// FuzzHostToGuest is the same for the port header and the session start in the guest.
func FuzzHostToGuest(f *testing.F) {
	f.Add([]byte{0, 0, 0, 1, 'x'})
	f.Add([]byte{0, 0, 0, 0, 0, 0, 0, 1})
	f.Add([]byte{0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		watch := time.AfterFunc(20*time.Second, func() { panic("the session hangs") })
		defer watch.Stop()
		p := newVirtioPort()
		g := newGuest(p, transportSerial, nil)
		l, err := g.Listen(1)
		if err != nil {
			t.Fatal(err)
		}
		g.Ready()
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = io.Copy(io.Discard, c)
				_ = c.Close()
			}
		}()
		h := NewHost(HostConfig{Connect: p.attach, Guest: Fresh})
		a, err := h.session(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		s, err := a.mux.session.OpenStream()
		if err != nil {
			t.Fatal(err)
		}
		_, _ = s.Write(b)
		_ = s.Close()
		_, _ = io.Copy(io.Discard, s)
		_ = h.Close()
		_ = g.Close()
	})
}
