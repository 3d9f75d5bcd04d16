// Package ps lists processes as ps(1) does, from /proc, for the API's "top": the program need not exist anywhere.
//
//	titles, rows, err := ps.List("/proc", pids, []string{"-ef"})
//
// It knows the forms that people use with docker top: -ef and -e -f (the default), aux, and -o with a list of columns.
package ps

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// ticks is USER_HZ, the unit of times in /proc/PID/stat: 100 on every architecture that Linux shows to programs.
const ticks = 100

// ErrUsage is returned (wrapped) for arguments that are not known.
var ErrUsage = errors.New("known are: -ef, aux, and -o with columns")

// process is what /proc says of one process.
type process struct {
	pid, ppid, uid, gid, threads int
	comm, args, state            string
	tty                          int
	cpu                          time.Duration // user and system
	start                        time.Duration // since the kernel's start
	vsz, rss                     uint64        // bytes
	nice, priority               int
}

// machine is what a column needs beside the process.
type machine struct {
	now    time.Time
	uptime time.Duration
	memory uint64 // bytes
}

// column is one column of the output, by the name that ps -o knows.
type column struct {
	name, title string
	value       func(p *process, m *machine) string
}

var (
	user   = column{"user", "USER", func(p *process, _ *machine) string { return userName(p.uid) }}
	uid    = column{"uid", "UID", func(p *process, _ *machine) string { return strconv.Itoa(p.uid) }}
	pid    = column{"pid", "PID", func(p *process, _ *machine) string { return strconv.Itoa(p.pid) }}
	stime  = column{"stime", "STIME", func(p *process, m *machine) string { return startTime(p, m) }}
	tty    = column{"tty", "TTY", func(p *process, _ *machine) string { return ttyName(p.tty) }}
	cputim = column{"time", "TIME", func(p *process, _ *machine) string { return clock(p.cpu) }}
	cmd    = column{"args", "CMD", func(p *process, _ *machine) string { return p.args }}
	rss    = column{"rss", "RSS", func(p *process, _ *machine) string { return kib(p.rss) }}
	vsz    = column{"vsz", "VSZ", func(p *process, _ *machine) string { return kib(p.vsz) }}
	stat   = column{"stat", "STAT", func(p *process, _ *machine) string { return state(p) }}
	pcpu   = column{"pcpu", "%CPU", func(p *process, m *machine) string { return percent(share(p, m)) }}
	pmem   = column{"pmem", "%MEM", func(p *process, m *machine) string {
		return percent(100 * float64(p.rss) / float64(max(m.memory, 1)))
	}}
)

// full is ps -ef.
var full = []column{
	{"uid", "UID", user.value}, pid, {"ppid", "PPID", ppid}, {"c", "C", func(p *process, m *machine) string {
		return strconv.Itoa(int(math.Min(share(p, m), 99)))
	}}, stime, tty, cputim, cmd,
}

// aux is ps aux.
var aux = []column{
	user, pid, pcpu, pmem, vsz, rss, tty, stat, {"start", "START", stime.value},
	{"time", "TIME", func(p *process, _ *machine) string {
		s := int(p.cpu.Seconds())
		return fmt.Sprintf("%d:%02d", s/60, s%60)
	}}, {"command", "COMMAND", cmd.value},
}

// columns are those of -o, by every name they go by.
var columns = []column{
	user, {"euser", "EUSER", user.value}, uid, {"euid", "EUID", uid.value},
	{"gid", "GID", func(p *process, _ *machine) string { return strconv.Itoa(p.gid) }},
	pid, {"ppid", "PPID", ppid}, pcpu, {"%cpu", "%CPU", pcpu.value}, pmem, {"%mem", "%MEM", pmem.value},
	rss, vsz, {"c", "C", full[3].value}, stime, {"start", "STARTED", stime.value},
	{"tty", "TT", tty.value}, {"tt", "TT", tty.value}, {"tname", "TTY", tty.value},
	cputim, {"cputime", "TIME", cputim.value}, stat, {"state", "S", letter}, {"s", "S", letter},
	{"ni", "NI", nice}, {"nice", "NI", nice},
	{"nlwp", "NLWP", func(p *process, _ *machine) string { return strconv.Itoa(p.threads) }},
	{"comm", "COMMAND", comm}, {"ucmd", "CMD", comm},
	{"args", "COMMAND", cmd.value}, {"cmd", "CMD", cmd.value}, {"command", "COMMAND", cmd.value},
	{"etime", "ELAPSED", func(p *process, m *machine) string { return clock(m.uptime - p.start) }},
}

