package reference

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/ovmf/ovmftest"
	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/snp/policy"
)

var update = flag.Bool("update", false, "write testdata/vector.json again")

// podOf returns a pod.json with a container for each image.
func podOf(images ...byte) []byte {
	var containers []string
	for i, n := range images {
		digest := "sha256:" + strings.Repeat(fmt.Sprintf("%02x", n), 32)
		containers = append(containers, fmt.Sprintf(`{"name":"c%d","image":{"ref":"app:%d","digest":"%s","config":"%s"}}`, i, n, digest, digest))
	}
	return []byte(`{"version":1,"name":"p","containers":[` + strings.Join(containers, ",") + `]}`)
}

func firmware(t testing.TB, size uint32) measure.Firmware {
	t.Helper()
	f, err := measure.ReadFirmware(ovmftest.Image(ovmftest.AmdSev(size)))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func options(t testing.TB) Options {
	o := Options{
		Release:     "1.2.3",
		Firmware:    firmware(t, 64<<10),
		Kernel:      measure.FileHash{1},
		Initrd:      measure.FileHash{2},
		VCPUs:       2,
		CPU:         "EPYC-v4",
		SEVFeatures: measure.FeatureSNP,
		GuestPolicy: snp.PolicyReserved1 | snp.PolicySMT,
	}
	boots(&o, podOf(7))
	return o
}

// boots makes o boot a pod; nil: none.
func boots(o *Options, document []byte) {
	o.Pod, o.CommandLine = document, "console=hvc0"
	if document != nil {
		o.CommandLine += " cradle.pod=" + pod.DigestOf(document).String() + " quiet"
	}
}

func newReference(t testing.TB, change func(*Options)) *Reference {
	t.Helper()
	o := options(t)
	if change != nil {
		change(&o)
	}
	r, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func encode(t testing.TB, r *Reference) []byte {
	t.Helper()
	b, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	for name, change := range map[string]func(*Options){
		"pod":              nil,
		"no pod":           func(o *Options) { boots(o, nil) },
		"two images":       func(o *Options) { boots(o, podOf(7, 8)) },
		"one image twice":  func(o *Options) { boots(o, podOf(7, 7)) },
		"no ID block":      func(o *Options) { o.GuestPolicy = 0 },
		"no initrd":        func(o *Options) { o.Initrd = measure.FileHash{} },
		"many CPUs":        func(o *Options) { o.VCPUs, o.CPU = 64, "EPYC-Turin" },
		"other features":   func(o *Options) { o.SEVFeatures |= measure.FeatureDebugSwap },
		"no command line":  func(o *Options) { o.Pod, o.CommandLine = nil, "" },
		"smaller firmware": func(o *Options) { o.Firmware = firmware(t, 8<<10) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newReference(t, change)
			b := encode(t, r)
			got, err := Parse(b)
			if err != nil {
				t.Fatalf("%v\n%s", err, b)
			}
			if !reflect.DeepEqual(got, r) {
				t.Errorf("got %+v, want %+v", got, r)
			}
			if err := got.Check(); err != nil {
				t.Error(err)
			}
			none := r.PodDigest == pod.Digest{} || name == "two images"
			if (got.Image == nil) != none || !none && (got.Image.Ref != "app:7" || got.Image.Manifest[0] != 7 || got.Image.Config[0] != 7) {
				t.Errorf("got image %+v", got.Image)
			}
		})
	}
}

// TestVector makes a reference of published numbers: test_snp_default of virtee/sev-snp-measure. The digest of the anonymous
// key for it was computed with another program.
func TestVector(t *testing.T) {
	digest := func(s string) measure.Digest {
		d, err := measure.ParseDigest(s)
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	hash := func(s string) measure.FileHash {
		h, err := measure.ParseFileHash(s)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	empty := hash("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
	r, err := New(Options{
		Firmware: measure.Firmware{
			Layout: ovmftest.AmdSev(4096),
			Seed:   digest("086e2e9149ebf45abdc3445fba5b2da8270bdbb04094d7a2c37faaa4b24af3aa16aff8c374c2a55c467a50da6d466b74"),
			SHA256: hash("8f765dfabc127fc0a938a0744a3103ec15864d7d794eb4c398aa976b6d6ab16c"),
		},
		Kernel: empty, Initrd: empty, CommandLine: "console=ttyS0 loglevel=7",
		VCPUs: 1, CPU: "EPYC", SEVFeatures: 0x21, GuestPolicy: 0x30000,
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := r.Measurement.String(), "803f691094946e42068aaa3a8f9e26a5c89f36f7b73ecfb28c653360fe4b3aba7e534442e7e1e17895dfe778d0228977"; got != want {
		t.Errorf("got measurement %s, want %s", got, want)
	}
	if got, want := r.IDKeyDigest.String(), "401350d83e0f5ea5b494d576eaa3009635d4984b74af2ca0816140a4efc18493006824737ccc4a1ac5f5d0d7b474519b"; got != want {
		t.Errorf("got ID key %s, want %s", got, want)
	}
	const golden = "testdata/vector.json"
	b := encode(t, r)
	if *update {
		if err := os.WriteFile(golden, b, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(b, want) {
		t.Errorf("got\n%s\nwant\n%s", b, want)
	}
}

// TestDisagrees changes every single value of a reference file: none may stand that says something else than its inputs.
func TestDisagrees(t *testing.T) {
	r := newReference(t, nil)
	var whole map[string]any
	if err := json.Unmarshal(encode(t, r), &whole); err != nil {
		t.Fatal(err)
	}
	// What is for people, and what only CheckFirmware can know.
	free := map[string]bool{"release": true, "image.ref": true, "image.manifest": true, "image.config": true, "inputs.firmware": true}
	// The same to a launch: the CPUs' registers are alike, the hash table is where it was.
	same := map[string]bool{"inputs.firmwareLayout.hashTable.size": true, "inputs.firmwareLayout.size": true}
	changed := 0
	try := func(path string, v any, set func(any), to any) {
		set(to)
		defer set(v)
		b, err := json.Marshal(whole)
		if err != nil {
			t.Fatal(err)
		}
		changed++
		got, err := Parse(b)
		if err == nil {
			if err = got.Check(); err != nil && !errors.Is(err, ErrDisagrees) {
				t.Errorf("%s: got %v, want ErrDisagrees", path, err)
			}
		}
		if err == nil && !free[path] && !same[path] {
			t.Errorf("%s may be %v", path, to)
		}
		if err != nil && free[path] {
			t.Errorf("%s: %v", path, err)
		}
	}
	var walk func(path string, v any, set func(any))
	walk = func(path string, v any, set func(any)) {
		at := func(name string) string { return strings.TrimPrefix(path+"."+name, ".") }
		switch v := v.(type) {
		case map[string]any:
			for name, inner := range v {
				walk(at(name), inner, func(to any) { v[name] = to })
			}
		case []any:
			for i, inner := range v {
				walk(fmt.Sprintf("%s[%d]", path, i), inner, func(to any) { v[i] = to })
			}
			try(path, v, set, v[1:])
		case float64:
			try(path, v, set, v+1)
		case string:
			last := byte('0')
			if v[len(v)-1] == last {
				last++
			}
			try(path, v, set, v[:len(v)-1]+string(last))
		}
	}
	walk("", whole, func(any) {})
	if changed < 40 {
		t.Errorf("only %d values were changed", changed)
	}
	// A change and back is nothing.
	b, err := json.Marshal(whole)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Parse(b); err != nil || got.Check() != nil {
		t.Errorf("got %v, %v", err, got.Check())
	}
}

// TestCheckWords wants each way to disagree in words.
func TestCheckWords(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		change     func(*Reference)
	}{
		{"measurement", "measurement: ", func(r *Reference) { r.Measurement[0]++ }},
		{"pod digest", "inputs.cmdline: want cradle.pod=sha256:", func(r *Reference) { r.PodDigest[0]++ }},
		{"host data", "hostData: ", func(r *Reference) { r.HostData[0]++ }},
		{"no pod digest", "podDigest: missing, but inputs.cmdline", func(r *Reference) { r.PodDigest = pod.Digest{} }},
		{"ID key", "idKeyDigest: ", func(r *Reference) { r.IDKeyDigest[0]++ }},
		{"ID key without a policy", "one is there without the other", func(r *Reference) { r.Inputs.GuestPolicy = 0 }},
		{"policy without an ID key", "one is there without the other", func(r *Reference) { r.IDKeyDigest = [48]byte{} }},
		{"other policy", "but measurement and guest policy make", func(r *Reference) { r.Inputs.GuestPolicy ^= 1 }},
	} {
		r := newReference(t, nil)
		tt.change(r)
		if err := r.Check(); !errors.Is(err, ErrDisagrees) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want …%s…", tt.name, err, tt.want)
		}
	}
	// Two pods on one command line, in a reference that was measured so.
	digest := pod.DigestOf(podOf(7)).String()
	for _, line := range []string{
		"cradle.pod=" + digest + " cradle.pod=" + digest,
		"cradle.pod=" + digest + " x=cradle.pod=sha256:00",
		"x-cradle.pod=" + digest,
		"cradle.pod=" + digest + "0",
		"cradle.pod=" + digest[:len(digest)-1],
		"quiet",
	} {
		o := options(t)
		o.CommandLine = line
		if _, err := New(o); !errors.Is(err, ErrDisagrees) || !strings.Contains(err.Error(), ", once") {
			t.Errorf("%s: got %v", line, err)
		}
	}
	o := options(t)
	o.Pod = nil
	if _, err := New(o); !errors.Is(err, ErrDisagrees) {
		t.Errorf("a pod on the command line alone: got %v", err)
	}
	r := newReference(t, func(o *Options) { boots(o, nil) })
	r.HostData[0]++
	if err := r.Check(); !errors.Is(err, ErrDisagrees) {
		t.Errorf("host data without a pod: got %v", err)
	}
}

func TestCheckFirmware(t *testing.T) {
	r := newReference(t, nil)
	f := firmware(t, 64<<10)
	if err := r.CheckFirmware(f); err != nil {
		t.Error(err)
	}
	if err := r.CheckFirmware(firmware(t, 8<<10)); !errors.Is(err, ErrFirmware) || errors.Is(err, ErrDisagrees) {
		t.Errorf("got %v, want ErrFirmware", err)
	}
	// The digest of one image, and the seed or the layout of another.
	r = newReference(t, func(o *Options) { o.Firmware.Seed[0]++ })
	if err := r.CheckFirmware(f); !errors.Is(err, ErrDisagrees) || !strings.Contains(err.Error(), "firmwareSeed") {
		t.Errorf("got %v", err)
	}
	r = newReference(t, func(o *Options) { o.Firmware.Layout.ResetEIP++ })
	if err := r.CheckFirmware(f); !errors.Is(err, ErrDisagrees) || !strings.Contains(err.Error(), "firmwareLayout") {
		t.Errorf("got %v", err)
	}
}

func TestRefusals(t *testing.T) {
	good := string(encode(t, newReference(t, nil)))
	for _, tt := range []struct{ name, old, new, want string }{
		{"version 2", `"version": 1`, `"version": 2`, "version: 2 is not known here, want 1"},
		{"unknown field", `"release"`, `"relaese"`, "relaese: no such field"},
		{"upper case", `"measurement": "`, `"measurement": "G`, "measurement: "},
		{"no inputs", `"inputs"`, `"input"`, "input: no such field"},
		{"number in decimal", `Features": "0x1"`, `Features": "1"`, `inputs.sevFeatures: "1", want a number such as 0x21`},
		{"number with zeros", `Features": "0x1"`, `Features": "0x01"`, "inputs.sevFeatures"},
		{"number in capitals", `"0x810c00"`, `"0x810C00"`, "inputs.firmwareLayout.hashTable.base"},
		{"number with a sign", `Features": "0x1"`, `Features": "0x-1"`, "inputs.sevFeatures"},
		{"number beyond 32 bits", `"0x80b004"`, `"0x100000000"`, "firmwareLayout: 0x100000000 is no number of 32 bits"},
		{"unknown section", `"type": "0x10"`, `"type": "0x11"`, "section 5: unknown type 0x11"},
		{"huge section", `"size": "0x9000"`, `"size": "0xfffff000"`, "ovmf: section 0"},
		{"unknown CPU", `"EPYC-v4"`, `"host"`, `inputs.cpu: measure: unknown CPU model "host"`},
		{"no vCPUs", `"vcpus": 2`, `"vcpus": 0`, "0 vCPUs"},
		{"too many vCPUs", `"vcpus": 2`, `"vcpus": 4097`, "4097 vCPUs"},
		{"no SNP", `Features": "0x1"`, `Features": "0x20"`, "SEV features 0x20"},
		{"NUL", `console=hvc0`, `console\u0000hvc0`, "NUL in the command line"},
		{"long", `"release": "1.2.3"`, `"release": "` + strings.Repeat("x", 1<<20) + `"`, "more than 1048576"},
	} {
		b := strings.Replace(good, tt.old, tt.new, 1)
		if b == good {
			t.Fatalf("%s: nothing changed in\n%s", tt.name, good)
		}
		if r, err := Parse([]byte(b)); r != nil || err == nil || !strings.HasPrefix(err.Error(), "reference: ") || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: got %v, want …%s…", tt.name, err, tt.want)
		}
	}
	for name, change := range map[string]func(*Options){
		"no firmware": func(o *Options) { o.Firmware = measure.Firmware{} },
		"no digest":   func(o *Options) { o.Firmware.SHA256 = measure.FileHash{} },
		"no kernel":   func(o *Options) { o.Kernel = measure.FileHash{} },
		"no CPU":      func(o *Options) { o.CPU = "" },
		"bad pod":     func(o *Options) { boots(o, []byte("{}")) },
	} {
		o := options(t)
		change(&o)
		if r, err := New(o); err == nil {
			t.Errorf("%s: got %+v", name, r)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(encode(f, newReference(f, nil)))
	f.Add(encode(f, newReference(f, func(o *Options) { boots(o, nil); o.GuestPolicy = 0 })))
	vector, err := os.ReadFile("testdata/vector.json")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(vector)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := Parse(b)
		if err != nil {
			return
		}
		again, err := Parse(encode(t, r))
		if err != nil || !reflect.DeepEqual(again, r) {
			t.Errorf("got %+v, %v, want %+v", again, err, r)
		}
		_ = r.Check()
	})
}

func BenchmarkCheck(b *testing.B) {
	r := newReference(b, nil)
	b.ReportAllocs()
	for b.Loop() {
		if err := r.Check(); err != nil {
			b.Fatal(err)
		}
	}
}

// TestSignature checks a signature that openssl made with a key that was not kept, and that nothing else passes for one.
func TestSignature(t *testing.T) {
	file, err := os.ReadFile("testdata/vector.json")
	if err != nil {
		t.Fatal(err)
	}
	signature, err := os.ReadFile("testdata/vector.json" + SignatureSuffix)
	if err != nil {
		t.Fatal(err)
	}
	var key policy.PublicKey
	if err := key.UnmarshalText([]byte("ed25519:499bbdf549e0ad7d18bed430da078a467949c1116e7fc8a4c2667f1ed833d969")); err != nil {
		t.Fatal(err)
	}
	if err := CheckSignature(file, signature, key); err != nil {
		t.Error(err)
	}
	for name, err := range map[string]error{
		"other bytes":     CheckSignature(append(file, '\n'), signature, key),
		"short signature": CheckSignature(file, signature[1:], key),
		"no signature":    CheckSignature(file, nil, key),
		"long signature":  CheckSignature(file, append(bytes.Clone(signature), 0), key),
		"other key":       CheckSignature(file, signature, policy.PublicKey{1}),
		"no key":          CheckSignature(file, signature, policy.PublicKey{}),
	} {
		if !errors.Is(err, ErrSignature) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
