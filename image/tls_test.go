package image

import (
	"bytes"
	"encoding/pem"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	ggcr "github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// TestPullTLS pulls over TLS, and refuses to be sent from there to plain HTTP.
func TestPullTLS(t *testing.T) {
	inner := ggcr.New(ggcr.Logger(slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)))
	plain := httptest.NewServer(inner)
	defer plain.Close()
	tls := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.URL.Path, "/v2/away/blobs/") && r.Method == http.MethodGet {
			http.Redirect(w, r, plain.URL+r.URL.Path, http.StatusTemporaryRedirect)
			return
		}
		inner.ServeHTTP(w, r)
	}))
	defer tls.Close()
	ca := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(ca, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: tls.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	img := makeImage(t, makeLayer(t, makeTar(t, map[string][]byte{"a": noise(1000)}), "gzip"))
	host := strings.TrimPrefix(tls.URL, "https://")
	for _, repo := range []string{"here", "away"} {
		tag, err := name.NewTag(host + "/" + repo + ":latest")
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(tag, img, remote.WithTransport(tls.Client().Transport)); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name, repo, ca string
		words          string // empty: it works
	}{
		{"trusted", "here", ca, ""},
		{"not trusted", "here", "/dev/null", "certificate"},
		{"sent to plain HTTP", "away", ca, "plain HTTP is not allowed"},
	} {
		t.Run(test.name, func(t *testing.T) {
			var out, errs bytes.Buffer
			cmd := exec.Command(os.Args[0]) // the roots are read once in a process
			cmd.Env = append(os.Environ(), pullVariable+"="+t.TempDir()+" docker://"+host+"/"+test.repo, "SSL_CERT_FILE="+test.ca, "SSL_CERT_DIR=/nonexistent")
			cmd.Stdout, cmd.Stderr = &out, &errs
			err := cmd.Run()
			if (err == nil) != (test.words == "") || !strings.Contains(errs.String(), test.words) {
				t.Errorf("got %v, %s", err, errs.String())
			}
		})
	}
}
