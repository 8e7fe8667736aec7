#!/usr/bin/env bash
# The watcher's state machine: create a run's machine, watch it, replace it if it is lost, delete it.
# Every step is written to the state first, so a watcher may be killed at any point and the next
# one resumes there. Source this file after state.sh.
#
# Phases:  create -> run -> retire -> create ...      delete the machine, create one in the next zone
#                    run -> end -> ended              delete the machine, then the run has ended
# A machine is created only if the run has no machine in any zone.

# The scripts in this folder share variables.
# shellcheck disable=SC2034,SC2153,SC2154

# Print the machine's metadata. None of it is secret. No value contains the separator.
vm_metadata() { # ZONE
  local secret secrets=''
  for secret in ${STATE[secrets]}; do
    secrets+="$secret=projects/$PROJECT/secrets/$(secret_name "$secret") "
  done
  printf '^;;^job-project=%s;;job-run=%s;;job-attempt=%s;;job-control=%s' \
    "$PROJECT" "$RUN" "${STATE[attempt]}" "$(run_folder)"
  printf ';;job-spec=%s;;job-output=%s;;job-image=%s' \
    "${STATE[spec]}" "${STATE[output]}" "${STATE[image]}"
  printf ';;job-secrets=%s;;job-max-seconds=%s' "${secrets% }" "$(remaining_seconds)"
  printf ';;job-container-flags=%s' "${STATE[container_flags]}"
  [[ ${STATE[self_delete]} != yes ]] || printf ';;job-delete=%s' "$(vm_delete_path "$1")"
}

vm_labels() {
  printf 'managed-by=job-infra,job-run=%s' "$NAME"
}

remaining_seconds() {
  local left=${STATE[max_run_seconds]}
  [[ -z ${STATE[started]:-} ]] || left=$((STATE[started] + left - $(now)))
  printf '%s' "$((left > 60 ? left : 60))"
}

current_zone() {
  local -a zones
  read -ra zones <<<"${STATE[zones]}"
  printf '%s' "${zones[STATE[zone_index] % ${#zones[@]}]}"
}

zones_count() {
  local -a zones
  read -ra zones <<<"${STATE[zones]}"
  printf '%s' "${#zones[@]}"
}

set_phase() { # PHASE
  STATE[phase]=$1
  write_state
}

# Take one step as the watcher, which must hold the lease. If the step fails, read the state again,
# because another script may have changed it, and retry.
watch_step() {
  local zone status=0
  if ((STATE[expires] - $(now) < LEASE_SECONDS / 2)) && ! write_state; then
    acquire_lease
    return
  fi
  zone=$(current_zone)
  case ${STATE[phase]} in
    create) step_create "$zone" ;;
    run) step_run "$zone" ;;
    retire) step_retire "$zone" ;;
    end) step_end "$zone" ;;
    *) fail "the state of $RUN has the unknown phase '${STATE[phase]}'; update this checkout" ;;
  esac || status=$?
  ((status != 0)) || return 0
  case $ERROR_KIND in
    denied | login) gcloud_fail "$RUN in $zone" ;;
    conflict | ok) ;;
    *) log "$RUN: $ERROR" ;;
  esac
  pause "$POLL_SECONDS"
  acquire_lease
}

