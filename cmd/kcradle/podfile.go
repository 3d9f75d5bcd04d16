package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/kcradle/kcradle/spec"
)

// podFile is what summon --pod reads: several containers in the words of docker and Kubernetes. docs/bundle.md is its
// reference.
type podFile struct {
	Name       string                `yaml:"name"`
	Hostname   string                `yaml:"hostname"`
	Domainname string                `yaml:"domainname"`
	CPUs       string                `yaml:"cpus"`
	Memory     string                `yaml:"memory"`
	DNS        []string              `yaml:"dns"`
	DNSSearch  []string              `yaml:"dns_search"`
	DNSOptions []string              `yaml:"dns_options"`
	ExtraHosts []string              `yaml:"extra_hosts"`
	Ports      []string              `yaml:"ports"`
	Volumes    map[string]volumeFile `yaml:"volumes"`
	Containers []containerFile       `yaml:"containers"`
}

type volumeFile struct {
	Size string `yaml:"size"`
}

type containerFile struct {
	Name  string `yaml:"name"`
	Image string `yaml:"image"`
	// Command replaces the image's entrypoint, args its command: as in Kubernetes.
	Command words `yaml:"command"`
	Args    words `yaml:"args"`

	Env        variables `yaml:"env"`
	EnvFile    words     `yaml:"env_file"`
	WorkingDir string    `yaml:"working_dir"`
	User       string    `yaml:"user"`
	GroupAdd   []string  `yaml:"group_add"`
	TTY        bool      `yaml:"tty"`
	Stdin      bool      `yaml:"stdin_open"`
	Init       bool      `yaml:"init"`

	Volumes  []string `yaml:"volumes"`
	Tmpfs    words    `yaml:"tmpfs"`
	ReadOnly bool     `yaml:"read_only"`
	ShmSize  string   `yaml:"shm_size"`

	Memory      string  `yaml:"memory"`
	CPUs        string  `yaml:"cpus"`
	PidsLimit   int64   `yaml:"pids_limit"`
	OOMScoreAdj int     `yaml:"oom_score_adj"`
	Ulimits     words   `yaml:"ulimits"`
	Labels      pairs   `yaml:"labels"`
	Expose      words   `yaml:"expose"`
	Restart     string  `yaml:"restart"`
	StopSignal  string  `yaml:"stop_signal"`
	StopTimeout seconds `yaml:"stop_timeout"`

	CapAdd      []string  `yaml:"cap_add"`
	CapDrop     []string  `yaml:"cap_drop"`
	Privileged  bool      `yaml:"privileged"`
	SecurityOpt []string  `yaml:"security_opt"`
	Sysctls     variables `yaml:"sysctls"`

	Healthcheck *healthFile `yaml:"healthcheck"`

	After    []afterFile `yaml:"after"`
	Critical *bool       `yaml:"critical"`
}

type healthFile struct {
	Test          words         `yaml:"test"`
	Disable       bool          `yaml:"disable"`
	Interval      time.Duration `yaml:"interval"`
	Timeout       time.Duration `yaml:"timeout"`
	StartPeriod   time.Duration `yaml:"start_period"`
	StartInterval time.Duration `yaml:"start_interval"`
	Retries       int           `yaml:"retries"`
}

// words is a list, or one word alone.
type words []string

func (w *words) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode && n.Tag != "!!null" {
		*w = words{n.Value}
		return nil
	}
	return n.Decode((*[]string)(w))
}

// variables is a list of NAME=VALUE, or a map; a name without a value takes the caller's.
type variables []string

func (v *variables) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind != yaml.MappingNode {
		return n.Decode((*[]string)(v))
	}
	for i := 0; i+1 < len(n.Content); i += 2 { // in the order of the file
		key, value := n.Content[i], n.Content[i+1]
		switch {
		case value.Kind != yaml.ScalarNode:
			return fmt.Errorf("line %d: %s: want a value, not a list or a map", value.Line, key.Value)
		case value.Tag == "!!null":
			*v = append(*v, key.Value)
		default:
			*v = append(*v, key.Value+"="+value.Value)
		}
	}
	return nil
}

// pairs is like variables, and a name without a value has an empty one.
type pairs []string

func (p *pairs) UnmarshalYAML(n *yaml.Node) error { return (*variables)(p).UnmarshalYAML(n) }

// seconds is a number of seconds or a duration such as 1m30s.
type seconds struct{ n *int }

func (s *seconds) UnmarshalYAML(n *yaml.Node) error {
	var number int
	if n.Decode(&number) == nil {
		s.n = &number
		return nil
	}
	d, err := time.ParseDuration(n.Value)
	if err != nil {
		return fmt.Errorf("line %d: want seconds or a duration, got %q", n.Line, n.Value)
	}
	number = int(d / time.Second)
	s.n = &number
	return nil
}

