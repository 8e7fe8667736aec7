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

# Prints what an attempt's log has beyond what was shown. A last line that is half written comes
# the next time, unless all there is was asked for.
shown=0
show_more() { # ATTEMPT whole|lines
  if ! ask storage cat "$(run_folder)/logs/$1-$worker.log" "--range=$shown-"; then
    [[ $KIND == missing || $PROBLEM == *416* || $PROBLEM == *ange* ]] || stop_at "cannot read the log"
    return 0
  fi
  if [[ $2 == lines && $(tail -c 1 "$WORK/answer" | wc -l) == 0 ]]; then
    sed -i '$d' "$WORK/answer"
  fi
  cat "$WORK/answer"
  shown=$((shown + $(stat -c %s "$WORK/answer")))
}

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
  if [[ -z $follow ]]; then
    show_more "${attempt:-${STATE[attempt]}}" whole
    [[ $KIND != missing ]] || misuse "there is no such log of $RUN yet; see infra/status.sh $RUN"
    exit 0
  fi
  showing=${attempt:-${STATE[attempt]}}
  while [[ ${STATE[phase]} != ended ]]; do
    if [[ -z $attempt && ${STATE[attempt]} != "$showing" ]]; then
      show_more "$showing" whole
      showing=${STATE[attempt]} shown=0
    fi
    show_more "$showing" lines
    sleep "$POLL_SECONDS"
    read_state || no_such_run
  done
  show_more "$showing" whole
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
