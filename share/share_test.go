package share

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/need"
)

// mount serves a share to the library's client and returns the root as the guest sees it.
func mount(t *testing.T, s *Share) p9.File {
	t.Helper()
	host, guest := net.Pipe()
	served := make(chan error, 1)
	go func() { served <- s.Serve(host) }()
	client, err := p9.NewClient(guest)
	if err != nil {
		t.Fatal(err)
	}
	root, err := client.Attach("")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.Close()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if n := s.objects.Load(); n != 0 {
			t.Errorf("%d objects are still open after the client left", n)
		}
		if err := errors.Join(s.Close(), s.Close()); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
	return root
}

func open(t *testing.T, path string, mode Mode) *Share {
	t.Helper()
	s, err := Open(path, mode)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func walk(t *testing.T, f p9.File, names ...string) p9.File {
	t.Helper()
	_, got, err := f.Walk(names)
	if err != nil {
		t.Fatalf("walk %v: %v", names, err)
	}
	t.Cleanup(func() { got.Close() })
	return got
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, f p9.File) string {
	t.Helper()
	if _, _, err := f.Open(p9.ReadOnly); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(io.NewSectionReader(f, 0, 1<<20))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func names(t *testing.T, dir p9.File) []string {
	t.Helper()
	d := walk(t, dir)
	if _, _, err := d.Open(p9.ReadOnly); err != nil {
		t.Fatal(err)
	}
	var out []string
	for offset := uint64(0); ; {
		entries, err := d.Readdir(offset, 4096)
		if err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			slices.Sort(out)
			return out
		}
		for _, e := range entries {
			out = append(out, e.Name)
			offset = e.Offset
		}
	}
}

func wantErrno(t *testing.T, what string, err error, want syscall.Errno) {
	t.Helper()
	var got linux.Errno
	if !errors.As(err, &got) || syscall.Errno(got) != want {
		t.Errorf("%s: got error %v, want %v", what, err, want)
	}
}

func TestReadWrite(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "hello"), "hello, guest")
	root := mount(t, open(t, dir, ReadWrite))

	if got := read(t, walk(t, root, "hello")); got != "hello, guest" {
		t.Errorf("read hello: got %q", got)
	}
	if _, err := root.Mkdir("sub", 0o1777, p9.NoUID, p9.NoGID); err != nil {
		t.Fatal(err)
	}
	sub := walk(t, root, "sub")
	made, _, _, err := walk(t, sub).Create("new", p9.ReadWrite, 0o4711, p9.NoUID, p9.NoGID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := made.WriteAt([]byte("from the guest"), 3); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(made.FSync(), made.Close()); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(dir, "sub/new"))
	if err != nil || string(b) != "\x00\x00\x00from the guest" {
		t.Errorf("host reads %q, %v", b, err)
	}
	for path, want := range map[string]os.FileMode{
		"sub":     os.ModeDir | os.ModeSticky | 0o777,
		"sub/new": 0o711, // setuid does not come through
	} {
		if st, err := os.Stat(filepath.Join(dir, path)); err != nil || st.Mode() != want {
			t.Errorf("%s: got mode %v (%v), want %v whatever the umask", path, st.Mode(), err, want)
		}
	}
	if err := sub.RenameAt("new", root, "moved"); err != nil {
		t.Fatal(err)
	}
	moved := walk(t, root, "moved")
	if err := root.Link(moved, "linked"); err != nil {
		t.Fatal(err)
	}
	if _, err := root.Symlink("moved", "pointer", p9.NoUID, p9.NoGID); err != nil {
		t.Fatal(err)
	}
	if target, err := walk(t, root, "pointer").Readlink(); err != nil || target != "moved" {
		t.Errorf("Readlink: got %q, %v", target, err)
	}
	if err := moved.SetAttr(p9.SetAttrMask{Size: true, Permissions: true, MTime: true, MTimeNotSystemTime: true},
		p9.SetAttr{Size: 5, Permissions: 0o600, MTimeSeconds: 1e9, MTimeNanoSeconds: 7}); err != nil {
		t.Fatal(err)
	}
	_, _, attr, err := moved.GetAttr(p9.AttrMaskAll)
	if err != nil || attr.Size != 5 || attr.Mode.Permissions() != 0o600 || attr.NLink != 2 || attr.MTimeSeconds != 1e9 || attr.MTimeNanoSeconds != 7 {
		t.Errorf("GetAttr after SetAttr: %v, %v", attr, err)
	}
	if got, want := names(t, root), []string{"hello", "linked", "moved", "pointer", "sub"}; !slices.Equal(got, want) {
		t.Errorf("names: got %v, want %v", got, want)
	}
	if err := errors.Join(root.UnlinkAt("linked", 0), root.UnlinkAt("sub", unix.AT_REMOVEDIR)); err != nil {
		t.Error(err)
	}
	if _, err := root.StatFS(); err != nil {
		t.Error(err)
	}
}

