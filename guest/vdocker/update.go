package vdocker

import (
	"fmt"
	"net/http"
	"reflect"

	"github.com/moby/moby/api/types/container"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/spec"
)

// minMemory is the least memory limit docker takes, in bytes.
const minMemory = 6 << 20

// update is docker update: what is zero stays as it is.
func (s *server) update(w http.ResponseWriter, k call) error {
	var asked container.UpdateConfig
	if err := dockerapi.ReadJSON(k.Request, &asked, false); err != nil {
		return err
	}
	if err := checkResources(asked.Resources); err != nil {
		return err
	}
	if err := checkPolicy(asked.RestartPolicy); err != nil {
		return err
	}
	if err := k.c.Update(k.Context(), func(r *spec.Resources, p *spec.Restart) error {
		if asked.RestartPolicy.Name != "" {
			*p = spec.Restart{Name: string(asked.RestartPolicy.Name), MaxRetries: asked.RestartPolicy.MaximumRetryCount}
		}
		return updateResources(&r.LinuxResources, asked.Resources)
	}); err != nil {
		return fmt.Errorf("cannot update container %s: %w", k.c.ID(), err)
	}
	k.emit("update", nil)
	return dockerapi.WriteJSON(w, http.StatusOK, container.UpdateResponse{Warnings: []string{}})
}

// checkResources refuses what is wrong whatever the container has.
func checkResources(r container.Resources) error {
	if name := unchangeable(r); name != "" {
		return dockerapi.Errorf(http.StatusNotImplemented, "%s cannot be changed while the pod runs", name)
	}
	for _, c := range []struct {
		wrong   bool
		message string
	}{
		{r.Memory != 0 && r.Memory < minMemory, "Minimum memory limit allowed is 6MB"},
		{r.Memory > 0 && r.MemorySwap > 0 && r.MemorySwap < r.Memory, "Minimum memoryswap limit should be larger than memory limit, see usage"},
		{r.Memory > 0 && r.MemoryReservation > r.Memory, "Minimum memory limit can not be less than memory reservation limit, see usage"},
		{r.NanoCPUs > 0 && r.CPUPeriod > 0, "Conflicting options: Nano CPUs and CPU Period cannot both be set."},
		{r.NanoCPUs > 0 && r.CPUQuota > 0, "Conflicting options: Nano CPUs and CPU Quota cannot both be set."},
		{r.NanoCPUs < 0, "range of CPUs is from 0.01 upwards"},
		{r.CPUPeriod != 0 && (r.CPUPeriod < 1000 || r.CPUPeriod > 1000000), "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)"},
		{r.CPUQuota > 0 && r.CPUQuota < 1000, "CPU cfs quota can not be less than 1ms (i.e. 1000)"},
		{r.CPUShares < 0, "CPU shares cannot be negative"},
		{r.BlkioWeight != 0 && (r.BlkioWeight < 10 || r.BlkioWeight > 1000), "Range of blkio weight is from 10 to 1000"},
	} {
		if c.wrong {
			return dockerapi.BadRequest("%s", c.message)
		}
	}
	return nil
}

func checkPolicy(p container.RestartPolicy) error {
	switch p.Name {
	case "":
	case container.RestartPolicyAlways, container.RestartPolicyUnlessStopped, container.RestartPolicyDisabled:
		if p.MaximumRetryCount != 0 {
			return dockerapi.BadRequest("invalid restart policy: maximum retry count can only be used with 'on-failure'")
		}
	case container.RestartPolicyOnFailure:
		if p.MaximumRetryCount < 0 {
			return dockerapi.BadRequest("invalid restart policy: maximum retry count cannot be negative")
		}
	default:
		return dockerapi.BadRequest("invalid restart policy: unknown policy '%s'; use one of 'no', 'always', 'on-failure', or 'unless-stopped'", p.Name)
	}
	return nil
}

// updateResources merges what is asked for into limits. Pointers are replaced, never written through.
func updateResources(r *specs.LinuxResources, asked container.Resources) error {
	if err := updateMemory(r, asked); err != nil {
		return err
	}
	if err := updateCPU(r, asked); err != nil {
		return err
	}
	if asked.PidsLimit != nil { // here 0 asks for something: no limit
		limit := *asked.PidsLimit
		if limit <= 0 {
			limit = -1
		}
		r.Pids = &specs.LinuxPids{Limit: &limit}
	}
	if asked.BlkioWeight != 0 {
		io := specs.LinuxBlockIO{}
		if r.BlockIO != nil {
			io = *r.BlockIO
		}
		io.Weight = &asked.BlkioWeight
		r.BlockIO = &io
	}
	return nil
}

