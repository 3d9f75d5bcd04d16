package initrd

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"strings"
)

// The newc format ("070701"), as Documentation/driver-api/early-userspace/buffer-format.rst of the kernel describes
// it: per entry a header of 110 ASCII bytes, the name with its NUL padded to 4 bytes, the data padded to 4 bytes. An
// entry named TRAILER!!! ends the archive.
const (
	magic      = "070701"
	headerSize = 110
	trailer    = "TRAILER!!!"
	maxName    = 4096 // PATH_MAX, with the NUL: the kernel's unpacker takes no longer ones
)

// File types of Header.Mode, as in stat(2).
const (
	ModeFile    uint32 = 0o100000
	ModeDir     uint32 = 0o040000
	ModeSymlink uint32 = 0o120000
	ModeChar    uint32 = 0o020000
	modeType    uint32 = 0o170000
)

// Header describes one entry. Times, owners and inode numbers are not in it: the first two are always zero, the last
// is the entry's position, so that equal contents give equal bytes.
type Header struct {
	Name         string // required; relative, slash-separated, in the form fs.ValidPath accepts
	Mode         uint32 // required; one of the Mode constants with permission bits
	Size         int64  // bytes of data; zero for all but files and links
	Major, Minor uint32 // the device, for ModeChar
}

func (h Header) validate() error {
	if !fs.ValidPath(h.Name) || h.Name == "." || h.Name == trailer || strings.ContainsRune(h.Name, 0) || len(h.Name)+1 > maxName {
		return fmt.Errorf("newc: bad name %.60q", h.Name)
	}
	switch h.Mode & modeType {
	case ModeFile, ModeSymlink:
	case ModeDir, ModeChar:
		if h.Size != 0 {
			return fmt.Errorf("newc: %s has data but is no file", h.Name)
		}
	default:
		return fmt.Errorf("newc: %s has unknown type %#o", h.Name, h.Mode&modeType)
	}
	if h.Mode&^(modeType|0o7777) != 0 {
		return fmt.Errorf("newc: %s has bad mode %#o", h.Name, h.Mode)
	}
	if h.Size < 0 || h.Size > math.MaxUint32 {
		return fmt.Errorf("newc: %s has %d bytes, the format holds at most 4 GiB", h.Name, h.Size)
	}
	return nil
}

func (h Header) format(ino uint32) []byte {
	nlink := 1
	if h.Mode&modeType == ModeDir {
		nlink = 2
	}
	b := fmt.Appendf(nil, "%s%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00", magic,
		ino, h.Mode, 0, 0, nlink, 0, h.Size, 0, 0, h.Major, h.Minor, len(h.Name)+1, 0, h.Name)
	return append(b, zeros[:pad(int64(len(b)))]...)
}

var zeros [4]byte

func pad(n int64) int64 { return -n & 3 }

// Writer writes a newc archive. It is not safe for concurrent use.
type Writer struct {
	w   io.Writer
	ino uint32
	err error // the first failure; every later call returns it
}

// NewWriter returns a Writer to w. Close ends the archive; it does not close w.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Add writes one entry with the h.Size bytes that data delivers; data may be nil when there are none. It fails when
// data delivers more or fewer.
func (a *Writer) Add(h Header, data io.Reader) error {
	if a.err != nil {
		return a.err
	}
	if err := h.validate(); err != nil {
		return err // nothing written yet: the archive is still good
	}
	a.err = a.add(h, data)
	return a.err
}

func (a *Writer) add(h Header, data io.Reader) error {
	a.ino++
	if _, err := a.w.Write(h.format(a.ino)); err != nil {
		return fmt.Errorf("newc: write %s: %w", h.Name, err)
	}
	if data == nil {
		data = strings.NewReader("")
	}
	n, err := io.Copy(a.w, io.LimitReader(data, h.Size))
	if err != nil {
		return fmt.Errorf("newc: write %s: %w", h.Name, err)
	}
	if n != h.Size {
		return fmt.Errorf("newc: %s ended after %d of %d bytes: %w", h.Name, n, h.Size, io.ErrUnexpectedEOF)
	}
	switch n, err := io.ReadFull(data, make([]byte, 1)); {
	case n != 0:
		return fmt.Errorf("newc: %s has more than its %d bytes", h.Name, h.Size)
	case err != io.EOF:
		return fmt.Errorf("newc: read %s: %w", h.Name, err)
	}
	if _, err := a.w.Write(zeros[:pad(h.Size)]); err != nil {
		return fmt.Errorf("newc: write %s: %w", h.Name, err)
	}
	return nil
}

