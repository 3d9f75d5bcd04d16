package rootfs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/guest/sandboxtest"
)

func TestMain(m *testing.M) { sandboxtest.Inside(m) }

const (
	passwd = `# comment
root:x:0:0:root:/root:/bin/bash

www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
1234:x:77:78:a name of digits:/home/digits:/bin/sh
short:x:5
bad:x:five:5::/:/bin/sh
nohome:x:9:9::
`
	group = `root:x:0:
www-data:x:33:
adm:x:4:www-data,syslog
ssl:x:101:root,www-data
55:x:66:
broken:x
`
)

func TestLookup(t *testing.T) {
	for _, tt := range []struct {
		name, spec string
		add        []string
		want       User
		err        string
	}{
		{"nobody named", "", nil, User{0, 0, []uint32{0, 101}, "/root"}, ""},
		{"name", "www-data", nil, User{33, 33, []uint32{4, 33, 101}, "/var/www"}, ""},
		{"number of an entry", "33", nil, User{33, 33, []uint32{4, 33, 101}, "/var/www"}, ""},
		{"number without entry", "4711", nil, User{4711, 0, []uint32{0}, "/"}, ""},
		{"name of digits wins", "1234", nil, User{77, 78, []uint32{78}, "/home/digits"}, ""},
		{"group name", "www-data:adm", nil, User{33, 4, []uint32{4}, "/var/www"}, ""},
		{"group number", "4711:4712", nil, User{4711, 4712, []uint32{4712}, "/"}, ""},
		{"group name of digits", "0:55", nil, User{0, 66, []uint32{66}, "/root"}, ""},
		{"group alone", ":adm", nil, User{0, 4, []uint32{4}, "/root"}, ""},
		{"without home", "nohome", nil, User{9, 9, []uint32{9}, "/"}, ""},
		{"further groups", "4711", []string{"adm", "999"}, User{4711, 0, []uint32{0, 4, 999}, "/"}, ""},
		{"unknown name", "alice", nil, User{}, "unable to find user alice: no matching entries in passwd file"},
		{"entry that is none", "bad", nil, User{}, "unable to find user bad: no matching entries in passwd file"},
		{"unknown group", "root:wheel", nil, User{}, "unable to find group wheel: no matching entries in group file"},
		{"unknown further group", "root", []string{"wheel"}, User{}, "unable to find group wheel: no matching entries in group file"},
		{"too large", "4294967296", nil, User{}, "uids and gids must be in range 0-2147483647"},
		{"negative", "-1", nil, User{}, "uids and gids must be in range 0-2147483647"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := lookup(tt.spec, tt.add, strings.NewReader(passwd), strings.NewReader(group))
			if tt.err != "" {
				if err == nil || err.Error() != tt.err {
					t.Errorf("got error %v, want %s", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, got); d != "" {
				t.Errorf("user (-want +got):\n%s", d)
			}
		})
	}
}

// TestLookupHostile has images whose passwd is not what it should be.
func TestLookupHostile(t *testing.T) {
	for _, tt := range []struct {
		name string
		make func(t *testing.T, etc string) error
		err  string
	}{
		{"link out of the image", func(t *testing.T, etc string) error {
			return os.Symlink("../../../../../../../../etc/passwd", filepath.Join(etc, "passwd"))
		}, "unable to find user daemon"},
		{"absolute link", func(t *testing.T, etc string) error {
			return os.Symlink("/etc/shadow", filepath.Join(etc, "passwd"))
		}, "unable to find user daemon"},
		{"directory", func(t *testing.T, etc string) error { return os.Mkdir(filepath.Join(etc, "passwd"), 0o755) }, "no regular file"},
		{"FIFO", func(t *testing.T, etc string) error { return mkfifo(filepath.Join(etc, "passwd")) }, "no regular file"},
		{"endless line", func(t *testing.T, etc string) error {
			return os.WriteFile(filepath.Join(etc, "passwd"), make([]byte, maxUserLine+1), 0o644)
		}, "token too long"},
		{"missing", func(*testing.T, string) error { return nil }, "unable to find user daemon"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			root := t.TempDir()
			if err := os.Mkdir(filepath.Join(root, "etc"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := tt.make(t, filepath.Join(root, "etc")); err != nil {
				t.Fatal(err)
			}
			if _, err := LookupUser(root, "daemon", nil); err == nil || !strings.Contains(err.Error(), tt.err) {
				t.Errorf("got error %v, want one with %q", err, tt.err)
			}
		})
	}
}

func FuzzUsers(f *testing.F) {
	f.Add(passwd, group, "www-data:adm")
	f.Add("root:x:0:0:::", "", "0")
	f.Fuzz(func(t *testing.T, passwd, group, spec string) {
		u, err := lookup(spec, []string{"adm"}, strings.NewReader(passwd), strings.NewReader(group))
		if err != nil {
			return
		}
		if u.UID > maxID || u.GID > maxID || u.Home == "" {
			t.Errorf("got %+v", u)
		}
	})
}
