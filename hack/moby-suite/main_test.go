package main

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/internal/need"
)

func TestParseArgs(t *testing.T) {
	c, err := parseArgs([]string{"-daemon", "bin/x", "-packages", "container,network/bridge", "-run", "^TestA", "-check"}, io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"container", "network/bridge"}, c.packages); diff != "" {
		t.Errorf("packages (-want +got)\n%s", diff)
	}
	if !filepath.IsAbs(c.daemon) || !c.run.MatchString("TestABC") || c.run.MatchString("XTestA") || !c.check {
		t.Errorf("got %+v", c)
	}
	for args, want := range map[string]string{
		"-H unix:///x -daemon y":  "want one of them",
		"-check -update":          "want one of them",
		"-timeout 0s":             "want more than none",
		"-packages ../../etc":     "-packages",
		"-packages container,":    "-packages",
		"-run (":                  "-run",
		"-packages container foo": "want flags only",
		"-nonsense":               "not defined",
	} {
		if _, err := parseArgs(strings.Fields(args), io.Discard); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", args, err, want)
		}
	}
}

func TestStageOf(t *testing.T) {
	if rest, stage, dir := stageOf([]string{stageRun, "/d", "-run", "x"}); stage != stageRun || dir != "/d" || len(rest) != 2 {
		t.Errorf("got %v, %q, %q", rest, stage, dir)
	}
	if rest, stage, _ := stageOf([]string{"-run", stageRun}); stage != "" || len(rest) != 2 {
		t.Errorf("a flag's value was taken for a stage: got %v, %q", rest, stage)
	}
}

func TestOlder(t *testing.T) {
	for _, tc := range []struct {
		a, b string
		want bool
	}{
		{"1.41", "1.51", true}, {"1.9", "1.51", true}, {"0.99", "1.0", true},
		{"1.51", "1.51", false}, {"1.52", "1.51", false}, {"2.0", "1.51", false}, {"", "1.51", false}, {"1.x", "1.51", false},
	} {
		if got := older(tc.a, tc.b); got != tc.want {
			t.Errorf("older(%q, %q): got %v, want %v", tc.a, tc.b, got, tc.want)
		}
	}
}

func TestNewAPI(t *testing.T) {
	for _, host := range []string{"unix:///x/y.sock", "tcp://127.0.0.1:2375"} {
		if _, err := newAPI(host); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
	for _, host := range []string{"", "/x/y.sock", "unix://", "tcp:///x", "ssh://host", "://"} {
		if _, err := newAPI(host); err == nil {
			t.Errorf("%q: got no error", host)
		}
	}
}

// The module is the one that was pinned, becomes one that compiles by itself, and asks for no image that is not made here.
func TestFetch(t *testing.T) {
	need.Long(t)
	before, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	s := &suite{dir: t.TempDir(), log: &log}
	if err := s.fetch(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"go.mod", "go.sum", "integration/container/main_test.go", "integration/network/bridge"} {
		if !exists(filepath.Join(s.dir, "src", name)) {
			t.Errorf("the tree has no %s", name)
		}
	}
	for _, name := range []string{"vendor", "vendor.mod", "vendor.sum"} {
		if exists(filepath.Join(s.dir, "src", name)) {
			t.Errorf("the tree still has %s", name)
		}
	}
	after, err := os.ReadFile("../../go.mod")
	if err != nil || !bytes.Equal(before, after) || bytes.Contains(after, []byte(suiteModule+" ")) {
		t.Errorf("our go.mod has changed, or names the suite (%v)", err)
	}

	source, err := os.ReadFile(filepath.Join(s.dir, "src/testutil/environment/protect.go"))
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile(`(?s)frozenImages = \[\]string\{(.*?)\}`).FindSubmatch(source)
	if block == nil {
		t.Fatal("the suite does not say any more which images it wants")
	}
	wanted := regexp.MustCompile(`"([^"]+)"`).FindAllSubmatch(block[1], -1)
	if len(wanted) != 6 {
		t.Errorf("the suite wants %d images, want 6", len(wanted))
	}
	made := map[string]bool{}
	for _, i := range suiteImages {
		made[i.ref] = true
	}
	for _, w := range wanted {
		if !made[string(w[1])] {
			t.Errorf("the suite wants the image %s, which is not made", w[1])
		}
	}
	api, err := os.ReadFile(filepath.Join(s.dir, "src/api/common.go"))
	if want := `DefaultVersion = "` + suiteAPI + `"`; err != nil || !bytes.Contains(api, []byte(want)) {
		t.Errorf("the suite's client does not say %s (%v)", want, err)
	}
}
