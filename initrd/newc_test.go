package initrd

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/kcradle/kcradle/internal/need"
)

type entry struct {
	Header
	Data string
}

func write(t testing.TB, entries []entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := NewWriter(&b)
	for _, e := range entries {
		if err := w.Add(e.Header, strings.NewReader(e.Data)); err != nil {
			t.Fatalf("add %q: %v", e.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatalf("second close: %v", err)
	}
	return b.Bytes()
}

func readAll(r io.Reader, limit int64) ([]entry, error) {
	var out []entry
	a := NewReader(r, limit)
	for {
		h, err := a.Next()
		if err == io.EOF {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		data, err := io.ReadAll(a)
		if err != nil {
			return out, err
		}
		out = append(out, entry{h, string(data)})
	}
}

var sample = []entry{
	{Header{Name: "dev", Mode: ModeDir | 0o755}, ""},
	{Header{Name: "dev/null", Mode: ModeChar | 0o666, Major: 1, Minor: 3}, ""},
	{Header{Name: "init", Mode: ModeFile | 0o755, Size: 5}, "12345"},
	{Header{Name: "link", Mode: ModeSymlink | 0o777, Size: 4}, "init"},
	{Header{Name: "setuid", Mode: ModeFile | 0o4755}, ""},
}

func TestRoundTrip(t *testing.T) {
	got, err := readAll(bytes.NewReader(write(t, sample)), 100)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(sample, got); d != "" {
		t.Errorf("read back (-want +got):\n%s", d)
	}
}

// TestCpioReads has cpio(1) unpack what the Writer wrote, and the Reader read what cpio(1) wrote.
func TestCpio(t *testing.T) {
	need.Root(t) // for the device node
	cpio := need.Command(t, "cpio", "apt-get install cpio")
	dir := t.TempDir()
	cmd := exec.Command(cpio, "--extract", "--make-directories", "--quiet")
	cmd.Dir, cmd.Stdin = dir, bytes.NewReader(write(t, sample))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio -i: %v\n%s", err, out)
	}
	for _, e := range sample {
		info, err := os.Lstat(filepath.Join(dir, e.Name))
		if err != nil {
			t.Error(err)
			continue
		}
		if got, want := uint32(info.Mode().Perm()), e.Mode&0o777; got != want {
			t.Errorf("%s: mode %#o, want %#o", e.Name, got, want)
		}
	}
	if got, err := os.ReadFile(filepath.Join(dir, "link")); err != nil || string(got) != "12345" {
		t.Errorf("through the link: %q, %v", got, err)
	}
	cmd = exec.Command(cpio, "--create", "--format=newc", "--quiet")
	var names []string
	for _, e := range sample {
		names = append(names, e.Name)
	}
	cmd.Dir, cmd.Stdin = dir, strings.NewReader(strings.Join(names, "\n")+"\n")
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	got, err := readAll(bytes.NewReader(out), 100)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(sample, got); d != "" {
		t.Errorf("cpio's archive (-want +got):\n%s", d)
	}
}

func TestWriterRefuses(t *testing.T) {
	long := strings.Repeat("a", maxName)
	for _, tc := range []struct {
		name string
		h    Header
		data string
		want string
	}{
		{"empty name", Header{Mode: ModeFile}, "", "bad name"},
		{"absolute", Header{Name: "/init", Mode: ModeFile}, "", "bad name"},
		{"escape", Header{Name: "../init", Mode: ModeFile}, "", "bad name"},
		{"trailer", Header{Name: trailer, Mode: ModeFile}, "", "bad name"},
		{"NUL", Header{Name: "a\x00b", Mode: ModeFile}, "", "bad name"},
		{"long", Header{Name: long, Mode: ModeFile}, "", "bad name"},
		{"no type", Header{Name: "a", Mode: 0o644}, "", "unknown type"},
		{"bad mode", Header{Name: "a", Mode: ModeFile | 1<<20}, "", "bad mode"},
		{"directory with data", Header{Name: "a", Mode: ModeDir, Size: 1}, "1", "is no file"},
		{"too big", Header{Name: "a", Mode: ModeFile, Size: 1 << 32}, "", "4 GiB"},
		{"negative", Header{Name: "a", Mode: ModeFile, Size: -1}, "", "4 GiB"},
		{"short data", Header{Name: "a", Mode: ModeFile, Size: 3}, "12", "ended after 2 of 3"},
		{"long data", Header{Name: "a", Mode: ModeFile, Size: 1}, "12", "more than its 1 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			err := NewWriter(io.Discard).Add(tc.h, strings.NewReader(tc.data))
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want … %s …", err, tc.want)
			}
		})
	}
}

func TestWriterStaysFailed(t *testing.T) {
	w := NewWriter(io.Discard)
	first := w.Add(Header{Name: "a", Mode: ModeFile, Size: 3}, strings.NewReader("12"))
	if !errors.Is(first, io.ErrUnexpectedEOF) {
		t.Fatalf("got %v, want an unexpected EOF", first)
	}
	if err := w.Add(Header{Name: "b", Mode: ModeDir}, nil); err != first {
		t.Errorf("next entry: got %v, want %v", err, first)
	}
	if err := w.Close(); err != first {
		t.Errorf("close: got %v, want %v", err, first)
	}
}

func TestReaderRefuses(t *testing.T) {
	good := write(t, sample)
	edit := func(at int, s string) []byte {
		b := bytes.Clone(good)
		copy(b[at:], s)
		return b
	}
	for _, tc := range []struct {
		name string
		in   []byte
		want string
	}{
		{"empty", nil, "unexpected EOF"},
		{"magic", edit(0, "070707"), "bad magic"},
		{"number", edit(6, "+0000001"), "bad number"},
		{"name size", edit(94, "00001001"), "name of 4097 bytes"},
		{"no name", edit(94, "00000001"), "name of 1 bytes"},
		{"no NUL", edit(94, "00000002"), "without its NUL"},
		{"no trailer", good[:len(good)-124], "unexpected EOF"},
		{"size above the limit", write(t, []entry{{Header{Name: "big", Mode: ModeFile, Size: 101}, strings.Repeat("x", 101)}}), "at most 100"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := readAll(bytes.NewReader(tc.in), 100)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want … %s …", err, tc.want)
			}
		})
	}
	for n := range len(good) {
		if _, err := readAll(bytes.NewReader(good[:n]), 100); err == nil {
			t.Errorf("an archive cut to %d of %d bytes was read without error", n, len(good))
		}
	}
}

// FuzzReader: whatever the Reader accepts, the Writer writes and the Reader reads again, equal.
func FuzzReader(f *testing.F) {
	f.Add(write(f, sample))
	f.Add(write(f, nil))
	f.Add([]byte(strings.Repeat(magic, 40)))
	f.Fuzz(func(t *testing.T, in []byte) {
		first, err := readAll(bytes.NewReader(in), 1<<16)
		if err != nil {
			return
		}
		again, err := readAll(bytes.NewReader(write(t, first)), 1<<16)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(first, again); d != "" {
			t.Errorf("(-first +again):\n%s", d)
		}
	})
}
