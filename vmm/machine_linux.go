package vmm

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/undo"
	"github.com/kcradle/kcradle/vmm/channel"
	"github.com/kcradle/kcradle/vmm/qmp"
)

// Machine is a running virtual machine, or one that has ended. Its methods may be called at the same time.
type Machine struct {
	pid     int
	kill    func() error // SIGKILL; harmless when QEMU is gone
	log     *slog.Logger
	engine  Engine
	channel *channel.Host
	held    held
	roles   []string    // of the descriptors that QEMU inherited, see Config.files; nil: it was adopted
	disarm  func() bool // lets the machine outlive the context of Start

	killed atomic.Bool
	given  atomic.Pointer[os.File] // set by Give: where to tell how QEMU ended
	oom    *oomWatch

	greeted chan struct{} // closed when qmp is set or QEMU will not greet
	qmp     *qmp.Client   // nil: QEMU never came up

	migration chan string // its states, as QEMU tells them

	drives   []Drive
	attach   sync.Mutex // guards what follows
	nodes    []string   // the block node behind each drive
	spare    []string   // one with nothing in it, for each drive that began so
	sets     [][]int    // the descriptor sets that Attach has made for each
	attached int        // nodes that Attach has made

	attaching chan struct{} // closed when attachErr is set; nil: nothing is to be attached
	attachErr error

	stderr, console tail

	done chan struct{} // closed when exit is set
	exit Exit
}

func newMachine(config Config, log *slog.Logger) *Machine {
	m := &Machine{log: log, engine: config.Engine, greeted: make(chan struct{}), migration: make(chan string, 16), done: make(chan struct{})}
	m.drives = slices.Clone(config.Drives)
	for i := range config.Drives {
		m.nodes, m.spare = append(m.nodes, driveNode(i)), append(m.spare, "")
	}
	m.sets = make([][]int, len(config.Drives))
	return m
}

// Start starts QEMU and returns as soon as its process runs; what goes wrong later is in Exit. QEMU dies with this
// process, and when ctx ends. log may be nil.
func Start(ctx context.Context, config Config, log *slog.Logger) (*Machine, error) {
	if err := config.Validate(); err != nil {
		return nil, err
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	var u, handed undo.Stack // what a failure undoes; what is QEMU's alone once it runs
	defer u.Run()
	defer handed.Run()

	m := newMachine(config, log)
	var control, kernelLog net.Conn
	var address *socketAddress
	var memory, lifeline *os.File
	var inherited []*os.File
	for i, f := range config.files() {
		m.roles = append(m.roles, f.role)
		file, conn, addr, err := open(config, f, firstFile+i)
		if err != nil {
			return nil, fmt.Errorf("start machine: %w", err)
		}
		if f.role != "wire" {
			handed.Push(func() { _ = file.Close() })
		}
		if conn != nil {
			u.Push(func() { _ = conn.Close() })
		}
		switch f.role {
		case "qmp":
			control = conn
		case "console":
			kernelLog = conn
		case "channel":
			address = addr
			u.Push(func() { _ = addr.Close() })
		case "memory":
			memory = file
		case "lifeline":
			lifeline, err = ours(conn)
			if err != nil {
				return nil, fmt.Errorf("start machine: %w", err)
			}
			u.Push(func() { _ = lifeline.Close() })
		}
		inherited = append(inherited, file)
	}
	console, err := config.openConsole()
	if err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	u.Push(func() { _ = console.Close() })
	stderr, stderrEnd, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start machine: %w", err)
	}
	u.Push(func() { _ = stderr.Close() })
	handed.Push(func() { _ = stderrEnd.Close() })

	cmd := exec.Command(config.QEMU, config.Args()...)
	cmd.Env = []string{"LANG=C", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.Stderr = stderrEnd
	cmd.ExtraFiles = inherited
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setpgid: true, // Ctrl-C in a terminal is the supervisor's business
	}
	if !config.Transferable {
		cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	if r := config.RunAs; r != nil {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: r.UID, Gid: r.GID, Groups: r.Groups}
	}

	m.oom = newOOMWatch(config.RunAs)
	// The first connection waits in the socket's queue before QEMU looks at it.
	guest := channel.Fresh
	if config.Restore != nil {
		guest = channel.Waiting
	}
	m.channel = channel.NewHost(channel.HostConfig{Connect: address.connect, Guest: guest, CID: config.CID})
	u.Push(func() { _ = m.channel.Close() })

	var guard *warden
	if config.Restore != nil {
		if guard, err = newWarden(memory, inherited); err != nil {
			return nil, fmt.Errorf("start machine: %w", err)
		}
		u.Push(guard.close)
	}
	// Pdeathsig is bound to the thread that started the process, so that thread stays until the process is gone. It ends
	// then: what the warden did to it, it inherits for good.
	started := make(chan error, 1)
	waited := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := guard.enter()
		if err == nil {
			// A machine that is to stand ready has the time for huge pages, and what it translates is found faster in them.
			err = startWith(cmd, engines[config.Engine].smallPages && !config.Transferable)
		}
		started <- err
		if err == nil {
			untilExit(cmd.Process.Pid)
			waited <- cmd.Wait()
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start machine: %w", qemuError(config.QEMU, err))
	}
	u.Keep()
	m.pid, m.kill = cmd.Process.Pid, cmd.Process.Kill
	m.held = held{control: control, kernelLog: kernelLog, stderr: stderr, address: address, guard: guard}
	if config.Transferable {
		m.held.lifeline = lifeline
		if err := tie(inherited[len(inherited)-1], m.pid); err != nil {
			_ = m.kill()
			log.Error("the machine cannot be tied to its owner", "error", err)
		}
	}
	log.Debug("machine started", "pid", m.PID(), "engine", config.Engine)
	m.attend(ctx, console, incoming(config), func() (syscall.WaitStatus, error) {
		err := <-waited
		var exitError *exec.ExitError
		if errors.As(err, &exitError) {
			err = nil
		}
		var status syscall.WaitStatus
		if cmd.ProcessState != nil {
			status, _ = cmd.ProcessState.Sys().(syscall.WaitStatus)
		}
		if to := m.given.Load(); to != nil {
			tellStatus(to, status)
		}
		return status, err
	})
	return m, nil
}

