// Package template keeps machines that were stopped when they were ready, so that others need not boot. A template is a
// snapshot (package vmm) with the proof that it is whole and ours.
//
//	store := template.Open(dir, template.DefaultBudget, log)
//	t, err := store.Find(shape)                     // ErrNone: boot, and make one beside it
//	config.Restore = &t.Snapshot
//	err = store.Make(ctx, shape, config, prepare)   // boots, prepares, snapshots; one at a time
//
// The store is a directory that belongs to one user and that nobody else can enter:
//
//	KEY/template.json, memory, state    a template; the directory appears whole, by a rename
//	KEY/process.json, process           beside them, with the engine tcg: QEMU's process, frozen
//	.making-*                           one that is being made, or was when its maker died
//	.bad-*                              one that was set aside
//	lock                                held while one is made
package template

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/internal/undo"
	"github.com/kcradle/kcradle/vmm"
	"github.com/kcradle/kcradle/vmm/checkpoint"
)

// DefaultBudget is how much disk the templates of a store may take together, in bytes.
const DefaultBudget = 2 << 30

// Version of template.json, and of what a template's guest must be able to do.
//
// History:
//   - 1: first version.
const Version = 1

const (
	manifestFile = "template.json"
	memoryFile   = "memory"
	stateFile    = "state"
	frozenFile   = "process.json"
	processFile  = "process"
	lockFile     = "lock"
	making       = ".making-"
	bad          = ".bad-"
)

// Limits of what is read.
const (
	maxManifest = 1 << 20
	maxState    = 16 << 20
	maxFrozen   = 16 << 20
)

var (
	// ErrNone says that there is no template of that shape.
	ErrNone = errors.New("no template of this shape")
	// ErrBusy says that another process makes a template in this store.
	ErrBusy = errors.New("another process is making a template")
)

// Shape is everything that a template depends on.
type Shape struct {
	Args   []string `json:"args"`          // of QEMU; see vmm.Config.Shape
	QEMU   File     `json:"qemu"`          //
	Kernel string   `json:"kernel"`        // digest
	Initrd string   `json:"initrd"`        // digest
	CPU    string   `json:"cpu,omitempty"` // of the host, and its kernel, where the processor executes the guest
}

// File is a file that is not read to know that it is the same.
type File struct {
	Path     string    `json:"path"`
	Size     int64     `json:"size"`
	Modified time.Time `json:"modified"`
	Inode    uint64    `json:"inode"`
}

// ShapeOf is the shape of a machine. kernel and initrd are the digests of what the config boots.
func ShapeOf(c vmm.Config, kernel, initrd string) (Shape, error) {
	s := Shape{Args: c.Shape(), Kernel: kernel, Initrd: initrd}
	path, err := filepath.EvalSymlinks(c.QEMU)
	if err != nil {
		return s, fmt.Errorf("look at QEMU: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return s, fmt.Errorf("look at QEMU: %w", err)
	}
	s.QEMU = File{Path: path, Size: info.Size(), Modified: info.ModTime().UTC(), Inode: info.Sys().(*syscall.Stat_t).Ino}
	if c.Engine == vmm.KVM {
		if s.CPU, err = processor(); err != nil {
			return s, err
		}
	}
	return s, nil
}

// processor names the host's processor and kernel: the state of a guest that they execute holds what they can do.
func processor() (string, error) {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "", err
	}
	var out []string
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		if strings.TrimSpace(line) == "" { // the first one's
			break
		}
		switch strings.TrimSpace(name) {
		case "vendor_id", "cpu family", "model", "stepping", "microcode", "flags":
			out = append(out, strings.TrimSpace(value))
		}
	}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", os.NewSyscallError("uname", err)
	}
	return strings.Join(append(out, unix.ByteSliceToString(u.Release[:])), " "), nil
}

// Key names a shape: 32 hexadecimal digits.
func (s Shape) Key() string {
	b, err := json.Marshal(struct {
		Version int
		Shape   Shape
	}{Version, s})
	if err != nil {
		panic(fmt.Sprintf("template: internal error: %v", err)) // plain values
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:16])
}

// manifest is template.json.
type manifest struct {
	Version int       `json:"version"`
	Shape   Shape     `json:"shape"`
	Created time.Time `json:"created"`
	Memory  content   `json:"memory"`
	State   content   `json:"state"`
	// Both empty: there is none.
	Frozen  content `json:"frozen,omitzero"`
	Process content `json:"process,omitzero"`
}

