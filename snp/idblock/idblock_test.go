package idblock

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha512"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"math/big"
	"reflect"
	"strings"
	"testing"
)

// launch is the digest of a launch with Debian's ovmf-amdsev 2026.08 and one vCPU of EPYC-v4.
func launch(t testing.TB) Block {
	t.Helper()
	b := Block{Policy: 0x30000}
	if _, err := hex.Decode(b.LaunchDigest[:], []byte("d74bd3ea40b240c3228edc5177ce6193561ebff633dbd0be76d6c143b876d65102425c0e2e8a930857c48daa5eacda58")); err != nil {
		t.Fatal(err)
	}
	return b
}

// The bytes are those of tests/test_id_block.py of virtee/sev-snp-measure.
func TestBlock(t *testing.T) {
	const want = "B28FLQi9p6cAqipgjFyqawDrrSl7bWioWkWx5mmlWLZ+G5HShKMB/mPE+gdQRn7tAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABAAAAAAAAAAAAAwAAAAAA"
	var b Block
	if _, err := base64.StdEncoding.Decode(b.LaunchDigest[:], []byte(want)[:64]); err != nil {
		t.Fatal(err)
	}
	b.Policy = 196608
	raw := b.Bytes()
	if got := base64.StdEncoding.EncodeToString(raw[:]); got != want {
		t.Errorf("got %s, want %s", got, want)
	}

	b.FamilyID, b.ImageID, b.GuestSVN = [16]byte{0xfa}, [16]byte{15: 0x1d}, 0x01020304
	raw = b.Bytes()
	if raw[0x30] != 0xfa || raw[0x4f] != 0x1d || !bytes.Equal(raw[0x50:], []byte{1, 0, 0, 0, 4, 3, 2, 1, 0, 0, 3, 0, 0, 0, 0, 0}) {
		t.Errorf("got %x", raw[0x30:])
	}
	back, err := ParseBlock(raw[:])
	if err != nil {
		t.Fatal(err)
	}
	if back != b {
		t.Errorf("got %+v, want %+v", back, b)
	}
	if _, err := ParseBlock(raw[1:]); err == nil || !strings.Contains(err.Error(), "ID block of 95 bytes") {
		t.Errorf("got %v", err)
	}
	raw[0x50] = 2
	if _, err := ParseBlock(raw[:]); err == nil || !strings.Contains(err.Error(), "version 2: this code knows 1") {
		t.Errorf("got %v", err)
	}
}

func TestAnonymous(t *testing.T) {
	b := launch(t)
	a, err := Anonymous(b)
	if err != nil {
		t.Fatal(err)
	}
	digest := a.IDKey.Digest()
	if got, want := hex.EncodeToString(digest[:]), "1088366d03bea96a2f94ba63b9f6fe4f0598a21bcac21512d109c5e872f831795b49181816aa462621a3f74275c01305"; got != want {
		t.Errorf("got ID key digest %s, want %s", got, want)
	}
	// Only the standard library, from the bytes.
	raw, block := a.Bytes(), b.Bytes()
	sum := sha512.Sum384(block[:])
	key, err := PublicKey(raw[0x240:0x644]).Key()
	if err != nil {
		t.Fatal(err)
	}
	if !ecdsa.Verify(key, sum[:], big.NewInt(2), big.NewInt(1)) {
		t.Error("the signature does not verify")
	}
	if raw[0x40] != 2 || raw[0x40+72] != 1 || !isZero(raw[0x41:0x40+72]) || !isZero(raw[0x40+73:0x240]) {
		t.Errorf("got signature %x", raw[0x40:0x240])
	}
	if raw[0] != 1 || !isZero(raw[1:0x40]) || !isZero(raw[0x644:]) {
		t.Error("got something beside the ID key and its signature")
	}
}

