package image

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"
)

// Good credentials are told from bad ones, and a registry without TLS is asked only if it was named so.
func TestLogin(t *testing.T) {
	host, _ := pushRegistry(t, func(w http.ResponseWriter, r *http.Request) bool {
		if user, password, _ := r.BasicAuth(); user == "me" && password == "secret" {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="here"`)
		w.WriteHeader(http.StatusUnauthorized)
		return true
	})
	good := Credentials{Username: "me", Password: "secret"}
	for _, server := range []string{host, "http://" + host + "/v1/"} {
		if err := Login(t.Context(), server, good, []string{host}); err != nil {
			t.Errorf("%s: %v", server, err)
		}
	}
	for _, c := range []Credentials{{}, {Username: "me", Password: "wrong"}} {
		if err := Login(t.Context(), host, c, []string{host}); !errors.Is(err, ErrUnauthorized) {
			t.Errorf("%+v: got %v, want %v", c, err, ErrUnauthorized)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := Login(ctx, host, good, nil); err == nil || !strings.Contains(err.Error(), "--plain-http") {
		t.Errorf("without TLS, and not named: got %v", err)
	}
}