// content proves that a file is what was written. Memory is too large to be read at each start: whoever changes it changes
// when it was last changed.
type content struct {
	Size    int64  `json:"size"`
	Blocks  int64  `json:"blocks,omitempty"` // bytes on disk
	Digest  string `json:"digest"`           // "sha256:…"
	Inode   uint64 `json:"inode,omitempty"`
	Changed int64  `json:"changed,omitempty"` // ctime, nanoseconds since 1970
}

// Template is a snapshot in the store.
type Template struct {
	Key      string
	Snapshot vmm.Snapshot
	Shape    Shape
	Created  time.Time
	Used     time.Time // the last time, or when it was made
	Size     int64     // bytes on disk

	dir      string
	manifest manifest
}

// ErrStale is in the error of Thaw when the host has changed since the machine was frozen: Snapshot is as good as ever, and a
// template that is made anew can be thawed.
var ErrStale = checkpoint.ErrStale

// Frozen says whether the machine's QEMU is in the template, too.
func (t *Template) Frozen() bool { return t.manifest.Process.Digest != "" }

// Stale says whether Thaw would fail because of the host.
func (t *Template) Stale() bool {
	if !t.Frozen() {
		return false
	}
	f, err := t.frozen()
	return err == nil && errors.Is(f.Process.Check(), ErrStale)
}

// frozen reads the description of the frozen machine.
func (t *Template) frozen() (*vmm.Frozen, error) {
	raw, _, err := readOwn(filepath.Join(t.dir, frozenFile), maxFrozen)
	if err != nil {
		return nil, err
	}
	if got := digest(raw); got != t.manifest.Frozen.Digest {
		return nil, fmt.Errorf("%s is damaged: its digest is %s, not %s", frozenFile, got, t.manifest.Frozen.Digest)
	}
	f := new(vmm.Frozen)
	if err := json.Unmarshal(raw, f); err != nil {
		return nil, fmt.Errorf("parse %s: %w", frozenFile, err)
	}
	return f, nil
}

// Thaw starts the machine that is frozen in the template; see vmm.Adopt. Of c it sets Memory and Process.
func (t *Template) Thaw(c vmm.ThawConfig, log *slog.Logger) (*vmm.Handover, error) {
	f, err := t.frozen()
	if err != nil {
		return nil, err
	}
	if err := f.Process.Check(); err != nil {
		return nil, err
	}
	return thaw(f, t.dir, c, log)
}

func thaw(f *vmm.Frozen, dir string, c vmm.ThawConfig, log *slog.Logger) (*vmm.Handover, error) {
	process, err := os.Open(filepath.Join(dir, processFile))
	if err != nil {
		return nil, err
	}
	defer process.Close()
	c.Memory, c.Process = filepath.Join(dir, memoryFile), process
	return vmm.Thaw(f, c, log)
}

// Store is a directory of templates. Several processes may use it at the same time.
type Store struct {
	dir    string
	budget int64
	log    *slog.Logger
}

// Open returns the store in a directory, which the first Make makes. Templates together take at most budget bytes of disk.
func Open(dir string, budget int64, log *slog.Logger) *Store { return &Store{dir, budget, log} }

// Find returns the template of a shape, or ErrNone. One that is damaged is set aside and reported in the log.
func (s *Store) Find(shape Shape) (*Template, error) {
	key := shape.Key()
	t, err := s.load(key)
	switch {
	case err == nil:
		now := time.Now()
		_ = os.Chtimes(filepath.Join(s.dir, key, manifestFile), now, now) // for what is removed first
		return t, nil
	case errors.Is(err, fs.ErrNotExist):
		if _, serr := os.Lstat(filepath.Join(s.dir, key)); errors.Is(serr, fs.ErrNotExist) {
			return nil, ErrNone
		}
	}
	s.SetAside(key, err)
	return nil, ErrNone
}

