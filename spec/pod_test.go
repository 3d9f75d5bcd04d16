package spec

import (
	"bytes"
	"errors"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var hex64 = strings.Repeat("0123456789abcdef", 4)

func validPod() *Pod {
	return &Pod{
		Version: PodVersion,
		Name:    "web",
		Volumes: []Volume{{Name: "data"}},
		Ports:   []Port{{Proto: "tcp", ContainerPort: 80, HostPort: 8080}},
		Containers: []Container{{
			ID: hex64, Name: "web", Created: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
			Image: Image{Ref: "nginx", ConfigID: "sha256:" + hex64, Layers: []string{"sha256:" + hex64}},
			Cmd:   []string{"nginx", "-g", "daemon off; <&>"},
			Mounts: []Mount{
				{Type: MountVolume, Source: "data", Target: "/data"},
				{Type: MountTmpfs, Target: "/tmp", Options: []string{"size=64m"}},
			},
		}},
	}
}

func TestPodRoundTrip(t *testing.T) {
	want := validPod()
	b, err := want.Encode()
	if err != nil {
		t.Fatal(err)
	}
	got, err := ParsePod(b)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("pod after a round trip (-want +got):\n%s", d)
	}
	again, err := got.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, again) {
		t.Errorf("encoding is not canonical:\n%s\n%s", b, again)
	}
	if !bytes.Contains(b, []byte("daemon off; <&>")) {
		t.Errorf("arguments are escaped for HTML:\n%s", b)
	}
	if got := PodDigest([]byte("abc")); got != "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" {
		t.Errorf("PodDigest(abc): got %s", got)
	}
}

func TestPodValidate(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*Pod)
		want   string
	}{
		{"no version", func(p *Pod) { p.Version = 0 }, "version: want 1 to 1, got 0"},
		{"bad name", func(p *Pod) { p.Name = "Web_1" }, `name: "Web_1" is not a DNS label`},
		{"no containers", func(p *Pod) { p.Containers = nil }, "containers: a pod needs at least one"},
		{"no command", func(p *Pod) { p.Containers[0].Cmd = nil }, "containers[0].cmd: no command specified"},
		{"short id", func(p *Pod) { p.Containers[0].ID = "abc" }, "containers[0].id:"},
		{"bad diffID", func(p *Pod) { p.Containers[0].Image.Layers[0] = "sha256:../../x" }, "containers[0].image.layers[0]:"},
		{"too many layers", func(p *Pod) {
			p.Containers[0].Image.Layers = make([]string, MaxLayers+1)
		}, "containers[0].image.layers: 128 are more"},
		{"relative workdir", func(p *Pod) { p.Containers[0].WorkingDir = "srv" }, "containers[0].working_dir:"},
		{"NUL in env", func(p *Pod) { p.Containers[0].Env = []string{"A=\x00"} }, "containers[0]: NUL byte"},
		{"unknown volume", func(p *Pod) { p.Containers[0].Mounts[0].Source = "other" }, `the pod has no volume "other"`},
		{"relative mount", func(p *Pod) { p.Containers[0].Mounts[1].Target = "tmp" }, "containers[0].mounts[1].target:"},
		{"unknown mount", func(p *Pod) { p.Containers[0].Mounts[1].Type = "nfs" }, "containers[0].mounts[1].type:"},
		{"duplicate name", func(p *Pod) { p.Containers = append(p.Containers, p.Containers[0]) }, "is there twice"},
		{"duplicate volume", func(p *Pod) { p.Volumes = append(p.Volumes, p.Volumes[0]) }, "volumes[1].name:"},
		{"restart policy", func(p *Pod) { p.Containers[0].Restart.Name = "sometimes" }, "containers[0].restart.name:"},
		{"retries of always", func(p *Pod) { p.Containers[0].Restart = Restart{"always", 3} }, "containers[0].restart.max_retries:"},
		{"after a later one", func(p *Pod) {
			p.Containers[0].After = []Dependency{{Container: "db", Condition: ConditionStarted}}
		}, `no container "db" stands before`},
		{"protocol", func(p *Pod) { p.Ports[0].Proto = "sctp" }, "ports[0].proto:"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := validPod()
			tt.change(p)
			err := p.Validate()
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("Validate: got error %v, want one with %q", err, tt.want)
			}
			if _, err := p.Encode(); err == nil {
				t.Error("Encode wrote an invalid pod")
			}
		})
	}
}

