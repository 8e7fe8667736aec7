#!/usr/bin/env bash
# The state of a run: one small object of name=value lines, gs://BUCKET/infra/RUN/state.
#
# A write needs the generation that was read (a precondition), and the lease: the script named in
# `owner` holds it until `expires`. So many scripts may watch a run, one of them acts, and another
# takes over if that one is killed. Source this file after lib.sh.

# The scripts in this folder share variables.
# shellcheck disable=SC2034,SC2153,SC2154

declare -A STATE=()
GENERATION=0
ME=$(hostname)-$$-$RANDOM$RANDOM

run_folder() { printf '%s/%s' "$CONTROL" "$RUN"; }

# Read the state. Return 1 if there is none; exit on any other error.
read_state() {
  local tries line uri
  uri=$(run_folder)/state
  STATE=() GENERATION=0
  for tries in 1 2 3; do
    if ! gcloud_read storage objects describe "$uri" --format='value(generation)'; then
      [[ $ERROR_KIND == missing || -n $DRY_RUN ]] && return 1
      [[ $ERROR_KIND =~ ^(unclear|busy)$ && $tries != 3 ]] && continue
      gcloud_fail "cannot read $uri"
    fi
    GENERATION=$RESULT
    gcloud_read storage cat "$uri#$GENERATION" && break
    [[ $tries != 3 ]] || gcloud_fail "cannot read $uri"
  done
  while IFS= read -r line; do
    [[ $line != *=* ]] || STATE[${line%%=*}]=${line#*=}
  done <<<"$RESULT"
  [[ -n ${STATE[phase]:-} ]] || fail "$uri is not a run state"
}

# Write the state and renew this script's lease for LEASE_SECONDS. Fail if another script has
# written the state since it was read.
write_state() {
  local key uri status=0
  uri=$(run_folder)/state
  STATE[owner]=$ME STATE[expires]=$(($(now) + LEASE_SECONDS)) STATE[written]=$RANDOM$RANDOM
  for key in $(printf '%s\n' "${!STATE[@]}" | LC_ALL=C sort); do
    printf '%s=%s\n' "$key" "${STATE[$key]//$'\n'/ }"
  done >"$WORK/state"
  gcloud_write storage cp "$WORK/state" "$uri" "--if-generation-match=$GENERATION" \
    --print-created-message || status=$?
  [[ -z $DRY_RUN ]] || return 0
  if ((status == 0)); then
    GENERATION=$(sed -n 's/^Created: .*#\([0-9]*\)$/\1/p' "$WORK/stderr")
    [[ -z $GENERATION ]] || return 0
  elif [[ ! $ERROR_KIND =~ ^(conflict|unclear|busy)$ ]]; then
    gcloud_fail "cannot write $uri"
  fi
  write_took_effect "${STATE[written]}"
}

# Return whether a write with an unclear outcome took effect. A retry of a write whose response was
# lost looks like a conflict. Always reads the state again.
write_took_effect() { # MARK
  local problem=$ERROR
  read_state && [[ ${STATE[written]:-} == "$1" && ${STATE[owner]:-} == "$ME" ]] && return 0
  [[ -z $problem || $problem == *ondition* ]] || log "cannot write the state of $RUN: $problem"
  return 1
}

# Look up MACHINE in the job's accelerator registry and set MACHINE_INFO. Exit if the provisioner
# cannot create such a machine.
declare -A MACHINE_INFO=()
read_machine() {
  local -a keys=(platform chips hosts accelerator_type runtime_version machine_type image_family
    image_project quota spot_quota usd_per_hour spot_usd_per_hour prices_of)
  local -a values
  local at
  job accelerators "$MACHINE" --json >"$WORK/machine.json" || exit $?
  mapfile -t values < <(json_values "$WORK/machine.json" "${keys[@]/#/0.}")
  for at in "${!keys[@]}"; do MACHINE_INFO[${keys[at]}]=${values[at]:-}; done
  [[ ${MACHINE_INFO[platform]} == tpu ]] || usage_error "MACHINE='$MACHINE' is not a TPU; write one like v5e-8"
  if [[ $PROVISIONER == gce && (${MACHINE_INFO[hosts]} != 1 || -z ${MACHINE_INFO[image_family]}) ]]; then
    usage_error "MACHINE='$MACHINE' does not work with PROVISIONER=gce: Compute Engine creates only one host of v5p or v6e; set PROVISIONER=queued"
  fi
}

# Set IMAGE_DIGEST to the image with its digest, so a run always uses the image it was submitted with.
resolve_image() {
  IMAGE_DIGEST=$IMAGE
  if [[ $IMAGE == *@sha256:* || $IMAGE == sha256:* ]]; then return; fi
  if [[ -n $DRY_RUN ]]; then
    IMAGE_DIGEST=${IMAGE%:*}@sha256:DIGEST
  elif gcloud_read artifacts docker images describe "$IMAGE" --format='value(image_summary.digest)'; then
    IMAGE_DIGEST=${IMAGE%:*}@$RESULT
  elif [[ $ERROR_KIND == missing ]]; then
    fail "there is no image $IMAGE; to build and push it, run infra/push_image.sh"
  else
    gcloud_fail "cannot look up the image $IMAGE"
  fi
}

# Set STATE for a new run of the spec SPEC_URI, or for a new submission of a run that has ended.
STALL_SECONDS=''
new_submission() { # AGAIN
  local attempt=1 submission=1 generation=$GENERATION
  if [[ -n $1 ]]; then
    attempt=$((STATE[attempt] + 1)) submission=$((STATE[submission] + 1))
  fi
  STATE=([run]=$RUN [phase]=create [submission]=$submission [attempt]=$attempt
    [failures]=0 [not_before]=0 [was_active]='' [active_since]='' [started]='' [ordered]=0
    [lost]=0 [bad_nodes]=0 [unclear]=0 [no_quota]='' [stall_seconds]=$STALL_SECONDS
    [zones]=$ZONES [zone_index]=0 [provisioner]=$PROVISIONER [spot]=$SPOT [machine]=$MACHINE
    [accelerator_type]=${MACHINE_INFO[accelerator_type]} [runtime_version]=${MACHINE_INFO[runtime_version]}
    [machine_type]=${MACHINE_INFO[machine_type]} [image_family]=${MACHINE_INFO[image_family]}
    [image_project]=${MACHINE_INFO[image_project]} [quota]=${MACHINE_INFO[quota]}
    [image]=$IMAGE_DIGEST [spec]=$SPEC_URI [output]=$OUTPUT [run_uri]=$OUTPUT/$RUN
    [service_account]=$SERVICE_ACCOUNT [secrets]=$SECRETS [self_delete]=$SELF_DELETE
    [wait_seconds]=$WAIT_SECONDS [max_run_seconds]=$MAX_RUN_SECONDS [max_attempts]=$MAX_ATTEMPTS
    [network]=$NETWORK [subnetwork]=$SUBNETWORK [internal_ips]=$INTERNAL_IPS [boot_disk_gb]=$BOOT_DISK_GB
    [container_flags]=$CONTAINER_FLAGS)
  [[ $SPOT != yes ]] || STATE[quota]=${MACHINE_INFO[spot_quota]}
  [[ $PROVISIONER != gce ]] || STATE[quota]="Compute Engine's quota for ${MACHINE_INFO[machine_type]%-*}"
  GENERATION=$generation
}

# Acquire the run's lease, or wait until another watcher has ended the run.
acquire_lease() {
  local announced=''
  until read_state && lease_is_free && write_state; do
    [[ -n ${STATE[phase]:-} ]] || no_such_run
    [[ ${STATE[phase]} != ended ]] || return 0
    [[ -n $announced ]] || log "$RUN is watched by ${STATE[owner]}; standing by"
    announced=yes
    sleep "$POLL_SECONDS"
  done
}

lease_is_free() {
  [[ ${STATE[phase]} != ended ]] \
    && { [[ -z ${STATE[owner]:-} || ${STATE[owner]} == "$ME" ]] || ((STATE[expires] < $(now))); }
}

# Release the lease, so the next watcher need not wait.
release_lease() {
  [[ ${STATE[owner]:-} == "$ME" && ${STATE[phase]} != ended ]] || return 0
  LEASE_SECONDS=-1 write_state || true
}
