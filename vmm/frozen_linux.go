package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/undo"
	"github.com/kcradle/kcradle/vmm/checkpoint"
)

// Frozen is a machine that stood still when its QEMU was written to files, and goes on from them as often as wanted. Unlike a
// Snapshot, of which a new QEMU knows only the guest, it has what QEMU made of the guest: its code, translated. It is plain
// data; the memory of QEMU's process is in a file of its own.
type Frozen struct {
	Machine Handover          `json:"machine"`
	Process *checkpoint.Image `json:"process"`
}

// Roles of QEMU's descriptors that are not in Config.files.
const (
	roleStderr     = "stderr"
	roleConnection = "connection" // the host's, to the control channel
)

// sockets are the roles of Config.files whose descriptors QEMU keeps; the numbers of others it uses again.
var sockets = []string{"qmp", "console", "channel", "wire", "lifeline"}

// Freeze writes the QEMU of a machine that Give has just given to this process to a new file. The machine is of no use
// afterwards and should be closed. It must have been restored, and its engine be TCG: what KVM has of a machine is not QEMU's.
func (h *Handover) Freeze(ctx context.Context, memory *os.File) (_ *Frozen, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("freeze machine: %w", err)
		}
	}()
	if h.Engine != TCG || h.Memory == "" || h.roles == nil {
		return nil, errors.New("it was not restored in this process with the engine tcg")
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(h.Files[fileMemory].Fd()), &st); err != nil {
		return nil, os.NewSyscallError("fstat", err)
	}
	// It is told when QEMU ends.
	stop := context.AfterFunc(ctx, func() { _ = unix.PidfdSendSignal(int(h.Files[filePID].Fd()), unix.SIGKILL, nil, 0) })
	defer stop()
	connected := false
	img, err := checkpoint.Freeze(h.PID, memory, func(d checkpoint.Descriptor) string {
		i := d.Number - firstFile
		switch {
		case d.Number == int(unix.Stderr):
			return roleStderr
		case d.Type == unix.S_IFREG && d.Device == st.Dev && d.Inode == st.Ino:
			return "memory"
		case d.Type == unix.S_IFSOCK && i >= 0 && i < len(h.roles) && slices.Contains(sockets, h.roles[i]):
			return h.roles[i]
		case d.Type == unix.S_IFSOCK && !connected:
			connected = true
			return roleConnection
		}
		return ""
	})
	if err != nil {
		return nil, err
	}
	if !connected {
		return nil, errors.New("the control channel is not connected")
	}
	f := &Frozen{Machine: *h, Process: img}
	f.Machine.PID, f.Machine.Files, f.Machine.roles = 0, nil, nil
	return f, nil
}

// ThawConfig is what a machine that was frozen is made from.
type ThawConfig struct {
	Memory  string      // path of the guest's memory: the Snapshot's from which it was restored
	Process *os.File    // what Freeze wrote
	Wire    *os.File    // QEMU's end; nil: it has none
	RunAs   *Credential // see Config
	Ready   bool        // it will stand ready for a time: see checkpoint.Start
}

// Thaw lets a frozen machine stand there again. Adopt lets it go on.
func Thaw(f *Frozen, c ThawConfig, log *slog.Logger) (_ *Handover, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("thaw machine: %w", err)
		}
	}()
	var u, handed undo.Stack
	defer u.Run()
	defer handed.Run() // what is QEMU's alone
	h := f.Machine
	if h.Memory == "" || f.Process == nil {
		return nil, errors.New("it is not whole")
	}
	h.Files = make([]*os.File, h.files())
	u.Push(func() {
		for _, file := range h.Files {
			_ = file.Close()
		}
	})
	theirs := map[string]*os.File{}
	pair := func(role string, index int) error {
		fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("socketpair", err)
		}
		theirs[role], h.Files[index] = os.NewFile(uintptr(fds[0]), role), os.NewFile(uintptr(fds[1]), role)
		handed.Push(func() { _ = theirs[role].Close() })
		return nil
	}
	for role, index := range map[string]int{"qmp": fileQMP, "console": fileConsole, roleConnection: fileChannel, "lifeline": fileLifeline} {
		if err := pair(role, index); err != nil {
			return nil, err
		}
	}
	listener, address, err := listen()
	if err != nil {
		return nil, err
	}
	theirs["channel"], h.Files[fileAddress] = listener, address.file
	handed.Push(func() { _ = listener.Close() })
	stderr, stderrEnd, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	theirs[roleStderr], h.Files[fileStderr] = stderrEnd, stderr
	handed.Push(func() { _ = stderrEnd.Close() })
	memory, err := os.Open(c.Memory)
	if err != nil {
		return nil, err
	}
	theirs["memory"], h.Files[fileMemory] = memory, memory
	if c.Wire != nil {
		theirs["wire"] = c.Wire
	}
	status, tell, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	h.Files[fileStatus] = status

	guard, err := guardMemory(h.Memory, memory)
	if err != nil {
		_ = tell.Close()
		return nil, err
	}
	cmd := &exec.Cmd{Dir: "/", SysProcAttr: &syscall.SysProcAttr{Setpgid: true}}
	if r := c.RunAs; r != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: r.UID, Gid: r.GID, Groups: r.Groups}
	}
	// See Start: what the warden does to the thread it has for good, and the thread that has traced a process must stay.
	thawed := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := guard.enter()
		if err == nil {
			err = checkpoint.Thaw(cmd, f.Process, checkpoint.Start{
				Memory: c.Process, Files: theirs, Filter: sandboxFilter, Ready: c.Ready,
				Tie: func(pid int) error { // it cannot end before its time here
					pidfd, err := unix.PidfdOpen(pid, 0)
					if err != nil {
						return os.NewSyscallError("pidfd_open", err)
					}
					h.Files[filePID] = os.NewFile(uintptr(pidfd), "pidfd")
					return tie(theirs["lifeline"], pid)
				},
			})
		}
		thawed <- err
		if err == nil {
			_ = cmd.Wait()
			if end := cmd.ProcessState; end != nil {
				tellStatus(tell, end.Sys().(syscall.WaitStatus))
				return
			}
		}
		_ = tell.Close()
	}()
	err = <-thawed
	if err == nil {
		h.Files[fileListener], err = duplicate(guard.listener)
	}
	guard.close() // whoever adopts the machine has another
	if err != nil {
		return nil, err
	}
	h.PID = cmd.Process.Pid
	log.Debug("machine thawed", "pid", h.PID)
	u.Keep()
	return &h, nil
}

// WirePair is a wire of the kind WireStream: our end, and QEMU's.
func WirePair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	for _, fd := range fds {
		for _, opt := range []int{unix.SO_SNDBUF, unix.SO_RCVBUF} {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, opt, 1<<20) // as much of it as the host allows
		}
	}
	return os.NewFile(uintptr(fds[0]), "wire"), os.NewFile(uintptr(fds[1]), "wire"), nil
}