func TestParsePodRefuses(t *testing.T) {
	good, err := validPod().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name, in, want string
	}{
		{"unknown field", strings.Replace(string(good), `"name": "web",`, `"name": "web", "colour": 1,`, 1), `unknown field "colour"`},
		{"newer version", strings.Replace(string(good), `"version": 1`, `"version": 2`, 1), "upgrade kcradle"},
		{"trailing data", string(good) + "{}", "something behind the document"},
		{"truncated", string(good[:len(good)/2]), "parse pod"},
		{"too large", strings.Repeat(" ", MaxPodBytes+1), "more than the limit"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := ParsePod([]byte(tt.in)); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("ParsePod: got error %v, want one with %q", err, tt.want)
			}
		})
	}
	newer := strings.Replace(string(good), `"version": 1`, `"version": 2`, 1)
	if _, err := ParsePod([]byte(newer)); !errors.Is(err, ErrNewer) {
		t.Errorf("ParsePod of a newer version: got %v, want ErrNewer", err)
	}
}

func TestPodLayers(t *testing.T) {
	p := validPod()
	a, b, c := "sha256:"+strings.Repeat("a", 64), "sha256:"+strings.Repeat("b", 64), "sha256:"+strings.Repeat("c", 64)
	second := p.Containers[0]
	p.Containers[0].Image.Layers = []string{a, b}
	second.Image.Layers = []string{a, c, b}
	p.Containers = append(p.Containers, second)
	if d := cmp.Diff([]string{a, b, c}, p.Layers()); d != "" {
		t.Errorf("Layers (-want +got):\n%s", d)
	}
}

func TestPodBinds(t *testing.T) {
	p := validPod()
	a := Mount{Type: MountBind, Source: "/srv", Target: "/a"}
	b := Mount{Type: MountBind, Source: "/srv", Target: "/b", ReadOnly: true}
	second := p.Containers[0]
	second.Name, second.Mounts = "second", []Mount{b}
	p.Containers[0].Mounts = append(p.Containers[0].Mounts, a)
	p.Containers = append(p.Containers, second)
	if d := cmp.Diff([]Bind{{"web", a}, {"second", b}}, p.Binds()); d != "" {
		t.Errorf("Binds (-want +got):\n%s", d)
	}
}

func FuzzParsePod(f *testing.F) {
	good, err := validPod().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := ParsePod(b)
		if err != nil {
			return
		}
		once, err := p.Encode()
		if err != nil {
			t.Fatalf("encode what was parsed: %v", err)
		}
		q, err := ParsePod(once)
		if err != nil {
			t.Fatalf("parse what was encoded: %v", err)
		}
		twice, err := q.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(once, twice) {
			t.Errorf("encoding is not canonical:\n%s\n%s", once, twice)
		}
	})
}

// TestNameRules holds the written-out rules against what they are written for.
func TestNameRules(t *testing.T) {
	rules := []struct {
		name string
		rule func(string) bool
		want *regexp.Regexp
	}{
		{"name", isName, regexp.MustCompile(`\A[a-zA-Z0-9][a-zA-Z0-9_.-]{0,127}\z`)},
		{"label", isLabel, regexp.MustCompile(`\A[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\z`)},
		{"id", isID, regexp.MustCompile(`\A[0-9a-f]{64}\z`)},
		{"digest", isDigest, regexp.MustCompile(`\Asha256:[0-9a-f]{64}\z`)},
	}
	in := []string{"", "a", "-", "a-", "-a", "a-b", "web_1", "Web", "é", "a\n", "sha256:" + hex64, "sha256:", hex64, hex64[1:], hex64 + "0",
		strings.ToUpper(hex64), strings.Repeat("a", 63), strings.Repeat("a", 64), strings.Repeat("b", 128), strings.Repeat("b", 129)}
	for c := range 256 {
		in = append(in, string([]byte{byte(c)}), "a"+string([]byte{byte(c)})+"b", hex64[1:]+string([]byte{byte(c)}))
	}
	for _, r := range rules {
		for _, s := range in {
			if got, want := r.rule(s), r.want.MatchString(s); got != want {
				t.Errorf("%s of %q: got %v, want %v", r.name, s, got, want)
			}
		}
	}
}
