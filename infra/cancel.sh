#!/usr/bin/env bash
# Stops a run and deletes its machine; returns when it is gone. What the run has kept stays in the
# bucket, and submitting the same spec again goes on from there.
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
  take_run cancel.sh "${ARGUMENTS[@]}"
  echo cancel >"$WORK/cancel"
  if [[ -n $DRY_RUN ]]; then
    change storage cp "$WORK/cancel" "$(run_folder)/marks/cancel-1"
    use_provisioner "$PROVISIONER"
    vm_delete "${ZONES%% *}"
    exit 0
  fi
  read_state || no_such_run
  if [[ ${STATE[phase]} == ended ]]; then
    say "$RUN has ended: ${STATE[reason]}"
    exit 0
  fi
  change storage cp "$WORK/cancel" "$(run_folder)/marks/cancel-${STATE[submission]}" \
    || stop_at "cannot cancel $RUN"
  say "$RUN: cancelling"
  trap 'let_go; exit 130' INT TERM
  take_over
  use_provisioner "${STATE[provisioner]}"
  watch_to_end || [[ ${STATE[outcome]} == cancelled ]]
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
