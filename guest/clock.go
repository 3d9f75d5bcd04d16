package guest

import (
	"errors"
	"time"

	"github.com/kcradle/kcradle/guest/early"
	"github.com/kcradle/kcradle/spec"
)

// What the launch says of the time is late by the way into a guest that may have run little yet. So the guest asks, and takes the
// middle of question and answer; and it asks again whenever the host says that there is a reason.

// stepFrom is the error of the wall clock from which on it is set, and not made faster or slower for a while.
const stepFrom = 500 * time.Millisecond

// slowAnswer is how long an answer may be under way before it is asked for once more, and questions how often in a row.
const (
	slowAnswer = 20 * time.Millisecond
	questions  = 4
)

// ask asks the host for the time.
func (h *host) ask() error {
	return h.write(spec.FrameClock, spec.Clock{Echo: int64(early.SinceBoot())}.Append)
}

// clock takes an answer, or asks when the host says that it is time to.
func (h *host) clock(m Machine, b []byte) error {
	c, err := spec.ParseClock(b)
	if err != nil {
		return err
	}
	if c.Now.IsZero() || c.Echo == 0 {
		h.asked = 1
		return h.ask()
	}
	way := early.SinceBoot() - time.Duration(c.Echo)
	if way < 0 {
		return errors.New("the answer is older than the question")
	}
	if way > slowAnswer && h.asked < questions {
		h.asked++
		return h.ask()
	}
	behind := time.Until(c.Now.Add(way / 2))
	step, slew := correction(behind, way, !h.set)
	h.set = true
	if step != 0 {
		return m.Clock(time.Now().Add(step))
	}
	if slew != 0 {
		return m.Slew(slew)
	}
	return nil
}

// correction says what to do about a wall clock that is behind the host's, by the middle of an answer that was under way so long: the
// truth is half of that away at most. A clock that nobody has looked at yet may be set to be later; later on, and back, it is
// set only when it is quite wrong.
func correction(behind, way time.Duration, first bool) (step, slew time.Duration) {
	switch e := behind.Abs() - way/2; {
	case e <= 0:
		return 0, 0
	case e >= stepFrom, first && behind > 0:
		return behind, 0
	}
	return 0, behind
}
