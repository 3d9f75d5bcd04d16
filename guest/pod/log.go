package pod

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// outputLog is everything a container has written, across its runs: records at growing offsets, in segment files and,
// as far as the last part goes, in memory. It is the one buffer of the output: the host's pump, attachments and
// docker logs are cursors in it. The log is bounded; of a cursor that falls behind its beginning the gap is lost,
// except the pump's: the writer waits for that one.
//
// A record is uint32 length, one byte of stream, int64 nanoseconds, the bytes, big endian. A segment file's name is the
// offset of its first record in hex.
type outputLog struct {
	dir string
	max int64 // of all segments together; a segment takes a quarter

	mu       sync.Mutex
	changed  chan struct{} // closed at each append and by wake, then replaced
	segments []*segment    // oldest first, contiguous but for what a full disk swallowed
	writing  *segment      // the last of them; nil before the first append
	end      int64         // offset of the next record
	tail     []record      // the newest records, oldest first
	tailSize int
	stored   int   // how many of them are in files
	pump     int64 // everything before it was pumped; MaxInt64: there is no pump
	room     sync.Cond
	closed   bool // nothing is written to files any more
}

type segment struct {
	start, size int64
	f           *os.File
	cursors     int // readers that have it open; closed when it was dropped and this is 0
	dropped     bool
}

type record struct {
	off    int64
	stream byte
	time   int64
	bytes  []byte
}

const (
	recordHeader = 4 + 1 + 8
	minRead      = 4 << 10   // what the first read of a pipe gives at most; memory that nobody needs takes time to be made
	maxRecord    = 64 << 10  // and the later ones
	tailLimit    = 256 << 10 // bytes of records kept in memory
	logLimit     = 64 << 20
)

func (r *record) next() int64 { return r.off + recordHeader + int64(len(r.bytes)) }

// openLog opens the log in a directory, which is made if need be, behind what earlier runs of the machine left.
func openLog(dir string, max int64) (*outputLog, error) {
	l := &outputLog{dir: dir, max: max, changed: make(chan struct{}), pump: math.MaxInt64}
	l.room.L = &l.mu
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make log directory: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read log directory: %w", err)
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".log")
		start, err := strconv.ParseInt(name, 16, 64)
		if !ok || err != nil {
			continue
		}
		f, err := os.OpenFile(filepath.Join(dir, e.Name()), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		info, err := f.Stat()
		if err != nil {
			f.Close()
			return nil, err
		}
		l.segments = append(l.segments, &segment{start: start, size: info.Size(), f: f})
	}
	slices.SortFunc(l.segments, func(a, b *segment) int {
		if a.start < b.start {
			return -1
		}
		return 1
	})
	if n := len(l.segments); n > 0 {
		// A small segment is gone on with, or each start would leave a file. Else a new one begins here: a record torn by a
		// crash stays at the end of the old one and is passed over.
		last := l.segments[n-1]
		l.end = last.start + last.size
		if last.size <= resumeLimit && last.whole() {
			l.writing = last
		}
	}
	return l, nil
}

// resumeLimit is up to which size a segment of an earlier run is gone on with, in bytes.
const resumeLimit = 64 << 10

// whole says that a segment ends with a record that is not torn.
func (s *segment) whole() bool {
	b := make([]byte, s.size)
	if _, err := s.f.ReadAt(b, 0); err != nil {
		return false
	}
	for len(b) >= recordHeader {
		n := int64(binary.BigEndian.Uint32(b)) + recordHeader
		if n > int64(len(b)) {
			return false
		}
		b = b[n:]
	}
	return len(b) == 0
}

// append adds a record and returns when it is stored. b is copied. It waits while the log is full of what the pump has
// not taken.
func (l *outputLog) append(stream byte, now time.Time, b []byte) {
	l.mu.Lock()
	r := record{off: l.end, stream: stream, time: now.UnixNano(), bytes: slices.Clone(b)}
	l.end = r.next()
	l.tail = append(l.tail, r)
	l.tailSize += len(b)
	l.wakeLocked()
	l.mu.Unlock()

	// Readers go ahead from memory, on a machine with one processor, too: the host's first byte is not to wait for a file.
	runtime.Gosched()

	l.mu.Lock()
	defer l.mu.Unlock()
	for l.stored < len(l.tail) {
		if !l.closed {
			if err := l.storeLocked(&l.tail[l.stored]); err != nil {
				// A full disk, mostly: this record stays in memory only, the next one gets a file of its own.
				l.writing = nil
			}
		}
		l.stored++
	}
	drop := 0
	for l.tailSize > tailLimit && drop < len(l.tail)-1 {
		l.tailSize -= len(l.tail[drop].bytes)
		l.tail[drop] = record{}
		drop++
	}
	l.tail = l.tail[drop:]
	l.stored -= drop
	for l.end-l.pump > l.max {
		l.room.Wait()
	}
}

