// Command guest is the /init of the kernel's test: it tries what the kernel promises, one check after the other, and
// prints a line for each on the console. The disk vda holds an EROFS image with tools and the files the checks read.
package main

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/anatol/devmapper.go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

type check struct {
	name string
	run  func() error
}

var checks = []check{
	{"filesystems", filesystems},
	{"erofs disk", erofsDisk},
	{"config.gz", configGz},
	{"cgroup controllers", cgroupControllers},
	{"cgroup freeze and kill", cgroupKill},
	{"namespaces", namespaces},
	{"seccomp", seccomp},
	{"overlay by fsconfig, 130 lower layers", overlayManyLowers},
	{"overlay xattrs and file capabilities", fileCapabilities},
	{"device-mapper targets", dmTargets},
	{"device-mapper linear", dmLinear},
	{"device-mapper verity", dmVerity},
	{"device-mapper crypt", dmCrypt},
	{"loop", loopDevice},
	{"links", links},
	{"nft", tool("/usr/sbin/nft", "-f", "/etc/test.nft")},
	{"nft list", tool("/usr/sbin/nft", "list", "ruleset")},
	{"iptables-nft", iptables("iptables-nft-restore", "/etc/test.v4")},
	{"ip6tables-nft", iptables("ip6tables-nft-restore", "/etc/test.v6")},
	{"iptables-legacy", iptables("iptables-legacy-restore", "/etc/test.legacy4")},
	{"ip6tables-legacy", iptables("ip6tables-legacy-restore", "/etc/test.legacy6")},
	{"ipvs", exists("/proc/net/ip_vs")},
	{"bridge netfilter", exists("/proc/sys/net/bridge/bridge-nf-call-iptables")},
	{"binfmt_misc", binfmtMisc},
	{"io_uring", ioUring},
	{"mqueue", mountFS("mqueue")},
	{"devpts", mountFS("devpts")},
	{"hugetlbfs", mountFS("hugetlbfs")},
	{"tun", exists("/dev/net/tun")},
	{"fuse", exists("/dev/fuse")},
	{"loop-control", exists("/dev/loop-control")},
	{"hw random", hwRandom},
	{"vsock", vsock},
	{"packet socket", packetSocket},
	{"32-bit system calls", compat32},
	{"all processors", processors},
	{"clock", clock},
	{"no uart, pci, acpi", absent},
}

func main() {
	fmt.Println("guest: started")
	mounts := []struct{ fs, dir string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}, {"tmpfs", "/tmp"}}
	for _, m := range mounts {
		must(os.MkdirAll(m.dir, 0o755))
		must(unix.Mount(m.fs, m.dir, m.fs, 0, ""))
	}
	if b, err := os.ReadFile("/proc/cmdline"); err == nil && strings.Contains(string(b), "test.panic") {
		must(os.WriteFile("/proc/sysrq-trigger", []byte("c"), 0))
	}
	for _, c := range checks {
		if err := c.run(); err != nil {
			fmt.Printf("guest: FAIL %s: %s\n", c.name, strings.ReplaceAll(err.Error(), "\n", " | "))
		} else {
			fmt.Printf("guest: ok %s\n", c.name)
		}
	}
	warnings()
	fmt.Println("guest: done")
	halt()
}

func halt() {
	unix.Sync()
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_RESTART)
	select {}
}

func must(err error) {
	if err != nil {
		fmt.Println("guest: FAIL set-up:", err)
		halt()
	}
}

// warnings fails on a kernel that complained, whatever the checks said.
func warnings() {
	buf := make([]byte, 1<<20)
	n, err := unix.Klogctl(3 /* SYSLOG_ACTION_READ_ALL */, buf)
	if err != nil {
		fmt.Println("guest: FAIL kernel log:", err)
		return
	}
	for line := range strings.Lines(string(buf[:n])) {
		if strings.Contains(line, "WARNING:") || strings.Contains(line, "BUG:") || strings.Contains(line, "Oops") {
			fmt.Print("guest: FAIL kernel log: ", line)
		}
	}
}

