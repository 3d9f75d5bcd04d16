package main

import (
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/network"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
)

func TestStep(t *testing.T) {
	const mib = 1 << 20
	for in, want := range map[int64]int64{1: 128 * mib, 128 * mib: 128 * mib, 128*mib + 1: 160 * mib, 256 * mib: 256 * mib, 257 * mib: 320 * mib, 1109 * mib: 1280 * mib, 7000 * mib: 7 << 30} {
		if got := step(in); got != want {
			t.Errorf("%d MiB: got %d, want %d", in/mib, got/mib, want/mib)
		}
	}
	for m := int64(130 * mib); m < 64<<30; m = m*11/10 + 12345 {
		if got := step(m); got < m || got > m+m/3 {
			t.Errorf("%d: got %d", m, got)
		}
	}
}

func TestMachineConfig(t *testing.T) {
	pod := &spec.Pod{Name: "shop", Containers: []spec.Container{{Name: "a"}}}
	layers := []bundle.Layer{{DiffID: "sha256:aa", Path: "/s/aa", Size: 5000}, {DiffID: "sha256:bb", Path: "/s/bb", Size: 8192}}
	volumes := []bundle.Volume{{Name: "data", Path: "/b/volumes/data.ext4", Size: 1 << 30}, {Name: "more", Path: "/b/volumes/more.ext4", Size: 5000}}
	got := machineConfig(machineInput{
		Bundle: &bundle.Bundle{Dir: "/b"}, Pod: pod, Layers: layers, Volumes: volumes, Engine: vmm.TCG, QEMU: "/qemu", HostCPUs: 8, TSCKHz: 2_000_000,
		Package: &bundle.Package{Dir: "/p", Manifest: bundle.Manifest{CommandLine: "quiet"}},
	})
	want := vmm.Config{
		Name: "kcradle:shop", Engine: vmm.TCG, QEMU: "/qemu", Kernel: "/p/vmlinux", Initrd: "/p/initrd.cpio",
		CommandLine: "quiet tsc_early_khz=2000000 tsc=reliable mitigations=off GODEBUG=cpu.sse42=off nolapic_timer",
		VCPUs:       1, Memory: 1280 << 20, Console: "/b/run/console.log",
		Drives: []vmm.Drive{
			{Serial: "scratch", Path: "/b/scratch.ext4"},
			{Serial: "layers", ReadOnly: true, Extents: []vmm.Extent{{Path: "/s/aa", Size: 5000}, {Path: "/s/bb", Size: 8192}}},
			{Serial: "volume0", Path: "/b/volumes/data.ext4"}, {Serial: "volume1", Path: "/b/volumes/more.ext4"},
		},
	}
	if d := cmp.Diff(want, got, cmpopts.IgnoreUnexported(vmm.Config{})); d != "" {
		t.Errorf("machine (-want +got):\n%s", d)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
	for hostCPUs, want := range map[int]int{1: 1, 2: 2, 64: defaultVCPUs} {
		in := machineInput{Bundle: &bundle.Bundle{}, Pod: pod, Package: &bundle.Package{}, Engine: vmm.KVM, HostCPUs: hostCPUs, TSCKHz: 1}
		got := machineConfig(in)
		if got.VCPUs != want {
			t.Errorf("vCPUs on a host with %d: got %d, want %d", hostCPUs, got.VCPUs, want)
		}
		if got.CommandLine != "" {
			t.Errorf("a machine under KVM is told %q, which is for emulated ones", got.CommandLine)
		}
	}
	wire := &vmm.Wire{Kind: vmm.WireTap, File: os.Stderr, MAC: "02:00:00:00:00:01"}
	for n, want := range map[int]uint32{2: 5, 3: 0, 4: 5, 16: 5} {
		c := machineConfig(machineInput{
			Bundle: &bundle.Bundle{Dir: "/b"}, Pod: pod, Layers: layers, Volumes: slices.Repeat(volumes, n)[:n], Package: &bundle.Package{Dir: "/p"},
			Engine: vmm.KVM, QEMU: "/qemu", HostCPUs: 1, Wire: wire, CID: 5,
		})
		if c.CID != want {
			t.Errorf("with %d volumes: got context id %d, want %d", n, c.CID, want)
		}
		if err := c.Validate(); err != nil {
			t.Errorf("with %d volumes: %v", n, err)
		}
	}
	wantExtents := []spec.Extent{{DiffID: "sha256:aa", Offset: 0, Length: 8192}, {DiffID: "sha256:bb", Offset: 8192, Length: 8192}}
	if d := cmp.Diff(wantExtents, extents(layers)); d != "" {
		t.Errorf("extents (-want +got):\n%s", d)
	}
	if d := cmp.Diff([]spec.Drive{{Name: "data", Serial: "volume0"}, {Name: "more", Serial: "volume1"}}, volumeDrives(volumes)); d != "" {
		t.Errorf("volumes (-want +got):\n%s", d)
	}
	shared := []spec.Drive{
		{Name: "data", Serial: "volumes", Length: 1 << 30}, {Name: "more", Serial: "volumes", Offset: 1 << 30, Length: 8192},
		{Name: "data", Serial: "volumes", Offset: 1<<30 + 8192, Length: 1 << 30}, {Name: "more", Serial: "volumes", Offset: 2<<30 + 8192, Length: 8192},
	}
	if d := cmp.Diff(shared, volumeDrives(slices.Repeat(volumes, 2))); d != "" {
		t.Errorf("volumes on one device (-want +got):\n%s", d)
	}
}

func TestPodMemory(t *testing.T) {
	limit := func(n int64) spec.Container {
		return spec.Container{Resources: spec.Resources{LinuxResources: specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &n}}}}
	}
	for _, tt := range []struct {
		name string
		pod  spec.Pod
		want int64
	}{
		{"nothing said", spec.Pod{Containers: []spec.Container{{}}}, defaultMemory},
		{"the pod's own", spec.Pod{Memory: 64 << 20, Containers: []spec.Container{limit(1 << 40)}}, 64 << 20},
		{"small limits", spec.Pod{Containers: []spec.Container{limit(64 << 20), {}}}, defaultMemory},
		{"large limits", spec.Pod{Containers: []spec.Container{limit(1 << 30), limit(2 << 30)}}, 3 << 30},
	} {
		if got := podMemory(&tt.pod); got != tt.want {
			t.Errorf("%s: got %d, want %d", tt.name, got, tt.want)
		}
	}
}

