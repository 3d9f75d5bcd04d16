package e2e

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/test/servers"
)

// TestDaemonMetrics asks a real daemon for its metrics as Prometheus does.
func TestDaemonMetrics(t *testing.T) {
	h := &host{t: t, dir: tempDir(t)}
	h.root = filepath.Join(h.dir, "root")
	t.Setenv("KCRADLE_TEMPLATES", "off")
	// A wrapper gives the daemon one more flag.
	program := filepath.Join(h.dir, "kcradle")
	socket := filepath.Join(h.dir, "metrics.sock")
	script := fmt.Sprintf("#!/bin/sh\nexec %q \"$@\" --metrics-addr unix://%s\n", kcradle(t), socket)
	if err := os.WriteFile(program, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	var err error
	if h.d, err = servers.StartDaemon(t.Context(), h.dir, program); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.d.Stop)
	h.docker("load", "-q", "-i", image(t, "busybox").Archive)
	h.docker("run", "-d", "--name", "runs", busybox, "sleep", "1000")
	h.docker("create", "--name", "made", busybox, "true")
	h.refused(1, "inspect", "nobody")

	client := &http.Client{Transport: &http.Transport{Dial: func(string, string) (net.Conn, error) { return net.Dial("unix", socket) }}}
	scrape := func() string {
		resp, err := client.Get("http://metrics/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("scrape: %s, %v", resp.Status, err)
		}
		return string(b)
	}
	got := scrape()
	for _, want := range []string{
		`engine_daemon_container_states_containers{state="running"} 1`,
		`engine_daemon_container_states_containers{state="stopped"} 1`,
		`engine_daemon_engine_info{architecture="amd64",kcradle="[^"]+",version="28.2.2"} 1`,
		`engine_daemon_container_actions_seconds_count{action="create"} 2`,
		`engine_daemon_container_actions_seconds_count{action="start"} 1`,
		`engine_daemon_events_total [1-9]`,
		`kcradle_pods{state="created"} 1`,
		`kcradle_pods{state="running"} 1`,
		`kcradle_start_seconds_count{path="cold"} 1`,
		`kcradle_start_seconds_count{path="pool"} 0`,
		`kcradle_pods_memory_bytes [1-9][.0-9]*e\+0[78]`,
		`kcradle_store_bytes [1-9]`,
		`kcradle_api_request_seconds_count{method="POST",route="/containers/create",status="201"} 2`,
		`kcradle_api_request_seconds_count{method="GET",route="/containers/{id}/json",status="404"} 1`,
	} {
		if !regexp.MustCompile(`(?m)^` + want).MatchString(got) {
			t.Errorf("metrics: nothing like %s in\n%s", want, got)
		}
	}
	// Whatever clients ask for, the number of series stays what it is.
	lines := strings.Count(got, "kcradle_api_request_seconds_count")
	for i := range 50 {
		conn, r := h.raw(fmt.Sprintf("ODD%d", i), fmt.Sprintf("/odd/%d", i), "", "Connection: close")
		if _, err := io.Copy(io.Discard, r); err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	if n := strings.Count(scrape(), "kcradle_api_request_seconds_count"); n > lines+1 {
		t.Errorf("%d series became %d", lines, n)
	}
	h.docker("rm", "-f", "runs", "made")

	cmd := exec.Command(kcradle(t), "--root", filepath.Join(h.dir, "other"), "daemon", "-H", "unix://"+filepath.Join(h.dir, "o.sock"), "--metrics-addr", "0.0.0.0:9323")
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "want an address of the loopback") {
		t.Errorf("metrics for the network: %v, %s", err, out)
	}
}
