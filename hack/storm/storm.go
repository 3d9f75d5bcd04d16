package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
)

const (
	image = "test/busybox"
	// hung is how long one call of the docker client may take; nothing here needs a tenth of it.
	hung = 2 * time.Minute
)

// storm is one run.
type storm struct {
	config
	dir, root string
	host      string // as for DOCKER_HOST; the same for every daemon

	daemon  *servers.Daemon // the killer's alone, and the checks' afterwards
	workers []*worker

	mu   sync.Mutex
	errs []error
}

// known is what a worker may take for granted of something it has made.
type known int

const (
	unknown known = iota // the last act on it was not answered
	absent
	present
)

// worker acts on a container, a volume and a network that nobody else touches, and remembers what it was promised.
type worker struct {
	s    *storm
	name string
	rand *rand.Rand

	container, volume, network known
	always                     bool  // the container comes back by itself
	running                    known // present: it was started; absent: it was stopped
	acked                      int   // the last number that is on the volume's disk
	tried                      int   // the last number that was written there, promised or not
	done                       map[string]int
}

func run(ctx context.Context, c config) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("machines with networks and binds need root")
	}
	s := &storm{config: c}
	if s.Kcradle, err = filepath.Abs(c.Kcradle); err != nil {
		return err
	}
	if _, err := os.Stat(s.Kcradle); err != nil {
		return fmt.Errorf("%w (make build)", err)
	}
	if s.Archive == "" {
		cache, err := images.Open("", c.Log)
		if err != nil {
			return err
		}
		built, err := cache.Build(ctx, "busybox")
		if err != nil {
			return err
		}
		s.Archive = built.Archive
	}
	if s.dir, err = servers.TempDir(); err != nil {
		return err
	}
	s.root = filepath.Join(s.dir, "root")
	fmt.Fprintf(s.Log, "storm: seed %d, %d kills, %d workers, in %s\n", c.Seed, c.Kills, c.Workers, s.dir)
	if err := s.start(ctx); err != nil {
		return err
	}
	defer func() {
		s.daemon.Stop()
		for _, p := range s.processes() {
			_ = syscall.Kill(p.pid, syscall.SIGKILL) // it has our state directory
		}
		if err == nil {
			err = os.RemoveAll(s.dir)
		} else {
			fmt.Fprintf(s.Log, "storm: what there was is left in %s\n", s.dir)
		}
	}()
	if out, err := s.docker(ctx, "load", "-q", "-i", s.Archive); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	s.blow(ctx)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.settle(ctx)
	s.remove(ctx)
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(s.errs...)
}

func (s *storm) start(ctx context.Context) (err error) {
	s.daemon, err = servers.StartDaemon(ctx, s.dir, s.Kcradle)
	if err == nil {
		s.host = s.daemon.Host
	}
	return err
}

// wrong notes that something is not as it has to be.
func (s *storm) wrong(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	err := fmt.Errorf(format, args...)
	fmt.Fprintln(s.Log, "storm: WRONG:", err)
	s.errs = append(s.errs, err)
}