func TestLargeDirectory(t *testing.T) {
	dir := t.TempDir()
	var want []string
	for i := range 3000 {
		name := fmt.Sprintf("%s-%04d", strings.Repeat("n", i%200), i)
		write(t, filepath.Join(dir, name), "")
		want = append(want, name)
	}
	slices.Sort(want)
	if got := names(t, mount(t, open(t, dir, ReadOnly))); !slices.Equal(got, want) {
		t.Errorf("got %d names, want %d, each once", len(got), len(want))
	}
}

// Nothing outside the shared tree can be named, read or changed.
func TestConfinement(t *testing.T) {
	top := t.TempDir()
	dir := filepath.Join(top, "shared")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(top, "secret"), "secret")
	for name, target := range map[string]string{"up": "..", "abs": "/etc", "leaf": "../secret"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	root := mount(t, open(t, dir, ReadWrite))
	for _, path := range [][]string{{".."}, {"up", "secret"}, {"abs", "passwd"}, {"up/secret"}, {"."}, {""}} {
		if _, f, err := root.Walk(path); err == nil {
			f.Close()
			t.Errorf("walk %q succeeded", path)
		}
	}
	if _, _, err := walk(t, root, "leaf").Open(p9.ReadOnly); err == nil {
		t.Error("open followed a symbolic link")
	}
	if err := walk(t, root, "leaf").SetAttr(p9.SetAttrMask{Size: true}, p9.SetAttr{}); err == nil {
		t.Error("truncate followed a symbolic link")
	}
	wantErrno(t, "create over a link", create(walk(t, root), "leaf"), unix.EEXIST)
	wantErrno(t, "make a device", mknod(root, p9.FileMode(unix.S_IFCHR|0o666)), unix.EPERM)
	wantErrno(t, "make a block device", mknod(root, p9.FileMode(unix.S_IFBLK|0o666)), unix.EPERM)
	if err := mknod(root, p9.FileMode(unix.S_IFIFO|0o600)); err != nil {
		t.Errorf("make a fifo: %v", err)
	}
	_, _, err := walk(t, root, "node").Open(p9.ReadOnly)
	wantErrno(t, "open a fifo on the host", err, unix.ENXIO)
	if b, err := os.ReadFile(filepath.Join(top, "secret")); err != nil || string(b) != "secret" {
		t.Errorf("secret: %q, %v", b, err)
	}

	// A directory that is moved out of the tree while the guest holds it must not become a way up.
	if err := os.MkdirAll(filepath.Join(dir, "a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	held := walk(t, root, "a", "b")
	if err := os.Rename(filepath.Join(dir, "a/b"), filepath.Join(top, "b")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := held.Walk([]string{".."}); err == nil {
		t.Error("walked up from a moved directory")
	}
}

func create(dir p9.File, name string) error {
	f, _, _, err := dir.Create(name, p9.ReadWrite, 0o600, p9.NoUID, p9.NoGID)
	if err == nil {
		f.Close()
	}
	return err
}

func mknod(dir p9.File, mode p9.FileMode) error {
	_, err := dir.Mknod("node", mode, 1, 3, p9.NoUID, p9.NoGID)
	return err
}

func TestReadOnly(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "f"), "x")
	root := mount(t, open(t, dir, ReadOnly))
	f := walk(t, root, "f")
	wantErrno(t, "create", create(walk(t, root), "g"), unix.EROFS)
	_, err := root.Mkdir("d", 0o755, p9.NoUID, p9.NoGID)
	wantErrno(t, "mkdir", err, unix.EROFS)
	_, err = root.Symlink("f", "l", p9.NoUID, p9.NoGID)
	wantErrno(t, "symlink", err, unix.EROFS)
	wantErrno(t, "mknod", mknod(root, p9.FileMode(unix.S_IFIFO)), unix.EROFS)
	wantErrno(t, "link", root.Link(f, "l"), unix.EROFS)
	wantErrno(t, "rename", root.RenameAt("f", root, "g"), unix.EROFS)
	wantErrno(t, "unlink", root.UnlinkAt("f", 0), unix.EROFS)
	wantErrno(t, "setattr", f.SetAttr(p9.SetAttrMask{Permissions: true}, p9.SetAttr{Permissions: 0o777}), unix.EROFS)
	_, _, err = walk(t, root, "f").Open(p9.ReadWrite)
	wantErrno(t, "open for writing", err, unix.EROFS)
	_, _, err = walk(t, root, "f").Open(p9.ReadOnly | p9.OpenFlags(unix.O_TRUNC))
	wantErrno(t, "open and truncate", err, unix.EROFS)
	if got := read(t, f); got != "x" {
		t.Errorf("read: got %q", got)
	}
}

// Sharing a file shows that file and nothing else of its directory.
func TestFile(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "shown"), "shown")
	write(t, filepath.Join(dir, "hidden"), "hidden")
	s := open(t, filepath.Join(dir, "shown"), ReadWrite)
	if s.File() != "shown" {
		t.Errorf("File: got %q", s.File())
	}
	root := mount(t, s)
	if got := names(t, root); !slices.Equal(got, []string{"shown"}) {
		t.Errorf("names: got %v", got)
	}
	_, _, err := root.Walk([]string{"hidden"})
	wantErrno(t, "walk to a sibling", err, unix.ENOENT)
	wantErrno(t, "create a sibling", create(walk(t, root), "third"), unix.EPERM)
	wantErrno(t, "remove", root.UnlinkAt("shown", 0), unix.EPERM)
	f := walk(t, root, "shown")
	if _, _, err := f.Open(p9.ReadWrite); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("S"), 0); err != nil {
		t.Error(err)
	}
}

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		fifo:                         "neither a directory nor a regular file",
		filepath.Join(dir, "absent"): "no such file",
	} {
		if _, err := Open(path, ReadWrite); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Open(%s): got %v, want %q", path, err, want)
		}
	}
}

