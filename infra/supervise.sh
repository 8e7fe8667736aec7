#!/usr/bin/env bash
# Watch a run until it ends. Replace its machine if it is preempted, refused or lost: in the next
# zone, after a pause, at most MAX_ATTEMPTS times. Delete the machine once the job is done, has
# failed, was cancelled, or has reached its maximum run time.
#
# Usage: infra/supervise.sh RUN [--dry-run]
#
# Run it anywhere, more than once at the same time, and kill it at any moment. All its state is in
# the bucket, one watcher acts at a time, and the next one resumes where it stopped.
# Exit codes: 0 done, 2 no such run, 3 request refused, 4 the job failed, 75 stopped early.

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"
# shellcheck source=watch.sh
source "$INFRA/watch.sh"

main() {
  common_flags "${BASH_SOURCE[0]}" "$@"
  parse_run supervise.sh "${ARGUMENTS[@]}"
  if [[ -n $DRY_RUN ]]; then
    log "would watch $RUN every $POLL_SECONDS s, and delete its machine at the end (in the zone of its state):"
    use_provisioner "$PROVISIONER"
    vm_delete "${ZONES%% *}"
    exit 0
  fi
  trap 'release_lease; log "stopped watching; to continue, run infra/supervise.sh $RUN"; exit 130' INT TERM
  acquire_lease
  use_provisioner "${STATE[provisioner]}"
  watch_to_end
}

# Bash reads the full script before main starts, so a checkout can be updated while it runs.
main "$@"; exit
