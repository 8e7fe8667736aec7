#!/usr/bin/env bash
# The life of a run's machine: order, run, replace when it is lost, delete. To be sourced after
# state.sh. Every step is written to the state before it is taken, so that a watcher may be killed
# at any point and the next one goes on from there.
#
# Phases:  create -> run -> retire -> create ...      another machine, in the next zone
#                    run -> end -> ended              the machine is deleted first
# A machine is ordered only while none of the run's machines exists in any zone.

# Variables are shared by the files of this folder.
# shellcheck disable=SC2034,SC2153,SC2154

# What is put on the machine; none of it is secret. The separator is one that no value has.
vm_metadata() { # ZONE
  local secret secrets=''
  for secret in ${STATE[secrets]}; do
    secrets+="$secret=projects/$PROJECT/secrets/$(secret_name "$secret") "
  done
  printf '^;;^job-run=%s;;job-attempt=%s;;job-control=%s' "$RUN" "${STATE[attempt]}" "$(run_folder)"
  printf ';;job-spec=%s;;job-output=%s;;job-image=%s' \
    "${STATE[spec]}" "${STATE[output]}" "${STATE[image]}"
  printf ';;job-secrets=%s;;job-max-seconds=%s' "${secrets% }" "$(remaining_seconds)"
  printf ';;job-container-flags=%s' "${STATE[container_flags]}"
  [[ ${STATE[self_delete]} != yes ]] || printf ';;job-delete=%s' "$(vm_path "$1")"
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

# Becomes the run's one watcher, or waits until the run has ended under another's eyes.
take_over() {
  local told=''
  until read_state && is_free && write_state; do
    [[ -n ${STATE[phase]:-} ]] || no_such_run
    [[ ${STATE[phase]} != ended ]] || return 0
    [[ -n $told ]] || say "$RUN is watched by ${STATE[owner]}; standing by"
    told=yes
    sleep "$POLL_SECONDS"
  done
}

is_free() {
  [[ ${STATE[phase]} != ended ]] \
    && { [[ -z ${STATE[owner]:-} || ${STATE[owner]} == "$ME" ]] || ((STATE[expires] < $(now))); }
}

# Gives the run back, so that the next watcher need not wait.
let_go() {
  [[ ${STATE[owner]:-} == "$ME" && ${STATE[phase]} != ended ]] || return 0
  LEASE_SECONDS=-1 write_state || true
}

enter() { # PHASE
  STATE[phase]=$1
  write_state
}

# One step of the watcher; the state is this script's when it begins. Where a step fails, the
# state is read again, for another script may have changed it, and the step comes again.
watch_step() {
  local zone status=0
  if ((STATE[expires] - $(now) < LEASE_SECONDS / 2)) && ! write_state; then
    take_over
    return
  fi
  zone=$(current_zone)
  case ${STATE[phase]} in
    create) step_create "$zone" ;;
    run) step_run "$zone" ;;
    retire) step_retire "$zone" ;;
    end) step_end "$zone" ;;
    *) fail "the state of $RUN has the phase '${STATE[phase]}', which this version does not know" ;;
  esac || status=$?
  ((status != 0)) || return 0
  case $KIND in
    denied | login) stop_at "$RUN in $zone" ;;
    conflict | ok) ;;
    *) say "$RUN: $PROBLEM" ;;
  esac
  pause "$POLL_SECONDS"
  take_over
}

# What has been left for the watcher, in CODE: the exit code of the attempt, "cancel", or nothing.
# The code is part of a mark's name. A machine of a slice that could not even start the job (125)
# speaks for all; otherwise the first one does.
CODE=''
read_marks() {
  local mark
  CODE=''
  if ! ask storage ls "$(run_folder)/marks/**"; then
    [[ $KIND == missing ]]
    return
  fi
  for mark in $ANSWER; do
    mark=${mark##*/marks/}
    case $mark in
      "cancel-${STATE[submission]}") CODE=cancel && return ;;
      "exit-${STATE[attempt]}-0-"*) CODE=${mark##*-} ;;
      "exit-${STATE[attempt]}-"*-125) CODE=${CODE:-125} ;;
    esac
  done
}

# The words that a machine left with its exit code.
reason() { # CODE
  ask storage cat "$(run_folder)/marks/exit-${STATE[attempt]}-*-$1" && [[ -n $ANSWER ]] \
    && printf ' (%s)' "${ANSWER%%$'\n'*}"
  return 0
}

finish() { # OUTCOME CODE REASON
  say "$RUN: $3"
  STATE[outcome]=$1 STATE[exit]=$2 STATE[reason]=$3
  enter end
}

# Gives the machine up; the next one is ordered after a pause.
retire() { # REASON
  local failures=${STATE[failures]}
  say "$RUN: $1"
  STATE[reason]=$1
  if [[ -n ${STATE[was_active]} ]]; then
    failures=0
  else
    failures=$((failures + 1))
  fi
  STATE[failures]=$failures STATE[not_before]=$(($(now) + $(pause_after "$failures")))
  if ((STATE[attempt] - STATE[first_attempt] + 1 >= STATE[max_attempts])); then
    finish failed 4 "given up after ${STATE[max_attempts]} machines; the last: $1"
    return
  fi
  enter retire
}

