// Package idblock makes and checks what a SEV-SNP launch can be held to: an ID block, which names the launch digest and
// the policy of a guest, and the ID authentication, which signs it. The security processor refuses to finish a launch
// that differs from its ID block, and reports the digest of the key that signed.
//
//	block := idblock.Block{LaunchDigest: digest, Policy: 0x30000}
//	auth, err := idblock.Anonymous(block)
//	blockBytes, authBytes := block.Bytes(), auth.Bytes()      // for QEMU's id-block= and id-auth=, in base64
//	want := auth.IDKey.Digest()                               // ID_KEY_DIGEST of the report
//
// An ID block fails a wrong launch early and on the host. A host may leave it out, so a verifier compares the
// measurement of the report in any case.
package idblock

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha512"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"slices"
)

// Sizes in bytes, as the SEV-SNP firmware ABI (AMD document 56860) has them: ID_BLOCK and ID_AUTH_INFO of
// SNP_LAUNCH_FINISH, and the formats of an ECDSA key and signature.
const (
	BlockSize     = 96
	AuthSize      = 4096
	PublicKeySize = 1028
	SignatureSize = 512
)

// BlockVersion is the version of the ID block that this code writes and reads.
const BlockVersion = 1

// coordinate is the size of a number in a key or signature: little-endian, zeros after its scalar bytes.
const (
	coordinate = 72
	scalar     = 48 // of P-384
)

const (
	algorithmECDSAP384 = 1 // ID_KEY_ALGO and AUTHOR_KEY_ALGO: ECDSA with P-384 and SHA-384
	curveP384          = 2
)

// ErrSignature is returned (wrapped) for a signature that is not by its key.
var ErrSignature = errors.New("signature does not verify")

// Block mirrors the ID_BLOCK structure.
type Block struct {
	LaunchDigest [sha512.Size384]byte // required
	FamilyID     [16]byte             // as the owner likes; in the report and in derived keys
	ImageID      [16]byte             // likewise
	GuestSVN     uint32               // likewise: a security version of the guest
	Policy       uint64               // required; the guest policy that the launch must have, bit for bit
}

// Offsets in an ID block.
const (
	blockDigest  = 0x00
	blockFamily  = 0x30
	blockImage   = 0x40
	blockVersion = 0x50 // u32
	blockSVN     = 0x54 // u32
	blockPolicy  = 0x58 // u64
)

// Bytes is what the security processor reads.
func (b Block) Bytes() [BlockSize]byte {
	var out [BlockSize]byte
	copy(out[blockDigest:], b.LaunchDigest[:])
	copy(out[blockFamily:], b.FamilyID[:])
	copy(out[blockImage:], b.ImageID[:])
	binary.LittleEndian.PutUint32(out[blockVersion:], BlockVersion)
	binary.LittleEndian.PutUint32(out[blockSVN:], b.GuestSVN)
	binary.LittleEndian.PutUint64(out[blockPolicy:], b.Policy)
	return out
}

// ParseBlock reads what [Block.Bytes] writes.
func ParseBlock(in []byte) (Block, error) {
	if len(in) != BlockSize {
		return Block{}, fmt.Errorf("idblock: ID block of %d bytes: want %d", len(in), BlockSize)
	}
	if v := binary.LittleEndian.Uint32(in[blockVersion:]); v != BlockVersion {
		return Block{}, fmt.Errorf("idblock: ID block of version %d: this code knows %d", v, BlockVersion)
	}
	return Block{
		LaunchDigest: [sha512.Size384]byte(in[blockDigest:]),
		FamilyID:     [16]byte(in[blockFamily:]),
		ImageID:      [16]byte(in[blockImage:]),
		GuestSVN:     binary.LittleEndian.Uint32(in[blockSVN:]),
		Policy:       binary.LittleEndian.Uint64(in[blockPolicy:]),
	}, nil
}

// digest is what the ID key signs.
func (b Block) digest() [sha512.Size384]byte {
	raw := b.Bytes()
	return sha512.Sum384(raw[:])
}

// PublicKey is a P-384 key as the security processor has it: the curve as u32, X, Y, zeros.
type PublicKey [PublicKeySize]byte

const (
	keyX   = 4
	keyY   = keyX + coordinate
	keyEnd = keyY + coordinate
)

// NewPublicKey writes a key. It must be of P-384.
func NewPublicKey(key *ecdsa.PublicKey) (PublicKey, error) {
	if key == nil || key.Curve != elliptic.P384() {
		return PublicKey{}, errors.New("idblock: key: want one of P-384")
	}
	if key.X == nil || key.Y == nil { //nolint:staticcheck // deprecated, but Bytes would panic
		return PublicKey{}, errors.New("idblock: key: no point")
	}
	raw, err := key.Bytes() // 4, X, Y; big-endian
	if err != nil {
		return PublicKey{}, fmt.Errorf("idblock: key: %w", err)
	}
	var k PublicKey
	binary.LittleEndian.PutUint32(k[:], curveP384)
	putReversed(k[keyX:], raw[1:1+scalar])
	putReversed(k[keyY:], raw[1+scalar:])
	return k, nil
}

// Digest is the ID_KEY_DIGEST or AUTHOR_KEY_DIGEST of a report.
func (k PublicKey) Digest() [sha512.Size384]byte { return sha512.Sum384(k[:]) }