func TestObjectLimit(t *testing.T) {
	s := open(t, t.TempDir(), ReadOnly)
	s.limit = 20
	root := mount(t, s)
	var held []p9.File
	var err error
	for range 40 {
		var f p9.File
		if _, f, err = root.Walk(nil); err != nil {
			break
		}
		held = append(held, f)
	}
	wantErrno(t, "the 21st object", err, unix.ENFILE)
	for _, f := range held {
		f.Close()
	}
	if _, f, err := root.Walk(nil); err != nil {
		t.Errorf("after giving objects back: %v", err)
	} else {
		f.Close()
	}
}

// attachMessage is what Linux sends to attach as a user.
func attachMessage(uname, aname string, uid uint32) []byte {
	b := []byte{0, 0, 0, 0, typeAttach, 1, 0}
	b = binary.LittleEndian.AppendUint32(b, 5)
	b = binary.LittleEndian.AppendUint32(b, ^uint32(0))
	for _, s := range []string{uname, aname} {
		b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
		b = append(b, s...)
	}
	b = binary.LittleEndian.AppendUint32(b, uid)
	binary.LittleEndian.PutUint32(b, uint32(len(b)))
	return b
}

func TestUserReader(t *testing.T) {
	other := []byte{11, 0, 0, 0, 110, 2, 0, 'b', 'o', 'd', 'y'}
	in := slices.Concat(other, attachMessage("mysql", "/anything", 999), other)
	want := slices.Concat(other, attachMessage("mysql", "u999", 999), other)
	for _, chunk := range []int{1, 3, 4096} {
		r := &userReader{r: io.NopCloser(bytes.NewReader(in))}
		var got bytes.Buffer
		if _, err := io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{r}, make([]byte, chunk)); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("in pieces of %d:\ngot  %q\nwant %q", chunk, got.Bytes(), want)
		}
	}
}