func (l *outputLog) storeLocked(r *record) error {
	if l.writing == nil || l.writing.size >= l.max/4 {
		f, err := os.OpenFile(filepath.Join(l.dir, fmt.Sprintf("%016x.log", r.off)), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return err
		}
		l.writing = &segment{start: r.off, f: f}
		l.segments = append(l.segments, l.writing)
		l.rotateLocked()
	}
	s := l.writing
	b := make([]byte, 0, recordHeader+len(r.bytes))
	b = binary.BigEndian.AppendUint32(b, uint32(len(r.bytes)))
	b = append(b, r.stream)
	b = binary.BigEndian.AppendUint64(b, uint64(r.time))
	b = append(b, r.bytes...)
	if _, err := s.f.WriteAt(b, s.size); err != nil {
		return err
	}
	s.size += int64(len(b))
	return nil
}

func (l *outputLog) rotateLocked() {
	var total int64
	for _, s := range l.segments {
		total += s.size
	}
	for len(l.segments) > 1 && total > l.max-l.max/4 && l.segments[0].start+l.segments[0].size <= l.pump {
		s := l.segments[0]
		os.Remove(s.f.Name())
		s.dropped = true
		if s.cursors == 0 {
			s.f.Close()
		}
		total -= s.size
		l.segments = l.segments[1:]
	}
}

func (l *outputLog) wakeLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// wake lets waiting readers look again.
func (l *outputLog) wake() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.wakeLocked()
}

// position is the offset behind the last record.
func (l *outputLog) position() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.end
}

// begin is the offset of the oldest record.
func (l *outputLog) begin() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.segments) > 0 {
		return l.segments[0].start
	}
	if len(l.tail) > 0 {
		return l.tail[0].off
	}
	return l.end
}

// pumped says how far the host's pump is; math.MaxInt64 says that there is none.
func (l *outputLog) pumped(off int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pump = off
	l.room.Broadcast()
}

// at returns the record at off, or the first one behind a gap, or more=false and a channel that is closed when it is
// worth looking again. The bytes must not be changed.
func (l *outputLog) at(off int64) (r record, more bool, changed <-chan struct{}, err error) {
	l.mu.Lock()
	if len(l.tail) > 0 && off >= l.tail[0].off {
		defer l.mu.Unlock()
		i, ok := slices.BinarySearchFunc(l.tail, off, func(r record, off int64) int {
			switch {
			case r.off < off:
				return -1
			case r.off > off:
				return 1
			}
			return 0
		})
		if ok || i < len(l.tail) {
			return l.tail[i], true, nil, nil
		}
		return record{}, false, l.changed, nil
	}
	var s *segment
	var tail *record
	if len(l.tail) > 0 {
		tail = &l.tail[0]
	}
	for _, c := range l.segments {
		if off < c.start+c.size {
			s = c
			break
		}
	}
	if s == nil || tail != nil && s.start >= tail.off {
		defer l.mu.Unlock()
		if tail != nil {
			return *tail, true, nil, nil
		}
		return record{}, false, l.changed, nil
	}
	off = max(off, s.start)
	s.cursors++
	size := s.size
	l.mu.Unlock()

	r, err = s.read(off, size)

	l.mu.Lock()
	s.cursors--
	if s.dropped && s.cursors == 0 {
		s.f.Close()
	}
	l.mu.Unlock()
	if errors.Is(err, errTorn) {
		return l.at(s.start + size)
	}
	return r, err == nil, nil, err
}

var errTorn = errors.New("record is cut off")

func (s *segment) read(off, size int64) (record, error) {
	var h [recordHeader]byte
	if off-s.start+recordHeader > size {
		return record{}, errTorn
	}
	if _, err := s.f.ReadAt(h[:], off-s.start); err != nil {
		return record{}, fmt.Errorf("read log: %w", err)
	}
	n := binary.BigEndian.Uint32(h[:])
	if n > maxRecord || off-s.start+recordHeader+int64(n) > size {
		return record{}, errTorn
	}
	r := record{off: off, stream: h[4], time: int64(binary.BigEndian.Uint64(h[5:])), bytes: make([]byte, n)}
	if _, err := s.f.ReadAt(r.bytes, off-s.start+recordHeader); err != nil {
		return record{}, fmt.Errorf("read log: %w", err)
	}
	return r, nil
}

