package disk

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// fakeBlock makes a /sys/block.
func fakeBlock(t *testing.T, disks map[string][2]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, d := range disks {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
		for file, content := range map[string]string{"serial": d[0], "size": d[1]} {
			if err := os.WriteFile(filepath.Join(dir, name, file), []byte(content), 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	return dir
}

func TestDrives(t *testing.T) {
	for _, tt := range []struct {
		name  string
		disks map[string][2]string
		want  map[string]Drive
		err   string
	}{
		{"three", map[string][2]string{"vda": {"layers", "16\n"}, "vdb": {"scratch\n", "2048\n"}, "vdc": {"", "1\n"}, "loop0": {"scratch", "1\n"}},
			map[string]Drive{"layers": {"/dev/vda"}, "scratch": {"/dev/vdb"}}, ""},
		{"twenty bytes without an end", map[string][2]string{"vda": {"12345678901234567890", "1\n"}},
			map[string]Drive{"12345678901234567890": {"/dev/vda"}}, ""},
		{"twice", map[string][2]string{"vda": {"x", "1"}, "vdb": {"x", "1"}}, nil, `the same serial number "x"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := drives(fakeBlock(t, tt.disks), "/dev")
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("got error %v, want %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("drives (-want +got):\n%s", d)
			}
		})
	}
	_, err := Find(map[string]Drive{"b": {}, "a": {}}, "scratch")
	if want := `the machine has no drive with the serial number "scratch" (it has: "a", "b")`; err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

func TestLinearRefuses(t *testing.T) {
	d := Drive{Path: "/dev/vda"}
	for _, tt := range []struct {
		name           string
		offset, length int64
		want           string
	}{
		{"odd", 1, 512, "no whole sectors"},
		{"empty", 0, 0, "no whole sectors"},
		{"negative", -512, 512, "no whole sectors"},
	} {
		if _, err := Linear("x", d, tt.offset, tt.length, ReadOnly); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %q", tt.name, err, tt.want)
		}
	}
}

func TestLinearTable(t *testing.T) {
	b, err := linearTable("layer1", "/dev/vda", 8, 16, ReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	if n := binary.NativeEndian.Uint32(b[dmOffDataSize:]); int(n) != len(b) || len(b)%8 != 0 {
		t.Errorf("size: %d of %d", n, len(b))
	}
	if got := string(b[dmOffName : dmOffName+6]); got != "layer1" {
		t.Errorf("name: %q", got)
	}
	if binary.NativeEndian.Uint32(b[dmOffFlags:]) != dmReadOnly {
		t.Error("a device to be read can be written")
	}
	spec := b[dmHeaderSize:]
	if binary.NativeEndian.Uint64(spec[8:]) != 16 || string(spec[24:30]) != "linear" || string(spec[dmSpecSize:dmSpecSize+11]) != "/dev/vda 8\x00" {
		t.Errorf("target: %q", spec)
	}
	if _, err := linearTable(strings.Repeat("x", dmNameSize), "/dev/vda", 0, 1, Writable); err == nil {
		t.Error("a name that does not fit was taken")
	}
}

func TestMountWritableRefuses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(file, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	err := MountWritable(Drive{Path: file}, t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "holds no ext4 file system") {
		t.Errorf("got %v", err)
	}
}
