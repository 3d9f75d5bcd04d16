package e2e

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/images"
	"github.com/kcradle/kcradle/test/servers"
)

// lister is where the lister of trees lies in an image that has it.
const lister = "/.tree"

// notOfTheImage are the paths that docker lays over an image in every container.
var notOfTheImage = []string{
	"/proc", "/sys", "/dev", "/etc/hosts", "/etc/hostname", "/etc/resolv.conf", "/etc/mtab", "/.dockerenv",
}

// TestTree proves that a pod shows the tree that Debian's dockerd shows of the same image: one lister, a layer on top
// of each image, is run in both.
func TestTree(t *testing.T) {
	kcradle(t)
	need.Command(t, "dockerd", "hack/deps test")
	program := filepath.Join(tempDir(t), "tree")
	build := exec.Command("go", "build", "-trimpath", "-o", program, "github.com/kcradle/kcradle/hack/tree")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	succeed(t, build)

	d, err := servers.StartDockerd(t.Context(), tempDir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Stop()

	for _, test := range []struct {
		name string
		// flat: dockerd refuses so many layers and gets the same tree in one.
		flat bool
	}{
		{name: "odd"},
		{name: "deep", flat: true},
		{name: "nginx"},
		{name: "mariadb"},
	} {
		t.Run(test.name, func(t *testing.T) {
			img, err := image(t, test.name).Image()
			if err != nil {
				t.Fatal(err)
			}
			img, err = images.Append(img, map[string]string{strings.TrimPrefix(lister, "/"): program}, func(c *v1.Config) {
				c.Entrypoint, c.Cmd, c.User, c.Healthcheck = []string{lister}, nil, "", nil
				for _, p := range notOfTheImage {
					c.Entrypoint = append(c.Entrypoint, "-skip", p)
				}
				c.Entrypoint = append(c.Entrypoint, "/")
			})
			if err != nil {
				t.Fatal(err)
			}
			ref := "tree/" + test.name + ":latest"
			archive := save(t, ref, img)
			forDocker := archive
			if test.flat {
				flat, err := images.Flatten(img)
				if err != nil {
					t.Fatal(err)
				}
				forDocker = save(t, ref, flat)
			}

			succeed(t, d.Docker(t.Context(), "load", "--input", forDocker))
			want := lines(succeed(t, d.Docker(t.Context(), "run", "--rm", "--network", "none", ref)))
			p := summon(t, "docker-archive:"+archive)
			got := lines(succeed(t, command(t, "run", "--network", "none", p.dir)))

			if len(want) < 100 {
				t.Fatalf("the tree under dockerd has %d lines, which cannot be all", len(want))
			}
			if diff := cmp.Diff(want, got); diff != "" {
				if len(diff) > 16<<10 {
					diff = diff[:16<<10] + "…"
				}
				t.Fatalf("tree in the pod against the tree under dockerd (-dockerd +pod):\n%s", diff)
			}
			t.Logf("%d paths are equal", len(got))
		})
	}
}

func save(t *testing.T, ref string, img v1.Image) string {
	t.Helper()
	file := filepath.Join(tempDir(t), "image.tar")
	if err := images.Save(file, ref, img); err != nil {
		t.Fatal(err)
	}
	return file
}

// lines are a listing's lines by path. Two kinds of directories have a date that is not the image's: those that docker
// puts its own files in, and those for which no layer has an entry.
func lines(listing string) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(listing) {
		path, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), "\t")
		f := strings.Split(rest, "\t")
		if path == `"/"` || path == `"/etc"` || strings.HasPrefix(path, `"/odd/implied`) && f[0] == "dir" {
			f[5] = "date"
			rest = strings.Join(f, "\t")
		}
		out[path] = rest
	}
	return out
}
