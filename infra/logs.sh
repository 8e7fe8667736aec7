#!/usr/bin/env bash
# Prints what a run's job has written, as its machine ships it to the bucket.
#
# Usage: infra/logs.sh RUN [--follow] [--attempt N] [--worker N] [--dry-run]
#
#   --follow    goes on until the run has ended, over all its machines
#   --attempt   the log of an earlier machine; by default the newest
#   --worker    the host of a slice, from 0

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"

main() {
  follow='' attempt='' worker=0 rest=()
  common_flags "${BASH_SOURCE[0]}" "$@"
  SHOW_READS=$DRY_RUN
  set -- "${ARGUMENTS[@]}"
  while (($#)); do
    case $1 in
      --follow) follow=yes ;;
      --attempt | --worker)
        [[ ${2:-} =~ ^[0-9]+$ ]] || misuse "logs.sh: $1 needs a number"
        if [[ $1 == --attempt ]]; then attempt=$2; else worker=$2; fi
        shift
        ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  take_run logs.sh "${rest[@]}"
  if [[ -n $DRY_RUN ]]; then
    ask storage cat "$(run_folder)/logs/${attempt:-1}-$worker.log" || exit 0
  fi
  read_state || no_such_run
  shown=0 showing=''
  while true; do
    current=${attempt:-${STATE[attempt]}}
    [[ $current == "$showing" ]] || { showing=$current shown=0; }
    if ask storage cat "$(run_folder)/logs/$current-$worker.log" "--range=$shown-"; then
      # The last line may be half written; it comes whole the next time.
      [[ -z $follow || ${STATE[phase]} == ended ]] || ANSWER=$(sed '$d' <<<"$ANSWER.")
      if [[ -n $ANSWER ]]; then
        printf '%s\n' "$ANSWER"
        shown=$((shown + $(printf '%s\n' "$ANSWER" | wc -c)))
      fi
    elif [[ $KIND != missing && $PROBLEM != *416* && $PROBLEM != *ange* ]]; then
      stop_at "cannot read the log"
    elif [[ -z $follow && $KIND == missing ]]; then
      misuse "there is no log of attempt $current yet; see infra/status.sh $RUN"
    fi
    if [[ -z $follow || ${STATE[phase]} == ended ]]; then break; fi
    sleep "$POLL_SECONDS"
    read_state || no_such_run
  done
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
