package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/ovmf/ovmftest"
	"github.com/kcradle/kcradle/snp/sim"
	"github.com/kcradle/kcradle/snp/verify"
	"github.com/kcradle/kcradle/spec"
)

var update = flag.Bool("update", false, "write the golden files in the scripts about attestation")

// simClock is the instant of everything that is simulated.
var simClock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// simulation is AMD in small: an authority for each line, and what they publish.
type simulation struct {
	roots   verify.Roots
	service sim.KDS
	chips   map[string]*sim.Chip // by the name that the command report takes
}

// simulate is made once, when a test first asks for it: keys take seconds.
var simulate = sync.OnceValues(func() (*simulation, error) {
	keys, err := sim.NewKeys()
	if err != nil {
		return nil, err
	}
	s := &simulation{service: sim.KDS{}, chips: map[string]*sim.Chip{}}
	for _, line := range []snp.Line{snp.LineMilan, snp.LineGenoa, snp.LineTurin} {
		for _, signer := range []snp.Signer{snp.SignerVCEK, snp.SignerVLEK} {
			chip, err := sim.NewAuthority(keys, line, signer, simClock).NewChip(1)
			if err != nil {
				return nil, err
			}
			if err := s.service.Publish(chip); err != nil {
				return nil, err
			}
			name := strings.ToLower(line.String())
			if signer == snp.SignerVLEK {
				name += "-vlek"
			}
			s.chips[name] = chip
			root, err := chip.Authority.Root()
			if err != nil {
				return nil, err
			}
			s.roots = verify.Roots{Milan: root, Genoa: root, Turin: root}
		}
	}
	old := *s.chips["milan"] // a report that does not name its processor
	old.Report.Version, old.Report.CPU = snp.Version2, snp.CPU{}
	s.chips["milan-v2"] = &old
	masked := *s.chips["genoa"]
	masked.Report.ChipID = [64]byte{}
	s.chips["genoa-masked"] = &masked
	unknown, err := s.chips["genoa"].Authority.NewChip(2) // not published
	if err != nil {
		return nil, err
	}
	s.chips["genoa-unknown"] = unknown
	return s, nil
})

// ServeHTTP is the key distribution service, and below /busy one that has no time before tomorrow.
func (s *simulation) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.URL.Path, "/busy/") {
		w.Header().Set("Retry-After", "86400")
		w.WriteHeader(http.StatusTooManyRequests)
		return
	}
	s.service.ServeHTTP(w, r)
}

// attestCommands are what the scripts about attestation have beside kcradle:
//
//	firmware amdsev|generic|small FILE   writes a firmware image
//	bundle DIR                     writes what makes a directory a bundle
//	launch CHIP REF POD FILE       writes evidence of a simulated chip, see there
//	report CHIP FILE               writes a report of a simulated chip
//	simulated CODE VERB ARG…       runs kcradle in this process, with the simulated roots and clock and the service at
//	                               $KDS, and wants the exit code
func attestCommands(kdsURL func() string) map[string]func(ts *testscript.TestScript, neg bool, args []string) {
	return map[string]func(ts *testscript.TestScript, neg bool, args []string){
		"launch": launch,
		"firmware": func(ts *testscript.TestScript, _ bool, args []string) {
			layout := ovmftest.AmdSev(1 << 20)
			switch args[0] {
			case "generic":
				layout = ovmftest.OvmfX64(1 << 20)
			case "small":
				layout = ovmftest.AmdSev(64 << 10)
			}
			ts.Check(os.WriteFile(ts.MkAbs(args[1]), ovmftest.Image(layout), 0o644))
		},
		"bundle": func(ts *testscript.TestScript, _ bool, args []string) {
			dir, hex64 := ts.MkAbs(args[0]), strings.Repeat("0123456789abcdef", 4)
			ts.Check(os.MkdirAll(dir, 0o755))
			for name, v := range map[string]any{
				"bundle.json": bundle.Meta{Version: bundle.Version, Created: simClock, Writer: "test"},
				"pod.json": spec.Pod{Version: spec.PodVersion, Name: "web", Containers: []spec.Container{{
					ID: hex64, Name: "web", Created: simClock, Cmd: []string{"sh"},
					Image: spec.Image{Ref: "busybox", ConfigID: "sha256:" + hex64, Layers: []string{"sha256:" + hex64}},
				}}},
			} {
				b, err := json.Marshal(v)
				ts.Check(err)
				ts.Check(os.WriteFile(filepath.Join(dir, name), b, 0o644))
			}
		},
		"report": func(ts *testscript.TestScript, _ bool, args []string) {
			s, err := simulate()
			ts.Check(err)
			chip, ok := s.chips[args[0]]
			if !ok {
				ts.Fatalf("no chip %s", args[0])
			}
			b, err := chip.Attest([64]byte{0xab}, 0)
			ts.Check(err)
			ts.Check(os.WriteFile(ts.MkAbs(args[1]), b, 0o644))
		},
		"simulated": func(ts *testscript.TestScript, _ bool, args []string) {
			s, err := simulate()
			ts.Check(err)
			url := kdsURL()
			if v := ts.Getenv("KDS"); v != "" {
				url = strings.Replace(v, "SERVER", url, 1)
			}
			a := &app{
				Stdin: strings.NewReader(""), Stdout: ts.Stdout(), Stderr: ts.Stderr(), Root: ts.MkAbs("root"),
				Now: func() time.Time { return simClock }, Roots: s.roots, KDS: url,
			}
			if got := fmt.Sprint(execute(context.Background(), a, append([]string{"--root", ts.MkAbs("root")}, args[1:]...))); got != args[0] {
				ts.Fatalf("exit code: got %s, want %s", got, args[0])
			}
		},
	}
}