func updateMemory(r *specs.LinuxResources, asked container.Resources) error {
	m := specs.LinuxMemory{}
	if r.Memory != nil {
		m = *r.Memory
	}
	switch {
	case asked.Memory > 0 && asked.MemorySwap == 0 && m.Swap != nil && *m.Swap > 0 && asked.Memory > *m.Swap:
		return dockerapi.BadRequest("Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same time")
	case asked.MemorySwap > 0 && asked.Memory == 0 && m.Limit == nil:
		return dockerapi.BadRequest("You should always set the Memory limit when using Memoryswap limit, see usage")
	case asked.MemorySwap > 0 && asked.Memory == 0 && asked.MemorySwap < *m.Limit:
		return dockerapi.BadRequest("Minimum memoryswap limit should be larger than memory limit, see usage")
	}
	for _, s := range []struct {
		to **int64
		v  int64
	}{{&m.Limit, asked.Memory}, {&m.Swap, asked.MemorySwap}, {&m.Reservation, asked.MemoryReservation}} {
		if s.v != 0 {
			*s.to = &s.v
		}
	}
	if m != (specs.LinuxMemory{}) {
		r.Memory = &m
	}
	return nil
}

// cpuPeriod is what --cpus is a share of, in microseconds.
const cpuPeriod = 100_000

func updateCPU(r *specs.LinuxResources, asked container.Resources) error {
	c := specs.LinuxCPU{}
	if r.CPU != nil {
		c = *r.CPU
	}
	const conflict = "Conflicting options: %s cannot be updated as %s has already been set"
	// A limit given as --cpus stands as a quota of the usual period.
	byCPUs := c.Quota != nil && c.Period != nil && *c.Quota > 0 && *c.Period == cpuPeriod
	switch {
	case asked.NanoCPUs > 0 && !byCPUs && c.Period != nil:
		return dockerapi.BadRequest(conflict, "Nano CPUs", "CPU Period")
	case asked.NanoCPUs > 0 && !byCPUs && c.Quota != nil:
		return dockerapi.BadRequest(conflict, "Nano CPUs", "CPU Quota")
	case asked.CPUPeriod > 0 && asked.CPUQuota != 0: // both anew, whatever they stood for
	case asked.CPUPeriod > 0 && byCPUs:
		return dockerapi.BadRequest(conflict, "CPU Period", "NanoCPUs")
	case asked.CPUQuota > 0 && byCPUs:
		return dockerapi.BadRequest(conflict, "CPU Quota", "NanoCPUs")
	}
	if asked.NanoCPUs != 0 {
		period, quota := uint64(cpuPeriod), asked.NanoCPUs/(1e9/cpuPeriod)
		c.Period, c.Quota = &period, &quota
	}
	if asked.CPUPeriod != 0 {
		period := uint64(asked.CPUPeriod)
		c.Period = &period
	}
	if asked.CPUQuota != 0 {
		c.Quota = &asked.CPUQuota
	}
	if asked.CPUShares != 0 {
		shares := uint64(asked.CPUShares)
		c.Shares = &shares
	}
	if asked.CpusetCpus != "" {
		c.Cpus = asked.CpusetCpus
	}
	if asked.CpusetMems != "" {
		c.Mems = asked.CpusetMems
	}
	if !reflect.ValueOf(c).IsZero() {
		r.CPU = &c
	}
	return nil
}

// unchangeable names a field that is set and that nothing here can change.
func unchangeable(asked container.Resources) string {
	changeable := container.Resources{
		Memory: asked.Memory, MemorySwap: asked.MemorySwap, MemoryReservation: asked.MemoryReservation,
		NanoCPUs: asked.NanoCPUs, CPUPeriod: asked.CPUPeriod, CPUQuota: asked.CPUQuota, CPUShares: asked.CPUShares,
		CpusetCpus: asked.CpusetCpus, CpusetMems: asked.CpusetMems, PidsLimit: asked.PidsLimit, BlkioWeight: asked.BlkioWeight,
	}
	a, b := reflect.ValueOf(asked), reflect.ValueOf(changeable)
	for i := range a.NumField() {
		f := a.Field(i)
		empty := f.IsZero() || f.Kind() == reflect.Slice && f.Len() == 0 ||
			f.Kind() == reflect.Pointer && f.Elem().IsZero()
		if !empty && b.Field(i).IsZero() {
			return a.Type().Field(i).Name
		}
	}
	return ""
}
