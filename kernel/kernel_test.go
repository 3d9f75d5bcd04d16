package kernel

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
)

func TestCommandLine(t *testing.T) {
	digest := "sha256:" + strings.Repeat("0a", 32)
	const rest = " noreplace-smp no_timer_check initcall_blacklist=jent_mod_init fb_tunnels=none dummy.numdummies=0 ifb.numifbs=0"
	for _, tc := range []struct {
		name string
		in   Params
		want string
	}{
		{"plain", Params{}, "console=hvc0 quiet panic=-1 reboot=t" + rest},
		{"verbose", Params{Verbose: true}, "console=hvc0 panic=-1 reboot=t" + rest},
		{"attested", Params{PodDigest: digest}, "console=hvc0 quiet panic=-1 reboot=t" + rest + " cradle.pod=" + digest},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := CommandLine(tc.in)
			if err != nil || got != tc.want {
				t.Errorf("got %q, %v, want %q", got, err, tc.want)
			}
		})
	}
	for _, bad := range []string{"sha256:", digest + "0", strings.ToUpper(digest), "sha512:" + strings.Repeat("0a", 32),
		"sha256:" + strings.Repeat(" a", 32), strings.Repeat("0a", 32)} {
		if got, err := CommandLine(Params{PodDigest: bad}); err == nil {
			t.Errorf("pod digest %q was accepted: %q", bad, got)
		}
	}
}

func TestEmulated(t *testing.T) {
	for _, tc := range []struct {
		name string
		in   Emulation
		want string
	}{
		{"one processor", Emulation{CPUs: 1, TSCKHz: 2596120}, "tsc_early_khz=2596120 tsc=reliable mitigations=off GODEBUG=cpu.sse42=off nolapic_timer"},
		{"several", Emulation{CPUs: 2, TSCKHz: 2596120}, "tsc_early_khz=2596120 tsc=reliable lpj=10384480 mitigations=off GODEBUG=cpu.sse42=off"},
		{"no constant counter", Emulation{CPUs: 1}, "mitigations=off GODEBUG=cpu.sse42=off nolapic_timer"},
		{"neither", Emulation{CPUs: 4}, "mitigations=off GODEBUG=cpu.sse42=off"},
	} {
		if got := Emulated(tc.in); got != tc.want {
			t.Errorf("%s: got %q, want %q", tc.name, got, tc.want)
		}
	}
}

func TestTokensHaveReasons(t *testing.T) {
	seen := map[string]bool{}
	check := func(text, reason string) {
		if len(reason) < 20 {
			t.Errorf("%s: the reason %q is none", text, reason)
		}
		if seen[text] || strings.ContainsAny(text, " \t\n\"") {
			t.Errorf("%q is there twice, or is not one word", text)
		}
		seen[text] = true
	}
	for _, tok := range tokens {
		check(tok.text, tok.reason)
	}
	for _, tok := range emulated {
		check(tok.text, tok.reason)
	}
}

func TestOptionsRefuse(t *testing.T) {
	for _, tc := range []struct{ name, text, want string }{
		{"no reason", "CONFIG_A=y\n", "reason"},
		{"empty reason", "CONFIG_A=y #  \n", "reason"},
		{"module", "CONFIG_A=m # modular\n", "reason"},
		{"other text", "# fine\nhello\n", ":2:"},
		{"twice", "CONFIG_A=y # one\nCONFIG_A=n # two\n", "already in"},
		{"nothing", "# nothing\n", "no fragments"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := Options(fstest.MapFS{"config/a.config": {Data: []byte(tc.text)}})
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want … %s …", err, tc.want)
			}
		})
	}
}

