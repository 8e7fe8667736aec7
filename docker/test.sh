#!/usr/bin/env bash
# Build the CPU and the TPU image without an image registry, and test them: tests/test_container.py.
#
# Without a Docker daemon, and where none can be installed, it says so and tests nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! started=$(docker/daemon.sh); then
  echo "the images are not tested here"
  exit 0
fi
# Only what was started here is ended here, and waited for: the next daemon needs its place.
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
  echo "job:$extra is built: $((SECONDS - begin)) s"
done
uv run pytest -m docker -n 0 -rP --durations 0 tests/test_container.py
