package layer

import (
	"archive/tar"
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"strings"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/kcradle/kcradle/image/erofs"
)

// A skeleton is what a tar holds beside its files' contents, and where in the EROFS image the contents lie. With both
// the tar is put together again, byte for byte. Its file:
//
//	records   zstd: uvarint n<<1, n bytes of the tar       or  uvarint n<<1|1, here stands a file of n bytes
//	extents   zstd: uvarint n<<2|kind for each part of each of those files, in their order; then
//	          partImage: varint, how far from the end of the last such part it begins in the image; partData: n bytes
//	trailer   fixed size, see below
//
// Two streams, because a file's end has its place in the image only when all of the tar was read.
const (
	skeletonMagic   = "kcskel\x00\x01" // the last byte is the version
	skeletonTrailer = 8 + 5*8 + 2*4    // magic, lengths of both streams, of tar and image, entries; CRC-32C of image, of trailer

	partImage = 0
	partHole  = 1
	partData  = 2

	maxLiteral     = 32 << 10 // bytes of a record
	skeletonWindow = 1 << 20  // of zstd: the most a reader needs
)

// ErrSkeleton says that a skeleton is damaged, or not that of the image.
var ErrSkeleton = errors.New("damaged skeleton of a layer")

// skeletonWriter records what passes on its way to the tar reader. A nil one records nothing.
type skeletonWriter struct {
	out     counter
	zip     *zstd.Encoder
	literal []byte // not written yet
	files   []*erofs.Inode
	content bool  // what passes now is a file's content
	passed  int64 // bytes of content
	varint  [binary.MaxVarintLen64]byte
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n += int64(n)
	return n, err
}

func newSkeletonWriter(w io.Writer) (*skeletonWriter, error) {
	if w == nil {
		return nil, nil
	}
	s := &skeletonWriter{out: counter{w: w}, literal: make([]byte, 0, maxLiteral)}
	var err error
	s.zip, err = zstd.NewWriter(&s.out, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(skeletonWindow), zstd.WithLowerEncoderMem(true))
	return s, err
}

// tee records what is read from r.
func (s *skeletonWriter) tee(r io.Reader) io.Reader {
	if s == nil {
		return r
	}
	return &recorder{s, r}
}

type recorder struct {
	s *skeletonWriter
	r io.Reader
}

func (r *recorder) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if r.s.content {
		r.s.passed += int64(n)
		return n, err
	}
	if aerr := r.s.add(p[:n]); aerr != nil {
		return n, aerr
	}
	return n, err
}

