package dockerapi

import (
	"errors"
	"net"
	"sync"
	"syscall"
)

// Limit returns a listener that accepts no further connection while n of them are open. The connections keep what they
// can beyond net.Conn: CloseWrite and their descriptor.
func Limit(l net.Listener, n int) net.Listener {
	return &limiter{Listener: l, slots: make(chan struct{}, n), closed: make(chan struct{})}
}

type limiter struct {
	net.Listener
	slots  chan struct{}
	closed chan struct{}
	once   sync.Once
}

func (l *limiter) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limited{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

func (l *limiter) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type limited struct {
	net.Conn
	release func()
}

func (c *limited) Close() error {
	err := c.Conn.Close()
	c.release()
	return err
}

func (c *limited) CloseWrite() error {
	if w, ok := c.Conn.(CloseWriter); ok {
		return w.CloseWrite()
	}
	return errors.ErrUnsupported
}

func (c *limited) SyscallConn() (syscall.RawConn, error) {
	if s, ok := c.Conn.(syscall.Conn); ok {
		return s.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}
