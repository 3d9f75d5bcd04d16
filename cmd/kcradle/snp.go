package main

import (
	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/snp"
)

func newSNP(a *app) *cobra.Command {
	cmd := onlyVerbs(&cobra.Command{
		Use:     "snp",
		Short:   "Look at what SEV-SNP machines produce",
		Example: "  kcradle snp explain report.bin",
	})
	cmd.AddCommand(newExplain(a))
	return cmd
}

func newExplain(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "explain FILE",
		Short: "Put an attestation report in words",
		Long: `explain shows every field of an attestation report: 1184 bytes, as AMD's firmware makes them, of any version that is
known. FILE may be - for stdin. It shows what the report claims and verifies nothing; that is for kcradle verify.

The exit code is 0 when FILE is a report, 2 when it cannot be opened, 3 when it is none.`,
		Example: `  kcradle snp explain report.bin
  kcradle snp explain --json - < report.bin`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			return explain(a, args[0], asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "as JSON")
	return cmd
}

func explain(a *app, name string, asJSON bool) error {
	r, err := readReport(a, name)
	if err != nil {
		return err
	}
	if !asJSON {
		return r.Explain(a.Stdout)
	}
	return printJSON(a.Stdout, struct {
		Version int         `json:"version"` // of this object
		Report  *snp.Report `json:"report"`
	}{1, r})
}
