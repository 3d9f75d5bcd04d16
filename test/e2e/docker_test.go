package e2e

import (
	"bytes"
	"errors"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/servers"
)

// surroundings prints what a process finds around itself, as far as it does not depend on the kernel (/dev/core is there
// where /proc/kcore is) and on where docker keeps the files it lays over an image's.
const surroundings = `
echo "# identity"; id; pwd; umask; hostname; env | sort
echo "# rights"; grep -E '^(Cap|NoNewPrivs|Groups|SigIgn|SigBlk)' /proc/self/status
echo "# limits"; cat /proc/self/oom_score_adj
echo "# devices"; cd /dev; for f in [!c]*; do stat -c '%N %F %a %u:%g %t,%T' $f; done
echo "# mounts"; awk '{ print $2, $3 }' /proc/self/mounts | grep -E ' (proc|tmpfs|devpts|sysfs|mqueue)$' | grep -Ev '^(/proc/|/sys/fs/cgroup|/etc/)' | sort
echo "# masked"; for f in /proc/keys /proc/timer_list; do wc -c <$f; done; ls -A /sys/firmware
echo "# read-only"; for f in /proc/sys/kernel/domainname /proc/sysrq-trigger /sys/kernel/rcu_normal; do (: >>$f) 2>/dev/null && echo "$f can be written"; done
echo "# files"; cat /etc/hostname; ls -ld /etc/hosts /etc/hostname /etc/resolv.conf | cut -c 1-10
echo "# processes"; ps -o pid,args | head -n 2
echo "on stderr" >&2
exit 42
`

// TestLikeDocker runs the same in a pod and under dockerd: output, errors and exit codes are the same.
func TestLikeDocker(t *testing.T) {
	kcradle(t)
	need.Command(t, "dockerd", "hack/deps test")
	d, err := servers.StartDockerd(t.Context(), tempDir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Stop()
	b := image(t, "busybox")
	succeed(t, d.Docker(t.Context(), "load", "--quiet", "--input", b.Archive))

	for _, test := range []struct {
		name  string
		flags []string
		cmd   []string
		// codeOnly: the words are about how the container was started, by another runtime.
		codeOnly bool
	}{
		{name: "surroundings", flags: []string{"--hostname", "here", "-e", "COLOUR=green"}, cmd: []string{"sh", "-c", surroundings}},
		{name: "another user", flags: []string{"--user", "nobody", "--workdir", "/made/new", "--cap-drop", "ALL", "--hostname", "here"},
			cmd: []string{"sh", "-c", `id; pwd; stat -c '%U %a' .; grep -E '^(Cap|Groups)' /proc/self/status; env | sort`}},
		{name: "killed", cmd: []string{"sh", "-c", "kill -9 $$"}},
		{name: "not there", cmd: []string{"/no/such/program"}, codeOnly: true},
		{name: "no program", cmd: []string{"/etc/passwd"}, codeOnly: true},
		{name: "much output", cmd: []string{"sh", "-c", "seq 1 200000; seq 1 1000 >&2"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			args := append(append([]string{"run", "--rm", "--network", "none"}, test.flags...), b.Ref)
			want := outcomeOf(t, d.Docker(t.Context(), append(args, test.cmd...)...))
			// What dockerd was started to ignore it hands on; a pod's container ignores nothing.
			want.stdout = ignored.ReplaceAllString(want.stdout, "SigIgn:\t0000000000000000")
			p := summon(t, "docker-archive:"+b.Archive, append(append(test.flags, "--"), test.cmd...)...)
			got := outcomeOf(t, command(t, "run", "--network", "none", p.dir))
			if test.codeOnly {
				if got.stderr == "" {
					t.Error("stderr is empty, want the reason")
				}
				got.stdout, got.stderr, want.stdout, want.stderr = "", "", "", ""
			}
			if got.code != want.code {
				t.Errorf("exit code: got %d, want docker's %d", got.code, want.code)
			}
			if diff := cmp.Diff(strings.Split(want.stdout, "\n"), strings.Split(got.stdout, "\n")); diff != "" {
				t.Errorf("stdout (-docker +pod):\n%s", tail([]byte(diff)))
			}
			if diff := cmp.Diff(want.stderr, got.stderr); diff != "" {
				t.Errorf("stderr (-docker +pod):\n%s", tail([]byte(diff)))
			}
		})
	}
}

type outcome struct {
	stdout, stderr string
	code           int
}

func outcomeOf(t *testing.T, cmd *exec.Cmd) outcome {
	t.Helper()
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", line(cmd), err)
	}
	// Once per run kcradle says that there is no hardware virtualization; the rest is the container's.
	first, rest, _ := strings.Cut(stderr.String(), "\n")
	if strings.HasPrefix(first, "kcradle run: slow:") {
		stderr = *bytes.NewBufferString(rest)
	}
	return outcome{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

var ignored = regexp.MustCompile(`SigIgn:\t[0-9a-f]{16}`)
