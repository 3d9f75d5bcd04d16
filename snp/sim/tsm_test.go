package sim_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/sim"
	"github.com/kcradle/kcradle/snp/verify"
)

// files is what a client of configfs-tsm needs of its kernel.
type files interface {
	Mkdir(name string, perm fs.FileMode) error
	WriteFile(name string, data []byte, perm fs.FileMode) error
	ReadFile(name string) ([]byte, error)
	Remove(name string) error
}

// kernel is the real one.
type kernel struct{}

func (kernel) Mkdir(name string, perm fs.FileMode) error { return os.Mkdir(name, perm) }
func (kernel) WriteFile(name string, data []byte, perm fs.FileMode) error {
	return os.WriteFile(name, data, perm)
}
func (kernel) ReadFile(name string) ([]byte, error) { return os.ReadFile(name) }
func (kernel) Remove(name string) error             { return os.Remove(name) }

var (
	_ files = kernel{}
	_ files = (*sim.Tree)(nil)
)

// request is a client as a guest has one: a directory of its own, and the generation held against the writes.
func request(k files, data [64]byte, vmpl int) (report []byte, err error) {
	dir := sim.Reports + "/test"
	if err := k.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, k.Remove(dir)) }()
	provider, err := k.ReadFile(dir + "/provider")
	if err != nil {
		return nil, err
	}
	if string(provider) != sim.Provider+"\n" {
		return nil, fmt.Errorf("provider %q", provider)
	}
	before, err := generation(k, dir)
	if err != nil {
		return nil, err
	}
	if err := k.WriteFile(dir+"/privlevel", []byte(strconv.Itoa(vmpl)), 0o600); err != nil {
		return nil, err
	}
	if err := k.WriteFile(dir+"/inblob", data[:], 0o600); err != nil {
		return nil, err
	}
	if report, err = k.ReadFile(dir + "/outblob"); err != nil {
		return nil, err
	}
	after, err := generation(k, dir)
	if err != nil {
		return nil, err
	}
	if after != before+2 {
		return nil, fmt.Errorf("%d writes, want 2: somebody else writes to %s", after-before, dir)
	}
	return report, nil
}

func generation(k files, dir string) (uint64, error) {
	b, err := k.ReadFile(dir + "/generation")
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
}

// TestGuest is the whole road: a guest's request through the kernel's files, the firmware's report, a verifier.
func TestGuest(t *testing.T) {
	c := newChip(t, snp.LineTurin, snp.SignerVCEK)
	tree := &sim.Tree{Attest: c.Attest}
	var data [64]byte
	rand.Read(data[:])
	report, err := request(tree, data, 2)
	if err != nil {
		t.Fatal(err)
	}
	r := decide(t, trusting(t, c), verify.Evidence{Report: report})
	if err := r.Err(); err != nil {
		t.Fatal(err)
	}
	if r.Report.ReportData != data || r.Report.VMPL != 2 {
		t.Errorf("got data %x at VMPL %d", r.Report.ReportData, r.Report.VMPL)
	}
	if err := tree.Remove(sim.Reports + "/test"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the client leaves its directory behind: %v", err)
	}
}

