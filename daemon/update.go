package daemon

import (
	"cmp"
	"context"
	"encoding/json"
	"net/http"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/events"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/spec"
)

// update changes limits and restart policy: of the running container at once, and of every later start.
func (d *Daemon) update(w http.ResponseWriter, r *dockerapi.Request) error {
	var raw json.RawMessage
	if err := dockerapi.ReadJSON(r, &raw, false); err != nil {
		return err
	}
	var q container.UpdateConfig
	if err := json.Unmarshal(raw, &q); err != nil {
		return dockerapi.BadRequest("invalid JSON: %w", err)
	}
	c, err := d.find(r.Var("id"))
	if err != nil {
		return err
	}
	c.life.Lock()
	defer c.life.Unlock()
	f := c.look()
	host := f.rec.HostConfig
	mergeResources(&host.Resources, &q.Resources)
	if q.RestartPolicy.Name != "" {
		if host.AutoRemove && q.RestartPolicy.Name != container.RestartPolicyDisabled {
			return dockerapi.Conflict("Restart policy cannot be updated because AutoRemove is enabled for the container")
		}
		host.RestartPolicy = q.RestartPolicy
	}
	check := request{CreateRequest: container.CreateRequest{Config: &container.Config{}, HostConfig: &host}}
	for _, x := range refusals(&check) {
		if x.set {
			return dockerapi.BadRequest("%s is refused: %s", x.field, x.why)
		}
	}
	limits, err := resources(&host.Resources)
	if err != nil {
		return err
	}
	policy, err := restart(&host)
	if err != nil {
		return err
	}
	answer := container.UpdateResponse{}
	if f.running() {
		if err := c.ask(context.WithoutCancel(r.Context()), c.d.bounds.patience, "POST", c.path("/update"), nil, raw, &answer); err != nil {
			return err
		}
	}
	pod := *c.b.Pod
	pod.Containers = append([]spec.Container(nil), pod.Containers...)
	pod.Containers[0].Resources, pod.Containers[0].Restart = *limits, policy
	if err := c.b.SetPod(&pod); err != nil {
		return err
	}
	c.mu.Lock()
	c.rec.HostConfig = host
	err = c.saveLocked()
	c.mu.Unlock()
	if err != nil {
		return err
	}
	if !f.running() { // else its machine has said so
		c.emit(events.ContainerEventType, events.ActionUpdate, nil)
	}
	answer.Warnings = append([]string{}, answer.Warnings...)
	return dockerapi.WriteJSON(w, http.StatusOK, answer)
}

// mergeResources changes what an update names; zero leaves a limit as it is.
func mergeResources(into, from *container.Resources) {
	into.CPUShares = cmp.Or(from.CPUShares, into.CPUShares)
	into.Memory = cmp.Or(from.Memory, into.Memory)
	into.MemorySwap = cmp.Or(from.MemorySwap, into.MemorySwap)
	into.MemoryReservation = cmp.Or(from.MemoryReservation, into.MemoryReservation)
	into.CPUPeriod = cmp.Or(from.CPUPeriod, into.CPUPeriod)
	into.CPUQuota = cmp.Or(from.CPUQuota, into.CPUQuota)
	into.NanoCPUs = cmp.Or(from.NanoCPUs, into.NanoCPUs)
	into.CpusetCpus = cmp.Or(from.CpusetCpus, into.CpusetCpus)
	into.CpusetMems = cmp.Or(from.CpusetMems, into.CpusetMems)
	into.BlkioWeight = cmp.Or(from.BlkioWeight, into.BlkioWeight)
	into.PidsLimit = cmp.Or(from.PidsLimit, into.PidsLimit)
}
