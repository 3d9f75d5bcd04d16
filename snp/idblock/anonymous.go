package idblock

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"errors"
	"fmt"
	"math/big"
)

// Anonymous signs an ID block with a key that nobody has: the signature is fixed, R = 2 and S = 1, and the public key is
// the one for which it is right. So the same block always has the same ID_KEY_DIGEST, another block has another, and
// there is no private key to keep or to lose.
func Anonymous(b Block) (Auth, error) {
	digest := b.digest()
	r, s := big.NewInt(2), big.NewInt(1)
	key, err := recoverKey(digest[:], r, s)
	if err != nil {
		return Auth{}, fmt.Errorf("idblock: anonymous key: %w", err)
	}
	a := Auth{BlockSignature: newSignature(r, s)}
	if a.IDKey, err = NewPublicKey(key); err != nil {
		return Auth{}, err
	}
	// The standard library has the last word on the arithmetic below.
	if err := a.Verify(b); err != nil {
		return Auth{}, err
	}
	return a, nil
}

// recoverKey finds the key with which (r, s) signs a digest (SEC 1 version 2.0, section 4.1.6). R is a point with X = r;
// the key is (s·R − digest·G) / r. There are two such points, R and −R, and so two keys: it takes the one with the
// smaller X.
//
// The standard library multiplies points for ECDH: the base point, and of any other it tells the X of the result. That is
// enough, since both points with that X are asked for.
func recoverKey(digest []byte, r, s *big.Int) (*ecdsa.PublicKey, error) {
	params := elliptic.P384().Params()
	c := curve{p: params.P, b: params.B}
	point, ok := c.lift(r)
	if !ok {
		return nil, fmt.Errorf("no point of P-384 has X = %v", r)
	}
	inverse := new(big.Int).ModInverse(r, params.N)
	// The digest has as many bits as the order of the curve.
	minus := new(big.Int).SetBytes(digest)
	minus.Mul(minus.Neg(minus), inverse).Mod(minus, params.N)
	base, err := newScalar(minus)
	if err != nil {
		return nil, fmt.Errorf("no key signs this digest so: %w", err)
	}
	second := parsePoint(base.PublicKey().Bytes())
	factor, err := newScalar(inverse.Mul(inverse, s).Mod(inverse, params.N))
	if err != nil {
		return nil, err
	}
	public, err := ecdh.P384().NewPublicKey(point.bytes())
	if err != nil {
		return nil, err
	}
	x, err := factor.ECDH(public)
	if err != nil {
		return nil, err
	}
	first, ok := c.lift(new(big.Int).SetBytes(x))
	if !ok {
		panic("idblock: internal error: the X of a point is of no point")
	}
	var best *affine
	for _, candidate := range [...]*affine{first, c.negate(first)} {
		q := c.add(candidate, second)
		if q != nil && (best == nil || q.x.Cmp(best.x) < 0) {
			best = q
		}
	}
	if best == nil {
		return nil, errors.New("no key signs this digest so")
	}
	return ecdsa.ParseUncompressedPublicKey(elliptic.P384(), best.bytes())
}

// newScalar is k as the standard library multiplies by it, from 1 to below the order of the curve.
func newScalar(k *big.Int) (*ecdh.PrivateKey, error) {
	return ecdh.P384().NewPrivateKey(k.FillBytes(make([]byte, scalar)))
}

// curve is y² = x³ − 3x + b modulo p, with the textbook's formulas. Its time depends on its operands, all of which are
// public here.
type curve struct{ p, b *big.Int }

// affine is a point; nil is the point at infinity.
type affine struct{ x, y *big.Int }

func (c curve) mod(n *big.Int) *big.Int { return n.Mod(n, c.p) }

// lift finds a point with an X.
func (c curve) lift(x *big.Int) (*affine, bool) {
	y := new(big.Int).Exp(x, big.NewInt(3), c.p)
	y.Sub(y, new(big.Int).Mul(big.NewInt(3), x))
	y = c.mod(y.Add(y, c.b))
	if y.ModSqrt(y, c.p) == nil {
		return nil, false
	}
	return &affine{new(big.Int).Set(x), y}, true
}

func (c curve) negate(a *affine) *affine {
	if a == nil {
		return nil
	}
	return &affine{a.x, c.mod(new(big.Int).Neg(a.y))}
}

func (c curve) add(a, b *affine) *affine {
	if a == nil {
		return b
	}
	if b == nil {
		return a
	}
	var over, under *big.Int // the slope of the line through both
	if a.x.Cmp(b.x) != 0 {
		over, under = new(big.Int).Sub(b.y, a.y), new(big.Int).Sub(b.x, a.x)
	} else {
		if a.y.Cmp(b.y) != 0 || a.y.Sign() == 0 {
			return nil
		}
		over = new(big.Int).Mul(a.x, a.x)
		over.Mul(over, big.NewInt(3)).Sub(over, big.NewInt(3))
		under = new(big.Int).Lsh(a.y, 1)
	}
	slope := under.ModInverse(c.mod(under), c.p)
	slope = c.mod(slope.Mul(slope, over))
	x := new(big.Int).Mul(slope, slope)
	x = c.mod(x.Sub(x, a.x).Sub(x, b.x))
	y := new(big.Int).Sub(a.x, x)
	y = c.mod(y.Mul(y, slope).Sub(y, a.y))
	return &affine{x, y}
}

// bytes is the uncompressed form of SEC 1, section 2.3.3.
func (a *affine) bytes() []byte {
	out := make([]byte, 1+2*scalar)
	out[0] = 4
	a.x.FillBytes(out[1 : 1+scalar])
	a.y.FillBytes(out[1+scalar:])
	return out
}

// parsePoint reads what bytes writes.
func parsePoint(b []byte) *affine {
	return &affine{new(big.Int).SetBytes(b[1 : 1+scalar]), new(big.Int).SetBytes(b[1+scalar:])}
}
