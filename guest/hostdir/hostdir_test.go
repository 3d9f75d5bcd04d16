package hostdir_test

import (
	"bufio"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/internal/vmtest"
	"github.com/kcradle/kcradle/share"
	"github.com/kcradle/kcradle/spec"
)

// A real kernel's 9P client against package share, over the real channel.
func TestInMachine(t *testing.T) {
	need.Root(t) // files of other users
	dir := t.TempDir()
	write := func(name, content string, mode os.FileMode) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.WriteFile(path, []byte(content), 0o600), os.Chmod(path, mode)); err != nil {
			t.Fatal(err)
		}
	}
	large := make([]byte, 8<<20)
	rand.Read(large)
	write("hello", "hello, guest", 0o644)
	write("secret", "secret", 0o600)
	write("config", "one file", 0o644)
	write("large", string(large), 0o644)
	write("ping", "ping", 0o644)
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "many"), 0o755), os.Mkdir(filepath.Join(dir, "open"), 0o755),
		os.Chmod(filepath.Join(dir, "open"), 0o777)); err != nil {
		t.Fatal(err)
	}
	for i := range 2000 {
		write(fmt.Sprintf("many/%d", i), "", 0o644)
	}

	vm := vmtest.Boot(t, vmtest.Options{Init: "./testdata/guest"})
	for i, s := range []struct {
		path string
		mode share.Mode
	}{{dir, share.ReadWrite}, {dir, share.ReadOnly}, {filepath.Join(dir, "config"), share.ReadWrite}} {
		sh, err := share.Open(s.path, s.mode)
		if err != nil {
			t.Fatal(err)
		}
		conn := vm.Dial(spec.PortShare)
		if _, err := conn.Write(binary.BigEndian.AppendUint16(nil, uint16(i))); err != nil {
			t.Fatal(err)
		}
		served := make(chan error, 1)
		go func() { served <- sh.Serve(conn) }()
		t.Cleanup(func() {
			vm.Kill()
			conn.Close()
			if err := errors.Join(<-served, sh.Close()); err != nil {
				t.Errorf("serve %s: %v", s.path, err)
			}
		})
	}
	answered := make(chan struct{})
	go func() {
		defer close(answered)
		for t.Context().Err() == nil {
			if _, err := os.Stat(filepath.Join(dir, "asked")); err == nil {
				if err := os.WriteFile(filepath.Join(dir, "ping"), []byte("pong"), 0o644); err != nil {
					t.Error(err)
				}
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	}()
	report := vm.Dial(spec.PortControl)
	defer report.Close()
	checks, ended := 0, false
	for s := bufio.NewScanner(report); !ended && s.Scan(); {
		switch line := s.Text(); {
		case line == "end":
			ended = true
		case strings.HasPrefix(line, "ok "):
			checks++
			t.Log(line)
		default:
			t.Error(line)
		}
	}
	if !ended || checks < 18 {
		t.Fatalf("the guest reported %d checks and end is %v; want all 18", checks, ended)
	}
	<-answered

	b, err := os.ReadFile(filepath.Join(dir, "large.copy"))
	sum, err2 := os.ReadFile(filepath.Join(dir, "large.sum"))
	if want := sha256.Sum256(large); err != nil || err2 != nil || sha256.Sum256(b) != want || string(sum) != fmt.Sprintf("%x", want) {
		t.Errorf("the large file changed on its way: %v %v", err, err2)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "mapped")); err != nil || !strings.HasPrefix(string(b[4096:]), "mapped") {
		t.Errorf("a shared mapping did not reach the host: %v", err)
	}
	for name, want := range map[string]struct {
		mode     fs.FileMode
		uid, gid uint32
	}{
		"open/mine": {0o640, 1234, 1234},
		"open/dir":  {fs.ModeDir | 0o750, 1234, 1234},
		"renamed":   {0o604, 7, 8},
	} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
			continue
		}
		sys := st.Sys().(*syscall.Stat_t)
		if st.Mode() != want.mode || sys.Uid != want.uid || sys.Gid != want.gid {
			t.Errorf("%s: got %v %d:%d, want %v %d:%d", name, st.Mode(), sys.Uid, sys.Gid, want.mode, want.uid, want.gid)
		}
	}
}
