#!/usr/bin/env bash
# The Python packages of the images, with versions and hashes, from pyproject.toml's ranges.
#
#   docker/lock.sh [UV OPTION ...]    bring the lock files up to date; --upgrade takes the newest
#   docker/lock.sh --check            exit code 1 where they do not fit pyproject.toml any more
#
# What is locked stays as it is while it fits. The files hold no addresses.
set -euo pipefail
cd "$(dirname "$0")/.."

check=false
if [ "${1:-}" = --check ]; then
  check=true
  shift
fi
if command -v uv >/dev/null; then uv=(uv); else uv=(python3 -m uv); fi
new=$(mktemp -d -t lock.XXXXXX)
trap 'rm -rf "$new"' EXIT
cp docker/requirements-*.lock "$new/" 2>/dev/null || true

compile() {
  local name=$1
  shift
  "${uv[@]}" pip compile --quiet --generate-hashes --no-emit-index-url --no-emit-find-links \
    --python-version 3.13 --python-platform x86_64-manylinux_2_40 \
    --custom-compile-command docker/lock.sh --output-file "$new/requirements-$name.lock" "$@"
}

compile cpu pyproject.toml "$@"
compile tpu --extra tpu pyproject.toml "$@"
compile cuda --extra cuda pyproject.toml "$@"
compile build docker/requirements-build.in "$@"

if ! $check; then
  cp "$new"/requirements-*.lock docker/
  exit
fi
for wanted in "$new"/*.lock; do
  locked=docker/${wanted##*/}
  if ! diff -U 0 --label "$locked" --label wanted "$locked" "$wanted" >&2; then
    echo "$locked does not fit pyproject.toml any more: run docker/lock.sh" >&2
    exit 1
  fi
done
