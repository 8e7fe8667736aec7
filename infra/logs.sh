#!/usr/bin/env bash
# Print the log of a run's job. The machine uploads the log to the bucket every few seconds.
#
# Usage: infra/logs.sh RUN [--follow] [--attempt N] [--worker N] [--dry-run]
#
#   --follow    keep printing until the run ends, across replaced machines
#   --attempt   print the log of this attempt (machine); default: the latest
#   --worker    print the log of this host of a slice; default: 0

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"

# Print the part of an attempt's log that was not printed yet. "lines" leaves an incomplete last
# line for the next call, "all" prints it too.
shown=0
show_more() { # ATTEMPT all|lines
  if ! gcloud_read storage cat "$(run_folder)/logs/$1-$worker.log" "--range=$shown-"; then
    [[ $ERROR_KIND == missing || $ERROR == *416* || $ERROR == *ange* ]] || gcloud_fail "cannot read the log"
    return 0
  fi
  if [[ $2 == lines && $(tail -c 1 "$WORK/stdout" | wc -l) == 0 ]]; then
    sed -i '$d' "$WORK/stdout"
  fi
  cat "$WORK/stdout"
  shown=$((shown + $(stat -c %s "$WORK/stdout")))
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
        [[ ${2:-} =~ ^[0-9]+$ ]] || usage_error "logs.sh: $1 needs a number"
        if [[ $1 == --attempt ]]; then attempt=$2; else worker=$2; fi
        shift
        ;;
      *) rest+=("$1") ;;
    esac
    shift
  done
  parse_run logs.sh "${rest[@]}"
  if [[ -n $DRY_RUN ]]; then
    gcloud_read storage cat "$(run_folder)/logs/${attempt:-1}-$worker.log" || exit 0
  fi
  read_state || no_such_run
  if [[ -z $follow ]]; then
    show_more "${attempt:-${STATE[attempt]}}" all
    [[ $ERROR_KIND != missing ]] || usage_error "$RUN has no such log yet; see infra/status.sh $RUN"
    exit 0
  fi
  showing=${attempt:-${STATE[attempt]}}
  while [[ ${STATE[phase]} != ended ]]; do
    if [[ -z $attempt && ${STATE[attempt]} != "$showing" ]]; then
      show_more "$showing" all
      showing=${STATE[attempt]} shown=0
    fi
    show_more "$showing" lines
    sleep "$POLL_SECONDS"
    read_state || no_such_run
  done
  show_more "$showing" all
}

# Bash reads the full script before main starts, so a checkout can be updated while it runs.
main "$@"; exit
