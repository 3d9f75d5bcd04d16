package guest_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/guest/guesttest"
	"github.com/kcradle/kcradle/spec"
)

func TestMain(m *testing.M) { guesttest.Main(m, nil) }

func sh(name, script string) spec.Container {
	return spec.Container{Name: name, Cmd: []string{"sh", "-c", script}}
}

// one runs a pod of one container to its end.
func one(t *testing.T, c spec.Container) (*guesttest.Host, spec.Done) {
	t.Helper()
	h := guesttest.Start(t, &spec.Pod{Containers: []spec.Container{c}}, map[string]string{c.Name: guesttest.Busybox(t)})
	return h, h.Done()
}

func TestRunToEnd(t *testing.T) {
	h, done := one(t, sh("web", "echo hello; echo oops >&2; echo last; exit 3"))
	if got, want := h.Output(0, 1), "hello\nlast\n"; got != want {
		t.Errorf("stdout: got %q, want %q", got, want)
	}
	if got, want := h.Output(0, 2), "oops\n"; got != want {
		t.Errorf("stderr: got %q, want %q", got, want)
	}
	if s := h.Status("web", spec.StatusExited); s.ExitCode != 3 || s.Signal != 0 || s.Pid != 0 || s.Started.IsZero() || s.Finished.Before(s.Started) {
		t.Errorf("state: got %+v", s)
	}
	if !done.Clean || done.Message != "" {
		t.Errorf("done: got %+v", done)
	}
	for _, phase := range []string{"early", "listen", "ready", "launch", "clock", "network", "disks", "shares", "containers", "start", "stop", "unmount"} {
		if done.Phases[phase] == 0 {
			t.Errorf("phase %s has no time: %v", phase, done.Phases)
		}
	}
}

func TestEnvironment(t *testing.T) {
	c := sh("web", "env | grep -vE '^(SHLVL|OLDPWD)=' | sort; pwd; id; cat /etc/hostname; grep -c localhost /etc/hosts; ls -a / | tr '\\n' ' '")
	c.Env = []string{"A=1", "PATH=/bin:/sbin"}
	c.User, c.WorkingDir = "user", "/srv"
	h, _ := one(t, c)
	want := `A=1
HOME=/home/user
HOSTNAME=pod
PATH=/bin:/sbin
PWD=/srv
/srv
uid=1000(user) gid=1000(user) groups=29(audio),1000(user),1234(extra)
pod
2
. .. .dockerenv bin dev etc home proc root srv sys tmp `
	if d := cmp.Diff(want, h.Output(0, 1)); d != "" {
		t.Errorf("output (-want +got):\n%s", d)
	}
}
