package verify

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/reference"
)

// The checks of this file are made on a report that AMD's hardware made: s.report and s.vek are there, and true.

// verdict is a check that passes if ok, and else fails with the given message.
func verdict(ok bool, expected, actual, message string) Check {
	c := Check{Status: Pass, Expected: expected, Actual: actual}
	if !ok {
		c.Status, c.Message = Fail, message
	}
	return c
}

// tolerated turns a failure into a warning.
func tolerated(c Check) Check {
	if c.Status == Fail {
		c.Status = Warn
	}
	return c
}

func (s *session) checkReportData(context.Context) Check {
	actual := fmt.Sprintf("%x", s.report.ReportData)
	want := s.Expectation.ReportData
	if want != nil && s.Nonce != [32]byte{} {
		return Check{Status: Unset, Actual: actual, Message: "both a nonce and report data are expected"}
	}
	if want == nil {
		data, err := snp.Binding{
			Nonce: s.Nonce, Key: s.Key, Exporter: s.Exporter, PodDigest: pod.DigestOf(s.Evidence.Pod),
		}.ReportData()
		if err != nil {
			return Check{Status: Unset, Actual: actual, Message: err.Error() + ": nothing would tie the report to its reader"}
		}
		want = &data
	}
	if *want == ([64]byte{}) {
		return Check{Status: Unset, Actual: actual, Message: "no report data are expected, or zeros: nothing would tie the report to its reader"}
	}
	return verdict(s.report.ReportData == *want, fmt.Sprintf("%x", *want), actual,
		"the report was made for another nonce, key, connection or pod")
}

// checkFreshness says when the report was made. A nonce that the verifier has just chosen answers it; what was stored
// answers for itself alone.
func (s *session) checkFreshness(context.Context) Check {
	most := time.Duration(s.Policy.MaxEvidenceAge)
	c := Check{Status: Warn}
	switch {
	case s.Expectation.ReportData != nil:
		c.Message = "not checked: a bare report does not say when it was made, nor over which connection it came"
		if most != 0 {
			c.Status, c.Message = Fail, "a bare report does not say when it was made"
		}
	case !s.Stored:
		return Check{Status: Pass, Actual: "nonce and connection of this run"}
	default:
		c.Message = "not checked: stored evidence is as old as its nonce, and its connection is gone"
		if s.StoredAt.IsZero() {
			if most != 0 {
				c.Status, c.Message = Fail, "the evidence does not say when it was stored"
			}
			break
		}
		c.Actual = "stored " + s.StoredAt.UTC().Format(time.RFC3339)
		if age := s.now.Sub(s.StoredAt); most != 0 && age > most {
			c.Status, c.Message = Fail, "the evidence was stored too long ago"
		} else if age < 0 {
			c.Status, c.Message = Fail, "the evidence says that it was stored later than now"
		}
	}
	if most != 0 {
		c.Expected = "at most " + s.Policy.MaxEvidenceAge.String() + " old"
	}
	return c
}

// checkPod wants pod.json to be the one that was attested, and reads it. In a pod's own evidence checkReportData holds its
// digest; the reference names it, too.
func (s *session) checkPod(context.Context) Check {
	b := s.Evidence.Pod
	bare := s.Expectation.ReportData != nil
	if len(b) == 0 {
		if bare {
			return Check{Status: Open, Message: "a bare report comes without one"}
		}
		return Check{Status: Malformed, Message: "the evidence has no pod.json"}
	}
	p, err := pod.Parse(b)
	if err != nil {
		return Check{Status: Malformed, Message: err.Error()}
	}
	c := Check{Status: Pass, Actual: pod.DigestOf(b).String()}
	if s.Reference != nil && s.Reference.PodDigest != (pod.Digest{}) {
		c = verdict(s.Reference.PodDigest == pod.DigestOf(b), s.Reference.PodDigest.String(), c.Actual, "pod.json is of another pod than the reference")
	} else if bare {
		c.Status, c.Message = Fail, "nothing ties this pod.json to a bare report (give a reference that names it)"
	}
	if c.Status == Pass {
		s.pod = p
	}
	return c
}

