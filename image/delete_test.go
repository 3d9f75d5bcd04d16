package image

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/servers"
)

// deleteLines is what docker rmi prints: Untagged and Deleted lines, or the error.
func deleteLines(t testing.TB, s *Store, word string, o DeleteOptions) []string {
	t.Helper()
	d, err := s.Delete(t.Context(), word, o)
	if err != nil {
		if _, conflict, ok := strings.Cut(err.Error(), ": conflict: "); ok && errors.Is(err, ErrConflict) {
			return []string{"conflict: " + conflict}
		}
		if errors.Is(err, ErrNotFound) {
			return []string{"not found"}
		}
		t.Fatalf("%s: %v", word, err)
	}
	var out []string
	for _, i := range d.Items {
		if i.Untagged != "" {
			out = append(out, "Untagged: "+i.Untagged)
		} else {
			out = append(out, "Deleted: "+i.Deleted)
		}
	}
	return out
}

// TestDeleteLikeDocker removes the same images here and from Debian's dockerd.
func TestDeleteLikeDocker(t *testing.T) {
	need.Root(t)
	skopeo := need.Command(t, "skopeo", "apt-get install skopeo")
	need.Command(t, "docker-registry", "apt-get install docker-registry")
	need.Command(t, "dockerd", "apt-get install docker.io")
	img, archive := threeLayers(t)
	id, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	r, err := servers.StartRegistry(t.Context(), serverDir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer r.Stop()
	three := r.Addr + "/three"
	for _, to := range []string{three + ":v1", three + ":v2"} {
		run(t, exec.Command(skopeo, "--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false", "docker-archive:"+archive, "docker://"+to))
	}
	d, err := servers.StartDockerd(t.Context(), serverDir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Stop()
	s := openStore(t)
	o := anonymous()
	o.PlainHTTP, o.DockerHost = []string{r.Addr}, "unix:///nonexistent"

	var users []User
	pull := func(ref string) func() {
		return func() {
			run(t, d.Docker(t.Context(), "pull", "--quiet", ref))
			if _, err := s.Pull(t.Context(), parse(t, ref), o); err != nil {
				t.Fatal(err)
			}
		}
	}
	tagBoth := func(from, to string) func() {
		return func() {
			run(t, d.Docker(t.Context(), "tag", from, to))
			u, err := s.Lookup(t.Context(), from)
			if err != nil {
				t.Fatal(err)
			}
			tag(t, s, u.Image, to)
		}
	}
	bundle := t.TempDir()
	container := func(ref string) func() {
		return func() {
			c := strings.TrimSpace(run(t, d.Docker(t.Context(), "create", "--network", "none", ref)))
			users = []User{{Name: c[:12]}}
			u, err := s.Lookup(t.Context(), ref)
			if err == nil {
				err = s.Lease(t.Context(), bundle, ids(u.Image.Layers))
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func() {
		run(t, d.Docker(t.Context(), "rm", users[0].Name))
		users = nil
		if err := s.Release(t.Context(), bundle); err != nil {
			t.Fatal(err)
		}
	}
	rmi := func(args ...string) func() {
		return func() {
			t.Helper()
			word := args[len(args)-1]
			out, err := d.Docker(t.Context(), append([]string{"rmi"}, args...)...).CombinedOutput()
			want := strings.Split(strings.TrimSpace(string(out)), "\n")
			if err != nil {
				_, message, _ := strings.Cut(want[0], "Error response from daemon: ")
				_, message, _ = strings.Cut("Error: "+message, "Error: ")
				if message = strings.TrimSpace(message); strings.HasPrefix(message, "No such image") {
					message = "not found"
				}
				want = []string{message}
			}
			got := deleteLines(t, s, word, DeleteOptions{Force: args[0] == "-f", Users: func(digest.Digest) []User { return users }})
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("rmi %s (-docker +store):\n%s", strings.Join(args, " "), diff)
			}
			// What is left has the same names.
			var left, have []string
			for line := range strings.Lines(run(t, d.Docker(t.Context(), "images", "--no-trunc", "--format", "{{.ID}} {{.Repository}}:{{.Tag}}"))) {
				left = append(left, strings.TrimSpace(line))
			}
			all, err := s.Images(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for _, u := range all {
				for _, tag := range u.RepoTags {
					have = append(have, u.ID.String()+" "+tag)
				}
				if u.Dangling {
					have = append(have, u.ID.String()+" <none>:<none>")
				}
			}
			slices.Sort(left)
			slices.Sort(have)
			if diff := cmp.Diff(left, have); diff != "" {
				t.Errorf("after rmi %s (-docker +store):\n%s", strings.Join(args, " "), diff)
			}
		}
	}
	for _, step := range []func(){
		pull(three + ":v1"), tagBoth(three+":v1", "other:1"), tagBoth(three+":v1", three+":v9"),
		rmi(id.Hex[:12]), rmi("nothing:1"), rmi("other:1"), rmi("other:1"), rmi(three + ":v9"), rmi(three + ":v1"),
		pull(three + ":v1"), rmi(id.Hex),
		pull(three + ":v1"), tagBoth(three+":v1", "other:1"), rmi("-f", id.Hex[:12]),
		pull(three + ":v1"), pull(three + ":v2"), rmi(three + ":v2"), rmi(id.String()),
		// A container that does not run.
		pull(three + ":v1"), container(three + ":v1"), rmi(three + ":v1"), rmi(id.Hex[:12]),
		tagBoth(three+":v1", "other:1"), rmi("other:1"), rmi("-f", three+":v1"), remove, rmi(three + ":v1"),
		pull(three + ":v1"), container(three + ":v1"), rmi("-f", id.Hex[:12]), remove,
	} {
		step()
	}
	if _, err := s.Prune(t.Context(), PruneOptions{}); err != nil {
		t.Fatal(err)
	}
	if left := storeFiles(t, s, dirLayers); len(left) > 0 {
		t.Errorf("layers holds %v", left)
	}
}

// TestDeleteUsed removes names of images that containers run from: the image stays without one.
func TestDeleteUsed(t *testing.T) {
	s := openStore(t)
	one, two := pullShared(t, s)
	running := DeleteOptions{Users: func(digest.Digest) []User { return []User{{Name: "c0ffee", Running: true}} }}
	_, err := s.Delete(t.Context(), one.ConfigDigest.String(), running)
	wantError(t, err, ErrConflict, "cannot be forced", "c0ffee")
	running.Force = true
	_, err = s.Delete(t.Context(), one.ConfigDigest.String(), running)
	wantError(t, err, ErrConflict, "cannot be forced")
	d, err := s.Delete(t.Context(), one.Source, running)
	if err != nil || slices.ContainsFunc(d.Items, func(i DeletedItem) bool { return i.Deleted != "" }) {
		t.Errorf("got %+v, %v, want the name removed only", d, err)
	}
	u, err := s.Lookup(t.Context(), one.ConfigDigest.String())
	if err != nil || !u.Dangling || len(u.Names) > 0 || !s.has(one.Layers[1]) {
		t.Errorf("got %+v, %v, want it dangling", u, err)
	}
	if d, err = s.Delete(t.Context(), shortID(one.ConfigDigest), DeleteOptions{}); err != nil || len(d.Items) != 2 || len(d.Layers) != 1 {
		t.Errorf("got %+v, %v, want the image and its own layer removed", d, err)
	}
	// A name of an image that is not whole goes as well.
	tag(t, s, two, "broken")
	if err := os.Rename(two.Layers[1].Path, two.Layers[1].Path+"~"); err != nil {
		t.Fatal(err)
	}
	if d, err = s.Delete(t.Context(), "broken", DeleteOptions{}); err != nil || len(d.Items) != 1 || d.Items[0].Untagged != "broken:latest" {
		t.Errorf("an image that is not whole: %+v, %v", d, err)
	}
	if err := os.Rename(two.Layers[1].Path+"~", two.Layers[1].Path); err != nil {
		t.Fatal(err)
	}
	// Without being told, the store asks its leases.
	bundle := t.TempDir()
	if err := s.Lease(t.Context(), bundle, ids(two.Layers)); err != nil {
		t.Fatal(err)
	}
	_, err = s.Delete(t.Context(), two.Ref, DeleteOptions{})
	wantError(t, err, ErrConflict, "must force", bundle)
	if d, err = s.Delete(t.Context(), two.Ref, DeleteOptions{Force: true}); err != nil || len(d.Layers) > 0 || !s.has(two.Layers[0]) {
		t.Errorf("got %+v, %v, want the layers kept for the bundle", d, err)
	}
}

// TestDangling gives names to other images.
func TestDangling(t *testing.T) {
	s := openStore(t)
	one, two := pullShared(t, s)
	tag(t, s, one, "app")
	if _, err := s.Remove(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	state := func() string {
		all, err := s.Images(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		var out []string
		for _, u := range all {
			name := map[digest.Digest]string{one.ConfigDigest: "one", two.ConfigDigest: "two"}[u.ID]
			out = append(out, fmt.Sprint(name, " ", u.RepoTags, " ", u.Dangling))
		}
		slices.Sort(out)
		return strings.Join(out, "; ")
	}
	u, err := s.Lookup(t.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Tag(t.Context(), two, parse(t, "app")); err != nil {
		t.Fatal(err)
	}
	twoTags := "two " + fmt.Sprint(slices.Sorted(slices.Values([]string{"app:latest", two.Ref}))) + " false"
	if got, want := state(), "one [] true; "+twoTags; got != want {
		t.Errorf("after a new tag: got %s, want %s", got, want)
	}
	// It gets a name again.
	u.Image.Ref = one.ConfigDigest.String()
	tag(t, s, u.Image, "back", "back2")
	if got, want := state(), "one [back2:latest back:latest] false; "+twoTags; got != want {
		t.Errorf("named again: got %s, want %s", got, want)
	}
	// Loses one of two names.
	tag(t, s, two, "back2")
	if got, want := state(), "one [back:latest] false; "; !strings.HasPrefix(got, want) {
		t.Errorf("one name of two: got %s, want %s…", got, want)
	}
	tag(t, s, two, "back")
	removed, err := s.Prune(t.Context(), PruneOptions{})
	if err != nil || !slices.Equal(removed.Images, []string{one.ConfigDigest.String()}) || len(removed.Layers) != 1 {
		t.Errorf("prune: got %+v, %v, want the dangling image and its own layer", removed, err)
	}
	wantError(t, s.Tag(t.Context(), two, parse(t, "app@"+two.Digest.String())), nil, "name by digest")
	wantError(t, s.Tag(t.Context(), one, parse(t, "app")), ErrNotFound)
}

func TestLookup(t *testing.T) {
	s := openStore(t)
	one, two := pullShared(t, s)
	tag(t, s, one, "debian:12", "debian", "example.org/x/y:z")
	repo, _, _ := strings.Cut(strings.TrimPrefix(one.Source, "docker+http://"), ":latest")
	for word, want := range map[string]*Image{
		"debian": one, "debian:12": one, "docker.io/library/debian:latest": one, "example.org/x/y:z": one,
		repo: one, repo + "@" + one.Digest.String(): one, one.ConfigDigest.String(): one, one.ConfigDigest.Encoded()[:8]: one,
		two.ConfigDigest.Encoded(): two, two.Digest.String(): two,
		"debian:11": nil, "x/y:z": nil, "debian@" + one.Digest.String(): nil, "zz": nil, "": nil, strings.Repeat("x", 5000): nil,
	} {
		u, err := s.Lookup(t.Context(), word)
		switch {
		case want == nil:
			if !errors.Is(err, ErrNotFound) || len(err.Error()) > 500 {
				t.Errorf("%.50s: got %v, %.500v", word, u, err)
			}
		case err != nil || u.ID != want.ConfigDigest:
			t.Errorf("%s: got %v, %v", word, u, err)
		}
	}
	u, err := s.Lookup(t.Context(), "debian")
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"debian:12", "debian:latest", "example.org/x/y:z", repo + ":latest"}; !cmp.Equal(sorted(want), sorted(u.RepoTags)) {
		t.Errorf("got tags %v, want %v", u.RepoTags, want)
	}
	if want := []string{repo + "@" + one.Digest.String()}; !slices.Equal(u.RepoDigests, want) {
		t.Errorf("got digests %v, want %v", u.RepoDigests, want)
	}
	if u.Size != one.Size() || u.Shared != one.Layers[0].Size || u.LastTagged.IsZero() {
		t.Errorf("got size %d, shared %d, tagged %v", u.Size, u.Shared, u.LastTagged)
	}
	var first string
	for _, c := range "0123456789abcdef" {
		if strings.HasPrefix(one.ConfigDigest.Encoded(), string(c)) && strings.HasPrefix(two.ConfigDigest.Encoded(), string(c)) {
			first = string(c)
		}
	}
	if first != "" {
		_, err := s.Lookup(t.Context(), first)
		wantError(t, err, ErrAmbiguous)
	}
}

func sorted(s []string) []string { return slices.Sorted(slices.Values(s)) }
