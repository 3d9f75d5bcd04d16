package network

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/kcradle/kcradle/spec"
)

// Bounds of the forwarder. A pod that asks more loses what is beyond them.
const (
	maxQueries   = 256              // under way, over UDP and TCP
	queryTimeout = 12 * time.Second // longer than the host tries
	streamIdle   = 30 * time.Second
	maxDatagram  = 4096
	dnsPort      = 53
)

// forwarder answers DNS at an address of the pod's own, by asking a server that may change.
type forwarder struct {
	server atomic.Pointer[netip.AddrPort] // nil: there is none
	udp    *net.UDPConn
	tcp    net.Listener
	slots  chan struct{}
	ctx    context.Context // ends with the forwarder
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// forward starts the forwarder when n wants it, and tells it whom to ask.
func (w *Wire) forward(n *spec.Network) error {
	if !n.Resolver {
		return nil
	}
	if w.forwarder == nil {
		f, err := newForwarder(netip.AddrPortFrom(netip.MustParseAddr(spec.ResolverAddress), dnsPort))
		if err != nil {
			return fmt.Errorf("answer DNS in the pod: %w", err)
		}
		w.forwarder = f
	}
	w.forwarder.server.Store(nil)
	if len(n.DNS) > 0 {
		a, err := netip.ParseAddr(n.DNS[0])
		if err != nil {
			return fmt.Errorf("nameserver: %w", err)
		}
		at := netip.AddrPortFrom(a, dnsPort)
		w.forwarder.server.Store(&at)
	}
	return nil
}

func newForwarder(at netip.AddrPort) (*forwarder, error) {
	udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, err
	}
	tcp, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return nil, errors.Join(err, udp.Close())
	}
	f := &forwarder{udp: udp, tcp: tcp, slots: make(chan struct{}, maxQueries)}
	f.ctx, f.cancel = context.WithCancel(context.Background())
	f.wg.Go(f.datagrams)
	f.wg.Go(f.streams)
	return f, nil
}

func (f *forwarder) close() {
	if f == nil {
		return
	}
	f.cancel()
	_ = f.udp.Close()
	_ = f.tcp.Close()
	f.wg.Wait()
}

// work does something beside the caller, when there is a place for it.
func (f *forwarder) work(what func(server string)) bool {
	server := f.server.Load()
	if server == nil {
		return false
	}
	select {
	case f.slots <- struct{}{}:
	default:
		return false
	}
	f.wg.Go(func() {
		defer func() { <-f.slots }()
		what(server.String())
	})
	return true
}

func (f *forwarder) datagrams() {
	buf := make([]byte, maxDatagram)
	for {
		n, from, err := f.udp.ReadFromUDPAddrPort(buf)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil || n < 12 {
			continue
		}
		query := append([]byte(nil), buf[:n]...)
		f.work(func(server string) {
			if answer := f.ask(server, query); answer != nil {
				_, _ = f.udp.WriteToUDPAddrPort(answer, from) // whoever does not wait any more gets none
			}
		})
	}
}

// ask returns the server's answer, nil when there is none.
func (f *forwarder) ask(server string, query []byte) []byte {
	var d net.Dialer
	c, err := d.DialContext(f.ctx, "udp", server)
	if err != nil {
		return nil
	}
	defer c.Close()
	stop := context.AfterFunc(f.ctx, func() { c.Close() })
	defer stop()
	_ = c.SetDeadline(time.Now().Add(queryTimeout))
	if _, err := c.Write(query); err != nil {
		return nil
	}
	buf := make([]byte, 64<<10)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return nil
		}
		if n >= 2 && buf[0] == query[0] && buf[1] == query[1] {
			return buf[:n]
		}
	}
}

func (f *forwarder) streams() {
	for {
		c, err := f.tcp.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // no descriptors: it passes
			select {
			case <-f.ctx.Done():
				return
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		if !f.work(func(server string) { f.splice(c, server) }) {
			c.Close()
		}
	}
}

// splice carries a connection until either side has nothing more to say, or has been silent for long.
func (f *forwarder) splice(client net.Conn, server string) {
	defer client.Close()
	var d net.Dialer
	c, err := d.DialContext(f.ctx, "tcp", server)
	if err != nil {
		return
	}
	defer c.Close()
	stop := context.AfterFunc(f.ctx, func() { client.Close(); c.Close() })
	defer stop()
	done := make(chan struct{})
	carry := func(to, from net.Conn) {
		_, _ = io.Copy(to, idle{from})
		to.(*net.TCPConn).CloseWrite()
	}
	go func() {
		defer close(done)
		carry(c, client)
	}()
	carry(client, c)
	client.Close() // the server has said everything
	<-done
}

// idle ends a connection that has been silent for a while.
type idle struct{ net.Conn }

func (i idle) Read(b []byte) (int, error) {
	_ = i.SetReadDeadline(time.Now().Add(streamIdle))
	return i.Conn.Read(b)
}
