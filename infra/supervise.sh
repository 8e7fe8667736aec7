#!/usr/bin/env bash
# Watches a run to its end: replaces its machine when it is preempted, refused or lost (in the
# next zone, after a pause, a bounded number of times), and deletes it when the job is done, has
# failed, was cancelled or is over its maximum run time.
#
# Usage: infra/supervise.sh RUN [--dry-run]
#
# It can be run from anywhere, several times at once, and be killed at any moment: all it knows is
# in the bucket, one watcher acts at a time, and the next goes on where the last one stopped.
# Exit codes: 0 done, 2 there is no such run, 3 refused, 4 the job failed, 75 stopped early.

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"
# shellcheck source=watch.sh
source "$INFRA/watch.sh"

main() {
  common_flags "${BASH_SOURCE[0]}" "$@"
  take_run supervise.sh "${ARGUMENTS[@]}"
  if [[ -n $DRY_RUN ]]; then
    say "would watch $RUN by these commands, every $POLL_SECONDS s; the zone is that of its state"
    use_provisioner "$PROVISIONER"
    vm_delete "${ZONES%% *}"
    exit 0
  fi
  trap 'let_go; say "no longer watching; go on: infra/supervise.sh $RUN"; exit 130' INT TERM
  take_over
  use_provisioner "${STATE[provisioner]}"
  watch_to_end
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