// held is what of a machine this process has in its hands.
type held struct {
	control, kernelLog net.Conn
	stderr             *os.File
	address            *socketAddress
	guard              *warden  // nil: the machine was not restored
	lifeline           *os.File // nil: the machine dies with this process by itself
}

// attend looks after QEMU until its end. begin is what to tell it first, wait waits for its process.
func (m *Machine) attend(ctx context.Context, console io.WriteCloser, begin []command, wait func() (syscall.WaitStatus, error)) {
	m.disarm = context.AfterFunc(ctx, m.Kill)
	seen := ending{kvm: m.engine == KVM}
	var readers sync.WaitGroup
	readers.Go(func() {
		_, _ = io.Copy(&m.stderr, m.held.stderr)
		_ = m.held.stderr.Close()
	})
	readers.Go(func() {
		m.pump(console, m.held.kernelLog)
		_ = console.Close()
		_ = m.held.kernelLog.Close()
	})
	readers.Go(func() { m.watch(&seen, begin) })
	go func() {
		seen.status, seen.waitError = wait()
		m.disarm()
		readers.Wait()
		m.held.guard.close()
		_ = m.channel.Close()
		_ = m.held.address.Close()
		if m.held.lifeline != nil {
			_ = m.held.lifeline.Close()
		}
		seen.killed = m.killed.Load()
		if seen.status.Signaled() && seen.status.Signal() == syscall.SIGKILL && !seen.killed {
			seen.hostOOM = m.oom.verdict(m.PID())
		}
		m.oom.Close()
		seen.stderr, seen.console = m.stderr.bytes(), m.console.bytes()
		m.exit = seen.exit()
		m.log.Debug("machine ended", "pid", m.PID(), "reason", m.exit.Reason)
		close(m.done)
	}()
}

// untilExit returns when a child has ended, or at once where that cannot be seen. A wait would also return when the child
// stops because this process traces it (see Freeze).
func untilExit(pid int) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		if n, err := unix.Poll(p, -1); n > 0 || err != nil && err != unix.EINTR {
			return
		}
	}
}

// startWith starts a command, with transparent huge pages disabled for it if smallPages is set. It inherits that from this
// process, which has it only meanwhile.
func startWith(cmd *exec.Cmd, smallPages bool) error {
	if smallPages {
		before, err := unix.PrctlRetInt(unix.PR_GET_THP_DISABLE, 0, 0, 0, 0)
		if err == nil && before == 0 && unix.Prctl(unix.PR_SET_THP_DISABLE, 1, 0, 0, 0) == nil {
			defer func() { _ = unix.Prctl(unix.PR_SET_THP_DISABLE, 0, 0, 0, 0) }()
		} // a kernel without this: slower, no more
	}
	return cmd.Start()
}