// TestArtifact: the artefact in the tree was built from the configuration in the tree, and its final configuration
// holds every option as asked.
func TestArtifact(t *testing.T) {
	tree := os.DirFS(".")
	p, err := ReadProvenance(tree)
	if err != nil {
		t.Fatal(err)
	}
	inputs, err := InputsDigest(tree)
	if err != nil {
		t.Fatal(err)
	}
	if p.Inputs != inputs {
		t.Errorf("the artefact was built from inputs %s, VERSION and config/ are now %s: run make kernel and commit its result", p.Inputs, inputs)
	}
	digest, err := Digest(tree)
	if err != nil || digest != p.Vmlinux {
		t.Errorf("%s says %s, the provenance %s (%v)", DigestFile, digest, p.Vmlinux, err)
	}
	config, err := fs.ReadFile(tree, ConfigFile)
	if err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprintf("%x", sha256.Sum256(config)); got != p.Config {
		t.Errorf("%s has sha256 %s, the provenance says %s", ConfigFile, got, p.Config)
	}
	if want := fmt.Sprintf("\nCONFIG_HZ=%d\n", hz); !strings.Contains(string(config), want) {
		t.Errorf("%s has no line %q, but the command line is computed with it", ConfigFile, strings.TrimSpace(want))
	}
	set := map[string]string{}
	for line := range strings.Lines(string(config)) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			set[name] = value
		}
	}
	options, err := Options(tree)
	if err != nil {
		t.Fatal(err)
	}
	for _, o := range options {
		got := set[o.Name]
		if got == "" {
			got = "n"
		}
		if got != o.Value {
			t.Errorf("%s asks for %s=%s, the kernel has %s", o.File, o.Name, o.Value, got)
		}
	}
	version, err := fs.ReadFile(tree, "VERSION")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"package=" + p.Package, "version=" + p.Release, "tarball_sha256=" + p.TarballSHA} {
		if !strings.Contains(string(version), line+"\n") {
			t.Errorf("VERSION lacks %q of the provenance", line)
		}
	}
	dst := filepath.Join(t.TempDir(), "vmlinux")
	if err := Unpack(t.Context(), tree, dst); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(dst)
	if err != nil || info.Size() != p.VmlinuxBytes {
		t.Errorf("unpacked %v bytes (%v), the provenance says %d", info.Size(), err, p.VmlinuxBytes)
	}
}

