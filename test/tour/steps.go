package tour

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
	"github.com/google/go-cmp/cmp"
)

// psFormat shows what docker ps knows, sorted by the caller.
const psFormat = `{{.Names}}|{{.Image}}|{{.Command}}|{{.State}}|{{.Status}}|{{.Ports}}|{{.Networks}}|{{.Mounts}}|{{.Label "tour"}}|{{.Label "with.value"}}`

func (r *tour) created() {
	r.both("ps of none", docker("ps", "--format", psFormat))
	r.both("ps of all created", docker("ps", "-a", "--no-trunc", "--format", psFormat))
	r.both("inspect of a created one", docker("inspect", "-f", "{{json .State}} {{.Path}} {{json .Args}} {{.Name}}", "main"))
	r.both("logs of a created one", docker("logs", "main"))
}

func (r *tour) starts() {
	// The client attaches, waits for the next exit and then starts: nothing may be lost however short the life.
	for i := range 5 {
		r.both(fmt.Sprintf("attach before the start, %d", i), docker("start", "-a", "quick"))
	}
	r.both("attach before the start, two streams", docker("start", "-a", "fail"))
	r.both("attach before the start, megabytes", docker("start", "-a", "big"))
	r.both("attach with input", call{args: []string{"start", "-ai", "cat"}, stdin: strings.Repeat("0123456789abcde\n", 1<<15)})
	r.both("attach with input, again", call{args: []string{"start", "-ai", "cat"}, stdin: "no newline"})
	r.both("start of what is missing", docker("start", "missing"), docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.Error}}", "missing"))
	r.both("start of what may not run", docker("start", "refused"), docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.Error}}", "refused"))
	r.both("attach before the start of what is missing", docker("start", "-a", "missing"))
	r.both("end by a signal", docker("start", "-a", "signalled"), docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.OOMKilled}}", "signalled"))
	r.both("start", docker("start", "main"), docker("start", "main"))
	r.both("start of several", docker("start", "idle", "shell", "readonly", "lines"))
	r.awaitLog("main", "started")
	r.await("the end of lines", docker("inspect", "-f", "{{.State.Status}}", "lines"), func(res result) bool { return res.Stdout == "exited\n" })
}

func (r *tour) lists() {
	r.both("ps", docker("ps", "--no-trunc", "--format", psFormat))
	r.both("ps -a", docker("ps", "-a", "--no-trunc", "--format", psFormat))
	for _, filter := range []string{
		"name=a", "name=^/main$", "status=exited", "status=created", "exited=3", "label=tour", "label=tour=yes", "label=tour=no",
		"ancestor=tour", "ancestor=tour:latest", "ancestor=other", "health=none", "network=none", "network=bridge", "volume=/x",
		"before=idle", "since=idle", "publish=80", "expose=80/tcp", "status=nonsense", "colour=red", "before=nobody", "health=ill", "exited=x",
	} {
		r.both("ps -f "+filter, docker("ps", "-a", "--format", "{{.Names}}", "-f", filter))
	}
	r.both("ps -n 2", docker("ps", "-n", "2", "--format", "{{.Names}}"))
	r.both("ps -l", docker("ps", "-l", "--format", "{{.Names}}"))
	r.both("inspect", docker("inspect", "-f", "{{.Path}} {{json .Args}} {{len .Config.Env}} {{json .Config.Labels}} {{.Config.Image}} {{.State.Status}} {{.State.Running}} {{.HostConfig.NetworkMode}} {{json .Mounts}} {{.Config.Hostname}} {{.Config.Tty}} {{.Config.OpenStdin}} {{json .Config.StopTimeout}}", "main", "shell", "cat"))
	r.both("inspect of user", docker("inspect", "-f", "{{.Config.User}} {{.Config.WorkingDir}} {{.HostConfig.ReadonlyRootfs}}", "idle", "readonly"))
	r.both("port", docker("port", "main"))
	r.both("top", docker("top", "readonly"))
	r.both("top with columns", docker("top", "readonly", "-o", "pid,comm,args"))
	r.both("stats", docker("stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}} {{.NetIO}}", "idle"))
	r.both("stats of a stopped one", docker("stats", "--no-stream", "--format", "{{.Name}} {{.PIDs}} {{.CPUPerc}}", "quick"))
	r.both("images", docker("images", "--format", "{{.Repository}} {{.Tag}}"))
	r.both("inspect of the image", docker("image", "inspect", "-f", "{{json .RepoTags}} {{.Os}} {{.Architecture}}", Ref))
	r.both("inspect of no image", docker("image", "inspect", "nonesuch"))
}

