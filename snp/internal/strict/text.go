package strict

import (
	"encoding/hex"
	"fmt"
)

// Hex fills b with text of exactly as many lower case hexadecimal digits as it takes.
func Hex(b, text []byte) error {
	if len(text) != hex.EncodedLen(len(b)) {
		return fmt.Errorf("%d characters, want %d hexadecimal digits", len(text), hex.EncodedLen(len(b)))
	}
	for i, c := range text {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return fmt.Errorf("%q after %d characters, want lower case hexadecimal digits", c, i)
		}
	}
	_, err := hex.Decode(b, text)
	return err
}

// Bytes is any number of bytes, written as lower case hexadecimal digits.
type Bytes []byte

// MarshalText writes the digits.
func (b Bytes) MarshalText() ([]byte, error) { return hex.AppendEncode(nil, b), nil }

// UnmarshalText reads what MarshalText writes.
func (b *Bytes) UnmarshalText(text []byte) error {
	read := make([]byte, len(text)/2)
	if len(text)%2 != 0 {
		return fmt.Errorf("%d hexadecimal digits are no whole bytes", len(text))
	}
	if err := Hex(read, text); err != nil {
		return err
	}
	*b = read
	return nil
}
