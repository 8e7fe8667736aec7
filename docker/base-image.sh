#!/usr/bin/env bash
# Make a base image from Debian packages, for machines that cannot reach an image registry.
#
#   docker/base-image.sh [TAG]    default tag: job-base:trixie; then run BASE_IMAGE=TAG docker/build.sh cpu
#
# The image has the Debian packages that the Dockerfile would install, and this machine's extra
# certificate authorities (/usr/local/share/ca-certificates). DEBIAN_MIRROR sets the mirror. Needs root.
set -euo pipefail

tag=${1:-job-base:trixie}
[ "$(id -u)" = 0 ] || {
  echo "debootstrap needs root" >&2
  exit 3
}
if ! command -v debootstrap >/dev/null &&
  ! DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends debootstrap >/dev/null 2>&1; then
  echo "debootstrap is not installed, and apt-get cannot install it" >&2
  exit 3
fi

root=$(mktemp -d -t base-image.XXXXXX)
trap 'rm -rf "$root"' EXIT
chmod 755 "$root"

debootstrap --variant=minbase --include=ca-certificates,python3-venv,tini trixie "$root" \
  ${DEBIAN_MIRROR:+"$DEBIAN_MIRROR"} >"$root.log" 2>&1 || {
  tail -n 5 "$root.log" >&2
  exit 1
}
rm -f "$root.log"
certificates=(/usr/local/share/ca-certificates/*.crt)
if [ -e "${certificates[0]}" ]; then
  cp "${certificates[@]}" "$root/usr/local/share/ca-certificates/"
  chroot "$root" update-ca-certificates >/dev/null 2>&1
fi
# Remove caches and files that a container does not need.
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
  "$root"/usr/share/{doc,info,locale,man}/*
tar -C "$root" -c . | docker import --change 'CMD ["bash"]' - "$tag" >/dev/null
echo "$tag"
