// Package lan joins machines of one host into an Ethernet segment.
//
// There is no switch that could fail or be flooded for all: a segment is a directory. Each machine on it has two names there, after its
// MAC address: a file that says who it is, and a socket that takes frames for it. Who has a frame for somebody looks there, and
// sends it. What a process that was killed leaves behind is a socket that nobody answers, and counts as nothing.
//
//	l, err := lan.Join(dir, lan.Member{MAC: mac, Addresses: addrs, Names: []string{"web"}}, toMachine)
//	defer l.Close()
//	l.Send(frame)
//	addrs := l.Lookup("db")
//
// The directory belongs to one user; who can write to it is trusted to be a supervisor, and keeps its own machine from sending as
// somebody else.
package lan

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds.
const (
	// MaxFrame is the largest frame that is carried.
	MaxFrame = 14 + 65535

	maxMembers  = 4096
	maxFile     = 64 << 10  // bytes of a member's file
	maxPending  = 256 << 10 // bytes that wait for one member; what comes beyond them is lost, as in any switch
	maxIncoming = 4096      // connections
	header      = 4         // length of a frame, big endian
	listenRetry = 100 * time.Millisecond
)

// MAC is an Ethernet address.
type MAC [6]byte

// Multicast says whether the address is one of a group; broadcast is one.
func (m MAC) Multicast() bool { return m[0]&1 != 0 }

func (m MAC) String() string { return net.HardwareAddr(m[:]).String() }

// MarshalText and UnmarshalText have it with colons.
func (m MAC) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText reads it.
func (m *MAC) UnmarshalText(b []byte) error {
	a, err := net.ParseMAC(string(b))
	if err != nil || len(a) != len(m) {
		return fmt.Errorf("%q is no Ethernet address", b)
	}
	*m = MAC(a)
	return nil
}

func (m MAC) file() string { return hex.EncodeToString(m[:]) }

// Names in the directory.
const (
	fileSuffix   = ".json"
	socketSuffix = ".sock"
)

// Files are the names that a member has in the directory.
func Files(m MAC) []string { return []string{m.file() + fileSuffix, m.file() + socketSuffix} }

// Member is who is on a segment.
type Member struct {
	MAC       MAC          `json:"mac"`
	Addresses []netip.Addr `json:"addresses"`
	Names     []string     `json:"names,omitempty"` // without a dot at the end; the first is the one an address resolves to
}

// LAN is a membership.
type LAN struct {
	path    string
	dir     *os.File
	deliver func([]byte)
	gone    chan struct{} // closed by Close
	wg      sync.WaitGroup

	mu       sync.Mutex
	self     Member
	listener *net.UnixListener
	incoming map[net.Conn]bool
	members  map[MAC]*peer
	stamp    time.Time // of the directory as last read
	closed   bool
}

// Join joins a segment. deliver gets the frames that come, one at a time from each other member; the bytes are valid during the
// call alone. A name that is there already under this MAC address is that of a process which has ended.
func Join(dir string, self Member, deliver func(frame []byte)) (_ *LAN, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("join network %s: %w", dir, err)
		}
	}()
	if self.MAC.Multicast() || self.MAC == (MAC{}) {
		return nil, fmt.Errorf("%s is not the address of one machine", self.MAC)
	}
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	l := &LAN{path: dir, dir: d, self: self, deliver: deliver, gone: make(chan struct{}), incoming: map[net.Conn]bool{}, members: map[MAC]*peer{}}
	name := filepath.Join(dir, self.MAC.file()+socketSuffix)
	if err := os.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, errors.Join(err, d.Close())
	}
	if l.listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: l.short(self.MAC.file() + socketSuffix), Net: "unix"}); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	l.listener.SetUnlinkOnClose(false) // by a name that is ours alone: see Close
	if err := l.write(); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	l.wg.Go(l.accept)
	return l, nil
}

// short is a name in the directory that fits into a socket's address, however long the directory's own is.
func (l *LAN) short(name string) string {
	return "/proc/self/fd/" + strconv.Itoa(int(l.dir.Fd())) + "/" + name
}

// write writes the file that says who this is.
func (l *LAN) write() error {
	b, err := json.Marshal(l.self)
	if err != nil {
		return err
	}
	if len(b) > maxFile {
		return fmt.Errorf("%d bytes of names are more than the limit of %d", len(b), maxFile)
	}
	f, err := os.CreateTemp(l.path, ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), filepath.Join(l.path, l.self.MAC.file()+fileSuffix))
	}
	if err != nil {
		os.Remove(f.Name())
	}
	return err
}