# Read the marks in the bucket and set CODE: the exit code of the attempt, "cancel", or empty. A
# mark's name has the code. Host 0 decides for a slice, or any host that could not start the job
# (125 to 127) or whose job crashed (130 to 139).
CODE=''
read_marks() {
  local mark
  CODE=''
  if ! gcloud_read storage ls "$(run_folder)/marks/**"; then
    [[ $ERROR_KIND == missing ]]
    return
  fi
  for mark in $RESULT; do
    mark=${mark##*/marks/}
    case $mark in
      "cancel-${STATE[submission]}") CODE=cancel && return ;;
      "exit-${STATE[attempt]}-0-"*) CODE=${mark##*-} ;;
      "exit-${STATE[attempt]}-"*-12[5-7] | "exit-${STATE[attempt]}-"*-13[0-9]) CODE=${CODE:-${mark##*-}} ;;
    esac
  done
}

# Print the reason that the machine wrote with its exit code.
reason() { # CODE
  gcloud_read storage cat "$(run_folder)/marks/exit-${STATE[attempt]}-*-$1" && [[ -n $RESULT ]] \
    && printf ' (%s)' "${RESULT%%$'\n'*}"
  return 0
}

finish() { # OUTCOME CODE REASON
  log "$RUN: $3"
  STATE[outcome]=$1 STATE[exit]=$2 STATE[reason]=$3
  set_phase end
}

# Give up the current machine. The next one is created after a pause.
retire() { # REASON
  local failures=${STATE[failures]}
  log "$RUN: $1"
  STATE[reason]=$1
  if [[ -n ${STATE[was_active]} ]]; then
    failures=0 STATE[lost]=$((${STATE[lost]:-0} + 1))
    : "${STATE[started]:=${STATE[ordered]}}" # no watcher may have seen it up
  else
    failures=$((failures + 1))
  fi
  STATE[failures]=$failures STATE[not_before]=$(($(now) + $(backoff_seconds "$failures")))
  if ((${STATE[lost]:-0} >= STATE[max_attempts])); then
    finish failed 4 "gave up after ${STATE[max_attempts]} machines; last reason: $1"
    return
  fi
  set_phase retire
}

# Print the pause before the next machine: none within a round of zones, doubled after each round.
backoff_seconds() { # FAILURES IN A ROW
  local zones round
  zones=$(zones_count)
  if (($1 % zones)); then
    echo 0
    return
  fi
  round=$(($1 / zones))
  awk -v base="$BACKOFF_SECONDS" -v round="$round" \
    'BEGIN { pause = base * 2 ^ round; print int(pause < 900 ? pause : 900) }'
}

step_create() { # ZONE
  local wait
  read_marks || return
  if [[ $CODE == cancel ]]; then
    finish cancelled 75 "cancelled"
    return
  fi
  if [[ -n ${STATE[started]} ]] && is_past "$((STATE[started] + STATE[max_run_seconds]))"; then
    finish timeout 75 "stopped: reached the maximum run time of ${STATE[max_run_seconds]} s"
    return
  fi
  wait=$((STATE[not_before] - $(now)))
  if ((wait > 0)); then
    pause "$wait"
    return
  fi
  vm_list "$NAME" || return
  if [[ -n $RESULT ]]; then
    if [[ $RESULT == "$1 "* && $RESULT != *$'\n'* ]]; then
      STATE[ordered]=$(now) STATE[was_active]=''
      set_phase run
    else
      delete_strays "$RESULT"
    fi
    return
  fi
  STATE[ordered]=$(now) STATE[was_active]=''
  if vm_create "$1"; then
    log "$RUN: attempt ${STATE[attempt]} requested in $1"
    set_phase run
    return
  fi
  refused "$1"
}

# Go on after a refusal, ERROR and ERROR_KIND: again, in the next zone, or not at all.
refused() { # ZONE
  case $ERROR_KIND in
    capacity)
      STATE[no_quota]='' STATE[unclear]=0
      retire "no capacity in $1${ERROR:+ ($ERROR)}"
      ;;
    quota)
      STATE[no_quota]="${STATE[no_quota]:-} $1"
      if zones_have_quota; then
        retire "no quota in $1: $ERROR"
      else
        finish refused 3 "no quota in $1: $ERROR; request more of ${STATE[quota]}, or set a smaller MACHINE: a new project has 4 chips of v5e (v5e-4)"
      fi
      ;;
    busy)
      [[ ${STATE[phase]} != run ]] || { retire "the machine in $1 was not granted: $ERROR"; return; }
      log "$RUN: too many requests: $ERROR"
      pause "$POLL_SECONDS"
      ;;
    unclear)
      STATE[unclear]=$((${STATE[unclear]:-0} + 1))
      if ((STATE[unclear] >= 5)); then
        finish refused 3 "no clear response to 5 requests; the last in $1: $ERROR"
      elif [[ ${STATE[phase]} == run ]]; then
        retire "the machine in $1 was not granted: $ERROR"
      else
        log "$RUN: no clear response to the request in $1: $ERROR"
        write_state || return
        pause "$POLL_SECONDS"
      fi
      ;;
    *) finish refused 3 "the request in $1 was refused: $ERROR" ;;
  esac
}

# Return whether a zone is left that has not refused for lack of quota.
zones_have_quota() {
  local zone
  for zone in ${STATE[zones]}; do
    [[ " ${STATE[no_quota]} " == *" $zone "* ]] || return 0
  done
  return 1
}

# Delete machines of this run in the wrong place, which a killed watcher may leave behind.
delete_strays() { # LIST
  local zone rest
  while read -r zone rest; do
    log "$RUN: deleting an unneeded machine in $zone"
    vm_delete "$zone" || return
  done <<<"$1"
  pause "$POLL_SECONDS"
}

step_run() { # ZONE
  local seen='' problem=''
  read_marks || return
  if [[ -z $CODE ]]; then
    vm_describe "$1" || return
    seen=$VM problem=$VM_ERROR
    # A machine writes its mark before it deletes itself.
    [[ $seen != none ]] || read_marks || return
  fi
  case $CODE in
    cancel) finish cancelled 75 "cancelled" ;;
    0) finish "done" 0 "done; the results are in ${STATE[run_uri]}" ;;
    3 | 134 | 137 | 139) replace_bad_node "$1" ;;
    2 | 4) finish failed "$CODE" "the job failed with exit code $CODE$(reason "$CODE"); see infra/logs.sh $RUN" ;;
    124) # the exit code of `timeout`
      finish timeout 75 "stopped: reached the maximum run time"
      ;;
    '') follow_machine "$1" "$seen" "$problem" ;;
    *)
      STATE[was_active]=yes
      retire "the machine in $1 failed with exit code $CODE$(reason "$CODE")"
      ;;
  esac
}

