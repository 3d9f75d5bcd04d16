package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strings"
	"sync"

	"github.com/moby/moby/api/types/container"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/dockerapi/client"
	"github.com/kcradle/kcradle/spec"
)

// stats are the machine's own. Of a container that does not run there are none: an answer of zeros, where only one is wanted.
func (d *Daemon) stats(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	if f := c.look(); !f.running() && !r.BoolOr("stream", true) {
		return dockerapi.WriteJSON(w, http.StatusOK, container.StatsResponse{Name: "/" + f.rec.Name, ID: c.id})
	}
	return d.inside(w, r, c)
}

// inside hands a request to the container's vdocker. The container must run.
func (d *Daemon) inside(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	if f := c.look(); !f.running() {
		return notRunning(c, f)
	}
	return c.pass(w, r, c.inPath(r))
}

func notRunning(c *Container, f facts) error {
	return dockerapi.Conflict("container %s is not running", c.id)
}

// inPath is the request's path as vdocker knows it: the container by its ID.
func (c *Container) inPath(r *dockerapi.Request) string {
	_, rest, _ := strings.Cut(r.URL.Path, "/containers/"+r.Var("id"))
	return c.path(rest)
}

// pass takes the client's connection and joins it with one to vdocker: the request goes on under another path, and from there
// on bytes go both ways, each direction with an end of its own.
func (c *Container) pass(w http.ResponseWriter, r *dockerapi.Request, path string) error {
	guest, err := c.b.DialVdocker(r.Context())
	if err != nil {
		return dockerapi.Conflict("container %s is not running: %w", c.id, err)
	}
	defer guest.Close()
	client, err := dockerapi.Take(w)
	if err != nil {
		return err
	}
	defer client.Close()
	if _, err := guest.Write(head(r, path)); err != nil {
		return answerLost(client, err)
	}
	join(c.d.ctx, client, guest)
	return nil
}

// head is the beginning of the request as it goes on.
func head(r *dockerapi.Request, path string) []byte {
	u := url.URL{Path: "/v" + r.Version.String() + path, RawQuery: r.URL.RawQuery}
	h := r.Header.Clone()
	if h.Get("Upgrade") == "" {
		h.Set("Connection", "close")
	}
	if r.ContentLength >= 0 && (r.ContentLength > 0 || r.Method != http.MethodGet && r.Method != http.MethodHead) {
		h.Set("Content-Length", fmt.Sprint(r.ContentLength))
	}
	if len(r.TransferEncoding) > 0 {
		h.Del("Content-Length")
		h.Set("Transfer-Encoding", strings.Join(r.TransferEncoding, ", "))
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: vdocker\r\n", r.Method, u.RequestURI())
	_ = h.Write(&b) // a builder takes all
	b.WriteString("\r\n")
	return []byte(b.String())
}

// answerLost tells a client whose connection was taken that nothing comes of it.
func answerLost(client io.Writer, err error) error {
	body, _ := json.Marshal(map[string]string{"message": "the machine does not answer: " + err.Error()}) // plain text
	_, _ = fmt.Fprintf(client, "HTTP/1.1 502 Bad Gateway\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(body), body)
	return err
}

// join copies between a client and a guest until the guest has said everything, or either has gone.
func join(ctx context.Context, client *dockerapi.Stream, guest io.ReadWriteCloser) {
	stop := context.AfterFunc(ctx, func() { client.Close(); guest.Close() })
	defer stop()
	answering, answered := context.WithCancel(ctx)
	defer answered()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, err := io.Copy(guest, client)
		if w, ok := guest.(dockerapi.CloseWriter); !ok || err != nil || w.CloseWrite() != nil {
			guest.Close()
		}
		// A client that only listens now may go in silence.
		client.AwaitGone(answering)
		guest.Close()
	}()
	_, err := io.Copy(client, guest)
	answered()
	if err != nil {
		client.Close()
	}
	client.Finish(done)
	<-done
}

// attach joins a client with a container that runs, or that is to be started: its machine is then started with the container
// held back, so that nothing of the output is lost.
func (d *Daemon) attach(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	f := c.look()
	if f.running() || r.Method != http.MethodPost { // a websocket
		return c.pass(w, r, c.inPath(r))
	}
	if _, err := io.Copy(io.Discard, http.MaxBytesReader(w, r.Body, dockerapi.MaxBody)); err != nil {
		return dockerapi.BadRequest("read request body: %w", err)
	}
	if _, err := dockerapi.DetachKeys(r.Query("detachKeys")); err != nil {
		return err
	}
	// The client starts the container as soon as it is answered, and that is to come second.
	c.life.Lock()
	stream, err := dockerapi.Hijack(w, r, !f.rec.Config.Tty)
	if err != nil {
		c.life.Unlock()
		return err
	}
	defer stream.Close()
	var guest *client.Hijacked
	leave, err := c.visitLocked(r.Context())
	if err == nil {
		defer leave()
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), d.bounds.patience)
		guest, err = c.api().Hijack(ctx, c.path("/attach"), r.URL.Query(), nil)
		cancel()
	}
	c.life.Unlock()
	if err != nil { // the start will say so, too, and there the client listens
		stream.Finish(nil)
		return err
	}
	defer guest.Close()
	join(d.ctx, stream, guest)
	return nil
}

