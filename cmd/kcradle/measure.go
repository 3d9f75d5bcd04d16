package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/kcradle/kcradle/bundle"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/ovmf"
)

type measureOptions struct {
	Dir         string // a bundle; empty: parts
	Firmware    string
	Kernel      string
	Initrd      string
	CommandLine string
	VCPUs       int
	CPU         string
	SEVFeatures string
	Explain     bool
	JSON        bool

	appendSet bool // an empty command line was asked for, too
	parts     bool // any flag of the parts was given
}

func newMeasure(a *app) *cobra.Command {
	var o measureOptions
	cmd := &cobra.Command{
		Use:   "measure [flags] (DIR | --firmware FILE --vcpus N --cpu MODEL)",
		Short: "Compute the launch digest that a machine must report",
		Long: `measure computes the launch digest of a SEV-SNP machine: the MEASUREMENT of its attestation reports, 96 hex digits. It
needs no SEV-SNP, and the files need not come from who will run them.

With --kernel the digest covers kernel, initrd and command line, as QEMU measures them with kernel-hashes=on; the firmware
must have a page for their hashes, and must be one that holds what it loads against them. Without --kernel the digest
covers the firmware and the CPUs alone, and whoever starts the machine chooses what it runs.

The exit code is 0 with a digest, 2 when the command line or a file is at fault, 3 when the firmware cannot be read.`,
		Example: `  kcradle measure --firmware OVMF.amdsev.fd --kernel vmlinuz --initrd initrd --append "console=hvc0" --vcpus 2 --cpu EPYC-v4
  kcradle measure --firmware OVMF.amdsev.fd --kernel vmlinuz --vcpus 1 --cpu EPYC-v4 --explain`,
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: completeBundles(a),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				o.Dir = args[0]
			}
			f := cmd.Flags()
			o.appendSet = f.Changed("append")
			for _, name := range []string{"firmware", "kernel", "initrd", "append", "vcpus", "cpu", "sev-features"} {
				o.parts = o.parts || f.Changed(name)
			}
			return runMeasure(a, o)
		},
	}
	o.flags(cmd)
	f := cmd.Flags()
	f.BoolVar(&o.Explain, "explain", false, "show the digest after every step")
	f.BoolVar(&o.JSON, "json", false, "as JSON, with every input (with --explain: and every step)")
	return cmd
}

// flags are those of the parts of a machine.
func (o *measureOptions) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.Firmware, "firmware", "", "the whole firmware `file` (QEMU's -bios)")
	f.StringVar(&o.Kernel, "kernel", "", "the kernel `file`, a bzImage")
	f.StringVar(&o.Initrd, "initrd", "", "the initrd `file`")
	f.StringVar(&o.CommandLine, "append", "", "the kernel's command `line`")
	f.IntVar(&o.VCPUs, "vcpus", 0, "the `number` of virtual CPUs")
	f.StringVar(&o.CPU, "cpu", "", "QEMU's `model` of the virtual CPUs, such as EPYC-v4")
	f.StringVar(&o.SEVFeatures, "sev-features", "0x1", "SEV_FEATURES of the virtual CPUs, a `number`")
	_ = cmd.RegisterFlagCompletionFunc("cpu", cobra.FixedCompletions(cpuModels(), cobra.ShellCompDirectiveNoFileComp))
}

// cpuModels are what completion offers.
func cpuModels() []string {
	return []string{"EPYC-v4", "EPYC-Rome", "EPYC-Milan", "EPYC-Genoa", "EPYC-Turin"}
}

func runMeasure(a *app, o measureOptions) error {
	if o.Dir != "" {
		return measureBundle(o)
	}
	if err := o.validate(); err != nil {
		return usageError{err}
	}
	in, err := o.input(a)
	if err != nil {
		return err
	}
	steps, err := in.Explain()
	if err != nil {
		return usageError{err}
	}
	return o.print(a.Stdout, in, steps)
}

// measureBundle says what a bundle lacks.
func measureBundle(o measureOptions) error {
	if o.parts {
		return usageError{errors.New("a bundle or its parts: name DIR, or --firmware and the others")}
	}
	b, err := bundle.Open(o.Dir)
	if err != nil {
		return &exitError{code: exitUsage, err: err}
	}
	return &exitError{code: exitUsage, err: fmt.Errorf("%s has no machine package for SEV-SNP (pkg-snp: firmware, kernel, initrd and "+
		"command line of an attested machine), so there is nothing to measure (name the parts: --firmware, --kernel, --initrd, --append)", b.Dir)}
}

func (o measureOptions) validate() error {
	switch {
	case o.Firmware == "":
		return errors.New("--firmware is required: the file that the machine boots from")
	case o.VCPUs == 0:
		return errors.New("--vcpus is required: each virtual CPU is measured")
	case o.CPU == "":
		return errors.New("--cpu is required: the CPU model is measured (such as EPYC-v4; kcradle starts no other)")
	case o.Kernel == "" && (o.Initrd != "" || o.appendSet):
		return errors.New("--initrd and --append need --kernel: without a kernel none of them is measured")
	}
	return nil
}

