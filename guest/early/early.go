// Package early makes a machine that has just booted usable: file systems, kernel settings, clock and random state.
//
//	err := early.Mount()
//	err = early.Settings()
package early

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// row is one mount of the table. To add one, add a row; rows run in order.
type row struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

const quiet = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// newRoot is where the root is built before it becomes the root.
const newRoot = "/root"

// mounts is what the machine needs. A tmpfs becomes the root because a container's pivot_root works only where the root
// is mounted on something, and the kernel's initial file system is not.
var mounts = []row{
	{"tmpfs", newRoot, "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	{"devtmpfs", newRoot + "/dev", "devtmpfs", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=755"},
	{"proc", newRoot + "/proc", "proc", quiet, ""},
	{"sysfs", newRoot + "/sys", "sysfs", quiet, ""},
	// nsdelegate: a container may divide its own resources and cannot widen them.
	// memory_recursiveprot: a reservation also protects what is below it.
	{"cgroup2", newRoot + "/sys/fs/cgroup", "cgroup2", quiet, "nsdelegate,memory_recursiveprot"},
	{"tmpfs", newRoot + "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	{"tmpfs", newRoot + "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
}

// Mount mounts the table and makes it the root.
func Mount() error {
	unix.Umask(0)
	for _, m := range mounts {
		if err := os.Mkdir(m.target, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
		if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.fstype, m.target, err)
		}
	}
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move %s to /: %w", newRoot, err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change root to %s: %w", newRoot, err)
	}
	if err := os.Chdir("/"); err != nil {
		return err
	}
	unix.Umask(0o022)
	return nil
}

// monitorSlack is by how much the kernel may delay what the monitor of Go's runtime sleeps for.
const monitorSlack = 10 * time.Millisecond

// CalmMonitor lets the thread that Go's runtime watches the others with wake up seldom. While a program has anything to do it sleeps
// for 20 microseconds at a time, and in an emulated machine each of those costs five times that.
func CalmMonitor() error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	monitor := math.MaxInt // the first that was started, so the one with the lowest number but ours
	for _, t := range threads {
		if id, err := strconv.Atoi(t.Name()); err == nil && id != os.Getpid() {
			monitor = min(monitor, id)
		}
	}
	return os.WriteFile(fmt.Sprintf("/proc/%d/timerslack_ns", monitor), strconv.AppendInt(nil, int64(monitorSlack), 10), 0)
}

// Controllers hands every resource controller down to the containers' cgroups.
func Controllers(root string) error {
	b, err := os.ReadFile(root + "/cgroup.controllers")
	if err != nil {
		return err
	}
	var all []string
	for _, c := range strings.Fields(string(b)) {
		all = append(all, "+"+c)
	}
	if all == nil {
		return nil
	}
	if err := os.WriteFile(root+"/cgroup.subtree_control", []byte(strings.Join(all, " ")), 0); err != nil {
		return fmt.Errorf("delegate cgroup controllers %s: %w", strings.Join(all, " "), err)
	}
	return nil
}

// setting is a kernel parameter. To add one, add a row with its reason; optional ones may be missing from a kernel.
type setting struct {
	file, value, reason string
}

var settings = []setting{
	{"net/ipv4/ip_unprivileged_port_start", "0", "docker lets every user of a container listen on port 80"},
	{"net/ipv4/ping_group_range", "0 2147483647", "docker lets every user of a container ping"},
	{"net/ipv4/ip_forward", "1", "a docker host forwards: dockerd and k3s in a pod expect it"},
	{"vm/max_map_count", "262144", "databases and search engines refuse to start with the kernel's 65530; distributions raise it, too"},
	{"vm/overcommit_memory", "1", "a program that reserves more than a small machine has runs under docker on a large host, and must here"},
	{"fs/inotify/max_user_instances", "8192", "one user runs everything in a pod; the kernel's 128 are for a desktop"},
	{"fs/inotify/max_user_watches", "524288", "the same"},
	{"kernel/pid_max", "4194304", "pids.max of a container is the limit, not the machine"},
	{"kernel/panic_on_oops", "1", "a kernel that oopsed must not go on writing to disks"},
}

// Settings sets the kernel's parameters. A kernel without one is left as it is.
func Settings() error {
	for _, s := range settings {
		err := os.WriteFile("/proc/sys/"+s.file, []byte(s.value), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("set %s to %s: %w", s.file, s.value, err)
		}
	}
	return nil
}

// SetClock sets the wall clock.
func SetClock(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := clockSettime(&ts); err != nil {
		return fmt.Errorf("set the clock to %s: %w", t.Format(time.RFC3339Nano), err)
	}
	return nil
}

// SlewClock has the wall clock run faster, or slower if d is negative, until it has gained d: half a millisecond a second.
func SlewClock(d time.Duration) error {
	_, err := unix.Adjtimex(&unix.Timex{Modes: adjtime, Offset: d.Microseconds()})
	return os.NewSyscallError("adjtimex", err)
}

// adjtime is ADJ_OFFSET_SINGLESHOT of adjtimex(2): as adjtime(3) does it.
const adjtime = 0x8001

// Seed mixes bytes into the kernel's random pool and counts them as random.
func Seed(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	fd, err := unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &fs.PathError{Op: "open", Path: "/dev/urandom", Err: err}
	}
	defer unix.Close(fd)
	if err := addEntropy(fd, b); err != nil {
		return fmt.Errorf("seed the kernel's random pool: %w", err)
	}
	return nil
}

// PowerOff ends the machine. It does not return when it succeeds. The command line says reboot=t and QEMU runs with
// -no-reboot: a restart is the one way out that needs no device.
func PowerOff() error { return syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART) }

// SinceBoot is the time since the kernel started.
func SinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}
