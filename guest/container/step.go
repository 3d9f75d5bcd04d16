package container

import (
	"fmt"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Register numbers: results of earlier steps that later ones use, descriptors mostly.
const (
	regStdin = iota
	regStdout
	regStderr
	regMaster // of the terminal
	regTmp
	regSources // and those behind it: detached mounts
)

var regNames = []string{"stdin", "stdout", "stderr", "master", "fd"}

// reg is an argument that stands for a register's value.
type reg int

func (r reg) String() string {
	if int(r) < len(regNames) {
		return regNames[r]
	}
	return fmt.Sprintf("source%d", int(r)-regSources)
}

// Step is one system call of a container's start.
type Step struct {
	text   string        // what it does, for people and for golden files
	textOf func() string // the same, put together when somebody asks

	nr     uintptr
	args   [6]uintptr
	use    [6]int8 // 1 + the register that replaces the argument; 0: none
	save   int8    // 1 + the register that takes the result; 0: none
	ignore [3]syscall.Errno
	kind   stepKind
	path   string // of an exec or chdir
}

// Text is what the step does, for people.
func (s *Step) Text() string {
	text := s.text
	if s.textOf != nil {
		text = s.textOf()
	}
	if s.save != 0 {
		text = reg(s.save-1).String() + " = " + text
	}
	return text
}

type stepKind uint8

const (
	kindPlain stepKind = iota
	kindChdir
	kindExec
)

// table collects steps. The memory that they point to stays reachable through keep.
type table struct {
	steps []Step
	keep  [][]byte
	ptrs  [][]*byte
	regs  int
	err   error
}

// add appends a step. Arguments are integers, strings (passed as a pointer to a NUL-terminated copy), byte slices
// (as a pointer) and registers. At most six.
func (t *table) add(text string, nr uintptr, args ...any) *Step {
	return t.step(Step{text: text, nr: nr}, args)
}

// addf is add with a text that takes work to make: starts are many, and few have to be told about.
func (t *table) addf(text func() string, nr uintptr, args ...any) *Step {
	return t.step(Step{textOf: text, nr: nr}, args)
}

func (t *table) step(s Step, args []any) *Step {
	for i, a := range args {
		switch v := a.(type) {
		case int:
			s.args[i] = uintptr(v)
		case uint32:
			s.args[i] = uintptr(v)
		case uint64:
			s.args[i] = uintptr(v)
		case uintptr:
			s.args[i] = v
		case string:
			b, err := syscall.ByteSliceFromString(v)
			if err != nil && t.err == nil {
				t.err = fmt.Errorf("%s: NUL byte in %q", s.Text(), v)
			}
			s.args[i] = t.pointer(b)
		case []byte:
			s.args[i] = t.pointer(v)
		case reg:
			s.use[i] = int8(v) + 1
		case nil:
		default:
			panic(fmt.Sprintf("container: internal error: step argument of type %T", a))
		}
	}
	t.steps = append(t.steps, s)
	return &t.steps[len(t.steps)-1]
}

func (t *table) pointer(b []byte) uintptr {
	if len(b) == 0 {
		return 0
	}
	t.keep = append(t.keep, b)
	return address(b)
}

// may lists errors that do not matter.
func (s *Step) may(errs ...syscall.Errno) *Step {
	copy(s.ignore[:], errs)
	return s
}

func (s *Step) to(r reg) *Step {
	s.save = int8(r) + 1
	return s
}

// holdsFD reports whether the descriptor in regTmp is open before step i: a table that fails there leaves it behind.
func (t *table) holdsFD(i int) bool {
	held := false
	for _, s := range t.steps[:i] {
		switch {
		case s.save == int8(regTmp)+1:
			held = true
		case s.nr == unix.SYS_CLOSE && s.use[0] == int8(regTmp)+1:
			held = false
		}
	}
	return held
}

// Recurring calls.

func atFD(fd int) uintptr { return uintptr(fd) } // AT_FDCWD is negative

func (t *table) mount(source, target, fstype string, flags uintptr, data string) *Step {
	text := func() string {
		text := "mount " + source + " on " + target
		if fstype != "" {
			text += " type " + fstype
		}
		return text + mountText(flags, data)
	}
	var d any
	if data != "" {
		d = data
	}
	var f any
	if fstype != "" {
		f = fstype
	}
	return t.addf(text, unix.SYS_MOUNT, source, target, f, flags, d)
}

func (t *table) bind(source, target string) *Step {
	return t.mount(source, target, "", unix.MS_BIND|unix.MS_REC, "")
}

// remountBind changes the flags of a mount without touching its file system.
func (t *table) remountBind(target string, flags uintptr) *Step {
	return t.mount("none", target, "", unix.MS_BIND|unix.MS_REMOUNT|flags, "")
}

func (t *table) mkdir(path string, mode int) *Step {
	return t.addf(func() string { return fmt.Sprintf("mkdir %s %#o", path, mode) }, unix.SYS_MKDIRAT, atFD(unix.AT_FDCWD), path, mode).
		may(syscall.EEXIST, syscall.EROFS)
}

// mkdirAll makes a directory with its parents; links in the path lead where they lead inside the container.
func (t *table) mkdirAll(path string, mode int) {
	for i := 1; i < len(path); i++ {
		if path[i] == '/' {
			t.mkdir(path[:i], mode)
		}
	}
	if path != "/" {
		t.mkdir(path, mode)
	}
}

// mkfile makes an empty file to mount something on.
func (t *table) mkfile(path string) {
	if i := strings.LastIndexByte(path, '/'); i > 0 {
		t.mkdirAll(path[:i], 0o755)
	}
	t.addf(func() string { return "mkfile " + path }, unix.SYS_MKNODAT, atFD(unix.AT_FDCWD), path, unix.S_IFREG|0o755, 0).
		may(syscall.EEXIST, syscall.EROFS)
}

func (t *table) symlink(target, path string) *Step {
	return t.addf(func() string { return "symlink " + path + " to " + target }, unix.SYS_SYMLINKAT, target, atFD(unix.AT_FDCWD), path).
		may(syscall.EEXIST, syscall.EROFS)
}

func (t *table) write(path, value string) *Step {
	t.addf(func() string { return "open " + path }, unix.SYS_OPENAT, atFD(unix.AT_FDCWD), path, unix.O_WRONLY|unix.O_CLOEXEC, 0).to(regTmp)
	s := t.addf(func() string { return fmt.Sprintf("write %q to %s", value, path) }, unix.SYS_WRITE, reg(regTmp), value, len(value))
	t.add("close fd", unix.SYS_CLOSE, reg(regTmp))
	return s
}

var mountFlagNames = []struct {
	flag uintptr
	name string
}{
	{unix.MS_REMOUNT, "remount"},
	{unix.MS_BIND, "bind"},
	{unix.MS_REC, "rec"},
	{unix.MS_PRIVATE, "private"},
	{unix.MS_MOVE, "move"},
	{unix.MS_RDONLY, "ro"},
	{unix.MS_NOSUID, "nosuid"},
	{unix.MS_NODEV, "nodev"},
	{unix.MS_NOEXEC, "noexec"},
	{unix.MS_NOATIME, "noatime"},
	{unix.MS_NODIRATIME, "nodiratime"},
	{unix.MS_RELATIME, "relatime"},
	{unix.MS_STRICTATIME, "strictatime"},
	{unix.MS_SYNCHRONOUS, "sync"},
	{unix.MS_DIRSYNC, "dirsync"},
	{unix.MS_MANDLOCK, "mand"},
}

func mountText(flags uintptr, data string) string {
	var words []string
	for _, f := range mountFlagNames {
		if flags&f.flag != 0 {
			words = append(words, f.name)
			flags &^= f.flag
		}
	}
	if flags != 0 {
		words = append(words, fmt.Sprintf("%#x", flags))
	}
	if data != "" {
		words = append(words, data)
	}
	if words == nil {
		return ""
	}
	return " (" + strings.Join(words, ",") + ")"
}

// Text is the table as golden files hold it, a line per step.
func stepsText(steps []Step) string {
	var b strings.Builder
	for _, s := range steps {
		b.WriteString(s.Text())
		var ignored []string
		for _, e := range s.ignore {
			if e != 0 {
				ignored = append(ignored, unix.ErrnoName(e))
			}
		}
		if ignored != nil {
			b.WriteString(" [" + strings.Join(ignored, ", ") + " do not matter]")
		}
		b.WriteByte('\n')
	}
	return b.String()
}
