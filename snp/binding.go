package snp

import (
	"crypto/sha256"
	"crypto/sha512"
	"errors"
)

// ExporterLabel is the label under which both ends of a TLS 1.3 connection derive Binding.Exporter (RFC 8446, section 7.5;
// no context, 32 bytes): crypto/tls ConnectionState.ExportKeyingMaterial(ExporterLabel, nil, 32).
const ExporterLabel = "EXPORTER-kcradle-attestation"

// bindingLabel keeps these report data from ever being taken for others.
const bindingLabel = "kcradle-att-v1"

// Binding is what a kcradle pod puts into a report's REPORT_DATA: whom it answers, over which connection, and which pod it
// is. All fields are required: one that is zero would tie the report to nothing.
type Binding struct {
	Nonce     [32]byte // chosen by the verifier, for this report alone
	Key       []byte   // public key of the pod's TLS certificate, SubjectPublicKeyInfo in DER
	Exporter  [32]byte // of the connection, see ExporterLabel
	PodDigest [32]byte // SHA-256 of pod.json
}

// ReportData returns SHA-512("kcradle-att-v1" ‖ SHA-256(Nonce) ‖ SHA-256(Key) ‖ Exporter ‖ PodDigest).
func (b Binding) ReportData() ([64]byte, error) {
	switch {
	case b.Nonce == [32]byte{}:
		return [64]byte{}, errors.New("snp: report data: no nonce")
	case len(b.Key) == 0:
		return [64]byte{}, errors.New("snp: report data: no key")
	case b.Exporter == [32]byte{}:
		return [64]byte{}, errors.New("snp: report data: no exporter")
	case b.PodDigest == [32]byte{}:
		return [64]byte{}, errors.New("snp: report data: no pod digest")
	}
	nonce, key := sha256.Sum256(b.Nonce[:]), sha256.Sum256(b.Key)
	in := make([]byte, 0, len(bindingLabel)+4*sha256.Size)
	in = append(in, bindingLabel...)
	in = append(in, nonce[:]...)
	in = append(in, key[:]...)
	in = append(in, b.Exporter[:]...)
	in = append(in, b.PodDigest[:]...)
	return sha512.Sum512(in), nil
}