// load reads a template and checks all that can be checked without reading its memory.
func (s *Store) load(key string) (*Template, error) {
	for _, dir := range []string{s.dir, filepath.Join(s.dir, key)} {
		if err := private(dir); err != nil {
			return nil, err
		}
	}
	dir := filepath.Join(s.dir, key)
	raw, info, err := readOwn(filepath.Join(dir, manifestFile), maxManifest)
	if err != nil {
		return nil, err
	}
	var m manifest
	if err := json.Unmarshal(raw, &m); err != nil {
		return nil, fmt.Errorf("parse %s: %w", manifestFile, err)
	}
	if m.Version != Version || m.Shape.Key() != key {
		return nil, fmt.Errorf("%s is of another version or shape", manifestFile)
	}
	t := &Template{
		Key: key, Shape: m.Shape, Created: m.Created, Used: info.ModTime(), dir: dir, manifest: m,
		Snapshot: vmm.Snapshot{Memory: filepath.Join(dir, memoryFile), State: filepath.Join(dir, stateFile)},
	}
	state, _, err := readOwn(t.Snapshot.State, maxState)
	if err != nil {
		return nil, err
	}
	if got := digest(state); got != m.State.Digest {
		return nil, fmt.Errorf("%s is damaged: its digest is %s, not %s", stateFile, got, m.State.Digest)
	}
	t.Size = int64(len(state))
	for name, c := range t.large() {
		now, err := stat(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		t.Size += now.Blocks
		if now.Size != c.Size || now.Inode != c.Inode || now.Changed != c.Changed {
			return nil, fmt.Errorf("%s was changed since it was made", name)
		}
	}
	return t, nil
}

// large lists the files that are not read at each start.
func (t *Template) large() map[string]content {
	files := map[string]content{memoryFile: t.manifest.Memory}
	if t.Frozen() {
		files[processFile] = t.manifest.Process
	}
	return files
}

// Check reads a template's memory and compares it with what was written.
func (t *Template) Check(ctx context.Context) error {
	for name, c := range t.large() {
		got, err := digestFile(ctx, filepath.Join(t.dir, name))
		if err == nil && got != c.Digest {
			err = fmt.Errorf("%s is damaged: its digest is %s, not %s", name, got, c.Digest)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// private checks that a directory is the caller's, and that nobody else can enter it.
func private(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	if !info.IsDir() || int(st.Uid) != os.Geteuid() || info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%s is not a directory of this user's alone (owner %d, %s)", dir, st.Uid, info.Mode())
	}
	return nil
}

// stat describes a file of the caller's.
func stat(path string) (content, error) {
	info, err := os.Lstat(path)
	if err != nil {
		return content{}, err
	}
	st := info.Sys().(*syscall.Stat_t)
	if !info.Mode().IsRegular() || int(st.Uid) != os.Geteuid() {
		return content{}, fmt.Errorf("%s is not a file of this user's (owner %d, %s)", path, st.Uid, info.Mode())
	}
	return content{Size: st.Size, Blocks: st.Blocks * 512, Inode: st.Ino, Changed: st.Ctim.Nano()}, nil
}

// readOwn reads a file of the caller's.
func readOwn(path string, limit int64) ([]byte, fs.FileInfo, error) {
	if _, err := stat(path); err != nil {
		return nil, nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", path, limit)
	}
	return b, info, err
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return "sha256:" + hex.EncodeToString(sum[:])
}

// digestFile is the digest of a file's data, with where each piece lies; its holes are not read.
func digestFile(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	for at := int64(0); ; {
		if err := ctx.Err(); err != nil {
			return "", err
		}
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // only a hole is left
			return "sha256:" + hex.EncodeToString(h.Sum(nil)), nil
		}
		if err == nil {
			at, err = unix.Seek(int(f.Fd()), data, unix.SEEK_HOLE)
		}
		if err != nil {
			return "", &os.PathError{Op: "seek", Path: path, Err: err}
		}
		fmt.Fprintf(h, "%d %d\n", data, at)
		if _, err := io.Copy(h, io.NewSectionReader(f, data, at-data)); err != nil {
			return "", err
		}
	}
}

// SetAside takes a template out of use, whatever is wrong with it; the next Make removes it.
func (s *Store) SetAside(key string, reason error) {
	aside, err := os.MkdirTemp(s.dir, bad+key+"-")
	if err == nil {
		err = os.Rename(filepath.Join(s.dir, key), filepath.Join(aside, key))
	}
	if errors.Is(err, fs.ErrNotExist) { // somebody else was faster
		_ = os.Remove(aside)
		return
	}
	s.log.Warn("a template is not used any more", "template", key, "reason", reason)
	if err != nil {
		s.log.Warn("it cannot be set aside", "template", key, "error", err)
	}
}

// Make makes a template: it boots the machine of config, whose drives are blank, calls prepare when QEMU runs, and takes
// the snapshot when prepare has returned. ErrBusy when another process makes one in this store. What a maker that died
// left behind is removed, and then the templates that were not used for longest until the budget is kept.
func (s *Store) Make(ctx context.Context, shape Shape, config vmm.Config, prepare func(context.Context, *vmm.Machine) error) (err error) {
	defer func() {
		if err != nil && !errors.Is(err, ErrBusy) {
			err = fmt.Errorf("make template: %w", err)
		}
	}()
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return err
	}
	if err := private(s.dir); err != nil {
		return err
	}
	lock, err := s.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := s.clear(); err != nil {
		return err
	}
	if err := s.room(config.Memory); err != nil {
		return err
	}
	var u undo.Stack
	defer u.Run()
	dir, err := os.MkdirTemp(s.dir, making)
	if err != nil {
		return err
	}
	u.Push(func() { os.RemoveAll(dir) })
	snapshot := vmm.Snapshot{Memory: filepath.Join(dir, memoryFile), State: filepath.Join(dir, stateFile)}
	config.MemoryFile, config.Restore = snapshot.Memory, nil
	m, err := vmm.Start(ctx, config, s.log)
	if err != nil {
		return err
	}
	u.Push(func() { m.Kill(); m.Wait() })
	if err := prepare(ctx, m); err != nil {
		return err
	}
	if err := m.Snapshot(ctx, snapshot.State); err != nil {
		return err
	}
	m.Kill()
	m.Wait()
	// Machines get descriptors of it; by its name only we come there.
	if err := os.Chmod(snapshot.Memory, 0o600); err != nil {
		return err
	}
	if config.Engine == vmm.TCG {
		if err := s.freeze(ctx, dir, config, snapshot, prepare); err != nil {
			if ctx.Err() != nil {
				return err
			}
			s.log.Warn("starts from the template will be slower than they could be", "error", err)
		}
	}
	if err := describe(ctx, dir, shape); err != nil {
		return err
	}
	key := shape.Key()
	if _, err := os.Lstat(filepath.Join(s.dir, key)); err == nil {
		s.SetAside(key, errors.New("a newer one replaces it"))
	}
	if err := os.Rename(dir, filepath.Join(s.dir, key)); err != nil {
		return err
	}
	u.Keep()
	return s.shrink(key)
}

// Rehearsals is how often a machine that others come from, or that stands ready, is prepared: where the processor is emulated,
// each start comes past code that QEMU has not translated before: the first takes half a second, the second a quarter of that,
// the eighth half of the second.
const Rehearsals = 4

// freeze restores a machine from a template that is being made, prepares it, and writes its QEMU beside it. That it can be
// thawed here is proved by doing so.
func (s *Store) freeze(ctx context.Context, dir string, config vmm.Config, snapshot vmm.Snapshot, prepare func(context.Context, *vmm.Machine) error) (err error) {
	defer func() {
		if err != nil {
			_ = os.Remove(filepath.Join(dir, processFile))
			_ = os.Remove(filepath.Join(dir, frozenFile))
		}
	}()
	config.Name, config.MemoryFile, config.Restore, config.Transferable = "kcradle", "", &snapshot, true
	m, err := vmm.Start(ctx, config, s.log)
	if err != nil {
		return err
	}
	defer func() { m.Kill(); m.Wait() }()
	for range Rehearsals {
		if err := prepare(ctx, m); err != nil {
			return err
		}
	}
	h, err := m.Give(ctx)
	if err != nil {
		return err
	}
	defer h.Close()
	process, err := os.OpenFile(filepath.Join(dir, processFile), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer process.Close()
	f, err := h.Freeze(ctx, process)
	if err != nil {
		return err
	}
	raw, err := json.Marshal(f)
	if err != nil {
		return err
	}
	if len(raw) > maxFrozen {
		return fmt.Errorf("%s is larger than %d bytes", frozenFile, maxFrozen)
	}
	if err := os.WriteFile(filepath.Join(dir, frozenFile), raw, 0o600); err != nil {
		return err
	}
	again := vmm.ThawConfig{RunAs: config.RunAs}
	if config.Wire != nil {
		again.Wire = config.Wire.File
	}
	if h, err = thaw(f, dir, again, s.log); err != nil {
		return err
	}
	thawed, err := vmm.Adopt(ctx, h, config, s.log)
	if err != nil {
		return err
	}
	defer func() { thawed.Kill(); thawed.Wait() }()
	if err := thawed.Attached(); err != nil {
		return err
	}
	return prepare(ctx, thawed)
}

// describe makes the files of a template final and writes template.json beside them.
func describe(ctx context.Context, dir string, shape Shape) error {
	m := manifest{Version: Version, Shape: shape, Created: time.Now().UTC()}
	for name, c := range map[string]*content{memoryFile: &m.Memory, processFile: &m.Process} {
		path := filepath.Join(dir, name)
		err := sync(path)
		if name == processFile && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			*c, err = stat(path)
		}
		if err == nil {
			c.Digest, err = digestFile(ctx, path)
		}
		if err != nil {
			return err
		}
	}
	for name, c := range map[string]*content{stateFile: &m.State, frozenFile: &m.Frozen} {
		path := filepath.Join(dir, name)
		err := sync(path)
		if name == frozenFile && errors.Is(err, fs.ErrNotExist) {
			continue
		}
		var b []byte
		if err == nil {
			b, _, err = readOwn(path, maxState)
		}
		if err != nil {
			return err
		}
		*c = content{Size: int64(len(b)), Digest: digest(b)}
	}
	raw, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, manifestFile)
	if err := os.WriteFile(path, append(raw, '\n'), 0o600); err != nil {
		return err
	}
	return sync(path)
}