// input reads the files.
func (o measureOptions) input(a *app) (in measure.Input, err error) {
	if in.CPU, err = measure.ParseCPU(o.CPU); err != nil {
		return in, usageError{err}
	}
	if in.SEVFeatures, err = strconv.ParseUint(o.SEVFeatures, 0, 64); err != nil {
		return in, usageError{fmt.Errorf("invalid argument %q for \"--sev-features\" flag: want a number such as 0x1", o.SEVFeatures)}
	}
	in.VCPUs, in.CommandLine, in.NoKernelHashes = o.VCPUs, o.CommandLine, o.Kernel == ""
	if in.Firmware, err = readFirmware(a, o.Firmware); err != nil {
		return in, err
	}
	for _, part := range []struct {
		name string
		hash *measure.FileHash
	}{{o.Kernel, &in.Kernel}, {o.Initrd, &in.Initrd}} {
		if part.name == "" {
			continue
		}
		if *part.hash, err = hashFile(part.name); err != nil {
			return in, &exitError{code: exitUsage, err: err}
		}
	}
	return in, nil
}

func readFirmware(a *app, name string) (measure.Firmware, error) {
	image, err := readInput(a, name, ovmf.MaxSize)
	if err != nil {
		return measure.Firmware{}, err
	}
	f, err := measure.ReadFirmware(image)
	if err != nil {
		return measure.Firmware{}, &exitError{code: exitMalformed, err: fmt.Errorf("%s: %w", name, err)}
	}
	return f, nil
}

func hashFile(name string) (measure.FileHash, error) {
	f, err := os.Open(name)
	if err != nil {
		return measure.FileHash{}, err
	}
	defer f.Close()
	return measure.HashFile(f)
}

// measureJSON is the output of --json. Hashes of files are written as in a reference file.
type measureJSON struct {
	Version     int               `json:"version"` // of this object
	Measurement measure.Digest    `json:"measurement"`
	Inputs      measureInputsJSON `json:"inputs"`
	Steps       []measureStepJSON `json:"steps,omitempty"`
}

type measureInputsJSON struct {
	Firmware     string         `json:"firmware"`
	FirmwareSeed measure.Digest `json:"firmwareSeed"` // the digest after the firmware
	KernelHashes bool           `json:"kernelHashes"`
	Kernel       string         `json:"kernel,omitempty"`
	Initrd       string         `json:"initrd,omitempty"`
	CommandLine  string         `json:"cmdline,omitempty"`
	VCPUs        int            `json:"vcpus"`
	CPU          string         `json:"cpu"`
	SEVFeatures  string         `json:"sevFeatures"`
}

type measureStepJSON struct {
	Name   string         `json:"name"`
	Page   string         `json:"page"` // type of its pages
	GPA    string         `json:"gpa"`  // guest physical address of the first
	Pages  int            `json:"pages"`
	Digest measure.Digest `json:"digest"`
}

func (o measureOptions) print(w io.Writer, in measure.Input, steps []measure.Step) error {
	digest := steps[len(steps)-1].Digest
	switch {
	case o.JSON:
		out := measureJSON{
			Version: 1, Measurement: digest,
			Inputs: measureInputsJSON{
				Firmware: sha256Name(in.Firmware.SHA256), FirmwareSeed: in.Firmware.Seed, KernelHashes: !in.NoKernelHashes,
				Kernel: sha256Name(in.Kernel), Initrd: sha256Name(in.Initrd), CommandLine: in.CommandLine,
				VCPUs: in.VCPUs, CPU: o.CPU, SEVFeatures: fmt.Sprintf("%#x", in.SEVFeatures),
			},
		}
		if o.Explain {
			for _, s := range steps {
				out.Steps = append(out.Steps, measureStepJSON{s.Name, s.Page.String(), fmt.Sprintf("%#x", s.GPA), s.Pages, s.Digest})
			}
		}
		return printJSON(w, out)
	case o.Explain:
		t := tabwriter.NewWriter(w, 0, 8, 2, ' ', 0)
		fmt.Fprintln(t, "STEP\tPAGES\tTYPE\tADDRESS\tDIGEST AFTER IT")
		for _, s := range steps {
			fmt.Fprintf(t, "%s\t%d\t%s\t%#x\t%s\n", s.Name, s.Pages, s.Page, s.GPA, s.Digest)
		}
		return t.Flush()
	}
	_, err := fmt.Fprintln(w, digest)
	return err
}

// sha256Name writes a hash with its algorithm, none as nothing.
func sha256Name(h measure.FileHash) string {
	if h == (measure.FileHash{}) {
		return ""
	}
	return "sha256:" + h.String()
}
