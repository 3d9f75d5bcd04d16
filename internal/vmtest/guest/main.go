// Command guest is the /init of this package's own tests: it echoes on one port and obeys on another.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm/channel"
)

func main() {
	if err := run(); err != nil {
		if log, e := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0); e == nil {
			fmt.Fprintf(log, "<0>guest: %v\n", err)
		}
		// The end of init is a panic of the kernel.
	}
}

func run() error {
	for _, m := range []struct{ kind, at string }{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}} {
		if err := os.MkdirAll(m.at, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.at, err)
		}
	}
	g, err := channel.Open(context.Background(), nil)
	if err != nil {
		return err
	}
	echo, err := g.Listen(spec.PortVdocker)
	if err != nil {
		return err
	}
	obey, err := g.Listen(spec.PortControl)
	if err != nil {
		return err
	}
	g.Ready()
	go serve(echo, func(c net.Conn) { _, _ = io.Copy(c, c) })
	return serve(obey, func(c net.Conn) {
		for s := bufio.NewScanner(c); s.Scan(); {
			answer, err := do(strings.Fields(s.Text()))
			if err != nil {
				answer = "error: " + err.Error()
			}
			if _, err := fmt.Fprintln(c, answer); err != nil {
				return
			}
		}
	})
}

func serve(l net.Listener, f func(net.Conn)) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			f(c)
		}()
	}
}

// held is memory that "take" took. Only one connection uses it.
var held []byte

func do(words []string) (string, error) {
	if len(words) == 0 {
		return "", errors.New("no command")
	}
	switch words[0] {
	case "sysrq":
		return "", os.WriteFile("/proc/sysrq-trigger", []byte(words[1]), 0)
	case "restart":
		return "", unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	case "take": // MiB
		n, err := strconv.Atoi(words[1])
		if err != nil {
			return "", err
		}
		if held, err = unix.Mmap(-1, 0, n<<20, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE); err != nil {
			return "", err
		}
		for i := 0; i < len(held); i += 4096 {
			held[i] = byte(i>>12) | 1
		}
		return "taken", nil
	case "give":
		if err := unix.Munmap(held); err != nil {
			return "", err
		}
		runtime.GC()
		debug.FreeOSMemory()
		return "given", nil
	case "read": // a file
		b, err := os.ReadFile(words[1])
		return strings.ReplaceAll(strings.TrimSpace(string(b)), "\n", "|"), err
	case "disk": // serial, and how many bytes of it, or all: name, size, read-only, sha256 of its contents
		return disk(words[1], words[2:]...)
	case "fill": // serial, byte, MiB, and sync
		return "", fill(words[1], words[2], words[3])
	case "discard": // serial
		return "", discard(words[1])
	}
	return "", fmt.Errorf("unknown command %q", words[0])
}

// find returns the device of a serial.
func find(serial string) (string, error) {
	files, err := filepath.Glob("/sys/block/vd*/serial")
	if err != nil {
		return "", err
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(b)) == serial {
			return filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", fmt.Errorf("no disk with serial %q", serial)
}

func disk(serial string, limit ...string) (string, error) {
	name, err := find(serial)
	if err != nil {
		return "", err
	}
	ro, err := os.ReadFile("/sys/block/" + name + "/ro")
	if err != nil {
		return "", err
	}
	f, err := os.Open("/dev/" + name)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var r io.Reader = f
	if len(limit) > 0 {
		n, err := strconv.ParseInt(limit[0], 10, 64)
		if err != nil {
			return "", err
		}
		r = io.LimitReader(f, n)
	}
	sum := sha256.New()
	n, err := io.Copy(sum, r)
	return fmt.Sprintf("%s %d ro=%s %x", name, n, strings.TrimSpace(string(ro)), sum.Sum(nil)), err
}

func fill(serial, value, mib string) error {
	name, err := find(serial)
	if err != nil {
		return err
	}
	v, err := strconv.Atoi(value)
	if err != nil {
		return err
	}
	n, err := strconv.Atoi(mib)
	if err != nil {
		return err
	}
	f, err := os.OpenFile("/dev/"+name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	for i := range b {
		b[i] = byte(v)
	}
	for range n {
		if _, err := f.Write(b); err != nil {
			return err
		}
	}
	return f.Sync()
}

func discard(serial string) error {
	name, err := find(serial)
	if err != nil {
		return err
	}
	f, err := os.OpenFile("/dev/"+name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	return blockDiscard(f, uint64(size))
}