// Key reads the key; it is a point on P-384.
func (k PublicKey) Key() (*ecdsa.PublicKey, error) {
	if c := binary.LittleEndian.Uint32(k[:]); c != curveP384 {
		return nil, fmt.Errorf("idblock: key of curve %d: want %d, P-384", c, curveP384)
	}
	if !isZero(k[keyX+scalar:keyY]) || !isZero(k[keyY+scalar:]) {
		return nil, errors.New("idblock: key: want zeros after the coordinates")
	}
	raw := make([]byte, 1+2*scalar)
	raw[0] = 4 // uncompressed
	putReversed(raw[1:], k[keyX:keyX+scalar])
	putReversed(raw[1+scalar:], k[keyY:keyY+scalar])
	key, err := ecdsa.ParseUncompressedPublicKey(elliptic.P384(), raw)
	if err != nil {
		return nil, fmt.Errorf("idblock: key: %w", err)
	}
	return key, nil
}

// Signature is an ECDSA signature as the security processor has it: R, S, zeros.
type Signature [SignatureSize]byte

const signatureEnd = 2 * coordinate

func newSignature(r, s *big.Int) Signature {
	var out Signature
	var n [scalar]byte
	putReversed(out[:], r.FillBytes(n[:]))
	putReversed(out[coordinate:], s.FillBytes(n[:]))
	return out
}

func (s Signature) numbers() (r, v *big.Int, err error) {
	if !isZero(s[scalar:coordinate]) || !isZero(s[coordinate+scalar:]) {
		return nil, nil, errors.New("want zeros after R and S")
	}
	var n [scalar]byte
	putReversed(n[:], s[:scalar])
	r = new(big.Int).SetBytes(n[:])
	putReversed(n[:], s[coordinate:coordinate+scalar])
	return r, new(big.Int).SetBytes(n[:]), nil
}

// verify checks that a signature of a digest is by a key.
func (s Signature) verify(key PublicKey, digest [sha512.Size384]byte) error {
	public, err := key.Key()
	if err != nil {
		return err
	}
	r, v, err := s.numbers()
	if err != nil {
		return err
	}
	if !ecdsa.Verify(public, digest[:], r, v) {
		return ErrSignature
	}
	return nil
}

// Auth mirrors the ID_AUTH_INFO structure: the key that signed an ID block, and perhaps an author, whose key signed that
// key.
type Auth struct {
	BlockSignature Signature // of the 96 bytes of the ID block, by IDKey
	IDKey          PublicKey
	Author         *Author // nil: none
}

// Author vouches for an ID key. QEMU wants author-key-enabled=on with one.
type Author struct {
	KeySignature Signature // of the bytes of the ID key, by Key
	Key          PublicKey
}

// Offsets in an ID authentication. What lies between is zero.
const (
	authAlgorithm       = 0x000 // u32
	authAuthorAlgorithm = 0x004 // u32; 0 without an author
	authReserved1       = 0x008
	authBlockSignature  = 0x040
	authIDKey           = 0x240
	authReserved2       = 0x644
	authKeySignature    = 0x680
	authAuthorKey       = 0x880
	authReserved3       = 0xc84
)

// Bytes is what the security processor reads.
func (a Auth) Bytes() [AuthSize]byte {
	var out [AuthSize]byte
	binary.LittleEndian.PutUint32(out[authAlgorithm:], algorithmECDSAP384)
	copy(out[authBlockSignature:], a.BlockSignature[:])
	copy(out[authIDKey:], a.IDKey[:])
	if a.Author != nil {
		binary.LittleEndian.PutUint32(out[authAuthorAlgorithm:], algorithmECDSAP384)
		copy(out[authKeySignature:], a.Author.KeySignature[:])
		copy(out[authAuthorKey:], a.Author.Key[:])
	}
	return out
}

// ParseAuth reads what [Auth.Bytes] writes. It checks no signature; see [Auth.Verify].
func ParseAuth(in []byte) (Auth, error) {
	if len(in) != AuthSize {
		return Auth{}, fmt.Errorf("idblock: ID authentication of %d bytes: want %d", len(in), AuthSize)
	}
	if !isZero(in[authReserved1:authBlockSignature]) || !isZero(in[authReserved2:authKeySignature]) || !isZero(in[authReserved3:]) {
		return Auth{}, errors.New("idblock: ID authentication: want zeros between its fields")
	}
	if n := binary.LittleEndian.Uint32(in[authAlgorithm:]); n != algorithmECDSAP384 {
		return Auth{}, fmt.Errorf("idblock: ID key of algorithm %d: want %d", n, algorithmECDSAP384)
	}
	a := Auth{BlockSignature: Signature(in[authBlockSignature:]), IDKey: PublicKey(in[authIDKey:])}
	switch n := binary.LittleEndian.Uint32(in[authAuthorAlgorithm:]); n {
	case 0:
		if !isZero(in[authKeySignature:]) {
			return Auth{}, errors.New("idblock: an author's key without its algorithm")
		}
	case algorithmECDSAP384:
		a.Author = &Author{KeySignature: Signature(in[authKeySignature:]), Key: PublicKey(in[authAuthorKey:])}
	default:
		return Auth{}, fmt.Errorf("idblock: author key of algorithm %d: want %d, or 0 for none", n, algorithmECDSAP384)
	}
	return a, nil
}

// Verify checks the signatures as the security processor does. Whether the keys are to be trusted is the caller's
// question. It returns ErrSignature, wrapped, for a signature of something else.
func (a Auth) Verify(b Block) error {
	if err := a.BlockSignature.verify(a.IDKey, b.digest()); err != nil {
		return fmt.Errorf("idblock: signature of the ID block: %w", err)
	}
	if a.Author != nil {
		if err := a.Author.KeySignature.verify(a.Author.Key, a.IDKey.Digest()); err != nil {
			return fmt.Errorf("idblock: signature of the ID key: %w", err)
		}
	}
	return nil
}

// putReversed writes a big-endian number little-endian, or the other way round.
func putReversed(dst, src []byte) {
	n := copy(dst, src)
	slices.Reverse(dst[:n])
}

func isZero(b []byte) bool { return len(bytes.Trim(b, "\x00")) == 0 }
