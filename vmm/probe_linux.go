package vmm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/kernel/tsc"
)

// QEMUProgram is the name of QEMU on PATH.
const QEMUProgram = "qemu-system-x86_64"

// MinQEMU is the oldest QEMU that can run a machine: the first with -netdev stream.
var MinQEMU = QEMUVersion{7, 2, 0}

// qemuRemedy installs what is missing.
const qemuRemedy = "install it: apt-get install qemu-system-x86"

// probeDeadline bounds the KVM probe. A processor needs under a millisecond.
const probeDeadline = 25 * time.Millisecond

// Host is what a probe found.
type Host struct {
	Engine Engine `json:"engine"`
	Reason string `json:"reason"` // why this engine, a sentence without a full stop
	Remedy string `json:"remedy"` // what would make KVM usable; empty: nothing is missing, or nothing helps
	QEMU   QEMU   `json:"qemu"`
	TSCKHz uint32 `json:"tsc_khz"` // pace of the time stamp counter, for kernel.Emulated; 0: it has none
	Cached bool   `json:"-"`       // an earlier probe of this boot said so
}

// QEMU is an installed QEMU.
type QEMU struct {
	Path    string      `json:"path"`
	Version QEMUVersion `json:"version"`
}

// QEMUVersion is major, minor, micro.
type QEMUVersion [3]int

// String is the version with dots.
func (v QEMUVersion) String() string { return fmt.Sprintf("%d.%d.%d", v[0], v[1], v[2]) }

// Less says that v is older than w.
func (v QEMUVersion) Less(w QEMUVersion) bool { return slices.Compare(v[:], w[:]) < 0 }

// NoQEMUError says that QEMU is not installed.
type NoQEMUError struct{ Path string }

func (e *NoQEMUError) Error() string {
	return fmt.Sprintf("there is no %s on this host (%s)", e.Path, qemuRemedy)
}

// OldQEMUError says that QEMU is too old.
type OldQEMUError struct{ QEMU QEMU }

func (e *OldQEMUError) Error() string {
	return fmt.Sprintf("%s is version %s, and %s or newer is needed (Debian 12 and later have one: apt-get install qemu-system-x86)", e.QEMU.Path, e.QEMU.Version, MinQEMU)
}

// Probe finds QEMU and the engine that works here. The answer is kept in cacheDir for this boot, as long as QEMU and the
// rights on /dev/kvm stay what they are; cacheDir "" keeps nothing. A missing or too old QEMU is a *NoQEMUError or an
// *OldQEMUError, beside which Host is still what was found.
func Probe(ctx context.Context, cacheDir string) (Host, error) {
	path, err := exec.LookPath(QEMUProgram)
	if err != nil {
		h := Host{}
		h.Engine, h.Reason, h.Remedy = judgeKVM(runsInHardware(probeDeadline))
		return h, &NoQEMUError{Path: QEMUProgram}
	}
	var file string
	key, keyError := probeKey(path)
	if cacheDir != "" && keyError == nil {
		file = filepath.Join(cacheDir, "probe-"+key+".json")
		if h, err := readProbe(file); err == nil && h.QEMU.Path == path {
			return h, tooOld(h)
		}
	}
	h := Host{QEMU: QEMU{Path: path}}
	version := make(chan error, 1)
	go func() {
		var err error
		h.QEMU.Version, err = qemuVersion(ctx, path)
		version <- err
	}()
	pace := make(chan uint32, 1)
	go func() {
		khz, _ := tsc.KHz(ctx) // a counter of no use is not told of
		pace <- khz
	}()
	engine, reason, remedy := judgeKVM(runsInHardware(probeDeadline))
	err = <-version
	h.Engine, h.Reason, h.Remedy, h.TSCKHz = engine, reason, remedy, <-pace
	if err != nil {
		return h, err
	}
	if file != "" {
		if err := keepProbe(file, h); err != nil {
			return h, fmt.Errorf("keep the probe's answer: %w", err)
		}
	}
	return h, tooOld(h)
}

func tooOld(h Host) error {
	if h.QEMU.Version.Less(MinQEMU) {
		return &OldQEMUError{h.QEMU}
	}
	return nil
}