func (s *session) checkMeasurement(context.Context) Check {
	actual := measure.Digest(s.report.Measurement)
	accepted := slices.Clone(s.Policy.Measurements)
	if s.Reference != nil {
		accepted = append(accepted, s.Reference.Measurement)
	}
	if len(accepted) == 0 {
		return Check{Status: Unset, Actual: actual.String(), Message: "neither policy nor reference says which launch digest is expected, so any guest would do"}
	}
	c := verdict(slices.Contains(accepted, actual), listOf(accepted), actual.String(), "the guest was launched from something else")
	if c.Status == Fail && s.Reference != nil {
		c.Message += s.explain(actual)
	}
	return c
}

// explain looks for the one difference between the reference and the launch of a digest.
func (s *session) explain(got measure.Digest) string {
	in, err := s.Reference.Input()
	if err != nil {
		return ""
	}
	var others []measure.Variation
	for _, f := range s.Firmware {
		v := measure.Variation{Change: "firmware " + pod.Digest(f.SHA256).String(), Input: in}
		v.Input.Firmware = f
		others = append(others, v)
	}
	if want := s.Reference.PodDigest; want != (pod.Digest{}) {
		for _, d := range []pod.Digest{pod.DigestOf(s.Evidence.Pod), s.report.HostData} {
			v := measure.Variation{Change: "pod " + d.String(), Input: in}
			v.Input.CommandLine = strings.Replace(in.CommandLine, reference.PodParameter+want.String(), reference.PodParameter+d.String(), 1)
			others = append(others, v)
		}
	}
	v, ok, err := in.Match(got, others...)
	if err != nil || !ok {
		return ", and no single change of the reference explains it"
	}
	return "; it would match with " + v.Change
}

func (s *session) checkHostData(context.Context) Check {
	actual := policy.HostData(s.report.HostData)
	var want policy.HostData
	switch {
	case s.Policy.HostData != nil:
		want = *s.Policy.HostData
	case s.Reference != nil && s.Reference.HostData != policy.HostData{}:
		want = s.Reference.HostData
	case len(s.Evidence.Pod) > 0:
		want = policy.HostData(pod.DigestOf(s.Evidence.Pod))
	default:
		return Check{Status: Open, Actual: actual.String(), Message: "nothing says what they are to be"}
	}
	return verdict(actual == want, want.String(), actual.String(), "the host launched the guest with other host data")
}

func (s *session) checkIDKey(context.Context) Check {
	got := policy.KeyDigest(s.report.IDKeyDigest)
	actual := got.String()
	if got == (policy.KeyDigest{}) {
		actual = "no ID block"
	}
	accepted := slices.Clone(s.Policy.IDKeyDigests)
	if s.Reference != nil && s.Reference.IDKeyDigest != (policy.KeyDigest{}) {
		accepted = append(accepted, s.Reference.IDKeyDigest)
	}
	if len(accepted) == 0 {
		return Check{Status: Open, Actual: actual, Message: "neither policy nor reference names a key"}
	}
	return verdict(slices.Contains(accepted, got), listOf(accepted), actual, "no accepted key signed the guest's ID block")
}

func (s *session) checkVersion(context.Context) Check {
	v := s.Policy.ReportVersion
	expected := fmt.Sprintf("%d to %d", v.Min, v.Max)
	if v.Min == v.Max {
		expected = fmt.Sprint(v.Min)
	}
	return verdict(v.Min <= s.report.Version && s.report.Version <= v.Max, expected, fmt.Sprint(s.report.Version),
		"the format of the report is of a version that is not accepted")
}

// checkProduct takes the line from the certificate, for which AMD vouches: a version 2 report does not name its processor.
func (s *session) checkProduct(context.Context) Check {
	accepted := slices.Clone(s.Policy.Products)
	if s.Policy.AllowMilan {
		accepted = append(accepted, snp.LineMilan)
	}
	c := verdict(slices.Contains(accepted, s.vek.Line), listOf(accepted), s.vek.Line.String(), "processors of this line are not accepted")
	if s.vek.Line == snp.LineMilan {
		c.Message = "reports of the Milan line can be forged: its root secrets can be extracted by software"
		if c.Status == Pass {
			c.Status = Warn
		}
	}
	return c
}

