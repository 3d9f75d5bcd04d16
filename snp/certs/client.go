package certs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/verify"
)

// How a Client waits, see there.
const (
	firstWait   = time.Second
	longestWait = 30 * time.Second
	maxWait     = 2 * time.Minute
	maxAsked    = 10
)

// Client asks AMD's key distribution service, or a mirror of it. The service answers a few questions a minute and then says
// when to come back: a Client waits as long as Retry-After says, else a second, two, four, up to thirty, also when the
// service is out of order (status 5xx). It gives up after two minutes of waiting or ten questions, and at once where it is
// told to wait longer than that, where the network fails, and at any other status.
//
// What it returns is not checked beyond its size; a Cache does that.
type Client struct {
	HTTP    *http.Client     // required; its Timeout bounds each question
	Now     func() time.Time // required; for a Retry-After that is a date
	Service string           // scheme and host, no slash at the end; empty: kds.Service
	// Wait waits; nil: with a timer. It returns early with ctx's error.
	Wait func(ctx context.Context, d time.Duration) error
}

var _ verify.Source = (*Client)(nil)

// StatusError is an answer that is not what was asked for.
type StatusError struct {
	Object     kds.Object
	URL        string
	Code       int           // HTTP status
	RetryAfter time.Duration // what the service says, or how long the client would have waited; 0: another try is no use
}

// Error says what was asked for, and what to do.
func (e *StatusError) Error() string {
	if e.RetryAfter > 0 {
		return fmt.Sprintf("certs: %s: %s is busy or out of order (HTTP status %d): try again in %s", e.Object, e.URL, e.Code, e.RetryAfter.Round(time.Second))
	}
	return fmt.Sprintf("certs: %s: %s does not have it (HTTP status %d): check product line, chip and TCB version", e.Object, e.URL, e.Code)
}

// Is says that a service which is busy or out of order is verify.ErrUnreachable.
func (e *StatusError) Is(target error) bool {
	return target == verify.ErrUnreachable && e.RetryAfter > 0
}

// Fetch asks for an object and returns the body of the answer, at most o.MaxSize() bytes.
//
// An error is a *StatusError, a *RefusedError of what is too long, ctx's, or the network's, which wraps
// verify.ErrUnreachable.
func (c *Client) Fetch(ctx context.Context, o kds.Object) ([]byte, error) {
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("certs: %w", err)
	}
	if c.HTTP == nil || c.Now == nil {
		return nil, errors.New("certs: Client.HTTP and Client.Now are required")
	}
	waited, wait := time.Duration(0), firstWait
	for asked := 1; ; asked++ {
		body, err := c.ask(ctx, o)
		var status *StatusError
		if !errors.As(err, &status) || !busy(status.Code) {
			return body, err
		}
		if status.RetryAfter == 0 {
			status.RetryAfter = wait
			wait = min(2*wait, longestWait)
		}
		if waited += status.RetryAfter; waited > maxWait || asked == maxAsked {
			return nil, status
		}
		if err := c.wait(ctx, status.RetryAfter); err != nil {
			return nil, errors.Join(err, status)
		}
	}
}

// busy reports whether another try may be of use.
func busy(code int) bool { return code == http.StatusTooManyRequests || code >= 500 }

func (c *Client) wait(ctx context.Context, d time.Duration) error {
	if c.Wait != nil {
		return c.Wait(ctx, d)
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ask asks once.
func (c *Client) ask(ctx context.Context, o kds.Object) ([]byte, error) {
	url := o.URL()
	if c.Service != "" {
		url = c.Service + o.Path()
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, fmt.Errorf("certs: %w", err)
	}
	resp, err := c.HTTP.Do(req)
	if err != nil {
		return nil, fmt.Errorf("certs: %s: %w: %w", o, verify.ErrUnreachable, err) // it names the address
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		e := &StatusError{Object: o, URL: url, Code: resp.StatusCode}
		if busy(e.Code) {
			e.RetryAfter = retryAfter(resp.Header.Get("Retry-After"), c.Now())
		}
		return nil, e
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, int64(o.MaxSize())+1))
	if err != nil {
		return nil, fmt.Errorf("certs: %s: read %s: %w: %w", o, url, verify.ErrUnreachable, err)
	}
	if len(b) > o.MaxSize() {
		return nil, &RefusedError{o, fmt.Errorf("%s sends more than %d bytes", url, o.MaxSize())}
	}
	return b, nil
}

// retryAfter reads a Retry-After header (RFC 9110, section 10.2.3): seconds or a date. What cannot be read or lies in the
// past is 0; what is shorter than a first wait is that.
func retryAfter(s string, now time.Time) time.Duration {
	const most = 1 << 30 // seconds; far beyond what is waited for
	if n, err := strconv.ParseUint(s, 10, 64); err == nil {
		return max(time.Duration(min(n, most))*time.Second, firstWait)
	}
	t, err := http.ParseTime(s)
	if err != nil || !t.After(now) {
		return 0
	}
	return max(min(t.Sub(now), most*time.Second), firstWait)
}