// openConsole makes the file of the kernel's log.
func (c Config) openConsole() (io.WriteCloser, error) {
	if c.Console == "" {
		return discard{}, nil
	}
	limit := c.ConsoleLimit
	if limit <= 0 {
		limit = 1 << 20
	}
	f, err := createBounded(c.Console, limit)
	if err != nil {
		return nil, fmt.Errorf("create console log: %w", err)
	}
	return f, nil
}

type discard struct{}

func (discard) Write(b []byte) (int, error) { return len(b), nil }
func (discard) Close() error                { return nil }

// qemuError says what to do when QEMU's program cannot be started.
func qemuError(path string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", &NoQEMUError{Path: path}, err)
	}
	return err
}

// open opens QEMU's descriptor of that number, with our end where there is one.
func open(config Config, f file, number int) (*os.File, net.Conn, *socketAddress, error) {
	switch f.role {
	case "qmp", "console", "lifeline":
		return socketpair(f.role)
	case "channel":
		file, address, err := listen()
		return file, nil, address, err
	case "wire":
		return config.Wire.File, nil, nil, nil
	case "memory", "state":
		file, err := openMemory(config, f)
		return file, nil, nil, err
	case "kernel", "initrd":
		file, err := readable(f.path, config.RunAs)
		return file, nil, nil, err
	case "vsock":
		file, err := os.OpenFile(f.path, os.O_RDWR, 0)
		if errors.Is(err, fs.ErrNotExist) {
			err = fmt.Errorf("%w (load the module: modprobe vhost_vsock; or leave the context id out)", err)
		}
		return file, nil, nil, err
	}
	file, err := config.Drives[f.drive].open(f, number)
	if err != nil {
		return nil, nil, nil, fmt.Errorf("drive %s: %w", config.Drives[f.drive].Serial, err)
	}
	return file, nil, nil, nil
}

// openMemory opens what a snapshot consists of, or makes the memory of one.
func openMemory(config Config, f file) (*os.File, error) {
	if !f.write {
		return os.Open(f.path)
	}
	file, err := os.OpenFile(f.path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, err
	}
	err = file.Truncate(config.memory() << 20)
	if err == nil && config.RunAs != nil { // QEMU opens it once more, by a name that only leads there from its own descriptors
		err = file.Chmod(0o666)
	}
	if err != nil {
		_ = file.Close()
		_ = os.Remove(f.path)
		return nil, err
	}
	return file, nil
}

// open opens one of the drive's files; the one behind it in the list will be in descriptor set number+1.
func (d Drive) open(f file, number int) (*os.File, error) {
	if f.role == "descriptor" {
		return memoryFile("vmdk", []byte(descriptor(d.Extents, number+1)), f.write)
	}
	mode := os.O_RDONLY
	if f.write {
		mode = os.O_RDWR
	}
	file, err := os.OpenFile(f.path, mode, 0)
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && f.size > 0 && info.Size() < f.size {
		err = fmt.Errorf("%s has %d bytes, and %d are to be shown: it was cut", f.path, info.Size(), f.size)
	}
	if err != nil {
		_ = file.Close()
		return nil, err
	}
	return file, nil
}

// socketpair returns QEMU's end and ours.
func socketpair(name string) (*os.File, net.Conn, *socketAddress, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs, ours := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		_ = theirs.Close()
		return nil, nil, nil, fmt.Errorf("%s socket: %w", name, err)
	}
	return theirs, conn, nil, nil
}

// socketAddress reaches a listening socket that has no name any more.
type socketAddress struct {
	once sync.Once
	file *os.File // O_PATH
}

func (a *socketAddress) connect(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", "/proc/self/fd/"+strconv.Itoa(int(a.file.Fd())))
}

func (a *socketAddress) Close() error {
	a.once.Do(func() { _ = a.file.Close() })
	return nil
}

// listen makes a listening socket for QEMU that only the holder of the returned address can connect to: its name is
// removed before anybody else can use it.
func listen() (file *os.File, address *socketAddress, err error) {
	dir, err := os.MkdirTemp("", "kcradle-")
	if err != nil {
		return nil, nil, fmt.Errorf("listening socket: %w", err)
	}
	defer os.RemoveAll(dir)
	// By descriptor, because the name of a socket is bounded and that of the directory is not.
	d, err := os.Open(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("listening socket: %w", err)
	}
	defer d.Close()
	path := fmt.Sprintf("/proc/self/fd/%d/s", d.Fd())
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, nil, fmt.Errorf("listening socket: %w", err)
	}
	defer l.Close()
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	file, err = l.File()
	if err != nil {
		_ = unix.Close(fd)
		return nil, nil, fmt.Errorf("listening socket: %w", err)
	}
	return file, &socketAddress{file: os.NewFile(uintptr(fd), path)}, nil
}

