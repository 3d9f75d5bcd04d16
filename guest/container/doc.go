// Package container starts processes in containers. What a start does is a table of system calls, made by a pure
// function from a configuration and run by a loop: on a thread of its own up to the point where the container's file
// system stands, then in the child that becomes the container's first process. No program of ours is executed in
// between.
//
//	cg, err := container.NewCgroup("/sys/fs/cgroup", id, resources)
//	p, err := container.Start(reaper, &container.Config{Rootfs: dir, Cgroup: cg, Process: proc, …}, stdio)
//	<-p.Done()
package container
