package vdocker_test

import (
	"context"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/kcradle/kcradle/guest/guesttest"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/guest/vdocker"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/spec"
	"github.com/kcradle/kcradle/test/servers"
	"github.com/kcradle/kcradle/test/tour"
)

func TestMain(m *testing.M) { guesttest.Main(m, api) }

func api(ctx context.Context, l net.Listener, source func(context.Context) (*pod.Pod, error), log *slog.Logger) error {
	return vdocker.Serve(ctx, l, vdocker.New(source, log), log)
}

// startTour starts a guest with the tour's pod on this machine.
func startTour(t *testing.T, root string) tour.Host {
	t.Helper()
	doc := tour.Pod(spec.Image{})
	roots := map[string]string{}
	for _, c := range doc.Containers {
		roots[c.Name] = root
	}
	for i := range doc.Containers {
		doc.Containers[i].Image.ConfigID = "sha256:" + doc.Containers[0].ID
	}
	h := guesttest.StartWith(t, doc, roots, guesttest.Options{Placement: spec.Placement{Hold: true, Linger: true, Network: spec.Network{Mode: "none"}}})
	return tour.Host{Name: "the pod", Address: "unix://" + filepath.Join(h.Dir(), "1"), Pod: true}
}

// The real docker client finds no difference between a pod and Debian's dockerd.
func TestTour(t *testing.T) {
	need.Root(t)
	need.Command(t, "docker", "hack/deps test")
	need.Command(t, "dockerd", "hack/deps test")
	root := guesttest.Busybox(t)
	ours := startTour(t, root)

	dir, err := servers.TempDir()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	d, err := servers.StartDockerd(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Stop)
	theirs := tour.Host{Name: "dockerd", Address: d.Host}
	if err := tour.Import(t.Context(), theirs, root); err != nil {
		t.Fatal(err)
	}
	if err := tour.Create(t.Context(), theirs); err != nil {
		t.Fatal(err)
	}
	tour.Run(t, ours, theirs)
}
