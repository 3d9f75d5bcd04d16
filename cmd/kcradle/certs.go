package main

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/certs"
	"github.com/kcradle/kcradle/snp/kds"
)

func newCerts(a *app) *cobra.Command {
	cmd := onlyVerbs(&cobra.Command{
		Use:   "certs",
		Short: "Keep AMD's certificates, to verify without a network",
		Long: `certs keeps a directory of what AMD's key distribution service publishes: the certificates of chips, the chains above
them, and revocation lists. Nothing enters it that does not lead to AMD's root keys, which are built in; so it may be
copied from one host to another.`,
		Example: `  kcradle certs fetch --report report.bin
  kcradle certs ls`,
	})
	cmd.AddCommand(newCertsFetch(a), newCertsVerify(a), newCertsList(a))
	return cmd
}

type fetchOptions struct {
	Certs   string
	Report  string
	Product string
	Chip    string
	TCB     string
	JSON    bool
}

func newCertsFetch(a *app) *cobra.Command {
	var o fetchOptions
	cmd := &cobra.Command{
		Use:   "fetch [flags] (--report FILE | --product LINE [--chip HEX --tcb PARTS])",
		Short: "Fetch what a report is verified with",
		Long: `fetch asks AMD's key distribution service for the certificate of a chip at a TCB version, for the chain above it, and for
the revocation list, and keeps them. A report says all there is to know, unless it is of version 2: those do not name
their processor, so --product must. Without a chip only chain and list are fetched.

What is there and still valid is not asked for again, except the list. The service answers only a few questions a minute;
fetch waits as it is told to, up to two minutes.

The exit code is 0 when everything is there, 2 for a mistake in the command line, 3 when the report cannot be read, 4 when
AMD does not publish what is wanted, 5 when the service cannot be reached or stays busy, 1 otherwise.`,
		Example: `  kcradle certs fetch --report report.bin
  kcradle certs fetch --product Turin --chip 81ad8c5fbd2cf0b0 --tcb fmc=0,bl=1,tee=0,snp=2,ucode=71
  kcradle certs fetch --product Genoa --certs /srv/certs`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return fetchCerts(cmd.Context(), a, o)
		},
	}
	f := cmd.Flags()
	certsFlag(cmd, &o.Certs)
	f.StringVar(&o.Report, "report", "", "`file` with the report to verify, - for stdin")
	f.StringVar(&o.Product, "product", "", "product `line`: Milan, Genoa (also Bergamo and Siena) or Turin")
	f.StringVar(&o.Chip, "chip", "", "the chip's id in `hex`: 64 bytes, of Turin 8")
	f.StringVar(&o.TCB, "tcb", "", "the TCB version in `parts`: bl=N,tee=N,snp=N,ucode=N, of Turin fmc=N before them")
	f.BoolVar(&o.JSON, "json", false, "as JSON, one array")
	_ = cmd.RegisterFlagCompletionFunc("product", cobra.FixedCompletions([]string{"Milan", "Genoa", "Turin"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

// fetched is one line of what fetch did.
type fetched struct {
	Object string `json:"object"`
	URL    string `json:"url"`
	Source string `json:"source"` // kds, or cache: it was there
}

func fetchCerts(ctx context.Context, a *app, o fetchOptions) error {
	objects, note, err := o.objects(a)
	if err != nil {
		return err
	}
	cache, err := openCerts(a, o.Certs, true)
	if err != nil {
		return err
	}
	list := []fetched{}
	for _, object := range objects {
		f := fetched{Object: object.String(), URL: object.URL(), Source: "cache"}
		if object.Kind == kds.KindCRL || cache.Current(ctx, object) != nil {
			f.Source = "kds"
			if err := cache.Refresh(ctx, object); err != nil {
				return err
			}
		}
		list = append(list, f)
	}
	if note != "" {
		fmt.Fprintln(a.Stderr, note)
	}
	if o.JSON {
		return printJSON(a.Stdout, list)
	}
	w := tabwriter.NewWriter(a.Stdout, 0, 8, 2, ' ', 0)
	for _, f := range list {
		word := "fetched"
		if f.Source == "cache" {
			word = "present"
		}
		fmt.Fprintf(w, "%s\t%s\n", word, f.Object)
	}
	return w.Flush()
}

// objects returns what is wanted, in the order of asking, and what has to be said of it.
func (o fetchOptions) objects(a *app) (out []kds.Object, note string, err error) {
	line, signer := snp.LineUnknown, snp.SignerVCEK
	if o.Product != "" {
		if line, err = snp.ParseLine(o.Product); err != nil {
			return nil, "", usageError{fmt.Errorf("invalid argument %q for \"--product\" flag: want Milan, Genoa (also Bergamo and Siena) or Turin", o.Product)}
		}
	}
	var vcek []kds.Object
	switch {
	case o.Report != "" && (o.Chip != "" || o.TCB != ""):
		return nil, "", usageError{errors.New("a report says its chip and its TCB version: give --report, or --chip and --tcb")}
	case o.Report != "":
		r, err := readReport(a, o.Report)
		if err != nil {
			return nil, "", err
		}
		if named := r.Product().Line(); named == snp.LineUnknown && line == snp.LineUnknown {
			return nil, "", usageError{errors.New("a report of version 2 does not name its processor: give --product")}
		} else if named != snp.LineUnknown {
			if line != snp.LineUnknown && line != named {
				return nil, "", usageError{fmt.Errorf("the report is of %s: leave out --product %s", named, line)}
			}
			line = named
		}
		signer = r.KeyInfo.Signer()
		switch {
		case signer == snp.SignerVLEK:
			note = "The report is signed by a VLEK, whose certificate AMD does not publish: it has to come with the report."
		case signer == snp.SignerNone:
			return nil, "", &exitError{code: exitMissing, err: errors.New("nobody signed this report: there is no certificate for it")}
		case r.ChipID == [64]byte{}:
			note = "The platform masks its chip id: the certificate of its key has to come with the report."
		default:
			vcek = append(vcek, kds.VCEK(line, r.ChipID, r.ReportedTCB))
		}
	case line == snp.LineUnknown:
		return nil, "", usageError{errors.New("say what to fetch: --report FILE, or --product LINE")}
	case (o.Chip == "") != (o.TCB == ""):
		return nil, "", usageError{errors.New("a certificate is of a chip at a TCB version: give both --chip and --tcb")}
	case o.Chip != "":
		id, err := parseChip(line, o.Chip)
		if err != nil {
			return nil, "", usageError{fmt.Errorf("invalid argument for \"--chip\" flag: %w", err)}
		}
		tcb, err := parseTCB(line.Layout(), o.TCB)
		if err != nil {
			return nil, "", usageError{fmt.Errorf("invalid argument %q for \"--tcb\" flag: %w", o.TCB, err)}
		}
		vcek = append(vcek, kds.VCEK(line, id, tcb))
	}
	out = append([]kds.Object{kds.Chain(line, signer)}, vcek...)
	out = append(out, kds.CRL(line, signer))
	for _, object := range out {
		if err := object.Validate(); err != nil {
			return nil, "", usageError{fmt.Errorf("%s: %w", object, err)}
		}
	}
	return out, note, nil
}

// parseChip reads the id of a chip.
func parseChip(l snp.Line, s string) (id [64]byte, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != l.HWIDSize() {
		return id, fmt.Errorf("want %d hex digits for a chip of %s, got %d characters", 2*l.HWIDSize(), l, len(s))
	}
	copy(id[:], b)
	return id, nil
}

// parseTCB reads bl=N,tee=N,snp=N,ucode=N, of Turin with fmc=N, in any order: each part once, and all of them.
func parseTCB(l snp.Layout, s string) (snp.TCB, error) {
	t := snp.TCB{Layout: l}
	parts := map[string]*uint8{"bl": &t.Bootloader, "tee": &t.TEE, "snp": &t.SNP, "ucode": &t.Microcode}
	want := "bl=N,tee=N,snp=N,ucode=N"
	if l == snp.LayoutTurin {
		parts["fmc"], want = &t.FMC, "fmc=N,"+want
	}
	for _, part := range strings.Split(s, ",") {
		name, value, _ := strings.Cut(part, "=")
		p := parts[name]
		n, err := strconv.ParseUint(value, 10, 8)
		if p == nil || err != nil {
			return snp.TCB{}, fmt.Errorf("%q: want %s, each once and N from 0 to 255", part, want)
		}
		*p = uint8(n)
		delete(parts, name)
	}
	if len(parts) != 0 {
		return snp.TCB{}, fmt.Errorf("want all of %s", want)
	}
	return t, nil
}

func newCertsVerify(a *app) *cobra.Command {
	var dir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "verify [flags]",
		Short: "Check every certificate that is kept",
		Long: `verify checks each file of the directory as if it came from a stranger: that it is what its name says, leads to AMD's
root keys, is valid now, and is not revoked. It asks nobody.

The exit code is 0 when everything is good, 1 when something is not, 4 when there is nothing.`,
		Example: "  kcradle certs verify\n  kcradle certs verify --certs /srv/certs",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return verifyCerts(cmd.Context(), a, dir, asJSON)
		},
	}
	certsFlag(cmd, &dir)
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, one array")
	return cmd
}

func verifyCerts(ctx context.Context, a *app, dir string, asJSON bool) error {
	rows, err := certRows(ctx, a, dir)
	if err != nil {
		return err
	}
	bad := 0
	for _, r := range rows {
		if r.Error != "" {
			bad++
		}
	}
	if asJSON {
		err = printJSON(a.Stdout, rows)
	} else {
		for _, r := range rows {
			word, reason := "good", ""
			if r.Error != "" {
				word, reason = "BAD ", "\n     → "+r.Error
			}
			if _, err = fmt.Fprintf(a.Stdout, "%s %s%s\n", word, r.Path, reason); err != nil {
				break
			}
		}
	}
	switch {
	case err != nil:
		return err
	case len(rows) == 0:
		return &exitError{code: exitMissing, err: fmt.Errorf("%s holds no certificates (kcradle certs fetch)", certsDir(a, dir))}
	case bad > 0:
		return &exitError{code: exitRefused, err: fmt.Errorf("%d of %d files are of no use", bad, len(rows))}
	}
	return nil
}

func newCertsList(a *app) *cobra.Command {
	var dir string
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls [flags]",
		Short:   "List the certificates that are kept",
		Example: "  kcradle certs ls\n  kcradle certs ls --json",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return listCerts(cmd.Context(), a, dir, asJSON)
		},
	}
	certsFlag(cmd, &dir)
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON, one array")
	return cmd
}

