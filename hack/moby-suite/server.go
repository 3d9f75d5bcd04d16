package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/vishvananda/netlink"

	"github.com/kcradle/kcradle/test/servers"
)

// maxRestarts bounds how many tests may leave the server dead before the run is given up.
const maxRestarts = 10

// process is a server that this program started.
type process interface {
	Stop()
	Log() string
	Ended() <-chan struct{}
}

// server is the server under test, with the suite's images in it.
type server struct {
	host    string
	api     *api
	version version
	keep    []thing // what was there before the first test

	// begin starts a server with an empty state in dir. Nil: somebody else has started it.
	begin func(ctx context.Context, dir string) (process, string, error)
	// intact says what a test has broken around the server, if anything. It may be nil.
	intact   func() error
	dir      string
	images   []archive
	process  process
	restarts int
}

// startGiven uses a server that runs already.
func startGiven(ctx context.Context, host string, images []archive) (*server, error) {
	s := &server{host: host, images: images}
	return s, s.settle(ctx)
}

// startDockerd starts Debian's dockerd with its state below dir. Alone says that /run/docker is this run's own.
func startDockerd(ctx context.Context, dir string, images []archive, alone bool) (*server, error) {
	s := &server{dir: dir, images: images, intact: bridgeIntact}
	s.begin = func(ctx context.Context, dir string) (process, string, error) {
		d, err := servers.StartDockerdWithNetworks(ctx, dir)
		if err != nil {
			return nil, "", err
		}
		if alone {
			err = offerContainerd(filepath.Join(dir, "exec"))
		}
		return d, d.Host, err
	}
	return s, s.start(ctx)
}

// bridgeIntact says whether dockerd's bridge is there. Tests that start daemons of their own remove it, and put it back
// only where the kernel has all of its features.
func bridgeIntact() error {
	if _, err := netlink.LinkByName("docker0"); err != nil {
		return fmt.Errorf("find docker0: %w", err)
	}
	return nil
}

// startDaemon starts a daemon of ours with its state below dir.
func startDaemon(ctx context.Context, program, dir string, images []archive) (*server, error) {
	s := &server{dir: dir, images: images}
	s.begin = func(ctx context.Context, dir string) (process, string, error) {
		d, err := servers.StartDaemon(ctx, dir, program)
		if err != nil {
			return nil, "", err
		}
		return d, d.Host, nil
	}
	return s, s.start(ctx)
}

func (s *server) start(ctx context.Context) error {
	dir := filepath.Join(s.dir, fmt.Sprintf("s%d", s.restarts))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	p, host, err := s.begin(ctx, dir)
	if p != nil {
		s.process = p
	}
	if err != nil {
		s.stop()
		return err
	}
	s.host = host
	if err := s.settle(ctx); err != nil {
		log := p.Log()
		s.stop()
		return fmt.Errorf("%w\nthe server's last words:\n%s", err, log)
	}
	return nil
}

// settle asks who the server is and gives it the images.
func (s *server) settle(ctx context.Context) (err error) {
	if s.api, err = newAPI(s.host); err != nil {
		return err
	}
	if s.version, err = s.api.version(ctx); err != nil {
		return err
	}
	for _, img := range s.images {
		if err := s.api.load(ctx, img); err != nil {
			return fmt.Errorf("%w (the suite runs no test without this image)", err)
		}
	}
	s.keep, err = s.api.things(ctx)
	return err
}

func (s *server) stop() {
	if s.process != nil {
		s.process.Stop()
		s.process = nil
	}
}

// restore makes the server as it was before the last test. A server that does not answer any more, or cannot be tidied
// up, is started again with an empty state; what was wrong with it is returned as trouble, with its last words. The error
// says that there is no server to go on with.
func (s *server) restore(ctx context.Context) (trouble, log string, err error) {
	wrong := s.api.ping(ctx)
	if wrong == nil {
		// Removing a network is refused until its containers are gone, and some servers answer before they are.
		if wrong = s.api.tidy(ctx, s.keep, s.images); wrong != nil {
			wrong = s.api.tidy(ctx, s.keep, s.images)
		}
	}
	if wrong == nil && s.intact != nil {
		wrong = s.intact()
	}
	if wrong == nil {
		return "", "", nil
	}
	if ctx.Err() != nil {
		return "", "", ctx.Err()
	}
	trouble = fmt.Sprintf("the server was left useless: %v", wrong)
	if s.process == nil {
		if pingErr := s.api.ping(ctx); pingErr != nil {
			return trouble, "", fmt.Errorf("the server does not answer any more: %w", pingErr)
		}
		return trouble, "", nil // the next tests may mind what is left there, or not
	}
	select {
	case <-s.process.Ended():
		trouble = "the server ended"
	default:
	}
	log = s.process.Log()
	s.stop()
	s.restarts++
	if s.restarts > maxRestarts {
		return trouble, log, fmt.Errorf("the server would have to be started for the %d. time: giving up", s.restarts+1)
	}
	return trouble, log, s.start(ctx)
}

// offerContainerd makes the containerd of a dockerd whose exec root is execRoot known under the name where the daemons
// that tests start look for one.
func offerContainerd(execRoot string) error {
	link := filepath.Join(runDocker, "containerd")
	if err := os.Remove(link); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return os.Symlink(filepath.Join(execRoot, "containerd"), link)
}