func TestGuestNetwork(t *testing.T) {
	got := guestNetwork(network.User, network.Guest{
		Interfaces: []network.Interface{
			{
				MAC: net.HardwareAddr{2, 0, 0, 0, 0, 1}, MTU: 1500, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.2.15/24")},
				Gateways: []netip.Addr{netip.MustParseAddr("10.0.2.2")},
			},
			{Tag: 3, MAC: net.HardwareAddr{2, 0, 0, 0, 0, 2}, MTU: 1400, Addresses: []netip.Prefix{netip.MustParsePrefix("172.18.0.2/16")}},
		},
		DNS: []netip.Addr{netip.MustParseAddr("10.0.2.3")}, Resolver: true,
		Search: []string{"example.org"}, HostIP: netip.MustParseAddr("10.0.2.2"),
	}, []network.Port{{Proto: "tcp", HostIP: netip.MustParseAddr("127.0.0.1"), HostPort: 8080, ContainerPort: 80}})
	want := spec.Network{
		Mode: "user", DNS: []string{"10.0.2.3"}, DNSSearch: []string{"example.org"}, HostIP: "10.0.2.2", Resolver: true,
		Interfaces: []spec.Interface{
			{Name: "eth0", MAC: "02:00:00:00:00:01", MTU: 1500, Addresses: []string{"10.0.2.15/24"}, Gateways: []string{"10.0.2.2"}},
			{Name: "eth3", Tag: 3, MAC: "02:00:00:00:00:02", MTU: 1400, Addresses: []string{"172.18.0.2/16"}},
		},
		Published: []spec.Port{{Proto: "tcp", HostIP: "127.0.0.1", HostPort: 8080, ContainerPort: 80}},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("network (-want +got):\n%s", d)
	}
	if got := guestNetwork(network.None, network.Guest{}, nil); len(got.Interfaces) != 0 || got.Mode != "none" {
		t.Errorf("none: got %+v", got)
	}
}

func TestPublishRoundTrip(t *testing.T) {
	ports, err := parsePublish([]string{"127.0.0.1:8000-8005:80/udp", "81"})
	if err != nil {
		t.Fatal(err)
	}
	want := []spec.Port{{Proto: "udp", HostIP: "127.0.0.1", HostPort: 8000, HostPortEnd: 8005, ContainerPort: 80}, {Proto: "tcp", ContainerPort: 81}}
	if d := cmp.Diff(want, ports); d != "" {
		t.Errorf("ports (-want +got):\n%s", d)
	}
	back, err := networkPorts(ports)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, specPorts(back)); d != "" {
		t.Errorf("ports there and back (-want +got):\n%s", d)
	}
	if _, err := parsePublish([]string{"1:2:3:4:5"}); err == nil || !strings.Contains(err.Error(), "invalid argument") {
		t.Errorf("nonsense: got %v", err)
	}
}

// The exit code of a pod is the first failure of a critical container.
func TestPodExit(t *testing.T) {
	p := &spec.Pod{Containers: []spec.Container{{Name: "a", NonCritical: true}, {Name: "b"}, {Name: "c"}}}
	for _, tt := range []struct {
		name    string
		states  []spec.State
		code    int
		message string
	}{
		{"all well", []spec.State{{}, {}, {}}, 0, ""},
		{"not critical", []spec.State{{ExitCode: 3}, {}, {}}, 0, ""},
		{"the first", []spec.State{{ExitCode: 3}, {ExitCode: 4}, {ExitCode: 5}}, 4, ""},
		{"the second", []spec.State{{}, {}, {ExitCode: 5}}, 5, ""},
		{"could not start", []spec.State{{}, {ExitCode: 127, Error: "not found"}, {}}, 127, "b: not found"},
		{"no code", []spec.State{{}, {Error: "disk on fire"}, {}}, 125, "b: disk on fire"},
	} {
		if code, message := podExit(p, tt.states); code != tt.code || message != tt.message {
			t.Errorf("%s: got %d %q, want %d %q", tt.name, code, message, tt.code, tt.message)
		}
	}
}
