package vdocker

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/term"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/guest/pod"
	"github.com/kcradle/kcradle/spec"
)

// writeFunc writes a piece of a stream to a client: as a frame, or raw when there is a terminal.
type writeFunc func(stream byte, b []byte) error

func writer(w io.Writer, multiplexed bool) writeFunc {
	if multiplexed {
		return dockerapi.NewFrameWriter(w).WriteFrame
	}
	return func(_ byte, b []byte) error {
		_, err := w.Write(b)
		return err
	}
}

// --- logs ---

func (s *server) logs(w http.ResponseWriter, k call) error {
	o := pod.LogOptions{Follow: k.Bool("follow"), Tail: -1, Stdout: k.Bool("stdout"), Stderr: k.Bool("stderr")}
	if !o.Stdout && !o.Stderr {
		return dockerapi.BadRequest("Bad parameters: you must choose at least one stream")
	}
	now := time.Now()
	var err error
	if o.Since, err = dockerapi.ParseTime(k.Query("since"), now); err != nil {
		return err
	}
	if o.Until, err = dockerapi.ParseTime(k.Query("until"), now); err != nil {
		return err
	}
	if n, err := strconv.Atoi(k.Query("tail")); err == nil && n >= 0 {
		o.Tail = n
	}
	lines, err := k.c.Logs(o)
	if err != nil {
		return err
	}
	defer lines.Close()
	multiplexed := !k.c.Spec().TTY
	w.Header().Set("Content-Type", dockerapi.StreamMedia(k.Version, multiplexed))
	w.WriteHeader(http.StatusOK)
	ctl := http.NewResponseController(w)
	if err := ctl.Flush(); err != nil {
		return err
	}
	p := prefixer{timestamps: k.Bool("timestamps"), details: k.Bool("details")}
	write := writer(w, multiplexed)
	for {
		chunk, err := lines.Next(k.Context())
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := write(chunk.Stream, p.add(chunk)); err != nil {
			return err
		}
		if o.Follow {
			if err := ctl.Flush(); err != nil {
				return err
			}
		}
	}
}

// timeLayout is RFC 3339 with all nine decimals, so that columns align.
const timeLayout = "2006-01-02T15:04:05.000000000Z07:00"

// prefixer puts time and details before each line. Lines may span chunks; each stream has its own.
type prefixer struct {
	timestamps, details bool
	inLine              [3]bool
	buf                 []byte
}

func (p *prefixer) add(c pod.Chunk) []byte {
	if !p.timestamps && !p.details {
		return c.Bytes
	}
	p.buf = p.buf[:0]
	for rest := c.Bytes; len(rest) > 0; {
		if !p.inLine[c.Stream] {
			if p.timestamps {
				p.buf = append(c.Time.UTC().AppendFormat(p.buf, timeLayout), ' ')
			}
			if p.details {
				p.buf = append(p.buf, ' ') // no log attributes, then docker's separator
			}
		}
		line := rest
		if i := bytes.IndexByte(rest, '\n'); i >= 0 {
			line = rest[:i+1]
		}
		p.inLine[c.Stream] = line[len(line)-1] != '\n'
		p.buf = append(p.buf, line...)
		rest = rest[len(line):]
	}
	return p.buf
}

// --- attach ---

func (s *server) attach(w http.ResponseWriter, k call) error {
	if _, err := io.Copy(io.Discard, http.MaxBytesReader(w, k.Body, dockerapi.MaxBody)); err != nil {
		return dockerapi.BadRequest("read request body: %w", err)
	}
	return s.attachTo(k, func(multiplexed bool) (*dockerapi.Stream, error) {
		return dockerapi.Hijack(w, k.Request, multiplexed)
	}, !k.c.Spec().TTY)
}

func (s *server) attachWebSocket(w http.ResponseWriter, k call) error {
	return s.attachTo(k, func(bool) (*dockerapi.Stream, error) {
		return dockerapi.WebSocket(context.WithoutCancel(k.Context()), w, k.Request)
	}, false)
}

// attachTo attaches a client, whose connection open takes over once nothing can be refused any more.
func (s *server) attachTo(k call, open func(multiplexed bool) (*dockerapi.Stream, error), multiplexed bool) error {
	keys, err := dockerapi.DetachKeys(k.Query("detachKeys"))
	if err != nil {
		return err
	}
	switch k.c.State().Status {
	case spec.StatusPaused:
		return dockerapi.Conflict("container %s is paused, unpause the container before attach", k.c.ID())
	case spec.StatusRestarting:
		return dockerapi.Conflict("container %s is restarting, wait until the container is running", k.c.ID())
	}
	o := pod.AttachOptions{
		Stdin: k.Bool("stdin"), Stdout: k.Bool("stdout"), Stderr: k.Bool("stderr"),
		Logs: k.Bool("logs"), Stream: k.Bool("stream"),
	}
	cs := k.c.Spec()
	o.Stdin = o.Stdin && o.Stream && cs.OpenStdin
	a, err := k.c.Attach(o)
	if err != nil {
		return err
	}
	defer a.Close()
	conn, err := open(multiplexed)
	if err != nil {
		return err
	}
	k.emit("attach", nil)

	ctx, cancel := context.WithCancel(k.detached())
	defer cancel()
	in := input{conn: conn, cancel: cancel, detached: func() { k.emit("detach", nil) }, endsWithInput: true}
	if a.Stdin != nil {
		in.to = a.Stdin
		in.endsWithInput = cs.TTY || !cs.StdinOnce
		if cs.TTY {
			in.keys = keys
		}
	}
	in.start(ctx)
	write := writer(conn, multiplexed)
	for {
		chunk, err := a.Next(ctx)
		if err != nil {
			break // the end of this run, or of the client
		}
		if write(chunk.Stream, chunk.Bytes) != nil {
			break
		}
	}
	cancel()
	a.Close() // so that input that nobody takes any more does not hold up the end
	conn.Finish(in.done)
	in.wait()
	return nil
}