# No pause before a zone that was not tried yet; after a round of them, twice as long each time.
pause_after() { # FAILURES IN A ROW
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
  if [[ -n ${STATE[started]} ]] && is_over "$((STATE[started] + STATE[max_run_seconds]))"; then
    finish timeout 75 "stopped: it is over its maximum run time of ${STATE[max_run_seconds]} s"
    return
  fi
  wait=$((STATE[not_before] - $(now)))
  if ((wait > 0)); then
    pause "$wait"
    return
  fi
  vm_list "$NAME" || return
  if [[ -n $ANSWER ]]; then
    if [[ $ANSWER == "$1 "* && $ANSWER != *$'\n'* ]]; then
      STATE[ordered]=$(now) STATE[was_active]=''
      enter run
    else
      delete_strays "$ANSWER"
    fi
    return
  fi
  STATE[ordered]=$(now) STATE[was_active]=''
  if vm_create "$1"; then
    say "$RUN: attempt ${STATE[attempt]} ordered in $1"
    enter run
    return
  fi
  case $KIND in
    capacity) retire "no capacity in $1" ;;
    quota)
      finish refused 3 "no quota in $1: $PROBLEM; ask for more of ${STATE[quota]}, or take $1 out of ZONES"
      ;;
    unclear)
      say "$RUN: the order in $1 was not answered: $PROBLEM"
      pause "$POLL_SECONDS"
      ;;
    *) finish refused 3 "the order in $1 was refused: $PROBLEM" ;;
  esac
}

# Machines of this run where none may be: left by a watcher that was stopped in between.
delete_strays() { # LIST
  local zone rest
  while read -r zone rest; do
    say "$RUN: deleting a machine in $zone that is not needed"
    vm_delete "$zone" || return
  done <<<"$1"
  pause "$POLL_SECONDS"
}

step_run() { # ZONE
  local seen='' problem=''
  read_marks || return
  if [[ -z $CODE ]]; then
    vm_look "$1" || return
    seen=$VM problem=$VM_PROBLEM
    # A machine that has deleted itself left its mark before that.
    [[ $seen != none ]] || read_marks || return
  fi
  case $CODE in
    cancel) finish cancelled 75 "cancelled" ;;
    0) finish "done" 0 "done; the results are in ${STATE[run_uri]}" ;;
    2 | 3 | 4) finish failed "$CODE" "the job failed with exit code $CODE$(reason "$CODE"); see infra/logs.sh $RUN" ;;
    124) # as `timeout` has it
      finish timeout 75 "stopped: it was over its maximum run time"
      ;;
    '') follow_machine "$1" "$seen" "$problem" ;;
    *) retire "the machine in $1 gave up with exit code $CODE$(reason "$CODE")" ;;
  esac
}

follow_machine() { # ZONE STATE PROBLEM
  if [[ $2 == active && -z ${STATE[was_active]} ]]; then
    say "$RUN: the machine in $1 is up"
    : "${STATE[started]:=$(now)}"
    STATE[was_active]=yes
    write_state || return
  fi
  if [[ -n ${STATE[started]:-} ]] && is_over "$((STATE[started] + STATE[max_run_seconds]))"; then
    finish timeout 75 "stopped: it is over its maximum run time of ${STATE[max_run_seconds]} s"
    return
  fi
  case $2 in
    dead)
      if [[ ${3,,} == *quota* ]]; then
        finish refused 3 "no quota in $1: $3; ask for more of ${STATE[quota]}, or take $1 out of ZONES"
      else
        retire "the machine in $1 was preempted or not granted${3:+ ($3)}"
      fi
      ;;
    none)
      # A new order may take a moment to show.
      if [[ -n ${STATE[was_active]} ]] || is_over "${STATE[ordered]}"; then
        retire "the machine in $1 is gone"
      else
        pause "$POLL_SECONDS"
      fi
      ;;
    waiting)
      if is_over "$((STATE[ordered] + STATE[wait_seconds]))"; then
        retire "no capacity in $1 within ${STATE[wait_seconds]} s"
      else
        pause "$POLL_SECONDS"
      fi
      ;;
    *) pause "$POLL_SECONDS" ;;
  esac
}

# Whether a time has passed, and SETTLE_SECONDS more for what takes a moment to show.
is_over() { # TIME
  awk -v now="$(now)" -v due="$1" -v settle="$SETTLE_SECONDS" 'BEGIN { exit now < due + settle }'
}

step_retire() { # ZONE
  clear_machines "$1" || return
  [[ $VM == none ]] || return 0
  STATE[attempt]=$((STATE[attempt] + 1)) STATE[zone_index]=$((STATE[zone_index] + 1))
  enter create
}

step_end() { # ZONE
  clear_machines "$1" || return
  [[ $VM == none ]] || return 0
  enter ended
}

# Deletes the machine, and pauses while it is there; VM is none once it is gone.
CLEARING=''
clear_machines() { # ZONE
  local what=$1/${STATE[attempt]}
  VM=unknown
  if [[ $CLEARING == "$what" ]]; then
    vm_look "$1" || return
    [[ $VM != none ]] || return 0
    [[ $VM == deleting ]] || CLEARING=''
  elif vm_delete "$1"; then
    CLEARING=$what
    if [[ $KIND == missing ]]; then
      VM=none
      return
    fi
  else
    say "$RUN: the machine in $1 could not be deleted yet: $PROBLEM"
    [[ $KIND != denied && $KIND != login ]] || return
  fi
  pause "$POLL_SECONDS"
}

pause() { # SECONDS
  sleep "$(awk -v wanted="$1" -v most="$POLL_SECONDS" 'BEGIN { print wanted < most ? wanted : most }')"
}

# Watches to the end; the exit code says how it ended.
watch_to_end() {
  while [[ ${STATE[phase]} != ended ]]; do watch_step; done
  say "$RUN: ended, no machine is left: ${STATE[reason]}"
  return "${STATE[exit]}"
}
