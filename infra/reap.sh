#!/usr/bin/env bash
# Finds machines of this bucket's runs that are left over, by their label, in all zones and from
# both provisioners, and deletes them: those whose run has ended or is unknown, that are in another
# zone than their run is, or that are over their run's time without a watcher.
#
# Usage: infra/reap.sh [--all] [--dry-run]
#
#   --all       every machine that was ordered for this bucket, at work or not; the runs are
#               cancelled, so that no watcher orders another
#   --dry-run   prints what would be deleted

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"
# shellcheck source=watch.sh
source "$INFRA/watch.sh"

# Why a machine is left over, or nothing.
why_left() { # ZONE
  if [[ -n $all ]]; then
    echo "all are to go"
  elif ! read_state; then
    echo "its run is unknown"
  elif [[ ${STATE[phase]} == ended ]]; then
    echo "its run has ended (${STATE[outcome]})"
  elif ((STATE[expires] > $(now))); then
    return # its watcher sees to it
  elif [[ $(current_zone) != "$1" || $(machine_name "$RUN") != "$NAME" ]]; then
    echo "its run is elsewhere"
  elif [[ -n ${STATE[started]} ]] && is_over "$((STATE[started] + STATE[max_run_seconds]))"; then
    echo "it is over its maximum run time"
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
  dry=$DRY_RUN DRY_RUN='' # looking around changes nothing
  load_settings
  need_gcloud

  found=0 left=0
  for provisioner in queued gce; do
    use_provisioner "$provisioner"
    vm_list || stop_at "cannot list machines"
    machines=$ANSWER
    while read -r zone NAME state folder; do
      [[ -n $zone ]] || continue
      if [[ $folder != "$CONTROL/"* ]]; then
        say "$NAME in $zone ($state) belongs to ${folder:-nobody}, not to $CONTROL; left alone"
        continue
      fi
      RUN=${folder##*/} found=$((found + 1))
      why=$(why_left "$zone")
      if [[ -z $why ]]; then
        say "$NAME in $zone ($state) is at work for $RUN; watch it: infra/supervise.sh $RUN"
        continue
      fi
      say "$NAME in $zone ($state): $why"
      DRY_RUN=$dry
      if [[ -n $all ]] && read_state && [[ ${STATE[phase]} != ended ]]; then
        echo cancel >"$WORK/cancel"
        change storage cp "$WORK/cancel" "$(run_folder)/marks/cancel-${STATE[submission]}" \
          || stop_at "cannot cancel $RUN"
      fi
      vm_delete "$zone" || { say "$NAME could not be deleted: $PROBLEM" && left=$((left + 1)); }
      DRY_RUN=''
    done <<<"$machines"
  done
  say "$found found, $left could not be deleted"
  ((left == 0)) || exit 3
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