// input copies what a client sends, if it is wanted, and watches for the client's end.
type input struct {
	conn          *dockerapi.Stream
	to            io.WriteCloser // nil: what comes is dropped
	keys          []byte         // detach keys; nil: none
	endsWithInput bool           // the client's half-close ends its attachment, when it gives input
	detached      func()         // called when the keys were typed
	cancel        func()         // ends the attachment

	done chan struct{} // closed when nothing reads conn any more
	all  sync.WaitGroup
}

func (in *input) start(ctx context.Context) {
	in.done = make(chan struct{})
	in.all.Go(func() { in.run(ctx) })
}

// wait returns when the goroutine has ended. ctx must be done and the connection closed.
func (in *input) wait() { in.all.Wait() }

func (in *input) run(ctx context.Context) {
	defer in.cancel()
	client := &notingReader{r: in.conn}
	err := in.copy(client)
	close(in.done)
	if _, ok := errors.AsType[term.EscapeError](err); ok {
		in.detached()
		return
	}
	if client.err != nil && client.err != io.EOF {
		return // the connection broke
	}
	if in.to != nil && in.endsWithInput && err == nil {
		return
	}
	// The client has closed its direction or the process takes no more input: output goes on while the client is there.
	in.conn.AwaitGone(ctx)
}

func (in *input) copy(from io.Reader) error {
	if in.to == nil {
		_, err := io.Copy(io.Discard, from)
		return err
	}
	if in.keys != nil {
		from = term.NewEscapeProxy(from, in.keys)
	}
	_, err := io.Copy(in.to, from)
	if _, ok := errors.AsType[term.EscapeError](err); !ok {
		_ = in.to.Close() // end of file for the process only
	}
	return err
}

// notingReader tells the error of a read from that of the write it is copied to.
type notingReader struct {
	r   io.Reader
	err error
}

func (n *notingReader) Read(p []byte) (int, error) {
	c, err := n.r.Read(p)
	if err != nil {
		n.err = err
	}
	return c, err
}

// --- exec ---

func (s *server) execCreate(w http.ResponseWriter, k call) error {
	var req container.ExecCreateRequest
	if err := dockerapi.ReadJSON(k.Request, &req, false); err != nil {
		return err
	}
	if len(req.Cmd) == 0 {
		return dockerapi.BadRequest("No exec command specified")
	}
	if req.DetachKeys != "" {
		if _, err := dockerapi.DetachKeys(req.DetachKeys); err != nil {
			return err
		}
	}
	if k.Version < 42 {
		req.ConsoleSize = nil
	}
	if !req.Tty {
		req.ConsoleSize = nil
	}
	switch k.c.State().Status {
	case spec.StatusRestarting:
		return restarting(k.c)
	case spec.StatusPaused:
		return dockerapi.Conflict("container %s is paused, unpause the container before exec", k.Var("id"))
	}
	e, err := k.c.Exec(pod.ExecConfig{
		Cmd: req.Cmd, Env: req.Env, User: req.User, WorkingDir: req.WorkingDir, TTY: req.Tty,
		Stdin: req.AttachStdin, Stdout: req.AttachStdout, Stderr: req.AttachStderr,
		Privileged: req.Privileged, DetachKeys: req.DetachKeys, ConsoleSize: req.ConsoleSize,
	})
	if err != nil {
		return err
	}
	k.emit("exec_create: "+execName(req.Cmd), map[string]string{"execID": e.ID()})
	return dockerapi.WriteJSON(w, http.StatusCreated, container.ExecCreateResponse{ID: e.ID()})
}

// execName is a command in the name of an event: the program, a space, its arguments.
func execName(cmd []string) string { return cmd[0] + " " + strings.Join(cmd[1:], " ") }

