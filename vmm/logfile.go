package vmm

import (
	"os"
	"sync"
)

// tailSize is how much of QEMU's stderr and of the console is kept in memory.
const tailSize = 16 << 10

// tail keeps the last bytes written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

func (t *tail) Write(b []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, b[max(0, len(b)-tailSize):]...)
	if len(t.buf) > 2*tailSize {
		t.buf = append(t.buf[:0], t.buf[len(t.buf)-tailSize:]...)
	}
	return len(b), nil
}

func (t *tail) bytes() []byte {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]byte(nil), t.buf[max(0, len(t.buf)-tailSize):]...)
}

// boundedFile is a log of at most limit bytes: at half of it the file becomes path.old and a new one begins.
type boundedFile struct {
	path  string
	limit int64
	f     *os.File
	size  int64
}

func createBounded(path string, limit int64) (*boundedFile, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	_ = os.Remove(path + ".old")
	return &boundedFile{path: path, limit: limit, f: f}, nil
}

// Write never splits b, so a log line stays in one file when it comes in one piece.
func (l *boundedFile) Write(b []byte) (int, error) {
	if int64(len(b)) > l.limit/2 {
		b = b[int64(len(b))-l.limit/2:]
	}
	if l.size+int64(len(b)) > l.limit/2 {
		if err := l.turn(); err != nil {
			return 0, err
		}
	}
	n, err := l.f.Write(b)
	l.size += int64(n)
	return n, err
}

func (l *boundedFile) turn() error {
	if err := os.Rename(l.path, l.path+".old"); err != nil {
		return err
	}
	f, err := os.OpenFile(l.path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_ = l.f.Close()
	l.f, l.size = f, 0
	return nil
}

func (l *boundedFile) Close() error { return l.f.Close() }
