package pod

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/kcradle/kcradle/spec"
)

// Health states.
const (
	healthStarting  = "starting"
	healthHealthy   = "healthy"
	healthUnhealthy = "unhealthy"
)

// Docker's defaults and bounds of health checks.
const (
	healthInterval      = 30 * time.Second
	healthTimeout       = 30 * time.Second
	healthStartInterval = 5 * time.Second
	healthRetries       = 3
	healthResults       = 5
	healthOutput        = 4096
)

func hasHealthcheck(h *spec.Healthcheck) bool {
	return h != nil && len(h.Test) > 0 && h.Test[0] != "NONE"
}

// Health is what the health check knows; nil without one.
func (c *Container) Health() *Health {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.health == nil {
		return nil
	}
	h := *c.health
	h.Log = append([]HealthResult(nil), h.Log...)
	return &h
}

func orDefault(d, def time.Duration) time.Duration {
	if d <= 0 {
		return def
	}
	return d
}

// watchHealth probes a run until it ends.
func (c *Container) watchHealth(r *run) {
	h := c.doc.Healthcheck
	var args []string
	switch {
	case h.Test[0] == "CMD":
		args = h.Test[1:]
	case h.Test[0] == "CMD-SHELL" && len(h.Test) > 1:
		args = []string{"/bin/sh", "-c", h.Test[1]}
	}
	if len(args) == 0 {
		c.pod.cfg.Log.Error("unknown health check", "container", c.Name(), "test", h.Test)
		return
	}
	for {
		interval := orDefault(h.Interval, healthInterval)
		c.mu.Lock()
		starting := c.health.Status == healthStarting && time.Since(r.began) < h.StartPeriod
		c.mu.Unlock()
		if starting {
			interval = orDefault(h.StartInterval, healthStartInterval)
		}
		t := time.NewTimer(interval)
		select {
		case <-r.ctx.Done():
			t.Stop()
			return
		case <-t.C:
		}
		if c.State().Status == spec.StatusPaused {
			continue
		}
		res := c.probe(r, args, orDefault(h.Timeout, healthTimeout))
		if r.ctx.Err() != nil {
			return
		}
		c.judge(r, res)
	}
}

// judge takes the result of a probe into account.
func (c *Container) judge(r *run, res HealthResult) {
	hc := c.doc.Healthcheck
	retries := hc.Retries
	if retries <= 0 {
		retries = healthRetries
	}
	c.mu.Lock()
	if c.run != r || c.state.Status != spec.StatusRunning && c.state.Status != spec.StatusPaused {
		c.mu.Unlock()
		return
	}
	h := c.health
	old := h.Status
	h.Log = append(h.Log, res)
	if len(h.Log) > healthResults {
		h.Log = h.Log[len(h.Log)-healthResults:]
	}
	switch {
	case res.ExitCode == 0:
		h.FailingStreak = 0
		h.Status = healthHealthy
	case old == healthStarting && res.Start.Sub(r.began) < hc.StartPeriod:
		// Does not count yet.
	default:
		h.FailingStreak++
		if h.FailingStreak >= retries {
			h.Status = healthUnhealthy
		}
	}
	status := h.Status
	if status != old {
		c.publishLocked(func(s *spec.State) { s.Health = status })
	}
	c.mu.Unlock()
	if status != old {
		c.pod.Emit(Event{Action: "health_status: " + status, Container: c.ID()})
	}
}

// probe runs the check once.
func (c *Container) probe(r *run, args []string, timeout time.Duration) HealthResult {
	res := HealthResult{Start: time.Now()}
	proc, err := c.join(r, ExecConfig{Cmd: args, Stdout: true, Stderr: true}, [2]uint16{})
	if err != nil {
		res.End, res.ExitCode, res.Output = time.Now(), -1, err.Error()
		return res
	}
	defer proc.Close()
	out := &limitedOutput{}
	var wg sync.WaitGroup
	for _, f := range []*stream{newStream(proc.Stdout, proc.Done(), drainGrace), newStream(proc.Stderr, proc.Done(), drainGrace)} {
		wg.Go(func() {
			defer f.stop()
			io.Copy(out, f)
		})
	}
	ctx, cancel := context.WithTimeout(r.ctx, timeout)
	defer cancel()
	select {
	case <-proc.Done():
		wg.Wait()
		res.ExitCode, res.Output = proc.Exit().Code(), out.String()
		if res.ExitCode < 0 {
			res.ExitCode = -1
		}
	case <-ctx.Done():
		c.send(&run{proc: proc}, syscall.SIGKILL)
		<-proc.Done()
		wg.Wait()
		res.ExitCode = -1
		res.Output = fmt.Sprintf("Health check exceeded timeout (%v)", timeout)
		if s := out.String(); s != "" {
			res.Output += ": " + s
		}
	}
	res.End = time.Now()
	return res
}

// limitedOutput keeps the beginning of what is written to it.
type limitedOutput struct {
	mu   sync.Mutex
	b    strings.Builder
	more bool
}

func (o *limitedOutput) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := min(len(p), healthOutput-o.b.Len())
	o.b.Write(p[:n])
	o.more = o.more || n < len(p)
	return len(p), nil
}

func (o *limitedOutput) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.more {
		return o.b.String() + "..."
	}
	return o.b.String()
}