// Rename gives the machine other names.
func (l *LAN) Rename(names []string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || slices.Equal(l.self.Names, names) {
		return nil
	}
	l.self.Names = names
	return l.write()
}

// Leave makes the others forget this machine and ends all connections. It does not wait.
func (l *LAN) Leave() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	close(l.gone)
	for _, suffix := range []string{fileSuffix, socketSuffix} {
		_ = os.Remove(filepath.Join(l.path, l.self.MAC.file()+suffix)) // what is left counts as nothing
	}
	_ = l.listener.Close()
	for c := range l.incoming {
		_ = c.Close()
	}
	for _, p := range l.members {
		p.close()
	}
}

// Close leaves the segment and waits until no frame is delivered any more.
func (l *LAN) Close() error {
	l.Leave()
	l.wg.Wait()
	return l.dir.Close()
}

func (l *LAN) accept() {
	for {
		c, err := l.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // out of descriptors, for example: it passes
			select {
			case <-l.gone:
				return
			case <-time.After(listenRetry):
			}
			continue
		}
		l.mu.Lock()
		full := l.closed || len(l.incoming) >= maxIncoming
		if !full {
			l.incoming[c] = true
			l.wg.Go(func() {
				_ = ReadFrames(c, MaxFrame, l.deliver) // a member that speaks nonsense is not heard
				l.mu.Lock()
				delete(l.incoming, c)
				l.mu.Unlock()
				_ = c.Close()
			})
		}
		l.mu.Unlock()
		if full {
			_ = c.Close()
		}
	}
}

// ErrFrame says that two sides no longer agree on where frames begin.
var ErrFrame = errors.New("frame longer than the limit")

// ReadFrames calls deliver with each frame of r, which is behind its length of four bytes, big endian, until r ends; the frame
// is only valid during the call. A stream that ends between frames ends with nil.
func ReadFrames(r io.Reader, limit int, deliver func([]byte)) error {
	buf := make([]byte, 2*(limit+header))
	var start, end int
	for {
		n, err := r.Read(buf[end:])
		end += n
		for end-start >= header {
			size := binary.BigEndian.Uint32(buf[start:])
			if size > uint32(limit) {
				return fmt.Errorf("read frame of %d bytes: %w", size, ErrFrame)
			}
			next := start + header + int(size)
			if next > end {
				break
			}
			deliver(buf[start+header : next])
			start = next
		}
		switch {
		case start == end:
			start, end = 0, 0
		case start > 0 && len(buf)-end < limit+header:
			end = copy(buf, buf[start:end])
			start = 0
		}
		if err != nil {
			if err == io.EOF && end > start {
				return io.ErrUnexpectedEOF
			}
			if err == io.EOF {
				return nil
			}
			return err
		}
	}
}

// Send sends a frame to the member it is for. It never waits for that member, and what does not fit is lost. It reports whether
// there is one.
func (l *LAN) Send(frame []byte) bool {
	if len(frame) < 14 || len(frame) > MaxFrame {
		return false
	}
	p := l.peer(MAC(frame))
	return p != nil && p.send(frame)
}

// Flood sends a frame to all others.
func (l *LAN) Flood(frame []byte) {
	if len(frame) < 14 || len(frame) > MaxFrame {
		return
	}
	for _, p := range l.all() {
		p.send(frame)
	}
}

// Neighbour returns the Ethernet address of whoever has that address and lives.
func (l *LAN) Neighbour(a netip.Addr) (MAC, bool) {
	for _, p := range l.all() {
		if slices.Contains(p.Addresses, a) && p.alive() {
			return p.MAC, true
		}
	}
	return MAC{}, false
}