// Close writes the end of the archive. It may be called twice.
func (a *Writer) Close() error {
	if errors.Is(a.err, errClosed) {
		return nil
	}
	if a.err != nil {
		return a.err
	}
	a.err = errClosed
	if _, err := a.w.Write(Header{Name: trailer}.format(0)); err != nil {
		a.err = fmt.Errorf("newc: write trailer: %w", err)
		return a.err
	}
	return nil
}

var errClosed = errors.New("newc: archive is closed")

// Reader reads a newc archive of one generation of this Writer or of cpio(1).
type Reader struct {
	r    io.Reader
	data io.LimitedReader // what is left of the current entry
	skip int64            // its padding
	max  int64
}

// NewReader returns a Reader of r that refuses entries of more than limit bytes.
func NewReader(r io.Reader, limit int64) *Reader { return &Reader{r: r, max: limit} }

// Next moves to the next entry and returns it, or io.EOF after the trailer. The data of the entry is then what Read
// returns.
func (a *Reader) Next() (Header, error) {
	if _, err := io.Copy(io.Discard, &a.data); err != nil {
		return Header{}, fmt.Errorf("newc: %w", err)
	}
	if a.data.N != 0 {
		return Header{}, fmt.Errorf("newc: data: %w", io.ErrUnexpectedEOF)
	}
	if err := a.skipZeros(a.skip); err != nil {
		return Header{}, err
	}
	a.skip = 0
	var raw [headerSize]byte
	if _, err := io.ReadFull(a.r, raw[:]); err != nil {
		return Header{}, fmt.Errorf("newc: read header: %w", noEOF(err))
	}
	if string(raw[:6]) != magic {
		return Header{}, fmt.Errorf("newc: bad magic %q", raw[:6])
	}
	var field [13]uint32
	for i := range field {
		v, err := parseHex(raw[6+8*i : 14+8*i])
		if err != nil {
			return Header{}, err
		}
		field[i] = v
	}
	nameSize := field[11]
	if nameSize < 2 || nameSize > maxName {
		return Header{}, fmt.Errorf("newc: name of %d bytes", nameSize)
	}
	name := make([]byte, nameSize)
	if _, err := io.ReadFull(a.r, name); err != nil {
		return Header{}, fmt.Errorf("newc: read name: %w", noEOF(err))
	}
	if name[nameSize-1] != 0 {
		return Header{}, errors.New("newc: name without its NUL")
	}
	if err := a.skipZeros(pad(headerSize + int64(nameSize))); err != nil {
		return Header{}, err
	}
	h := Header{
		Name: string(name[:nameSize-1]), Mode: field[1], Size: int64(field[6]),
		Major: field[9], Minor: field[10],
	}
	if h.Name == trailer {
		return Header{}, io.EOF
	}
	if err := h.validate(); err != nil {
		return Header{}, err
	}
	if h.Size > a.max {
		return Header{}, fmt.Errorf("newc: %s has %d bytes, at most %d are accepted", h.Name, h.Size, a.max)
	}
	a.data = io.LimitedReader{R: a.r, N: h.Size}
	a.skip = pad(h.Size)
	return h, nil
}

// Read reads from the current entry; io.EOF is its end.
func (a *Reader) Read(p []byte) (int, error) {
	if a.data.N == 0 {
		return 0, io.EOF
	}
	n, err := a.data.Read(p)
	if err == io.EOF && a.data.N > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

func (a *Reader) skipZeros(n int64) error {
	var b [4]byte
	if _, err := io.ReadFull(a.r, b[:n]); err != nil {
		return fmt.Errorf("newc: read padding: %w", noEOF(err))
	}
	if b != zeros {
		return errors.New("newc: padding is not zero")
	}
	return nil
}

// parseHex takes exactly eight hexadecimal digits; strconv would accept signs and underscores.
func parseHex(b []byte) (uint32, error) {
	var v uint32
	for _, c := range b {
		switch {
		case '0' <= c && c <= '9':
			c -= '0'
		case 'a' <= c && c <= 'f':
			c -= 'a' - 10
		case 'A' <= c && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, fmt.Errorf("newc: bad number %q", b)
		}
		v = v<<4 | uint32(c)
	}
	return v, nil
}

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