// afterFile is a container's name, or a name and what to wait for.
type afterFile struct {
	Container string `yaml:"container"`
	Condition string `yaml:"condition"`
}

func (a *afterFile) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode {
		a.Container = n.Value
	} else {
		type plain afterFile
		for i := 0; i+1 < len(n.Content); i += 2 { // Decode of a node would not be strict
			if k := n.Content[i]; k.Value != "container" && k.Value != "condition" {
				return fmt.Errorf("line %d: unknown field %q", k.Line, k.Value)
			}
		}
		if err := n.Decode((*plain)(a)); err != nil {
			return err
		}
	}
	if a.Condition == "" {
		a.Condition = spec.ConditionStarted
	}
	return nil
}

// readPodFile reads a pod file; "-" is standard input.
func readPodFile(name string, stdin io.Reader) (*podFile, error) {
	r := stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, fmt.Errorf("read pod file: %w", err)
		}
		defer f.Close()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, spec.MaxPodBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read pod file %s: %w", name, err)
	}
	if len(b) > spec.MaxPodBytes {
		return nil, fmt.Errorf("read pod file %s: more than the limit of %d bytes", name, spec.MaxPodBytes)
	}
	p, err := parsePodFile(b)
	if err != nil {
		return nil, fmt.Errorf("read pod file %s: %w", name, err)
	}
	return p, nil
}

// unknownField is how the YAML library says it.
var unknownField = sync.OnceValue(func() *regexp.Regexp { return regexp.MustCompile(`field (\S+) not found in type \S+`) })

// parsePodFile is strict: a field it does not know is an error that names its line.
func parsePodFile(b []byte) (*podFile, error) {
	var p podFile
	d := yaml.NewDecoder(bytes.NewReader(b))
	d.KnownFields(true)
	if err := d.Decode(&p); err != nil {
		if errors.Is(err, io.EOF) {
			return nil, errors.New("empty")
		}
		text := strings.TrimPrefix(err.Error(), "yaml: unmarshal errors:\n")
		text = unknownField().ReplaceAllString(strings.TrimSpace(text), "unknown field \"$1\"")
		return nil, errors.New(strings.ReplaceAll(strings.TrimPrefix(text, "yaml: "), "\n  ", "; "))
	}
	if err := d.Decode(new(any)); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one document: a pod is one")
	}
	if len(p.Containers) == 0 {
		return nil, errors.New("containers: a pod needs at least one")
	}
	for i, c := range p.Containers {
		if c.Image == "" {
			return nil, fmt.Errorf("containers[%d]: image: missing", i)
		}
		if c.Name == "" {
			return nil, fmt.Errorf("containers[%d]: name: missing", i)
		}
	}
	return &p, nil
}

// options puts a container of the file into docker's notation.
func (c *containerFile) options() containerOptions {
	o := containerOptions{
		Name: c.Name, Image: c.Image, Entrypoint: c.Command, EntrypointSet: len(c.Command) > 0, Cmd: c.Args,
		Env: c.Env, EnvFiles: c.EnvFile, WorkDir: c.WorkingDir, User: c.User, GroupAdd: c.GroupAdd,
		TTY: c.TTY, Interactive: c.Stdin, Init: c.Init,
		Volumes: c.Volumes, Tmpfs: c.Tmpfs, ReadOnly: c.ReadOnly, ShmSize: c.ShmSize,
		Memory: c.Memory, CPUs: c.CPUs, PidsLimit: c.PidsLimit, OOMScoreAdj: c.OOMScoreAdj,
		Labels: c.Labels, Restart: c.Restart, StopSignal: c.StopSignal, StopTimeout: c.StopTimeout.n,
		Ulimits: c.Ulimits, CapAdd: c.CapAdd, CapDrop: c.CapDrop, Privileged: c.Privileged,
		SecurityOpt: c.SecurityOpt, Sysctls: c.Sysctls, Expose: c.Expose,
		NonCritical: c.Critical != nil && !*c.Critical,
	}
	for _, a := range c.After {
		o.After = append(o.After, spec.Dependency{Container: a.Container, Condition: a.Condition})
	}
	if h := c.Healthcheck; h != nil {
		o.NoHealthcheck = h.Disable
		o.HealthInterval, o.HealthTimeout, o.HealthRetries = h.Interval, h.Timeout, h.Retries
		o.HealthStart, o.HealthGap = h.StartPeriod, h.StartInterval
		if len(h.Test) == 1 && h.Test[0] != "NONE" { // one string is for a shell, as in compose
			o.HealthCmd = h.Test[0]
		} else {
			o.HealthTest = h.Test
		}
	}
	return o
}
