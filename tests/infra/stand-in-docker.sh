#!/usr/bin/env bash
# A stand-in for `docker` on PATH, for the tests of startup.sh and push_image.sh. It has one image and
# one container, which runs the script $DOCKER_FOLDER/job. It records each call in
# $DOCKER_FOLDER/calls, and the standard input and Docker configuration of a login. With the files
# `down`, `unreachable` or `hanging` there, the daemon, the registry or a pull does not respond; with
# `uncreatable`, no container can be created. The container is no process of its client's unit, and in
# the control group $DOCKER_GROUP if that is set.
set -euo pipefail
folder=$DOCKER_FOLDER
printf '%s\n' "$*" >>"$folder/calls"
if [[ -e $folder/down && $1 != login ]]; then
  echo "Cannot connect to the Docker daemon" >&2
  exit 1
fi

case "$1 ${2:-}" in
  "info ") ;;
  "image inspect")
    [[ -e $folder/image ]] || exit 1
    [[ $* != *Entrypoint* ]] || printf '%s\n' "$folder/job"
    ;;
  "login -u")
    cat >"$folder/login"
    df --output=fstype "$DOCKER_CONFIG" | tail -n 1 >"$folder/login-file-system"
    printf '%s' "$DOCKER_CONFIG" >"$folder/login-config"
    ;;
  "build "* | "push -q") ;;
  "pull -q")
    if [[ -e $folder/unreachable ]]; then
      echo "Error response from daemon: manifest unknown" >&2
      exit 1
    fi
    [[ ! -e $folder/hanging ]] || exec sleep 1000
    touch "$folder/image"
    ;;
  "run -i")
    [[ ! -e $folder/uncreatable ]] || exit 125
    while [[ $1 != --entrypoint ]]; do shift; done
    shell=$2
    shift 3 # and the image
    # Without <&0, a background command has no input.
    # shellcheck disable=SC2016
    setsid bash -c '
      [[ -z ${DOCKER_GROUP:-} ]] || { mkdir -p "$DOCKER_GROUP" && echo $$ >"$DOCKER_GROUP/cgroup.procs"; }
      "$@" <&0 &
      echo $! >"$DOCKER_FOLDER/pid"
      wait $!
      echo $? >"$DOCKER_FOLDER/code"' container "$shell" "$@" <&0 &
    wait $!
    exit "$(<"$folder/code")"
    ;;
  "container inspect")
    [[ -e $folder/pid ]] || { echo && exit 1; }
    if [[ $* == *Running* ]]; then
      if [[ -e $folder/code ]]; then echo false; else echo true; fi
    else
      cat "$folder/code"
    fi
    ;;
  "stop -t") [[ -e $folder/code ]] || kill -TERM "$(<"$folder/pid")" ;;
  "logs -f") until [[ -e $folder/code ]]; do sleep 0.1; done ;;
  "rm -f")
    # The process may have exited, and its number may be another's.
    if [[ -e $folder/pid ]] && grep -qsz "^DOCKER_FOLDER=$folder$" "/proc/$(<"$folder/pid")/environ"; then
      kill -KILL "$(<"$folder/pid")" || true
    fi
    rm -f "$folder/pid" "$folder/code"
    ;;
  "rm "*) rm -f "$folder/pid" "$folder/code" ;;
  *)
    echo "stand-in docker: unknown command: $*" >&2
    exit 64
    ;;
esac
