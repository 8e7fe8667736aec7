#!/usr/bin/env bash
# Download the results of a run with `job fetch`, which verifies every checksum.
#
# Usage: infra/fetch.sh RUN DIR [--dry-run]

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"

main() {
  common_flags "${BASH_SOURCE[0]}" "$@"
  ((${#ARGUMENTS[@]} == 2)) || usage_error "fetch.sh: expected a run and a folder; see infra/fetch.sh --help"
  folder=${ARGUMENTS[1]}
  parse_run fetch.sh "${ARGUMENTS[0]}"
  if [[ -n $DRY_RUN ]]; then
    printf '+ job fetch %q %q\n' "$OUTPUT/$RUN" "$folder"
    exit 0
  fi
  read_state || no_such_run
  if [[ ${STATE[phase]} != ended ]]; then
    log "$RUN has not ended (phase ${STATE[phase]}); fetching the complete files"
  fi
  job fetch "${STATE[run_uri]}" "$folder"
}

# Bash reads the full script before main starts, so a checkout can be updated while it runs.
main "$@"; exit
