package images

import (
	"archive/tar"
	"fmt"
	"os"
	"os/exec"
	"path"
	"strings"
)

// busyboxLayers is one layer: the static binary, a hard link for each of its commands, and the few files that make a
// root of it.
func busyboxLayers(_ *host) ([]writeLayer, error) {
	return busyboxRoot(busyboxTree{
		dirs: []folder{
			{"bin", 0o755}, {"dev", 0o755}, {"etc", 0o755}, {"home", 0o755}, {"proc", 0o755}, {"root", 0o700}, {"sbin", 0o755},
			{"sys", 0o755}, {"tmp", 0o1777}, {"usr", 0o755}, {"usr/bin", 0o755}, {"usr/sbin", 0o755}, {"var", 0o755}, {"var/www", 0o755},
		},
		files: []file{
			{"etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/home:/bin/false\n"},
			{"etc/group", 0o644, "root:x:0:\nmail:x:8:nobody\nnogroup:x:65534:\n"},
		},
		place: func(command string) string { return command },
	})
}

// busyboxBinLayers is the same as registries have it and as other people's tests expect it: every command in /bin, the
// users of a Debian system, and adduser and addgroup, which Debian's busybox is built without.
func busyboxBinLayers(_ *host) ([]writeLayer, error) {
	return busyboxRoot(busyboxTree{
		dirs: []folder{
			{"bin", 0o755}, {"dev", 0o755}, {"etc", 0o755}, {"home", 0o755}, {"root", 0o700}, {"tmp", 0o1777},
			{"usr", 0o755}, {"usr/sbin", 0o755}, {"var", 0o755}, {"var/spool", 0o755}, {"var/spool/mail", 0o755}, {"var/www", 0o755},
		},
		files: []file{
			{"etc/passwd", 0o644, body("busybox-passwd")},
			{"etc/group", 0o644, body("busybox-group")},
			{"etc/shadow", 0o600, "root:*::::::::\n"},
			{"bin/adduser", 0o755, body("busybox-adduser")},
			{"bin/addgroup", 0o755, body("busybox-addgroup")},
		},
		place: func(command string) string { return "bin/" + path.Base(command) },
	})
}

type folder struct {
	name string
	mode int64
}

// busyboxTree is what is around the binary.
type busyboxTree struct {
	dirs  []folder
	files []file
	place func(command string) string // where the link for a command goes, which busybox wants at "usr/bin/top"
}

func busyboxRoot(tree busyboxTree) ([]writeLayer, error) {
	binary, err := os.ReadFile(busyboxPath)
	if err != nil {
		return nil, err
	}
	list, err := exec.Command(busyboxPath, "--list-full").Output()
	if err != nil {
		return nil, fmt.Errorf("list busybox's commands: %w", err)
	}
	return []writeLayer{func(tw *tar.Writer) error {
		for _, d := range tree.dirs {
			if err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d.name + "/", Mode: d.mode, ModTime: epoch}); err != nil {
				return err
			}
		}
		there := map[string]bool{"bin/busybox": true}
		for _, f := range tree.files {
			there[f.Path] = true
			if err := regular(tw, f.Path, f.Mode, []byte(f.Body)); err != nil {
				return err
			}
		}
		if err := regular(tw, "bin/busybox", 0o755, binary); err != nil {
			return err
		}
		for command := range strings.FieldsSeq(string(list)) {
			name := tree.place(command)
			if there[name] || strings.HasPrefix(command, "linuxrc") {
				continue
			}
			there[name] = true
			err := tw.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: "bin/busybox", Mode: 0o755, ModTime: epoch})
			if err != nil {
				return err
			}
		}
		return nil
	}}, nil
}
