package guest

import (
	"strings"
	"testing"
)

func TestPodDigest(t *testing.T) {
	digest := "sha256:" + strings.Repeat("a", 64)
	for _, tt := range []struct {
		name, in, want string
		bad            bool
	}{
		{"none", "console=hvc0 quiet\n", "", false},
		{"one", "quiet cradle.pod=" + digest + " panic=-1\n", digest, false},
		{"two", "cradle.pod=" + digest + " cradle.pod=" + digest, "", true},
		{"empty", "cradle.pod= quiet", "", true},
		{"other", "xcradle.pod=" + digest, "", false},
	} {
		if got, err := podDigest(tt.in); got != tt.want || (err != nil) != tt.bad {
			t.Errorf("%s: got %q, %v", tt.name, got, err)
		}
	}
}
