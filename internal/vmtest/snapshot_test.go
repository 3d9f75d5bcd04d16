package vmtest

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/vmm"
)

// blank are two drives without contents.
func blank() []vmm.Drive {
	return []vmm.Drive{{Serial: spec.SerialScratch, Blank: true}, {Serial: spec.SerialLayers, ReadOnly: true, Blank: true}}
}

// template makes a snapshot of the test's guest, with memory that a file of its own does not share with the next test.
func template(t *testing.T, o Options) vmm.Snapshot {
	t.Helper()
	dir := t.TempDir()
	s := vmm.Snapshot{Memory: filepath.Join(dir, "memory"), State: filepath.Join(dir, "state")}
	o.MemoryFile = s.Memory
	vm := Boot(t, o)
	control(vm).ask("read /proc/version") // it is up, and its host says nothing of its going
	begun := time.Now()
	if err := vm.Snapshot(vm.Context(), s.State); err != nil {
		t.Fatal(err)
	}
	vm.Kill()
	vm.Wait()
	info, err := os.Stat(s.State)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("snapshot in %v, state of %d KiB, memory of %d MiB", time.Since(begun).Round(time.Millisecond), info.Size()>>10, blocks(t, s.Memory)>>20)
	return s
}

// sum is the checksum of a file.
func sum(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", sha256.Sum256(b))
}