# Exit code 3 may be the machine's fault: its TPU is busy or missing, or another host did not join. So
# may a crash, but one that repeats is the job's, such as running out of memory.
replace_bad_node() { # ZONE
  local what="the job found a wrong environment" outcome=3
  [[ $CODE == 3 ]] || what="the job crashed, perhaps out of memory," outcome=4
  what+=" with exit code $CODE$(reason "$CODE")"
  STATE[was_active]=yes STATE[bad_nodes]=$((${STATE[bad_nodes]:-0} + 1))
  if ((STATE[bad_nodes] > 2)); then
    finish failed "$outcome" "$what: the last of ${STATE[bad_nodes]} such machines, and another may not help; see infra/logs.sh $RUN"
  else
    retire "$what in $1"
  fi
}

follow_machine() { # ZONE STATE ERROR
  if [[ $2 == active && -z ${STATE[was_active]} ]]; then
    log "$RUN: the machine in $1 is up"
    : "${STATE[started]:=$(now)}"
    STATE[was_active]=yes STATE[active_since]=$(now) STATE[unclear]=0 STATE[no_quota]=''
    write_state || return
  fi
  if [[ -n ${STATE[started]:-} ]] && is_past "$((STATE[started] + STATE[max_run_seconds]))"; then
    finish timeout 75 "stopped: reached the maximum run time of ${STATE[max_run_seconds]} s"
    return
  fi
  case $2 in
    dead)
      if [[ -n $3 && -z ${STATE[was_active]} ]]; then
        ERROR=$3
        classify "$ERROR"
        # Google ends an order that was not granted in time, and calls that many things.
        (($(now) < STATE[ordered] + STATE[wait_seconds])) || ERROR_KIND=capacity
        refused "$1"
      else
        : "${STATE[started]:=${STATE[ordered]}}"
        retire "the machine in $1 was preempted or not granted${3:+ ($3)}"
      fi
      ;;
    active)
      if log_is_stalled; then
        retire "the machine in $1 is up, but its log has not grown for ${STATE[stall_seconds]} s"
      else
        pause "$POLL_SECONDS"
      fi
      ;;
    none)
      # A new machine may take a moment to appear.
      if [[ -n ${STATE[was_active]} ]] || is_past "${STATE[ordered]}"; then
        retire "the machine in $1 is gone"
      else
        pause "$POLL_SECONDS"
      fi
      ;;
    waiting)
      if is_past "$((STATE[ordered] + STATE[wait_seconds]))"; then
        ERROR_KIND=capacity ERROR="not within ${STATE[wait_seconds]} s"
        refused "$1"
      else
        pause "$POLL_SECONDS"
      fi
      ;;
    *) pause "$POLL_SECONDS" ;;
  esac
}

# Return whether the machine has been up, without a new line in its log, for longer than the job allows
# itself to be stalled (runtime.stall_minutes). A job that is well writes a line every half minute.
log_is_stalled() {
  local stall=${STATE[stall_seconds]:-} at
  [[ -n $stall ]] && is_past "$((${STATE[active_since]:-$(now)} + stall))" || return 1
  if gcloud_read storage objects describe "$(run_folder)/logs/${STATE[attempt]}-0.log" --format='value(update_time)'; then
    [[ -n $RESULT ]] && at=$(date -d "$RESULT" +%s) && is_past "$((at + stall))"
  else
    [[ $ERROR_KIND == missing ]]
  fi
}

# Return whether a time passed at least SETTLE_SECONDS ago. Changes take a moment to appear.
is_past() { # TIME
  awk -v now="$(now)" -v due="$1" -v settle="$SETTLE_SECONDS" 'BEGIN { exit now < due + settle }'
}

step_retire() { # ZONE
  delete_machine "$1" || return
  [[ $VM == none ]] || return 0
  STATE[attempt]=$((STATE[attempt] + 1)) STATE[zone_index]=$((STATE[zone_index] + 1))
  set_phase create
}

step_end() { # ZONE
  delete_machine "$1" || return
  [[ $VM == none ]] || return 0
  set_phase ended
}

# Delete the machine, or pause while it is being deleted. VM is none once it is gone.
DELETING=''
delete_machine() { # ZONE
  local what=$1/${STATE[attempt]}
  VM=unknown
  if [[ $DELETING == "$what" ]]; then
    vm_describe "$1" || return
    [[ $VM != none ]] || return 0
    [[ $VM == deleting ]] || DELETING=''
  elif vm_delete "$1"; then
    DELETING=$what
    if [[ $ERROR_KIND == missing ]]; then
      VM=none
      return
    fi
  else
    log "$RUN: cannot delete the machine in $1 yet: $ERROR"
    [[ $ERROR_KIND != denied && $ERROR_KIND != login ]] || return
  fi
  pause "$POLL_SECONDS"
}

pause() { # SECONDS
  sleep "$(awk -v seconds="$1" -v most="$POLL_SECONDS" 'BEGIN { print seconds < most ? seconds : most }')"
}

# Watch the run until it ends. Return the exit code of the outcome.
watch_to_end() {
  while [[ ${STATE[phase]} != ended ]]; do watch_step; done
  log "$RUN: ended, its machine is deleted: ${STATE[reason]}"
  return "${STATE[exit]}"
}
