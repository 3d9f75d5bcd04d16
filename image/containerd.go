package image

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	defaultContainerd = "/run/containerd/containerd.sock"
	grpcNotFound      = 5
	maxGRPCMessage    = 16 << 20 // containerd sends content in pieces of less than 4 MiB
)

// containerd speaks the two calls of containerd's API that reading an image takes: Images.Get and Content.Read. They
// are gRPC, which is framed protocol buffers over HTTP/2. The generated client with all it brings would double the
// start of every short command; docs/images.md has the figures.
type containerd struct {
	addr      string
	namespace string
	client    *http.Client
}

func newContainerd(o PullOptions) *containerd {
	first := func(values ...string) string {
		for _, v := range values {
			if v != "" {
				return v
			}
		}
		return ""
	}
	c := &containerd{
		addr:      first(o.Containerd, os.Getenv("CONTAINERD_ADDRESS"), defaultContainerd),
		namespace: first(o.Namespace, os.Getenv("CONTAINERD_NAMESPACE"), "default"),
	}
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "unix", c.addr)
		},
		Protocols: new(http.Protocols),
	}
	t.Protocols.SetUnencryptedHTTP2(true)
	c.client = &http.Client{Transport: t}
	return c
}

// grpcError is a status other than OK.
type grpcError struct {
	code    int
	message string
}

func (e *grpcError) Error() string {
	return fmt.Sprintf("containerd: %s (gRPC status %d)", e.message, e.code)
}

// call sends one message; the messages of the answer are then read with next.
func (c *containerd) call(ctx context.Context, method string, message []byte) (*grpcStream, error) {
	frame := make([]byte, 5, 5+len(message))
	binary.BigEndian.PutUint32(frame[1:], uint32(len(message)))
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://containerd"+method, bytes.NewReader(append(frame, message...)))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/grpc")
	req.Header.Set("Te", "trailers")
	req.Header.Set("Containerd-Namespace", c.namespace)
	resp, err := c.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("speak to containerd at %s: %w", c.addr, err)
	}
	if resp.StatusCode != http.StatusOK {
		resp.Body.Close()
		return nil, fmt.Errorf("speak to containerd at %s: %s", c.addr, resp.Status)
	}
	return &grpcStream{resp}, nil
}

type grpcStream struct{ resp *http.Response }

// next returns the next message, or io.EOF after the last one.
func (s *grpcStream) next() ([]byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(s.resp.Body, head[:]); err == io.EOF {
		return nil, s.status()
	} else if err != nil {
		return nil, err
	}
	n := binary.BigEndian.Uint32(head[1:])
	if head[0] != 0 || n > maxGRPCMessage {
		return nil, fmt.Errorf("containerd: a message of %d bytes (flags %d), the limit is %d", n, head[0], maxGRPCMessage)
	}
	b := make([]byte, n)
	_, err := io.ReadFull(s.resp.Body, b)
	return b, noEOF(err)
}

// status is io.EOF if the call went well.
func (s *grpcStream) status() error {
	h := s.resp.Trailer
	if h.Get("Grpc-Status") == "" {
		h = s.resp.Header // an error without any message comes so
	}
	code, err := strconv.Atoi(h.Get("Grpc-Status"))
	if err != nil {
		return fmt.Errorf("containerd: the answer has no gRPC status: %w", io.ErrUnexpectedEOF)
	}
	if code != 0 {
		return &grpcError{code, h.Get("Grpc-Message")}
	}
	return io.EOF
}

func (s *grpcStream) Close() error { return s.resp.Body.Close() }

// protoField appends a string to a protocol buffers message.
func protoField(b []byte, field int, value string) []byte {
	b = binary.AppendUvarint(b, uint64(field)<<3|2)
	b = binary.AppendUvarint(b, uint64(len(value)))
	return append(b, value...)
}

// protoNumber appends a number to a protocol buffers message.
func protoNumber(b []byte, field int, value int64) []byte {
	return binary.AppendUvarint(binary.AppendUvarint(b, uint64(field)<<3), uint64(value))
}

var errProto = errors.New("malformed message")

// protoFields calls f for each field of a protocol buffers message: bytes for strings and messages, else a number.
func protoFields(b []byte, f func(field int, value []byte, number uint64)) error {
	for len(b) > 0 {
		tag, n := binary.Uvarint(b)
		if n <= 0 || tag>>3 == 0 || tag>>3 > 1<<29 {
			return errProto
		}
		b = b[n:]
		field := int(tag >> 3)
		switch tag & 7 {
		case 0:
			v, n := binary.Uvarint(b)
			if n <= 0 {
				return errProto
			}
			b = b[n:]
			f(field, nil, v)
		case 1, 5:
			size := 8
			if tag&7 == 5 {
				size = 4
			}
			if len(b) < size {
				return errProto
			}
			b = b[size:]
		case 2:
			size, n := binary.Uvarint(b)
			if n <= 0 || size > uint64(len(b)-n) {
				return errProto
			}
			f(field, b[n:n+int(size)], 0)
			b = b[n+int(size):]
		default:
			return errProto
		}
	}
	return nil
}

