package guest_test

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kcradle/kcradle/guest/guesttest"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/internal/vmtest"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
)

// The tests of this file boot the real init in a real machine:
//
//	go test ./guest -run TestVM -v

// disks are the drives of a machine with a busybox image of two layers.
type disks struct {
	drives []vmm.Drive
	place  spec.Placement
	layers []string
}

func makeDisks(t testing.TB, volumes ...string) *disks {
	t.Helper()
	need.Root(t)
	erofs := need.Command(t, "mkfs.erofs", "apt-get install erofs-utils")
	dir := t.TempDir()
	top := filepath.Join(dir, "top")
	for name, content := range map[string]string{"etc/motd": "from the upper layer\n", "srv/data/seed": "seed\n"} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(top, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(top, name), []byte(content), 0o640); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chown(filepath.Join(top, "srv/data"), 1000, 1000); err != nil {
		t.Fatal(err)
	}
	d := &disks{}
	layers := vmm.Drive{Serial: spec.SerialLayers, ReadOnly: true}
	var offset int64
	for i, root := range []string{guesttest.Busybox(t), top} {
		img := filepath.Join(dir, "layer"+string(rune('0'+i)))
		if out, err := exec.Command(erofs, img, root).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.erofs: %v\n%s", err, out)
		}
		info, err := os.Stat(img)
		if err != nil {
			t.Fatal(err)
		}
		size := (info.Size() + vmm.ExtentAlignment - 1) &^ (vmm.ExtentAlignment - 1)
		id := "sha256:" + strings.Repeat(string(rune('a'+i)), 64)
		layers.Extents = append(layers.Extents, vmm.Extent{Path: img, Size: info.Size()})
		d.place.Layers = append(d.place.Layers, spec.Extent{DiffID: id, Offset: offset, Length: size})
		d.layers = append(d.layers, id)
		offset += size
	}
	d.drives = append(d.drives, layers, vmm.Drive{Serial: spec.SerialScratch, Path: ext4(t, filepath.Join(dir, "scratch"))})
	for i, name := range volumes {
		d.drives = append(d.drives, vmm.Drive{Serial: spec.VolumeSerial(i), Path: ext4(t, filepath.Join(dir, name))})
		d.place.Volumes = append(d.place.Volumes, spec.Drive{Name: name, Serial: spec.VolumeSerial(i)})
	}
	d.place.Now = time.Now()
	d.place.Entropy = []byte(strings.Repeat("entropy.", 8))
	return d
}

func ext4(t testing.TB, path string) string {
	t.Helper()
	mkfs := need.Command(t, "mkfs.ext4", "apt-get install e2fsprogs")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, 256<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(mkfs, "-q", path).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return path
}

func (d *disks) boot(t testing.TB, o vmtest.Options) *vmtest.VM {
	t.Helper()
	if o.InitFile == "" {
		o.Init = "github.com/kcradle/kcradle/cmd/init"
	}
	o.Drives = d.drives
	return vmtest.Boot(t, o)
}

func TestVM(t *testing.T) {
	need.Long(t)
	d := makeDisks(t, "data")
	vm := d.boot(t, vmtest.Options{})
	c := spec.Container{
		Name: "web", Image: spec.Image{Layers: d.layers},
		Cmd: []string{"sh", "-c", `
cat /etc/motd
cat /proc/self/cgroup
stat -c '%u %a' /srv/data; ls -A /srv/data; cat /srv/data/seed
grep -c . /sys/fs/cgroup/cgroup.controllers; cat /sys/fs/cgroup/memory.max
date +%Y >&2
head -c 8 /dev/random | wc -c
touch /x && mount | grep ' / ' | cut -d' ' -f1-5
ping -c1 -W1 127.0.0.1 | grep -c '1 packets received'
exit 7`},
		Mounts: []spec.Mount{{Type: spec.MountVolume, Source: "data", Target: "/srv/data"}},
	}
	limit := int64(64 << 20)
	c.Resources.Memory = limits(limit)
	began := time.Now()
	conn := vm.Dial(spec.PortControl)
	h := guesttest.Launch(t, conn, &spec.Pod{Containers: []spec.Container{c}, Volumes: []spec.Volume{{Name: "data"}}}, &d.place)
	done := h.Done()
	t.Logf("ready and run in %v; phases: %v", time.Since(began), done.Phases)
	want := "from the upper layer\n0::/\n1000 755\nseed\nseed\n1\n67108864\n8\noverlay on / type overlay\n1\n"
	if got := h.Output(0, 1); got != want {
		t.Errorf("stdout: got %q, want %q; stderr %q", got, want, h.Output(0, 2))
	}
	if got := strings.TrimSpace(h.Output(0, 2)); got != time.Now().UTC().Format("2006") {
		t.Errorf("year in the guest: %q", got)
	}
	if s := h.Status("web", spec.StatusExited); s.ExitCode != 7 {
		t.Errorf("state: %+v", s)
	}
	if !done.Clean {
		t.Errorf("unclean end: %s", done.Message)
	}
	conn.Close()
	if x := vm.Wait(); true {
		t.Logf("console: %s", x.Console)
	}
}