// The library's client knows no extended attributes, so these go to the server's side directly.
func TestAttributes(t *testing.T) {
	dir := t.TempDir()
	for _, mode := range []Mode{ReadWrite, ReadOnly} {
		s := open(t, dir, mode)
		defer s.Close()
		f, err := s.attach(0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if mode == ReadOnly {
			wantErrno(t, "set on a read-only share", f.SetXattr("user.x", []byte("y"), 0), unix.EROFS)
			wantErrno(t, "remove on a read-only share", f.RemoveXattr("user.x"), unix.EROFS)
			continue
		}
		for _, name := range []string{"security.capability", "trusted.overlay.opaque", "x"} {
			wantErrno(t, "set "+name, f.SetXattr(name, []byte("x"), 0), unix.EOPNOTSUPP)
		}
		if err := f.SetXattr("user.x", []byte("y"), 0); err != nil {
			t.Fatal(err)
		}
		if b, err := f.GetXattr("user.x"); err != nil || string(b) != "y" {
			t.Errorf("GetXattr: got %q, %v", b, err)
		}
		if l, err := f.ListXattrs(); err != nil || !slices.Equal(l, []string{"user.x"}) {
			t.Errorf("ListXattrs: got %q, %v", l, err)
		}
		if err := f.RemoveXattr("user.x"); err != nil {
			t.Error(err)
		}
	}
}

// A file belongs to the user who made it.
func TestOwner(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	s := open(t, dir, ReadWrite)
	defer s.Close()
	_, root, err := (&crossroads{s: s}).Walk([]string{"u1234"})
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	f, _, _, err := root.Create("file", p9.ReadWrite, 0o600, p9.NoUID, 5678)
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if _, err := root.Mkdir("dir", 0o700, p9.NoUID, 5678); err != nil {
		t.Fatal(err)
	}
	if _, err := root.Symlink("x", "link", p9.NoUID, 5678); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"file", "dir", "link"} {
		st, err := os.Lstat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if sys := st.Sys().(*syscall.Stat_t); sys.Uid != 1234 || sys.Gid != 5678 {
			t.Errorf("%s belongs to %d:%d, want 1234:5678", name, sys.Uid, sys.Gid)
		}
	}
}

func FuzzServe(f *testing.F) {
	f.Add(attachMessage("root", "", 0))
	f.Add([]byte{19, 0, 0, 0, 100, 255, 255, 0, 32, 0, 0, 6, 0, '9', 'P', '2', '0', '0', '0'})
	f.Add([]byte{255, 255, 255, 255, 104, 0, 0})
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		s := open(t, dir, ReadOnly)
		defer s.Close()
		_ = s.Serve(struct {
			io.Reader
			io.WriteCloser
		}{bytes.NewReader(b), nopWriteCloser{io.Discard}})
		if n := s.objects.Load(); n != 0 {
			t.Errorf("%d objects leaked", n)
		}
	})
}

type nopWriteCloser struct{ io.Writer }

func (nopWriteCloser) Close() error { return nil }

// Without what is mounted below it, a directory is what lies under the mount; with it, everything.
func TestNonRecursive(t *testing.T) {
	need.Root(t)
	dir, other := t.TempDir(), t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "mnt"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(other, "file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(other, filepath.Join(dir, "mnt"), "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(filepath.Join(dir, "mnt"), unix.MNT_DETACH)
	for mode, want := range map[Mode]bool{ReadOnly: true, ReadOnly | NonRecursive: false} {
		d := walk(t, mount(t, open(t, dir, mode)), "mnt")
		_, _, err := d.Walk([]string{"file"})
		if (err == nil) != want {
			t.Errorf("mode %d: got %v, want the mounted file to be there: %v", mode, err, want)
		}
		if _, _, _, err := d.Create("new", p9.WriteOnly, 0o644, p9.NoUID, p9.NoGID); err == nil {
			t.Errorf("mode %d: a file was made in what is read-only", mode)
		}
	}
}
