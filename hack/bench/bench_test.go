package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/kernel"
	"github.com/kcradle/kcradle/vmm"
)

func TestFloorArgs(t *testing.T) {
	// The flags of a real config, so that a change of theirs is noticed here.
	c := vmm.Config{
		Engine: vmm.TCG, QEMU: "qemu", Kernel: "k", Initrd: "i", CommandLine: "quiet", Memory: 256 << 20,
		Drives: []vmm.Drive{{Serial: "scratch", Path: "s"}},
		Wire:   &vmm.Wire{Kind: vmm.WireStream, MAC: "02:00:00:00:00:01"},
	}
	bare := c
	bare.Drives, bare.Wire = nil, nil
	got, err := floorArgs(c.Args(), "KERNEL", "INITRD")
	if err != nil {
		t.Fatal(err)
	}
	want, err := floorArgs(bare.Args(), "KERNEL", "INITRD")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("the floor of a machine with drives and a wire, against one without (-want +got):\n%s", d)
	}
	for _, pair := range [][2]string{
		{"-kernel", "KERNEL"}, {"-initrd", "INITRD"}, {"-append", "quiet"}, {"-chardev", "stdio,id=console,signal=off"}, {"-chardev", "null,id=channel"},
	} {
		found := false
		for i := range len(got) - 1 {
			found = found || got[i] == pair[0] && got[i+1] == pair[1]
		}
		if !found {
			t.Errorf("floor: %s %s is missing in %q", pair[0], pair[1], got)
		}
	}
	if _, err := floorArgs([]string{"-M", "microvm"}, "k", "i"); err == nil {
		t.Error("floor of flags without a kernel: no error")
	}
}

func TestMedian(t *testing.T) {
	for _, test := range []struct {
		in   []float64
		want float64
	}{{[]float64{3}, 3}, {[]float64{1, 3}, 2}, {[]float64{1, 2, 9}, 2}} {
		if got := median(test.in); got != test.want {
			t.Errorf("median(%v): got %v, want %v", test.in, got, test.want)
		}
	}
}

func TestFloorBoots(t *testing.T) {
	need.Root(t)
	need.Command(t, vmm.QEMUProgram, "hack/deps test")
	host, err := vmm.Probe(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "vmlinux")
	if err := kernel.Unpack(t.Context(), os.DirFS("../../kernel"), file); err != nil {
		t.Fatal(err)
	}
	cmdline, err := kernel.CommandLine(kernel.Params{})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{dir: dir, qemuPath: host.QEMU.Path}
	archive, err := b.floorInitrd(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c := vmm.Config{
		Engine: host.Engine, QEMU: host.QEMU.Path, Kernel: file, Initrd: archive, CommandLine: cmdline, VCPUs: 2, Memory: 1 << 30,
		Drives: []vmm.Drive{{Serial: "scratch", Path: "s"}},
	}
	if b.floor, err = floorArgs(c.Args(), file, archive); err != nil {
		t.Fatal(err)
	}
	s, err := runFloor(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	if s["first"] <= 0 || s["exit"] < s["first"] {
		t.Errorf("floor: got %v, want a first byte and an exit after it", s)
	}
	t.Logf("%s: first byte after %.2f s, exit after %.2f s", host.Engine, s["first"], s["exit"])
}
