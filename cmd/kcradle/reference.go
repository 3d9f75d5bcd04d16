package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/snp/reference"
)

type referenceOptions struct {
	measureOptions
	Pod         string
	Release     string
	GuestPolicy string
	NoIDBlock   bool
}

func newReference(a *app) *cobra.Command {
	var o referenceOptions
	cmd := &cobra.Command{
		Use:   "reference [flags] --firmware FILE --kernel FILE --vcpus N --cpu MODEL",
		Short: "Write what a pod's report must say, or check what somebody wrote",
		Long: `reference writes a reference file: the launch digest of a machine, every input that it follows from, the pod digest, and
the digest of the key of its ID block. kcradle verify --ref computes it again; so can you, from the files of a release.

With --pod the pod's digest is put at the end of the command line, which is how it enters the launch digest.

The exit code is 0 with a reference, 2 when the command line or a file is at fault, 3 when the firmware or the pod cannot
be read.`,
		Example: `  kcradle reference --firmware OVMF.amdsev.fd --kernel vmlinuz --initrd initrd --append "console=hvc0" --vcpus 2 --cpu EPYC-v4 --pod pod.json > ref.json
  kcradle reference check --firmware OVMF.amdsev.fd --kernel vmlinuz --initrd initrd --pod pod.json ref.json`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 0 {
				return fmt.Errorf("%q: a bundle has no machine package for SEV-SNP yet: name the parts (--firmware, --kernel, --initrd, --append, --pod)", args[0])
			}
			return nil
		},
		RunE: func(*cobra.Command, []string) error {
			return writeReference(a, o)
		},
	}
	f := cmd.Flags()
	o.flags(cmd)
	f.StringVar(&o.Pod, "pod", "", "the pod.json `file`")
	f.StringVar(&o.Release, "release", "", "the `name` of the release that the files are of")
	f.StringVar(&o.GuestPolicy, "guest-policy", "0x30000", "the guest policy in the ID block, a `number`")
	f.BoolVar(&o.NoIDBlock, "no-id-block", false, "the machine is launched without an ID block")
	cmd.AddCommand(newReferenceCheck(a))
	return cmd
}

func writeReference(a *app, o referenceOptions) error {
	if err := o.validate(); err != nil {
		return usageError{err}
	}
	if o.Kernel == "" {
		return usageError{errors.New("--kernel is required: a reference is of a machine whose kernel is measured")}
	}
	options := reference.Options{Release: o.Release, VCPUs: o.VCPUs, CPU: o.CPU}
	if !o.NoIDBlock {
		n, err := strconv.ParseUint(o.GuestPolicy, 0, 64)
		if err != nil || n == 0 {
			return usageError{fmt.Errorf("invalid argument %q for \"--guest-policy\" flag: want a number such as 0x30000", o.GuestPolicy)}
		}
		options.GuestPolicy = snp.Policy(n)
	}
	in, err := o.input(a)
	if err != nil {
		return err
	}
	options.Firmware, options.Kernel, options.Initrd = in.Firmware, in.Kernel, in.Initrd
	options.CommandLine, options.SEVFeatures = in.CommandLine, in.SEVFeatures
	if o.Pod != "" {
		if options.Pod, err = readPod(a, o.Pod); err != nil {
			return err
		}
		parameter := reference.PodParameter + pod.DigestOf(options.Pod).String()
		if !strings.Contains(options.CommandLine, reference.PodParameter) {
			options.CommandLine = strings.TrimPrefix(options.CommandLine+" "+parameter, " ")
		}
	}
	r, err := reference.New(options)
	if err != nil {
		return usageError{err}
	}
	b, err := r.Encode()
	if err != nil {
		return err
	}
	_, err = a.Stdout.Write(b)
	return err
}

// readPod reads a pod.json that a verifier would read, too.
func readPod(a *app, name string) ([]byte, error) {
	b, err := readInput(a, name, pod.MaxBytes)
	if err != nil {
		return nil, err
	}
	if _, err := pod.Parse(b); err != nil {
		return nil, &exitError{code: exitMalformed, err: fmt.Errorf("%s: %w", name, err)}
	}
	return b, nil
}

type checkOptions struct {
	Reference string
	Firmware  string
	Kernel    string
	Initrd    string
	Pod       string
	JSON      bool
}

