// Package channel is the control channel between a host and its guest: the host dials, the guest listens, and
// nothing travels before the guest has said that it is ready. It runs over AF_VSOCK where the machine has a vsock
// device, else as multiplexed streams over one virtio-serial port; users of either end cannot tell which.
//
// In the guest:
//
//	g, err := channel.Open(ctx, log)
//	api, err := g.Listen(spec.PortVdocker)
//	g.Ready() // once every listener stands
//
// On the host:
//
//	h := channel.NewHost(channel.HostConfig{Connect: connect, Guest: channel.Fresh})
//	conn, err := h.Dial(ctx, spec.PortVdocker) // waits for the guest's Ready
//
// # Session start on the serial port
//
// A virtio-serial port is one stream of bytes that outlives whoever reads it: bytes of an earlier session may still be
// under way, in both directions, and neither side is told reliably that the other went away and came back. So both
// sides find each other by fixed messages, each beginning with a magic number that no stream of the multiplexer starts
// with, and skip whatever else they read:
//
//	host  → guest   break    "I am new here": only if there may have been a session before
//	guest → host    hello n  n is fresh for each hello; the write blocks until a host is connected
//	host  → guest   knock n  answers each hello
//	guest → host    ack n    for its latest hello only; the session begins behind it, on both sides
//
// A break is preceded by more filling than a frame of the multiplexer can swallow, so a guest that sits in an old
// session meets bytes that are no frame, gives the session up and says hello.
package channel

import (
	"errors"
	"net"
	"strconv"
	"time"
)

// ErrRefused is what a read from a dialed connection returns when the guest has no listener on that port.
var ErrRefused = errors.New("the guest does not listen on this port")

// ErrBroken is what reads and writes return when the session under a connection ended before the connection did.
var ErrBroken = errors.New("control channel: session ended")

// Conn is a connection of either transport. Close may be called twice.
type Conn interface {
	net.Conn
	// CloseWrite ends the outgoing direction: the peer reads io.EOF, and can go on writing.
	CloseWrite() error
}

// Addr names one end of a connection over the serial port.
type Addr struct {
	Port uint32
}

// Network returns "virtio-serial".
func (Addr) Network() string { return "virtio-serial" }

// String returns the port as a decimal number.
func (a Addr) String() string { return strconv.FormatUint(uint64(a.Port), 10) }

// hostCID is the context id of the host on AF_VSOCK (VMADDR_CID_HOST in linux/vm_sockets.h).
const hostCID = 2

var past = time.Unix(1, 0)
