package images

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// host is what images take from the machine that builds them.
type host struct {
	codename string // of its Debian, "bookworm"
	busybox  string // digest of busyboxPath
}

const busyboxPath = "/bin/busybox"

func readHost(_ context.Context) (*host, error) {
	release, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return nil, err
	}
	h := &host{}
	for line := range strings.Lines(string(release)) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			h.codename = strings.Trim(v, `"`)
		}
	}
	if h.codename == "" {
		return nil, errors.New("read /etc/os-release: no VERSION_CODENAME, so no Debian to take packages from")
	}
	b, err := os.ReadFile(busyboxPath)
	if err != nil {
		return nil, fmt.Errorf("%w (apt-get install busybox-static)", err)
	}
	sum := sha256.Sum256(b)
	h.busybox = hex.EncodeToString(sum[:])
	return h, nil
}

// mirror returns where the machine's own apt takes the packages of its Debian from.
func (h *host) mirror(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets",
		"--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", "Created-By: Packages").Output()
	if err != nil {
		return "", fmt.Errorf("list apt's sources: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] == h.codename && f[1] == "main" {
			return strings.TrimSuffix(f[2], "/"), nil
		}
	}
	return "", fmt.Errorf("list apt's sources: none has component main of %s (apt-get update)", h.codename)
}

// environment is what builders see of ours: proxies, and nothing that varies.
func environment() []string {
	env := []string{pathEnv, "HOME=/root", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"}
	for _, kv := range os.Environ() {
		k, _, _ := strings.Cut(kv, "=")
		if strings.HasSuffix(strings.ToLower(k), "_proxy") {
			env = append(env, kv)
		}
	}
	return env
}

// run runs a builder at low priority; its output is shown when it fails.
func (c *Cache) run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, "nice", append([]string{"-n", "10", name}, args...)...)
	cmd.Env = environment()
	cmd.Dir = dir
	// The builder gets a group of its own, so that cancelling reaches what it started.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = 10 * time.Second
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		tail := out.Bytes()
		if n := len(tail) - 8<<10; n > 0 {
			tail = tail[n:]
		}
		_, _ = c.log.Write(tail)
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

// baseRoot makes a minimal Debian in dir.
func (c *Cache) baseRoot(ctx context.Context, h *host, dir string) error {
	mirror, err := h.mirror(ctx)
	if err != nil {
		return err
	}
	if err := c.run(ctx, "/", "debootstrap", "--variant=minbase", h.codename, dir, mirror); err != nil {
		return fmt.Errorf("%w (apt-get install debootstrap)", err)
	}
	// What a container image must not carry: devices, caches, logs, identity, the name of a mirror, and the manuals,
	// which the slim images of Debian leave out, too. Services must not start in a root that is being built.
	return c.run(ctx, dir, "sh", "-euc", `
		rm -rf dev/* var/cache/apt/archives/*.deb var/cache/apt/*.bin var/lib/apt/lists/* var/log/* var/cache/debconf/*-old
		rm -rf usr/share/doc/* usr/share/man/* usr/share/info/* usr/share/locale/*
		rm -f etc/hostname etc/machine-id; : >etc/resolv.conf; : >etc/hosts; : >etc/apt/sources.list
		printf '#!/bin/sh\nexit 101\n' >usr/sbin/policy-rc.d; chmod 755 usr/sbin/policy-rc.d
		printf 'path-exclude /usr/share/doc/*\npath-exclude /usr/share/man/*\npath-exclude /usr/share/info/*\npath-exclude /usr/share/locale/*\n' >etc/dpkg/dpkg.cfg.d/slim
	`)
}

// inRoot runs in a mount and PID namespace of its own: what it mounts and starts ends with it. The machine's apt
// configuration, keyrings and name resolution are laid over the root's, so the image itself holds none of them.
const inRoot = `
root=$1 cache=$2 packages=$3 script=$4
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mkdir -p "$cache/debs/partial" "$cache/lists/partial"
apt=$(mktemp -d)
mount -t tmpfs -o mode=0755 tmpfs "$apt"
cp -aL /etc/apt/. "$apt/"
rm -f "$apt"/apt.conf.d/docker-clean "$apt"/apt.conf.d/*autoremove*
mount --bind "$apt" "$root/etc/apt"
mount --bind "$cache/debs" "$root/var/cache/apt/archives"
mount --bind "$cache/lists" "$root/var/lib/apt/lists"
mount --bind -o ro /usr/share/keyrings "$root/usr/share/keyrings"
mount --bind -o ro /etc/resolv.conf "$root/etc/resolv.conf"
mount --bind -o ro /etc/hosts "$root/etc/hosts"
for d in /etc/ssl/certs /usr/share/ca-certificates /usr/local/share/ca-certificates; do
	if grep -rqs https: /etc/apt && [ -d "$d" ]; then mkdir -p "$root$d"; mount --bind -o ro "$d" "$root$d"; fi
done
if [ -n "$packages" ]; then
	chroot "$root" apt-get -q update
	chroot "$root" apt-get -q install -y --no-install-recommends $packages
fi
chroot "$root" /bin/sh -euc "$script"
rm -f "$root"/var/cache/apt/*.bin "$root"/var/log/*.log "$root"/var/log/apt/* "$root"/var/cache/debconf/*-old
`

// install installs the recipe's packages in root and runs its script there.
func (c *Cache) install(ctx context.Context, r *recipe, root string) error {
	tmp, err := os.MkdirTemp(c.dir, ".apt-") // where inRoot's mktemp puts its directory
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	return c.run(ctx, "/", "env", "TMPDIR="+tmp,
		"unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private",
		"sh", "-euc", inRoot, "sh", root, c.dir, strings.Join(r.packages, " "), r.script)
}

// root returns the tree of r's image, which must not be changed, when it is one made by debootstrap.
func (c *Cache) root(ctx context.Context, r *recipe, h *host) (string, error) {
	key, err := r.key(h)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(c.dir, "roots", r.name+"-"+key[:16])
	if exists(dir) {
		return dir, nil
	}
	return dir, atomically(dir, func(tmp string) error { return c.baseRoot(ctx, h, tmp) })
}

// packageLayer installs r's packages in a copy of its parent's root and writes what differs to w as a layer.
func (c *Cache) packageLayer(ctx context.Context, r *recipe, h *host, w io.Writer) (err error) {
	p, err := find(r.parent)
	if err != nil {
		return err
	}
	if !p.base {
		return fmt.Errorf("packages on top of %s, which is no Debian root", p.name)
	}
	old, err := c.root(ctx, p, h)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp(c.dir, ".root-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	root := filepath.Join(work, "root")
	if err := c.run(ctx, "/", "cp", "-a", "--reflink=auto", old, root); err != nil {
		return err
	}
	if err := c.install(ctx, r, root); err != nil {
		return err
	}
	return writeDifference(w, root, old)
}
