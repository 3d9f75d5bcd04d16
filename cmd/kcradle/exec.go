package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/dockerapi/client"
)

type execOptions struct {
	Interactive, TTY, Detach, Privileged bool
	Env                                  []string
	EnvFiles                             []string
	User, WorkDir, DetachKeys            string
	Cmd                                  []string
}

func newExec(a *app) *cobra.Command {
	var o execOptions
	cmd := &cobra.Command{
		Use:   "exec [flags] DIR[:CONTAINER] CMD [ARG…]",
		Short: "Run a command in a running container",
		Long: `exec runs a command beside the container's own process, as docker exec does, and ends with its exit code; 125 is our
own failure, 126 and 127 say that the command could not be executed or found.`,
		Example: `  kcradle exec /tmp/vm ps
  kcradle exec -it /tmp/vm sh
  kcradle exec -u nobody -e A=b -w /srv /tmp/shop:web env`,
		Args:              cobra.MinimumNArgs(2),
		ValidArgsFunction: completeContainers(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.Cmd = args[1:]
			code, err := execIn(cmd.Context(), a, args[0], o)
			if err != nil || code != 0 {
				return &exitError{code, err}
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.SetInterspersed(false) // what follows DIR is the command's
	f.BoolVarP(&o.Interactive, "interactive", "i", false, "pass standard input to the command")
	f.BoolVarP(&o.TTY, "tty", "t", false, "give the command a terminal")
	f.BoolVarP(&o.Detach, "detach", "d", false, "do not wait for the command")
	f.BoolVar(&o.Privileged, "privileged", false, "all capabilities")
	f.StringArrayVarP(&o.Env, "env", "e", nil, "set an environment variable")
	f.StringArrayVar(&o.EnvFiles, "env-file", nil, "read environment variables from a file")
	f.StringVarP(&o.User, "user", "u", "", "user: `NAME|UID[:GROUP|GID]`")
	f.StringVarP(&o.WorkDir, "workdir", "w", "", "working directory")
	f.StringVar(&o.DetachKeys, "detach-keys", "ctrl-p,ctrl-q", "keys that detach from the terminal")
	return cmd
}

// execConfig is the body of docker's exec create.
type execConfig struct {
	AttachStdin, AttachStdout, AttachStderr, Tty, Privileged bool
	Cmd, Env                                                 []string
	User, WorkingDir, DetachKeys                             string
	ConsoleSize                                              *[2]uint `json:",omitempty"`
}

func execIn(ctx context.Context, a *app, arg string, o execOptions) (int, error) {
	if o.TTY && o.Interactive && !o.Detach && !isTerminal(a.Stdin) {
		return exitOwnFailure, errors.New("the input device is not a TTY")
	}
	t, err := openTarget(arg)
	if err != nil {
		return exitOwnFailure, err
	}
	env, err := (&containerOptions{Env: o.Env, EnvFiles: o.EnvFiles}).environment(nil)
	if err != nil {
		return exitOwnFailure, err
	}
	c := t.api()
	config := execConfig{
		AttachStdin: o.Interactive && !o.Detach, AttachStdout: !o.Detach, AttachStderr: !o.Detach, Tty: o.TTY, Privileged: o.Privileged,
		Cmd: o.Cmd, Env: env, User: o.User, WorkingDir: o.WorkDir, DetachKeys: o.DetachKeys, ConsoleSize: consoleSize(a),
	}
	var created struct{ ID string }
	if err := c.Do(ctx, "POST", t.path("/exec"), nil, config, &created); err != nil {
		return exitOwnFailure, err
	}
	start := map[string]any{"Detach": o.Detach, "Tty": o.TTY}
	if config.ConsoleSize != nil {
		start["ConsoleSize"] = config.ConsoleSize
	}
	path := "/exec/" + created.ID
	if o.Detach {
		if err := c.Do(ctx, "POST", path+"/start", nil, start, nil); err != nil {
			return startFailure(err), err
		}
		return 0, nil
	}
	conn, err := c.Hijack(ctx, path+"/start", nil, start)
	if err != nil {
		return startFailure(err), err
	}
	defer conn.Close()
	s := session{app: a, conn: conn, tty: o.TTY, stdin: o.Interactive, keys: o.DetachKeys,
		resize: func(width, height int) error { return resizeTo(ctx, c, path+"/resize", width, height) }}
	if err := s.run(ctx); err != nil {
		switch {
		case errors.Is(err, errDetached):
			return 0, nil
		case ctx.Err() != nil: // interrupted; the command lives on, as with docker
			return 130, nil
		}
		return exitOwnFailure, err
	}
	var state struct {
		Running  bool
		ExitCode *int
	}
	if err := c.Do(ctx, "GET", path+"/json", nil, nil, &state); err != nil {
		return exitOwnFailure, err
	}
	if state.Running || state.ExitCode == nil {
		return 0, nil // it closed its output and lives on
	}
	return *state.ExitCode, nil
}

// startFailure is docker's exit code for a command that could not be started.
func startFailure(err error) int {
	e, ok := errors.AsType[*dockerapi.Error](err)
	if !ok {
		return exitOwnFailure
	}
	switch {
	case strings.Contains(e.Error(), "not found") || strings.Contains(e.Error(), "no such file or directory"):
		return exitNotFound
	case e.Status == http.StatusBadRequest || strings.Contains(e.Error(), "permission denied") || strings.Contains(e.Error(), "exec format error"):
		return exitNotExec
	}
	return exitOwnFailure
}

func consoleSize(a *app) *[2]uint {
	f, ok := a.Stdout.(*os.File)
	if !ok {
		return nil
	}
	width, height, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return nil
	}
	return &[2]uint{uint(height), uint(width)}
}

func newAttach(a *app) *cobra.Command {
	var noStdin bool
	var keys string
	cmd := &cobra.Command{
		Use:   "attach [flags] DIR[:CONTAINER]",
		Short: "Connect to the input and output of a running container",
		Long: `attach shows a container's output from now on, passes standard input and signals, and ends with its exit code.
ctrl-p ctrl-q leaves a container that has a terminal.`,
		Example:           "  kcradle attach /tmp/shell",
		Args:              cobra.ExactArgs(1),
		ValidArgsFunction: completeContainers(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			code, err := attach(cmd.Context(), a, args[0], noStdin, keys)
			if err != nil || code != 0 {
				return &exitError{code, err}
			}
			return nil
		},
	}
	cmd.Flags().BoolVar(&noStdin, "no-stdin", false, "do not pass standard input")
	cmd.Flags().StringVar(&keys, "detach-keys", "ctrl-p,ctrl-q", "keys that detach from the container's terminal")
	return cmd
}

func attach(ctx context.Context, a *app, arg string, noStdin bool, keys string) (int, error) {
	t, err := openTarget(arg)
	if err != nil {
		return 1, err
	}
	c := t.api()
	var info struct {
		State  struct{ Running bool }
		Config struct{ Tty, OpenStdin bool }
	}
	if err := c.Do(ctx, "GET", t.path("/json"), nil, nil, &info); err != nil {
		return 1, err
	}
	if !info.State.Running {
		return 1, errors.New("you cannot attach to a stopped container, start it first")
	}
	stdin := info.Config.OpenStdin && !noStdin
	q := url.Values{"stream": {"1"}, "stdout": {"1"}, "stderr": {"1"}}
	if stdin {
		q.Set("stdin", "1")
	}
	conn, err := c.Hijack(ctx, t.path("/attach"), q, nil)
	if err != nil {
		return 1, err
	}
	defer conn.Close()
	type result struct {
		code int
		err  error
	}
	ended := make(chan result, 1)
	go func() {
		var answer struct{ StatusCode int }
		err := c.Do(ctx, "POST", t.path("/wait"), nil, nil, &answer)
		ended <- result{answer.StatusCode, err}
	}()
	s := session{app: a, conn: conn, tty: info.Config.Tty, stdin: stdin, keys: keys,
		resize: func(width, height int) error { return resizeTo(ctx, c, t.path("/resize"), width, height) },
		signal: func(sig unix.Signal) error {
			return c.Do(ctx, "POST", t.path("/kill"), url.Values{"signal": {fmt.Sprint(int(sig))}}, nil, nil)
		}}
	if err := s.run(ctx); err != nil {
		if errors.Is(err, errDetached) {
			return 0, nil
		}
		return 1, err
	}
	r := <-ended
	if r.err != nil { // the machine went with its container: the bundle knows
		if st, ok, err := t.bundle.State(); err == nil && ok {
			for _, cs := range st.Containers {
				if cs.Container == t.container.Name {
					return cs.ExitCode, nil
				}
			}
		}
		return 1, r.err
	}
	return r.code, nil
}

// session carries a terminal or streams to and from something in the pod.
type session struct {
	app        *app
	conn       *client.Hijacked
	tty, stdin bool
	keys       string // detach keys
	resize     func(width, height int) error
	signal     func(unix.Signal) error // nil: signals are not passed on
}

// run returns when the output has ended, or with errDetached.
func (s *session) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.conn.Close() })
	defer stop()
	in, isFile := s.app.Stdin.(*os.File)
	if s.tty && s.stdin && isFile && isTerminal(in) {
		restore, err := rawTerminal(in)
		if err != nil {
			return err
		}
		defer restore()
	}
	if s.tty || s.signal != nil {
		signals := make(chan os.Signal, 16)
		signal.Notify(signals, unix.SIGWINCH)
		if s.signal != nil && !s.tty {
			signal.Notify(signals, unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGQUIT, unix.SIGUSR1, unix.SIGUSR2)
		}
		defer signal.Stop(signals)
		done := make(chan struct{})
		defer close(done)
		signals <- unix.SIGWINCH
		go s.signals(signals, done)
	}
	input := make(chan error, 1)
	if s.stdin {
		go func() { input <- s.input() }() // reads a file that cannot be interrupted; it ends with the process
	}
	output := make(chan error, 1)
	go func() { output <- s.output() }()
	for {
		select {
		case err := <-output:
			return err
		case err := <-input:
			if errors.Is(err, errDetached) {
				return err
			}
			if err != nil {
				s.app.Log.Debug("standard input", "error", err)
			}
			input = nil
		}
	}
}