func ppid(p *process, _ *machine) string   { return strconv.Itoa(p.ppid) }
func letter(p *process, _ *machine) string { return p.state }
func nice(p *process, _ *machine) string   { return strconv.Itoa(p.nice) }
func comm(p *process, _ *machine) string   { return p.comm }

// List describes processes by their numbers in the given proc file system. Processes that end meanwhile are left out.
// No arguments mean -ef. The command column is the last one in every form but -o's own order.
func List(proc string, pids []int, args []string) (titles []string, rows [][]string, err error) {
	cols, err := parse(args)
	if err != nil {
		return nil, nil, err
	}
	for _, c := range cols {
		titles = append(titles, c.title)
	}
	m, err := readMachine(proc)
	if err != nil {
		return nil, nil, err
	}
	for _, n := range pids {
		p, err := read(proc, n)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, errGone) {
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		var row []string
		for _, c := range cols {
			row = append(row, c.value(p, m))
		}
		rows = append(rows, row)
	}
	return titles, rows, nil
}

// parse chooses the columns.
func parse(args []string) ([]column, error) {
	if len(args) == 1 {
		args = strings.Fields(args[0])
	}
	cols := full
	for i := 0; i < len(args); i++ {
		list, isList := "", false
		switch a := args[i]; {
		case a == "-ef" || a == "-e" || a == "-f" || a == "-A" || a == "-fe":
			continue
		case a == "aux" || a == "-aux":
			cols = aux
		case a == "-o" || a == "-eo" || a == "o" || a == "-Ao":
			if i++; i == len(args) {
				return nil, fmt.Errorf("ps %s: a list of columns must follow: %w", a, ErrUsage)
			}
			list, isList = args[i], true
		case strings.HasPrefix(a, "-o"):
			list, isList = a[2:], true
		case strings.HasPrefix(a, "-eo"):
			list, isList = a[3:], true
		default:
			return nil, fmt.Errorf("ps %s: %w", a, ErrUsage)
		}
		if isList {
			chosen, err := choose(list)
			if err != nil {
				return nil, err
			}
			cols = chosen
		}
	}
	return cols, nil
}

func choose(list string) ([]column, error) {
	var out []column
next:
	for name := range strings.SplitSeq(list, ",") {
		name, title, renamed := strings.Cut(name, "=")
		for _, c := range columns {
			if c.name == strings.ToLower(name) {
				if renamed {
					c.title = title
				}
				out = append(out, c)
				continue next
			}
		}
		return nil, fmt.Errorf("ps -o %s: unknown column: %w", name, ErrUsage)
	}
	return out, nil
}

func readMachine(proc string) (*machine, error) {
	m := &machine{now: time.Now()}
	b, err := os.ReadFile(filepath.Join(proc, "uptime"))
	if err != nil {
		return nil, err
	}
	seconds, _, _ := strings.Cut(string(b), " ")
	f, err := strconv.ParseFloat(seconds, 64)
	if err != nil {
		return nil, fmt.Errorf("read %s/uptime: %w", proc, err)
	}
	m.uptime = time.Duration(f * float64(time.Second))
	b, err = os.ReadFile(filepath.Join(proc, "meminfo"))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "MemTotal:"); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			if err != nil {
				return nil, fmt.Errorf("read %s/meminfo: %w", proc, err)
			}
			m.memory = n << 10
		}
	}
	return m, nil
}

// errGone says that a process ended while it was read.
var errGone = errors.New("process has ended")

