package dockerapi

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/sys/unix"
)

// Media types of hijacked and log streams.
const (
	mediaRaw         = "application/vnd.docker.raw-stream"
	mediaMultiplexed = "application/vnd.docker.multiplexed-stream"
)

// StreamMedia is the content type of a stream. Before 1.42 every stream is called raw.
func StreamMedia(v Version, multiplexed bool) string {
	if multiplexed && v >= 42 {
		return mediaMultiplexed
	}
	return mediaRaw
}

// Stream is the connection under a request, taken over for bytes in both directions.
type Stream struct {
	conn net.Conn
	r    io.Reader
	once sync.Once
}

// CloseWriter is a connection that can end its own direction alone. Every connection that the API is served on should.
type CloseWriter interface{ CloseWrite() error }

// Take takes the connection for a server that answers by itself. What the client sent ahead, the rest of the request's body
// first, is not lost.
func Take(w http.ResponseWriter) (*Stream, error) {
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("hijack connection: %w", err)
	}
	if a, ok := w.(*answer); ok {
		a.hijacked()
	}
	_ = conn.SetDeadline(time.Time{}) // a connection without deadlines has none to clear
	return &Stream{conn: conn, r: ahead(buf.Reader, conn)}, nil
}

// Hijack takes the connection and answers: 101 with Upgrade: tcp where the client asked for an upgrade, else the older
// 200 without a length. The request's body must have been read.
func Hijack(w http.ResponseWriter, r *Request, multiplexed bool) (*Stream, error) {
	s, err := Take(w)
	if err != nil {
		return nil, err
	}
	var head bytes.Buffer
	if _, upgrade := r.Header["Upgrade"]; upgrade {
		head.WriteString("HTTP/1.1 101 UPGRADED\r\nContent-Type: " + StreamMedia(r.Version, multiplexed) +
			"\r\nConnection: Upgrade\r\nUpgrade: tcp\r\n")
	} else {
		head.WriteString("HTTP/1.1 200 OK\r\nContent-Type: " + mediaRaw + "\r\n")
	}
	_ = w.Header().Write(&head) // what every answer carries; a buffer takes all
	head.WriteString("\r\n")
	if _, err := s.conn.Write(head.Bytes()); err != nil {
		_ = s.conn.Close()
		return nil, fmt.Errorf("answer upgrade: %w", err)
	}
	return s, nil
}

// ahead reads what the server had buffered, then the connection itself.
func ahead(buf *bufio.Reader, conn net.Conn) io.Reader {
	n := buf.Buffered()
	if n == 0 {
		return conn
	}
	b, _ := buf.Peek(n)
	return io.MultiReader(&sliceReader{b}, conn)
}

type sliceReader struct{ b []byte }

func (s *sliceReader) Read(p []byte) (int, error) {
	if len(s.b) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.b)
	s.b = s.b[n:]
	return n, nil
}

// WebSocket takes the connection as a websocket of binary messages. ctx bounds its life.
func WebSocket(ctx context.Context, w http.ResponseWriter, r *Request) (*Stream, error) {
	c, err := websocket.Accept(w, r.Request, &websocket.AcceptOptions{
		InsecureSkipVerify: true, // who may connect is decided below this layer; docker checks no origin either
		CompressionMode:    websocket.CompressionDisabled,
	})
	if a, ok := w.(*answer); ok {
		a.hijacked() // Accept has answered in any case
	}
	if err != nil {
		return nil, fmt.Errorf("accept websocket: %w", err)
	}
	conn := websocket.NetConn(ctx, c, websocket.MessageBinary)
	return &Stream{conn: conn, r: wholeClose{conn}}, nil
}

// wholeClose reads a connection that cannot be closed in one direction alone: its end is no end of input but the
// client's going.
type wholeClose struct{ r io.Reader }

func (w wholeClose) Read(p []byte) (int, error) {
	n, err := w.r.Read(p)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// Read reads what the client sends; io.EOF is the client's half-close.
func (s *Stream) Read(p []byte) (int, error) { return s.r.Read(p) }

// Write writes to the client.
func (s *Stream) Write(p []byte) (int, error) { return s.conn.Write(p) }

// lingerTime is how long Finish waits for the client to close, so that no reset overtakes the last bytes.
const lingerTime = 2 * time.Second

// Finish ends the stream in order: our direction is closed, then the connection as soon as the client has closed
// too, at the latest after two seconds. reading is the goroutine that still reads the stream, if any; it is done when
// the channel is closed.
func (s *Stream) Finish(reading <-chan struct{}) {
	s.once.Do(func() {
		defer s.conn.Close()
		c, ok := s.conn.(CloseWriter)
		if !ok || c.CloseWrite() != nil {
			return
		}
		if s.conn.SetReadDeadline(time.Now().Add(lingerTime)) != nil {
			return
		}
		if reading != nil {
			select {
			case <-reading:
			case <-time.After(lingerTime):
				return
			}
		}
		_, _ = io.Copy(io.Discard, s.r)
	})
}

// Close drops the connection at once. It may be called twice, and after Finish.
func (s *Stream) Close() error { return s.conn.Close() }

// AwaitGone is [AwaitGone] of the stream's connection.
func (s *Stream) AwaitGone(ctx context.Context) { AwaitGone(ctx, s.conn) }

// goneInterval is how often a half-closed connection is asked whether its client is still there.
const goneInterval = 2 * time.Second

// AwaitGone returns when the other side of a connection has gone altogether, or when ctx is done. It is for a side that
// has closed its own direction, where a read cannot tell the two apart. A connection without a file descriptor must
// answer SetWriteDeadline with an error once it is reset; the write deadline is taken away.
func AwaitGone(ctx context.Context, conn net.Conn) {
	tick := time.NewTicker(goneInterval)
	defer tick.Stop()
	for !isGone(conn) {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func isGone(conn net.Conn) bool {
	if c, ok := conn.(syscall.Conn); ok {
		raw, err := c.SyscallConn()
		if err == nil {
			gone := false
			err = raw.Control(func(fd uintptr) {
				p := []unix.PollFd{{Fd: int32(fd)}}
				if n, err := unix.Poll(p, 0); err == nil && n > 0 {
					gone = p[0].Revents&(unix.POLLHUP|unix.POLLERR|unix.POLLNVAL) != 0
				}
			})
			return gone || err != nil
		}
		if !errors.Is(err, errors.ErrUnsupported) {
			return true
		}
	}
	return conn.SetWriteDeadline(time.Time{}) != nil
}
