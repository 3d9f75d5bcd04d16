package guid

import (
	"encoding/hex"
	"testing"
)

// The bytes are those of the hash table that QEMU writes and edk2 reads.
func TestGUID(t *testing.T) {
	g := Of(0x9438d606, 0x4f22, 0x4cc9, 0xb479_a793d411fd21)
	if got, want := hex.EncodeToString(g[:]), "06d63894224fc94cb479a793d411fd21"; got != want {
		t.Errorf("got bytes %s, want %s", got, want)
	}
	if got, want := g.String(), "9438d606-4f22-4cc9-b479-a793d411fd21"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got, want := Of(1, 2, 3, 4).String(), "00000001-0002-0003-0000-000000000004"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
