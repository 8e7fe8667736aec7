#!/usr/bin/env bash
# Stop a run and delete its machine. The script returns once the machine is gone. The run's outputs
# stay in the bucket. Submit the same spec again to resume the run.
#
# Usage: infra/cancel.sh RUN [--dry-run]

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"
# shellcheck source=watch.sh
source "$INFRA/watch.sh"

main() {
  common_flags "${BASH_SOURCE[0]}" "$@"
  parse_run cancel.sh "${ARGUMENTS[@]}"
  echo cancel >"$WORK/cancel"
  if [[ -n $DRY_RUN ]]; then
    gcloud_write storage cp "$WORK/cancel" "$(run_folder)/marks/cancel-1"
    use_provisioner "$PROVISIONER"
    vm_delete "${ZONES%% *}"
    exit 0
  fi
  read_state || no_such_run
  if [[ ${STATE[phase]} == ended ]]; then
    log "$RUN has ended: ${STATE[reason]}"
    exit 0
  fi
  gcloud_write storage cp "$WORK/cancel" "$(run_folder)/marks/cancel-${STATE[submission]}" \
    || gcloud_fail "cannot cancel $RUN"
  log "$RUN: cancelling"
  trap 'release_lease; exit 130' INT TERM
  acquire_lease
  use_provisioner "${STATE[provisioner]}"
  watch_to_end || [[ ${STATE[outcome]} == cancelled ]]
}

# Bash reads the full script before main starts, so a checkout can be updated while it runs.
main "$@"; exit