func limits(memory int64) *specs.LinuxMemory { return &specs.LinuxMemory{Limit: &memory} }

// TestVMKinds runs the containers that need a real machine: one that uses up its memory, one with a reaper as its first
// process, a privileged one.
func TestVMKinds(t *testing.T) {
	need.Long(t)
	d := makeDisks(t)
	vm := d.boot(t, vmtest.Options{})
	image := spec.Image{Layers: d.layers}
	pids := int64(50)
	oom := spec.Container{Name: "oom", Image: image, NonCritical: true, Cmd: []string{"sh", "-c", "echo eating; dd if=/dev/zero of=/dev/shm/eaten bs=1M; echo $?; exit 9"}}
	oom.Resources.Memory = limits(32 << 20)
	swap := int64(32 << 20)
	oom.Resources.Memory.Swap = &swap
	reaper := spec.Container{Name: "init", Image: image, Init: true, NonCritical: true, Cmd: []string{"sh", "-c", "test $$ -gt 1 && readlink /proc/1/exe; sleep 0.01 & exit 4"}}
	reaper.After = []spec.Dependency{{Container: "oom", Condition: spec.ConditionStarted}}
	root := spec.Container{Name: "root", Image: image, Privileged: true, Cmd: []string{"sh", "-c", `
ls /dev/vda /dev/dm-0; grep CapEff /proc/self/status; mount -t tmpfs none /mnt 2>/dev/null || (mkdir /mnt && mount -t tmpfs none /mnt) && echo mounted
mkdir /sys/fs/cgroup/sub && echo cgroup; cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/cpu.max; cat /proc/sys/net/ipv4/ip_unprivileged_port_start`}}
	root.Resources.Pids = &specs.LinuxPids{Limit: &pids}
	quota, period := int64(50000), uint64(100000)
	root.Resources.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
	plain := spec.Container{Name: "plain", Image: image, Cmd: []string{"sh", "-c", `
mknod /dev/disk b 254 0 && head -c1 /dev/disk; mkdir /sys/fs/cgroup/sub; mount -t tmpfs none /tmp; cat /dev/null && echo null`}}
	// A health check is a further process in a container.
	checked := spec.Container{Name: "checked", Image: image, NonCritical: true, Cmd: []string{"sleep", "1000"}, Healthcheck: &spec.Healthcheck{
		Test: []string{"CMD-SHELL", "grep -q ^0::/$ /proc/self/cgroup && test $(hostname) = pod"}, Interval: 100 * time.Millisecond, Retries: 1,
	}}
	plain.After = []spec.Dependency{{Container: "checked", Condition: spec.ConditionHealthy}}
	zero := 0
	checked.StopTimeout = &zero
	conn := vm.Dial(spec.PortControl)
	h := guesttest.Launch(t, conn, &spec.Pod{Containers: []spec.Container{oom, reaper, root, checked, plain}}, &d.place)
	for i, want := range []struct {
		name, out string
		code      int
	}{
		{"oom", "eating\n", 0},
		{"init", "/sbin/docker-init\n", 4},
		{"root", "/dev/dm-0\n/dev/vda\nCapEff:\t000001ffffffffff\nmounted\ncgroup\n50\n50000 100000\n0\n", 0},
		{"checked", "", -1},
		{"plain", "null\n", 0},
	} {
		if want.code < 0 {
			continue
		}
		s := h.Status(want.name, spec.StatusExited)
		got := h.Output(i, 1)
		if want.name == "oom" {
			if !s.OOMKilled || !strings.HasPrefix(got, want.out) {
				t.Errorf("oom: got %+v, %q", s, got)
			}
			continue
		}
		if s.ExitCode != want.code || s.OOMKilled || got != want.out {
			t.Errorf("%s: got exit code %d, %q, want %d, %q; stderr %q", want.name, s.ExitCode, got, want.code, want.out, h.Output(i, 2))
		}
	}
	if got := h.Output(4, 2); !strings.Contains(got, "Operation not permitted") {
		t.Errorf("what a plain container may not do: %q", got)
	}
	if done := h.Done(); !done.Clean {
		t.Errorf("unclean end: %s", done.Message)
	}
}

