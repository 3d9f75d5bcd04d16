package container

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"syscall"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/spec"
)

// Table is all that a start does. The first part runs on a thread of its own, the second in the child.
type Table struct {
	flags  uint64 // of clone3
	thread table
	child  table
}

// Text is the table for people and golden files.
func (t *Table) Text() string {
	return "thread:\n" + stepsText(t.thread.steps) +
		fmt.Sprintf("clone%s:\n", cloneText(t.flags)) + stepsText(t.child.steps)
}

func cloneText(flags uint64) string {
	var words []string
	for _, f := range []struct {
		flag uint64
		name string
	}{{unix.CLONE_NEWPID, "pid"}, {unix.CLONE_NEWUTS, "uts"}, {unix.CLONE_NEWIPC, "ipc"}} {
		if flags&f.flag != 0 {
			words = append(words, f.name)
		}
	}
	if words == nil {
		return ""
	}
	return " with new " + strings.Join(words, ", ")
}

// newTable makes the table of a container's first process.
func newTable(c *Config) (*Table, error) {
	t := &Table{flags: unix.CLONE_NEWPID | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC}
	t.thread.regs = regSources
	t.thread.steps, t.child.steps = make([]Step, 0, 48), make([]Step, 0, 80) // room for what most need
	t.thread.root(c)
	t.child.namespaces(c)
	args := c.Process.Args
	if c.InitFile != "" {
		args = append([]string{InitTarget, "--"}, args...)
	}
	t.child.process(&c.Process, args)
	return t, t.err()
}

// newExecTable makes the table of a further process in the container whose first process pidfd names.
func newExecTable(p *Process, pid, pidfd int) (*Table, error) {
	t := &Table{}
	t.thread.regs = regSources
	t.thread.add("unshare working directory and root", unix.SYS_UNSHARE, unix.CLONE_FS)
	// Should the number stand for another process by now, then the descriptor's has ended and cannot be entered.
	t.thread.add("open the container's root", unix.SYS_OPENAT, atFD(unix.AT_FDCWD), fmt.Sprintf("/proc/%d/root", pid),
		unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0).to(regTmp)
	t.thread.add("enter the container's namespaces", unix.SYS_SETNS, pidfd,
		unix.CLONE_NEWNS|unix.CLONE_NEWUTS|unix.CLONE_NEWIPC|unix.CLONE_NEWPID)
	// The root of a mount namespace need not be the container's: where init itself runs in a chroot, it is not.
	t.thread.add("chdir to the container's root", unix.SYS_FCHDIR, reg(regTmp))
	t.thread.add("chroot .", unix.SYS_CHROOT, ".")
	t.thread.add("close fd", unix.SYS_CLOSE, reg(regTmp))
	if p.TTY {
		t.thread.terminal("/dev/ptmx", p)
	}
	// Last, by the child: with nsdelegate the kernel lets a thread that is in a cgroup namespace clone only below the
	// cgroup it is in itself.
	t.child.add("enter the container's cgroup namespace", unix.SYS_SETNS, pidfd, unix.CLONE_NEWCGROUP)
	t.child.process(p, p.Args)
	return t, t.err()
}

func (t *Table) err() error {
	if t.thread.err != nil {
		return t.thread.err
	}
	return t.child.err
}

