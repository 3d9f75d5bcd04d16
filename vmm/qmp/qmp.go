// Package qmp speaks the QEMU Machine Protocol over a connection that QEMU already serves.
//
//	c, err := qmp.Dial(ctx, conn) // greeting and capabilities
//	go func() { for e := range c.Events() { … } }()
//	var status struct{ Status string }
//	err = c.Execute(ctx, "query-status", nil, &status)
package qmp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// maxMessage bounds one line from QEMU. The largest in use, query-qmp-schema, is under 200 KiB.
const maxMessage = 4 << 20

// eventBacklog is how many events wait for a reader; more are dropped, so that replies are never held up.
const eventBacklog = 256

// ErrClosed is what calls return after the connection has ended.
var ErrClosed = errors.New("qmp: connection closed")

// Error is QEMU's answer to a command that failed.
type Error struct {
	Command string `json:"-"`
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *Error) Error() string { return fmt.Sprintf("qmp %s: %s", e.Command, e.Desc) }

// Event is something QEMU says unasked.
type Event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
	Time time.Time       `json:"-"`
}

// Client is one connection. Its methods may be called at the same time.
type Client struct {
	conn    net.Conn
	events  chan Event
	version Version

	mu      sync.Mutex // guards the fields below and the order of commands on conn
	next    uint64
	pending map[uint64]chan reply
	err     error // why the reader ended
	done    chan struct{}
}

// Version is what QEMU says of itself.
type Version struct {
	Major int `json:"major"`
	Minor int `json:"minor"`
	Micro int `json:"micro"`
}

type reply struct {
	result json.RawMessage
	err    error
}

type message struct {
	QMP *struct {
		Version struct {
			QEMU Version `json:"qemu"`
		} `json:"version"`
	} `json:"QMP"`
	ID        *uint64         `json:"id"`
	Return    json.RawMessage `json:"return"`
	Error     *Error          `json:"error"`
	Event     string          `json:"event"`
	Data      json.RawMessage `json:"data"`
	Timestamp struct {
		Seconds      int64 `json:"seconds"`
		Microseconds int64 `json:"microseconds"`
	} `json:"timestamp"`
}

// Dial waits for QEMU's greeting and leaves negotiation mode. The client owns conn from here on, also when Dial fails.
func Dial(ctx context.Context, conn net.Conn) (*Client, error) {
	c := &Client{conn: conn, events: make(chan Event, eventBacklog), pending: map[uint64]chan reply{}, done: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
	r := bufio.NewReaderSize(conn, 16<<10)
	m, err := read(r)
	if err == nil && m.QMP == nil {
		err = errors.New("this is no greeting of QEMU")
	}
	if !stop() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		_ = conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("wait for qmp's greeting: %w", err)
	}
	c.version = m.QMP.Version.QEMU
	go c.read(r)
	if err := c.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// Resume goes on with a connection on which another client has left negotiation mode, and is gone after the reply to its last
// command. The client owns conn from here on.
func Resume(conn net.Conn) *Client {
	c := &Client{conn: conn, events: make(chan Event, eventBacklog), pending: map[uint64]chan reply{}, done: make(chan struct{})}
	go c.read(bufio.NewReaderSize(conn, 16<<10))
	return c
}

// read takes one message.
func read(r *bufio.Reader) (message, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > maxMessage {
			return message{}, fmt.Errorf("a qmp message is longer than %d bytes", maxMessage)
		}
		line = append(line, part...)
		if err == nil {
			break
		}
		if !errors.Is(err, bufio.ErrBufferFull) {
			if err == io.EOF && len(line) > 0 {
				err = io.ErrUnexpectedEOF
			}
			return message{}, err
		}
	}
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		return message{}, fmt.Errorf("parse qmp message: %w", err)
	}
	return m, nil
}

// read hands replies and events on until the connection ends.
func (c *Client) read(r *bufio.Reader) {
	defer close(c.events)
	for {
		m, err := read(r)
		if err != nil {
			c.fail(err)
			return
		}
		switch {
		case m.Event != "":
			e := Event{Name: m.Event, Data: m.Data, Time: time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1000)}
			select {
			case c.events <- e:
			default:
			}
		case m.ID != nil:
			c.mu.Lock()
			ch := c.pending[*m.ID]
			delete(c.pending, *m.ID)
			c.mu.Unlock()
			if ch == nil {
				continue
			}
			if m.Error != nil {
				ch <- reply{err: m.Error}
			} else {
				ch <- reply{result: m.Return}
			}
		}
	}
}

func (c *Client) fail(err error) {
	if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET) {
		err = ErrClosed
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	for id, ch := range c.pending {
		delete(c.pending, id)
		ch <- reply{err: err}
	}
	close(c.done)
	_ = c.conn.Close()
}

// Events returns what QEMU says unasked. It is closed when the connection ends. Events nobody takes are dropped after a
// few hundred.
func (c *Client) Events() <-chan Event { return c.events }

// Version returns QEMU's version from its greeting.
func (c *Client) Version() Version { return c.version }

// Execute runs a command and decodes its result, when result is not nil. A failure of the command is an *Error.
func (c *Client) Execute(ctx context.Context, command string, arguments, result any) error {
	return c.ExecuteWithFile(ctx, command, arguments, nil, result)
}

// ExecuteWithFile is Execute with an open file handed over beside the command, as getfd and add-fd take it. The caller
// keeps its own descriptor. The connection must be a unix socket.
func (c *Client) ExecuteWithFile(ctx context.Context, command string, arguments any, file *os.File, result any) error {
	ch := make(chan reply, 1)
	c.mu.Lock()
	if c.err != nil {
		c.mu.Unlock()
		return fmt.Errorf("qmp %s: %w", command, c.err)
	}
	c.next++
	id := c.next
	line, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, arguments, id})
	if err != nil {
		c.mu.Unlock()
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	c.pending[id] = ch
	err = c.send(append(line, '\n'), file)
	if err != nil {
		delete(c.pending, id)
	}
	c.mu.Unlock()
	if err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	select {
	case r := <-ch:
		var e *Error
		if errors.As(r.err, &e) {
			e.Command = command
			return e
		}
		if r.err != nil {
			return fmt.Errorf("qmp %s: %w", command, r.err)
		}
		if result == nil {
			return nil
		}
		if err := json.Unmarshal(r.result, result); err != nil {
			return fmt.Errorf("qmp %s: parse its result: %w", command, err)
		}
		return nil
	case <-ctx.Done():
		c.mu.Lock()
		delete(c.pending, id)
		c.mu.Unlock()
		return fmt.Errorf("qmp %s: %w", command, context.Cause(ctx))
	}
}

func (c *Client) send(line []byte, file *os.File) error {
	if file == nil {
		_, err := c.conn.Write(line)
		return err
	}
	u, ok := c.conn.(*net.UnixConn)
	if !ok {
		return errors.New("files can be handed over on a unix socket only")
	}
	n, _, err := u.WriteMsgUnix(line, syscall.UnixRights(int(file.Fd())), nil)
	if err != nil {
		return err
	}
	_, err = u.Write(line[n:])
	return err
}

// Close ends the connection and waits for the reader. It may be called twice.
func (c *Client) Close() error {
	err := c.conn.Close()
	<-c.done
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	return err
}
