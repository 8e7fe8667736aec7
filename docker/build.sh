#!/usr/bin/env bash
# Build an image: docker/build.sh [cpu|tpu|cuda] [--tag NAME ...]. docker/README.md lists the variables.
set -euo pipefail
cd "$(dirname "$0")/.."

extra=${1:-cpu}
[ $# -eq 0 ] || shift
case $extra in
  cpu | tpu | cuda) ;;
  *)
    echo "unknown image '$extra'; write cpu, tpu or cuda" >&2
    exit 2
    ;;
esac
version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' job/__init__.py)
commit=$(git rev-parse HEAD 2>/dev/null || true)
[ -z "$commit" ] || git diff --quiet HEAD -- job docker pyproject.toml Dockerfile || commit=$commit-dirty

docker build --network=host --build-arg "EXTRA=$extra" \
  --build-arg "VERSION=$version" --build-arg "GIT_COMMIT=$commit" \
  ${BASE_IMAGE:+--build-arg "BASE_IMAGE=$BASE_IMAGE"} \
  ${UV_DEFAULT_INDEX:+--build-arg UV_DEFAULT_INDEX} \
  --tag "job:$extra" --tag "job:$version-$extra" "$@" .
