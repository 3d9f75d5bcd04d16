package erofs

import (
	"bytes"
	"errors"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	reader "github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"
)

// build writes an image of what fill puts into it and opens it with another implementation of the format.
func build(t *testing.T, fill func(w *Writer)) fs.FS {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	w, err := NewWriter(f, Options{SpoolDir: t.TempDir(), Volume: "test"})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	fill(w)
	res, err := w.Finish([16]byte{1})
	if err != nil {
		t.Fatal(err)
	}
	if fi, err := f.Stat(); err != nil || fi.Size() != res.Size || res.Size != w.Written() {
		t.Errorf("the file has %d bytes, the result says %d, the writer %d", fi.Size(), res.Size, w.Written())
	}
	if _, err := w.Finish([16]byte{1}); err == nil {
		t.Error("the second Finish went well")
	}
	fsys, err := reader.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	return fsys
}

func put(t *testing.T, w *Writer, name, content string) *Inode {
	t.Helper()
	c, err := w.Content(strings.NewReader(content), int64(len(content)))
	if err != nil {
		t.Fatal(err)
	}
	i := &Inode{Mode: TypeRegular | 0o644}
	i.SetContent(c)
	if err := w.Root().Put(name, i); err != nil {
		t.Fatal(err)
	}
	return i
}

func TestHardLinkIsOneInode(t *testing.T) {
	fsys := build(t, func(w *Writer) {
		i := put(t, w, "a", "content")
		if err := w.Root().Put("b", i); err != nil {
			t.Fatal(err)
		}
	})
	stat := func(name string) *reader.Stat {
		info, err := fs.Stat(fsys, name)
		if err != nil {
			t.Fatal(err)
		}
		return info.Sys().(*reader.Stat)
	}
	if a, b := stat("a"), stat("b"); a.Ino != b.Ino || a.Nlink != 2 {
		t.Errorf("got inodes %d and %d with %d links, want one with 2", a.Ino, b.Ino, a.Nlink)
	}
}

// TestSpool makes the ends of files more than fit into memory.
func TestSpool(t *testing.T) {
	const n = 2*spoolMemory/3000 + 1
	content := func(i int) string { return strings.Repeat(string(rune('a'+i%26)), 3000) }
	name := func(i int) string { return strings.Repeat("n", i%200) + string(rune('0'+i/200)) }
	fsys := build(t, func(w *Writer) {
		for i := range n {
			put(t, w, name(i), content(i))
		}
		if w.spool.f == nil {
			t.Error("the spool is not used")
		}
	})
	for i := range n {
		if b, err := fs.ReadFile(fsys, name(i)); err != nil || string(b) != content(i) {
			t.Fatalf("%s: got %.10q, %v", name(i), b, err)
		}
	}
}

// TestLargeChunks looks at files of which the chunks are larger than the smallest hole.
func TestLargeChunks(t *testing.T) {
	const chunk, size = 256 << 10, 3*256<<10 + 100
	f, err := os.Create(filepath.Join(t.TempDir(), "out"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	content := make([]byte, size)
	content[chunk+100_000] = 1 // in the middle of the second chunk, zeros on both sides
	content[size-1] = 2
	o := output{f: f, buf: make([]byte, 0, outBuffer), table: crc32.MakeTable(crc32.Castagnoli)}
	r := bytes.NewReader(content)
	var zero []bool
	for at := 0; at < size; at += chunk {
		z, err := o.chunk(r, int64(min(chunk, size-at)))
		if err != nil {
			t.Fatal(err)
		}
		zero = append(zero, z)
	}
	if err := o.flush(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	want := append(bytes.Clone(content[chunk:2*chunk]), content[3*chunk:]...)
	if !bytes.Equal(got, want) || !zero[0] || zero[1] || !zero[2] || zero[3] {
		t.Errorf("got %d bytes, holes %v, want %d bytes", len(got), zero, len(want))
	}
}

func TestBounds(t *testing.T) {
	d := &Inode{Mode: TypeDirectory | 0o755}
	for _, name := range []string{"", ".", "..", "a/b", "a\x00", strings.Repeat("x", 256)} {
		if err := d.Put(name, &Inode{}); err == nil {
			t.Errorf("name %.20q was taken", name)
		}
	}
	if err := (&Inode{Mode: TypeRegular}).Put("x", &Inode{}); err == nil {
		t.Error("a file took a child")
	}
	i := &Inode{Mode: TypeRegular}
	for name, kind := range map[string]error{"nothing": ErrXattrNamespace, "system.other": ErrXattrNamespace, "user.": ErrXattrNamespace, "user." + strings.Repeat("x", 256): nil} {
		if err := i.SetXattr(name, ""); err == nil || kind != nil && !errors.Is(err, kind) {
			t.Errorf("%.20q: got %v", name, err)
		}
	}
	for n := range 5 { // together too much
		err := i.SetXattr("user."+string(rune('a'+n)), strings.Repeat("v", 65535))
		if (err != nil) != (n >= 3) { // the fourth no longer fits into 262148 bytes beside its name
			t.Errorf("attribute %d: %v", n, err)
		}
		if err != nil && len(i.XattrNames()) > n {
			t.Error("a refused attribute is there")
		}
	}
	if _, err := NewWriter(nil, Options{Volume: strings.Repeat("x", 17)}); err == nil {
		t.Error("a long volume name was taken")
	}
	if got, want := MakeDevice(259, 1_000_000), uint32(0xf4210340); got != want || unix.Major(unix.Mkdev(259, 1_000_000)) != 259 {
		t.Errorf("got device %#x, want %#x", got, want)
	}
}
