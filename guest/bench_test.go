package guest_test

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/kcradle/kcradle/guest/guesttest"
	"github.com/kcradle/kcradle/internal/vmtest"
	"github.com/kcradle/kcradle/spec"
)

// BenchmarkLaunch measures, in a machine that is ready, from the pod's frames to the first byte of its container's output,
// as time and as QEMU's processor time, which a busy host distorts less:
//
//	go test ./guest -run '^$' -bench Launch -benchtime 5x
func BenchmarkLaunch(b *testing.B) {
	init := vmtest.Build(b, "github.com/kcradle/kcradle/cmd/init")
	var first, cpu, boots []time.Duration
	phases := map[string][]int64{}
	for b.Loop() {
		b.StopTimer()
		d := makeDisks(b)
		vm := d.boot(b, vmtest.Options{InitFile: init})
		conn := vm.Dial(spec.PortControl)
		c := spec.Container{Name: "web", Image: spec.Image{Layers: d.layers}, Cmd: []string{"echo", "hello"}}
		boot := cpuTime(b, vm.PID())
		b.StartTimer()
		began := time.Now()
		h := guesttest.Launch(b, conn, &spec.Pod{Containers: []spec.Container{c}}, &d.place)
		h.AwaitOutput(0, 1, "hello")
		first = append(first, time.Since(began))
		b.StopTimer()
		used := cpuTime(b, vm.PID())
		cpu = append(cpu, used-boot)
		boots = append(boots, boot)
		done := h.Done()
		last := done.Phases["ready"]
		for _, p := range []string{"launch", "clock", "network", "disks", "shares", "containers", "start", "stop", "unmount"} {
			phases[p] = append(phases[p], done.Phases[p]-last)
			last = done.Phases[p]
		}
		conn.Close()
		vm.Kill()
		vm.Wait()
		b.StartTimer()
	}
	for name, times := range map[string][]time.Duration{"first-byte": first, "first-byte-cpu": cpu, "boot-cpu": boots} {
		slices.Sort(times)
		b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, "ms/"+name)
	}
	for p, times := range phases {
		slices.Sort(times)
		b.ReportMetric(float64(times[len(times)/2])/1e6, "ms/"+p)
	}
}

// cpuTime is the processor time that a process has used.
func cpuTime(b *testing.B, pid int) time.Duration {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		b.Fatal(err)
	}
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	var ticks int64
	for _, w := range f[11:13] { // utime, stime
		n, err := strconv.ParseInt(w, 10, 64)
		if err != nil {
			b.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100
}
