package rootfs

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// User is who a container's process runs as.
type User struct {
	UID, GID uint32
	Groups   []uint32 // supplementary, ascending
	Home     string   // "/" when nobody says
}

// Bounds of files that an image brings.
const (
	maxUserFile = 16 << 20
	maxUserLine = 1 << 20
	maxID       = 1<<31 - 1 // as docker
)

type passwdEntry struct {
	name     string
	uid, gid uint32
	home     string
}

type groupEntry struct {
	name    string
	gid     uint32
	members []string
}

// LookupUser resolves name|uid[:group|gid] in the passwd and group files of the tree at root, by docker's rules: a name
// that is there wins over a number, a number need not be there, a user without a group named gets the groups of the
// file. add are further groups. The error texts are docker's.
func LookupUser(root, spec string, add []string) (User, error) {
	passwd, err := readUserFile(root, "/etc/passwd")
	if err != nil {
		return User{}, err
	}
	group, err := readUserFile(root, "/etc/group")
	if err != nil {
		return User{}, err
	}
	return lookup(spec, add, strings.NewReader(passwd), strings.NewReader(group))
}

func readUserFile(root, path string) (string, error) {
	// Without O_NONBLOCK a FIFO at that name would wait for a writer for ever.
	f, err := open(root, path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
			return "", nil // as if empty
		}
		return "", fmt.Errorf("read the image's %s: %w", path, err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() {
		return "", errors.Join(err, fmt.Errorf("the image's %s is no regular file", path))
	}
	b, err := io.ReadAll(io.LimitReader(f, maxUserFile))
	if err != nil {
		return "", fmt.Errorf("read the image's %s: %w", path, err)
	}
	return string(b), nil
}

func lookup(spec string, add []string, passwd, group io.Reader) (User, error) {
	userArg, groupArg, _ := strings.Cut(spec, ":")
	users, err := parsePasswd(passwd)
	if err != nil {
		return User{}, err
	}
	groups, err := parseGroup(group)
	if err != nil {
		return User{}, err
	}
	u := User{Home: "/"}
	uid, numeric := parseID(userArg)
	i := slices.IndexFunc(users, func(e passwdEntry) bool {
		if userArg == "" {
			return e.uid == 0
		}
		return e.name == userArg
	})
	if i < 0 && numeric {
		i = slices.IndexFunc(users, func(e passwdEntry) bool { return e.uid == uid })
	}
	name := ""
	switch {
	case i >= 0:
		e := users[i]
		u.UID, u.GID, name = e.uid, e.gid, e.name
		if e.home != "" {
			u.Home = e.home
		}
	case userArg == "":
	case numeric:
		u.UID = uid
	default:
		if isNumber(userArg) {
			return User{}, errors.New("uids and gids must be in range 0-2147483647")
		}
		return User{}, fmt.Errorf("unable to find user %s: no matching entries in passwd file", userArg)
	}
	if groupArg != "" {
		gid, err := findGroup(groups, groupArg)
		if err != nil {
			return User{}, err
		}
		u.GID = gid
	} else if name != "" {
		for _, g := range groups {
			if slices.Contains(g.members, name) {
				u.Groups = append(u.Groups, g.gid)
			}
		}
	}
	for _, a := range add {
		gid, err := findGroup(groups, a)
		if err != nil {
			return User{}, err
		}
		u.Groups = append(u.Groups, gid)
	}
	// Docker lists the primary group among them, too.
	u.Groups = append(u.Groups, u.GID)
	slices.Sort(u.Groups)
	u.Groups = slices.Compact(u.Groups)
	return u, nil
}

func findGroup(groups []groupEntry, arg string) (uint32, error) {
	if i := slices.IndexFunc(groups, func(g groupEntry) bool { return g.name == arg }); i >= 0 {
		return groups[i].gid, nil
	}
	if gid, ok := parseID(arg); ok {
		return gid, nil
	}
	if isNumber(arg) {
		return 0, errors.New("uids and gids must be in range 0-2147483647")
	}
	return 0, fmt.Errorf("unable to find group %s: no matching entries in group file", arg)
}

func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n <= maxID
}

func isNumber(s string) bool {
	_, err := strconv.ParseInt(s, 10, 64)
	return err == nil || errors.Is(err, strconv.ErrRange)
}

// parsePasswd reads name:password:uid:gid:comment:home:shell. Lines that are none are passed over.
func parsePasswd(r io.Reader) ([]passwdEntry, error) {
	var out []passwdEntry
	err := eachEntry(r, "passwd", func(f []string) {
		if len(f) < 4 {
			return
		}
		uid, ok := parseID(f[2])
		gid, ok2 := parseID(f[3])
		if !ok || !ok2 {
			return
		}
		e := passwdEntry{name: f[0], uid: uid, gid: gid}
		if len(f) > 5 {
			e.home = f[5]
		}
		out = append(out, e)
	})
	return out, err
}

// parseGroup reads name:password:gid:member,member.
func parseGroup(r io.Reader) ([]groupEntry, error) {
	var out []groupEntry
	err := eachEntry(r, "group", func(f []string) {
		if len(f) < 3 {
			return
		}
		gid, ok := parseID(f[2])
		if !ok {
			return
		}
		g := groupEntry{name: f[0], gid: gid}
		if len(f) > 3 && f[3] != "" {
			g.members = strings.Split(f[3], ",")
		}
		out = append(out, g)
	})
	return out, err
}

func eachEntry(r io.Reader, file string, fn func(fields []string)) error {
	s := bufio.NewScanner(r)
	s.Buffer(nil, maxUserLine)
	for s.Scan() {
		line := strings.TrimSpace(s.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		fn(strings.Split(line, ":"))
	}
	if err := s.Err(); err != nil {
		return fmt.Errorf("parse the image's %s file: %w", file, err)
	}
	return nil
}