// image returns the descriptor an image's name stands for.
func (c *containerd) image(ctx context.Context, name string) (ocispec.Descriptor, error) {
	var d ocispec.Descriptor
	s, err := c.call(ctx, "/containerd.services.images.v1.Images/Get", protoField(nil, 1, name))
	if err != nil {
		return d, err
	}
	defer s.Close()
	b, err := s.next()
	var ge *grpcError
	if errors.As(err, &ge) && ge.code == grpcNotFound {
		return d, fmt.Errorf("%w in containerd's namespace %s: %s", ErrNotFound, c.namespace, ge.message)
	}
	if err != nil {
		return d, noEOF(err)
	}
	// GetImageResponse{Image image = 1}, Image{Descriptor target = 3}, Descriptor{media_type, digest, size = 1, 2, 3}.
	var inner error
	err = protoFields(b, func(field int, image []byte, _ uint64) {
		if field != 1 {
			return
		}
		inner = errors.Join(inner, protoFields(image, func(field int, target []byte, _ uint64) {
			if field != 3 {
				return
			}
			inner = errors.Join(inner, protoFields(target, func(field int, value []byte, number uint64) {
				switch field {
				case 1:
					d.MediaType = string(value)
				case 2:
					d.Digest = digest.Digest(value)
				case 3:
					d.Size = int64(number)
				}
			}))
		}))
	})
	if err := errors.Join(err, inner); err != nil {
		return d, fmt.Errorf("containerd: image %s: %w", name, err)
	}
	return d, checkDescriptor(d, maxDocument)
}

// content opens a blob of the content store from an offset on.
func (c *containerd) content(ctx context.Context, d digest.Digest, offset int64) (io.ReadCloser, error) {
	// ReadContentRequest{string digest = 1; int64 offset = 2}
	m := protoField(nil, 1, d.String())
	if offset > 0 {
		m = protoNumber(m, 2, offset)
	}
	s, err := c.call(ctx, "/containerd.services.content.v1.Content/Read", m)
	if err != nil {
		return nil, err
	}
	return &contentReader{stream: s, digest: d}, nil
}

type contentReader struct {
	stream *grpcStream
	digest digest.Digest
	buf    []byte
}

func (r *contentReader) Read(p []byte) (int, error) {
	for len(r.buf) == 0 {
		b, err := r.stream.next()
		var ge *grpcError
		if errors.As(err, &ge) && ge.code == grpcNotFound {
			return 0, fmt.Errorf("%w: containerd does not have the content of %s; pull the image there again, with all its content", ErrNotFound, r.digest)
		}
		if err != nil {
			return 0, err
		}
		// ReadContentResponse{int64 offset = 1; bytes data = 2}
		if err := protoFields(b, func(field int, value []byte, _ uint64) {
			if field == 2 {
				r.buf = value
			}
		}); err != nil {
			return 0, fmt.Errorf("containerd: content of %s: %w", r.digest, err)
		}
	}
	n := copy(p, r.buf)
	r.buf = r.buf[n:]
	return n, nil
}

func (r *contentReader) Close() error { return r.stream.Close() }

// pullContainerd takes an image out of a containerd.
func (s *Store) pullContainerd(ctx context.Context, ref Reference, o PullOptions) (*Image, error) {
	c := newContainerd(o)
	defer c.client.CloseIdleConnections()
	top, err := c.image(ctx, ref.Name())
	if err != nil {
		return nil, err
	}
	read := func(d ocispec.Descriptor) ([]byte, error) {
		r, err := c.content(ctx, d.Digest, 0)
		if err != nil {
			return nil, err
		}
		defer r.Close()
		b, err := io.ReadAll(io.LimitReader(r, maxDocument+1))
		if err == nil && len(b) > maxDocument {
			err = fmt.Errorf("%w: more than %d bytes", ErrUnsupported, maxDocument)
		}
		return b, err
	}
	b, err := read(top)
	if err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", top.Digest, err)
	}
	if err := checkBytes(top, b); err != nil {
		return nil, fmt.Errorf("read manifest %s: %w", top.Digest, err)
	}
	f, err := resolve(b, top.MediaType, read)
	if err != nil {
		return nil, err
	}
	f.names, f.source, f.transport = []string{ref.Key()}, ref.String(), Containerd
	f.open = func(ctx context.Context, n int, offset int64) (io.ReadCloser, error) {
		return c.content(ctx, f.layers[n].Digest, offset)
	}
	return s.fetch(ctx, f, o)
}