func (r *tour) logs() {
	for _, args := range [][]string{
		{"lines"}, {"--tail", "3", "lines"}, {"--tail", "0", "lines"}, {"--tail", "all", "lines"}, {"--tail", "1000", "lines"},
		{"-t", "--tail", "2", "lines"}, {"--details", "--tail", "2", "lines"}, {"-f", "lines"}, {"-f", "--tail", "1", "lines"},
		{"--since", "1h", "lines"}, {"--until", "1h", "lines"}, {"--since", "0", "lines"}, {"--since", "2001-02-03T04:05:06Z", "--until", "2002-02-03", "lines"},
		{"big"}, {"nobody"}, {"--since", "nonsense", "lines"}, {"missing"},
	} {
		r.both("logs "+strings.Join(args, " "), docker(append([]string{"logs"}, args...)...))
	}
	r.both("logs -f from the start", docker("start", "follow"), docker("logs", "-f", "follow"))
	r.both("logs -f with a start after it", docker("start", "follow"), docker("logs", "-f", "--tail", "1", "follow"), docker("logs", "follow"))
}

func (r *tour) execs() {
	for _, args := range [][]string{
		{"main", "echo", "hello", "world"},
		{"main", "sh", "-c", "echo out; echo err >&2; exit 42"},
		{"main", "true"}, {"main", "false"},
		{"main", "sh", "-c", "kill -9 $$"}, {"main", "sh", "-c", "kill -TERM $$"},
		{"main", "/etc/passwd"},
		{"-e", "A=b c", "-e", "COLOUR=red", "main", "sh", "-c", `echo "$A $COLOUR $HOME"`},
		{"main", "sh", "-c", "env | sort"}, {"-w", "/etc", "main", "pwd"}, {"-w", "/no/such/dir", "main", "pwd"}, {"idle", "pwd"},
		{"-u", "user", "main", "id"}, {"-u", "1234:99", "main", "id"}, {"-u", "nobody-here", "main", "id"}, {"idle", "id"}, {"-u", "0", "idle", "id"},
		{"main", "sh", "-c", "grep -E '^(CapEff|CapBnd|CapInh|NoNewPrivs):' /proc/self/status"},
		{"main", "sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' y"},
		{"main", "hostname"}, {"main", "cat", "/etc/hostname"}, {"main", "sh", "-c", "ls /proc/self/fd | wc -l"},
		{"nobody", "true"}, {"quick", "true"},
		{"-d", "main", "sh", "-c", "echo detached > /tmp/detached"},
		{"-t", "main", "tty"},
	} {
		r.both("exec "+strings.Join(args, " "), docker(append([]string{"exec"}, args...)...))
	}
	r.both("exec of what is missing", call{args: []string{"exec", "main", "/no/such/program"}, newer: code(126, 127)})
	r.both("exec of what is not in PATH", call{args: []string{"exec", "main", "no-such-program"}, newer: code(126, 127)})
	r.both("exec of a directory", call{args: []string{"exec", "main", "/etc"}, newer: func(r *result) {
		r.Stdout = strings.Replace(r.Stdout, "permission denied", "is a directory", 1)
	}})
	r.both("exec with input", call{args: []string{"exec", "-i", "main", "cat"}, stdin: "123\n"})
	r.both("exec with much input", call{args: []string{"exec", "-i", "main", "wc", "-c"}, stdin: strings.Repeat("x", 5<<20)})
	r.both("exec with input that nobody reads", call{args: []string{"exec", "-i", "main", "true"}, stdin: strings.Repeat("x", 1<<20)})
	r.both("exec with input that stays open", call{args: []string{"exec", "-i", "main", "echo", "done"}, open: true})
	r.both("exec without input asked for", call{args: []string{"exec", "main", "cat"}, stdin: "not for you"})
	r.both("what the detached exec did", docker("exec", "main", "sh", "-c", "until [ -s /tmp/detached ]; do sleep 0.05; done; cat /tmp/detached"))
	r.Run("many execs at once", func(t *testing.T) {
		var all sync.WaitGroup
		for i := range 8 {
			all.Go(func() {
				want := fmt.Sprintf("%d\n", i)
				if got := r.ours.run(t, call{args: []string{"exec", "-i", "readonly", "cat"}, stdin: want}); got.Stdout != want || got.Code != 0 {
					t.Errorf("got %+v, want %q", got, want)
				}
			})
		}
		all.Wait()
	})
}

