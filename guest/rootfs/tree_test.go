package rootfs

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/guest/sandboxtest"
)

func mkfifo(path string) error { return unix.Mkfifo(path, 0o644) }

// scratch is a file system of the test's own, where an overlay may write.
func scratch(t *testing.T) string {
	t.Helper()
	sandboxtest.NeedInside(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func mkdirs(t *testing.T, dirs ...string) {
	t.Helper()
	for _, d := range dirs {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

func write(t *testing.T, path, content string) {
	t.Helper()
	mkdirs(t, filepath.Dir(path))
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestMount127Layers(t *testing.T) {
	dir := scratch(t)
	var layers []string
	for i := range 127 {
		l := filepath.Join(dir, strings.Repeat("x", 100)+strconv.Itoa(i)) // together more than a page
		write(t, filepath.Join(l, "n"+strconv.Itoa(i)), "")
		write(t, filepath.Join(l, "top"), strconv.Itoa(i))
		layers = append(layers, l)
	}
	upper, work, root := filepath.Join(dir, "upper"), filepath.Join(dir, "work"), filepath.Join(dir, "root")
	mkdirs(t, upper, work, root)
	if err := Mount(root, layers, upper, work); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(root, 0)
	names, err := os.ReadDir(root)
	if err != nil || len(names) != 128 {
		t.Errorf("%d names, %v; want 128", len(names), err)
	}
	if b, err := os.ReadFile(filepath.Join(root, "top")); err != nil || string(b) != "126" {
		t.Errorf("the newest layer does not win: %q, %v", b, err)
	}
}

func TestMountSaysWhy(t *testing.T) {
	dir := scratch(t)
	err := Mount(dir, []string{filepath.Join(dir, "nowhere")}, dir, dir)
	if err == nil || !strings.Contains(err.Error(), "nowhere") {
		t.Errorf("got %v", err)
	}
}

func TestCopyUp(t *testing.T) {
	dir := scratch(t)
	root, base := filepath.Join(dir, "root"), filepath.Join(dir, "volume")
	data := filepath.Join(root, "var/lib/data")
	write(t, filepath.Join(data, "a"), "content")
	write(t, filepath.Join(data, "sub/setuid"), "x")
	for _, err := range []error{
		os.Chown(filepath.Join(data, "sub/setuid"), 5, 6),
		os.Chmod(filepath.Join(data, "sub/setuid"), 0o755|os.ModeSetuid),
		os.Link(filepath.Join(data, "a"), filepath.Join(data, "sub/hard")),
		os.Symlink("/nowhere", filepath.Join(data, "link")),
		os.Lchown(filepath.Join(data, "link"), 7, 8),
		mkfifo(filepath.Join(data, "fifo")),
		unix.Mknod(filepath.Join(data, "null"), unix.S_IFCHR|0o640, int(unix.Mkdev(1, 3))),
		unix.Setxattr(filepath.Join(data, "a"), "trusted.test", []byte("value"), 0),
		os.Chown(data, 999, 998),
		os.Chmod(data, 0o750),
		os.Symlink("/var/lib", filepath.Join(root, "var/alias")),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, used := range []bool{false, true} {
		name := "data" + strconv.FormatBool(used)
		mkdirs(t, filepath.Join(base, name))
		// By a path with a link, which leads where it leads inside the image.
		if err := CopyUp(root, "/var/alias/data", base, name, used); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(list(t, data), list(t, filepath.Join(base, name))); d != "" {
			t.Errorf("used %v (-image +volume):\n%s", used, d)
		}
		var a, b unix.Stat_t
		if err := unix.Stat(filepath.Join(base, name, "a"), &a); err != nil {
			t.Fatal(err)
		}
		if err := unix.Stat(filepath.Join(base, name, "sub/hard"), &b); err != nil || a.Ino != b.Ino {
			t.Errorf("the hard link is none: %d, %d, %v", a.Ino, b.Ino, err)
		}
	}
	// A volume with content stays as it is.
	write(t, filepath.Join(base, "mine/own"), "1")
	if err := CopyUp(root, "/var/lib/data", base, "mine", false); err != nil {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(filepath.Join(base, "mine")); err != nil || len(names) != 1 {
		t.Errorf("a volume with content was filled: %v, %v", names, err)
	}
	// What the image has not, or has as a file, leaves the volume empty.
	mkdirs(t, filepath.Join(base, "empty"))
	for _, path := range []string{"/nowhere", "/var/lib/data/a", "/../../../../etc"} {
		if err := CopyUp(root, path, base, "empty", false); err != nil {
			t.Errorf("%s: %v", path, err)
		}
	}
	if names, err := os.ReadDir(filepath.Join(base, "empty")); err != nil || len(names) != 0 {
		t.Errorf("the empty volume holds %v, %v", names, err)
	}
}

// list shows a tree as lines.
func list(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		target, _ := os.Readlink(path)
		var content []byte
		if d.Type().IsRegular() {
			content, _ = os.ReadFile(path)
		}
		x := make([]byte, 64)
		n, _ := unix.Lgetxattr(path, "trusted.test", x)
		out = append(out, strings.Join([]string{
			rel, strconv.FormatUint(uint64(st.Mode), 8), strconv.Itoa(int(st.Uid)), strconv.Itoa(int(st.Gid)),
			strconv.FormatInt(st.Mtim.Nano(), 10), strconv.FormatUint(st.Rdev, 10), target, string(content), string(x[:max(n, 0)]),
		}, "|"))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestPrepareRemovesLinks(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "etc/hosts"), "kept")
	if err := os.Symlink("../run/systemd/resolve/stub-resolv.conf", filepath.Join(root, "etc/resolv.conf")); err != nil {
		t.Fatal(err)
	}
	if err := Prepare(root, []string{"/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/nowhere/x"}); err != nil {
		t.Fatal(err)
	}
	names, err := os.ReadDir(filepath.Join(root, "etc"))
	if err != nil || len(names) != 1 || names[0].Name() != "hosts" {
		t.Errorf("got %v, %v; want hosts alone", names, err)
	}
}

func TestView(t *testing.T) {
	dir := scratch(t)
	root, vol := filepath.Join(dir, "root"), filepath.Join(dir, "vol")
	write(t, filepath.Join(root, "etc/hosts"), "old")
	write(t, filepath.Join(dir, "hosts"), "new")
	write(t, filepath.Join(vol, "x"), "in the volume")
	write(t, filepath.Join(dir, "outside/y"), "")
	// A link in the image that would lead the mount out of it.
	if err := os.Symlink("/../../outside", filepath.Join(root, "data")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(root, root, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(root, 0)
	view := filepath.Join(dir, "view")
	closeView, err := View(view, root, []Mountpoint{{Source: vol, Target: "/data"}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(dir, "outside/x")); err == nil {
		t.Error("the volume was mounted outside of the view")
	}
	if err := closeView(); err != nil {
		t.Fatal(err)
	}
	closeView, err = View(view, root, []Mountpoint{
		{Source: filepath.Join(dir, "hosts"), Target: "/etc/hosts", File: true},
		{Source: vol, Target: "/made/here"},
	})
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{"etc/hosts": "new", "made/here/x": "in the volume"} {
		if b, err := os.ReadFile(filepath.Join(view, path)); err != nil || string(b) != want {
			t.Errorf("%s: %q, %v", path, b, err)
		}
	}
	if err := closeView(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(view); !os.IsNotExist(err) {
		t.Errorf("the view is still there: %v", err)
	}
}
