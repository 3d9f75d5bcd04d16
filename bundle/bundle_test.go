package bundle

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/spec"
)

var hex64 = strings.Repeat("0123456789abcdef", 4)

func testPod() *spec.Pod {
	return &spec.Pod{
		Version: spec.PodVersion, Name: "web",
		Volumes: []spec.Volume{{Name: "data", Size: 32 << 20}},
		Containers: []spec.Container{{
			ID: hex64, Name: "web", Created: time.Unix(1e9, 0).UTC(),
			Image: spec.Image{Ref: "busybox", ConfigID: "sha256:" + hex64, Layers: []string{"sha256:" + hex64}},
			Cmd:   []string{"sh"},
		}},
	}
}

func testConfig(t *testing.T) Config {
	t.Helper()
	need.Command(t, "mkfs.ext4", "apt-get install e2fsprogs")
	store := t.TempDir()
	layer := filepath.Join(store, "layer")
	if err := os.WriteFile(layer, bytes.Repeat([]byte("erofs"), 1000), 0o644); err != nil {
		t.Fatal(err)
	}
	packages := filepath.Join(store, "packages")
	writePackage(t, filepath.Join(packages, PackageDefault))
	return Config{Pod: testPod(), Layers: map[string]string{"sha256:" + hex64: layer}, Packages: packages,
		Cache: filepath.Join(store, "cache"), ScratchSize: 64 << 20, Writer: "test"}
}

func writePackage(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{kernelFile, initrdFile} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m := Manifest{Name: "default", Kernel: File{Size: int64(len(kernelFile))}, Initrd: File{Size: int64(len(initrdFile))}}
	if err := WriteManifest(dir, m); err != nil {
		t.Fatal(err)
	}
}

// onlyBundle fails when anything but the bundle is left beside it: no temporary directory survives.
func onlyBundle(t *testing.T, parent string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(parent)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("left in %s (-want +got):\n%s", parent, d)
	}
}

func TestWriteAndOpen(t *testing.T) {
	for _, portable := range []bool{false, true} {
		c := testConfig(t)
		c.Portable = portable
		parent := t.TempDir()
		dir := filepath.Join(parent, "vm")
		if _, err := Write(context.Background(), dir, c); err != nil {
			t.Fatal(err)
		}
		onlyBundle(t, parent, "vm")
		b, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(c.Pod, b.Pod); d != "" {
			t.Errorf("pod (-want +got):\n%s", d)
		}
		layers, err := b.Layers()
		if err != nil || len(layers) != 1 || layers[0].Size != 5000 {
			t.Errorf("Layers: got %v, %v", layers, err)
		}
		src, err := os.Stat(c.Layers["sha256:"+hex64])
		if err != nil {
			t.Fatal(err)
		}
		if dst, err := os.Stat(layers[0].Path); err != nil || os.SameFile(src, dst) == portable {
			t.Errorf("portable %v: the layer is the store's file: %v, %v", portable, os.SameFile(src, dst), err)
		}
		if p, err := b.Package(); err != nil || p.Manifest.Name != "default" {
			t.Errorf("Package: got %v, %v", p, err)
		}
		for path, size := range map[string]int64{b.ScratchPath(): 64 << 20, b.VolumePath("data"): 32 << 20} {
			var st unix.Stat_t
			if err := unix.Stat(path, &st); err != nil || st.Size != size {
				t.Errorf("%s: got size %d, %v; want %d", path, st.Size, err, size)
			}
			if st.Blocks*512 > size/4 {
				t.Errorf("%s takes %d bytes: it is not sparse", path, st.Blocks*512)
			}
			if out, err := exec.Command("e2fsck", "-fn", path).CombinedOutput(); err != nil {
				t.Errorf("e2fsck %s: %v\n%s", path, err, out)
			}
			// What a crash of the machine is survived by, and what a kernel would write at the first mount otherwise.
			out, err := exec.Command("dumpe2fs", path).Output()
			if err != nil {
				t.Fatal(err)
			}
			for _, want := range []string{"has_journal", "extent", "metadata_csum", "ITABLE_ZEROED", "Inode size:	          256"} {
				if !strings.Contains(string(out), want) {
					t.Errorf("%s: dumpe2fs does not show %q", path, want)
				}
			}
		}
		// The seed of the interface: another machine package is a link away, and its absence is said in words.
		cradle := filepath.Join(dir, cradleLink)
		if err := os.Remove(cradle); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(PackageSNP, cradle); err != nil {
			t.Fatal(err)
		}
		if _, err := b.Package(); err == nil || !strings.Contains(err.Error(), "the snp machine package is not installed") {
			t.Errorf("Package with cradle -> pkg-snp: got %v", err)
		}
	}
}

