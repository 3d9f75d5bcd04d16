package snp_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/reference"
)

func page(t *testing.T) string {
	t.Helper()
	b, err := os.ReadFile("../../docs/attestation.md")
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestAttestationPage pastes the shell of docs/attestation.md into a shell, in this repository.
func TestAttestationPage(t *testing.T) {
	need.Command(t, "openssl", "hack/deps test")
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	bin, dir := t.TempDir(), filepath.Join(t.TempDir(), "simulated")
	build := exec.Command("go", "build", "-o", bin, "./cmd/kcradle")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	const marker = "<!-- the test TestAttestationPage runs this block as it stands -->\n```sh\n"
	blocks := strings.Split(page(t), marker)[1:]
	if len(blocks) != 2 {
		t.Fatalf("%d blocks, want 2", len(blocks))
	}
	for i, want := range [][]string{
		{
			"VERIFIED image registry.example/app:1@sha256:1111", "good       firmware", "Its signature was not checked",
			"FAIL root: the chain ends in a key that is not the root of Genoa", "exit code 1", "not the pod that was attested",
			"FAIL report-data", "FAIL pod: pod.json is of another pod than the reference", "it would match with 2 vCPUs", "two vCPUs, and not four",
		},
		{"Verified OK"},
	} {
		block, _, ok := strings.Cut(blocks[i], "```")
		if !ok {
			t.Fatal("a block without an end")
		}
		block = strings.ReplaceAll(block, "/tmp/simulated", dir)
		cmd := exec.Command("bash", "-euo", "pipefail")
		cmd.Dir = root
		cmd.Stdin = strings.NewReader(strings.Replace(block, "$PWD/bin", bin, 1))
		cmd.Env = append(os.Environ(), "KCRADLE_ROOT="+t.TempDir())
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		for _, w := range want {
			if !strings.Contains(string(out), w) {
				t.Errorf("got no %q in\n%s", w, out)
			}
		}
	}
}

// TestPolicyPage wants each field of a policy on the page, and its example to be a policy.
func TestPolicyPage(t *testing.T) {
	text := page(t)
	var walk func(prefix string, typ reflect.Type)
	walk = func(prefix string, typ reflect.Type) {
		for i := range typ.NumField() {
			f := typ.Field(i)
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			switch {
			case f.Type.Kind() == reflect.Pointer && f.Type.Elem().Kind() == reflect.Struct:
				walk(name, f.Type.Elem())
				continue
			case f.Type.Kind() == reflect.Struct && f.Type.NumField() > 2 || name == "reportVersion":
				walk(name, f.Type)
				continue
			}
			// `prefix.name`, or .name in the row of a sibling.
			if prefix == "" && !strings.Contains(text, "| `"+name+"` |") || prefix != "" && !inRow(text, prefix, name) {
				t.Errorf("no row for %s.%s", prefix, name)
			}
		}
	}
	walk("", reflect.TypeFor[policy.Policy]())
	_, example, _ := strings.Cut(text, "```json\n")
	example, _, _ = strings.Cut(example, "```")
	example = strings.NewReplacer("sha256:…", "sha256:"+strings.Repeat("0a", 32), "d2421d…", strings.Repeat("0a", 64)).Replace(example)
	p, err := policy.Parse([]byte(example))
	if err != nil || len(p.Images) != 1 || len(p.ChipIDs) != 1 || p.Reference == nil {
		t.Errorf("got %+v, %v", p, err)
	}
	if !strings.Contains(text, reference.PodParameter) {
		t.Errorf("no word of %s", reference.PodParameter)
	}
}

// inRow reports whether a row of the table begins with `prefix.…` and names the field.
func inRow(text, prefix, name string) bool {
	for line := range strings.Lines(text) {
		cell, _, ok := strings.Cut(strings.TrimPrefix(line, "| `"), " | ")
		if ok && strings.HasPrefix(line, "| `"+prefix+".") && (strings.Contains(cell, prefix+"."+name+"`") || strings.Contains(cell, "`."+name+"`")) {
			return true
		}
	}
	return false
}

// TestOpinionsPage wants each disagreement with go-sev-guest on the page, and no other.
func TestOpinionsPage(t *testing.T) {
	_, table, _ := strings.Cut(page(t), "| case | here | there | who is right, and why |\n|---|---|---|---|\n")
	table, _, _ = strings.Cut(table, "\n\n")
	var want []string
	word := map[bool]string{true: "passes", false: "refused"}
	for _, o := range opinions() {
		if o.ours != o.theirs {
			want = append(want, "| "+o.name+" | "+word[o.ours]+" | "+word[o.theirs]+" | "+o.why+" |")
		}
	}
	if got := strings.Join(want, "\n"); got != table {
		t.Errorf("the page has\n%s\nwant\n%s", table, got)
	}
}
