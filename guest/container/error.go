package container

import (
	"errors"
	"fmt"
	"syscall"
)

// StartError says that a process could not start, with docker's exit code for it and docker's wording.
type StartError struct {
	Code int // 125 our own failure, 126 found but not executable, 127 not found
	Msg  string
	Err  error // what the system said; may be nil
}

func (e *StartError) Error() string { return e.Msg }

func (e *StartError) Unwrap() error { return e.Err }

// AsStartError makes a StartError of any error: what is none already is a failure of our own, code 125.
func AsStartError(err error) *StartError {
	var se *StartError
	if errors.As(err, &se) {
		return se
	}
	return &StartError{Code: 125, Msg: err.Error(), Err: err}
}

// failure puts a failed step into docker's words. name is the program as the user wrote it.
func failure(steps []Step, out outcome, name string) error {
	errno := syscall.Errno(out.errno)
	if int(out.step) >= len(steps) {
		// Every candidate along PATH was tried.
		return &StartError{
			Code: 127,
			Msg:  fmt.Sprintf("unable to start container process: exec: %q: executable file not found in $PATH", name),
			Err:  syscall.ENOENT,
		}
	}
	s := steps[out.step]
	switch s.kind {
	case kindChdir:
		return &StartError{
			Code: 126,
			Msg:  fmt.Sprintf("unable to start container process: chdir to cwd (%q) set in config.json failed: %v", s.path, errno),
			Err:  errno,
		}
	case kindExec:
		e := &StartError{Code: 126, Err: errno}
		switch errno {
		case syscall.ENOENT, syscall.ENOTDIR:
			e.Code = 127
			e.Msg = fmt.Sprintf("unable to start container process: exec: %q: stat %s: %v", name, s.path, errno)
		case syscall.EISDIR:
			e.Msg = fmt.Sprintf("unable to start container process: exec: %q: is a directory", name)
		case syscall.EACCES:
			e.Msg = fmt.Sprintf("unable to start container process: exec: %q: permission denied", name)
		default:
			e.Msg = fmt.Sprintf("unable to start container process: exec %s: %v", s.path, errno)
		}
		return e
	}
	return &StartError{
		Code: 125,
		Msg:  fmt.Sprintf("unable to start container process: %s: %v", s.Text(), errno),
		Err:  errno,
	}
}
