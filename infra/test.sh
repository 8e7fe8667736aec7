#!/usr/bin/env bash
# Submits the smoke spec to a local stand-in for Google Cloud whose machines run the CPU image,
# preempts it in the middle of training, and follows it to the end: tests/infra/test_end_to_end.py.
#
# Without a Docker daemon, and where none can be had, or without gcloud, it says so and tests
# nothing. An image job:cpu that is there is used; else it is built.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v gcloud >/dev/null; then
  echo "gcloud is not installed: the scripts are not tested here with the image"
  exit 0
fi
if ! started=$(docker/daemon.sh); then
  echo "the scripts are not tested here with the image"
  exit 0
fi
# Only what was started here is ended here, and waited for: the next daemon needs its place.
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
