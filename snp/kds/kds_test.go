package kds

import (
	"fmt"
	"strings"
	"testing"

	"github.com/kcradle/kcradle/snp"
)

func chip(n int) (id [64]byte) {
	for i := range n {
		id[i] = byte(0xa0 + i)
	}
	return id
}

var (
	milan = snp.TCB{Layout: snp.LayoutMilan, Bootloader: 3, SNP: 8, Microcode: 115}
	turin = snp.TCB{Layout: snp.LayoutTurin, FMC: 1, Bootloader: 2, TEE: 3, SNP: 4, Microcode: 71}
)

func TestURL(t *testing.T) {
	tests := []struct {
		o         Object
		url, text string
	}{
		{VCEK(snp.LineMilan, chip(64), milan),
			fmt.Sprintf("https://kdsintf.amd.com/vcek/v1/Milan/%x?blSPL=03&teeSPL=00&snpSPL=08&ucodeSPL=115", chip(64)),
			"VCEK of Milan chip a0a1a2a3a4a5a6a7… at bl 3 tee 0 snp 8 ucode 115"},
		{VCEK(snp.LineGenoa, chip(64), milan),
			fmt.Sprintf("https://kdsintf.amd.com/vcek/v1/Genoa/%x?blSPL=03&teeSPL=00&snpSPL=08&ucodeSPL=115", chip(64)),
			"VCEK of Genoa chip a0a1a2a3a4a5a6a7… at bl 3 tee 0 snp 8 ucode 115"},
		{VCEK(snp.LineTurin, chip(8), turin),
			"https://kdsintf.amd.com/vcek/v1/Turin/a0a1a2a3a4a5a6a7?fmcSPL=01&blSPL=02&teeSPL=03&snpSPL=04&ucodeSPL=71",
			"VCEK of Turin chip a0a1a2a3a4a5a6a7… at fmc 1 bl 2 tee 3 snp 4 ucode 71"},
		{Chain(snp.LineGenoa, snp.SignerVCEK), "https://kdsintf.amd.com/vcek/v1/Genoa/cert_chain", "chain of Genoa for VCEKs"},
		{Chain(snp.LineTurin, snp.SignerVLEK), "https://kdsintf.amd.com/vlek/v1/Turin/cert_chain", "chain of Turin for VLEKs"},
		{CRL(snp.LineMilan, snp.SignerVCEK), "https://kdsintf.amd.com/vcek/v1/Milan/crl", "revocation list of Milan for VCEKs"},
		{CRL(snp.LineMilan, snp.SignerVLEK), "https://kdsintf.amd.com/vlek/v1/Milan/crl", "revocation list of Milan for VLEKs"},
	}
	for _, tt := range tests {
		if err := tt.o.Validate(); err != nil {
			t.Errorf("%s: %v", tt.o, err)
		}
		if got := tt.o.URL(); got != tt.url {
			t.Errorf("got  %s\nwant %s", got, tt.url)
		}
		if got := tt.o.String(); got != tt.text {
			t.Errorf("got  %s\nwant %s", got, tt.text)
		}
		if tt.o.MaxSize() == 0 {
			t.Errorf("%s has no bound", tt.o)
		}
	}
}

func TestValidate(t *testing.T) {
	tests := []struct {
		name string
		o    Object
		err  string
	}{
		{"zero", Object{}, "no product line"},
		{"no kind", Object{Line: snp.LineMilan}, "unknown kind 0"},
		{"no line", VCEK(snp.LineUnknown, chip(64), milan), "no product line"},
		{"no chip", VCEK(snp.LineMilan, [64]byte{}, milan), "no chip"},
		{"long chip", VCEK(snp.LineTurin, chip(9), turin), "8 bytes"},
		{"layout of another line", VCEK(snp.LineTurin, chip(8), milan), "not of Turin"},
		{"no layout", VCEK(snp.LineMilan, chip(64), snp.TCB{}), "not of Milan"},
		{"VCEK of a VLEK", Object{Kind: KindVCEK, Line: snp.LineMilan, Signer: snp.SignerVLEK, ChipID: chip(64), TCB: milan}, "kind VLEK"},
		{"chain of nobody", Chain(snp.LineMilan, snp.SignerNone), "kind none"},
		{"chain of a chip", Object{Kind: KindChain, Line: snp.LineMilan, ChipID: chip(1)}, "of one chip"},
		{"list of a TCB version", Object{Kind: KindCRL, Line: snp.LineMilan, TCB: milan}, "of one chip"},
	}
	for _, tt := range tests {
		if err := tt.o.Validate(); err == nil || !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%s: got %v, want …%s…", tt.name, err, tt.err)
		}
	}
}

func TestForReport(t *testing.T) {
	good := snp.Report{Version: snp.Version3, CPU: snp.CPU{Family: 0x1a, Model: 2}, ChipID: chip(8), ReportedTCB: turin}
	if got, err := ForReport(&good); err != nil || got != VCEK(snp.LineTurin, chip(8), turin) {
		t.Errorf("got %v, %v", got, err)
	}
	for want, change := range map[string]func(*snp.Report){
		"not published":       func(r *snp.Report) { r.KeyInfo = snp.NewKeyInfo(false, false, snp.SignerVLEK) },
		"version 2":           func(r *snp.Report) { r.Version = snp.Version2 },
		"masks its chip id":   func(r *snp.Report) { r.ChipID = [64]byte{} },
		"has an id of 8 byte": func(r *snp.Report) { r.ChipID = chip(64) },
	} {
		r := good
		change(&r)
		if _, err := ForReport(&r); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want …%s…", err, want)
		}
	}
}