// memoryFile is a file without a name. One that is not to be written cannot be changed any more and is opened for reading:
// QEMU takes a descriptor from a set only in the mode it asks for.
func memoryFile(name string, contents []byte, write bool) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, os.NewSyscallError("memfd_create", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(contents); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("memory file %s: %w", name, err)
	}
	if write {
		return f, nil
	}
	defer f.Close()
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		return nil, os.NewSyscallError("seal "+name, err)
	}
	return os.Open("/proc/self/fd/" + strconv.Itoa(int(f.Fd())))
}

// readable opens a file that QEMU opens once more, by /proc/self/fd: when its user may not, a copy in memory.
func readable(path string, user *Credential) (*os.File, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		_ = f.Close()
		return nil, err
	}
	if !info.Mode().IsRegular() {
		_ = f.Close()
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("not a regular file")}
	}
	if user == nil || info.Mode().Perm()&0o004 != 0 {
		return f, nil
	}
	defer f.Close()
	b, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	return memoryFile(filepath.Base(path), b, false)
}

// pump moves the kernel's log to its file. A full disk loses the file's rest, not the machine.
func (m *Machine) pump(w io.Writer, r io.Reader) {
	buf := make([]byte, 4<<10)
	failed := false
	for {
		n, err := r.Read(buf)
		_, _ = m.console.Write(buf[:n])
		if !failed && n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				failed = true
				m.log.Warn("the kernel's log is not written any more", "error", err)
			}
		}
		if err != nil {
			return
		}
	}
}

// watch speaks to QEMU until it is gone. begin is what to say first; it is waited for.
func (m *Machine) watch(seen *ending, begin []command) {
	client := m.qmp // of an adopted machine
	if client == nil {
		var err error
		if client, err = qmp.Dial(context.Background(), m.held.control); err != nil { // ends with QEMU
			close(m.greeted)
			return
		}
	}
	defer client.Close()
	for _, c := range begin {
		if err := client.Execute(context.Background(), c.name, c.arguments, nil); err != nil {
			m.log.Error("QEMU refused to restore the machine", "error", err)
			_ = m.kill()
			break
		}
	}
	seen.greeted = true
	m.qmp = client
	close(m.greeted)
	diskErrors := map[string]int{} // by drive and operation
	for e := range client.Events() {
		switch e.Name {
		case "SHUTDOWN":
			var data struct{ Reason string }
			_ = json.Unmarshal(e.Data, &data)
			seen.shutdown = data.Reason
		case "STOP":
			var status struct{ Status string }
			if err := client.Execute(context.Background(), "query-status", nil, &status); err != nil {
				continue
			}
			// QEMU keeps such a machine for a debugger.
			if status.Status == "internal-error" {
				seen.engine = true
				_ = m.kill()
			}
		case "MIGRATION":
			var data struct{ Status string }
			_ = json.Unmarshal(e.Data, &data)
			select {
			case m.migration <- data.Status:
			default: // nobody asked for this much
			}
		case "BLOCK_IO_ERROR":
			var data struct {
				Device    string `json:"device"`
				Node      string `json:"node-name"`
				Operation string `json:"operation"`
				Reason    string `json:"reason"`
			}
			_ = json.Unmarshal(e.Data, &data)
			key := data.Node + " " + data.Operation
			diskErrors[key]++
			if n := diskErrors[key]; n&(n-1) == 0 { // a guest with much to write meets a full disk very often
				m.log.Error("the host failed to serve the guest's disk", "drive", data.Node, "operation", data.Operation, "error", data.Reason, "times", n)
			}
		}
	}
}

// PID is QEMU's process id.
func (m *Machine) PID() int { return m.pid }

// Ready waits until the guest has said that it may be dialed.
func (m *Machine) Ready(ctx context.Context) error {
	ctx, cancel := m.untilEnd(ctx)
	defer cancel()
	if err := m.channel.Ready(ctx); err != nil {
		return m.explain(err)
	}
	return nil
}

// Dial opens a stream to the guest's listener on port, as soon as the guest is ready. The connection is a channel.Conn.
func (m *Machine) Dial(ctx context.Context, port uint32) (net.Conn, error) {
	ctx, cancel := m.untilEnd(ctx)
	defer cancel()
	c, err := m.channel.Dial(ctx, port)
	if err != nil {
		return nil, m.explain(err)
	}
	return c, nil
}

var errEnded = errors.New("the machine has ended")

// untilEnd is a context that also ends with the machine.
func (m *Machine) untilEnd(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := make(chan struct{})
	go func() {
		select {
		case <-m.done:
			cancel(errEnded)
		case <-stop:
		}
	}()
	return ctx, sync.OnceFunc(func() { close(stop); cancel(nil) })
}

