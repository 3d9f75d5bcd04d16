package bundle

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"
	"unicode/utf8"
)

// Bounds of a log. A container's log takes at most twice logMaxBytes: the file and its predecessor.
const (
	logMaxBytes  = 16 << 20
	logOldSuffix = ".1"
	maxLogLine   = 1 << 20 // of an encoded record, when reading
	maxLogRecord = 16 << 10
)

// Record is one piece of output: at most one line, with its newline when it is complete.
type Record struct {
	Log    string    `json:"log"`
	Stream string    `json:"stream"` // "stdout" or "stderr"
	Time   time.Time `json:"time"`
}

// Log writes a container's output in docker's json-file format. A piece of output is on disk when Write returns; a
// line that came in pieces is several records, as docker writes long lines. Bytes that are not UTF-8 become U+FFFD, as
// docker's do. It is for one goroutine.
type Log struct {
	path string
	f    *os.File
	size int64
	max  int64
	buf  []byte
}

// OpenLog opens a log for appending. The caller must Close it.
func OpenLog(path string) (*Log, error) {
	l := &Log{path: path, max: logMaxBytes}
	if err := l.open(); err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return l, nil
}

func (l *Log) open() error {
	f, err := os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return err
	}
	l.f, l.size = f, fi.Size()
	// A record that a crash has torn must not take the next one with it.
	var last [1]byte
	if _, err := f.ReadAt(last[:], l.size-1); l.size > 0 && err == nil && last[0] != '\n' {
		n, err := f.Write([]byte("\n"))
		l.size += int64(n)
		if err != nil {
			f.Close()
			return err
		}
	}
	return nil
}

// Write appends output of stream 1 or 2.
func (l *Log) Write(stream byte, t time.Time, b []byte) error {
	l.buf = l.buf[:0]
	var stamp [40]byte
	when := t.UTC().AppendFormat(stamp[:0], time.RFC3339Nano)
	for len(b) > 0 {
		n := min(len(b), maxLogRecord)
		for i, c := range b[:n] {
			if c == '\n' {
				n = i + 1
				break
			}
		}
		if n == maxLogRecord && n < len(b) { // do not cut a character
			for i := 0; i < utf8.UTFMax-1 && !utf8.RuneStart(b[n]); i++ {
				n--
			}
		}
		l.buf = append(l.buf, `{"log":"`...)
		l.buf = appendEscaped(l.buf, b[:n])
		if stream == 2 {
			l.buf = append(l.buf, `","stream":"stderr","time":"`...)
		} else {
			l.buf = append(l.buf, `","stream":"stdout","time":"`...)
		}
		l.buf = append(l.buf, when...)
		l.buf = append(l.buf, "\"}\n"...)
		b = b[n:]
	}
	if l.size > 0 && l.size+int64(len(l.buf)) > l.max {
		if err := l.rotate(); err != nil {
			return fmt.Errorf("rotate log: %w", err)
		}
	}
	n, err := l.f.Write(l.buf)
	l.size += int64(n)
	if err != nil {
		return fmt.Errorf("write log: %w", err)
	}
	return nil
}

func (l *Log) rotate() error {
	if err := l.f.Close(); err != nil {
		return err
	}
	if err := os.Rename(l.path, l.path+logOldSuffix); err != nil {
		return err
	}
	return l.open()
}

// Close may be called twice.
func (l *Log) Close() error {
	if err := l.f.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return fmt.Errorf("close log: %w", err)
	}
	return nil
}

const hexDigits = "0123456789abcdef"

// appendEscaped appends b as the inside of a JSON string.
func appendEscaped(dst, b []byte) []byte {
	for i := 0; i < len(b); {
		// The common case: a run that needs no escape.
		j := i
		for j < len(b) && b[j] >= 0x20 && b[j] < utf8.RuneSelf && b[j] != '"' && b[j] != '\\' && b[j] != 0x7f {
			j++
		}
		dst = append(dst, b[i:j]...)
		if i = j; i == len(b) {
			break
		}
		switch c := b[i]; {
		case c == '\n':
			dst, i = append(dst, '\\', 'n'), i+1
		case c == '\r':
			dst, i = append(dst, '\\', 'r'), i+1
		case c == '\t':
			dst, i = append(dst, '\\', 't'), i+1
		case c == '"' || c == '\\':
			dst, i = append(dst, '\\', c), i+1
		case c < utf8.RuneSelf:
			dst, i = append(dst, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15]), i+1
		default:
			r, n := utf8.DecodeRune(b[i:])
			if r == utf8.RuneError && n == 1 {
				dst = append(dst, "\\ufffd"...)
			} else {
				dst = append(dst, b[i:i+n]...)
			}
			i += n
		}
	}
	return dst
}

// LogReader reads a log, also while it is written and rotated. It is for one goroutine.
type LogReader struct {
	path    string
	begun   bool
	f       *os.File
	r       *bufio.Reader
	partial []byte
}

// NewLogReader returns a reader of a log, which need not be there yet. The caller must Close it.
func NewLogReader(path string) *LogReader { return &LogReader{path: path} }

// ReadLog calls fn with the records of a log, oldest first. A log that is not there is empty.
func ReadLog(path string, fn func(Record) error) error {
	r := NewLogReader(path)
	defer r.Close()
	return r.Read(fn)
}

// Read calls fn with the records since the last Read, oldest first. A record that is not whole yet is left for the
// next Read; one that a crash has torn is left out.
func (r *LogReader) Read(fn func(Record) error) error {
	if !r.begun {
		r.begun = true
		if err := r.open(r.path + logOldSuffix); err != nil {
			return fmt.Errorf("read log: %w", err)
		}
	}
	for {
		if r.f != nil {
			if err := r.rest(fn); err != nil {
				return fmt.Errorf("read log: %w", err)
			}
		}
		// Rotated or not yet there? What comes next is under the log's own name.
		there, err := os.Stat(r.path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		if r.f != nil {
			mine, err := r.f.Stat()
			if err != nil {
				return fmt.Errorf("read log: %w", err)
			}
			if os.SameFile(mine, there) {
				return nil
			}
			// It was renamed after we had read it, and may have got its last records before.
			if err := r.rest(fn); err != nil {
				return fmt.Errorf("read log: %w", err)
			}
		}
		if err := r.open(r.path); err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		if r.f == nil {
			return nil
		}
	}
}

// Close may be called twice.
func (r *LogReader) Close() error {
	if r.f == nil {
		return nil
	}
	err := r.f.Close()
	r.f = nil
	return err
}

func (r *LogReader) open(path string) error {
	if err := r.Close(); err != nil {
		return err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	r.f, r.r, r.partial = f, bufio.NewReaderSize(f, 64<<10), nil
	return nil
}

// rest reads to the present end of the open file.
func (r *LogReader) rest(fn func(Record) error) error {
	for {
		part, err := r.r.ReadSlice('\n')
		r.partial = append(r.partial, part...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull) && len(r.partial) < maxLogLine:
			continue
		case errors.Is(err, bufio.ErrBufferFull):
			return fmt.Errorf("%s: a record of more than %d bytes", r.f.Name(), maxLogLine)
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		var rec Record
		if json.Unmarshal(r.partial, &rec) == nil { // else: torn by a crash
			if err := fn(rec); err != nil {
				return err
			}
		}
		r.partial = r.partial[:0]
	}
}