func (r *tour) terminals() {
	size := &pty.Winsize{Rows: 33, Cols: 101}
	r.both("exec on a terminal", call{args: []string{"exec", "-it", "main", "sh", "-c", "until stty size | grep 101; do sleep 0.1; done"}, tty: size, typed: []reply{{"33 101\r\n", ""}}})
	r.both("exec of a shell", call{args: []string{"exec", "-it", "-e", "PS1=% ", "main", "sh"}, tty: size, typed: []reply{{"% ", "echo $((6*7))\r"}, {"42\r\n", "exit 9\r"}}})
	r.both("detach from an exec", call{args: []string{"exec", "-it", "-e", "PS1=% ", "main", "sh"}, tty: size, typed: []reply{{"% ", "\x10\x11"}}})
	r.both("detach from an exec by other keys", call{args: []string{"exec", "-it", "--detach-keys", "ctrl-a,x", "-e", "PS1=% ", "main", "sh"}, tty: size, typed: []reply{{"% ", "\x01x"}}})
	r.both("exec with nonsense keys", call{args: []string{"exec", "-it", "--detach-keys", "ctrl-nonsense", "main", "sh"}, tty: size})
	r.both("attach to a shell and detach", call{args: []string{"attach", "shell"}, tty: size, typed: []reply{{"", "echo a$((1+1))b\r"}, {"a2b\r\n", "stty size\r"}, {"33 101\r\n", "\x10\x11"}}})
	r.both("attach to a shell that ends", call{args: []string{"attach", "shell"}, tty: size, typed: []reply{{"", "echo still h''ere\r"}, {"still here\r\n", "exit 4\r"}}})
	r.both("attach to what has ended", docker("attach", "shell"))
	r.both("start on a terminal", call{args: []string{"start", "-ai", "shell"}, tty: size, typed: []reply{{"> ", "exit 6\r"}}})
	r.both("state after it", docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "shell"))
}

