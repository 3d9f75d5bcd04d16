package channel

import (
	"errors"
	"net"
	"testing"
)

// A guest with a vsock device says so on the serial port; streams then go over AF_VSOCK. What answers at the context id
// is not this test's: where there is no vsock the dial fails, with the kernel's reason.
func TestVsockIsAnnounced(t *testing.T) {
	noLeaks(t)
	p := newVirtioPort()
	g := newGuest(p, transportVsock, nil)
	defer g.Close()
	const nobody = 4_000_000_000
	h := NewHost(HostConfig{Connect: p.attach, Guest: Fresh, CID: nobody})
	defer h.Close()
	g.Ready()
	if err := h.Ready(testContext(t)); err != nil {
		t.Fatal(err)
	}
	c, err := h.Dial(testContext(t), 1)
	var oe *net.OpError
	if c != nil || !errors.As(err, &oe) || oe.Net != "vsock" {
		t.Errorf("got %v and %v, want an error of vsock", c, err)
	}
	// Another host finds the guest ready, too.
	again := NewHost(HostConfig{Connect: p.attach, CID: nobody})
	defer again.Close()
	if err := again.Ready(testContext(t)); err != nil {
		t.Fatal(err)
	}
}
