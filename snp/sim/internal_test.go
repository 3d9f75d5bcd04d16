package sim

import (
	"errors"
	"syscall"
	"testing"
)

// TestGenerationUsedUp winds the counter on, which no guest has the time for.
func TestGenerationUsedUp(t *testing.T) {
	tree := &Tree{Attest: func(data [64]byte, _ uint32) ([]byte, error) { return data[:1], nil }}
	dir := Reports + "/a"
	for _, err := range []error{
		tree.Mkdir(dir, 0),
		tree.WriteFile(dir+"/inblob", make([]byte, 64), 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tree.ReadFile(dir + "/outblob"); err != nil {
		t.Fatal(err)
	}
	tree.entries["a"].written = 0 // round to the generation before the report's
	if err := tree.WriteFile(dir+"/privlevel", []byte("1"), 0); !errors.Is(err, syscall.EBUSY) {
		t.Errorf("got %v, want EBUSY", err)
	}
	full := make([]byte, 64)
	full[0] = 9
	if err := tree.WriteFile(dir+"/inblob", full, 0); err != nil { // the kernel swallows it
		t.Errorf("got %v", err)
	}
	if tree.entries["a"].written != 0 || tree.entries["a"].inblob[0] != 0 {
		t.Error("a write counted that the kernel refuses")
	}
}
