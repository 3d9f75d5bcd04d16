package image

import (
	"bytes"
	"encoding/json"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/servers"
)

func TestHistory(t *testing.T) {
	s := openStore(t)
	base, _ := pullShared(t, s)
	tag(t, s, base, "base")
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	first, err := s.Commit(t.Context(), base, bytes.NewReader(makeTar(t, map[string][]byte{"x": noise(50_000)})),
		CommitOptions{Ref: parse(t, "first"), Comment: "one", CreatedBy: "/bin/one", Author: "me", Created: created})
	if err != nil {
		t.Fatal(err)
	}
	second, err := s.Commit(t.Context(), first, bytes.NewReader(make([]byte, 1024)), CommitOptions{Ref: parse(t, "second"), Comment: "two", Created: created})
	if err != nil {
		t.Fatal(err)
	}
	got, err := s.History(t.Context(), second)
	if err != nil {
		t.Fatal(err)
	}
	u, err := s.Lookup(t.Context(), "base")
	if err != nil {
		t.Fatal(err)
	}
	want := []Step{
		{ID: second.ConfigDigest, RepoTags: []string{"second:latest"}, Comment: "two", Created: created},
		{ID: first.ConfigDigest, RepoTags: []string{"first:latest"}, Comment: "one", CreatedBy: "/bin/one", Author: "me", Created: created,
			Layer: first.Layers[2].DiffID, Size: first.Layers[2].Size},
		{ID: base.ConfigDigest, RepoTags: u.RepoTags, Layer: base.Layers[1].DiffID, Size: base.Layers[1].Size},
		{Layer: base.Layers[0].DiffID, Size: base.Layers[0].Size},
	}
	for i := 2; i < 4; i++ { // what the library says of layers it appends
		want[i].Created, want[i].CreatedBy, want[i].Author, want[i].Comment = got[i].Created, got[i].CreatedBy, got[i].Author, got[i].Comment
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("history (-want +got):\n%s", diff)
	}
	if second.Comment() != "two" {
		t.Errorf("got comment %q", second.Comment())
	}

	// Histories that say too little or too much.
	for _, test := range []struct {
		history []ocispec.History
		want    []string
	}{
		{nil, []string{"second", "first"}},
		{[]ocispec.History{{CreatedBy: "b"}}, []string{"b second", "first"}},
		{[]ocispec.History{{CreatedBy: "a"}, {CreatedBy: "b"}, {CreatedBy: "c"}}, []string{"c", "b second", "a first"}},
		{[]ocispec.History{{CreatedBy: "a", EmptyLayer: true}, {CreatedBy: "b"}}, []string{"b second", "a", "first"}},
	} {
		img := *base
		img.Config.History = test.history
		var got []string
		for _, st := range img.steps() {
			layer := map[string]string{base.Layers[0].DiffID.String(): "first", base.Layers[1].DiffID.String(): "second"}[st.Layer.String()]
			got = append(got, strings.TrimSpace(st.CreatedBy+" "+layer))
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%v: got %q, want %q", test.history, got, test.want)
		}
	}
}

// TestHistoryLikeDocker compares with what docker history says of an image that docker committed.
func TestHistoryLikeDocker(t *testing.T) {
	need.Root(t)
	need.Command(t, "dockerd", "apt-get install docker.io")
	_, archive := threeLayers(t)
	d, err := servers.StartDockerd(t.Context(), serverDir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Stop()
	run(t, d.Docker(t.Context(), "load", "--input", archive))
	c := strings.TrimSpace(run(t, d.Docker(t.Context(), "create", "--network", "none", "test/three", "/bin/other", "x")))
	run(t, d.Docker(t.Context(), "commit", "--message", "words", "--author", "me", c, "test/four"))
	saved := filepath.Join(t.TempDir(), "saved.tar")
	run(t, d.Docker(t.Context(), "save", "--output", saved, "test/four"))
	s := openStore(t)
	images, err := s.Load(t.Context(), mustOpen(t, saved), anonymous())
	if err != nil {
		t.Fatal(err)
	}
	steps, err := s.History(t.Context(), images[0])
	if err != nil {
		t.Fatal(err)
	}
	type line struct{ CreatedBy, Comment, CreatedAt string }
	var want, got []line
	for text := range strings.Lines(run(t, d.Docker(t.Context(), "history", "--no-trunc", "--human=false", "--format", "{{json .}}", "test/four"))) {
		var l line
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatal(err)
		}
		at, err := time.Parse(time.RFC3339, l.CreatedAt)
		if err != nil {
			t.Fatal(err)
		}
		l.CreatedAt = at.UTC().Format(time.RFC3339)
		want = append(want, l)
	}
	for _, st := range steps {
		got = append(got, line{st.CreatedBy, st.Comment, st.Created.UTC().Format(time.RFC3339)})
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("history (-docker +store):\n%s", diff)
	}
	if images[0].Comment() != "words" || images[0].Config.Author != "me" || steps[0].ID != images[0].ConfigDigest {
		t.Errorf("got comment %q, author %q, ID %s", images[0].Comment(), images[0].Config.Author, steps[0].ID)
	}
}
