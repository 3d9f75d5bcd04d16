package main

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/certs"
	"github.com/kcradle/kcradle/snp/verify"
)

// Exit codes of the verbs about attestation. They are for scripts, which must never take one failure for another.
const (
	exitRefused   = 1 // it was looked at, and is not as it must be; or another failure
	exitUsage     = 2 // the command line, or a file that it names cannot be opened
	exitMalformed = 3 // report, evidence or firmware cannot be read
	exitMissing   = 4 // a certificate or a revocation list is not to be had
	exitNetwork   = 5 // it could not be fetched, this time
)

// attestationCode is exitCode for the verbs about attestation.
func attestationCode(err error) int {
	var field *snp.FieldError
	var status *certs.StatusError
	switch {
	case errors.As(err, new(usageError)):
		return exitUsage
	case errors.As(err, &field):
		return exitMalformed
	case errors.Is(err, verify.ErrUnreachable):
		return exitNetwork
	case errors.Is(err, certs.ErrMissing), errors.As(err, &status):
		return exitMissing
	}
	return exitRefused
}

// isAttestation reports whether a command is one of these verbs, or below one.
func isAttestation(cmd *cobra.Command) bool {
	for ; cmd != nil; cmd = cmd.Parent() {
		if cmd.GroupID == groupAttestation {
			return true
		}
	}
	return false
}

// onlyVerbs makes a command that has only verbs below it show its help, and refuse others.
func onlyVerbs(cmd *cobra.Command) *cobra.Command {
	cmd.Args = cobra.ArbitraryArgs
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usageError{fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())}
		}
		return cmd.Help()
	}
	return cmd
}

// readInput reads a whole file that the command line names, - is stdin.
func readInput(a *app, name string, limit int64) ([]byte, error) {
	r := a.Stdin
	if name != "-" {
		f, err := os.Open(name)
		if err != nil {
			return nil, &exitError{code: exitUsage, err: err}
		}
		defer f.Close()
		r = f
	}
	b, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, &exitError{code: exitUsage, err: fmt.Errorf("read %s: %w", name, err)}
	}
	if int64(len(b)) > limit {
		return nil, &exitError{code: exitMalformed, err: fmt.Errorf("%s: more than %d bytes", name, limit)}
	}
	return b, nil
}

// readReport reads a report from a file of its 1184 bytes.
func readReport(a *app, name string) (*snp.Report, error) {
	b, err := readInput(a, name, snp.Size)
	if err != nil {
		return nil, err
	}
	r, err := snp.Parse(b)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return r, nil
}

// certsDir is where certificates are kept unless --certs says otherwise.
func certsDir(a *app, dir string) string {
	if dir == "" {
		return filepath.Join(a.Root, "cache/certs")
	}
	return dir
}

// openCerts opens the certificate cache. Without online nobody is asked for what it lacks.
func openCerts(a *app, dir string, online bool) (*certs.Cache, error) {
	config := certs.Config{Dir: certsDir(a, dir), Roots: a.Roots, Now: a.Now, Log: a.Log}
	if online {
		config.Upstream = &certs.Client{HTTP: &http.Client{Timeout: 30 * time.Second}, Now: a.Now, Service: a.KDS}
	}
	return certs.Open(config)
}

// certsFlag is --certs, the same in every verb.
func certsFlag(cmd *cobra.Command, dir *string) {
	cmd.Flags().StringVar(dir, "certs", "", "`directory` of AMD's certificates (default cache/certs in the state directory)")
	_ = cmd.MarkFlagDirname("certs")
}
