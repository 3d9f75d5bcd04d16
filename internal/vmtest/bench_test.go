package vmtest

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/kcradle/kcradle/vmm"
)

// BenchmarkReady boots a guest until it may be dialed, and says beside the time what it cost in processor time, which
// a busy host disturbs less:
//
//	go test ./internal/vmtest -run xxx -bench Ready -benchtime 10x
func BenchmarkReady(b *testing.B) {
	c := Config(b, Options{Init: guest})
	b.Logf("engine %s", c.Engine)
	var cpu time.Duration
	var resident int64
	for b.Loop() {
		m, err := vmm.Start(b.Context(), c, nil)
		if err != nil {
			b.Fatal(err)
		}
		if err := m.Ready(b.Context()); err != nil {
			b.Fatal(err)
		}
		cpu += processorTime(b, m.PID())
		mem, err := m.Memory(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		resident += mem.Resident
		m.Kill()
		m.Wait()
	}
	b.ReportMetric(cpu.Seconds()/float64(b.N)*1e3, "cpu-ms/op")
	b.ReportMetric(float64(resident)/float64(b.N)/(1<<20), "resident-MiB")
}

// processorTime reads utime and stime of proc(5).
func processorTime(tb testing.TB, pid int) time.Duration {
	tb.Helper()
	stat, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "stat"))
	if err != nil {
		tb.Fatal(err)
	}
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(string(f), 10, 64)
		if err != nil {
			tb.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / 100
}
