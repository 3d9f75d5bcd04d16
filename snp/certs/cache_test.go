package certs

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/kcradle/kcradle/internal/need"
	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/sim"
	"github.com/kcradle/kcradle/snp/verify"
)

var clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

func now() time.Time { return clock }

// testKeys are made once: they take seconds. The last one belongs to nobody whom a test trusts.
var testKeys = sync.OnceValues(func() (keys sim.Keys, foreign *rsa.PrivateKey) {
	var err, foreignErr error
	var wg sync.WaitGroup
	wg.Go(func() { keys, err = sim.NewKeys() })
	wg.Go(func() { foreign, foreignErr = rsa.GenerateKey(rand.Reader, 4096) })
	wg.Wait()
	if err != nil || foreignErr != nil {
		panic("no keys")
	}
	return keys, foreign
})

func newChip(t testing.TB, l snp.Line, s snp.Signer, n uint64) *sim.Chip {
	t.Helper()
	keys, _ := testKeys()
	c, err := sim.NewAuthority(keys, l, s, clock).NewChip(n)
	if err != nil {
		t.Fatal(err)
	}
	c.Report.ReportData, c.Report.Measurement = [64]byte{1}, [48]byte{2}
	return c
}

// verified returns why the hardware of a report is not believed; what the report says is as expected. AMD's real lists are
// not among the fixtures.
func verified(t testing.TB, r verify.Roots, source verify.Source, e verify.Evidence) error {
	t.Helper()
	report, err := snp.Parse(e.Report)
	if err != nil {
		t.Fatal(err)
	}
	p := policy.Default()
	p.AllowMilan, p.Signer, p.ReportVersion.Min, p.Platform.AliasCheck = true, policy.AnySigner, 2, policy.Any
	p.GuestPolicy.Debug, p.AllowProvisional = true, true
	p.Measurements = []measure.Digest{report.Measurement}
	if r != verify.AMD() {
		p.CRL = policy.CRLRequire
	}
	v, err := verify.New(verify.Config{Now: now, Roots: r, Source: source, Policy: p})
	if err != nil {
		t.Fatal(err)
	}
	return v.Verify(t.Context(), e, verify.Expectation{ReportData: &report.ReportData}).Err()
}

func roots(t testing.TB) verify.Roots {
	t.Helper()
	root, err := newChip(t, snp.LineMilan, snp.SignerVCEK, 1).Authority.Root()
	if err != nil {
		t.Fatal(err)
	}
	return verify.Roots{Milan: root, Genoa: root, Turin: root}
}

