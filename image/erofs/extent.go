package erofs

import "errors"

// Extent is a part of a regular file's content: bytes of the image file, zeros, or, where a file has no place in the
// tree and with it none for its end, the bytes themselves.
type Extent struct {
	Size   int64
	Offset int64  // in the image file; with Hole and Data it means nothing
	Hole   bool   // zeros
	Data   []byte // at most 4000 bytes
}

// Extents says where the content of a regular file lies in the image, in order. The file may have been replaced in the
// tree by another one. It is to be called between Finish and Close.
func (w *Writer) Extents(i *Inode, f func(Extent) error) error {
	if !w.done {
		return errors.New("erofs: extents of an image that is not finished")
	}
	c := i.data
	if c.chunks == nil {
		if full := c.size - int64(c.tail); full > 0 {
			if err := f(Extent{Size: full, Offset: int64(c.block) << blockBits}); err != nil {
				return err
			}
		}
		return w.tailExtent(i, f)
	}
	// Chunks that follow each other, and holes that do, are one extent.
	var e Extent
	chunk := int64(1) << c.bits
	for n, block := range c.chunks {
		next := Extent{Size: min(chunk, c.size-int64(n)<<c.bits), Offset: int64(block) << blockBits, Hole: block == nullBlock}
		if e.Size > 0 && e.Hole == next.Hole && (e.Hole || e.Offset+e.Size == next.Offset) {
			e.Size += next.Size
			continue
		}
		if e.Size > 0 {
			if err := f(e); err != nil {
				return err
			}
		}
		e = next
	}
	return f(e)
}

// tailExtent is the end of a short file: behind its inode, or still in the spool.
func (w *Writer) tailExtent(i *Inode, f func(Extent) error) error {
	c := i.data
	switch {
	case c.tail == 0:
		return nil
	case i.placed:
		at := w.base + int64(i.nid)<<slotBits + inodeSize + int64(i.xattrSize())
		return f(Extent{Size: int64(c.tail), Offset: at})
	}
	b := make([]byte, c.tail)
	if err := w.spool.read(b, c.spool); err != nil {
		return err
	}
	return f(Extent{Size: int64(c.tail), Data: b})
}
