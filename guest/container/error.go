package container

// StartError says that a process could not start, with docker's exit code for it and docker's wording.
type StartError struct {
	Code int // 125 our own failure, 126 found but not executable, 127 not found
	Msg  string
}

func (e *StartError) Error() string { return e.Msg }
