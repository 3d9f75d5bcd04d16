package sim_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/sim"
	"github.com/kcradle/kcradle/snp/verify"
)

var clock = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// testKeys are made once: they take seconds.
var testKeys = sync.OnceValues(sim.NewKeys)

func newChip(t testing.TB, l snp.Line, s snp.Signer) *sim.Chip {
	t.Helper()
	keys, err := testKeys()
	if err != nil {
		t.Fatal(err)
	}
	c, err := sim.NewAuthority(keys, l, s, clock).NewChip(1)
	if err != nil {
		t.Fatal(err)
	}
	c.Report.Measurement = [48]byte{1}
	return c
}

// trusting returns a configuration that trusts the chip's authority and asks the service for everything.
func trusting(t testing.TB, c *sim.Chip) verify.Config {
	t.Helper()
	root, err := c.Authority.Root()
	if err != nil {
		t.Fatal(err)
	}
	service := sim.KDS{}
	if err := service.Publish(c); err != nil {
		t.Fatal(err)
	}
	p := policy.Default()
	p.AllowMilan = true
	p.Signer = policy.AnySigner
	return verify.Config{
		Now:    func() time.Time { return clock },
		Roots:  verify.Roots{Milan: root, Genoa: root, Turin: root},
		Source: service,
		Policy: p,
	}
}

// decide verifies a report that is expected to say what it says.
func decide(t testing.TB, config verify.Config, e verify.Evidence) verify.Result {
	t.Helper()
	r, err := snp.Parse(e.Report)
	if err != nil {
		t.Fatal(err)
	}
	config.Policy.Measurements, config.Policy.VMPL = []measure.Digest{r.Measurement}, uint8(r.VMPL)
	v, err := verify.New(config)
	if err != nil {
		t.Fatal(err)
	}
	return v.Verify(t.Context(), e, verify.Expectation{ReportData: &r.ReportData})
}

var (
	_ verify.Source = sim.KDS(nil)
	_ http.Handler  = sim.KDS(nil)
)

// TestOnlyOnPurpose is the promise of the package: what it signs passes where its root is trusted, and nowhere else.
func TestOnlyOnPurpose(t *testing.T) {
	for _, line := range []snp.Line{snp.LineMilan, snp.LineGenoa, snp.LineTurin} {
		for _, signer := range []snp.Signer{snp.SignerVCEK, snp.SignerVLEK} {
			t.Run(line.String()+"/"+signer.String(), func(t *testing.T) {
				c := newChip(t, line, signer)
				config := trusting(t, c)
				report, err := c.Attest([64]byte{1, 2, 3}, 1)
				if err != nil {
					t.Fatal(err)
				}
				e := verify.Evidence{Report: report}
				if signer == snp.SignerVLEK { // not published: it comes with the report
					if e.VEK, err = c.VEKDER(); err != nil {
						t.Fatal(err)
					}
				}
				r := decide(t, config, e)
				if err := r.Err(); err != nil {
					t.Fatal(err)
				}
				if r.Report.ReportData != ([64]byte{1, 2, 3}) || r.Report.VMPL != 1 || r.Report.Product().Line() != line {
					t.Errorf("got %+v", r.Report)
				}

				config.Roots = verify.AMD()
				for _, mode := range []policy.CRLMode{policy.CRLRequire, policy.CRLSoft, policy.CRLOff} {
					config.Policy.CRL = mode
					var stop *verify.Error
					if err := decide(t, config, e).Err(); !errors.As(err, &stop) || stop.Cause().ID != verify.CheckRoot {
						t.Errorf("CRL %s: got %v, want AMD's roots to refuse it", mode, err)
					}
				}
			})
		}
	}
}

func TestChips(t *testing.T) {
	c := newChip(t, snp.LineTurin, snp.SignerVCEK)
	config := trusting(t, c)
	other, err := c.Authority.NewChip(2)
	if err != nil {
		t.Fatal(err)
	}
	other.Report.Measurement = c.Report.Measurement
	if c.Report.ChipID == other.Report.ChipID {
		t.Error("two chips of one id")
	}
	if same, err := c.Authority.NewChip(1); err != nil || same.Report.ChipID != c.Report.ChipID {
		t.Errorf("chip 1 is not chip 1: %v", err)
	}
	report, err := other.Attest([64]byte{1}, 0)
	if err != nil {
		t.Fatal(err)
	}
	if r := decide(t, config, verify.Evidence{Report: report}); r.Passed() {
		t.Error("a chip passes whose certificate is not published")
	}

	// Other firmware is another certificate.
	tcb := c.Report.ReportedTCB
	tcb.SNP++
	c.SetTCB(tcb)
	if report, err = c.Attest([64]byte{1}, 0); err != nil {
		t.Fatal(err)
	}
	if r := decide(t, config, verify.Evidence{Report: report}); r.Passed() {
		t.Error("a TCB version passes whose certificate is not published")
	}
	if err := config.Source.(sim.KDS).Publish(c); err != nil {
		t.Fatal(err)
	}
	if err := decide(t, config, verify.Evidence{Report: report}).Err(); err != nil {
		t.Error(err)
	}
	crl, err := c.Authority.CRL(0x10001)
	if err != nil {
		t.Fatal(err)
	}
	if r := decide(t, config, verify.Evidence{Report: report, CRL: crl}); r.Passed() {
		t.Error("a revoked ASK passes")
	}

	keys, err := testKeys()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sim.NewAuthority(keys, snp.LineUnknown, snp.SignerVCEK, clock).NewChip(1); err == nil {
		t.Error("a chip of no line")
	}
	c.Report.VMPL = 9
	if _, err := c.Sign(c.Report); err == nil {
		t.Error("a report that cannot be is signed")
	}
}

func TestService(t *testing.T) {
	c := newChip(t, snp.LineGenoa, snp.SignerVCEK)
	service := sim.KDS{}
	if err := service.Publish(c); err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(service)
	defer server.Close()
	for _, o := range []kds.Object{c.Object(), kds.Chain(snp.LineGenoa, snp.SignerVCEK), kds.CRL(snp.LineGenoa, snp.SignerVCEK)} {
		want, err := service.Fetch(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := server.Client().Get(server.URL + o.Path())
		if err != nil {
			t.Fatal(err)
		}
		got, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil || resp.StatusCode != http.StatusOK || string(got) != string(want) {
			t.Errorf("%s: got %s, %d bytes, %v", o, resp.Status, len(got), err)
		}
	}
	o := kds.Chain(snp.LineMilan, snp.SignerVCEK)
	if _, err := service.Fetch(t.Context(), o); err == nil || !strings.Contains(err.Error(), "not published") {
		t.Errorf("got %v", err)
	}
	resp, err := server.Client().Get(server.URL + o.Path())
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNotFound {
		t.Errorf("got %s", resp.Status)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := service.Fetch(ctx, c.Object()); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
