#!/usr/bin/env bash
# What is known of a run: one small object, gs://BUCKET/infra/RUN/state, lines of name=value.
# It is written only if it still is what it was when it was read (a generation precondition), and
# only by the script whose turn it is: `owner` until `expires`. So any number of scripts may watch
# a run, one acts, and another goes on where one was killed. To be sourced after lib.sh.

# Variables are shared by the files of this folder.
# shellcheck disable=SC2034,SC2153,SC2154

declare -A STATE=()
GENERATION=0
ME=$(hostname)-$$-$RANDOM$RANDOM

run_folder() { printf '%s/%s' "$CONTROL" "$RUN"; }

# Reads the state; fails where there is none. Everything else ends the script.
read_state() {
  local tries line uri
  uri=$(run_folder)/state
  STATE=() GENERATION=0
  for tries in 1 2 3; do
    if ! ask storage objects describe "$uri" --format='value(generation)'; then
      [[ $KIND == missing || -n $DRY_RUN ]] && return 1
      [[ $KIND == unclear && $tries != 3 ]] && continue
      stop_at "cannot read $uri"
    fi
    GENERATION=$ANSWER
    ask storage cat "$uri#$GENERATION" && break
    [[ $tries != 3 ]] || stop_at "cannot read $uri"
  done
  while IFS= read -r line; do
    [[ $line != *=* ]] || STATE[${line%%=*}]=${line#*=}
  done <<<"$ANSWER"
  [[ -n ${STATE[phase]:-} ]] || fail "$uri is not the state of a run"
}

# Writes the state with this script as its owner for LEASE_SECONDS more; fails if another
# script has written it since it was read.
write_state() {
  local key uri status=0
  uri=$(run_folder)/state
  STATE[owner]=$ME STATE[expires]=$(($(now) + LEASE_SECONDS)) STATE[written]=$RANDOM$RANDOM
  for key in $(printf '%s\n' "${!STATE[@]}" | LC_ALL=C sort); do
    printf '%s=%s\n' "$key" "${STATE[$key]//$'\n'/ }"
  done >"$WORK/state"
  change storage cp "$WORK/state" "$uri" "--if-generation-match=$GENERATION" \
    --print-created-message || status=$?
  [[ -z $DRY_RUN ]] || return 0
  if ((status == 0)); then
    GENERATION=$(sed -n 's/^Created: .*#\([0-9]*\)$/\1/p' "$WORK/stderr")
    [[ -z $GENERATION ]] || return 0
  elif [[ $KIND != conflict && $KIND != unclear ]]; then
    stop_at "cannot write $uri"
  fi
  was_written "${STATE[written]}"
}

# Whether a write without a clear answer was made after all. A write that met its own earlier
# try, whose answer was lost, looks like a conflict. The state is read again in any case.
was_written() { # MARK
  local problem=$PROBLEM
  read_state && [[ ${STATE[written]:-} == "$1" && ${STATE[owner]:-} == "$ME" ]] && return 0
  [[ -z $problem || $problem == *ondition* ]] || say "the state of $RUN was not written: $problem"
  return 1
}

# What the registry of the job says about MACHINE, in ORDER; an accelerator that the provisioner
# cannot order is refused.
declare -A ORDER=()
read_order() {
  local -a keys=(platform chips hosts accelerator_type runtime_version machine_type image_family
    image_project quota spot_quota usd_per_hour spot_usd_per_hour prices_of)
  local -a values
  local at
  job accelerators "$MACHINE" --json >"$WORK/order.json" || exit $?
  mapfile -t values < <(json_values "$WORK/order.json" "${keys[@]/#/0.}")
  for at in "${!keys[@]}"; do ORDER[${keys[at]}]=${values[at]:-}; done
  [[ ${ORDER[platform]} == tpu ]] || misuse "MACHINE='$MACHINE' is no TPU; write one like v5e-8"
  if [[ $PROVISIONER == gce && (${ORDER[hosts]} != 1 || -z ${ORDER[image_family]}) ]]; then
    misuse "MACHINE='$MACHINE' cannot be had from Compute Engine by these scripts: it takes one host of v5e, v5p or v6e; set PROVISIONER=queued"
  fi
}

# The image by its digest, in IMAGE_DIGEST: what is run is what was there when it was submitted.
resolve_image() {
  IMAGE_DIGEST=$IMAGE
  if [[ $IMAGE == *@sha256:* || $IMAGE == sha256:* ]]; then return; fi
  if [[ -n $DRY_RUN ]]; then
    IMAGE_DIGEST=${IMAGE%:*}@sha256:DIGEST
  elif ask artifacts docker images describe "$IMAGE" --format='value(image_summary.digest)'; then
    IMAGE_DIGEST=${IMAGE%:*}@$ANSWER
  elif [[ $KIND == missing ]]; then
    fail "there is no image $IMAGE; build and push it: infra/push_image.sh"
  else
    stop_at "cannot look up the image $IMAGE"
  fi
}

# The state of a run that begins, or of one that has ended and begins again, of the spec SPEC_URI.
new_submission() { # AGAIN
  local attempt=1 submission=1 generation=$GENERATION
  if [[ -n $1 ]]; then
    attempt=$((STATE[attempt] + 1)) submission=$((STATE[submission] + 1))
  fi
  STATE=([run]=$RUN [phase]=create [submission]=$submission [attempt]=$attempt
    [first_attempt]=$attempt [failures]=0 [not_before]=0 [was_active]='' [started]='' [ordered]=0
    [zones]=$ZONES [zone_index]=0 [provisioner]=$PROVISIONER [spot]=$SPOT [machine]=$MACHINE
    [accelerator_type]=${ORDER[accelerator_type]} [runtime_version]=${ORDER[runtime_version]}
    [machine_type]=${ORDER[machine_type]} [image_family]=${ORDER[image_family]}
    [image_project]=${ORDER[image_project]} [quota]=${ORDER[quota]}
    [image]=$IMAGE_DIGEST [spec]=$SPEC_URI [output]=$OUTPUT [run_uri]=$OUTPUT/$RUN
    [service_account]=$SERVICE_ACCOUNT [secrets]=$SECRETS [self_delete]=$SELF_DELETE
    [wait_seconds]=$WAIT_SECONDS [max_run_seconds]=$MAX_RUN_SECONDS [max_attempts]=$MAX_ATTEMPTS
    [network]=$NETWORK [subnetwork]=$SUBNETWORK [boot_disk_gb]=$BOOT_DISK_GB
    [container_flags]=$CONTAINER_FLAGS)
  [[ $SPOT != yes ]] || STATE[quota]=${ORDER[spot_quota]}
  GENERATION=$generation
}
