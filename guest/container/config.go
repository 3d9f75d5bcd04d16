package container

import (
	"fmt"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Config is what a container's first process starts in.
type Config struct {
	Rootfs   string // required; a mount point in our mount namespace
	ReadOnly bool   // of the root file system
	Hostname string // required
	Domain   string

	Mounts  []Mount // in this order, after the default ones
	ShmSize int64   // bytes; zero: 64 MiB
	NoShm   bool    // nothing is mounted at /dev/shm
	// WritableCgroups mounts the container's cgroups so that it can make some below its own.
	WritableCgroups bool
	// MaskedPaths and ReadonlyPaths are in place of docker's; nil: docker's.
	MaskedPaths, ReadonlyPaths *[]string

	Privileged bool
	Devices    []specs.LinuxDevice // beside the default ones
	Sysctls    []Sysctl
	InitFile   string // our own binary, when it is to be the container's first process; empty: the process itself

	Process Process // required
}

// Mount puts a directory, a file or a tmpfs into a container.
type Mount struct {
	Source   string // path in our mount namespace; empty: a tmpfs
	Target   string // required; clean absolute path in the container
	File     bool   // the source is a file
	ReadOnly bool
	Flags    uintptr // of a tmpfs, MS_*
	Data     string  // of a tmpfs
}

// Sysctl is one kernel parameter of the container's namespaces.
type Sysctl struct{ Name, Value string }

// Process is a process in a container.
type Process struct {
	Args        []string // required
	Env         []string // complete
	Cwd         string   // required; absolute
	User        User
	Bounding    uint64 // capabilities, a bit each; see Capabilities
	NoNewPrivs  bool
	Rlimits     []specs.POSIXRlimit // beside the default ones; see Rlimits
	OOMScoreAdj int

	TTY    bool
	Size   [2]uint16 // rows and columns of the terminal; zero: unknown
	Stdin  bool      // a pipe; else /dev/null
	Stdout bool      // a pipe; else /dev/null. A first process always has both.
	Stderr bool
}

// User is who a process runs as.
type User struct {
	UID, GID uint32
	Groups   []uint32 // supplementary
	Home     string
}

// InitTarget is where the reaper of Config.InitFile stands in a container, as docker has it.
const InitTarget = "/sbin/docker-init"

// DefaultPath is PATH where neither image nor user set one.
const DefaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// DefaultShmSize is the size of /dev/shm where none is asked for.
const DefaultShmSize = 64 << 20

const defaultFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC

// device is a node that docker makes in every container.
type device struct {
	path         string
	major, minor uint32
}

var defaultDevices = []device{
	{"/dev/null", 1, 3},
	{"/dev/zero", 1, 5},
	{"/dev/full", 1, 7},
	{"/dev/random", 1, 8},
	{"/dev/urandom", 1, 9},
	{"/dev/tty", 5, 0},
}

var defaultLinks = []struct{ path, target string }{
	{"/dev/fd", "/proc/self/fd"},
	{"/dev/stdin", "/proc/self/fd/0"},
	{"/dev/stdout", "/proc/self/fd/1"},
	{"/dev/stderr", "/proc/self/fd/2"},
	{"/dev/core", "/proc/kcore"},
	{"/dev/ptmx", "pts/ptmx"},
}

// maskedFiles and maskedDirs are spec.DefaultMaskedPaths. The kernel decides which of them are directories.
var (
	maskedFiles = []string{"/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug"}
	maskedDirs  = []string{"/proc/asound", "/proc/acpi", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap"}
)

// capabilities in the kernel's numbering (linux/capability.h).
var capabilities = []string{
	"CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP",
	"LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER",
	"SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE",
	"SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP",
	"MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF",
	"CHECKPOINT_RESTORE",
}

var defaultCapabilities = []string{
	"CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP",
	"NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE",
}

// AllCapabilities is the set of a privileged container.
const AllCapabilities = uint64(1)<<41 - 1

// Capabilities is docker's default set with add and drop applied by docker's rules: ALL stands for every one, a name
// has the prefix CAP_ or not, in any case.
func Capabilities(privileged bool, add, drop []string) (uint64, error) {
	if privileged {
		return AllCapabilities, nil
	}
	var set uint64
	for _, name := range defaultCapabilities {
		set |= capability(name)
	}
	var added, dropped uint64
	for _, l := range []struct {
		names []string
		to    *uint64
		all   func()
	}{
		{drop, &dropped, func() { set = 0 }},
		{add, &added, func() { set = AllCapabilities }},
	} {
		for _, name := range l.names {
			n := strings.TrimPrefix(strings.ToUpper(name), "CAP_")
			if n == "ALL" {
				l.all()
				continue
			}
			c := capability(n)
			if c == 0 {
				return 0, fmt.Errorf("invalid capability: %q", name)
			}
			*l.to |= c
		}
	}
	return set&^dropped | added, nil
}

func capability(name string) uint64 {
	for i, c := range capabilities {
		if c == name {
			return 1 << i
		}
	}
	return 0
}

var rlimitNumbers = map[string]int{
	"cpu": 0, "fsize": 1, "data": 2, "stack": 3, "core": 4, "rss": 5, "nproc": 6, "nofile": 7, "memlock": 8,
	"as": 9, "locks": 10, "sigpending": 11, "msgqueue": 12, "nice": 13, "rtprio": 14, "rttime": 15,
}

// infinity is an absent limit.
const infinity = ^uint64(0)

// defaultRlimits are those of a docker daemon under systemd. They are stated because init's own differ: the Go runtime
// raises nofile.
var defaultRlimits = []specs.POSIXRlimit{
	{Type: "core", Soft: infinity, Hard: infinity},
	{Type: "nofile", Soft: 1048576, Hard: 1048576},
	{Type: "nproc", Soft: infinity, Hard: infinity},
}

// Rlimits checks limits as a user asked for them and spells their names alike.
func Rlimits(ask []specs.POSIXRlimit) ([]specs.POSIXRlimit, error) {
	var out []specs.POSIXRlimit
	for _, l := range ask {
		l.Type = strings.ToLower(strings.TrimPrefix(l.Type, "RLIMIT_"))
		if _, ok := rlimitNumbers[l.Type]; !ok {
			return nil, fmt.Errorf("invalid ulimit type: %s", l.Type)
		}
		if l.Soft > l.Hard {
			return nil, fmt.Errorf("ulimit soft limit must be less than or equal to hard limit: %d > %d", l.Soft, l.Hard)
		}
		out = append(out, l)
	}
	return out, nil
}

func limit(n uint64) string {
	if n == ^uint64(0) {
		return "unlimited"
	}
	return strconv.FormatUint(n, 10)
}

// NamespacedSysctl says whether a kernel parameter belongs to a container's own namespaces or, for net, to the pod's.
func NamespacedSysctl(name string) bool {
	switch name {
	case "kernel.msgmax", "kernel.msgmnb", "kernel.msgmni", "kernel.sem", "kernel.shmall", "kernel.shmmax",
		"kernel.shmmni", "kernel.shm_rmid_forced", "kernel.domainname":
		return true
	}
	return strings.HasPrefix(name, "fs.mqueue.") || strings.HasPrefix(name, "net.")
}
