package image

import (
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

const (
	maxAttempts = 5 // in a row without a byte
	firstWait   = 250 * time.Millisecond
	maxWait     = 10 * time.Second
	// stallTimeout ends a connection over which nothing comes.
	stallTimeout = 60 * time.Second

	zstdWindow = 128 << 20 // the largest that zstd's own tool makes
)

// download reads a layer as stored: what an earlier pull left in the part file first, then the source, which is asked
// again from where it stopped when it fails. Digest and size are checked over all of it.
type download struct {
	ctx    context.Context
	size   int64
	want   digest.Digest // empty: not known
	part   string        // file that keeps the bytes; empty: none
	remote bool
	open   func(ctx context.Context, offset int64) (io.ReadCloser, error)
	tell   func(Event)

	started bool
	resumed bool // a part file was read
	off     int64
	file    *os.File // the part file
	left    int64    // bytes of it still to be read
	body    io.ReadCloser
	stall   *time.Timer
	cancel  context.CancelFunc
	hash    hash.Hash
	tries   int
	told    int64
	err     error // sticky
}

// start opens the part file.
func (d *download) start() error {
	d.started = true
	d.hash = digest.SHA256.Hash()
	if d.part == "" {
		return nil
	}
	f, err := os.OpenFile(d.part, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	d.file = f
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	if fi.Size() > d.size {
		return f.Truncate(0)
	}
	d.left = fi.Size()
	d.resumed = d.left > 0
	return nil
}

// Read implements io.Reader.
func (d *download) Read(p []byte) (int, error) {
	if !d.started {
		d.err = d.start()
	}
	if d.err != nil {
		return 0, d.err
	}
	n, err := d.read(p)
	if d.want != "" {
		d.hash.Write(p[:n])
	}
	d.off += int64(n)
	if d.off-d.told >= 256<<10 || d.off == d.size && d.told != d.off {
		d.told = d.off
		d.tell(Event{State: Pulling, Current: d.off})
	}
	d.err = err
	return n, err
}

func (d *download) read(p []byte) (int, error) {
	if d.left > 0 {
		n, err := d.file.Read(p[:min(int64(len(p)), d.left)])
		d.left -= int64(n)
		return n, noEOF(err)
	}
	if int64(len(p)) > d.size-d.off {
		p = p[:d.size-d.off]
	}
	if len(p) == 0 {
		return 0, io.EOF
	}
	for {
		n, err := d.source(p)
		if n > 0 {
			d.tries = 0
			if d.file != nil {
				if _, err := d.file.Write(p[:n]); err != nil {
					return 0, err
				}
			}
			return n, nil
		}
		if err == nil {
			continue
		}
		d.closeBody()
		if d.ctx.Err() != nil {
			return 0, context.Cause(d.ctx)
		}
		if err == io.EOF || errors.Is(err, io.ErrUnexpectedEOF) {
			err = fmt.Errorf("%w: it ends after %d of %d bytes", io.ErrUnexpectedEOF, d.off, d.size)
		}
		if d.tries++; !d.remote || d.tries >= maxAttempts || !transient(err) {
			return 0, err
		}
		wait := backoff(d.tries)
		d.tell(Event{State: Retrying, Current: d.off, Message: err.Error(), Wait: wait})
		select {
		case <-d.ctx.Done():
			return 0, context.Cause(d.ctx)
		case <-time.After(wait):
		}
	}
}

// source reads from the source, opening it where the bytes so far end.
func (d *download) source(p []byte) (int, error) {
	if d.body == nil {
		ctx, cancel := context.WithCancel(d.ctx)
		d.cancel = cancel
		body, err := d.open(ctx, d.off)
		if err != nil {
			cancel()
			return 0, err
		}
		d.body = body
		if d.remote {
			d.stall = time.AfterFunc(stallTimeout, cancel)
		}
	}
	n, err := d.body.Read(p)
	if d.stall != nil && n > 0 {
		d.stall.Reset(stallTimeout)
	}
	if errors.Is(err, context.Canceled) && d.ctx.Err() == nil {
		err = fmt.Errorf("nothing came for %v: %w", stallTimeout, os.ErrDeadlineExceeded)
	}
	return n, err
}

func (d *download) closeBody() {
	if d.stall != nil {
		d.stall.Stop()
		d.stall = nil
	}
	if d.body != nil {
		d.body.Close()
		d.body = nil
	}
	if d.cancel != nil {
		d.cancel()
	}
}

// verify reads what the decompressor left and checks digest and size.
func (d *download) verify() error {
	if _, err := io.Copy(io.Discard, d); err != nil {
		return err
	}
	if d.want == "" {
		return nil
	}
	if got := digest.NewDigest(digest.SHA256, d.hash); got != d.want {
		return fmt.Errorf("%w: the %d bytes that came have %s", ErrCorrupt, d.off, got)
	}
	return nil
}

// prefer names the cause of a conversion's error: bytes that are not those promised explain every other complaint,
// and the source's own failure explains a stream that is cut short.
func (d *download) prefer(err error) error {
	if d.err != nil && d.err != io.EOF {
		return d.err
	}
	// A limit is not a question of what else comes.
	if d.ctx.Err() != nil || isLimit(err) || isSystem(err) {
		return err
	}
	if v := d.verify(); v != nil {
		return v
	}
	return err
}

// finish closes everything. The part file stays for the next pull unless its bytes were wrong, or it fills the disk.
func (d *download) finish(err error) error {
	d.closeBody()
	if d.file == nil {
		return nil
	}
	cerr := d.file.Close()
	d.file = nil
	if err != nil && (errors.Is(err, ErrCorrupt) || isLimit(err) || errors.Is(err, syscall.ENOSPC)) {
		cerr = errors.Join(cerr, os.Remove(d.part))
	}
	return cerr
}

func backoff(try int) time.Duration { return min(firstWait<<(try-1), maxWait) }

// transient says whether an error of a registry may be gone the next time.
func transient(err error) bool {
	var te *transport.Error
	if errors.As(err, &te) {
		switch te.StatusCode {
		case 408, 425, 429, 500, 502, 503, 504:
			return true
		}
		return false
	}
	var dns *net.DNSError
	if errors.As(err, &dns) {
		return dns.IsTemporary || dns.IsTimeout
	}
	var ne net.Error
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EPIPE) || errors.Is(err, os.ErrDeadlineExceeded) ||
		errors.As(err, &ne) && ne.Timeout()
}

// decompress tells by the first bytes how a layer is compressed, as docker and containerd do: media types are wrong
// too often.
func decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 256<<10)
	head, err := b.Peek(6)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, err
		}
		return z, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(zstdWindow))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(head, []byte("BZh")):
		return io.NopCloser(bzip2.NewReader(b)), nil
	case bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X', 'Z', 0}):
		return nil, fmt.Errorf("%w: it is compressed with xz; unpack it first, with unxz", ErrUnsupported)
	}
	return io.NopCloser(b), nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
