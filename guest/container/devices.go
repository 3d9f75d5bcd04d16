package container

import (
	"encoding/binary"
	"fmt"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// What a container may do with a device node: access bits of linux/bpf.h, BPF_DEVCG_ACC_*.
const (
	accessMknod = 1
	accessRead  = 2
	accessWrite = 4
	accessAll   = accessMknod | accessRead | accessWrite
)

// deviceRule allows accesses to devices. Everything else is refused.
type deviceRule struct {
	kind         byte  // 'c' or 'b'
	major, minor int64 // -1: any
	access       int
}

func (r deviceRule) String() string {
	num := func(n int64) string {
		if n < 0 {
			return "*"
		}
		return fmt.Sprint(n)
	}
	var access strings.Builder
	for _, a := range []struct {
		bit  int
		name byte
	}{{accessRead, 'r'}, {accessWrite, 'w'}, {accessMknod, 'm'}} {
		if r.access&a.bit != 0 {
			access.WriteByte(a.name)
		}
	}
	return fmt.Sprintf("%c %s:%s %s", r.kind, num(r.major), num(r.minor), &access)
}

// deviceRules are docker's: the nodes that every container has, terminals, the nodes that were asked for; any node may
// be made, few may be opened. In particular the machine's disks may not, which hold the other containers' files.
func deviceRules(devices []specs.LinuxDevice) []deviceRule {
	rules := []deviceRule{
		{'c', -1, -1, accessMknod},
		{'b', -1, -1, accessMknod},
		{'c', 136, -1, accessAll}, // pseudo terminals
		{'c', 5, 1, accessAll},    // console
		{'c', 5, 2, accessAll},    // ptmx
	}
	for _, d := range defaultDevices {
		rules = append(rules, deviceRule{'c', int64(d.major), int64(d.minor), accessAll})
	}
	for _, d := range devices {
		r := deviceRule{'c', d.Major, d.Minor, accessAll}
		switch d.Type {
		case "b":
			r.kind = 'b'
		case "p":
			continue
		}
		rules = append(rules, r)
	}
	return rules
}

// Instructions of linux/bpf.h, as far as the program needs them.
const (
	bpfLoad32    = 0x61 // dst = *(u32 *)(src + off)
	bpfMove      = 0xbf // dst = src
	bpfMoveImm   = 0xb7 // dst = imm
	bpfAndImm    = 0x57 // dst &= imm
	bpfShiftImm  = 0x77 // dst >>= imm
	bpfJumpNeImm = 0x55 // if dst != imm goto pc + off
	bpfJumpNe    = 0x5d // if dst != src goto pc + off
	bpfExit      = 0x95

	bpfDeviceBlock = 1
	bpfDeviceChar  = 2
)

// insn is struct bpf_insn.
type insn struct {
	op       byte
	dst, src byte
	off      int16
	imm      int32
}

// deviceProgram is a program of type BPF_PROG_TYPE_CGROUP_DEVICE: the kernel calls it with a struct bpf_cgroup_dev_ctx
// (access in the upper half and type in the lower half of the first word, major, minor) and lets the access happen when
// it returns 1.
func deviceProgram(rules []deviceRule) []byte {
	const ctx, kind, access, major, minor = 1, 2, 3, 4, 5
	prog := []insn{
		{bpfLoad32, kind, ctx, 0, 0},
		{bpfMove, access, kind, 0, 0},
		{bpfAndImm, kind, 0, 0, 0xffff},
		{bpfShiftImm, access, 0, 0, 16},
		{bpfLoad32, major, ctx, 4, 0},
		{bpfLoad32, minor, ctx, 8, 0},
	}
	for _, r := range rules {
		var tests []insn // each jumps to the next rule
		k := int32(bpfDeviceChar)
		if r.kind == 'b' {
			k = bpfDeviceBlock
		}
		tests = append(tests, insn{bpfJumpNeImm, kind, 0, 0, k})
		if r.access != accessAll {
			tests = append(tests,
				insn{bpfMove, ctx, access, 0, 0},
				insn{bpfAndImm, ctx, 0, 0, int32(r.access)},
				insn{bpfJumpNe, ctx, access, 0, 0})
		}
		if r.major >= 0 {
			tests = append(tests, insn{bpfJumpNeImm, major, 0, 0, int32(r.major)})
		}
		if r.minor >= 0 {
			tests = append(tests, insn{bpfJumpNeImm, minor, 0, 0, int32(r.minor)})
		}
		tests = append(tests, insn{bpfMoveImm, 0, 0, 0, 1}, insn{bpfExit, 0, 0, 0, 0})
		for i := range tests {
			if tests[i].op == bpfJumpNeImm || tests[i].op == bpfJumpNe {
				tests[i].off = int16(len(tests) - i - 1)
			}
		}
		prog = append(prog, tests...)
	}
	prog = append(prog, insn{bpfMoveImm, 0, 0, 0, 0}, insn{bpfExit, 0, 0, 0, 0})
	b := make([]byte, 0, 8*len(prog))
	for _, i := range prog {
		b = append(b, i.op, i.src<<4|i.dst)
		b = binary.NativeEndian.AppendUint16(b, uint16(i.off))
		b = binary.NativeEndian.AppendUint32(b, uint32(i.imm))
	}
	return b
}

// LimitDevices lets the processes of the cgroup open docker's devices and these, no others.
func (g *Cgroup) LimitDevices(devices []specs.LinuxDevice) error {
	fd, err := g.open("")
	if err != nil {
		return err
	}
	defer closeFD(fd)
	if err := attachDeviceProgram(fd, deviceProgram(deviceRules(devices))); err != nil {
		return fmt.Errorf("limit the devices of cgroup %s: %w", g.dir, err)
	}
	return nil
}