func filesystems() error {
	b, err := os.ReadFile("/proc/filesystems")
	if err != nil {
		return err
	}
	have := strings.Fields(string(b))
	var missing []string
	for _, fs := range []string{"erofs", "ext4", "ext2", "ext3", "xfs", "overlay", "tmpfs", "nfs4", "fuse", "virtiofs", "9p",
		"squashfs", "mqueue", "devpts", "hugetlbfs", "binfmt_misc", "cgroup2", "bpf", "autofs"} {
		if !slices.Contains(have, fs) {
			missing = append(missing, fs)
		}
	}
	if missing != nil {
		return fmt.Errorf("missing %v", missing)
	}
	return nil
}

func erofsDisk() error {
	if err := os.MkdirAll("/disk", 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/dev/vda", "/disk", "erofs", unix.MS_RDONLY, ""); err != nil {
		return err
	}
	// The tools want a place for locks, /proc and /dev.
	for _, m := range [][2]string{{"/dev", "/disk/dev"}, {"/proc", "/disk/proc"}} {
		if err := unix.Mount(m[0], m[1], "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind %s: %w", m[1], err)
		}
	}
	return unix.Mount("tmpfs", "/disk/run", "tmpfs", 0, "")
}

func configGz() error {
	f, err := os.Open("/proc/config.gz")
	if err != nil {
		return err
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		return err
	}
	got, err := io.ReadAll(z)
	if err != nil {
		return err
	}
	want, err := os.ReadFile("/disk/etc/vmlinux.config")
	if err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return errors.New("differs from vmlinux.config in the tree")
	}
	return nil
}

const cgroup = "/sys/fs/cgroup"

func cgroupControllers() error {
	if err := unix.Mount("cgroup2", cgroup, "cgroup2", 0, "nsdelegate,memory_recursiveprot"); err != nil {
		return err
	}
	b, err := os.ReadFile(cgroup + "/cgroup.controllers")
	if err != nil {
		return err
	}
	have := strings.Fields(string(b))
	for _, c := range []string{"cpuset", "cpu", "io", "memory", "hugetlb", "pids", "rdma", "misc"} {
		if !slices.Contains(have, c) {
			return fmt.Errorf("no %s in %v", c, have)
		}
		if err := os.WriteFile(cgroup+"/cgroup.subtree_control", []byte("+"+c), 0); err != nil {
			return err
		}
	}
	if err := os.Mkdir(cgroup+"/t", 0o755); err != nil {
		return err
	}
	for _, f := range []string{"memory.max", "memory.swap.max", "memory.high", "memory.oom.group", "cpu.max", "cpu.weight",
		"io.max", "io.weight", "io.latency", "pids.max", "cpuset.cpus", "cpuset.mems", "hugetlb.2MB.max", "rdma.max",
		"cgroup.freeze", "cgroup.kill", "cpu.stat", "io.stat", "memory.stat"} {
		if _, err := os.Stat(cgroup + "/t/" + f); err != nil {
			return err
		}
	}
	return nil
}

func cgroupKill() error {
	cmd := exec.Command("/bin/sleep", "1000")
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: "/disk"}
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		return err
	}
	for _, w := range []struct{ file, value string }{
		{"cgroup.procs", fmt.Sprint(cmd.Process.Pid)}, {"memory.max", "64M"}, {"cpu.max", "50000 100000"},
		{"pids.max", "10"}, {"io.max", "254:0 rbps=1000000"}, {"io.weight", "default 50"}, {"cgroup.freeze", "1"}, {"cgroup.freeze", "0"}, {"cgroup.kill", "1"},
	} {
		value := w.value
		if w.file == "io.max" {
			var st unix.Stat_t
			if err := unix.Stat("/dev/vda", &st); err != nil {
				return err
			}
			value = fmt.Sprintf("%d:%d rbps=100000000", unix.Major(st.Rdev), unix.Minor(st.Rdev))
		}
		if err := os.WriteFile(cgroup+"/t/"+w.file, []byte(value), 0); err != nil {
			return err
		}
	}
	err := cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		return fmt.Errorf("cgroup.kill: the process ended with %v", err)
	}
	return nil
}