func read(proc string, n int) (*process, error) {
	dir := filepath.Join(proc, strconv.Itoa(n))
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		if strings.Contains(err.Error(), "no such process") {
			return nil, errGone
		}
		return nil, err
	}
	p, err := parseStat(b)
	if err != nil {
		return nil, fmt.Errorf("read %s/stat: %w", dir, err)
	}
	b, err = os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return nil, errGone
	}
	for line := range strings.Lines(string(b)) {
		// Real, effective, saved and file-system numbers; ps shows the effective one.
		if f := strings.Fields(line); len(f) == 5 {
			switch f[0] {
			case "Uid:":
				p.uid, _ = strconv.Atoi(f[2])
			case "Gid:":
				p.gid, _ = strconv.Atoi(f[2])
			}
		}
	}
	b, err = os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return nil, errGone
	}
	p.args = printable(strings.Join(strings.Split(strings.TrimRight(string(b), "\x00"), "\x00"), " "))
	if p.args == "" { // a kernel thread or a zombie
		p.args = "[" + p.comm + "]"
		if p.state == "Z" {
			p.args += " <defunct>"
		}
	}
	return p, nil
}

// parseStat reads /proc/PID/stat: pid (comm) state ppid …, see proc_pid_stat(5). The name may hold anything, so the
// fields are counted from the last parenthesis.
func parseStat(b []byte) (*process, error) {
	open, end := bytes.IndexByte(b, '('), bytes.LastIndexByte(b, ')')
	if open < 0 || end < open {
		return nil, errors.New("no name in parentheses")
	}
	f := strings.Fields(string(b[end+1:]))
	if len(f) < 22 {
		return nil, fmt.Errorf("%d fields are fewer than 22", len(f))
	}
	// f[i] is field i+3 of the manual page.
	num := func(field int) int64 {
		n, _ := strconv.ParseInt(f[field-3], 10, 64)
		return n
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(b[:open])))
	if err != nil {
		return nil, err
	}
	return &process{
		pid: n, comm: printable(string(b[open+1 : end])), state: f[0],
		ppid: int(num(4)), tty: int(num(7)),
		cpu:      time.Duration(num(14)+num(15)) * time.Second / ticks,
		priority: int(num(18)), nice: int(num(19)), threads: int(num(20)),
		start: time.Duration(num(22)) * time.Second / ticks,
		vsz:   uint64(num(23)), rss: uint64(num(24)) * uint64(os.Getpagesize()),
	}, nil
}

// printable replaces what would disturb a terminal or a table.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return '?'
		}
		return r
	}, s)
}

// userName is what a machine without users of its own knows: root, and numbers.
func userName(uid int) string {
	if uid == 0 {
		return "root"
	}
	return strconv.Itoa(uid)
}

// share is the average use of a CPU since the start, in percent.
func share(p *process, m *machine) float64 {
	age := m.uptime - p.start
	if age <= 0 {
		return 0
	}
	return 100 * float64(p.cpu) / float64(age)
}

func percent(f float64) string { return strconv.FormatFloat(f, 'f', 1, 64) }

func kib(n uint64) string { return strconv.FormatUint(n>>10, 10) }

// clock is [DD-]hh:mm:ss.
func clock(d time.Duration) string {
	s := int(max(d, 0).Seconds())
	days, s := s/86400, s%86400
	out := fmt.Sprintf("%02d:%02d:%02d", s/3600, s/60%60, s%60)
	if days > 0 {
		out = fmt.Sprintf("%d-%s", days, out)
	}
	return out
}

// startTime is the time of day within a day, the date within a year, else the year.
func startTime(p *process, m *machine) string {
	t := m.now.Add(p.start - m.uptime)
	switch age := m.now.Sub(t); {
	case age < 24*time.Hour:
		return t.Format("15:04")
	case t.Year() == m.now.Year():
		return t.Format("Jan02")
	default:
		return t.Format("2006")
	}
}

// ttyName decodes a device number as the kernel packs it: minor bits 31-20 and 7-0, major bits 15-8.
func ttyName(dev int) string {
	major, minor := dev>>8&0xfff, dev&0xff|dev>>12&0xfff00
	switch {
	case dev == 0:
		return "?"
	case major >= 136 && major <= 143:
		return "pts/" + strconv.Itoa((major-136)<<8|minor)
	case major == 229:
		return "hvc" + strconv.Itoa(minor)
	case major == 4:
		return "tty" + strconv.Itoa(minor)
	}
	return "?"
}

// state is the letter and the signs that ps adds.
func state(p *process) string {
	s := p.state
	switch {
	case p.nice < 0:
		s += "<"
	case p.nice > 0:
		s += "N"
	}
	if p.threads > 1 {
		s += "l"
	}
	return s
}