func TestWriteRefuses(t *testing.T) {
	c := testConfig(t)
	for _, tt := range []struct {
		name   string
		before func(t *testing.T, dir string)
		change func(*Config)
		want   string
		left   []string // in the parent
	}{
		{name: "something else", before: func(t *testing.T, dir string) { mustWrite(t, filepath.Join(dir, "letter")) },
			want: "holds something else (letter)", left: []string{"vm"}},
		{name: "a file", before: func(t *testing.T, dir string) { mustWrite(t, dir) }, want: "a file of that name", left: []string{"vm"}},
		{name: "a bundle", before: func(t *testing.T, dir string) { mustBundle(t, dir, c) }, want: "--force", left: []string{"vm"}},
		{name: "a running bundle", before: func(t *testing.T, dir string) { hold(t, mustBundle(t, dir, c)) },
			change: func(c *Config) { c.Replace = true }, want: "is running (pid", left: []string{"vm"}},
		{name: "missing layer", change: func(c *Config) { c.Layers = nil }, want: "no file was given"},
		{name: "vanished layer", change: func(c *Config) { c.Layers = map[string]string{"sha256:" + hex64: "/nowhere"} }, want: "/nowhere"},
		{name: "invalid pod", change: func(c *Config) { p := testPod(); p.Name = "A B"; c.Pod = p }, want: "DNS label"},
		{name: "tiny disk", change: func(c *Config) { c.ScratchSize = 4096 }, want: "at least 16 MiB"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			parent := t.TempDir()
			dir := filepath.Join(parent, "vm")
			if tt.before != nil {
				tt.before(t, dir)
			}
			c := c
			if tt.change != nil {
				tt.change(&c)
			}
			if _, err := Write(context.Background(), dir, c); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Write: got %v, want an error with %q", err, tt.want)
			}
			onlyBundle(t, parent, tt.left...)
		})
	}
}

func mustWrite(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func mustBundle(t *testing.T, dir string, c Config) *Bundle {
	t.Helper()
	b, err := Write(context.Background(), dir, c)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func hold(t *testing.T, b *Bundle) {
	t.Helper()
	l, err := b.Lock()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Unlock() })
}

// A replaced bundle keeps the volumes that the new one has too, and nothing else.
func TestReplaceKeepsVolumes(t *testing.T) {
	c := testConfig(t)
	parent := t.TempDir()
	dir := filepath.Join(parent, "vm")
	old := mustBundle(t, dir, c)
	if err := os.WriteFile(old.VolumePath("data"), []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(old.LogPath(hex64), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Replace = true
	c.Pod = testPod()
	c.Pod.Volumes = append(c.Pod.Volumes, spec.Volume{Name: "more", Size: 16 << 20})
	b := mustBundle(t, dir, c)
	onlyBundle(t, parent, "vm")
	if got, err := os.ReadFile(b.VolumePath("data")); string(got) != "mine" {
		t.Errorf("volume data: got %.20q, %v", got, err)
	}
	if _, err := os.Stat(b.LogPath(hex64)); err == nil {
		t.Error("the old log is still there")
	}
	if err := b.Remove(); err != nil {
		t.Fatal(err)
	}
	onlyBundle(t, parent)
}

// A disk that is full while the bundle is written leaves nothing behind.
func TestWriteFullDisk(t *testing.T) {
	need.Root(t)
	c := testConfig(t)
	c.Portable = true
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, make([]byte, 4<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	c.Layers = map[string]string{"sha256:" + hex64: big}
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	if _, err := Write(context.Background(), filepath.Join(small, "vm"), c); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("Write on a full disk: got %v, want ENOSPC", err)
	}
	onlyBundle(t, small)
}

func TestOpenRefuses(t *testing.T) {
	c := testConfig(t)
	for _, tt := range []struct {
		name, file, content, want string
	}{
		{"newer bundle", metaFile, `{"version": 2, "colour": 1}`, "version 2: written by a newer kcradle"},
		{"unknown field", metaFile, `{"version": 1, "colour": 1}`, `unknown field "colour"`},
		{"no version", metaFile, `{}`, "want 1 to 1, got 0"},
		{"newer pod", podFile, `{"version": 9}`, "written by a newer kcradle"},
		{"damaged pod", podFile, `{"version": 1`, "parse pod"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "vm")
			mustBundle(t, dir, c)
			if err := os.WriteFile(filepath.Join(dir, tt.file), []byte(tt.content), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Open(dir); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Open: got %v, want an error with %q", err, tt.want)
			}
		})
	}
	if _, err := Open(t.TempDir()); !errors.Is(err, ErrNotBundle) {
		t.Errorf("Open of an empty directory: got %v, want ErrNotBundle", err)
	}
	if _, err := Open("/nowhere"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("Open of nothing: got %v, want not exist", err)
	}
}