// docker runs the client. A call that takes too long is wrong whatever the storm does.
func (s *storm) docker(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, hung)
	defer cancel()
	cmd := servers.Client(ctx, s.host, args...)
	cmd.WaitDelay = time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if ctx.Err() == context.DeadlineExceeded {
		s.wrong("docker %s: no answer within %v", strings.Join(args, " "), hung)
	}
	if err != nil {
		err = fmt.Errorf("docker %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return strings.TrimSpace(string(out)), err
}

// blow lets the workers work and kills what they work with.
func (s *storm) blow(ctx context.Context) {
	working, over := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for i := range s.Workers {
		w := &worker{s: s, name: fmt.Sprintf("w%d", i), rand: rand.New(rand.NewPCG(s.Seed, uint64(i)+1)), container: absent, volume: absent,
			network: absent, running: absent, done: map[string]int{}}
		s.workers = append(s.workers, w)
		wg.Go(func() {
			for working.Err() == nil {
				w.act(ctx) // what has begun is finished
			}
		})
	}
	r := rand.New(rand.NewPCG(s.Seed, 0))
	killed := map[string]int{}
	for n := 0; n < s.Kills && ctx.Err() == nil; {
		select {
		case <-time.After(time.Duration(r.Int64N(int64(s.Pause)) + 1)): // the moment is the input
		case <-ctx.Done():
		}
		what, pids := "daemon", []int{s.daemon.Pid()}
		if k := r.IntN(10); k >= 4 {
			what, pids = []string{supervisor, machine}[k%2], nil
			for _, p := range s.processes() {
				if p.kind == what {
					pids = append(pids, p.pid)
				}
			}
		}
		if len(pids) == 0 {
			continue
		}
		pid := pids[r.IntN(len(pids))]
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
			continue // it has just ended
		}
		n++
		killed[what]++
		if what == "daemon" {
			if err := s.restart(ctx); err != nil {
				s.wrong("the daemon does not start again: %w", err)
				break
			}
		}
	}
	over()
	wg.Wait()
	fmt.Fprintf(s.Log, "storm: killed %v\n", killed)
	for _, w := range s.workers {
		fmt.Fprintf(s.Log, "storm: %s was answered %v\n", w.name, w.done)
	}
}

// restart starts a daemon after the last one was killed.
func (s *storm) restart(ctx context.Context) error {
	s.daemon.Stop() // waits for its end
	return s.start(ctx)
}

// Kinds of processes that a container has.
const (
	supervisor = "supervisor"
	machine    = "machine"
)

// process is one of them.
type process struct {
	pid       int
	kind      string
	container string // its ID; "" when it is none's
}

// processes are the supervisors and machines of this state directory. A supervisor names its bundle in its arguments, a machine
// has the bundle's disk open.
func (s *storm) processes() (out []process) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	containers := s.root + "/containers/"
	id := func(text string) string {
		_, rest, _ := strings.Cut(text, containers)
		return rest[:min(len(rest), 64)]
	}
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		exe, _ := os.Readlink(dir + "/exe") // all of it may be gone
		switch args, _ := os.ReadFile(dir + "/cmdline"); {
		case bytes.Contains(args, []byte("--supervise-fd")) && bytes.Contains(args, []byte(containers)):
			out = append(out, process{pid, supervisor, id(string(args))})
		case strings.HasPrefix(filepath.Base(exe), "qemu-system-"):
			fds, _ := os.ReadDir(dir + "/fd")
			for _, fd := range fds {
				if target, _ := os.Readlink(filepath.Join(dir, "fd", fd.Name())); strings.HasPrefix(target, containers) {
					out = append(out, process{pid, machine, id(target)})
					break
				}
			}
		}
	}
	slices.SortFunc(out, func(a, b process) int { return a.pid - b.pid })
	return out
}