func (s *session) checkVMPL(context.Context) Check {
	c := verdict(s.report.VMPL == uint32(s.Policy.VMPL), fmt.Sprint(s.Policy.VMPL), fmt.Sprint(s.report.VMPL),
		"another privilege level in the guest asked for the report")
	if s.report.VMPL == snp.VMPLHost {
		c.Actual, c.Message = "the host", "the host asked for the report, not the guest"
	}
	return c
}

// permission is a bit by which the guest's policy permits the host something that no owner should want.
func permission(bit snp.Policy, message string, allowed func(policy.GuestPolicy) bool) func(*session, context.Context) Check {
	return func(s *session, _ context.Context) Check {
		c := verdict(!s.report.Policy.Has(bit), "not allowed", "not allowed", message)
		if c.Status == Fail {
			c.Actual = "allowed"
		}
		if allowed(s.Policy.GuestPolicy) {
			return tolerated(c)
		}
		return c
	}
}

func (s *session) checkSMT(context.Context) Check {
	actual := "not allowed"
	if s.report.Policy.Has(snp.PolicySMT) {
		actual = "allowed"
	}
	if s.Policy.GuestPolicy.SMT == policy.Allow {
		return verdict(true, "any", actual, "")
	}
	return verdict(actual == "not allowed", "not allowed", actual, "the guest may share its cores with others by SMT")
}

// restriction is a bit by which the guest's policy demands something of the host.
func restriction(bit snp.Policy, message string, rule func(policy.GuestPolicy) policy.Rule) func(*session, context.Context) Check {
	return func(s *session, _ context.Context) Check {
		actual := "not required"
		if s.report.Policy.Has(bit) {
			actual = "required"
		}
		if rule(s.Policy.GuestPolicy) == policy.Any {
			return verdict(true, "any", actual, "")
		}
		return verdict(actual == "required", "required", actual, message)
	}
}

func (s *session) checkABI(context.Context) Check {
	got := policy.ABI{Major: s.report.Policy.ABIMajor(), Minor: s.report.Policy.ABIMinor()}
	want := s.Policy.GuestPolicy.MinABI
	return verdict(!got.Less(want), want.String()+" or newer", got.String(), "the guest would run on firmware with an older ABI than is accepted")
}

func (s *session) checkUnknownPolicy(context.Context) Check {
	u := s.report.Policy.Unknown()
	return verdict(u == 0, "none", bitsOf(u), "the guest's policy has bits that are not known here, and so what they permit is not either")
}

// platform is a bit of the machine's state.
func platform(bit snp.PlatformInfo, what string, rule func(policy.Platform) policy.Rule) func(*session, context.Context) Check {
	return func(s *session, _ context.Context) Check {
		on := s.report.PlatformInfo.Has(bit)
		actual := "off"
		if on {
			actual = "on"
		}
		switch rule(s.Policy.Platform) {
		case policy.Require:
			return verdict(on, "on", actual, what+" is off or was not done on this machine")
		case policy.Deny:
			return verdict(!on, "off", actual, what+" is on or was done on this machine")
		}
		return verdict(true, "any", actual, "")
	}
}

func (s *session) checkUnknownPlatform(context.Context) Check {
	u := s.report.PlatformInfo.Unknown()
	return tolerated(verdict(u == 0, "none", bitsOf(u), "the machine's state has bits that are not known here"))
}

func bitsOf(u uint64) string {
	if u == 0 {
		return "none"
	}
	return fmt.Sprintf("%#x", u)
}