func (s *server) execStart(w http.ResponseWriter, k execCall) error {
	var req container.ExecStartRequest
	// The whole body is read before anything is upgraded: none of it may reach the process.
	if err := dockerapi.ReadJSON(k.Request, &req, true); err != nil {
		return err
	}
	if err := running(k.c); err != nil {
		return err
	}
	if k.c.State().Status == spec.StatusPaused {
		return pod.ErrPaused
	}
	cfg := k.e.Config()
	st := k.e.State()
	switch {
	case st.ExitCode != nil:
		return dockerapi.Conflict("Error: Exec command %s has already run", k.e.ID())
	case st.Running:
		return dockerapi.Conflict("Error: Exec command %s is already running", k.e.ID())
	}
	if req.ConsoleSize != nil && req.Tty && k.Version >= 42 {
		if err := k.e.Resize(req.ConsoleSize[0], req.ConsoleSize[1]); err != nil {
			return err
		}
	}
	name := execName(cfg.Cmd)
	id := map[string]string{"execID": k.e.ID()}
	if req.Detach {
		k.emit("exec_start: "+name, id)
		sess, err := k.e.Start(k.detached())
		if err != nil {
			return err
		}
		go k.runDetached(sess)
		w.WriteHeader(http.StatusOK)
		return nil
	}
	keys, err := dockerapi.DetachKeys(cfg.DetachKeys)
	if err != nil {
		return err
	}
	multiplexed := !req.Tty
	conn, err := dockerapi.Hijack(w, k.Request, multiplexed)
	if err != nil {
		return err
	}
	write := writer(conn, multiplexed)
	k.emit("exec_start: "+name, id)
	sess, err := k.e.Start(k.detached())
	if err != nil {
		_ = write(dockerapi.Stdout, []byte(failed(k.c, err).Error()+"\r\n"))
		conn.Finish(nil)
		return nil
	}
	k.runAttached(sess, conn, write, keys)
	return nil
}

// runDetached takes what nobody reads. It lives as long as the process.
func (k execCall) runDetached(sess *pod.ExecSession) {
	defer sess.Close()
	var out sync.WaitGroup
	for _, r := range []io.Reader{sess.Stdout, sess.Stderr} {
		if r != nil {
			out.Go(func() { _, _ = io.Copy(io.Discard, r) })
		}
	}
	if sess.Stdin != nil {
		_ = sess.Stdin.Close()
	}
	out.Wait()
	_, _ = sess.Wait(k.detached()) // ends with the process alone
}

// runAttached joins a client and a process. A client that has gone does not end the process: what it writes is dropped,
// as docker does.
func (k execCall) runAttached(sess *pod.ExecSession, conn *dockerapi.Stream, write writeFunc, keys []byte) {
	defer sess.Close()
	ctx, cancel := context.WithCancel(k.detached())
	defer cancel()
	detached := make(chan struct{})
	var once sync.Once
	in := input{
		conn: conn, to: sess.Stdin, cancel: cancel,
		detached: func() { k.emit("exec_detach", map[string]string{"execID": k.e.ID()}) },
	}
	in.cancel = func() { once.Do(func() { close(detached) }); cancel() }
	if sess.Stdin != nil && k.e.Config().TTY {
		in.keys = keys
	}
	in.start(ctx)
	var out sync.WaitGroup
	cfg := k.e.Config()
	pump := func(stream byte, r io.Reader, wanted bool) {
		if r == nil {
			return
		}
		out.Go(func() {
			buf := make([]byte, 32<<10)
			for {
				n, err := r.Read(buf)
				if n > 0 && wanted && write(stream, buf[:n]) != nil {
					wanted = false
				}
				if err != nil {
					return
				}
			}
		})
	}
	pump(dockerapi.Stdout, sess.Stdout, cfg.Stdout)
	pump(dockerapi.Stderr, sess.Stderr, cfg.Stderr)
	finished := make(chan struct{})
	go func() { // ends with the process, whether or not the client is still there
		defer close(finished)
		out.Wait()
		_, _ = sess.Wait(k.detached())
	}()
	select {
	case <-finished:
	case <-detached:
		_ = conn.Close()
		<-finished
	}
	cancel()
	if sess.Stdin != nil {
		_ = sess.Stdin.Close()
	}
	conn.Finish(in.done)
	in.wait()
}

func (s *server) execResize(w http.ResponseWriter, k execCall) error {
	h, wd, err := size(k.Request)
	if err != nil {
		return err
	}
	if err := k.e.Resize(h, wd); err != nil {
		return err
	}
	w.WriteHeader(http.StatusOK)
	return nil
}

func (s *server) execInspect(w http.ResponseWriter, k execCall) error {
	cfg, st := k.e.Config(), k.e.State()
	keys := []byte{}
	if cfg.DetachKeys != "" {
		if b, err := dockerapi.DetachKeys(cfg.DetachKeys); err == nil {
			keys = b
		}
	}
	return dockerapi.WriteJSON(w, http.StatusOK, container.ExecInspectResponse{
		ID: k.e.ID(), Running: st.Running, ExitCode: st.ExitCode, Pid: st.Pid, ContainerID: k.c.ID(),
		ProcessConfig: &container.ExecProcessConfig{
			Tty: cfg.TTY, Entrypoint: cfg.Cmd[0], Arguments: append([]string{}, cfg.Cmd[1:]...),
			Privileged: &cfg.Privileged, User: cfg.User,
		},
		OpenStdin: cfg.Stdin, OpenStdout: cfg.Stdout, OpenStderr: cfg.Stderr, DetachKeys: keys,
	})
}
