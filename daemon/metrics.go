package daemon

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi"
	"github.com/kcradle/kcradle/spec"
)

// metrics are what Prometheus asks for. What dockerd has, too, has dockerd's names.
type metrics struct {
	registry *prometheus.Registry
	starts   *prometheus.HistogramVec // by path
	actions  *prometheus.HistogramVec // by action
	requests *prometheus.HistogramVec // by method, route and status
	events   prometheus.Counter
}

// Buckets from a start out of the pool to a boot on a busy host without virtualization, and for answers.
var (
	startBuckets   = []float64{.025, .05, .1, .2, .4, .8, 1.6, 3.2, 6.4, 12.8, 25.6}
	requestBuckets = []float64{.001, .005, .025, .1, .5, 2, 10, 60}
)

// newMetrics makes the metrics of a daemon; each has its own.
func newMetrics(d *Daemon) *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		starts: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "kcradle_start_seconds", Buckets: startBuckets,
			Help: "Seconds from the wish to start a container until its process runs, by how its machine came up"}, []string{"path"}),
		actions: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "engine_daemon_container_actions_seconds", Buckets: startBuckets,
			Help: "The number of seconds it takes to process each container action"}, []string{"action"}),
		requests: prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "kcradle_api_request_seconds", Buckets: requestBuckets,
			Help: "Seconds until a request was answered to its end, streams included"}, []string{"method", "route", "status"}),
		events: prometheus.NewCounter(prometheus.CounterOpts{Name: "engine_daemon_events_total", Help: "The number of events logged"}),
	}
	for _, path := range []string{bundle.PathCold, bundle.PathTemplate, bundle.PathPool} {
		m.starts.WithLabelValues(path)
	}
	m.registry.MustRegister(m.starts, m.actions, m.requests, m.events, &gauges{d})
	return m
}

// answered notes a request. Routes and methods are rows of a table, so that no client can make labels.
func (m *metrics) answered(a dockerapi.Answer) {
	if a.Route == "" {
		a.Method, a.Route = "other", "other"
	}
	m.requests.WithLabelValues(a.Method, a.Route, strconv.Itoa(a.Status)).Observe(a.Took.Seconds())
}

// action notes what took that long; call it deferred.
func (m *metrics) action(name string, since time.Time, err *error) {
	if *err == nil {
		m.actions.WithLabelValues(name).Observe(time.Since(since).Seconds())
	}
}

// gauges are what is looked up when somebody asks.
type gauges struct{ d *Daemon }

var (
	infoDesc   = prometheus.NewDesc("engine_daemon_engine_info", "The information related to the engine and the OS it is running on", []string{"version", "kcradle", "architecture"}, nil)
	cpusDesc   = prometheus.NewDesc("engine_daemon_engine_cpus_cpus", "The number of cpus that the host system of the engine has", nil, nil)
	statesDesc = prometheus.NewDesc("engine_daemon_container_states_containers", "The count of containers in various states", []string{"state"}, nil)
	podsDesc   = prometheus.NewDesc("kcradle_pods", "Pods by the state of their containers", []string{"state"}, nil)
	memoryDesc = prometheus.NewDesc("kcradle_pods_memory_bytes", "Memory of all pods: the proportional share of their machines and supervisors", nil, nil)
	storeDesc  = prometheus.NewDesc("kcradle_store_bytes", "Bytes that the layers of images take on disk", nil, nil)
)

var _ prometheus.Collector = (*gauges)(nil)

func (g *gauges) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{infoDesc, cpusDesc, statesDesc, podsDesc, memoryDesc, storeDesc} {
		ch <- d
	}
}

func (g *gauges) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(infoDesc, 1, EngineVersion, g.d.cfg.Version, runtime.GOARCH)
	gauge(cpusDesc, float64(runtime.NumCPU()))
	states := map[string]int{}
	pods := map[string]int{spec.StatusCreated: 0, spec.StatusRunning: 0, spec.StatusPaused: 0, spec.StatusRestarting: 0, spec.StatusExited: 0}
	memory := int64(0)
	for _, c := range g.d.all() {
		f := c.look()
		pods[f.state.Status]++
		switch {
		case f.state.Status == spec.StatusPaused:
			states["paused"]++
		case f.running():
			states["running"]++
		default:
			states["stopped"]++
		}
		if f.machine != nil {
			for _, pid := range f.pids {
				memory += proportional(pid)
			}
		}
	}
	for _, s := range []string{"paused", "running", "stopped"} {
		gauge(statesDesc, float64(states[s]), s)
	}
	for s, n := range pods {
		gauge(podsDesc, float64(n), s)
	}
	gauge(memoryDesc, float64(memory))
	ctx, cancel := context.WithTimeout(g.d.ctx, g.d.bounds.told)
	defer cancel()
	if u, err := g.d.cfg.Store.Usage(ctx); err == nil {
		gauge(storeDesc, float64(u.Bytes))
	}
}

// proportional is a process's proportional share of memory; zero for one that has gone.
func proportional(pid int) int64 {
	if pid <= 0 {
		return 0
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
	if err != nil {
		return 0
	}
	for line := range bytes.Lines(b) {
		if rest, ok := bytes.CutPrefix(line, []byte("Pss:")); ok {
			if fields := bytes.Fields(rest); len(fields) > 0 {
				kib, _ := strconv.ParseInt(string(fields[0]), 10, 64)
				return kib << 10
			}
		}
	}
	return 0
}

// Metrics serves what Prometheus asks for, at /metrics.
func (d *Daemon) Metrics() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(d.metrics.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4}))
	return mux
}
