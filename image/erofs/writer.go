// Package erofs writes EROFS file system images, as Linux mounts them: one pass over the files' contents, which go
// straight to their place in the image, then the tree.
//
//	w, err := erofs.NewWriter(file, erofs.Options{})
//	defer w.Close()
//	content, err := w.Content(reader, size)
//	f := &erofs.Inode{Mode: erofs.TypeRegular | 0o644}
//	f.SetContent(content)
//	err = w.Root().Put("hello", f)
//	result, err := w.Finish(uuid)
//
// The same calls give the same bytes. Files are not compressed; runs of zeros in them become holes; an inode put
// under several names is one inode in the image (a hard link); the ends of files that do not fill a block stand beside
// their inodes. Memory grows with the number of files, not with their size.
package erofs

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	// minChunk is the smallest hole that is looked for.
	minChunk = 64 << 10
	// maxChunks bounds the block addresses of one file; larger files get larger chunks.
	maxChunks = 1 << 20
	// maxInline is the longest end of a file that stands beside its inode. An inode can always be placed so that
	// that many bytes after it do not cross a block, whatever attributes stand between.
	maxInline = 4000
	// maxBlocks: block addresses have 32 bits, the last of which is a hole.
	maxBlocks = nullBlock - 1

	outBuffer   = 1 << 20
	writeback   = 16 << 20 // bytes after which the kernel is asked to begin writing to the disk
	spoolMemory = 4 << 20  // bytes of file ends that are kept in memory
)

// Options of a Writer.
type Options struct {
	// SpoolDir is where the ends of files wait for their inodes when they are many, in a file without a name.
	// Empty: the system's directory for temporary files.
	SpoolDir string
	Volume   string // name of the volume, at most 16 bytes
}

// Content is where the content of a regular file lies in the image. The zero Content is that of an empty file.
type Content struct {
	size   int64
	block  uint32 // of the first full block
	tail   int    // bytes in the spool
	spool  int64  // where
	chunks []uint32
	bits   int // size of a chunk as a power of two
}

// Size is the length of the content in bytes.
func (c Content) Size() int64 { return c.size }

// Result describes a finished image.
type Result struct {
	Size   int64  // bytes, a multiple of BlockSize
	CRC    uint32 // CRC-32C of the image from the second block on, then the first
	Inodes int
}

// Writer writes one image. It is for one goroutine.
type Writer struct {
	out   output
	opts  Options
	root  *Inode
	spool spool
	base  int64 // of the metadata in the file, after Finish
	done  bool
}

// NewWriter starts an image in an empty file, which stays the caller's.
func NewWriter(f *os.File, opts Options) (*Writer, error) {
	if len(opts.Volume) > 16 {
		return nil, fmt.Errorf("erofs: volume name %q is longer than 16 bytes", opts.Volume)
	}
	return &Writer{
		out:   output{f: f, off: BlockSize, synced: BlockSize, buf: make([]byte, 0, outBuffer), table: crc32.MakeTable(crc32.Castagnoli)},
		opts:  opts,
		root:  &Inode{Mode: TypeDirectory | 0o755},
		spool: spool{dir: opts.SpoolDir},
	}, nil
}

// Root is the root directory, mode 0755.
func (w *Writer) Root() *Inode { return w.root }

// Close lets go of what the writer holds. It may be called twice, and after Finish.
func (w *Writer) Close() error { return w.spool.close() }

// Written is the number of bytes the image takes so far.
func (w *Writer) Written() int64 { return w.out.pos() }