// A restored machine has other files behind its drives, and leaves the snapshot as it is.
func TestRestore(t *testing.T) {
	o := Options{InitFile: Build(t, guest), Drives: blank(), RunAs: nobody()}
	s := template(t, o)
	before := sum(t, s.Memory)
	o.Restore = &s
	for i := range 3 {
		file := filepath.Join(t.TempDir(), "layer")
		contents := fmt.Appendf(nil, "%4096d", i)
		if err := os.WriteFile(file, contents, 0o600); err != nil {
			t.Fatal(err)
		}
		scratch := filepath.Join(t.TempDir(), "scratch")
		if err := os.WriteFile(scratch, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
		o.Drives[0] = vmm.Drive{Serial: spec.SerialScratch, Path: scratch}
		o.Drives[1] = vmm.Drive{Serial: spec.SerialLayers, ReadOnly: true, Extents: []vmm.Extent{{Path: file, Size: 4096}}}
		begun := time.Now()
		vm := Boot(t, o)
		c := control(vm)
		answer := c.ask("disk layers 4096")
		t.Logf("first answer after %v", time.Since(begun).Round(time.Millisecond))
		if want := fmt.Sprintf("vdb 4096 ro=1 %x", sha256.Sum256(contents)); answer != want {
			t.Errorf("got %q, want %q", answer, want)
		}
		c.ask("fill scratch %d 1", i+1)
		vm.Kill()
		vm.Wait()
		if b, err := os.ReadFile(scratch); err != nil || len(b) != 1<<20 || b[77] != byte(i+1) {
			t.Errorf("what the guest wrote did not reach the file: %d bytes, %v", len(b), err)
		}
	}
	if after := sum(t, s.Memory); after != before {
		t.Error("the snapshot's memory has changed")
	}
}

// What a restored guest frees goes back to the host, and is not cut out of the snapshot that it shares with others.
func TestRestoredMemoryGoesBack(t *testing.T) {
	o := Options{InitFile: Build(t, guest), Memory: 512 << 20, RunAs: nobody()}
	s := template(t, o)
	before, taken := sum(t, s.Memory), blocks(t, s.Memory)
	o.Restore = &s
	vm := Boot(t, o)
	memoryGoesBack(t, vm)
	if sum(t, s.Memory) != before || blocks(t, s.Memory) != taken {
		t.Error("the snapshot's memory has changed")
	}
}

func nobody() *vmm.Credential {
	if os.Geteuid() != 0 {
		return nil
	}
	return &vmm.Credential{UID: 65534, GID: 65534}
}

// The contents of a drive come and go under a running guest.
func TestAttach(t *testing.T) {
	vm := Boot(t, Options{Init: guest, Drives: blank(), RunAs: nobody()})
	c := control(vm)
	if got, want := c.ask("disk layers 4096"), fmt.Sprintf("vdb 4096 ro=1 %x", sha256.Sum256(make([]byte, 4096))); got != want {
		t.Errorf("blank: got %q, want %q", got, want)
	}
	for i := range 3 {
		var extents []vmm.Extent
		var contents []byte
		for j := range i + 1 {
			file := filepath.Join(t.TempDir(), fmt.Sprint("layer", j))
			part := fmt.Appendf(nil, "%4096d", 10*i+j)
			if err := os.WriteFile(file, part, 0o600); err != nil {
				t.Fatal(err)
			}
			extents, contents = append(extents, vmm.Extent{Path: file, Size: 4096}), append(contents, part...)
		}
		if err := vm.Attach(vm.Context(), vmm.Drive{Serial: spec.SerialLayers, ReadOnly: true, Extents: extents}); err != nil {
			t.Fatal(err)
		}
		if got, want := c.ask("disk layers %d", len(contents)), fmt.Sprintf("vdb %d ro=1 %x", len(contents), sha256.Sum256(contents)); got != want {
			t.Errorf("attached: got %q, want %q", got, want)
		}
	}
	if err := vm.Attach(vm.Context(), blank()[1]); err != nil {
		t.Fatal(err)
	}
	if err := vm.Attach(vm.Context(), vmm.Drive{Serial: spec.SerialLayers, Path: "/dev/null"}); err == nil {
		t.Error("a drive that is read-only was made writable")
	}
	if err := vm.Attach(vm.Context(), vmm.Drive{Serial: "other", Path: "/dev/null"}); err == nil {
		t.Error("a drive was attached to no device")
	}
}

// A machine is given away, standing still, and goes on in other hands with other drives; its end is told.
func TestHandover(t *testing.T) {
	o := Options{InitFile: Build(t, guest), Drives: blank(), Memory: 512 << 20, RunAs: nobody()}
	s := template(t, o)
	for _, restored := range []bool{false, true} {
		t.Run(fmt.Sprint("restored ", restored), func(t *testing.T) {
			o := o
			o.Transfer = true
			if restored {
				o.Restore = &s
			}
			vm := Boot(t, o)
			control(vm).ask("read /proc/version")
			h, err := vm.Give(vm.Context())
			if err != nil {
				t.Fatal(err)
			}
			if !h.Alive() {
				t.Fatal("it died")
			}
			file := filepath.Join(t.TempDir(), "layer")
			contents := fmt.Appendf(nil, "%4096d", 1)
			if err := os.WriteFile(file, contents, 0o600); err != nil {
				t.Fatal(err)
			}
			o.Drives = []vmm.Drive{blank()[0], {Serial: spec.SerialLayers, ReadOnly: true, Extents: []vmm.Extent{{Path: file, Size: 4096}}}}
			begun := time.Now()
			adopted := Adopt(t, h, o)
			answer := control(adopted).ask("disk layers 4096")
			t.Logf("first answer after %v", time.Since(begun).Round(time.Millisecond))
			if want := fmt.Sprintf("vdb 4096 ro=1 %x", sha256.Sum256(contents)); answer != want {
				t.Errorf("got %q, want %q", answer, want)
			}
			if restored {
				memoryGoesBack(t, adopted) // the warden has changed hands, too
			}
			control(adopted).send("restart")
			if x := adopted.Wait(); x.Reason != vmm.GuestReset {
				t.Errorf("it ended: %+v", x)
			}
		})
	}
}

// A machine that nobody has in his hands any more is killed.
func TestHandoverDropped(t *testing.T) {
	vm := Boot(t, Options{Init: guest, Drives: blank(), RunAs: nobody(), Transfer: true})
	control(vm).ask("read /proc/version")
	h, err := vm.Give(vm.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := h.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-vm.Done():
	case <-time.After(10 * time.Second):
		t.Fatal("it lives")
	}
	if x := vm.Wait(); x.Signal != syscall.SIGKILL {
		t.Errorf("it ended: %+v", x)
	}
}
