#!/usr/bin/env bash
# Lock the images' Python packages: versions and hashes that match the ranges in pyproject.toml.
#
#   docker/lock.sh [UV OPTION ...]    update the lock files; --upgrade takes the newest versions
#   docker/lock.sh --check            exit with 1 if they no longer match pyproject.toml
#
# A locked version that still matches stays the same. The files have no index URLs.
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
for expected in "$new"/*.lock; do
  locked=docker/${expected##*/}
  if ! diff -U 0 --label "$locked" --label expected "$locked" "$expected" >&2; then
    echo "$locked no longer matches pyproject.toml; run docker/lock.sh" >&2
    exit 1
  fi
done
