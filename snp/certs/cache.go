// Package certs keeps what AMD's key distribution service publishes: a directory of certificates and revocation lists that
// verifies reports without a network, and a client that fills it.
//
//	service := &certs.Client{HTTP: &http.Client{Timeout: 30 * time.Second}, Now: time.Now}
//	cache, err := certs.Open(certs.Config{Dir: dir, Roots: verify.AMD(), Now: time.Now, Upstream: service})
//	v, err := verify.New(verify.Config{Now: time.Now, Roots: verify.AMD(), Source: cache, Policy: policy})
//
// Where something comes from does not matter: nothing enters the directory that does not lead to a pinned root, and nothing
// is taken from it without looking again. So a machine that is to be verified may hand in certificates (Put), a directory
// may be copied from another host, and any mirror can stand in for AMD's service.
//
// # The directory
//
//	vcek/Genoa/cert_chain.pem                           ASK and ARK, PEM
//	vcek/Genoa/crl.der                                  revocation list of the ARK
//	vcek/Genoa/d2421d…/bl10-tee00-snp25-ucode84.der     certificate of a chip (its id, in hex) at a TCB version
//	vcek/Turin/81ad8c…/fmc00-bl01-tee00-snp02-ucode71.der
//	vlek/Genoa/cert_chain.pem                           the same for cloud providers' keys, whose certificates are not published
//	vlek/Genoa/crl.der
//
// A file is written whole, under a name that begins with a dot, and renamed. Any number of processes may use a directory:
// none sees half a file, and two that fetch the same thing at once both write it. Nothing is ever removed; a certificate
// takes 1.5 KB. The time of a file is when it was fetched; 1970 is when somebody handed it in.
package certs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/verify"
)

// crlAge is how old a revocation list may be before the upstream is asked for a newer one. AMD's are valid for longer.
const crlAge = 24 * time.Hour

// ErrMissing is returned (wrapped) for what is not in the directory when there is no upstream.
var ErrMissing = errors.New("not in the certificate cache, and nobody may be asked for it")

// RefusedError is about bytes that are not what they should be. They were not stored.
type RefusedError struct {
	Object kds.Object
	Err    error // what is wrong with them
}

// Error returns what was refused, and why.
func (e *RefusedError) Error() string {
	return fmt.Sprintf("certs: refused as %s: %v", e.Object, e.Err)
}

// Unwrap returns what is wrong.
func (e *RefusedError) Unwrap() error { return e.Err }

// Config is what a Cache is made of.
type Config struct {
	Dir      string           // required; made when something is stored
	Roots    verify.Roots     // required; what does not lead to them does not enter
	Now      func() time.Time // required
	Upstream verify.Source    // asked for what is missing or outdated; nil: nobody is
	Log      *slog.Logger     // what is wrong and does not keep Fetch from answering; nil: nowhere
}

// Cache is a directory of certificates and lists. It may be used by several goroutines and processes at once.
type Cache struct {
	config Config
}

var _ verify.Source = (*Cache)(nil)

