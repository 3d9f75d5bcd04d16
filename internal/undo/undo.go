// Package undo is the undo stack of a constructor that acquires several things: each acquisition pushes its release,
// a failure runs them in reverse, success keeps them.
//
//	var u undo.Stack
//	defer u.Run()
//	u.Push(func() { f.Close() })
//	…
//	u.Keep()
package undo

// Stack holds what is to be undone. The zero value is ready. It is for one goroutine.
type Stack struct{ fns []func() }

// Push adds an undo step.
func (s *Stack) Push(fn func()) { s.fns = append(s.fns, fn) }

// Run undoes everything pushed since the last Run or Keep, last first.
func (s *Stack) Run() {
	for i := len(s.fns) - 1; i >= 0; i-- {
		s.fns[i]()
	}
	s.fns = nil
}

// Keep forgets every step: the constructor succeeded.
func (s *Stack) Keep() { s.fns = nil }