func namespaces() error {
	for _, ns := range []string{"cgroup", "ipc", "mnt", "net", "pid", "pid_for_children", "time", "time_for_children", "user", "uts"} {
		if _, err := os.Stat("/proc/self/ns/" + ns); err != nil {
			return err
		}
	}
	cmd := exec.Command("/bin/true")
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: "/disk", Cloneflags: unix.CLONE_NEWCGROUP | unix.CLONE_NEWIPC | unix.CLONE_NEWNS |
		unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWTIME | unix.CLONE_NEWUTS}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("all but the user namespace: %w", err)
	}
	user := exec.Command("/bin/true")
	user.Dir = "/"
	user.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: 1000, Size: 1}}, Chroot: "/disk"}
	return user.Run()
}

func seccomp() error {
	b, err := os.ReadFile("/proc/sys/kernel/seccomp/actions_avail")
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), "user_notif") || !strings.Contains(string(b), "errno") {
		return fmt.Errorf("actions %s", b)
	}
	return nil
}

func overlayManyLowers() error {
	const n = 130
	base := "/tmp/ovl"
	for _, d := range []string{"upper", "work", "merged"} {
		if err := os.MkdirAll(filepath.Join(base, d), 0o755); err != nil {
			return err
		}
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen: %w", err)
	}
	defer unix.Close(fd)
	for i := range n {
		dir := filepath.Join(base, fmt.Sprintf("lower-with-a-long-name-so-that-one-page-of-options-would-not-do-%d", i))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprint("file", i)), []byte("x"), 0o644); err != nil {
			return err
		}
		if err := unix.FsconfigSetString(fd, "lowerdir+", dir); err != nil {
			return fmt.Errorf("fsconfig lowerdir+ number %d: %w", i, err)
		}
	}
	for _, kv := range [][2]string{{"upperdir", base + "/upper"}, {"workdir", base + "/work"}} {
		if err := unix.FsconfigSetString(fd, kv[0], kv[1]); err != nil {
			return fmt.Errorf("fsconfig %s: %w", kv[0], err)
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return fmt.Errorf("fsconfig create: %w", err)
	}
	mfd, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("fsmount: %w", err)
	}
	defer unix.Close(mfd)
	if err := unix.MoveMount(mfd, "", unix.AT_FDCWD, base+"/merged", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move_mount: %w", err)
	}
	names, err := os.ReadDir(base + "/merged")
	if err != nil {
		return err
	}
	if len(names) != n {
		return fmt.Errorf("%d files in the merged directory, want %d", len(names), n)
	}
	return os.WriteFile(base+"/merged/file0", []byte("copied up"), 0o644)
}

func fileCapabilities() error {
	f := "/tmp/ovl/merged/file1"
	// VFS_CAP_REVISION_2 with cap_net_bind_service, little-endian.
	value := []byte{1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}
	if err := unix.Setxattr(f, "security.capability", value, 0); err != nil {
		return fmt.Errorf("security.capability: %w", err)
	}
	if err := unix.Setxattr(f, "user.test", []byte("1"), 0); err != nil {
		return fmt.Errorf("user.test: %w", err)
	}
	return unix.Setxattr("/tmp/ovl/upper/file1", "trusted.test", []byte("1"), 0)
}

func dmLinear() error {
	// Two pieces of the disk in the opposite order.
	const piece = 64 << 10
	err := devmapper.CreateAndLoad("linear", "", devmapper.ReadOnlyFlag,
		devmapper.LinearTable{Start: 0, Length: piece, BackendDevice: "/dev/vdb", BackendOffset: piece},
		devmapper.LinearTable{Start: piece, Length: piece, BackendDevice: "/dev/vdb", BackendOffset: 0})
	if err != nil {
		return err
	}
	defer devmapper.Remove("linear")
	disk, err := os.ReadFile("/dev/vdb")
	if err != nil {
		return err
	}
	got, err := readDM("linear")
	if err != nil {
		return err
	}
	if !bytes.Equal(got, slices.Concat(disk[piece:2*piece], disk[:piece])) {
		return errors.New("wrong contents")
	}
	return nil
}

func readDM(name string) ([]byte, error) {
	info, err := devmapper.InfoByName(name)
	if err != nil {
		return nil, err
	}
	return os.ReadFile(fmt.Sprintf("/dev/dm-%d", unix.Minor(info.DevNo)))
}

