#!/usr/bin/env bash
# Build the CPU and TPU images without an image registry, and run tests/test_container.py on them.
#
# Without a Docker daemon, it prints SKIPPED and exits with 77; with CI=true, it fails.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! started=$(docker/daemon.sh); then
  echo "SKIPPED: there is no Docker daemon, so the image tests did not run"
  [ "${CI:-}" != true ] || exit 1
  exit 77
fi
# Stop only a daemon that this script started. Wait for it, because the next one uses the same socket.
[ -z "$started" ] ||
  trap 'kill "$started"; while kill -0 "$started" 2>/dev/null; do sleep 0.2; done' EXIT

if [ -z "${BASE_IMAGE:-}" ] && [ "$(id -u)" = 0 ]; then
  BASE_IMAGE=job-base:trixie
  docker image inspect "$BASE_IMAGE" >/dev/null 2>&1 || docker/base-image.sh "$BASE_IMAGE"
  export BASE_IMAGE
fi
for extra in cpu tpu; do
  begin=$SECONDS
  docker/build.sh "$extra" --quiet
  echo "built job:$extra in $((SECONDS - begin)) s"
done
uv run pytest -m docker -n 0 -rP --durations 0 tests/test_container.py