// Content reads size bytes into the image and returns where they are.
func (w *Writer) Content(r io.Reader, size int64) (Content, error) {
	c := Content{size: size}
	if size == 0 {
		return c, nil
	}
	if size < 0 || size > maxBlocks<<blockBits {
		return c, fmt.Errorf("a file of %d bytes does not fit", size)
	}
	if w.out.pos()>>blockBits+(size+BlockSize-1)>>blockBits > maxBlocks {
		return c, errors.New("the image does not fit into 16 TiB")
	}
	chunk := int64(minChunk)
	c.bits = 16
	for (size+chunk-1)/chunk > maxChunks {
		chunk, c.bits = chunk<<1, c.bits+1
	}
	c.block = uint32(w.out.pos() >> blockBits)
	if size < minChunk {
		return c, w.short(r, &c)
	}
	for at := int64(0); at < size; at += chunk {
		n := min(chunk, size-at)
		block := uint32(w.out.pos() >> blockBits)
		zero, err := w.out.chunk(r, n)
		if err != nil {
			return c, err
		}
		if zero {
			if c.chunks == nil { // the first hole: all before it lies in a row
				c.chunks = make([]uint32, 0, (size+chunk-1)/chunk)
				for i := int64(0); i < at; i += chunk {
					c.chunks = append(c.chunks, c.block+uint32(i>>blockBits))
				}
			}
			block = nullBlock
		}
		if c.chunks != nil {
			c.chunks = append(c.chunks, block)
		}
	}
	return c, w.out.pad(BlockSize)
}

// short reads a file without room for holes: its full blocks into the image, a short rest into the spool.
func (w *Writer) short(r io.Reader, c *Content) error {
	full := c.size &^ (BlockSize - 1)
	tail := c.size - full
	if tail > maxInline {
		full, tail = c.size, 0
	}
	b, err := w.out.room(int(full))
	if err != nil {
		return err
	}
	if err := readFull(r, b); err != nil {
		return err
	}
	w.out.advance(int(full))
	if tail > 0 {
		c.tail = int(tail)
		if c.spool, err = w.spool.add(r, tail); err != nil {
			return err
		}
	}
	return w.out.pad(BlockSize)
}

// Finish writes the tree and the superblock. The file is complete after it, though not synced.
func (w *Writer) Finish(uuid [16]byte) (Result, error) {
	if w.done {
		return Result{}, errors.New("erofs: finished twice")
	}
	w.done = true
	if err := w.spool.flush(); err != nil {
		return Result{}, err
	}
	l := layout{pos: inodeSize} // no inode has number 0, which is no file's
	l.tree(w.root)
	base := w.out.pos()
	w.base = base
	l.extraBase = uint32((base + align(l.pos, BlockSize)) >> blockBits)
	if int64(l.extraBase)+l.extra > maxBlocks {
		return Result{}, errors.New("the image does not fit into 16 TiB")
	}
	// Inodes in the order of their place, then the blocks of directories and long links.
	for _, p := range l.places {
		if err := w.out.zeros(base + p.pos - w.out.pos()); err != nil {
			return Result{}, err
		}
		if err := w.inode(&l, p); err != nil {
			return Result{}, err
		}
	}
	if err := w.out.pad(BlockSize); err != nil {
		return Result{}, err
	}
	for _, p := range l.places {
		if err := w.blocks(&l, p); err != nil {
			return Result{}, err
		}
	}
	if err := w.out.flush(); err != nil {
		return Result{}, err
	}
	s := superblock{
		rootNid:   uint16(w.root.nid),
		inodes:    uint64(len(l.places)),
		blocks:    uint32(w.out.pos() >> blockBits),
		metaBlock: uint32(base >> blockBits),
		uuid:      uuid,
		features:  featureCompatMtime,
	}
	copy(s.volume[:], w.opts.Volume)
	if l.chunked {
		s.featuresIn |= featureIncompatChunked
	}
	first := s.block()
	if _, err := w.out.f.WriteAt(first, 0); err != nil {
		return Result{}, err
	}
	return Result{
		Size:   w.out.pos(),
		CRC:    crc32.Update(w.out.crc, w.out.table, first),
		Inodes: len(l.places),
	}, nil
}

