package spec

import (
	"encoding/binary"
	"fmt"
	"time"
)

// Clock is the payload of FrameClock. From the guest it is a question: Echo is the guest's own time of asking, in
// nanoseconds of a clock that only the guest knows, and comes back with the answer. From the host it is the answer, or, without
// an Echo, the advice to ask: the host's clock was set, or time went by.
//
// On the stream it is two int64, big endian: nanoseconds since 1970, and Echo; zero where there is none.
type Clock struct {
	Now  time.Time
	Echo int64
}

const clockSize = 16

// Append encodes c behind b.
func (c Clock) Append(b []byte) []byte {
	var now int64
	if !c.Now.IsZero() {
		now = c.Now.UnixNano()
	}
	b = binary.BigEndian.AppendUint64(b, uint64(now))
	return binary.BigEndian.AppendUint64(b, uint64(c.Echo))
}

// ParseClock decodes the payload of a FrameClock.
func ParseClock(b []byte) (c Clock, err error) {
	if len(b) != clockSize {
		return c, fmt.Errorf("parse clock: got %d bytes, want %d", len(b), clockSize)
	}
	if now := int64(binary.BigEndian.Uint64(b)); now != 0 {
		c.Now = time.Unix(0, now)
	}
	c.Echo = int64(binary.BigEndian.Uint64(b[8:]))
	return c, nil
}
