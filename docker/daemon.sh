#!/usr/bin/env bash
# Make sure that a Docker daemon answers: the one that is there or, as root on Debian, a new one.
#
#   pid=$(docker/daemon.sh)    the process to end afterwards; empty where a daemon was there
#
# Exit code 1: there is no daemon, and none can be had.
set -euo pipefail

answers() { docker version >/dev/null 2>&1; }

answers && exit 0
if ! command -v dockerd >/dev/null; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no Docker daemon answers, and only root on Debian can install one here" >&2
    exit 1
  fi
  {
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends docker.io
  } >/dev/null 2>&1 || {
    echo "no Docker daemon answers, and docker.io cannot be installed" >&2
    exit 1
  }
fi
[ "$(id -u)" = 0 ] || {
  echo "no Docker daemon answers, and only root can start one" >&2
  exit 1
}

log=$(mktemp -t dockerd.XXXXXX)
# Neither bridge nor iptables: they need rights that a container or a small VM may not have.
setsid dockerd --iptables=false --bridge=none >"$log" 2>&1 </dev/null &
pid=$!
for _ in $(seq 60); do
  if answers; then
    echo "$pid"
    exit 0
  fi
  kill -0 "$pid" 2>/dev/null || break
  sleep 0.5
done
kill "$pid" 2>/dev/null || true
echo "dockerd did not start: $(tail -n 1 "$log")" >&2
exit 1