// add takes bytes of the tar that are no content.
func (s *skeletonWriter) add(b []byte) error {
	for len(b) > 0 {
		n := copy(s.literal[len(s.literal):cap(s.literal)], b)
		s.literal, b = s.literal[:len(s.literal)+n], b[n:]
		if len(s.literal) == cap(s.literal) {
			if err := s.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *skeletonWriter) number(n uint64) error {
	_, err := s.zip.Write(binary.AppendUvarint(s.varint[:0], n))
	return err
}

func (s *skeletonWriter) flush() error {
	if len(s.literal) == 0 {
		return nil
	}
	if err := s.number(uint64(len(s.literal)) << 1); err != nil {
		return err
	}
	_, err := s.zip.Write(s.literal)
	s.literal = s.literal[:0]
	return err
}

// begin says that the content of an entry comes now. That of a sparse one is not in the image as it is in the tar, so
// that it stays in the skeleton.
func (s *skeletonWriter) begin(hdr *tar.Header) {
	if s != nil && !isSparse(hdr) {
		s.content, s.passed = true, 0
	}
}

// end says that all of it was read into the file i.
func (s *skeletonWriter) end(i *erofs.Inode, size int64) error {
	if s == nil || !s.content {
		return nil
	}
	s.content = false
	if s.passed != size {
		return fmt.Errorf("layer: internal error: %d bytes of content were read, not %d", s.passed, size)
	}
	if size == 0 {
		return nil
	}
	s.files = append(s.files, i)
	if err := s.flush(); err != nil {
		return err
	}
	return s.number(uint64(size)<<1 | 1)
}

func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for k := range hdr.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// finish writes the extents of the image that w has finished, and the trailer.
func (s *skeletonWriter) finish(w *erofs.Writer, tarSize int64, entries int, image erofs.Result) error {
	if err := s.flush(); err != nil {
		return err
	}
	if err := s.zip.Close(); err != nil {
		return err
	}
	records := s.out.n
	s.zip.Reset(&s.out)
	var end int64
	for _, i := range s.files {
		err := w.Extents(i, func(e erofs.Extent) error {
			kind := uint64(partImage)
			switch {
			case e.Hole:
				kind = partHole
			case e.Data != nil:
				kind = partData
			}
			err := s.number(uint64(e.Size)<<2 | kind)
			if err == nil && kind == partImage {
				_, err = s.zip.Write(binary.AppendVarint(s.varint[:0], e.Offset-end))
				end = e.Offset + e.Size
			}
			if err == nil && kind == partData {
				_, err = s.zip.Write(e.Data)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	if err := s.zip.Close(); err != nil {
		return err
	}
	le := binary.LittleEndian
	b := make([]byte, 0, skeletonTrailer)
	b = append(b, skeletonMagic...)
	for _, n := range []int64{records, s.out.n - records, tarSize, image.Size, int64(entries)} {
		b = le.AppendUint64(b, uint64(n))
	}
	b = le.AppendUint32(b, image.CRC)
	b = le.AppendUint32(b, crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)))
	_, err := s.out.Write(b)
	return err
}

// Skeleton is an opened skeleton. It holds nothing open beside the file, which is the caller's.
type Skeleton struct {
	r                io.ReaderAt
	records, extents int64

	TarSize   int64  // of the tar it makes
	ImageSize int64  // of the image it belongs to
	ImageCRC  uint32 // see erofs.Checksum
	Entries   int    // of the tar
}

// OpenSkeleton reads what stands at the end of a skeleton's file of that size. ErrSkeleton if it is none.
func OpenSkeleton(r io.ReaderAt, size int64) (*Skeleton, error) {
	if size < skeletonTrailer {
		return nil, fmt.Errorf("%w: it has %d bytes", ErrSkeleton, size)
	}
	b := make([]byte, skeletonTrailer)
	if n, err := r.ReadAt(b, size-skeletonTrailer); n < len(b) {
		return nil, noEOF(err)
	}
	le := binary.LittleEndian
	if string(b[:7]) == skeletonMagic[:7] && b[7] > skeletonMagic[7] {
		return nil, fmt.Errorf("%w: it has version %d, written by a newer kcradle", ErrSkeleton, b[7])
	}
	end := skeletonTrailer - 4
	if string(b[:8]) != skeletonMagic || le.Uint32(b[end:]) != crc32.Checksum(b[:end], crc32.MakeTable(crc32.Castagnoli)) {
		return nil, fmt.Errorf("%w: its end is not one", ErrSkeleton)
	}
	var n [5]int64
	for i := range n {
		n[i] = int64(le.Uint64(b[8+8*i:]))
		if n[i] < 0 {
			return nil, fmt.Errorf("%w: a length out of bounds", ErrSkeleton)
		}
	}
	s := &Skeleton{r: r, records: n[0], extents: n[1], TarSize: n[2], ImageSize: n[3], Entries: int(n[4]), ImageCRC: le.Uint32(b[48:])}
	if n[0] > size || n[1] > size || n[0]+n[1] != size-skeletonTrailer {
		return nil, fmt.Errorf("%w: its parts have %d and %d bytes, the file %d", ErrSkeleton, n[0], n[1], size)
	}
	return s, nil
}

// Tar is a layer's tar as it is put together from skeleton and image. Its Read gives io.EOF only if all of it had the
// digest it should have, otherwise an error that is ErrSkeleton.
type Tar struct {
	s       *Skeleton
	image   io.ReaderAt
	want    digest.Digest
	hash    hash.Hash
	total   int64
	records *bufio.Reader
	extents *bufio.Reader
	close   []func()

	part    io.Reader // what is read now
	left    int64     // bytes of it
	file    int64     // bytes of the file that are still to be found
	imageAt int64     // end of the last part of the image
	err     error
}

// Tar starts to read the layer diffID, whose image is image.
func (s *Skeleton) Tar(image io.ReaderAt, diffID digest.Digest) (*Tar, error) {
	t := &Tar{s: s, image: image, want: diffID, hash: digest.SHA256.Hash()}
	for _, p := range []struct {
		off, size int64
		r         **bufio.Reader
	}{{0, s.records, &t.records}, {s.records, s.extents, &t.extents}} {
		z, err := zstd.NewReader(io.NewSectionReader(s.r, p.off, p.size), zstd.WithDecoderConcurrency(1),
			zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(skeletonWindow))
		if err != nil {
			return nil, errors.Join(err, t.Close())
		}
		t.close = append(t.close, z.Close)
		*p.r = bufio.NewReaderSize(z, maxLiteral)
	}
	return t, nil
}

// Close lets go of what the reader holds. It may be called twice.
func (t *Tar) Close() error {
	for _, f := range t.close {
		f()
	}
	t.close = nil
	if t.err == nil {
		t.err = errors.New("layer: read after close")
	}
	return nil
}

// Read implements io.Reader.
func (t *Tar) Read(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, nil
	}
	for t.err == nil && t.left == 0 {
		t.err = t.next()
	}
	if t.err != nil {
		return 0, t.err
	}
	n, err := t.part.Read(p[:min(int64(len(p)), t.left)])
	t.hash.Write(p[:n])
	t.left -= int64(n)
	if err != nil && (err != io.EOF || t.left > 0) {
		t.err = damaged(err)
		return n, t.err
	}
	return n, nil
}

// next finds the next part of the tar.
func (t *Tar) next() error {
	if t.file > 0 {
		return t.nextExtent()
	}
	v, err := binary.ReadUvarint(t.records)
	if err == io.EOF {
		return t.end()
	}
	if err != nil {
		return damaged(err)
	}
	n := int64(v >> 1)
	if n == 0 || n > t.s.TarSize-t.total || v&1 == 0 && n > maxLiteral {
		return fmt.Errorf("%w: a record of %d bytes", ErrSkeleton, n)
	}
	t.total += n
	if v&1 == 1 {
		t.file = n
		return nil
	}
	t.part, t.left = t.records, n
	return nil
}

func (t *Tar) nextExtent() error {
	v, err := binary.ReadUvarint(t.extents)
	if err != nil {
		return damaged(err)
	}
	n := int64(v >> 2)
	if n == 0 || n > t.file {
		return fmt.Errorf("%w: a part of %d bytes of a file", ErrSkeleton, n)
	}
	switch v & 3 {
	case partImage:
		d, err := binary.ReadVarint(t.extents)
		if err != nil {
			return damaged(err)
		}
		at := t.imageAt + d
		if at < 0 || at > t.s.ImageSize || n > t.s.ImageSize-at {
			return fmt.Errorf("%w: a part outside of the image", ErrSkeleton)
		}
		t.part, t.imageAt = io.NewSectionReader(t.image, at, n), at+n
	case partHole:
		t.part = zeros{}
	case partData:
		t.part = t.extents
	default:
		return fmt.Errorf("%w: a part of an unknown kind", ErrSkeleton)
	}
	t.left = n
	t.file -= n
	return nil
}

// end says whether what was read is the layer.
func (t *Tar) end() error {
	if _, err := t.extents.ReadByte(); err != io.EOF {
		return fmt.Errorf("%w: more files than the tar has", ErrSkeleton)
	}
	if got := digest.NewDigest(digest.SHA256, t.hash); t.total != t.s.TarSize || got != t.want {
		return fmt.Errorf("%w: put together, the layer has %d bytes and %s, not %d and %s", ErrSkeleton, t.total, got, t.s.TarSize, t.want)
	}
	return io.EOF
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// damaged makes an error of reading a skeleton one.
func damaged(err error) error { return fmt.Errorf("%w: %w", ErrSkeleton, noEOF(err)) }

func noEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
