package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/evidence"
	"github.com/kcradle/kcradle/snp/kds"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/reference"
	"github.com/kcradle/kcradle/snp/verify"
)

// exitPolicy is the exit code for a policy or a reference that cannot be read. The others are in attest.go.
const exitPolicy = 6

// maxText bounds the policies, references and evidence that verify reads, in bytes; each has a lower bound of its own.
const maxText = 64 << 20

type verifyOptions struct {
	Evidence   string
	Nonce      string
	Report     string
	VEK        string
	Chain      string
	CRL        string
	ReportData string

	Reference string
	Policy    string
	Images    []string
	Firmware  []string

	Certs   string
	Offline bool
	Save    string
	JSON    bool
}

func newVerify(a *app) *cobra.Command {
	var o verifyOptions
	cmd := &cobra.Command{
		Use:   "verify [flags] (--evidence FILE --nonce HEX | --report FILE --report-data HEX)",
		Short: "Decide whether a pod is the one that was asked for, on hardware that is accepted",
		Long: `verify holds evidence against AMD's root keys, which are built in, and against what you expect: a reference (what the pod
was to be launched from), a policy (which machines and which state of them you accept) and your own nonce. It shows every
check with what was expected and what was found. Nothing passes unless all checks that the policy demands were made.

Evidence is a file that --save wrote. The nonce has to be the one that you chose, from your own records. A report that is
not a pod's can be given with its certificates and the report data that you expect. Pods do not serve their
evidence yet; once they do, verify takes their URL.

Without --policy the policy is the strictest that a genuine pod of today meets; docs/attestation.md has it field by field.
What is missing of AMD's certificates comes from the directory of kcradle certs, and with a network from AMD.

The exit code is 0 when everything was checked and passed, and then alone; 1 when a check failed; 2 for a mistake in the
command line or when nothing says what to expect; 3 when the evidence cannot be read; 4 when a certificate or a revocation
list is not to be had; 5 when AMD's service does not answer; 6 when policy or reference cannot be read.`,
		Example: `  kcradle verify --evidence evidence.json --nonce 9f3c… --ref ref.json --image registry.example/app@sha256:…
  kcradle verify --report report.bin --vek vcek.der --chain cert_chain.pem --report-data 00ab… --policy policy.json --offline --json`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("%q: pods do not serve their evidence yet: give --evidence FILE, or --report FILE", args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runVerify(cmd.Context(), a, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Evidence, "evidence", "", "`file` with evidence, - for stdin")
	f.StringVar(&o.Nonce, "nonce", "", "the nonce that you chose, 64 `hex` digits")
	f.StringVar(&o.Report, "report", "", "`file` with a bare report, - for stdin")
	f.StringVar(&o.VEK, "vek", "", "`file` with the certificate of the key that signed the report, DER (default: ask for it)")
	f.StringVar(&o.Chain, "chain", "", "`file` with the two certificates above that one, PEM (default: ask for it)")
	f.StringVar(&o.CRL, "crl", "", "`file` with their revocation list, DER (default: ask for it)")
	f.StringVar(&o.ReportData, "report-data", "", "the REPORT_DATA that you expect of a bare report, 128 `hex` digits")
	f.StringVar(&o.Reference, "ref", "", "`file` with the reference (default: the one that the policy names)")
	f.StringVar(&o.Policy, "policy", "", "`file` with the policy")
	f.StringArrayVar(&o.Images, "image", nil, "the image that the pod must run, `NAME@sha256:…`; once for each (default: the policy's, or the reference's)")
	f.StringArrayVar(&o.Firmware, "firmware", nil, "a firmware `file`: the reference's own makes its seed certain, others may explain a launch digest")
	certsFlag(cmd, &o.Certs)
	f.BoolVar(&o.Offline, "offline", false, "ask nobody for certificates and revocation lists")
	f.StringVar(&o.Save, "save", "", "`file` to store the evidence in, with all certificates")
	f.BoolVar(&o.JSON, "json", false, "as JSON")
	return cmd
}

func runVerify(ctx context.Context, a *app, o verifyOptions) error {
	result, stored, err := o.decide(ctx, a)
	if err != nil {
		return err
	}
	if o.Save != "" && stored != nil {
		if err := saveEvidence(o.Save, stored); err != nil {
			return err
		}
	}
	if o.JSON {
		err = printJSON(a.Stdout, result)
	} else {
		err = result.WriteTable(a.Stdout)
	}
	if err != nil {
		return err
	}
	if code := resultCode(result); code != 0 {
		return &exitError{code: code}
	}
	return nil
}

// resultCode is the exit code of a decision.
func resultCode(r verify.Result) int {
	err := r.Err()
	if err == nil {
		return 0
	}
	var e *verify.Error
	if !errors.As(err, &e) {
		return exitRefused
	}
	switch cause := e.Cause(); cause.Status {
	case verify.Malformed:
		if cause.ID == verify.CheckPolicy || cause.ID == verify.CheckReference {
			return exitPolicy
		}
		return exitMalformed
	case verify.Missing:
		return exitMissing
	case verify.Unreachable:
		return exitNetwork
	case verify.Unset:
		return exitUsage
	}
	return exitRefused
}

// decide returns the decision, and the evidence it is about for storing; nil: it could not be read. An error is one of the
// command line, or of a file that cannot be opened.
func (o verifyOptions) decide(ctx context.Context, a *app) (verify.Result, *evidence.Stored, error) {
	if err := o.validate(); err != nil {
		return verify.Result{}, nil, usageError{err}
	}
	p, rejected, err := o.readPolicy(a)
	if err != nil || rejected != nil {
		return reject(rejected, err)
	}
	x := verify.Expectation{}
	if x.Reference, rejected, err = o.readReference(a, p); err != nil || rejected != nil {
		return reject(rejected, err)
	}
	for _, name := range o.Firmware {
		f, err := readFirmware(a, name)
		if err != nil {
			return verify.Result{}, nil, err
		}
		x.Firmware = append(x.Firmware, f)
	}
	stored, rejected, err := o.readEvidence(a, &x)
	if err != nil || rejected != nil {
		return reject(rejected, err)
	}
	cache, err := openCerts(a, o.Certs, !o.Offline)
	if err != nil {
		return verify.Result{}, nil, err
	}
	source := &recorder{source: cache, stored: stored}
	v, err := verify.New(verify.Config{Now: a.Now, Roots: a.Roots, Source: source, Policy: p})
	if err != nil {
		return verify.Result{}, nil, err
	}
	return v.Verify(ctx, stored.Evidence(), x), stored, nil
}

func reject(rejected *verify.Result, err error) (verify.Result, *evidence.Stored, error) {
	if rejected == nil {
		rejected = &verify.Result{}
	}
	return *rejected, nil, err
}

func rejected(id verify.ID, s verify.Status, name string, err error) *verify.Result {
	r := verify.Rejected(id, s, fmt.Errorf("%s: %w", name, err))
	return &r
}

func (o verifyOptions) validate() error {
	switch {
	case o.Evidence == "" && o.Report == "":
		return errors.New("say what to verify: --evidence FILE, or --report FILE")
	case o.Evidence != "" && o.Report+o.VEK+o.Chain+o.CRL+o.ReportData != "":
		return errors.New("--report, --vek, --chain, --crl and --report-data are of a bare report: --evidence has all of it in one file")
	case o.Evidence != "" && o.Nonce == "":
		return errors.New("--evidence needs --nonce: without the nonce that you chose anybody's old evidence would do")
	case o.Report != "" && o.Nonce != "":
		return errors.New("--nonce is for --evidence: a bare report does not come with what its nonce was bound to")
	}
	return nil
}

// readPolicy returns the policy of the file, with the images of the command line.
func (o verifyOptions) readPolicy(a *app) (policy.Policy, *verify.Result, error) {
	p := policy.Default()
	if o.Policy != "" {
		b, err := readInput(a, o.Policy, maxText)
		if err != nil {
			return p, nil, err
		}
		if p, err = policy.Parse(b); err != nil {
			return p, rejected(verify.CheckPolicy, verify.Malformed, o.Policy, err), nil
		}
	}
	if len(o.Images) > 0 {
		p.Images = nil
	}
	for _, s := range o.Images {
		image, err := policy.ParseImage(s)
		if err != nil {
			return p, nil, usageError{fmt.Errorf("invalid argument for \"--image\" flag: %w", err)}
		}
		p.Images = append(p.Images, image)
	}
	if err := p.Validate(); err != nil {
		return p, nil, usageError{fmt.Errorf("invalid argument for \"--image\" flag: %w", err)}
	}
	return p, nil, nil
}

// readReference returns the reference of the command line, or the one that the policy names; nil: there is none.
func (o verifyOptions) readReference(a *app, p policy.Policy) (*reference.Reference, *verify.Result, error) {
	name := o.Reference
	if name == "" && p.Reference != nil {
		if name = p.Reference.File; !filepath.IsAbs(name) {
			name = filepath.Join(filepath.Dir(o.Policy), name)
		}
	}
	if name == "" {
		return nil, nil, nil
	}
	b, err := readInput(a, name, maxText)
	if err != nil {
		return nil, nil, err
	}
	if p.Reference != nil && p.Reference.SignedBy != nil {
		signature, err := os.ReadFile(name + reference.SignatureSuffix)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, rejected(verify.CheckReference, verify.Fail, name, errors.New("the policy wants it signed, and there is no "+name+reference.SignatureSuffix)), nil
		}
		if err != nil {
			return nil, nil, &exitError{code: exitUsage, err: err}
		}
		if err := reference.CheckSignature(b, signature, *p.Reference.SignedBy); err != nil {
			return nil, rejected(verify.CheckReference, verify.Fail, name, err), nil
		}
	}
	r, err := reference.Parse(b)
	if err != nil {
		return nil, rejected(verify.CheckReference, verify.Malformed, name, err), nil
	}
	return r, nil, nil
}

// readEvidence returns the evidence, and fills in what is expected of it.
func (o verifyOptions) readEvidence(a *app, x *verify.Expectation) (*evidence.Stored, *verify.Result, error) {
	if o.Report != "" {
		x.ReportData = new([64]byte)
		if err := decodeHex(x.ReportData[:], o.ReportData); o.ReportData != "" && err != nil {
			return nil, nil, usageError{fmt.Errorf("invalid argument for \"--report-data\" flag: %w", err)}
		}
		report, err := readInput(a, o.Report, snp.Size)
		if err != nil {
			return nil, nil, err
		}
		s := &evidence.Stored{At: a.Now(), Report: report}
		for _, part := range []struct {
			name string
			most int64
			to   *[]byte
		}{{o.VEK, kds.MaxVEK, &s.VEK}, {o.Chain, kds.MaxChain, &s.Chain}, {o.CRL, kds.MaxCRL, &s.CRL}} {
			if part.name == "" {
				continue
			}
			if *part.to, err = readInput(a, part.name, part.most); err != nil {
				return nil, nil, err
			}
		}
		return s, nil, nil
	}
	var nonce [32]byte
	if err := decodeHex(nonce[:], o.Nonce); err != nil {
		return nil, nil, usageError{fmt.Errorf("invalid argument for \"--nonce\" flag: %w", err)}
	}
	b, err := readInput(a, o.Evidence, maxText)
	if err != nil {
		return nil, nil, err
	}
	s, err := evidence.Parse(b)
	if err != nil {
		return nil, rejected(verify.CheckEvidence, verify.Malformed, o.Evidence, err), nil
	}
	if len(s.Pod) == 0 {
		return nil, rejected(verify.CheckEvidence, verify.Malformed, o.Evidence, errors.New("it holds a bare report, which no nonce is bound to")), nil
	}
	reference, firmware := x.Reference, x.Firmware
	*x = s.Expect(nonce)
	x.Reference, x.Firmware = reference, firmware
	return s, nil, nil
}

// decodeHex fills b with as many hexadecimal digits as it takes.
func decodeHex(b []byte, s string) error {
	if len(s) != hex.EncodedLen(len(b)) {
		return fmt.Errorf("%d characters, want %d hex digits", len(s), hex.EncodedLen(len(b)))
	}
	if _, err := hex.Decode(b, []byte(strings.ToLower(s))); err != nil {
		return fmt.Errorf("want %d hex digits: %w", len(s), err)
	}
	return nil
}

// recorder puts what a verifier asks for into the evidence, so that it can be stored whole.
type recorder struct {
	source verify.Source
	stored *evidence.Stored
}

// Fetch asks the source.
func (r *recorder) Fetch(ctx context.Context, o kds.Object) ([]byte, error) {
	b, err := r.source.Fetch(ctx, o)
	if err != nil {
		return nil, err
	}
	switch o.Kind {
	case kds.KindVCEK:
		r.stored.VEK = b
	case kds.KindChain:
		r.stored.Chain = b
	case kds.KindCRL:
		r.stored.CRL = b
	}
	return b, nil
}

// saveEvidence writes a file whole or not at all.
func saveEvidence(name string, s *evidence.Stored) (err error) {
	b, err := s.Encode()
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	_, err = f.Write(b)
	if err := errors.Join(err, f.Chmod(0o644), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