func listCerts(ctx context.Context, a *app, dir string, asJSON bool) error {
	rows, err := certRows(ctx, a, dir)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(a.Stdout, rows)
	}
	w := tabwriter.NewWriter(a.Stdout, 0, 8, 3, ' ', 0)
	fmt.Fprintln(w, "KIND\tPRODUCT\tFOR\tCHIP\tTCB\tVALID UNTIL\tSTATE")
	for _, r := range rows {
		chip, tcb, until, state := r.Chip, "", "", "good"
		if len(chip) > 16 {
			chip = chip[:16] + "…"
		}
		if r.TCB != nil {
			tcb = r.TCB.String()
		}
		if r.Expires != nil {
			until = r.Expires.Format(time.DateOnly)
		}
		if r.Error != "" {
			state = "BAD"
		}
		if r.Kind == "" {
			fmt.Fprintf(w, "%s\t\t\t\t\t\t%s\n", r.Path, state)
			continue
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Kind, r.Product, r.Signer, chip, tcb, until, state)
	}
	return w.Flush()
}

// certRow is one file of the cache.
type certRow struct {
	Path    string     `json:"path"`              // below the directory
	Kind    string     `json:"kind,omitempty"`    // vcek, chain or crl; empty: not a file of the cache
	Product string     `json:"product,omitempty"` // line
	Signer  string     `json:"signer,omitempty"`  // VCEK or VLEK: the keys that it is about
	Chip    string     `json:"chip,omitempty"`
	TCB     *snp.TCB   `json:"tcb,omitempty"`
	Issued  *time.Time `json:"issued,omitempty"`
	Expires *time.Time `json:"expires,omitempty"`
	Fetched *time.Time `json:"fetched,omitempty"`
	Error   string     `json:"error,omitempty"` // why it is of no use; empty: it is
}

func certRows(ctx context.Context, a *app, dir string) ([]certRow, error) {
	cache, err := openCerts(a, dir, false)
	if err != nil {
		return nil, err
	}
	entries, err := cache.Entries(ctx)
	if err != nil {
		return nil, err
	}
	rows := []certRow{}
	for _, e := range entries {
		rows = append(rows, newCertRow(e))
	}
	return rows, nil
}

func newCertRow(e certs.Entry) certRow {
	r := certRow{Path: e.Path}
	if e.Err != nil {
		r.Error = e.Err.Error()
	}
	if e.Object == (kds.Object{}) {
		return r
	}
	r.Kind, r.Product, r.Signer = e.Object.Kind.String(), e.Object.Line.String(), e.Object.Signer.String()
	if e.Object.Kind == kds.KindVCEK {
		r.Chip, r.TCB = hex.EncodeToString(e.Object.HWID()), &e.Object.TCB
	}
	for _, t := range []struct {
		from time.Time
		to   **time.Time
	}{{e.Issued, &r.Issued}, {e.Expires, &r.Expires}, {e.Fetched, &r.Fetched}} {
		if !t.from.IsZero() {
			utc := t.from.UTC()
			*t.to = &utc
		}
	}
	return r
}

func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