func TestLockAndState(t *testing.T) {
	b := mustBundle(t, filepath.Join(t.TempDir(), "vm"), testConfig(t))
	if _, ok, err := b.State(); ok || err != nil {
		t.Errorf("state of a bundle that never ran: got %v, %v", ok, err)
	}
	lock, err := b.Lock()
	if err != nil {
		t.Fatal(err)
	}
	if pid, ok := b.Running(); !ok || pid != os.Getpid() {
		t.Errorf("Running: got %d %v, want %d true", pid, ok, os.Getpid())
	}
	if _, err := b.Lock(); !errors.Is(err, ErrRunning) {
		t.Errorf("second Lock: got %v, want ErrRunning", err)
	}
	s := State{Phase: PhaseRunning, Pid: os.Getpid(), Started: time.Unix(1, 0).UTC(),
		Containers: []spec.State{{Container: "web", Status: spec.StatusRunning, Pid: 7}}}
	if err := b.SetState(s); err != nil {
		t.Fatal(err)
	}
	s.Version = Version
	got, ok, err := b.State()
	if !ok || err != nil {
		t.Fatal(ok, err)
	}
	if d := cmp.Diff(s, got); d != "" {
		t.Errorf("state (-want +got):\n%s", d)
	}
	// What a killed supervisor leaves behind is a state that says running and a lock that nobody holds.
	lock.Unlock()
	got, _, err = b.State()
	if err != nil || got.Phase != PhaseEnded || got.End == nil || got.End.Reason != EndSupervisor ||
		got.Containers[0].Status != spec.StatusExited || got.Containers[0].ExitCode != 137 {
		t.Errorf("state after the supervisor was killed: got %+v, %v", got, err)
	}
}

