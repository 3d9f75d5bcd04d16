#!/bin/sh
# Build the guest's kernel from Debian's source package: kernel/build.sh OUTDIR
#
# Writes vmlinux.zst, vmlinux.sha256, vmlinux.config and provenance.json to OUTDIR. The same VERSION, options, compiler
# and linker give the same bytes, whatever the directory, the user, the host and the time.
#
# Environment: JOBS (processors), KERNEL_SOURCE (a tarball to use instead of fetching the package; its digest is
# checked all the same), KERNEL_WORK (where to build; a temporary directory, removed at the end, by default),
# KERNEL_FRAGMENTS (another directory of fragments, for experiments: the provenance then says so by its digest),
# KERNEL_CONFIG_ONLY (stop once the configuration is found to be as asked).
set -eu
umask 022
export LC_ALL=C TZ=UTC

die() { echo "kernel/build.sh: $*" >&2; exit 1; }
say() { echo "kernel/build.sh: $*" >&2; }

[ $# -eq 1 ] || die "usage: kernel/build.sh OUTDIR"
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
out=$(cd "$1" && pwd)
fragments=${KERNEL_FRAGMENTS:-$here/config}
jobs=${JOBS:-$(nproc)}

pin() { sed -n "s/^$1=//p" "$here/VERSION"; }
package=$(pin package) version=$(pin version) tarball=$(pin tarball)

# 1. What the build itself needs.
missing=
for need in gcc:gcc make:make ld:binutils flex:flex bison:bison bc:bc zstd:zstd xz:xz-utils gzip:gzip dpkg-deb:dpkg; do
	command -v "${need%%:*}" >/dev/null || missing="$missing ${need#*:}"
done
[ -e /usr/include/libelf.h ] || missing="$missing libelf-dev"
[ -e /usr/include/stdio.h ] || missing="$missing libc6-dev"
if [ -n "$missing" ]; then
	[ "$(id -u)" -eq 0 ] || die "missing:$missing (as root: apt-get install$missing)"
	say "installing$missing"
	apt-get -q update >&2
	DEBIAN_FRONTEND=noninteractive apt-get -q install -y --no-install-recommends $missing >&2
fi

if [ -n "${KERNEL_WORK:-}" ]; then
	mkdir -p "$KERNEL_WORK"
	work=$(cd "$KERNEL_WORK" && pwd)
else
	work=$(mktemp -d)
	trap 'rm -rf "$work"' EXIT
	trap 'exit 1' HUP INT TERM
fi

# 2. The source, by digest.
check() { echo "$2  $1" | sha256sum --check --status - || die "$1 does not have the SHA-256 that VERSION names"; }
if [ -n "${KERNEL_SOURCE:-}" ]; then
	archive=$KERNEL_SOURCE
elif [ "$(dpkg-query -W -f '${Version}' "$package" 2>/dev/null)" = "$version" ]; then
	archive=/$tarball
else
	say "fetching $package $version"
	(cd "$work" && { apt-get -q download "$package=$version" || { apt-get -q update && apt-get -q download "$package=$version"; }; }) >&2 ||
		die "the archive has no $package $version: move VERSION on to $(apt-cache policy "$package" | sed -n 's/ *Candidate: //p')"
	deb=$(ls "$work"/"$package"_*.deb)
	check "$deb" "$(pin deb_sha256)"
	dpkg-deb --fsys-tarfile "$deb" | tar -x -C "$work" "./$tarball"
	rm "$deb"
	archive=$work/$tarball
fi
check "$archive" "$(pin tarball_sha256)"
src=$work/linux
rm -rf "$src"
mkdir "$src"
say "unpacking $package $version"
tar -x -J --strip-components=1 -C "$src" -f "$archive"

# 3. The configuration: nothing but what the fragments ask for, and every line of them as asked.
want=$work/want.config
sed 's/[[:space:]]*#.*//; /^$/d' "$fragments"/*.config | sort >"$want"
twice=$(cut -d= -f1 "$want" | uniq -d)
[ -z "$twice" ] || die "named twice: $twice"
inputs=$({ sed 's/[[:space:]]*#.*//; /^$/d' "$here/VERSION"; cat "$want"; } | sha256sum | cut -d' ' -f1)

# 4. What the build would otherwise take from its surroundings. A Rust compiler or pahole would be named in the
# configuration, which is part of the kernel, though neither is used.
export ARCH=x86_64 KBUILD_BUILD_USER=cradle KBUILD_BUILD_HOST=cradle KBUILD_BUILD_VERSION=1
export SOURCE_DATE_EPOCH=0 KBUILD_BUILD_TIMESTAMP='Thu Jan  1 00:00:00 UTC 1970'
unset MAKEFLAGS MAKELEVEL KBUILD_OUTPUT CFLAGS LDFLAGS 2>/dev/null || :
kmake() { make -C "$src" -s RUSTC=/nonexistent/rustc PAHOLE=/nonexistent/pahole "KCFLAGS=-ffile-prefix-map=$src=. $(pin cflags)" "KAFLAGS=-ffile-prefix-map=$src=." "$@"; }

KCONFIG_ALLCONFIG=$want kmake allnoconfig >&2
wrong=0
while IFS= read -r line; do
	name=${line%%=*}
	case $line in
	*=n) got=$(grep "^$name=" "$src/.config") || continue ;;
	*) grep -qxF -e "$line" "$src/.config" && continue
		got=$(grep -e "^$name=" -e "^# $name " "$src/.config" || echo "nothing: unknown, or a dependency is missing") ;;
	esac
	echo "kernel/build.sh: $line was asked for, the configuration has $got" >&2
	wrong=$((wrong + 1))
done <"$want"
[ "$wrong" -eq 0 ] || die "$wrong options are not as asked"
[ -z "${KERNEL_CONFIG_ONLY:-}" ] || exit 0

# 5. The kernel, and what is kept of it.
say "building in $src with $jobs jobs"
kmake -j"$jobs" vmlinux >&2
strip --strip-all -o "$work/vmlinux" "$src/vmlinux"
chmod 644 "$work/vmlinux" # zstd copies it
zstd -q -f -19 --single-thread --no-progress -o "$out/vmlinux.zst" "$work/vmlinux"
sum=$(sha256sum <"$work/vmlinux" | cut -d' ' -f1)
echo "$sum  vmlinux" >"$out/vmlinux.sha256"
cp "$src/.config" "$out/vmlinux.config"
cat >"$out/provenance.json" <<JSON
{
  "version": 1,
  "package": "$package",
  "release": "$version",
  "tarballSha256": "$(pin tarball_sha256)",
  "kernel": "$(cat "$src/include/config/kernel.release")",
  "inputsSha256": "$inputs",
  "configSha256": "$(sha256sum <"$out/vmlinux.config" | cut -d' ' -f1)",
  "compiler": "$(gcc --version | sed q)",
  "linker": "$(ld --version | sed q)",
  "vmlinuxSha256": "$sum",
  "vmlinuxBytes": $(stat -c %s "$work/vmlinux"),
  "zstdBytes": $(stat -c %s "$out/vmlinux.zst")
}
JSON
say "vmlinux sha256 $sum, $(stat -c %s "$work/vmlinux") bytes; compressed $(stat -c %s "$out/vmlinux.zst") bytes, in $out"
if [ -e "$here/vmlinux.sha256" ] && [ "$out" != "$here" ] && ! cmp -s "$out/vmlinux.sha256" "$here/vmlinux.sha256"; then
	say "differs from the artefact in the tree, which was built with: $(sed -n 's/.*"compiler": "\(.*\)",/\1/p' "$here/provenance.json")"
fi