// dmVerity computes the hash tree of 128 blocks itself: one block of hashes, whose hash is the root.
func dmVerity() error {
	const blocks, size = 128, 4096
	f, err := os.OpenFile("/dev/vdb", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	tree := make([]byte, 0, size)
	block := make([]byte, size)
	for i := range int64(blocks) {
		if _, err := f.ReadAt(block, i*size); err != nil {
			return err
		}
		sum := sha256.Sum256(block)
		tree = append(tree, sum[:]...)
	}
	if _, err := f.WriteAt(tree, blocks*size); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	root := sha256.Sum256(tree)
	table := devmapper.VerityTable{Length: blocks * size, HashType: 1, DataDevice: "/dev/vdb", HashDevice: "/dev/vdb",
		DataBlockSize: size, HashBlockSize: size, NumDataBlocks: blocks, HashStartBlock: blocks, Algorithm: "sha256",
		Digest: fmt.Sprintf("%x", root), Salt: "-"}
	if err := devmapper.CreateAndLoad("verity", "", devmapper.ReadOnlyFlag, table); err != nil {
		return err
	}
	_, err = readDM("verity")
	if err := devmapper.Remove("verity"); err != nil {
		return err
	}
	if err != nil {
		return fmt.Errorf("read what is intact: %w", err)
	}
	if _, err := f.WriteAt([]byte("tampered"), 100*size+17); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := devmapper.CreateAndLoad("verity", "", devmapper.ReadOnlyFlag, table); err != nil {
		return err
	}
	defer devmapper.Remove("verity")
	if _, err := readDM("verity"); !errors.Is(err, unix.EIO) {
		return fmt.Errorf("read what was tampered with: got %v, want EIO", err)
	}
	return nil
}

func dmCrypt() error {
	for _, cipher := range []struct {
		name string
		key  int
	}{{"aes-xts-plain64", 64}, {"aes-cbc-essiv:sha256", 32}} {
		const length = 64 << 10
		err := devmapper.CreateAndLoad("crypt", "", 0, devmapper.CryptTable{Length: length, BackendDevice: "/dev/vdb", BackendOffset: 1 << 20,
			Encryption: cipher.name, Key: bytes.Repeat([]byte{7}, cipher.key)})
		if err != nil {
			return fmt.Errorf("%s: %w", cipher.name, err)
		}
		info, err := devmapper.InfoByName("crypt")
		if err != nil {
			return err
		}
		plain := bytes.Repeat([]byte("plain text "), 100)
		f, err := os.OpenFile(fmt.Sprintf("/dev/dm-%d", unix.Minor(info.DevNo)), os.O_RDWR|os.O_SYNC, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(plain, 0)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
		if err := devmapper.Remove("crypt"); err != nil {
			return err
		}
		raw := make([]byte, len(plain))
		d, err := os.Open("/dev/vdb")
		if err != nil {
			return err
		}
		_, err = d.ReadAt(raw, 1<<20)
		if err := errors.Join(err, d.Close()); err != nil {
			return err
		}
		if bytes.Contains(raw, []byte("plain")) || bytes.Equal(raw, make([]byte, len(raw))) {
			return fmt.Errorf("%s: the disk holds %q", cipher.name, raw[:16])
		}
	}
	return nil
}

func dmTargets() error {
	have, err := dmVersions()
	if err != nil {
		return err
	}
	for _, target := range []string{"linear", "verity", "crypt", "integrity"} {
		if !slices.Contains(have, target) {
			return fmt.Errorf("no %s in %v", target, have)
		}
	}
	return nil
}

func loopDevice() error {
	control, err := os.Open("/dev/loop-control")
	if err != nil {
		return err
	}
	defer control.Close()
	n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return err
	}
	backing, err := os.Open("/disk/etc/small.squashfs")
	if errors.Is(err, os.ErrNotExist) {
		backing, err = os.Open("/disk/etc/small.erofs")
	}
	if err != nil {
		return err
	}
	defer backing.Close()
	loop, err := os.OpenFile(fmt.Sprint("/dev/loop", n), os.O_RDONLY, 0)
	if err != nil {
		return err
	}
	defer loop.Close()
	if err := unix.IoctlLoopConfigure(int(loop.Fd()), &unix.LoopConfig{Fd: uint32(backing.Fd()),
		Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR}}); err != nil {
		return fmt.Errorf("LOOP_CONFIGURE: %w", err)
	}
	if err := os.MkdirAll("/tmp/loop", 0o755); err != nil {
		return err
	}
	if err := unix.Mount(loop.Name(), "/tmp/loop", "erofs", unix.MS_RDONLY, ""); err != nil {
		return err
	}
	got, err := os.ReadFile("/tmp/loop/hello")
	if err != nil || string(got) != "hello\n" {
		return fmt.Errorf("read through the loop: %q, %v", got, err)
	}
	return nil
}