func newReferenceCheck(a *app) *cobra.Command {
	var o checkOptions
	cmd := &cobra.Command{
		Use:   "check [flags] FILE",
		Short: "Compute a reference file again",
		Long: `check computes everything in a reference file that follows from its inputs, and holds the inputs against the files that
are given: those are what a release publishes, or what you have built yourself. An input without its file is the word of
whoever wrote the reference, and check says so.

The exit code is 0 when everything agrees, 1 when something does not, 2 when the command line or a file is at fault, 6 when
the reference cannot be read.`,
		Example: "  kcradle reference check --firmware OVMF.amdsev.fd --kernel vmlinuz --initrd initrd --pod pod.json ref.json",
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			o.Reference = args[0]
			return checkReference(a, o)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.Firmware, "firmware", "", "the firmware `file`")
	f.StringVar(&o.Kernel, "kernel", "", "the kernel `file`")
	f.StringVar(&o.Initrd, "initrd", "", "the initrd `file`")
	f.StringVar(&o.Pod, "pod", "", "the pod.json `file`")
	f.BoolVar(&o.JSON, "json", false, "as JSON, one array")
	return cmd
}

// referenceRow is one thing that check looks at.
type referenceRow struct {
	Input  string `json:"input"`
	Status string `json:"status"` // good, bad, or unchecked: its file was not given
	Value  string `json:"value,omitempty"`
	Error  string `json:"error,omitempty"` // why it is bad
}

func checkReference(a *app, o checkOptions) error {
	b, err := readInput(a, o.Reference, maxText)
	if err != nil {
		return err
	}
	r, err := reference.Parse(b)
	if err != nil {
		return &exitError{code: exitPolicy, err: fmt.Errorf("%s: %w", o.Reference, err)}
	}
	rows, err := o.rows(a, r)
	if err != nil {
		return err
	}
	if o.JSON {
		err = printJSON(a.Stdout, rows)
	} else {
		err = printReferenceRows(a.Stdout, rows)
	}
	if err != nil {
		return err
	}
	for _, row := range rows {
		if row.Status == "bad" {
			return &exitError{code: exitRefused, err: fmt.Errorf("%s is not what its inputs make", o.Reference)}
		}
	}
	return nil
}

// rows looks at each input in turn. An error is a file that cannot be read.
func (o checkOptions) rows(a *app, r *reference.Reference) ([]referenceRow, error) {
	out := []referenceRow{}
	for _, l := range []struct {
		input, value string
		check        func() error // nil: nothing to check with
	}{
		{"measurement", r.Measurement.String(), r.Check},
		{"firmware", r.Inputs.Firmware.String(), o.checkFirmware(a, r)},
		{"kernel", r.Inputs.Kernel.String(), checkHash(o.Kernel, r.Inputs.Kernel)},
		{"initrd", r.Inputs.Initrd.String(), checkHash(o.Initrd, r.Inputs.Initrd)},
		{"pod", r.PodDigest.String(), checkHash(o.Pod, r.PodDigest)},
	} {
		row := referenceRow{Input: l.input, Status: "unchecked", Value: l.value}
		if l.value == (pod.Digest{}).String() {
			if row.Value = "none"; l.check == nil {
				continue
			}
		}
		if l.check != nil {
			row.Status = "good"
			err := l.check()
			if errors.As(err, new(*exitError)) {
				return nil, err
			}
			if err != nil {
				row.Status, row.Error = "bad", err.Error()
			}
		}
		out = append(out, row)
	}
	return out, nil
}

func (o checkOptions) checkFirmware(a *app, r *reference.Reference) func() error {
	if o.Firmware == "" {
		return nil
	}
	return func() error {
		f, err := readFirmware(a, o.Firmware)
		if err != nil {
			return err
		}
		return r.CheckFirmware(f)
	}
}

// checkHash wants a file, if there is one, to have a digest.
func checkHash(name string, want pod.Digest) func() error {
	if name == "" {
		return nil
	}
	return func() error {
		got, err := hashFile(name)
		if err != nil {
			return &exitError{code: exitUsage, err: err}
		}
		if pod.Digest(got) != want {
			return fmt.Errorf("%s is %s", name, pod.Digest(got))
		}
		return nil
	}
}

func printReferenceRows(w io.Writer, rows []referenceRow) error {
	for _, r := range rows {
		reason := ""
		switch r.Status {
		case "bad":
			reason = "\n           → " + r.Error
		case "unchecked":
			reason = "\n           → give --" + r.Input + " to compare it"
		}
		if _, err := fmt.Fprintf(w, "%-9s  %-11s  %s%s\n", r.Status, r.Input, r.Value, reason); err != nil {
			return err
		}
	}
	return nil
}
