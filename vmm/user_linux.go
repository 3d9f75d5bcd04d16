package vmm

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Machines run as users of a range of their own, above what distributions, containers and systemd hand out. Which one is
// drawn: of 64 million no two machines of a host get the same, so none can touch the processes of another.
const (
	firstUser = 0x6C000000
	users     = 1 << 26
)

const nobody = 65534

// Unprivileged is the user that a root supervisor runs QEMU as, and nil for other callers. With KVM it belongs to the
// group of /dev/kvm; when no group may use the device the error says so, and QEMU can only run as root.
func Unprivileged(engine Engine) (*Credential, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	id := firstUser + rand.Uint32N(users)
	c := &Credential{UID: id, GID: id}
	if !mapped("/proc/self/uid_map", c.UID) || !mapped("/proc/self/gid_map", c.GID) {
		c.UID, c.GID = nobody, nobody
	}
	if engine == KVM {
		var st unix.Stat_t
		if err := unix.Stat(kvmDevice, &st); err != nil {
			return nil, &os.PathError{Op: "stat", Path: kvmDevice, Err: err}
		}
		switch {
		case st.Mode&0o006 == 0o006:
		case st.Mode&0o060 == 0o060 && st.Gid != 0:
			c.Groups = []uint32{st.Gid}
		default:
			return nil, fmt.Errorf("%s is for root alone, so QEMU would have to run as root (chgrp kvm %s && chmod 660 %s)", kvmDevice, kvmDevice, kvmDevice)
		}
	}
	return c, nil
}

// mapped says whether an id exists in this user namespace.
func mapped(path string, id uint32) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var first, outside, count uint64
		if _, err := fmt.Sscan(strings.TrimSpace(s.Text()), &first, &outside, &count); err == nil && uint64(id) >= first && uint64(id)-first < count {
			return true
		}
	}
	return false
}