// The same block has the same key; a block that differs in anything has another, and no signature fits another block.
func TestAnonymousKeys(t *testing.T) {
	base := launch(t)
	seen := map[[48]byte]string{}
	for name, change := range map[string]func(*Block){
		"base":   func(*Block) {},
		"digest": func(b *Block) { b.LaunchDigest[47] ^= 1 },
		"family": func(b *Block) { b.FamilyID[0] = 1 },
		"image":  func(b *Block) { b.ImageID[0] = 1 },
		"svn":    func(b *Block) { b.GuestSVN = 1 },
		"policy": func(b *Block) { b.Policy |= 1 << 19 },
		"zero":   func(b *Block) { *b = Block{} },
	} {
		b := base
		change(&b)
		a, err := Anonymous(b)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		again, err := Anonymous(b)
		if err != nil || !reflect.DeepEqual(a, again) {
			t.Errorf("%s: got another key the second time, %v", name, err)
		}
		if o, twice := seen[a.IDKey.Digest()]; twice {
			t.Errorf("%s and %s have the same key", name, o)
		}
		seen[a.IDKey.Digest()] = name
		if err := a.Verify(base); name != "base" && !errors.Is(err, ErrSignature) {
			t.Errorf("%s: got %v for another block, want ErrSignature", name, err)
		}
	}
}

// signed is a block signed by real keys.
func signed(t testing.TB, b Block) Auth {
	t.Helper()
	sign := func(key *ecdsa.PrivateKey, digest [48]byte) Signature {
		r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		return newSignature(r, s)
	}
	generate := func() (*ecdsa.PrivateKey, PublicKey) {
		key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		public, err := NewPublicKey(&key.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		return key, public
	}
	id, idPublic := generate()
	author, authorPublic := generate()
	return Auth{
		BlockSignature: sign(id, b.digest()),
		IDKey:          idPublic,
		Author:         &Author{KeySignature: sign(author, idPublic.Digest()), Key: authorPublic},
	}
}

func TestAuthor(t *testing.T) {
	b := launch(t)
	a := signed(t, b)
	if err := a.Verify(b); err != nil {
		t.Error(err)
	}
	raw := a.Bytes()
	if raw[4] != 1 || !bytes.Equal(raw[0x680:0x880], a.Author.KeySignature[:]) || !bytes.Equal(raw[0x880:0xc84], a.Author.Key[:]) {
		t.Error("the author is not where it belongs")
	}
	back, err := ParseAuth(raw[:])
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(back, a) {
		t.Error("got another ID authentication back")
	}
	other := signed(t, b)
	a.Author.Key = other.Author.Key
	if err := a.Verify(b); !errors.Is(err, ErrSignature) || !strings.Contains(err.Error(), "signature of the ID key") {
		t.Errorf("got %v, want ErrSignature of the ID key", err)
	}
	a.IDKey = other.IDKey
	if err := a.Verify(b); !errors.Is(err, ErrSignature) || !strings.Contains(err.Error(), "signature of the ID block") {
		t.Errorf("got %v, want ErrSignature of the ID block", err)
	}
}

func TestRefuses(t *testing.T) {
	b := launch(t)
	good := signed(t, b).Bytes()
	for _, tt := range []struct {
		name   string
		change func([]byte) []byte
		want   string
	}{
		{"short", func(r []byte) []byte { return r[1:] }, "ID authentication of 4095 bytes"},
		{"algorithm", func(r []byte) []byte { r[0] = 2; return r }, "ID key of algorithm 2"},
		{"author's algorithm", func(r []byte) []byte { r[4] = 2; return r }, "author key of algorithm 2"},
		{"author without algorithm", func(r []byte) []byte { r[4] = 0; return r }, "an author's key without its algorithm"},
		{"after the algorithms", func(r []byte) []byte { r[0x3f] = 1; return r }, "want zeros between its fields"},
		{"after the ID key", func(r []byte) []byte { r[0x67f] = 1; return r }, "want zeros between its fields"},
		{"at the end", func(r []byte) []byte { r[0xfff] = 1; return r }, "want zeros between its fields"},
		{"curve", func(r []byte) []byte { r[0x240] = 1; return r }, "key of curve 1"},
		{"X too long", func(r []byte) []byte { r[0x244+48] = 1; return r }, "want zeros after the coordinates"},
		{"after Y", func(r []byte) []byte { r[0x643] = 1; return r }, "want zeros after the coordinates"},
		{"not on the curve", func(r []byte) []byte { r[0x244] ^= 1; return r }, "idblock: key:"},
		{"R too long", func(r []byte) []byte { r[0x40+48] = 1; return r }, "want zeros after R and S"},
		{"after S", func(r []byte) []byte { r[0x23f] = 1; return r }, "want zeros after R and S"},
		{"another R", func(r []byte) []byte { r[0x40] ^= 1; return r }, ErrSignature.Error()},
		{"another S", func(r []byte) []byte { r[0x40+72] ^= 1; return r }, ErrSignature.Error()},
		{"R and S zero", func(r []byte) []byte { clear(r[0x40:0x240]); return r }, ErrSignature.Error()},
		{"the author's R", func(r []byte) []byte { r[0x680] ^= 1; return r }, "signature of the ID key: " + ErrSignature.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a, err := ParseAuth(tt.change(bytes.Clone(good[:])))
			if err == nil {
				err = a.Verify(b)
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want %q", err, tt.want)
			}
		})
	}
	wrong, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []*ecdsa.PublicKey{nil, {}, {Curve: elliptic.P384()}, &wrong.PublicKey} {
		if _, err := NewPublicKey(key); err == nil {
			t.Errorf("got no error for %v", key)
		}
	}
}