func TestUnpackRefuses(t *testing.T) {
	good := []byte("a kernel")
	enc, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	packed := enc.EncodeAll(good, nil)
	sum := sha256.Sum256(good)
	line := hex.EncodeToString(sum[:]) + "  vmlinux\n"
	tree := func(artifact []byte, digest string) fs.FS {
		return fstest.MapFS{ArtifactFile: {Data: artifact}, DigestFile: {Data: []byte(digest)}}
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		name string
		ctx  context.Context
		tree fs.FS
		want string
	}{
		{"good", t.Context(), tree(packed, line), ""},
		{"other contents", t.Context(), tree(enc.EncodeAll([]byte("a kernfl"), nil), line), "digest differs"},
		{"truncated", t.Context(), tree(packed[:len(packed)-5], line), "unexpected EOF"},
		{"not zstd", t.Context(), tree([]byte("junk, junk, junk"), line), "magic number mismatch"},
		{"bomb", t.Context(), tree(enc.EncodeAll(make([]byte, maxSize+1), nil), line), "more than"},
		{"no digest", t.Context(), tree(packed, ""), "not a line of sha256sum"},
		{"digest of another file", t.Context(), tree(packed, strings.Replace(line, "vmlinux", "bzImage", 1)), "not a line of sha256sum"},
		{"no artefact", t.Context(), fstest.MapFS{DigestFile: {Data: []byte(line)}}, "does not exist"},
		{"cancelled", cancelled, tree(packed, line), "canceled"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			err := Unpack(tc.ctx, tc.tree, filepath.Join(dir, "vmlinux"))
			left, rerr := os.ReadDir(dir)
			if rerr != nil {
				t.Fatal(rerr)
			}
			if tc.want == "" {
				if err != nil || len(left) != 1 {
					t.Errorf("got %v and %d files, want none and 1", err, len(left))
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want … %s …", err, tc.want)
			}
			if len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
	if err := Unpack(t.Context(), tree(packed, line), "/nonexistent/dir/vmlinux"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: got %v, want not exist", err)
	}
}

func TestReadProvenanceRefuses(t *testing.T) {
	for _, bad := range []string{"", "{", `{"version":2}`, `{"version":1,"unknown":1}`} {
		if _, err := ReadProvenance(fstest.MapFS{ProvenanceFile: {Data: []byte(bad)}}); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

// TestInputsDigest: comments do not count, options and the pinned source do.
func TestInputsDigest(t *testing.T) {
	digest := func(version, options string) string {
		d, err := InputsDigest(fstest.MapFS{"VERSION": {Data: []byte(version)}, "config/a.config": {Data: []byte(options)}})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	base := digest("version=1\n", "CONFIG_A=y # why\nCONFIG_B=n # why\n")
	got := []bool{
		base == digest("# other\nversion=1\n", "# text\nCONFIG_B=n # another why\nCONFIG_A=y # why\n"),
		base == digest("version=2\n", "CONFIG_A=y # why\nCONFIG_B=n # why\n"),
		base == digest("version=1\n", "CONFIG_A=y # why\nCONFIG_B=y # why\n"),
	}
	if d := cmp.Diff([]bool{true, false, false}, got); d != "" {
		t.Errorf("(-want +got):\n%s", d)
	}
}

// TestCheckScripts: what the check scripts of docker (contrib/check-config.sh) and k3s (k3s check-config) call
// required, and what they call optional and this kernel promises, is built in.
func TestCheckScripts(t *testing.T) {
	config, err := os.ReadFile(ConfigFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, group := range []struct{ name, options string }{
		{"docker, necessary", `NAMESPACES NET_NS PID_NS IPC_NS UTS_NS CGROUPS CGROUP_SCHED KEYS VETH BRIDGE BRIDGE_NETFILTER
			IP_NF_FILTER IP_NF_MANGLE IP_NF_TARGET_MASQUERADE IP6_NF_FILTER IP6_NF_MANGLE IP6_NF_TARGET_MASQUERADE
			NETFILTER_XT_MATCH_ADDRTYPE NETFILTER_XT_MATCH_CONNTRACK NETFILTER_XT_MATCH_IPVS NETFILTER_XT_MARK
			IP_NF_RAW IP_NF_NAT NF_NAT IP6_NF_RAW IP6_NF_NAT POSIX_MQUEUE CGROUP_BPF`},
		{"k3s, necessary", `CGROUP_PIDS CGROUP_CPUACCT CGROUP_DEVICE CGROUP_FREEZER CPUSETS MEMCG SECCOMP IP_NF_TARGET_REJECT
			NETFILTER_XT_MATCH_COMMENT NETFILTER_XT_MATCH_MULTIPORT NETFILTER_XT_MATCH_STATISTIC`},
		{"optional", `USER_NS SECCOMP_FILTER CGROUP_HUGETLB BLK_CGROUP BLK_DEV_THROTTLING CGROUP_PERF CFS_BANDWIDTH
			FAIR_GROUP_SCHED IP_NF_TARGET_REDIRECT IP_SET IP_VS IP_VS_NFCT IP_VS_PROTO_TCP IP_VS_PROTO_UDP IP_VS_RR
			EXT4_USE_FOR_EXT2 EXT4_FS EXT4_FS_POSIX_ACL EXT4_FS_SECURITY OVERLAY_FS`},
		{"network drivers", `VXLAN BRIDGE_VLAN_FILTERING CRYPTO CRYPTO_AEAD CRYPTO_GCM CRYPTO_SEQIV CRYPTO_GHASH XFRM XFRM_USER
			XFRM_ALGO INET_ESP NETFILTER_XT_MATCH_BPF IPVLAN MACVLAN DUMMY`},
	} {
		for _, o := range strings.Fields(group.options) {
			if !strings.Contains("\n"+string(config), "\nCONFIG_"+o+"=y\n") {
				t.Errorf("%s: CONFIG_%s is not built in", group.name, o)
			}
		}
	}
}
