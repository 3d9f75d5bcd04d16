package pod

import (
	"reflect"
	"strings"
	"testing"
)

const (
	manifest = "sha256:00000000000000000000000000000000000000000000000000000000000000aa"
	config   = "sha256:00000000000000000000000000000000000000000000000000000000000000bb"
)

// containerOf is one that asks for nothing special, with fields added.
func containerOf(name, fields string) string {
	return `{"id":"x","name":"` + name + `","image":{"ref":"app:1","digest":"` + manifest + `","config":"` + config + `","layers":null}` + fields + `}`
}

func documentOf(containers ...string) string {
	return `{"version":1,"name":"p","containers":[` + strings.Join(containers, ",") + `]}`
}

func TestParse(t *testing.T) {
	p, err := Parse([]byte(documentOf(
		containerOf("web", `,"mounts":[{"type":"bind","source":"/srv","target":"/srv"},{"type":"tmpfs","target":"/tmp"}],"labels":{"a":"b"},
			"cap_add":["net_admin","CAP_SYS_NICE","sys_admin","CAP_BPF"],"healthcheck":{"test":null}`),
		containerOf("db", `,"privileged":true,"devices":[{"path":"/dev/x"}],"mounts":[{"type":"volume","source":"data","target":"/d"}]`),
	)))
	if err != nil {
		t.Fatal(err)
	}
	image := Image{Ref: "app:1", Digest: Digest{31: 0xaa}, Config: Digest{31: 0xbb}}
	want := &Pod{Name: "p", Containers: []Container{
		{Name: "web", Image: image, Binds: []string{"/srv"}, CapAdd: []string{"net_admin", "CAP_SYS_NICE", "sys_admin", "CAP_BPF"}},
		{Name: "db", Image: image, Privileged: true, Devices: 1},
	}}
	if !reflect.DeepEqual(p, want) {
		t.Errorf("got %+v, want %+v", p, want)
	}
	if got, want := p.HostMounts(), []string{"web: /srv"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := p.Privileges(), []string{"web: capability sys_admin", "web: capability CAP_BPF", "db: privileged", "db: devices of the machine"}; !reflect.DeepEqual(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := p.Images(); !reflect.DeepEqual(got, []Image{image}) {
		t.Errorf("got %+v", got)
	}
	p, err = Parse([]byte(`{"version":1,"name":"p","containers":[` + containerOf("a", "") + `],"volumes":[{"name":"data","size":1}]}`))
	if err != nil || !reflect.DeepEqual(p.UnverifiedVolumes(), []string{"data"}) || p.HostMounts() != nil || p.Privileges() != nil {
		t.Errorf("got %+v, %v", p, err)
	}
}

func TestRefusals(t *testing.T) {
	for _, tt := range []struct{ name, document, want string }{
		{"no version", `{"name":"p","containers":[` + containerOf("a", "") + `]}`, "version: missing"},
		{"newer", `{"version":2,"name":"p","containers":[` + containerOf("a", "") + `]}`, "version 2 is not known here"},
		{"no containers", documentOf(), "no containers"},
		{"unknown field of the pod", `{"version":1,"name":"p","containers":[],"api":{"exec":true}}`, "api: no such field"},
		{"unknown field of a container", documentOf(containerOf("a", `,"exec":true`)), "containers[0].exec: no such field"},
		{"unknown field of a mount", documentOf(containerOf("a", `,"mounts":[{"type":"tmpfs","host":"/"}]`)), "containers[0].mounts[0].host: no such field"},
		{"unknown mount", documentOf(containerOf("a", `,"mounts":[{"type":"nfs"}]`)), `containers[0].mounts[0].type: "nfs" is not known here`},
		{"two lists of mounts", documentOf(containerOf("a", `,"mounts":[],"mounts":[{"type":"bind"}]`)), "containers[0].mounts: stands there twice"},
		{"mounts in other case", documentOf(containerOf("a", `,"Mounts":[{"type":"bind"}]`)), "containers[0].Mounts: no such field"},
		{"short digest", documentOf(strings.Replace(containerOf("a", ""), "00aa", "aa", 1)), "containers[0].image.digest: 62 characters"},
		{"digest of another kind", documentOf(strings.Replace(containerOf("a", ""), manifest, "sha512:aa", 1)), `image.digest: "sha512:aa", want sha256:`},
		{"no image", `{"version":1,"name":"p","containers":[{"name":"a"}]}`, "containers[0].image: missing"},
	} {
		if p, err := Parse([]byte(tt.document)); p != nil || err == nil || !strings.HasPrefix(err.Error(), "pod: ") || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want %s", tt.name, err, tt.want)
		}
	}
}

func TestDigest(t *testing.T) {
	d := DigestOf([]byte("{}"))
	const want = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
	if d.String() != want {
		t.Errorf("got %s, want %s", d, want)
	}
	if got, err := ParseDigest(want); err != nil || got != d {
		t.Errorf("got %s, %v", got, err)
	}
	for _, s := range []string{"", "sha256:", want[7:], want + "0", strings.ToUpper(want), "sha256:" + strings.ToUpper(want[7:])} {
		if got, err := ParseDigest(s); err == nil || got != (Digest{}) {
			t.Errorf("%q: got %s, %v", s, got, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte(documentOf(containerOf("a", `,"privileged":true,"mounts":[{"type":"bind","source":"/","target":"/h"}]`), containerOf("b", ""))))
	f.Add([]byte(`{"version":1,"name":"p","containers":[],"volumes":[{"name":"v"}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := Parse(b)
		if err == nil && (len(p.Containers) == 0 || len(p.Images()) == 0) {
			t.Errorf("got %+v", p)
		}
	})
}
