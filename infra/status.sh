#!/usr/bin/env bash
# Print the status of all runs, one line each, or of one run with its machine and last log line.
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
    gcloud_read storage cat "$CONTROL/*/state" || {
      [[ $ERROR_KIND == missing || -n $DRY_RUN ]] || gcloud_fail "cannot read $CONTROL"
      log "there are no runs in $CONTROL"
      exit 0
    }
    # The names in a state are sorted, and `zones` comes last.
    awk -F= '{ value = substr($0, length($1) + 2); now[$1] = value }
      $1 == "zones" {
        split(now["zones"], zones, " ")
        where = now["phase"] == "ended" ? now["outcome"] : now["phase"]
        printf "%-40s %-10s attempt %-3d %s\n", now["run"], where, now["attempt"], now["reason"]
        delete now
      }' <<<"$RESULT"
    exit 0
  fi
  parse_run status.sh "$@"
  read_state || { [[ -n $DRY_RUN ]] && exit 0; no_such_run; }
  use_provisioner "${STATE[provisioner]}"
  zone=$(current_zone)
  vm_describe "$zone" || gcloud_fail "cannot read the machine's state"
  printf '%s\n' "run       ${STATE[run_uri]}" "phase     ${STATE[phase]}${STATE[outcome]:+ (${STATE[outcome]})}" \
    "machine   ${STATE[machine]} in $zone: $VM" "attempt   ${STATE[attempt]}" "reason    ${STATE[reason]:-}"
  if [[ -n ${STATE[started]} ]]; then
    printf 'running   %s s of %s s at most\n' "$(($(now) - STATE[started]))" "${STATE[max_run_seconds]}"
  fi
  if [[ ${STATE[phase]} != ended ]]; then
    if ((STATE[expires] > $(now))); then
      printf 'watcher   %s\n' "${STATE[owner]}"
    else
      printf 'watcher   none; to start one, run infra/supervise.sh %s\n' "$RUN"
    fi
  fi
  if gcloud_read storage cat "$(run_folder)/logs/${STATE[attempt]}-0.log" --range=-4000; then
    printf 'last log  %s\n' "$(tail -n 1 <<<"$RESULT")"
  fi
}

# Bash reads the full script before main starts, so a checkout can be updated while it runs.
main "$@"; exit
