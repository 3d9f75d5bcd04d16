package container

import (
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got), go test -update writes it:\n%s", file, d)
	}
}

// plain is docker run IMAGE sleep 1.
func plain() *Config {
	caps, _ := Capabilities(false, nil, nil)
	return &Config{
		Rootfs:   "/run/rootfs",
		Hostname: "pod",
		Process:  Process{Args: []string{"sleep", "1"}, Env: []string{"PATH=/usr/bin:/bin"}, Cwd: "/", Bounding: caps},
	}
}

func TestTable(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Config)
	}{
		{"default", func(*Config) {}},
		{"terminal", func(c *Config) {
			c.Process.TTY = true
			c.Process.Size = [2]uint16{24, 80}
		}},
		{"privileged", func(c *Config) {
			c.Privileged = true
			c.Process.Bounding = AllCapabilities
		}},
		{"everything", func(c *Config) {
			c.ReadOnly = true
			c.Domain = "example.org"
			c.InitFile = "/init"
			c.Sysctls = []Sysctl{{"net.core.somaxconn", "512"}}
			c.Mounts = []Mount{
				{Source: "/run/volumes/data/_data", Target: "/var/lib/data"},
				{Source: "/run/hosts", Target: "/etc/hosts", File: true, ReadOnly: true},
				{Target: "/tmp", Flags: defaultFlags, Data: "size=65536k"},
			}
			c.Devices = []specs.LinuxDevice{{Path: "/dev/net/tun", Type: "c", Major: 10, Minor: 200}}
			c.Process.User = User{UID: 1000, GID: 1000, Groups: []uint32{1000, 1234}}
			c.Process.Cwd = "/srv/app"
			c.Process.NoNewPrivs = true
			c.Process.OOMScoreAdj = 100
			c.Process.Rlimits = []specs.POSIXRlimit{{Type: "nofile", Soft: 1024, Hard: 4096}}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := plain()
			tt.change(c)
			table, err := newTable(c)
			if err != nil {
				t.Fatal(err)
			}
			golden(t, tt.name, table.Text())
		})
	}
	t.Run("exec", func(t *testing.T) {
		p := plain().Process
		p.TTY = true
		table, err := newExecTable(&p, 7, 9)
		if err != nil {
			t.Fatal(err)
		}
		golden(t, "exec", table.Text())
	})
	t.Run("NUL", func(t *testing.T) {
		c := plain()
		c.Process.Args = []string{"a\x00b"}
		if _, err := newTable(c); err == nil {
			t.Error("a NUL byte was taken")
		}
	})
}

func TestCapabilities(t *testing.T) {
	def, err := Capabilities(false, nil, nil)
	if err != nil || def != 0xa80425fb {
		t.Fatalf("default set: got %#x, %v, want docker's a80425fb", def, err)
	}
	for _, tt := range []struct {
		name       string
		privileged bool
		add, drop  []string
		want       uint64
		err        string
	}{
		{"privileged", true, nil, []string{"ALL"}, AllCapabilities, ""},
		{"drop all", false, nil, []string{"all"}, 0, ""},
		{"add all", false, []string{"ALL"}, nil, AllCapabilities, ""},
		{"add all but one", false, []string{"ALL"}, []string{"CAP_SYS_ADMIN"}, AllCapabilities &^ (1 << 21), ""},
		{"drop all but one", false, []string{"net_bind_service"}, []string{"ALL"}, 1 << 10, ""},
		{"add one", false, []string{"CAP_SYS_ADMIN"}, nil, def | 1<<21, ""},
		{"unknown", false, []string{"CAP_FOO"}, nil, 0, `invalid capability: "CAP_FOO"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Capabilities(tt.privileged, tt.add, tt.drop)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil || got != tt.want {
				t.Errorf("got %#x, %v, want %#x", got, err, tt.want)
			}
		})
	}
	if last := capability("CHECKPOINT_RESTORE"); last != 1<<unix.CAP_LAST_CAP {
		t.Errorf("the last capability is %#x, want %#x", last, uint64(1)<<unix.CAP_LAST_CAP)
	}
}

func TestSettings(t *testing.T) {
	i := func(n int64) *int64 { return &n }
	u := func(n uint64) *uint64 { return &n }
	w := uint16(500)
	for _, tt := range []struct {
		name string
		in   specs.LinuxResources
		want []setting
		err  string
	}{
		{"nothing", specs.LinuxResources{}, nil, ""},
		{"memory", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: i(64 << 20), Reservation: i(32 << 20)}},
			[]setting{{"memory.low", "33554432"}, {"memory.max", "67108864"}, {"memory.swap.max", "67108864"}}, ""},
		{"memory and swap", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: i(64 << 20), Swap: i(96 << 20)}},
			[]setting{{"memory.max", "67108864"}, {"memory.swap.max", "33554432"}}, ""},
		{"no swap", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: i(64 << 20), Swap: i(64 << 20)}},
			[]setting{{"memory.max", "67108864"}, {"memory.swap.max", "0"}}, ""},
		{"endless swap", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: i(64 << 20), Swap: i(-1)}},
			[]setting{{"memory.max", "67108864"}, {"memory.swap.max", "max"}}, ""},
		{"swap below memory", specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: i(64 << 20), Swap: i(1 << 20)}}, nil, "memoryswap"},
		{"swap alone", specs.LinuxResources{Memory: &specs.LinuxMemory{Swap: i(1 << 20)}}, nil, "needs a memory limit"},
		{"cpu", specs.LinuxResources{CPU: &specs.LinuxCPU{Quota: i(150000), Period: u(100000), Shares: u(1024), Cpus: "0-1"}},
			[]setting{{"cpu.weight", "39"}, {"cpu.max", "150000 100000"}, {"cpuset.cpus", "0-1"}}, ""},
		{"pids", specs.LinuxResources{Pids: &specs.LinuxPids{Limit: i(100)}}, []setting{{"pids.max", "100"}}, ""},
		{"pids without end", specs.LinuxResources{Pids: &specs.LinuxPids{Limit: i(-1)}}, []setting{{"pids.max", "max"}}, ""},
		{"io", specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{
			Weight: &w, ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{throttle(254, 16, 1<<20)},
		}}, []setting{{"io.weight", "default 500"}, {"io.max", "254:16 rbps=1048576"}}, ""},
		{"forbidden", specs.LinuxResources{Unified: map[string]string{"cgroup.procs": "1"}}, nil, "may not be set"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := settings(&tt.in)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got, cmp.AllowUnexported(setting{})); d != "" {
				t.Errorf("settings (-want +got):\n%s", d)
			}
		})
	}
}

func throttle(major, minor int64, rate uint64) specs.LinuxThrottleDevice {
	var d specs.LinuxThrottleDevice
	d.Major, d.Minor, d.Rate = major, minor, rate
	return d
}

// A table that fails between the steps that open and close a descriptor leaves it open, and start closes it.
func TestHoldsFD(t *testing.T) {
	table, err := newExecTable(&Process{Args: []string{"x"}, Cwd: "/"}, 7, 9)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for i, s := range table.thread.steps {
		if table.thread.holdsFD(i) {
			got = append(got, s.Text())
		}
	}
	want := []string{"enter the container's namespaces", "chdir to the container's root", "chroot .", "close fd"}
	if !slices.Equal(got, want) {
		t.Errorf("the descriptor is held before %q, want %q", got, want)
	}
}
