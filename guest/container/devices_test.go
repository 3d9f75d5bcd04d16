package container

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kcradle/kcradle/internal/need"
)

func TestDeviceRules(t *testing.T) {
	var got []string
	for _, r := range deviceRules([]specs.LinuxDevice{{Type: "b", Major: 7, Minor: 0}, {Type: "c", Major: 10, Minor: 200}, {Type: "p"}}) {
		got = append(got, r.String())
	}
	want := []string{"c *:* m", "b *:* m", "c 136:* rwm", "c 5:1 rwm", "c 5:2 rwm", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm",
		"c 1:9 rwm", "c 5:0 rwm", "b 7:0 rwm", "c 10:200 rwm"}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("rules (-want +got):\n%s", d)
	}
}

// interpret runs a device program as the kernel would.
func interpret(t *testing.T, prog []byte, kind, access, major, minor uint32) uint64 {
	t.Helper()
	ctx := []uint32{access<<16 | kind, major, minor}
	var r [11]uint64
	for pc := 0; pc < len(prog); {
		op, regs := prog[pc], prog[pc+1]
		off := int(int16(binary.NativeEndian.Uint16(prog[pc+2:])))
		imm := uint64(int64(int32(binary.NativeEndian.Uint32(prog[pc+4:]))))
		dst, src := regs&15, regs>>4
		pc += 8
		switch op {
		case bpfLoad32:
			r[dst] = uint64(ctx[off/4])
		case bpfMove:
			r[dst] = r[src]
		case bpfMoveImm:
			r[dst] = imm
		case bpfAndImm:
			r[dst] &= imm
		case bpfShiftImm:
			r[dst] >>= imm
		case bpfJumpNeImm:
			if r[dst] != imm {
				pc += 8 * off
			}
		case bpfJumpNe:
			if r[dst] != r[src] {
				pc += 8 * off
			}
		case bpfExit:
			return r[0]
		default:
			t.Fatalf("instruction %#x", op)
		}
	}
	t.Fatal("the program has no end")
	return 0
}

func TestDeviceProgram(t *testing.T) {
	prog := deviceProgram(deviceRules([]specs.LinuxDevice{{Type: "b", Major: 7, Minor: 0}}))
	for _, tt := range []struct {
		name                       string
		kind, access, major, minor uint32
		want                       uint64
	}{
		{"read null", bpfDeviceChar, accessRead, 1, 3, 1},
		{"read and write null", bpfDeviceChar, accessRead | accessWrite, 1, 3, 1},
		{"read mem", bpfDeviceChar, accessRead, 1, 1, 0},
		{"make mem", bpfDeviceChar, accessMknod, 1, 1, 1},
		{"make and read mem", bpfDeviceChar, accessMknod | accessRead, 1, 1, 0},
		{"any terminal", bpfDeviceChar, accessWrite, 136, 12345, 1},
		{"make a disk", bpfDeviceBlock, accessMknod, 254, 0, 1},
		{"read a disk", bpfDeviceBlock, accessRead, 254, 0, 0},
		{"block device with null's numbers", bpfDeviceBlock, accessRead, 1, 3, 0},
		{"asked for", bpfDeviceBlock, accessWrite, 7, 0, 1},
		{"its neighbour", bpfDeviceBlock, accessWrite, 7, 1, 0},
	} {
		if got := interpret(t, prog, tt.kind, tt.access, tt.major, tt.minor); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.name, got, tt.want)
		}
	}
}

// TestLimitDevices has the kernel take the program; that it obeys is tested in a machine, too.
func TestLimitDevices(t *testing.T) {
	need.Root(t)
	f := newFixture(t)
	if err := f.cgroup.LimitDevices(nil); err != nil {
		t.Fatal(err)
	}
	c := f.config("sh", "-c", "mknod /dev/mem1 c 1 1 && head -c1 /dev/mem1; cat /dev/null && echo null")
	out, stderr, _ := f.run(t, c)
	if out != "null\n" || !strings.Contains(stderr, "Operation not permitted") {
		t.Errorf("got %q, %q", out, stderr)
	}
}