func publish(t testing.TB, chips ...*sim.Chip) *service {
	t.Helper()
	s := &service{KDS: sim.KDS{}}
	for _, c := range chips {
		if err := s.Publish(c); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// service counts what it is asked.
type service struct {
	sim.KDS
	asked []string
	err   error // instead of every answer
}

func (s *service) Fetch(ctx context.Context, o kds.Object) ([]byte, error) {
	s.asked = append(s.asked, o.String())
	if s.err != nil {
		return nil, s.err
	}
	return s.KDS.Fetch(ctx, o)
}

// took returns what was asked since the last call.
func (s *service) took() []string {
	asked := s.asked
	s.asked = nil
	return asked
}

func open(t testing.TB, c Config) *Cache {
	t.Helper()
	if c.Roots == (verify.Roots{}) {
		c.Roots = roots(t)
	}
	if c.Now == nil {
		c.Now = now
	}
	cache, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	return cache
}

// tree lists the files of a directory.
func tree(t testing.TB, dir string) (out []string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		out = append(out, filepath.ToSlash(rel))
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return out
}

// TestOffline fills a directory through a verifier, and verifies from it without an upstream.
func TestOffline(t *testing.T) {
	for _, line := range []snp.Line{snp.LineMilan, snp.LineGenoa, snp.LineTurin} {
		for _, signer := range []snp.Signer{snp.SignerVCEK, snp.SignerVLEK} {
			t.Run(line.String()+"/"+signer.String(), func(t *testing.T) {
				chip := newChip(t, line, signer, 1)
				report, err := chip.Sign(chip.Report)
				if err != nil {
					t.Fatal(err)
				}
				e := verify.Evidence{Report: report}
				if signer == snp.SignerVLEK {
					if e.VEK, err = chip.VEKDER(); err != nil {
						t.Fatal(err)
					}
				}
				dir := filepath.Join(t.TempDir(), "not", "yet")
				decide := func(source verify.Source) error {
					return verified(t, roots(t), source, e)
				}
				if err := decide(open(t, Config{Dir: dir})); err == nil {
					t.Error("passed with an empty directory")
				}
				upstream := publish(t, chip)
				if err := decide(open(t, Config{Dir: dir, Upstream: upstream})); err != nil {
					t.Fatal(err)
				}
				want := []string{
					fileName(kds.Chain(line, signer)),
					fileName(kds.CRL(line, signer)),
				}
				if signer == snp.SignerVCEK {
					want = append(want, fileName(chip.Object()))
				}
				slices.Sort(want)
				if got := tree(t, dir); !slices.Equal(got, want) || len(upstream.took()) != len(want) {
					t.Errorf("got  %v\nwant %v", got, want)
				}
				if err := decide(open(t, Config{Dir: dir})); err != nil {
					t.Errorf("offline: %v", err)
				}
				if err := decide(open(t, Config{Dir: dir, Upstream: upstream})); err != nil || upstream.took() != nil {
					t.Errorf("asked again for what is there: %v", err)
				}
			})
		}
	}
}

func TestFileNames(t *testing.T) {
	milan, turin := newChip(t, snp.LineMilan, snp.SignerVCEK, 1), newChip(t, snp.LineTurin, snp.SignerVCEK, 1)
	for want, o := range map[string]kds.Object{
		fmt.Sprintf("vcek/Milan/%x/bl10-tee01-snp25-ucode200.der", milan.Report.ChipID):           milan.Object(),
		fmt.Sprintf("vcek/Turin/%x/fmc02-bl10-tee01-snp25-ucode200.der", turin.Report.ChipID[:8]): turin.Object(),
		"vcek/Genoa/cert_chain.pem": kds.Chain(snp.LineGenoa, snp.SignerVCEK),
		"vcek/Genoa/crl.der":        kds.CRL(snp.LineGenoa, snp.SignerVCEK),
		"vlek/Turin/cert_chain.pem": kds.Chain(snp.LineTurin, snp.SignerVLEK),
		"vlek/Turin/crl.der":        kds.CRL(snp.LineTurin, snp.SignerVLEK),
	} {
		if got := fileName(o); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
		if got, err := parseFileName(want); err != nil || got != o {
			t.Errorf("%s: got %v, %v", want, got, err)
		}
	}
	for _, name := range badNames {
		if o, err := parseFileName(name); err == nil {
			t.Errorf("%q is %s", name, o)
		}
	}
}

var badNames = []string{
	"", "vcek", "vcek/Milan", "vcek/Milan/", "vcek/Milan/x", "vcek/Rome/crl.der", "vtek/Milan/crl.der", "vcek/Milan/crl.der/x",
	"vcek/Milan/../Milan/crl.der", "/vcek/Milan/crl.der", "vcek/milan/crl.der", "vcek/Milan//crl.der",
	"vcek/Turin/0102030405060708/bl10-tee01-snp25-ucode200.der",       // no FMC
	"vcek/Turin/0102030405060708/fmc2-bl10-tee01-snp25-ucode200.der",  // no second digit
	"vcek/Turin/0102030405060708/fmc02-bl10-tee01-snp25-ucode256.der", // more than a byte
	"vcek/Turin/0102030405060708/fmc02-bl10-tee01-snp25-ucode200.der2",
	"vcek/Turin/0102030405060708/fmc02-bl10-tee01-snp25-ucode+20.der",
	"vcek/Turin/010203040506070A/fmc02-bl10-tee01-snp25-ucode200.der", // upper case
	"vcek/Turin/01020304050607/fmc02-bl10-tee01-snp25-ucode200.der",   // seven bytes
	"vcek/Turin/0000000000000000/fmc02-bl10-tee01-snp25-ucode200.der", // no chip
	"vlek/Turin/0102030405060708/fmc02-bl10-tee01-snp25-ucode200.der", // not published
}

func FuzzFileName(f *testing.F) {
	f.Add("vcek/Turin/0102030405060708/fmc02-bl10-tee01-snp25-ucode200.der")
	f.Add("vcek/Milan/" + strings.Repeat("ab", 64) + "/bl10-tee01-snp25-ucode200.der")
	f.Add("vlek/Genoa/crl.der")
	for _, name := range badNames {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if o, err := parseFileName(name); err == nil && (fileName(o) != name || o.Validate() != nil) {
			t.Errorf("%q is %s", name, o)
		}
	})
}

// TestRefuses offers what is not what it claims to be: none of it may enter the directory, by any door.
func TestRefuses(t *testing.T) {
	_, foreign := testKeys()
	chip := newChip(t, snp.LineGenoa, snp.SignerVCEK, 1)
	der := func(f func() ([]byte, error)) []byte {
		t.Helper()
		b, err := f()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	under := func(keys sim.Keys) *sim.Chip {
		other := *chip
		authority := *chip.Authority
		authority.Keys, other.Authority = keys, &authority
		return &other
	}
	self := under(sim.Keys{ARK: foreign, ASK: foreign})
	otherTCB := newChip(t, snp.LineGenoa, snp.SignerVCEK, 1)
	tcb := otherTCB.Report.ReportedTCB
	tcb.SNP--
	otherTCB.SetTCB(tcb)
	vlek := newChip(t, snp.LineGenoa, snp.SignerVLEK, 1)
	chain, crl := kds.Chain(snp.LineGenoa, snp.SignerVCEK), kds.CRL(snp.LineGenoa, snp.SignerVCEK)

	tests := []struct {
		name string
		o    kds.Object
		body []byte
		err  string
	}{
		{"empty certificate", chip.Object(), nil, "vek certificate"},
		{"rubbish", chip.Object(), []byte("rubbish"), "vek certificate"},
		{"bytes behind a certificate", chip.Object(), append(der(chip.VEKDER), 0), "vek certificate"},
		{"long certificate", chip.Object(), make([]byte, kds.MaxVEK+1), "more than"},
		{"PEM", chip.Object(), sim.PEM(der(chip.VEKDER)), "vek certificate"},
		{"another chip", chip.Object(), der(newChip(t, snp.LineGenoa, snp.SignerVCEK, 2).VEKDER), "of chip"},
		{"another TCB version", chip.Object(), der(otherTCB.VEKDER), "of TCB version bl 10 tee 1 snp 24"},
		{"another line", chip.Object(), der(newChip(t, snp.LineMilan, snp.SignerVCEK, 1).VEKDER), "VCEK of Milan"},
		{"VLEK", chip.Object(), der(vlek.VEKDER), "VLEK of Genoa"},
		{"ASK", chip.Object(), der(chip.Authority.ASKDER), `subject "SEV-Genoa"`},
		{"self-made certificate", chip.Object(), der(self.VEKDER), "not signed"},
		{"empty chain", chain, nil, "certificate 1 of 2"},
		{"long chain", chain, make([]byte, kds.MaxChain+1), "more than"},
		{"chain of DER", chain, der(chip.Authority.ASKDER), "certificate 1 of 2"},
		{"self-made chain", chain, der(self.Authority.Chain), "not the root of Genoa"},
		{"self-made ASK", chain, slices.Concat(sim.PEM(der(under(sim.Keys{ARK: foreign, ASK: foreign}).Authority.ASKDER)), sim.PEM(der(chip.Authority.RootDER))), "ASK: not signed"},
		{"chain of another line", chain, der(newChip(t, snp.LineTurin, snp.SignerVCEK, 1).Authority.Chain), `ARK: subject "ARK-Turin"`},
		{"chain of VLEKs", chain, der(vlek.Authority.Chain), "ASK: subject"},
		{"empty list", crl, nil, "revocation list"},
		{"long list", crl, make([]byte, kds.MaxCRL+1), "more than"},
		{"self-made list", crl, der(func() ([]byte, error) { return self.Authority.CRL() }), "not signed"},
		{"list of another line", crl, der(func() ([]byte, error) { return newChip(t, snp.LineMilan, snp.SignerVCEK, 1).Authority.CRL() }), `issued by "ARK-Milan"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			upstream := publish(t, chip)
			upstream.KDS[tt.o.URL()] = tt.body
			cache := open(t, Config{Dir: dir, Upstream: upstream})
			_, err := cache.Fetch(t.Context(), tt.o)
			for door, err := range map[string]error{
				"Fetch":   err,
				"Refresh": cache.Refresh(t.Context(), tt.o),
				"Put":     cache.Put(t.Context(), tt.o, tt.body),
			} {
				var refused *RefusedError
				if !errors.As(err, &refused) || refused.Object != tt.o || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("%s: got %v, want …%s…", door, err, tt.err)
				}
			}
			if got := tree(t, dir); slices.Contains(got, fileName(tt.o)) {
				t.Errorf("it is in %v", got)
			}
		})
	}

	t.Run("AMD's roots", func(t *testing.T) {
		dir := t.TempDir()
		cache := open(t, Config{Dir: dir, Roots: verify.AMD(), Upstream: publish(t, chip)})
		for _, o := range []kds.Object{chain, crl, chip.Object()} {
			if _, err := cache.Fetch(t.Context(), o); err == nil || !strings.Contains(err.Error(), "not the root of Genoa") {
				t.Errorf("%s: got %v", o, err)
			}
		}
		if got := tree(t, dir); got != nil {
			t.Errorf("got %v", got)
		}
	})
	t.Run("no object", func(t *testing.T) {
		cache := open(t, Config{Dir: t.TempDir(), Upstream: publish(t, chip)})
		_, err := cache.Fetch(t.Context(), kds.Object{})
		if err == nil || cache.Put(t.Context(), kds.Object{}, nil) == nil || cache.Refresh(t.Context(), kds.Object{}) == nil {
			t.Error("the zero object is one")
		}
	})
	t.Run("a chain first", func(t *testing.T) {
		cache := open(t, Config{Dir: t.TempDir()})
		if err := cache.Current(t.Context(), chain); !errors.Is(err, ErrMissing) {
			t.Errorf("got %v", err)
		}
		if err := cache.Put(t.Context(), chip.Object(), der(chip.VEKDER)); !errors.Is(err, ErrMissing) {
			t.Errorf("got %v", err)
		}
		for _, put := range []struct {
			o    kds.Object
			body []byte
		}{{chain, der(chip.Authority.Chain)}, {chip.Object(), der(chip.VEKDER)}, {crl, der(func() ([]byte, error) { return chip.Authority.CRL() })}} {
			if err := cache.Put(t.Context(), put.o, put.body); err != nil {
				t.Errorf("%s: %v", put.o, err)
			}
			if err := cache.Current(t.Context(), put.o); err != nil {
				t.Errorf("%s: %v", put.o, err)
			}
			asking := open(t, Config{Dir: cache.config.Dir, Upstream: publish(t, chip)})
			if list, err := asking.Entries(t.Context()); err != nil || !list[len(list)-1].Fetched.IsZero() {
				t.Errorf("%s counts as fetched: %+v, %v", put.o, list, err)
			}
			if got, err := cache.Fetch(t.Context(), put.o); err != nil || !bytes.Equal(got, put.body) {
				t.Errorf("%s: got %d bytes, %v", put.o, len(got), err)
			}
		}
	})
}

// TestStale turns the clock on.
func TestStale(t *testing.T) {
	chip := newChip(t, snp.LineGenoa, snp.SignerVCEK, 1)
	upstream := publish(t, chip)
	crl := kds.CRL(snp.LineGenoa, snp.SignerVCEK)
	at := clock
	var log bytes.Buffer
	config := Config{Dir: t.TempDir(), Upstream: upstream, Now: func() time.Time { return at },
		Log: slog.New(slog.NewTextHandler(&log, nil))}
	cache := open(t, config)
	config.Upstream = nil
	offline := open(t, config)
	fetch := func(c *Cache, o kds.Object, asked ...string) []byte {
		t.Helper()
		b, err := c.Fetch(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		if got := upstream.took(); !slices.Equal(got, asked) {
			t.Errorf("asked for %q, want %q", got, asked)
		}
		return b
	}
	const chainOf, listOf = "chain of Genoa for VCEKs", "revocation list of Genoa for VCEKs"
	old := fetch(cache, crl, chainOf, listOf)
	at = clock.Add(23 * time.Hour)
	fetch(cache, crl)
	at = clock.Add(24 * time.Hour)

	// After a day there is a newer list, in which the ASK is revoked.
	keys, _ := testKeys()
	newer, err := sim.NewAuthority(keys, snp.LineGenoa, snp.SignerVCEK, at).CRL(0x10001)
	if err != nil {
		t.Fatal(err)
	}
	upstream.KDS[crl.URL()] = newer
	if got := fetch(offline, crl); !bytes.Equal(got, old) {
		t.Error("offline: not what is there")
	}
	if got := fetch(cache, crl, listOf); !bytes.Equal(got, newer) {
		t.Error("not the newer list")
	}
	fetch(cache, crl)

	// Who hands in a list again and again keeps nobody from asking for a newer one.
	at = at.Add(25 * time.Hour)
	if err := offline.Put(t.Context(), crl, newer); err != nil {
		t.Error(err)
	}
	fetch(cache, crl, listOf)

	// Nobody may bring back the list in which it is not.
	if err := offline.Put(t.Context(), crl, old); err != nil {
		t.Error(err)
	}
	at = at.Add(48 * time.Hour)
	upstream.KDS[crl.URL()] = old
	if got := fetch(cache, crl, listOf); !bytes.Equal(got, newer) {
		t.Error("the older list is back")
	}

	// Where nothing can be had, the old is better than nothing, and the log says so.
	at = at.Add(48 * time.Hour)
	upstream.err = errors.New("unplugged")
	if got := fetch(cache, crl, listOf); !bytes.Equal(got, newer) {
		t.Error("not what is there")
	}
	if !strings.Contains(log.String(), "not up to date") || !strings.Contains(log.String(), "unplugged") {
		t.Errorf("the log says %q", log.String())
	}
	if err := cache.Refresh(t.Context(), crl); err == nil {
		t.Error("refreshed from nothing")
	}
	upstream.took()

	// A file from tomorrow does not stay for ever.
	at = at.Add(-72 * time.Hour)
	fetch(cache, crl, listOf)

	// Certificates are kept until they expire, and then asked for again.
	upstream.err, at = nil, clock
	fetch(cache, chip.Object(), "VCEK of Genoa chip "+fmt.Sprintf("%.8x", chip.Report.ChipID[:])+"… at bl 10 tee 1 snp 25 ucode 200")
	at = clock.AddDate(0, 11, 0)
	fetch(cache, chip.Object())
	at = clock.AddDate(1, 0, 1)
	fetch(cache, chip.Object(), chainOf, "VCEK of Genoa chip "+fmt.Sprintf("%.8x", chip.Report.ChipID[:])+"… at bl 10 tee 1 snp 25 ucode 200")
	fetch(offline, chip.Object())
}

// TestDamaged finds things in the directory that it did not put there.
func TestDamaged(t *testing.T) {
	chip := newChip(t, snp.LineTurin, snp.SignerVCEK, 1)
	for name, damage := range map[string]func(file string) error{
		"truncated": func(file string) error { return os.Truncate(file, 100) },
		"emptied":   func(file string) error { return os.Truncate(file, 0) },
		"grown":     func(file string) error { return os.Truncate(file, 1<<40) },
		"another's": func(file string) error {
			b, err := newChip(t, snp.LineTurin, snp.SignerVCEK, 2).VEKDER()
			if err != nil {
				return err
			}
			return os.WriteFile(file, b, 0o644)
		},
		"a link":    func(file string) error { return errors.Join(os.Remove(file), os.Symlink("/dev/zero", file)) },
		"a program": func(file string) error { return os.WriteFile(file, []byte("\x7fELF"), 0o755) },
	} {
		t.Run(name, func(t *testing.T) {
			upstream := publish(t, chip)
			dir := t.TempDir()
			cache := open(t, Config{Dir: dir, Upstream: upstream})
			want, err := cache.Fetch(t.Context(), chip.Object())
			if err != nil {
				t.Fatal(err)
			}
			file := filepath.Join(dir, fileName(chip.Object()))
			if err := damage(file); err != nil {
				t.Fatal(err)
			}
			offline := open(t, Config{Dir: dir})
			if _, err := offline.Fetch(t.Context(), chip.Object()); err == nil || errors.Is(err, ErrMissing) || !strings.Contains(err.Error(), file) {
				t.Errorf("got %v", err)
			}
			list, err := offline.Entries(t.Context())
			if err != nil || len(list) != 2 || list[0].Err != nil || list[1].Err == nil {
				t.Errorf("got %+v, %v", list, err)
			}
			if got, err := cache.Fetch(t.Context(), chip.Object()); err != nil || !bytes.Equal(got, want) {
				t.Errorf("it is not repaired: %d bytes, %v", len(got), err)
			}
			if got, err := offline.Fetch(t.Context(), chip.Object()); err != nil || !bytes.Equal(got, want) {
				t.Errorf("it is not repaired on the disk: %d bytes, %v", len(got), err)
			}
		})
	}
}

// TestNoDirectory has a file where the directory should be.
func TestNoDirectory(t *testing.T) {
	chip := newChip(t, snp.LineMilan, snp.SignerVCEK, 1)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	cache := open(t, Config{Dir: filepath.Join(file, "certs"), Upstream: publish(t, chip), Log: slog.New(slog.NewTextHandler(&log, nil))})
	if _, err := cache.Fetch(t.Context(), chip.Object()); err != nil || !strings.Contains(log.String(), "cannot be written") {
		t.Errorf("got %v; the log says %q", err, log.String())
	}
	if err := cache.Refresh(t.Context(), chip.Object()); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("got %v", err)
	}
}

func TestEntries(t *testing.T) {
	chip := newChip(t, snp.LineGenoa, snp.SignerVCEK, 1)
	dir := t.TempDir()
	cache := open(t, Config{Dir: dir, Upstream: publish(t, chip)})
	if list, err := open(t, Config{Dir: filepath.Join(dir, "none")}).Entries(t.Context()); err != nil || list != nil {
		t.Errorf("got %v, %v", list, err)
	}
	for _, o := range []kds.Object{chip.Object(), kds.CRL(snp.LineGenoa, snp.SignerVCEK)} {
		if _, err := cache.Fetch(t.Context(), o); err != nil {
			t.Fatal(err)
		}
	}
	at := clock
	wantErrs := func(cache *Cache, want ...string) {
		t.Helper()
		list, err := cache.Entries(t.Context())
		if err != nil || len(list) != len(want) {
			t.Fatalf("got %+v, %v", list, err)
		}
		for i, e := range list {
			if want[i] == "" && e.Err != nil || want[i] != "" && (e.Err == nil || !strings.Contains(e.Err.Error(), want[i])) {
				t.Errorf("%s: got %v, want …%s…", e.Path, e.Err, want[i])
			}
		}
	}
	list, err := cache.Entries(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var objects []kds.Object
	for _, e := range list {
		objects = append(objects, e.Object)
		if e.Err != nil || !e.Fetched.Equal(clock) || !e.Issued.Before(clock) || !e.Expires.After(clock) || fileName(e.Object) != e.Path {
			t.Errorf("got %+v", e)
		}
	}
	// The id of chip 1 begins with cf, and its name sorts so.
	if want := []kds.Object{kds.Chain(snp.LineGenoa, snp.SignerVCEK), chip.Object(), kds.CRL(snp.LineGenoa, snp.SignerVCEK)}; !slices.Equal(objects, want) {
		t.Errorf("got %v", objects)
	}

	later := open(t, Config{Dir: dir, Now: func() time.Time { return at }})
	wantErrs(later, "", "", "")
	at = clock.AddDate(-2, 0, 0)
	wantErrs(later, "not valid before", "not valid before", "not valid before")
	at = clock.AddDate(0, 2, 0)
	wantErrs(later, "", "", "has expired on")
	at = clock.AddDate(2, 0, 0)
	wantErrs(later, "has expired", "has expired", "has expired")
	at = clock

	revoking, err := chip.Authority.CRL(0x10001)
	if err != nil {
		t.Fatal(err)
	}
	if err := cache.Put(t.Context(), kds.CRL(snp.LineGenoa, snp.SignerVCEK), revoking); err != nil {
		t.Fatal(err)
	}
	wantErrs(later, "SEV-Genoa was revoked", "", "")

	for _, name := range []string{"a-readme", "vcek/.tmp-1"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	wantErrs(later, "does not belong", "interrupted write", "SEV-Genoa was revoked", "", "")
	if err := os.Remove(filepath.Join(dir, "vcek/Genoa/cert_chain.pem")); err != nil {
		t.Fatal(err)
	}
	list, err = later.Entries(t.Context())
	if err != nil || len(list) != 4 {
		t.Fatalf("got %v, %v", list, err)
	}
	for _, e := range list[2:] {
		if !errors.Is(e.Err, ErrMissing) {
			t.Errorf("%s without its chain: %v", e.Path, e.Err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := later.Entries(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}

func TestOpen(t *testing.T) {
	for name, c := range map[string]Config{
		"nothing":      {},
		"no directory": {Roots: verify.AMD(), Now: now},
		"no roots":     {Dir: "x", Now: now},
		"no clock":     {Dir: "x", Roots: verify.AMD()},
	} {
		if _, err := Open(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestProcesses lets processes write the same files while others read them: what is read is always whole.
func TestProcesses(t *testing.T) {
	const rounds = 30
	if dir := os.Getenv("CERTS_TEST_DIR"); dir != "" { // one of the processes
		root, err := hex.DecodeString(os.Getenv("CERTS_TEST_ROOT"))
		if err != nil {
			t.Fatal(err)
		}
		upstream := sim.KDS{}
		o := kds.Chain(snp.LineMilan, snp.SignerVCEK)
		body, err := os.ReadFile(os.Getenv("CERTS_TEST_CHAIN"))
		if err != nil {
			t.Fatal(err)
		}
		upstream[o.URL()] = body
		config := Config{Dir: dir, Roots: verify.Roots{Milan: verify.Fingerprint(root)}, Now: now}
		offline := open(t, config)
		config.Upstream = upstream
		cache := open(t, config)
		for range rounds {
			if err := cache.Refresh(t.Context(), o); err != nil {
				t.Fatal(err)
			}
			if got, err := offline.Fetch(t.Context(), o); err != nil || !bytes.Equal(got, body) {
				t.Fatalf("got %d bytes, %v", len(got), err)
			}
		}
		return
	}
	chip := newChip(t, snp.LineMilan, snp.SignerVCEK, 1)
	chain, err := chip.Authority.Chain()
	if err != nil {
		t.Fatal(err)
	}
	root, err := chip.Authority.Root()
	if err != nil {
		t.Fatal(err)
	}
	dir, file := t.TempDir(), filepath.Join(t.TempDir(), "chain")
	if err := os.WriteFile(file, chain, 0o644); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			cmd := exec.Command(os.Args[0], "-test.run=^TestProcesses$")
			cmd.Env = append(os.Environ(), "CERTS_TEST_DIR="+dir, "CERTS_TEST_CHAIN="+file, fmt.Sprintf("CERTS_TEST_ROOT=%x", root))
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	wg.Wait()
	if got, want := tree(t, dir), []string{"vcek/Milan/cert_chain.pem"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

// TestReal keeps AMD's own certificates, handed in by somebody, and verifies real reports from nothing else.
func TestReal(t *testing.T) {
	tests := []struct {
		report, chain string
		line          snp.Line
		ask           bool // the report names what to ask for; one of version 2 does not
	}{
		{"gosevguest-milan-v2-debugpolicy", "milan", snp.LineMilan, false},
		{"trustee-milan-v2", "milan", snp.LineMilan, false},
		{"oak-milan-v3", "milan", snp.LineMilan, true},
		{"trustee-siena-v3", "genoa", snp.LineGenoa, true},
		{"oak-genoa-v5", "genoa", snp.LineGenoa, true},
		{"oak-turin-v5", "turin_vcek", snp.LineTurin, true},
	}
	cache := open(t, Config{Dir: t.TempDir(), Roots: verify.AMD()})
	for _, tt := range tests {
		t.Run(tt.report, func(t *testing.T) {
			report, vek := need.Fixture(t, "fixtures/"+tt.report+".report"), need.Fixture(t, "fixtures/"+strings.TrimSuffix(tt.report, "-debugpolicy")+".vcek.der")
			r, err := snp.Parse(report)
			if err != nil {
				t.Fatal(err)
			}
			o, err := kds.ForReport(r)
			if (err == nil) != tt.ask {
				t.Errorf("got %v", err)
			}
			if !tt.ask {
				o = kds.VCEK(tt.line, r.ChipID, r.ReportedTCB)
			}
			if err := cache.Put(t.Context(), kds.Chain(tt.line, snp.SignerVCEK), need.Fixture(t, "fixtures/ask_ark_"+tt.chain+".pem")); err != nil {
				t.Fatal(err)
			}
			if err := cache.Put(t.Context(), o, vek); err != nil {
				t.Fatal(err)
			}
			e := verify.Evidence{Report: report}
			if !tt.ask {
				e.VEK = vek
			}
			if err := verified(t, verify.AMD(), cache, e); err != nil {
				t.Error(err)
			}
		})
	}
	for chain, line := range map[string]snp.Line{"milan": snp.LineMilan, "genoa": snp.LineGenoa, "turin": snp.LineTurin} {
		if err := cache.Put(t.Context(), kds.Chain(line, snp.SignerVLEK), need.Fixture(t, "fixtures/ask_ark_"+chain+"_vlek.pem")); err != nil {
			t.Errorf("%s: %v", chain, err)
		}
	}
	list, err := cache.Entries(t.Context())
	if err != nil || len(list) != 12 {
		t.Errorf("got %d entries, %v", len(list), err)
	}
	for _, e := range list {
		if e.Err != nil {
			t.Errorf("%s: %v", e.Path, e.Err)
		}
	}
}
