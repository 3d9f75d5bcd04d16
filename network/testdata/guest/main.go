// Guest is the init of the machine that network's test boots: it sets up its interface from the environment (the kernel
// hands unknown words of its command line to init), exchanges bytes with the host, and switches the machine off.
package main

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func main() {
	if err := run(); err != nil {
		fmt.Println("guest:", err)
	}
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func run() error {
	mtu, err := strconv.Atoi(os.Getenv("TEST_MTU"))
	if err != nil {
		return err
	}
	size, err := strconv.ParseInt(os.Getenv("TEST_BYTES"), 10, 64)
	if err != nil {
		return err
	}
	for _, name := range []string{"lo", "eth0"} {
		l, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if name == "eth0" {
			if err := netlink.LinkSetMTU(l, mtu); err != nil {
				return fmt.Errorf("set the mtu: %w", err)
			}
			for _, key := range []string{"TEST_ADDR4", "TEST_ADDR6"} {
				a, err := netlink.ParseAddr(os.Getenv(key))
				if err != nil {
					return err
				}
				a.Flags = unix.IFA_F_NODAD
				if err := netlink.AddrAdd(l, a); err != nil {
					return fmt.Errorf("add %s: %w", a, err)
				}
			}
		}
		if err := netlink.LinkSetUp(l); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
	}
	// Three connections for each family; the first byte says what follows: up, down, echo.
	for _, key := range []string{"TEST_HOST4", "TEST_HOST6"} {
		for _, what := range []byte{'u', 'd', 'e'} {
			c, err := net.Dial("tcp", os.Getenv(key))
			if err != nil {
				return err
			}
			if _, err := c.Write([]byte{what}); err != nil {
				return err
			}
			switch what {
			case 'u':
				err = send(c, size)
			case 'd':
				_, err = io.Copy(io.Discard, c)
			case 'e':
				_, err = io.Copy(c, c) // the host ends its half first
			}
			if err == nil {
				err = c.(*net.TCPConn).CloseWrite()
			}
			if err != nil {
				return fmt.Errorf("%s %c: %w", key, what, err)
			}
			if err := c.Close(); err != nil {
				return err
			}
		}
	}
	// The host takes this one when it is done with the others: nothing is left in this kernel's buffers.
	c, err := net.Dial("tcp", os.Getenv("TEST_HOST4"))
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, c)
	return err
}

func send(w io.Writer, size int64) error {
	buf := make([]byte, 128<<10)
	for i := range buf {
		buf[i] = byte(i * 7)
	}
	for size > 0 {
		n, err := w.Write(buf[:min(size, int64(len(buf)))])
		if err != nil {
			return err
		}
		size -= int64(n)
	}
	return nil
}
