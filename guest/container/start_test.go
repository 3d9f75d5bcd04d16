package container

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/guest/reap"
	"github.com/kcradle/kcradle/guest/sandboxtest"
	"github.com/kcradle/kcradle/spec"
)

func TestMain(m *testing.M) { sandboxtest.Inside(m) }

// fixture is a reaper and a busybox root.
type fixture struct {
	reaper *reap.Reaper
	root   string
	cgroup *Cgroup
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	cgroups := sandboxtest.Cgroup(t)
	f := &fixture{reaper: reap.New(), root: sandboxtest.Busybox(t)}
	if err := unix.Mount(f.root, f.root, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(f.root, 0); err != nil {
			t.Error(err)
		}
	})
	stop, done := make(chan struct{}), make(chan struct{})
	go func() { defer close(done); f.reaper.Run(stop) }()
	t.Cleanup(func() { close(stop); <-done })
	cg, err := NewCgroup(cgroups, strings.ReplaceAll(t.Name(), "/", "_"), &specs.LinuxResources{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cg.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	f.cgroup = cg
	return f
}

func (f *fixture) config(args ...string) *Config {
	caps, _ := Capabilities(false, nil, nil)
	return &Config{
		Rootfs:   f.root,
		Hostname: "pod",
		Process: Process{
			Args: args, Env: []string{"PATH=" + DefaultPath}, Cwd: "/",
			Bounding: caps,
		},
	}
}

// run runs to the end and returns what was written.
func (f *fixture) run(t *testing.T, c *Config) (stdout, stderr string, code int) {
	t.Helper()
	r, err := Start(f.reaper, c, f.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	return finish(t, r)
}

func finish(t *testing.T, r *Running) (stdout, stderr string, code int) {
	t.Helper()
	defer r.Close()
	deadline := time.Now().Add(20 * time.Second)
	errs := make(chan string, 1)
	read := func(f *os.File) string {
		if f == nil {
			return ""
		}
		f.SetReadDeadline(deadline)
		b, err := io.ReadAll(f)
		if err != nil && !errors.Is(err, unix.EIO) {
			t.Error(err)
		}
		return string(b)
	}
	go func() { errs <- read(r.Stderr) }()
	if r.Terminal != nil {
		stdout = read(r.Terminal)
	} else {
		stdout = read(r.Stdout)
	}
	<-r.Done()
	return stdout, <-errs, r.Exit().Code()
}

func TestStart(t *testing.T) {
	f := newFixture(t)
	out, stderr, code := f.run(t, f.config("sh", "-c", "echo hello; echo oops >&2; exit 3"))
	if out != "hello\n" || stderr != "oops\n" || code != 3 {
		t.Errorf("got %q, %q, exit code %d", out, stderr, code)
	}
}

func TestView(t *testing.T) {
	f := newFixture(t)
	for _, tt := range []struct {
		name   string
		change func(*Config)
		script string
		want   string
	}{
		{"pid", nil, "echo $$", "1"},
		{"host name", nil, "hostname; cat /proc/sys/kernel/hostname", "pod\npod"},
		{"cgroup", nil, "cat /proc/self/cgroup | grep ^0::; grep -c . /sys/fs/cgroup/cgroup.procs", "0::/\n1"},
		{"capabilities", nil, "grep Cap /proc/self/status", "CapInh:\t0000000000000000\nCapPrm:\t00000000a80425fb\nCapEff:\t00000000a80425fb\nCapBnd:\t00000000a80425fb\nCapAmb:\t0000000000000000"},
		{"user", func(c *Config) { c.Process.User = User{UID: 1000, GID: 100, Groups: []uint32{5, 7}} },
			"grep -E '^(Uid|Gid|Groups|CapEff|CapBnd)' /proc/self/status; echo x > /dev/stdout",
			"Uid:\t1000\t1000\t1000\t1000\nGid:\t100\t100\t100\t100\nGroups:\t5 7 \nCapEff:\t0000000000000000\nCapBnd:\t00000000a80425fb\nx"},
		{"limits", func(c *Config) {
			c.Process.Rlimits, _ = Rlimits([]specs.POSIXRlimit{{Type: "nofile", Soft: 100, Hard: 200}, {Type: "RLIMIT_CORE"}})
		}, "ulimit -n; ulimit -Hn; ulimit -c", "100\n200\n0"},
		{"working directory is made", func(c *Config) { c.Process.Cwd = "/a/b" }, "pwd", "/a/b"},
		{"no new privileges", func(c *Config) { c.Process.NoNewPrivs = true }, "grep NoNewPrivs /proc/self/status", "NoNewPrivs:\t1"},
		{"masked", nil, "cat /proc/kcore | wc -c; ls /sys/firmware | wc -l; echo 1 > /proc/sys/kernel/panic", "0\n0"},
		{"sysctl", func(c *Config) { c.Sysctls = []Sysctl{{"kernel.msgmax", "4321"}} }, "cat /proc/sys/kernel/msgmax", "4321"},
		{"oom score", func(c *Config) { c.Process.OOMScoreAdj = 321 }, "cat /proc/self/oom_score_adj", "321"},
		{"umask", nil, "umask", "0022"},
		{"cgroups", nil, "mkdir /sys/fs/cgroup/x 2>&1 | grep -c 'Read-only file system'", "1"},
		{"writable cgroups", func(c *Config) { c.WritableCgroups = true }, "mkdir /sys/fs/cgroup/x && rmdir /sys/fs/cgroup/x && echo done", "done"},
		{"no shm", func(c *Config) { c.NoShm = true }, "grep ' /dev/shm ' /proc/mounts | wc -l", "0"},
		{"other masked paths", func(c *Config) { c.MaskedPaths = &[]string{"/proc/version", "/proc/tty", "/nowhere"} },
			"cat /proc/version | wc -c; ls /proc/tty | wc -l; head -c 3 /proc/interrupts | wc -c", "0\n0\n3"},
		{"other read-only paths", func(c *Config) { c.ReadonlyPaths = &[]string{"/proc/tty"} },
			"grep -c ' /proc/tty proc ro' /proc/mounts; grep ' /proc/bus ' /proc/mounts | wc -l", "1\n0"},
		{"shm", func(c *Config) { c.ShmSize = 1 << 20 }, "df -k /dev/shm | tail -1 | awk '{print $2}'", "1024"},
		{"signals", nil, "grep -E 'Sig(Blk|Cgt)' /proc/self/status", "SigBlk:\t0000000000000000\nSigCgt:\t0000000000000000"},
		{"descriptors", nil, "ls /proc/self/fd", "0\n1\n2\n3"},
		{"devices", nil, "cd /dev; ls; ls -l null | cut -c1-10", "core\nfd\nfull\nmqueue\nnull\nptmx\npts\nrandom\nshm\nstderr\nstdin\nstdout\ntty\nurandom\nzero\ncrw-rw-rw-"},
		{"read-only", func(c *Config) { c.ReadOnly = true }, "touch /x 2>&1; touch /dev/shm/x && echo shm", "touch: /x: Read-only file system\nshm"},
		{"tmpfs", func(c *Config) {
			c.Mounts = []Mount{{Target: "/t/mp", Flags: defaultFlags, Data: "size=64k,mode=700"}}
		}, "stat -c '%a %F' /t/mp; df -k /t/mp | tail -1 | awk '{print $2}'", "700 directory\n64"},
		{"device", func(c *Config) {
			mode := os.FileMode(0o600)
			uid := uint32(7)
			c.Devices = []specs.LinuxDevice{{Path: "/dev/x/y", Type: "b", Major: 7, Minor: 3, FileMode: &mode, UID: &uid}}
		}, "stat -c '%a %F %t %T %u' /dev/x/y", "600 block special file 7 3 7"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := f.config("sh", "-c", tt.script)
			if tt.change != nil {
				tt.change(c)
			}
			out, stderr, _ := f.run(t, c)
			if got := strings.TrimSuffix(out, "\n"); got != tt.want {
				t.Errorf("%s\ngot:\n%s\nwant:\n%s\nstderr: %s", tt.script, got, tt.want, stderr)
			}
		})
	}
}

func TestStartFails(t *testing.T) {
	f := newFixture(t)
	if err := os.WriteFile(filepath.Join(f.root, "notexec"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(f.root, "garbage"), []byte("\x01\x02\x03"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		args   []string
		change func(*Config)
		code   int
		want   string
	}{
		{"missing in PATH", []string{"foo"}, nil, 127, `exec: "foo": executable file not found in $PATH`},
		{"missing path", []string{"/bin/foo"}, nil, 127, `exec: "/bin/foo": stat /bin/foo: no such file or directory`},
		{"below a file", []string{"/notexec/foo"}, nil, 127, `exec: "/notexec/foo": stat /notexec/foo: not a directory`},
		{"directory", []string{"/bin"}, nil, 126, `exec: "/bin": is a directory`},
		{"not executable", []string{"/notexec"}, nil, 126, `exec: "/notexec": permission denied`},
		{"no program", []string{"/garbage"}, nil, 126, `exec /garbage: exec format error`},
		{"no program in PATH", []string{"garbage"}, func(c *Config) { c.Process.Env = []string{"PATH=/nowhere:/"} }, 126, `exec //garbage: exec format error`},
		{"empty", []string{""}, nil, 127, `exec: "": executable file not found in $PATH`},
		{"working directory", []string{"true"}, func(c *Config) { c.Process.Cwd = "/notexec" }, 126, `chdir to cwd ("/notexec") set in config.json failed: not a directory`},
		{"sysctl", []string{"true"}, func(c *Config) { c.Sysctls = []Sysctl{{"kernel.nosuch", "1"}} }, 125, `open /proc/sys/kernel/nosuch: no such file or directory`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := f.config(tt.args...)
			if tt.change != nil {
				tt.change(c)
			}
			r, err := Start(f.reaper, c, f.cgroup)
			if err == nil {
				finish(t, r)
				t.Fatal("it started")
			}
			se := AsStartError(err)
			if se.Code != tt.code || !strings.Contains(se.Msg, tt.want) {
				t.Errorf("got %d %q, want %d %q", se.Code, se.Msg, tt.code, tt.want)
			}
		})
	}
}

func TestTerminal(t *testing.T) {
	f := newFixture(t)
	c := f.config("sh", "-c", "stty size; tty; echo $TERM; test -t 0 && echo terminal; ls -l /dev/console | cut -c1; echo x > /dev/tty")
	c.Process.TTY = true
	c.Process.Size = [2]uint16{33, 99}
	out, _, code := f.run(t, c)
	want := "33 99\r\n/dev/pts/0\r\n\r\nterminal\r\nc\r\nx\r\n"
	if out != want || code != 0 {
		t.Errorf("got %q, exit code %d, want %q", out, code, want)
	}
}

func TestJoin(t *testing.T) {
	f := newFixture(t)
	c := f.config("sh", "-c", "cat; exit 9")
	c.Process.Stdin = true
	first, err := Start(f.reaper, c, f.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	p := c.Process
	p.Args = []string{"sh", "-c", "read x; echo $x; hostname; cat /proc/1/cmdline | tr '\\0' ' '; cat /proc/self/cgroup | grep ^0::"}
	p.Stdin, p.Stdout, p.Stderr = true, true, true
	second, err := Join(f.reaper, first, &p, f.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(second.Stdin, "typed\n"); err != nil {
		t.Fatal(err)
	}
	second.Stdin.Close()
	out, stderr, code := finish(t, second)
	if want := "typed\npod\nsh -c cat; exit 9 0::/\n"; out != want || code != 0 {
		t.Errorf("second process: got %q, stderr %q, exit code %d, want %q", out, stderr, code, want)
	}

	p.Args, p.TTY, p.Size = []string{"sh", "-c", "tty; stty size"}, true, [2]uint16{10, 20}
	third, err := Join(f.reaper, first, &p, f.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	if out, _, _ := finish(t, third); out != "/dev/pts/0\r\n10 20\r\n" {
		t.Errorf("process with a terminal: got %q", out)
	}

	p.TTY, p.Args = false, []string{"nosuch"}
	if _, err := Join(f.reaper, first, &p, f.cgroup); AsStartError(err).Code != 127 {
		t.Errorf("missing program: got %v", err)
	}

	first.Stdin.Close()
	if _, _, code := finish(t, first); code != 9 {
		t.Errorf("first process: got exit code %d, want 9", code)
	}
}

// TestNothingLeaks starts and fails often and counts what is left.
func TestNothingLeaks(t *testing.T) {
	f := newFixture(t)
	count := func() (fds, threads int) {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		d2, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		return len(d), len(d2)
	}
	round := func() {
		c := f.config("true")
		c.Mounts = []Mount{{Source: "/tmp", Target: "/mnt"}}
		f.run(t, c)
		c.Process.TTY = true
		f.run(t, c)
		c.Process.Args = []string{"nosuch"}
		if _, err := Start(f.reaper, c, f.cgroup); err == nil {
			t.Fatal("it started")
		}
	}
	round()
	fds, threads := count()
	for range 20 {
		round()
	}
	if f2, t2 := count(); f2 > fds || t2 > threads+4 {
		t.Errorf("descriptors: %d, then %d; threads: %d, then %d", fds, f2, threads, t2)
	}
}

// TestJoinNested joins a container that distributes its resources among cgroups of its own, as systemd and dockerd do.
func TestJoinNested(t *testing.T) {
	f := newFixture(t)
	c := f.config("cat")
	c.Process.Stdin = true
	first, err := Start(f.reaper, c, f.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(f.cgroup.Dir(), "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(sub, "cgroup.procs"), []byte(strconv.Itoa(first.Pid())), 0); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(f.cgroup.Dir(), "cgroup.controllers"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range strings.Fields(string(b)) {
		if err := os.WriteFile(filepath.Join(f.cgroup.Dir(), "cgroup.subtree_control"), []byte("+"+name), 0); err != nil {
			t.Fatal(err)
		}
	}
	p := c.Process
	p.Args, p.Stdin, p.Stdout = []string{"sh", "-c", "grep ^0:: /proc/self/cgroup"}, false, true
	second, err := Join(f.reaper, first, &p, f.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	want := "0::/sub\n"
	if len(b) <= 1 {
		want = "0::/\n" // no controller, no distribution
	}
	if out, _, code := finish(t, second); out != want || code != 0 {
		t.Errorf("got %q, exit code %d, want %q", out, code, want)
	}
	first.Stdin.Close()
	finish(t, first)
}

// The lists of docker's masked paths, with and without what the kernel says of them, are one.
func TestMaskedPaths(t *testing.T) {
	want, got := spec.DefaultMaskedPaths(), slices.Concat(maskedFiles, maskedDirs)
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(want, got) {
		t.Errorf("got %v, want %v", got, want)
	}
}
