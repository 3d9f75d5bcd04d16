package snp

import (
	"encoding/hex"
	"encoding/json"
	"fmt"
)

// MarshalJSON returns the report as an object, for programs that cannot read its bytes: digests, identities and sets of
// bits as lower case hex, bits also by their names in 56860, TCB versions as their parts. What a version of the report does
// not say is left out, and so is the signature. The names are stable. There is no way back: the report is its bytes.
func (r Report) MarshalJSON() ([]byte, error) {
	hexed := hex.EncodeToString
	out := reportJSON{
		Version:           r.Version,
		GuestSVN:          r.GuestSVN,
		GuestPolicy:       newBitsJSON(uint64(r.Policy), policyNames, r.Policy.Unknown()),
		GuestABI:          fmt.Sprintf("%d.%d", r.Policy.ABIMajor(), r.Policy.ABIMinor()),
		FamilyID:          hexed(r.FamilyID[:]),
		ImageID:           hexed(r.ImageID[:]),
		Signer:            r.KeyInfo.Signer().String(),
		AuthorKey:         r.KeyInfo.AuthorKey(),
		MaskChipKey:       r.KeyInfo.MaskChipKey(),
		CurrentTCB:        r.CurrentTCB,
		Platform:          newBitsJSON(uint64(r.PlatformInfo), platformNames, r.PlatformInfo.Unknown()),
		ReportData:        hexed(r.ReportData[:]),
		Measurement:       hexed(r.Measurement[:]),
		HostData:          hexed(r.HostData[:]),
		IDKeyDigest:       hexed(r.IDKeyDigest[:]),
		AuthorKeyDigest:   hexed(r.AuthorKeyDigest[:]),
		ReportID:          hexed(r.ReportID[:]),
		ReportIDMA:        hexed(r.ReportIDMA[:]),
		ReportedTCB:       r.ReportedTCB,
		ChipID:            hexed(r.ChipID[:]),
		CommittedTCB:      r.CommittedTCB,
		CurrentFirmware:   r.Current.String(),
		CommittedFirmware: r.Committed.String(),
		LaunchTCB:         r.LaunchTCB,
	}
	if r.VMPL == VMPLHost {
		out.Host = true
	} else {
		out.VMPL = &r.VMPL
	}
	if r.Version >= Version3 {
		out.Product = r.Product().String()
		out.CPU = &cpuJSON{r.CPU.Family, r.CPU.Model, r.CPU.Stepping}
	}
	if r.Version >= Version5 {
		out.LaunchMit, out.CurrentMit = fmt.Sprintf("%#x", r.LaunchMit), fmt.Sprintf("%#x", r.CurrentMit)
	}
	return json.Marshal(out)
}

// reportJSON has the fields in the order of the report's bytes.
type reportJSON struct {
	Version           uint32   `json:"version"`
	GuestSVN          uint32   `json:"guestSVN"`
	GuestPolicy       bitsJSON `json:"guestPolicy"`
	GuestABI          string   `json:"guestABI"`
	FamilyID          string   `json:"familyID"`
	ImageID           string   `json:"imageID"`
	VMPL              *uint32  `json:"vmpl,omitempty"`
	Host              bool     `json:"requestedByHost,omitempty"`
	Signer            string   `json:"signer"`
	AuthorKey         bool     `json:"authorKey"`
	MaskChipKey       bool     `json:"maskChipKey"`
	CurrentTCB        TCB      `json:"currentTCB"`
	Platform          bitsJSON `json:"platform"`
	ReportData        string   `json:"reportData"`
	Measurement       string   `json:"measurement"`
	HostData          string   `json:"hostData"`
	IDKeyDigest       string   `json:"idKeyDigest"`
	AuthorKeyDigest   string   `json:"authorKeyDigest"`
	ReportID          string   `json:"reportID"`
	ReportIDMA        string   `json:"reportIDMA"`
	ReportedTCB       TCB      `json:"reportedTCB"`
	Product           string   `json:"product,omitempty"`
	CPU               *cpuJSON `json:"cpu,omitempty"`
	ChipID            string   `json:"chipID"`
	CommittedTCB      TCB      `json:"committedTCB"`
	CurrentFirmware   string   `json:"currentFirmware"`
	CommittedFirmware string   `json:"committedFirmware"`
	LaunchTCB         TCB      `json:"launchTCB"`
	LaunchMit         string   `json:"launchMitigations,omitempty"`
	CurrentMit        string   `json:"currentMitigations,omitempty"`
}

type bitsJSON struct {
	Value   string   `json:"value"`
	Set     []string `json:"set"`
	Unknown string   `json:"unknown,omitempty"` // bits without a name
}

func newBitsJSON(v uint64, table []name, unknown uint64) bitsJSON {
	out := bitsJSON{Value: fmt.Sprintf("%#x", v), Set: append([]string{}, names(v, table)...)}
	if unknown != 0 {
		out.Unknown = fmt.Sprintf("%#x", unknown)
	}
	return out
}

type cpuJSON struct {
	Family   uint8 `json:"family"`
	Model    uint8 `json:"model"`
	Stepping uint8 `json:"stepping"`
}

// MarshalJSON returns the parts by the names they have in AMD's key distribution service.
func (t TCB) MarshalJSON() ([]byte, error) {
	out := struct {
		FMC        *uint8 `json:"fmc,omitempty"` // Turin only
		Bootloader uint8  `json:"bl"`
		TEE        uint8  `json:"tee"`
		SNP        uint8  `json:"snp"`
		Microcode  uint8  `json:"ucode"`
	}{nil, t.Bootloader, t.TEE, t.SNP, t.Microcode}
	if t.Layout == LayoutTurin {
		out.FMC = &t.FMC
	}
	return json.Marshal(out)
}
