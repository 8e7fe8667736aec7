#!/usr/bin/env bash
# Run tests/infra/test_end_to_end.py: submit the smoke spec to a local stand-in for Google Cloud whose
# machines run the CPU image, preempt the run during training, and watch it until it ends.
#
# The test uses the image job:cpu and builds it if it does not exist. Without gcloud or a Docker
# daemon, it prints SKIPPED and exits with 77; with CI=true, it fails.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() { # REASON
  echo "SKIPPED: $1, so the end-to-end test did not run"
  [[ ${CI:-} != true ]] || exit 1
  exit 77
}
command -v gcloud >/dev/null || skip "gcloud is not installed"
started=$(docker/daemon.sh) || skip "there is no Docker daemon"
# Stop only a daemon that this script started. Wait for it, because the next one uses the same socket.
[[ -z $started ]] ||
  trap 'kill "$started"; while kill -0 "$started" 2>/dev/null; do sleep 0.2; done' EXIT

if ! docker image inspect job:cpu >/dev/null 2>&1; then
  if [[ -z ${BASE_IMAGE:-} && $(id -u) == 0 ]]; then
    export BASE_IMAGE=job-base:trixie
    docker image inspect "$BASE_IMAGE" >/dev/null 2>&1 || docker/base-image.sh "$BASE_IMAGE"
  fi
  docker/build.sh cpu --quiet
fi
uv run pytest -m docker -n 0 --durations 0 tests/infra/test_end_to_end.py