// act does one thing at random and remembers the answer.
func (w *worker) act(ctx context.Context) {
	ask := func(args ...string) bool {
		_, err := w.s.docker(ctx, args...)
		if err == nil {
			w.done[args[0]]++
		}
		return err == nil
	}
	// learn is what is known after an act that makes something so.
	learn := func(k *known, becomes known, ok bool) bool {
		if ok {
			*k = becomes
		} else {
			*k = unknown
		}
		return ok
	}
	if w.container != present {
		if w.container == unknown {
			w.running = unknown
			if !learn(&w.container, absent, ask("rm", "-f", w.name)) {
				return
			}
			w.running = absent
		}
		if w.volume != present {
			learn(&w.volume, present, ask("volume", "create", w.name)) // as often as one likes
			return
		}
		if w.network != present {
			if w.network == absent || ask("network", "rm", "-f", w.name) {
				learn(&w.network, present, ask("network", "create", w.name))
			}
			return
		}
		policy := "no"
		if w.always = w.rand.IntN(2) == 0; w.always {
			policy = "unless-stopped"
		}
		if learn(&w.container, present, ask("create", "--name", w.name, "--restart", policy, "--network", w.name, "-v", w.name+":/data",
			image, "sleep", "100000")) {
			w.running = absent
		}
		return
	}
	switch k := w.rand.IntN(12); {
	case w.running != present:
		learn(&w.running, present, ask("start", w.name))
	case k < 7:
		w.tried++
		if ask("exec", w.name, "sh", "-c", fmt.Sprintf("echo %d >/data/new && sync && mv /data/new /data/n && sync", w.tried)) {
			w.acked = w.tried
		} else if !w.always { // it may have been killed under us
			w.running = unknown
		}
	case k < 9:
		learn(&w.running, absent, ask("stop", "-t", "0", w.name))
	case k < 10:
		if !ask("restart", "-t", "0", w.name) {
			w.running = unknown
		}
	default:
		if learn(&w.container, absent, ask("rm", "-f", w.name)) {
			w.running = absent
		}
		if w.container == absent && w.rand.IntN(2) == 0 {
			learn(&w.network, absent, ask("network", "rm", w.name))
		}
	}
}

// settle waits until all is as it was promised, or says what is not.
func (s *storm) settle(ctx context.Context) {
	if err := syscall.Kill(s.daemon.Pid(), syscall.SIGKILL); err != nil {
		s.wrong("the daemon has gone: %w", err)
	}
	if err := s.restart(ctx); err != nil {
		s.wrong("the daemon does not start again: %w", err)
		return
	}
	var wrongs []string
	for end := time.Now().Add(time.Minute); ; time.Sleep(200 * time.Millisecond) { // what is to come back comes when it comes
		wrongs = s.lies(ctx)
		if len(wrongs) == 0 || time.Now().After(end) {
			break
		}
	}
	for _, w := range wrongs {
		s.wrong("%s", w)
	}

	// What was written and synced is on the disks.
	args := []string{"run", "--rm", "--network", "none"}
	var script strings.Builder
	for _, w := range s.workers {
		if _, err := s.docker(ctx, "rm", "-f", w.name); err != nil {
			s.wrong("%s cannot be removed: %w", w.name, err)
		}
		if w.acked == 0 {
			continue
		}
		args = append(args, "-v", w.name+":/"+w.name)
		fmt.Fprintf(&script, "echo %s $(cat /%s/n)\n", w.name, w.name)
	}
	if script.Len() == 0 {
		fmt.Fprintln(s.Log, "storm: nothing was written; the storm was too short")
		return
	}
	out, err := s.docker(ctx, append(args, image, "sh", "-c", script.String())...)
	if err != nil {
		s.wrong("the volumes cannot be read: %w", err)
		return
	}
	for _, w := range s.workers {
		if w.acked == 0 {
			continue
		}
		_, rest, _ := strings.Cut("\n"+out+"\n", "\n"+w.name+" ")
		text, _, _ := strings.Cut(rest, "\n")
		got, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil || got < w.acked || got > w.tried {
			s.wrong("volume %s holds %q; %d was acknowledged, %d was the last that was tried", w.name, text, w.acked, w.tried)
		}
	}
}