// root makes the container's root file system the root of this thread and mounts what does not depend on the
// namespaces of the child.
func (t *table) root(c *Config) {
	t.add("unshare mounts", unix.SYS_UNSHARE, unix.CLONE_NEWNS|unix.CLONE_FS)
	t.add("umask 0", unix.SYS_UMASK, 0)
	// What comes from outside is held as detached mounts before the outside is out of reach.
	for _, m := range c.Mounts {
		if m.Source != "" {
			t.source(m.Source)
		}
	}
	if c.InitFile != "" {
		t.source(c.InitFile)
	}
	t.addf(func() string { return "chdir " + c.Rootfs }, unix.SYS_CHDIR, c.Rootfs)
	t.add("pivot_root . .", unix.SYS_PIVOT_ROOT, ".", ".")
	t.add("umount the old root", unix.SYS_UMOUNT2, ".", unix.MNT_DETACH)
	t.add("chdir /", unix.SYS_CHDIR, "/")

	t.mkdir("/proc", 0o755)
	t.mkdir("/sys", 0o755)
	t.mkdir("/dev", 0o755)
	t.mount("tmpfs", "/dev", "tmpfs", unix.MS_NOSUID|unix.MS_STRICTATIME, "mode=755,size=65536k")
	for _, d := range defaultDevices {
		t.node(d.path, unix.S_IFCHR|0o666, d.major, d.minor, 0, 0)
	}
	for _, l := range defaultLinks {
		t.symlink(l.target, l.path)
	}
	t.mkdir("/dev/pts", 0o755)
	t.mount("devpts", "/dev/pts", "devpts", unix.MS_NOSUID|unix.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5")
	if c.Process.TTY {
		t.terminal("/dev/pts/ptmx", &c.Process)
		t.mkfile("/dev/console")
		t.bind("/dev/pts/0", "/dev/console") // the first of a new instance
	}
	shm := c.ShmSize
	if shm == 0 {
		shm = DefaultShmSize
	}
	t.mkdir("/dev/shm", 0o755)
	if !c.NoShm {
		t.mount("shm", "/dev/shm", "tmpfs", defaultFlags, fmt.Sprintf("mode=1777,size=%dk", (shm+1023)/1024))
	}
	t.mkdir("/dev/mqueue", 0o755)
	for _, d := range c.Devices {
		t.device(d)
	}

	// What docker leaves in every container: the mark that it is one, and where the mounts are listed.
	t.mkfile("/.dockerenv")
	t.mkdir("/etc", 0o755)
	t.symlink("/proc/mounts", "/etc/mtab")
	source := regSources
	for _, m := range c.Mounts {
		if m.File {
			t.mkfile(m.Target)
		} else {
			t.mkdirAll(m.Target, 0o755)
		}
		if m.Source == "" {
			t.mount("tmpfs", m.Target, "tmpfs", m.Flags, m.Data)
			continue
		}
		t.attach(reg(source), m.Target, m.ReadOnly)
		source++
	}
	if c.InitFile != "" {
		t.mkfile(InitTarget)
		t.attach(reg(source), InitTarget, true)
	}
	if c.Process.Cwd != "/" {
		t.mkdirAll(c.Process.Cwd, 0o755)
	}
	if c.ReadOnly {
		t.remountBind("/", unix.MS_RDONLY)
	}
}

// source opens a copy of a mount, attached nowhere.
func (t *table) source(path string) {
	t.addf(func() string { return "open_tree " + path + " (clone)" }, unix.SYS_OPEN_TREE, atFD(unix.AT_FDCWD), path,
		unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE).to(reg(t.regs))
	t.regs++
}

func (t *table) attach(source reg, target string, readOnly bool) {
	t.addf(func() string { return fmt.Sprintf("move_mount %v to %s", source, target) }, unix.SYS_MOVE_MOUNT, source, "",
		atFD(unix.AT_FDCWD), target, unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_SYMLINKS)
	if readOnly {
		t.remountBind(target, unix.MS_RDONLY)
	}
}

func (t *table) node(path string, mode, major, minor, uid, gid uint32) {
	kind := "c"
	switch mode & unix.S_IFMT {
	case unix.S_IFBLK:
		kind = "b"
	case unix.S_IFIFO:
		kind = "p"
	}
	t.addf(func() string { return fmt.Sprintf("mknod %s %s %d %d %#o", path, kind, major, minor, mode&0o7777) },
		unix.SYS_MKNODAT, atFD(unix.AT_FDCWD), path, mode, uint64(unix.Mkdev(major, minor))).may(syscall.EEXIST)
	if uid != 0 || gid != 0 {
		t.addf(func() string { return fmt.Sprintf("chown %s %d %d", path, uid, gid) }, unix.SYS_FCHOWNAT, atFD(unix.AT_FDCWD), path, uid, gid, unix.AT_SYMLINK_NOFOLLOW)
	}
}

func (t *table) device(d specs.LinuxDevice) {
	mode := uint32(unix.S_IFCHR)
	switch d.Type {
	case "b":
		mode = unix.S_IFBLK
	case "p":
		mode = unix.S_IFIFO
	}
	perm := uint32(0o666)
	if d.FileMode != nil {
		perm = uint32(d.FileMode.Perm())
	}
	var uid, gid uint32
	if d.UID != nil {
		uid = *d.UID
	}
	if d.GID != nil {
		gid = *d.GID
	}
	if i := strings.LastIndexByte(d.Path, '/'); i > 0 && d.Path[:i] != "/dev" {
		t.mkdirAll(d.Path[:i], 0o755)
	}
	t.node(d.Path, mode|perm, uint32(d.Major), uint32(d.Minor), uid, gid)
}

// terminal opens a new terminal of the container's own devpts: the master for us, the other end as standard streams.
func (t *table) terminal(ptmx string, p *Process) {
	t.addf(func() string { return "open " + ptmx }, unix.SYS_OPENAT, atFD(unix.AT_FDCWD), ptmx,
		unix.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0).to(regMaster)
	t.add("unlock the terminal", unix.SYS_IOCTL, reg(regMaster), unix.TIOCSPTLCK, make([]byte, 4))
	t.add("open the terminal's other end", unix.SYS_IOCTL, reg(regMaster), unix.TIOCGPTPEER,
		unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC).to(regStdin)
	t.add("chown the terminal", unix.SYS_FCHOWN, reg(regStdin), p.User.UID, ^uint32(0))
	if p.Size != [2]uint16{} {
		size := make([]byte, 8) // struct winsize
		binary.NativeEndian.PutUint16(size[0:], p.Size[0])
		binary.NativeEndian.PutUint16(size[2:], p.Size[1])
		t.addf(func() string {
			return fmt.Sprintf("set the terminal's size to %d rows, %d columns", p.Size[0], p.Size[1])
		},
			unix.SYS_IOCTL, reg(regMaster), unix.TIOCSWINSZ, size)
	}
}

// namespaces is what only a process inside the new namespaces can do.
func (t *table) namespaces(c *Config) {
	// The root of a cgroup namespace is the cgroup its maker is in: the child is in its own, our thread is not.
	t.add("unshare cgroups", unix.SYS_UNSHARE, unix.CLONE_NEWCGROUP)
	t.addf(func() string { return "set host name " + c.Hostname }, unix.SYS_SETHOSTNAME, c.Hostname, len(c.Hostname))
	if c.Domain != "" {
		t.addf(func() string { return "set domain name " + c.Domain }, unix.SYS_SETDOMAINNAME, c.Domain, len(c.Domain))
	}
	ro := uintptr(unix.MS_RDONLY)
	if c.Privileged {
		ro = 0
	}
	t.mount("proc", "/proc", "proc", defaultFlags, "")
	t.mount("sysfs", "/sys", "sysfs", defaultFlags|ro, "")
	cgroups := ro
	if c.WritableCgroups {
		cgroups = 0
	}
	t.mount("cgroup", "/sys/fs/cgroup", "cgroup2", defaultFlags|cgroups, "")
	t.mount("mqueue", "/dev/mqueue", "mqueue", defaultFlags, "")
	for _, s := range c.Sysctls {
		t.write("/proc/sys/"+strings.ReplaceAll(s.Name, ".", "/"), s.Value)
	}
	if c.Process.OOMScoreAdj != 0 {
		t.write("/proc/self/oom_score_adj", fmt.Sprint(c.Process.OOMScoreAdj))
	}
	if c.Privileged {
		return
	}
	readonly := spec.DefaultReadonlyPaths()
	if c.ReadonlyPaths != nil {
		readonly = *c.ReadonlyPaths
	}
	for _, p := range readonly {
		t.bind(p, p).may(syscall.ENOENT)
		t.remountBind(p, defaultFlags|unix.MS_RDONLY).may(syscall.ENOENT, syscall.EINVAL)
	}
	if c.MaskedPaths != nil { // of which of them are directories the kernel knows
		for _, p := range *c.MaskedPaths {
			t.mount("/dev/null", p, "", unix.MS_BIND, "").may(syscall.ENOENT, syscall.ENOTDIR)
			t.mount("tmpfs", p, "tmpfs", unix.MS_RDONLY, "nr_blocks=1,nr_inodes=1").may(syscall.ENOENT, syscall.ENOTDIR)
		}
		return
	}
	for _, p := range maskedFiles {
		t.mount("/dev/null", p, "", unix.MS_BIND, "").may(syscall.ENOENT)
	}
	for _, p := range maskedDirs {
		t.mount("tmpfs", p, "tmpfs", unix.MS_RDONLY, "nr_blocks=1,nr_inodes=1").may(syscall.ENOENT)
	}
}

// process is what a first and a further process have in common.
func (t *table) process(p *Process, args []string) {
	t.add("new session", unix.SYS_SETSID)
	if p.TTY {
		t.add("make the terminal the controlling one", unix.SYS_IOCTL, reg(regStdin), unix.TIOCSCTTY, 0)
		for fd := range 3 {
			t.dup(regStdin, fd)
		}
	} else {
		for fd := range 3 {
			t.dup(reg(fd), fd)
		}
	}
	t.add("close every other descriptor at exec", unix.SYS_CLOSE_RANGE, 3, ^uint32(0), unix.CLOSE_RANGE_CLOEXEC)
	for _, l := range defaultRlimits {
		if !slices.ContainsFunc(p.Rlimits, func(o specs.POSIXRlimit) bool { return o.Type == l.Type }) {
			t.rlimit(l).may(syscall.EPERM) // outside of a machine of our own
		}
	}
	for _, l := range p.Rlimits {
		t.rlimit(l)
	}
	var dropped []string
	for c := range capabilities {
		if p.Bounding&(1<<c) == 0 {
			dropped = append(dropped, capabilities[c])
			t.addf(func() string { return "prctl drop " + capabilities[c] + " for good" }, unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, c, 0, 0, 0).
				may(syscall.EINVAL) // a kernel that does not know it
		}
	}
	groups := make([]byte, 0, 4*len(p.User.Groups))
	for _, g := range p.User.Groups {
		groups = binary.NativeEndian.AppendUint32(groups, g)
	}
	t.addf(func() string { return fmt.Sprintf("set groups %v", p.User.Groups) }, unix.SYS_SETGROUPS, len(p.User.Groups), groups)
	t.addf(func() string { return fmt.Sprintf("set group %d", p.User.GID) }, unix.SYS_SETRESGID, p.User.GID, p.User.GID, p.User.GID)
	t.addf(func() string { return fmt.Sprintf("set user %d", p.User.UID) }, unix.SYS_SETRESUID, p.User.UID, p.User.UID, p.User.UID)
	if p.User.UID == 0 && dropped != nil {
		t.capset(p.Bounding)
	}
	t.add("umask 022", unix.SYS_UMASK, 0o022)
	if p.NoNewPrivs {
		t.add("prctl no new privileges", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	s := t.addf(func() string { return "chdir " + p.Cwd }, unix.SYS_CHDIR, p.Cwd)
	s.kind, s.path = kindChdir, p.Cwd
	t.exec(args, p.Env)
}

func (t *table) rlimit(l specs.POSIXRlimit) *Step {
	b := make([]byte, 16) // struct rlimit64
	binary.NativeEndian.PutUint64(b[0:], l.Soft)
	binary.NativeEndian.PutUint64(b[8:], l.Hard)
	return t.addf(func() string { return fmt.Sprintf("set limit %s %s %s", l.Type, limit(l.Soft), limit(l.Hard)) },
		unix.SYS_PRLIMIT64, 0, rlimitNumbers[l.Type], b, nil)
}

// capset sets the permitted and effective capabilities and clears the inheritable ones.
func (t *table) capset(set uint64) {
	head := make([]byte, 8) // struct __user_cap_header_struct
	binary.NativeEndian.PutUint32(head, unix.LINUX_CAPABILITY_VERSION_3)
	data := make([]byte, 24) // two struct __user_cap_data_struct: effective, permitted, inheritable
	for i := range 2 {
		half := uint32(set >> (32 * i))
		binary.NativeEndian.PutUint32(data[12*i:], half)
		binary.NativeEndian.PutUint32(data[12*i+4:], half)
	}
	text := func() string {
		names := []string{"set capabilities"}
		for c, name := range capabilities {
			if set&(1<<c) != 0 {
				names = append(names, name)
			}
		}
		return strings.Join(names, " ")
	}
	t.addf(text, unix.SYS_CAPSET, head, data)
}

func (t *table) dup(from reg, to int) {
	t.addf(func() string { return fmt.Sprintf("dup %v to %d", from, to) }, unix.SYS_DUP3, from, to, 0)
}

// exec tries the program, along PATH when its name has no slash.
func (t *table) exec(args, env []string) {
	argv, envv := t.vector(args), t.vector(env)
	name := args[0]
	try := func(path string) *Step {
		s := t.addf(func() string { return "exec " + path }, unix.SYS_EXECVE, path, argv, envv)
		s.kind, s.path = kindExec, path
		return s
	}
	if strings.Contains(name, "/") {
		try(name)
		return
	}
	if name == "" {
		return // not found in $PATH
	}
	for _, dir := range strings.Split(searchPath(env), ":") {
		if dir == "" {
			dir = "."
		}
		try(dir+"/"+name).may(syscall.ENOENT, syscall.ENOTDIR, syscall.EACCES)
	}
}

// leaveOut removes the candidates along PATH that are not there, seen from this thread, whose root is the container's: to look is a
// fifth of the work of trying.
func (t *table) leaveOut() {
	t.steps = slices.DeleteFunc(t.steps, func(s Step) bool {
		if s.kind != kindExec || !slices.Contains(s.ignore[:], syscall.ENOENT) || !strings.HasPrefix(s.path, "/") {
			return false
		}
		for _, dir := range []string{"/proc/", "/sys/", "/dev/"} { // the child mounts these, or in these
			if strings.HasPrefix(s.path, dir) {
				return false
			}
		}
		var st unix.Stat_t
		err := unix.Fstatat(unix.AT_FDCWD, s.path, &st, unix.AT_SYMLINK_NOFOLLOW)
		return err == unix.ENOENT || err == unix.ENOTDIR
	})
}

func searchPath(env []string) string {
	for _, e := range env {
		if p, ok := strings.CutPrefix(e, "PATH="); ok {
			return p
		}
	}
	return DefaultPath
}
