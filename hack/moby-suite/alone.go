package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// A run in namespaces of its own has three processes of this program: the one that was called; the first of the new
// process namespace, which reaps what is left by daemons; and the one that works. The last two are told apart from the
// first by their first argument, which is followed by the run's directory.
const (
	stageInit = "alone-init"
	stageRun  = "alone-run"
)

// runDocker is where the daemons that tests start look for a containerd. It is empty and in memory in a run of its own.
const runDocker = "/run/docker"

// aloneGrace is how long a run may take to end its server after a signal.
const aloneGrace = 90 * time.Second

// stageOf takes stage and directory off the arguments of a process that this program started.
func stageOf(args []string) (rest []string, stage, dir string) {
	if len(args) >= 2 && (args[0] == stageInit || args[0] == stageRun) {
		return args[2:], args[0], args[1]
	}
	return args, "", ""
}

// runAlone runs this program again with args in new network, mount and process namespaces and returns its exit code.
// When ctx is done it is told to end; whatever of it is left after aloneGrace is killed, and so it is when this process
// dies.
func runAlone(ctx context.Context, dir string, args []string) (code int, err error) {
	if !exists(runDocker) {
		if err := os.MkdirAll(runDocker, 0o755); err != nil {
			return 2, err
		}
		defer os.Remove(runDocker) // fails when somebody uses it by now
	}
	self, err := os.Executable()
	if err != nil {
		return 2, err
	}
	// The kernel sends the signal of Pdeathsig when the thread ends that started the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd := exec.Command(self, append([]string{stageInit, dir}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWPID | unix.CLONE_NEWNET,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true, // Ctrl-C reaches this process, which passes it on
	}
	if err := cmd.Start(); err != nil {
		return 2, fmt.Errorf("start in namespaces of its own: %w", err)
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	select {
	case err = <-done:
	case <-ctx.Done():
		err = endAlone(cmd, done)
	}
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), nil // it has said why
	}
	if err != nil {
		return 2, fmt.Errorf("run in namespaces of its own: %w", err)
	}
	return 0, nil
}

// endAlone ends the first process of the namespace. A signal that comes before it listens may be lost,
// as everywhere in a process namespace, so it is sent again.
func endAlone(cmd *exec.Cmd, done <-chan error) error {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	deadline := time.NewTimer(aloneGrace)
	defer deadline.Stop()
	for {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case err := <-done:
			return err
		case <-tick.C:
		case <-deadline.C:
			_ = cmd.Process.Kill() // and with it everything in the namespace
			return <-done
		}
	}
}

// beInit is the first process of a namespace: it sets the namespaces up, starts the one that works, passes the first
// signal on, and waits for every process there until that one has ended. It returns that one's exit code.
func beInit(dir string, args []string) int {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	if err := setUpAlone(); err != nil {
		fmt.Fprintln(os.Stderr, "moby-suite: set up namespaces:", err)
		return 2
	}
	self, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "moby-suite:", err)
		return 2
	}
	p, err := os.StartProcess(self, append([]string{self, stageRun, dir}, args...), &os.ProcAttr{
		Files: []*os.File{nil, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Setpgid: true},
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, "moby-suite:", err)
		return 2
	}
	go func() {
		<-signals
		_ = syscall.Kill(p.Pid, syscall.SIGTERM)
	}()
	for {
		var ws syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
		case err != nil:
			fmt.Fprintln(os.Stderr, "moby-suite: wait4:", err)
			return 2
		case pid != p.Pid:
		case ws.Signaled():
			return 128 + int(ws.Signal())
		default:
			return ws.ExitStatus()
		}
	}
}

func setUpAlone() error {
	// What is mounted here stays here; what the machine unmounts goes here, too.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("keep mounts to itself: %w", err)
	}
	// Shared, with nobody outside: so a volume can pass mounts on, as on a machine that systemd has started.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("make mounts shared: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc: %w", err)
	}
	if err := unix.Mount("tmpfs", runDocker, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount %s: %w", runDocker, err)
	}
	return setUpNetwork()
}

// setUpNetwork sets the loopback up, and an eth0 with an address, which tests take for the machine's. It leads nowhere:
// there is no default route, so that a name that is looked up outside is refused at once.
func setUpNetwork() error {
	eth0 := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0peer"}
	if err := netlink.LinkAdd(eth0); err != nil {
		return fmt.Errorf("make eth0: %w", err)
	}
	for _, name := range []string{"lo", "eth0", "eth0peer"} {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return fmt.Errorf("find %s: %w", name, err)
		}
		if name == "eth0" {
			addr := &netlink.Addr{IPNet: &net.IPNet{IP: net.IPv4(198, 51, 100, 2), Mask: net.CIDRMask(24, 32)}} // of TEST-NET-2
			if err := netlink.AddrAdd(link, addr); err != nil {
				return fmt.Errorf("give %s an address: %w", name, err)
			}
		}
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set %s up: %w", name, err)
		}
	}
	return nil
}
