package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kcradle/kcradle/initrd"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/kernel/tsc"
)

const processors = 3 // of the machine; guest expects as many

// TestBoot starts the artefact under QEMU's emulation with guest as /init and three processors. The guest
// tries everything the kernel promises, with the real nft and iptables from a disk, and says what failed. Run it by
//
//	go test ./kernel -run TestBoot -v
//
// KERNEL_UNDER_TEST names another vmlinux, for experiments.
func TestBoot(t *testing.T) {
	need.Long(t)
	dir := t.TempDir()
	tools := toolDisk(t, dir)
	scratch := filepath.Join(dir, "scratch")
	if err := os.WriteFile(scratch, bytes.Repeat([]byte("0123456789abcdef"), 4<<20/16), 0o600); err != nil {
		t.Fatal(err)
	}
	cmdline, err := CommandLine(Params{})
	if err != nil {
		t.Fatal(err)
	}
	khz, err := tsc.KHz(t.Context())
	if err != nil && !errors.Is(err, tsc.ErrUnusable) {
		t.Fatal(err)
	}
	cmdline += " " + Emulated(Emulation{CPUs: processors, TSCKHz: khz})
	if khz != 0 {
		cmdline += " test.clock" // the guest then expects a good one
	}

	log := boot(t, dir, cmdline,
		"-drive", "if=none,id=a,format=raw,readonly=on,file="+tools, "-device", "virtio-blk-device,drive=a",
		"-drive", "if=none,id=b,format=raw,file="+scratch, "-device", "virtio-blk-device,drive=b")
	passed, done := 0, false
	for line := range strings.Lines(log) {
		_, text, ok := strings.Cut(strings.TrimSpace(line), "guest: ")
		switch {
		case !ok:
		case text == "done":
			done = true
		case strings.HasPrefix(text, "FAIL "):
			t.Error(text)
		case strings.HasPrefix(text, "ok "):
			passed++
		}
	}
	if !done {
		t.Error("the machine ended early")
	}
	if t.Failed() {
		t.Logf("console:\n%s", log)
	}
	t.Logf("%d checks passed (emulated: TCG)", passed)
	if passed == 0 {
		t.Error("no check passed")
	}
}

// TestPanic: a panic leaves its words on the console and ends QEMU at once.
func TestPanic(t *testing.T) {
	need.Long(t)
	cmdline, err := CommandLine(Params{})
	if err != nil {
		t.Fatal(err)
	}
	log := boot(t, t.TempDir(), cmdline+" test.panic")
	if !strings.Contains(log, "Kernel panic - not syncing: sysrq triggered crash") {
		t.Errorf("no panic on the console:\n%s", log)
	}
}

// boot runs one machine with guest as /init to its end and returns what was on its console.
func boot(t *testing.T, dir, cmdline string, devices ...string) string {
	t.Helper()
	qemu := need.Command(t, "qemu-system-x86_64", "apt-get install qemu-system-x86")
	vmlinux := os.Getenv("KERNEL_UNDER_TEST")
	if vmlinux == "" {
		vmlinux = filepath.Join(dir, "vmlinux")
		if err := Unpack(t.Context(), os.DirFS("."), vmlinux); err != nil {
			t.Fatal(err)
		}
	}
	init := filepath.Join(dir, "init")
	goBuild(t, "amd64", init, "./guest")
	archive := filepath.Join(dir, "initrd.cpio")
	if err := initrd.Write(t.Context(), archive, init); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	args := []string{"-accel", "tcg,thread=single", "-cpu", "max", "-m", "512", "-smp", strconv.Itoa(processors),
		"-M", "microvm,acpi=off,x-option-roms=off,isa-serial=off", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-chardev", "stdio,id=log,signal=off", "-device", "virtio-serial-device", "-device", "virtconsole,chardev=log",
		"-device", "virtio-rng-device", "-device", "virtio-balloon-device,free-page-reporting=on",
		"-kernel", vmlinux, "-initrd", archive, "-append", cmdline}
	cmd := exec.CommandContext(ctx, qemu, append(args, devices...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("qemu: %v\n%s", err, stderr.Bytes())
	}
	return string(out)
}

func goBuild(t *testing.T, arch, out, pkg string) {
	t.Helper()
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
	if b, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build %s: %v\n%s", pkg, err, b)
	}
}