// The end of a pod is told although its host's disk is full.
func TestStateOnAFullDisk(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	b := &Bundle{Dir: dir}
	if err := os.Mkdir(b.RunDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	s := State{Version: Version, Phase: PhaseStarting, Started: time.Unix(1, 0).UTC()}
	if err := b.SetState(s); err != nil {
		t.Fatal(err)
	}
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	for block := make([]byte, 4096); ; {
		if _, err = fill.Write(block); err != nil {
			break
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	for range 3 { // more than one, each larger than a block
		s.Phase = PhaseRunning
		s.Containers = append(s.Containers, spec.State{Container: "web", Error: strings.Repeat("x", 5000)})
		if err := b.SetState(s); err != nil {
			t.Fatal(err)
		}
	}
	s.Phase, s.End = PhaseEnded, &End{Reason: EndDone, ExitCode: 3}
	if err := b.SetState(s); err != nil {
		t.Fatal(err)
	}
	got, _, err := b.State()
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(s, got); d != "" {
		t.Errorf("state (-want +got):\n%s", d)
	}
}

func TestKnown(t *testing.T) {
	c := testConfig(t)
	root := t.TempDir()
	a := mustBundle(t, filepath.Join(t.TempDir(), "a"), c)
	b := mustBundle(t, filepath.Join(t.TempDir(), "b"), c)
	for _, x := range []*Bundle{a, b, a} {
		if err := x.Remember(root); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.RemoveAll(a.Dir); err != nil {
		t.Fatal(err)
	}
	got, err := Known(root)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]string{b.Dir}, got); d != "" {
		t.Errorf("Known (-want +got):\n%s", d)
	}
}

func TestLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := OpenLog(path)
	if err != nil {
		t.Fatal(err)
	}
	when := time.Unix(1, 5).UTC()
	long := strings.Repeat("ä", maxLogRecord) // twice as many bytes, and cut only between characters
	for _, s := range []string{"one\ntwo\n\"q\" \\ \x01\t", "torn", " line\n", "bad \xff byte\n", long} {
		if err := l.Write(1, when, []byte(s)); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Write(2, when, []byte("error\n")); err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	f.WriteString(`{"log":"cut by a cr`)
	f.Close()
	if l, err = OpenLog(path); err != nil {
		t.Fatal(err)
	}
	if err := l.Write(1, when, []byte("after\n")); err != nil {
		t.Fatal(err)
	}
	l.Close()
	var out, errs strings.Builder
	records := 0
	err = ReadLog(path, func(r Record) error {
		records++
		if !r.Time.Equal(when) {
			t.Errorf("time of %q: got %v", r.Log, r.Time)
		}
		if r.Stream == "stderr" {
			errs.WriteString(r.Log)
		} else {
			out.WriteString(r.Log)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	want := "one\ntwo\n\"q\" \\ \x01\ttorn line\nbad \uFFFD byte\n" + long + "after\n"
	if d := cmp.Diff(want, out.String()); d != "" {
		t.Errorf("stdout (-want +got):\n%s", d)
	}
	if errs.String() != "error\n" || records < 8 {
		t.Errorf("stderr: got %q; %d records", errs.String(), records)
	}
}

func TestLogRotates(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := OpenLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	l.max = 4096
	line := []byte(strings.Repeat("x", 99) + "\n")
	for range 200 {
		if err := l.Write(1, time.Unix(0, 0), line); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range []string{path, path + logOldSuffix} {
		if fi, err := os.Stat(p); err != nil || fi.Size() > l.max || fi.Size() == 0 {
			t.Errorf("%s: %v, %v", p, fi, err)
		}
	}
	n := 0
	if err := ReadLog(path, func(r Record) error { n += len(r.Log); return nil }); err != nil || n == 0 || n%100 != 0 {
		t.Errorf("ReadLog after rotation: %d bytes, %v", n, err)
	}
}

func FuzzLog(f *testing.F) {
	f.Add([]byte("hello\n"), byte(1))
	f.Add([]byte{0xff, 0xc3, '"', '\\', 0, '\n', 0xe2, 0x82}, byte(2))
	f.Fuzz(func(t *testing.T, b []byte, stream byte) {
		path := filepath.Join(t.TempDir(), "log")
		l, err := OpenLog(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := l.Write(stream, time.Unix(0, 0), b); err != nil {
			t.Fatal(err)
		}
		l.Close()
		var got strings.Builder
		if err := ReadLog(path, func(r Record) error { got.WriteString(r.Log); return nil }); err != nil {
			t.Fatal(err)
		}
		var want strings.Builder
		for _, r := range string(b) { // an invalid byte is one U+FFFD
			want.WriteRune(r)
		}
		if len(b) < maxLogRecord && got.String() != want.String() {
			t.Errorf("log of %q: got %q, want %q", b, got.String(), want.String())
		}
	})
}

func BenchmarkLog(b *testing.B) {
	l, err := OpenLog(filepath.Join(b.TempDir(), "log"))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	chunk := bytes.Repeat([]byte("a line of a usual length, as programs write them all day long\n"), 512)
	b.SetBytes(int64(len(chunk)))
	now := time.Now()
	for b.Loop() {
		if err := l.Write(1, now, chunk); err != nil {
			b.Fatal(err)
		}
	}
}

func TestPackageSizes(t *testing.T) {
	dir := filepath.Join(t.TempDir(), PackageDefault)
	writePackage(t, dir)
	mustWrite(t, filepath.Join(dir, kernelFile))
	if _, err := OpenPackage(dir); err == nil || !strings.Contains(err.Error(), "its manifest says") {
		t.Errorf("OpenPackage with a changed kernel: got %v", err)
	}
}

// A file of the daemon's can be replaced when the disk has no room any more.
func TestSetFileDiskFull(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	b := &Bundle{Dir: dir}
	for _, content := range []string{"first", "second"} { // the first has no one's room to leave
		if err := b.SetFile("x.json", []byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	ballast, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer ballast.Close()
	for err == nil {
		_, err = ballast.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	for i := range 10 {
		want := strings.Repeat("x", 8<<10-i)
		if err := b.SetFile("x.json", []byte(want)); err != nil {
			t.Fatal(err)
		}
		if got, err := b.File("x.json"); err != nil || strings.TrimRight(string(got), "\n") != want {
			t.Errorf("got %d bytes, %v, want %d", len(got), err, len(want))
		}
	}
	if err := b.SetFile("x.json", make([]byte, fileRoom+1)); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("more than there is room for: got %v", err)
	}
}