// lies are where the daemon's words are not what was promised, or not what there is.
func (s *storm) lies(ctx context.Context) (out []string) {
	lie := func(format string, args ...any) { out = append(out, fmt.Sprintf(format, args...)) }
	list, err := s.docker(ctx, "ps", "-a", "--no-trunc", "--format", "{{.Names}} {{.State}} {{.ID}}")
	if err != nil {
		return []string{err.Error()}
	}
	state, has := map[string]string{}, map[string][]string{}
	for _, p := range s.processes() {
		has[p.container] = append(has[p.container], p.kind)
	}
	for line := range strings.Lines(list) {
		f := strings.Fields(line)
		state[f[0]] = f[1]
		want := []string(nil)
		if f[1] == "running" {
			want = []string{machine, supervisor}
		}
		if got := slices.Sorted(slices.Values(has[f[2]])); !slices.Equal(got, want) {
			lie("%s is %s and has the processes %q", f[0], f[1], got)
		}
		delete(has, f[2])
	}
	for id, kinds := range has {
		lie("%q of container %s, which is not there", kinds, id)
	}
	things := func(kind string) string {
		out, err := s.docker(ctx, kind, "ls", "--format", "{{.Name}}")
		if err != nil {
			lie("%v", err)
		}
		return "\n" + out + "\n"
	}
	volumes, networks := things("volume"), things("network")
	for _, w := range s.workers {
		st, there := state[w.name]
		switch {
		case w.container == present && !there:
			lie("container %s is lost", w.name)
		case w.container == absent && there:
			lie("container %s was removed and is %s", w.name, st)
		case w.container == present && w.running == absent && st == "running":
			lie("container %s was stopped and runs", w.name)
		case w.container == present && w.running == present && w.always && st != "running":
			lie("container %s was started, comes back by itself, and is %s", w.name, st)
		}
		if has := strings.Contains(volumes, "\n"+w.name+"\n"); w.volume == present && !has {
			lie("volume %s is lost", w.name)
		}
		if has := strings.Contains(networks, "\n"+w.name+"\n"); has != (w.network == present) && w.network != unknown {
			lie("network %s: there is %v", w.name, has)
		}
	}
	return out
}

// remove removes everything and looks for what is left.
func (s *storm) remove(ctx context.Context) {
	all := func(list []string, remove ...string) {
		out, err := s.docker(ctx, list...)
		if err != nil {
			s.wrong("%w", err)
		}
		for name := range strings.FieldsSeq(out) {
			if _, err := s.docker(ctx, append(remove, name)...); err != nil {
				s.wrong("%w", err)
			}
		}
	}
	all([]string{"ps", "-aq"}, "rm", "-f", "-v")
	all([]string{"volume", "ls", "-q"}, "volume", "rm")
	all([]string{"network", "ls", "-q", "--filter", "type=custom"}, "network", "rm")
	all([]string{"images", "-q"}, "rmi") // refused while something leases its layers
	var left []string
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(200 * time.Millisecond) { // the processes' ends are nobody's to tell
		left = s.left()
		if len(left) == 0 || time.Now().After(end) {
			break
		}
	}
	for _, l := range left {
		s.wrong("left over: %s", l)
	}
}

// left is what there is although everything was removed.
func (s *storm) left() (out []string) {
	for _, p := range s.processes() {
		out = append(out, fmt.Sprintf("%s %d of container %s", p.kind, p.pid, p.container))
	}
	for _, dir := range []string{"containers", "volumes"} {
		entries, err := os.ReadDir(filepath.Join(s.root, dir))
		if err != nil {
			out = append(out, err.Error())
		}
		for _, e := range entries {
			out = append(out, filepath.Join(dir, e.Name()))
		}
	}
	for file, what := range map[string]string{"/proc/self/mounts": "mount", "/proc/net/unix": "socket"} {
		b, _ := os.ReadFile(file)
		for line := range strings.Lines(string(b)) {
			if strings.Contains(line, s.root+"/containers/") {
				out = append(out, what+" "+strings.TrimSpace(line))
			}
		}
	}
	// Layers and their leases: there is no image any more.
	_ = filepath.WalkDir(s.root, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && (strings.HasSuffix(path, ".erofs") || strings.Contains(path, "/leases/")) {
			out = append(out, path)
		}
		return nil // others come and go meanwhile
	})
	if fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.daemon.Pid())); err == nil && len(fds) > 64 {
		out = append(out, fmt.Sprintf("%d descriptors of the daemon", len(fds)))
	}
	return out
}