// TestVMRehearsal runs pods one after the other in the same machine, each as if it were the first.
func TestVMRehearsal(t *testing.T) {
	need.Long(t)
	d := makeDisks(t, "data")
	vm := d.boot(t, vmtest.Options{})
	d.place.Rehearsal = true
	seen := map[string]bool{}
	for i := range 3 {
		begun := time.Now()
		if i == 2 {
			d.place.Rehearsal = false
		}
		c := spec.Container{
			Name: "web", Image: spec.Image{Layers: d.layers}, Privileged: true, Init: true,
			Cmd: []string{"sh", "-c", `
wc -l < /proc/mounts; ls /sys/fs/cgroup | grep -c pod; grep -c . /proc/net/dev; ls /dev/dm-* | wc -l
cat /srv/data/runs; echo run >> /srv/data/runs; cat /written 2>&1; echo kept >> /written; ip -o addr show up | wc -l; exit 5`},
			Mounts: []spec.Mount{{Type: spec.MountVolume, Source: "data", Target: "/srv/data"}},
		}
		conn := vm.Dial(spec.PortControl)
		h := guesttest.Launch(t, conn, &spec.Pod{Containers: []spec.Container{c}, Volumes: []spec.Volume{{Name: "data"}}}, &d.place)
		done := h.Done()
		if s := h.Status("web", spec.StatusExited); s.ExitCode != 5 || !done.Clean {
			t.Errorf("run %d: %+v, %+v", i, s, done)
		}
		if i < 2 {
			h.Ended()
		}
		t.Logf("run %d: %v", i, time.Since(begun).Round(time.Millisecond))
		out := h.Output(0, 1)
		if got := strings.Count(out, "run\n"); got != i {
			t.Errorf("run %d: the volume remembers %d: %q, %q", i, got, out, h.Output(0, 2))
		}
		// What is the same in each run: mounts, cgroups, devices, addresses.
		seen[strings.ReplaceAll(strings.ReplaceAll(strings.Replace(out, "cat: can't open '/written': No such file or directory\n", "", 1), "run\n", ""), "kept\n", "")] = true
	}
	if len(seen) != 1 {
		t.Errorf("the machine was not the same in each run: %q", slices.Collect(maps.Keys(seen)))
	}
	if x := vm.Wait(); !x.Orderly() {
		t.Errorf("the machine ended: %+v", x)
	}
}

// TestVMBadDisks has disks that are not what they should be.
func TestVMBadDisks(t *testing.T) {
	need.Long(t)
	for _, tt := range []struct {
		name  string
		spoil func(t *testing.T, d *disks)
		want  string
	}{
		{"no file system", func(t *testing.T, d *disks) {
			if err := os.WriteFile(d.drives[1].Path, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "holds no ext4 file system"},
		{"damaged layer", func(t *testing.T, d *disks) {
			f, err := os.OpenFile(d.drives[0].Extents[1].Path, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
				t.Fatal(err)
			}
		}, "mount layer"},
		{"no scratch", func(t *testing.T, d *disks) { d.drives = d.drives[:1] }, `no drive with the serial number "scratch"`},
		{"layer beyond the drive", func(t *testing.T, d *disks) { d.place.Layers[1].Length += 1 << 30 }, "it does not fit: the drive has"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := makeDisks(t)
			tt.spoil(t, d)
			vm := d.boot(t, vmtest.Options{})
			h := guesttest.Launch(t, vm.Dial(spec.PortControl), &spec.Pod{Containers: []spec.Container{
				{Name: "web", Image: spec.Image{Layers: d.layers}, Cmd: []string{"true"}},
			}}, &d.place)
			if f := h.Failure(); f.Phase != "disks" || !strings.Contains(f.Message, tt.want) {
				t.Errorf("got %+v, want %q", f, tt.want)
			}
			h.Done()
		})
	}
}

// TestVMFullDisk has a container that fills the writable disk: it is told so, what it says afterwards still arrives, the
// machine ends in order, and the next one starts on the same disk.
func TestVMFullDisk(t *testing.T) {
	need.Long(t)
	d := makeDisks(t)
	scratch := d.drives[1].Path
	if err := os.Truncate(scratch, 16<<20); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", scratch).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	run := func(script string) (*guesttest.Host, spec.Done) {
		vm := d.boot(t, vmtest.Options{})
		conn := vm.Dial(spec.PortControl)
		h := guesttest.Launch(t, conn, &spec.Pod{Containers: []spec.Container{
			{Name: "web", Image: spec.Image{Layers: d.layers}, Cmd: []string{"sh", "-c", script}},
		}}, &d.place)
		done := h.Done()
		conn.Close()
		vm.Wait()
		return h, done
	}
	h, done := run("dd if=/dev/zero of=/fill bs=64k 2>&1 | grep -o 'No space left on device'; echo still here; exit 3")
	if got := h.Output(0, 1); got != "No space left on device\nstill here\n" {
		t.Errorf("output: %q, %q", got, h.Output(0, 2))
	}
	if s := h.Status("web", spec.StatusExited); s.ExitCode != 3 || !done.Clean {
		t.Errorf("state %+v, done %+v", s, done)
	}
	h, done = run("rm /fill; sync; echo free > /x && cat /x")
	if got := h.Output(0, 1); got != "free\n" || !done.Clean {
		t.Errorf("second machine: %q, %q, done %+v", got, h.Output(0, 2), done)
	}
}