// judgeKVM turns the probe's result into a choice and its reason.
func judgeKVM(err error) (engine Engine, reason, remedy string) {
	const slow = "using QEMU's software emulation"
	switch {
	case err == nil:
		return KVM, "the processor executes guests by itself (KVM)", ""
	case errors.Is(err, errEmulated):
		return TCG, "the processor's virtualization is emulated here: guest kernel code would crawl and die; " + slow, "run on a host whose processor's virtualization is real: bare metal, or a virtual machine with nested virtualization"
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENXIO), errors.Is(err, unix.ENODEV):
		return TCG, "there is no " + kvmDevice + "; " + slow, "turn virtualization on in the firmware and load KVM: modprobe kvm_intel || modprobe kvm_amd"
	case errors.Is(err, fs.ErrPermission):
		return TCG, "this user has no rights on " + kvmDevice + "; " + slow, "usermod -aG kvm $USER, then log in again"
	case errors.Is(err, unix.EBUSY):
		return TCG, "another hypervisor holds the processor's virtualization; " + slow, "stop the other hypervisor"
	default:
		return TCG, fmt.Sprintf("KVM does not work here (%v); %s", err, slow), ""
	}
}

var versionPattern = regexp.MustCompile(`^QEMU emulator version (\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?`)

// qemuVersion asks the program.
func qemuVersion(ctx context.Context, path string) (QEMUVersion, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return QEMUVersion{}, fmt.Errorf("ask %s for its version: %w", path, err)
	}
	return parseVersion(out)
}

func parseVersion(out []byte) (QEMUVersion, error) {
	m := versionPattern.FindSubmatch(out)
	if m == nil {
		line, _, _ := bytes.Cut(out, []byte("\n"))
		return QEMUVersion{}, fmt.Errorf("%q is no version of QEMU", printable(line, 80))
	}
	var v QEMUVersion
	for i := range v {
		v[i], _ = strconv.Atoi(string(m[i+1])) // empty: 0
	}
	return v, nil
}

// probeKey is a digest of everything that shapes the answer.
func probeKey(qemu string) (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	info, err := os.Stat(qemu)
	if err != nil {
		return "", err
	}
	groups, err := os.Getgroups()
	if err != nil {
		return "", err
	}
	slices.Sort(groups)
	rights := "none"
	if info, err := os.Stat(kvmDevice); err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			rights = fmt.Sprint(st.Mode, st.Uid, st.Gid, st.Rdev)
		}
		// Access lists and sandboxes decide too.
		if f, err := os.OpenFile(kvmDevice, os.O_RDWR, 0); err == nil {
			_ = f.Close()
			rights += " opens"
		}
	}
	_, intel := os.Stat("/sys/module/kvm_intel")
	_, amd := os.Stat("/sys/module/kvm_amd")
	sum := sha256.Sum256([]byte(strings.Join([]string{
		"2", // of this list and of Host
		string(boot), qemu, info.ModTime().UTC().Format(time.RFC3339Nano), strconv.FormatInt(info.Size(), 10),
		rights, fmt.Sprint(os.Geteuid(), os.Getegid(), groups), fmt.Sprint(intel == nil, amd == nil),
	}, "\x00")))
	return hex.EncodeToString(sum[:8]), nil
}

// maxProbe bounds a kept answer.
const maxProbe = 16 << 10

func readProbe(file string) (Host, error) {
	f, err := os.Open(file)
	if err != nil {
		return Host{}, err
	}
	defer f.Close()
	buf := make([]byte, maxProbe)
	n, err := f.Read(buf)
	if err != nil {
		return Host{}, err
	}
	var h Host
	if err := json.Unmarshal(buf[:n], &h); err != nil {
		return Host{}, err
	}
	if h.Engine != KVM && h.Engine != TCG {
		return Host{}, fmt.Errorf("%s: unknown engine %q", file, h.Engine)
	}
	h.Cached = true
	return h, nil
}

// keepProbe replaces every older answer: there is one per directory.
func keepProbe(file string, h Host) error {
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, ".probe-")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if e := f.Close(); err == nil {
		err = e
	}
	if err == nil {
		err = os.Rename(f.Name(), file)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	old, _ := filepath.Glob(filepath.Join(dir, "probe-*.json"))
	for _, o := range old {
		if o != file {
			_ = os.Remove(o)
		}
	}
	return nil
}
