package image

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/kcradle/kcradle/image/layer"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/test/servers"
)

// changesOfDocker are changes that docker's daemon and ApplyChanges are both given.
var changesOfDocker = [][]string{
	{`CMD echo "a  b" $HOME`, `ENTRYPOINT ["/bin/sh", "-c"]`},
	{`ENTRYPOINT /bin/run --x`},
	{`CMD ["one", "two"]`, `ENTRYPOINT ["three"]`},
	{`ENV A=1 B="two words" C=it\ is`, `ENV A=3`, `ENV D=$A-${B}-${NONE:-default}-'$A'`, `ENV OLD style value`},
	{`EXPOSE 80 443/tcp 53/udp`, `ENV P=7000`, `EXPOSE $P 9000-9002`},
	{`LABEL a=b "c d"="e f"`, `LABEL multi.line="x\`, `y"`, `ENV V=1`, `LABEL v=$V a=second`},
	{`USER 1000:1000`, `VOLUME /a /b`, `VOLUME ["/c d", "/e"]`, `ENV DIR=/v`, `VOLUME $DIR`},
	{`WORKDIR /a/b`, `WORKDIR ../c`, `WORKDIR d/`},
	{`HEALTHCHECK --interval=5s --timeout=3s --start-period=1m --retries=4 CMD curl -f http://localhost/`},
	{`HEALTHCHECK CMD ["/check", "x"]`}, {`HEALTHCHECK NONE`},
	{`ONBUILD RUN make`, `onbuild   COPY . /x`},
	{"# a comment", "", `CMD x`},
	// Refused by both.
	{`RUN rm -rf /`}, {`FROM scratch`}, {`COPY a b`}, {`EXPOSE nothing`}, {`HEALTHCHECK --interval=x CMD y`},
	{`HEALTHCHECK --what=1 CMD y`}, {`ENV`}, {`ENV A`}, {`LABEL`}, {`VOLUME ""`}, {`CMD ok`, `NOTHING x`}, {`USER`}, {`HEALTHCHECK`}, {`EXPOSE 70000`},
}

// runConfigText is what of a configuration changes can change.
func runConfigText(t testing.TB, c RunConfig) string {
	t.Helper()
	return string(rawJSON(t, map[string]any{
		"Cmd": c.Cmd, "Entrypoint": c.Entrypoint, "Env": c.Env, "ExposedPorts": c.ExposedPorts, "Healthcheck": c.Healthcheck, "Labels": c.Labels,
		"OnBuild": c.OnBuild, "StopSignal": c.StopSignal, "User": c.User, "Volumes": c.Volumes, "WorkingDir": c.WorkingDir,
	}))
}

// TestChangesLikeDocker imports a tar with the same changes here and into Debian's dockerd.
func TestChangesLikeDocker(t *testing.T) {
	need.Root(t)
	need.Command(t, "dockerd", "apt-get install docker.io")
	d, err := servers.StartDockerd(t.Context(), serverDir(t))
	if err != nil {
		t.Fatal(err)
	}
	defer d.Stop()
	b := makeTar(t, map[string][]byte{"a": []byte("text"), "d/b": noise(5000)})
	file := filepath.Join(t.TempDir(), "root.tar")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	s := openStore(t)
	for _, changes := range changesOfDocker {
		args := []string{"import", "--message", "from a test"}
		for _, c := range changes {
			args = append(args, "--change", c)
		}
		out, dockerErr := d.Docker(t.Context(), append(args, file)...).CombinedOutput()
		img, err := s.Import(t.Context(), bytes.NewReader(b), ImportOptions{Changes: changes, Message: "from a test"})
		if (dockerErr != nil) != (err != nil) {
			t.Errorf("%q: docker says %s, the store %v", changes, bytes.TrimSpace(out), err)
			continue
		}
		if err != nil {
			wantError(t, err, ErrChange)
			continue
		}
		var inspect struct {
			Config  RunConfig
			Comment string
			RootFS  struct{ Layers []digest.Digest }
		}
		id := strings.TrimSpace(string(out))
		if err := json.Unmarshal([]byte(run(t, d.Docker(t.Context(), "image", "inspect", "--format", "{{json .}}", id))), &inspect); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(runConfigText(t, inspect.Config), runConfigText(t, img.Config.Config)); diff != "" {
			t.Errorf("%q (-docker +store):\n%s", changes, diff)
		}
		if inspect.Comment != img.Config.History[0].Comment || !slices.Equal(inspect.RootFS.Layers, ids(img.Layers)) {
			t.Errorf("docker has comment %q, layers %v, the store %q, %v", inspect.Comment, inspect.RootFS.Layers, img.Config.History[0].Comment, ids(img.Layers))
		}
	}
}

// TestStopSignal: Debian's dockerd is too old to know it as a change.
func TestStopSignal(t *testing.T) {
	for signal, ok := range map[string]bool{
		"SIGQUIT": true, "9": true, "kill": true, "RTMIN+3": true, "SIGRTMAX-2": true, "SIGNOTHING": false, "0": false, "65": false, "RTMIN-3": false, "RTMIN+x": false,
	} {
		c, err := ApplyChanges(RunConfig{}, []string{"STOPSIGNAL " + signal})
		if (err == nil) != ok || ok && c.StopSignal != signal {
			t.Errorf("%s: got %q, %v", signal, c.StopSignal, err)
		}
	}
}

// TestVariableBomb doubles a variable sixty times, and uses a large one often.
func TestVariableBomb(t *testing.T) {
	double := []string{"ENV A=0123456789"}
	for range 60 {
		double = append(double, "ENV A=$A$A")
	}
	often := []string{"ENV A=" + strings.Repeat("x", 60_000), "LABEL x=" + strings.Repeat("$A", 30_000)}
	for _, changes := range [][]string{double, often, {often[0], "EXPOSE " + strings.Repeat("$A", 1000)}} {
		_, err := ApplyChanges(RunConfig{}, changes)
		wantError(t, err, ErrChange, "bytes of variables")
	}
}

func TestImport(t *testing.T) {
	b := makeTar(t, map[string][]byte{"bin/a": noise(100_000), "b": nil})
	var gz, zs bytes.Buffer
	zw := gzip.NewWriter(&gz)
	sw, err := zstd.NewWriter(&zs)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []io.WriteCloser{zw, sw} {
		if _, err := w.Write(b); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	s := openStore(t)
	created := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	var first *Image
	for name, in := range map[string][]byte{"plain": b, "gzip": gz.Bytes(), "zstd": zs.Bytes()} {
		img, err := s.Import(t.Context(), bytes.NewReader(in), ImportOptions{
			Ref: parse(t, "imported:"+name), Changes: []string{"CMD /a"}, Message: "words", Created: created, Architecture: "amd64",
		})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if first == nil {
			first = img
		}
		if img.ConfigDigest != first.ConfigDigest || img.Ref != "docker.io/library/imported:"+name || !img.Created().Equal(created) || img.Layers[0].DiffID != digest.FromBytes(b) {
			t.Errorf("%s: got %+v", name, img)
		}
		if got, err := layerTar(t, s, img.Layers[0]); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%s: the layer has %d bytes, %v", name, len(got), err)
		}
	}
	if u, err := s.Lookup(t.Context(), "imported:gzip"); err != nil || len(u.RepoTags) != 3 || len(u.RepoDigests) > 0 {
		t.Errorf("got %+v, %v", u, err)
	}
	if got, err := s.Pull(t.Context(), parse(t, "imported:gzip"), PullOptions{DockerHost: "unix:///nonexistent", Policy: Missing}); err != nil || got.ConfigDigest != first.ConfigDigest {
		t.Errorf("summoned by name: %v", err)
	}
	// Without a name.
	img, err := s.Import(t.Context(), bytes.NewReader(b), ImportOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if u, err := s.Lookup(t.Context(), img.ConfigDigest.String()); err != nil || !u.Dangling {
		t.Errorf("got %+v, %v, want a dangling image", u, err)
	}
	for _, dir := range []string{dirIngest, dirLeases} {
		if left := storeFiles(t, s, dir); len(left) > 0 {
			t.Errorf("%s holds %v", dir, left)
		}
	}
	if left := storeFiles(t, s, dirLocks); !slices.Equal(left, []string{"store"}) {
		t.Errorf("locks holds %v", left)
	}
}

func TestImportRefuses(t *testing.T) {
	s := openStore(t)
	b := makeTar(t, map[string][]byte{"a": noise(100_000)})
	broken := errors.New("broken pipe of the client")
	for _, test := range []struct {
		name  string
		in    io.Reader
		o     ImportOptions
		kind  error
		words string
	}{
		{"no tar", strings.NewReader(strings.Repeat("no tar ", 1000)), ImportOptions{}, tar.ErrHeader, "import"},
		{"cut short", bytes.NewReader(b[:5000]), ImportOptions{}, io.ErrUnexpectedEOF, ""},
		{"broken", io.MultiReader(bytes.NewReader(b[:5000]), failingReader{broken}), ImportOptions{}, broken, ""},
		{"xz", strings.NewReader("\xfd7zXZ\x00 and more"), ImportOptions{}, ErrUnsupported, "unxz"},
		{"change", bytes.NewReader(b), ImportOptions{Changes: []string{"RUN x"}}, ErrChange, "run is not a valid change command"},
		{"many changes", bytes.NewReader(b), ImportOptions{Changes: []string{strings.Repeat("# \n", 1<<19)}}, ErrChange, "limit"},
		{"limit", bytes.NewReader(b), ImportOptions{Limits: layer.Limits{Bytes: 50_000}}, layer.ErrLimit, "--max-layer-size"},
		{"digest", bytes.NewReader(b), ImportOptions{Ref: parse(t, "x@"+digest.FromString("x").String())}, nil, "by digest"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := s.Import(t.Context(), test.in, test.o)
			wantError(t, err, test.kind, test.words)
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	started := make(chan struct{})
	go func() { <-started; cancel() }()
	_, err := s.Import(ctx, io.MultiReader(bytes.NewReader(b[:5000]), &endless{started: started}), ImportOptions{})
	wantError(t, err, context.Canceled)
	for _, dir := range []string{dirIngest, dirLeases, dirImages, dirLayers, dirBlobs} {
		if left := storeFiles(t, s, dir); len(left) > 0 {
			t.Errorf("%s holds %v", dir, left)
		}
	}
}

type failingReader struct{ err error }

func (f failingReader) Read([]byte) (int, error) { return 0, f.err }

// endless says when it was asked first.
type endless struct {
	started chan struct{}
	told    bool
}

func (e *endless) Read(p []byte) (int, error) {
	if !e.told {
		close(e.started)
		e.told = true
	}
	clear(p)
	return len(p), nil
}

func TestCommit(t *testing.T) {
	s := openStore(t)
	base, _ := pullShared(t, s)
	changes := makeTar(t, map[string][]byte{"new": noise(20_000), ".wh.base": nil})
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	config := base.Config.Config
	config.Env = []string{"A=1"}
	o := CommitOptions{
		Ref: parse(t, "committed"), Config: &config, Changes: []string{"ENV B=$A", "LABEL x=y"}, Author: "someone", Comment: "why", CreatedBy: "/bin/sh", Created: created,
	}
	img, err := s.Commit(t.Context(), base, bytes.NewReader(changes), o)
	if err != nil {
		t.Fatal(err)
	}
	if want := append(ids(base.Layers), digest.FromBytes(changes)); !slices.Equal(ids(img.Layers), want) {
		t.Errorf("got layers %v, want %v", ids(img.Layers), want)
	}
	if img.Layers[0].Blob.Digest != base.Layers[0].Blob.Digest {
		t.Errorf("the base's layer is %v now, it was %v: a push could not refer to it", img.Layers[0].Blob, base.Layers[0].Blob)
	}
	c := img.Config
	if !slices.Equal(c.Config.Env, []string{"A=1", "B=1"}) || c.Config.Labels["x"] != "y" || c.Author != "someone" || !img.Created().Equal(created) ||
		!slices.Equal(c.Config.Cmd, []string{"/run"}) || c.Config.Healthcheck == nil {
		t.Errorf("got configuration %s", img.RawConfig)
	}
	h := c.History[len(c.History)-1]
	if len(c.History) != len(base.Config.History)+1 || h.Comment != "why" || h.CreatedBy != "/bin/sh" || h.EmptyLayer {
		t.Errorf("got history %+v", c.History)
	}
	if img.Parent != base.ConfigDigest || !slices.Equal(config.Env, []string{"A=1"}) || len(base.Config.Config.Labels) > 0 {
		t.Errorf("got parent %s, want %s; the base has %s", img.Parent, base.ConfigDigest, base.RawConfig)
	}
	if got := readLayer(t, img.Layers[2], "new"); len(got) != 20_000 {
		t.Errorf("the new file has %d bytes", len(got))
	}
	// The same again is the same image.
	again, err := s.Commit(t.Context(), base, bytes.NewReader(changes), o)
	if err != nil || again.ConfigDigest != img.ConfigDigest || again.Digest != img.Digest {
		t.Errorf("the second time: %v, %v", again, err)
	}
	// Nothing changed: no layer.
	o.Changes, o.Config = []string{"CMD x"}, nil
	empty, err := s.Commit(t.Context(), base, bytes.NewReader(make([]byte, 1024)), o)
	if err != nil || len(empty.Layers) != 2 || !empty.Config.History[len(empty.Config.History)-1].EmptyLayer {
		t.Errorf("without changes: %v, %v", empty, err)
	}
	// The name went to the last one, the first is dangling; the base goes, its layers stay.
	if u, err := s.Lookup(t.Context(), img.ConfigDigest.String()); err != nil || !u.Dangling {
		t.Errorf("the first one: %+v, %v", u, err)
	}
	if _, err := s.Delete(t.Context(), base.Ref, DeleteOptions{}); err != nil || !s.has(base.Layers[0]) {
		t.Errorf("remove the base: %v", err)
	}
	if file := saveFile(t, s, img.ConfigDigest.String()); file != "" {
		images, err := openStore(t).Load(t.Context(), mustOpen(t, file), anonymous())
		if err != nil || images[0].ConfigDigest != img.ConfigDigest {
			t.Errorf("save and load: %v, %v", images, err)
		}
	}
	if _, err := s.Prune(t.Context(), PruneOptions{All: true}); err != nil {
		t.Fatal(err)
	}
	_, err = s.Commit(t.Context(), base, bytes.NewReader(changes), CommitOptions{})
	wantError(t, err, ErrNotFound, "removed meanwhile")
}

func TestCommitTooDeep(t *testing.T) {
	s := openStore(t)
	r := newRegistry(t)
	var layers []v1.Layer
	for i := range MaxLayers {
		layers = append(layers, makeLayer(t, makeTar(t, map[string][]byte{fmt.Sprint(i): nil}), "gzip"))
	}
	base, err := s.Pull(t.Context(), parse(t, r.push(t, "deep", makeImage(t, layers...))), anonymous())
	if err != nil {
		t.Fatal(err)
	}
	_, err = s.Commit(t.Context(), base, bytes.NewReader(makeTar(t, map[string][]byte{"x": nil})), CommitOptions{})
	wantError(t, err, ErrUnsupported, "128 layers")
}

func FuzzApplyChanges(f *testing.F) {
	for _, c := range changesOfDocker {
		f.Add(strings.Join(c, "\n"))
	}
	f.Fuzz(func(t *testing.T, s string) {
		c, err := ApplyChanges(RunConfig{}, []string{s})
		if err != nil {
			if !errors.Is(err, ErrChange) {
				t.Errorf("got %v", err)
			}
			return
		}
		if _, err := json.Marshal(c); err != nil {
			t.Error(err)
		}
	})
}

// TestImportTogether imports one tar several times at once while garbage is collected all the time.
func TestImportTogether(t *testing.T) {
	s := openStore(t)
	b := makeTar(t, map[string][]byte{"a": noise(300_000), "b": noise(10)})
	started, goOn := make(chan struct{}), make(chan struct{})
	var g errgroup.Group
	for i := range 4 {
		first := &gate{started: started, goOn: goOn}
		g.Go(func() error {
			img, err := s.Import(t.Context(), io.MultiReader(bytes.NewReader(b[:100_000]), first, bytes.NewReader(b[100_000:])),
				ImportOptions{Ref: parse(t, fmt.Sprintf("together:%d", i))})
			if err == nil && img.Layers[0].DiffID != digest.FromBytes(b) {
				err = fmt.Errorf("got layer %s", img.Layers[0].DiffID)
			}
			return err
		})
	}
	for range 4 {
		<-started
	}
	if left := storeFiles(t, s, dirIngest); len(left) != 8 {
		t.Errorf("ingest holds %v", left)
	}
	prune := func() {
		if _, err := s.Prune(t.Context(), PruneOptions{Ingest: true}); err != nil {
			t.Error(err)
		}
	}
	prune()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range 50 {
			prune()
		}
	}()
	close(goOn)
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	<-done
	u, err := s.Lookup(t.Context(), "together:0")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := layerTar(t, s, u.Image.Layers[0]); err != nil || !bytes.Equal(got, b) {
		t.Errorf("the layer has %d bytes, %v", len(got), err)
	}
	// What a killed import leaves goes with the next prune of that kind.
	for _, ext := range []string{extImage, extSkeleton} {
		if err := os.WriteFile(s.path(dirIngest, "import-DEAD"+ext), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	prune()
	if left := storeFiles(t, s, dirIngest); len(left) > 0 {
		t.Errorf("ingest holds %v", left)
	}
}

// gate says that it was reached and waits.
type gate struct {
	started, goOn chan struct{}
}

func (g *gate) Read([]byte) (int, error) {
	g.started <- struct{}{}
	<-g.goOn
	return 0, io.EOF
}
