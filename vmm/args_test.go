package vmm

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

// golden compares with testdata/NAME.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("%s (-want +got; go test -update writes it):\n%s", path, d)
	}
}

// lines shows an option and its value on a line.
func lines(args []string) string {
	var b strings.Builder
	for i, a := range args {
		if i > 0 {
			if strings.HasPrefix(a, "-") {
				b.WriteByte('\n')
			} else {
				b.WriteByte(' ')
			}
		}
		b.WriteString(a)
	}
	return b.String() + "\n"
}

func full() Config {
	return Config{
		Name: "kcradle:web,1", Engine: KVM, QEMU: "/usr/bin/qemu-system-x86_64", Kernel: "/pkg/vmlinux", Initrd: "/pkg/initrd.cpio",
		CommandLine: "console=hvc0 quiet", VCPUs: 2, Memory: 300<<20 + 1,
		Drives: []Drive{
			{Serial: "scratch", Path: "/pod/scratch.ext4"},
			{Serial: "layers", ReadOnly: true, Extents: []Extent{{"/store/a", 4096}, {"/store/b", 4097}, {"/store/a", 1}}},
			{Serial: "volume0", Path: "/pod/v0", ReadOnly: true},
		},
		Wire: &Wire{Kind: WireStream, File: os.Stdin, MAC: "52:54:00:00:00:01", MTU: 1400},
		CID:  70000,
	}
}

func TestArgs(t *testing.T) {
	tests := []struct {
		name   string
		config func(*Config)
	}{
		{"kvm", func(*Config) {}},
		{"tcg", func(c *Config) {
			c.Engine, c.CID, c.Wire.Kind, c.Wire.MTU = TCG, 0, WireTap, 0
		}},
		{"least", func(c *Config) {
			*c = Config{Engine: TCG, QEMU: c.QEMU, Kernel: c.Kernel, Memory: MinMemory}
		}},
		{"template", func(c *Config) {
			c.MemoryFile = "/t/memory"
			for i := range c.Drives {
				c.Drives[i] = Drive{Serial: c.Drives[i].Serial, ReadOnly: c.Drives[i].ReadOnly, Blank: true}
			}
		}},
		{"restore", func(c *Config) { c.Restore = &Snapshot{Memory: "/t/memory", State: "/t/state"} }},
		{"places", func(c *Config) {
			c.CID = 0
			for i := range 2 {
				c.Drives = append(c.Drives, Drive{Serial: fmt.Sprintf("volume%d", i+1), Path: "/pod/v"})
			}
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := full()
			test.config(&c)
			if err := c.Validate(); err != nil {
				t.Fatal(err)
			}
			got := lines(c.Args())
			for i, f := range c.files() {
				got += fmt.Sprintf("# %d: %s %s\n", firstFile+i, f.role, f.path)
			}
			golden(t, test.name+".args", got)
		})
	}
	t.Run("descriptor", func(t *testing.T) {
		got := descriptor(full().Drives[1].Extents, 11)
		golden(t, "descriptor.vmdk", got)
		if strings.Contains(got, "\n\n") {
			t.Error("an empty line makes QEMU show the extent behind it twice")
		}
	})
}

func TestValidate(t *testing.T) {
	extents := []Extent{{"/a", 1}}
	tests := []struct {
		name   string
		change func(*Config)
		want   string
	}{
		{"engine", func(c *Config) { c.Engine = "xen" }, `engine "xen"`},
		{"qemu", func(c *Config) { c.QEMU = "" }, "path of QEMU is missing"},
		{"kernel", func(c *Config) { c.Kernel = "" }, "kernel is missing"},
		{"vcpus", func(c *Config) { c.VCPUs = 65 }, "65 vCPUs"},
		{"memory", func(c *Config) { c.Memory = 1 << 20 }, "1048576 bytes of memory"},
		{"command line", func(c *Config) { c.CommandLine = strings.Repeat("x", 2000) }, "2000 bytes is longer than 1727"},
		{"context id", func(c *Config) { c.CID = 2 }, "context id 2"},
		{"serial", func(c *Config) { c.Drives[0].Serial = "a,b" }, "a serial is"},
		{"long serial", func(c *Config) { c.Drives[0].Serial = strings.Repeat("x", 21) }, "a serial is"},
		{"twice", func(c *Config) { c.Drives[0].Serial = "layers" }, "same serial"},
		{"no contents", func(c *Config) { c.Drives[0].Path = "" }, "either a path or extents, or is blank"},
		{"both contents", func(c *Config) { c.Drives[0].Extents = extents }, "either a path or extents, or is blank"},
		{"blank with contents", func(c *Config) { c.Drives[0].Blank = true }, "either a path or extents, or is blank"},
		{"snapshot", func(c *Config) { c.Restore = &Snapshot{Memory: "/t/memory"} }, "a memory and a state"},
		{"from and to a snapshot", func(c *Config) { c.MemoryFile, c.Restore = "/m", &Snapshot{"/t/memory", "/t/state"} }, "cannot both come"},
		{"empty extent", func(c *Config) { c.Drives[1].Extents[1].Size = 0 }, "extent 1 needs"},
		{"wire", func(c *Config) { c.Wire.Kind = "radio" }, `kind "radio"`},
		{"wire's file", func(c *Config) { c.Wire.File = nil }, "its file is missing"},
		{"mac", func(c *Config) { c.Wire.MAC = "52:54:00:00:00:0,x=1" }, "MAC address"},
		{"places", func(c *Config) {
			for i := range 3 {
				c.Drives = append(c.Drives, Drive{Serial: fmt.Sprint("more", i), Path: "/x"})
			}
		}, "too many devices: 6 drives make 10, and a microvm has places for 8; leave 2 out"},
		{"root", func(c *Config) { c.RunAs = &Credential{GID: 5} }, "root is what this is there to avoid"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			c := full()
			test.change(&c)
			if err := c.Validate(); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want an error with %q", err, test.want)
			}
		})
	}
	if err := (Config{}).Validate(); err == nil || strings.Count(err.Error(), "\n") != 3 {
		t.Errorf("of an empty config everything missing is named at once: got %v", err)
	}
}

func TestBoundedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path+".old", []byte("of an earlier machine"), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := createBounded(path, 200)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path + ".old"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the predecessor of an earlier machine is still there: %v", err)
	}
	var all []byte
	for i := range 100 {
		line := fmt.Appendf(nil, "line %d\n", i)
		all = append(all, line...)
		if _, err := f.Write(line); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := f.Write(bytes.Repeat([]byte("x"), 500)); err != nil {
		t.Fatal(err)
	}
	all = append(all, bytes.Repeat([]byte("x"), 500)...)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(path + ".old")
	if err != nil {
		t.Fatal(err)
	}
	now, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(old) > 100 || len(now) > 100 || !bytes.HasSuffix(all, now) || !bytes.HasSuffix(old, []byte("line 99\n")) {
		t.Errorf("%q then %q", old, now)
	}
}

func TestTail(t *testing.T) {
	var tl tail
	var all []byte
	for i := range 10000 {
		line := fmt.Appendf(nil, "line %d\n", i)
		all = append(all, line...)
		_, _ = tl.Write(line)
	}
	if got := tl.bytes(); !bytes.Equal(got, all[len(all)-tailSize:]) {
		t.Errorf("%d bytes, not the last %d", len(got), tailSize)
	}
	big := bytes.Repeat([]byte("y"), 10*tailSize)
	_, _ = tl.Write(big)
	if got := tl.bytes(); !bytes.Equal(got, big[:tailSize]) {
		t.Errorf("%d bytes after a large write", len(got))
	}
}