// sync writes a file to its disk: after a crash of the host a template is whole, or its name is not there.
func sync(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	err = f.Sync()
	return errors.Join(err, f.Close())
}

// lock is held by the one maker of a store, and goes with its process.
func (s *Store) lock() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(s.dir, lockFile), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	l := unix.Flock_t{Type: unix.F_WRLCK}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &l); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
			return nil, ErrBusy
		}
		return nil, &os.PathError{Op: "fcntl", Path: f.Name(), Err: err}
	}
	return f, nil
}

// Wait waits until no template is being made.
func (s *Store) Wait(ctx context.Context) error {
	f, err := os.OpenFile(filepath.Join(s.dir, lockFile), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	free := make(chan error, 1)
	go func() { // ends with the maker, which is bounded
		defer f.Close()
		l := unix.Flock_t{Type: unix.F_WRLCK}
		for err := error(unix.EINTR); ; {
			if err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLKW, &l); err != unix.EINTR {
				free <- err
				return
			}
		}
	}()
	select {
	case err := <-free:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// Busy says whether a template is being made.
func (s *Store) Busy() bool {
	f, err := os.Open(filepath.Join(s.dir, lockFile))
	if err != nil {
		return false
	}
	defer f.Close()
	l := unix.Flock_t{Type: unix.F_RDLCK}
	return unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l) == nil && l.Type != unix.F_UNLCK
}

// clear removes what makers that died left behind, and what was set aside.
func (s *Store) clear() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), making) || strings.HasPrefix(e.Name(), bad) {
			errs = append(errs, os.RemoveAll(filepath.Join(s.dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}

// footprint is about what a template takes on disk: the kernel, init and what they have touched. A disk that becomes full
// under a machine's memory kills QEMU.
const footprint = 256 << 20

// room checks that the disk has place for one more template.
func (s *Store) room(memory int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return &os.PathError{Op: "statfs", Path: s.dir, Err: err}
	}
	need := min(memory, footprint)
	if free := int64(st.Bavail) * st.Bsize; free < need {
		return fmt.Errorf("%s has %d MiB free, and a template may need %d MiB (make room, or KCRADLE_TEMPLATES=off)", s.dir, free>>20, need>>20)
	}
	return nil
}

// List returns the templates, the one that was used last first, and why others are none.
func (s *Store) List() (list []*Template, damaged map[string]error, err error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, nil, fmt.Errorf("list templates: %w", err)
	}
	damaged = map[string]error{}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), ".") || e.Name() == lockFile {
			continue
		}
		t, err := s.load(e.Name())
		if err != nil {
			damaged[e.Name()] = err
			continue
		}
		list = append(list, t)
	}
	slices.SortFunc(list, func(a, b *Template) int { return b.Used.Compare(a.Used) })
	return list, damaged, nil
}

