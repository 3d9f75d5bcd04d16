package measure

import (
	"fmt"
	"strings"
)

// Variation is an input that differs from another in one thing.
type Variation struct {
	Change string // what differs, as "would match with …" continues: "4 vCPUs"; empty: nothing
	Input  Input
}

// Match looks for the one change to an input with which it has the digest of a report: another number of virtual CPUs,
// another CPU model, other SEV features, another reading of the command line, no initrd, no kernel hashes, and what the
// caller has at hand: another firmware, another pod's command line. It explains a mismatch to a person and decides nothing:
// the input that matches is not the one that was asked for.
//
// Without such a change ok is false. Its errors are those of [Input.Validate]; others that are not valid match nothing.
func (in Input) Match(want Digest, others ...Variation) (v Variation, ok bool, err error) {
	if err := in.Validate(); err != nil {
		return Variation{}, false, err
	}
	before := in.addSections(nil)
	if in.addVCPUs(before, nil) == want {
		return Variation{Input: in}, true, nil
	}
	first, other := in.vmsaHashes()
	digest, contents := before, &first
	for n := 1; n <= MaxVCPUs; n++ {
		if digest = digest.add(PageVMSA, vmsaGPA, contents); digest == want {
			in.VCPUs = n
			return Variation{Change: vCPUs(n), Input: in}, true, nil
		}
		contents = &other
	}
	for _, v := range append(in.variations(), others...) {
		if got, err := v.Input.Digest(); err == nil && got == want {
			return v, true, nil
		}
	}
	return Variation{}, false, nil
}

func vCPUs(n int) string {
	if n == 1 {
		return "1 vCPU"
	}
	return fmt.Sprintf("%d vCPUs", n)
}

// variations are the changes that Match tries, beside the number of virtual CPUs.
func (in Input) variations() []Variation {
	var out []Variation
	try := func(change string, edit func(*Input)) {
		v := in
		edit(&v)
		out = append(out, Variation{Change: change, Input: v})
	}
	for _, m := range cpuModels() {
		try("CPU "+m.name, func(v *Input) { v.CPU = m.cpu })
	}
	for _, f := range [...]uint64{FeatureSNP, FeatureSNP | FeatureDebugSwap} {
		try(fmt.Sprintf("SEV features %#x", f), func(v *Input) { v.SEVFeatures = f })
	}
	if in.NoKernelHashes {
		return out
	}
	try("kernel hashes off", func(v *Input) {
		v.NoKernelHashes, v.Kernel, v.Initrd, v.CommandLine = true, FileHash{}, FileHash{}, ""
	})
	try("no initrd", func(v *Input) { v.Initrd = FileHash{} })
	try("an empty command line", func(v *Input) { v.CommandLine = "" })
	try("a command line that ends in a newline", func(v *Input) { v.CommandLine += "\n" })
	try("the command line without the space around it", func(v *Input) { v.CommandLine = strings.TrimSpace(v.CommandLine) })
	return out
}