// minimum is one of the report's TCB versions.
func minimum(name policy.TCBName, of func(*snp.Report) snp.TCB) func(*session, context.Context) Check {
	return func(s *session, _ context.Context) Check {
		got := of(s.report)
		if !slices.Contains(s.Policy.TCBApplies, name) {
			return Check{Status: Open, Actual: got.String(), Message: fmt.Sprintf("the policy applies no minimum to the %s TCB version", name)}
		}
		floor, ok := s.Policy.MinTCB[s.vek.Line]
		if !ok {
			return Check{Status: Warn, Actual: got.String(), Message: fmt.Sprintf("the policy names no minimum for %s, so old firmware with known flaws is accepted", s.vek.Line)}
		}
		want := floor.Of(s.vek.Line)
		low := lower(got, want)
		return verdict(len(low) == 0, want.String()+" or newer", got.String(), fmt.Sprintf("the %s TCB version is too old: %s", name, strings.Join(low, ", ")))
	}
}

// lower returns the parts of got that are lower than those of want, or that they cannot be compared.
func lower(got, want snp.TCB) (out []string) {
	if got.Layout != want.Layout {
		return []string{"its parts are those of another line"}
	}
	for _, part := range []struct {
		name      string
		got, want uint8
	}{
		{"fmc", got.FMC, want.FMC},
		{"bl", got.Bootloader, want.Bootloader},
		{"tee", got.TEE, want.TEE},
		{"snp", got.SNP, want.SNP},
		{"ucode", got.Microcode, want.Microcode},
	} {
		if part.got < part.want {
			out = append(out, fmt.Sprintf("%s %d is below %d", part.name, part.got, part.want))
		}
	}
	return out
}

// mitigations is one of the report's two vectors.
func mitigations(pick func(*snp.Report, policy.Mitigations) (uint64, policy.Mask)) func(*session, context.Context) Check {
	return func(s *session, _ context.Context) Check {
		got, mask := pick(s.report, s.Policy.MinMitigations[s.vek.Line])
		want := uint64(mask)
		actual := fmt.Sprintf("%#x", got)
		if s.report.Version < snp.Version5 {
			actual = fmt.Sprintf("none in a report of version %d", s.report.Version)
		}
		if want == 0 {
			return Check{Status: Open, Actual: actual, Message: fmt.Sprintf("the policy demands no mitigations of %s", s.vek.Line)}
		}
		return verdict(got&want == want, fmt.Sprintf("all of %#x", want), actual, fmt.Sprintf("mitigations are missing: %#x", want&^got))
	}
}

// checkProvisional wants the running firmware to be committed: equal, and not only as new, since a version can be newer in
// one part and older in another. Whatever is tolerated: no firmware has committed, or derives keys for, what it does not run.
func (s *session) checkProvisional(context.Context) Check {
	r := s.report
	current := fmt.Sprintf("%s, %s", r.Current, r.CurrentTCB)
	committed := fmt.Sprintf("%s, %s", r.Committed, r.CommittedTCB)
	switch {
	case newer(r.Committed, r.Current) || len(lower(r.CurrentTCB, r.CommittedTCB)) > 0:
		return verdict(false, current, committed, "the firmware says that it has committed a newer one than it is")
	case len(lower(r.CurrentTCB, r.ReportedTCB)) > 0:
		return verdict(false, r.CurrentTCB.String(), r.ReportedTCB.String(), "the firmware reports a newer TCB version than it has")
	case s.Policy.AllowProvisional:
		return verdict(true, "any", committed, "")
	}
	return verdict(current == committed, current, committed, "the firmware that is running is not committed: the host may roll it back")
}

// newer reports whether a is of a later version than b.
func newer(a, b snp.Firmware) bool {
	return slices.Compare([]uint8{a.Major, a.Minor, a.Build}, []uint8{b.Major, b.Minor, b.Build}) > 0
}

func (s *session) checkChipID(context.Context) Check {
	id := policy.ChipID(s.report.ChipID)
	if len(s.Policy.ChipIDs) == 0 {
		return Check{Status: Warn, Actual: id.String(), Message: "the policy names no chips, so any machine of anybody is accepted"}
	}
	return verdict(slices.Contains(s.Policy.ChipIDs, id), listOf(s.Policy.ChipIDs), id.String(), "the machine is none of those that are accepted")
}

