package vmm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/undo"
	"github.com/kcradle/kcradle/vmm/channel"
	"github.com/kcradle/kcradle/vmm/qmp"
)

// Handover is a machine between two processes: it stands still, and its guest waits for a host. It is plain data and open
// files, which can go over a socket.
type Handover struct {
	PID      int      `json:"pid"`
	Engine   Engine   `json:"engine"`
	Drives   []Drive  `json:"drives"` // serial numbers and access
	Nodes    []string `json:"nodes"`
	Attached int      `json:"attached"`
	Nonce    uint64   `json:"nonce"`            // see channel.HostConfig
	Memory   string   `json:"memory,omitempty"` // how QEMU opens its memory; empty: the machine was not restored

	// Files in the order of the constants below; the last two only with Memory.
	Files []*os.File `json:"-"`

	roles []string // see Machine
}

// Files of a handover.
const (
	filePID      = iota // pidfd of QEMU
	fileStatus          // pipe: how QEMU has ended, if the process whose child it is lives so long
	fileLifeline        // QEMU is killed when nobody has this open any more
	fileQMP
	fileConsole
	fileStderr
	fileChannel // the host's connection to the control channel
	fileAddress // and where to make another
	fileListener
	fileMemory
)

// files is how many there are.
func (h *Handover) files() int {
	if h.Memory == "" {
		return fileListener
	}
	return fileMemory + 1
}

