#!/bin/sh
# A base to build on where no registry of images can be reached: Debian's own packages, put together by debootstrap and
# trimmed as debian:*-slim is. As root; needs debootstrap and buildah.
#
#   deploy/image/base.sh [SUITE]          makes localhost/debian:SUITE-slim (trixie)
#
# MIRROR may be set to another one than this machine's own apt has, and BUILDAH (to `buildah --storage-driver vfs`, say).
set -eu
suite=${1:-trixie}
own=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | grep -m1 '/debian/$') || own=
mirror=${MIRROR:-${own%/}}
if [ -z "$mirror" ]; then
    echo "base.sh: apt here knows no mirror of Debian. Say which: MIRROR=http://HOST/debian $0 $suite" >&2
    exit 2
fi
buildah=${BUILDAH:-buildah}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

debootstrap --variant=minbase "$suite" "$work/root" "$mirror"
cat >"$work/root/etc/apt/sources.list" <<SOURCES
deb $mirror $suite main
deb $mirror $suite-updates main
deb ${mirror%/*}/debian-security $suite-security main
SOURCES
cat >"$work/root/etc/dpkg/dpkg.cfg.d/slim" <<'SLIM'
path-exclude /usr/share/doc/*
path-include /usr/share/doc/*/copyright
path-exclude /usr/share/man/*
path-exclude /usr/share/info/*
path-exclude /usr/share/locale/*
SLIM
cd "$work/root"
find usr/share/doc -type f ! -name copyright -delete
rm -rf usr/share/man/* usr/share/info/* usr/share/locale/* var/cache/apt/* var/lib/apt/lists/* var/log/*
cd "$OLDPWD"

container=$($buildah from scratch)
$buildah add --quiet "$container" "$work/root" / >/dev/null
$buildah config --cmd /bin/bash --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$container"
$buildah commit --quiet --rm "$container" "localhost/debian:$suite-slim"
