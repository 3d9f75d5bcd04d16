package reference

import (
	"crypto/ed25519"
	"errors"

	"github.com/kcradle/kcradle/snp/policy"
)

// SignatureSuffix is what the name of the file with a reference's signature has behind that of the reference.
const SignatureSuffix = ".sig"

// SignatureSize is the size of such a file, in bytes: an Ed25519 signature (RFC 8032) of the reference file's bytes, and
// nothing else. This is how openssl writes it:
//
//	openssl pkeyutl -sign -rawin -inkey key.pem -in ref.json -out ref.json.sig
const SignatureSize = ed25519.SignatureSize

// ErrSignature is returned for a signature that is not by the key, or of other bytes.
var ErrSignature = errors.New("reference: the signature is not by the key that the policy names")

// CheckSignature wants signature to be key's, of the bytes of a reference file.
func CheckSignature(file, signature []byte, key policy.PublicKey) error {
	if len(signature) != SignatureSize || !ed25519.Verify(key[:], file, signature) {
		return ErrSignature
	}
	return nil
}
