package kcradle_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os/exec"
	"path"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/kcradle/kcradle"

// lattice is the import policy of this module, a statement of intent: each line names packages (a trailing /... takes
// what lies below), what of this module they may import, and why. A package without a line, an import without
// permission and a permission without use all fail.
const lattice = `
spec: -                                            # the contract; the ground
dockerapi: -                                       # the wire of the Docker API, for guest and daemon alike
dockerapi/client: dockerapi                        # its other end
dockerapi/shape: spec dockerapi                    # containers as docker shows them, for guest and daemon alike
internal/undo internal/need: -                     # small tools

kernel/...: -                                      # an artefact and its command line
initrd: -                                          # a file format
share: -                                           # a directory of the host, for a hostile guest

snp/...: -                                         # importable by a customer; standard library only

image/...: -                                       # reference → verified layers; knows no bundle and no machine
network: network/lan                                         # the wire; knows no machine
network/lan: -                                     # machines of one host on one wire
vmm: spec internal/undo vmm/qmp vmm/channel vmm/checkpoint kernel/tsc # files, drives, a command line → a machine; knows no image, bundle, pod
vmm/template: vmm vmm/checkpoint internal/undo     # machines at rest, kept on disk
vmm/pool: vmm vmm/template                         # machines ready, handed to other processes
vmm/qmp: -                                         # a protocol
vmm/checkpoint: internal/undo                      # a process, to files and back; knows no machine
vmm/channel: spec                                  # both ends of the control channel, so guest and host share it
bundle: spec internal/undo                                 # the directory between summon and run

guest/...: spec dockerapi dockerapi/shape vmm/channel internal/undo internal/need # PID 1; never pulls the trees of image or of a registry client
cmd/init: guest/...                                # main of the guest

daemon: spec bundle image network network/lan dockerapi dockerapi/client dockerapi/shape internal/undo # the Docker API of a host, over bundles; starts no machine itself

cmd/kcradle: *                                     # the one host binary, on top
internal/vmtest/...: *                             # the harness that boots machines in tests
test/... hack/...: *                               # end-to-end tests and tools
`

// bans are whole dependency trees that a program must not contain.
var bans = []struct{ program, tree, reason string }{
	{"cmd/init", "github.com/google/go-containerregistry", "the initrd is measured, and small is auditable"},
	{"cmd/init", module + "/image", "the guest never reads a registry or an archive of an image"},
	{"cmd/init", "github.com/spf13/cobra", "init has no command line"},
	{"cmd/init", "gvisor.dev/gvisor", "the network stack is the host's"},
	{"cmd/init", "github.com/moby/moby/client", "the guest serves the API and calls none"},
	{"cmd/kcradle", "github.com/google/go-sev-guest", "it is the second opinion of test/snp; package snp/verify decides"},
}

type rule struct {
	packages []string
	allowed  map[string]bool // permission → used
	line     string
}

func rules(t *testing.T) []*rule {
	t.Helper()
	var out []*rule
	for line := range strings.Lines(lattice) {
		text, reason, ok := strings.Cut(strings.TrimSpace(line), "#")
		if text == "" && !ok {
			continue
		}
		left, right, colon := strings.Cut(text, ":")
		if !colon || strings.TrimSpace(reason) == "" {
			t.Fatalf("lattice: want «packages: imports # reason», got %q", line)
		}
		r := &rule{packages: strings.Fields(left), allowed: map[string]bool{}, line: strings.TrimSpace(text)}
		for _, a := range strings.Fields(right) {
			if a != "-" {
				r.allowed[a] = false
			}
		}
		out = append(out, r)
	}
	return out
}

// covers reports whether pattern (a path, or a path with /...) takes pkg.
func covers(pattern, pkg string) bool {
	base, tree := strings.CutSuffix(pattern, "/...")
	return pkg == base || tree && strings.HasPrefix(pkg, base+"/")
}

