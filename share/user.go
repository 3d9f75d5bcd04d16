package share

import (
	"encoding/binary"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/hugelgupf/p9/linux"
	"github.com/hugelgupf/p9/p9"
)

// The 9P server library does not tell its back end which user attached, but Linux attaches once per user and means new
// files to belong to that user. So userReader rewrites the attach request on its way in: the name of the tree becomes
// "u<uid>", and crossroads, the directory above the tree, leads that name to the root as that user.
//
// Source of the layout: the 9P2000.u/.L Tattach message, size[4] type[1] tag[2] fid[4] afid[4] uname[s] aname[s]
// n_uname[4], where s is a string with a two-byte length, all little endian.
const (
	typeAttach    = 104
	typeFlush     = 108 // size[4] type[1] tag[2] oldtag[2]
	flushSize     = 9
	headerSize    = 4 + 1 + 2
	maxAttachSize = 4096
	maxMessage    = 8 << 20 // above the largest message size the server negotiates
)

// userReader passes a stream of 9P messages through, rewrites attach requests and refuses what would stall the server.
type userReader struct {
	r    io.ReadCloser
	buf  []byte // rewritten or header bytes not yet read
	rest uint32 // bytes of the current message that follow unchanged
	err  error  // a message that no client of ours sends
}

func (u *userReader) Close() error { return u.r.Close() }

func (u *userReader) Read(p []byte) (int, error) {
	for len(u.buf) == 0 && u.rest == 0 {
		if err := u.next(); err != nil {
			return 0, err
		}
	}
	if len(u.buf) > 0 {
		n := copy(p, u.buf)
		u.buf = u.buf[n:]
		return n, nil
	}
	if uint32(len(p)) > u.rest {
		p = p[:u.rest]
	}
	n, err := u.r.Read(p)
	u.rest -= uint32(n)
	return n, err
}

// next reads the header of a message, and the whole of an attach request.
func (u *userReader) next() error {
	var h [headerSize]byte
	if _, err := io.ReadFull(u.r, h[:]); err != nil {
		return err
	}
	size := binary.LittleEndian.Uint32(h[:])
	if size < headerSize || size > maxMessage {
		u.err = fmt.Errorf("9P message of %d bytes", size)
		return u.err
	}
	switch h[4] {
	case typeFlush:
		return u.flush(h, size)
	case typeAttach:
	default:
		u.buf, u.rest = h[:], size-headerSize
		return nil
	}
	if size > maxAttachSize {
		u.err = fmt.Errorf("9P attach request of %d bytes", size)
		return u.err
	}
	body := make([]byte, size-headerSize)
	if _, err := io.ReadFull(u.r, body); err != nil {
		return err
	}
	u.buf, u.err = rewriteAttach(h, body)
	return u.err
}

// flush passes a flush request through, unless it waits for itself: the server would never answer it, nor ever end.
func (u *userReader) flush(h [headerSize]byte, size uint32) error {
	var oldtag [2]byte
	if size != flushSize {
		u.err = fmt.Errorf("9P flush request of %d bytes", size)
		return u.err
	}
	if _, err := io.ReadFull(u.r, oldtag[:]); err != nil {
		return err
	}
	if oldtag[0] == h[5] && oldtag[1] == h[6] {
		u.err = fmt.Errorf("9P flush request for its own tag")
		return u.err
	}
	u.buf = append(h[:], oldtag[:]...)
	return nil
}

func rewriteAttach(h [headerSize]byte, body []byte) ([]byte, error) {
	fids, rest := body, body
	if len(body) < 8 {
		return nil, fmt.Errorf("9P attach request of %d bytes", len(body))
	}
	fids, rest = body[:8], body[8:]
	uname, rest, ok := cutString(rest)
	if !ok {
		return nil, fmt.Errorf("9P attach request: user name is cut short")
	}
	_, rest, ok = cutString(rest)
	if !ok || len(rest) != 4 {
		return nil, fmt.Errorf("9P attach request: want the numeric user at its end")
	}
	name := "u" + strconv.FormatUint(uint64(binary.LittleEndian.Uint32(rest)), 10)
	out := append([]byte(nil), h[:]...)
	out = append(out, fids...)
	out = append(out, uname...)
	out = binary.LittleEndian.AppendUint16(out, uint16(len(name)))
	out = append(out, name...)
	out = append(out, rest...)
	binary.LittleEndian.PutUint32(out, uint32(len(out)))
	return out, nil
}

// cutString cuts a 9P string, its length included, off b.
func cutString(b []byte) (s, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n := 2 + int(binary.LittleEndian.Uint16(b))
	if len(b) < n {
		return nil, nil, false
	}
	return b[:n], b[n:], true
}

// crossroads is the directory above the tree: its only names are users.
type crossroads struct {
	refuseAll
	s *Share
}

func (c *crossroads) Walk(names []string) ([]p9.QID, p9.File, error) {
	if len(names) == 0 {
		return nil, &crossroads{s: c.s}, nil
	}
	digits, ok := strings.CutPrefix(names[0], "u")
	uid, err := strconv.ParseUint(digits, 10, 32)
	if !ok || err != nil || len(names) != 1 {
		return nil, nil, linux.ENOENT
	}
	root, err := c.s.attach(p9.UID(uid))
	if err != nil {
		return nil, nil, err
	}
	qid, _, _, err := root.GetAttr(p9.AttrMaskAll)
	if err != nil {
		root.Close()
		return nil, nil, err
	}
	return []p9.QID{qid}, root, nil
}

// GetAttr describes a directory, which is all that the server asks before it walks on.
func (c *crossroads) GetAttr(p9.AttrMask) (p9.QID, p9.AttrMask, p9.Attr, error) {
	return p9.QID{Type: p9.TypeDir}, p9.AttrMask{Mode: true}, p9.Attr{Mode: p9.ModeDirectory | 0o555}, nil
}
