package vdocker

import (
	"context"
	"errors"
	"math"
	"net/http"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/moby/api/types/container"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/spec"
)

// detached is the context of an act that a client began and that goes on when the client has gone.
func (k call) detached() context.Context { return context.WithoutCancel(k.Context()) }

func noContent(w http.ResponseWriter) error {
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (s *server) start(w http.ResponseWriter, k call) error {
	if k.c.State().Status == spec.StatusPaused {
		return dockerapi.Conflict("cannot start a paused container, try unpause instead")
	}
	if err := k.c.Start(k.detached()); err != nil {
		return err
	}
	return noContent(w)
}

func stopOptions(k call) (pod.StopOptions, error) {
	var o pod.StopOptions
	if k.Version >= 42 {
		o.Signal = k.Query("signal")
	}
	if o.Signal != "" {
		if _, err := parseSignal(o.Signal); err != nil {
			return o, err
		}
	}
	if t := k.Query("t"); t != "" {
		n, err := strconv.Atoi(t)
		if err != nil {
			return o, dockerapi.BadRequest("strconv.Atoi: parsing %q: invalid syntax", t)
		}
		o.Timeout = &n
	}
	return o, nil
}

func (s *server) stop(w http.ResponseWriter, k call) error {
	o, err := stopOptions(k)
	if err != nil {
		return err
	}
	if err := k.c.Stop(k.detached(), o); err != nil {
		return err
	}
	return noContent(w)
}

func (s *server) restart(w http.ResponseWriter, k call) error {
	o, err := stopOptions(k)
	if err != nil {
		return err
	}
	if err := k.c.Restart(k.detached(), o); err != nil {
		return err
	}
	return noContent(w)
}

func (s *server) kill(w http.ResponseWriter, r *dockerapi.Request, p *pod.Pod) error {
	sig := syscall.SIGKILL
	if name := r.Query("signal"); name != "" {
		var err error
		if sig, err = parseSignal(name); err != nil {
			return err
		}
	}
	c, err := find(p, r.Var("id"))
	if err == nil {
		err = failed(c, c.Kill(context.WithoutCancel(r.Context()), sig))
	}
	if err != nil {
		return dockerapi.Errorf(dockerapi.Status(err), "cannot kill container: %s: %w", r.Var("id"), err)
	}
	return noContent(w)
}

// parseSignal is pod.ParseSignal with docker's wording.
func parseSignal(name string) (syscall.Signal, error) {
	sig, err := pod.ParseSignal(name)
	if err != nil {
		return 0, dockerapi.BadRequest("invalid signal: %s", name)
	}
	return sig, nil
}

func (s *server) pause(w http.ResponseWriter, k call) error {
	switch k.c.State().Status {
	case spec.StatusPaused:
		return dockerapi.Conflict("container %s is already paused", k.c.ID())
	case spec.StatusRestarting:
		return restarting(k.c)
	}
	if err := k.c.Pause(k.detached()); err != nil {
		return err
	}
	return noContent(w)
}

func restarting(c *pod.Container) error {
	return dockerapi.Conflict("Container %s is restarting, wait until the container is running", c.ID())
}

func (s *server) unpause(w http.ResponseWriter, k call) error {
	st := k.c.State()
	if st.Status != spec.StatusPaused {
		return dockerapi.Errorf(http.StatusInternalServerError, "Container %s is not paused", k.c.ID())
	}
	if err := k.c.Unpause(k.detached()); err != nil {
		return err
	}
	return noContent(w)
}

func (s *server) rename(w http.ResponseWriter, k call) error {
	name := strings.TrimPrefix(k.Query("name"), "/")
	switch {
	case name == "":
		return dockerapi.BadRequest("Neither old nor new names may be empty")
	case name == k.c.Name():
		return dockerapi.BadRequest("Renaming a container with the same name as its current name")
	}
	err := k.c.Rename(name)
	switch {
	case errors.Is(err, pod.ErrConflict):
		id := ""
		if other, err := k.pod.Find(name); err == nil {
			id = other.ID()
		}
		return dockerapi.Conflict("Error when allocating new name: Conflict. The container name %q is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", "/"+name, id)
	case errors.Is(err, pod.ErrInvalid):
		return dockerapi.BadRequest("Error when allocating new name: Invalid container name (%s), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed", "/"+name)
	case err != nil:
		return err
	}
	return noContent(w)
}

func (s *server) resize(w http.ResponseWriter, k call) error {
	h, wd, err := size(k.Request)
	if err != nil {
		return err
	}
	if err := k.c.Resize(h, wd); err != nil {
		return err
	}
	k.emit("resize", map[string]string{"height": strconv.Itoa(int(h)), "width": strconv.Itoa(int(wd))})
	w.WriteHeader(http.StatusOK)
	return nil
}

// size reads the parameters h and w of a resize.
func size(r *dockerapi.Request) (height, width uint, err error) {
	var out [2]uint
	for i, name := range []string{"h", "w"} {
		n, err := strconv.ParseInt(r.Query(name), 10, 64)
		if err == nil && (n < 0 || n > math.MaxUint16) {
			err = &strconv.NumError{Err: strconv.ErrRange}
		}
		if err != nil {
			return 0, 0, dockerapi.BadRequest("invalid resize %s %q: %w", map[string]string{"h": "height", "w": "width"}[name], r.Query(name), errors.Unwrap(err))
		}
		out[i] = uint(n)
	}
	return out[0], out[1], nil
}

func (s *server) wait(w http.ResponseWriter, k call) error {
	cond := k.Query("condition")
	switch cond {
	case "":
		cond = pod.WaitNotRunning
	case pod.WaitNotRunning, pod.WaitNextExit, pod.WaitRemoved:
	default:
		return dockerapi.BadRequest("invalid condition: %q", cond)
	}
	done, cancel, err := k.c.Wait(cond)
	if err != nil {
		return err
	}
	defer cancel()
	// The client starts the container only after it knows that the wait is registered.
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(http.StatusOK)
	if err := http.NewResponseController(w).Flush(); err != nil {
		return err
	}
	select {
	case <-k.Context().Done():
		return k.Context().Err()
	case res := <-done:
		answer := container.WaitResponse{StatusCode: int64(res.ExitCode)}
		if res.Err != nil {
			answer.Error = &container.WaitExitError{Message: res.Err.Error()}
		}
		if k.Version < 42 {
			return dockerapi.WriteJSON(bodyOnly{w}, 0, struct {
				Error      *container.WaitExitError
				StatusCode int64
			}{answer.Error, answer.StatusCode})
		}
		return dockerapi.WriteJSON(bodyOnly{w}, 0, answer)
	}
}

// bodyOnly writes the body of an answer whose header is sent.
type bodyOnly struct{ http.ResponseWriter }

func (bodyOnly) WriteHeader(int) {}

// running refuses a container that has no processes.
func running(c *pod.Container) error {
	switch c.State().Status {
	case spec.StatusRunning, spec.StatusPaused:
		return nil
	case spec.StatusRestarting:
		return restarting(c)
	}
	return pod.ErrNotRunning
}

func (s *server) top(w http.ResponseWriter, k call) error {
	if err := running(k.c); err != nil {
		return err
	}
	args := strings.Fields(k.Query("ps_args"))
	if len(args) == 0 {
		args = []string{"-ef"}
	}
	titles, rows, err := k.c.Top(args)
	if err != nil {
		return err
	}
	k.emit("top", nil)
	return dockerapi.WriteJSON(w, http.StatusOK, container.TopResponse{Titles: titles, Processes: rows})
}

func (s *server) changes(w http.ResponseWriter, k call) error {
	changes, err := k.c.Changes(k.Context())
	if err != nil {
		return err
	}
	var out []container.FilesystemChange // docker says null when nothing changed
	for _, c := range changes {
		out = append(out, container.FilesystemChange{Kind: container.ChangeType(c.Kind), Path: c.Path})
	}
	return dockerapi.WriteJSON(w, http.StatusOK, out)
}

// statsInterval is how often docker samples.
const statsInterval = time.Second

func (s *server) stats(w http.ResponseWriter, k call) error {
	stream := k.BoolOr("stream", true)
	oneShot := k.Version >= 41 && k.Bool("one-shot")
	if stream && oneShot {
		return dockerapi.BadRequest("cannot have stream=true and one-shot=true")
	}
	if !stream && k.c.State().Status != spec.StatusRunning && k.c.State().Status != spec.StatusPaused {
		return dockerapi.WriteJSON(w, http.StatusOK, s.sample(k.c, nil))
	}
	if oneShot {
		return dockerapi.WriteJSON(w, http.StatusOK, s.sample(k.c, nil))
	}
	before := s.sample(k.c, nil)
	tick := time.NewTicker(statsInterval)
	defer tick.Stop()
	next := func() (*container.StatsResponse, error) {
		select {
		case <-k.Context().Done():
			return nil, k.Context().Err()
		case <-tick.C:
		}
		now := s.sample(k.c, before)
		before = now
		return now, nil
	}
	if !stream {
		v, err := next()
		if err != nil {
			return err
		}
		return dockerapi.WriteJSON(w, http.StatusOK, v)
	}
	out := dockerapi.NewJSONStream(w)
	if err := out.Begin(); err != nil {
		return err
	}
	for v := before; ; {
		if err := out.Write(v); err != nil {
			return err
		}
		var err error
		if v, err = next(); err != nil {
			return err
		}
	}
}

// sample reads a container's counters; of one that does not run they are zero. before becomes the answer's previous
// sample, from which clients compute a CPU percentage.
func (s *server) sample(c *pod.Container, before *container.StatsResponse) *container.StatsResponse {
	out := &container.StatsResponse{ID: c.ID(), Name: "/" + c.Name()}
	if before != nil {
		out.PreRead, out.PreCPUStats = before.Read, before.CPUStats
	}
	st, err := c.Stats()
	if err != nil {
		if !errors.Is(err, pod.ErrNotRunning) {
			s.log.Warn("read stats", "container", c.Name(), "err", err)
		}
		return out
	}
	out.Read = st.Read.UTC()
	out.CPUStats = container.CPUStats{
		CPUUsage: container.CPUUsage{
			TotalUsage: st.CPU.Total, UsageInUsermode: st.CPU.User, UsageInKernelmode: st.CPU.System,
		},
		SystemUsage: st.CPU.Host,
		OnlineCPUs:  uint32(st.CPU.Online),
		ThrottlingData: container.ThrottlingData{
			Periods: st.CPU.Periods, ThrottledPeriods: st.CPU.ThrottledPeriods, ThrottledTime: st.CPU.ThrottledTime,
		},
	}
	out.MemoryStats = container.MemoryStats{
		Usage: st.Memory.Usage, Limit: st.Memory.Limit, Failcnt: st.Memory.Failures, Stats: st.Memory.Stat,
	}
	out.PidsStats = container.PidsStats{Current: st.Pids.Current, Limit: st.Pids.Limit}
	for _, d := range st.IO {
		out.BlkioStats.IoServiceBytesRecursive = append(out.BlkioStats.IoServiceBytesRecursive,
			container.BlkioStatEntry{Major: d.Major, Minor: d.Minor, Op: "read", Value: d.ReadBytes},
			container.BlkioStatEntry{Major: d.Major, Minor: d.Minor, Op: "write", Value: d.WriteBytes})
	}
	if len(st.Networks) > 0 {
		out.Networks = make(map[string]container.NetworkStats, len(st.Networks))
	}
	for name, n := range st.Networks {
		out.Networks[name] = container.NetworkStats{
			RxBytes: n.RxBytes, RxPackets: n.RxPackets, RxErrors: n.RxErrors, RxDropped: n.RxDropped,
			TxBytes: n.TxBytes, TxPackets: n.TxPackets, TxErrors: n.TxErrors, TxDropped: n.TxDropped,
		}
	}
	return out
}
