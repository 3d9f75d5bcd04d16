package main

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/kcradle/kcradle/spec"
)

const shop = `
name: shop
memory: 1g
ports: ["8080:80"]
volumes:
  data: {size: 20g}
containers:
- name: web
  image: nginx
  env: {B: 2, A: "x y", FROM_CALLER: }
  after:
  - db
  - {container: init, condition: completed}
  restart: no
  critical: false
  stop_timeout: 1m30s
- name: init
  image: busybox
  command: [sh, -c]
  args: echo
- name: db
  image: mariadb
  env: ["X=1"]
  volumes: ["data:/var/lib/mysql"]
  restart: on-failure:3
  healthcheck: {test: "mariadb-admin ping", interval: 5s}
`

func TestParsePodFile(t *testing.T) {
	p, err := parsePodFile([]byte(shop))
	if err != nil {
		t.Fatal(err)
	}
	var got []containerOptions
	for i := range p.Containers {
		got = append(got, p.Containers[i].options())
	}
	timeout := 90
	want := []containerOptions{
		{Name: "web", Image: "nginx", Env: []string{"B=2", "A=x y", "FROM_CALLER"}, Restart: "no", NonCritical: true, StopTimeout: &timeout,
			After: []spec.Dependency{{Container: "db", Condition: "started"}, {Container: "init", Condition: "completed"}}},
		{Name: "init", Image: "busybox", Entrypoint: []string{"sh", "-c"}, EntrypointSet: true, Cmd: []string{"echo"}},
		{Name: "db", Image: "mariadb", Env: []string{"X=1"}, Volumes: []string{"data:/var/lib/mysql"}, Restart: "on-failure:3",
			HealthCmd: "mariadb-admin ping", HealthInterval: 5 * time.Second},
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("containers (-want +got):\n%s", d)
	}
	ordered, err := inOrder(got)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, c := range ordered {
		names = append(names, c.Name)
	}
	if d := cmp.Diff([]string{"init", "db", "web"}, names); d != "" {
		t.Errorf("order (-want +got):\n%s", d)
	}
}

func TestParsePodFileRefuses(t *testing.T) {
	for _, tt := range []struct{ name, in, want string }{
		{"empty", "", "empty"},
		{"unknown field", "name: x\ncolour: red\n", `line 2: unknown field "colour"`},
		{"unknown field of a container", "containers:\n- name: x\n  imag: y\n", `line 3: unknown field "imag"`},
		{"unknown field of after", "containers:\n- name: x\n  image: y\n  after: [{container: a, when: b}]\n", `line 4: unknown field "when"`},
		{"wrong type", "containers: 7\n", "line 1: cannot unmarshal"},
		{"not YAML", "containers: [", "line 1"},
		{"no containers", "name: x\n", "a pod needs at least one"},
		{"no image", "containers: [{name: x}]", "containers[0]: image: missing"},
		{"no name", "containers: [{image: x}]", "containers[0]: name: missing"},
		{"two documents", "containers: [{name: x, image: y}]\n---\nname: z\n", "more than one document"},
		{"stop_timeout", "containers: [{name: x, image: y, stop_timeout: soon}]", `want seconds or a duration, got "soon"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := parsePodFile([]byte(tt.in)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

// JSON is YAML.
func TestParsePodFileJSON(t *testing.T) {
	p, err := parsePodFile([]byte(`{"name": "x", "containers": [{"name": "a", "image": "b", "restart": "always"}]}`))
	if err != nil || p.Containers[0].Restart != "always" {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestInOrderRefuses(t *testing.T) {
	after := func(name string, others ...string) containerOptions {
		c := containerOptions{Name: name}
		for _, o := range others {
			c.After = append(c.After, spec.Dependency{Container: o})
		}
		return c
	}
	for want, in := range map[string][]containerOptions{
		"waits for itself":            {after("a", "b"), after("b", "a")},
		`there is no container "nil"`: {after("a"), after("b", "nil")},
		"a name is there twice":       {after("a"), after("a")},
	} {
		if _, err := inOrder(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want an error with %q", err, want)
		}
	}
}

func FuzzPodFile(f *testing.F) {
	f.Add([]byte(shop))
	f.Add([]byte(`{"containers": [{"name": "a", "image": "b", "after": ["x"], "env": {"a": null}}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parsePodFile(b)
		if err != nil {
			return
		}
		var all []containerOptions
		for i := range p.Containers {
			all = append(all, p.Containers[i].options())
		}
		if _, err := inOrder(all); err != nil {
			return
		}
		for i := range all {
			_, _, _ = all[i].container(testImage) // must not panic
		}
	})
}