// TestGuestFaults is what a client has to expect of a host and of its neighbours.
func TestGuestFaults(t *testing.T) {
	c := newChip(t, snp.LineGenoa, snp.SignerVCEK)
	on := func(op, file string, err error) func(string, string) error {
		return func(o, path string) error {
			if o == op && strings.HasSuffix(path, file) {
				return err
			}
			return nil
		}
	}
	tests := []struct {
		name string
		tree *sim.Tree
		vmpl int
		want error
		text string
	}{
		{name: "no provider", tree: &sim.Tree{}, want: syscall.ENXIO},
		{name: "another provider", tree: &sim.Tree{Attest: c.Attest, Provider: "tdx_guest"}, text: `provider "tdx_guest\n"`},
		{name: "below the floor", tree: &sim.Tree{Attest: c.Attest, PrivlevelFloor: 1}, vmpl: 0, want: syscall.EINVAL},
		{name: "above the highest", tree: &sim.Tree{Attest: c.Attest}, vmpl: 4, want: syscall.EINVAL},
		{name: "host limits requests", tree: &sim.Tree{Attest: c.Attest, Fault: on("read", "/outblob", syscall.EBUSY)}, want: syscall.EBUSY},
		{name: "host does not answer", tree: &sim.Tree{Attest: c.Attest, Fault: on("read", "/outblob", syscall.ETIMEDOUT)}, want: syscall.ETIMEDOUT},
		{name: "generation used up", tree: &sim.Tree{Attest: c.Attest, Fault: on("write", "/privlevel", syscall.EBUSY)}, want: syscall.EBUSY},
		{name: "no configfs", tree: &sim.Tree{Attest: c.Attest, Fault: on("mkdir", "", syscall.ENOENT)}, want: syscall.ENOENT},
		{name: "firmware fails", tree: &sim.Tree{Attest: func([64]byte, uint32) ([]byte, error) { return nil, syscall.EIO }}, want: syscall.EIO},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			report, err := request(tt.tree, [64]byte{}, tt.vmpl)
			if report != nil || err == nil || tt.want != nil && !errors.Is(err, tt.want) || !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %d bytes, %v", len(report), err)
			}
			var pe *fs.PathError
			if tt.want != nil && (!errors.As(err, &pe) || !strings.HasPrefix(pe.Path, sim.Reports)) {
				t.Errorf("got %v, want a PathError", err)
			}
		})
	}

	// A neighbour writes to the same directory between the client's write and its read: the report is the neighbour's,
	// and the generation tells.
	tree := &sim.Tree{Attest: c.Attest}
	tree.Fault = func(op, path string) error {
		if op == "read" && strings.HasSuffix(path, "/outblob") {
			tree.Fault = nil
			return tree.WriteFile(sim.Reports+"/test/inblob", bytes.Repeat([]byte{0xee}, 64), 0)
		}
		return nil
	}
	if _, err := request(tree, [64]byte{}, 0); err == nil || !strings.Contains(err.Error(), "somebody else writes") {
		t.Errorf("got %v", err)
	}
}

