// Simulate shows an attested pod without hardware: it makes a chip with a root key of its own, launches a pod on it, and
// verifies the evidence as kcradle verify does, but for trusting that root.
//
//	go run ./hack/simulate DIR
//
// The first run makes the files of DIR, every run verifies what is there: change the policy, the reference or pod.json and
// run it again. docs/attestation.md walks through it. Nothing here protects anything.
package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/kcradle/kcradle/snp"
	"github.com/kcradle/kcradle/snp/evidence"
	"github.com/kcradle/kcradle/snp/measure"
	"github.com/kcradle/kcradle/snp/ovmf/ovmftest"
	"github.com/kcradle/kcradle/snp/pod"
	"github.com/kcradle/kcradle/snp/policy"
	"github.com/kcradle/kcradle/snp/reference"
	"github.com/kcradle/kcradle/snp/sim"
	"github.com/kcradle/kcradle/snp/verify"
)

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go run ./hack/simulate DIR")
		os.Exit(2)
	}
	passed, err := run(context.Background(), os.Args[1], os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "simulate:", err)
		os.Exit(2)
	}
	if !passed {
		os.Exit(1)
	}
}

// The pod, and what its machine boots from: files as good as any to a launch digest.
const (
	podJSON = `{
  "version": 1,
  "name": "web",
  "containers": [
    {
      "id": "0000000000000000000000000000000000000000000000000000000000000001",
      "name": "app",
      "image": {
        "ref": "registry.example/app:1",
        "digest": "sha256:1111111111111111111111111111111111111111111111111111111111111111",
        "config": "sha256:2222222222222222222222222222222222222222222222222222222222222222",
        "layers": []
      },
      "created": "2026-01-01T00:00:00Z",
      "cmd": ["/app"]
    }
  ]
}
`
	commandLine = "console=hvc0 " + reference.PodParameter
	vCPUs       = 2
	cpuModel    = "EPYC-v4"
	guestPolicy = snp.PolicyReserved1 | snp.PolicySMT
	line        = snp.LineGenoa
)

func run(ctx context.Context, dir string, w io.Writer) (passed bool, err error) {
	if _, err := os.Stat(filepath.Join(dir, "evidence.json")); errors.Is(err, fs.ErrNotExist) {
		if err := launch(dir); err != nil {
			return false, err
		}
	}
	r, err := decide(ctx, dir)
	if err != nil {
		return false, err
	}
	return r.Passed(), r.WriteTable(w)
}