// links makes one interface of every kind, in a network that holds nothing but lo before.
func links() error {
	have, err := netlink.LinkList()
	if err != nil {
		return err
	}
	if len(have) != 1 || have[0].Attrs().Name != "lo" {
		var names []string
		for _, l := range have {
			names = append(names, l.Attrs().Name)
		}
		return fmt.Errorf("at first there are %v, want lo alone", names)
	}
	if err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "parent"}}); err != nil {
		return fmt.Errorf("dummy: %w", err)
	}
	parent, err := netlink.LinkByName("parent")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(parent); err != nil {
		return err
	}
	p := parent.Attrs().Index
	a := func(name string) netlink.LinkAttrs { return netlink.LinkAttrs{Name: name} }
	child := func(name string) netlink.LinkAttrs { return netlink.LinkAttrs{Name: name, ParentIndex: p} }
	vlanFiltering := true
	for _, l := range []netlink.Link{
		&netlink.Bridge{LinkAttrs: a("t-bridge"), VlanFiltering: &vlanFiltering},
		&netlink.Veth{LinkAttrs: a("t-veth"), PeerName: "t-peer"},
		&netlink.Vlan{LinkAttrs: child("t-vlan"), VlanId: 7},
		&netlink.Macvlan{LinkAttrs: child("t-macvlan"), Mode: netlink.MACVLAN_MODE_BRIDGE},
		&netlink.Vxlan{LinkAttrs: a("t-vxlan"), VxlanId: 42, VtepDevIndex: p, Port: 4789},
		&netlink.Geneve{LinkAttrs: a("t-geneve"), ID: 43, Remote: []byte{192, 0, 2, 1}},
		&netlink.Wireguard{LinkAttrs: a("t-wg")},
		&netlink.Ip6tnl{LinkAttrs: a("t-ip6tnl"), Local: net.ParseIP("2001:db8::1"), Remote: net.ParseIP("2001:db8::2")},
		&netlink.Iptun{LinkAttrs: a("t-ipip"), Local: []byte{192, 0, 2, 2}, Remote: []byte{192, 0, 2, 1}},
		&netlink.Sittun{LinkAttrs: a("t-sit"), Local: []byte{192, 0, 2, 2}, Remote: []byte{192, 0, 2, 3}},
		&netlink.Gretun{LinkAttrs: a("t-gre"), Local: []byte{192, 0, 2, 2}, Remote: []byte{192, 0, 2, 4}},
		&netlink.Ifb{LinkAttrs: a("t-ifb")},
		&netlink.Tuntap{LinkAttrs: a("t-tap"), Mode: netlink.TUNTAP_MODE_TAP},
	} {
		if err := netlink.LinkAdd(l); err != nil {
			return fmt.Errorf("%s: %w", l.Type(), err)
		}
	}
	// ipvlan takes a parent of its own: one device cannot carry macvlan and ipvlan.
	if err := netlink.LinkAdd(&netlink.Dummy{LinkAttrs: a("parent2")}); err != nil {
		return err
	}
	parent2, err := netlink.LinkByName("parent2")
	if err != nil {
		return err
	}
	if err := netlink.LinkAdd(&netlink.IPVlan{LinkAttrs: netlink.LinkAttrs{Name: "t-ipvlan", ParentIndex: parent2.Attrs().Index}}); err != nil {
		return fmt.Errorf("ipvlan: %w", err)
	}
	for _, q := range []netlink.Qdisc{
		&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: p, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}},
		netlink.NewFq(netlink.QdiscAttrs{LinkIndex: p, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT}),
	} {
		if err := netlink.QdiscAdd(q); err != nil {
			return fmt.Errorf("qdisc %s: %w", q.Type(), err)
		}
	}
	rule := netlink.NewRule()
	rule.Table, rule.Priority, rule.Family = 100, 100, unix.AF_INET
	if err := netlink.RuleAdd(rule); err != nil {
		return fmt.Errorf("policy routing: %w", err)
	}
	return nil
}