func (r *tour) signals() {
	r.both("kill -s USR1", docker("kill", "-s", "USR1", "main"))
	r.awaitLog("main", "got USR1")
	r.both("kill with a number", docker("kill", "-s", "10", "main"))
	r.both("kill with nonsense", docker("kill", "-s", "NONSENSE", "main"))
	r.both("pause", docker("pause", "main"), docker("ps", "--format", "{{.Names}} {{.State}} {{.Status}}", "-f", "name=main"))
	r.both("pause twice", docker("pause", "main"))
	r.both("exec in a paused one", docker("exec", "main", "true"))
	r.both("attach to a paused one", docker("attach", "main"))
	r.both("unpause", docker("unpause", "main"), docker("ps", "--format", "{{.Names}} {{.State}}", "-f", "name=main"))
	r.both("unpause twice", docker("unpause", "main"))
	r.both("stop", docker("stop", "main"), docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}} {{.State.Running}}", "main"), docker("stop", "main"))
	r.both("ps of stopped ones", docker("ps", "-a", "--format", "{{.Names}} {{.Status}}", "-f", "name=main"))
	r.both("logs kept over the stop", docker("logs", "--tail", "1", "main"))
	r.both("kill of a stopped one", docker("kill", "main"))
	r.both("pause of a stopped one", docker("pause", "main"))
	r.both("exec in a stopped one", docker("exec", "main", "true"))
	r.both("top of a stopped one", docker("top", "main"))
	r.both("start after the stop", docker("start", "main"), docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "main"))
	r.both("stop by force", docker("stop", "-t", "1", "idle"), docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "idle"))
	r.both("restart of a stopped one", docker("restart", "-t", "1", "idle"), docker("inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "idle"))
	r.both("restart of a running one", docker("restart", "-t", "1", "idle"), docker("inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "idle"))
	r.both("kill", docker("kill", "idle"), docker("wait", "idle"), docker("inspect", "-f", "{{.State.Status}} {{.State.ExitCode}}", "idle"))
	r.both("start again", docker("start", "idle"))
}

// clientFiles makes what docker cp takes into the containers.
func clientFiles(dir string) error {
	if err := os.MkdirAll(filepath.Join(dir, "in/tree/sub"), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, "in/plain"), 0o755); err != nil {
		return err
	}
	for name, mode := range map[string]os.FileMode{"in/file": 0o640, "in/tree/a": 0o600, "in/tree/sub/b": 0o4755, "in/plain/c": 0o644} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte("content of "+name+"\n"), 0o600); err != nil {
			return err
		}
		m := mode.Perm()
		if mode&0o4000 != 0 {
			m |= os.ModeSetuid
		}
		if err := os.Chmod(path, m); err != nil {
			return err
		}
		if err := os.Lchown(path, 1234, 4321); err != nil {
			return err
		}
		if err := os.Chtimes(path, time.Unix(1e9, 0), time.Unix(1e9, 0)); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{"in/link": "file", "in/tree/up": "../file", "in/dirlink": "tree"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return os.Mkdir(filepath.Join(dir, "out"), 0o755)
}

// listing is what a directory looks like from inside a container.
func listing(container, dir string) call {
	return docker("exec", "-u", "0", container, "sh", "-c",
		"cd "+dir+" && find . | sort | while read f; do stat -c '%n %F %a %u:%g %s %Y' \"$f\" | sed '/directory/s/ [0-9]* [0-9]*$//; / 1000000000$/!s/ [0-9]*$//'; readlink \"$f\"; [ -f \"$f\" ] && md5sum < \"$f\"; done; true")
}

func (r *tour) copies() {
	r.both("a place to copy to", docker("exec", "main", "sh", "-c", "mkdir -p /c/dir /c/other; ln -s dir /c/tolink; ln -s /c/other /c/abs; ln -s nowhere /c/broken; ln -s ../../../../../../c/dir /c/up; echo x > /c/f; ln -s f /c/flink; mkfifo /c/fifo; touch -d @1000000000 /c/f; chown 7:8 /c/f"))
	for _, args := range [][]string{
		{"@/in/file", "main:/c/dir"}, {"@/in/file", "main:/c/dir/renamed"}, {"@/in/file", "main:/c/new"}, {"@/in/file", "main:/c/tolink/"},
		{"@/in/file", "main:/c/up/through"}, {"@/in/file", "main:c/relative"},
		{"@/in/tree", "main:/c/dir"}, {"@/in/tree", "main:/c/fresh"}, {"@/in/plain/.", "main:/c/other"}, {"@/in/plain/.", "main:/c/abs"},
		{"@/in/link", "main:/c/dir/link"}, {"-L", "@/in/link", "main:/c/dir/followed"}, {"@/in/dirlink", "main:/c/dir/dirlink"}, {"-L", "@/in/dirlink", "main:/c/dir/dirfollowed"},
		{"-a", "@/in/file", "main:/c/dir/archived"}, {"@/in/tree", "idle:/tmp/plain"},
		{"@/in/file", "main:/c/flink"}, {"@/in/file", "main:/c/broken"},
		{"@/in/tree", "main:/c/f"}, {"@/in/file", "main:/no/such/dir/"}, {"@/in/file", "main:/no/such/dir/x"}, {"@/in/file", "main:/c/f/"},
		{"@/in/file", "readonly:/x"}, {"@/in/file", "nobody:/x"}, {"@/in/missing", "main:/c"},
		{"@/in/tree", "quick:/into-stopped"},
	} {
		r.both("cp in "+strings.Join(args, " "), docker(append([]string{"cp", "-q"}, args...)...))
	}
	r.both("what was copied in", listing("main", "/c"), listing("idle", "/tmp"))
	for i, args := range [][]string{
		{"main:/c/f", "@/out/f"}, {"main:/c/f", "@/out/"}, {"main:/c/dir", "@/out/dir"}, {"main:/c/dir/.", "@/out/here"}, {"main:/c/dir", "@/out"},
		{"main:/c/flink", "@/out/flink"}, {"-L", "main:/c/flink", "@/out/followed"}, {"-L", "main:/c/tolink", "@/out/dirfollowed"}, {"main:/c/tolink/", "@/out/slash"},
		{"-a", "main:/c/f", "@/out/archived"}, {"main:/c/broken", "@/out/broken"}, {"-L", "main:/c/broken", "@/out/brokenfollowed"},
		{"main:/no/such", "@/out/x"}, {"main:/c/f", "@/no/such/"}, {"quick:/into-stopped", "@/out/stopped"}, {"main:/proc/self/status/x", "@/out/x"},
		{"main:/etc/hostname", "@/out/hostname"},
	} {
		r.both(fmt.Sprintf("cp out %d %s", i, strings.Join(args, " ")), docker(append([]string{"cp", "-q"}, args...)...))
	}
	var seen [2]string
	r.Run("what was copied out", func(t *testing.T) {
		for side, dir := range r.dirs {
			seen[side] = tree(t, filepath.Join(dir, "out"))
		}
		if d := cmp.Diff(seen[1], seen[0]); d != "" {
			t.Errorf("files from dockerd (-), from the pod (+):\n%s", d)
		}
	})
	r.Run("cp to and from stdout", func(t *testing.T) {
		var names [2]string
		for side, h := range []Host{r.ours, r.theirs} {
			out := h.run(t, docker("cp", "main:/c/dir", "-"))
			names[side] = fmt.Sprint(out.Code, " ", headers(t, out.Stdout))
			back := h.run(t, call{args: []string{"cp", "-", "main:/c/other"}, stdin: out.Stdout})
			names[side] += fmt.Sprint("\n", back.normal())
		}
		if d := cmp.Diff(names[1], names[0]); d != "" {
			t.Errorf("archive from dockerd (-), from the pod (+):\n%s", d)
		}
	})
	r.both("what came back in", listing("main", "/c/other"))
	r.Run("diff", func(t *testing.T) {
		var got [2][]string
		for side, h := range []Host{r.ours, r.theirs} {
			res := h.run(t, docker("diff", "main"))
			got[side] = strings.Split(res.normal().Stdout, "\n")
			slices.Sort(got[side])
		}
		if d := cmp.Diff(got[1], got[0]); d != "" {
			t.Errorf("changes from dockerd (-), from the pod (+):\n%s", d)
		}
	})
	r.Run("export", func(t *testing.T) {
		var got [2]string
		for side, h := range []Host{r.ours, r.theirs} {
			res := h.run(t, docker("export", "main"))
			if res.Code != 0 {
				t.Errorf("%s: %+v", h.Name, res.normal())
			}
			// docker makes places for mounts in the image's own /dev, which a tmpfs hides.
			got[side] = regexp.MustCompile(`(?m)^dev/(console|pts/|shm/) .*\n`).ReplaceAllString(headers(t, res.Stdout), "")
		}
		if d := cmp.Diff(got[1], got[0]); d != "" {
			t.Errorf("archive from dockerd (-), from the pod (+):\n%s", d)
		}
	})
	r.both("export to a terminal", call{args: []string{"export", "main"}, tty: &pty.Winsize{Rows: 24, Cols: 80}})
}

// tree lists a directory of the client's side.
func tree(t *testing.T, dir string) string {
	var b strings.Builder
	err := filepath.Walk(dir, func(path string, fi os.FileInfo, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %s", rel, fi.Mode())
		switch {
		case fi.Mode().IsRegular():
			content, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " %q", content)
			if rel != "hostname" {
				fmt.Fprintf(&b, " %d", fi.ModTime().Unix())
			}
		case fi.Mode()&os.ModeSymlink != 0:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			fmt.Fprintf(&b, " -> %s", target)
		}
		b.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`\b[0-9a-f]{12}\b`).ReplaceAllString(b.String(), "<id>")
}

// headers lists an archive: all that is not a time of the moment, sorted, since the order of a directory is nobody's.
func headers(t *testing.T, archive string) string {
	var lines []string
	r := tar.NewReader(strings.NewReader(archive))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Errorf("read archive: %v", err)
			break
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Errorf("read archive: %v", err)
		}
		link := h.Linkname
		if h.Typeflag == tar.TypeLink {
			link = "" // which of the names is the first is the order's
		}
		content := ""
		if len(b) < 100 {
			content = fmt.Sprintf("%q", bytes.TrimSpace(b))
		}
		lines = append(lines, fmt.Sprintf("%s %c %o %d:%d %d %s %s", h.Name, h.Typeflag, h.Mode&0o7777, h.Uid, h.Gid, h.Size, link, content))
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func (r *tour) waits() {
	r.both("wait for what has ended", docker("wait", "fail"), docker("wait", "quick", "signalled"))
	r.both("wait for nobody", docker("wait", "nobody"))
	r.both("start what will be waited for", docker("start", "waits"))
	r.Run("wait for an end", func(t *testing.T) {
		for _, h := range []Host{r.ours, r.theirs} {
			done := make(chan result, 1)
			go func() { done <- h.run(t, docker("wait", "waits")) }()
			select {
			case res := <-done:
				t.Errorf("%s: wait ended before the container: %+v", h.Name, res)
			case <-time.After(300 * time.Millisecond): // long enough to see a wait that does not
			}
			if res := h.run(t, docker("stop", "waits")); res.Code != 0 {
				t.Errorf("%s: stop: %+v", h.Name, res)
			}
			if res := <-done; res.Stdout != "5\n" || res.Code != 0 {
				t.Errorf("%s: wait: got %+v, want 5", h.Name, res)
			}
		}
	})
}

func (r *tour) names() {
	r.both("rename", docker("rename", "fail", "renamed"), docker("inspect", "-f", "{{.Name}}", "renamed"), docker("inspect", "fail"))
	r.both("rename to a taken name", docker("rename", "renamed", "main"))
	r.both("rename to its own", docker("rename", "renamed", "renamed"))
	r.both("rename to nonsense", docker("rename", "renamed", "no/slash"))
	r.both("rename of nobody", docker("rename", "nobody", "somebody"))
	r.both("rename back", docker("rename", "renamed", "fail"))
}

func (r *tour) updates() {
	limits := docker("inspect", "-f", "{{.HostConfig.NanoCpus}} {{.HostConfig.CpuPeriod}} {{.HostConfig.CpuQuota}} {{.HostConfig.CpuShares}} {{.HostConfig.PidsLimit}} {{json .HostConfig.RestartPolicy}}", "idle", "fail")
	// Of either version of control groups.
	pids := docker("exec", "idle", "sh", "-c", "cat /sys/fs/cgroup/pids.max /sys/fs/cgroup/pids/pids.max 2>/dev/null")
	r.both("update of a running one", docker("update", "--cpus", "0.5", "--cpu-shares", "512", "--pids-limit", "200", "idle"), limits, pids)
	r.both("update of limits that are there", docker("update", "--cpus", "0.75", "--pids-limit", "-1", "idle"), limits, pids)
	r.both("update of a stopped one, and of several", docker("update", "--restart", "on-failure:3", "--cpu-shares", "300", "fail", "idle"), limits)
	r.both("update back", docker("update", "--restart", "no", "fail", "idle"), limits)
	for _, args := range [][]string{
		{"--memory", "4m", "idle"}, {"--memory", "64m", "--memory-swap", "32m", "idle"}, {"--cpu-quota", "50000", "idle"},
		{"--cpu-period", "5", "fail"}, {"--cpu-quota", "5", "fail"}, {"--restart", "sometimes", "idle"}, {"--restart", "always:3", "idle"},
		{"--cpus", "1", "nobody"}, {"idle"},
	} {
		r.both("update "+strings.Join(args, " "), docker(append([]string{"update"}, args...)...))
	}
	r.both("after what was refused", limits)
}

func (r *tour) refusals() {
	for _, args := range [][]string{
		{"inspect", "nobody"}, {"logs", "nobody"}, {"start", "nobody"}, {"stop", "nobody"}, {"kill", "nobody"}, {"pause", "nobody"},
		{"top", "nobody"}, {"attach", "nobody"}, {"diff", "nobody"}, {"export", "nobody"}, {"restart", "nobody"}, {"port", "nobody"},
		{"stats", "--no-stream", "nobody"}, {"network", "inspect", "nonesuch"}, {"volume", "inspect", "nonesuch"}, {"rm", "nobody"}, {"rmi", "nonesuch"},
		{"node", "ls"}, {"service", "ls"},
	} {
		r.both(strings.Join(args, " "), docker(args...))
	}
	if !r.ours.Pod {
		return
	}
	// What a pod cannot do it says in a sentence.
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"create", Ref, "true"}, "a pod's containers are fixed by its pod.json"},
		{[]string{"rm", "quick"}, "a pod's containers are fixed by its pod.json"},
		{[]string{"pull", "busybox"}, "a pod holds the images of its pod.json and no others"},
		{[]string{"rmi", Ref}, "the pod's containers use it"},
		{[]string{"tag", Ref, "x"}, "a pod holds the images of its pod.json"},
		{[]string{"commit", "quick", "x"}, "a pod holds the images of its pod.json"},
		{[]string{"network", "create", "n"}, "a pod has the one network"},
		{[]string{"network", "rm", "none"}, "cannot be removed"},
		{[]string{"volume", "create", "v"}, "a pod's volumes are fixed"},
		{[]string{"swarm", "init"}, "cannot join a swarm"},
		{[]string{"update", "--blkio-weight", "3", "main"}, "Range of blkio weight"},
	} {
		r.Run("a pod does not "+strings.Join(tt.args, " "), func(t *testing.T) {
			res := r.ours.run(t, docker(tt.args...))
			if res.Code == 0 || !strings.Contains(res.Stderr, tt.want) {
				t.Errorf("got %+v, want an error with %q", res, tt.want)
			}
		})
	}
}