// Remove removes a template. Machines that were restored from it are not disturbed.
func (s *Store) Remove(key string) error {
	if key != filepath.Base(key) || strings.HasPrefix(key, ".") || key == lockFile {
		return fmt.Errorf("template %q: %w", key, fs.ErrNotExist)
	}
	if _, err := os.Lstat(filepath.Join(s.dir, key)); err != nil {
		return fmt.Errorf("template %q: %w", key, fs.ErrNotExist)
	}
	aside, err := os.MkdirTemp(s.dir, bad)
	if err != nil {
		return fmt.Errorf("remove template: %w", err)
	}
	err = os.Rename(filepath.Join(s.dir, key), filepath.Join(aside, key))
	return errors.Join(err, os.RemoveAll(aside))
}

// shrink keeps the budget; the newest stays in any case.
func (s *Store) shrink(newest string) error {
	list, damaged, err := s.List()
	if err != nil {
		return err
	}
	var errs []error
	for key := range damaged {
		errs = append(errs, s.Remove(key))
	}
	sum := int64(0)
	for _, t := range list {
		if t.Key == newest {
			sum += t.Size
		}
	}
	for _, t := range list {
		if t.Key == newest {
			continue
		}
		if sum += t.Size; sum <= s.budget {
			continue
		}
		s.log.Info("a template is removed to keep the budget", "template", t.Key, "budget", s.budget)
		errs = append(errs, s.Remove(t.Key))
		sum -= t.Size
	}
	return errors.Join(errs...)
}