// Close lets go of the files; the machine dies, unless somebody else has them.
func (h *Handover) Close() error {
	var errs []error
	for _, f := range h.Files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// Alive says whether QEMU's process has not ended.
func (h *Handover) Alive() bool {
	p := []unix.PollFd{{Fd: int32(h.Files[filePID].Fd()), Events: unix.POLLIN}}
	n, err := unix.Poll(p, 0)
	return err == nil && n == 0
}

// tie makes QEMU die when nobody has the other end of its lifeline open: the end of the connection is a signal to QEMU,
// and which one that is can be chosen (fcntl(2), F_SETSIG). A parent's death, for which there is a signal too, is not it:
// the parent stays behind when a machine changes hands. A parent that dies before this call leaves a QEMU behind, unless that has
// the signal until then, as a thawed one has.
func tie(end *os.File, pid int) error {
	fd := end.Fd()
	for _, c := range [][2]int{{unix.F_SETOWN, pid}, {unix.F_SETSIG, int(unix.SIGKILL)}} {
		if _, err := unix.FcntlInt(fd, c[0], c[1]); err != nil {
			return os.NewSyscallError("fcntl", err)
		}
	}
	flags, err := unix.FcntlInt(fd, unix.F_GETFL, 0)
	if err == nil {
		_, err = unix.FcntlInt(fd, unix.F_SETFL, flags|unix.O_ASYNC)
	}
	return os.NewSyscallError("fcntl", err)
}

// ours is the file of our end of a socket pair.
func ours(c net.Conn) (*os.File, error) {
	defer c.Close()
	return c.(*net.UnixConn).File()
}

// duplicate is another descriptor of the same file.
func duplicate(f *os.File) (*os.File, error) {
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("dup", err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// Give makes the machine stand still, its guest waiting for a host, and gives it away. It must be Transferable. Afterwards
// this Machine must not be used any more; when its process ends, the new owner is told how.
func (m *Machine) Give(ctx context.Context) (_ *Handover, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("give the machine away: %w", err)
		}
	}()
	if m.held.lifeline == nil {
		return nil, errors.New("it was not started as transferable")
	}
	for _, d := range m.drives {
		if !d.Blank {
			return nil, fmt.Errorf("drive %s is not blank", d.Serial)
		}
	}
	if err := m.channel.Rest(ctx); err != nil {
		return nil, m.explain(err)
	}
	if err := m.Stop(ctx); err != nil {
		return nil, err
	}
	h := &Handover{PID: m.pid, Engine: m.engine, Nodes: m.nodes, Attached: m.attached, roles: m.roles}
	for _, d := range m.drives {
		h.Drives = append(h.Drives, Drive{Serial: d.Serial, ReadOnly: d.ReadOnly, Blank: true})
	}
	var u undo.Stack
	defer u.Run()
	u.Push(func() { h.Close() })
	pidfd, err := unix.PidfdOpen(m.pid, 0)
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	h.Files = append(h.Files, os.NewFile(uintptr(pidfd), "pidfd"))
	status, tell, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	h.Files = append(h.Files, status)
	u.Push(func() { tell.Close() })
	resting, nonce := m.channel.Resting()
	h.Nonce = nonce
	sources := []func() (*os.File, error){
		func() (*os.File, error) { return duplicate(m.held.lifeline) },
		m.held.control.(*net.UnixConn).File,
		m.held.kernelLog.(*net.UnixConn).File,
		func() (*os.File, error) { return duplicate(m.held.stderr) },
		resting.(*net.UnixConn).File,
		func() (*os.File, error) { return duplicate(m.held.address.file) },
	}
	if g := m.held.guard; g != nil {
		h.Memory = g.path
		sources = append(sources, func() (*os.File, error) { return duplicate(g.listener) }, func() (*os.File, error) { return duplicate(g.memory) })
	}
	for _, source := range sources {
		f, err := source()
		if err != nil {
			return nil, err
		}
		h.Files = append(h.Files, f)
	}
	u.Keep()
	m.given.Store(tell)
	m.disarm()
	// What reads here ends; the copies stay open.
	_ = m.qmp.Close()
	_ = m.held.kernelLog.Close()
	_ = m.held.stderr.Close()
	_ = m.held.lifeline.Close()
	m.held.guard.close()
	return h, nil
}

// tellStatus says how QEMU has ended.
func tellStatus(to *os.File, status syscall.WaitStatus) {
	_, _ = to.Write(binary.LittleEndian.AppendUint32(nil, uint32(status)))
	_ = to.Close()
}

// Adopt takes over a machine that another process gave away. Of config it uses the contents of the drives, Console and
// RunAs; the machine was made from one of the same shape. It goes on at once, and the drives are attached meanwhile: the guest
// must not be told to use them before Attached. The handover's files are the machine's from here on, also when Adopt fails: it
// dies then.
func Adopt(ctx context.Context, h *Handover, config Config, log *slog.Logger) (_ *Machine, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("adopt machine: %w", err)
		}
	}()
	var u undo.Stack
	defer u.Run()
	u.Push(func() { h.Close() })
	if len(h.Files) != h.files() || len(h.Drives) != len(config.Drives) || len(h.Nodes) != len(h.Drives) {
		return nil, fmt.Errorf("%d files, %d drives and %d nodes are not what belongs to it", len(h.Files), len(h.Drives), len(h.Nodes))
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	for i, d := range h.Drives {
		if d.Serial != config.Drives[i].Serial || d.ReadOnly != config.Drives[i].ReadOnly {
			return nil, fmt.Errorf("drive %d is %q, not %q", i, d.Serial, config.Drives[i].Serial)
		}
	}
	blank := config
	blank.Drives = h.Drives
	m := newMachine(blank, log)
	m.pid, m.nodes, m.attached = h.PID, h.Nodes, h.Attached
	pidfd := h.Files[filePID]
	m.kill = func() error {
		return unix.PidfdSendSignal(int(pidfd.Fd()), unix.SIGKILL, nil, 0)
	}
	var conns []net.Conn
	for _, i := range []int{fileQMP, fileConsole, fileChannel} {
		c, err := net.FileConn(h.Files[i])
		if err != nil {
			return nil, err
		}
		u.Push(func() { c.Close() })
		_ = h.Files[i].Close()
		conns = append(conns, c)
	}
	m.held = held{
		control: conns[0], kernelLog: conns[1], stderr: h.Files[fileStderr], lifeline: h.Files[fileLifeline],
		address: &socketAddress{file: h.Files[fileAddress]},
	}
	first := conns[2]
	connect := func(ctx context.Context) (net.Conn, error) {
		if c := first; c != nil {
			first = nil
			return c, nil
		}
		return m.held.address.connect(ctx)
	}
	console, err := config.openConsole()
	if err != nil {
		return nil, err
	}
	if h.Memory != "" {
		if m.held.guard, err = adoptWarden(h.Memory, h.Files[fileMemory], h.Files[fileListener]); err != nil {
			_ = console.Close()
			return nil, err
		}
	}
	m.oom = newOOMWatch(config.RunAs)
	m.qmp = qmp.Resume(m.held.control)
	m.channel = channel.NewHost(channel.HostConfig{Connect: connect, Guest: channel.Waiting, Nonce: h.Nonce, CID: config.CID})
	u.Keep()
	m.attend(ctx, console, nil, func() (syscall.WaitStatus, error) { return awaitEnd(pidfd, h.Files[fileStatus]) })
	log.Debug("machine adopted", "pid", m.PID(), "engine", m.engine)
	if err := m.Continue(ctx); err != nil {
		err = m.explain(err)
		m.Kill()
		return nil, err
	}
	m.attaching = make(chan struct{})
	go func() {
		defer close(m.attaching)
		for _, d := range config.Drives {
			if m.attachErr = m.Attach(ctx, d); m.attachErr != nil {
				m.Kill()
				return
			}
		}
	}()
	return m, nil
}

// Attached waits until an adopted machine has its drives. If one of them cannot be attached, the machine ends.
func (m *Machine) Attached() error {
	if m.attaching == nil {
		return nil
	}
	<-m.attaching
	return m.attachErr
}

// awaitEnd waits for a process that is somebody else's child. Its parent says how it ended; if that is gone, nobody knows.
func awaitEnd(pidfd, status *os.File) (syscall.WaitStatus, error) {
	defer pidfd.Close()
	defer status.Close()
	p := []unix.PollFd{{Fd: int32(pidfd.Fd()), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, -1)
		if err != nil && err != unix.EINTR {
			return 0, os.NewSyscallError("poll", err)
		}
		if n > 0 {
			break
		}
	}
	var b [4]byte
	if _, err := io.ReadFull(status, b[:]); err != nil {
		return 0, errors.New("its parent, kcradle's pool, ended before it and cannot tell how")
	}
	return syscall.WaitStatus(binary.LittleEndian.Uint32(b[:])), nil
}