// Checksum computes Result.CRC of an image of that size.
func Checksum(r io.ReaderAt, size int64) (uint32, error) {
	table := crc32.MakeTable(crc32.Castagnoli)
	if size < BlockSize {
		return 0, fmt.Errorf("erofs: %d bytes are no image", size)
	}
	var crc uint32
	buf := make([]byte, outBuffer)
	for off := int64(BlockSize); off < size; {
		n, err := r.ReadAt(buf[:min(int64(len(buf)), size-off)], off)
		if n == 0 {
			return 0, noEOF(err)
		}
		crc = crc32.Update(crc, table, buf[:n])
		off += int64(n)
	}
	if _, err := r.ReadAt(buf[:BlockSize], 0); err != nil {
		return 0, noEOF(err)
	}
	return crc32.Update(crc, table, buf[:BlockSize]), nil
}

// place is an inode and where it lies.
type place struct {
	inode  *Inode
	parent *Inode // of a directory
	pos    int64  // from the start of the metadata
	extra  int64  // first of its blocks among the extra ones
	full   int64  // how many
	names  []string
}

// layout gives every inode its place. Siblings lie together, then their subtrees follow: what one directory listing
// asks for lies in one piece.
type layout struct {
	places    []place
	pos       int64
	extra     int64
	extraBase uint32
	chunked   bool
}

func (l *layout) tree(root *Inode) {
	type dir struct {
		inode *Inode
		names []string
	}
	l.place(root, root)
	stack := []dir{{root, l.places[0].names}}
	for len(stack) > 0 {
		d := stack[len(stack)-1]
		stack = stack[:len(stack)-1]
		var below []dir
		for _, name := range d.names {
			c := d.inode.children[name]
			if c.placed {
				c.nlink++
				continue
			}
			l.place(c, d.inode)
			if c.IsDir() {
				d.inode.nlink++
				below = append(below, dir{c, l.places[len(l.places)-1].names})
			}
		}
		slices.Reverse(below)
		stack = append(stack, below...)
	}
}

func (l *layout) place(i, parent *Inode) {
	p := place{inode: i, parent: parent}
	i.placed, i.nlink = true, 1
	body := int64(inodeSize + i.xattrSize())
	var inline int64
	switch i.Mode & TypeMask {
	case TypeDirectory:
		i.nlink = 2
		p.names = i.Names()
		i.size = dirSize(p.names)
		p.full, inline = split(i.size)
	case TypeSymlink:
		i.size = int64(len(i.Target))
		p.full, inline = split(i.size)
	case TypeRegular:
		i.size = i.data.size
		inline = int64(i.data.tail)
		if i.data.chunks != nil {
			l.chunked = true
			body += 4 * int64(len(i.data.chunks))
		}
	}
	p.pos = l.pos
	for p.pos%BlockSize > BlockSize-inodeSize || inline > 0 && (p.pos+body)%BlockSize+inline > BlockSize {
		p.pos += slotSize
	}
	i.nid = uint64(p.pos) >> slotBits
	l.pos = align(p.pos+body+inline, slotSize)
	p.extra = l.extra
	l.extra += p.full
	l.places = append(l.places, p)
}

// split divides a size into full blocks and a rest beside the inode.
func split(size int64) (full, inline int64) {
	full, inline = size>>blockBits, size&(BlockSize-1)
	if inline > maxInline {
		return full + 1, 0
	}
	return full, inline
}

func (w *Writer) inode(l *layout, p place) error {
	i := p.inode
	xattrs := i.xattrSize()
	b := make([]byte, inodeSize+xattrs, inodeSize+xattrs+64)
	d := dataLayout{layout: layoutPlain}
	var tail []byte
	switch i.Mode & TypeMask {
	case TypeDirectory, TypeSymlink:
		d.u = l.extraBase + uint32(p.extra)
		if _, inline := split(i.size); inline > 0 {
			d.layout = layoutInline
			tail = l.content(p)[p.full<<blockBits:]
		}
	case TypeRegular:
		d.u = i.data.block
		switch {
		case i.data.chunks != nil:
			d = dataLayout{layoutChunk, uint32(i.data.bits - blockBits)}
			tail = make([]byte, 0, 4*len(i.data.chunks))
			for _, c := range i.data.chunks {
				tail = append(tail, byte(c), byte(c>>8), byte(c>>16), byte(c>>24))
			}
		case i.data.tail > 0:
			d.layout = layoutInline
			tail = make([]byte, i.data.tail)
			if err := w.spool.read(tail, i.data.spool); err != nil {
				return err
			}
		}
	case TypeCharDevice, TypeBlockDevice:
		d.u = i.Rdev
	}
	i.put(b, d, xattrs)
	if xattrs > 0 {
		i.putXattrs(b[inodeSize:])
	}
	if err := w.out.write(b); err != nil {
		return err
	}
	return w.out.write(tail)
}