func TestTree(t *testing.T) {
	dir := sim.Reports + "/a"
	made := 0
	tree := &sim.Tree{
		Aux: []byte("certificates"),
		Attest: func(data [64]byte, vmpl uint32) ([]byte, error) {
			made++
			return fmt.Appendf(nil, "%d %x %d", made, data[:2], vmpl), nil
		},
	}
	write := func(file, content string) func() (string, error) {
		return func() (string, error) { return "", tree.WriteFile(file, []byte(content), 0o600) }
	}
	read := func(file string) func() (string, error) {
		return func() (string, error) { b, err := tree.ReadFile(file); return string(b), err }
	}
	mkdir := func(dir string) func() (string, error) {
		return func() (string, error) { return "", tree.Mkdir(dir, 0o700) }
	}
	remove := func(dir string) func() (string, error) {
		return func() (string, error) { return "", tree.Remove(dir) }
	}
	a64, b64 := strings.Repeat("a", 64), strings.Repeat("b", 64)
	for _, step := range []struct {
		name string
		do   func() (string, error)
		want string
		err  error
	}{
		{"read before mkdir", read(dir + "/generation"), "", syscall.ENOENT},
		{"write before mkdir", write(dir+"/inblob", a64), "", syscall.ENOENT},
		{"mkdir", mkdir(dir), "", nil},
		{"mkdir again", mkdir(dir + "/"), "", syscall.EEXIST},
		{"mkdir below", mkdir(dir + "/b"), "", syscall.EPERM},
		{"mkdir elsewhere", mkdir("/tmp/a"), "", syscall.EPERM},
		{"provider", read(dir + "/provider"), "sev_guest\n", nil},
		{"floor", read(dir + "/privlevel_floor"), "0\n", nil},
		{"generation 0", read(dir + "/generation"), "0\n", nil},
		{"report of nothing", read(dir + "/outblob"), "", syscall.EINVAL},
		{"certificates of nothing", read(dir + "/auxblob"), "", syscall.EINVAL},
		{"too much", write(dir+"/inblob", a64+"a"), "", syscall.EFBIG},
		{"too much does not count", read(dir + "/generation"), "0\n", nil},
		{"too little", write(dir+"/inblob", "a"), "", nil},
		{"too little is noticed", read(dir + "/outblob"), "", syscall.EINVAL},
		{"inblob", write(dir+"/inblob", a64), "", nil},
		{"generation 2", read(dir + "/generation"), "2\n", nil},
		{"report", read(dir + "/outblob"), "1 6161 0", nil},
		{"the same report", read(dir + "/outblob"), "1 6161 0", nil},
		{"its certificates", read(dir + "/auxblob"), "certificates", nil},
		{"VMPL in hex", write(dir+"/privlevel", "0x3\n"), "", nil},
		{"VMPL 4", write(dir+"/privlevel", "4"), "", syscall.EINVAL},
		{"VMPL in words", write(dir+"/privlevel", "low"), "", syscall.EINVAL},
		{"generation 3", read(dir + "/generation"), "3\n", nil},
		{"certificates make a report", read(dir + "/auxblob"), "certificates", nil},
		{"new report", read(dir + "/outblob"), "2 6161 3", nil},
		{"inblob again", write(dir+"/inblob", b64), "", nil},
		{"newer report", read(dir + "/outblob"), "3 6262 3", nil},
		{"read what is for writing", read(dir + "/inblob"), "", syscall.EACCES},
		{"read privlevel", read(dir + "/privlevel"), "", syscall.EACCES},
		{"write what is for reading", write(dir+"/outblob", "x"), "", syscall.EACCES},
		{"no such file to read", read(dir + "/quote"), "", syscall.ENOENT},
		{"no such file to write", write(dir+"/quote", "x"), "", syscall.ENOENT},
		{"read the directory", read(dir), "", syscall.ENOENT},
		{"read elsewhere", read("/etc/passwd"), "", syscall.ENOENT},
		{"read around", read(dir + "/../../../../etc/passwd"), "", syscall.ENOENT},
		{"remove a file", remove(dir + "/inblob"), "", syscall.EPERM},
		{"remove elsewhere", remove("/tmp"), "", syscall.EPERM},
		{"remove", remove(dir), "", nil},
		{"remove again", remove(dir), "", syscall.ENOENT},
		{"mkdir anew", mkdir(dir), "", nil},
		{"nothing is left of the old one", read(dir + "/generation"), "0\n", nil},
	} {
		got, err := step.do()
		if got != step.want || !errors.Is(err, step.err) || (err != nil) != (step.err != nil) {
			t.Errorf("%s: got %q, %v, want %q, %v", step.name, got, err, step.want, step.err)
		}
	}
	own := errors.New("own")
	tree.Attest = func([64]byte, uint32) ([]byte, error) { return nil, own }
	if err := tree.WriteFile(dir+"/inblob", []byte(a64), 0); err != nil {
		t.Fatal(err)
	}
	if b, err := tree.ReadFile(dir + "/outblob"); b != nil || !errors.Is(err, own) {
		t.Errorf("got %q, %v", b, err)
	}
	tree.PrivlevelFloor = 2 // of a guest that did not look, and asks for VMPL 0
	if _, err := tree.ReadFile(dir + "/outblob"); !errors.Is(err, syscall.EIO) {
		t.Errorf("got %v", err)
	}
}

// TestTreeShared is for the race detector: a directory for each, as the kernel's documentation advises.
func TestTreeShared(t *testing.T) {
	tree := &sim.Tree{Attest: func(data [64]byte, _ uint32) ([]byte, error) { return data[:1], nil }}
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			dir := fmt.Sprintf("%s/%d", sim.Reports, i)
			if err := tree.Mkdir(dir, 0o700); err != nil {
				t.Error(err)
			}
			for j := range 50 {
				b := byte(i*50 + j)
				if err := tree.WriteFile(dir+"/inblob", bytes.Repeat([]byte{b}, 64), 0o600); err != nil {
					t.Error(err)
				}
				if got, err := tree.ReadFile(dir + "/outblob"); err != nil || got[0] != b {
					t.Errorf("got %x, %v, want %x", got, err, b)
				}
			}
		})
	}
	wg.Wait()
}