// noPod is the outcome of a check that needs a pod.json where there is none that was attested: open if none was to be
// expected, not reached else.
func (s *session) noPod() Check {
	if len(s.Evidence.Pod) == 0 && s.Expectation.ReportData != nil {
		return Check{Status: Open, Message: "a bare report comes without a pod.json"}
	}
	return Check{Status: Skipped, Message: notReached(CheckPod)}
}

// checkImage wants each container to run an image that is accepted, and each of those to run.
func (s *session) checkImage(context.Context) Check {
	var expected []string
	accepted := map[pod.Digest]bool{}
	for _, i := range s.Policy.Images {
		expected = append(expected, i.String())
		accepted[i.Digest] = false
	}
	var config pod.Digest
	if ref := s.Reference; len(expected) == 0 && ref != nil && ref.Image != nil {
		config = ref.Image.Config
		if ref.Image.Manifest != (pod.Digest{}) {
			expected = append(expected, ref.Image.Ref+"@"+ref.Image.Manifest.String())
			accepted[ref.Image.Manifest] = false
		}
	}
	if s.pod == nil {
		c := s.noPod()
		if c.Status == Open && len(s.Policy.Images) > 0 {
			c.Status, c.Message = Fail, "there is no pod.json that would say which images run"
		}
		c.Expected = strings.Join(expected, ", ")
		return c
	}
	var actual []string
	for _, i := range s.pod.Images() {
		name := i.Ref + "@" + i.Digest.String()
		if i.Digest == (pod.Digest{}) {
			name = i.Ref + " without a manifest, configuration " + i.Config.String()
		}
		actual = append(actual, name)
	}
	c := Check{Status: Pass, Expected: strings.Join(expected, ", "), Actual: strings.Join(actual, ", ")}
	for _, i := range s.pod.Images() {
		if config != (pod.Digest{}) && i.Config != config {
			c.Status, c.Message = Fail, "the pod runs an image of another configuration than the reference"
			return c
		}
		if _, ok := accepted[i.Digest]; !ok && len(accepted) > 0 {
			c.Status, c.Message = Fail, "the pod runs an image that is not accepted"
			return c
		}
		accepted[i.Digest] = true
	}
	for _, runs := range accepted {
		if !runs {
			c.Status, c.Message = Fail, "the pod does not run every image that was asked for"
			return c
		}
	}
	if len(expected) == 0 && config == (pod.Digest{}) {
		c.Status, c.Message = Open, "neither policy nor reference names an image"
	}
	return c
}

// checkPodExec looks for somebody who may run commands in the pod. A pod.json of version 1 cannot say it.
func (s *session) checkPodExec(context.Context) Check {
	if s.pod == nil {
		return s.noPod()
	}
	if s.Policy.PodConstraints.Exec {
		return verdict(true, "any", "not said in pod.json", "")
	}
	return Check{Status: Warn, Expected: "nobody", Actual: "not said in pod.json",
		Message: "pod.json does not say who may run commands in the pod: the guest that was measured decides"}
}

// constraint is something that a pod has or has not.
func constraint(what string, found func(*pod.Pod) []string, allowed func(policy.PodConstraints) bool) func(*session, context.Context) Check {
	return func(s *session, _ context.Context) Check {
		if s.pod == nil {
			return s.noPod()
		}
		list := found(s.pod)
		c := verdict(len(list) == 0, "none", "none", "the pod has "+what)
		if c.Status == Fail {
			c.Actual = listOf(list)
		}
		if allowed(s.Policy.PodConstraints) {
			return tolerated(c)
		}
		return c
	}
}

// maxShown bounds how many entries of a list a check shows.
const maxShown = 4

// listOf lists what there is to choose from.
func listOf[T any](list []T) string {
	var b strings.Builder
	for i, v := range list[:min(len(list), maxShown)] {
		switch {
		case i > 0 && i == len(list)-1:
			b.WriteString(" or ")
		case i > 0:
			b.WriteString(", ")
		}
		fmt.Fprint(&b, v)
	}
	if n := len(list) - maxShown; n > 0 {
		fmt.Fprintf(&b, ", or %d others", n)
	}
	return b.String()
}
