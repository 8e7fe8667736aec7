#!/usr/bin/env bash
# Delete leftover machines of this bucket's runs, in all zones and for both provisioners. Machines
# are matched by label. A machine is leftover if its run has ended or is unknown, if its run has
# moved to another zone, or if it is past the maximum run time and has no watcher. If no watcher has
# seen the machine start, that time is counted from the end of the time to wait for capacity.
#
# Usage: infra/reap.sh [--all] [--dry-run]
#
#   --all       delete every machine created for this bucket, busy or not, and cancel the runs,
#               so no watcher creates another machine
#   --dry-run   print what would be deleted

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"
# shellcheck source=watch.sh
source "$INFRA/watch.sh"

# Print why a machine is leftover, or nothing if it is not.
leftover_reason() { # ZONE
  local started
  if [[ -n $all ]]; then
    echo "deleting all machines"
  elif ! read_state; then
    echo "its run is unknown"
  elif [[ ${STATE[phase]} == ended ]]; then
    echo "its run has ended (${STATE[outcome]})"
  elif ((STATE[expires] > $(now))); then
    return # it has a watcher
  elif [[ $(current_zone) != "$1" || $(machine_name "$RUN") != "$NAME" ]]; then
    echo "its run is in another zone"
  else
    started=${STATE[started]:-$((STATE[ordered] + STATE[wait_seconds]))}
    ! is_past "$((started + STATE[max_run_seconds]))" || echo "it is past the maximum run time"
  fi
}

main() {
  all='' dry=''
  common_flags "${BASH_SOURCE[0]}" "$@"
  set -- "${ARGUMENTS[@]}"
  while (($#)); do
    case $1 in
      --all) all=yes ;;
      *) refuse_flag reap.sh "$1" ;;
    esac
    shift
  done
  dry=$DRY_RUN DRY_RUN='' # a dry run still lists machines
  load_settings
  need_gcloud

  matched=0 failed=0
  for provisioner in queued gce; do
    use_provisioner "$provisioner"
    vm_list || gcloud_fail "cannot list machines"
    machines=$RESULT
    while read -r zone NAME state folder; do
      [[ -n $zone ]] || continue
      if [[ $folder != "$CONTROL/"* ]]; then
        log "$NAME in $zone ($state) belongs to ${folder:-no run}, not to $CONTROL; not deleted"
        continue
      fi
      RUN=${folder##*/} matched=$((matched + 1))
      why=$(leftover_reason "$zone")
      if [[ -z $why ]]; then
        log "$NAME in $zone ($state) is in use by $RUN; to watch it, run infra/supervise.sh $RUN"
        continue
      fi
      log "$NAME in $zone ($state): $why"
      DRY_RUN=$dry
      if [[ -n $all ]] && read_state && [[ ${STATE[phase]} != ended ]]; then
        echo cancel >"$WORK/cancel"
        gcloud_write storage cp "$WORK/cancel" "$(run_folder)/marks/cancel-${STATE[submission]}" \
          || gcloud_fail "cannot cancel $RUN"
      fi
      vm_delete "$zone" || { log "cannot delete $NAME: $ERROR" && failed=$((failed + 1)); }
      DRY_RUN=''
    done <<<"$machines"
  done
  log "$matched machines of $CONTROL, $failed failed to delete"
  ((failed == 0)) || exit 3
}

# Bash reads the full script before main starts, so a checkout can be updated while it runs.
main "$@"; exit
