#!/usr/bin/env bash
# A base image from Debian's packages, for where no image registry can be reached.
#
#   docker/base-image.sh [TAG]    job-base:trixie by default; then BASE_IMAGE=TAG docker/build.sh cpu
#
# It holds what the Dockerfile would install, and the extra certificate authorities of this machine
# (/usr/local/share/ca-certificates). DEBIAN_MIRROR names another mirror. Needs root.
set -euo pipefail

tag=${1:-job-base:trixie}
[ "$(id -u)" = 0 ] || {
  echo "debootstrap needs root" >&2
  exit 3
}
if ! command -v debootstrap >/dev/null &&
  ! DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends debootstrap >/dev/null 2>&1; then
  echo "debootstrap is not here, and apt-get cannot install it" >&2
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
# Caches, and what nobody reads in a container.
rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
  "$root"/usr/share/{doc,info,locale,man}/*
tar -C "$root" -c . | docker import --change 'CMD ["bash"]' - "$tag" >/dev/null
echo "$tag"