// visit starts the machine of a container that does not run, for a call that needs it until leave is called.
func (c *Container) visit(ctx context.Context) (leave func(), err error) {
	c.life.Lock()
	defer c.life.Unlock()
	return c.visitLocked(ctx)
}

func (c *Container) visitLocked(ctx context.Context) (leave func(), err error) {
	if err := c.free(ctx); err != nil {
		return nil, err
	}
	m, err := c.boot(context.WithoutCancel(ctx))
	if err != nil {
		return nil, err
	}
	c.change(func() { c.visitors++ })
	return func() {
		c.change(func() { c.visitors-- })
		c.d.workers.Go(func() { c.abandon(m) })
	}, nil
}

// abandon ends a machine that nobody needs: whoever visited has left, and has not started the container.
func (c *Container) abandon(m *machine) {
	c.life.Lock()
	defer c.life.Unlock()
	c.mu.Lock()
	needed := c.machine != m || m.ran || c.visitors > 0
	c.mu.Unlock()
	if needed {
		return
	}
	if err := c.halt(c.d.ctx, nil); err != nil && c.d.ctx.Err() == nil {
		c.d.log.Warn("a machine that nobody needs goes on", "container", c.id, "error", err)
	}
}

// files are calls that need the container's file system. While it does not run, its machine is started for them, without the
// container: the host does not mount what a guest has written.
func (d *Daemon) files(w http.ResponseWriter, r *dockerapi.Request, c *Container) error {
	if f := c.look(); !f.running() {
		leave, err := c.visit(r.Context())
		if err != nil {
			return err
		}
		defer leave()
	}
	return c.pass(w, r, c.inPath(r))
}

// execCreate makes an exec and remembers whose it is.
func (d *Daemon) execCreate(w http.ResponseWriter, r *dockerapi.Request) error {
	var config json.RawMessage
	if err := dockerapi.ReadJSON(r, &config, false); err != nil { // what is wrong with the request is said first
		return err
	}
	c, err := d.find(r.Var("id"))
	if err != nil {
		return err
	}
	f := c.look()
	switch {
	case f.state.Status == spec.StatusPaused:
		return dockerapi.Conflict("Container %s is paused, unpause the container before exec", r.Var("id"))
	case f.state.Status == spec.StatusRestarting:
		return dockerapi.Conflict("Container %s is restarting, wait until the container is running", c.id)
	case !f.running():
		return notRunning(c, f)
	}
	var created container.ExecCreateResponse
	if err := c.ask(r.Context(), c.d.bounds.patience, "POST", "/v"+r.Version.String()+c.path("/exec"), nil, config, &created); err != nil {
		return err
	}
	d.mu.Lock()
	d.execs[created.ID] = c
	d.mu.Unlock()
	return dockerapi.WriteJSON(w, http.StatusCreated, created)
}

// forgetExecs forgets those of a container's last machine.
func (d *Daemon) forgetExecs(c *Container) {
	d.mu.Lock()
	defer d.mu.Unlock()
	maps.DeleteFunc(d.execs, func(_ string, of *Container) bool { return of == c })
}

// exec hands a request about an exec to the machine that has it.
func (d *Daemon) exec(w http.ResponseWriter, r *dockerapi.Request) error {
	id := r.Var("id")
	c, err := d.execOwner(r.Context(), id)
	if err != nil {
		var q container.ExecStartRequest // what is wrong with the request is said first
		if r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/start") {
			if err := dockerapi.ReadJSON(r, &q, true); err != nil {
				return err
			}
		}
		return err
	}
	if f := c.look(); !f.running() && r.Method == http.MethodPost {
		return notRunning(c, f)
	} else if f.machine == nil {
		return dockerapi.NotFound("No such exec instance: %s", id)
	}
	_, rest, _ := strings.Cut(r.URL.Path, "/exec/"+id)
	return c.pass(w, r, "/exec/"+id+rest)
}

// execOwner finds the container of an exec. After a start of the daemon only the machines know.
func (d *Daemon) execOwner(ctx context.Context, id string) (*Container, error) {
	d.mu.Lock()
	c := d.execs[id]
	d.mu.Unlock()
	if c != nil {
		return c, nil
	}
	// All at once: some may not answer.
	asking, cancel := context.WithTimeout(ctx, d.bounds.told)
	defer cancel()
	owner := make(chan *Container, 1)
	var asked sync.WaitGroup
	for _, c := range d.all() {
		if !c.look().running() {
			continue
		}
		asked.Go(func() {
			if c.api().Do(asking, "GET", "/exec/"+url.PathEscape(id)+"/json", nil, nil, nil) == nil {
				select {
				case owner <- c:
					cancel()
				default: // IDs are random: another machine that has it lies, or this one does
				}
			}
		})
	}
	asked.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	select {
	case c := <-owner:
		d.mu.Lock()
		d.execs[id] = c
		d.mu.Unlock()
		return c, nil
	default:
	}
	return nil, dockerapi.NotFound("No such exec instance: %s", id)
}
