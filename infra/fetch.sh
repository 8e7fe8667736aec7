#!/usr/bin/env bash
# Downloads the results of a run and checks every checksum, with `job fetch`.
#
# Usage: infra/fetch.sh RUN DIR [--dry-run]

# shellcheck source=lib.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/lib.sh"
# shellcheck source=state.sh
source "$INFRA/state.sh"

main() {
  common_flags "${BASH_SOURCE[0]}" "$@"
  ((${#ARGUMENTS[@]} == 2)) || misuse "fetch.sh: name a run and a folder; see infra/fetch.sh --help"
  folder=${ARGUMENTS[1]}
  take_run fetch.sh "${ARGUMENTS[0]}"
  if [[ -n $DRY_RUN ]]; then
    printf '+ job fetch %q %q\n' "$OUTPUT/$RUN" "$folder"
    exit 0
  fi
  read_state || no_such_run
  if [[ ${STATE[phase]} != ended ]]; then
    say "$RUN has not ended (${STATE[phase]}); what is whole is fetched"
  fi
  job fetch "${STATE[run_uri]}" "$folder"
}

# The whole script is read before it begins, so that an update of this folder does not disturb it.
main "$@"; exit