func goList(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := exec.Command("go", append([]string{"list"}, args...)...)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func TestLattice(t *testing.T) {
	rs := rules(t)
	for _, line := range goList(t, "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...") {
		fields := strings.Fields(line)
		pkg := strings.TrimPrefix(strings.TrimPrefix(fields[0], module), "/")
		if pkg == "" {
			continue
		}
		i := slices.IndexFunc(rs, func(r *rule) bool {
			return slices.ContainsFunc(r.packages, func(p string) bool { return covers(p, pkg) })
		})
		if i < 0 {
			t.Errorf("%s has no line in the lattice: say what it may import, and why", pkg)
			continue
		}
		r := rs[i]
		for _, imp := range fields[1:] {
			imp, own := strings.CutPrefix(imp, module+"/")
			if !own || slices.ContainsFunc(r.packages, func(p string) bool { return strings.HasSuffix(p, "/...") && covers(p, imp) }) {
				continue
			}
			if _, any := r.allowed["*"]; any {
				r.allowed["*"] = true
				continue
			}
			used := false
			for a := range r.allowed {
				if covers(a, imp) {
					r.allowed[a], used = true, true
				}
			}
			if !used {
				t.Errorf("%s imports %s, which its line does not allow: %s", pkg, imp, r.line)
			}
		}
	}
	for _, r := range rs {
		for a, used := range r.allowed {
			if !used {
				t.Errorf("stale permission %q in the lattice's line: %s", a, r.line)
			}
		}
	}
}

func TestBans(t *testing.T) {
	for _, b := range bans {
		for _, dep := range goList(t, "-deps", "./"+b.program) {
			if dep == b.tree || strings.HasPrefix(dep, b.tree+"/") {
				t.Errorf("%s contains %s, but %s", b.program, dep, b.reason)
			}
		}
	}
}

// A customer who verifies an attestation imports snp and gets nothing beside it and the standard library, tests
// included; these ask internal/need for what they need, which is small and held to the same.
func TestStandardLibraryOnly(t *testing.T) {
	for _, line := range goList(t, "-deps", "-test", "-f", "{{.ImportPath}} {{.Standard}}", "./snp/...") {
		fields := strings.Fields(line)
		pkg, standard := strings.TrimSuffix(fields[0], ".test"), fields[len(fields)-1] == "true"
		if !standard && !covers(module+"/snp/...", pkg) && pkg != module+"/internal/need" {
			t.Errorf("snp depends on %s: write the part that is needed, or leave it out", pkg)
		}
	}
}

// Each package says what it is, once.
func TestPackageComments(t *testing.T) {
	for _, line := range goList(t, "-f", `{{.Dir}} {{join .GoFiles " "}}`, "./...") {
		fields := strings.Fields(line)
		dir := fields[0]
		var with []string
		for _, name := range fields[1:] {
			f, err := parser.ParseFile(token.NewFileSet(), path.Join(dir, name), nil, parser.PackageClauseOnly|parser.ParseComments)
			if err != nil {
				t.Fatal(err)
			}
			if f.Doc != nil && hasText(f.Doc) {
				with = append(with, name)
			}
		}
		if len(fields) > 1 && len(with) != 1 {
			t.Errorf("%s: want one file with a package comment, got %v", strings.TrimPrefix(dir, "/"), with)
		}
	}
}

func hasText(doc *ast.CommentGroup) bool { return strings.TrimSpace(doc.Text()) != "" }

// unsafe lives in files named for it, so that a reader finds every one.
func TestUnsafeFiles(t *testing.T) {
	for _, line := range goList(t, "-f", `{{.Dir}} {{join .GoFiles " "}} {{join .TestGoFiles " "}}`, "./...") {
		fields := strings.Fields(line)
		for _, name := range fields[1:] {
			if strings.Contains(name, "_unsafe") {
				continue
			}
			f, err := parser.ParseFile(token.NewFileSet(), path.Join(fields[0], name), nil, parser.ImportsOnly)
			if err != nil {
				t.Fatal(err)
			}
			for _, imp := range f.Imports {
				if imp.Path.Value == `"unsafe"` {
					t.Errorf("%s imports unsafe: move that part into a *_unsafe.go file", path.Join(path.Base(fields[0]), name))
				}
			}
		}
	}
}