// blocks writes the full blocks of a directory or a long link.
func (w *Writer) blocks(l *layout, p place) error {
	if p.full == 0 {
		return nil
	}
	b := l.content(p)
	if err := w.out.write(b[:min(int64(len(b)), p.full<<blockBits)]); err != nil {
		return err
	}
	return w.out.pad(BlockSize)
}

func (l *layout) content(p place) []byte {
	if p.inode.IsDir() {
		return dirContent(p.inode, p.parent, p.names)
	}
	return []byte(p.inode.Target)
}

// direntName is a directory's entries in the order of their bytes: "." and ".." among the others.
func direntNames(names []string) []string {
	all := make([]string, 0, len(names)+2)
	all = append(all, ".", "..")
	all = append(all, names...)
	slices.SortFunc(all, cmp.Compare[string])
	return all
}

// dirBlocks calls f for each block's entries and the bytes they use.
func dirBlocks(all []string, f func(names []string, used int)) {
	for len(all) > 0 {
		n, used := 0, 0
		for n < len(all) && used+direntSize+len(all[n]) <= BlockSize {
			used += direntSize + len(all[n])
			n++
		}
		f(all[:n], used)
		all = all[n:]
	}
}

// dirSize is a directory's i_size: full blocks and what the last one uses.
func dirSize(names []string) int64 {
	blocks, last := 0, 0
	dirBlocks(direntNames(names), func(_ []string, used int) { blocks++; last = used })
	return int64(blocks-1)<<blockBits + int64(last)
}

func dirContent(d, parent *Inode, names []string) []byte {
	var out []byte
	dirBlocks(direntNames(names), func(names []string, used int) {
		out = append(out, make([]byte, align(int64(len(out)), BlockSize)-int64(len(out)))...)
		start := len(out)
		out = append(out, make([]byte, used)...)
		b := out[start:]
		nameOff := len(names) * direntSize
		for i, name := range names {
			c := d.children[name]
			switch name {
			case ".":
				c = d
			case "..":
				c = parent
			}
			e := b[i*direntSize:]
			for j := range 8 {
				e[j] = byte(c.nid >> (8 * j))
			}
			e[8], e[9] = byte(nameOff), byte(nameOff>>8)
			e[10] = fileType(c.Mode)
			nameOff += copy(b[nameOff:], name)
		}
	})
	return out
}

// output is the image file behind a buffer, written front to back.
type output struct {
	f      *os.File
	off    int64 // of the buffer's start in the file
	buf    []byte
	synced int64 // up to where the kernel was asked to write
	crc    uint32
	table  *crc32.Table
}

func (o *output) pos() int64 { return o.off + int64(len(o.buf)) }

// room returns n bytes of the buffer after the position; advance then takes them in. n is at most minChunk.
func (o *output) room(n int) ([]byte, error) {
	if len(o.buf)+n > cap(o.buf) {
		if err := o.flush(); err != nil {
			return nil, err
		}
	}
	return o.buf[len(o.buf) : len(o.buf)+n], nil
}

func (o *output) advance(n int) { o.buf = o.buf[:len(o.buf)+n] }

