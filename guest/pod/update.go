package pod

import (
	"context"

	"github.com/kcradle/kcradle/spec"
)

// Update changes a container's limits and restart policy: of its present run at once, and of those that follow as long as
// the machine is up. change gets copies, whose pointers it must replace and not write through; when it fails, or the kernel
// refuses a limit, nothing of what later runs get has changed.
func (c *Container) Update(ctx context.Context, change func(*spec.Resources, *spec.Restart) error) error {
	if err := c.lock(ctx); err != nil {
		return err
	}
	defer c.unlock()
	c.mu.Lock()
	limits, policy := c.limits, c.policy
	c.mu.Unlock()
	if err := change(&limits, &policy); err != nil {
		return err
	}
	if r, err := c.current(); err == nil {
		if err := r.cgroup.Update(&limits.LinuxResources); err != nil {
			return c.wrap(err)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.limits, c.policy = limits, policy
	return nil
}