// TestAttestScripts runs the scripts of testdata/attest. They need no machine, and no network but the loopback.
func TestAttestScripts(t *testing.T) {
	p := params(t, "testdata/attest")
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s, err := simulate()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		s.ServeHTTP(w, r)
	}))
	t.Cleanup(server.Close) // after the scripts, which run in parallel
	for name, f := range attestCommands(func() string { return server.URL }) {
		p.Cmds[name] = f
	}
	p.UpdateScripts = *update
	testscript.Run(t, p)
}

// runHere executes kcradle in this process with AMD's roots.
func runHere(t *testing.T, a *app, args ...string) (stdout, stderr string, code int) {
	t.Helper()
	var out, errs bytes.Buffer
	a.Stdin, a.Stdout, a.Stderr, a.Log = strings.NewReader(""), &out, &errs, slog.New(slog.DiscardHandler)
	if a.Now == nil {
		a.Now = func() time.Time { return simClock }
	}
	if a.Roots == (verify.Roots{}) {
		a.Roots = verify.AMD()
	}
	code = execute(t.Context(), a, args)
	return out.String(), errs.String(), code
}

// TestMeasureVectors gives every published vector that can be had as files to the command.
func TestMeasureVectors(t *testing.T) {
	b := need.Fixture(t, "vectors.json")
	var file struct {
		Vectors []struct {
			Source, OVMF, CPU, VMM, Digest string
			VCPUs                          int
			Kernel, Initrd, Append         *string
			Features                       string `json:"guest_features"`
		}
	}
	if err := json.Unmarshal(b, &file); err != nil {
		t.Fatal(err)
	}
	measured := 0
	for _, v := range file.Vectors {
		if v.VMM != "QEMU" || !strings.HasSuffix(v.OVMF, ".bin") {
			continue
		}
		measured++
		args := []string{"measure", "--firmware", need.FixturePath(t, "fixtures/"+v.OVMF), "--vcpus", fmt.Sprint(v.VCPUs), "--cpu", v.CPU, "--sev-features", v.Features}
		for flag, value := range map[string]*string{"--kernel": v.Kernel, "--initrd": v.Initrd, "--append": v.Append} {
			if value != nil && (v.Kernel != nil || *value != "") {
				args = append(args, flag, *value)
			}
		}
		out, errs, code := runHere(t, &app{}, args...)
		if out != v.Digest+"\n" || errs != "" || code != 0 {
			t.Errorf("%s: got %q, %q, %d\nwant %s", v.Source, out, errs, code, v.Digest)
		}
	}
	if measured < 8 {
		t.Errorf("only %d of %d vectors were measured", measured, len(file.Vectors))
	}
}