// explain replaces the loss of the channel by its cause: QEMU's end. The channel may learn of it first.
func (m *Machine) explain(err error) error {
	if errors.Is(err, context.Canceled) && !errors.Is(err, errEnded) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	if !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) && !errors.Is(err, errEnded) && !errors.Is(err, syscall.ECONNREFUSED) &&
		!errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) && !errors.Is(err, channel.ErrBroken) && !errors.Is(err, qmp.ErrClosed) {
		return err
	}
	select {
	case <-m.done:
		return fmt.Errorf("%w: %w", errEnded, &ExitError{m.exit})
	case <-time.After(2 * time.Second): // QEMU's socket is closed, so its end is near
		return err
	}
}

// Done is closed when the machine has ended.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Wait waits for the machine's end.
func (m *Machine) Wait() Exit {
	<-m.done
	return m.exit
}

// Kill ends the machine at once; Wait tells when it is gone. What the guest has flushed is on the host's disk.
func (m *Machine) Kill() {
	m.killed.Store(true)
	_ = m.kill()
}

// Console returns the end of the kernel's log.
func (m *Machine) Console() []byte { return m.console.bytes() }

// QMP returns the client of QEMU's control protocol, when QEMU is up.
func (m *Machine) QMP(ctx context.Context) (*qmp.Client, error) {
	select {
	case <-m.greeted:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for QEMU: %w", context.Cause(ctx))
	}
	if m.qmp == nil {
		return nil, fmt.Errorf("control QEMU: %w", errEnded)
	}
	return m.qmp, nil
}

// Status is QEMU's word on the machine: "running", "paused", "internal-error" and others.
func (m *Machine) Status(ctx context.Context) (string, error) {
	c, err := m.QMP(ctx)
	if err != nil {
		return "", err
	}
	var status struct{ Status string }
	err = c.Execute(ctx, "query-status", nil, &status)
	return status.Status, err
}

// Memory is how much of the machine is where, in bytes.
type Memory struct {
	Resident  int64 // of QEMU's process, on the host
	Total     int64 // of the guest; 0: it did not answer
	Free      int64 // unused in the guest
	Available int64 // of what the guest could free
}

const balloonPath = "/machine/peripheral/balloon"

// property names a property of one of QEMU's objects.
type property struct {
	Path     string `json:"path"`
	Property string `json:"property"`
	Value    any    `json:"value,omitempty"`
}

// Memory asks the host, and the guest by its balloon driver.
func (m *Machine) Memory(ctx context.Context) (Memory, error) {
	var mem Memory
	resident, err := residentSize(m.PID())
	if err != nil {
		return mem, err
	}
	mem.Resident = resident
	c, err := m.QMP(ctx)
	if err != nil {
		return mem, err
	}
	type statistics struct {
		LastUpdate int64 `json:"last-update"`
		Stats      struct {
			Total     int64 `json:"stat-total-memory"`
			Free      int64 `json:"stat-free-memory"`
			Available int64 `json:"stat-available-memory"`
		} `json:"stats"`
	}
	// QEMU asks the guest when an interval is set, and has no event for the answer.
	if err := c.Execute(ctx, "qom-set", property{balloonPath, "guest-stats-polling-interval", 1}, nil); err != nil {
		return mem, err
	}
	defer func() {
		_ = c.Execute(context.WithoutCancel(ctx), "qom-set", property{balloonPath, "guest-stats-polling-interval", 0}, nil)
	}()
	begun := time.Now().Unix()
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		var s statistics
		if err := c.Execute(ctx, "qom-get", property{Path: balloonPath, Property: "guest-stats"}, &s); err != nil {
			return mem, err
		}
		if s.LastUpdate >= begun {
			mem.Total, mem.Free, mem.Available = s.Stats.Total, s.Stats.Free, s.Stats.Available
			return mem, nil
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return mem, fmt.Errorf("ask the guest for its memory: %w", context.Cause(ctx))
		}
	}
}

// residentSize reads the second field of /proc/PID/statm.
func residentSize(pid int) (int64, error) {
	b, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "statm"))
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(b)
	if len(fields) < 2 {
		return 0, fmt.Errorf("parse statm of process %d: %q", pid, b)
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("parse statm of process %d: %w", pid, err)
	}
	return pages * int64(os.Getpagesize()), nil
}

// Disconnect ends the channel's session, and with it every connection over the serial port, as a restored machine or
// a lost supervisor would. The next Dial begins another.
func (m *Machine) Disconnect() { m.channel.Disconnect() }