// chunk reads n bytes to the position, unless they are all zero.
func (o *output) chunk(r io.Reader, n int64) (zero bool, err error) {
	var skipped int64 // zeros not written yet
	for done := int64(0); done < n; {
		piece := min(minChunk, n-done)
		b, err := o.room(int(piece))
		if err != nil {
			return false, err
		}
		if err := readFull(r, b); err != nil {
			return false, err
		}
		done += piece
		if isZero(b) {
			skipped += piece
			continue
		}
		if skipped > 0 { // a large chunk that is not one hole: its zeros are data
			keep := bytes.Clone(b)
			if err := o.zeros(skipped); err != nil {
				return false, err
			}
			skipped = 0
			if err := o.write(keep); err != nil {
				return false, err
			}
			continue
		}
		o.advance(int(piece))
	}
	if skipped == n {
		return true, nil
	}
	return false, o.zeros(skipped)
}

func (o *output) write(b []byte) error {
	for len(b) > 0 {
		if len(o.buf) == cap(o.buf) {
			if err := o.flush(); err != nil {
				return err
			}
		}
		n := copy(o.buf[len(o.buf):cap(o.buf)], b)
		o.buf = o.buf[:len(o.buf)+n]
		b = b[n:]
	}
	return nil
}

var zeroBlock [minChunk]byte

func isZero(b []byte) bool { return bytes.Equal(b, zeroBlock[:len(b)]) }

func (o *output) zeros(n int64) error {
	for n > 0 {
		m := min(n, int64(len(zeroBlock)))
		if err := o.write(zeroBlock[:m]); err != nil {
			return err
		}
		n -= m
	}
	return nil
}

func (o *output) pad(to int64) error { return o.zeros(align(o.pos(), to) - o.pos()) }

func (o *output) flush() error {
	if len(o.buf) == 0 {
		return nil
	}
	if _, err := o.f.WriteAt(o.buf, o.off); err != nil {
		return err
	}
	o.crc = crc32.Update(o.crc, o.table, o.buf)
	o.off += int64(len(o.buf))
	o.buf = o.buf[:0]
	if o.off-o.synced >= writeback {
		// A hint: the fsync at the end then has little left to wait for. Not every file system takes it.
		_ = unix.SyncFileRange(int(o.f.Fd()), o.synced, o.off-o.synced, unix.SYNC_FILE_RANGE_WRITE)
		o.synced = o.off
	}
	return nil
}

// spool keeps the ends of files until their inodes are written: the first ones in memory, then in a nameless file.
type spool struct {
	dir string
	mem []byte
	f   *os.File
	w   *bufio.Writer
	off int64
}

func (s *spool) add(r io.Reader, n int64) (int64, error) {
	at := s.off
	if s.f == nil && s.off+n <= spoolMemory {
		s.mem = slices.Grow(s.mem, int(n))
		if err := readFull(r, s.mem[at:at+n]); err != nil {
			return 0, err
		}
		s.mem = s.mem[:at+n]
		s.off += n
		return at, nil
	}
	if s.f == nil {
		f, err := nameless(s.dir)
		if err != nil {
			return 0, fmt.Errorf("make spool: %w", err)
		}
		s.f, s.w = f, bufio.NewWriterSize(f, 256<<10)
	}
	m, err := io.CopyN(s.w, r, n)
	s.off += m
	if err != nil {
		return 0, noEOF(err)
	}
	return at, nil
}

func (s *spool) flush() error {
	if s.w == nil {
		return nil
	}
	return s.w.Flush()
}

func (s *spool) read(b []byte, at int64) error {
	if at < int64(len(s.mem)) {
		copy(b, s.mem[at:])
		return nil
	}
	_, err := s.f.ReadAt(b, at-int64(len(s.mem)))
	return noEOF(err)
}

func (s *spool) close() error {
	if s.f == nil {
		return nil
	}
	err := s.f.Close()
	s.f, s.w, s.mem = nil, nil, nil
	return err
}

// nameless makes a file that vanishes with its last descriptor, even if the process is killed.
func nameless(dir string) (*os.File, error) {
	if dir == "" {
		dir = os.TempDir()
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), dir+"/(nameless)"), nil
	}
	// Not every file system has O_TMPFILE.
	f, err := os.CreateTemp(dir, "spool-*")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func readFull(r io.Reader, b []byte) error {
	if len(b) == 0 {
		return nil
	}
	_, err := io.ReadFull(r, b)
	return noEOF(err)
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
