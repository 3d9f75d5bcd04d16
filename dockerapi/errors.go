package dockerapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/moby/moby/api/types/common"
)

// Error is an error with the HTTP status it is answered with.
type Error struct {
	Status int
	Err    error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an error with a status.
func Errorf(status int, format string, args ...any) error {
	return &Error{status, fmt.Errorf(format, args...)}
}

// BadRequest is status 400.
func BadRequest(format string, args ...any) error {
	return Errorf(http.StatusBadRequest, format, args...)
}

// NotFound is status 404.
func NotFound(format string, args ...any) error {
	return Errorf(http.StatusNotFound, format, args...)
}

// Conflict is status 409.
func Conflict(format string, args ...any) error {
	return Errorf(http.StatusConflict, format, args...)
}

// ErrNotModified is status 304: what was asked for is so already. It has no body.
var ErrNotModified error = &Error{http.StatusNotModified, errors.New("not modified")}

// Status returns the status an error is answered with: its own, or 500.
func Status(err error) int {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Status
	}
	if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
		return http.StatusRequestEntityTooLarge
	}
	if errors.Is(err, context.Canceled) {
		return 499 // the client has gone; nobody reads this
	}
	return http.StatusInternalServerError
}

func writeError(w http.ResponseWriter, err error) {
	status := Status(err)
	if status == http.StatusNotModified {
		w.WriteHeader(status)
		return
	}
	_ = WriteJSON(w, status, common.ErrorResponse{Message: err.Error()})
}

// WriteJSON answers with a value, as docker writes it: no HTML escapes, a newline at the end.
func WriteJSON(w http.ResponseWriter, status int, v any) error {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, err := w.Write(b.Bytes())
	return err
}

// ReadJSON reads a request's body, to its end, into v. An empty body is an error unless optional; then v stays as it is.
func ReadJSON(r *Request, v any, optional bool) error {
	body := http.MaxBytesReader(nil, r.Body, MaxBody)
	b, err := io.ReadAll(body)
	if err != nil {
		if _, ok := errors.AsType[*http.MaxBytesError](err); ok {
			return err
		}
		return BadRequest("read request body: %w", err)
	}
	b = bytes.TrimSpace(b)
	if len(b) == 0 {
		if optional {
			return nil
		}
		return BadRequest("invalid JSON: got EOF while reading request body")
	}
	if ct := r.Header.Get("Content-Type"); ct != "" {
		media, _, _ := strings.Cut(ct, ";")
		if strings.TrimSpace(strings.ToLower(media)) != "application/json" {
			return BadRequest("unsupported Content-Type header (%s): must be 'application/json'", ct)
		}
	}
	d := json.NewDecoder(bytes.NewReader(b))
	if err := d.Decode(v); err != nil {
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return BadRequest("invalid JSON: got EOF while reading request body")
		}
		return BadRequest("invalid JSON: %w", err)
	}
	if d.More() || d.InputOffset() != int64(len(b)) {
		return BadRequest("unexpected content after JSON")
	}
	return nil
}

// JSONStream is an answer of values one after another, each flushed at once. Until it has begun, the answer can still be an error.
type JSONStream struct {
	w     http.ResponseWriter
	ctl   *http.ResponseController
	enc   *json.Encoder
	begun bool
}

// NewJSONStream makes one, which begins with its first value or by Begin.
func NewJSONStream(w http.ResponseWriter) *JSONStream {
	s := &JSONStream{w: w, ctl: http.NewResponseController(w), enc: json.NewEncoder(w)}
	s.enc.SetEscapeHTML(false)
	return s
}

// Begin sends the header.
func (s *JSONStream) Begin() error {
	s.begin()
	return s.ctl.Flush()
}

func (s *JSONStream) begin() {
	if !s.begun {
		s.begun = true
		s.w.Header().Set("Content-Type", "application/json")
		s.w.WriteHeader(http.StatusOK)
	}
}

// Begun says whether the header was sent.
func (s *JSONStream) Begun() bool { return s.begun }

// Write sends one value.
func (s *JSONStream) Write(v any) error {
	s.begin()
	if err := s.enc.Encode(v); err != nil {
		return err
	}
	return s.ctl.Flush()
}
