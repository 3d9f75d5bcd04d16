package channel

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// magic begins each message of the session start. Its first byte is no version of the multiplexer's frames (0).
var magic = [8]byte{0xFF, 'k', 'c', 'r', 'a', 'd', 'l', 'e'}

// version of the session start. History: 1 is the first.
const version = 1

// messageSize is magic, one byte each of version, kind and transport, five of zero, and the nonce.
const messageSize = 8 + 8 + 8

const (
	kindBreak byte = 'B'
	kindHello byte = 'H'
	kindKnock byte = 'K'
	kindAck   byte = 'A'
)

// Transports that a hello announces.
const (
	transportSerial byte = 's'
	transportVsock  byte = 'v'
)

// maxSkip bounds what is skipped in search of a message: far more than can be under way between the two ends.
const maxSkip = 64 << 20

// fill precedes a break: one byte more than the largest frame, so that a reader within a frame comes out of it.
const fill = headerSize + maxChunk + 1

// maxHellos bounds the hellos that a host answers on one connection, so that a guest cannot keep it busy for ever.
const maxHellos = 1024

var (
	errHellos  = fmt.Errorf("the guest said hello %d times without beginning a session", maxHellos)
	errSkip    = fmt.Errorf("no session start within %d bytes", maxSkip)
	errVersion = errors.New("the guest's init and this kcradle speak different versions of the control channel: summon the bundle again")
)

type message struct {
	version   byte
	kind      byte
	transport byte
	nonce     uint64
}

func (m message) encode() []byte {
	b := make([]byte, 0, messageSize)
	b = append(b, magic[:]...)
	b = append(b, m.version, m.kind, m.transport, 0, 0, 0, 0, 0)
	return binary.BigEndian.AppendUint64(b, m.nonce)
}

// parseMessage decodes what follows the magic. Reserved bytes are not looked at.
func parseMessage(b *[messageSize - len(magic)]byte) message {
	return message{version: b[0], kind: b[1], transport: b[2], nonce: binary.BigEndian.Uint64(b[8:])}
}

// nextMessage skips to the next message and reads it. skipped counts across calls.
func nextMessage(r *bufio.Reader, skipped *int) (message, error) {
	for {
		b, err := r.Peek(len(magic))
		if err != nil {
			if len(b) > 0 && err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return message{}, err
		}
		if bytes.Equal(b, magic[:]) {
			break
		}
		// Skip to the next byte in the buffer that may begin the magic.
		buffered, _ := r.Peek(r.Buffered())
		n := bytes.IndexByte(buffered[1:], magic[0]) + 1
		if n == 0 {
			n = len(buffered)
		}
		if *skipped += n; *skipped > maxSkip {
			return message{}, errSkip
		}
		if _, err := r.Discard(n); err != nil {
			return message{}, err
		}
	}
	if _, err := r.Discard(len(magic)); err != nil {
		return message{}, err
	}
	var rest [messageSize - len(magic)]byte
	if _, err := io.ReadFull(r, rest[:]); err != nil {
		return message{}, err
	}
	return parseMessage(&rest), nil
}

// meetHost is the guest's side of the session start.
func meetHost(r *bufio.Reader, w io.Writer, transport byte) error {
	skipped := 0
	nonce := newNonce()
	for {
		if _, err := w.Write(message{version, kindHello, transport, nonce}.encode()); err != nil {
			return fmt.Errorf("say hello: %w", err)
		}
		for again := false; !again; {
			m, err := nextMessage(r, &skipped)
			if err != nil {
				return fmt.Errorf("wait for the host: %w", err)
			}
			switch {
			case m.kind == kindBreak:
				if nonce = m.nonce; nonce == 0 {
					nonce = newNonce()
				}
				again = true
			case m.kind == kindKnock && m.nonce == nonce:
				if _, err := w.Write(message{version, kindAck, transport, nonce}.encode()); err != nil {
					return fmt.Errorf("acknowledge the session: %w", err)
				}
				return nil
			}
		}
	}
}

// sayBreak makes a guest begin anew, which it does with a hello of that nonce; 0: of one that it chooses.
func sayBreak(w io.Writer, guest GuestState, nonce uint64) error {
	var b []byte
	if guest == Unknown {
		b = bytes.Repeat(magic[:1], fill)
	}
	if _, err := w.Write(append(b, message{version: version, kind: kindBreak, nonce: nonce}.encode()...)); err != nil {
		return fmt.Errorf("announce a new session: %w", err)
	}
	return nil
}

// awaitHello makes the guest say hello and wait for the answer, and returns the hello's nonce. A guest may not have seen
// yet that the session before is over, and so lose the break and say hello of its own accord, or say it twice: only the
// hello of the nonce asked for is the one that it stays with, however often it says that.
func awaitHello(rw io.ReadWriter) (nonce uint64, err error) {
	nonce = newNonce()
	r, skipped, guest := bufio.NewReader(rw), 0, Unknown
	for range maxHellos {
		if err := sayBreak(rw, guest, nonce); err != nil {
			return 0, err
		}
		guest = Waiting
		for m := (message{}); m.kind != kindHello; {
			if m, err = nextMessage(r, &skipped); err != nil {
				return 0, err
			}
			if m.kind == kindHello && m.nonce == nonce {
				return nonce, nil
			}
		}
	}
	return 0, errHellos
}

// meetGuest is the host's side of the session start. It returns the transport that the guest announced.
func meetGuest(r *bufio.Reader, w io.Writer, guest GuestState, nonce uint64) (transport byte, err error) {
	known := map[uint64]bool{}
	knock := func(nonce uint64) error {
		known[nonce] = true
		if _, err := w.Write(message{version: version, kind: kindKnock, nonce: nonce}.encode()); err != nil {
			return fmt.Errorf("answer the guest: %w", err)
		}
		return nil
	}
	switch {
	case guest == Fresh:
	case nonce != 0:
		err = knock(nonce)
	default:
		err = sayBreak(w, guest, 0)
	}
	if err != nil {
		return 0, err
	}
	skipped := 0
	for hellos := 0; hellos < maxHellos; {
		m, err := nextMessage(r, &skipped)
		if err != nil {
			return 0, fmt.Errorf("wait for the guest: %w", err)
		}
		switch {
		case m.kind == kindHello && m.version != version:
			return 0, errVersion
		case m.kind == kindHello:
			if hellos++; known[m.nonce] {
				break
			}
			if err := knock(m.nonce); err != nil {
				return 0, err
			}
		case m.kind == kindAck && known[m.nonce]:
			if m.transport != transportSerial && m.transport != transportVsock {
				return 0, fmt.Errorf("the guest announced an unknown transport %q", m.transport)
			}
			return m.transport, nil
		}
	}
	return 0, errHellos
}

func newNonce() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails; it aborts the program instead
	return binary.BigEndian.Uint64(b[:])
}
