package vmm

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// oomWatch notices whether the host's kernel killed a process for memory: by the counter of the control group, and by
// the kernel's log. Either may be unreadable. In a PID namespace the log has other numbers than we: there the process is
// known by its user, if that is its own.
type oomWatch struct {
	user     uint32           // 0: not its own
	counters map[string]int64 // file → oom_kill at the start
	kmsg     int              // positioned at the log's end; -1: not readable
}

func newOOMWatch(user *Credential) *oomWatch {
	w := &oomWatch{counters: map[string]int64{}, kmsg: -1}
	if user != nil && user.UID >= firstUser {
		w.user = user.UID
	}
	groups, _ := os.ReadFile("/proc/self/cgroup")
	for _, path := range memoryEventFiles(groups) {
		if n, ok := oomKills(path); ok {
			w.counters[path] = n
		}
	}
	fd, err := unix.Open("/dev/kmsg", unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err == nil {
		if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
			_ = unix.Close(fd)
		} else {
			w.kmsg = fd
		}
	}
	return w
}

// memoryEventFiles names the files that count OOM kills for the groups of /proc/PID/cgroup.
func memoryEventFiles(groups []byte) []string {
	var files []string
	for line := range strings.Lines(string(groups)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		switch {
		case parts[0] == "0":
			files = append(files, filepath.Join("/sys/fs/cgroup", parts[2], "memory.events"))
		case parts[1] == "memory":
			files = append(files, filepath.Join("/sys/fs/cgroup/memory", parts[2], "memory.oom_control"))
		}
	}
	return files
}

func oomKills(path string) (int64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	for line := range strings.Lines(string(b)) {
		if s, ok := strings.CutPrefix(strings.TrimSpace(line), "oom_kill "); ok {
			n, err := strconv.ParseInt(s, 10, 64)
			return n, err == nil
		}
	}
	return 0, false
}

// verdict is where it stands that the process was killed for memory, or empty.
func (w *oomWatch) verdict(pid int) string {
	if line := w.logged(pid); line != "" {
		return "its kernel says: " + line
	}
	for path, before := range w.counters {
		if n, ok := oomKills(path); ok && n > before {
			return fmt.Sprintf("%s counts it", path)
		}
	}
	return ""
}

// logged reads what the kernel's log has gained. One record is one read.
func (w *oomWatch) logged(pid int) string {
	if w.kmsg < 0 {
		return ""
	}
	buf := make([]byte, 8<<10)
	for range 10000 {
		n, err := unix.Read(w.kmsg, buf)
		if err == unix.EPIPE { // records were overwritten
			continue
		}
		if err != nil || n <= 0 {
			return ""
		}
		if line := oomRecord(buf[:n], pid, w.user); line != "" {
			return line
		}
	}
	return ""
}

// oomRecord is the text of a record of /dev/kmsg that tells of the process's end by the OOM killer.
func oomRecord(record []byte, pid int, user uint32) string {
	_, text, ok := bytes.Cut(record, []byte(";"))
	if !ok {
		return ""
	}
	s := bufio.NewScanner(bytes.NewReader(text))
	if !s.Scan() {
		return ""
	}
	line := s.Text()
	_, killed, _ := strings.Cut(line, "Killed process ")
	if !strings.HasPrefix(killed, strconv.Itoa(pid)+" ") &&
		(killed == "" || user == 0 || !strings.Contains(killed, fmt.Sprintf(" UID:%d ", user))) {
		return ""
	}
	return printable([]byte(line), 200)
}

func (w *oomWatch) Close() {
	if w.kmsg >= 0 {
		_ = unix.Close(w.kmsg)
		w.kmsg = -1
	}
}