// launch makes the files of a directory.
func launch(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	image, kernel, initrd := ovmftest.Image(ovmftest.AmdSev(4<<20)), []byte("a kernel\n"), []byte("an initrd\n")
	o := reference.Options{
		Release: "simulated", CommandLine: commandLine + pod.DigestOf([]byte(podJSON)).String(), VCPUs: vCPUs, CPU: cpuModel,
		SEVFeatures: measure.FeatureSNP, GuestPolicy: guestPolicy, Pod: []byte(podJSON),
		Kernel: measure.FileHash(pod.DigestOf(kernel)), Initrd: measure.FileHash(pod.DigestOf(initrd)),
	}
	var err error
	if o.Firmware, err = measure.ReadFirmware(image); err != nil {
		return err
	}
	ref, err := reference.New(o)
	if err != nil {
		return err
	}
	refJSON, err := ref.Encode()
	if err != nil {
		return err
	}
	stored, root, err := attest(ref)
	if err != nil {
		return err
	}
	evidenceJSON, err := stored.Encode()
	if err != nil {
		return err
	}
	report, err := snp.Parse(stored.Report)
	if err != nil {
		return err
	}
	policyJSON, err := json.MarshalIndent(map[string]any{
		"version": policy.Version, "reference": map[string]string{"file": "ref.json"},
		"image":   "registry.example/app@sha256:1111111111111111111111111111111111111111111111111111111111111111",
		"chipIDs": []policy.ChipID{report.ChipID}, "minTCB": map[string]any{line.String(): report.ReportedTCB},
	}, "", "  ")
	if err != nil {
		return err
	}
	for name, b := range map[string][]byte{
		"firmware.fd": image, "kernel": kernel, "initrd": initrd, "pod.json": []byte(podJSON), "ref.json": refJSON,
		"policy.json": append(policyJSON, '\n'), "evidence.json": evidenceJSON,
		"nonce": fmt.Appendf(nil, "%x\n", stored.Nonce), "root": fmt.Appendf(nil, "%x\n", root), "report.bin": stored.Report,
	} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// attest is the machine's part: a chip launches what the reference says, and the pod answers a nonce.
func attest(ref *reference.Reference) (s *evidence.Stored, root [32]byte, err error) {
	keys, err := sim.NewKeys()
	if err != nil {
		return nil, root, err
	}
	amd := sim.NewAuthority(keys, line, snp.SignerVCEK, time.Now())
	if root, err = amd.Root(); err != nil {
		return nil, root, err
	}
	chip, err := amd.NewChip(1)
	if err != nil {
		return nil, root, err
	}
	chip.Report.Policy = guestPolicy
	chip.Report.Measurement, chip.Report.HostData, chip.Report.IDKeyDigest = ref.Measurement, ref.HostData, ref.IDKeyDigest
	s = &evidence.Stored{At: time.Now(), Pod: []byte(podJSON), Key: []byte("the public key of the pod's TLS certificate")}
	_, _ = rand.Read(s.Nonce[:]) // it does not fail
	_, _ = rand.Read(s.Exporter[:])
	data, err := snp.Binding{Nonce: s.Nonce, Key: s.Key, Exporter: s.Exporter, PodDigest: pod.DigestOf(s.Pod)}.ReportData()
	if err != nil {
		return nil, root, err
	}
	for _, part := range []struct {
		to   *[]byte
		made func() ([]byte, error)
	}{
		{&s.Report, func() ([]byte, error) { return chip.Attest(data, 0) }},
		{&s.VEK, chip.VEKDER},
		{&s.Chain, amd.Chain},
		{&s.CRL, func() ([]byte, error) { return amd.CRL() }},
	} {
		if *part.to, err = part.made(); err != nil {
			return nil, root, err
		}
	}
	return s, root, nil
}

// decide is the verifier's part, from the files of a directory alone. pod.json counts as it stands there, not as it was
// stored.
func decide(ctx context.Context, dir string) (verify.Result, error) {
	read := func(name string) []byte {
		b, _ := os.ReadFile(filepath.Join(dir, name)) // what is missing is not what it should be
		return b
	}
	p, err := policy.Parse(read("policy.json"))
	if err != nil {
		return verify.Rejected(verify.CheckPolicy, verify.Malformed, err), nil
	}
	ref, err := reference.Parse(read("ref.json"))
	if err != nil {
		return verify.Rejected(verify.CheckReference, verify.Malformed, err), nil
	}
	stored, err := evidence.Parse(read("evidence.json"))
	if err != nil {
		return verify.Rejected(verify.CheckEvidence, verify.Malformed, err), nil
	}
	stored.Pod = read("pod.json")
	var nonce, root [32]byte
	for name, to := range map[string]*[32]byte{"nonce": &nonce, "root": &root} {
		digits := read(name)
		if n, err := hex.Decode(to[:], digits[:min(len(digits), 64)]); err != nil || n != len(to) {
			return verify.Result{}, fmt.Errorf("%s: want 64 hex digits", filepath.Join(dir, name))
		}
	}
	v, err := verify.New(verify.Config{Now: time.Now, Roots: verify.Roots{Genoa: root}, Policy: p})
	if err != nil {
		return verify.Result{}, err
	}
	x := stored.Expect(nonce)
	x.Reference = ref
	if f, err := measure.ReadFirmware(read("firmware.fd")); err == nil {
		x.Firmware = append(x.Firmware, f)
	}
	return v.Verify(ctx, stored.Evidence(), x), nil
}
