// Package snp holds the snp packages, which import nothing of this module, against its other packages and against other
// people's programs.
package snp_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/spec"
)

// TestPodFields gives pod.Parse a document with every field that the owner of a pod can set: a verifier that lacked one
// would refuse good pods.
func TestPodFields(t *testing.T) {
	var p spec.Pod
	fill(reflect.ValueOf(&p).Elem())
	for i := range p.Containers {
		p.Containers[i].Image.Digest = "sha256:" + strings.Repeat("0a", 32)
		p.Containers[i].Image.ConfigID = p.Containers[i].Image.Digest
		p.Containers[i].Mounts[0].Type = spec.MountBind
	}
	p.Version = spec.PodVersion
	b, err := json.Marshal(p)
	if err != nil {
		t.Fatal(err)
	}
	got, err := pod.Parse(b)
	if err != nil {
		t.Fatal(err)
	}
	if len(got.HostMounts()) != 1 || len(got.Privileges()) != 3 || len(got.UnverifiedVolumes()) != 1 {
		t.Errorf("got %+v", got)
	}
	if pod.Version != spec.PodVersion || pod.MaxBytes != spec.MaxPodBytes {
		t.Error("versions or bounds differ")
	}
}

// TestPodMounts wants every kind of mount to be known.
func TestPodMounts(t *testing.T) {
	for _, kind := range []string{spec.MountBind, spec.MountTmpfs, spec.MountVolume} {
		p := spec.Pod{Version: 1, Name: "p", Volumes: []spec.Volume{{Name: "v"}}, Containers: []spec.Container{{
			ID: strings.Repeat("0", 64), Name: "c", Cmd: []string{"x"}, Created: time.Unix(0, 0).UTC(),
			Image:  spec.Image{ConfigID: "sha256:" + strings.Repeat("0", 64)},
			Mounts: []spec.Mount{{Type: kind, Source: map[string]string{spec.MountVolume: "v", spec.MountBind: "/h"}[kind], Target: "/t"}},
		}}}
		b, err := p.Encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := pod.Parse(b)
		if err != nil {
			t.Errorf("%s: %v", kind, err)
		} else if binds := len(got.HostMounts()); binds != map[string]int{spec.MountBind: 1}[kind] {
			t.Errorf("%s: %d mounts of the host", kind, binds)
		}
	}
}

// fill sets every field to something, so that none is left out of the JSON.
func fill(v reflect.Value) {
	switch v.Interface().(type) {
	case time.Time:
		v.Set(reflect.ValueOf(time.Unix(1, 0).UTC()))
		return
	case spec.Resources:
		limit := int64(1)
		v.Set(reflect.ValueOf(spec.Resources{LinuxResources: specs.LinuxResources{Pids: &specs.LinuxPids{Limit: &limit}}}))
		return
	}
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Struct:
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Map:
		key, value := reflect.New(v.Type().Key()).Elem(), reflect.New(v.Type().Elem()).Elem()
		fill(key)
		fill(value)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(key, value)
	case reflect.String:
		v.SetString("x")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(1)
	case reflect.Uint16, reflect.Uint32, reflect.Uint64:
		v.SetUint(1)
	}
}
