package guest_test

import (
	"strings"
	"testing"
	"time"

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

const forever = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.02; done"

func TestStopOrder(t *testing.T) {
	root := guesttest.Busybox(t)
	doc := &spec.Pod{Containers: []spec.Container{sh("db", forever), sh("web", forever)}}
	h := guesttest.Start(t, doc, map[string]string{"db": root, "web": root})
	h.AwaitOutput(0, 1, "up")
	h.AwaitOutput(1, 1, "up")
	h.Send(spec.FrameStop, spec.Stop{})
	done := h.Done()
	db, web := h.Status("db", spec.StatusExited), h.Status("web", spec.StatusExited)
	if !web.Finished.Before(db.Finished) {
		t.Errorf("web ended at %v, db, which started before it, at %v", web.Finished, db.Finished)
	}
	if db.ExitCode != 5 || web.ExitCode != 5 || db.ManualStop || !done.Clean {
		t.Errorf("db %+v, web %+v, done %+v", db, web, done)
	}
	if got := h.Output(0, 1); got != "up\nbye\n" {
		t.Errorf("output: %q", got)
	}
}

func TestStopKills(t *testing.T) {
	h := guesttest.Start(t, &spec.Pod{Containers: []spec.Container{sh("deaf", "trap '' TERM; echo up; while :; do sleep 0.05; done")}},
		map[string]string{"deaf": guesttest.Busybox(t)})
	h.AwaitOutput(0, 1, "up")
	zero := 0
	h.Send(spec.FrameStop, spec.Stop{Timeout: &zero})
	h.Done()
	if s := h.Status("deaf", spec.StatusExited); s.ExitCode != 137 {
		t.Errorf("got %+v", s)
	}
}

func TestSignal(t *testing.T) {
	h := guesttest.Start(t, &spec.Pod{Containers: []spec.Container{sh("web", forever)}}, map[string]string{"web": guesttest.Busybox(t)})
	h.AwaitOutput(0, 1, "up")
	h.Send(spec.FrameSignal, spec.Signal{Signal: 15})
	h.Done() // the pod ends by it
	if s := h.Status("web", spec.StatusExited); s.ExitCode != 5 {
		t.Errorf("got %+v", s)
	}
}

// TestClock has a host whose clock is set to another time while a pod runs.
func TestClock(t *testing.T) {
	h := guesttest.Start(t, &spec.Pod{Containers: []spec.Container{sh("web", forever)}}, map[string]string{"web": guesttest.Busybox(t)})
	h.AwaitOutput(0, 1, "up")
	for _, ahead := range []time.Duration{time.Hour, -time.Hour} {
		if got := h.SetClock(ahead); got != ahead.String() {
			t.Errorf("the host's clock is %v ahead, and the guest set its own by %s", ahead, got)
		}
	}
	h.Send(spec.FrameSignal, spec.Signal{Signal: 15})
	h.Done()
}

// TestHostGone has a host that vanishes: guesttest's end of every test waits for the guest to end in order by itself.
func TestHostGone(t *testing.T) {
	h := guesttest.Start(t, &spec.Pod{Containers: []spec.Container{sh("web", forever)}}, map[string]string{"web": guesttest.Busybox(t)})
	h.AwaitOutput(0, 1, "up")
}

// TestKeepsFiles runs a pod twice on the same disks.
func TestKeepsFiles(t *testing.T) {
	root := guesttest.Busybox(t)
	script := "cat /kept 2>/dev/null; echo kept >> /kept; echo done"
	h := guesttest.Start(t, &spec.Pod{Containers: []spec.Container{sh("web", script)}}, map[string]string{"web": root})
	h.Done()
	if got := h.Output(0, 1); got != "done\n" {
		t.Errorf("first run: %q", got)
	}
	again := guesttest.StartWith(t, &spec.Pod{Containers: []spec.Container{sh("web", script)}}, map[string]string{"web": root}, guesttest.Options{Dir: h.Dir()})
	again.Done()
	if got := again.Output(0, 1); got != "kept\ndone\n" { // the output of the first run is not sent again
		t.Errorf("second run: %q", got)
	}
}

func TestStartFails(t *testing.T) {
	h, _ := one(t, spec.Container{Name: "web", Cmd: []string{"nosuch"}})
	s := h.State("web", func(s spec.State) bool { return s.Error != "" })
	if s.ExitCode != 127 || s.Status != spec.StatusCreated {
		t.Errorf("got %+v", s)
	}
}

func TestLaunchFails(t *testing.T) {
	c := sh("web", "true")
	c.Image.Layers = []string{"sha256:" + strings.Repeat("0", 64)}
	h := guesttest.Start(t, &spec.Pod{Containers: []spec.Container{c}, ExtraHosts: []spec.Host{{Name: "h", Address: "nonsense"}}}, nil)
	if f := h.Failure(); f.Phase != "containers" || !strings.Contains(f.Message, `extra host "h"`) {
		t.Errorf("got %+v", f)
	}
	if d := h.Done(); !d.Clean {
		t.Errorf("done: %+v", d)
	}
}