// The arithmetic against the standard library's: a·G + b·G is (a+b)·G.
func TestCurve(t *testing.T) {
	params := elliptic.P384().Params()
	c := curve{p: params.P, b: params.B}
	g := &affine{params.Gx, params.Gy}
	times := func(k *big.Int) *affine {
		t.Helper()
		if k = new(big.Int).Mod(k, params.N); k.Sign() == 0 {
			return nil
		}
		key, err := newScalar(k)
		if err != nil {
			t.Fatal(err)
		}
		return parsePoint(key.PublicKey().Bytes())
	}
	for range 8 {
		a, err := rand.Int(rand.Reader, params.N)
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range []*big.Int{big.NewInt(0), big.NewInt(1), big.NewInt(7), a, new(big.Int).Neg(a), new(big.Int).Lsh(a, 3)} {
			if got, want := c.add(times(a), times(b)), times(new(big.Int).Add(a, b)); !reflect.DeepEqual(got, want) {
				t.Errorf("%v·G + %v·G: got %v, want %v", a, b, got, want)
			}
		}
		point := times(a)
		lifted, ok := c.lift(point.x)
		if !ok || lifted.y.Cmp(point.y) != 0 && c.negate(lifted).y.Cmp(point.y) != 0 {
			t.Errorf("lifted %v: got %v", point.x, lifted)
		}
		if !reflect.DeepEqual(parsePoint(point.bytes()), point) {
			t.Errorf("got %x of %v", point.bytes(), point)
		}
	}
	if got := times(big.NewInt(1)); !reflect.DeepEqual(got, g) {
		t.Errorf("1·G: got %v", got)
	}
	if c.negate(nil) != nil || c.add(nil, g) != g || c.add(g, nil) != g || c.add(nil, nil) != nil {
		t.Error("infinity is not neutral")
	}
	for _, k := range []*big.Int{big.NewInt(0), params.N} {
		if _, err := newScalar(k); err == nil {
			t.Errorf("%v is a scalar", k)
		}
	}
}

// A key that is recovered verifies any signature, not only the fixed one.
func TestRecoverKey(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	for _, message := range []string{"", "a", "b"} {
		digest := sha512.Sum384([]byte(message))
		r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
		if err != nil {
			t.Fatal(err)
		}
		got, err := recoverKey(digest[:], r, s)
		if err != nil {
			t.Fatal(err)
		}
		if !ecdsa.Verify(got, digest[:], r, s) {
			t.Errorf("%q: the key does not verify", message)
		}
	}
	if key, err := recoverKey(make([]byte, 48), big.NewInt(1), big.NewInt(1)); err == nil {
		t.Errorf("got %v for an R that is no point", key)
	}
}

// What parses is written back to the same bytes.
func FuzzParse(f *testing.F) {
	b := launch(f)
	a, err := Anonymous(b)
	if err != nil {
		f.Fatal(err)
	}
	block, anonymous, author := b.Bytes(), a.Bytes(), signed(f, b).Bytes()
	f.Add(block[:])
	f.Add(anonymous[:])
	f.Add(author[:])
	f.Fuzz(func(t *testing.T, in []byte) {
		if b, err := ParseBlock(in); err == nil {
			if out := b.Bytes(); !bytes.Equal(out[:], in) {
				t.Errorf("got %x, want %x", out, in)
			}
		}
		if a, err := ParseAuth(in); err == nil {
			if out := a.Bytes(); !bytes.Equal(out[:], in) {
				t.Errorf("got %x, want %x", out, in)
			}
			_ = a.Verify(Block{}) // for any bytes an error at most
		}
	})
}

func BenchmarkAnonymous(b *testing.B) {
	block := launch(b)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := Anonymous(block); err != nil {
			b.Fatal(err)
		}
	}
}
