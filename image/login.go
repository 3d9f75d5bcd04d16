package image

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
)

// Login asks a registry (HOST[:PORT], or the address docker login has) whether credentials are good: nil, or an error that is
// ErrUnauthorized if it refuses them. plainHTTP are the registries that may be spoken to without TLS.
func Login(ctx context.Context, server string, c Credentials, plainHTTP []string) error {
	host := strings.TrimPrefix(strings.TrimPrefix(server, "https://"), "http://")
	host, _, _ = strings.Cut(host, "/")
	if host == "" || host == "index.docker.io" || host == "docker.io" {
		host = name.DefaultRegistry
	}
	reg, err := name.NewRegistry(host, name.Insecure)
	if err != nil {
		return fmt.Errorf("log in at %s: %w", clip(server), err)
	}
	r := undialed(reg, slices.Contains(plainHTTP, host))
	if r.auth, err = c.Keychain().Resolve(reg); err == nil {
		err = r.dial(ctx, nil)
	}
	if err == nil {
		// Basic authentication has not been looked at yet.
		var resp *http.Response
		if resp, err = r.askAt(ctx, http.MethodGet, "/v2/", nil); err == nil {
			err = resp.Body.Close()
		}
	}
	if err != nil {
		return fmt.Errorf("log in at %s: %w", host, err)
	}
	return nil
}