func tool(argv ...string) func() error {
	return func() error {
		cmd := exec.Command(argv[0], argv[1:]...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: "/disk"}
		cmd.Dir = "/"
		cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", strings.Join(argv, " "), err, out)
		}
		return nil
	}
}

// iptables restores a file of rules line by line, so that a missing extension is named.
func iptables(program, rules string) func() error {
	return func() error {
		b, err := os.ReadFile("/disk" + rules)
		if err != nil {
			return err
		}
		var failed []error
		table := ""
		lines := bufio.NewScanner(bytes.NewReader(b))
		for lines.Scan() {
			line := strings.TrimSpace(lines.Text())
			switch {
			case line == "" || line[0] == '#':
				continue
			case line[0] == '*':
				table = line
				continue
			}
			cmd := exec.Command("/usr/sbin/"+program, "--noflush")
			cmd.SysProcAttr = &syscall.SysProcAttr{Chroot: "/disk"}
			cmd.Dir = "/"
			cmd.Stdin = strings.NewReader(table + "\n" + line + "\nCOMMIT\n")
			if out, err := cmd.CombinedOutput(); err != nil {
				failed = append(failed, fmt.Errorf("%s %s: %w: %s", table, line, err, out))
			}
		}
		return errors.Join(failed...)
	}
}

func exists(path string) func() error {
	return func() error {
		_, err := os.Stat(path)
		return err
	}
}

func mountFS(fs string) func() error {
	return func() error {
		dir := "/tmp/" + fs
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		return unix.Mount(fs, dir, fs, 0, "")
	}
}

func binfmtMisc() error {
	if err := unix.Mount("binfmt_misc", "/proc/sys/fs/binfmt_misc", "binfmt_misc", 0, ""); err != nil {
		return err
	}
	return os.WriteFile("/proc/sys/fs/binfmt_misc/register", []byte(":test:E::cradletest::/bin/true:"), 0)
}

func ioUring() error {
	params := make([]byte, 120) // struct io_uring_params
	fd, err := ioUringSetup(8, params)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func hwRandom() error {
	b, err := os.ReadFile("/sys/class/misc/hw_random/rng_current")
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(b), "virtio_rng") {
		return fmt.Errorf("rng_current is %s", b)
	}
	return nil
}

func vsock() error {
	fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

func packetSocket() error {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// compat32 runs a static 32-bit program.
func compat32() error {
	out, err := exec.Command("/disk/etc/hello386").CombinedOutput()
	if err != nil || string(out) != "hello from 386\n" {
		return fmt.Errorf("got %q, %v", out, err)
	}
	return nil
}

func processors() error {
	if n := runtime.NumCPU(); n != 3 {
		return fmt.Errorf("%d processors are online, want 3", n)
	}
	return nil
}

// clock wants the time stamp counter and timers of less than a tick, when the command line says that they can be had.
func clock() error {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	if !strings.Contains(string(b), "test.clock") {
		return nil
	}
	b, err = os.ReadFile("/sys/devices/system/clocksource/clocksource0/current_clocksource")
	if err != nil {
		return err
	}
	if !strings.HasPrefix(string(b), "tsc") {
		return fmt.Errorf("the clock is %s", b)
	}
	b, err = os.ReadFile("/proc/timer_list")
	if err != nil {
		return err
	}
	if n := strings.Count(string(b), ".hres_active    : 1"); n != runtime.NumCPU() {
		return fmt.Errorf("%d of %d processors have timers of high resolution", n, runtime.NumCPU())
	}
	return nil
}

func absent() error {
	for _, path := range []string{"/dev/ttyS0", "/dev/tty1", "/sys/bus/pci", "/sys/firmware/acpi", "/proc/modules", "/dev/mem"} {
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s exists", path)
		}
	}
	return nil
}
