package tsc

// counter reads the time stamp counter, after every earlier instruction is done.
func counter() uint64
