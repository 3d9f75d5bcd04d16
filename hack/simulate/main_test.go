package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRun makes a pod, verifies it twice, and changes each of its files.
func TestRun(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pod")
	decide := func() (bool, string) {
		t.Helper()
		var b strings.Builder
		passed, err := run(t.Context(), dir, &b)
		if err != nil {
			t.Fatal(err)
		}
		return passed, b.String()
	}
	for range 2 {
		if passed, text := decide(); !passed || !strings.Contains(text, "\nVERIFIED image registry.example/app:1@sha256:1111") {
			t.Errorf("got\n%s", text)
		}
	}
	for _, tt := range []struct{ name, old, new, want string }{
		{"pod.json", `"/app"`, `"/evil"`, "NOT VERIFIED: report-data, pod"},
		{"ref.json", `"vcpus": 2`, `"vcpus": 4`, "NOT VERIFIED: reference"},
		{"policy.json", `"ucode": 200`, `"ucode": 201`, "NOT VERIFIED: tcb-reported, tcb-committed, tcb-launch"},
		{"policy.json", `"version"`, `"versoin"`, "NOT VERIFIED: policy"},
		{"nonce", "", "00", "NOT VERIFIED: report-data"},
		{"root", "", "00", "NOT VERIFIED: root"},
		{"firmware.fd", "ASEV", "BSEV", "WARNING reference"},
		{"evidence.json", `"version": 1`, `"version": 2`, "NOT VERIFIED: evidence"},
	} {
		path := filepath.Join(dir, tt.name)
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		bad := strings.Replace(string(good), tt.old, tt.new, 1)
		if tt.old == "" {
			bad = tt.new + string(good[2:])
			if bad == string(good) {
				bad = "01" + bad[2:]
			}
		}
		if bad == string(good) {
			t.Fatalf("%s: nothing changed", tt.name)
		}
		if err := os.WriteFile(path, []byte(bad), 0o644); err != nil {
			t.Fatal(err)
		}
		passed, text := decide()
		if !strings.Contains(text, "\n"+tt.want) || passed != strings.HasPrefix(tt.want, "WARNING") {
			t.Errorf("%s with %s: got\n%s", tt.name, tt.new, text)
		}
		if err := os.WriteFile(path, good, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "nonce"), []byte("short"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := run(t.Context(), dir, &strings.Builder{}); err == nil {
		t.Error("a short nonce is one")
	}
}
