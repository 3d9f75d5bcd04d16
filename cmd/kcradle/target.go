package main

import (
	"fmt"
	"strings"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/dockerapi/client"
	"github.com/kcradle/kcradle/spec"
)

// target is what DIR[:CONTAINER] on the command line means.
type target struct {
	bundle    *bundle.Bundle
	container *spec.Container // the named one, else the first
	named     bool
}

func (t target) String() string {
	if t.named {
		return t.bundle.Dir + ":" + t.container.Name
	}
	return t.bundle.Dir
}

// openTarget opens the bundle of DIR[:CONTAINER]. A container is named by its name or the beginning of its ID.
func openTarget(arg string) (target, error) {
	dir, name := splitTarget(arg)
	b, err := bundle.Open(dir)
	if err != nil {
		return target{}, err
	}
	t := target{bundle: b, container: &b.Pod.Containers[0]}
	if name == "" {
		return t, nil
	}
	t.named, t.container = true, nil
	for i := range b.Pod.Containers {
		c := &b.Pod.Containers[i]
		if c.Name == name || len(name) >= 4 && strings.HasPrefix(c.ID, name) {
			t.container = c
			break
		}
	}
	if t.container == nil {
		var names []string
		for _, c := range b.Pod.Containers {
			names = append(names, c.Name)
		}
		return t, fmt.Errorf("bundle %s has no container %q (it has: %s)", dir, name, strings.Join(names, ", "))
	}
	return t, nil
}

// api speaks to the pod's vdocker.
func (t target) api() client.Client { return client.Client{Dial: t.bundle.DialVdocker} }

// path is the container's path in the API, with more behind it.
func (t target) path(more string) string { return "/containers/" + t.container.ID + more }