// TestRealReports explains every real report, and fetches what it is verified with from a service that has AMD's own
// certificates.
func TestRealReports(t *testing.T) {
	service := sim.KDS{}
	read := func(name string) []byte { return need.Fixture(t, "fixtures/"+name) }
	service[kds.Chain(snp.LineMilan, snp.SignerVCEK).URL()] = read("ask_ark_milan.pem")
	service[kds.Chain(snp.LineGenoa, snp.SignerVCEK).URL()] = read("ask_ark_genoa.pem")
	service[kds.Chain(snp.LineTurin, snp.SignerVCEK).URL()] = read("ask_ark_turin_vcek.pem")
	reports := []struct{ name, product, words string }{
		{"gosevguest-milan-v2-debugpolicy", "Milan", "DEBUG ALLOWED"},
		{"trustee-milan-v2", "Milan", "bl 3 tee 0 snp 8 ucode 115"},
		{"oak-milan-v3", "", "Milan (family 0x19"},
		{"trustee-siena-v3", "", "Bergamo or Siena (family 0x19"},
		{"oak-genoa-v5", "", "launch mitigations"},
		{"oak-turin-v5", "", "unknown bits 0x40"},
	}
	for _, r := range reports {
		report, err := snp.Parse(read(r.name + ".report"))
		if err != nil {
			t.Fatal(err)
		}
		line := report.Product().Line()
		if r.product != "" {
			line = snp.LineMilan
		}
		service[kds.VCEK(line, report.ChipID, report.ReportedTCB).URL()] = read(strings.TrimSuffix(r.name, "-debugpolicy") + ".vcek.der")
	}
	server := httptest.NewServer(service)
	defer server.Close()
	root := t.TempDir()
	for _, r := range reports {
		t.Run(r.name, func(t *testing.T) {
			path := need.FixturePath(t, "fixtures/"+r.name+".report")
			out, errs, code := runHere(t, &app{}, "snp", "explain", path)
			if code != 0 || errs != "" || !strings.Contains(out, r.words) {
				t.Errorf("got %d, %q\n%s", code, errs, out)
			}
			args := []string{"--root", root, "certs", "fetch", "--report", path}
			if r.product != "" {
				args = append(args, "--product", r.product)
			}
			// AMD's lists are not among the fixtures.
			out, errs, code = runHere(t, &app{KDS: server.URL}, args...)
			if code != exitMissing || !strings.Contains(errs, "revocation list of ") {
				t.Errorf("got %d, %q, %q", code, out, errs)
			}
		})
	}
	out, errs, code := runHere(t, &app{}, "--root", root, "certs", "verify")
	if code != 0 || strings.Count(out, "good vcek/") != len(reports)+3 {
		t.Errorf("got %d, %q\n%s", code, errs, out)
	}
}

func TestCPUModels(t *testing.T) {
	for _, name := range cpuModels() {
		if _, err := measure.ParseCPU(name); err != nil {
			t.Error(err)
		}
	}
}

func TestParseTCB(t *testing.T) {
	for _, tt := range []struct {
		layout snp.Layout
		s      string
		want   string // empty: refused
	}{
		{snp.LayoutMilan, "bl=10,tee=0,snp=25,ucode=84", "bl 10 tee 0 snp 25 ucode 84"},
		{snp.LayoutMilan, "ucode=255,snp=0,tee=0,bl=0", "bl 0 tee 0 snp 0 ucode 255"},
		{snp.LayoutTurin, "fmc=1,bl=2,tee=3,snp=4,ucode=5", "fmc 1 bl 2 tee 3 snp 4 ucode 5"},
		{snp.LayoutMilan, "fmc=1,bl=2,tee=3,snp=4,ucode=5", ""},
		{snp.LayoutTurin, "bl=2,tee=3,snp=4,ucode=5", ""},
		{snp.LayoutMilan, "", ""},
		{snp.LayoutMilan, "bl=10,tee=0,snp=25", ""},
		{snp.LayoutMilan, "bl=10,tee=0,snp=25,ucode=256", ""},
		{snp.LayoutMilan, "bl=10,tee=0,snp=25,ucode=-1", ""},
		{snp.LayoutMilan, "bl=10,tee=0,snp=25,ucode=", ""},
		{snp.LayoutMilan, "bl=10,tee=0,snp=25,ucode", ""},
		{snp.LayoutMilan, "bl=10,bl=10,tee=0,snp=25,ucode=84", ""},
		{snp.LayoutMilan, "bl=10, tee=0,snp=25,ucode=84", ""},
		{snp.LayoutMilan, "bl=10,tee=0,snp=25,ucode=84,", ""},
	} {
		got, err := parseTCB(tt.layout, tt.s)
		if tt.want == "" && err == nil || tt.want != "" && got.String() != tt.want {
			t.Errorf("%q: got %s, %v", tt.s, got, err)
		}
	}
}

func FuzzParseTCB(f *testing.F) {
	f.Add("bl=10,tee=0,snp=25,ucode=84", false)
	f.Add("fmc=1,bl=2,tee=3,snp=4,ucode=5", true)
	f.Add("bl=1,,=", true)
	f.Fuzz(func(t *testing.T, s string, turin bool) {
		layout := snp.LayoutMilan
		if turin {
			layout = snp.LayoutTurin
		}
		tcb, err := parseTCB(layout, s)
		if err != nil {
			return
		}
		again, err := parseTCB(layout, strings.NewReplacer(" tee ", ",tee=", " snp ", ",snp=", " ucode ", ",ucode=", "fmc ", "fmc=", " bl ", ",bl=", "bl ", "bl=").Replace(tcb.String()))
		if err != nil || again != tcb {
			t.Errorf("%q: got %s, then %s, %v", s, tcb, again, err)
		}
	})
}