// Open returns the cache in a directory, which need not exist.
func Open(c Config) (*Cache, error) {
	switch {
	case c.Dir == "":
		return nil, errors.New("certs: Config.Dir is required")
	case c.Roots == verify.Roots{}:
		return nil, errors.New("certs: Config.Roots is required (verify.AMD() returns AMD's)")
	case c.Now == nil:
		return nil, errors.New("certs: Config.Now is required")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	return &Cache{config: c}, nil
}

// Fetch returns an object from the directory, or else from the upstream, and then stores it. Certificates that are not
// valid now, and lists that are outdated or were fetched more than a day ago, are asked for again; if that brings nothing,
// what is there is better than nothing: dates are for the verifier to judge.
//
// An error is ErrMissing, a *RefusedError or the upstream's; or, without an upstream, says which file is not what its name
// says.
func (c *Cache) Fetch(ctx context.Context, o kds.Object) ([]byte, error) {
	above, err := c.above(ctx, o)
	if err != nil {
		return nil, err
	}
	have, err := c.load(o, above)
	if err == nil && (c.config.Upstream == nil || c.fresh(o, have)) {
		return have.body, nil
	}
	if c.config.Upstream == nil {
		return nil, err
	}
	if err != nil && !errors.Is(err, ErrMissing) {
		c.config.Log.Warn("a file of the certificate cache is not used", "error", err)
	}
	best, fetchErr := c.ask(ctx, o, above)
	switch {
	case fetchErr != nil && err == nil:
		c.config.Log.Warn("the certificate cache is not up to date", "object", o.String(), "error", fetchErr)
		return have.body, nil
	case fetchErr != nil:
		return nil, fetchErr
	}
	if err := c.store(o, best.body, c.config.Now()); err != nil { // it serves this once
		c.config.Log.Warn("the certificate cache cannot be written", "error", err)
	}
	return best.body, nil
}

// Refresh asks the upstream, whatever is in the directory, and stores the answer.
func (c *Cache) Refresh(ctx context.Context, o kds.Object) error {
	above, err := c.above(ctx, o)
	if err != nil {
		return err
	}
	best, err := c.ask(ctx, o, above)
	if err != nil {
		return err
	}
	return c.store(o, best.body, c.config.Now())
}

// Put stores an object that came from anywhere, unless what is there is the same or was issued later. The chain above it
// must be there, or the upstream must have it.
//
// It does not count as fetched: who hands in the list of yesterday cannot keep Fetch from asking for that of today.
func (c *Cache) Put(ctx context.Context, o kds.Object, body []byte) error {
	above, err := c.above(ctx, o)
	if err != nil {
		return err
	}
	got, err := c.check(o, above, body)
	if err != nil {
		return &RefusedError{Object: o, Err: err}
	}
	have, err := c.load(o, above)
	if err == nil && (have.issued.After(got.issued) || bytes.Equal(have.body, got.body)) {
		return nil
	}
	return c.store(o, got.body, never)
}

// above returns the chain without which nothing can be said of an object; nil for a chain.
func (c *Cache) above(ctx context.Context, o kds.Object) (*verify.Chain, error) {
	if err := o.Validate(); err != nil {
		return nil, fmt.Errorf("certs: %w", err)
	}
	if o.Kind == kds.KindChain {
		return nil, nil
	}
	b, err := c.Fetch(ctx, kds.Chain(o.Line, o.Signer))
	if err != nil {
		return nil, err
	}
	return c.config.Roots.ParseChain(o.Line, o.Signer, b)
}

// item is an object whose bytes were checked.
type item struct {
	body            []byte
	issued, expires time.Time // of the certificate, of both of a chain, of the list
	fetched         time.Time // zero unless it lies in the directory and came from the upstream
}

// never is the time of a file that the upstream was not asked for.
var never = time.Unix(0, 0)

// ask asks the upstream, and returns its answer, or what is there if that was issued later: a mirror that is behind brings
// back no old list.
func (c *Cache) ask(ctx context.Context, o kds.Object, above *verify.Chain) (item, error) {
	if c.config.Upstream == nil {
		return item{}, fmt.Errorf("certs: %s: %w", o, ErrMissing)
	}
	body, err := c.config.Upstream.Fetch(ctx, o)
	if err != nil {
		return item{}, err
	}
	got, err := c.check(o, above, body)
	if err != nil {
		return item{}, &RefusedError{Object: o, Err: err}
	}
	if have, err := c.load(o, above); err == nil && have.issued.After(got.issued) {
		return have, nil
	}
	return got, nil
}

// check wants body to be the object.
func (c *Cache) check(o kds.Object, above *verify.Chain, body []byte) (item, error) {
	if len(body) > o.MaxSize() {
		return item{}, fmt.Errorf("more than %d bytes", o.MaxSize())
	}
	switch o.Kind {
	case kds.KindChain:
		chain, err := c.config.Roots.ParseChain(o.Line, o.Signer, body)
		if err != nil {
			return item{}, err
		}
		it := item{body: body, issued: chain.ASK.NotBefore, expires: chain.ASK.NotAfter}
		if chain.ARK.NotBefore.After(it.issued) {
			it.issued = chain.ARK.NotBefore
		}
		if chain.ARK.NotAfter.Before(it.expires) {
			it.expires = chain.ARK.NotAfter
		}
		return it, nil
	case kds.KindCRL:
		list, err := above.ParseCRL(body)
		if err != nil {
			return item{}, err
		}
		return item{body: body, issued: list.ThisUpdate, expires: list.NextUpdate}, nil
	}
	vek, err := verify.ParseVEK(body)
	if err != nil {
		return item{}, err
	}
	if err := isOf(vek, o); err != nil {
		return item{}, err
	}
	if err := above.CheckVEK(vek); err != nil {
		return item{}, err
	}
	return item{body: body, issued: vek.Certificate.NotBefore, expires: vek.Certificate.NotAfter}, nil
}

// isOf wants a certificate to be the one that was asked for.
func isOf(v *verify.VEK, o kds.Object) error {
	switch {
	case v.Signer != o.Signer || v.Line != o.Line:
		return fmt.Errorf("it is of a %s of %s", v.Signer, v.Line)
	case !bytes.Equal(v.HWID, o.HWID()):
		return fmt.Errorf("it is of chip %x", v.HWID)
	case v.TCB != o.TCB:
		return fmt.Errorf("it is of TCB version %s", v.TCB)
	}
	return nil
}

// fresh reports whether an item need not be asked for again.
func (c *Cache) fresh(o kds.Object, it item) bool {
	now := c.config.Now()
	if now.Before(it.issued) || now.After(it.expires) {
		return false
	}
	age := now.Sub(it.fetched)
	return o.Kind != kds.KindCRL || age >= 0 && age < crlAge
}

// load reads and checks what is in the directory; what is not is ErrMissing.
func (c *Cache) load(o kds.Object, above *verify.Chain) (item, error) {
	name := filepath.Join(c.config.Dir, fileName(o))
	body, modified, err := read(name, o.MaxSize())
	if errors.Is(err, fs.ErrNotExist) {
		return item{}, fmt.Errorf("certs: %s: %w", o, ErrMissing)
	}
	if err != nil {
		return item{}, fmt.Errorf("certs: %w", err)
	}
	it, err := c.check(o, above, body)
	if err != nil {
		return item{}, fmt.Errorf("certs: %s is not what its name says (remove it): %w", name, err)
	}
	if modified.After(never) {
		it.fetched = modified
	}
	return it, nil
}

// read returns a regular file of at most limit bytes, and when it was modified.
func read(name string, limit int) ([]byte, time.Time, error) {
	info, err := os.Lstat(name) // opening a FIFO waits for somebody to write
	if err != nil {
		return nil, time.Time{}, err
	}
	if !info.Mode().IsRegular() {
		return nil, time.Time{}, fmt.Errorf("%s is not a regular file", name)
	}
	f, err := os.Open(name)
	if err != nil {
		return nil, time.Time{}, err
	}
	defer f.Close()
	if info, err = f.Stat(); err != nil { // of what is read, whatever was renamed since
		return nil, time.Time{}, err
	}
	b, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err != nil {
		return nil, time.Time{}, err
	}
	if len(b) > limit {
		return nil, time.Time{}, fmt.Errorf("%s has more than %d bytes", name, limit)
	}
	return b, info.ModTime(), nil
}

// store writes an object that was checked.
func (c *Cache) store(o kds.Object, body []byte, fetched time.Time) (err error) {
	name := filepath.Join(c.config.Dir, fileName(o))
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return fmt.Errorf("certs: %w", err)
	}
	f, err := os.CreateTemp(filepath.Dir(name), ".tmp-*")
	if err != nil {
		return fmt.Errorf("certs: %w", err)
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("certs: store %s: %w", o, errors.Join(err, os.Remove(f.Name())))
		}
	}()
	_, err = f.Write(body)
	err = errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()) // on the disk before it has its name
	if err != nil {
		return err
	}
	if err := os.Chtimes(f.Name(), fetched, fetched); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