// Lookup returns the addresses of those who have that name and live, this machine among them.
func (l *LAN) Lookup(name string) (out []netip.Addr) {
	has := func(m Member) bool {
		return slices.ContainsFunc(m.Names, func(n string) bool { return strings.EqualFold(n, name) })
	}
	for _, p := range l.all() {
		if has(p.Member) && p.alive() {
			out = append(out, p.Addresses...)
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if has(l.self) {
		out = append(out, l.self.Addresses...)
	}
	return out
}

// Reverse returns the name of whoever has that address.
func (l *LAN) Reverse(a netip.Addr) (string, bool) {
	l.mu.Lock()
	self := l.self
	l.mu.Unlock()
	if slices.Contains(self.Addresses, a) && len(self.Names) > 0 {
		return self.Names[0], true
	}
	for _, p := range l.all() {
		if slices.Contains(p.Addresses, a) && len(p.Names) > 0 && p.alive() {
			return p.Names[0], true
		}
	}
	return "", false
}

// peer is another member, nil when there is none.
func (l *LAN) peer(m MAC) *peer {
	l.mu.Lock()
	defer l.mu.Unlock()
	p := l.members[m]
	if p == nil {
		l.refreshLocked()
		p = l.members[m]
	}
	return p
}

// all are the other members.
func (l *LAN) all() []*peer {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refreshLocked()
	out := make([]*peer, 0, len(l.members))
	for _, p := range l.members {
		out = append(out, p)
	}
	slices.SortFunc(out, func(a, b *peer) int { return bytes.Compare(a.MAC[:], b.MAC[:]) })
	return out
}

// tick is longer than the time stamp of a directory may stand still while the directory changes.
const tick = 50 * time.Millisecond

// refreshLocked reads the directory when it has changed.
func (l *LAN) refreshLocked() {
	if l.closed {
		return
	}
	info, err := os.Stat(l.path)
	if err != nil || info.ModTime().Equal(l.stamp) {
		return // a directory that is gone has nobody new
	}
	entries, err := os.ReadDir(l.path)
	if err != nil {
		return
	}
	l.stamp = info.ModTime()
	if age := time.Since(l.stamp); age < tick && age > -tick {
		l.stamp = time.Time{} // it may change again without a sign
	}
	there := map[MAC]bool{}
	for _, e := range entries {
		m, ok := l.readMember(e.Name())
		if !ok || m.MAC == l.self.MAC || len(there) >= maxMembers {
			continue
		}
		there[m.MAC] = true
		switch old := l.members[m.MAC]; {
		case old == nil:
			l.members[m.MAC] = &peer{Member: m, lan: l}
		case !slices.Equal(old.Names, m.Names) || !slices.Equal(old.Addresses, m.Addresses):
			old.close()
			l.members[m.MAC] = &peer{Member: m, lan: l}
		}
	}
	for mac, p := range l.members {
		if !there[mac] {
			p.close()
			delete(l.members, mac)
		}
	}
}

// readMember reads one file; what is none is passed over.
func (l *LAN) readMember(name string) (m Member, ok bool) {
	base, ok := strings.CutSuffix(name, fileSuffix)
	if !ok || len(base) != 2*len(m.MAC) {
		return m, false
	}
	f, err := os.Open(filepath.Join(l.path, name))
	if err != nil {
		return m, false
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil || len(b) > maxFile || json.Unmarshal(b, &m) != nil || m.MAC.file() != base || m.MAC.Multicast() {
		return m, false
	}
	return m, true
}

// peer is what leads to another member.
type peer struct {
	Member
	lan *LAN

	mu      sync.Mutex
	conn    net.Conn // nil: none
	pending []byte   // frames that nobody writes yet
	spare   []byte
	writing bool
	closed  bool
}

// sendBuffer is what the kernel holds for one member, as far as it allows that much.
const sendBuffer = 512 << 10

// dialLocked connects, if nothing is connected.
func (p *peer) dialLocked() bool {
	if p.closed || p.conn != nil {
		return p.conn != nil
	}
	// Connecting to a socket of this host does not wait: it succeeds, or is refused.
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: p.lan.short(p.MAC.file() + socketSuffix), Net: "unix"})
	if err != nil {
		return false
	}
	_ = c.SetWriteBuffer(sendBuffer)
	p.conn = c
	// Nothing comes this way but the end.
	p.lan.wg.Go(func() {
		_, _ = io.Copy(io.Discard, c)
		_ = c.Close()
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.conn == c {
			p.conn, p.pending = nil, p.pending[:0]
		}
	})
	return true
}

// alive says whether the member answers.
func (p *peer) alive() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dialLocked()
}

func (p *peer) send(frame []byte) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.dialLocked() {
		return false
	}
	if len(p.pending)+header+len(frame) > maxPending {
		return true
	}
	p.pending = append(binary.BigEndian.AppendUint32(p.pending, uint32(len(frame))), frame...)
	if !p.writing {
		p.writing = true
		p.lan.wg.Go(p.flush)
	}
	return true
}

// flush writes what is pending until nothing is.
func (p *peer) flush() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.pending) > 0 && p.conn != nil {
		buf, c := p.pending, p.conn
		p.pending, p.spare = p.spare[:0], nil
		p.mu.Unlock()
		_, err := c.Write(buf)
		p.mu.Lock()
		p.spare = buf
		if err != nil {
			_ = c.Close()
			if p.conn == c {
				p.conn = nil
			}
			p.pending = p.pending[:0]
		}
	}
	p.writing = false
}

func (p *peer) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	if p.conn != nil {
		_ = p.conn.Close()
		p.conn = nil
	}
}
