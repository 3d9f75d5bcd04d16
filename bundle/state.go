package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kcradle/kcradle/spec"
)

const (
	stateFile = "state.json"
	spareFile = ".spare" // where the next state goes when the disk is full
)

// Phases of a start, in their order.
const (
	PhaseStarting = "starting" // the machine boots
	PhaseRunning  = "running"  // the pod was launched
	PhaseEnded    = "ended"    // see State.End
)

// Reasons of an end.
const (
	EndDone       = "done"       // the pod ended by itself
	EndStopped    = "stopped"    // stopped by the user
	EndLaunch     = "launch"     // the pod could not be launched
	EndHost       = "host"       // something of the host's failed before the launch
	EndMachine    = "machine"    // QEMU ended by itself or was killed
	EndOOM        = "oom"        // the host killed QEMU for its memory
	EndPanic      = "panic"      // the guest's kernel or init died
	EndSupervisor = "supervisor" // the supervisor was killed
)

// State is run/state.json: what is known of the present or the last start.
type State struct {
	Version    int          `json:"version"` // of the format, see Version
	Phase      string       `json:"phase"`
	Pid        int          `json:"pid"`                   // of the supervisor
	MachinePid int          `json:"machine_pid,omitempty"` // of QEMU
	Engine     string       `json:"engine,omitempty"`
	Network    string       `json:"network,omitempty"`
	Ports      []spec.Port  `json:"ports,omitempty"` // as really bound
	Started    time.Time    `json:"started"`
	Path       string       `json:"path,omitempty"`       // how the machine came up: PathCold, PathTemplate or PathPool
	Phases     []Mark       `json:"phases,omitempty"`     // of the start, in their order
	Containers []spec.State `json:"containers,omitempty"` // in the pod's order
	End        *End         `json:"end,omitempty"`
}

// Paths to a running machine.
const (
	PathCold     = "cold"     // it has booted
	PathTemplate = "template" // it came from a template
	PathPool     = "pool"     // it stood ready
)

// Mark is a moment of a start.
type Mark struct {
	Name  string        `json:"name"`
	After time.Duration `json:"after"` // of the start, in nanoseconds; in the guest: of its kernel's start
	Guest bool          `json:"guest,omitempty"`
}

// Mark notes that something is done now.
func (s *State) Mark(name string) {
	s.Phases = append(slices.Clip(s.Phases), Mark{Name: name, After: time.Since(s.Started)})
}

// End says how a start ended.
type End struct {
	Time     time.Time `json:"time"`
	Reason   string    `json:"reason"`
	Message  string    `json:"message,omitempty"` // for a person
	ExitCode int       `json:"exit_code"`         // of kcradle run
}

// State reads the state of the present or last start. ok is false when there was none. When the supervisor was killed,
// the state says so: nobody else could have written it.
func (b *Bundle) State() (s State, ok bool, err error) {
	// Look at the lock first: a supervisor writes its last state before it gives the lock away.
	pid, running := b.Running()
	raw, err := readBounded(filepath.Join(b.RunDir(), stateFile), maxMetaBytes)
	if errors.Is(err, fs.ErrNotExist) {
		if running {
			return State{Version: Version, Phase: PhaseStarting, Pid: pid}, true, nil
		}
		return State{}, false, nil
	}
	if err != nil {
		return State{}, false, fmt.Errorf("read state: %w", err)
	}
	if err := decodeVersioned(raw, &s, Version); err != nil {
		return State{}, false, fmt.Errorf("read state %s: %w", filepath.Join(b.RunDir(), stateFile), err)
	}
	switch {
	case running && s.Phase == PhaseEnded: // the next start has not written yet
		s = State{Version: Version, Phase: PhaseStarting, Pid: pid}
	case !running && s.Phase != PhaseEnded:
		s.Phase = PhaseEnded
		s.End = &End{Reason: EndSupervisor, ExitCode: 137,
			Message: fmt.Sprintf("the supervisor (pid %d) was killed; the machine died with it", s.Pid)}
		s.Pid, s.MachinePid = 0, 0
		for i := range s.Containers {
			c := &s.Containers[i]
			if c.Status == spec.StatusRunning || c.Status == spec.StatusPaused || c.Status == spec.StatusRestarting {
				c.Status, c.Pid, c.ExitCode, c.Signal = spec.StatusExited, 0, 137, 9
			}
		}
	}
	return s, true, nil
}

// SetState replaces run/state.json. Only the holder of the lock may call it. While a pod runs, a second file is kept that can
// take the next state without asking the file system for room, so that the end can be told although the guest has filled the
// host's disk.
func (b *Bundle) SetState(s State) error {
	s.Version = Version
	raw, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	raw = append(raw, '\n')
	path, spare := filepath.Join(b.RunDir(), stateFile), filepath.Join(b.RunDir(), spareFile)
	err = writeAtomicIn(path, raw, 0o600, stateRoom)
	switch {
	case errors.Is(err, unix.ENOSPC):
		switch werr := overwrite(spare, raw); {
		case werr == nil:
			err = unix.Renameat2(unix.AT_FDCWD, spare, unix.AT_FDCWD, path, unix.RENAME_EXCHANGE)
		case !errors.Is(werr, fs.ErrNotExist):
			err = werr
		}
	case err == nil && s.Phase == PhaseStarting:
		err = writeAtomicIn(spare, nil, 0o600, stateRoom)
	}
	if err == nil && s.Phase == PhaseEnded {
		_ = os.Remove(spare) // kept only if this fails, and then in nobody's way
	}
	if err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// stateRoom is what a state gets on disk, in bytes: that of the largest pod is smaller.
const stateRoom = 64 << 10

// overwrite replaces the contents of a file, within the room that it has. Newlines fill up what was longer: cutting it would
// give the room away.
func overwrite(path string, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err == nil {
		if rest := fi.Size() - int64(len(b)); rest > 0 {
			b = append(slices.Clip(b), bytes.Repeat([]byte{'\n'}, int(rest))...)
		}
		_, err = f.Write(b)
	}
	return errors.Join(err, f.Close())
}
