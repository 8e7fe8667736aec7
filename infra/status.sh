#!/usr/bin/env bash
# Says where runs are: all of them in a line each, or one with its machine and its last log line.
#
# Usage: infra/status.sh [RUN] [--dry-run]

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"
# shellcheck source=watch.sh
source "$INFRA/watch.sh"

main() {
  common_flags "${BASH_SOURCE[0]}" "$@"
  SHOW_READS=$DRY_RUN
  set -- "${ARGUMENTS[@]}"
  if (($# == 0)); then
    load_settings
    need_gcloud
    ask storage cat "$CONTROL/*/state" || {
      [[ $KIND == missing || -n $DRY_RUN ]] || stop_at "cannot read $CONTROL"
      say "there are no runs in $CONTROL"
      exit 0
    }
    # A state's names are in alphabetical order, and `zones` is the last.
    awk -F= '{ value = substr($0, length($1) + 2); now[$1] = value }
      $1 == "zones" {
        split(now["zones"], zones, " ")
        where = now["phase"] == "ended" ? now["outcome"] : now["phase"]
        printf "%-40s %-10s attempt %-3d %s\n", now["run"], where, now["attempt"], now["reason"]
        delete now
      }' <<<"$ANSWER"
    exit 0
  fi
  take_run status.sh "$@"
  read_state || { [[ -n $DRY_RUN ]] && exit 0; no_such_run; }
  use_provisioner "${STATE[provisioner]}"
  zone=$(current_zone)
  vm_look "$zone" || stop_at "cannot look at the machine"
  printf '%s\n' "run       ${STATE[run_uri]}" "phase     ${STATE[phase]}${STATE[outcome]:+ (${STATE[outcome]})}" \
    "machine   ${STATE[machine]} in $zone: $VM" "attempt   ${STATE[attempt]}" "reason    ${STATE[reason]:-}"
  if [[ -n ${STATE[started]} ]]; then
    printf 'running   %s s of at most %s s\n' "$(($(now) - STATE[started]))" "${STATE[max_run_seconds]}"
  fi
  if [[ ${STATE[phase]} != ended ]]; then
    if ((STATE[expires] > $(now))); then
      printf 'watcher   %s\n' "${STATE[owner]}"
    else
      printf 'watcher   none; start one: infra/supervise.sh %s\n' "$RUN"
    fi
  fi
  if ask storage cat "$(run_folder)/logs/${STATE[attempt]}-0.log" --range=-4000; then
    printf 'last log  %s\n' "$(tail -n 1 <<<"$ANSWER")"
  fi
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
