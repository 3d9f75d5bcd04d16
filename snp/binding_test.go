package snp

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"strings"
	"testing"
)

// The digest was computed with another program: sha512sum of the parts, each made with sha256sum.
func TestReportData(t *testing.T) {
	good := Binding{Key: []byte("spki"), PodDigest: sha256.Sum256([]byte("{}"))}
	for i := range 32 {
		good.Nonce[i], good.Exporter[i] = byte(i), 0xee
	}
	got, err := good.ReportData()
	if err != nil {
		t.Fatal(err)
	}
	const want = "a7f3effb3be0cde2c1832d3a48d6533ec737eda7f3a67fc5f8659c4650d9ae9b49c5de18dc0c57d466f980ec559d4a754015afa0ffa85952c5098b016b157a20"
	if hex.EncodeToString(got[:]) != want {
		t.Errorf("got %x, want %s", got, want)
	}
	for _, tt := range []struct {
		missing string
		without func(*Binding)
		other   func(*Binding)
	}{
		{"nonce", func(b *Binding) { b.Nonce = [32]byte{} }, func(b *Binding) { b.Nonce[31]++ }},
		{"key", func(b *Binding) { b.Key = nil }, func(b *Binding) { b.Key = []byte("spk") }},
		{"exporter", func(b *Binding) { b.Exporter = [32]byte{} }, func(b *Binding) { b.Exporter[0]++ }},
		{"pod digest", func(b *Binding) { b.PodDigest = [32]byte{} }, func(b *Binding) { b.PodDigest[0]++ }},
	} {
		b := good
		tt.without(&b)
		if data, err := b.ReportData(); err == nil || !strings.HasSuffix(err.Error(), "no "+tt.missing) || data != [64]byte{} {
			t.Errorf("without %s: got %x, %v", tt.missing, data, err)
		}
		b = good
		tt.other(&b)
		if data, err := b.ReportData(); err != nil || data == got {
			t.Errorf("another %s: got %x, %v", tt.missing, data, err)
		}
	}
}

func TestLineText(t *testing.T) {
	b, err := json.Marshal(map[Line]Line{LineMilan: LineGenoa, LineTurin: LineTurin})
	if err != nil || string(b) != `{"Milan":"Genoa","Turin":"Turin"}` {
		t.Errorf("got %s, %v", b, err)
	}
	var back map[Line]Line
	if err := json.Unmarshal(b, &back); err != nil || back[LineMilan] != LineGenoa || len(back) != 2 {
		t.Errorf("got %v, %v", back, err)
	}
	if _, err := json.Marshal(LineUnknown); err == nil {
		t.Error("a line that is none has a name")
	}
	l := LineMilan
	if err := l.UnmarshalText([]byte("Bergamo")); err == nil || l != LineMilan {
		t.Errorf("got %v, %v", l, err)
	}
}