// close closes the files. Readers then see what is in memory.
func (l *outputLog) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, s := range l.segments {
		s.dropped = true
		if s.cursors == 0 {
			errs = append(errs, s.f.Close())
		}
	}
	l.segments, l.writing = nil, nil
	l.closed = true
	l.wakeLocked()
	return errors.Join(errs...)
}

// cursor reads a log from an offset on.
type cursor struct {
	log *outputLog
	off int64
	end func() (off int64, known bool) // where reading ends; not known: not yet
}

// next waits for the next record. It returns io.EOF at the end.
func (c *cursor) next(ctx context.Context) (record, error) {
	for {
		end, known := c.end()
		if known && c.off >= end {
			return record{}, io.EOF
		}
		r, more, changed, err := c.log.at(c.off)
		if err != nil {
			return record{}, err
		}
		if more {
			if known && r.off >= end {
				return record{}, io.EOF
			}
			c.off = r.next()
			return r, nil
		}
		if known {
			return record{}, io.EOF
		}
		// The end may have become known after the first look: that wakes, too.
		if _, now := c.end(); now {
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return record{}, ctx.Err()
		}
	}
}

// LogReader reads the output of a container.
type LogReader struct {
	cursor  cursor
	options LogOptions
	skip    int // bytes of the first record that belong to lines before the tail
	leave   func()
}

// Next returns the next piece. It waits when Follow is set and the container runs; at the end it returns io.EOF.
func (r *LogReader) Next(ctx context.Context) (Chunk, error) {
	for {
		rec, err := r.cursor.next(ctx)
		if err != nil {
			return Chunk{}, err
		}
		if !r.options.wants(&rec) {
			continue
		}
		at := time.Unix(0, rec.time)
		if !r.options.Until.IsZero() && at.After(r.options.Until) {
			return Chunk{}, io.EOF
		}
		b := rec.bytes[r.skip:]
		r.skip = 0
		if len(b) == 0 {
			continue
		}
		return Chunk{Stream: rec.stream, Time: at, Bytes: b}, nil
	}
}

// Close ends the reader. It must be called, and may be twice.
func (r *LogReader) Close() { r.leave() }

func (o *LogOptions) wants(r *record) bool {
	return (r.stream == 1 && o.Stdout || r.stream == 2 && o.Stderr) && (o.Since.IsZero() || r.time >= o.Since.UnixNano())
}

// newReader makes a reader that ends at end and begins o.Tail lines before it.
func (l *outputLog) newReader(o LogOptions, end func() (int64, bool)) (*LogReader, error) {
	r := &LogReader{cursor: cursor{log: l, off: l.begin(), end: end}, options: o}
	now := l.position()
	switch {
	case o.Tail < 0:
		return r, nil
	case o.Tail == 0:
		r.cursor.off = now
		return r, nil
	}
	// The beginning of each of the last lines, of both streams together.
	type place struct {
		off  int64
		skip int
	}
	var ring []place
	oldest := 0
	push := func(p place) {
		if len(ring) < o.Tail {
			ring = append(ring, p)
			return
		}
		ring[oldest] = p
		oldest = (oldest + 1) % o.Tail
	}
	open := map[byte]bool{} // streams in the middle of a line
	scan := cursor{log: l, off: r.cursor.off, end: func() (int64, bool) { return now, true }}
	for {
		rec, err := scan.next(context.Background())
		if err == io.EOF {
			break
		}
		if err != nil {
			return nil, err
		}
		if !o.wants(&rec) || !o.Until.IsZero() && rec.time > o.Until.UnixNano() {
			continue
		}
		for i, b := range rec.bytes {
			if !open[rec.stream] {
				push(place{rec.off, i})
				open[rec.stream] = true
			}
			if b == '\n' {
				open[rec.stream] = false
			}
		}
	}
	if len(ring) == 0 {
		r.cursor.off = now
		return r, nil
	}
	first := ring[oldest%len(ring)]
	r.cursor.off, r.skip = first.off, first.skip
	return r, nil
}