func (s *session) signals(in <-chan os.Signal, done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case sig := <-in:
			var err error
			if sig != unix.SIGWINCH {
				err = s.signal(sig.(unix.Signal))
			} else if f, ok := s.app.Stdout.(*os.File); ok && s.tty {
				if width, height, terr := term.GetSize(int(f.Fd())); terr == nil {
					err = s.resize(width, height)
				}
			}
			if err != nil {
				s.app.Log.Debug("signal", "signal", sig, "error", err)
			}
		}
	}
}

func (s *session) input() error {
	in := s.app.Stdin
	if s.tty {
		keys, err := detachKeys(s.keys)
		if err != nil {
			return err
		}
		in = &keyReader{r: in, keys: keys}
	}
	if _, err := io.Copy(s.conn, in); err != nil {
		return err
	}
	return s.conn.CloseWrite()
}

// output is raw with a terminal, and in docker's frames without one.
func (s *session) output() error {
	if s.tty {
		_, err := io.Copy(s.app.Stdout, s.conn)
		return err
	}
	buf := make([]byte, 32<<10)
	for {
		stream, payload, err := dockerapi.ReadFrame(s.conn, buf)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		w := s.app.Stdout
		if stream == 2 {
			w = s.app.Stderr
		}
		if _, err := w.Write(payload); err != nil {
			return err
		}
	}
}