// toolDisk makes an EROFS image with nft, iptables, what they load, and the files of testdata.
func toolDisk(t *testing.T, dir string) string {
	t.Helper()
	mkfs := need.Command(t, "mkfs.erofs", "apt-get install erofs-utils")
	busybox := need.Command(t, "busybox", "apt-get install busybox-static")
	root := filepath.Join(dir, "root")
	for _, d := range []string{"bin", "dev", "etc", "proc", "run", "tmp", "usr/sbin", "lib64"} {
		if err := os.MkdirAll(filepath.Join(root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"sleep", "true"} {
		copyFile(t, busybox, filepath.Join(root, "bin", name))
	}
	nft := need.Command(t, "nft", "apt-get install nftables")
	xtables := need.Command(t, "xtables-nft-multi", "apt-get install iptables")
	legacy := need.Command(t, "xtables-legacy-multi", "apt-get install iptables")
	copyFile(t, nft, filepath.Join(root, "usr/sbin/nft"))
	for _, name := range []string{"iptables-nft-restore", "ip6tables-nft-restore"} {
		copyFile(t, xtables, filepath.Join(root, "usr/sbin", name))
	}
	for _, name := range []string{"iptables-legacy-restore", "ip6tables-legacy-restore"} {
		copyFile(t, legacy, filepath.Join(root, "usr/sbin", name))
	}
	extensions, err := filepath.Glob("/usr/lib/*/xtables/*.so")
	if err != nil || len(extensions) == 0 {
		t.Fatalf("no extensions of iptables (%v)", err)
	}
	for _, e := range extensions {
		copyFile(t, e, filepath.Join(root, e))
	}
	for _, lib := range libraries(t, slices.Concat([]string{nft, xtables, legacy}, extensions)) {
		copyFile(t, lib, filepath.Join(root, lib))
	}
	copyFile(t, "/etc/protocols", filepath.Join(root, "etc/protocols"))
	copyFile(t, ConfigFile, filepath.Join(root, "etc", ConfigFile))
	rules, err := filepath.Glob("testdata/rules/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		copyFile(t, r, filepath.Join(root, "etc", filepath.Base(r)))
	}
	goBuild(t, "386", filepath.Join(root, "etc/hello386"), "./testdata/hello386")
	small := filepath.Join(dir, "small")
	if err := os.MkdirAll(small, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(small, "hello"), []byte("hello\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "tools.erofs")
	for _, args := range [][]string{{filepath.Join(root, "etc/small.erofs"), small}, {"-zlz4", image, root}} {
		if b, err := exec.Command(mkfs, args...).CombinedOutput(); err != nil {
			t.Fatalf("mkfs.erofs: %v\n%s", err, b)
		}
	}
	return image
}

var libraryPath = regexp.MustCompile(`(?m)(/\S+) \(0x`)

// libraries returns what the dynamic linker loads for the programs, by its own words.
func libraries(t *testing.T, programs []string) []string {
	t.Helper()
	out, err := exec.Command(need.Command(t, "ldd", "apt-get install libc-bin"), programs...).Output()
	if err != nil {
		t.Fatalf("ldd: %v", err)
	}
	var libs []string
	for _, m := range libraryPath.FindAllStringSubmatch(string(out), -1) {
		libs = append(libs, m[1])
	}
	slices.Sort(libs)
	return slices.Compact(libs)
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, b, 0o755); err != nil {
		t.Fatal(fmt.Errorf("copy: %w", err))
	}
}
