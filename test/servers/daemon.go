package servers

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"time"
)

// Daemon is a running program of ours that serves the Docker API.
type Daemon struct {
	*process
	Host string // as for DOCKER_HOST
}

// StartDaemon starts "PROGRAM daemon -H unix://SOCKET --root DIR", both paths below dir, and waits until GET /_ping is
// answered with 200: there is nothing else that every such program says when it is ready. dir must not be deep.
func StartDaemon(ctx context.Context, dir, program string) (*Daemon, error) {
	socket := filepath.Join(dir, "d.sock")
	cmd := exec.Command(program, "daemon", "-H", "unix://"+socket, "--root", filepath.Join(dir, "root"))
	p, err := start(ctx, dir, cmd, func(ctx context.Context, _ *process) error { return untilPing(ctx, socket) })
	if err != nil {
		return nil, err
	}
	return &Daemon{process: p, Host: "unix://" + socket}, nil
}

// untilPing asks over a Unix socket until the answer is 200 or ctx is done.
func untilPing(ctx context.Context, socket string) error {
	var d net.Dialer
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return d.DialContext(ctx, "unix", socket) },
	}}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ping(ctx, client)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for an answer to /_ping: %w", err)
		}
	}
}

func ping(ctx context.Context, client *http.Client) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://daemon/_ping", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET /_ping: got %s", resp.Status)
	}
	return nil
}
