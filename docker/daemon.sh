#!/usr/bin/env bash
# Make sure that a Docker daemon is running. As root on Debian, install and start one if needed.
#
#   pid=$(docker/daemon.sh)    the process to stop afterwards; empty if a daemon was already running
#
# Exit code 1: no daemon is running, and none can be started.
set -euo pipefail

is_running() { docker version >/dev/null 2>&1; }

is_running && exit 0
if ! command -v dockerd >/dev/null; then
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "no Docker daemon is running, and only root on Debian can install one" >&2
    exit 1
  fi
  {
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends docker.io
  } >/dev/null 2>&1 || {
    echo "no Docker daemon is running, and docker.io cannot be installed" >&2
    exit 1
  }
fi
[ "$(id -u)" = 0 ] || {
  echo "no Docker daemon is running, and only root can start one" >&2
  exit 1
}

log=$(mktemp -t dockerd.XXXXXX)
# No bridge and no iptables: they need privileges that a container or a small VM may not have.
setsid dockerd --iptables=false --bridge=none >"$log" 2>&1 </dev/null &
pid=$!
for _ in $(seq 60); do
  if is_running; then
    echo "$pid"
    exit 0
  fi
  kill -0 "$pid" 2>/dev/null || break
  sleep 0.5
done
kill "$pid" 2>/dev/null || true
echo "dockerd did not start: $(tail -n 1 "$log")" >&2
exit 1
